"""Atomic writing of files: a crash leaves the old file or the new one, never a partial one."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zsnr.locks import Lock, remove_leftovers, unfinished

_WARNED: set[str] = set()  # side files that have failed before


@contextmanager
def side_file(path: str | Path) -> Iterator[None]:
    """Write an optional file: a failure causes one warning per path, and the run continues.

    Every exception is caught, because other ranks do not wait for the file, and libraries that
    write it raise their own errors.

    Args:
        path: The file, for the message.
    """
    name = str(path)
    try:
        yield
    except Exception as error:
        if name not in _WARNED:
            _WARNED.add(name)
            reason = " ".join(str(error).split()) or type(error).__name__
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            warnings.warn(
                f"{name} cannot be written, and the run continues without it: {kind}{reason}",
                stacklevel=3,
            )


def path_metavar(description: str) -> str:
    """Return what stands for a path in help: FOLDER or FILE, as its description begins, or PATH."""
    noun = re.match(
        r"(?:the |new |yaml |new \S+ )?(folder|file)\b(?! or folder)", description, re.I
    )
    return noun[1].upper() if noun else "PATH"


class HeldFolder:
    """An output folder that must not be moved or replaced while it is written to.

    A descriptor is held open, so that no other folder can get the same inode.

    Args:
        path: The folder; it is created if it does not exist.

    Raises:
        OSError: The folder cannot be created or opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def check(self) -> None:
        """Check that the path still leads to the folder.

        Raises:
            OSError: The folder was deleted, moved or replaced.
        """
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise OSError(
                f"{self.path} was deleted, moved or replaced while it was being written to: "
                "restore the folder and resume, or start again in another one."
            )

    def close(self) -> None:
        """Close the descriptor; further calls do nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unfinished(path)
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        # Pillow and torch do not report which file failed on a full disk.
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed to `path`, else removed.

    Raises:
        ValueError: `path` exists, before or after.
        OSError: The file cannot be written, or another process writes it.
    """
    with _new(path), replacing(path) as beside:
        yield beside
        check_new(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it is renamed to `path`, else removed.

    Raises:
        ValueError: `path` exists, before or after.
        OSError: The folder cannot be created, or another process writes it.
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
    """Refuse a machine without a folder for temporary files, which the import of libraries needs.

    Raises:
        OSError: There is no such folder.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise OSError(
            "There is no folder for temporary files: neither TMPDIR nor /tmp is writable. Set "
            "TMPDIR to a writable folder."
        ) from error


def check_new(path: Path) -> None:
    """Refuse a path that exists, or whose parent folder is not writable.

    Raises:
        ValueError: The path exists, or cannot be written.
    """
    if os.path.lexists(path):
        raise ValueError(f"{path} exists: choose another name, or remove it.")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ValueError(f"{path} cannot be written: {above} is not a writable folder.")
