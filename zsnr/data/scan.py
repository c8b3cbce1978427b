"""Scanning of a shard or folder for samples, from headers alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

from zsnr.data.captions import NO_CAPTION, TEXTS, is_text, parse_record, text_fields
from zsnr.data.faults import Fault, as_utf8
from zsnr.data.formats import HeaderCut, image_size
from zsnr.data.sources import IMAGE_SUFFIXES, METADATA, Shard, folder_files
from zsnr.data.storage import NOT_A_FILE, NotAFileError, Storage, is_remote
from zsnr.untrusted import disguise

if TYPE_CHECKING:
    import pyarrow as pa

FIELD = "json."
"""Prefix of the columns that hold fields of the json."""

PARTS = ("image", "text", "json")
"""The parts of a sample."""

NUMBERS = {"height": "int32", "width": "int32"} | {
    f"{part}_{number}": "int64" for part in PARTS for number in ("offset", "size")
}
"""Data type of each required numeric column of the index."""

_LONGEST = 64  # characters; longer texts, such as captions and addresses, are useless for filters
_HEADER = 16 << 10  # bytes of an image that nearly always contain its size
_LARGEST = {"image": 1 << 30, "text": 1 << 20, "json": 8 << 20}  # bytes of a part
_MAX_FIELDS = 256  # columns of a shard; a json with more fields adds none
_MAX_ENDINGS = 16  # distinct endings in a note
_BLOCK = 512  # bytes of a tar block
_RECORDS = 20 * _BLOCK  # bytes of a tar record, which is padded with zeros
_MAX_EXTENDED = 1 << 20  # bytes of an extended tar header
_LONGEST_NAME = 4096  # bytes
_PACKED = {  # first bytes of archives that are often mistaken for tar files
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
}
_NOT_FILES = (NotAFileError, IsADirectoryError)
_OF_THE_FILE = (FileNotFoundError, NotADirectoryError, PermissionError, *_NOT_FILES)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one shard.

    Args:
        table: One row per sample, in the shard's order: key, height, width (after EXIF
            orientation); offset and size in bytes of image, text and json (-1 = there is none);
            `TEXTS`, the fields that may hold its caption; fields of the json as "json.FIELD".
        faults: Faults of the shard.
        size: Size of the shard, in bytes.
        changed: Modification time of a local shard, in ns since 1970; 0 = unknown.
        digest: A hash of the rows.
    """

    table: pa.Table
    faults: list[Fault]
    size: int
    changed: int
    digest: str


def make_index(shard: Shard, storage: Storage) -> ShardIndex:
    """Index one shard or folder; damaged bytes become faults, not errors.

    Raises:
        OSError: The shard cannot be read, so it is unknown whether it is damaged.
    """
    index = _index_folder if shard.kind == "folder" else _index_tar
    return index(shard, storage)


def file_state(url: str) -> tuple[int, int]:
    """Return size and modification time of a local file; zeros = there is no such file."""
    if is_remote(url) or not os.path.isfile(url):
        return 0, 0
    stat = os.stat(url)
    return stat.st_size, stat.st_mtime_ns


