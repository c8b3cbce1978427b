"""The data module: batches of images and captions from shards and folders."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zsnr.checkpoints.checkpoint_file import MAX_IMAGE_SIZE
from zsnr.data.buckets import AspectBuckets
from zsnr.data.cache import (
    Cache,
    CacheDataset,
    check_cache,
    find_cache,
    image_facts,
    select_cached,
    text_embedding,
)
from zsnr.data.caption_tags import Tags
from zsnr.data.captions import Captions
from zsnr.data.dataset import Pixels, ShardDataset, collate
from zsnr.data.faults import BudgetError, Fault, Ledger, check_budget, summarize
from zsnr.data.filters import Filter
from zsnr.data.groups import SampleGroups
from zsnr.data.images import to_unit_range
from zsnr.data.index import Index, counted, load_index
from zsnr.data.local_cache import LocalCache
from zsnr.data.mapped import ItemError, MappedDataset, samples_of
from zsnr.data.order import StepBatches, TrainingOrder
from zsnr.data.prompts import PromptRequest, parse_prompts, read_prompts
from zsnr.data.samples import Samples, select
from zsnr.data.sources import Shard, Source, Sources, find_shards
from zsnr.data.storage import Retries, Storage, check_headers, is_remote
from zsnr.data.workers import Shared
from zsnr.files import side_file
from zsnr.public import public_url
from zsnr.training.resuming import changes, flat
from zsnr.untrusted import shown

_INDEX_AT_MOST = 100  # shards behind an address that training indexes by itself


class DataModule(L.LightningDataModule):
    """Images and captions from webdataset shards or from folders of images.

    A batch holds image (B, 3, H, W) in [-1, 1], or from a cache moments (B, 2 C, h, w) and
    text_embedding (Conditioning or None), or latents (B, C, h, w) as the network takes them;
    caption and key (lists), sizes (B, 6) as Conditioning's, position (B,), the sample's place in
    the run, and global_batch_size. Where training has several sources or buckets, groups (B, G)
    holds the numbers of a sample's source and bucket in `loss_groups`.

    The items of a dataset of your own are dicts: `image`, uint8 (3, H, W), float (3, H, W) in
    [-1, 1] or a PIL image of data.image_size, or `latents`, float (C, h, w); `caption`, text, or
    `label`, the whole number of a class; and for networks that take them `sizes`, int64 (6,), and
    `concat`, float (C', h, w).

    Args:
        train: Training data: a folder of shards or of images, a pattern such as
            "data/{000..099}.tar" or "https://host/{000..099}.tar", "pipe:COMMAND", a list of these,
            a list of objects with path and weight or ratio, or a map-style dataset of your own, by
            class_path. A cache of latents is a folder of shards. A command, or a server without
            byte ranges, needs local_cache.
        val: Validation data, in any form that data.train takes. None = no validation.
        image_size: Height and width of the images, in pixels, to which they are resized and
            cropped.
        batch_size: Global batch size, summed over all devices and accumulation steps.
        max_batch_size_per_device: Maximum number of samples that a device processes at a time. The
            remainder of its share is handled by gradient accumulation. None = the whole share.
        num_workers: Number of processes per device that load samples. 0 = load in the main process.
        val_samples: Number of validation samples to use, the first ones. None = all.
        filters: Conditions on the fields of a sample's json, all of which it must meet to be used.
            None = all samples are used.
        aspect: Aspect-ratio buckets. None = all images are cropped to squares.
        pixels: Cropping, mirroring and size limit of the training images.
        captions: Text of a sample that is used as its caption.
        window_shards: Number of shards whose samples are shuffled together.
        index: Folder of index files, as `zsnr data index --output` writes them. None = they lie
            beside the shards.
        retries: Retry policy for transient errors of local disks, servers and object storage.
        headers: HTTP headers of requests, such as {Authorization: "Bearer ${TOKEN}"}; "${NAME}"
            stands for the environment variable NAME, so that a config holds no secret. They are not
            forwarded to another host.
        local_cache: Cache of whole remote shards on a local disk of each node, up to a size limit.
            None = samples are read from the remote shards.
        error_budget: Fraction of the samples, or of the shards, that may be broken before the run
            stops. Ten broken samples are always allowed.
        accept_changed_data: Whether a run may resume with other data, filters or buckets than it
            began with.
        seed: Seed of every random number in training, such as the order of the data.
        prompts: Prompts of predict: a .txt or .jsonl file, or a list of objects with prompt and
            optionally negative_prompt, seed, count, height and width.
        prompt_seed: Seed of the prompts that have none of their own.
        predict_batch_size: Number of images per device that predict samples at a time.
        tags: Shuffling and dropout of tags in training captions. None = captions are as they are.

    Raises:
        ValueError: A number is out of range, or the headers are malformed.
    """

    def __init__(
        self,
        train: str | list[str | Source] | Dataset | None = None,  # type: ignore[type-arg]
        val: str | list[str | Source] | Dataset | None = None,  # type: ignore[type-arg]
        image_size: int = 512,
        batch_size: int = 32,
        max_batch_size_per_device: int | None = None,
        num_workers: int = 2,
        val_samples: int | None = None,
        filters: list[Filter] | None = None,
        aspect: AspectBuckets | None = None,
        pixels: Pixels = Pixels(),
        captions: Captions = Captions(),
        window_shards: int = 10,
        index: str | None = None,
        retries: Retries = Retries(),
        headers: dict[str, str] | None = None,
        local_cache: LocalCache | None = None,
        error_budget: float = 0.01,
        accept_changed_data: bool = False,
        seed: int = 0,
        prompts: str | list[dict[str, Any]] | None = None,
        prompt_seed: int = 0,
        predict_batch_size: int = 8,
        tags: Tags | None = None,
    ) -> None:
        super().__init__()
        at_least_1 = {
            "image_size": image_size,
            "batch_size": batch_size,
            "max_batch_size_per_device": max_batch_size_per_device,
            "window_shards": window_shards,
            "predict_batch_size": predict_batch_size,
        }
        for name, value in at_least_1.items():
            limit = MAX_IMAGE_SIZE if name == "image_size" else 2**31
            if value is not None and not 1 <= value <= limit:
                raise ValueError(f"data.{name}={shown(value)}: wanted at least 1, at most {limit}.")
        if num_workers < 0:
            raise ValueError(f"data.num_workers={num_workers}: wanted 0 or more.")
        if not 0 <= error_budget <= 1:
            raise ValueError(f"data.error_budget={error_budget:g}: wanted a number in [0, 1].")
        if aspect is not None:
            aspect.shapes(image_size)
        check_headers(headers or {})
        own = [s for s, source in (("train", train), ("val", val)) if isinstance(source, Dataset)]
        changes_pixels = pixels != Pixels()
        for name, given in (
            *(("filters", filters), ("aspect", aspect), ("tags", tags)),
            ("pixels", changes_pixels),
        ):
            if own and given:
                raise ValueError(
                    f"data.{name} has no effect on data.{own[0]}, a dataset of your own: do it in "
                    "the dataset."
                )
        self.train, self.val = train, val
        self.image_size, self.batch_size, self.num_workers = image_size, batch_size, num_workers
        self.max_batch_size_per_device = max_batch_size_per_device
        self.val_samples, self.seed = val_samples, seed
        self.filters, self.aspect = filters or [], aspect
        self.pixels, self.captions, self.tags = pixels, captions, tags
        self.window_shards, self.retries = window_shards, retries
        self.headers, self.local_cache = headers, local_cache
        self.index_folder = None if index is None else Path(index).expanduser()
        self.error_budget, self.accept_changed_data = error_budget, accept_changed_data
        self.prompts, self.prompt_seed = prompts, prompt_seed
        self.predict_batch_size = predict_batch_size
        self.done: set[str] = set()  # files that an interrupted predict has written already
        self.caches: dict[str, Cache] = {}  # by the setting that names them
        self.loss_groups: list[str] = []  # of training samples, whose losses are logged apart
        self.failure: OSError | ValueError | None = None  # of this rank; it stops the run
        self.waited = 0.0  # seconds in which training has waited for a batch
        self._last: dict[str, Any] | None = None  # replaces a batch that could not be read
        self._train: Samples | None = None
        self._val: Samples | None = None
        self._indices: dict[str, Index] = {}
        self._described: dict[str, str] = {}  # what was said of the samples, by setting
        self._passing: list[Fault] = []  # transient errors while indexing
        self._ledger = Ledger(None)
        self._seen = 0

    # Selection of samples

    def prepare_data(self) -> None:
        """Index the shards that have no index yet, in one process of each node."""
        stage = None if self.trainer is None else self.trainer.state.fn
        for sources in ([self.train, self.val], [self.val])[stage in ("validate", "test")]:
            if sources is None or isinstance(sources, Dataset):
                continue
            if stage != "predict":
                find_cache(sources)  # refuses an unfinished cache
                self._check_indexed(find_shards(sources))
                with suppress(ValueError):  # setup raises it again
                    samples = self._selection(sources, progress=True)
                    if sources is self.train:
                        TrainingOrder(
                            samples, self.batch_size, self.seed, self.window_shards
                        ).prepare()

    def setup(self, stage: str) -> None:
        """Read the index and select the samples of the stage."""
        if stage == "fit":
            self._train = self._select("data.train", _wanted(self.train, "data.train"))
        if stage in ("fit", "validate", "test") and self.val is not None:
            self._val = self._select("data.val", self.val)
        if stage == "predict":
            self.requests = read_requests(self.prompts, self.prompt_seed)
        self._indices.clear()  # the selected samples stay

    def state_dict(self) -> dict[str, Any]:
        """Return the settings that determine the batches of all steps."""
        return {
            "samples": None if self._train is None else self._train.digest,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "window_shards": self.window_shards,
            "image_size": self.image_size,
            "pixels": asdict(self.pixels),
            "captions": asdict(self.captions),
            "tags": None if self.tags is None else asdict(self.tags),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume with other batches.

        Raises:
            ValueError: The data or their settings have changed.
        """
        if self._train is None:
            return  # validate and predict resume nothing
        changed = changes(flat(state_dict), flat(self.state_dict()))
        if not changed:
            return
        differences = "; ".join(
            f"{name} was {was}, is {now} now" for name, (was, now) in changed.items()
        )
        names = dict.fromkeys(name.partition(".")[0] for name in changed)
        if not self.accept_changed_data:
            raise ValueError(
                f"The run began with other training data: {', '.join(names)} changed ("
                f"{differences}; samples = a digest of the shards' contents, weights, filters and "
                "buckets). Restore it, or resume with other batches by "
                "--data.accept_changed_data true."
            )
        rank_zero_warn(f"The run resumes with other training data: {differences}.")

    def _load_index(self, sources: Sources, progress: bool = False) -> Index:
        name = repr(sources)
        if name not in self._indices:
            self._indices[name] = load_index(
                sources,
                self.storage(),
                folder=self.index_folder,
                fields=[each.field for each in self.filters],
                progress=progress,
            )
        return self._indices[name]

    def storage(self) -> Storage:
        """Return the storage that shards are read from; it records transient errors."""
        return Storage(
            on_fault=lambda url, reason: self._passing.append(Fault("passing", url, None, reason)),
            **self.reading(),
        )

    def reading(self) -> dict[str, Any]:
        """Return the options of reading, for Storage, datasets and write_cache."""
        return {
            "retries": self.retries,
            "headers": self.headers,
            "local_cache": self.local_cache,
        }

    def _check_indexed(self, shards: list[Shard]) -> None:
        remote = [shard.url for shard in shards if is_remote(shard.url)]
        for url in remote:
            self.storage().check_source(url)
        if self.index_folder is None and len(remote) > _INDEX_AT_MOST:
            raise ValueError(
                f"{len(remote)} shards behind an address have no index, and reading their headers "
                "takes long: run `zsnr data index ... --output FOLDER` once, then set data.index "
                "to the folder."
            )

    def select(self, sources: Sources) -> tuple[Index, Samples]:
        """Index shards, with all fields, and select the samples that are used."""
        index = load_index(sources, self.storage(), folder=self.index_folder, fields=None)
        return index, self._selected(index)

    def _selected(self, index: Index, folder: Path | None = None) -> Samples:
        return select(
            index,
            self.image_size,
            filters=self.filters,
            aspect=self.aspect,
            max_pixels=self.pixels.max_pixels,
            captions=self.captions,
            folder=folder,
        )

    def _selection(self, sources: Sources, progress: bool = False) -> Samples:
        """Select the samples that are used; the processes of a node share a file of many."""
        index, cache = self._load_index(sources, progress), find_cache(sources)
        folder = None if self.trainer is None else Path(self.trainer.default_root_dir) / "index"
        if cache is None:
            return self._selected(index, folder)
        return select_cached(cache, index, self.filters, folder)

    def _select(self, name: str, sources: Any) -> Samples:
        if isinstance(sources, Dataset):
            samples = samples_of(sources, self.image_size)
            rank_zero_info(f"{name}: {len(samples)} items of {samples.shards[0].url}")
            return samples
        cache = find_cache(sources)
        if cache is not None:
            facts = image_facts(self.image_size, self.aspect, self.pixels)
            check_cache(name, cache, images=facts, captions=asdict(self.captions))
            if name == "data.train" and cache.conditioner is not None:
                check_tags(self.tags, f"{name}={cache.folder}")
            self.caches[name] = cache
        samples = self._selection(sources)
        description = describe_samples(samples, name)
        if self._described.get(name) != description:  # once, where several checkpoints are measured
            rank_zero_info(description)
        self._described[name] = description
        self._check_room(samples)
        check_budget(samples.faults, samples.total, len(samples.shards), self.error_budget)
        return samples

    def _check_room(self, samples: Samples) -> None:
        """Warn of a local cache that is too small for the shards of a window."""
        if self.local_cache is None:
            return
        sizes = sorted(
            size
            for shard, size in zip(samples.shards, samples.sizes, strict=True)
            if is_remote(shard.url)
        )
        needed = sum(sizes[-self.window_shards :]) / 2**30
        if needed > self.local_cache.max_gib:
            rank_zero_warn(
                f"data.local_cache.max_gib={self.local_cache.max_gib:g} holds less than the "
                f"{min(self.window_shards, len(sizes))} shards whose samples are shuffled together "
                f"({needed:.3g} GiB): shards will be downloaded several times in an epoch. Raise "
                "it, or lower data.window_shards."
            )

    # Batches

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        trainer = self.trainer
        assert trainer is not None
        assert self._train is not None
        first = trainer.global_step
        rank, ranks = trainer.global_rank, trainer.world_size
        batches = StepBatches(
            self.batch_size, rank, ranks, trainer.accumulate_grad_batches, first_step=first
        )
        self._ledger = _open_ledger(
            Path(trainer.default_root_dir) / "faults", rank, ranks, first * self.batch_size
        )
        self._seen = first * self.batch_size // ranks
        if rank == 0:
            self._note([*self._train.faults, *self._passing])
        order = TrainingOrder(self._train, self.batch_size, self.seed, self.window_shards)
        dataset: Any
        if isinstance(self.train, Dataset):
            dataset = MappedDataset(self.train, self._train, order)
        else:
            cls = CacheDataset if "data.train" in self.caches else ShardDataset
            groups = SampleGroups(self._train)
            self.loss_groups = groups.names
            dataset = cls(
                self._train,
                order,
                pixels=self.pixels,
                captions=self.captions,
                tags=self.tags,
                seed=self.seed,
                groups=groups if groups.names else None,
                **self.reading(),
            )
        loader = self._loader(_Guarded(dataset), self._preparation(True), batch_sampler=batches)
        loader.on_wait = self._wait
        return loader

    def _wait(self, seconds: float) -> None:
        self.waited += seconds

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        if self._val is None:
            return []
        trainer = self.trainer
        assert trainer is not None
        number = min(len(self._val), self.val_samples or len(self._val))
        batches = batches_by_bucket(self._val, range(number), self._share())
        share = share_of_batches(batches, trainer.global_rank, trainer.world_size)
        dataset = self._as_indexed("data.val", self._val)
        return self._loader(_Guarded(dataset), self._preparation(False), batch_sampler=share)

    def _preparation(self, training: bool) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """Return what the model wants added to a batch where it is loaded."""
        module = self._model()
        return module.preparation(training) if hasattr(module, "preparation") else None

    def _model(self) -> Any:
        return getattr(self.trainer, "lightning_module", None)

    def spread(self, count: int) -> DataLoader[dict[str, Any]] | list[Any]:
        """Load up to `count` samples spread evenly over the training data, the same on all ranks.

        They are cropped as in validation.
        """
        samples = self._train
        if samples is None:
            return []
        taken = min(count, len(samples))
        rows = [i * len(samples) // taken for i in range(taken)]
        batches = batches_by_bucket(samples, rows, self._share())
        return self._loader(self._as_indexed("data.train", samples), None, batch_sampler=batches)

    def _share(self) -> int:
        """Return the maximum number of samples that a device processes at a time."""
        assert self.trainer is not None
        share: int = max(1, self.batch_size // self.trainer.world_size)
        return min(share, self.max_batch_size_per_device or share)

    def _as_indexed(self, name: str, samples: Samples) -> Dataset[Any]:
        """Return samples in the order of the index, without random crops or mirroring."""
        own = self.train if name == "data.train" else self.val
        if isinstance(own, Dataset):
            return MappedDataset(own, samples)
        cls, crop = ShardDataset, Pixels.crop
        if name in self.caches:
            cls, crop = CacheDataset, self.pixels.crop  # those that the cache was made with
        return cls(
            samples,
            pixels=Pixels(crop=crop, max_pixels=self.pixels.max_pixels),
            captions=self.captions,
            seed=self.seed,
            **self.reading(),
        )

    def test_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        return self.val_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Record the broken samples of a batch when it is used, not while it waits.

        Raises:
            BudgetError: More samples or shards are broken than data.error_budget allows.
            StorageError: The batch could not be read.
        """
        if isinstance(batch, _Failure):
            return self._stop(batch.error)
        if not isinstance(batch, dict) or "faults" not in batch:
            return batch
        faults = batch.pop("faults")
        self._last = {**batch}
        if self.trainer is not None and self.trainer.training:
            self._seen += len(batch["position"])
        if faults:
            self._note(faults)
            try:
                check_budget(
                    self._ledger.met,
                    self._seen + self._ledger.met.samples + len(self._val or ()),
                    0 if self._train is None else len(self._train.shards),
                    self.error_budget,
                    self._ledger.path,
                )
            except BudgetError as error:
                return self._stop(error)
        return batch

    def _note(self, faults: list[Fault]) -> None:
        """Record faults; a ledger that cannot be written does not stop the run."""
        with side_file(self._ledger.path or ""):
            self._ledger.write(faults)

    def _stop(self, error: OSError | ValueError) -> dict[str, Any]:
        """Stop the run, on all ranks together before their next step.

        Returns:
            A batch that the rank uses until all ranks meet.
        """
        assert self.trainer is not None
        if self.trainer.world_size == 1 or self._last is None:
            raise error
        self.failure = error
        return {**self._last}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, dict) and "image" in batch and batch["image"].dtype == torch.uint8:
            batch["image"] = to_unit_range(batch["image"])
        if isinstance(batch, dict) and "moments" in batch:
            numbers = {n: x for n, x in batch.items() if isinstance(x, Tensor)}
            batch["moments"] = batch["moments"].float()
            batch["text_embedding"] = text_embedding(numbers)
        return batch

    def predict_dataloader(self) -> DataLoader[list[PromptRequest]]:
        trainer = self.trainer
        assert trainer is not None
        left = [r for r in self.requests if r.filename not in self.done]
        mine = left[trainer.global_rank :: trainer.world_size]
        same = (list(group) for _, group in groupby(mine, lambda r: (r.height, r.width)))
        size = self.predict_batch_size
        batches = [group[i : i + size] for group in same for i in range(0, len(group), size)]
        batches = batches or [[]]  # Lightning needs a batch on every rank
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Move a batch to the device, except the positions, which only the host reads."""
        if not isinstance(batch, dict):  # predict's requests hold no tensors
            return batch
        tensors = {name: value for name, value in batch.items() if name != "position"}
        moved = super().transfer_batch_to_device(tensors, device, dataloader_idx)
        return {**moved, "position": batch["position"]}

    def _loader(self, dataset: Any, prepare: Any, **batching: Any) -> _Loader:
        module = self._model()
        collated = partial(_collate, global_batch_size=self.batch_size, prepare=prepare)
        return _Loader(
            dataset,
            num_workers=self.num_workers,
            collate_fn=Shared(collated, self.num_workers),
            worker_init_fn=_ignore_interrupts,
            persistent_workers=self.num_workers > 0,
            pin_memory=module is not None and module.device.type == "cuda",
            **batching,
        )


def _ignore_interrupts(worker: int) -> None:
    """Let Ctrl-C, which a terminal sends to workers too, only reach the process they work for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches_by_bucket(samples: Samples, rows: Iterable[int], size: int) -> list[list[int]]:
    """Divide rows into batches of one shape each, in order; a bucket's last may be smaller."""
    by_bucket: dict[int, list[int]] = {}
    for row in rows:
        by_bucket.setdefault(int(samples.bucket[row]), []).append(row)
    return [
        members[i : i + size]
        for _, members in sorted(by_bucket.items())
        for i in range(0, len(members), size)
    ]


def share_of_batches(batches: list[list[int]], rank: int, ranks: int) -> list[list[int]]:
    """Return a rank's share of the batches, as many as every other rank has.

    A rank that would lack a batch gets a sample that is not counted, because the forward pass of a
    sharded network waits for all ranks.
    """
    mine = batches[rank::ranks]
    full = len(mine) == -(-len(batches) // ranks)
    return mine if full else [*mine, [~batches[0][0]]]


def describe_samples(samples: Samples, what: str) -> str:
    """Describe in a few lines which samples are used, removed by filters, and broken."""
    lines = [f"{what}: {len(samples)} samples in {counted(samples.shards)}"]
    lines += [f"  removed by {name}: {count}" for name, count in samples.removed.items()]
    if len(samples.shapes) > 1:
        counts = samples.table.sum(0).tolist()
        used = sum(count > 0 for count in counts)
        lines.append(f"  in {used} of {len(counts)} buckets")
    for what, notes in (("broken", False), ("not read", True)):
        faults = [fault for fault in samples.faults if (fault.kind == "note") == notes]
        if faults:
            lines.append(f"  {what}: {summarize(faults)}")
    return "\n".join(lines)


def read_requests(prompts: str | list[dict[str, Any]] | None, seed: int = 0) -> list[PromptRequest]:
    """Read data.prompts, a file or a list.

    Raises:
        ValueError: The setting is missing or malformed.
    """
    prompts = _wanted(prompts, "data.prompts (--prompts)")
    read: Any = read_prompts if isinstance(prompts, str) else parse_prompts
    requests: list[PromptRequest] = read(prompts, seed)
    return requests


def check_tags(tags: Tags | None, cache: str) -> None:
    """Refuse changes of captions whose embeddings are cached: they would have no effect.

    Args:
        tags: The changes. None = there are none.
        cache: The setting that stands for the embeddings, for the message.

    Raises:
        ValueError: There are such changes.
    """
    if tags is not None:
        raise ValueError(
            f"{cache}: cached text embeddings are those of unchanged captions, so data.tags would "
            "have no effect. Cache without --text, or leave data.tags out."
        )


def check_shards(train: Sources | None, val: Sources | None) -> None:
    """Refuse missing shards, and shards that are in both data.train and data.val.

    Raises:
        FileNotFoundError: A source has no shards.
        ValueError: A shard is in both.
    """
    both = [
        set() if source is None else {shard.url for shard in find_shards(source)}
        for source in (train, val)
    ]
    shared = both[0] & both[1]
    if shared:
        raise ValueError(
            f"{public_url(min(shared))} is in data.train and in data.val: validation would measure "
            "overfitting as success. Use patterns such as train-*.tar and val-*.tar."
        )


def _open_ledger(folder: Path, rank: int, ranks: int, position: int) -> Ledger:
    """Open this rank's ledger, and cut back those of ranks that no longer exist."""
    for file in folder.glob("rank-*.jsonl"):
        number = file.stem.removeprefix("rank-")
        if number.isdecimal() and int(number) >= ranks and int(number) % ranks == rank:
            Ledger(file, position)
    return Ledger(folder / f"rank-{rank:05d}.jsonl", position)


def _wanted(value: Any, name: str) -> Any:
    if value is None:
        raise ValueError(f"{name} is not set: this command needs it.")
    return value


def _as_it_is(item: Any) -> Any:
    return item


def _collate(
    items: list[dict[str, Any]] | _Failure,
    global_batch_size: int,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None,
) -> dict[str, Any] | _Failure:
    if isinstance(items, _Failure):
        return items
    batch = {**collate(items), "global_batch_size": global_batch_size}
    return batch if prepare is None else prepare(batch)


class _Loader(DataLoader[dict[str, Any]]):
    """A loader that tells how long one has waited for each batch."""

    on_wait: Callable[[float], None] | None = None

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.on_wait is None else _timed(batches, self.on_wait)


def _timed(batches: Iterable[Any], on_wait: Callable[[float], None]) -> Iterator[Any]:
    iterator = iter(batches)
    while True:
        since = time.perf_counter()
        batch = next(iterator, None)
        on_wait(time.perf_counter() - since)
        if batch is None:
            return
        yield batch


class _Failure:
    """The error of a batch that could not be read, in place of the batch."""

    def __init__(self, error: OSError | ValueError) -> None:
        self.error = error


class _Guarded(Dataset[Any]):
    """A dataset whose errors reach the training process unchanged, at the batch's turn."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]] | _Failure:
        """Load a batch, or return the error that prevents it."""
        try:
            items: list[dict[str, Any]] = self.dataset.__getitems__(positions)
            return items
        except (OSError, BudgetError, ItemError) as error:
            return _Failure(error)
