"""Whole shards on local disk, bounded in size and shared by all processes of a node."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_COPY = r"[0-9a-f]{16}-"  # prefix of a copy's name; other files in the folder are not touched
_PART = ".part"  # suffix of a copy that is being written, and locked by its writer
_GROWTH = 8  # a copy of unknown size reserves 1 / _GROWTH more than it has
_POLL = 0.1  # seconds between two checks for space that other writers will free


@dataclass(frozen=True)
class LocalCache:
    """A folder on a local disk that caches whole shards of remote sources; data.local_cache.

    The least recently read shards are removed to make room for others. The processes of a node
    share the folder: one of them downloads a shard while the others wait for it. A copy gets its
    final name once it is complete, so a killed process leaves no partial copy under that name. An
    open copy stays readable after it is removed.

    Args:
        folder: Folder of the cached shards, on a local disk of each node.
        max_gib: Size limit of the folder, in GiB. It should hold twice the shards of
            data.window_shards. Shards of unknown size (a command that runs for the first time) may
            exceed it while they are written.

    Raises:
        ValueError: The limit is not above 0.
    """

    folder: str
    max_gib: float = 100.0

    def __post_init__(self) -> None:
        if not self.max_gib > 0:
            raise ValueError(f"data.local_cache.max_gib={self.max_gib:g}: wanted more than 0.")

    def open(self, url: str, name: str, fill: Callable[[Copy], None]) -> BinaryIO:
        """Open the copy of a shard; make it first if it does not exist.

        Args:
            url: Address of the shard, which identifies the copy.
            name: A short name of the shard, without secrets.
            fill: Writes the shard's bytes.

        Raises:
            ValueError: The shard alone exceeds the limit.
            OSError: The folder cannot be written to, or `fill` failed.
        """
        path = self._path(url, name)
        while True:
            with suppress(FileNotFoundError):
                file = open(path, "rb")  # noqa: SIM115 - the caller closes it
                os.utime(file.fileno())  # the modification time records the last use
                return file
            copy = self._make(path, name, fill)
            if copy is not None:
                return copy

    def forget(self, url: str, name: str) -> None:
        """Remove the copy of a shard; processes that have it open can continue to read it."""
        self._path(url, name).unlink(missing_ok=True)

    def _path(self, url: str, name: str) -> Path:
        digest = hashlib.blake2b(url.encode(errors="surrogateescape"), digest_size=8).hexdigest()
        return Path(self.folder).expanduser() / f"{digest}-{name[-50:]}"

    def _make(self, path: Path, name: str, fill: Callable[[Copy], None]) -> BinaryIO | None:
        """Write a copy and open it; None = another process has written or removed it meanwhile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + _PART)
        file = open(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")  # noqa: SIM115
        with ExitStack() as cleanup:
            cleanup.callback(file.close)
            fcntl.flock(file, fcntl.LOCK_EX)  # released when the process ends, even if killed
            cleanup.callback(_remove, file, part)
            if not _is_at(file, part) or path.exists():
                return None
            copy = Copy(self, file, name)
            copy.restart()  # drop the bytes of a killed process
            fill(copy)
            copy.finish()
            os.replace(part, path)
            cleanup.pop_all()
        fcntl.flock(file, fcntl.LOCK_UN)
        file.seek(0)
        return file

    def make_room(self, file: BinaryIO, size: int, name: str, wait: bool) -> None:
        """Reserve `size` bytes for a copy that is being written: remove others, oldest first.

        Args:
            file: The copy, which is extended to that size.
            size: Size in bytes.
            name: Name of the shard, for the message.
            wait: While unfinished copies fill the folder, wait instead of exceeding the limit.

        Raises:
            ValueError: The shard alone exceeds the limit.
        """
        limit = int(self.max_gib * 2**30)
        if size > limit:
            raise ValueError(
                f"data.local_cache.max_gib={self.max_gib:g} is less than one shard of "
                f"{size / 2**30:.3g} GiB, {name}: raise it."
            )
        while True:
            with self._locked():
                if self._free(file, limit - size) or not wait:
                    file.truncate(size)
                    return
            time.sleep(_POLL)

    def _free(self, file: BinaryIO, limit: int) -> bool:
        """Remove copies until the others take at most `limit` bytes; return whether they do."""
        inode, copies, total = os.fstat(file.fileno()).st_ino, [], 0
        for entry in os.scandir(Path(self.folder).expanduser()):
            with suppress(FileNotFoundError):  # a process has renamed or removed it
                stat = entry.stat(follow_symlinks=False)
                if stat.st_ino == inode or not re.match(_COPY, entry.name):
                    continue
                if entry.name.endswith(_PART) and _remove_left(Path(entry.path)):
                    continue
                total += stat.st_size
                if not entry.name.endswith(_PART):
                    copies.append((stat.st_mtime_ns, entry.path, stat.st_size))
        for _, path, size in sorted(copies):
            if total <= limit:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total <= limit

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(Path(self.folder).expanduser() / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


class Copy:
    """A copy of a shard that is being written."""

    def __init__(self, cache: LocalCache, file: BinaryIO, name: str) -> None:
        self._cache, self._file, self._name = cache, file, name
        self._room, self._known = 0, False
        self.size = 0
        self.tail = b""
        """The last 512 bytes."""

    def restart(self) -> None:
        """Begin again at the first byte."""
        self._file.seek(0)
        self.size, self.tail = 0, b""
        if not self._known:
            self._file.truncate(0)
            self._room = 0

    def reserve(self, size: int) -> None:
        """Reserve space for a shard of known size."""
        self._cache.make_room(self._file, size, self._name, wait=True)
        self._room, self._known = size, True

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            ValueError: The shard alone exceeds the limit of the folder.
            OSError: The disk cannot store the bytes.
        """
        self.size += len(data)
        if self.size > self._room:
            limit = int(self._cache.max_gib * 2**30)
            self._room = max(self.size, min(self.size + self.size // _GROWTH, limit))
            self._cache.make_room(self._file, self._room, self._name, wait=False)
        self._file.write(data)
        self.tail = (self.tail + data[-512:])[-512:]

    def finish(self) -> None:
        """Truncate the copy to its size and sync it to disk."""
        self._file.flush()
        self._cache.make_room(self._file, self.size, self._name, wait=False)
        os.fsync(self._file.fileno())


def _is_at(file: BinaryIO, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _remove(file: BinaryIO, part: Path) -> None:
    """Remove a part that this process has locked, unless it has its final name."""
    if _is_at(file, part):
        part.unlink()


def _remove_left(part: Path) -> bool:
    """Remove a part whose writer was killed; return whether it was removed."""
    with open(part, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        _remove(file, part)
    return True
