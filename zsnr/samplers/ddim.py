"""First-order samplers: DDIM, and those whose steps are equal to its own.

A step from t to s is `reverse_transition` with a fraction eta of ancestral noise. DDPM is eta = 1,
Euler's method eta = 0: their published steps are the same once they are written in x_t, x_0 and
noise, which is finite at zero SNR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zsnr.guidance import Guidance
from zsnr.samplers.base import Call, Sampler, step_calls, transition_steps
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import Schedule


class _FirstOrder(Sampler):
    """Steps of the shared transition, with the fraction `eta` of ancestral noise."""

    keeps_history: ClassVar[bool] = False

    @property
    def eta(self) -> float:
        """Fraction of ancestral noise, in [0, 1]."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        if not isinstance(self.eta, (int, float)) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta!r}: wanted a number in [0, 1].")

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        return step_calls(grid, transition_steps(schedule, grid, self.eta))


@register_sampler("ddim")
@dataclass(frozen=True)
class DDIM(_FirstOrder):
    """DDIM (equations 21 and 22).

    Args:
        eta: Fraction of ancestral noise, in [0, 1]. 0 = deterministic, 1 = DDPM.
    """

    eta: float = 0.0


@register_sampler("ddpm")
@dataclass(frozen=True)
class DDPM(_FirstOrder):
    """Ancestral sampling with the posterior variance (equations 20 and 9)."""

    eta: ClassVar[float] = 1.0


@register_sampler("euler")
@dataclass(frozen=True)
class Euler(_FirstOrder):
    """Euler's method on dy/dk = (y - x_0) / k, with y = x_t / alpha_t and k = sigma_t / alpha_t.

    A step is y_s = x_0 + (k_s / k_t) (y_t - x_0). Multiplied by alpha_s this is the shared
    transition with eta = 0, which is defined at alpha_t = 0, where y and k are not.
    """

    eta: ClassVar[float] = 0.0


@register_sampler("euler_ancestral")
@dataclass(frozen=True)
class EulerAncestral(_FirstOrder):
    """Euler's method to k_down, then noise of size k_up.

    k_up = eta k_s sqrt(1 - k_s^2 / k_t^2),  k_down^2 = k_s^2 - k_up^2; multiplied by alpha_s this
    is the shared transition with this eta.

    Args:
        eta: Fraction of ancestral noise, in [0, 1]. 1 = DDPM, 0 = Euler.
    """

    eta: float = 1.0
