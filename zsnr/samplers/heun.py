"""Heun's method (Karras et al., arXiv:2206.00364, Algorithm 1), from zero SNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zsnr.samplers.base import (
    Callback,
    DenoiserFunction,
    MultistepCoefficients,
    RandnLike,
    Sampler,
    begin,
    check_run,
    log_snr_steps,
    multistep,
    predict,
    step,
    transition_coefficients,
)
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import NoiseSchedule


@register_sampler("heun")
@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method on dy/dk = (y - x_0) / k, with y = x_t / alpha_t and k = sigma_t / alpha_t.

    Euler's step leads to s, where the network is asked again, and the step is taken anew with the
    mean of both slopes. Times alpha_s, with h = log(k_t / k_s) and (a, b) of the shared transition:

    x_s = a ((1 - e^h / 2) x_0(x_t, t) + e^h / 2 x_0(x_s, s)) + b x_t

    The step from SNR 0, where k is infinite, and the step to clean data are Euler's; the first is
    exact, since x_0 does not depend on x_t there. So S steps make max(S, 2S - 2) network calls.
    """

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
        grid = check_run(denoiser, schedule, timesteps)
        steps = transition_coefficients(schedule, grid, 0.0)
        h = log_snr_steps(schedule, grid)
        x_t, t_rows = begin(x_T, grid)
        for i, (t, coefficients) in enumerate(zip(grid, steps, strict=True)):
            x_0 = predict(denoiser, x_t, t, t_rows[i])
            x_s = step(x_0, x_t, coefficients)
            if math.isfinite(h[i]):
                again = predict(denoiser, x_s, grid[i + 1], t_rows[i + 1])
                a, b, _ = coefficients
                w = math.exp(h[i]) / 2
                x_s = multistep((again, x_0), x_t, MultistepCoefficients((a * w, a * (1 - w)), b))
            x_t = x_s
            if callback is not None:
                callback(i, t, x_0, x_t)
        return x_t.to(x_T.dtype)
