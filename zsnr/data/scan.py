"""The samples of one shard or folder, found from headers alone."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from zsnr.data.faults import Fault
from zsnr.data.images import HeaderCut, image_size
from zsnr.data.sources import IMAGE_SUFFIXES, Shard, pictures
from zsnr.data.storage import Storage, is_remote

if TYPE_CHECKING:
    import pyarrow as pa

FIELD = "json."
"""Prefix of the columns that hold fields of the json."""

METADATA = "metadata.jsonl"

_PARTS = ("image", "text", "json")
_LONGEST = 64  # characters; longer texts, such as captions and addresses, are no filter's business
_HEADER = 16 << 10  # bytes of a picture that nearly always hold its size


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one shard.

    Args:
        table: A row a sample, in the shard's order: key, height, width (as seen), and for each of
            image, text and json its offset and size in bytes (-1 = there is none); the fields of
            the json are columns named "json.FIELD".
        faults: What is broken in the shard.
        size: Of the shard, in bytes.
        changed: When a local shard was last changed, in ns since 1970; 0 = unknown.
        digest: A hash of the rows.
    """

    table: pa.Table
    faults: list[Fault]
    size: int
    changed: int
    digest: str


def make_index(shard: Shard, storage: Storage) -> ShardIndex:
    """Index one shard or folder; what is broken in its bytes becomes a fault, not an error.

    Raises:
        OSError: It cannot be read, which says nothing about its bytes.
    """
    index = _index_folder if shard.kind == "folder" else _index_tar
    return index(shard, storage)


def file_state(url: str) -> tuple[int, int]:
    """Size and time of change of a local file; zeros = there is none."""
    if is_remote(url) or not os.path.isfile(url):
        return 0, 0
    stat = os.stat(url)
    return stat.st_size, stat.st_mtime_ns


