"""DPM-Solver++ 2M and 3M (Lu et al., arXiv:2211.01095), for zero SNR; 2M also stochastic."""

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
from zsnr.schedule import Schedule


def dpmpp_2m_coefficients(
    schedule: Schedule, grid: Sequence[int], eta: float = 0.0
) -> list[MultistepCoefficients]:
    """Compute the steps of DPM-Solver++ 2M in x_0 form.

    With l = log(alpha / sigma), h = l_s - l_t and h' that of the previous step,

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


def dpmpp_3m_coefficients(
    schedule: Schedule, grid: Sequence[int], refined: bool = False
) -> list[MultistepCoefficients]:
    """Compute the steps of DPM-Solver++ 3M in x_0 form.

    With l = log(alpha / sigma), h = l_s - l_t, h' and h'' those of the two previous steps, and
    (a, b) of the shared transition,

    x_s = a x_0 + alpha_s (p_2 D_1 - p_3 D_2) + b x_t
    p_2 = (e^-h - 1) / h + 1,  p_3 = p_2 / h - 1/2
    D_1 = d + (d - d') h' / (h' + h''),  D_2 = (d - d') h / (h' + h'')
    d = (x_0 - x_0') h / h',  d' = (x_0' - x_0'') h / h''

    D_2 is half of h^2 times the second derivative of x_0, while p_3 is the coefficient of all of
    it. As published, the order of convergence is therefore 2; with 2 D_2 it is 3, and the solver is
    the exponential Adams-Bashforth method, RES 3M (Zhang et al., arXiv:2308.02157).

    Without x_0'', d' = d. At SNR 0 l is minus infinity, so that differences to the prediction there
    vanish. The steps from SNR 0 and to clean data are first order, as in `dpmpp_2m_coefficients`.

    Args:
        schedule: The noise schedule.
        grid: Timesteps, descending.
        refined: Whether to use 2 D_2.
    """
    h = log_snr_steps(schedule, grid)
    steps = []
    for i, (a, b, _) in enumerate(transition_coefficients(schedule, grid, 0.0)):
        if i == 0 or not (math.isfinite(h[i]) and math.isfinite(h[i - 1])):
            steps.append(MultistepCoefficients((a,), b))
            continue
        alpha_s = schedule(grid[i + 1])[0]
        p_2 = math.expm1(-h[i]) / h[i] + 1
        p_3 = (p_2 / h[i] - 0.5) * (2 if refined else 1)
        bend = 0.0  # of d - d'
        if i > 1 and math.isfinite(h[i - 2]):
            bend = (p_2 * h[i - 1] - p_3 * h[i]) / (h[i - 1] + h[i - 2])
        u_1 = alpha_s * (p_2 + bend) * h[i] / h[i - 1]  # of x_0 - x_0'
        u_2 = alpha_s * bend * h[i] / h[i - 2] if bend else 0.0  # of x_0'' - x_0'
        weights = (a + u_1, -u_1 - u_2, u_2) if bend else (a + u_1, -u_1)
        steps.append(MultistepCoefficients(weights, b))
    return steps


@register_sampler("dpmpp_2m")
@dataclass(frozen=True)
class DPMpp2M(Sampler):
    """DPM-Solver++ 2M: second order in log SNR from the last two predictions.

    See `dpmpp_2m_coefficients`.
    """

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
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
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        steps = dpmpp_2m_coefficients(schedule, grid, eta=1.0)
        return step_calls(grid, steps)


@register_sampler("dpmpp_3m")
@dataclass(frozen=True)
class DPMpp3M(Sampler):
    """DPM-Solver++ 3M: from the last three predictions, in log SNR.

    See `dpmpp_3m_coefficients`.

    Args:
        refined: Whether to use the weight of the second difference that gives third order, as in
            RES 3M, instead of the published one.
    """

    refined: bool = False

    def __post_init__(self) -> None:
        if type(self.refined) is not bool:
            raise ValueError(f"refined={self.refined!r}: wanted true or false.")

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        return step_calls(grid, dpmpp_3m_coefficients(schedule, grid, self.refined))
