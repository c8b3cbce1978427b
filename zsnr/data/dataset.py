"""Samples by their position in the run, with replacements for broken ones."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch.utils.data import Dataset

from zsnr.data.caption_tags import Tags
from zsnr.data.captions import Captions
from zsnr.data.faults import BudgetError, Fault
from zsnr.data.formats import MAX_PIXELS
from zsnr.data.groups import SampleGroups
from zsnr.data.images import decode_image, size_facts
from zsnr.data.local_cache import LocalCache
from zsnr.data.samples import Sample, Samples
from zsnr.data.storage import Retries, Storage, StorageError, is_remote
from zsnr.noise import derive_seed
from zsnr.public import public_url

_CROP, _CAPTION, _TAGS = 3, 4, 5  # streams of the run's seed; draws.py uses the first three
_TRIES = 32  # consecutive samples that may be broken
_GAP = 64 << 10  # bytes between two parts of a sample that are read rather than skipped
_THREADS = 8  # concurrent reads from a server


@dataclass(frozen=True)
class Pixels:
    """Conversion of an image to the shape of its bucket.

    Args:
        crop: Placement of the crop where the aspect ratio differs: "center" or "random".
        flip: Mirror each image with probability 1/2.
        max_pixels: Larger images count as broken, and are not decoded.
    """

    crop: Literal["center", "random"] = "center"
    flip: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop={self.crop!r}: wanted 'center' or 'random'.")

    def draw(self, seed: int, position: int) -> tuple[tuple[float, float], bool]:
        """Draw a sample's crop (v, u), where 0.5 is the center, and whether it is mirrored."""
        draw = random.Random(derive_seed(seed, _CROP, position))
        place = draw.random(), draw.random()
        return (place if self.crop == "random" else (0.5, 0.5)), self.flip and draw.random() < 0.5


class Order(Protocol):
    """Maps positions to rows; `replacement` gives the row that is used for a broken sample."""

    def __getitem__(self, position: int) -> int: ...

    def replacement(self, position: int, attempt: int) -> int: ...


