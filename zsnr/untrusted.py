"""Small files that somebody else wrote: bounded, and nothing in them is run."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from zsnr.pickled import check_extent, read_inert

_HEAD = 512
_MACHINE = {  # errors of storage and machine, not of a file
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE),
}
_MOST_ENTRIES = 2_000_000
_MOST_TEXT = 64 * 2**20
_MOST_JSON = 8 * 2**20
_MOST_YAML = 200_000
_MOST_NODES = 200_000


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading; gives the file and its size.

    Raises:
        ValueError: There is no such file, a folder, a pipe or a device has the name, or another
            file was saved under it, see `disguise`.
        OSError: The storage or the machine fails, which says nothing of the file.
    """
    try:
        # Without O_NONBLOCK a pipe waits for somebody who writes to it.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        if _is_of_machine(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read: {reason}.") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a file: wanted a regular one.")
    with os.fdopen(descriptor, "rb") as file:
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
        _raise_unreadable(what, error)
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > size:
        raise ValueError(f"{what} is packed: wanted a checkpoint as training writes it.")
    try:
        names = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
        check_extent(read_inert(archive.read(names[0]), size))
    except Exception as error:  # damaged archives fail in many ways
        _raise_unreadable(what, error)


def _raise_unreadable(what: str | Path, error: Exception) -> NoReturn:
    if _is_of_machine(error):
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(what)
        raise error
    reason = clipped(str(error) or repr(error))
    raise ValueError(f"{what} is not a readable checkpoint: {reason}.") from error


def _is_of_machine(error: Exception) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in _MACHINE


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
        _raise_unreadable(path, error)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds {shown(found)}.")
    _check_storages(path, found)
    return found


def _check_storages(path: Path, value: Any) -> None:
    """See that no tensor stands for more than its data, as expanded ones do.

    Raises:
        ValueError: One does.
    """
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, torch.Tensor):
            if current.is_sparse or current.is_quantized or current.is_nested:
                raise ValueError(f"{path} holds a tensor that is not dense.")
            if current.numel() * current.itemsize > current.untyped_storage().nbytes():
                raise ValueError(f"{path} holds a tensor that is larger than its data.")
        elif isinstance(current, dict):
            waiting += current.values()
        elif isinstance(current, list | tuple):
            waiting += current


def check_size(path: Path, most: int) -> None:
    """Refuse what is not a file, or has more bytes than a library should read whole.

    Raises:
        ValueError: It is so.
    """
    with open_regular(path) as (_, size):
        if size > most:
            raise ValueError(f"{path} has {size} bytes: wanted at most {most}.")


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


def decode(data: bytes, what: str) -> str:
    """Decode UTF-8 text, without a byte order mark at its start.

    Raises:
        ValueError: It is in another encoding.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{what} is UTF-16 text, not UTF-8 text: save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{what} is not UTF-8 text: {error.reason} in line {line}. Save it as UTF-8."
        ) from error


def read_text(path: Path, most: int = _MOST_TEXT) -> str:
    """Read a text file of at most so many bytes.

    Raises:
        ValueError: It is larger, cannot be read, or is not UTF-8.
    """
    return decode(read_small(path, most), str(path))


def parse_json(
    text: str, *, strict: bool = False, most: int = _MOST_ENTRIES, repeated: bool = False
) -> Any:
    """Parse JSON.

    Args:
        text: The JSON.
        strict: Refuse NaN and Infinity, which are no JSON but which Python writes.
        most: Bound on its entries; half of it bounds its lists and objects.
        repeated: Take the last value of a key that an object has twice, instead of refusing it.

    Raises:
        ValueError: It is not JSON; the reason, without a period.
    """
    if text.count("[") + text.count("{") > most // 2 or text.count(",") > most:
        raise ValueError(f"it has over {most // 2} lists and objects, or {most} entries")
    try:
        return json.loads(
            text,
            object_pairs_hook=None if repeated else _once,
            parse_constant=_refuse if strict else None,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_object(
    data: bytes, what: str, *, strict: bool = False, repeated: bool = False
) -> dict[str, Any]:
    """Parse one JSON object, see `parse_json`, and bound how deep it is nested.

    Args:
        data: The file's content.
        what: What it is, for the error.
        strict: See there.
        repeated: See there.

    Raises:
        ValueError: It is not one JSON object.
    """
    text = decode(data, what)
    try:
        value = parse_json(text, strict=strict, repeated=repeated)
        check_extent(value)
    except ValueError as error:
        raise ValueError(f"{what} is not readable JSON: {clipped(str(error))}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}: wanted a JSON object.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of one JSON object, see `parse_json`."""
    return parse_object(read_small(path, _MOST_JSON), str(path))