class _Rows:
    """Collects the rows and faults of a shard."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.rows: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        """Remarks on the shard that are not faults."""
        self._others: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._fields: dict[str, None] = {}
        self._left_out: list[str] = []
        self._num_left_out = 0

    def shard_fault(self, reason: str) -> None:
        self.faults.append(Fault("shard", self.shard.url, None, reason))

    def sample_fault(self, key: str, reason: str) -> None:
        self.faults.append(Fault("sample", self.shard.url, key, reason))

    def count_other(self, name: str) -> None:
        """Count a file that is not a part of a sample."""
        ending = as_utf8(PurePosixPath(name).suffix.lower()) or "without an ending"
        if ending not in self._others and len(self._others) >= _MAX_ENDINGS:
            ending = "of other endings"
        self._others[ending] += 1
        self._examples.setdefault(ending, as_utf8(name)[:100])

    def add(
        self,
        key: str,
        size: tuple[int, int],
        spans: dict[str, tuple[int, int]],
        record: dict[str, Any],
        texts: str,
    ) -> None:
        row: dict[str, Any] = {"key": key, "height": size[0], "width": size[1], TEXTS: texts}
        for part in PARTS:
            row[f"{part}_offset"], row[f"{part}_size"] = spans.get(part, (-1, -1))
        for name in record:
            if name in self._fields:
                continue
            if len(record) <= _MAX_FIELDS and len(self._fields) < _MAX_FIELDS:
                self._fields[name] = None
            else:
                self._num_left_out += 1
                if len(self._left_out) < 3 and name not in self._left_out:
                    self._left_out.append(name)
        row["record"] = {n: value for n, value in record.items() if n in self._fields}
        self.rows.append(row)

    def _note(self) -> list[Fault]:
        notes = self.notes
        if self._others:
            counts = (f"{n} {e} (such as {self._examples[e]})" for e, n in self._others.items())
            notes.append(f"files that are not an image of a sample: {', '.join(counts)}")
        if self._left_out:
            notes.append(
                f"over {_MAX_FIELDS} fields of json: {self._num_left_out} values are left out, "
                f"such as those of {', '.join(self._left_out)}, and filters cannot use them"
            )
        return [Fault("note", self.shard.url, None, "; ".join(notes))] if notes else []

    def index(self, size: int, changed: int = 0) -> ShardIndex:
        import pyarrow as pa

        columns: dict[str, Any] = {"key": pa.array([r["key"] for r in self.rows], pa.string())}
        for name, kind in NUMBERS.items():
            columns[name] = pa.array([r[name] for r in self.rows], kind)
        columns[TEXTS] = pa.array([r[TEXTS] for r in self.rows], pa.string()).dictionary_encode()
        for name in sorted(self._fields):
            columns[FIELD + name] = _column([row["record"].get(name) for row in self.rows])
        digest = hashlib.blake2b(digest_size=16)
        decisive = ["key", *(name for name in NUMBERS if not name.endswith("_offset"))]
        for row in self.rows:
            facts = [row[name] for name in decisive]
            digest.update((json.dumps(facts) + "\n").encode())
        faults = self.faults + self._note()
        return ShardIndex(pa.table(columns), faults, size, changed, digest.hexdigest())


def part_file(folder: str, key: str, part: str) -> str:
    """Return the path of a sample's part in a folder of images."""
    if part == "json":
        return f"{folder}/{METADATA}"
    if part == "image":
        return f"{folder}/{key}"
    stem = f"{folder}/{PurePosixPath(key).with_suffix('')}"
    endings = (end for end in (".txt", ".TXT", ".Txt") if Path(stem + end).is_file())
    return stem + next(endings, ".txt")


def _index_tar(shard: Shard, storage: Storage) -> ShardIndex:
    rows = _Rows(shard)
    size, changed = file_state(shard.url)
    try:
        size = storage.size(shard.url)
        with storage.open(shard.url) as file:
            _read_tar(rows, file, size)
    except FileNotFoundError:
        rows.shard_fault("missing")
    except _NOT_FILES:
        rows.shard_fault(NOT_A_FILE)
    except EOFError as error:
        rows.shard_fault(_line(error))
        return rows.index(0)  # not written to a file: the next attempt may succeed
    return rows.index(size, changed)


def _read_tar(rows: _Rows, file: BinaryIO, end: int) -> None:
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    twice: set[str] = set()
    head = file.read(_BLOCK)
    problem = next((problem for start, problem in _PACKED.items() if head.startswith(start)), None)
    if head and (problem := problem or disguise(head)):
        rows.shard_fault(f"not a tar file: {problem}")
        return
    try:
        for name, offset, size in _members(rows, file, end):
            key, suffix = _split(name)
            if name.rpartition("/")[2].startswith("."):
                rows.count_other(name)
                continue
            parts = groups.setdefault(key, {})
            if suffix in parts:
                twice.add(key)
            parts[suffix] = (offset, size)
    except ValueError as error:
        rows.shard_fault(_line(error))
    for key, parts in groups.items():
        if key in twice:
            rows.sample_fault(key, "the shard has two files of this name")
        elif any(offset + size > end for offset, size in parts.values()):
            rows.sample_fault(key, "cut short: it extends beyond the shard's end")
        else:
            _add_member(rows, file, key, parts)


