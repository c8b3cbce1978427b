"""UniPC, a predictor and a corrector in one network call (Zhao et al., arXiv:2302.04867)."""

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
from zsnr.samplers.dpmpp import dpmpp_2m_coefficients
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import NoiseSchedule


def unic_coefficients(
    schedule: NoiseSchedule, grid: Sequence[int]
) -> list[MultistepCoefficients | None]:
    """Compute the correctors of UniPC's second order, with B(h) = e^h - 1 ("bh2").

    Once the network was asked at s, the step that led there is taken anew, with the new prediction
    x_0^s beside x_0 and the one before, x_0':

    x_s = a (x_0 + r_0 (x_0 - x_0') h / h' + r_1 (x_0^s - x_0)) + b x_t

    With e = e^-h - 1 and p = -e / h - 1, r solves r_0 + r_1 = p / e and
    r_1 - (h' / h) r_0 = -(2 p / h + 1) / e.
    Where there is no x_0', r_1 = 1/2 alone.

    Returns:
        One a step, newest prediction first. None = nothing to correct: the step from SNR 0 is
        exact, and at clean data the network is not asked.
    """
    h = log_snr_steps(schedule, grid)
    found: list[MultistepCoefficients | None] = []
    for i, (a, b, _) in enumerate(transition_coefficients(schedule, grid, 0.0)):
        if not math.isfinite(h[i]):
            found.append(None)
        elif i == 0 or not math.isfinite(h[i - 1]):
            found.append(MultistepCoefficients((a / 2, a / 2), b))
        else:
            ratio, e = h[i - 1] / h[i], math.expm1(-h[i])
            p = -e / h[i] - 1
            b_1, b_2 = p / e, (-2 * p / h[i] - 1) / e
            r_0 = (b_1 - b_2) / (1 + ratio)
            r_1 = b_1 - r_0
            found.append(
                MultistepCoefficients((a * r_1, a * (1 - r_1 + r_0 / ratio), -a * r_0 / ratio), b)
            )
    return found


@register_sampler("unipc")
@dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC of second order in x_0, with B(h) = e^h - 1.

    The predictor is DPM-Solver++ 2M's step; see `unic_coefficients` for the corrector, which costs
    no network call. What the callback sees as x_s is predicted, not corrected yet.
    """

    def calls(
        self, schedule: NoiseSchedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        predictors = dpmpp_2m_coefficients(schedule, grid)
        correctors = [None, *unic_coefficients(schedule, grid)[:-1]]  # of the step that led to t
        return [
            call._replace(correct=correct)
            for call, correct in zip(step_calls(grid, predictors), correctors, strict=True)
        ]
