"""The index: one row per sample, made from headers alone, stored beside the shards."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsnr.data.captions import TEXTS, Captions, field_names
from zsnr.data.faults import Fault, Ledger, Tally, as_utf8, summarize
from zsnr.data.index_file import Part, read_footer, read_rows, write_index
from zsnr.data.local_cache import LocalCache
from zsnr.data.scan import FIELD, file_state, make_index
from zsnr.data.sources import Shard, Sources, find_shards
from zsnr.data.storage import Retries, Storage, StorageError, is_remote
from zsnr.failures import tame_output
from zsnr.locks import Lock
from zsnr.public import public_url
from zsnr.untrusted import clipped

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


@dataclass(eq=False)
class Index:
    """The samples of all shards of a source; rows are read from the shards' index files on demand.

    Args:
        shards: The shards, in the order in which they were listed.
        parts: The index of each shard without its rows.
        fields: Columns of json fields to read. None = all.
        remake: Indexes a shard again, if its index file turns out to be damaged.
    """

    shards: list[Shard]
    parts: list[Part]
    fields: list[str] | None
    remake: Callable[[Shard], Part]

    @property
    def sizes(self) -> list[int]:
        """Sizes of the shards, in bytes; 0 = the shard could not be read."""
        return [part.size for part in self.parts]

    @property
    def faults(self) -> list[Fault]:
        """Faults of all shards."""
        return [fault for part in self.parts for fault in part.faults]

    @property
    def digest(self) -> str:
        """A hash of the shards' names and rows, independent of the shards' location."""
        return self._hash([part.digest for part in self.parts])

    @property
    def state(self) -> str:
        """A hash that changes when the rows change, or their offsets in the shards."""
        return self._hash([f"{part.digest} {part.size} {part.state}" for part in self.parts])

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    @cached_property
    def table(self) -> pa.Table:
        """All rows as one table: `shard`, the number of the shard, and the columns of its index.

        A field that is text in one shard is converted to text in all.
        """
        import pyarrow as pa

        table = pa.concat_tables(list(self.blocks()), promote_options="permissive")
        keys = table.schema.get_field_index("key")
        return table.set_column(keys, "key", table.column("key").cast(pa.large_string()))

    def blocks(self) -> Iterator[pa.Table]:
        """Yield the rows of each shard in turn; all tables have the same columns."""
        import pyarrow as pa

        kinds = self._kinds()
        for number in range(len(self.shards)):
            table = self._rows(number)
            count = table.num_rows
            names = [name for name in table.column_names if not name.startswith(FIELD)]
            columns = {"shard": pa.repeat(pa.scalar(number, pa.int32()), count)}
            columns[TEXTS] = pa.nulls(count, pa.dictionary(pa.int32(), pa.string()))  # of a cache
            columns |= {name: table.column(name) for name in names}
            for name, kind in kinds.items():
                present = name in table.column_names and count
                columns[name] = table.column(name).cast(kind) if present else pa.nulls(count, kind)
            yield pa.table(columns)

    def _kinds(self) -> dict[str, pa.DataType]:
        """Return the common type of each json field over all shards."""
        import pyarrow as pa

        kinds: dict[str, set[pa.DataType]] = {}
        for part in self.parts:
            for field in part.schema:
                if field.name.startswith(FIELD) and (
                    self.fields is None or field.name in self.fields
                ):
                    types = kinds.setdefault(field.name, set())
                    if part.rows and not pa.types.is_null(field.type):
                        types.add(field.type)
        return {
            name: pa.string() if len(types) > 1 else next(iter(types), pa.null())
            for name, types in kinds.items()
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
        return hashlib.blake2b(as_utf8("\n".join(lines)).encode(), digest_size=16).hexdigest()


def load_index(
    sources: Sources,
    storage: Storage,
    *,
    folder: Path | None = None,
    fields: Iterable[str] | None = (),
    must_write: bool = False,
    processes: int = 0,
    progress: bool = True,
) -> Index:
    """Load the index of every shard; make it if it is missing or the shard has changed.

    Args:
        sources: Sources to index.
        storage: Reads the shards, and is told about passing faults.
        folder: Folder of the index files. None = beside the shards; remote shards are then indexed
            every time.
        fields: Fields of the json to read. None = all.
        must_write: Raise an error, instead of a warning, if an index file cannot be written.
        processes: Number of processes; below 2, threads of this process are used.
        progress: Show a progress bar after two seconds.

    Raises:
        FileNotFoundError: There are no shards.
        StorageError: A shard cannot be read, so it is unknown whether it is broken.
        OSError: An index file cannot be written, and `must_write` is set.
        ValueError: The index of a cached shard is missing or belongs to another shard.
    """
    from zsnr.progress import progress_bar

    shards, parts = find_shards(sources), []
    columns = None if fields is None else [FIELD + name for name in fields]
    load = partial(
        _load_alone,
        settings=storage.reporting(None),
        folder=folder,
        must_write=must_write,
        fields=columns,
    )
    unwritten: list[str] = []
    pool: Executor = ThreadPoolExecutor(8)
    if processes > 1:
        pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=tame_output)
    try:
        with progress_bar(len(shards), "index", "shard", show=progress, delay=2) as bar:
            for part, passing, reason in pool.map(load, shards):
                bar.update()
                parts.append(part)
                unwritten += [reason] * bool(reason)
                if storage.on_fault is not None:
                    for fault in passing:
                        storage.on_fault(*fault)
    finally:
        pool.shutdown(wait=len(parts) == len(shards), cancel_futures=True)
    if unwritten:
        warnings.warn(
            f"{unwritten[0]} {len(unwritten)} of {len(shards)} shards are indexed again each time: "
            "set data.index, or write the index once with `zsnr data index --output FOLDER`.",
            stacklevel=2,
        )

    def remake(shard: Shard) -> Part:
        return _make(shard, storage, folder, must_write, columns)[0]

    return Index(shards, parts, columns, remake)


def write_indices(
    sources: Sources,
    folder: Path | None = None,
    *,
    ledger: Path | None = None,
    attempts: int = 5,
    timeout: float = 30.0,
    processes: int = 0,
    headers: Mapping[str, str] | None = None,
    local_cache: LocalCache | None = None,
) -> tuple[dict[str, Any], str]:
    """Index shards; `zsnr data index`.

    Args:
        sources: Sources to index.
        folder: Output folder. None = beside the shards.
        ledger: A jsonl file that lists all faults; overwritten.
        attempts: Number of attempts for each read.
        timeout: Seconds after which a server counts as stalled.
        processes: Number of processes.
        headers: Headers of requests to http servers.
        local_cache: Cache of whole remote shards on local disk.

    Returns:
        A summary as plain values, and as text.

    Raises:
        OSError: An index file cannot be written.
        ValueError: The shards are remote and `folder` is None, no sample is usable, or a folder of
            images is given and would have an index file in `folder`.
    """
    import pyarrow.compute as pc

    shards = find_shards(sources)
    remote = [shard.url for shard in shards if is_remote(shard.url)]
    if remote and folder is None:
        name = public_url(remote[0])
        raise ValueError(f"{name} is remote: set --output FOLDER for its index.")
    if folder is not None and all(index_path(shard, folder) is None for shard in shards):
        name = public_url(shards[0].url)
        raise ValueError(
            f"{name} is a folder of images, which has no index file: it is listed again each time "
            "it is used, so --output would stay empty. Leave it out; --ledger FILE writes what is "
            "broken."
        )
    passing: list[Fault] = []
    storage = Storage(
        Retries(attempts, timeout=timeout, outage=0.0),
        lambda url, reason: passing.append(Fault("passing", url, None, reason)),
        headers=headers,
        local_cache=local_cache,
    )
    with _lock(shards, folder):
        index = load_index(
            sources, storage, folder=folder, fields=None, must_write=True, processes=processes
        )
    usable = Captions().usable(index.table.column(TEXTS))
    faults = index.faults + without_caption(index, index.table, ~usable, Captions()) + passing
    if ledger is not None:
        try:
            ledger.parent.mkdir(parents=True, exist_ok=True)
            ledger.unlink(missing_ok=True)
            Ledger(ledger).write(faults)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"The ledger {ledger} cannot be written: {reason}.") from error
    table = index.table if usable.all() else index.table.filter(usable)
    other_fields = field_names(index.table.select([TEXTS]).filter(~usable).column(TEXTS))
    tip = f"Fields with text there: {', '.join(other_fields)}; data.captions.fields can use them"
    notes = [fault for fault in faults if fault.kind == "note"]
    broken = [fault for fault in faults if fault.kind != "note"]
    if not table.num_rows:
        reason = summarize(faults) or "they are empty"
        reason += f". {tip}" * bool(other_fields)
        raise ValueError(f"No usable sample in {counted(index.shards)}: {reason}.")
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
        "notes": [f"{note.shard}: {note.reason}" for note in notes],
        "fields": fields,
        "digest": index.digest,
    }
    size = sum(index.sizes) / 2**20
    samples = f"{table.num_rows} sample{'s' * (table.num_rows != 1)}"
    lines = [f"{samples} in {counted(index.shards)}, {size:.1f} MiB"]
    for name in ("height", "width"):
        low, middle, high = pc.quantile(table.column(name), [0, 0.5, 1]).to_pylist()
        lines.append(f"  {name}: {low:.0f} to {high:.0f} pixels, median {middle:.0f}")
    lines += [f"  field {name}: in {count} samples" for name, count in fields.items()]
    lines += [f"broken: {reason}" for reason in Tally(broken).reasons()]
    if other_fields:
        lines.append(tip)
    lines += [f"not read: {reason}" for reason in Tally(notes).reasons()]
    if any(index_path(shard, folder) is None for shard in index.shards):
        lines.append("Folders of images have no index file: they are listed each time.")
    return facts, "\n".join(lines)


def _lock(shards: Sequence[Shard], folder: Path | None) -> AbstractContextManager[object]:
    """Prevent other processes from indexing the same shards into the same folder concurrently."""
    paths = [path for path in (index_path(shard, folder) for shard in shards) if path is not None]
    if not paths:
        return nullcontext()
    place, urls = paths[0].parent, "\n".join(shard.url for shard in shards)
    digest = hashlib.blake2b(urls.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return Lock(place / f".index-{digest}.lock", place)


def without_caption(
    index: Index, table: pa.Table, rows: np.ndarray, captions: Captions
) -> list[Fault]:
    """List the faults of samples that lack a caption.

    Args:
        index: The index.
        table: Rows of the index.
        rows: True for rows without a caption, bool (N,).
        captions: Settings of captions.
    """
    lacking = table.select(["shard", "key"]).filter(rows)
    reason = captions.lacking()
    return [
        Fault("sample", index.shards[shard].url, key, reason)
        for shard, key in zip(*(column.to_pylist() for column in lacking.columns), strict=True)
    ]


def counted(shards: Sequence[Shard]) -> str:
    """Return the numbers of shards and of folders of images, as text."""
    folders = sum(shard.kind == "folder" for shard in shards)
    counts = (len(shards) - folders, "shard"), (folders, "folder")
    return " and ".join(f"{n} {noun}{'s' * (n != 1)}" for n, noun in counts if n) or "no shards"


def index_path(shard: Shard, folder: Path | None) -> Path | None:
    """Return the path of a shard's index file; None = the shard has no index file."""
    if shard.kind == "folder":
        return None
    if shard.kind == "cache":
        return Path(shard.url + ".index")
    if folder is not None:
        place = hashlib.blake2b(as_utf8(shard.url).encode(), digest_size=4).hexdigest()
        return folder / f"{place}-{shard.name}.index"
    return None if is_remote(shard.url) else Path(shard.url + ".index")


