"""The cache: shards of latent moments and text embeddings in place of images.

A cache mirrors its source sample by sample, broken ones included, so a run from the cache sees the
same batches as a run from the images. It holds the moments of the codec, so that each epoch samples
new latents, and the captions, so that dropout and other encoders remain possible.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import warnings
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
from zsnr.conditioning.cuts import Cut, describe_cuts, longest_cut
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
_MAX_NULL = 1 << 28  # bytes; a T5 embedding takes 4 MB

_VERSION = 1
TEXT = "text."  # prefix of the names of the embedding's tensors
_FLIPPED = "moments_flipped"
_MAX_SIDE = 1 << 16  # pixels
_FACTS: dict[str, tuple[type, ...]] = {
    "codec": (dict,),
    "conditioner": (dict, NoneType),
    "captions": (dict, NoneType),
    "images": (dict,),
    "filters": (list,),
    "samples": (str,),
    "dtype": (str,),
    "shards": (list,),
}


@dataclass(frozen=True)
class Cache:
    """The settings and sources that a cache was made with; cache.json.

    Args:
        folder: Folder of the cache.
        codec: Fingerprint of the codec.
        conditioner: Fingerprint of the text encoder. None = the cache holds no text embeddings.
        captions: Settings of the embedded captions. None = the cache holds no text embeddings.
        images: Size, buckets, crop, flip and pixel limit of the images.
        filters: Filters that were applied to the source.
        samples: Digest of the source's samples, which determines their order.
        dtype: Data type of moments and embeddings.
        shards: File and weight of each shard, in order.
    """

    folder: Path
    codec: dict[str, Any]
    conditioner: dict[str, Any] | None
    captions: dict[str, Any] | None
    images: dict[str, Any]
    filters: list[dict[str, Any]]
    samples: str
    dtype: Literal["float32", "float16", "bfloat16"]
    shards: list[dict[str, Any]]

    def facts(self) -> dict[str, Any]:
        """Return all fields except the folder, as plain values."""
        facts = {**asdict(self), "version": _VERSION}
        del facts["folder"]
        return facts

    def null(self) -> Conditioning | None:
        """Read the embedding of the null prompt. None = the cache holds no text embeddings.

        Raises:
            ValueError: The embedding's file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        if self.conditioner is None:
            return None
        file = self.folder / NULL
        try:
            tensors = load(read_small(file, _MAX_NULL))
            return text_embedding({name: row[None] for name, row in tensors.items()})
        except (SafetensorError, TypeError) as error:
            reason = clipped(str(error))
            raise ValueError(f"{file} is damaged: {reason}. Cache the data again.") from error


def find_cache(sources: Sources) -> Cache | None:
    """Read the settings of a source that is a cache. None = the source is not a cache.

    Raises:
        ValueError: The cache is one of several sources, unfinished, or of another version.
    """
    paths = [
        path
        for source in as_sources(sources)
        for path in ([source.path] if isinstance(source.path, str) else source.path)
    ]
    if not any(is_cache(path) for path in paths):
        return None
    if len(paths) > 1:
        raise ValueError(f"{paths[0]}: a cache must be the only source: cache several together.")
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
    """Whether a value of cache.json has the type that its field requires."""
    if name not in _FACTS or type(facts.get(name)) not in _FACTS[name]:
        return False
    if name == "dtype":
        return facts[name] in ("float32", "float16", "bfloat16")
    if name != "images":
        return True
    from zsnr.data.buckets import AspectBuckets

    size, aspect = facts[name].get("image_size"), facts[name].get("aspect", ...)
    try:
        buckets = None if aspect is None else AspectBuckets(**aspect)
        return (
            type(size) is int
            and 0 < size <= _MAX_SIDE
            and (not buckets or any(buckets.shapes(size)))
        )
    except (TypeError, ValueError):
        return False


