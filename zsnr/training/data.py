"""The data module: shards in, batches out."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from zsnr.data.dataset import ShardDataset, collate
from zsnr.data.order import ShuffledOrder, StepBatches
from zsnr.data.prompts import PromptRequest, parse_prompts, read_prompts
from zsnr.data.shards import find_shards, index_shards


class DataModule(L.LightningDataModule):
    """Pictures and captions from webdataset shards.

    A batch holds image (B, 3, H, W) in [-1, 1], caption and key (lists), position (B,), the
    sample's place in the run, and global_batch_size.

    Args:
        train: Shards to train on: a folder, a file, a pattern with {000..009} or *, or a list.
        val: Shards to validate on. None = no validation.
        image_size: Height and width, in pixels; pictures are resized and cropped to it.
        batch_size: Of the global batch: all devices and accumulated batches together.
        num_workers: Processes that load, per device. 0 = load in the main process.
        val_samples: Use only the first so many validation samples. None = all.
        caption_field: Field of a sample's json that holds its caption, where it has no txt.
        seed: Of the order of the training data.
        prompts: What predict makes: a prompts file, .txt or .jsonl, or a list of objects with
            prompt and, if wanted, negative_prompt, seed, count, height, width.
        prompt_seed: Seed of the prompts that name none.
        predict_batch_size: Images that predict makes at a time, per device.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        image_size: int = 512,
        batch_size: int = 32,
        num_workers: int = 2,
        val_samples: int | None = None,
        caption_field: str = "caption",
        seed: int = 0,
        prompts: str | list[dict[str, Any]] | None = None,
        prompt_seed: int = 0,
        predict_batch_size: int = 8,
    ) -> None:
        super().__init__()
        at_least_1 = {
            "image_size": image_size,
            "batch_size": batch_size,
            "predict_batch_size": predict_batch_size,
        }
        for name, value in at_least_1.items():
            if value < 1:
                raise ValueError(f"data.{name}={value}: wanted at least 1.")
        if num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers}: wanted 0 or more.")
        self.train, self.val = train, val
        self.image_size, self.batch_size, self.num_workers = image_size, batch_size, num_workers
        self.val_samples, self.caption_field, self.seed = val_samples, caption_field, seed
        self.prompts, self.prompt_seed = prompts, prompt_seed
        self.predict_batch_size = predict_batch_size
        self.done: set[str] = set()  # files that an interrupted predict has written already

    def setup(self, stage: str) -> None:
        """Index the shards that the stage needs."""
        if stage == "fit":
            self._train = index_shards(_wanted(self.train, "data.train"))
        if stage in ("fit", "validate", "test") and self.val is not None:
            self._val = index_shards(self.val)[: self.val_samples]
        if stage == "predict":
            self.requests = read_requests(self.prompts, self.prompt_seed)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        trainer = self.trainer
        assert trainer is not None
        batches = StepBatches(
            self.batch_size,
            trainer.global_rank,
            trainer.world_size,
            trainer.accumulate_grad_batches,
            first_step=trainer.global_step,
        )
        order = ShuffledOrder(len(self._train), self.seed)
        dataset = ShardDataset(self._train, self.image_size, order, self.caption_field)
        return self._loader(dataset, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        if self.val is None:
            return []
        trainer = self.trainer
        assert trainer is not None
        dataset = ShardDataset(self._val, self.image_size, None, self.caption_field)
        mine = range(trainer.global_rank, len(dataset), trainer.world_size)
        each = max(1, self.batch_size // trainer.world_size)
        return self._loader(
            dataset, batch_sampler=[list(mine[i : i + each]) for i in range(0, len(mine), each)]
        )

    def test_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[list[PromptRequest]]:
        trainer = self.trainer
        assert trainer is not None
        left = [r for r in self.requests if r.filename not in self.done]
        mine = left[trainer.global_rank :: trainer.world_size]
        batches: list[list[PromptRequest]] = []
        for request in mine:  # a batch has one size
            last = batches[-1] if batches else []
            size = (request.height, request.width)
            if (
                not last
                or len(last) == self.predict_batch_size
                or size
                != (
                    last[0].height,
                    last[0].width,
                )
            ):
                batches.append([])
            batches[-1].append(request)
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        if not isinstance(batch, dict):  # predict's requests hold no tensors
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _loader(self, dataset: ShardDataset, batch_sampler: Any) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=self.num_workers,
            collate_fn=partial(_collate, global_batch_size=self.batch_size),
            persistent_workers=self.num_workers > 0,
        )


def read_requests(prompts: str | list[dict[str, Any]] | None, seed: int = 0) -> list[PromptRequest]:
    """Read data.prompts, a file or a list.

    Raises:
        ValueError: It is not set, or wrong.
    """
    prompts = _wanted(prompts, "data.prompts (--prompts)")
    read: Any = read_prompts if isinstance(prompts, str) else parse_prompts
    requests: list[PromptRequest] = read(prompts, seed)
    return requests


def check_shards(train: str | list[str] | None, val: str | list[str] | None) -> None:
    """Refuse shards that are not there, or that stand in both data.train and data.val.

    Raises:
        FileNotFoundError: There are none.
        ValueError: A shard is in both.
    """
    both = [set() if source is None else set(find_shards(source)) for source in (train, val)]
    shared = both[0] & both[1]
    if shared:
        raise ValueError(
            f"{min(shared)} is in data.train and in data.val: validation would measure what was "
            "learned by heart. Use patterns such as train-*.tar and val-*.tar."
        )


def _wanted(value: Any, name: str) -> Any:
    if value is None:
        raise ValueError(f"{name} is not set: this command needs it.")
    return value


def _as_it_is(item: Any) -> Any:
    return item


def _collate(items: list[dict[str, Any]], global_batch_size: int) -> dict[str, Any]:
    return {**collate(items), "global_batch_size": global_batch_size}