class AsIndexed:
    """Samples in the order of the index."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, position: int) -> int:
        return position

    def replacement(self, position: int, attempt: int) -> int:
        """Return the row of the attempt-th sample after a broken one in its bucket."""
        return self._samples.alike(position, attempt)


class ShardDataset(Dataset[dict[str, Any]]):
    """Images and captions read by offset.

    An item is {"image": uint8 (3, H, W), "caption": str, "sizes": int64 (6,), "key": str,
    "position": int, "faults": list of the Fault met while loading}. Sizes are those of the original
    image, its crop and the result, as in Conditioning. A negative position ~p = -1 - p loads the
    sample at p to keep ranks in step, and stays negative in the item. With `groups`, an item has
    "groups": int64 (G,).

    Args:
        samples: The samples.
        order: Maps positions to rows. None = the order of the index.
        pixels: Cropping and mirroring of images.
        captions: Choice of the caption among a sample's texts.
        tags: Changes of captions that are lists of tags. None = captions are as they are.
        retries: Retry policy for reads.
        headers: Headers of requests to http servers.
        local_cache: Cache of whole remote shards on local disk. None = samples are read remotely.
        seed: Seed of crops, captions and tags, which are functions of the position.
        groups: Groups of the samples. None = items do not name theirs.
    """

    def __init__(
        self,
        samples: Samples,
        order: Order | None = None,
        *,
        pixels: Pixels = Pixels(),
        captions: Captions = Captions(),
        tags: Tags | None = None,
        retries: Retries = Retries(),
        headers: Mapping[str, str] | None = None,
        local_cache: LocalCache | None = None,
        seed: int = 0,
        groups: SampleGroups | None = None,
    ) -> None:
        self.samples, self._groups = samples, groups
        self._order = AsIndexed(samples) if order is None else order
        self._pixels, self._captions, self._tags, self._seed = pixels, captions, tags, seed
        self._storage = Storage(retries, headers=headers, local_cache=local_cache)
        self._remote = any(is_remote(shard.url) for shard in samples.shards)
        self._process: _Process | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Load the sample at a position, or its replacement if it is broken.

        Raises:
            BudgetError: Too many consecutive samples are broken.
            StorageError: Storage failed, so it is unknown whether the sample is broken.
        """
        if position < 0:
            return {**self[~position], "position": position}
        process = self._here()
        faults: list[Fault] = []
        for attempt in range(_TRIES):
            row = self._order.replacement(position, attempt) if attempt else self._order[position]
            sample = self.samples[row]
            process.local.report = lambda url, reason, key=sample.key: faults.append(
                Fault("passing", url, key, reason, position)
            )
            try:
                item = self._load(sample, row, position, process.storage)
            except (ValueError, EOFError) as error:
                reason = " ".join(str(error).split())
                faults.append(Fault("sample", sample.shard, sample.key, reason, position))
                continue
            if self._groups is not None:
                item["groups"] = self._groups(row)
            return {**item, "key": sample.key, "position": position, "faults": faults}
        last = faults[-1]
        raise BudgetError(
            f"{_TRIES} consecutive samples are broken; the last: {last.shard}, sample "
            f"{last.key!r}: {last.reason}. Repair the data."
        )

    def load(self, position: int) -> dict[str, Any]:
        """Load the sample at a position, without a replacement if it is broken.

        Returns:
            {"image": ..., "caption": ..., "sizes": ...}

        Raises:
            ValueError, EOFError: The sample is broken.
            StorageError: The sample cannot be reached.
        """
        process, row = self._here(), self._order[position]
        process.local.report = lambda url, reason: None
        return self._load(self.samples[row], row, position, process.storage)

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Load a batch; remote samples are read concurrently."""
        if not self._remote:
            return [self[position] for position in positions]
        return list(self._here().pool.map(self.__getitem__, positions))

    def _load(self, sample: Sample, row: int, position: int, storage: Storage) -> dict[str, Any]:
        """Read and decode one sample.

        Raises:
            ValueError, EOFError: The sample is broken.
            StorageError: The sample cannot be reached.
        """
        image, text, record = self._read(sample, row, storage)
        assert image is not None
        caption = self._caption(text, record, position)
        crop, _ = self._pixels.draw(self._seed, position)
        pixels, sizes = self._decode(image, row, position), self._sizes(row, crop)
        return {"image": pixels, "caption": caption, "sizes": sizes}

    def _caption(self, text: bytes | None, record: bytes | None, position: int) -> str:
        seed = self._seed
        caption = self._captions.choose(text, record, derive_seed(seed, _CAPTION, position))
        tags = self._tags
        return caption if tags is None else tags(caption, derive_seed(seed, _TAGS, position))

    def _decode(self, data: bytes, row: int, position: int) -> torch.Tensor:
        height, width = self.samples.shapes[self.samples.bucket[row]]
        crop, flip = self._pixels.draw(self._seed, position)
        limit = self._pixels.max_pixels
        return decode_image(data, height, width, crop=crop, flip=flip, max_pixels=limit)

    def _sizes(self, row: int, crop: tuple[float, float]) -> torch.Tensor:
        size: tuple[int, int] = tuple(self.samples.size[row].tolist())
        height, width = self.samples.shapes[self.samples.bucket[row]]
        return size_facts(size, height, width, crop)

    def _read(self, sample: Sample, row: int, storage: Storage) -> list[bytes | None]:
        """Read image, text and json.

        Raises:
            EOFError: The sample is truncated.
            StorageError: The sample cannot be reached, or no longer exists.
        """
        try:
            return self._read_parts(sample, row, storage)
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{public_url(sample.shard)}, sample {sample.key!r}, existed when the data was "
                f"indexed, but now: {error} Restore it, or index the data again."
            ) from error

    def _read_parts(self, sample: Sample, row: int, storage: Storage) -> list[bytes | None]:
        """Read all parts with one request if they are close together."""
        spans = [sample.image, sample.text, sample.json]
        present = [span for span in spans if span is not None]
        size = self.samples.shard_size(row)
        start = min(span.offset for span in present)
        end = max(span.offset + span.size for span in present)
        together = len({span.url for span in present}) == 1
        if together and end - start <= sum(span.size for span in present) + _GAP:
            block = storage.read(sample.image.url, start, end - start, expected_size=size)
            return [
                None if s is None else block[s.offset - start : s.offset - start + s.size]
                for s in spans
            ]
        return [None if s is None else storage.read(s.url, s.offset, s.size, size) for s in spans]

    def _here(self) -> _Process:
        """Return this process's connections and threads, which do not survive a fork."""
        if self._process is None or self._process.pid != os.getpid():
            self._process = _Process(self._storage)
        return self._process


class _Process:
    def __init__(self, storage: Storage) -> None:
        self.pid = os.getpid()
        self.local = threading.local()
        self.storage = storage.reporting(lambda url, reason: self.local.report(url, reason))
        self.pool = ThreadPoolExecutor(_THREADS)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate items: tensors stacked, position (B,), faults joined in one list, others as lists."""
    batch: dict[str, Any] = {}
    names = {name for item in items for name in item}
    for item in items:
        if missing := sorted(names - item.keys()):
            raise ValueError(
                f"{item.get('key', 'An item')} has no {missing[0]}, unlike other items of its "
                "batch: wanted the same keys in every item of a dataset."
            )
    for name, first in items[0].items():
        values = [item[name] for item in items]
        if isinstance(first, torch.Tensor):
            batch[name] = torch.stack(values)
        elif name == "position":
            batch[name] = torch.tensor(values)
        elif name == "faults":
            batch[name] = [fault for faults in values for fault in faults]
        else:
            batch[name] = values
    return batch
