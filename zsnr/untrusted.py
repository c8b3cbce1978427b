"""Reading of small untrusted files: with limits, and without executing anything in them."""

from __future__ import annotations

import difflib
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
_MACHINE = {  # errors of the storage or the machine, not of a file
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE),
}
_MAX_ENTRIES = 2_000_000
_MAX_TEXT = 64 * 2**20
_MAX_JSON = 8 * 2**20
_MAX_YAML = 200_000
_MAX_NODES = 200_000


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading; yields the file and its size.

    Raises:
        ValueError: The path does not exist, is a folder, a pipe or a device, or holds another kind
            of file, see `disguise`.
        OSError: The storage or the machine failed, so the file may be intact.
    """
    try:
        # Without O_NONBLOCK a pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        if _is_of_machine(error):
            raise
        reason = getattr(error, "strerror", None) or error
        near = near_path(path) if isinstance(error, FileNotFoundError) else ""
        raise ValueError(f"{path} cannot be read: {reason}.{near}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file.")
    with os.fdopen(descriptor, "rb") as file:
        disguised_as = disguise(file.read(_HEAD))
        if disguised_as is not None:
            raise ValueError(f"{path} is {disguised_as}.")
        file.seek(0)
        yield file, status.st_size


def near_path(path: Path) -> str:
    """Suggest a path like one that does not exist: " Did you mean X?", or "" if there is none.

    Args:
        path: The path, of which the first part that does not exist is taken for mistyped.
    """
    first = next((each for each in (path, *path.parents) if each.parent.is_dir()), path)
    try:
        names = {name for name in os.listdir(first.parent) if name[0] != "."} - {first.name}
    except OSError:
        return ""
    near = difflib.get_close_matches(first.name, names, n=1, cutoff=0.7)
    return f" Did you mean {first.parent / near[0]}?" if near else ""


def check_inside(file: Path, folder: Path) -> None:
    """Check that a file is in the folder, or in the blob store of the folder's hub cache.

    Raises:
        ValueError: The file is a link to another place.
    """
    real, home = file.resolve(), folder.resolve()
    snapshots = (above.parent / "blobs" for above in home.parents if above.name == "snapshots")
    if not any(real.is_relative_to(place) for place in (home, *snapshots)):
        raise ValueError(f"{file} is a link out of {folder}: wanted a file inside the folder.")


def disguise(head: bytes) -> str | None:
    """Recognize a wrong kind of file by its first bytes, such as a saved error page.

    Args:
        head: The first 512 bytes, or all of a shorter file.

    Returns:
        A description such as "an HTML page", with a remedy. None = the file is not recognized.
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


_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive or a pickle of torch.save: rename or convert it",
    b"\x80": "a pickle: rename or convert it",
    b"GGUF": "a GGUF file of quantized weights: download the original weights",
    b"\x1f\x8b": "compressed: unpack it",
    b"\x89HDF": "an HDF5 file: download the .safetensors weights",
}


def other_format(head: bytes) -> str | None:
    """Recognize weights of another format, and texts, by the first bytes of a .safetensors file.

    Args:
        head: The first bytes, at least 64 of a longer file.

    Returns:
        A description such as "a GGUF file", with a remedy. None = it is not recognized.
    """
    if head[8:9] == b"{":
        return None  # after eight bytes of length, the header starts
    for start, kind in _OTHER_FORMATS.items():
        if head.startswith(start):
            return kind
    if head.lstrip().startswith(b"{"):
        return "a JSON text, such as a server's message: download the file again"
    if len(head) > 16 and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head[:64]):
        return "a text, such as a server's message: download the file again"
    return None


