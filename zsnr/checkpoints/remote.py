"""Checkpoints in object storage: copies of those that a run writes, and local copies of them."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zsnr.checkpoints.opening import open_checkpoint
from zsnr.checkpoints.shard_index import INDEX
from zsnr.files import side_file
from zsnr.locks import Lock, unfinished
from zsnr.public import public_text, public_url
from zsnr.remote import filesystem
from zsnr.untrusted import printable

_BLOCK = 16 << 20  # bytes
_PATIENCE = 600.0  # seconds that the end of a run waits for a copy


def is_address(source: str | Path) -> bool:
    """Whether a model's name is an address, such as s3://bucket/run."""
    return "://" in str(source)


def fetch_checkpoint(address: str) -> Path:
    """Copy a checkpoint to the local disk, unless it is there already.

    Args:
        address: A checkpoint; or the folder of a run or of its checkpoints, or `last.ckpt` in it,
            for the newest checkpoint that can be read.

    Returns:
        The copy, in ~/.cache/zsnr/checkpoints.

    Raises:
        ValueError: There is no checkpoint, or it cannot be copied.
    """
    with _told(address):
        files, path = filesystem(address)
        path = path.rstrip("/")
        files.invalidate_cache()
        named = _is_complete(files, path)
        folder = path.removesuffix("/last.ckpt")
        names = [path] if named else _newest_first(files, folder)
    if not names:
        raise ValueError(
            f"{public_url(address)} is not a checkpoint, and holds none: wanted a file or folder "
            "step-*.ckpt that training wrote, or the folder that they are in."
        )
    *newer, last = names
    for name in newer:
        with _told(address):
            copy = _fetch(files, name)
        try:
            open_checkpoint(copy)
        except ValueError as error:
            warnings.warn(f"{error} Looking for an earlier one.", stacklevel=2)
        else:
            return copy
    with _told(address):
        return _fetch(files, last)


def fetch_snapshots(address: str, folder: str) -> list[Path]:
    """Copy the snapshots of a run to the local disk, unless they are there already.

    Args:
        address: The folder of the run, or of its checkpoints.
        folder: Name of the folder of snapshots in it.

    Returns:
        The copies, the newest last.

    Raises:
        ValueError: They cannot be copied.
    """
    with _told(address):
        files, path = filesystem(address)
        path = path.rstrip("/")
        files.invalidate_cache()
        for place in (f"{path}/checkpoints/{folder}", f"{path}/{folder}"):
            names = [name for name in _steps(files, place) if _is_complete(files, name)]
            if names:
                return [_fetch(files, name) for name in names]
    return []


def _newest_first(files: Any, folder: str) -> list[str]:
    for place in (f"{folder}/checkpoints", folder):
        names = [name for name in _steps(files, place) if _is_complete(files, name)]
        if names:
            return names[::-1]
    return []


def _steps(files: Any, folder: str) -> list[str]:
    """List the checkpoints of a folder, the newest last."""
    return sorted(str(name).rstrip("/") for name in files.glob(f"{folder}/step-*.ckpt"))


def _is_complete(files: Any, path: str) -> bool:
    """Whether a path is a file, or a folder of shards whose index has been written at last."""
    return bool(files.isfile(path) or files.isfile(f"{path}/{INDEX}"))


def _fetch(files: Any, path: str) -> Path:
    """Copy a file or a folder of shards; processes of one node copy it once."""
    folder = not files.isfile(path)
    version = files.ukey(f"{path}/{INDEX}" if folder else path)
    digest = hashlib.blake2b(f"{files.protocol} {path} {version}".encode(), digest_size=8)
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    copy = home / "zsnr" / "checkpoints" / digest.hexdigest() / path.rpartition("/")[2]
    if copy.exists():
        return copy
    names = [str(name) for name in files.find(path)] if folder else [path]
    with Lock(copy.with_name(".lock"), copy, patience=math.inf):
        if copy.exists():
            return copy
        size = sum(files.size(name) or 0 for name in names) / 2**30
        print(printable(f"copying {path} ({size:.2f} GiB) to {copy}"), file=sys.stderr)
        part = unfinished(copy)
        try:
            if folder:
                part.mkdir()
            for name in names:
                files.get_file(name, str(part / name.rpartition("/")[2] if folder else part))
            os.replace(part, copy)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            part.unlink(missing_ok=True)
    return copy


