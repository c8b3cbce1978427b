"""A shard's index as a Parquet file: written, and read as untrusted input.

Anyone who can write beside the shards can write an index. So the footer is checked before any row
is decoded, and the rows before they are used: no row may point outside the shard, or take more
memory than the index of a shard of that size would.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from zsnr.data.captions import TEXTS, parse_text_fields
from zsnr.data.faults import Fault, PackedFaults, as_fault
from zsnr.data.scan import FIELD, NUMBERS, PARTS, ShardIndex
from zsnr.data.thrift import read_struct
from zsnr.files import replacing
from zsnr.untrusted import clipped, open_regular, parse_object, shown

if TYPE_CHECKING:
    import pyarrow as pa

_VERSION = 1
_CODECS = {0, 1}  # Parquet's numbers of no compression and snappy, which expands at most 20-fold
_DICTIONARY = {2, 8}
_ENCODINGS = {0, 3, 4, *_DICTIONARY}  # plain, run length, bit-packed, dictionaries
_MIN_BYTES_PER_ROW = 512  # of a shard: one header of a tar file
_MAX_CELLS = 1 << 25  # rows times columns; larger files may have more
_CELLS_PER_BYTE = 16
_TEXT_PER_BYTE = 64


@dataclass(frozen=True, eq=False)
class Part:
    """One shard's index without its rows.

    Args:
        file: File with the rows. None = the rows are in `table`.
        table: Rows that are not stored in a file.
        rows: Number of samples.
        schema: Names and types of the columns.
        faults: Faults of the shard.
        size: Size of the shard in bytes; 0 = it could not be read.
        changed: Modification time of the shard, as in ShardIndex.
        digest: A hash of the rows.
        state: A string that changes whenever the rows or their offsets in the shard change.
    """

    file: Path | None
    table: pa.Table | None
    rows: int
    schema: pa.Schema
    faults: Collection[Fault]
    size: int
    changed: int
    digest: str
    state: str


def write_index(index: ShardIndex, path: Path) -> None:
    """Write a shard's index as a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {
        "version": _VERSION,
        "size": index.size,
        "changed": index.changed,
        "digest": index.digest,
        "faults": [asdict(fault) for fault in index.faults],
    }
    table = index.table.replace_schema_metadata({"zsnr": json.dumps(about)})
    texts = [name for name in table.column_names if name.startswith((FIELD, TEXTS))]
    if TEXTS in texts:
        place = table.column_names.index(TEXTS)
        table = table.set_column(place, TEXTS, table.column(TEXTS).cast(pa.string()))
    # Arrow cannot open a path that is not UTF-8.
    with replacing(path) as beside, open(beside, "wb") as file:
        pq.write_table(table, file, use_dictionary=[*texts, *NUMBERS])


def read_footer(path: Path) -> Part:
    """Read and check the footer of an index file, without decoding any row.

    Raises:
        ValueError: The file is unreadable, was written by another version, or is not an index.
    """
    with _opened(path) as (raw, size):
        return _footer(raw, size, path)


def read_rows(path: Path, fields: Iterable[str] | None = None) -> pa.Table:
    """Read and check the rows of an index file.

    Args:
        path: The file.
        fields: Columns of json fields to read. None = all.

    Raises:
        ValueError: As in `read_footer`, or a row does not belong to the shard.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _opened(path) as (raw, size):
        footer = _footer(raw, size, path)
        names = [n for n in footer.schema.names if n.startswith(FIELD)]
        selected = names if fields is None else [name for name in fields if name in names]
        texts = [TEXTS] if TEXTS in footer.schema.names else []
        columns = ["key", *NUMBERS, *texts, *selected]
        if footer.rows * len(columns) > max(_MAX_CELLS, _CELLS_PER_BYTE * size):
            raise ValueError(f"it has {footer.rows} rows of {len(columns)} columns in {size} bytes")
        # Dictionaries must not be expanded before they are checked.
        dictionary_columns = _layout(raw, size, footer)
        raw.seek(0)
        as_dictionary = sorted(dictionary_columns | {*texts})
        file = pq.ParquetFile(raw, read_dictionary=as_dictionary, **_limits(size))
        table = file.read(columns=columns, use_threads=False)
        table = table.select(columns)  # "json.a" reads "json.a.b" too
        for i, name in enumerate(table.column_names):
            if name in dictionary_columns or name in texts:
                _check_texts(table.column(i), size)
            if name in texts:
                for chunk in table.column(i).chunks:
                    for text in chunk.dictionary.to_pylist():
                        parse_text_fields(text)
            if name in dictionary_columns and name not in texts:
                table = table.set_column(i, name, table.column(i).cast(pa.string()))
        table.validate(full=True)
        _check_rows(table, footer)
        return table.replace_schema_metadata(None)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file and yield it with its size; every error of its contents is a ValueError."""
    import pyarrow as pa

    with open_regular(path) as (file, size):
        try:
            yield file, size
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"its footer is damaged ({clipped(repr(error))})") from error
        except (pa.ArrowException, OSError, OverflowError, UnicodeError) as error:
            raise ValueError(clipped(str(error) or repr(error))) from error


def _limits(size: int) -> dict[str, int]:
    return {"thrift_string_size_limit": size, "thrift_container_size_limit": size}


