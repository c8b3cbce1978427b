"""A multistep sampler whose weights are fitted to data of all scales simultaneously."""

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
from zsnr.schedule import Schedule
from zsnr.timesteps import timestep_pairs
from zsnr.transition import reverse_transition

DAMPING = 0.1
_SCALES = 36
_RATIOS = (1.0, 1.8, 3.3, 6.0)  # s_u / s_c: how much a condition narrows a pattern's distribution
_GUIDED_SCALES = 16
_MAX_SCALE = 20.0  # of w'; beyond it the path of a narrowed pattern overflows


@lru_cache(maxsize=64)
def multiscale_coefficients(
    schedule: Schedule,
    grid: tuple[int, ...],
    order: int = 3,
    smallest: float = 0.05,
    largest: float = 60.0,
    guidance: tuple[float, ...] = (),
) -> tuple[MultistepCoefficients, ...]:
    """Compute the steps of `Multiscale`.

    A pattern of the data is Gaussian, with standard deviation s_c given the condition and s_u
    without. Guided by w, its optimal prediction is K (x_t - alpha_t m) about its mean, with

    K = k_u + w (k_c - k_u),  k_i = alpha_t s_i^2 / (alpha_t^2 s_i^2 + sigma_t^2)

    and the exact path is x_t - alpha_t m = e_t eps, in closed form

    e_t = (alpha_t^2 s_c^2 + sigma_t^2)^(w/2) (alpha_t^2 s_u^2 + sigma_t^2)^((1-w)/2).

    Every linear sampler results in y_t eps, where y follows a scalar recursion. The step from t to
    s is

    x_s = a (x_0 + u_1 (x_0 - x_0') + u_2 (x_0 - 2 x_0' + x_0'')) + b x_t

    with (a, b) of the shared transition, and x_0' and x_0'' the predictions of the two previous
    steps. u minimizes the squared error (y_s - e_s) / c_s over patterns, where c_s is e_s for
    w = 1, plus a damping term: u_2^2 times `DAMPING` and the mean square of (x_0 - x_0') / c_s. So
    curvature is not used where it is small, and short steps are of second order.

    Args:
        schedule: The noise schedule.
        grid: Timesteps, descending.
        order: Number of predictions a step uses. 1 = DDIM.
        smallest: Smallest s_c, relative to noise of unit variance. With guidance, four times that,
            because finer patterns hardly depend on a condition.
        largest: Largest s_c; log s_c is uniform between the two.
        guidance: w of each step; () = 1 for all, where s_u has no effect. Otherwise s_u / s_c takes
            the values 1, 1.8, 3.3 and 6.
    """
    w = guidance or (1.0,) * len(grid)
    guided = any(scale != 1 for scale in w)
    count, smallest = (_GUIDED_SCALES, 4 * smallest) if guided else (_SCALES, smallest)
    step = math.log(largest / smallest) / (count - 1)
    scales = [smallest * math.exp(i * step) for i in range(count)]
    pairs = [(s_c, ratio * s_c) for s_c in scales for ratio in (_RATIOS if guided else (1.0,))]
    scales_at = [schedule(t) for t in (*grid, -1)]
    size_c, size_u = (
        [[math.hypot(alpha * pair[i], sigma) for pair in pairs] for alpha, sigma in scales_at]
        for i in (0, 1)
    )
    exact = _exact_path(size_c, size_u, w) if guided else size_c
    y = exact[0]  # the state of each pattern
    history: list[list[float]] = []  # x_0 of the steps so far, newest first
    steps = []
    for i, ((alpha_t, sigma_t), (alpha_s, sigma_s)) in enumerate(pairwise(scales_at)):
        k_c, k_u = (
            [alpha_t * pair[j] ** 2 / size**2 for pair, size in zip(pairs, sizes[i], strict=True)]
            for j, sizes in enumerate((size_c, size_u))
        )
        gains = [u + w[i] * (c - u) for c, u in zip(k_c, k_u, strict=True)]
        history = [list(map(mul, gains, y)), *history[: order - 1]]
        a, b, _ = reverse_transition(alpha_t, sigma_t, alpha_s, sigma_s)
        c_s = size_c[i + 1]
        target = [(e / c - b * y_j / c) / a for e, y_j, c in zip(exact[i + 1], y, c_s, strict=True)]
        weights = _weights([_over(x, c_s) for x in history], target)
        y = [
            b * y_j + a * sum(map(mul, weights, x))
            for y_j, x in zip(y, zip(*history, strict=True), strict=True)
        ]
        steps.append(MultistepCoefficients(tuple(a * weight for weight in weights), b))
    return tuple(steps)


