"""DDIM, from deterministic to ancestral."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zsnr.guidance import Guidance
from zsnr.samplers.base import Call, Sampler, step_calls, transition_steps
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import Schedule


@register_sampler("ddim")
@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM (equations 21 and 22).

    Args:
        eta: Fraction of ancestral noise, in [0, 1]. 0 = deterministic, 1 = DDPM.
    """

    keeps_history: ClassVar[bool] = False

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.eta, (int, float)) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta!r}: wanted a number in [0, 1].")

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        return step_calls(grid, transition_steps(schedule, grid, self.eta))
