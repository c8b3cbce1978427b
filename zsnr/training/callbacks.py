"""What is seen and written while a model trains and predicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from PIL import Image
from torch import Tensor

from zsnr.agreement import on_first_rank
from zsnr.checkpoints import sharded
from zsnr.checkpoints.own import describe_model
from zsnr.data.images import to_unit_range
from zsnr.data.prompts import PromptRequest
from zsnr.files import HeldFolder, replacing, side_file
from zsnr.locks import LOCK, Lock, remove_leftovers
from zsnr.metrics.luma import luma
from zsnr.noise import sample_generator
from zsnr.pipeline import save_png, write_sample
from zsnr.reports.pictures import picture_grid
from zsnr.training.loggers import log_luma, log_picture
from zsnr.training.module import LatentDiffusion
from zsnr.untrusted import parse_object, read_json, read_text, shown

_MOST_TEXT = 1 << 30  # bytes of a manifest


class Previews(Callback):
    """Samples from the same prompts and seeds as training goes on, by the sampling path of predict.

    Written to the folder `previews` of the run and, as grids, to TensorBoard and W&B; their mean
    luma to all loggers, and its histograms to TensorBoard.

    Args:
        prompts: One picture each.
        seeds: One a prompt. None = 0, 1, 2, ...
        every_n_steps: Optimizer steps between grids.
        columns: Pictures in a row.
    """

    def __init__(
        self,
        prompts: list[str],
        seeds: list[int] | None = None,
        every_n_steps: int = 1000,
        columns: int = 8,
    ) -> None:
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} preview prompts.")
        if not prompts:
            raise ValueError("Previews has no prompts: give at least one, or drop the callback.")
        for seed in seeds or []:
            sample_generator(seed)
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: wanted at least 1.")
        self.prompts, self.seeds = prompts, seeds
        self.every_n_steps, self.columns = every_n_steps, columns
        self._done = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._done = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._done:
            self._done = step
            self._show(trainer, pl_module, step)

    def _show(self, trainer: L.Trainer, module: LatentDiffusion, step: int) -> None:
        """Sample on all ranks, each as many pictures: a sharded network waits for all of them."""
        rank, ranks = trainer.global_rank, trainer.world_size
        each = -(-len(self.prompts) // ranks)
        mine = [(rank + i * ranks) % len(self.prompts) for i in range(each)]
        seeds = self.seeds or range(len(self.prompts))
        sampling = module.sampling
        with module.pipeline() as pipe:
            images = pipe(
                [self.prompts[i] for i in mine],
                seeds=[seeds[i] for i in mine],
                sampler=sampling.sampler,
                num_steps=sampling.num_steps,
                spacing=sampling.spacing,
                guidance=sampling.guidance,
                progress=False,
            )
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
        everyone = trainer.strategy.all_gather(pixels.to(trainer.strategy.root_device))
        by_prompt = everyone.reshape(ranks, *pixels.shape).transpose(0, 1).flatten(0, 1)
        if trainer.is_global_zero:
            self._write(trainer, by_prompt[: len(self.prompts)].cpu(), step)

    def _write(self, trainer: L.Trainer, pixels: Tensor, step: int) -> None:
        """Write pictures (N, H, W, 3), uint8, to the run's folder and its loggers."""
        grid = picture_grid([Image.fromarray(p) for p in pixels.numpy()], self.columns)
        folder = Path(trainer.default_root_dir) / "previews"
        with side_file(folder):
            folder.mkdir(exist_ok=True)  # not the run's folder, should it be gone
            save_png(grid, folder / f"step-{step:08d}.png")
        done_before = step - 1  # so are scalars counted, and what a resumed run keeps
        log_picture(trainer.loggers, "previews", grid, done_before)
        values = luma(to_unit_range(pixels.permute(0, 3, 1, 2))).flatten(1)
        log_luma(trainer.loggers, "previews", values.mean(1), values, done_before)
        for logger in trainer.loggers:
            logger.log_metrics({"luma_mean/previews": float(values.mean())}, done_before)


