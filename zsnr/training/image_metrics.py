"""Metrics of images generated in validation: FID, KID, IS, CLIP score and brightness."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zsnr.agreement import on_first_rank, raise_on_all
from zsnr.conditioning import Remembered
from zsnr.data.caption_files import Captioned, read_captions
from zsnr.data.dataset import ShardDataset, collate
from zsnr.data.images import to_unit_range
from zsnr.data.index import load_index
from zsnr.data.samples import Samples, select
from zsnr.data.sources import find_shards
from zsnr.data.workers import Shared
from zsnr.files import check_new, replacing, side_file
from zsnr.metrics.clip import CLIPScore
from zsnr.metrics.collected import (
    InOrder,
    LatentMean,
    LumaPercentile,
    LumaSpread,
    LumaWasserstein,
    MeanLuma,
    PromptGroups,
    RMSContrast,
)
from zsnr.metrics.features import FeatureExtractor, Inception, check_weights
from zsnr.metrics.fidelity import (
    RealStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    real_statistics,
)
from zsnr.metrics.luma import mean_luma
from zsnr.pipeline import describe_sampling, save_png
from zsnr.progress import tracked
from zsnr.training.console import shows_progress
from zsnr.training.module import LatentDiffusion
from zsnr.training.preemption import stops
from zsnr.training.watchdog import Watchdog

_NEED_CAPTIONS = ("real", "statistics", "inception", "features", "clip", "save_images", "output")
_CHANNELS = "latent_mean_by_channel"
_LOGGED_CHANNELS = 16  # whose latent means are logged; the json has all
_OF_DATA = "metrics_of_data"  # constants, which are no curves in training


class ImageMetrics(Callback):
    """Generates images from captions in validation, by model.sampling, and measures them.

    Logged as metrics/luma_mean, luma_std (over images), luma_contrast, luma_p01, luma_p99; luma_w1,
    the distance to real images; fid and kid, inception_score, clip_score; and luma_mean_by_group,
    luma_contrast_by_group, latent_mean_by_channel (the first 16 channels).

    Args:
        captions: File of captions: COCO's annotations (.json), one caption in each line (.txt), or
            objects with caption and optionally group (.jsonl). None = no images are generated.
        num_images: Number of images, summed over all ranks. Captions are chosen by a hash of the
            seed and of COCO's image id or the line number; for an image of COCO, the caption with
            the smallest id is used.
        seed: Seed of the choice of captions, of the noise, and of the subsets of KID and IS.
        batch_size: Number of images per device that are sampled at a time.
        every_n_validations: Number of validations in training from one measurement to the next.
        real: Real images to compare with, given as data.train is, and cropped as in validation.
            None = no comparison, or the one with `statistics`.
        num_real: Maximum number of real images, evenly spread over all of them.
        statistics: File (.safetensors) of the statistics of the real images. It is read if it
            exists, and otherwise written. None = they are measured in every run.
        inception: File with the weights of the Inception network of FID. None = no FID, KID and IS,
            unless `features` is set.
        features: Custom network instead of Inception, by class_path: from levels (B, 3, s, s) in
            0 .. 255 to features (B, D), or to features and logits. Its attribute `size` is s; 299
            without it.
        inception_splits: Number of parts of the images that the Inception score is computed on.
        clip: CLIP model: a folder of transformers, or ARCHITECTURE:FILE of open_clip. None = no
            CLIP score.
        save_images: Folder to write the images to. None = they are not written.
        output: File (.json) to write the metrics to; in training one for each measurement, with the
            step in its name. None = they are only logged.

    Raises:
        ValueError: A number is out of range, or both `inception` and `features` are set.
    """

    def __init__(
        self,
        captions: str | None = None,
        num_images: int = 10_000,
        seed: int = 0,
        batch_size: int = 8,
        every_n_validations: int = 1,
        real: str | list[str] | None = None,
        num_real: int = 50_000,
        statistics: str | None = None,
        inception: str | None = None,
        features: nn.Module | None = None,
        inception_splits: int = 10,
        clip: str | None = None,
        save_images: str | None = None,
        output: str | None = None,
    ) -> None:
        at_least = {
            "num_images": (num_images, 1),
            "batch_size": (batch_size, 1),
            "every_n_validations": (every_n_validations, 1),
            "num_real": (num_real, 2),
            "inception_splits": (inception_splits, 2),
        }
        for name, (value, minimum) in at_least.items():
            if value < minimum:
                raise ValueError(f"metrics.{name}={value}: wanted at least {minimum}.")
        if inception is not None and features is not None:
            raise ValueError("metrics.inception and metrics.features are both set: choose one.")
        self.captions, self.num_images, self.seed = captions, num_images, seed
        self.batch_size, self.every_n_validations = batch_size, every_n_validations
        self.real, self.num_real, self.statistics = real, num_real, statistics
        self.inception, self.features, self.clip = inception, features, clip
        self.inception_splits = inception_splits
        self.save_images, self.output = save_images, output
        self.each_step = False  # whether each checkpoint has files of its own, as in training
        self._validations = 0  # in this run
        self._loaded_step: int | None = None
        self._requests: list[Captioned] = []
        self._extractor: FeatureExtractor | None = None
        self._clip: CLIPScore | None = None
        self._samples: Samples | None = None
        self._real: RealStatistics | None = None

    # Lightning's hooks

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: Any) -> None:
        self._loaded_step = checkpoint["global_step"]

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Read and check all inputs, load the networks and measure the real images."""
        if self.captions is None or stage == "predict":
            return
        # only there: other ranks may arrive when it has begun to write
        check = partial(check_files, self, writes_once=not (stage == "fit" or self.each_step))
        on_first_rank(check)
        self._requests = read_captions(self.captions, self.num_images, self.seed)
        if self.num_images < trainer.world_size:
            raise ValueError(
                f"metrics.num_images={self.num_images} on {trainer.world_size} ranks: wanted at "
                "least one image for each rank."
            )
        network = self.features if self.inception is None else Inception(self.inception)
        self._extractor = None if network is None else FeatureExtractor(network)
        self._clip = None if self.clip is None else CLIPScore(self.clip)
        self._find_real(trainer, pl_module)
        pl_module.codec.load()
        conditioner = pl_module.model().conditioner.load()
        if trainer.datamodule is not None and getattr(trainer.datamodule, "caches", {}):
            conditioner.release()  # it was loaded only to check that it can be
        if self._real is None and self._samples is not None:
            with torch.no_grad(), self._on(trainer.strategy.root_device):
                self._real = self._measure_real(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" and self._loaded_step is not None:
            # Lightning logs at this step, which would otherwise be 0
            pl_module.log_agreed("step", float(self._loaded_step))
        if self.captions is None or trainer.sanity_checking:
            return
        if trainer.state.fn == "fit":
            self._validations += 1
            if self._validations % self.every_n_validations:
                return
        self.measure(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.on_validation_epoch_end(trainer, pl_module)

    # Measuring

    def measure(self, trainer: L.Trainer, module: LatentDiffusion) -> dict[str, float]:
        """Generate the images, measure them and log the metrics; every rank calls it."""
        device = trainer.strategy.root_device
        # frozen parts remember tensors for training, which cannot use inference tensors
        conditioner = module.model().conditioner
        encoding = conditioner.passing() if isinstance(conditioner, Remembered) else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), self._on(device), encoding:
            measured = self._measure_images(trainer, module)
        if measured is None:
            return {}
        metrics, rows = measured
        metrics, left_out = on_first_rank(partial(self._with_distances, rows, metrics))
        for name, reason in left_out.items():
            rank_zero_warn(f"{name} is left out: {reason}")
        for name, value in metrics.items():
            group, _, channel = name.partition("/c")
            constant = name.startswith(_OF_DATA) and trainer.state.fn == "fit"
            if not constant and (group != _CHANNELS or int(channel) < _LOGGED_CHANNELS):
                module.log_agreed(name, value)
        if self.output is not None:
            self._write(trainer, module, metrics, left_out)
        return dict(metrics)

    def _measure_images(
        self, trainer: L.Trainer, module: LatentDiffusion
    ) -> tuple[dict[str, float], dict[str, Tensor]] | None:
        """Generate and measure as many images on each rank: sharded networks wait for all ranks.

        Returns:
            The metrics that are collected over the ranks; features, logits and CLIP scores in the
            order of the images. None = a signal has stopped the run.
        """
        rank, ranks, N = trainer.global_rank, trainer.world_size, len(self._requests)
        device = trainer.strategy.root_device
        numbers = [rank + i * ranks for i in range(-(-N // ranks))]
        groups = sorted({request.group for request in self._requests} - {""})
        brightness = {
            "luma_mean": MeanLuma(),
            "luma_std": LumaSpread(),
            "luma_contrast": RMSContrast(),
            "luma_p01": LumaPercentile(1),
            "luma_p99": LumaPercentile(99),
        }
        if self._real is not None:
            brightness["luma_w1"] = LumaWasserstein(self._real.luma)
        by_group = {
            name: PromptGroups(metric, groups).to(device)
            for name, metric in (("luma_mean", MeanLuma()), ("luma_contrast", RMSContrast()))
            if groups
        }
        latent_mean = LatentMean(module.codec.channels).to(device)
        rows = {name: InOrder().to(device) for name in ("features", "logits", "clip")}
        brightness = {name: metric.to(device) for name, metric in brightness.items()}

        module.warn_of_cuts([request.caption for request in self._requests])
        starts = range(0, len(numbers), self.batch_size)
        problem: Exception | None = None
        show = shows_progress(trainer)
        for start in tracked(starts, len(starts), "image metrics", "batch", show=show):
            if stops(trainer):
                rank_zero_warn("The images are not measured: the run stops.")
                return None
            batch = numbers[start : start + self.batch_size]
            counted = [i for i, number in enumerate(batch) if number < N]
            requests = [self._requests[number % N] for number in batch]
            images, latents = self._sample(trainer, module, requests)
            _note(trainer)
            if not counted:
                continue
            images, requests = [images[i] for i in counted], [requests[i] for i in counted]
            places = [batch[i] for i in counted]
            levels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
            levels = levels.permute(0, 3, 1, 2).to(device)
            pixels = to_unit_range(levels)
            for metric in brightness.values():
                metric.update(pixels)
            for metric in by_group.values():
                inside = [i for i, request in enumerate(requests) if request.group]
                metric.update(pixels[inside], [requests[i].group for i in inside])
            latent_mean.update(latents[counted].to(device))
            if self._extractor is not None:
                features, logits = self._extractor(levels)
                rows["features"].update(features.to(device), places)
                if logits is not None:
                    rows["logits"].update(logits.to(device), places)
            if self._clip is not None:
                scores = self._clip(images, [request.caption for request in requests])
                rows["clip"].update(scores.to(device), places)
            if self.save_images is not None and problem is None:
                try:
                    self._save(trainer, Path(self.save_images).expanduser(), images, places)
                except Exception as error:  # of any kind: the other ranks must not wait
                    problem = error
        raise_on_all(problem)

        metrics = {f"metrics/{name}": float(m.compute()) for name, m in brightness.items()}
        for name, metric in by_group.items():
            for group, value in metric.compute().items():
                metrics[f"{name}_by_group/{group.replace(' ', '_')}"] = float(value)
        for channel, value in enumerate(latent_mean.compute().tolist()):
            metrics[f"{_CHANNELS}/c{channel:02d}"] = value
        used = {name: metric for name, metric in rows.items() if metric.rows}
        return metrics, {name: metric.compute().cpu() for name, metric in used.items()}

    def _sample(
        self,
        trainer: L.Trainer,
        module: LatentDiffusion,
        requests: Sequence[Captioned],
    ) -> tuple[list[Any], Tensor]:
        """Generate images, and return them with their latents."""
        sampling, states = module.sampling, deque[Tensor](maxlen=1)
        with module.pipeline() as pipe, trainer.precision_plugin.predict_step_context():
            images = pipe(
                [request.caption for request in requests],
                seeds=[request.seed for request in requests],
                sampler=sampling.sampler,
                num_steps=sampling.num_steps,
                spacing=sampling.spacing,
                guidance=sampling.guidance,
                batch_size=len(requests),
                progress=False,
                callback=lambda i, t, x_0, x_s: states.append(x_s),
            )
        return images, states[0]

    def _with_distances(
        self, rows: dict[str, Tensor], metrics: dict[str, float]
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Add the metrics of all images together; those of a collapsed model are left out."""
        left_out: dict[str, str] = {}
        features, logits = rows.get("features"), rows.get("logits")
        if "clip" in rows:
            metrics["metrics/clip_score"] = float(rows["clip"].double().mean())
        real = self._real
        if features is not None and real is not None:
            try:
                metrics["metrics/fid"] = frechet_distance(real, features)
                kid = kernel_distance(real, features, self.seed)
                metrics["metrics/kid"], metrics["metrics/kid_std"] = kid
            except ValueError as error:
                left_out["metrics/fid"] = left_out["metrics/kid"] = str(error)
        if logits is not None:
            name = "metrics/inception_score"
            try:
                score = inception_score(logits, self.inception_splits, self.seed)
                metrics[name], metrics[f"{name}_std"] = score
            except ValueError as error:
                left_out[name] = str(error)
        if real is not None:
            metrics[f"{_OF_DATA}/luma_mean"] = float(real.luma.double().mean())
            metrics[f"{_OF_DATA}/luma_std"] = float(real.luma.double().std(correction=0))
        return metrics, left_out

    # Real images

    def _find_real(self, trainer: L.Trainer, module: LatentDiffusion) -> None:
        """Read the statistics, or find the real images that they are measured of."""
        extractor = "" if self._extractor is None else self._extractor.fingerprint
        source = None
        if self.real is not None:
            data: Any = trainer.datamodule
            if trainer.local_rank:  # one process of a node writes the index
                trainer.strategy.barrier()
            problem: Exception | None = None
            try:
                index = load_index(self.real, data.storage(), folder=data.index_folder)
                self._samples = select(
                    index,
                    module.image_size,
                    max_pixels=data.pixels.max_pixels,
                    folder=Path(trainer.default_root_dir) / "index",
                )
            except Exception as error:  # of any kind: the other ranks must not wait
                problem = error
            if not trainer.local_rank:
                trainer.strategy.barrier()
            raise_on_all(problem)
            assert self._samples is not None
            source = f"{self._samples.digest} {min(self.num_real, len(self._samples))}"
            if len(self._samples) < max(2, trainer.world_size):
                raise ValueError(
                    f"metrics.real={self.real} holds {len(self._samples)} images: wanted at "
                    f"least {max(2, trainer.world_size)}."
                )
        path = None if self.statistics is None else Path(self.statistics).expanduser()
        exists = trainer.strategy.broadcast(path is not None and path.is_file())
        if path is not None and exists:
            self._real = RealStatistics.read(path)
            self._real.check(str(path), module.image_size, extractor, source)

    def _measure_real(self, trainer: L.Trainer, module: LatentDiffusion) -> RealStatistics:
        assert self._samples is not None
        data: Any = trainer.datamodule
        rank, ranks, device = trainer.global_rank, trainer.world_size, trainer.strategy.root_device
        N = min(self.num_real, len(self._samples))
        rows = torch.linspace(0, len(self._samples) - 1, N, dtype=torch.float64).round().long()
        mine = range(rank, N, ranks)
        loader = DataLoader(
            ShardDataset(self._samples, **data.reading()),
            batch_sampler=[
                rows[list(mine[i : i + self.batch_size])].tolist()
                for i in range(0, len(mine), self.batch_size)
            ],
            num_workers=data.num_workers,
            collate_fn=Shared(collate, data.num_workers),
        )
        luma, features = InOrder().to(device), InOrder().to(device)
        broken = 0
        show = shows_progress(trainer)
        for i, batch in enumerate(tracked(loader, len(loader), "real images", "batch", show=show)):
            _note(trainer)
            levels = batch["image"].to(device)
            places = list(mine[i * self.batch_size : (i + 1) * self.batch_size])
            luma.update(mean_luma(to_unit_range(levels)), places)
            if self._extractor is not None:
                features.update(self._extractor(levels)[0].to(device), places)
            broken += len(batch.get("faults", ()))
        if broken:
            rank_zero_warn(f"{broken} real images are broken: the next ones replace them.")
        source = f"{self._samples.digest} {N}"
        statistics = real_statistics(
            luma.compute().cpu(),
            None if self._extractor is None else features.compute().cpu(),
            image_size=module.image_size,
            source=source,
            extractor="" if self._extractor is None else self._extractor.fingerprint,
        )
        if self.statistics is not None:
            path = Path(self.statistics).expanduser()
            _put(trainer, path, partial(statistics.write, path))
        return statistics

    # Files and devices

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        """Move the networks that measure to a device for as long as this is open."""
        networks: list[Any] = [part for part in (self._extractor, self._clip) if part is not None]
        try:
            for network in networks:
                network.to(device)
            yield
        finally:
            for network in networks:
                network.to(torch.device("cpu"))

    def _step(self, trainer: L.Trainer) -> int | None:
        return trainer.global_step if trainer.state.fn == "fit" else self._loaded_step

    def _save(
        self, trainer: L.Trainer, folder: Path, images: Sequence[Any], places: Sequence[int]
    ) -> None:
        """Write images; in training, a run continues where they cannot be written."""
        fits = trainer.state.fn == "fit"
        folder = folder / f"step-{self._step(trainer):08d}" if fits or self.each_step else folder
        with side_file(folder) if fits else nullcontext():
            for image, place in zip(images, places, strict=True):
                save_png(image, folder / f"{place:05d}.png")

    def _write(
        self,
        trainer: L.Trainer,
        module: LatentDiffusion,
        metrics: dict[str, float],
        left_out: dict[str, str],
    ) -> None:
        assert self.output is not None
        path = Path(self.output).expanduser()
        if trainer.state.fn == "fit" or self.each_step:
            path = path.with_name(f"{path.stem}-step-{self._step(trainer):08d}{path.suffix}")
        real = self._real
        content = {
            "global_step": self._step(trainer),
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "captions": self.captions,
            "num_images": self.num_images,
            "seed": self.seed,
            "image_size": module.image_size,
            "sampling": describe_sampling(module.sampling),
            "schedule": module.schedule.settings(),
            "real": None if real is None else {"count": real.count, "source": real.source},
            "features": None if self._extractor is None else self._extractor.fingerprint,
            "clip": self.clip,
            "metrics": metrics,
            "left_out": left_out,
        }

        def write() -> None:
            with replacing(path) as beside:
                beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

        _put(trainer, path, write)


def _put(trainer: L.Trainer, path: Path, write: Callable[[], None]) -> None:
    """Write a file on rank 0; in training, a run continues where it cannot be written."""
    if trainer.state.fn != "fit":
        on_first_rank(write)
    elif trainer.is_global_zero:
        with side_file(path):
            write()


def _note(trainer: L.Trainer) -> None:
    """Tell the watchdog that this rank makes progress."""
    for callback in trainer.callbacks:
        if isinstance(callback, Watchdog):
            callback.note(trainer, "measures images")


def check_files(options: Any, *, writes_once: bool) -> None:
    """Refuse inputs that are missing or malformed, and outputs that exist; loads no network.

    Args:
        options: Settings of ImageMetrics as attributes: a parsed config, or the callback itself.
        writes_once: Whether images and metrics go to new files, not to one for each step.

    Raises:
        ValueError: A file is missing, malformed, or exists where a new one is to be written.
        FileNotFoundError: There are no real images.
    """
    if options.captions is None:
        unused = [name for name in _NEED_CAPTIONS if getattr(options, name) is not None]
        if unused and writes_once:
            raise ValueError(
                f"metrics.{unused[0]} is set, but nothing is measured without metrics.captions."
            )
        return
    read_captions(options.captions, options.num_images, options.seed)
    if options.inception is not None:
        check_weights(options.inception)
        if options.num_images < 2 * options.inception_splits:
            raise ValueError(
                f"metrics.num_images={options.num_images} in {options.inception_splits} parts: the "
                "Inception score needs at least two images in each; lower metrics.inception_splits."
            )
    if options.real is not None:
        find_shards(options.real)
    if options.statistics is not None:
        path = Path(options.statistics).expanduser()
        if path.suffix != ".safetensors":
            raise ValueError(f"metrics.statistics={path}: wanted a name ending in .safetensors.")
        if path.exists():
            RealStatistics.read(path)
        elif options.real is None:
            raise ValueError(
                f"{path} is not there, and metrics.real names no images to measure for it."
            )
        else:
            check_new(path)  # so that it can be written
    if options.output is not None and Path(options.output).suffix != ".json":
        raise ValueError(f"metrics.output={options.output}: wanted a name that ends in .json.")
    if writes_once:
        for written in (options.output, options.save_images):
            if written is not None:
                check_new(Path(written).expanduser())
