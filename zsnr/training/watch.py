"""Early warnings: what the settings and the measures of a run say about its recipe.

Each function judges one measure, and returns a `Finding` where it is out of bounds. A cause is
certain from what it judges; a symptom may have several causes, so that it counts only where no
cause is found. Every bound is derived, not fitted to runs: its reason stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from zsnr.loss import LossWeighting
from zsnr.prediction import PredictionType
from zsnr.schedule import Schedule
from zsnr.timestep_law import MIN_TERMINAL_SHARE, TimestepLaw
from zsnr.timesteps import get_timesteps
from zsnr.untrusted import shown

WarningName = Literal[
    "terminal_weight",
    "spacing",
    "prediction_type",
    "noise",
    "latent_scale",
    "divergence",
    "terminal_loss",
    "adaptation",
    "luma",
    "contrast",
    "saturation",
    "luma_spread",
]
Appearance = Mapping[str, tuple[float, float]]
"""Mean and standard deviation over images of each of luma, contrast and saturation."""

SIGMAS = 5.0
"""Deviation, in standard errors, from which noise depends on the data: independent noise exceeds
it in one of 1.7 million tests, so in one of 1700 runs of 1000 validations."""
MIN_BATCHES = 16
"""Number of micro-batches from which the standard error of their mean is known well enough."""
LATENT_FACTOR = 2.0
"""Factor of the latents' standard deviation: Stable Diffusion's schedule serves 512 and 1024 pixels
alike, whose signal-to-noise ratios of an image's mean differ by this factor."""
BLOWN_UP = 4.0
"""||output - target||^2 <= (||output|| + ||target||)^2 <= 4 (||x_0||^2 + ||eps||^2) as long as the
output is no larger than data and noise together."""
RISE = 2.0
"""Factor of the mean loss: a prediction of the right size that has nothing to do with the target
has twice the loss of predicting zero."""
FORGOTTEN, MEMORY = 16.0, 16
"""Growth of the weights' squared norm. Updates that point anywhere add their squares to it, so that
a factor of 16 leaves a sixteenth of it to what the weights were; and one that doubles in 16 steps
has no memory of more batches than those. Adam's updates, each as large as the learning rate, reach
a part of that even if 16 of them point the same way."""
MIN_SAMPLES = 64
"""Number of samples whose mean loss is compared: at a standard deviation as large as the mean, that
of a mean is an eighth, and `RISE` is eight of those."""
LABEL_SNR = 0.1
"""SNR up to which outputs tell their prediction type: x_t is then more than 90 % noise, so that the
targets eps and v, which is nearly -x_0, are nearly orthogonal."""
LABEL_FACTOR = 2.0
"""How many times as much of a target another prediction type has to leave unexplained."""
LABEL_SAMPLES = 8
"""Number of samples from which the outputs of a start are judged."""
MIN_DRIFT = 3.0
"""Standard deviations over the data's images: the mean of all previews is where fewer than 0.3 % of
the images of a normal distribution are."""
DRIFT_STEP = 1.0
"""Standard deviations that previews have moved away since they were nearest to the data."""
SPREAD_CHANCE = 1e-3
"""Probability that so few normally distributed brightnesses lie as close together by chance."""
SPREAD_FALL = 2.0
"""Factor by which the spread of previews has fallen from the largest one so far."""
MIN_RISE = 1.1
"""Factor of a validation loss, whose noise is fixed, from one validation to another."""


