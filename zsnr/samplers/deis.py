"""DEIS, an exponential integrator in eps (Zhang and Chen, arXiv:2204.13902), for zero SNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zsnr.guidance import Guidance
from zsnr.samplers.base import (
    Call,
    MultistepCoefficients,
    Sampler,
    step_calls,
    transition_coefficients,
)
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import Schedule
from zsnr.timesteps import timestep_pairs


def deis_coefficients(
    schedule: Schedule, grid: Sequence[int], order: int = 3
) -> list[MultistepCoefficients]:
    """Compute the steps of tAB-DEIS.

    With y = x / alpha and k = sigma / alpha the path is dy/dk = eps. A step integrates the
    polynomial in the timestep through the last predictions of eps, with Lagrange's basis L_i:

    x_s = a x_0 + b x_t + sum_i e_i (eps^(i) - eps),    e_i = alpha_s int_t^s L_i(tau) dk(tau)

    with (a, b) of the shared transition. k is linear between the schedule's timesteps, so that the
    integral is exact. The step from SNR 0, where k is infinite, has no history: it is first order,
    which is exact since x_0 does not depend on x_t there. Its eps, which the next steps use, is
    finite: at SNR 0 it is x_T itself. The first steps are of lower order, and the step to clean
    data goes to x_0, because extrapolated eps would overshoot there.

    Args:
        schedule: The noise schedule.
        grid: Timesteps, descending.
        order: Degree of the polynomial.
    """
    scales = (schedule(t) for t in range(schedule.num_timesteps))
    k = [sigma / alpha if alpha > 0 else math.inf for alpha, sigma in scales]
    steps = []
    transitions = transition_coefficients(schedule, grid, 0.0)
    for i, ((_, s), (a, b, _)) in enumerate(zip(timestep_pairs(grid), transitions, strict=True)):
        nodes = grid[i::-1][: order + 1] if s >= 0 else grid[i:]  # newest first
        alpha_s = schedule(s)[0]
        older = [alpha_s * _integral(nodes, j, s, k) for j in range(1, len(nodes))]
        e = (-math.fsum(older), *older) if older else ()
        steps.append(MultistepCoefficients((a,), b, e=e))
    return steps


def _integral(nodes: Sequence[int], j: int, s: int, k: Sequence[float]) -> float:
    """Integrate Lagrange's L_j over dk from nodes[0] to s."""
    others = [node for node in nodes if node != nodes[j]]
    scale = math.prod(nodes[j] - node for node in others)

    def basis(tau: float) -> float:
        return math.prod(tau - node for node in others)

    # Simpson's rule is exact for cubics.
    pieces = (
        (k[n - 1] - k[n]) * (basis(n) + 4 * basis(n - 0.5) + basis(n - 1))
        for n in range(nodes[0], s, -1)
    )
    return math.fsum(pieces) / (6 * scale)


@register_sampler("deis")
@dataclass(frozen=True)
class DEIS(Sampler):
    """tAB-DEIS: Adams-Bashforth in eps, a polynomial in t integrated over sigma / alpha.

    See `deis_coefficients`. On "log_snr" grids of 10 steps or fewer, whose steps in t are unequal,
    order 3 may amplify errors of the network several times more than `dpmpp_2m`.

    Args:
        order: Degree of the polynomial, 2 or 3: the r of tAB r. A step uses order + 1 predictions,
            and the order of convergence is order + 1.
    """

    order: int = 3

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (2, 3):
            raise ValueError(f"order={self.order!r}: wanted 2 or 3.")

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        return step_calls(grid, deis_coefficients(schedule, grid, self.order))
