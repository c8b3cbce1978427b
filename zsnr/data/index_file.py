"""A shard's index as a Parquet file: written, and read back without trust.

Whoever can write beside the shards can write an index. So the footer is judged before any row is
decoded, and the rows before they are used: nothing in them may point outside the shard, and none of
them takes more memory than an index of a shard of that size would.
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
_CODECS = {0, 1}  # Parquet's numbers: none and snappy, which grows 20-fold at most
_DICTIONARY = {2, 8}
_ENCODINGS = {0, 3, 4, *_DICTIONARY}  # plain, run length, bit-packed, dictionaries
_LEAST_BYTES = 512  # of a shard, for a row: one header of a tar file
_MOST_CELLS = 1 << 25  # rows times columns, for any file; more for a larger one
_CELLS_PER_BYTE = 16
_TEXT_PER_BYTE = 64


@dataclass(frozen=True, eq=False)
class Part:
    """What is known of one shard's index without its rows.

    Args:
        file: Where its rows are. None = in `table`.
        table: Rows that are kept nowhere else.
        rows: Samples.
        schema: Names and types of the columns.
        faults: What is broken in the shard.
        size: Of the shard, in bytes; 0 = it could not be read.
        changed: When the shard was last changed, as of ShardIndex.
        digest: A hash of the rows.
        state: Changes whenever the rows or their places in the shard do.
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
    # Arrow opens no path that is not UTF-8.
    with replacing(path) as beside, open(beside, "wb") as file:
        pq.write_table(table, file, use_dictionary=[*texts, *NUMBERS])


def read_footer(path: Path) -> Part:
    """Read and judge what the end of an index file says; no row is decoded.

    Raises:
        ValueError: It is unreadable, of another version, or not an index; says why.
    """
    with _opened(path) as (raw, size):
        return _footer(raw, size, path)


def read_rows(path: Path, fields: Iterable[str] | None = None) -> pa.Table:
    """Read and judge the rows of an index file.

    Args:
        path: The file.
        fields: Columns of json fields to read. None = all.

    Raises:
        ValueError: As of `read_footer`, or a row is none of that shard.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _opened(path) as (raw, size):
        footer = _footer(raw, size, path)
        names = [n for n in footer.schema.names if n.startswith(FIELD)]
        wanted = names if fields is None else [name for name in fields if name in names]
        texts = [TEXTS] if TEXTS in footer.schema.names else []
        columns = ["key", *NUMBERS, *texts, *wanted]
        if footer.rows * len(columns) > max(_MOST_CELLS, _CELLS_PER_BYTE * size):
            raise ValueError(f"it has {footer.rows} rows of {len(columns)} columns in {size} bytes")
        packed = _layout(raw, size, footer)  # must not be written out before they are judged
        raw.seek(0)
        file = pq.ParquetFile(raw, read_dictionary=sorted(packed | {*texts}), **_limits(size))
        table = file.read(columns=columns, use_threads=False)
        table = table.select(columns)  # "json.a" reads "json.a.b" too
        for i, name in enumerate(table.column_names):
            if name in packed or name in texts:
                _check_texts(table.column(i), size)
            if name in texts:
                for chunk in table.column(i).chunks:
                    for text in chunk.dictionary.to_pylist():
                        parse_text_fields(text)
            if name in packed and name not in texts:
                table = table.set_column(i, name, table.column(i).cast(pa.string()))
        table.validate(full=True)
        _check_rows(table, footer)
        return table.replace_schema_metadata(None)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file, and give its size; whatever is found wrong with it is a ValueError."""
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
        raise ValueError("it is a Parquet file of something else")
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
    if metadata.num_rows > shard_size // _LEAST_BYTES + size:  # a broken row of a cache has no file
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
        raise ValueError(f"its {name} is {shown(value)}: wanted a number of 64 bits")
    return value


def _layout(file: BinaryIO, size: int, footer: Part) -> set[str]:
    """Refuse ways of packing that an index is not written in, and that could hide any amount.

    Returns:
        Names of columns of which a row may be a number that stands for any text.
    """
    file.seek(-8, os.SEEK_END)
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, os.SEEK_END)
    groups = read_struct(file.read(length))[4]
    if sum(group[3] for group in groups) != footer.rows:
        raise ValueError(f"its parts have other rows than the {footer.rows} it says")
    unpacked, texts = 0, set()
    for chunk in (column[3] for group in groups for column in group[1]):
        encodings, path, codec, values, whole = (chunk[field] for field in (2, 3, 4, 5, 6))
        odd = {*encodings} - _ENCODINGS or {codec} - _CODECS
        if odd:
            raise ValueError(f"it is packed in a way that no index is ({min(odd)})")
        if not 0 <= values <= footer.rows or whole < 0:
            raise ValueError("its parts have more values than rows")
        unpacked += whole
        if {*encodings} & _DICTIONARY:
            texts.add(b".".join(path).decode())
    if unpacked > _TEXT_PER_BYTE * size:
        raise ValueError(f"it would take {unpacked} bytes unpacked, of {size}")
    return texts & {field.name for field in footer.schema if str(field.type) == "string"}


def _check_types(schema: pa.Schema) -> None:
    import pyarrow as pa

    wanted = {name: pa.type_for_alias(kind) for name, kind in {"key": "string", **NUMBERS}.items()}
    if TEXTS in schema.names:  # a cache has none
        wanted[TEXTS] = pa.string()
    if len({*schema.names}) != len(schema.names):
        raise ValueError("a column stands in it twice")
    for name, kind in wanted.items():
        found = schema.field(name).type if name in schema.names else "missing"
        if found != kind:
            raise ValueError(f"its column {name} is {clipped(str(found))}: wanted {kind}")
    kinds = "floating", "integer", "boolean", "string", "null"
    for field in schema:
        plain = any(getattr(pa.types, f"is_{kind}")(field.type) for kind in kinds)
        if field.name not in wanted and not (field.name.startswith(FIELD) and plain):
            raise ValueError(f"its column {clipped(field.name)} is {clipped(str(field.type))}")


def _check_texts(column: pa.ChunkedArray, size: int) -> None:
    """Refuse a dictionary whose texts, written out, are many times the file."""
    import pyarrow.compute as pc

    total = 0
    for chunk in column.chunks:
        lengths = pc.binary_length(chunk.dictionary)
        total += pc.sum(lengths.take(chunk.indices)).as_py() or 0
        if total > max(_MOST_CELLS, _TEXT_PER_BYTE * size):
            raise ValueError(f"its texts would take {total} bytes, of {size}")


def _check_rows(table: pa.Table, footer: Part) -> None:
    """Refuse rows that point outside the shard."""
    import numpy as np

    if table.num_rows != footer.rows:
        raise ValueError(f"it has {table.num_rows} rows, its footer says {footer.rows}")
    if any(table.column(name).null_count for name in ("key", *NUMBERS)):
        raise ValueError("a row has no value where every sample has one")
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
                f"row {row}: {part} at {offset[row]}, {size[row]} bytes, is not in the shard of "
                f"{footer.size} bytes"
            )
