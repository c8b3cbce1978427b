"""What TensorBoard and other loggers are told of a run besides its losses."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm

from zsnr.files import side_file
from zsnr.metrics.luma import luma
from zsnr.metrics.terminal import TerminalOptimum
from zsnr.public import public
from zsnr.reports.images import figure_image
from zsnr.reports.schedule import schedule_facts, schedule_figure, schedule_title
from zsnr.training.callbacks import Previews
from zsnr.training.loggers import (
    log_layout,
    log_luma,
    log_picture,
    log_settings,
    log_text,
)
from zsnr.training.module import LatentDiffusion

TERMINAL, OPTIMUM = "train_by_timestep/terminal", "train_by_timestep/terminal_optimum"
_PIXELS = 1 << 16  # of a picture that a histogram counts, at least


class TrainingBoard(Callback):
    """Shows a run in its loggers: speed, settings, schedule, and what the data are.

    Scalars: images a second over all devices; where the schedule ends at SNR 0, the least loss
    that the last timestep can have without prompts, beside its loss; the mean luma of the data.
    TensorBoard also has luma histograms of the data, the schedule's plot, hyperparameters, the
    config as text, and charts of several curves under "Custom Scalars". A resumed run measures and
    shows nothing twice.

    Args:
        samples: So many training samples, spread evenly over the data, are measured once at the
            start. 0 = none.
    """

    def __init__(self, samples: int = 256) -> None:
        if samples < 0:
            raise ValueError(f"board.samples={samples}: wanted 0 or more.")
        self.samples = samples
        self.config = ""  # as YAML; the command line sets it
        self._shown: dict[str, str] = {}  # digests of what is in the logs
        self._of: list[Any] = []  # what was measured: the data's digest, and how many samples
        self._measured: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"shown": self._shown, "of": self._of, "measured": self._measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._shown, self._of = state_dict["shown"], state_dict["of"]
        self._measured = state_dict["measured"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and trainer.loggers:  # the other ranks begin to train
            with side_file("The run's settings in the logs"):
                self._show_settings(trainer, pl_module)
            with side_file("What the data are, in the logs,"):
                self._measure(trainer, pl_module)
        self._since, self._step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        for name, value in self._lines(pl_module).items():
            pl_module.log(name, value, rank_zero_only=True)
        steps = trainer.global_step - self._step
        if steps >= trainer.log_every_n_steps:
            now = time.perf_counter()
            rate = steps * batch["global_batch_size"] / (now - self._since)
            pl_module.log("train/images_per_second", rate, rank_zero_only=True)
            self._since, self._step = now, trainer.global_step

    def _lines(self, module: LatentDiffusion) -> dict[str, float]:
        """Return what stays the same all along."""
        lines = {}
        if "variance" in self._measured and module.schedule.snr[-1] == 0:
            weight = float(module.loss.table(module.schedule, module.prediction_type)[-1])
            lines[OPTIMUM] = weight * self._measured["variance"]
        if "luma" in self._measured:
            lines["luma_mean/data"] = self._measured["luma"]
        return lines

    def _show_settings(self, trainer: L.Trainer, module: LatentDiffusion) -> None:
        loggers, step, sampling = trainer.loggers, trainer.global_step, module.sampling
        settings = hyperparameters(trainer, module)
        if self._is_new("settings", settings):
            has_val = getattr(trainer.datamodule, "val", None) is not None
            metrics = [*(["val/loss"] if has_val else []), "train/loss", TERMINAL]
            log_settings(loggers, settings, metrics)
        if self.config and self._is_new("config", self.config):
            log_text(loggers, "config", f"```yaml\n{self.config.rstrip()}\n```", step)
        facts = schedule_facts(module.schedule, sampling.num_steps, [sampling.spacing])
        if self._is_new("schedule", facts):
            figure = schedule_figure(facts, 4.2, 5.2)
            title = schedule_title(module.schedule).replace(" timesteps, ", " timesteps,\n")
            figure.suptitle(f"this run: {title}", fontsize="small")
            log_picture(loggers, "schedule", figure_image(figure), step)
            log_layout(loggers, charts(module.schedule.num_timesteps))

    def _is_new(self, name: str, value: Any) -> bool:
        digest = hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
        known, self._shown[name] = self._shown.get(name), digest
        return known != digest

    def _measure(self, trainer: L.Trainer, module: LatentDiffusion) -> None:
        """Measure variance and luma of the data.

        A cache's pictures only where there are previews, which load the decoder anyway.
        """
        data: Any = trainer.datamodule
        if data is None or not self.samples:
            return
        of = [data.state_dict()["samples"], self.samples]
        if of == self._of:
            return
        self._of, self._measured = of, {}
        batches = data.spread(self.samples)
        codec, optimum, count = module.codec, TerminalOptimum(), 0
        means: list[Tensor] = []
        pixels: list[Tensor] = []
        decoded = any(isinstance(callback, Previews) for callback in trainer.callbacks)
        bar = trainer.progress_bar_callback is not None
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for batch in tqdm(batches, "measuring the data", disable=not bar):
                batch.pop("faults", None)  # training will tell, if it meets them
                batch = trainer.strategy.batch_to_device(batch)
                moments = batch["moments"] if "moments" in batch else codec.encode(batch["image"])
                mean = codec.latents(moments)
                optimum.add(mean, codec.latents(moments, torch.ones_like(mean)) - mean)
                count += len(mean)
                if "image" in batch or decoded:
                    image = batch["image"] if "image" in batch else codec.decode(mean)
                    rows = luma(image.clamp(-1, 1)).flatten(1).cpu()
                    means.append(rows.mean(1))
                    pixels.append(rows[:, :: max(1, rows.shape[1] // _PIXELS)].flatten())
        if not count:
            return
        words = [f"{count} samples of the data are measured"]
        variance = optimum.value()
        if variance is not None:
            self._measured["variance"] = variance
            words.append(f"the variance of their latents is {variance:.3g} an element")
        if means:
            self._measured["luma"] = float(torch.cat(means).mean())
            words.append(f"their mean luma {self._measured['luma']:.2f} of -1 to 1")
            step = trainer.global_step
            log_luma(trainer.loggers, "data", torch.cat(means), torch.cat(pixels), step)
        rank_zero_info(f"{': '.join([words[0], ', '.join(words[1:])])}.")


def charts(num_timesteps: int) -> dict[str, Any]:
    """Lay out "Custom Scalars": {group: {chart: [kind, regular expressions of the tags]}}."""
    last = [f"{TERMINAL}$", f"val_by_timestep/t{num_timesteps - 1:04d}$", f"{OPTIMUM}$"]
    by_group = {
        "loss": {
            "training, by timestep": [r"train_by_timestep/t\d"],
            "validation, by timestep": [r"val_by_timestep/t\d"],
            "last timestep; its least without prompts": last,
        },
        "luma": {"mean, of -1 to 1": [r"luma_mean/(data|previews)$"]},
    }
    return {
        group: {title: ["Multiline", tags] for title, tags in own.items()}
        for group, own in by_group.items()
    }


def hyperparameters(trainer: L.Trainer, module: LatentDiffusion) -> dict[str, Any]:
    """Collect what a table of runs compares: names with dots, and plain values."""
    data, [optimizer] = trainer.datamodule, trainer.optimizers
    weights = module.trained.parameters()
    facts = {
        **module.facts(),
        "optimizer": type(optimizer).__name__,
        "learning_rate": {"peak": optimizer.defaults.get("lr"), **vars(module.learning_rate)},
        "batch_size": getattr(data, "batch_size", None),
        "max_steps": trainer.max_steps,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": trainer.precision,
        "ranks": trainer.world_size,
        "seed": module.seed,
        "trained_weights": sum(p.numel() for p in weights if p.requires_grad),
    }
    return _flat(public(facts))


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows = (
        _flat(value, f"{prefix}{name}.").items()
        if isinstance(value, Mapping)
        else [(prefix + name, value if isinstance(value, (bool, int, float, str)) else str(value))]
        for name, value in facts.items()
    )
    return dict(chain.from_iterable(rows))
