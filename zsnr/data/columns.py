"""The columns of a run's samples: collected shard by shard, and memory-mapped from one Arrow file.

A file with one record batch stores each column contiguously, so the arrays are views of the file:
all ranks and loader processes share one copy in the page cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from zsnr.files import replacing
from zsnr.untrusted import clipped, open_regular, parse_object

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "rows": ("int64", ()),
    "shard": ("int32", ()),
    "bucket": ("int16", ()),
    "size": ("int32", (2,)),
    "spans": ("int64", (3, 2)),
}
"""Data type and shape of a row of each array; `keys` holds strings."""


class Spool:
    """Columns that grow row by row, in unnamed files of a folder, or in memory.

    Args:
        folder: Folder of the unnamed files, which need space while the spool is open. None = in
            memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._in_memory = folder is None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, Any] = {
            name: BytesIO() if folder is None else TemporaryFile(dir=folder)  # noqa: SIM115
            for name in (*SHAPES, "ends", "keys")
        }
        self._bytes = 0
        self.rows = 0
        self._files["ends"].write(bytes(8))

    def add(self, keys: pa.Array, **columns: np.ndarray) -> None:
        """Append rows.

        Args:
            keys: large_string (n,).
            columns: The columns of SHAPES, (n, ...).
        """
        import numpy as np

        _, ends, texts = keys.buffers()
        ends = np.frombuffer(ends, np.int64)[keys.offset : keys.offset + len(keys) + 1]
        if texts is not None:
            self._files["keys"].write(memoryview(texts)[int(ends[0]) : int(ends[-1])])
        self._files["ends"].write((ends[1:] - ends[0] + self._bytes).tobytes())
        self._bytes += int(ends[-1] - ends[0])
        for name, (kind, shape) in SHAPES.items():
            column = np.ascontiguousarray(columns[name], kind)
            assert column.shape == (len(keys), *shape)
            self._files[name].write(column.tobytes())
        self.rows += len(keys)

    def batch(self) -> pa.RecordBatch:
        """Return all rows."""
        import pyarrow as pa

        buffers: dict[str, pa.Buffer] = {}
        for name, file in self._files.items():
            if self._in_memory:
                buffers[name] = pa.py_buffer(file.getbuffer())
                continue
            file.flush()
            contents = mmap(file.fileno(), 0, access=ACCESS_READ) if file.tell() else b""
            buffers[name] = pa.py_buffer(contents)
        schema = _schema()
        keys = [None, buffers["ends"], buffers["keys"]]
        arrays = [pa.Array.from_buffers(pa.large_string(), self.rows, keys)]
        for name in SHAPES:
            kind, width = schema.field(name).type, 1
            if pa.types.is_fixed_size_list(kind):
                kind, width = kind.value_type, kind.list_size
            flat = pa.Array.from_buffers(kind, width * self.rows, [None, buffers[name]])
            arrays.append(flat if width == 1 else pa.FixedSizeListArray.from_arrays(flat, width))
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def close(self) -> None:
        """Close the files."""
        if not self._in_memory:
            for file in self._files.values():
                file.close()


def write_columns(
    path: Path, batch: pa.RecordBatch, about: Mapping[str, Any], counts: np.ndarray
) -> None:
    """Write rows, their description, and their counts (shards, buckets) as one Arrow file."""
    import pyarrow as pa

    facts = {"zsnr": json.dumps(about), "counts": counts.astype("int32").tobytes()}
    batch = batch.replace_schema_metadata(facts)
    # Arrow cannot open a path that is not UTF-8.
    with (
        replacing(path) as beside,
        beside.open("wb") as file,
        pa.ipc.new_file(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)


class Mapped:
    """The columns of samples in a memory-mapped file; only the file's name is pickled.

    Args:
        path: File that `write_columns` wrote.

    Attributes:
        columns: The columns, as returned by `arrays`.
        about: Description of the rows.
        counts: Bytes of their counts.

    Raises:
        ValueError: The file was not written by `write_columns`, or is truncated.
        OSError: The file cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        with open_regular(path) as (opened, _):
            contents = mmap(opened.fileno(), 0, access=ACCESS_READ)
        try:
            file = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(contents)))
            metadata = file.schema.metadata or {}
            if file.schema.remove_metadata() != _schema() or file.num_record_batches != 1:
                raise ValueError(f"{path} holds other columns")
            batch = file.get_batch(0)
            batch.validate()
            self.about = parse_object(metadata[b"zsnr"], str(path))
            self.counts = metadata[b"counts"]
        except (pa.ArrowException, KeyError) as error:
            reason = clipped(str(error))
            raise ValueError(f"{path} is not a readable file of samples: {reason}") from error
        self.columns = arrays(batch)

    def __reduce__(self) -> tuple[type[Mapped], tuple[Path]]:
        return Mapped, (self.path,)


def arrays(batch: pa.RecordBatch) -> dict[str, Any]:
    """Return the columns as numpy arrays that share the batch's memory, and `keys`."""
    columns: dict[str, Any] = {"keys": batch.column("keys")}
    for name, (_, shape) in SHAPES.items():
        column = batch.column(name)
        flat = column.flatten() if shape else column
        columns[name] = flat.to_numpy().reshape(len(batch), *shape)
    return columns


def _schema() -> pa.Schema:
    import math

    import pyarrow as pa

    fields = [("keys", pa.large_string())]
    for name, (kind, shape) in SHAPES.items():
        flat = pa.type_for_alias(kind)
        fields.append((name, pa.list_(flat, math.prod(shape)) if shape else flat))
    return pa.schema(fields)
