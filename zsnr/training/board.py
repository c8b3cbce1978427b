"""What TensorBoard and other loggers show of a run besides its losses."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm

from zsnr.denoiser import Conditioning
from zsnr.draws import validation_timesteps
from zsnr.files import side_file
from zsnr.metrics.luma import luma
from zsnr.metrics.terminal import TerminalOptimum
from zsnr.networks import takes_sizes
from zsnr.public import public
from zsnr.reports.images import figure_image
from zsnr.reports.schedule import schedule_facts, schedule_figure, schedule_title
from zsnr.training.console import Paced
from zsnr.training.image_metrics import ImageMetrics
from zsnr.training.loggers import log_image, log_layout, log_luma, log_settings, log_text
from zsnr.training.module import LatentDiffusion
from zsnr.training.previews import Previews
from zsnr.training.tags import TERMINAL, at_timestep, markdown_table, quarters, tag_table
from zsnr.training.throughput import network_flops, peak_flops
from zsnr.training.watcher import appearance

VARIANCE = "variance of the latents, per element"
LOWER_BOUND = "lower bound of the loss at the last timestep, without prompts"
MEAN_LUMA = "mean luma of the training images, from -1 (black) to 1 (white)"
COMPARED = (
    *("learning_rate", "batch_size", "schedule.zero_terminal_snr", "prediction_type", "max_steps"),
    *("sampling.sampler", "sampling.num_steps", "sampling.spacing", "sampling.guidance_scale"),
    *("sampling.guidance_rescale", "loss.name", "ema.decay", "precision", "seed"),
)
"""Settings by which TensorBoard's table compares runs; the text `config` holds all others."""

_CURVES = 5  # of one chart
_PIXELS = 1 << 16  # minimum number of pixels of an image that a histogram counts


