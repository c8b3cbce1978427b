"""Sources that can only be read from their start: commands, and servers that give no ranges.

No index, so no exact resume: a resumed run reads the shards anew, in another order.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from torch.utils.data import IterableDataset, get_worker_info

from zsnr.data.captions import Captions
from zsnr.data.dataset import Pixels
from zsnr.data.faults import BudgetError, Fault
from zsnr.data.filters import Filter, apply_filters
from zsnr.data.images import decode_image, image_size, size_facts
from zsnr.data.scan import read_fields
from zsnr.data.sources import IMAGE_SUFFIXES, Shard
from zsnr.data.storage import Retries, Storage
from zsnr.noise import derive_seed

_SHARDS, _BUFFER, _CAPTION = 10, 11, 12  # streams of the run's seed


class StreamDataset(IterableDataset[list[dict[str, Any]]]):
    """Endless batches of one rank from shards that are read from start to end, by webdataset.

    With fewer shards than loading processes of all ranks, each reads all and takes its share.

    Args:
        shards: What to read.
        image_size: Height and width, in pixels.
        batches: Positions of each of this rank's batches, in order; they name draws, not samples.
        part: This rank's number and their number.
        filters: Put on the fields of each sample's json.
        pixels: How pictures are cut.
        captions: Which text is the caption.
        retries: How often an opening is tried.
        seed: Of the order, of crops and captions.
        buffer: Samples that are shuffled among each other.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        image_size: int,
        batches: Any,
        part: tuple[int, int] = (0, 1),
        *,
        filters: Sequence[Filter] = (),
        pixels: Pixels = Pixels(),
        captions: Captions = Captions(),
        retries: Retries = Retries(),
        seed: int = 0,
        buffer: int = 1000,
    ) -> None:
        self._shards, self._size, self._batches, self._part = shards, image_size, batches, part
        self._filters, self._pixels, self._captions = filters, pixels, captions
        self._retries, self._seed, self._buffer = retries, seed, buffer

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Give lists of items as ShardDataset's, one list a batch."""
        worker = get_worker_info()
        number, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        own, all_ = self._part[0] * of + number, self._part[1] * of
        batches = iter(self._batches)
        faults: list[Fault] = []
        samples = self._shuffled(own, all_, faults)
        for n, positions in enumerate(batches):
            if n % of == number:
                yield [self._item(samples, position, faults) for position in positions]

    def _item(
        self, samples: Iterator[Mapping[str, Any]], position: int, faults: list[Fault]
    ) -> dict[str, Any]:
        while True:
            sample = next(samples)
            try:
                item = self._load(sample, position)
            except ValueError as error:
                reason = " ".join(str(error).split())
                faults.append(Fault("sample", sample["__url__"], sample["__key__"], reason))
                continue
            if item is not None:
                found = [replace(fault, position=position) for fault in faults]
                faults.clear()
                return {**item, "position": position, "faults": found}

    def _load(self, sample: Mapping[str, Any], position: int) -> dict[str, Any] | None:
        image = next((sample[s] for s in IMAGE_SUFFIXES if s in sample), None)
        if image is None:
            raise ValueError("it has no picture")
        if self._filters and not self._keeps(sample, image):
            return None
        seed = derive_seed(self._seed, _CAPTION, position)
        caption = self._captions.choose(sample.get("txt"), sample.get("json"), seed)
        crop, flip = self._pixels.draw(self._seed, position)
        size, most = self._size, self._pixels.max_pixels
        pixels = decode_image(image, size, size, crop=crop, flip=flip, max_pixels=most)
        sizes = size_facts(image_size(image), size, size, crop)
        return {"image": pixels, "caption": caption, "sizes": sizes, "key": sample["__key__"]}

    def _keeps(self, sample: Mapping[str, Any], image: bytes) -> bool:
        import pyarrow as pa

        record = read_fields(sample.get("json", b"{}"))
        height, width = image_size(image)
        record |= {"image_height": height, "image_width": width, "image_bytes": len(image)}
        columns = {f.field: pa.array([record.get(f.field)]) for f in self._filters}
        return bool(apply_filters(self._filters, columns, 1)[0][0])

    def _shuffled(self, own: int, of: int, faults: list[Fault]) -> Iterator[Mapping[str, Any]]:
        """Give the samples of this process, each with others of the buffer before it."""
        draw = random.Random(derive_seed(self._seed, _BUFFER, own))
        held: list[Mapping[str, Any]] = []
        for sample in self._samples(own, of, faults):
            held.append(sample)
            if len(held) >= self._buffer:
                i = draw.randrange(len(held))
                held[i], held[-1] = held[-1], held[i]
                yield held.pop()

    def _samples(self, own: int, of: int, faults: list[Fault]) -> Iterator[Mapping[str, Any]]:
        storage = Storage(self._retries, lambda url, why: faults.append(_passing(url, why)))
        by_shard = len(self._shards) % of == 0
        number = 0
        while True:
            shards = list(self._shards)
            random.Random(derive_seed(self._seed, _SHARDS, number)).shuffle(shards)
            count = 0
            for shard in shards[own::of] if by_shard else shards:
                for sample in self._read(storage, shard.url, faults):
                    count += 1
                    if by_shard or count % of == own:
                        yield sample
            if not count:
                raise BudgetError(f"No shard gives a sample. The last fault: {faults[-1].reason}.")
            number += 1

    def _read(self, storage: Storage, url: str, faults: list[Fault]) -> Iterator[Mapping[str, Any]]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        try:
            with storage.stream(url) as stream:
                tail = _Tail(stream)
                yield from group_by_keys(tar_file_expander([{"url": url, "stream": tail}]))
                while tail.read(1 << 20):
                    pass  # a command tells at its end whether it went well
                if tail.last != bytes(512):
                    raise ValueError("cut short: the tar file has no end")
        except (OSError, ValueError, tarfile.TarError) as error:
            faults.append(Fault("shard", url, None, " ".join(str(error).split())))


class _Tail:
    """A stream that remembers its last 512 bytes: a whole tar file ends with zeros."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.last = stream, b""

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        if data:
            self.last = (self.last + data)[-512:]
        return data


def _passing(url: str, reason: str) -> Fault:
    return Fault("passing", url, None, reason)
