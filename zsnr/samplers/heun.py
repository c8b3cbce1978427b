"""Heun's method (Karras et al., arXiv:2206.00364, Algorithm 1), for zero SNR."""

from __future__ import annotations

import math
from dataclasses import dataclass

from zsnr.guidance import Guidance
from zsnr.samplers.base import (
    Call,
    MultistepCoefficients,
    Sampler,
    log_snr_steps,
    transition_coefficients,
)
from zsnr.samplers.registry import register_sampler
from zsnr.schedule import Schedule
from zsnr.timesteps import timestep_pairs


@register_sampler("heun")
@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method on dy/dk = (y - x_0) / k, with y = x_t / alpha_t and k = sigma_t / alpha_t.

    After Euler's step to s the network is evaluated again, and the step is repeated with the mean
    of both slopes. With h = log(k_t / k_s) and (a, b) of the shared transition:

    x_s = a ((1 - e^h / 2) x_0(x_t, t) + e^h / 2 x_0(x_s, s)) + b x_t

    The step from SNR 0, where k is infinite, and the step to clean data are Euler's; the first is
    exact, since x_0 does not depend on x_t there. So S steps make max(S, 2S - 2) network calls.
    """

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> list[Call]:
        h = log_snr_steps(schedule, grid)
        calls: list[Call] = []
        transitions = transition_coefficients(schedule, grid, 0.0)
        for (t, s), (a, b, _), h_t in zip(timestep_pairs(grid), transitions, h, strict=True):
            calls.append(Call(t, s, MultistepCoefficients((a,), b)))
            if math.isfinite(h_t):
                w = math.exp(h_t) / 2
                again = MultistepCoefficients((a * w, a * (1 - w)), b)
                calls.append(Call(s, s, None, again))
        return calls
