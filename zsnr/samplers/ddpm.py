"""DDPM: ancestral sampling in x_0 form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zsnr.guidance import Guidance
from zsnr.samplers.base import Call, Sampler, step_calls, transition_steps
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import Schedule


@register_sampler("ddpm")
@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling with the posterior variance (equations 20 and 9)."""

    keeps_history: ClassVar[bool] = False

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        return step_calls(grid, transition_steps(schedule, grid, 1.0))
