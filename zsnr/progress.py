"""Times and numbers in words; progress on stderr: a bar on a terminal, else a line at intervals."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

INTERVAL = 10.0  # seconds between lines


def progress_bar(
    total: int | None, description: str, unit: str, *, show: bool = True, delay: float = 0.0
) -> Any:
    """Return a tqdm bar, to be used as a context manager or closed.

    Where stderr is not a terminal, such as in the log of a job, every `INTERVAL` seconds a whole
    line takes the place of the bar; work that is done sooner prints nothing.

    Args:
        total: Units of work. None = not known.
        description: What is done.
        unit: What is counted.
        show: Print it at all.
        delay: Seconds until a bar appears on a terminal.
    """
    from tqdm import tqdm

    options: dict[str, Any] = {"total": total, "desc": description, "unit": unit}
    if sys.stderr.isatty() or not show:
        return tqdm(**options, delay=delay, disable=not show)
    left = "" if total is None else ", {remaining} left"
    return tqdm(
        **options,
        file=_Lines(sys.stderr),
        mininterval=INTERVAL,
        delay=INTERVAL,
        bar_format="{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed}" + left + "{postfix}",
    )


def tracked(
    items: Iterable[T], total: int, description: str, unit: str, *, show: bool = True
) -> Iterator[T]:
    """Iterate over items, and show with `progress_bar` how many have been worked on."""
    with progress_bar(total, description, unit, show=show) as bar:
        for item in items:
            yield item
            bar.update()


def duration(seconds: float) -> str:
    """Say a time in the two largest of its units."""
    whole = max(0, round(seconds))
    units = (("day", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (unit, size), (smaller, part) in pairwise(units):
        if whole >= size:
            count = whole // size
            days = f"{count} {unit}{'s' if unit == 'day' and count > 1 else ''}"
            return f"{days} {whole % size // part} {smaller}"
    return f"{whole} s"


def counted(number: int, noun: str) -> str:
    """Say a number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class _Lines:
    """A stream on which what would overwrite a line is a new line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()
