"""Recommended sampler and spacing for a number of steps, based on measurements."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

from zsnr.guidance import Guidance
from zsnr.samplers.multiscale import Multiscale
from zsnr.timesteps import is_grid_file, read_grid

_SamplerT = TypeVar("_SamplerT")

AUTO = "auto"
PAPER = ("ddim", "trailing")
MANY_STEPS = 50


def recommend_sampling(num_steps: int, guidance: Guidance | float | None = None) -> tuple[str, str]:
    """Choose a sampler and a spacing for a number of steps and a guidance scale.

    | steps | w up to 1 | w above 1 | w above 4 and rescale below 0.35 |
    |---|---|---|---|
    | 50 and more | ddim, trailing: the paper's | the same | the same |
    | 10 to 49 | multiscale, log_snr | multiscale, guided | the same |
    | 6 to 9 | multiscale, log_snr | multiscale, guided | ddim, guided |
    | up to 5 | multiscale, log_snr | multiscale, guided | ddim, trailing |

    CFG++ requires first-order steps: ddim, guided below 50 steps. The measurements behind each row,
    for every sampler and spacing that was tested, are in benchmarks/results: guided.md,
    fidelity.md.

    Args:
        num_steps: S, at least 1.
        guidance: The guidance, or its scale w with the paper's rescale. None = no guidance.

    Returns:
        Names for `get_sampler` and `get_timesteps`.

    Raises:
        ValueError: num_steps is not a positive int, or the scale is not a finite number.
    """
    _check_num_steps(num_steps)
    if isinstance(guidance, Guidance):
        w = max(guidance.scales)
    else:
        w = 1.0 if guidance is None else guidance
    if isinstance(w, bool) or not isinstance(w, (int, float)) or not math.isfinite(w):
        raise ValueError(f"guidance={w!r}: wanted a Guidance, or its scale as a finite number.")
    if num_steps >= MANY_STEPS:
        return PAPER
    if isinstance(guidance, Guidance) and guidance.method == "cfg_pp":
        return "ddim", "guided"
    if w <= 1:
        return "multiscale", "log_snr"
    plain = isinstance(guidance, Guidance) and guidance.rescale < 0.35
    if plain and w > 4 and num_steps < 10:
        return "ddim", "trailing" if num_steps < 6 else "guided"
    return "multiscale", "guided"


def resolve_sampling(
    sampler: _SamplerT | str,
    spacing: str,
    num_steps: int,
    guidance: Guidance | float | None = None,
) -> tuple[_SamplerT | str, str]:
    """Replace "auto" by a sampler and a spacing.

    | sampler | spacing | result |
    |---|---|---|
    | auto | auto | `recommend_sampling` of the number of steps and the guidance scale |
    | auto | a grid file | the sampler that the file was made for, ddim if it names none |
    | auto | a name | ddim, the paper's |
    | multiscale | auto | guided, or log_snr if the scale is at most 1 |
    | another | auto | trailing, the paper's |

    Args:
        sampler: "auto", or a sampler, its name or the path of its class, which is returned
            unchanged.
        spacing: "auto", a registered timestep spacing, or the path of a grid file.
        num_steps: S.
        guidance: The guidance, or its scale w. None = no guidance.

    Raises:
        ValueError: num_steps is not a positive int, spacing is not a string, or the file holds no
            grid.
        OSError: The file cannot be read.
    """
    _check_num_steps(num_steps)
    if not isinstance(spacing, str):
        raise ValueError(f"spacing={spacing!r}: wanted a name, the path of a grid, or 'auto'.")
    if spacing == AUTO:
        if sampler == AUTO:
            return recommend_sampling(num_steps, guidance)
        name = sampler.rpartition(".")[2].lower() if isinstance(sampler, str) else ""
        if name == "multiscale" or isinstance(sampler, Multiscale):
            return sampler, recommend_sampling(MANY_STEPS - 1, guidance)[1]
        return sampler, PAPER[1]
    if sampler == AUTO:
        made_for = read_grid(Path(spacing)).sampler if is_grid_file(spacing) else None
        return made_for or PAPER[0], spacing
    return sampler, spacing


def _check_num_steps(num_steps: int) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}: wanted an int of at least 1.")