def select_cached(
    cache: Cache, index: Index, filters: Sequence[Filter], folder: Path | None = None
) -> Samples:
    """Select the samples of a cache; filters that the cache was made with are not applied again."""
    from zsnr.data.buckets import AspectBuckets

    filter_settings = filter_facts(filters)
    same_filters = filter_settings == cache.filters
    aspect = cache.images["aspect"]
    samples = select(
        index,
        cache.images["image_size"],
        filters=() if same_filters else filters,
        aspect=None if aspect is None else AspectBuckets(**aspect),
        folder=folder,
    )
    digest = cache.samples
    if not same_filters:
        text = json.dumps([cache.samples, filter_settings])
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return replace(samples, digest=digest)


def filter_facts(filters: Sequence[Filter]) -> list[dict[str, Any]]:
    """Return filters as plain values, as they are after a round trip through JSON."""
    facts: list[dict[str, Any]] = json.loads(json.dumps([asdict(f) for f in filters]))
    return facts


def image_facts(image_size: int, aspect: AspectBuckets | None, pixels: Pixels) -> dict[str, Any]:
    """Return the settings that determine the codec's input pixels, as plain values."""
    shape = None if aspect is None else asdict(aspect)
    return {"image_size": image_size, "aspect": shape, **asdict(pixels)}


def check_cache(name: str, cache: Cache, **expected: Mapping[str, Any] | None) -> None:
    """Refuse a cache that was made with other settings or weights.

    Args:
        name: The setting that names the cache, for the message.
        cache: The cache's description.
        expected: Expected values of its fields, such as `codec` or `images`. A digest of weights
            that is None, on either side, could not be read, and matches any.

    Raises:
        ValueError: A field differs.
    """
    for part, new in expected.items():
        old = getattr(cache, part)
        if new is None or old is None:
            continue
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        keys = [k for k in keys if k != "weights" or None not in (old.get(k), new.get(k))]
        if keys:
            was, now = ({k: facts.get(k) for k in keys} for facts in (old, new))
            raise ValueError(
                f"{name}={cache.folder} is stale: it was made with {part} {was}, the config has "
                f"{now}. Make it again with this config, or put the config back."
            )


_CROPS = 0  # seed of a cache's random crops, which are a function of the row in its source


