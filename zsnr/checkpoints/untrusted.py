"""Small files that somebody else wrote: bounded, and nothing in them is run."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_MOST_BRACKETS = 1_000_000


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading; gives the file and its size.

    Raises:
        ValueError: There is none, or a folder, a pipe or a device has the name.
    """
    try:
        # Without O_NONBLOCK a pipe waits for somebody who writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}.") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no file: wanted a regular one.")
    with os.fdopen(descriptor, "rb") as file:
        yield file, status.st_size


def read_small(path: Path, most: int) -> bytes:
    """Read a file of at most so many bytes.

    Raises:
        ValueError: It is larger, or cannot be read.
    """
    with open_regular(path) as (file, size):
        data = file.read(most + 1) if size <= most else b""
    if size > most or len(data) > most:
        raise ValueError(f"{path} has {max(size, len(data))} bytes: wanted at most {most}.")
    return data


def parse_json(data: bytes, what: str, *, strict: bool = False) -> dict[str, Any]:
    """Parse one JSON object without repeated keys.

    Args:
        data: The file's content.
        what: What it is, for the error.
        strict: Refuse NaN and Infinity, which are no JSON but which Python writes.

    Raises:
        ValueError: It is none; says why.
    """
    if data.count(b"[") + data.count(b"{") > _MOST_BRACKETS:
        raise ValueError(f"{what} has over {_MOST_BRACKETS} lists and objects: no model needs so.")
    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_refuse if strict else None,
        )
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else clipped(str(error))
        raise ValueError(f"{what} is no readable JSON: {reason}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is {type(found).__name__}: wanted a JSON object.")
    return found


def clipped(text: str, most: int = 120) -> str:
    """Shorten what somebody else wrote so that it fits in a message, on one line."""
    line = " ".join(text.split())
    line = line if len(line) <= most else f"{line[:most]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def shown(value: object) -> str:
    """Say what a value is that somebody else wrote, in a few words."""
    if value is None or isinstance(value, (str, float, bool)):
        return clipped(repr(value))
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**20 else "a huge number"
    return f"a {type(value).__name__}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{clipped(repr(twice))} stands in it twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")
