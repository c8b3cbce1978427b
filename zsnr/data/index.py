"""The index: one row a sample, made from headers alone, kept beside the shards."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from zsnr.data.faults import Fault, Ledger, summarize
from zsnr.data.images import HeaderCut, image_size
from zsnr.data.sources import IMAGE_SUFFIXES, Shard, Sources, find_shards, pictures
from zsnr.data.storage import NoRangesError, Retries, Storage, is_remote
from zsnr.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa

FIELD = "json."
"""Prefix of the columns that hold fields of the json."""

METADATA = "metadata.jsonl"

_VERSION = 1
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


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of all shards of a source.

    Args:
        shards: In the order in which they were named.
        sizes: Of the shards, in bytes; 0 = it could not be read.
        table: As of ShardIndex, with a column `shard` in front, the number of its shard.
        faults: What is broken.
        digest: A hash of the shards' names and rows; it does not change when shards move.
    """

    shards: list[Shard]
    sizes: list[int]
    table: pa.Table
    faults: list[Fault]
    digest: str


def load_index(
    sources: Sources,
    storage: Storage,
    *,
    folder: Path | None = None,
    fields: Iterable[str] | None = (),
    write: bool = True,
    processes: int = 0,
    progress: bool = True,
) -> Index:
    """Read the index of every shard, and make it where there is none or the shard has changed.

    Args:
        sources: What to index.
        storage: What reads the shards, and hears of passing faults.
        folder: Where index files are. None = beside the shards; those behind an address are then
            indexed every time.
        fields: Fields of the json that are wanted. None = all.
        write: Keep what was made.
        processes: How many work at once; below 2, threads of this one.
        progress: Show a bar if it takes long.

    Raises:
        FileNotFoundError: There are no shards.
        NoRangesError: A server gives no parts of a file.
        ValueError: A cached shard has no index, or not its own.
    """
    import pyarrow as pa
    from tqdm import tqdm

    shards, parts = find_shards(sources), []
    one = partial(_load_alone, retries=storage.retries, folder=folder, write=write)
    pool: Executor = ThreadPoolExecutor(8)
    if processes > 1:
        pool = ProcessPoolExecutor(processes, get_context("spawn"))
    with pool as running:
        bar = tqdm(
            running.map(one, shards),
            total=len(shards),
            desc="index",
            unit="shard",
            delay=2,
            disable=not progress,
        )
        for part, met in bar:
            parts.append(part)
            if storage.on_fault is not None:
                for fault in met:
                    storage.on_fault(*fault)
    wanted = None if fields is None else [FIELD + name for name in fields]
    tables = []
    for number, part in enumerate(parts):
        table = part.table
        if wanted is not None:
            names = [name for name in table.column_names if name.startswith(FIELD)]
            table = table.drop_columns([name for name in names if name not in wanted])
        column = pa.repeat(pa.scalar(number, pa.int32()), table.num_rows)
        tables.append(table.add_column(0, "shard", column))
    names = [f"{s.name} {p.digest}" for s, p in zip(shards, parts, strict=True)]
    return Index(
        shards,
        [part.size for part in parts],
        _concatenate(tables),
        [fault for part in parts for fault in part.faults],
        hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest(),
    )


def write_indices(
    sources: Sources,
    folder: Path | None = None,
    *,
    ledger: Path | None = None,
    attempts: int = 5,
    timeout: float = 30.0,
    processes: int = 0,
    as_json: bool = False,
) -> str:
    """Index shards and say what was found; `zsnr data index`.

    Args:
        sources: What to index.
        folder: Where to write. None = beside the shards.
        ledger: A jsonl file for what is broken; written anew.
        attempts: Tries of one read.
        timeout: Seconds after which a server is stalled.
        processes: How many work at once.
        as_json: Say it as JSON.

    Raises:
        ValueError: There is no place for the index files.
    """
    import pyarrow.compute as pc

    remote = [shard.url for shard in find_shards(sources) if is_remote(shard.url)]
    if remote and folder is None:
        raise ValueError(f"{remote[0]}: there is no place beside it; give --output FOLDER.")
    passing: list[Fault] = []
    storage = Storage(
        Retries(attempts, timeout=timeout),
        lambda url, reason: passing.append(Fault("passing", url, None, reason)),
    )
    index = load_index(sources, storage, folder=folder, fields=None, processes=processes)
    faults = index.faults + passing
    if ledger is not None:
        ledger.unlink(missing_ok=True)
        Ledger(ledger).write(faults)
    table = index.table
    fields = {
        name.removeprefix(FIELD): table.num_rows - table.column(name).null_count
        for name in table.column_names
        if name.startswith(FIELD)
    }
    facts = {
        "shards": len(index.shards),
        "samples": table.num_rows,
        "bytes": sum(index.sizes),
        "broken_shards": len({f.shard for f in faults if f.kind == "shard"}),
        "broken_samples": sum(f.kind == "sample" for f in faults),
        "retried_reads": len(passing),
        "fields": fields,
        "digest": index.digest,
    }
    if as_json:
        return json.dumps(facts)
    size = sum(index.sizes) / 2**20
    lines = [f"{table.num_rows} samples in {len(index.shards)} shards, {size:.1f} MiB"]
    if table.num_rows:
        pixels = [
            pc.quantile(table.column(n), [0, 0.5, 1]).to_pylist() for n in ("height", "width")
        ]
        for name, (low, middle, high) in zip(("height", "width"), pixels, strict=True):
            lines.append(f"  {name}: {low:.0f} to {high:.0f} pixels, median {middle:.0f}")
    lines += [f"  field {name}: in {count} samples" for name, count in fields.items()]
    if faults:
        lines.append(f"broken: {summarize(faults)}")
    return "\n".join(lines)


