"""What a run measures for its early warnings, on the device and without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from zsnr.metrics.luma import mean_luma, rms_contrast, saturation
from zsnr.objective import Objective
from zsnr.prediction import PredictionType, prediction_target, to_eps, to_x0
from zsnr.sampling import Sampling
from zsnr.schedule import widest
from zsnr.training.guard import sums_by_group
from zsnr.training.tags import quarters
from zsnr.training.watch import (
    BLOWN_UP,
    LABEL_SAMPLES,
    LABEL_SNR,
    MIN_SAMPLES,
    Appearance,
    Finding,
    Watch,
    adaptation,
    distance_from,
    divergence,
    drift,
    forgets,
    latent_scale,
    luma_spread,
    noise,
    prediction_type,
    raised,
    spacing,
    terminal_loss,
    terminal_weight,
    verdict,
)

_START_STEPS = 16  # in which the weights are nearly those of the start
_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)
_QUARTERS = range(4)  # of the timesteps
_SUMS = (
    *("batches", "leak", "leak_squared", "values", "sum", "squares"),
    *("samples", "loss", "zero_loss", "blown_up"),
    *(f"samples_{quarter}" for quarter in _QUARTERS),
    *(f"gradient_{quarter}" for quarter in _QUARTERS),
)
_START = ("samples", "loss", "zero_loss", "labelled", *_TYPES)


class Watcher:
    """Collects the measures of a run, judges them at validations, and says what is new.

    Args:
        watch: Settings.
        objective: The training objective.
        sampling: How previews are sampled.
        start_type: Declared prediction type of the pretrained weights. None = unknown, or none.
        codec_scale: Scale of the codec. None = latents are pixels, whose scale is no mistake.
    """

    def __init__(
        self,
        watch: Watch,
        objective: Objective,
        sampling: Sampling,
        start_type: PredictionType | None,
        codec_scale: float | None,
    ) -> None:
        self.watch, self.objective, self.sampling = watch, objective, sampling
        self.start_type, self.codec_scale = start_type, codec_scale
        self.bound: float | None = None  # of the loss at the last timestep
        self.data: Appearance = {}  # of training images
        self.same_prompts = False  # whether their means are of those with the previews' prompts
        self.line = ""  # the last verdict
        self._sums: Tensor | None = None  # since the last verdict, on this rank
        self._start_sums: Tensor | None = None  # of the first steps, on this rank
        self._start = dict.fromkeys(_START, 0.0)  # the same over all ranks
        self._total = dict.fromkeys(_SUMS, 0.0)  # over all ranks
        self._size: Tensor | None = None  # squared norm of the steady weights, on this rank
        self._size_step = 0
        self._images: dict[str, float] = {}  # means of the last previews
        self.told: dict[str, int] = {}  # steps at which warnings were first raised
        self._best: dict[str, float] = {}  # the smallest values before, and the largest spread
        self._terminal: float | None = None

    # Measures

    @torch.no_grad()
    def add(
        self,
        noised: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        losses: Tensor,
        step: int,
        learned: Tensor | None = None,
    ) -> None:
        """Add a micro-batch; reads nothing from the device.

        Args:
            noised: x_t and the network's target, (B, *), and t, (B,).
            output: The network's, (B, *).
            losses: Loss of each sample, (B,).
            step: Number of optimizer steps before.
            learned: What training multiplies these losses by, (B,). None = 1.
        """
        x_t, target, t = noised
        scales = self.objective.schedule(t)
        own = self.objective.prediction_type
        x_0, eps = (to(target, x_t, *scales, own) for to in (to_x0, to_eps))
        zero = torch.zeros_like(target)
        zero_loss = self.objective.losses(zero, target, t)
        size = sum(self.objective.losses(zero, each, t).sum() for each in (x_0, eps))
        leak = noise_leak(x_0, eps)
        loss = losses.sum()
        dtype = widest(x_t.device)
        counted = leak.isfinite() & loss.isfinite()
        now = torch.stack(
            [
                torch.ones_like(leak, dtype=dtype),
                *(leak.to(dtype) ** power for power in (1, 2)),
                torch.full_like(leak, x_0.numel(), dtype=dtype),
                *(x_0.to(dtype).pow(power).sum() for power in (1, 2)),
                torch.full_like(leak, len(losses), dtype=dtype),
                *(part.sum().to(dtype) for part in (loss, zero_loss)),
                (loss > BLOWN_UP * size).to(dtype),
            ]
        )
        # d loss / d output = 2 lambda_t (output - target) / n
        gradients = 4 * self.objective.weights(t) * losses / x_t[0].numel()
        if learned is not None:
            gradients = gradients * learned.square()
        totals, counts = sums_by_group(gradients, t, self.objective.schedule.num_timesteps)
        for by_group in (counts, totals):
            by_group[3] += by_group[4]  # the last timestep alone, which is of the last quarter
        now = torch.cat([now, counts[:4], totals[:4]])
        now = torch.where(counted, now, 0.0)
        self._sums = now if self._sums is None else self._sums.to(now) + now
        if step >= _START_STEPS:
            return
        high = (scales[0] / scales[1]).square() <= LABEL_SNR
        explained = [
            signed_square_cosine(output, prediction_target(x_0, eps, *scales, each))
            for each in _TYPES
        ]
        labels = torch.stack([high.to(dtype), *(high * each.to(dtype) for each in explained)])
        first = torch.cat([now[6:9], torch.where(counted, labels.sum(1), 0.0)])
        if self._start_sums is not None:
            first = first + self._start_sums.to(first)
        self._start_sums = first

    def see(self, images: Tensor) -> None:
        """Take the appearance of previews, (B, 3, H, W) in [-1, 1]."""
        measured = appearance(images)
        self._images = {name: float(each.mean()) for name, each in measured.items()}
        if len(images) > 1:
            self._images["luma_std"] = float(measured["luma"].std())
            self._images["count"] = len(images)

    # Verdicts

    def static(self) -> list[Finding]:
        """Return the causes that the settings hold."""
        objective, sampling = self.objective, self.sampling
        schedule = objective.schedule
        causes = (
            terminal_weight(
                schedule, objective.prediction_type, objective.loss, objective.timestep_law
            ),
            spacing(schedule, sampling.spacing, sampling.num_steps),
        )
        return [finding for finding in causes if finding is not None]

    def begin(self, step: int) -> str | None:
        """Return the line about the settings, before training; None if there is nothing to say."""
        findings = raised(self.static(), [], self.watch.ignore)
        if not findings or all(finding.name in self.told for finding in findings):
            return None
        self._say(step, findings, [])
        return self.line

    def weigh(self, size: Tensor, step: int) -> None:
        """Take this rank's part of the squared norm of the trained weights."""
        self._size, self._size_step = size, step

    def collect(
        self, reduce: Callable[[Tensor], Tensor], size: Tensor | None = None, step: int = 0
    ) -> dict[str, float]:
        """Sum the measures over all ranks, which all call it, and return those of this interval.

        Args:
            reduce: Sums a tensor over the ranks.
            size: As `weigh` takes it, now.
            step: Number of optimizer steps.
        """
        if self._sums is None:
            return {}
        first = self._start_sums
        first = self._sums.new_zeros(len(_START)) if first is None else first.to(self._sums)
        sizes = self._sums.new_zeros(2)
        if size is not None and self._size is not None:
            sizes = torch.stack([self._size, size]).to(self._sums)
        values = reduce(torch.cat([sizes, self._sums, first])).tolist()
        before, after, *values = values
        interval = dict(zip(_SUMS, values, strict=False))
        self._start = dict(zip(_START, values[len(_SUMS) :], strict=True))
        for name, value in interval.items():
            self._total[name] += value
        interval["growth"] = after / before if before else 1.0
        interval["steps"] = step - self._size_step
        if size is not None and not forgets(interval["growth"], step - self._size_step):
            self.weigh(size, step)
        self._sums = None
        return interval

    def judge(
        self,
        step: int,
        interval: Mapping[str, float],
        *,
        learning_rate: float,
        terminal: float | None = None,
        terminal_skill: float | None = None,
        low_noise: tuple[int, float | None] = (0, None),
    ) -> tuple[bool, dict[str, float]]:
        """Judge all measures, and make `line`.

        Args:
            step: Number of optimizer steps.
            interval: Result of `collect`.
            learning_rate: The optimizer's.
            terminal: Validation loss at the last timestep.
            terminal_skill: The same divided by that of predicting zero.
            low_noise: The timestep with the least noise that validation measures, and its loss
                divided by that of the start.

        Returns:
            Whether a warning is new, and scalars for the loggers by tag.
        """
        facts: list[str] = []
        scalars: dict[str, float] = {}
        causes = [
            *self.static(),
            self._judge_label(),
            *self._judge_latents(scalars),
            self._judge_training(interval, learning_rate, facts, scalars),
        ]
        t, adapted = low_noise
        symptoms = [
            terminal_loss(terminal_skill, self._terminal),
            adaptation(t, adapted, self._best.get("adaptation")),
        ]
        self._terminal = terminal_skill
        if terminal is not None and self.bound:
            scalars["watch/terminal_over_bound"] = terminal / self.bound
            facts.append(
                f"terminal loss {terminal / self.bound:.2g} times the unconditional lower bound"
            )
        if adapted is not None:
            facts.append(f"adaptation {adapted:.2g} at t={t}")
            self._lowest("adaptation", adapted)
        symptoms += self._judge_previews(facts, scalars)
        findings = raised(
            [each for each in causes if each is not None],
            [each for each in symptoms if each is not None],
            self.watch.ignore,
        )
        scalars["watch/warnings"] = len(findings)
        return self._say(step, findings, facts), scalars

    def _judge_latents(self, scalars: dict[str, float]) -> list[Finding | None]:
        """Judge the noise and the latents of all steps so far."""
        total = self._total
        if not total["batches"]:
            return []
        mean = total["leak"] / total["batches"]
        variance = max(0.0, total["leak_squared"] / total["batches"] - mean**2)
        findings = [noise(total["batches"], mean, variance**0.5)]
        std = (total["squares"] / total["values"] - (total["sum"] / total["values"]) ** 2) ** 0.5
        scalars["watch/latent_std"] = std
        if self.codec_scale is not None:
            findings.append(latent_scale(std, self.watch.latent_std, self.codec_scale))
        return findings

    def _judge_training(
        self,
        interval: Mapping[str, float],
        learning_rate: float,
        facts: list[str],
        scalars: dict[str, float],
    ) -> Finding | None:
        """Judge the training losses since the last verdict, and the growth of the weights."""
        for quarter, end in enumerate(quarters(self.objective.schedule.num_timesteps)):
            if count := interval.get(f"samples_{quarter}"):
                mean = interval[f"gradient_{quarter}"] / count
                scalars[f"output_gradient_by_timestep/{end}"] = mean**0.5
        ratio = None
        if interval.get("samples", 0) >= MIN_SAMPLES and interval["zero_loss"]:
            ratio = interval["loss"] / interval["zero_loss"]
            scalars["watch/loss_ratio"] = ratio
            facts.append(f"training loss {ratio:.2g} times that of predicting zero")
        first = self._start
        if first["samples"] >= MIN_SAMPLES and first["zero_loss"]:
            self._best.setdefault("loss", first["loss"] / first["zero_loss"])
        blown_up = interval.get("blown_up", 0)
        growth, steps = interval.get("growth", 1.0), round(interval.get("steps", 0))
        best = self._best.get("loss")
        if ratio is not None:
            self._lowest("loss", ratio)
        return divergence(blown_up, ratio, best, growth, steps, learning_rate)

    def _judge_previews(self, facts: list[str], scalars: dict[str, float]) -> list[Finding | None]:
        """Judge the appearance of the last previews."""
        findings: list[Finding | None] = []
        compared = "data at the same prompts" if self.same_prompts else "data"
        for name in ("luma", "contrast", "saturation"):
            if name in self._images and name in self.data:
                image, data = self._images[name], self.data[name]
                findings.append(drift(name, image, data, self._best.get(name)))
                self._lowest(name, distance_from(image, data))
                scalars[f"watch/{name}"] = image - data[0]
                facts.append(f"{name} of previews {image:.2f}, of {compared} {data[0]:.2f}")
        if "luma_std" in self._images and self.data.get("luma", (0.0, 0.0))[1]:
            ratio = self._images["luma_std"] / self.data["luma"][1]
            largest = self._best.get("luma_spread")
            findings.append(luma_spread(ratio, round(self._images["count"]), largest))
            self._best["luma_spread"] = max(ratio, largest or 0.0)
            scalars["watch/luma_spread"] = ratio
            facts.append(f"luma of previews spreads {ratio:.2g} times as far as that of data")
        return findings

    def _lowest(self, name: str, value: float) -> None:
        self._best[name] = min(value, self._best.get(name, value))

    def _judge_label(self) -> Finding | None:
        count = self._start["labelled"]
        if self.start_type is None or count < LABEL_SAMPLES:
            return None
        return prediction_type(self.start_type, {k: self._start[k] / count for k in _TYPES})

    def _say(self, step: int, findings: list[Finding], facts: list[str]) -> bool:
        self.line = verdict(step, findings, self.told, facts)
        new = [finding.name for finding in findings if finding.name not in self.told]
        self.told |= dict.fromkeys(new, step)
        return bool(new)

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        sums = {"sums": self._sums, "start_sums": self._start_sums}
        return {
            "told": dict(self.told),
            "best": dict(self._best),
            "terminal": self._terminal,
            "total": dict(self._total),
            "images": dict(self._images),
            **{name: [] if each is None else each.tolist() for name, each in sums.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept; every rank gets rank 0's sums, whose ratios count."""
        self.told, self._best = dict(state["told"]), dict(state["best"])
        self._terminal, self._total = state["terminal"], {**self._total, **state["total"]}
        self._images = dict(state["images"])
        self._sums, self._start_sums = (
            torch.tensor(state[name], dtype=torch.float64) if state[name] else None
            for name in ("sums", "start_sums")
        )


def noise_leak(x_0: Tensor, eps: Tensor) -> Tensor:
    """Measure how much of the images a micro-batch's noise holds.

    q = <d, sum_j eps_j> / (|d| sqrt(B)),  d = sum_i x_0,i / |x_0,i|

    is standard normal if the noise is normal and independent of the images, and also if noises were
    drawn independently and then paired with images of the same micro-batch, because the sums do not
    change. If each noise has the mean m along its own image, q has the mean m |d| / sqrt(B), which
    is m where the images are orthogonal, and up to m sqrt(B).

    Args:
        x_0: Images or latents, (B, *).
        eps: Noise, (B, *).

    Returns:
        (), not finite where a value is not finite.
    """
    images, noises = x_0.flatten(1).float(), eps.flatten(1).float()
    tiny = torch.finfo(images.dtype).tiny
    d = (images / images.norm(dim=1, keepdim=True).clamp_min(tiny)).sum(0)
    q: Tensor = (d * noises.sum(0)).sum() / (d.norm().clamp_min(tiny) * len(images) ** 0.5)
    return q


def signed_square_cosine(output: Tensor, target: Tensor) -> Tensor:
    """Return the share of each target that its output explains, (B,): cos |cos| of their angle."""
    output, target = output.flatten(1).float(), target.flatten(1).float()
    cosine: Tensor = torch.nn.functional.cosine_similarity(output, target)
    return cosine * cosine.abs()


def appearance(images: Tensor) -> dict[str, Tensor]:
    """Measure images, (B, 3, H, W) in [-1, 1]: mean luma, contrast and saturation, (B,) each."""
    measures = {"luma": mean_luma, "contrast": rms_contrast, "saturation": saturation}
    return {name: measure(images) for name, measure in measures.items()}