class _Rows:
    """Rows and faults of a shard, as they are found."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.rows: list[dict[str, Any]] = []
        self.faults: list[Fault] = []

    def shard_fault(self, reason: str) -> None:
        self.faults.append(Fault("shard", self.shard.url, None, reason))

    def sample_fault(self, key: str, reason: str) -> None:
        self.faults.append(Fault("sample", self.shard.url, key, reason))

    def add(
        self,
        key: str,
        size: tuple[int, int],
        spans: dict[str, tuple[int, int]],
        record: dict[str, Any],
    ) -> None:
        row: dict[str, Any] = {"key": key, "height": size[0], "width": size[1]}
        for part in _PARTS:
            row[f"{part}_offset"], row[f"{part}_size"] = spans.get(part, (-1, -1))
        row["record"] = record
        self.rows.append(row)

    def index(self, size: int, changed: int = 0) -> ShardIndex:
        import pyarrow as pa

        columns: dict[str, Any] = {"key": pa.array([r["key"] for r in self.rows], pa.string())}
        for name in ("height", "width"):
            columns[name] = pa.array([r[name] for r in self.rows], pa.int32())
        for part in _PARTS:
            for name in (f"{part}_offset", f"{part}_size"):
                columns[name] = pa.array([r[name] for r in self.rows], pa.int64())
        fields = sorted({name for row in self.rows for name in row["record"]})
        for name in fields:
            columns[FIELD + name] = _column([row["record"].get(name) for row in self.rows])
        digest = hashlib.blake2b(digest_size=16)
        sizes = [f"{part}_size" for part in _PARTS]
        for row in self.rows:
            facts = [row[name] for name in ("key", "height", "width", *sizes)]
            digest.update((json.dumps(facts) + "\n").encode())
        return ShardIndex(pa.table(columns), self.faults, size, changed, digest.hexdigest())


def _index_tar(shard: Shard, storage: Storage) -> ShardIndex:
    rows = _Rows(shard)
    size, changed = file_state(shard.url)
    try:
        size = storage.size(shard.url)
        with storage.open(shard.url) as file:
            _read_tar(rows, file, size)
    except FileNotFoundError:
        rows.shard_fault("missing")
    except EOFError as error:
        rows.shard_fault(_line(error))
    return rows.index(size, changed)


def _read_tar(rows: _Rows, file: BinaryIO, end: int) -> None:
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    twice: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, suffix = _split(member.name)
                parts = groups.setdefault(key, {})
                if suffix in parts:
                    twice.add(key)
                parts[suffix] = (member.offset_data, member.size)
            file.seek(tar.offset)
            whole = file.read(512) == bytes(512)
    except tarfile.TarError as error:
        if not groups:
            rows.shard_fault(f"not a readable tar file: {_line(error)}")
            return
        whole = False
    if not whole:
        rows.shard_fault("cut short or overwritten: the tar file has no end")
    for key, parts in groups.items():
        if key in twice:
            rows.sample_fault(key, "a file of this name stands in the shard twice")
        elif any(offset + size > end for offset, size in parts.values()):
            rows.sample_fault(key, "cut short: it goes beyond the shard's end")
        else:
            _add_member(rows, file, key, parts)


def _add_member(rows: _Rows, file: BinaryIO, key: str, parts: dict[str, tuple[int, int]]) -> None:
    spans = {
        "image": next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None),
        "text": parts.get("txt"),
        "json": parts.get("json"),
    }
    found = {part: span for part, span in spans.items() if span is not None}
    try:
        if "image" not in found:
            raise ValueError("it has no picture")
        record: dict[str, Any] = {}
        if "json" in found:
            record = read_fields(_read(file, *found["json"]))
        if found.keys() <= {"image"}:
            raise ValueError("it has no caption (txt or json)")
        size = _measure(file, *found["image"])
    except ValueError as error:
        rows.sample_fault(key, _line(error))
        return
    rows.add(key, size, found, record)


def _index_folder(shard: Shard, storage: Storage) -> ShardIndex:
    folder, rows = Path(shard.url), _Rows(shard)
    entries = _read_metadata(rows, folder / METADATA)
    for path in pictures(folder):
        key = path.relative_to(folder).as_posix()
        spans: dict[str, tuple[int, int]] = {"image": (0, path.stat().st_size)}
        text = path.with_suffix(".txt")
        if text.is_file():
            spans["text"] = (0, text.stat().st_size)
        span, record = entries.pop(key, (None, {}))
        if span is not None:
            spans["json"] = span
        try:
            if len(spans) == 1:
                raise ValueError(f"it has no caption: no {text.name}, no line in {METADATA}")
            with storage.open(str(path)) as file:
                size = _measure(file, *spans["image"])
        except (ValueError, EOFError, FileNotFoundError) as error:
            rows.sample_fault(key, _line(error))
            continue
        rows.add(key, size, spans, record)
    for key in entries:
        rows.sample_fault(key, f"{METADATA} names it, but there is no such picture")
    return rows.index(sum(row["image_size"] for row in rows.rows))


def _read_metadata(rows: _Rows, path: Path) -> dict[str, tuple[tuple[int, int], dict[str, Any]]]:
    """Read where each picture's line is, and its fields, by the picture's name."""
    entries: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}
    if not path.is_file():
        return entries
    offset = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            span, offset = (offset, len(line)), offset + len(line)
            if not line.strip():
                continue
            try:
                record = read_fields(line)
                name = json.loads(line).get("file_name")
                if not isinstance(name, str):
                    raise ValueError("there is no file_name")
                entries[name.removeprefix("./")] = (span, record)
            except ValueError as error:
                rows.sample_fault(f"{METADATA}, line {number}", _line(error))
    return entries


def _split(name: str) -> tuple[str, str]:
    """Split a member's name into the sample's key and the suffix."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def read_fields(data: bytes) -> dict[str, Any]:
    """Read the fields of a json that filters may use: numbers, truth values and short texts."""
    try:
        record = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its json is unreadable: {_line(error)}") from error
    if not isinstance(record, dict):
        raise ValueError("its json is no object")
    return {
        name: value
        for name, value in record.items()
        if (isinstance(value, int | float) and value == value)
        or (isinstance(value, str) and len(value) <= _LONGEST)
    }


def _measure(file: BinaryIO, offset: int, size: int) -> tuple[int, int]:
    """Read height and width from a picture's first bytes."""
    length = min(size, _HEADER)
    while True:
        try:
            return image_size(_read(file, offset, length))
        except HeaderCut:
            if length == size:
                raise
            length = min(size, 8 * length)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _column(values: Sequence[Any]) -> pa.Array:
    """Make a column; of several types it becomes text, of huge integers floats."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    if len(kinds) > 1:
        values = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return pa.array(values)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