@contextmanager
def _told(address: str) -> Iterator[None]:
    """Raise errors of a client of storage, which has its own exceptions, in one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{public_url(address)} cannot be copied: {public_text(reason)}"
        ) from error


class Mirror:
    """Copies the checkpoints and snapshots of a run to an address, in a thread.

    A copy is seen under its name once it is complete: a file at once, and a folder of shards by
    its index, which is copied last. Where copying is slower than training, the newest checkpoint is
    copied and those before it are left out; of snapshots all are copied. A failure causes a
    warning, and the run continues.

    Args:
        address: Folder of the copies, such as s3://bucket/run.

    Raises:
        ValueError: It is not an address of a known protocol.
    """

    def __init__(self, address: str) -> None:
        if not is_address(address):
            raise ValueError(
                f"checkpoint.mirror={address}: wanted an address such as s3://bucket/run."
            )
        # transactions belong to a file system, so others must not use this one
        self._files, root = filesystem(address, skip_instance_cache=True)
        self.address, self._root = address, root.rstrip("/")
        self.copying: Path | None = None
        self._next: Path | None = None
        self._removed: set[str] = set()
        self._snapshots: list[Path] = []
        self._asked = self._busy = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def check_new(self) -> None:
        """Refuse an address that holds checkpoints of another run.

        Raises:
            ValueError: It does.
        """
        held: list[str] = []
        with side_file(public_url(self.address)):
            held = _steps(self._files, self._root)
        if held:
            raise ValueError(
                f"checkpoint.mirror={public_url(self.address)} holds checkpoints of an earlier "
                "run: resume it with --ckpt_path, or choose another address."
            )

    def copy(self, checkpoint: Path, removed: Iterable[str], snapshots: Path) -> None:
        """Begin to copy a complete checkpoint, and return at once.

        Args:
            checkpoint: The file, or folder of shards.
            removed: Names of checkpoints that are to be removed at the address too.
            snapshots: Folder that may hold a snapshot of the same name, to be copied after it.
        """
        snapshot = snapshots / checkpoint.name
        with self._lock:
            self._next = checkpoint
            self._removed.update(removed)
            if snapshot.exists():
                self._snapshots.append(snapshot)
            self._ask()

    def copy_snapshot(self, snapshot: Path) -> None:
        """Begin to copy a complete snapshot without its checkpoint, and return at once."""
        with self._lock:
            self._snapshots.append(snapshot)
            self._ask()

    def _ask(self) -> None:
        self._asked = True
        if not self._busy:
            self._busy, self.copying = True, self._next
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until everything is copied, for ten minutes at most."""
        if self._thread is None:
            return
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            late = self.copying or ", ".join(map(str, self._snapshots)) or "A snapshot"
            warnings.warn(
                f"{late} is not yet copied to {public_url(self.address)}, and the run ends "
                "without it: copy it by hand.",
                stacklevel=2,
            )

    def _run(self) -> None:
        while True:
            with self._lock:
                self.copying, self._next = self._next, None
                if not self._asked:
                    self._busy = False
                    return
                self._asked = False
                removed, self._removed = self._removed, set()
                snapshots, self._snapshots = self._snapshots, []
            with side_file(public_url(self.address)):
                if self.copying is not None:
                    self._copy(self.copying, self._root)
                for name in sorted(removed):
                    if self._files.exists(f"{self._root}/{name}"):
                        self._files.rm(f"{self._root}/{name}", recursive=True)
                    removed.discard(name)
                while snapshots:
                    self._copy(snapshots[0], f"{self._root}/{snapshots[0].parent.name}")
                    snapshots.pop(0)
            with self._lock:
                self._removed |= removed
                self._snapshots = snapshots + self._snapshots

    def _copy(self, checkpoint: Path, folder: str) -> None:
        files, target = self._files, f"{folder}/{checkpoint.name}"
        files.invalidate_cache()
        for other in _steps(files, folder):
            if other.rpartition("/")[2] > checkpoint.name:  # of steps that are trained again
                if files.exists(f"{other}.abandoned"):
                    files.rm(f"{other}.abandoned", recursive=True)
                files.mv(other, f"{other}.abandoned", recursive=True)
        if checkpoint.is_dir():
            if files.exists(target):
                files.rm(target, recursive=True)
            for part in sorted(checkpoint.iterdir(), key=lambda part: part.name == INDEX):
                self._put(part, f"{target}/{part.name}")
        else:
            self._put(checkpoint, target)

    def _put(self, source: Path, target: str) -> None:
        """Copy a file; a failure leaves none of its name."""
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        with (
            source.open("rb") as file,
            self._files.transaction,
            self._files.open(target, "wb") as copy,
        ):
            shutil.copyfileobj(file, copy, _BLOCK)