def _footer(file: BinaryIO, size: int, path: Path) -> Part:
    import pyarrow.parquet as pq

    opened = pq.ParquetFile(file, **_limits(size))
    metadata, schema = opened.metadata, opened.schema_arrow
    text = (schema.metadata or {}).get(b"zsnr")
    if text is None:
        raise ValueError("it is a Parquet file, but not an index")
    about = parse_object(text, "its description")
    version = about.get("version")
    if type(version) is not int or version != _VERSION:
        raise ValueError(f"its version is {shown(version)}: wanted {_VERSION}")
    shard_size, changed = (_count(about, name) for name in ("size", "changed"))
    digest, faults = about.get("digest"), about.get("faults")
    if not isinstance(digest, str) or len(digest) > 64:
        raise ValueError(f"its digest is {shown(digest)}")
    if not isinstance(faults, list):
        raise ValueError(f"its faults are {shown(faults)}: wanted a list")
    # A broken row of a cache has no file, hence `+ size`.
    if metadata.num_rows > shard_size // _MIN_BYTES_PER_ROW + size:
        raise ValueError(
            f"it has {metadata.num_rows} rows in {size} bytes, for a shard of {shard_size} bytes"
        )
    _check_types(schema)
    status = path.stat()
    packed, state = PackedFaults(map(as_fault, faults)), f"{status.st_size} {status.st_mtime_ns}"
    return Part(path, None, metadata.num_rows, schema, packed, shard_size, changed, digest, state)


def _count(about: dict[str, Any], name: str) -> int:
    value = about.get(name)
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"its {name} is {shown(value)}: wanted a 64-bit integer")
    return value


def _layout(file: BinaryIO, size: int, footer: Part) -> set[str]:
    """Refuse encodings that no index uses and that could expand without limit.

    Returns:
        Names of dictionary-encoded text columns.
    """
    file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, os.SEEK_END)
    groups = read_struct(file.read(length))[4]
    if sum(group[3] for group in groups) != footer.rows:
        raise ValueError(f"its row groups do not have the {footer.rows} rows of its footer")
    unpacked, texts = 0, set()
    for chunk in (column[3] for group in groups for column in group[1]):
        encodings, path, codec, values, unpacked_size = (chunk[field] for field in (2, 3, 4, 5, 6))
        odd = {*encodings} - _ENCODINGS or {codec} - _CODECS
        if odd:
            raise ValueError(f"it uses an encoding that no index uses ({min(odd)})")
        if not 0 <= values <= footer.rows or unpacked_size < 0:
            raise ValueError("its columns have more values than rows")
        unpacked += unpacked_size
        if {*encodings} & _DICTIONARY:
            texts.add(b".".join(path).decode())
    if unpacked > _TEXT_PER_BYTE * size:
        raise ValueError(f"its {size} bytes would expand to {unpacked}")
    return texts & {field.name for field in footer.schema if str(field.type) == "string"}


def _check_types(schema: pa.Schema) -> None:
    import pyarrow as pa

    expected = {
        name: pa.type_for_alias(kind) for name, kind in {"key": "string", **NUMBERS}.items()
    }
    if TEXTS in schema.names:  # a cache has none
        expected[TEXTS] = pa.string()
    if len({*schema.names}) != len(schema.names):
        raise ValueError("it holds a column twice")
    for name, kind in expected.items():
        type_name = schema.field(name).type if name in schema.names else "missing"
        if type_name != kind:
            raise ValueError(f"its column {name} is {clipped(str(type_name))}: wanted {kind}")
    kinds = "floating", "integer", "boolean", "string", "null"
    for field in schema:
        plain = any(getattr(pa.types, f"is_{kind}")(field.type) for kind in kinds)
        if field.name not in expected and not (field.name.startswith(FIELD) and plain):
            raise ValueError(f"its column {clipped(field.name)} is {clipped(str(field.type))}")


def _check_texts(column: pa.ChunkedArray, size: int) -> None:
    """Refuse a dictionary whose texts, when expanded, are many times larger than the file."""
    import pyarrow.compute as pc

    total = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary)
        total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
        if total > max(_MAX_CELLS, _TEXT_PER_BYTE * size):
            raise ValueError(f"its texts would expand to {total} bytes, from a file of {size}")


def _check_rows(table: pa.Table, footer: Part) -> None:
    """Refuse rows that point outside the shard."""
    import numpy as np

    if table.num_rows != footer.rows:
        raise ValueError(f"it has {table.num_rows} rows, but its footer says {footer.rows}")
    if any(table.column(name).null_count for name in ("key", *NUMBERS)):
        raise ValueError("a row lacks a required value")
    if not table.num_rows:
        return
    column = {name: table.column(name).to_numpy() for name in NUMBERS}
    if min(column["height"].min(), column["width"].min()) < 1:
        raise ValueError("an image has no size")
    for part in PARTS:
        offset, size = column[f"{part}_offset"], column[f"{part}_size"]
        missing = (offset == -1) & (size == -1) & (part != "image")
        inside = (
            (offset >= 0) & (size >= 0) & (size <= footer.size - np.minimum(offset, footer.size))
        )
        inside &= offset <= footer.size
        if not (missing | inside).all():
            row = int(np.flatnonzero(~(missing | inside))[0])
            raise ValueError(
                f"row {row}: {part} at {offset[row]}, {size[row]} bytes, is outside of the shard "
                f"of {footer.size} bytes"
            )
