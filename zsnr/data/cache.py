"""The cache: shards of moments and text embeddings in the place of images.

A cache stands for its source sample by sample, broken ones included, so a run from the cache takes
the batches of a run from the images. It holds the moments of the codec, so each epoch draws its
latents anew, and the captions, so dropout and other encoders stay possible.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.data.captions import Captions
from zsnr.data.dataset import Pixels, ShardDataset
from zsnr.data.faults import Fault, as_utf8
from zsnr.data.filters import Filter
from zsnr.data.images import to_unit_range
from zsnr.data.index import Index
from zsnr.data.index_file import write_index
from zsnr.data.local_cache import LocalCache
from zsnr.data.samples import Sample, Samples, select
from zsnr.data.scan import FIELD, PARTS, ShardIndex
from zsnr.data.sources import CACHE, Shard, Sources, as_sources, is_cache, read_cache
from zsnr.data.storage import Retries, Storage, local_path
from zsnr.data.workers import Shared
from zsnr.denoiser import Conditioning
from zsnr.files import replacing
from zsnr.locks import remove_leftovers
from zsnr.public import public_url
from zsnr.untrusted import clipped, read_small

if TYPE_CHECKING:
    import pyarrow as pa

    from zsnr.data.buckets import AspectBuckets

NULL = "null.safetensors"
_MOST_NULL = 1 << 28  # bytes; an embedding of T5 has 4 MB

_VERSION = 1
_TEXT = "text."  # names of the embedding's tensors begin so
_FLIPPED = "moments_flipped"
_MOST_PIXELS = 1 << 16  # of a side
_FACTS: dict[str, tuple[type, ...]] = {
    "codec": (dict,),
    "conditioner": (dict, NoneType),
    "captions": (dict, NoneType),
    "picture": (dict,),
    "filters": (list,),
    "samples": (str,),
    "dtype": (str,),
    "shards": (list,),
}


@dataclass(frozen=True)
class Cache:
    """What a cache was made with, and of what; cache.json.

    Args:
        folder: Where it is.
        codec: The codec's fingerprint.
        conditioner: The text encoder's. None = the cache holds no text embeddings.
        captions: Which captions the embeddings are of, likewise.
        picture: Size, buckets, crop, flip and limit of the images.
        filters: Put on the source.
        samples: Digest of the source's samples, which decides their order.
        dtype: Of moments and embeddings.
        shards: File and weight of each, in order.
    """

    folder: Path
    codec: dict[str, Any]
    conditioner: dict[str, Any] | None
    captions: dict[str, Any] | None
    picture: dict[str, Any]
    filters: list[dict[str, Any]]
    samples: str
    dtype: Literal["float32", "float16", "bfloat16"]
    shards: list[dict[str, Any]]

    def facts(self) -> dict[str, Any]:
        """Return all but the folder, as plain values."""
        facts = {**asdict(self), "version": _VERSION}
        del facts["folder"]
        return facts

    def null(self) -> Conditioning | None:
        """Read null's embedding. None = the cache holds no text embeddings.

        Raises:
            ValueError: Its file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        if self.conditioner is None:
            return None
        file = self.folder / NULL
        try:
            tensors = load(read_small(file, _MOST_NULL))
            return text_embedding({name: row[None] for name, row in tensors.items()})
        except (SafetensorError, TypeError) as error:
            reason = clipped(str(error))
            raise ValueError(f"{file} is damaged: {reason}. Cache the data again.") from error


def find_cache(sources: Sources) -> Cache | None:
    """Read what a source that is a cache was made with. None = it is none.

    Raises:
        ValueError: It is one of several sources, unfinished, or of another version.
    """
    paths = [
        path
        for source in as_sources(sources)
        for path in ([source.path] if isinstance(source.path, str) else source.path)
    ]
    if not any(is_cache(path) for path in paths):
        return None
    if len(paths) > 1:
        raise ValueError(f"{paths[0]}: a cache is a source alone; cache several together.")
    folder = local_path(paths[0])
    facts = read_cache(folder / CACHE)
    version = facts.pop("version", None)
    if type(version) is not int or version != _VERSION:
        raise ValueError(f"{folder} was written by another version of zsnr: cache the data again.")
    if strange := [name for name in {**_FACTS, **facts} if not _fits(name, facts)]:
        raise ValueError(
            f"{folder / CACHE} is not what `zsnr data cache` writes: {clipped(', '.join(strange))} "
            "has the wrong form. Cache the data again, in another folder."
        )
    cache = Cache(folder=folder, **facts)
    missing = [s["file"] for s in cache.shards if not _index_file(folder / s["file"]).is_file()]
    if missing:
        raise ValueError(
            f"{folder} is not finished: {len(missing)} of {len(cache.shards)} shards are missing, "
            f"such as {missing[0]}. Run `zsnr data cache` again to resume it."
        )
    return cache


