"""Handling of SIGTERM and SIGINT: a clean stop with exit code 143 or 130; a second signal kills.

Where a first Ctrl-C only asks for a stop, as in training, the second one is the clean stop.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
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


def stop_on_second(number: int, on_first: Callable[[], object]) -> None:
    """Call a function at the first signal, and stop at one that comes over a second later.

    A signal at which the process would not stop is left alone, such as one that is ignored.

    Args:
        number: The signal.
        on_first: What the first signal does instead.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is _stop:
        signal.signal(number, _StopOnSecond(on_first))


def stop_on_first(number: int) -> None:
    """Undo `stop_on_second`."""
    if isinstance(signal.getsignal(number), _StopOnSecond):
        stop_on(number)


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


class _StopOnSecond:
    """A handler that calls a function once, and stops at later signals."""

    def __init__(self, on_first: Callable[[], object]) -> None:
        self._on_first = on_first
        self._first: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = time.monotonic()
            self._on_first()
        elif self.stops():
            _stop(number, frame)

    def stops(self) -> bool:
        return self._first is not None and time.monotonic() - self._first > _TWICE


def _stops(number: int) -> bool:
    """Whether the process stops at a signal, or does so already."""
    handler = signal.getsignal(number)
    return handler in (_stop, _wait) or (isinstance(handler, _StopOnSecond) and handler.stops())


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
                number = next(filter(_stops, numbers), None)
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
        if _stops(number) or isinstance(signal.getsignal(number), _StopOnSecond):
            signal.signal(number, signal.SIG_DFL)
