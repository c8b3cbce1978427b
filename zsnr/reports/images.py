"""Images as tensors and grids, and matplotlib figures of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsnr.data.images import to_unit_range
from zsnr.files import replacing
from zsnr.untrusted import printable

if TYPE_CHECKING:
    from PIL.Image import Image

_DPI = 110


def image_pixels(images: Sequence[Image]) -> Tensor:
    """Stack RGB images of one size: (B, 3, H, W), float32 in [-1, 1]."""
    import numpy as np

    levels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return to_unit_range(levels.permute(0, 3, 1, 2))


def image_grid(images: Sequence[Image], columns: int, gap: int = 2) -> Image:
    """Place images of any sizes in rows of `columns`, on white.

    Raises:
        ValueError: `images` is empty.
    """
    from PIL import Image as PILImage

    if not images:
        raise ValueError("There are no images to place in a grid.")
    width = max(image.width for image in images) + gap
    height = max(image.height for image in images) + gap
    rows = -(-len(images) // columns)
    grid = PILImage.new(
        "RGB", (min(columns, len(images)) * width - gap, rows * height - gap), "white"
    )
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def stacked_axes(
    width: float, height: float, rows: int = 1, sharex: bool = True
) -> tuple[Any, Any]:
    """Make a figure of a size in inches, and its axes, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=sharex)


def panel_figure(
    images: Sequence[Sequence[Image]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    inner: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> Any:
    """Make a figure of images in rows and columns, with labels beside and above them.

    Args:
        images: One list per row.
        rows: One label per row.
        columns: One label per column.
        title: Above all.
        inner: If each image is a grid, the labels of its rows and of its columns.
    """
    from textwrap import fill

    from matplotlib.figure import Figure

    inner_rows, inner_columns = inner
    side = min(3.0, 12 / len(columns))
    shape = max(image.height / image.width for row in images for image in row)
    row_labels, inner_labels = (
        ["\n".join(fill(line, 22) for line in label.split("\n")) for label in group]
        for group in (rows, inner_rows)
    )
    beside = 1.2 + (1.7 if inner_rows else 0.0)
    figure = Figure(
        figsize=(side * len(columns) + beside, side * shape * len(rows) + 0.9), layout="constrained"
    )
    figure.suptitle(printable(title), fontsize=10, parse_math=False)  # a prompt may hold $
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    text = {"fontsize": 9, "parse_math": False}
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            axis = axes[i, j]
            axis.imshow(image, interpolation="nearest" if image.width < 256 else "antialiased")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("0.8")
            if inner_columns:
                _label_inside(axis, image.width, inner_columns, "x")
            if inner_rows and j == 0:
                _label_inside(axis, image.height, inner_labels, "y")
            if i == 0:
                axis.set_title(printable(columns[j]), **text)
            if j == 0:
                axis.set_ylabel(
                    printable(row_labels[i]), rotation=0, ha="right", va="center", **text
                )
    return figure


def _label_inside(axis: Any, length: int, labels: Sequence[str], which: str) -> None:
    """Label the rows (y) or the columns (x) of a grid that an axis shows."""
    ticks = [(i + 0.5) * length / len(labels) - 0.5 for i in range(len(labels))]
    names = [printable(label) for label in labels]
    getattr(axis, f"set_{which}ticks")(ticks, names, fontsize=7, parse_math=False)
    axis.tick_params(axis=which, length=0)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=_DPI)


def figure_image(figure: Any) -> Image:
    """Render a figure as an image."""
    from PIL import Image as PILImage

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    return PILImage.open(drawn).convert("RGB")
