"""The samples of a run: rows of an index that pass the filters, assigned to buckets."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsnr.data.buckets import AspectBuckets, assign
from zsnr.data.captions import TEXTS, Captions
from zsnr.data.columns import Mapped, Spool, arrays, write_columns
from zsnr.data.faults import Fault, PackedFaults, summarize
from zsnr.data.filters import IMAGE_FIELDS, Filter, Sieve
from zsnr.data.index import Index, without_caption
from zsnr.data.scan import FIELD, PARTS, part_file
from zsnr.data.sources import Shard

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_VERSION = 1
_IN_MEMORY = 100_000  # maximum number of samples for which no file is written
_BLOCK = 1 << 20  # rows that are counted at a time


@dataclass(frozen=True)
class Span:
    """Bytes inside a file."""

    url: str
    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """The location of each part of a sample; None = the sample has no such part."""

    shard: str
    key: str
    image: Span
    text: Span | None
    json: Span | None


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in the order of their shards, stored as a few arrays rather than objects.

    The arrays may be views of a file, which all processes share; then only its name is pickled.

    Args:
        shards: Shards of the samples.
        sizes: Sizes of the shards, in bytes.
        shapes: (height, width) of each bucket, in pixels.
        rows: Row of each sample in the index, (N,).
        shard: Number of each sample's shard, (N,), ascending.
        bucket: Number of each sample's bucket, (N,).
        size: Height and width of each image, (N, 2).
        spans: Offset and size of image, text and json, (N, 3, 2); -1 = there is no such part.
        keys: Keys of the samples.
        removed: Number of samples that each filter removed.
        total: Number of samples before filtering.
        faults: Faults found by indexing and selection.
        digest: A hash of everything that determines the samples and their order.
        counts: Samples of each shard and bucket, (S, K). None = not counted yet.
        mapped: File of which the arrays are views. None = they are in memory.
    """

    shards: list[Shard]
    sizes: list[int]
    shapes: list[tuple[int, int]]
    rows: np.ndarray
    shard: np.ndarray
    bucket: np.ndarray
    size: np.ndarray
    spans: np.ndarray
    keys: pa.Array
    removed: dict[str, int]
    total: int
    faults: Collection[Fault]
    digest: str
    counts: np.ndarray | None = None
    mapped: Mapped | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.mapped is not None:
            for name, column in self.mapped.columns.items():
                if state[name] is column:
                    del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        mapped = state["mapped"]
        self.__dict__.update({} if mapped is None else mapped.columns)
        self.__dict__.update(state)

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, row: int) -> Sample:
        shard = self.shards[self.shard[row]]
        key: str = self.keys[row].as_py()
        spans: dict[str, Span | None] = {}
        for part, (offset, size) in zip(PARTS, self.spans[row].tolist(), strict=True):
            if offset < 0:
                spans[part] = None
                continue
            url = part_file(shard.url, key, part) if shard.kind == "folder" else shard.url
            spans[part] = Span(url, offset, size)
        image = spans.pop("image")
        assert image is not None
        return Sample(shard.url, key, image, **spans)

    @cached_property
    def table(self) -> np.ndarray:
        """Number of samples of each shard and bucket, (S, K)."""
        import numpy as np

        if self.counts is not None:
            return self.counts
        S, K = len(self.shards), len(self.shapes)
        table = np.zeros(S * K, np.int64)
        for i in range(0, len(self), _BLOCK):
            cell = self.shard[i : i + _BLOCK].astype(np.int64) * K + self.bucket[i : i + _BLOCK]
            table += np.bincount(cell, minlength=S * K)
        return table.reshape(S, K)

    @cached_property
    def _starts(self) -> np.ndarray:
        import numpy as np

        starts: np.ndarray = np.concatenate([[0], self.table.sum(1).cumsum()])
        return starts

    def members(self, shard: int, bucket: int) -> np.ndarray:
        """Return the rows of one shard that are in a bucket, ascending."""
        first, end = self._starts[shard : shard + 2]
        rows: np.ndarray = first + (self.bucket[first:end] == bucket).nonzero()[0]
        return rows

    def member(self, bucket: int, n: int, shards: np.ndarray | slice = slice(None)) -> int:
        """Return the row of the n-th sample of a bucket; n wraps around at its end.

        Args:
            bucket: Number of the bucket.
            n: Counted from 0.
            shards: Numbers of the shards whose samples are counted.
        """
        import numpy as np

        numbers = np.arange(len(self.shards))[shards]
        counts = self.table[numbers, bucket]
        ends = counts.cumsum()
        n %= int(ends[-1])
        i = int(ends.searchsorted(n, side="right"))
        return int(self.members(int(numbers[i]), bucket)[n - int(ends[i] - counts[i])])

    def alike(self, row: int, distance: int) -> int:
        """Return the row of the sample that is `distance` samples after `row` in its bucket."""
        shard, bucket = int(self.shard[row]), int(self.bucket[row])
        before = int(self.table[:shard, bucket].sum())
        within = int(self.members(shard, bucket).searchsorted(row))
        return self.member(bucket, before + within + distance)

    def shard_size(self, row: int) -> int | None:
        """Return the size of the sample's shard. None = its parts are separate files."""
        number = self.shard[row]
        return None if self.shards[number].kind == "folder" else self.sizes[number]