@dataclass(frozen=True)
class Watch:
    """Early warnings: a line for every validation on what is wrong with a run's recipe.

    It stops nothing and changes no weight. Measures that the run takes anyway are judged; those of
    images need zsnr.training.Previews.

    Args:
        latent_std: Standard deviation that the latents of the codec are meant to have; a warning
            says where they have half of it or twice as much. null = any.
        ignore: Names of warnings that are not raised.

    Raises:
        ValueError: The standard deviation is not positive, or a name is unknown.
    """

    latent_std: float | None = 1.0
    ignore: tuple[WarningName, ...] = ()

    def __post_init__(self) -> None:
        std, listed = self.latent_std, isinstance(self.ignore, list | tuple)
        real = isinstance(std, int | float) and not isinstance(std, bool)
        if std is not None and not (real and math.isfinite(std) and std > 0):
            raise ValueError(f"watch.latent_std={shown(std)}: wanted a positive number, or null.")
        if not listed:
            raise ValueError(f"watch.ignore={shown(self.ignore)}: wanted a list, as in [spacing].")
        unknown = [name for name in self.ignore if name not in get_args(WarningName)]
        if unknown:
            known = ", ".join(get_args(WarningName))
            raise ValueError(f"watch.ignore={unknown[0]!r}: no such warning. Known: {known}.")
        object.__setattr__(self, "ignore", tuple(self.ignore))


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run.

    Args:
        name: Name of the warning.
        text: What was measured, and what follows from it.
        way_out: What to do.
    """

    name: WarningName
    text: str
    way_out: str


# Causes that the settings hold


def terminal_weight(
    schedule: Schedule, prediction: PredictionType, loss: LossWeighting, law: TimestepLaw
) -> Finding | None:
    """Warn of a weighting or a timestep law that does not train the last timestep at zero SNR."""
    T = schedule.num_timesteps
    if schedule.snr[-1] != 0:
        return None
    text = way_out = ""
    if loss.starves_the_end(schedule):
        text = f"the learned loss weighting may leave hardly any weight to t={T - 1}, the last one"
        way_out = "set model.loss.min_terminal_share to 1."
    elif loss.table(schedule, prediction)[-1] == 0:
        text = f"the loss weighting {loss.name} gives the last timestep, t={T - 1}, the weight 0"
        way_out = "set model.loss.name to uniform (the paper's), snr_plus_one or truncated_snr."
    elif law.terminal_share(T) < MIN_TERMINAL_SHARE:
        share = law.terminal_share(T)
        text = f"the timestep law {law.name} visits t={T - 1} {share:.2g} times as often as uniform"
        way_out = "set model.timestep_law.name to uniform or shift."
    if not text:
        return None
    lost = "the model never learns to start from pure noise, which decides the brightness of images"
    return Finding("terminal_weight", f"{text}: {lost}.", way_out)


def spacing(schedule: Schedule, name: str, num_steps: int) -> Finding | None:
    """Warn of sampling timesteps that do not begin at the last one where its SNR is zero."""
    T = schedule.num_timesteps
    first = int(get_timesteps(name, num_steps, T, schedule=schedule)[0])
    if schedule.snr[-1] != 0 or first == T - 1:
        return None
    return Finding(
        "spacing",
        f"images are sampled with {name} timesteps, from t={first}, but begin with pure noise, "
        f"which the model knows at t={T - 1} only: they are not what the model has learned.",
        "set model.sampling.spacing to trailing.",
    )


# Causes that are measured


def prediction_type(declared: PredictionType, explained: Mapping[str, float]) -> Finding | None:
    """Warn of pretrained weights that predict something else than is declared of them.

    Args:
        declared: Declared prediction type of the weights.
        explained: Mean squared cosine between output and target at high noise, negative where they
            are opposed, by prediction type; empty where too few samples were measured.
    """
    if not explained:
        return None
    left = {name: 1 - value for name, value in explained.items()}
    best = min(left, key=lambda name: left[name])
    if best == declared or left[best] * LABEL_FACTOR > left[declared]:
        return None
    return Finding(
        "prediction_type",
        f"the pretrained network is declared to predict {declared}, but its outputs explain "
        f"{100 * explained[best]:.0f} % of {best} at high noise and "
        f"{100 * max(0.0, explained[declared]):.0f} % of {declared}: its conversion is wrong, and "
        "so is every measure against it.",
        f"declare {best} in the files of the pretrained model, such as the prediction_type of its "
        "scheduler/scheduler_config.json (model.prediction_type is what the run learns), and start "
        "again.",
    )


def noise(batches: float, mean: float, std: float) -> Finding | None:
    """Warn of noise that depends on the data, so that training sees other noise than sampling.

    Args:
        batches: Number of micro-batches.
        mean: Mean of their `noise_leak`, 0 for independent noise.
        std: Standard deviation of it, 1 for independent normal noise.
    """
    if batches < MIN_BATCHES:
        return None
    sigmas = mean * math.sqrt(batches) / max(1.0, std)
    if abs(sigmas) <= SIGMAS:
        return None
    return Finding(
        "noise",
        f"the noise depends on the images: along them its mean is {mean:.2g} standard deviations "
        f"({sigmas:.0f} standard errors from 0), as with the nearest of several noises, so that "
        "x_T holds a part of the image in training and not in sampling.",
        "draw the noise independently of the images; pairing the noises of a batch with its images "
        "is fine.",
    )


def latent_scale(std: float, wanted: float | None, scale: float) -> Finding | None:
    """Warn of latents whose standard deviation is not what it is meant to be.

    Args:
        std: Standard deviation of all elements of the latents.
        wanted: What it is meant to be; None = not judged.
        scale: Scale of the codec.
    """
    if wanted is None or wanted / LATENT_FACTOR < std < wanted * LATENT_FACTOR or std == 0:
        return None
    return Finding(
        "latent_scale",
        f"the latents have a standard deviation of {std:.3g} instead of {wanted:g}: every "
        f"timestep has {(std / wanted) ** 2:.2g} times its signal-to-noise ratio.",
        f"set the codec's scale to {scale * wanted / std:.4g} (it is {scale:.4g}) or to the "
        "autoencoder's scaling_factor; where the scale is meant, set model.watch.latent_std.",
    )


def forgets(growth: float, steps: int) -> bool:
    """Whether weights whose squared norm grew by a factor in so many steps forget too soon."""
    return growth > min(FORGOTTEN, 1 + steps / MEMORY)


def divergence(
    blown_up: float,
    ratio: float | None,
    best: float | None,
    growth: float,
    steps: int,
    learning_rate: float,
) -> Finding | None:
    """Warn of weights that diverge.

    Args:
        blown_up: Number of micro-batches since the last verdict whose loss no output of the size of
            data and noise can have.
        ratio: Mean training loss since the last verdict, divided by that of predicting zero.
        best: The smallest such ratio before; None = none.
        growth: Factor of the squared norm of the trained weights since they were steady.
        steps: Number of optimizer steps since then.
        learning_rate: The optimizer's.
    """
    if blown_up:
        text = f"the loss of {blown_up:.0f} micro-batches was too large for any output of the size "
        text += "of data and noise"
    elif ratio is not None and best is not None and ratio > RISE * best:
        text = f"the training loss rose to {ratio / best:.2g} times what it was"
    elif forgets(growth, steps):
        text = f"the norm of the weights grew {growth**0.5:.2g} times in {steps} steps"
    else:
        return None
    return Finding(
        "divergence",
        f"{text}: the weights diverge.",
        f"lower the learning rate, now {learning_rate:.2g}, to a tenth or less, set trainer."
        "gradient_clip_val and warm up, and resume from an earlier checkpoint.",
    )


# Symptoms


def terminal_loss(skill: float | None, before: float | None) -> Finding | None:
    """Warn of a loss at the last timestep that is above that of predicting zero and does not fall.

    Args:
        skill: Validation loss at the last timestep, divided by that of predicting zero; None = not
            measured.
        before: The same at the last validation.
    """
    if skill is None or before is None or skill <= MIN_RISE or skill < before:
        return None
    return Finding(
        "terminal_loss",
        f"the loss at the last timestep is {skill:.2g} times that of predicting zero and does not "
        "fall: sampling starts there.",
        "lower the learning rate, train longer, or let model.timestep_law visit the last timestep "
        "more often.",
    )


def adaptation(t: int, ratio: float | None, best: float | None) -> Finding | None:
    """Warn of a fine-tune that is no longer as good as its start where there is little noise.

    Args:
        t: The timestep with the least noise that validation measures.
        ratio: Validation loss there divided by that of the pretrained model; None = not measured.
        best: The smallest such ratio before.
    """
    if ratio is None or best is None or best > 1 or ratio <= MIN_RISE:
        return None  # until it is as good, it is still adapting
    return Finding(
        "adaptation",
        f"the loss at t={t} is {ratio:.2g} times that of the pretrained model, and was {best:.2g} "
        "times it: details are lost.",
        "lower the learning rate, or stop at the earlier checkpoint.",
    )


def drift(
    name: Literal["luma", "contrast", "saturation"],
    images: float,
    data: tuple[float, float],
    nearest: float | None,
) -> Finding | None:
    """Warn of previews whose mean luma, contrast or saturation moves away from the data's.

    Args:
        name: What is measured.
        images: Its mean over the previews.
        data: Its mean and standard deviation over training images.
        nearest: The smallest distance of earlier previews, in these standard deviations.
    """
    distance = distance_from(images, data)
    if nearest is None or distance <= max(MIN_DRIFT, nearest + DRIFT_STEP):
        return None
    return Finding(
        name,
        f"the {name} of previews is {images:.2f}, {distance:.1f} standard deviations from that of "
        f"the data, {data[0]:.2f}, and was {nearest:.1f} from it.",
        "compare the previews: lower the guidance scale or the learning rate, or stop at the "
        "earlier checkpoint.",
    )


def luma_spread(ratio: float, count: int, largest: float | None) -> Finding | None:
    """Warn of previews that became all about equally bright, as those of medium brightness.

    Args:
        ratio: Standard deviation of the previews' mean luma divided by that of the data.
        count: Number of previews.
        largest: The largest such ratio before.
    """
    if largest is None or ratio >= largest / SPREAD_FALL:
        return None
    freedom = torch.tensor(count - 1.0, dtype=torch.float64)
    # (n - 1) s^2 / sigma^2 is distributed as chi-squared
    chance = torch.special.gammainc(freedom / 2, freedom * ratio**2 / 2)
    if chance >= SPREAD_CHANCE:
        return None
    return Finding(
        "luma_spread",
        f"the mean luma of previews spreads {ratio:.2g} times as far as that of the data, and "
        f"spread {largest:.2g} times as far: all are about equally bright.",
        "compare the previews: train the last timestep (model.loss, model.timestep_law), sample "
        "from it (model.sampling.spacing), or stop at the earlier checkpoint.",
    )


def distance_from(images: float, data: tuple[float, float]) -> float:
    """Return the distance of a mean over previews from the data's, in its standard deviations."""
    mean, std = data
    return abs(images - mean) / std if std > 0 else 0.0


# The verdict


def raised(
    causes: Sequence[Finding], symptoms: Sequence[Finding], ignore: Sequence[str]
) -> list[Finding]:
    """Return the findings that are warned of: causes; symptoms only where no cause is known."""
    causes = [finding for finding in causes if finding.name not in ignore]
    return causes or [finding for finding in symptoms if finding.name not in ignore]


def verdict(
    step: int, findings: Sequence[Finding], told: Mapping[str, int], facts: Sequence[str]
) -> str:
    """Return the line about a validation.

    Args:
        step: Number of optimizer steps.
        findings: What is warned of.
        told: Steps at which warnings were first raised, by name: those are not explained again.
        facts: What was measured, in short.
    """
    parts = [
        f"still {each.name}, see step {told[each.name]}."
        if each.name in told
        else f"{each.name}: {each.text} Way out: {each.way_out}"
        for each in findings
    ]
    measured = f" Measured: {'; '.join(facts)}." if facts else ""
    return f"watch, step {step}: {' '.join(parts) or 'no warning.'}{measured}"
