"""`zsnr checkpoint consolidate`."""

from __future__ import annotations

from pathlib import Path


def checkpoint_consolidate(folder: str | Path, *, output: str | Path) -> Path:
    """Make one file of a sharded checkpoint.

    The file holds weights, averaged weights and optimizer state, as a run on one device would have
    written them. fit, validate and predict read both forms.

    Args:
        folder: The checkpoint, such as checkpoints/last.ckpt.
        output: File to write, which must not exist.
    """
    from zsnr.checkpoints.sharded import consolidate, is_sharded, save_file
    from zsnr.files import check_new

    source, path = Path(folder).expanduser(), Path(output).expanduser()
    if not is_sharded(source):
        what = "a file already" if source.is_file() else "not a sharded checkpoint"
        raise ValueError(f"{source} is {what}: wanted a folder that training wrote in shards.")
    check_new(path)
    save_file(consolidate(source), path)
    return path