def _load_alone(
    shard: Shard,
    settings: Storage,
    folder: Path | None,
    must_write: bool,
    fields: list[str] | None,
) -> tuple[Part, list[tuple[str, str]], str]:
    """Find or make a shard's index with a separate storage; return also the passing faults."""
    passing: list[tuple[str, str]] = []
    storage = settings.reporting(lambda url, reason: passing.append((url, reason)))
    path = index_path(shard, folder)
    if path is not None and path.exists():
        try:
            footer = read_footer(path)
            if _is_current(footer, shard):
                return footer, passing, ""
        except ValueError as error:
            _reject(shard, path, error)
    part, unwritten = _make(shard, storage, folder, must_write, fields)
    return part, passing, unwritten


def _make(
    shard: Shard,
    storage: Storage,
    folder: Path | None,
    must_write: bool,
    fields: list[str] | None,
) -> tuple[Part, str]:
    """Index a shard; return also why its index file could not be written, or ""."""
    if shard.kind == "cache":
        raise ValueError(f"{shard.url} does not match its index: cache the data again.")
    new_index, path, unwritten = make_index(shard, storage), index_path(shard, folder), ""
    if path is not None and new_index.size:
        try:
            write_index(new_index, path)
            return read_footer(path), ""
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            unwritten = f"The index {path} cannot be written: {reason}."
            if must_write:
                raise OSError(f"{unwritten} Set --output to a folder with space for it.") from error
    names = [n for n in new_index.table.column_names if n.startswith(FIELD)]
    unwanted = [] if fields is None else [name for name in names if name not in fields]
    table = new_index.table.drop_columns(unwanted)
    places = pickle.dumps(table.drop_columns([n for n in names if n not in unwanted]), protocol=5)
    state = hashlib.blake2b(places, digest_size=16).hexdigest()
    facts = new_index.faults, new_index.size, new_index.changed, new_index.digest, state
    return Part(None, table, table.num_rows, table.schema, *facts), unwritten


def _reject(shard: Shard, path: Path, error: ValueError) -> None:
    """Warn that an index file is not used, and why.

    Raises:
        ValueError: The index file belongs to a cache, which only caching can make again.
        StorageError: The index file belongs to a cache, and the disk failed.
    """
    cause = error.__cause__
    if shard.kind == "cache" and isinstance(cause, OSError) and cause.errno is not None:
        raise StorageError(f"{path} cannot be read: {cause.strerror}.") from error
    reason = f"{path} is not used as an index: {clipped(str(error)).rstrip('.')}."
    if shard.kind == "cache":
        raise ValueError(f"{reason} Remove it, and run `zsnr data cache` again to resume it.")
    warnings.warn(f"{reason} It is made again.", stacklevel=3)


def _is_current(footer: Part, shard: Shard) -> bool:
    if shard.kind == "cache":
        return footer.size == file_state(shard.url)[0]  # a cache may be copied
    if TEXTS not in footer.schema.names:
        return False  # written by a version whose index did not record captions
    if is_remote(shard.url):
        return True  # each read compares the size
    return (footer.size, footer.changed) == file_state(shard.url)