def check_archive(file: BinaryIO, size: int, label: str) -> None:
    """Check that an archive of torch.save is harmless before torch loads it.

    Args:
        file: The archive, at its start.
        size: Its size in bytes.
        label: Its name, for the error.

    Raises:
        ValueError: The file is not such an archive, is compressed, so that it could expand, or its
            pickle holds more than plain values, see `read_inert` and `check_extent`.
    """
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    except Exception as error:  # damaged archives fail in many ways
        _raise_unreadable(label, error)
    packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
    if packed or sum(member.file_size for member in members) > size:
        raise ValueError(f"{label} is compressed: wanted a checkpoint as training writes it.")
    try:
        names = [m for m in members if m.filename.rpartition("/")[2] == "data.pkl"]
        check_extent(read_inert(archive.read(names[0]), size))
    except Exception as error:  # damaged archives fail in many ways
        _raise_unreadable(label, error)


def _raise_unreadable(label: str | Path, error: Exception) -> NoReturn:
    if _is_of_machine(error):
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(label)
        raise error
    reason = clipped(str(error) or repr(error))
    raise ValueError(f"{label} is not a readable checkpoint: {reason}.") from error


def _is_of_machine(error: Exception) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in _MACHINE


def open_archive(path: Path) -> dict[str, Any]:
    """Open a file of torch.save on the CPU: memory-mapped tensors, and plain values.

    Raises:
        ValueError: The file fails `check_archive`, or holds other objects.
    """
    with open_regular(path) as (file, size):
        check_archive(file, size, str(path))
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values.") from error
    except Exception as error:  # a pickle may fail in any way
        _raise_unreadable(path, error)
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is not a checkpoint: it holds {shown(contents)}.")
    _check_storages(path, contents)
    return contents


def _check_storages(path: Path, value: Any) -> None:
    """Check that no tensor is larger than its data, as expanded tensors are.

    Raises:
        ValueError: A tensor is larger than its data, or not dense.
    """
    waiting, checked = [value], set()
    while waiting:
        current = waiting.pop()
        if id(current) in checked:
            continue
        checked.add(id(current))
        if isinstance(current, torch.Tensor):
            if current.is_sparse or current.is_quantized or current.is_nested:
                raise ValueError(f"{path} holds a tensor that is not dense.")
            if current.numel() * current.itemsize > current.untyped_storage().nbytes():
                raise ValueError(f"{path} holds a tensor that is larger than its data.")
        elif isinstance(current, dict):
            waiting += current.values()
        elif isinstance(current, list | tuple):
            waiting += current


def check_size(path: Path, limit: int) -> None:
    """Refuse a file that is too large for a library to read at once.

    Raises:
        ValueError: The path is not a file, or the file is larger than the limit.
    """
    with open_regular(path) as (_, size):
        if size > limit:
            raise ValueError(f"{path} has {size} bytes: wanted at most {limit}.")


def read_small(path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises:
        ValueError: The file is larger, or cannot be read.
    """
    with open_regular(path) as (file, size):
        data = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        raise ValueError(f"{path} has {max(size, len(data))} bytes: wanted at most {limit}.")
    return data


def decode(data: bytes, label: str) -> str:
    """Decode UTF-8 text, and remove a byte order mark.

    Raises:
        ValueError: The text has another encoding.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{label} is UTF-16 text, not UTF-8 text: save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{label} is not UTF-8 text: {error.reason} in line {line}. Save it as UTF-8."
        ) from error


def read_text(path: Path, limit: int = _MAX_TEXT) -> str:
    """Read a text file of at most `limit` bytes.

    Raises:
        ValueError: The file is larger, cannot be read, or is not UTF-8.
    """
    return decode(read_small(path, limit), str(path))