class PredictionWriter(BasePredictionWriter):
    """Writes the images of predict and one manifest.jsonl; an interrupted run goes on.

    A folder belongs to one run: the same checkpoint, prompts and settings. Another run's folder is
    refused.

    Args:
        folder: Where to write. None = only allowed where nothing is predicted.
    """

    MANIFEST, RUN = "manifest.jsonl", "run.json"

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = None if folder is None else Path(folder)
        self._lock: Lock | None = None
        self._held: HeldFolder | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "predict":
            return
        if self.folder is None:
            raise ValueError("--output is not set: say which folder predict shall write to.")
        data: Any = trainer.datamodule
        for request in data.requests:
            try:
                size = pl_module.image_size
                pl_module.codec.latent_shape(request.height or size, request.width or size)
            except ValueError as error:
                raise ValueError(f"Prompt {request.line}: {error}") from error
        self._rank = trainer.global_rank
        identity = run_identity(pl_module, data.requests, trainer.ckpt_path)
        try:
            data.done = on_first_rank(lambda: self._begin(identity))
        except Exception:
            self._release()
            raise
        self._held = HeldFolder(self.folder)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: list[PromptRequest],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self.folder is not None
        assert self._held is not None
        self._held.check()
        for request, image in zip(batch, prediction, strict=True):
            write_sample(image, self.folder / request.filename, self._manifest(self._rank))

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.strategy.barrier()
        on_first_rank(self._finish)
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._release()

    def _begin(self, identity: str) -> set[str]:
        assert self.folder is not None
        self._lock = Lock(self.folder / LOCK, self.folder)
        self._lock.take()
        return self._open(identity)

    def _finish(self) -> None:
        assert self._held is not None
        self._held.check()
        self._join()

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
        if self._lock is not None:
            self._lock.release()

    def _manifest(self, rank: int) -> Path:
        """Name a rank's list of what it has written; several cannot safely append to one file."""
        assert self.folder is not None
        return self.folder / (f".{self.MANIFEST}.{rank:05d}" if rank else self.MANIFEST)

    def _join(self) -> set[str]:
        """Make one manifest of all ranks', and return which files are done."""
        assert self.folder is not None
        parts = sorted(self.folder.glob(f".{self.MANIFEST}.*[0-9]"))
        lines: dict[str, str] = {}
        for part in [self.folder / self.MANIFEST, *parts]:
            lines |= _finished(part)
        if lines:
            with replacing(self.folder / self.MANIFEST) as beside:
                beside.write_text("".join(lines.values()), encoding="utf-8")
        for part in parts:
            part.unlink()
        return set(lines)

    def _open(self, identity: str) -> set[str]:
        """Make the folder, or find out what an interrupted run has written into it."""
        assert self.folder is not None
        run = self.folder / self.RUN
        remove_leftovers(self.folder)
        if run.is_file():
            if read_json(run).get("identity") != identity:
                raise ValueError(
                    f"{self.folder} holds images of another checkpoint, prompts file or settings: "
                    "choose another --output."
                )
            return self._join()
        if any(path.name != LOCK for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty: choose another --output.")
        with replacing(run) as beside:
            beside.write_text(json.dumps({"identity": identity}) + "\n")
        return set()


def run_identity(
    module: LatentDiffusion, requests: Sequence[PromptRequest], checkpoint: Any
) -> str:
    """Hash what decides the images: model, checkpoint, prompts and sampling settings."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(requests).encode())
    with module.pipeline() as pipe:
        facts = {**pipe.describe(module.sampling), **describe_model(pipe.model)}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    if checkpoint is not None:
        path = Path(checkpoint)
        stat = (path / sharded.REST if path.is_dir() else path).stat()
        digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _finished(manifest: Path) -> dict[str, str]:
    """Read the lines of files that are done; not one cut short by a crash, or without its file.

    Raises:
        ValueError: A line is not what predict writes.
    """
    if not manifest.is_file():
        return {}
    lines = read_text(manifest, _MOST_TEXT).split("\n")[:-1]
    done: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{manifest}, line {number}"
        name = parse_object(line.encode(), where).get("file")
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{where}: file={shown(name)}: wanted the name of an image.")
        if (manifest.parent / name).is_file():
            done[name] = line + "\n"
    return done
