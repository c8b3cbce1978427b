"""A multistep sampler whose weights are right for data of every scale at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import mul, sub, truediv

from zsnr.guidance import Guidance
from zsnr.samplers.base import Call, MultistepCoefficients, Sampler, step_calls
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import NoiseSchedule
from zsnr.transition import reverse_transition

DAMPING = 0.1
_SCALES = 36


@lru_cache(maxsize=64)
def multiscale_coefficients(
    schedule: NoiseSchedule,
    grid: tuple[int, ...],
    order: int = 3,
    smallest: float = 0.05,
    largest: float = 60.0,
) -> tuple[MultistepCoefficients, ...]:
    """Compute the steps of `Multiscale`.

    For data N(m, s^2) the exact path is x_t - alpha_t m = e_t eps with e_t^2 = alpha_t^2 s^2 +
    sigma_t^2, and every linear sampler makes y_t eps of it, where y follows a scalar recursion. The
    step from t to s is

    x_s = a (x_0 + u_1 (x_0 - x_0') + u_2 (x_0 - 2 x_0' + x_0'')) + b x_t

    with (a, b) of the shared transition, x_0' and x_0'' the predictions of the two steps before,
    and u least squares over scales s of the relative error y_s / e_s - 1, plus damping: u_2^2 times
    `DAMPING` and the mean square of (x_0 - x_0') / e_s. So what is small is not trusted to
    curvature, and short steps are of second order.

    Args:
        schedule: The noise schedule.
        grid: Timesteps, descending.
        order: How many predictions a step uses. 1 = DDIM.
        smallest: Least s, where noise has 1.
        largest: Greatest s; between the two log s is uniform.
    """
    step = math.log(largest / smallest) / (_SCALES - 1)
    scales = [smallest * math.exp(i * step) for i in range(_SCALES)]
    variances = [s**2 for s in scales]
    at = [schedule(t) for t in (*grid, -1)]
    exact = [[math.hypot(alpha * s, sigma) for s in scales] for alpha, sigma in at]
    y = exact[0]  # the state of each scale
    history: list[list[float]] = []  # x_0 of the steps so far, newest first
    steps = []
    for (e_t, e_s), ((alpha_t, sigma_t), (alpha_s, sigma_s)) in zip(
        pairwise(exact), pairwise(at), strict=True
    ):
        x_0 = [alpha_t * v / e**2 * y_i for v, e, y_i in zip(variances, e_t, y, strict=True)]
        history = [x_0, *history[: order - 1]]
        a, b, _ = reverse_transition(alpha_t, sigma_t, alpha_s, sigma_s)
        wanted = [(1 - b * y_i / e) / a for y_i, e in zip(y, e_s, strict=True)]
        weights = _weights([_over(x, e_s) for x in history], wanted)
        y = [
            b * y_i + a * sum(map(mul, weights, x))
            for y_i, x in zip(y, zip(*history, strict=True), strict=True)
        ]
        steps.append(MultistepCoefficients(tuple(a * w for w in weights), b))
    return tuple(steps)


def _weights(history: Sequence[Sequence[float]], wanted: Sequence[float]) -> list[float]:
    """Fit sum_i w_i history_i to what is wanted over all scales, with sum_i w_i = 1."""
    if len(history) == 1:
        return [1.0]
    slope, missing = _minus(history[0], history[1]), _minus(wanted, history[0])
    m_11, v_1 = _dot(slope, slope), _dot(slope, missing)
    if len(history) == 2:
        u_1 = v_1 / m_11
        return [1 + u_1, -u_1]
    bend = _minus(slope, _minus(history[1], history[2]))
    m_12, m_22, v_2 = _dot(slope, bend), _dot(bend, bend), _dot(bend, missing)
    m_22 += DAMPING * m_11
    determinant = m_11 * m_22 - m_12**2
    u_1 = (v_1 * m_22 - v_2 * m_12) / determinant
    u_2 = (m_11 * v_2 - m_12 * v_1) / determinant
    return [1 + u_1 + u_2, -u_1 - 2 * u_2, u_2]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(map(mul, a, b))


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return list(map(sub, a, b))


def _over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return list(map(truediv, a, b))


@register_sampler("multiscale")
@dataclass(frozen=True)
class Multiscale(Sampler):
    """A three-step sampler for few steps, deterministic, one network call a step.

    Solvers extrapolate x_0 along one coordinate, such as log SNR. But a small pattern of low
    contrast comes out of the noise late, and the brightness of a picture early: no coordinate
    suits both. These weights of the last three predictions have the least squared error over all
    scales s from `smallest` to `largest` at once, for N(m, s^2); see `multiscale_coefficients`. The
    mean path is exact whatever the weights are, and SNR 0 is a timestep like any other.

    Made for sampling without guidance on the spacing "log_snr"; it runs on any. A guidance scale
    above about 3, and fewer than 15 steps with any guidance, make it overshoot: use DDIM there.

    Args:
        order: How many predictions a step uses, 1 to 3. 1 = DDIM.
        smallest: Least standard deviation of a pattern in the data, where noise has 1.
        largest: Greatest one. The mean of a picture counts times the root of its number of pixels.
    """

    order: int = 3
    smallest: float = 0.05
    largest: float = 60.0

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order!r}: wanted 1, 2 or 3.")
        numbers = all(isinstance(s, (int, float)) for s in (self.smallest, self.largest))
        if not (numbers and 0 < self.smallest < self.largest < math.inf):
            raise ValueError(
                f"smallest={self.smallest!r}, largest={self.largest!r}: wanted two positive "
                "numbers, the smaller first."
            )

    def calls(
        self, schedule: NoiseSchedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        steps = multiscale_coefficients(
            schedule, tuple(grid), self.order, self.smallest, self.largest
        )
        return step_calls(grid, steps)
