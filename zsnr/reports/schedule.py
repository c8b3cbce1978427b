"""A schedule and the timesteps it is sampled at: tables, and Figure 2."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from zsnr.files import new_file
from zsnr.reports.images import save_figure, stacked_axes
from zsnr.schedule import BetaKind, NoiseSchedule
from zsnr.timesteps import available_spacings, get_timesteps

_ROWS = 11  # timesteps in the printed table


def find_schedule(target: str, *, open_pickle: bool = False) -> NoiseSchedule:
    """Find a schedule by its kind, or in what `zsnr doctor` reads.

    Args:
        target: A kind such as "scaled_linear", or a file, folder or hub id.
        open_pickle: Open a checkpoint that has no run.json, tensors and plain values only.

    Raises:
        ValueError: The target is neither, or declares no schedule.
    """
    if target in get_args(BetaKind):
        return NoiseSchedule(cast(BetaKind, target))
    from zsnr.doctor.examine import examine

    diagnosis = examine(target, open_pickle=open_pickle)
    if "schedule" not in diagnosis.facts:
        known = ", ".join(get_args(BetaKind))
        raise ValueError(f"{diagnosis.reason} Known kinds: {known}.")
    return NoiseSchedule.from_settings(diagnosis.facts["schedule"])


def schedule_facts(
    schedule: NoiseSchedule, num_steps: int = 10, spacings: Sequence[str] | None = None
) -> dict[str, Any]:
    """Collect the values of a schedule, of its counterpart, and of its grids of timesteps.

    Args:
        schedule: The schedule.
        num_steps: S, the length of the grids.
        spacings: Registered names. None = all of them.

    Returns:
        Plain values: settings; "original" and "rescaled", each with snr_T, sqrt_abar_T, log_snr
        (None where it is minus infinity) and sqrt_abar, lists over t; and timesteps by spacing.

    Raises:
        ValueError: A spacing is unknown, or S is out of range.
    """
    T = schedule.num_timesteps
    grids = {
        name: get_timesteps(name, num_steps, T, schedule=schedule).tolist()
        for name in (available_spacings() if spacings is None else spacings)
    }
    return {
        "schedule": schedule.settings(),
        **{name: _curves(curve) for name, curve in both(schedule).items()},
        "num_steps": num_steps,
        "timesteps": grids,
    }


def both(schedule: NoiseSchedule) -> dict[str, NoiseSchedule]:
    """Return the schedule as it was published and rescaled to zero terminal SNR (section 3.1)."""
    return {
        "original": replace(schedule, zero_terminal_snr=False),
        "rescaled": replace(schedule, zero_terminal_snr=True),
    }


def schedule_text(schedule: NoiseSchedule, facts: dict[str, Any], name: str) -> str:
    """Write the facts as tables for a terminal; timesteps count from 0."""
    T = schedule.num_timesteps
    original, rescaled = facts["original"], facts["rescaled"]
    lines = [
        f"{name}: {schedule_title(schedule)}",
        "",
        f"{'':14}{'original':>14}{'rescaled':>14}",
        f"{'SNR(T)':14}{original['snr_T']:14.6g}{rescaled['snr_T']:14.6g}",
        f"{'sqrt(abar_T)':14}{original['sqrt_abar_T']:14.6f}{rescaled['sqrt_abar_T']:14.6f}",
        "",
        f"{'':6}{'log SNR':^24}{'sqrt(abar)':^24}",
        f"{'t':>6}" + f"{'original':>12}{'rescaled':>12}" * 2,
    ]
    for t in sorted({round(i * (T - 1) / (_ROWS - 1)) for i in range(_ROWS)}):
        logs = (_number(curve["log_snr"][t]) for curve in (original, rescaled))
        scales = (f"{curve['sqrt_abar'][t]:12.6f}" for curve in (original, rescaled))
        lines.append(f"{t:6}" + "".join(logs) + "".join(scales))
    lines += ["", f"timesteps of {facts['num_steps']} sampling steps, in sampling order"]
    for spacing, grid in facts["timesteps"].items():
        shown = grid if len(grid) <= 12 else [*grid[:6], "...", *grid[-5:]]
        misses = "" if grid[0] == T - 1 else f"   (never sees t={T - 1})"
        lines.append(f"{spacing:10} {' '.join(map(str, shown))}{misses}")
    return "\n".join(lines)


def schedule_title(schedule: NoiseSchedule) -> str:
    """Describe a schedule in one line."""
    kind = "rescaled to zero terminal SNR" if schedule.snr[-1] == 0 else "keeps signal at the end"
    return f"{_describe(schedule)}, {schedule.num_timesteps} timesteps, {kind}"


def plot_schedule(facts: dict[str, Any], path: Path) -> None:
    """Draw log SNR(t) and sqrt(abar_t), original and rescaled (Figure 2), and the grids.

    Args:
        facts: Of `schedule_facts`.
        path: The PNG to write.

    Raises:
        ValueError: A file of that name exists.
        OSError: The file cannot be written.
    """
    figure = schedule_figure(facts)
    with new_file(path) as beside:
        save_figure(figure, beside)


def schedule_figure(facts: dict[str, Any], width: float = 7, height: float = 8) -> Any:
    """Draw that figure.

    Args:
        facts: Of `schedule_facts`.
        width: In inches.
        height: In inches.
    """
    figure, (upper, middle, lower) = stacked_axes(width, height, rows=3)
    for name, style in (("original", "--"), ("rescaled", "-")):
        curve = facts[name]
        logs = [math.nan if value is None else value for value in curve["log_snr"]]
        label = f"{name}, SNR(T) = {curve['snr_T']:.3g}"
        upper.plot(logs, style, label=label)
        middle.plot(curve["sqrt_abar"], style, label=label)
    upper.set_ylabel("log SNR(t), natural log")
    upper.legend(fontsize=8)
    middle.set_ylabel("signal scale sqrt(abar_t)")
    spacings = list(facts["timesteps"])
    for row, grid in enumerate(facts["timesteps"].values()):
        lower.plot(grid, [row] * len(grid), "|", markersize=14)
    lower.set_yticks(range(len(spacings)), spacings)
    lower.set_ylim(-0.6, len(spacings) - 0.4)
    lower.invert_yaxis()
    lower.set_title(f"timesteps of {facts['num_steps']} sampling steps, by spacing", fontsize=9)
    lower.set_xlabel("timestep t, from clean data (left) to noise (right)")
    return figure


def to_json(facts: dict[str, Any]) -> str:
    """Write the facts as strict JSON."""
    return json.dumps(facts, allow_nan=False)


def _curves(schedule: NoiseSchedule) -> dict[str, Any]:
    return {
        "snr_T": float(schedule.snr[-1]),
        "sqrt_abar_T": float(schedule.alphas_cumprod[-1].sqrt()),
        "log_snr": [x if math.isfinite(x) else None for x in schedule.log_snr.tolist()],
        "sqrt_abar": schedule.alphas_cumprod.sqrt().tolist(),
    }


def _describe(schedule: NoiseSchedule) -> str:
    if schedule.alphas_cumprod_table is not None:
        return "a custom table"
    if schedule.betas == "cosine":
        return "cosine"
    plain = replace(schedule, zero_terminal_snr=False).beta_table
    return f"{schedule.betas}, beta {plain[0]:.5g} to {plain[-1]:.5g}"


def _number(value: float | None) -> str:
    return f"{'-inf':>12}" if value is None else f"{value:12.4f}"
