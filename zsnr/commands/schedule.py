"""`zsnr schedule`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsnr.commands.options import path_or_none
from zsnr.commands.result import Result


def schedule(
    target: str = "scaled_linear",
    *,
    num_steps: int = 10,
    spacing: Sequence[str] = (),
    plot: str | Path | None = None,
    open: bool = False,
) -> Result:
    """Print a noise schedule and its timesteps, and plot them.

    The schedule is printed as it was published and rescaled to zero terminal SNR, with the
    timesteps of each spacing (Table 2 of the paper). --plot draws log SNR and sqrt(abar)
    (Figure 2).

    Args:
        target: scaled_linear (the schedule of Stable Diffusion), linear, cosine, or what `zsnr
            doctor` reads: a folder, scheduler_config.json, .safetensors file, checkpoint or YAML.
        num_steps: Number of sampling steps that the timesteps are for.
        spacing: Print only this spacing. May be repeated.
        plot: New .png file for the plot.
        open: Open a .ckpt that has no run.json beside it; only tensors and plain values are read.
    """
    from zsnr.files import check_new
    from zsnr.reports.schedule import find_schedule, plot_schedule, schedule_facts, schedule_text

    path = path_or_none(plot)
    if path is not None:
        if path.suffix != ".png":
            raise ValueError(f"--plot {path}: wanted a name that ends in .png.")
        check_new(path)
    examined = find_schedule(target, open_pickle=open)
    facts = schedule_facts(examined, num_steps, list(spacing) or None)
    if path is not None:
        plot_schedule(facts, path)
    return Result(facts, schedule_text(examined, facts, target))
