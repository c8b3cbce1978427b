"""ER-SDE, solvers of a reverse-time SDE (Cui et al., arXiv:2309.06169), for zero SNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from zsnr.guidance import Guidance
from zsnr.samplers.base import Call, MultistepCoefficients, Sampler, step_calls
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import Schedule

_NODES = 32


def er_sde_coefficients(
    schedule: Schedule, grid: Sequence[int], order: int = 3
) -> list[MultistepCoefficients]:
    """Compute the steps of ER-SDE-Solver in x_0 form.

    With y = x / alpha, k = sigma / alpha and the noise scale f(k) = k (exp(k^0.3) + 10) of
    ER-SDE 5, the published step of third order is, with F = f(k_s) / f(k_t),

    y_s = x_0 + F (y_t - x_0) + sqrt(k_s^2 - k_t^2 F^2) z + A_1 x_0' + A_2 x_0''
    A_n = int_{k_s}^{k_t} (k - k_t)^(n-1) (f(k_s) / f(k) - 1) dk

    where x_0' = dx_0/dk and x_0'' its derivative, by differences of the last predictions.
    Multiplied by alpha_s, with g = (exp(k_s^0.3) + 10) / (exp(k_t^0.3) + 10), this is

    x_s = (alpha_s - b alpha_t) x_0 + b x_t + c z + ...,    b = g sigma_s / sigma_t
    c = sigma_s sqrt(1 - g^2)

    At SNR 0 g = 0, so that x_s = alpha_s x_0 + sigma_s z, and differences to predictions of SNR 0
    vanish since k is infinite there. The step to clean data is first order, as published.

    Args:
        schedule: The noise schedule.
        grid: Timesteps, descending.
        order: Number of predictions a step uses, 1 to 3.
    """
    scales = [schedule(t) for t in (*grid, -1)]
    k = [sigma / alpha if alpha > 0 else math.inf for alpha, sigma in scales]
    steps = []
    for i, ((alpha_t, sigma_t), (alpha_s, sigma_s)) in enumerate(pairwise(scales)):
        g = _ratio(k[i], k[i + 1])
        b = g * sigma_s / sigma_t
        a, c = [alpha_s - b * alpha_t, 0.0, 0.0], sigma_s * math.sqrt((1 - g) * (1 + g))
        used = min(order, i + 1) if sigma_s > 0 else 1
        if used > 1 and math.isfinite(k[i - 1]):
            A_1, A_2 = (alpha_s * A for A in _integrals(k[i], k[i + 1]))
            half = (k[i] - k[i - 2]) / 2 if used > 2 else -math.inf
            # x_0' = d and x_0'' = (d - d_old) / half, with d = (x_0 - x_0^(1)) / (k_t - k_t^(1))
            d = (A_1 + A_2 / half) / (k[i] - k[i - 1])
            d_old = -A_2 / half / (k[i - 1] - k[i - 2]) if math.isfinite(half) else 0.0
            a = [a[0] + d, d_old - d, -d_old]
        steps.append(MultistepCoefficients(tuple(a[:used]), b, c))
    return steps


def _ratio(k_t: float, k_s: float) -> float:
    """Compute (exp(k_s^0.3) + 10) / (exp(k_t^0.3) + 10), which is 0 at k_t = infinity."""
    u_t, u_s = k_t**0.3, k_s**0.3
    return math.exp(u_s - u_t) * (1 + 10 * math.exp(-u_s)) / (1 + 10 * math.exp(-u_t))


def _integrals(k_t: float, k_s: float) -> tuple[float, float]:
    """Compute A_1 and A_2, by Gauss and Legendre's rule in log k."""
    length = math.log(k_t / k_s)
    A_1, A_2 = [], []
    for x, weight in zip(*_gauss_legendre(), strict=True):
        k = k_s * math.exp(x * length)
        value = weight * length * (k_s * _ratio(k, k_s) - k)  # dk = k dlog k
        A_1.append(value)
        A_2.append(value * (k - k_t))
    return math.fsum(A_1), math.fsum(A_2)


@cache
def _gauss_legendre() -> tuple[list[float], list[float]]:
    """Compute nodes and weights on [0, 1], by Newton's method on Legendre's polynomial P_n.

    With n P_n = (2 n - 1) x P_{n-1} - (n - 1) P_{n-2}, w = 2 / ((1 - x^2) P_n'^2) on [-1, 1].
    """
    nodes, weights = [], []
    for i in range(_NODES):
        x, slope = -math.cos(math.pi * (i + 0.75) / (_NODES + 0.5)), 1.0
        for _ in range(8):
            P, before = x, 1.0
            for n in range(2, _NODES + 1):
                P, before = ((2 * n - 1) * x * P - (n - 1) * before) / n, P
            slope = _NODES * (x * P - before) / (x * x - 1)
            x -= P / slope
        nodes.append((x + 1) / 2)
        weights.append(1 / ((1 - x * x) * slope**2))
    return nodes, weights


@register_sampler("er_sde")
@dataclass(frozen=True)
class ERSDE(Sampler):
    """ER-SDE-Solver: a reverse SDE with less injected noise at low noise levels, in x_0.

    See `er_sde_coefficients`.

    Args:
        order: Number of predictions a step uses, 1 to 3. 3 as published. The deterministic part has
            order of convergence 1, 2 and 2, as the slope of x_0 is a difference to the previous
            step.
    """

    order: int = 3

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (1, 2, 3):
            raise ValueError(f"order={self.order!r}: wanted 1, 2 or 3.")

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        return step_calls(grid, er_sde_coefficients(schedule, grid, self.order))
