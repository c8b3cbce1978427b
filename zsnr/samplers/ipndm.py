"""iPNDM, the linear multistep of PNDM (Liu et al., arXiv:2202.09778), from zero SNR."""

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
from zsnr.schedule import NoiseSchedule

# Adams and Bashforth's weights of order 2 to 4 for equal steps, newest first.
_WEIGHTS = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def ipndm_coefficients(
    schedule: NoiseSchedule, grid: Sequence[int], order: int = 4
) -> list[MultistepCoefficients]:
    """Compute the steps of iPNDM.

    With y = x / alpha and k = sigma / alpha the path is dy/dk = eps. A step takes the
    Adams-Bashforth mean of the last predictions of eps, eps' = sum_i w_i eps^(i), in place of eps:

    y_s = y_t + (k_s - k_t) eps'
    x_s = a x_0 + b x_t + (sigma_s - alpha_s k_t) (eps' - eps)

    with (a, b) of the shared transition. The step from SNR 0, where k is infinite, has no history:
    it is first order, which is exact since x_0 does not depend on x_t there. What it leaves to the
    next steps is finite, since eps at SNR 0 is x_T itself. The first steps are of lower order, and
    the step to clean data lands on x_0, as in the published solvers over sigma: extrapolated eps
    would overshoot there.

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

    PNDM without its Runge-Kutta start (Zhang and Chen, arXiv:2204.13902, section 3.4): orders grow
    from one while there is no history. The weights take all steps for equal, so that the order of
    convergence is `order` on grids that divide sigma / alpha evenly, and 2 on other smooth grids.
    See `ipndm_coefficients`.

    Where noise outweighs the data, a step is stable if it takes away at most 1, 0.55 or 0.3 of k,
    for orders 2, 3 and 4. Grids of few steps exceed that for orders 3 and 4; the error stays
    bounded because few steps are made there.

    Args:
        order: Number of predictions a step uses, 2 to 4. 4 as published.
    """

    order: int = 4

    def __post_init__(self) -> None:
        if type(self.order) is not int or self.order not in (2, 3, 4):
            raise ValueError(f"order={self.order!r}: wanted 2, 3 or 4.")

    def calls(
        self, schedule: NoiseSchedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        return step_calls(grid, ipndm_coefficients(schedule, grid, self.order))
