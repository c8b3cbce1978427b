"""DPM-Solver++ 2M, deterministic and stochastic (Lu et al., arXiv:2211.01095), from zero SNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zsnr.guidance import Guidance
from zsnr.samplers.base import (
    Call,
    MultistepCoefficients,
    Sampler,
    log_snr_steps,
    step_calls,
    transition_coefficients,
)
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import NoiseSchedule


def dpmpp_2m_coefficients(
    schedule: NoiseSchedule, grid: Sequence[int], eta: float = 0.0
) -> list[MultistepCoefficients]:
    """Compute the steps of DPM-Solver++ 2M in x_0 form.

    With l = log(alpha / sigma), h = l_s - l_t and h' that of the step before,

    x_s = a ((1 + h / 2h') x_0 - h / 2h' x_0') + b x_t + c z

    where (a, b, c) are the shared transition's. At SNR 0 l is minus infinity: the step from there
    is first order, which is exact since x_0 does not depend on x_t there, and so is the next,
    because h' is infinite. The step to clean data is first order too, as published.

    Args:
        schedule: The noise schedule.
        grid: Timesteps, descending.
        eta: 0 = the deterministic solver, 1 = the stochastic one.
    """
    h = log_snr_steps(schedule, grid)
    steps = []
    for i, (a, b, c) in enumerate(transition_coefficients(schedule, grid, eta)):
        w = h[i] / (2 * h[i - 1]) if i > 0 and math.isfinite(h[i]) else 0.0
        steps.append(MultistepCoefficients((a * (1 + w), -a * w) if w else (a,), b, c))
    return steps


@register_sampler("dpmpp_2m")
@dataclass(frozen=True)
class DPMpp2M(Sampler):
    """DPM-Solver++ 2M: second order in log SNR from the last two predictions.

    See `dpmpp_2m_coefficients`.
    """

    def calls(
        self, schedule: NoiseSchedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        steps = dpmpp_2m_coefficients(schedule, grid)
        return step_calls(grid, steps)


@register_sampler("dpmpp_2m_sde")
@dataclass(frozen=True)
class DPMpp2MSDE(Sampler):
    """SDE-DPM-Solver++ 2M: DDPM's noise, second order in x_0.

    See `dpmpp_2m_coefficients`, with eta = 1.
    """

    def calls(
        self, schedule: NoiseSchedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        steps = dpmpp_2m_coefficients(schedule, grid, eta=1.0)
        return step_calls(grid, steps)