def select(
    index: Index,
    image_size: int,
    *,
    filters: Sequence[Filter] = (),
    aspect: AspectBuckets | None = None,
    max_pixels: int | None = None,
    captions: Captions = Captions(),
    folder: Path | None = None,
) -> Samples:
    """Select the samples of a run, and assign each to a bucket.

    Args:
        index: Index of the shards, with the fields that the filters need.
        image_size: Height and width without buckets, in pixels.
        filters: Filters, in order.
        aspect: Aspect-ratio buckets. None = one square shape.
        max_pixels: Larger images count as broken.
        captions: Samples without a caption count as broken.
        folder: Folder in which large selections are written once, and memory-mapped by all
            processes. None = each process holds them in memory.

    Raises:
        ValueError: A filter does not match its field, or no samples are left.
    """
    shapes = [(image_size, image_size)] if aspect is None else aspect.shapes(image_size)
    settings: dict[str, Any] = {
        "weights": [shard.weight for shard in index.shards],
        "filters": [asdict(f) for f in filters],
        "shapes": shapes,
        "max_pixels": max_pixels,
        "captions": asdict(captions),
    }
    if any(shard.ratio is not None for shard in index.shards):
        settings["ratios"] = [[shard.source, shard.ratio] for shard in index.shards]
    if folder is None or len(index) <= _IN_MEMORY:
        return _selected(index, settings, filters, captions, None)
    file = _file_of(index, settings, folder)
    if file.exists():
        try:
            return _mapped(file, index, shapes)
        except (ValueError, OSError) as error:
            warnings.warn(f"{str(error).rstrip('.')}. It is made again.", stacklevel=2)
    try:
        return _selected(index, settings, filters, captions, folder)
    except OSError as error:
        warnings.warn(
            f"{file} cannot be written or mapped: {error}. Each process holds the index in memory.",
            stacklevel=2,
        )
        return _selected(index, settings, filters, captions, None)


