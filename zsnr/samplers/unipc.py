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
from zsnr.schedule import Schedule


def unip_coefficients(
    schedule: Schedule, grid: Sequence[int], order: int = 2
) -> list[MultistepCoefficients]:
    """Compute the predictors of UniPC, with B(h) = e^h - 1 ("bh2").

    With l = log(alpha / sigma), h = l_s - l_t, and r_i = (l_i - l_t) / h of earlier predictions
    x_0^(i), i = 1 .. p - 1,

    x_s = a (x_0 + sum_i w_i (x_0^(i) - x_0) / r_i) + b x_t

    where (a, b) are the shared transition's and w solves sum_i w_i r_i^(n-1) = b_n for n = 1 to
    p - 1, see `_conditions`. Order p = 2 has w_1 = 1/2 as published, which is DPM-Solver++ 2M's
    step.

    The order increases from one, ends with 2 and 1 as published, and predictions at SNR 0, where l
    is minus infinity, are not used.
    """
    h = log_snr_steps(schedule, grid)
    steps = dpmpp_2m_coefficients(schedule, grid)
    for i, (a, b, _) in enumerate(transition_coefficients(schedule, grid, 0.0)):
        r = _earlier(h, i, order)
        if len(r) > 1:
            w = _solve(r, _conditions(h[i], len(r)))
            slopes = [w_i / r_i for w_i, r_i in zip(w, r, strict=True)]
            newest = a * (1 - math.fsum(slopes))
            steps[i] = MultistepCoefficients((newest, *(a * slope for slope in slopes)), b)
    return steps


def unic_coefficients(
    schedule: Schedule, grid: Sequence[int], order: int = 2
) -> list[MultistepCoefficients | None]:
    """Compute the correctors of UniPC, with B(h) = e^h - 1 ("bh2").

    After the network is evaluated at s, the step to s is repeated, including the new prediction
    x_0^s:

    x_s = a (x_0 + sum_i w_i (x_0^(i) - x_0) / r_i + w_s (x_0^s - x_0)) + b x_t

    in the notation of `unip_coefficients`, with r_s = 1 among the r and one additional condition.
    Without an earlier prediction, w_s = 1/2.

    Returns:
        Coefficients of each step, newest prediction first. None = no correction: the step from
        SNR 0 is exact, and the network is not evaluated at clean data.
    """
    h = log_snr_steps(schedule, grid)
    correctors: list[MultistepCoefficients | None] = []
    for i, (a, b, _) in enumerate(transition_coefficients(schedule, grid, 0.0)):
        r = _earlier(h, i, order)
        if not math.isfinite(h[i]):
            correctors.append(None)
        elif not r:
            correctors.append(MultistepCoefficients((a / 2, a / 2), b))
        else:
            w_s, *w = _solve([1.0, *r], _conditions(h[i], len(r) + 1))
            first = 1 - w_s
            for w_i, r_i in zip(w, r, strict=True):
                first -= w_i / r_i
            earlier = (a * w_i / r_i for w_i, r_i in zip(w, r, strict=True))
            correctors.append(MultistepCoefficients((a * w_s, a * first, *earlier), b))
    return correctors


def _earlier(h: Sequence[float], i: int, order: int) -> list[float]:
    """Compute r of the earlier predictions that step i uses, newest first."""
    r: list[float] = []
    back = 0.0
    for j in range(1, min(order, i + 1, len(h) - i)):
        back += h[i - j]
        if not math.isfinite(back):
            break
        r.append(-back / h[i])
    return r


def _conditions(h: float, count: int) -> list[float]:
    """Compute b_n = n! f_n / (e^-h - 1), with f_0 = e^-h - 1 and f_n = -f_(n-1) / h - 1 / n!."""
    e = f = math.expm1(-h)
    b, factorial = [], 1
    for n in range(1, count + 1):
        factorial *= n
        f = -f / h - 1 / factorial
        b.append(f * factorial / e)
    return b


def _solve(r: Sequence[float], b: Sequence[float]) -> list[float]:
    """Solve sum_i w_i r_i^(n-1) = b_n for w, by Björck and Pereyra's elimination."""
    w, size = list(b), len(b)
    for k in range(size - 1):
        for i in range(size - 1, k, -1):
            w[i] -= r[k] * w[i - 1]
    for k in range(size - 2, -1, -1):
        for i in range(k + 1, size):
            w[i] /= r[i] - r[i - k - 1]
        for i in range(k, size - 1):
            w[i] -= w[i + 1]
    return w


@register_sampler("unipc")
@dataclass(frozen=True)
class UniPC(Sampler):
    """UniPC in x_0, with B(h) = e^h - 1.

    A predictor, see `unip_coefficients`, and a corrector that needs no additional network call, see
    `unic_coefficients`, and gains one order of convergence. The x_s that is passed to the callback
    is not corrected yet.

    Args:
        order: Number of predictions the predictor uses, 2 or 3.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (2, 3):
            raise ValueError(f"order={self.order!r}: wanted 2 or 3.")

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        predictors = unip_coefficients(schedule, grid, self.order)
        # each corrector repeats the step that led to t
        correctors = [None, *unic_coefficients(schedule, grid, self.order)[:-1]]
        return [
            call._replace(correct=correct)
            for call, correct in zip(step_calls(grid, predictors), correctors, strict=True)
        ]
