"""Samples by their position in the run, with others in the place of broken ones."""

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

from zsnr.data.captions import Captions
from zsnr.data.faults import BudgetError, Fault
from zsnr.data.formats import MAX_PIXELS
from zsnr.data.images import decode_image, size_facts
from zsnr.data.local_cache import LocalCache
from zsnr.data.samples import Sample, Samples
from zsnr.data.storage import Retries, Storage, StorageError, is_remote
from zsnr.noise import derive_seed
from zsnr.public import public_url

_CROP, _CAPTION = 3, 4  # streams of the run's seed; those of training.draws come before
_TRIES = 32  # samples in a row that may be broken
_GAP = 64 << 10  # bytes between two parts of a sample that are read rather than skipped
_THREADS = 8  # reads at a time, from a server


@dataclass(frozen=True)
class Pixels:
    """How an image becomes the pixels of a bucket.

    Args:
        crop: What is cut away where the shape differs: the same on both sides ("center"), or by
            chance ("random").
        flip: Mirror half of the images, by chance.
        max_pixels: Larger images count as broken, before they are decoded.
    """

    crop: Literal["center", "random"] = "center"
    flip: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop={self.crop!r}: wanted 'center' or 'random'.")

    def draw(self, seed: int, position: int) -> tuple[tuple[float, float], bool]:
        """Draw a sample's crop (v, u), 0.5 = the middle, and whether it is mirrored."""
        draw = random.Random(derive_seed(seed, _CROP, position))
        place = draw.random(), draw.random()
        return (place if self.crop == "random" else (0.5, 0.5)), self.flip and draw.random() < 0.5


class Order(Protocol):
    """Positions to rows; `replacement` stands in for a broken sample."""

    def __getitem__(self, position: int) -> int: ...

    def replacement(self, position: int, attempt: int) -> int: ...


class AsIndexed:
    """Samples in the order of the index."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __getitem__(self, position: int) -> int:
        return position

    def replacement(self, position: int, attempt: int) -> int:
        """Return the row of the attempt-th sample of the bucket behind a broken one."""
        return self._samples.alike(position, attempt)


class ShardDataset(Dataset[dict[str, Any]]):
    """Images and captions read by offset.

    An item is {"image": uint8 (3, H, W), "caption": str, "sizes": int64 (6,), "key": str,
    "position": int, "faults": what went wrong on the way, a list of Fault}. Sizes are of the
    original image, its crop and the result, as Conditioning's. Position ~p = -1 - p stands for
    the sample at p where only the same amount of work is wanted, and keeps its sign.

    Args:
        samples: What there is.
        order: Maps positions to rows. None = as they are indexed.
        pixels: How images are cut.
        captions: Which text is the caption.
        retries: How often a read is tried.
        headers: Of requests to http servers.
        local_cache: Keeps whole remote shards on local disk. None = samples are read where they
            are.
        seed: Of crops and captions, which belong to a position.
    """

    def __init__(
        self,
        samples: Samples,
        order: Order | None = None,
        *,
        pixels: Pixels = Pixels(),
        captions: Captions = Captions(),
        retries: Retries = Retries(),
        headers: Mapping[str, str] | None = None,
        local_cache: LocalCache | None = None,
        seed: int = 0,
    ) -> None:
        self.samples = samples
        self._order = AsIndexed(samples) if order is None else order
        self._pixels, self._captions, self._seed = pixels, captions, seed
        self._storage = Storage(retries, headers=headers, local_cache=local_cache)
        self._remote = any(is_remote(shard.url) for shard in samples.shards)
        self._process: _Process | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Load the sample at a position, or the one that replaces it.

        Raises:
            BudgetError: So many samples in a row are broken that something else must be wrong.
            StorageError: Storage failed: what cannot be read is not broken.
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
            return {**item, "key": sample.key, "position": position, "faults": faults}
        last = faults[-1]
        raise BudgetError(
            f"{_TRIES} samples in a row are broken; the last: {last.shard}, sample {last.key!r}: "
            f"{last.reason}. Mend the data."
        )

    def load(self, position: int) -> dict[str, Any]:
        """Load the sample at a position, and no other in its place.

        Returns:
            {"image": ..., "caption": ..., "sizes": ...}

        Raises:
            ValueError, EOFError: It is broken.
            StorageError: It cannot be reached.
        """
        process, row = self._here(), self._order[position]
        process.local.report = lambda url, reason: None
        return self._load(self.samples[row], row, position, process.storage)

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Load a batch; what lies behind an address is read several samples at a time."""
        if not self._remote:
            return [self[position] for position in positions]
        return list(self._here().pool.map(self.__getitem__, positions))

    def _load(self, sample: Sample, row: int, position: int, storage: Storage) -> dict[str, Any]:
        """Read and decode one sample.

        Raises:
            ValueError, EOFError: It is broken.
            StorageError: It cannot be reached.
        """
        image, text, record = self._read(sample, row, storage)
        assert image is not None
        caption = self._caption(text, record, position)
        crop, _ = self._pixels.draw(self._seed, position)
        pixels, sizes = self._decode(image, row, position), self._sizes(row, crop)
        return {"image": pixels, "caption": caption, "sizes": sizes}

    def _caption(self, text: bytes | None, record: bytes | None, position: int) -> str:
        return self._captions.choose(text, record, derive_seed(self._seed, _CAPTION, position))

    def _decode(self, data: bytes, row: int, position: int) -> torch.Tensor:
        height, width = self.samples.shapes[self.samples.bucket[row]]
        crop, flip = self._pixels.draw(self._seed, position)
        most = self._pixels.max_pixels
        return decode_image(data, height, width, crop=crop, flip=flip, max_pixels=most)

    def _sizes(self, row: int, crop: tuple[float, float]) -> torch.Tensor:
        size: tuple[int, int] = tuple(self.samples.size[row].tolist())
        height, width = self.samples.shapes[self.samples.bucket[row]]
        return size_facts(size, height, width, crop)

    def _read(self, sample: Sample, row: int, storage: Storage) -> list[bytes | None]:
        """Read image, text and json.

        Raises:
            EOFError: The sample is cut short.
            StorageError: It cannot be reached, or is not there any more.
        """
        try:
            return self._read_parts(sample, row, storage)
        except StorageError:
            raise
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{public_url(sample.shard)}, sample {sample.key!r}, was there when it was "
                f"indexed, and now: {error} Put it back, or index the data again."
            ) from error

    def _read_parts(self, sample: Sample, row: int, storage: Storage) -> list[bytes | None]:
        """Read all parts with one request where they lie side by side."""
        spans = [sample.image, sample.text, sample.json]
        wanted = [span for span in spans if span is not None]
        size = self.samples.shard_size(row)
        start = min(span.offset for span in wanted)
        end = max(span.offset + span.size for span in wanted)
        together = len({span.url for span in wanted}) == 1
        if together and end - start <= sum(span.size for span in wanted) + _GAP:
            block = storage.read(sample.image.url, start, end - start, expected_size=size)
            return [
                None if s is None else block[s.offset - start : s.offset - start + s.size]
                for s in spans
            ]
        return [None if s is None else storage.read(s.url, s.offset, s.size, size) for s in spans]

    def _here(self) -> _Process:
        """What belongs to this process: connections and threads do not survive a fork."""
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
    """Join items to a batch: tensors stacked, position (B,), all else as lists; faults in one."""
    batch: dict[str, Any] = {}
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
