"""Grids of pictures, and figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsnr.data.images import to_unit_range
from zsnr.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

_DPI = 110


def picture_pixels(images: Sequence[Image]) -> Tensor:
    """Stack RGB pictures of one size: (B, 3, H, W), float32 in [-1, 1]."""
    import numpy as np

    levels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return to_unit_range(levels.permute(0, 3, 1, 2))


def picture_grid(images: Sequence[Image], columns: int, gap: int = 2) -> Image:
    """Put pictures of any sizes into rows of `columns`, on white."""
    from PIL import Image as PILImage

    if not images:
        raise ValueError("There are no pictures to put into a grid.")
    width = max(image.width for image in images) + gap
    height = max(image.height for image in images) + gap
    rows = -(-len(images) // columns)
    grid = PILImage.new(
        "RGB", (min(columns, len(images)) * width - gap, rows * height - gap), "white"
    )
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def figure_of(width: float, height: float, rows: int = 1, sharex: bool = True) -> tuple[Any, Any]:
    """Make a figure of so many inches, and its axes, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=sharex)


def panel_figure(
    images: Sequence[Sequence[Image]], rows: Sequence[str], columns: Sequence[str], title: str
) -> Any:
    """Make a figure of pictures in rows and columns, with labels beside and above them.

    Args:
        images: One list a row.
        rows: A label a row.
        columns: A label a column.
        title: Above all.
    """
    from textwrap import fill

    from matplotlib.figure import Figure

    side = min(3.0, 12 / len(columns))
    shape = max(image.height / image.width for row in images for image in row)
    figure = Figure(
        figsize=(side * len(columns) + 1.2, side * shape * len(rows) + 0.9), layout="constrained"
    )
    figure.suptitle(title, fontsize=10, parse_math=False)  # a prompt may hold $
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            axis = axes[i, j]
            axis.imshow(image, interpolation="nearest" if image.width < 256 else "antialiased")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("0.8")
            if i == 0:
                axis.set_title(columns[j], fontsize=9, parse_math=False)
            if j == 0:
                label = "\n".join(fill(line, 22) for line in rows[i].split("\n"))
                axis.set_ylabel(
                    label, rotation=0, ha="right", va="center", fontsize=9, parse_math=False
                )
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=_DPI)


def figure_image(figure: Any) -> Image:
    """Draw a figure as a picture."""
    from PIL import Image as PILImage

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    return PILImage.open(drawn).convert("RGB")
