"""Who owns a lock or an unfinished file, and whether that process still lives.

A process is told by its host, its pid and the time that pid began, since pids are used again, and
containers have the same ones. Where pids cannot be looked up, on another host or in another
container, the lock file's own time tells: its owner renews it, and readers compare it with that of
a file they have just written beside it, so that no host's clock counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

from zsnr.untrusted import printable

LOCK = ".zsnr.lock"
"""Name of the lock file inside a folder."""

RENEWAL = 15.0
"""Seconds between two renewals of a lock."""

SILENCE = 180.0
"""Seconds without a renewal after which an owner that cannot be looked up counts as dead."""

EXIT_CODE = 75  # the run can be started again

_FORGOTTEN = 86400.0  # seconds after which an unfinished file of an unknown owner may go
_MARK = re.compile(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.part$")


class LockedError(OSError):
    """Another process works there."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Args:
        host: Name of its host.
        place: Digest of its host, boot and pid namespace: where its pid means something.
        pid: Its process id there.
        start: When that process began, in clock ticks after boot. 0 = unknown.
        since: When it took the lock, for people.
        command: What it does, for people.
        token: Random, of this lock alone.
    """

    host: str
    place: str
    pid: int
    start: int
    since: str
    command: str
    token: str


class Lock:
    """A lock file that names its owner; a context manager.

    Args:
        path: The file.
        what: What it protects, for the message.
        patience: Seconds to wait for an owner that may be dead.
    """

    def __init__(self, path: Path, what: Path, patience: float = 0.0) -> None:
        self.path, self.what, self.patience = path, what, patience
        self._owner = Owner(
            socket.gethostname(),
            _place(),
            os.getpid(),
            max(0, _started(os.getpid())),
            f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            " ".join(["zsnr", *(word for word in sys.argv[1:4] if "://" not in word)]),
            secrets.token_hex(8),
        )
        self._stop = threading.Event()

    def take(self) -> None:
        """Take the lock, of a dead owner too, and renew it until it is released.

        Raises:
            LockedError: Another process holds it; says which.
            OSError: The file cannot be written.
        """
        mine, end = unfinished(self.path), time.monotonic() + self.patience
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mine.write_text(json.dumps(asdict(self._owner)) + "\n", encoding="utf-8")
            while not _link(mine, self.path):
                self._take_over(mine, end)
        except LockedError:
            raise
        except OSError as error:
            raise OSError(f"{self.what} cannot be written: {error.strerror or error}.") from error
        finally:
            with suppress(OSError):
                mine.unlink(missing_ok=True)
        threading.Thread(target=self._renew, daemon=True).start()

    def release(self) -> None:
        """Give the lock back; does nothing if it is not held, or held by a parent process."""
        if self._stop.is_set() or os.getpid() != self._owner.pid:
            return
        self._stop.set()
        with suppress(OSError):
            if _read(self.path) == self._owner:
                self.path.unlink()

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take_over(self, mine: Path, end: float) -> None:
        """Remove the lock of a dead owner, or wait a second for it to die.

        Raises:
            LockedError: It lives, and there is no patience left.
        """
        os.utime(mine)
        try:
            with open(self.path, encoding="utf-8") as file:
                try:  # two that find the same dead owner
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.1)
                    return
                except OSError:  # a file system without locks: the next renewal tells
                    pass
                now, then = mine.stat(), os.fstat(file.fileno())
                if not os.path.samestat(then, os.stat(self.path)):
                    return
                owner = _read(self.path)
                if _is_dead(owner, now.st_mtime - then.st_mtime):
                    self.path.unlink()
                    return
        except FileNotFoundError:
            return
        if time.monotonic() >= end:
            who = "an unknown process"
            if owner is not None:
                who = f"{owner.host}, pid {owner.pid}, since {owner.since}: {owner.command}"
            raise LockedError(
                f"{self.what} is in use by another process ({who}). Wait for it, stop it, or "
                f"choose another folder. If it is dead, try again {SILENCE / 60:g} minutes after "
                f"its end, or remove {self.path}."
            )
        time.sleep(1.0)

    def _renew(self) -> None:
        while not self._stop.wait(RENEWAL):
            with suppress(OSError):  # storage that fails for a while
                owner = _read(self.path)
                if self._stop.is_set():
                    return
                if owner is not None and owner != self._owner:
                    line = (
                        f"zsnr: error: {self.what} was taken over by {owner.host}, pid {owner.pid},"
                        " since this process gave no sign of life: it stops, and can be resumed."
                    )
                    print(printable(line, one_line=True), file=sys.stderr, flush=True)
                    os._exit(EXIT_CODE)
                os.utime(self.path)


def lock_owner(path: Path) -> tuple[Owner, bool] | None:
    """Return who holds a lock, and whether that process lives; None if nobody holds it."""
    with suppress(OSError):
        owner = _read(path)
        if owner is not None:
            silence = time.time() - path.stat().st_mtime
            return owner, not _is_dead(owner, silence)
    return None


def unfinished(path: Path) -> Path:
    """Name a file or folder beside `path` that is not complete; the name tells its owner."""
    pid = os.getpid()
    mark = f"{_place()}-{pid}-{max(0, _started(pid))}-{secrets.token_hex(4)}"
    return path.with_name(f"{_beginning(path.name)}{mark}.part")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what dead processes have left unfinished in a folder.

    Args:
        folder: Where; it may be missing.
        name: Which name the file would have had. None = any.
    """
    for part in folder.glob(".*.part"):
        if name is not None and not part.name.startswith(_beginning(name)):
            continue
        mark = _MARK.search(part.name)
        with suppress(OSError):  # another process removes it
            if mark is not None and mark[1] == _place():
                dead = not _lives(int(mark[2]), int(mark[3]))
            else:
                with TemporaryFile(dir=folder) as probe:
                    now = os.fstat(probe.fileno()).st_mtime
                dead = now - part.stat().st_mtime > _FORGOTTEN
            if dead and part.is_dir():
                shutil.rmtree(part)
            elif dead:
                part.unlink()


def _beginning(name: str) -> str:
    return f".{name.removeprefix('.')[:60]}."  # a file system's names end at 255 bytes


def _link(mine: Path, path: Path) -> bool:
    """Give a file one more name, if there is none such; whether it was done."""
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(mine.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _read(path: Path) -> Owner | None:
    """Read whose lock it is; None = nobody's, or it cannot be told.

    Raises:
        OSError: The storage fails.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            values = json.loads(file.read(10_000))
        owner = Owner(**{field.name: values[field.name] for field in fields(Owner)})
        numbers = isinstance(owner.pid, int) and isinstance(owner.start, int)
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return owner if numbers else None


def _is_dead(owner: Owner | None, silence: float) -> bool:
    if owner is not None and owner.place == _place():
        return not _lives(owner.pid, owner.start)
    return silence > SILENCE


def _lives(pid: int, start: int) -> bool:
    """Whether a process of this place lives, if it is still the one that began then."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    now = _started(pid)
    return 0 in (start, now) or now == start


def _started(pid: int) -> int:
    """Read when a process began, in clock ticks after boot; 0 = cannot be told, -1 = it is dead."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return 0  # /proc is that of another pid namespace
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    return -1 if state in "ZX" else int(rest[18])


def _place() -> str:
    """Tell within which processes can be looked up by their pid: host, boot and namespace."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=4).hexdigest()
