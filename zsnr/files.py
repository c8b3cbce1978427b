"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zsnr.locks import Lock, remove_leftovers, unfinished


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it takes `path`'s place, else it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unfinished(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it takes the name `path`, else it goes.

    Raises:
        ValueError: There is something of that name, before or after.
        OSError: It cannot be written, or another process writes it.
    """
    with _new(path), replacing(path) as beside:
        yield beside
        check_new(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder beside `path` to fill; on success it takes the name `path`, else it goes.

    Raises:
        ValueError: There is something of that name, before or after.
        OSError: It cannot be made, or another process writes it.
    """
    with _new(path):
        beside = unfinished(path)
        try:
            beside.mkdir()
            yield beside
            check_new(path)
            os.rename(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _new(path: Path) -> Iterator[None]:
    check_new(path)
    with Lock(path.with_name(f".{path.name}.lock"), path):
        remove_leftovers(path.parent, path.name)
        yield


def check_temporary() -> None:
    """Refuse a machine without a folder for temporary files, which libraries need to be imported.

    Raises:
        OSError: There is none.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise OSError(
            "There is no folder for temporary files: neither TMPDIR nor /tmp can be written. Set "
            "TMPDIR to a folder that can."
        ) from error


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
