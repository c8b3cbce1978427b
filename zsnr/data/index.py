"""The index: one row a sample, made from headers alone, kept beside the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from zsnr.data.faults import Fault, Ledger, summarize
from zsnr.data.local_cache import LocalCache
from zsnr.data.scan import FIELD, ShardIndex, file_state, make_index
from zsnr.data.sources import Shard, Sources, find_shards
from zsnr.data.storage import Retries, Storage, is_remote, public_url
from zsnr.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa

_VERSION = 1


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
        StorageError: A shard cannot be read, which says nothing about its bytes.
        ValueError: A cached shard has no index, or not its own.
    """
    import pyarrow as pa
    from tqdm import tqdm

    shards, parts = find_shards(sources), []
    settings = storage.reporting(None)
    one = partial(_load_alone, settings=settings, folder=folder, write=write)
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
    local_cache: LocalCache | None = None,
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
        local_cache: Keeps whole remote shards on local disk.
        as_json: Say it as JSON.

    Raises:
        ValueError: There is no place for the index files.
    """
    import pyarrow.compute as pc

    remote = [shard.url for shard in find_shards(sources) if is_remote(shard.url)]
    if remote and folder is None:
        name = public_url(remote[0])
        raise ValueError(f"{name}: there is no place beside it; give --output FOLDER.")
    passing: list[Fault] = []
    storage = Storage(
        Retries(attempts, timeout=timeout, outage=0.0),
        lambda url, reason: passing.append(Fault("passing", url, None, reason)),
        local_cache=local_cache,
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
    shard: Shard, settings: Storage, folder: Path | None, write: bool
) -> tuple[ShardIndex, list[tuple[str, str]]]:
    """Load a shard's index with a storage of its own, and say which faults passed."""
    met: list[tuple[str, str]] = []
    storage = settings.reporting(lambda url, reason: met.append((url, reason)))
    return _load(shard, storage, folder, write), met


def _is_current(index: ShardIndex, shard: Shard) -> bool:
    if is_remote(shard.url):
        return True  # each read compares the size
    if shard.kind == "cache":
        return index.size == file_state(shard.url)[0]  # a cache may be copied
    return (index.size, index.changed) == file_state(shard.url)


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