class CacheDataset(ShardDataset):
    """Moments, text embeddings and captions of a cache, by position.

    Items are those of ShardDataset, with moments (2 C, h, w) in place of the image, and the tensors
    of the text embedding, if there is one. `pixels.crop` must be the value that the cache was made
    with.
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
    """Collect the embedding from a batch's tensors. None = the batch has no embedding."""
    parts = {
        name.removeprefix(TEXT): part.float() if part.is_floating_point() else part
        for name, part in tensors.items()
        if name.startswith(TEXT)
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
    """Write this rank's shards of a cache, except those that already exist.

    Args:
        folder: Output folder.
        samples: Samples of the source.
        codec: Encodes the images.
        conditioner: Encodes the captions. None = captions are encoded during training.
        index: Index of the source, with all fields.
        cache: Contents of cache.json.
        pixels: Cropping of the images. A random crop is drawn once per sample.
        captions: Choice of the caption among a sample's texts.
        retries: Retry policy for reads of the source.
        headers: Headers of requests to http servers.
        local_cache: Cache of whole remote shards on local disk.
        batch_size: Number of images that are encoded at a time.
        num_workers: Number of loader processes.
        rank: Rank of this process, which writes every num_ranks-th shard.
        num_ranks: Number of processes.
        device: Device of the encoders.
        on_shard: Called after each shard with the faults and the number of samples so far.
        progress: Show a progress bar.

    Returns:
        The faults of broken samples.

    Raises:
        ValueError: The folder holds other files, or a cache with other settings.
    """
    from zsnr.progress import progress_bar

    _claim(folder, cache, conditioner)
    starts = samples.shard.searchsorted(range(len(samples.shards) + 1)).tolist()
    shard_numbers = [
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
    total, done = sum(starts[n + 1] - starts[n] for n in shard_numbers), 0
    with progress_bar(total, "cache", "sample", show=progress) as bar:
        for n in shard_numbers:
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
            source_faults = [f for f in samples.faults if f.shard == name]
            size = path.stat().st_size
            write_index(ShardIndex(table, source_faults + broken, size, 0, ""), _index_file(path))
            done += len(rows)
            if on_shard is not None:
                on_shard(faults, done)
    encoder.warn_of_cuts()
    return faults


def shard_files(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """List the cache's shards, each with its weight, or with its source and ratio.

    Where there are several sources, each shard has the name of its source.
    """
    several = len({shard.source_name for shard in shards}) > 1
    return [
        {"file": f"{number:06d}-{shard.name.removesuffix('.tar')}.tar", "weight": shard.weight}
        | ({} if shard.ratio is None else {"ratio": shard.ratio, "source": shard.source})
        | ({"source_name": shard.source_name} if several else {})
        for number, shard in enumerate(shards)
    ]


_Spans = dict[int, dict[str, tuple[int, int]]]  # offset and size of each part of each row


class _Raw(ShardDataset):
    """Images with the bytes of their captions; a broken sample holds the reason instead."""

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
    """Encodes batches of items and serializes the tensors of each."""

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
        self._captions, self._cut = 0, 0
        self._longest: Cut | None = None

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
                    "A sample has several captions, so its embedding cannot be cached: name one "
                    "field in data.captions.fields, or cache without --text."
                )
            captions = [item["caption"] for item in items]
            columns |= _columns(self._conditioner(captions))
            self._count(captions, self._conditioner.cuts(captions))
        tensors = {n: x.to("cpu", _stored_dtype(x, self._dtype)) for n, x in columns.items()}
        return [
            save({name: column[i].contiguous() for name, column in tensors.items()})
            for i in range(len(items))
        ]

    def _count(self, captions: Sequence[str], cuts: Sequence[Cut]) -> None:
        self._captions += len(captions)
        self._cut += len(cuts)
        if cuts:
            longest = longest_cut(cuts)
            self._longest = longest_cut([self._longest or longest, longest])

    def warn_of_cuts(self) -> None:
        """Warn of the captions that were cut."""
        if self._longest is not None:
            warnings.warn(
                describe_cuts(self._longest, self._cut, self._captions, "caption"), stacklevel=3
            )


def _columns(cond: Conditioning) -> dict[str, Tensor]:
    return {TEXT + name: part for name, part in cond.parts().items()}


def _stored_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if x.is_floating_point() else x.dtype


def _write_shard(
    path: Path, items: Any, encoder: _Encoder, bar: Any
) -> tuple[_Spans, list[tuple[str, str]]]:
    """Write one shard; return its spans, and the key and reason of each broken sample."""
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
    """Make the rows of a cached shard's index: one per row of the source, in the same order."""
    import pyarrow as pa

    table = pa.table({"key": samples.keys[rows.start : rows.stop].cast(pa.string())})
    for i, name in enumerate(("height", "width")):
        column = samples.size[rows.start : rows.stop, i]
        table = table.append_column(name, pa.array(column, pa.int32()))
    for part in PARTS:
        missing = (0, 0) if part == "image" else (-1, -1)
        places = [spans.get(row, {}).get(part, missing) for row in rows]
        for i, name in enumerate((f"{part}_offset", f"{part}_size")):
            table = table.append_column(name, pa.array([span[i] for span in places], pa.int64()))
    source = index.table.take(samples.rows[rows.start : rows.stop])
    for name in source.column_names:
        if name.startswith(FIELD):
            table = table.append_column(name, source.column(name))
    return table


def _one_shape(samples: Samples, rows: range, size: int) -> list[list[int]]:
    by_bucket: dict[int, list[int]] = {}
    for row in rows:
        by_bucket.setdefault(int(samples.bucket[row]), []).append(row)
    return [group[i : i + size] for group in by_bucket.values() for i in range(0, len(group), size)]


def _claim(folder: Path, cache: Cache, conditioner: Conditioner | None) -> None:
    """Write cache.json, or check that the existing one holds the same settings."""
    from safetensors.torch import save

    file = folder / CACHE
    if file.is_file():
        existing = read_cache(file)
        settings = json.loads(json.dumps(cache.facts()))
        for facts in (existing, settings):
            for shard in facts["shards"]:
                shard.pop("source_name", None)  # a label, which older caches lack
        changed = [name for name in settings if existing.get(name) != settings[name]]
        if changed:
            raise ValueError(
                f"{folder} holds a cache that was made with a different {', '.join(changed)}: "
                "choose another folder, or remove it."
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
