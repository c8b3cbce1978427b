"""A verdict on a model and the facts it rests on, in words and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from zsnr.prediction import PredictionType
from zsnr.schedule import NoiseSchedule
from zsnr.untrusted import clipped, printable

Verdict = Literal["fixed", "flawed", "inconsistent", "unreadable"]

SCALE = 32  # of an image's mean, sqrt(h w L): see `kept_brightness`


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says of one target.

    Args:
        target: What was asked about.
        kind: What it is, such as "diffusers folder".
        verdict: fixed: SNR_T is 0, v or sample prediction, and sampling starts at T. flawed: the
            schedule keeps signal at T. inconsistent: zero SNR with epsilon prediction, a spacing
            that misses T, or a scheduler class that drops the rescale. unreadable: none of these
            can be told.
        reason: Why, in one line.
        facts: Plain values, those that are known.
        warnings: What goes wrong nevertheless.
        changes: What to change.
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
        """0 fixed, 1 flawed, 2 inconsistent, 3 unreadable."""
        return get_args(Verdict).index(self.verdict)

    def to_json(self) -> str:
        """Return it as one JSON object."""
        return json.dumps(asdict(self), indent=1)

    def to_text(self) -> str:
        """Return it as aligned lines, the verdict first."""
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
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    starts: Mapping[int, float],
    lacking: str | None,
) -> tuple[Verdict, str]:
    """Judge what is declared.

    Args:
        schedule: The schedule that sampling uses.
        prediction_type: What the network predicts.
        starts: The first timestep by step count.
        lacking: What contradicts the schedule otherwise, if anything does.

    Returns:
        The verdict and why, in one line.
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
    """Say where grids start that miss T; "" if none does."""
    some = [f"t = {t:g} for S = {S}" for S, t in starts.items() if t != num_timesteps - 1]
    return ", ".join(some[:5])


def signal(schedule: NoiseSchedule) -> str:
    """Say how much signal is left at T."""
    abar_T = float(schedule.alphas_cumprod[-1])
    return f"the schedule keeps signal at T: sqrt(abar_T) = {math.sqrt(abar_T):.6g}"


def schedule_facts(schedule: NoiseSchedule) -> dict[str, Any]:
    """Return what matters of a schedule; "schedule" holds its settings."""
    abar_T = float(schedule.alphas_cumprod[-1])
    return {
        "schedule": schedule.settings(),
        "snr_T": float(schedule.snr[-1]),
        "sqrt_abar_T": math.sqrt(abar_T),
        "kept_brightness": {"scale": SCALE, "fraction": kept_brightness(abar_T)},
    }


def kept_brightness(abar_T: float, scale: float = SCALE) -> float:
    """Compute which fraction of the range of brightness survives pure noise at T.

    1 / sqrt(abar_T S^2 + 1 - abar_T)

    Args:
        abar_T: The schedule's last abar_t.
        scale: S = sqrt(h w L), L the variance of the mean of an image's strongest channel mix.
    """
    return 1 / math.sqrt(abar_T * scale**2 + 1 - abar_T)


def _rows(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Write facts as short texts."""
    for key, value in facts.items():
        name = key.replace("_", " ")
        match key:
            case "schedule":
                yield name, _schedule_text(value)
            case "snr_T" | "sqrt_abar_T":
                yield {"snr_T": "SNR_T", "sqrt_abar_T": "sqrt(abar_T)"}[key], f"{value:.6g}"
            case "kept_brightness":
                part = "all" if value["fraction"] == 1 else f"{value['fraction']:.3g}"
                yield "brightness kept", f"{part} of its range (of scale {SCALE}, assumed)"
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
            case "metadata" | "defaults_taken" if not value:
                continue
            case "metadata":
                yield name, ", ".join(f"{key}={text}" for key, text in value.items())
            case "defaults_taken":
                yield "not in the file", ", ".join(value) + " (the class's defaults)"
            case "terminal_loss_weight":
                yield "weight at T", f"{value:.3g} of the mean, by {facts['loss_weighting']!r}"
            case "loss_weighting":
                continue
            case _:
                yield name, f"{value:g}" if isinstance(value, float) else clipped(str(value), 200)


def _schedule_text(settings: Mapping[str, Any]) -> str:
    T, zero = settings["num_timesteps"], settings["zero_terminal_snr"]
    if settings["alphas_cumprod_table"] is not None:
        name = "own table"
    else:
        ends = (settings["beta_start"], settings["beta_end"])
        name = settings["betas"]
        name += f" {ends[0]:g} to {ends[1]:g}" if None not in ends else ""
    return f"{name}, T = {T}" + (", made to end at SNR 0" if zero else "")


def _starts_text(starts: Mapping[int, float]) -> str:
    """Group step counts by where they start."""
    by_start: dict[float, list[str]] = {}
    for S, t in starts.items():
        by_start.setdefault(t, []).append(str(S))
    return "; ".join(f"t = {t:g} for S = {', '.join(S)}" for t, S in by_start.items())
