"""Which step counts are examined, and which files belong to a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from zsnr.interop.declared import (
    Declared,
)

NUM_STEPS = (10, 20, 25, 30, 50)


def step_counts(T: int, extra: Iterable[int], declared: Declared | None) -> list[int]:
    """Return the step counts to examine: the usual and the extra ones that the grid supports."""
    limit = T
    if declared is not None and declared.scheduler.grid == "distilled":
        limit = declared.original_inference_steps
    counts = sorted({S for S in (*NUM_STEPS, *extra) if limit >= S})
    if declared is not None and declared.scheduler.grid == "repeated":
        counts = [S for S in counts if S >= 4 or declared.skip_prk_steps]
    return counts or [max(1, limit // 2)]


def check_inside(file: Path, folder: Path) -> None:
    """Check that a file is in the folder, or in the blob store of the folder's hub cache.

    Raises:
        ValueError: The file is a link to another place.
    """
    real, home = file.resolve(), folder.resolve()
    snapshots = (above.parent / "blobs" for above in home.parents if above.name == "snapshots")
    if not any(real.is_relative_to(place) for place in (home, *snapshots)):
        raise ValueError(f"{file} is a link out of {folder}: wanted a file inside the folder.")
