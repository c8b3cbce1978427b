"""The samples that a run uses: what filters keep of an index, sorted into buckets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zsnr.data.buckets import AspectBuckets, assign
from zsnr.data.captions import Captions
from zsnr.data.faults import Fault, summarize
from zsnr.data.filters import PICTURE_FIELDS, Filter, apply_filters
from zsnr.data.index import Index, without_caption
from zsnr.data.scan import FIELD, TEXTS, part_file
from zsnr.data.sources import Shard

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PARTS = ("image", "text", "json")


@dataclass(frozen=True)
class Span:
    """Bytes inside a file."""

    url: str
    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """Where the parts of one sample are; None = it has no such part."""

    shard: str
    key: str
    image: Span
    text: Span | None
    json: Span | None


@dataclass(frozen=True, eq=False)
class Samples:
    """Samples in the order of their shards; memory is a few arrays, not objects.

    Args:
        shards: What they come from.
        sizes: Of the shards, in bytes.
        shapes: (height, width) of each bucket, in pixels.
        rows: Row of each sample in the index, (N,).
        shard: Number of each sample's shard, (N,), ascending.
        bucket: Number of each sample's bucket, (N,).
        size: Height and width of each picture, (N, 2).
        spans: Offset and size of image, text and json, (N, 3, 2); -1 = there is none.
        keys: Of the samples.
        removed: How many samples each filter removed.
        total: Samples before filters.
        faults: What indexing and selecting found broken.
        digest: A hash of all that decides which samples stand where.
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
    faults: list[Fault]
    digest: str

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, row: int) -> Sample:
        shard = self.shards[self.shard[row]]
        key: str = self.keys[row].as_py()
        found: dict[str, Span | None] = {}
        for part, (offset, size) in zip(PARTS, self.spans[row].tolist(), strict=True):
            if offset < 0:
                found[part] = None
                continue
            url = part_file(shard.url, key, part) if shard.kind == "folder" else shard.url
            found[part] = Span(url, offset, size)
        image = found.pop("image")
        assert image is not None
        return Sample(shard.url, key, image, **found)

    def shard_size(self, row: int) -> int | None:
        """Bytes of the sample's shard. None = its parts are files of their own."""
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
) -> Samples:
    """Decide which samples a run uses, and the bucket of each.

    Args:
        index: Of the shards, with the fields that the filters want.
        image_size: Height and width without buckets, in pixels.
        filters: In order.
        aspect: The buckets. None = one square.
        max_pixels: Larger pictures count as broken.
        captions: Samples without a caption count as broken.

    Raises:
        ValueError: A filter does not fit, or nothing is kept.
    """
    import numpy as np

    table = index.table
    count = table.num_rows
    columns = {name.removeprefix(FIELD): table.column(name) for name in table.column_names}
    for name, column in zip(PICTURE_FIELDS, ("width", "height", "image_size"), strict=True):
        columns[name] = table.column(column)
    kept, removed = apply_filters(filters, columns, count)
    height, width = (table.column(name).to_numpy() for name in ("height", "width"))
    huge = np.zeros(count, bool)
    if max_pixels is not None:
        huge = height.astype(np.int64) * width > max_pixels
    bare = np.zeros(count, bool)
    if TEXTS in table.column_names:  # a cache has samples with captions only
        bare = ~captions.usable(table.column(TEXTS))
    faults = list(index.faults)
    for row in np.flatnonzero(kept & huge).tolist():
        url = index.shards[table.column("shard")[row].as_py()].url
        reason = f"{width[row]} x {height[row]} pixels: wanted at most {max_pixels}"
        faults.append(Fault("sample", url, table.column("key")[row].as_py(), reason))
    faults += without_caption(index, kept & ~huge & bare, captions)
    rows = np.flatnonzero(kept & ~huge & ~bare)
    if not len(rows):
        lost = ", ".join(f"{name} removed {n}" for name, n in removed.items() if n)
        lost = lost or (f"Broken: {summarize(faults)}" if faults else "There are none")
        raise ValueError(f"No samples are left of {count}. {lost}.")
    shapes = [(image_size, image_size)] if aspect is None else aspect.shapes(image_size)
    small = table.select(
        [
            "shard",
            "key",
            "height",
            "width",
            *(f"{p}_{x}" for p in PARTS for x in ("offset", "size")),
        ]
    ).take(rows)
    size = np.stack([small.column(name).to_numpy() for name in ("height", "width")], 1)
    spans = [
        np.stack([small.column(f"{part}_{x}").to_numpy() for x in ("offset", "size")], 1)
        for part in PARTS
    ]
    settings: dict[str, Any] = {
        "index": index.digest,
        "weights": [shard.weight for shard in index.shards],
        "filters": [asdict(each) for each in filters],
        "shapes": shapes,
        "max_pixels": max_pixels if huge.any() else None,
    }
    if bare.any():
        settings["captions"] = asdict(captions)
    text = json.dumps(settings, sort_keys=True)
    return Samples(
        shards=index.shards,
        sizes=index.sizes,
        shapes=shapes,
        rows=rows,
        shard=small.column("shard").to_numpy(),
        bucket=assign(size[:, 0], size[:, 1], shapes),
        size=size,
        spans=np.stack(spans, 1),
        keys=small.column("key").combine_chunks(),
        removed=removed,
        total=count,
        faults=faults,
        digest=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
    )
