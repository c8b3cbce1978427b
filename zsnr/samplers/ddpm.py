"""DDPM: ancestral sampling in x_0 form."""

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


@register_sampler("ddpm")
@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling with the posterior variance (equations 20 and 9)."""

    keeps_history: ClassVar[bool] = False

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
        return run_steps(1.0, denoiser, schedule, x_T, timesteps, randn_like, callback)
