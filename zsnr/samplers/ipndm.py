"""iPNDM, the linear multistep method of PNDM (Liu et al., arXiv:2202.09778), for zero SNR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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

# Adams-Bashforth weights of order 2 to 4 for equal steps, newest first.
_WEIGHTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def ipndm_coefficients(
    schedule: Schedule, grid: Sequence[int], order: int = 4
) -> list[MultistepCoefficients]:
    """Compute the steps of iPNDM.

    With y = x / alpha and k = sigma / alpha the path is dy/dk = eps. A step replaces eps by the
    Adams-Bashforth mean of its last predictions, eps' = sum_i w_i eps^(i):

    y_s = y_t + (k_s - k_t) eps'
    x_s = a x_0 + b x_t + (sigma_s - alpha_s k_t) (eps' - eps)

    with (a, b) of the shared transition. The step from SNR 0, where k is infinite, has no history:
    it is first order, which is exact since x_0 does not depend on x_t there. Its eps, which the
    next steps use, is finite: at SNR 0 it is x_T itself. The first steps are of lower order, and
    the step to clean data goes to x_0, as in the published solvers over sigma, because extrapolated
    eps would overshoot there.

    Args:
        schedule: The noise schedule.
        grid: Timesteps, descending.
        order: Number of predictions a step uses, 2 to 4.
    """
    scales = [schedule(t) for t in (*grid, -1)]
    steps = []
    for i, ((a, b, _), ((alpha_t, sigma_t), (alpha_s, sigma_s))) in enumerate(
        zip(transition_coefficients(schedule, grid, 0.0), pairwise(scales), strict=True)
    ):
        e: tuple[float, ...] = ()
        if i > 0 and sigma_s > 0:
            newest, *older = _WEIGHTS[min(order, i + 1)]
            gain = sigma_s - alpha_s * sigma_t / alpha_t
            e = tuple(gain * w for w in (newest - 1, *older))
        steps.append(MultistepCoefficients((a,), b, e=e))
    return steps


@register_sampler("ipndm")
@dataclass(frozen=True)
class IPNDM(Sampler):
    """iPNDM: Adams-Bashforth in eps over sigma / alpha, with the weights of equal steps.

    PNDM without its Runge-Kutta start (Zhang and Chen, arXiv:2204.13902, section 3.4): the order
    grows from one with the history. The weights assume equal steps, so that the order of
    convergence is `order` on grids that divide sigma / alpha evenly, and 2 on other smooth grids.
    See `ipndm_coefficients`.

    At high noise levels, a step is stable if it reduces k by at most 1, 0.55 or 0.3 of its value,
    for orders 2, 3 and 4. Grids of few steps exceed that for orders 3 and 4; the error stays
    bounded because there are few such steps.

    Args:
        order: Number of predictions a step uses, 2 to 4. 4 as published.
    """

    order: int = 4

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (2, 3, 4):
            raise ValueError(f"order={self.order!r}: wanted 2, 3 or 4.")

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        return step_calls(grid, ipndm_coefficients(schedule, grid, self.order))
