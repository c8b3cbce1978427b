"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zsnr.locks import Lock, remove_leftovers, unfinished

_TOLD: set[str] = set()  # side files that are known to fail


@contextmanager
def side_file(path: str | Path) -> Iterator[None]:
    """Write what a run can do without: a failure is warned of once per path, and the run goes on.

    Whatever fails counts, because other ranks do not wait for it, and libraries that write files
    for us raise errors of their own.

    Args:
        path: What is written, for the message.
    """
    name = str(path)
    try:
        yield
    except Exception as error:
        if name not in _TOLD:
            _TOLD.add(name)
            reason = " ".join(str(error).split()) or type(error).__name__
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            warnings.warn(
                f"{name} cannot be written, and the run goes on without it: {kind}{reason}",
                stacklevel=3,
            )


class HeldFolder:
    """An output folder that must stay where it is while it is written to.

    A descriptor is kept open, so that no other folder can be given the same inode.

    Args:
        path: The folder; it is made if it does not exist.

    Raises:
        OSError: It cannot be made or opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)

    def check(self) -> None:
        """See that the path still names the folder.

        Raises:
            OSError: It was deleted, moved or replaced.
        """
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except (FileNotFoundError, NotADirectoryError):
            same = False
        if not same:
            raise OSError(
                f"{self.path} was deleted, moved or replaced while it was being written to: put "
                "the folder back and resume, or start again in another one."
            )

    def close(self) -> None:
        """Stop holding the folder; called again, this does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it takes `path`'s place, else it goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = unfinished(path)
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        if (
            error.errno and error.filename is None
        ):  # Pillow and torch do not say which file a full disk cut
            error.filename = str(path)
        raise
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