class TrainingBoard(Paced):
    """Shows a run in its loggers: throughput, settings, schedule, and the training data.

    TensorBoard gets a chart of the schedule, luma histograms of the data, a table of
    hyperparameters, and charts of several curves under "Custom Scalars". Its Text dashboard holds
    what is no curve: the configuration, the constants of the data, such as the lower bound of the
    loss at the last timestep, and a description of every tag. A resumed run measures the data and
    logs what has not changed only once.

    Args:
        samples: Number of training samples, spread evenly over the data, that are measured once at
            the start of a run: their mean luma, and the variance of their latents. 0 = none.

    Raises:
        ValueError: The number of samples is negative.
    """

    def __init__(self, samples: int = 256) -> None:
        if samples < 0:
            raise ValueError(f"board.samples={samples}: wanted 0 or more.")
        self.samples = samples
        self.config = ""  # as YAML; the command line sets it
        self._shown: dict[str, str] = {}  # digests of what the logs hold, by name
        self._measured_of: list[Any] = []  # digest of the data, and how many samples
        self._measured: dict[str, float] = {}
        self._appearance: dict[str, tuple[float, float]] = {}
        self._same_prompts = False  # whether the means are those of the previews' prompts
        self._flops: float | None = None  # of one image

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and trainer.loggers and self._flops is None:
            with side_file("The network's number of operations, in the logs,"):
                self._flops = flops_per_image(pl_module)  # before it is sharded and compiled

    def state_dict(self) -> dict[str, Any]:
        return {
            "shown": self._shown,
            "of": self._measured_of,
            "measured": self._measured,
            "appearance": self._appearance,
            "same_prompts": self._same_prompts,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._shown, self._measured_of = state_dict["shown"], state_dict["of"]
        self._measured = state_dict["measured"]
        self._appearance = state_dict.get("appearance", {})
        self._same_prompts = state_dict.get("same_prompts", False)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and trainer.loggers:  # the other ranks begin to train
            with side_file("The constants of the data, in the logs,"):
                self._measure(trainer, pl_module)
                if pl_module.watcher is not None:
                    pl_module.watcher.bound = self._constants(pl_module).get(LOWER_BOUND)
                    pl_module.watcher.data = self._appearance
                    pl_module.watcher.same_prompts = self._same_prompts
            with side_file("The run's settings in the logs"):
                self._show_settings(trainer, pl_module)
        super().on_train_start(trainer, pl_module)
        self._waited = getattr(trainer.datamodule, "waited", 0.0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.pace is not None
        steps = self.pace.steps(trainer)
        if trainer.is_global_zero and steps >= trainer.log_every_n_steps:
            rate, seconds = self.pace.lap(trainer, batch["global_batch_size"])
            self._log_throughput(trainer, pl_module, rate)
            waited = getattr(trainer.datamodule, "waited", None)
            if waited is not None:
                pl_module.log_agreed("train/data_wait", (waited - self._waited) / seconds)
                self._waited = waited

    def _log_throughput(self, trainer: L.Trainer, module: LatentDiffusion, rate: float) -> None:
        """Log images per second, and what follows from them."""
        module.log_agreed("train/images_per_second", rate)
        device = module.device
        if self._flops is not None:
            achieved = self._flops * rate / trainer.world_size
            module.log_agreed("train/tflops", achieved / 1e12)
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
            peak = peak_flops(name)
            if peak is not None:
                module.log_agreed("train/mfu", achieved / peak)
        if device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(device)
            module.log_agreed("train/gpu_memory", reserved / 2**30)

    def _constants(self, module: LatentDiffusion) -> dict[str, float]:
        """Return what the data decide for the whole run, by description."""
        constants = {}
        if "variance" in self._measured:
            constants[VARIANCE] = self._measured["variance"]
            if module.schedule.snr[-1] == 0:
                weight = float(module.loss.table(module.schedule, module.prediction_type)[-1])
                constants[LOWER_BOUND] = weight * self._measured["variance"]
        if "luma" in self._measured:
            constants[MEAN_LUMA] = self._measured["luma"]
        return constants

    def _show_settings(self, trainer: L.Trainer, module: LatentDiffusion) -> None:
        loggers, step, sampling = trainer.loggers, trainer.global_step, module.sampling
        constants = self._constants(module)
        settings = hyperparameters(trainer, module)
        if self._is_new("settings", settings):
            has_val = getattr(trainer.datamodule, "val", None) is not None
            metrics = [*(["val/loss"] if has_val else []), "train/loss", TERMINAL]
            log_settings(loggers, settings, COMPARED, metrics)
        if self.config and self._is_new("config", self.config):
            log_text(loggers, "config", f"```yaml\n{self.config.rstrip()}\n```", step)
        if constants and self._is_new("data", constants):
            rows = [(name, f"{value:.4g}") for name, value in constants.items()]
            log_text(loggers, "data", markdown_table([("constant", "value"), *rows]), step)
        if self._is_new("tags", tag_table()):
            log_text(loggers, "tags", tag_table(), step)
        layout = chart_layout(trainer, module, constants)
        if self._is_new("charts", layout):
            log_layout(loggers, layout)
        facts = schedule_facts(module.schedule, sampling.num_steps, [sampling.spacing])
        if self._is_new("schedule", facts):
            figure = schedule_figure(facts, 4.2, 5.2)
            title = schedule_title(module.schedule).replace(" timesteps, ", " timesteps,\n")
            figure.suptitle(f"this run: {title}", fontsize="small")
            log_image(loggers, "schedule", figure_image(figure), step)

    def _is_new(self, name: str, value: Any) -> bool:
        digest = hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
        known, self._shown[name] = self._shown.get(name), digest
        return known != digest

    def _measure(self, trainer: L.Trainer, module: LatentDiffusion) -> None:
        """Measure the variance and the luma of the data.

        Images of a cache are decoded only where there are previews, which load the decoder anyway.
        """
        data: Any = trainer.datamodule
        if data is None or not self.samples:
            return
        previews = [each for each in trainer.callbacks if isinstance(each, Previews)]
        prompts = [prompt for each in previews for prompt in each.prompts]
        asked = [data.state_dict()["samples"], self.samples, prompts]
        if asked == self._measured_of:
            return
        self._measured_of, self._measured = asked, {}
        self._appearance, self._same_prompts = {}, False
        batches = data.spread(self.samples)
        codec, optimum, count = module.codec, TerminalOptimum(), 0
        means: list[Tensor] = []
        looks: dict[str, list[Tensor]] = {}
        pixels: list[Tensor] = []
        captions: list[str] = []
        bar = trainer.progress_bar_callback is not None
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for batch in tqdm(batches, "measuring the data", disable=not bar):
                batch.pop("faults", None)  # training will tell, if it meets them
                batch = trainer.strategy.batch_to_device(batch)
                if "latents" in batch:
                    mean = batch["latents"]
                    optimum.add(mean, torch.zeros_like(mean))
                else:
                    given = "moments" in batch
                    moments = batch["moments"] if given else codec.encode(batch["image"])
                    mean = codec.latents(moments)
                    optimum.add(mean, codec.latents(moments, torch.ones_like(mean)) - mean)
                count += len(mean)
                if "image" in batch or previews:
                    image = batch["image"] if "image" in batch else codec.decode(mean)
                    image = image.clamp(-1, 1)
                    for name, values in appearance(image).items():
                        looks.setdefault(name, []).append(values.cpu())
                    captions += batch.get("caption", [""] * len(image))
                    rows = luma(image).flatten(1).cpu()
                    means.append(rows.mean(1))
                    pixels.append(rows[:, :: max(1, rows.shape[1] // _PIXELS)].flatten())
        if not count:
            return
        variance = optimum.value()
        if variance is not None:
            self._measured["variance"] = variance
        if means:
            self._measured["luma"] = float(torch.cat(means).mean())
            weights = prompt_weights(captions, prompts)
            self._same_prompts = weights is not None
            if weights is None:
                weights = torch.full((len(captions),), 1 / len(captions))
            self._appearance = {
                name: (float(torch.cat(each) @ weights), float(torch.cat(each).std(correction=0)))
                for name, each in looks.items()
            }
            step = trainer.global_step
            log_luma(trainer.loggers, "data", torch.cat(means), torch.cat(pixels), step)
        constants = self._constants(module).items()
        said = "; ".join(f"{name} {value:.3g}" for name, value in constants)
        rank_zero_info(f"Measured {count} training samples{f': {said}' if said else ''}.")


def prompt_weights(captions: Sequence[str], prompts: Sequence[str]) -> Tensor | None:
    """Return weights of samples whose mean is that of data with the same captions as prompts.

    Each prompt counts alike, and so does each sample that has it as its caption; a prompt without
    text stands for all samples.

    Args:
        captions: Of N samples.
        prompts: Of the previews.

    Returns:
        (N,) with the sum 1; None where there are no prompts, or one is no sample's caption.
    """
    rows = []
    for prompt in prompts:
        same = torch.tensor([caption == prompt or not prompt for caption in captions]).float()
        if not same.any():
            return None
        rows.append(same / same.sum())
    return torch.stack(rows).mean(0) if rows else None


def flops_per_image(module: LatentDiffusion) -> float | None:
    """Count the operations of the network in training, per image; None if that is not possible."""
    model = module.model(ema=False)
    conditioner = model.conditioner
    context = torch.empty(1, conditioner.context_length, conditioner.context_dim)
    pooled, labels = torch.empty(1, conditioner.pooled_dim), torch.zeros(1, dtype=torch.int64)
    shape = model.codec.latent_shape(module.image_size, module.image_size)
    try:
        cond = Conditioning(
            context if conditioner.context_dim else None,
            pooled=pooled if conditioner.pooled_dim else None,
            sizes=torch.zeros(1, 6) if takes_sizes(model.network) else None,
            labels=labels if conditioner.num_labels else None,
        )
        return network_flops(model.network, shape, cond)
    except Exception as error:  # a network of the user's may do what no meta tensor can
        rank_zero_info(f"The network's operations are not counted: {error}")
        return None


def chart_layout(
    trainer: L.Trainer, module: LatentDiffusion, constants: Mapping[str, float]
) -> dict[str, dict[str, list[Any]]]:
    """Lay out the dashboard "Custom Scalars": at most five curves of one meaning in a chart.

    Args:
        trainer: Trainer of the run; what it does not log gets no chart.
        module: Model in training.
        constants: Constants of the data by description; where curves approach one, the title of
            their chart names it.

    Returns:
        {group: {title: [kind, regular expressions that match one tag each]}}.
    """
    T, callbacks = module.schedule.num_timesteps, trainer.callbacks
    validates = getattr(trainer.datamodule, "val", None) is not None
    there = {
        "train": True,
        "train_by_timestep": True,
        "output_gradient_by_timestep": module.watcher is not None,
        "loss_weight": module.learned_weight is not None,
        "loss_by_source": True,
        "loss_by_bucket": True,
        "val": validates,
        "val_by_timestep": validates,
        "adaptation": validates and module.converted_start is not None,
        "luma_mean": any(isinstance(each, Previews) for each in callbacks),
        "metrics": any(isinstance(each, ImageMetrics) and each.captions for each in callbacks),
    }

    def titled(title: str, name: str, constant: str) -> str:
        value = constants.get(constant)
        return title if value is None else f"{title} ({name}: {value:.3g})"

    def by_timestep(group: str, title: str) -> list[tuple[str, list[str]]]:
        ends = [at_timestep(t) for t in sorted(validation_timesteps(T).tolist())]
        parts = [ends[i : i + _CURVES] for i in range(0, len(ends), _CURVES)]
        return [
            (f"{title}, {part[0]} to {part[-1]}", [f"{group}/{end}" for end in part])
            for part in parts
        ]

    def by_group(kind: str) -> list[tuple[str, list[str]]]:
        names = [n for n in getattr(trainer.datamodule, "loss_groups", ()) if n.startswith(kind)]
        parts = [names[i : i + _CURVES] for i in range(0, len(names), _CURVES)]
        return [
            (
                f"training, by {kind}" + (f", part {number}" if len(parts) > 1 else ""),
                [f"loss_by_{name}" for name in part],
            )
            for number, part in enumerate(parts, 1)
        ]

    raw = [] if module.ema_config is None else ["val/loss_raw"]
    last = [TERMINAL, f"val_by_timestep/{at_timestep(T - 1)}"]
    by_quarter = [f"train_by_timestep/{quarter}" for quarter in quarters(T)]
    gradients = [f"output_gradient_by_timestep/{quarter}" for quarter in quarters(T)]
    layout = {
        "loss": [
            ("all timesteps", ["train/loss", "val/loss", *raw]),
            (titled("last timestep", "lower bound without prompts", LOWER_BOUND), last),
            ("training, by quarter of the timesteps", by_quarter),
            ("gradient at the output, by quarter of the timesteps", gradients),
            *by_group("source"),
            *by_group("bucket"),
            *by_timestep("val_by_timestep", "validation"),
            *by_timestep("loss_weight", "learned weight"),
        ],
        "adaptation": by_timestep("adaptation", "validation loss divided by the start's"),
        "luma": [
            (
                titled("mean, -1 black to 1 white", "training images", MEAN_LUMA),
                ["luma_mean/previews", "metrics/luma_mean"],
            ),
            ("darkest and brightest percent", ["metrics/luma_p01", "metrics/luma_p99"]),
            ("spread over images, contrast within", ["metrics/luma_std", "metrics/luma_contrast"]),
        ],
    }
    charts: dict[str, dict[str, list[Any]]] = {}
    for group, rows in layout.items():
        for title, tags in rows:
            logged = [f"^{re.escape(tag)}$" for tag in tags if there[tag.partition("/")[0]]]
            if logged:
                charts.setdefault(group, {})[title] = ["Multiline", logged]
    return charts


def hyperparameters(trainer: L.Trainer, module: LatentDiffusion) -> dict[str, Any]:
    """Collect the settings of a run as plain values, those that runs are compared by first.

    Returns:
        COMPARED first, all other facts of the model under their names with dots after them.
    """
    data, [optimizer] = trainer.datamodule, trainer.optimizers
    weights = module.trained.parameters()
    facts = {
        **module.facts(),
        "optimizer": type(optimizer).__name__,
        "learning_rate": optimizer.defaults.get("lr"),
        "learning_rate_schedule": vars(module.learning_rate),
        "batch_size": getattr(data, "batch_size", None),
        "max_steps": trainer.max_steps,
        "gradient_clip_val": trainer.gradient_clip_val,
        "precision": trainer.precision,
        "ranks": trainer.world_size,
        "seed": module.seed,
        "trained_weights": sum(p.numel() for p in weights if p.requires_grad),
    }
    plain = _flat(public(facts))
    return {**{name: plain[name] for name in COMPARED if name in plain}, **plain}


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows = (
        _flat(value, f"{prefix}{name}.").items()
        if isinstance(value, Mapping)
        else [(prefix + name, value if isinstance(value, (bool, int, float, str)) else str(value))]
        for name, value in facts.items()
    )
    return dict(chain.from_iterable(rows))
