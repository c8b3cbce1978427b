"""Handling of SIGTERM and SIGINT: a clean stop with exit code 143 or 130; a second signal kills."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE = 15.0
"""Seconds within which a command must stop; SLURM and torchrun kill after 30."""

_TWICE = 1.0  # seconds within which launchers may send the same signal twice
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stopping(alone: bool) -> Iterator[None]:
    """Raise SystemExit(128 + number) in the main thread when a signal requests a stop.

    So temporary files and locks are removed as after an error. A signal that was ignored from the
    start (nohup, `env --ignore-signal`) is still ignored.

    Args:
        alone: Whether the process ends with the command. Then it also ends at a second signal, and
            after `GRACE` seconds even inside a library that does not return, without waiting for
            threads and child processes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            stop_on(number)
    watch = _Watch() if alone else None
    try:
        yield
    except SystemExit as end:
        if watch is not None and end.code in [128 + number for number in _SIGNALS]:
            print(f"zsnr: stopped by {signal.Signals(end.code - 128).name}", file=sys.stderr)
            leave(end.code)
        raise
    finally:
        if watch is not None:
            watch.close()
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def stop_on(number: int) -> None:
    """From now on, raise SystemExit at a signal, if this is the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, _stop)


def leave(code: int) -> None:
    """End this process and its child processes immediately."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, _wait)  # cleaning up is not interrupted
    raise SystemExit(128 + number)


def _wait(number: int, frame: FrameType | None) -> None:
    """Ignore a repeated signal, which the watch thread handles."""


class _Watch:
    """A thread that ends the process if the main thread does not, even inside native code."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget)
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        signal.set_wakeup_fd(-1)
        self._writer.close()

    def _run(self) -> None:
        first = None
        with self._reader:
            while True:
                try:
                    numbers = self._reader.recv(64)
                except TimeoutError:
                    break
                if not numbers:
                    return
                number = next((n for n in numbers if signal.getsignal(n) in (_stop, _wait)), None)
                if number is None:
                    continue
                now = time.monotonic()
                if first is None:
                    first, code = now, 128 + number
                elif now - first > _TWICE:
                    break
                self._reader.settimeout(max(0.01, first + GRACE - now))
        leave(code)


def _forget() -> None:
    """Prevent a forked process from writing to its parent's pipe, and reset its handlers."""
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if signal.getsignal(number) in (_stop, _wait):
            signal.signal(number, signal.SIG_DFL)