def _selected(
    index: Index,
    settings: dict[str, Any],
    filters: Sequence[Filter],
    captions: Captions,
    folder: Path | None,
) -> Samples:
    """Read the index shard by shard and select the samples of a run, in a file or in memory."""
    import numpy as np
    import pyarrow as pa

    shapes, max_pixels = settings["shapes"], settings["max_pixels"]
    sieve, faults, total, huge, lacking = Sieve(filters), [], 0, False, False
    counts = np.zeros((len(index.shards), len(shapes)), np.int32)
    with closing(Spool(folder)) as spool:
        for number, table in enumerate(index.blocks()):
            columns = {name.removeprefix(FIELD): table.column(name) for name in table.column_names}
            for name, column in zip(IMAGE_FIELDS, ("width", "height", "image_size"), strict=True):
                columns[name] = table.column(column)
            keep = sieve.keeps(columns, table.num_rows)
            height, width = (table.column(name).to_numpy() for name in ("height", "width"))
            large = np.zeros(len(keep), bool)
            if max_pixels is not None:
                large = height.astype(np.int64) * width > max_pixels
            huge |= bool(large.any())
            for row in np.flatnonzero(keep & large).tolist():
                reason = f"{width[row]} x {height[row]} pixels: wanted at most {max_pixels}"
                key = table.column("key")[row].as_py()
                faults.append(Fault("sample", index.shards[number].url, key, reason))
            bare = keep & ~large & ~captions.usable(table.column(TEXTS))
            faults += without_caption(index, table, bare, captions)
            lacking |= bool(bare.any())
            rows = np.flatnonzero(keep & ~large & ~bare)
            total += len(keep)
            if not len(rows):
                continue
            size = np.stack([height[rows], width[rows]], 1)
            bucket = assign(size[:, 0], size[:, 1], shapes)
            counts[number] = np.bincount(bucket, minlength=len(shapes))
            spans = [
                np.stack([table.column(f"{part}_{x}").to_numpy() for x in ("offset", "size")], 1)
                for part in PARTS
            ]
            spool.add(
                table.column("key").take(rows).combine_chunks().cast(pa.large_string()),
                rows=rows + total - len(keep),
                shard=np.full(len(rows), number, np.int32),
                bucket=bucket,
                size=size,
                spans=np.stack(spans, 1)[rows],
            )
        sieve.check()
        if not spool.rows:
            lost = ", ".join(f"{name} removed {n}" for name, n in sieve.removed.items() if n)
            faults = [*index.faults, *faults]
            lost = lost or (f"Broken: {summarize(faults)}" if faults else "There are none")
            where = f" of {total}" if total else ""
            tip = ""
            if any("no caption" in fault.reason for fault in faults):
                tip = " An empty text file beside an image trains it without a caption."
            raise ValueError(f"No samples are left{where}. {lost}.{tip}")
        limit = max_pixels if huge else None
        facts = {**settings, "index": index.digest, "max_pixels": limit}
        if not lacking:
            del facts["captions"]
        digest = _digest(facts)
        about: dict[str, Any] = {"removed": sieve.removed, "total": total, "digest": digest}
        if folder is not None:
            file = _file_of(
                index, settings, folder
            )  # a shard may have been indexed again meanwhile
            about["faults"] = [[fault.shard, fault.key, fault.reason] for fault in faults]
            write_columns(file, spool.batch(), about, counts)
            return _mapped(file, index, shapes)
        return _samples(index, shapes, faults, counts, about, arrays(spool.batch()))


def _file_of(index: Index, settings: dict[str, Any], folder: Path) -> Path:
    """Return the path of the samples' file, which hashes everything that determines it."""
    return folder / f"{_digest([_VERSION, index.state, settings])}.arrow"


def _mapped(file: Path, index: Index, shapes: list[tuple[int, int]]) -> Samples:
    """Memory-map the samples that a process has written.

    Raises:
        ValueError: The file is damaged, or belongs to other shards.
    """
    import numpy as np

    mapped = Mapped(file)
    counts = np.frombuffer(mapped.counts, np.int32)
    if len(counts) != len(index.shards) * len(shapes) or counts.sum() != len(
        mapped.columns["keys"]
    ):
        raise ValueError(f"{file} belongs to other shards")
    faults = [Fault("sample", *fault) for fault in mapped.about.pop("faults")]
    counts = counts.reshape(-1, len(shapes))
    return _samples(index, shapes, faults, counts, mapped.about, mapped.columns, mapped)


def _samples(
    index: Index,
    shapes: list[tuple[int, int]],
    faults: Iterable[Fault],
    counts: np.ndarray,
    about: Mapping[str, Any],
    columns: Mapping[str, Any],
    mapped: Mapped | None = None,
) -> Samples:
    return Samples(
        shards=index.shards,
        sizes=index.sizes,
        shapes=shapes,
        faults=PackedFaults(faults, [part.faults for part in index.parts]),
        counts=counts,
        mapped=mapped,
        **about,
        **columns,
    )


def _digest(facts: object) -> str:
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
