"""A verdict on a model and the facts it is based on, as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from zsnr.interop.scheduler_config import schedule_text
from zsnr.metrics.brightness import retained_fraction
from zsnr.prediction import PredictionType
from zsnr.schedule import Schedule, schedule_from_settings
from zsnr.untrusted import clipped, printable

Verdict = Literal["fixed", "flawed", "inconsistent", "unreadable", "unknown"]

TRAIN = (
    "fine-tune it from these weights with `zsnr fit`, whose schedule and prediction type are the "
    "paper's: no config setting repairs weights that were never trained on pure noise"
)
SCALE = 32  # signal-to-noise ratio of an image's mean, S of `retained_fraction`


@dataclass(frozen=True)
class Diagnosis:
    """The doctor's result for one target.

    Args:
        target: The path that was examined.
        kind: Kind of the target, such as "diffusers folder".
        verdict: fixed: SNR_T is 0, v, flow or sample prediction, and sampling starts at T. flawed:
            the schedule keeps signal at T. inconsistent: zero SNR with epsilon prediction, a
            spacing that misses T, or a scheduler class that drops the rescale. unreadable: the
            target cannot be read. unknown: it does not declare enough for a verdict.
        reason: Reason for the verdict, in one line.
        facts: Known facts, as plain values.
        warnings: Further problems.
        changes: Recommended changes.
    """

    target: str
    kind: str
    verdict: Verdict
    reason: str
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 fixed, 1 flawed, 2 inconsistent, 3 unreadable or unknown."""
        return min(3, get_args(Verdict).index(self.verdict))

    def to_json(self) -> str:
        """Return the diagnosis as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    def to_text(self) -> str:
        """Return the diagnosis as aligned lines, starting with the verdict."""
        rows = [
            (self.verdict, self.reason),
            ("", ""),
            ("target", f"{clipped(self.target, 300)} ({self.kind})"),
            *_rows(self.facts),
        ]
        width = max(len(name) for name, _ in rows) + 2
        lines = [f"{name:{width}}{text}".rstrip() for name, text in rows]
        for title, texts in (("warnings", self.warnings), ("what to change", self.changes)):
            if texts:
                lines += ["", title, *(f"  - {text}" for text in texts)]
        return printable("\n".join(lines))


def judge(
    schedule: Schedule,
    prediction_type: PredictionType,
    starts: Mapping[int, float],
    lacking: str | None,
) -> tuple[Verdict, str]:
    """Judge the declared settings.

    Args:
        schedule: The schedule that sampling uses.
        prediction_type: What the network predicts.
        starts: The first timestep by step count.
        lacking: Another contradiction to the schedule, if there is one.

    Returns:
        The verdict and the reason for it, in one line.
    """
    T = schedule.num_timesteps
    if lacking is not None:
        return "inconsistent", lacking
    if float(schedule.snr[-1]) != 0:
        return "flawed", signal(schedule)
    if prediction_type == "epsilon":
        return "inconsistent", "zero SNR with epsilon prediction: eps has no x_0 at T"
    if missed := late(starts, T):
        return "inconsistent", f"zero SNR, but sampling does not start at T: {missed}"
    return "fixed", f"SNR_T = 0, {prediction_type}, and sampling starts at T"


def late(starts: Mapping[int, float], num_timesteps: int) -> str:
    """Describe where grids start that miss T; "" if none does."""
    missed = [f"t = {t:g} for S = {S}" for S, t in starts.items() if t != num_timesteps - 1]
    return ", ".join(missed[:5])


def signal(schedule: Schedule) -> str:
    """Describe how much signal is left at T."""
    return f"the schedule keeps signal at T: sqrt(abar_T) = {_sqrt_abar(schedule):.6g}"


def schedule_facts(schedule: Schedule) -> dict[str, Any]:
    """Return the relevant facts of a schedule; "schedule" holds its settings."""
    return {"schedule": schedule.settings(), **level_facts(float(schedule.snr[-1]))}


def level_facts(snr_T: float) -> dict[str, Any]:
    """Return what follows from the SNR at which sampling starts."""
    return {
        "snr_T": snr_T,
        "sqrt_abar_T": math.sqrt(snr_T / (1 + snr_T)),
        "kept_brightness": {"scale": SCALE, "fraction": retained_fraction(snr_T, SCALE)},
    }


def _sqrt_abar(schedule: Schedule) -> float:
    return float(level_facts(float(schedule.snr[-1]))["sqrt_abar_T"])


def _rows(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Yield facts as short texts."""
    for key, value in facts.items():
        name = key.replace("_", " ")
        match key:
            case "schedule":
                yield name, schedule_text(schedule_from_settings(value))
            case "snr_T" | "sqrt_abar_T":
                yield {"snr_T": "SNR_T", "sqrt_abar_T": "sqrt(abar_T)"}[key], f"{value:.6g}"
            case "kept_brightness":
                yield "brightness", _brightness_text(value["fraction"])
            case "first_timestep":
                yield "starts at", _starts_text(value)
            case "off_grid_steps":
                continue
            case "guidance_rescale" if value is None:
                yield name, "cannot be stored there: pass guidance_rescale=0.7 with each call"
            case "marks":
                yield (
                    name,
                    ", ".join(f"{k} {'present' if v else 'missing'}" for k, v in value.items()),
                )
            case "prediction_type" if value is None:
                yield name, "not declared"
            case "metadata" | "defaults_taken" if not value:
                continue
            case "metadata":
                yield name, ", ".join(f"{key}={text}" for key, text in value.items())
            case "defaults_taken":
                yield "not in the file", ", ".join(value) + " (the class's defaults)"
            case "terminal_loss_weight":
                weighting = facts["loss_weighting"]
                yield (
                    "loss",
                    f"{weighting!r}; the last timestep has {value:.3g} times the mean weight",
                )
            case "timestep_law":
                visits = facts["terminal_visits"]
                yield (
                    name,
                    f"{value!r}; visits the last timestep {visits:.3g} times as often as uniform",
                )
            case "terminal_visits":
                continue
            case "loss_weight_t900":
                yield "loss at t >= 900", f"{100 * value:.2g} % of the weight (uniform: 10 %)"
            case "loss_weighting":
                continue
            case _:
                yield name, f"{value:g}" if isinstance(value, float) else clipped(str(value), 200)


def _brightness_text(fraction: float) -> str:
    """Say how much of the brightness of the training images samples can reach."""
    if fraction == 1:
        return "samples can span the whole range of the training images"
    return (
        f"samples can span about {100 * fraction:.1f} % of the range of the training images "
        f"(estimated for latents whose mean has a signal-to-noise ratio of {SCALE})"
    )


def _starts_text(starts: Mapping[int, float]) -> str:
    """Group step counts by their first timestep."""
    by_start: dict[float, list[str]] = {}
    for S, t in starts.items():
        by_start.setdefault(t, []).append(str(S))
    return "; ".join(f"t = {t:g} for S = {', '.join(S)}" for t, S in by_start.items())
