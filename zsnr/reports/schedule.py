"""A schedule and the timesteps it is sampled at: tables, and Figure 2."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import torch

from zsnr.files import new_file
from zsnr.reports.images import save_figure, stacked_axes
from zsnr.schedule import (
    BetaKind,
    NoiseSchedule,
    RectifiedFlow,
    Schedule,
    beta_ends,
    schedule_from_settings,
)
from zsnr.timesteps import available_spacings, get_timesteps

_ROWS = 11  # timesteps in the printed table


def find_schedule(target: str, *, open_pickle: bool = False) -> NoiseSchedule | RectifiedFlow:
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
        if diagnosis.verdict != "unreadable":
            raise ValueError(
                f"{target} does not declare a schedule on timesteps: {diagnosis.reason}."
            )
        known = ", ".join(get_args(BetaKind))
        raise ValueError(f"{diagnosis.reason} Known kinds: {known}.")
    return schedule_from_settings(diagnosis.facts["schedule"])


def schedule_facts(
    schedule: Schedule, num_steps: int = 10, spacings: Sequence[str] | None = None
) -> dict[str, Any]:
    """Collect the values of a schedule, of its counterpart, and of its grids of timesteps.

    Args:
        schedule: The schedule.
        num_steps: S, the length of the grids.
        spacings: Registered names. None = all of them.

    Returns:
        Plain values: settings; "original" and "rescaled", each with snr_T, sqrt_abar_T, log_snr
        (None where it is minus infinity) and sqrt_abar, lists over t, where a schedule that is not
        variance-preserving has alpha_T and alpha; and timesteps by spacing.

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


def both(schedule: Schedule) -> dict[str, Schedule]:
    """Return the schedule as it was published and rescaled to zero terminal SNR (section 3.1).

    Rectified flow ends at SNR 0 as published.
    """
    if not isinstance(schedule, NoiseSchedule):
        return {"original": schedule, "rescaled": schedule}
    return {
        "original": replace(schedule, zero_terminal_snr=False),
        "rescaled": replace(schedule, zero_terminal_snr=True),
    }


def schedule_text(schedule: Schedule, facts: dict[str, Any], name: str) -> str:
    """Write the facts as tables for a terminal; timesteps count from 0."""
    T, shown = schedule.num_timesteps, _curve_names(facts)
    curves, width = [facts[name] for name in shown], 12 * len(shown)
    scale = _scale(curves[0])
    end, heading = ("alpha_T", "alpha") if scale == "alpha" else ("sqrt(abar_T)", "sqrt(abar)")
    lines = [
        f"{name}: {schedule_title(schedule)}",
        "",
        f"{'':14}" + "".join(f"{name:>14}" for name in shown),
        f"{'SNR(T)':14}" + "".join(f"{curve['snr_T']:14.6g}" for curve in curves),
        f"{end:14}" + "".join(f"{curve[f'{scale}_T']:14.6f}" for curve in curves),
        "",
        f"{'':6}{'log SNR':^{width}}{heading:^{width}}",
        f"{'t':>6}" + "".join(f"{name:>12}" for name in shown) * 2,
    ]
    for t in sorted({round(i * (T - 1) / (_ROWS - 1)) for i in range(_ROWS)}):
        logs = (_number(curve["log_snr"][t]) for curve in curves)
        scales = (f"{curve[scale][t]:12.6f}" for curve in curves)
        lines.append(f"{t:6}" + "".join(logs) + "".join(scales))
    lines += ["", f"timesteps of {facts['num_steps']} sampling steps, in sampling order"]
    for spacing, grid in facts["timesteps"].items():
        listed = grid if len(grid) <= 12 else [*grid[:6], "...", *grid[-5:]]
        misses = "" if grid[0] == T - 1 else f"   (never sees t={T - 1})"
        lines.append(f"{spacing:10} {' '.join(map(str, listed))}{misses}")
    return "\n".join(line.rstrip() for line in lines)


def schedule_title(schedule: Schedule) -> str:
    """Describe a schedule in one line."""
    kind = "keeps signal at the end"
    if float(schedule.snr[-1]) == 0:
        kind = "ends at zero SNR"
        if isinstance(schedule, NoiseSchedule):
            kind = "rescaled to zero terminal SNR"
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
    names = _curve_names(facts)
    for name, style in zip(names, ("--", "-")[-len(names) :], strict=True):
        curve = facts[name]
        logs = [math.nan if value is None else value for value in curve["log_snr"]]
        label = f"SNR(T) = {curve['snr_T']:.3g}"
        if len(names) > 1:
            label = f"{name}, {label}"
        upper.plot(logs, style, label=label)
        middle.plot(curve[_scale(curve)], style, label=label)
    upper.set_ylabel("log SNR(t), natural log")
    upper.legend(fontsize=8)
    vp = _scale(facts["original"]) == "sqrt_abar"
    middle.set_ylabel("signal scale sqrt(abar_t)" if vp else "signal scale alpha_t")
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


def _curves(schedule: Schedule) -> dict[str, Any]:
    scale = "sqrt_abar" if isinstance(schedule, NoiseSchedule) else "alpha"
    alpha, _ = schedule(torch.arange(schedule.num_timesteps))
    return {
        "snr_T": float(schedule.snr[-1]),
        f"{scale}_T": float(alpha[-1]),
        "log_snr": [x if math.isfinite(x) else None for x in schedule.log_snr.tolist()],
        scale: alpha.tolist(),
    }


def _scale(curve: dict[str, Any]) -> str:
    return "sqrt_abar" if "sqrt_abar" in curve else "alpha"


def _curve_names(facts: dict[str, Any]) -> list[str]:
    """Name the curves that differ."""
    names = ["original", "rescaled"]
    return names[:1] if facts["original"] == facts["rescaled"] else names


def _describe(schedule: Schedule) -> str:
    if isinstance(schedule, RectifiedFlow):
        return f"rectified flow, shift {schedule.shift:g}"
    if not isinstance(schedule, NoiseSchedule):
        return f"a {type(schedule).__name__}"
    divided = "" if schedule.snr_shift == 1 else f", SNR divided by {schedule.snr_shift:g}"
    return f"{_betas(schedule)}{divided}"


def _betas(schedule: NoiseSchedule) -> str:
    if schedule.alphas_cumprod_table is not None:
        return "a custom table"
    if schedule.betas == "cosine":
        return "cosine"
    first, last = beta_ends(schedule)
    return f"{schedule.betas}, beta {first:.5g} to {last:.5g}"


def _number(value: float | None) -> str:
    return f"{'-inf':>12}" if value is None else f"{value:12.4f}"
