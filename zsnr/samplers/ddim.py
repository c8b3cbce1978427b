"""DDIM, from deterministic to ancestral."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zsnr.samplers.base import (
    Callback,
    DenoiserFunction,
    RandnLike,
    Sampler,
    run_steps,
)
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import NoiseSchedule


@register_sampler("ddim")
@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM (equations 21 and 22).

    Args:
        eta: Share of ancestral noise, in [0, 1]. 0 = deterministic, 1 = DDPM.
    """

    keeps_history: ClassVar[bool] = False

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.eta, (int, float)) or not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta!r}: wanted a number in [0, 1].")

    def sample(
        self,
        denoiser: DenoiserFunction,
        schedule: NoiseSchedule,
        x_T: Tensor,
        timesteps: Tensor | Sequence[int],
        *,
        randn_like: RandnLike = torch.randn_like,
        callback: Callback | None = None,
    ) -> Tensor:
        return run_steps(self.eta, denoiser, schedule, x_T, timesteps, randn_like, callback)
