"""Samples of shards by their position in the training order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from zsnr.data.images import decode_image
from zsnr.data.order import ShuffledOrder
from zsnr.data.shards import Sample, Span


class ShardDataset(Dataset[dict[str, Any]]):
    """Pictures and captions read from shards by offset.

    An item is {"image": (3, size, size) in [-1, 1], "caption": str, "key": str, "position": int}.

    Args:
        samples: The index of the shards.
        image_size: Height and width, in pixels.
        order: Maps positions to samples. None = as they stand in the shards.
        caption_field: Field of the json that holds the caption, where there is no txt.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        image_size: int,
        order: ShuffledOrder | None = None,
        caption_field: str = "caption",
    ) -> None:
        self._samples, self._size, self._order = samples, image_size, order
        self._field = caption_field

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        sample = self._samples[position if self._order is None else self._order[position]]
        with open(sample.shard, "rb") as shard:
            data, caption = (_read(shard, span) for span in (sample.image, sample.caption))
        try:
            image = decode_image(data, self._size)
            text = self._caption(caption, sample.caption_suffix)
        except ValueError as error:
            raise ValueError(f"{sample.shard}, sample {sample.key!r}: {error}") from error
        return {"image": image, "caption": text, "key": sample.key, "position": position}

    def _caption(self, data: bytes, suffix: str) -> str:
        text = data.decode("utf-8")
        if suffix == "txt":
            return text.strip()
        record = json.loads(text)
        if not isinstance(record, dict) or not isinstance(record.get(self._field), str):
            raise ValueError(f"its json has no text in the field {self._field!r}.")
        caption: str = record[self._field]
        return caption


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join items to a batch: image (B, 3, H, W), position (B,), lists of captions and keys."""
    return {
        "image": torch.stack([item["image"] for item in items]),
        "caption": [item["caption"] for item in items],
        "key": [item["key"] for item in items],
        "position": torch.tensor([item["position"] for item in items]),
    }


def _read(shard: Any, span: Span) -> bytes:
    shard.seek(span.offset)
    data: bytes = shard.read(span.size)
    return data