def _members(rows: _Rows, file: BinaryIO, end: int) -> Iterator[tuple[str, int, int]]:
    """Iterate over the headers of a tar file: name, offset and size of each regular file.

    The iterator of `tarfile` never ends at a negative size (Python 3.11), and reads extended
    headers of any size.

    Raises:
        ValueError: The file is damaged, or is not a tar file.
    """
    position, attributes = 0, dict[str, str]()
    while True:
        if position > end:
            raise ValueError("cut short or overwritten: the tar file has no end")
        file.seek(position)
        block = file.read(_BLOCK)
        if block == bytes(_BLOCK) and (position or end <= _RECORDS):
            _look_behind(rows, file, end - position)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.size < 0:
                raise tarfile.HeaderError(f"a size of {header.size}")
        except (tarfile.HeaderError, ValueError) as error:
            if position == 0:
                raise ValueError(f"not a readable tar file: {_line(error)}") from error
            reason = f": {_line(error)} at byte {position}" if block else ""
            raise ValueError(
                f"cut short or overwritten: the tar file has no end{reason}"
            ) from error
        position += _BLOCK
        if header.type in _EXTENDED:
            if header.size > _MAX_EXTENDED:
                raise ValueError(
                    f"a tar header of {header.size} bytes: wanted at most {_MAX_EXTENDED}"
                )
            data = file.read(header.size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                attributes["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                attributes |= _extended(data)
            position += -(-header.size // _BLOCK) * _BLOCK
            continue
        name, size = attributes.get("path", header.name).removeprefix("./"), header.size
        if "size" in attributes:
            size = int(attributes["size"]) if attributes["size"].isdecimal() else -1
            if not 0 <= size <= end:
                raise ValueError(f"a tar header with a size of {attributes['size'][:20]}")
        sparse = header.type == tarfile.GNUTYPE_SPARSE
        sparse = sparse or any(key.startswith("GNU.sparse.") for key in attributes)
        attributes = {}
        more = block[482:483] if header.type == tarfile.GNUTYPE_SPARSE else b""
        while more.strip(b"\0"):  # blocks that continue the list of holes
            file.seek(position)
            more = file.read(_BLOCK)[504:505]
            position += _BLOCK
        if sparse or len(name) > _LONGEST_NAME:
            rows.sample_fault(
                name[:100], "a sparse file" if sparse else "a name of over 4096 bytes"
            )
        elif header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            yield name, position, size
        elif header.type not in (tarfile.DIRTYPE, b"V"):  # V = the label of a volume
            rows.count_other(name)
        if header.type not in _WITHOUT_DATA:
            position += -(-size // _BLOCK) * _BLOCK


_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)


def _extended(data: bytes) -> dict[str, str]:
    """Read the relevant records of a pax header, each "LENGTH KEY=VALUE" and a newline."""
    attributes, position = {}, 0
    while record := _RECORD.match(data, position):
        end = position + int(record[1])
        if not record.end() < end <= len(data):
            break
        key, value = record[2].decode("utf-8", "replace"), data[record.end() : end - 1]
        if key in ("path", "size") or key.startswith("GNU.sparse."):
            attributes[key] = value.decode("utf-8", "surrogateescape")
        position = end
    if data[position:].strip(b"\0"):
        raise ValueError("a damaged pax header in the tar file")
    return attributes


_RECORD = re.compile(rb"(\d{1,8}) ([^=]{1,1000})=")


def _look_behind(rows: _Rows, file: BinaryIO, bytes_left: int) -> None:
    """Note data after a tar file's end, such as where two tar files were joined by cat."""
    if bytes_left > _RECORDS and file.read(1 << 20).strip(b"\0"):
        rows.notes.append("data after the tar file's end is not read: join tar files with tar -A")


def _add_member(rows: _Rows, file: BinaryIO, key: str, parts: dict[str, tuple[int, int]]) -> None:
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in parts), None)
    text, record = parts.get("txt"), parts.get("json")
    dotted = [name for name in parts if name.rpartition(".")[2] in IMAGE_SUFFIXES]
    if suffix is None and not dotted:
        others = (name for name in parts if name not in ("txt", "json"))
        suffix = next((name for name in others if _is_image(file, parts[name])), None)
    if suffix is None and not dotted and text is record is None:
        for name in parts:
            rows.count_other(f"{key}.{name}" if name else key)
        return
    try:
        if suffix is None and dotted:
            names = " and ".join(f"{key}.{name}" for name in list(parts)[:2])
            raise ValueError(
                f"{len(parts)} files have the same key, such as {names}: the first dot of a name "
                "ends the key"
            )
        if suffix is None:
            raise ValueError(f"it has no image, only {', '.join(map(repr, list(parts)[:5]))}")
        spans = {"image": parts[suffix], "text": text, "json": record}
        spans_present = {part: span for part, span in spans.items() if span is not None}
        if spans_present.keys() <= {"image"}:
            raise ValueError(f"{NO_CAPTION} (txt or json)")
        size = _measure(file, *_bounded("image", spans_present["image"]))
        content = {
            part: _read(file, *_bounded(part, span))
            for part, span in spans_present.items()
            if part != "image"
        }
        fields = parse_record(content["json"]) if "json" in content else {}
        texts = text_fields(content.get("text"), fields)
    except ValueError as error:
        rows.sample_fault(key, _line(error))
        return
    rows.add(key, size, spans_present, _filterable(fields), texts)


def _bounded(part: str, span: tuple[int, int]) -> tuple[int, int]:
    if span[1] > _LARGEST[part]:
        raise ValueError(f"its {part} has {span[1]} bytes: wanted at most {_LARGEST[part]}")
    return span


def _is_image(file: BinaryIO, span: tuple[int, int]) -> bool:
    try:
        _measure(file, *_bounded("image", span))
    except ValueError:
        return False
    return True


def _index_folder(shard: Shard, storage: Storage) -> ShardIndex:
    folder, rows = Path(shard.url), _Rows(shard)
    files = list(folder_files(folder))
    entries = _read_metadata(rows, storage, f"{shard.url}/{METADATA}")
    names = [path.relative_to(folder).as_posix() for path in files]
    tables = [name for name in names if PurePosixPath(name).stem == "metadata"]
    unread = [name for name in tables if name != METADATA]
    used = {METADATA}
    for key, path in zip(names, files, strict=True):
        suffix = path.suffix.lower().lstrip(".")
        if suffix in ("txt", "json", "jsonl", "csv", "parquet"):
            continue
        try:
            url, text = f"{shard.url}/{key}", part_file(shard.url, key, "text")
            with storage.open(url) as file:
                image = 0, file.seek(0, os.SEEK_END)
                spans = {"image": _bounded("image", image)}
                if suffix not in IMAGE_SUFFIXES and not _is_image(file, image):
                    continue
                used.add(key)
                size = _measure(file, *image)
            if not is_text(key):
                raise ValueError("its name is not UTF-8: rename it")
            content = None
            if Path(text).is_file():
                used.add(text.removeprefix(f"{shard.url}/"))
                spans["text"] = _bounded("text", (0, storage.size(text)))
                content = storage.read(text, *spans["text"])
            fields: dict[str, Any] = {}
            if key in entries:
                spans["json"] = entries.pop(key)
                record = storage.read(f"{shard.url}/{METADATA}", *spans["json"])
                fields = parse_record(record)
            if len(spans) == 1:
                tip = f"; {unread[0]} is not read: write it as {METADATA}" if unread else ""
                raise ValueError(
                    f"{NO_CAPTION}: no .txt file of its name, no line in {METADATA}{tip}"
                )
            rows.add(key, size, spans, _filterable(fields), text_fields(content, fields))
        except (ValueError, EOFError, *_OF_THE_FILE) as error:
            if suffix in IMAGE_SUFFIXES or key in used:
                used.add(key)
                strange = isinstance(error, _NOT_FILES)
                rows.sample_fault(key, NOT_A_FILE if strange else _line(error))
    for name in names:
        if name not in used:
            rows.count_other(name)
    for key in entries:
        if ".." in PurePosixPath(key).parts or PurePosixPath(key).is_absolute():
            rows.sample_fault(key, f"{METADATA} names it, but it is outside of the folder")
        elif not (folder / key).is_file():  # else the metadata of another folder lists it
            rows.sample_fault(key, f"{METADATA} names it, but there is no such image")
    if not rows.rows and not rows.faults:
        rows.shard_fault("no image in this folder")
    return rows.index(sum(row["image_size"] for row in rows.rows))


def _read_metadata(rows: _Rows, storage: Storage, url: str) -> dict[str, tuple[int, int]]:
    """Read offset and size of each image's line, by the image's name."""
    entries: dict[str, tuple[int, int]] = {}
    if not Path(url).is_file():
        return entries
    offset, limit = 0, _LARGEST["json"]
    with storage.open(url) as lines:
        for number in itertools.count(1):
            line = lines.readline(limit)
            span, offset = (offset, len(line)), offset + len(line)
            if not line:
                break
            try:
                if len(line) == limit:
                    while line and not line.endswith(b"\n"):
                        line = lines.readline(limit)
                        offset += len(line)
                    raise ValueError(f"it has {limit} bytes or more")
                if not line.strip():
                    continue
                name = parse_record(line).get("file_name")
                if not isinstance(name, str) or not is_text(name):
                    raise ValueError("it has no file_name")
                entries[name.removeprefix("./")] = span
            except ValueError as error:
                rows.sample_fault(f"{METADATA}, line {number}", _line(error))
    return entries


def _split(name: str) -> tuple[str, str]:
    """Split a member's name into the sample's key and suffix."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return as_utf8(folder + slash + stem), as_utf8(suffix.lower())


def _filterable(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in record.items()
        if len(name) <= _LONGEST and is_text(name) and _is_filterable(value)
    }


def _is_filterable(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST and is_text(value)
    if isinstance(value, int):
        return value.bit_length() <= 1000  # a larger one is not a float
    return isinstance(value, float) and value == value


def _measure(file: BinaryIO, offset: int, size: int) -> tuple[int, int]:
    """Read height and width from an image's first bytes."""
    length = min(size, _HEADER)
    while True:
        data = _read(file, offset, length)
        if data[:4] in (b"II*\0", b"MM\0*"):  # a TIFF may store its header anywhere
            data += file.read(size - length)
        try:
            return image_size(data)
        except HeaderCut:
            if length == size:
                raise
            length = min(size, 8 * length)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _column(values: Sequence[Any]) -> pa.Array:
    """Make a column; values of mixed types become text, integers become floats."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return pa.array([None if v is None else float(v) for v in values], pa.float64())
    if len(kinds) > 1:
        values = [v if v is None or isinstance(v, str) else json.dumps(v) for v in values]
    return pa.array(values)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
