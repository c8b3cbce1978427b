"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it takes `path`'s place, else it goes."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        if error.filename is None:  # Pillow and torch do not say which file a full disk cut
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside `path` to fill; on success it takes the name `path`, else it goes.

    Raises:
        ValueError: There is something of that name, before or after.
        OSError: It cannot be made.
    """
    check_new(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        yield beside
        check_new(path)
        os.rename(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_new(path: Path) -> None:
    """Refuse a path that exists, or where nothing can be written.

    Raises:
        ValueError: It is so.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path} exists: choose another name, or remove it.")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ValueError(f"{path} cannot be written: {above} is no folder to write to.")
