"""A user's own map-style dataset, in the order and with the keys of the built-in sources."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from zsnr.data.dataset import AsIndexed, Order
from zsnr.data.samples import Samples
from zsnr.data.sources import Shard
from zsnr.described import class_path
from zsnr.untrusted import clipped, shown

if TYPE_CHECKING:
    from PIL.Image import Image

KEYS = ("image", "latents", "caption", "label", "sizes", "concat")
"""Keys of an item: image or latents, and what else the model takes."""


def samples_of(dataset: Any, image_size: int) -> Samples:
    """Return the samples of a dataset, all in one shard and of one shape.

    Args:
        dataset: A map-style dataset.
        image_size: Height and width of its images, in pixels.

    Raises:
        ValueError: It has no length, or no items.
    """
    import numpy as np
    import pyarrow as pa

    name = class_path(dataset)
    try:
        count = len(dataset)
    except TypeError as error:
        raise ValueError(
            f"{name} has no length: wanted a map-style dataset, with __len__ and __getitem__."
        ) from error
    if not count:
        raise ValueError(f"{name} has no items.")
    digest = hashlib.blake2b(json.dumps([name, count, image_size]).encode(), digest_size=16)
    return Samples(
        shards=[Shard(name)],
        sizes=[0],
        shapes=[(image_size, image_size)],
        rows=np.arange(count),
        shard=np.zeros(count, np.int32),
        bucket=np.zeros(count, np.int16),
        size=np.zeros((0, 2), np.int32),  # what follows is read of files only
        spans=np.zeros((0, 3, 2), np.int64),
        keys=pa.nulls(0, pa.large_string()),
        removed={},
        total=count,
        faults=[],
        digest=digest.hexdigest(),
    )


class MappedDataset(Dataset[dict[str, Any]]):
    """Items of a user's dataset by their position in the run, as `ShardDataset` gives them.

    Args:
        dataset: Its items are dicts: see `DataModule`.
        samples: What `samples_of` returned.
        order: Maps positions to rows. None = the order of the dataset.
    """

    def __init__(self, dataset: Any, samples: Samples, order: Order | None = None) -> None:
        self.dataset, self.samples = dataset, samples
        self._order = AsIndexed(samples) if order is None else order
        self._prompt: tuple[str | None] | None = None  # key of item 0, once it is known

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the item at a position; ~p is that at p, to keep ranks in step.

        Raises:
            ItemError: It is not what a model is trained on, or the dataset fails to return it.
            OSError: The dataset's storage failed.
        """
        row = self._order[~position if position < 0 else position]
        [side, _] = self.samples.shapes[0]
        try:
            item = self._item(row)
            checked = checked_item(item, side)
            wanted = self._prompt_of_first()
            if prompt_key(item) != wanted:
                raise ItemError(
                    f"it has {prompt_key(item) or 'no caption or label'}, and item 0 "
                    f"{wanted or 'neither'}: wanted the same in all items. The caption '' is the "
                    "empty prompt."
                )
        except ItemError as error:
            raise ItemError(f"{class_path(self.dataset)}, item {row}: {error}") from error
        return {**checked, "key": str(row), "position": position, "faults": []}

    def _item(self, row: int) -> Any:
        """Return an item of the user's dataset.

        Raises:
            ItemError: It failed.
        """
        try:
            return self.dataset[row]
        except OSError:  # of its storage, and not of the item
            raise
        except Exception as error:  # of the user's code, in any way
            text = clipped(str(error).partition("\n")[0], 200)
            raise ItemError(f"its __getitem__ raised {type(error).__name__}: {text}") from error

    def _prompt_of_first(self) -> str | None:
        """Return what item 0 is conditioned on, by its key."""
        if self._prompt is None:
            self._prompt = (prompt_key(self._item(0)),)
        return self._prompt[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Return a batch of items."""
        return [self[position] for position in positions]


class ItemError(ValueError):
    """An item that no model is trained on."""


def prompt_key(item: Any) -> str | None:
    """Return the key of what an item is conditioned on: "caption", "label", or None."""
    return next((key for key in ("caption", "label") if key in item), None)


def checked_item(item: Any, image_size: int) -> dict[str, Any]:
    """Return an item with the keys of a batch.

    Args:
        item: A dict with some of `KEYS`.
        image_size: Wanted height and width of an image, in pixels.

    Raises:
        ItemError: A key is unknown or missing, or a value is of another kind.
    """
    if not isinstance(item, Mapping):
        raise ItemError(f"a {type(item).__name__}, wanted a dict with {', '.join(KEYS)}.")
    unknown = [key for key in item if key not in KEYS]
    if unknown:
        raise ItemError(f"unknown key {shown(unknown[0])}. Known: {', '.join(KEYS)}.")
    if ("image" in item) == ("latents" in item):
        raise ItemError("wanted either image or latents.")
    if "caption" in item and "label" in item:
        raise ItemError("wanted caption or label, not both.")
    sizes = torch.tensor([image_size, image_size, 0, 0, image_size, image_size])
    sizes = item.get("sizes", sizes)
    if not (isinstance(sizes, Tensor) and sizes.shape == (6,) and sizes.dtype == torch.int64):
        raise ItemError(f"sizes is {_kind(sizes)}, wanted an int64 tensor (6,).")
    checked = {"caption": _caption(item), "sizes": sizes}
    if "image" in item:
        checked["image"] = _image(item["image"], image_size)
    for name in ("latents", "concat"):
        if name in item:
            value = item[name]
            if not (isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3):
                raise ItemError(f"{name} is {_kind(value)}, wanted a float tensor (C, h, w).")
            checked[name] = value.float()
    return checked


def _caption(item: Mapping[str, Any]) -> str:
    """Return the prompt: the caption, or the number of the class; "" = there is neither."""
    if "label" in item:
        label = item["label"]
        if isinstance(label, Tensor) and label.ndim == 0:
            label = label.item()
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise ItemError(f"label is {_kind(label)}, wanted a whole number.")
        return str(int(label))
    caption = item.get("caption", "")
    if not isinstance(caption, str):
        raise ItemError(f"caption is {_kind(caption)}, wanted text.")
    return caption


def _image(image: Tensor | Image, side: int) -> Tensor:
    if not isinstance(image, Tensor):
        import numpy as np

        if not hasattr(image, "convert"):
            raise ItemError(f"image is {_kind(image)}, wanted a tensor (3, H, W) or a PIL image.")
        image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if image.shape != (3, side, side):
        raise ItemError(
            f"image is {_kind(image)}, wanted (3, {side}, {side}) as data.image_size says."
        )
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point() or image.abs().max() > 1:
        raise ItemError(f"image is {_kind(image)}, wanted uint8, or float from -1 to 1.")
    return image.float()


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return shown(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    kind = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if value.is_floating_point() and value.numel():
        low, high = value.aminmax()
        kind += f" from {low:.3g} to {high:.3g}"
    return kind
