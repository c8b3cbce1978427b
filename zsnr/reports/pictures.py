"""Grids of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


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