def parse_json(
    text: str, *, strict: bool = False, limit: int = _MAX_ENTRIES, repeated: bool = False
) -> Any:
    """Parse JSON.

    Args:
        text: The JSON.
        strict: Refuse NaN and Infinity, which Python writes although they are not JSON.
        limit: Maximum number of entries; half of it is the maximum of lists and objects.
        repeated: Use the last value of a repeated key, instead of refusing it.

    Raises:
        ValueError: The text is not JSON; the message is the reason, without a period.
    """
    if text.count("[") + text.count("{") > limit // 2 or text.count(",") > limit:
        raise ValueError(f"it has over {limit // 2} lists and objects, or {limit} entries")
    try:
        return json.loads(
            text,
            object_pairs_hook=None if repeated else _once,
            parse_constant=_refuse if strict else None,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def parse_object(
    data: bytes, label: str, *, strict: bool = False, repeated: bool = False
) -> dict[str, Any]:
    """Parse one JSON object, see `parse_json`, and limit its nesting depth.

    Args:
        data: The file's content.
        label: Its name, for the error.
        strict: As in `parse_json`.
        repeated: As in `parse_json`.

    Raises:
        ValueError: The content is not a JSON object.
    """
    text = decode(data, label)
    try:
        value = parse_json(text, strict=strict, repeated=repeated)
        check_extent(value)
    except ValueError as error:
        raise ValueError(f"{label} is not readable JSON: {clipped(str(error))}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{label} is {shown(value)}: wanted a JSON object.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with one JSON object, see `parse_json`."""
    return parse_object(read_small(path, _MAX_JSON), str(path))


def read_yaml(path: Path) -> Any:
    """Read a YAML file, see `parse_yaml`.

    Raises:
        ValueError: The file is not YAML of plain values.
    """
    text = read_yaml_text(path)
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not readable YAML: {error}.") from error


def read_yaml_text(path: Path) -> str:
    """Read the text of a YAML file of a plausible size."""
    return read_text(path, _MAX_YAML)


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values, without Python tags, repeated keys and exploding aliases.

    Raises:
        ValueError: The text is not such YAML; the message is the reason, without a period.
    """
    return _load(text)[1]


def compose_yaml(text: str) -> Any:
    """Parse YAML as `parse_yaml`, and return its root node, which has lines and spellings.

    Raises:
        ValueError: As in `parse_yaml`.
    """
    return _load(text)[0]


def _load(text: str) -> tuple[Any, Any]:
    """Return the root node of YAML, and its value."""
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Reads 1e-4 as a number, and does not parse dates, like the training command."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
    )
    if len(text) > _MAX_YAML:
        raise ValueError(f"it has over {_MAX_YAML} characters")
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        if _expanded(node, {}) > _MAX_NODES:
            raise ValueError("its aliases expand to too many values")
        return node, loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_yaml_reason(error, text)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, OverflowError, TypeError, AttributeError) as error:
        raise ValueError(clipped(str(error), 300)) from error


def clipped(text: str, limit: int = 120) -> str:
    """Shorten untrusted text to fit in a message, on one line."""
    line = " ".join(text[: 10 * limit].split())
    return line if len(line) <= limit and len(text) <= 10 * limit else f"{line[:limit]}..."


def shown(value: object) -> str:
    """Describe an untrusted value briefly."""
    if isinstance(value, str):
        return clipped(repr(value[:1000]))
    if value is None or isinstance(value, float | bool):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**20 else "a huge number"
    return f"a {type(value).__name__}"


def printable(text: str, *, one_line: bool = False) -> str:
    """Escape characters that control a terminal or reorder its text.

    Control characters, bidirectional controls and zero-width characters become escapes such as
    \\x1b and \\u202e. Joiners between letters and emoji are not escaped.

    Args:
        text: The text to print.
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
    """Return the line and the reason of a YAML error."""
    mark = error.problem_mark
    if mark is None:
        return clipped(str(error), 300)
    lines = text.splitlines()[mark.line : mark.line + 1]
    if "\t" in "".join(lines)[: mark.column + 1]:
        return f"line {mark.line + 1} is indented with a tab: use spaces"
    return f"line {mark.line + 1}: {clipped(error.problem or str(error), 250)}"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{shown(repeated)} appears twice")
    return mapping


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a JSON number")


def _expanded(node: Any, sizes: dict[int, float]) -> float:
    """Count the nodes of a YAML node with all aliases expanded; infinite for a cycle.

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
                raise ValueError(f"line {line}: {shown(key.value)} appears twice")
            keys.add(key.value)
    flat = (child for part in parts for child in (part if isinstance(part, tuple) else (part,)))
    sizes[id(node)] = 1 + sum(_expanded(child, sizes) for child in flat)
    return sizes[id(node)]