def _exact_path(
    size_c: Sequence[Sequence[float]], size_u: Sequence[Sequence[float]], w: Sequence[float]
) -> list[list[float]]:
    """Compute e_t of every pattern at every timestep, where w may differ between steps.

    e_s / e_t = (c_s / c_t)^w (u_s / u_t)^(1-w),  c_t^2 = alpha_t^2 s_c^2 + sigma_t^2, u_t with s_u.
    """
    path = [[c ** w[0] * u ** (1 - w[0]) for c, u in zip(size_c[0], size_u[0], strict=True)]]
    for i, scale in enumerate(w):
        ratios = zip(size_c[i], size_c[i + 1], size_u[i], size_u[i + 1], strict=True)
        growth = [
            (c_s / c_t) ** scale * (u_s / u_t) ** (1 - scale) for c_t, c_s, u_t, u_s in ratios
        ]
        path.append(list(map(mul, path[-1], growth)))
    return path


def _weights(history: Sequence[Sequence[float]], target: Sequence[float]) -> list[float]:
    """Fit sum_i w_i history_i to the target over all scales, with sum_i w_i = 1."""
    if len(history) == 1:
        return [1.0]
    slope, missing = _minus(history[0], history[1]), _minus(target, history[0])
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
    """A three-step sampler for few steps, with and without guidance, deterministic.

    Solvers extrapolate x_0 along one coordinate, such as log SNR. But small patterns of low
    contrast emerge from the noise late, and the brightness of an image early, so no coordinate
    suits both. And where guidance narrows a pattern, the guided prediction falls as x_t rises, so
    that every fixed extrapolation overshoots. These weights of the last three predictions have the
    smallest squared error over Gaussian patterns of all scales from `smallest` to `largest`, at the
    current guidance; see `multiscale_coefficients`. The mean path is exact for any weights, and
    SNR 0 needs no special case.

    In images only a few patterns are strongly guided, and guidance is rescaled, so the weights are
    fitted for w' = 1 + 0.75 sqrt(w - 1); 0.75 and the ratios s_u / s_c were chosen on two trained
    models and two exact denoisers, see benchmarks/results/guided.md. With guidance, a sample whose
    prediction reverses direction falls back to first order: with d = x_0 - x_0' and d' that of the
    previous step, the correction of the first-order step is multiplied by 1 + min(0, cos(d, d')).

    Designed for the spacings "log_snr" without guidance and "guided" with guidance, but works with
    any. For plain guidance with a scale above 4 and fewer than 10 steps, DDIM is better: see
    `recommend_sampling`.

    Args:
        order: Number of predictions a step uses, 1 to 3. 1 = DDIM.
        smallest: Smallest standard deviation of a pattern in the data, relative to noise of unit
            variance.
        largest: Largest standard deviation. That of an image's mean is multiplied by the square
            root of the number of pixels.
        guidance: The guidance scale of all steps, 1 = no guidance, for denoisers that do not
            declare it, such as a custom function or a pipeline of diffusers. None = the denoiser's
            guidance at each step; if it declares none, 3 is assumed.
    """

    order: int = 3
    smallest: float = 0.05
    largest: float = 60.0
    guidance: float | None = None

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order!r}: wanted 1, 2 or 3.")
        numbers = all(isinstance(s, (int, float)) for s in (self.smallest, self.largest))
        if not (numbers and 0 < 4 * self.smallest < self.largest < math.inf):
            raise ValueError(
                f"smallest={self.smallest!r}, largest={self.largest!r}: wanted two positive "
                "numbers, the first less than a quarter of the second."
            )
        scale = self.guidance
        if scale is not None and not (isinstance(scale, (int, float)) and math.isfinite(scale)):
            raise ValueError(f"guidance={scale!r}: wanted a finite number, or None.")

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        w = [1.0 if self.guidance is None else self.guidance] * len(grid)
        if self.guidance is None and guidance is not None:
            pairs = timestep_pairs(grid)
            w = [guidance.scale_at(*schedule(t), *schedule(s)) for t, s in pairs]
        fitted = tuple(min(1 + 0.75 * math.sqrt(max(scale - 1, 0)), _MAX_SCALE) for scale in w)
        guided = any(scale != 1 for scale in fitted)
        steps = multiscale_coefficients(
            schedule, grid, self.order, self.smallest, self.largest, fitted if guided else ()
        )
        return [
            call._replace(limited=guided and len(step.a) > 1)
            for call, step in zip(step_calls(grid, steps), steps, strict=True)
        ]
