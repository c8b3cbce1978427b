"""`zsnr data openmoji`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def data_openmoji(
    folder: str | Path, *, size: int = 64, glyphs: Literal["demo", "all"] = "all"
) -> None:
    """Write a small dataset: shards of OpenMoji images with captions.

    The images are glyphs on plain backgrounds, with captions such as 'grinning face on a black
    background', split into train and val.

    Args:
        folder: Folder to write, which must be empty or not exist.
        size: Height and width of the images, in pixels.
        glyphs: The few glyphs of the quickstart, or all of them.
    """
    from zsnr.data.openmoji import write_openmoji_shards

    write_openmoji_shards(folder, size=size, glyphs=glyphs)