def _fits(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether a value of cache.json has the form of that field."""
    if name not in _FACTS or type(facts.get(name)) not in _FACTS[name]:
        return False
    if name == "dtype":
        return facts[name] in ("float32", "float16", "bfloat16")
    if name != "picture":
        return True
    from zsnr.data.buckets import AspectBuckets

    size, aspect = facts[name].get("image_size"), facts[name].get("aspect", ...)
    try:
        shape = None if aspect is None else AspectBuckets(**aspect)
        return (
            type(size) is int
            and 0 < size <= _MOST_PIXELS
            and (not shape or any(shape.shapes(size)))
        )
    except (TypeError, ValueError):
        return False


def select_cached(
    cache: Cache, index: Index, filters: Sequence[Filter], folder: Path | None = None
) -> Samples:
    """Decide which samples of a cache a run uses; filters it was made with need no second look."""
    from zsnr.data.buckets import AspectBuckets

    mine = filter_facts(filters)
    same = mine == cache.filters
    aspect = cache.picture["aspect"]
    samples = select(
        index,
        cache.picture["image_size"],
        filters=() if same else filters,
        aspect=None if aspect is None else AspectBuckets(**aspect),
        folder=folder,
    )
    digest = cache.samples
    if not same:
        text = json.dumps([cache.samples, mine])
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return replace(samples, digest=digest)


def filter_facts(filters: Sequence[Filter]) -> list[dict[str, Any]]:
    """Return filters as plain values, as JSON gives them back."""
    facts: list[dict[str, Any]] = json.loads(json.dumps([asdict(each) for each in filters]))
    return facts


def picture_facts(image_size: int, aspect: AspectBuckets | None, pixels: Pixels) -> dict[str, Any]:
    """Return what decides the pixels that a codec sees, as plain values."""
    shape = None if aspect is None else asdict(aspect)
    return {"image_size": image_size, "aspect": shape, **asdict(pixels)}


def check_cache(name: str, cache: Cache, **wanted: Mapping[str, Any] | None) -> None:
    """Refuse a cache that was made with other settings or weights.

    Args:
        name: The setting that names the cache, for the message.
        cache: What it was made with.
        wanted: Parts of it, such as `codec` or `picture`, as they should be. A digest of weights
            that is None, on either side, could not be read, and fits any.

    Raises:
        ValueError: They differ; says where.
    """
    for part, mine in wanted.items():
        theirs = getattr(cache, part)
        if mine is None or theirs is None:
            continue
        keys = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
        keys = [k for k in keys if k != "weights" or None not in (theirs.get(k), mine.get(k))]
        if keys:
            was, now = ({k: facts.get(k) for k in keys} for facts in (theirs, mine))
            raise ValueError(
                f"{name}={cache.folder} is stale: it was made with {part} {was}, the config has "
                f"{now}. Make it again with this config, or put the config back."
            )


_CROPS = 0  # seed of a cache's random crops, which belong to a row of its source


class CacheDataset(ShardDataset):
    """Moments, text embeddings and captions of a cache, by position.

    Items are as ShardDataset's, with moments (2 C, h, w) in the place of the image, and the
    tensors of the text embedding, if there is one. Whether crops were random must be said by
    `pixels`, as the cache was made.
    """

    def _load(self, sample: Sample, row: int, position: int, storage: Storage) -> dict[str, Any]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        if not sample.image.size:
            raise ValueError("it was broken when the cache was made")
        data, text, record = self._read(sample, row, storage)
        assert data is not None
        try:
            tensors = load(data)
            moments, flipped = tensors.pop("moments"), tensors.pop(_FLIPPED, None)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"its moments are unreadable: {error}") from error
        _, flip = self._pixels.draw(self._seed, position)
        crop, _ = self._pixels.draw(_CROPS, int(self.samples.rows[row]))
        return {
            "moments": flipped if flip else moments,
            "caption": self._caption(text, record, position),
            "sizes": self._sizes(row, crop),
            **tensors,
        }


def text_embedding(tensors: Mapping[str, Tensor]) -> Conditioning | None:
    """Gather the embedding from a batch's tensors. None = there is none."""
    parts = {
        name.removeprefix(_TEXT): part.float() if part.is_floating_point() else part
        for name, part in tensors.items()
        if name.startswith(_TEXT)
    }
    return Conditioning(**parts) if parts else None


def write_cache(
    folder: Path,
    samples: Samples,
    codec: LatentCodec,
    conditioner: Conditioner | None,
    index: Index,
    *,
    cache: Cache,
    pixels: Pixels,
    captions: Captions,
    retries: Retries = Retries(),
    headers: Mapping[str, str] | None = None,
    local_cache: LocalCache | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    device: torch.device | str = "cpu",
    on_shard: Callable[[list[Fault], int], None] | None = None,
    progress: bool = True,
) -> list[Fault]:
    """Write this rank's shards of a cache; those that are there already stay.

    Args:
        folder: Where to write.
        samples: Of the source.
        codec: Encodes the images.
        conditioner: Encodes the captions. None = leave them to training.
        index: Of the source, with all fields.
        cache: What cache.json says.
        pixels: How images are cut. A random crop is drawn once a sample.
        captions: Which text is the caption.
        retries: Of the source's reads.
        headers: Of requests to http servers.
        local_cache: Keeps whole remote shards on local disk.
        batch_size: Images that are encoded at a time.
        num_workers: Processes that load.
        rank: This process; every num_ranks-th shard is its own.
        num_ranks: All processes.
        device: Where to encode.
        on_shard: Called after each shard with what was broken so far and the samples so far.
        progress: Show a bar.

    Returns:
        What was broken.

    Raises:
        ValueError: The folder holds something else, or a cache of other settings.
    """
    from zsnr.progress import progress_bar

    _claim(folder, cache, conditioner)
    starts = samples.shard.searchsorted(range(len(samples.shards) + 1)).tolist()
    mine = [
        n
        for n in range(rank, len(samples.shards), num_ranks)
        if not _index_file(folder / cache.shards[n]["file"]).is_file()
    ]
    codec.to(device)
    if conditioner is not None:
        conditioner.to(device)
    encoder = _Encoder(codec, conditioner, cache, pixels.flip, device)
    dataset = _Raw(
        samples,
        pixels=replace(pixels, flip=False),
        captions=captions,
        retries=retries,
        headers=headers,
        local_cache=local_cache,
        seed=_CROPS,
    )
    faults: list[Fault] = []
    total, done = sum(starts[n + 1] - starts[n] for n in mine), 0
    with progress_bar(total, "cache", "sample", show=progress) as bar:
        for n in mine:
            rows = range(starts[n], starts[n + 1])
            items = DataLoader(
                dataset,
                batch_sampler=_one_shape(samples, rows, batch_size),
                num_workers=num_workers,
                collate_fn=Shared(list, num_workers),
            )
            path = folder / cache.shards[n]["file"]
            remove_leftovers(folder, path.name)
            spans, reasons = _write_shard(path, items, encoder, bar)
            broken = [Fault("sample", samples.shards[n].url, *reason) for reason in reasons]
            faults += broken
            table = _table(samples, index, rows, spans)
            name = as_utf8(public_url(samples.shards[n].url))
            known = [f for f in samples.faults if f.shard == name]
            size = path.stat().st_size
            write_index(ShardIndex(table, known + broken, size, 0, ""), _index_file(path))
            done += len(rows)
            if on_shard is not None:
                on_shard(faults, done)
    return faults


def shard_files(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Name the cache's shards, with the weight of each, or its source and its ratio."""
    return [
        {"file": f"{number:06d}-{shard.name.removesuffix('.tar')}.tar", "weight": shard.weight}
        | ({} if shard.ratio is None else {"ratio": shard.ratio, "source": shard.source})
        for number, shard in enumerate(shards)
    ]


_Spans = dict[int, dict[str, tuple[int, int]]]  # where the parts of each row are


class _Raw(ShardDataset):
    """Images with the bytes of their captions; a broken one says why."""

    def __getitem__(self, row: int) -> dict[str, Any]:
        sample = self.samples[row]
        process = self._here()
        process.local.report = lambda url, reason: None
        try:
            image, text, record = self._read(sample, row, process.storage)
            assert image is not None
            return {
                "row": row,
                "image": self._decode(image, row, row),
                "caption": self._captions.choose(text, record, 0),
                "certain": self._captions.is_certain(text, record),
                "text": text,
                "json": record,
            }
        except (ValueError, EOFError) as error:
            return {"row": row, "key": sample.key, "reason": " ".join(str(error).split())}


class _Encoder:
    """Batches of items to the bytes of their tensors."""

    def __init__(
        self,
        codec: LatentCodec,
        conditioner: Conditioner | None,
        cache: Cache,
        flip: bool,
        device: torch.device | str,
    ) -> None:
        self._codec, self._conditioner, self._flip = codec, conditioner, flip
        self._dtype, self._device = getattr(torch, cache.dtype), device

    @torch.no_grad()
    def __call__(self, items: Sequence[Mapping[str, Any]]) -> list[bytes]:
        from safetensors.torch import save

        images = to_unit_range(torch.stack([item["image"] for item in items]).to(self._device))
        columns = {"moments": self._codec.encode(images)}
        if self._flip:
            columns[_FLIPPED] = self._codec.encode(images.flip(-1))
        if self._conditioner is not None:
            if not all(item["certain"] for item in items):
                raise ValueError(
                    "A sample has several captions, so its embedding cannot be kept: name one "
                    "field in data.captions.fields, or cache without --text."
                )
            columns |= _columns(self._conditioner([item["caption"] for item in items]))
        kept = {n: x.to("cpu", _kept(x, self._dtype)) for n, x in columns.items()}
        return [
            save({name: column[i].contiguous() for name, column in kept.items()})
            for i in range(len(items))
        ]


def _columns(cond: Conditioning) -> dict[str, Tensor]:
    parts = {"context": cond.context, "mask": cond.mask, "pooled": cond.pooled}
    return {_TEXT + name: part for name, part in parts.items() if part is not None}


def _kept(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if x.is_floating_point() else x.dtype


def _write_shard(
    path: Path, items: Any, encoder: _Encoder, bar: Any
) -> tuple[_Spans, list[tuple[str, str]]]:
    """Write one shard; return its spans, and key and reason of what is broken."""
    from webdataset import TarWriter

    spans: _Spans = {}
    broken: list[tuple[str, str]] = []
    with replacing(path) as beside:
        with open(beside, "wb") as file, TarWriter(file, mtime=0) as tar:
            for batch in items:
                good = [item for item in batch if "image" in item]
                broken += [(i["key"], i["reason"]) for i in batch if "image" not in i]
                for item, tensors in zip(good, encoder(good) if good else [], strict=True):
                    texts = {"txt": item["text"], "json": item["json"]}
                    tar.write(
                        {"__key__": f"{item['row']:09d}", "safetensors": tensors}
                        | {name: text for name, text in texts.items() if text is not None}
                    )
                bar.update(len(batch))
        names = {"safetensors": "image", "txt": "text", "json": "json"}
        with tarfile.open(beside) as members:
            for member in members:
                row, _, suffix = member.name.partition(".")
                span = (member.offset_data, member.size)
                spans.setdefault(int(row), {})[names[suffix]] = span
    return spans, broken


def _table(
    samples: Samples,
    index: Index,
    rows: range,
    spans: _Spans,
) -> pa.Table:
    """Make the rows of a cached shard's index: one for each of the source's, in its order."""
    import pyarrow as pa

    table = pa.table({"key": samples.keys[rows.start : rows.stop].cast(pa.string())})
    for i, name in enumerate(("height", "width")):
        column = samples.size[rows.start : rows.stop, i]
        table = table.append_column(name, pa.array(column, pa.int32()))
    for part in PARTS:
        missing = (0, 0) if part == "image" else (-1, -1)
        found = [spans.get(row, {}).get(part, missing) for row in rows]
        for i, name in enumerate((f"{part}_offset", f"{part}_size")):
            table = table.append_column(name, pa.array([span[i] for span in found], pa.int64()))
    source = index.table.take(samples.rows[rows.start : rows.stop])
    for name in source.column_names:
        if name.startswith(FIELD):
            table = table.append_column(name, source.column(name))
    return table


def _one_shape(samples: Samples, rows: range, size: int) -> list[list[int]]:
    by_bucket: dict[int, list[int]] = {}
    for row in rows:
        by_bucket.setdefault(int(samples.bucket[row]), []).append(row)
    return [own[i : i + size] for own in by_bucket.values() for i in range(0, len(own), size)]


def _claim(folder: Path, cache: Cache, conditioner: Conditioner | None) -> None:
    """Write cache.json, or see that the one that is there says the same."""
    from safetensors.torch import save

    file = folder / CACHE
    if file.is_file():
        theirs = read_cache(file)
        mine = json.loads(json.dumps(cache.facts()))
        changed = [name for name in mine if theirs.get(name) != mine[name]]
        if changed:
            raise ValueError(
                f"{folder} holds a cache that was made with another {', '.join(changed)}: choose "
                "another folder, or remove it."
            )
        return
    others = [path for path in folder.glob("[!.]*") if path.name != NULL]
    if others:
        raise ValueError(f"{folder} is not empty and holds no cache: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if conditioner is not None:
        with torch.no_grad():
            rows = {
                name: part[0].contiguous() for name, part in _columns(conditioner.null()).items()
            }
        with replacing(folder / NULL) as beside:
            beside.write_bytes(save({name: part.cpu() for name, part in rows.items()}))
    with replacing(file) as beside:
        beside.write_text(json.dumps(cache.facts(), indent=1) + "\n", encoding="utf-8")


def _index_file(path: Path) -> Path:
    return path.with_name(path.name + ".index")