def read_yaml(path: Path) -> Any:
    """Read a YAML file, see `parse_yaml`.

    Raises:
        ValueError: It is not such a file.
    """
    text = read_yaml_text(path)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not readable YAML: {error}.") from error


def read_yaml_text(path: Path) -> str:
    """Read the text of a YAML file of a size that a person writes."""
    return read_text(path, _MOST_YAML)


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values, without Python's tags, repeated keys and exploding aliases.

    Raises:
        ValueError: It is not such YAML; the reason, without a period.
    """
    return _load(text)[1]


def compose_yaml(text: str) -> Any:
    """Parse YAML as `parse_yaml`, and return its root node, which knows lines and spellings.

    Raises:
        ValueError: See there.
    """
    return _load(text)[0]


def _load(text: str) -> tuple[Any, Any]:
    """Return the root node of YAML, and its value."""
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Knows 1e-4 as a number and no dates, as the training command does."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
    )
    if len(text) > _MOST_YAML:
        raise ValueError(f"it has over {_MOST_YAML} characters")
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        if _expanded(node, {}) > _MOST_NODES:
            raise ValueError("its aliases stand for too much")
        return node, loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_yaml_reason(error, text)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, OverflowError, TypeError, AttributeError) as error:
        raise ValueError(clipped(str(error), 300)) from error


def clipped(text: str, most: int = 120) -> str:
    """Shorten what somebody else wrote so that it fits in a message, on one line."""
    line = " ".join(text[: 10 * most].split())
    return line if len(line) <= most and len(text) <= 10 * most else f"{line[:most]}..."


def shown(value: object) -> str:
    """Say what a value is that somebody else wrote, in a few words."""
    if isinstance(value, str):
        return clipped(repr(value[:1000]))
    if value is None or isinstance(value, float | bool):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**20 else "a huge number"
    return f"a {type(value).__name__}"


def printable(text: str, *, one_line: bool = False) -> str:
    """Escape what would steer a terminal or reorder its text; every other character stays.

    Control characters, bidirectional controls and zero-width characters become escapes such as
    \\x1b and \\u202e. Joiners stay between letters and emoji that they join.

    Args:
        text: What is printed.
        one_line: Escape line breaks too.
    """
    if text.isascii() and text.replace("\n", "").isprintable() and not (one_line and "\n" in text):
        return text
    around = zip(" " + text, text, text[1:] + " ", strict=False)
    return "".join(
        c
        if _is_harmless(c, before, after) or (c in "\n\t" and not one_line)
        else c.encode("unicode_escape").decode()
        for before, c, after in around
    )


def _is_harmless(c: str, before: str, after: str) -> bool:
    if c in "\u200c\u200d":
        return not before.isascii() and not after.isascii()
    return c.isprintable() or unicodedata.category(c) == "Zs"


def _yaml_reason(error: Any, text: str) -> str:
    """Say in which line YAML is wrong, and how."""
    mark = error.problem_mark
    if mark is None:
        return clipped(str(error), 300)
    lines = text.splitlines()[mark.line : mark.line + 1]
    if "\t" in "".join(lines)[: mark.column + 1]:
        return f"line {mark.line + 1} is indented with a tab: use spaces"
    return f"line {mark.line + 1}: {clipped(error.problem or str(error), 250)}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{shown(twice)} stands in it twice")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number of JSON")


def _expanded(node: Any, sizes: dict[int, float]) -> float:
    """Count the nodes that a YAML node stands for, each alias anew; a circle is endless.

    Raises:
        ValueError: A mapping has a key twice.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = math.inf
    value = node.value
    parts = [] if isinstance(value, str) else value
    keys: set[str] = set()
    for key in [part[0] for part in parts if isinstance(part, tuple)]:
        if isinstance(key.value, str) and key.value != "<<":
            if key.value in keys:
                line = key.start_mark.line + 1
                raise ValueError(f"line {line}: {shown(key.value)} stands in it twice")
            keys.add(key.value)
    flat = (child for part in parts for child in (part if isinstance(part, tuple) else (part,)))
    sizes[id(node)] = 1 + sum(_expanded(child, sizes) for child in flat)
    return sizes[id(node)]
