"""The index: one row a sample, made from headers alone, kept beside the shards."""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from zsnr.data.faults import Fault, Ledger, summarize
from zsnr.data.index_file import Part, read_footer, read_index, read_rows, write_index
from zsnr.data.scan import FIELD, file_state, make_index
from zsnr.data.sources import Shard, Sources, find_shards
from zsnr.data.storage import Retries, Storage, is_remote
from zsnr.untrusted import clipped

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Index", "index_path", "load_index", "read_index", "write_index", "write_indices"]


@dataclass(eq=False)
class Index:
    """The samples of all shards of a source; rows stay in the shards' index files until asked for.

    Args:
        shards: In the order in which they were named.
        parts: What is known of each.
        fields: Columns of json fields that are wanted. None = all.
        remake: Indexes a shard anew, if its index file turns out to be damaged.
    """

    shards: list[Shard]
    parts: list[Part]
    fields: list[str] | None
    remake: Callable[[Shard], Part]

    @property
    def sizes(self) -> list[int]:
        """Of the shards, in bytes; 0 = it could not be read."""
        return [part.size for part in self.parts]

    @property
    def faults(self) -> list[Fault]:
        """What is broken."""
        return [fault for part in self.parts for fault in part.faults]

    @property
    def digest(self) -> str:
        """A hash of the shards' names and rows; it does not change when shards move."""
        return self._hash([part.digest for part in self.parts])

    @property
    def state(self) -> str:
        """A hash that changes when the rows do or their places in the shards."""
        return self._hash([f"{part.digest} {part.size} {part.state}" for part in self.parts])

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    @cached_property
    def table(self) -> pa.Table:
        """All rows as one table: `shard`, the number of the shard, and the columns of its index.

        A field that is text in one shard is text in all.
        """
        import pyarrow as pa

        whole = pa.concat_tables(list(self.blocks()), promote_options="permissive")
        keys = whole.schema.get_field_index("key")
        return whole.set_column(keys, "key", whole.column("key").cast(pa.large_string()))

    def blocks(self) -> Iterator[pa.Table]:
        """Read the rows of one shard after the other; all have the same columns."""
        import pyarrow as pa

        kinds = self._kinds()
        for number in range(len(self.shards)):
            table = self._rows(number)
            count = table.num_rows
            names = [name for name in table.column_names if not name.startswith(FIELD)]
            columns = {"shard": pa.repeat(pa.scalar(number, pa.int32()), count)}
            columns |= {name: table.column(name) for name in names}
            for name, kind in kinds.items():
                there = name in table.column_names and count
                columns[name] = table.column(name).cast(kind) if there else pa.nulls(count, kind)
            yield pa.table(columns)

    def _kinds(self) -> dict[str, pa.DataType]:
        """The type of each json field in all shards together."""
        import pyarrow as pa

        kinds: dict[str, set[pa.DataType]] = {}
        for part in self.parts:
            for field in part.schema:
                if field.name.startswith(FIELD) and (
                    self.fields is None or field.name in self.fields
                ):
                    met = kinds.setdefault(field.name, set())
                    if part.rows and not pa.types.is_null(field.type):
                        met.add(field.type)
        return {
            name: pa.string() if len(met) > 1 else next(iter(met), pa.null())
            for name, met in kinds.items()
        }

    def _rows(self, number: int) -> pa.Table:
        part = self.parts[number]
        if part.file is not None:
            try:
                return read_rows(part.file, self.fields)
            except ValueError as error:
                _reject(self.shards[number], part.file, error)
                part = self.parts[number] = self.remake(self.shards[number])
        return part.table if part.file is None else read_rows(part.file, self.fields)

    def _hash(self, parts: list[str]) -> str:
        lines = [f"{shard.name} {part}" for shard, part in zip(self.shards, parts, strict=True)]
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


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
    """Look for the index of every shard; make it where there is none or the shard has changed.

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
    from tqdm import tqdm

    shards, parts = find_shards(sources), []
    wanted = None if fields is None else [FIELD + name for name in fields]
    one = partial(_load_alone, retries=storage.retries, folder=folder, write=write, fields=wanted)
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
    return Index(shards, parts, wanted, lambda shard: _make(shard, storage, folder, write, wanted))


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


def _load_alone(
    shard: Shard, retries: Retries, folder: Path | None, write: bool, fields: list[str] | None
) -> tuple[Part, list[tuple[str, str]]]:
    """Find or make a shard's index with a storage of its own, and say which faults passed."""
    met: list[tuple[str, str]] = []
    storage = Storage(retries, lambda url, reason: met.append((url, reason)))
    path = index_path(shard, folder)
    if path is not None and path.exists():
        try:
            footer = read_footer(path)
            if _is_current(footer, shard):
                return footer, met
        except ValueError as error:
            _reject(shard, path, error)
    return _make(shard, storage, folder, write, fields), met


def _make(
    shard: Shard, storage: Storage, folder: Path | None, write: bool, fields: list[str] | None
) -> Part:
    """Index a shard; its rows are kept in its index file, or in memory where that cannot be."""
    if shard.kind == "cache":
        raise ValueError(f"{shard.url} and its index do not belong together: cache it again.")
    made, path = make_index(shard, storage), index_path(shard, folder)
    if write and path is not None and made.size:
        with suppress(OSError, ValueError):  # a read-only data set is indexed again each time
            write_index(made, path)
            return read_footer(path)
    names = [n for n in made.table.column_names if n.startswith(FIELD)]
    unwanted = [] if fields is None else [name for name in names if name not in fields]
    table = made.table.drop_columns(unwanted)
    places = pickle.dumps(table.drop_columns([n for n in names if n not in unwanted]), protocol=5)
    state = hashlib.blake2b(places, digest_size=16).hexdigest()
    return Part(
        None,
        table,
        table.num_rows,
        table.schema,
        made.faults,
        made.size,
        made.changed,
        made.digest,
        state,
    )


def _reject(shard: Shard, path: Path, error: ValueError) -> None:
    """Say that an index file is not used, and why.

    Raises:
        ValueError: It is a cache's, which only caching can make again.
    """
    reason = f"{path} is not used as an index: {clipped(str(error)).rstrip('.')}."
    if shard.kind == "cache":
        raise ValueError(f"{reason} Remove it, and run `zsnr data cache` again; it goes on.")
    warnings.warn(f"{reason} It is made again.", stacklevel=3)


def _is_current(footer: Part, shard: Shard) -> bool:
    if is_remote(shard.url):
        return True  # each read compares the size
    if shard.kind == "cache":
        return footer.size == file_state(shard.url)[0]  # a cache may be copied
    return (footer.size, footer.changed) == file_state(shard.url)
