"""Small files that somebody else wrote: bounded, and nothing in them is run."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from zsnr.pickled import check_extent, read_inert

_HEAD = 512
_MOST_BRACKETS = 1_000_000
_MOST_COMMAS = 2_000_000
_MOST_JSON = 8 * 2**20
_MOST_YAML = 200_000
_MOST_NODES = 200_000


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading; gives the file and its size.

    Raises:
        ValueError: There is no such file, a folder, a pipe or a device has the name, or another
            file was saved under it, see `disguise`.
    """
    try:
        # Without O_NONBLOCK a pipe waits for somebody who writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}.") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file.")
        other = disguise(file.read(_HEAD))
        if other is not None:
            raise ValueError(f"{path} is {other}.")
        file.seek(0)
        yield file, status.st_size


def disguise(head: bytes) -> str | None:
    """Say what a file is that was saved under a wrong name, by its first bytes.

    Args:
        head: The first 512 bytes, or all of a shorter file.

    Returns:
        Such as "an HTML page", with the way out. None = it may be what its name says.
    """
    if not head:
        return "empty: download or write it again"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer, not the file itself: run git lfs pull"
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return (
            "an HTML page, not the file itself: the download was refused or redirected, log in and "
            "download it again"
        )
    if start.startswith(b"<?xml") and b"<error>" in head.lower():
        return "a storage server's error message, not the file itself: download it again"
    return None


def check_archive(file: BinaryIO, size: int, what: str) -> None:
    """See that an archive of torch.save is plain before torch unpacks it.

    Args:
        file: The archive, at its start.
        size: Its bytes.
        what: What it is, for the error.

    Raises:
        ValueError: It is no such archive, is packed, so that it would take more room than it has,
            or its pickle is none of plain values, see `read_inert` and `check_extent`.
    """
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    except Exception as error:  # damaged archives fail in many ways
        reason = clipped(str(error) or repr(error))
        raise ValueError(f"{what} is not a readable checkpoint: {reason}.") from error
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > size:
        raise ValueError(f"{what} is packed: wanted a checkpoint as training writes it.")
    try:
        names = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
        check_extent(read_inert(archive.read(names[0]), size))
    except Exception as error:  # damaged archives fail in many ways
        reason = clipped(str(error) or repr(error))
        raise ValueError(f"{what} is not a readable checkpoint: {reason}.") from error


def open_archive(path: Path) -> dict[str, Any]:
    """Open what torch.save wrote, on the CPU: tensors, which stay on disk, and plain values.

    Raises:
        ValueError: It is no such file, see `check_archive`, or holds something else.
    """
    with open_regular(path) as (file, size):
        check_archive(file, size, str(path))
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values.") from error
    except Exception as error:  # a pickle may fail in any way
        reason = clipped(str(error) or repr(error))
        raise ValueError(f"{path} is not a readable checkpoint: {reason}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds {shown(found)}.")
    return found


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
    if data.count(b"[") + data.count(b"{") > _MOST_BRACKETS or data.count(b",") > _MOST_COMMAS:
        raise ValueError(
            f"{what} has over {_MOST_BRACKETS} lists and objects or {_MOST_COMMAS} entries: no "
            "model needs so many."
        )
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of one JSON object, see `parse_json`."""
    return parse_json(read_small(path, _MOST_JSON), str(path))


def read_yaml(path: Path) -> Any:
    """Read a YAML file of plain values, without tags of Python and without aliases that explode.

    Raises:
        ValueError: It is no YAML, or one of those.
    """
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Knows 1e-4 as a number, as the training command does."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
    )
    data = read_small(path, _MOST_YAML)
    try:
        loader = Loader(data.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > _MOST_NODES:
            raise ValueError("its aliases stand for too much")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is no readable YAML: {clipped(reason, 300)}") from error


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


def _expanded(node: Any, sizes: dict[int, float]) -> float:
    """Count the nodes that a YAML node stands for, each alias anew; a circle is endless."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = math.inf
    value = node.value
    parts = [] if isinstance(value, str) else value
    flat = (child for part in parts for child in (part if isinstance(part, tuple) else (part,)))
    sizes[id(node)] = 1 + sum(_expanded(child, sizes) for child in flat)
    return sizes[id(node)]