def index_path(shard: Shard, folder: Path | None) -> Path | None:
    """Name the file of a shard's index; None = it has no place."""
    if shard.kind == "folder":
        return None
    if shard.kind == "cache":
        return Path(shard.url + ".index")
    if folder is not None:
        place = hashlib.blake2b(shard.url.encode(), digest_size=4).hexdigest()
        return folder / f"{place}-{shard.name}.index"
    return None if is_remote(shard.url) else Path(shard.url + ".index")


def make_index(shard: Shard, storage: Storage) -> ShardIndex:
    """Index one shard or folder; what is broken in it becomes a fault, not an error.

    Raises:
        NoRangesError: Its server gives no parts of a file.
    """
    return _index_folder(shard) if shard.kind == "folder" else _index_tar(shard, storage)


def write_index(index: ShardIndex, path: Path) -> None:
    """Write a shard's index as a Parquet file."""
    import pyarrow.parquet as pq

    about = {
        "version": _VERSION,
        "size": index.size,
        "changed": index.changed,
        "digest": index.digest,
        "faults": [asdict(fault) for fault in index.faults],
    }
    table = index.table.replace_schema_metadata({"zsnr": json.dumps(about)})
    with replacing(path) as beside:
        pq.write_table(table, beside)


def read_index(path: Path) -> ShardIndex | None:
    """Read a shard's index; None = it is of another version or unreadable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[b"zsnr"])
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
        return None
    if about["version"] != _VERSION:
        return None
    faults = [Fault(**fault) for fault in about["faults"]]
    return ShardIndex(table, faults, about["size"], about["changed"], about["digest"])


def _load(shard: Shard, storage: Storage, folder: Path | None, write: bool) -> ShardIndex:
    path = index_path(shard, folder)
    if path is not None and path.is_file():
        found = read_index(path)
        if found is not None and _is_current(found, shard):
            return found
    if shard.kind == "cache":
        raise ValueError(f"{shard.url} and its index do not belong together: cache it again.")
    made = make_index(shard, storage)
    if write and path is not None and made.size:
        with suppress(OSError):  # a read-only data set is indexed again each time
            write_index(made, path)
    return made


def _load_alone(
    shard: Shard, retries: Retries, folder: Path | None, write: bool
) -> tuple[ShardIndex, list[tuple[str, str]]]:
    """Load a shard's index with a storage of its own, and say which faults passed."""
    met: list[tuple[str, str]] = []
    storage = Storage(retries, lambda url, reason: met.append((url, reason)))
    return _load(shard, storage, folder, write), met


def _is_current(index: ShardIndex, shard: Shard) -> bool:
    if is_remote(shard.url):
        return True  # each read compares the size
    if shard.kind == "cache":
        return index.size == _state(shard.url)[0]  # a cache may be copied
    return (index.size, index.changed) == _state(shard.url)


def _state(url: str) -> tuple[int, int]:
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
    size, changed = _state(shard.url)
    try:
        size = storage.size(shard.url)
        with storage.open(shard.url) as file:
            _read_tar(rows, file, size)
    except FileNotFoundError:
        rows.shard_fault("missing")
    except NoRangesError:
        raise
    except (OSError, EOFError) as error:
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


def _index_folder(shard: Shard) -> ShardIndex:
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
            with open(path, "rb") as file:
                size = _measure(file, *spans["image"])
        except (ValueError, OSError) as error:
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


def _concatenate(tables: list[pa.Table]) -> pa.Table:
    """Join the shards' tables; a field that is text in one is text in all."""
    import pyarrow as pa

    kinds: dict[str, set[pa.DataType]] = {}
    for table in tables:
        for field in table.schema:
            if not pa.types.is_null(field.type) and table.num_rows:
                kinds.setdefault(field.name, set()).add(field.type)
    joined = []
    for table in tables:
        for i, field in enumerate(table.schema):
            if len(kinds.get(field.name, ())) > 1:
                table = table.set_column(i, field.name, table.column(i).cast(pa.string()))
        joined.append(table.replace_schema_metadata(None))
    whole = pa.concat_tables(joined, promote_options="permissive")
    keys = whole.schema.get_field_index("key")
    return whole.set_column(keys, "key", whole.column("key").cast(pa.large_string()))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
