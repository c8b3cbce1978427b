"""Samplers and grids of this package and of diffusers, compared by the fidelity benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsnr import NoiseSchedule, get_sampler, get_timesteps, recommend_sampling, to_v
from zsnr.samplers.base import guidance_of

SCHEDULE = NoiseSchedule()
SETTINGS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """A sampler and a grid.

    Args:
        name: Name in the table.
        sample: (denoiser, x_T (B, *), S) -> x_0.
        random: Whether it draws noise, so that its path cannot be compared.
    """

    name: str
    sample: Callable[[Denoise, Tensor, int], Tensor]
    random: bool = False


def zsnr_sampler(sampler: str, spacing: str, *, random: bool = False, **options: Any) -> Contender:
    """One of this package's samplers on one of its grids; heun with S network calls."""

    def sample(denoiser: Denoise, x_T: Tensor, S: int) -> Tensor:
        steps = (S + 2) // 2 if sampler == "heun" else S
        grid = get_timesteps(spacing, steps, schedule=SCHEDULE)
        noise = torch.Generator().manual_seed(0)
        return get_sampler(sampler, **options).sample(
            denoiser,
            SCHEDULE,
            x_T,
            grid,
            randn_like=lambda x: torch.randn(x.shape, generator=noise, dtype=x.dtype),
        )

    settings = "".join(f" {name}={value}" for name, value in options.items())
    return Contender(f"{sampler}{settings}, {spacing}", sample, random)


def recommended() -> Contender:
    """The result of `recommend_sampling` for the number of steps and the denoiser's guidance."""

    def sample(denoiser: Denoise, x_T: Tensor, S: int) -> Tensor:
        sampler, spacing = recommend_sampling(S, guidance_of(denoiser))
        return zsnr_sampler(sampler, spacing).sample(denoiser, x_T, S)

    return Contender("recommended", sample)


def diffusers_sampler(name: str, cls: str, **options: Any) -> Contender:
    """A scheduler of diffusers, on its own grid, with the exact denoiser at its timesteps.

    Raises:
        IndexError: When sampling, if the scheduler uses another number of steps.
    """

    def sample(denoiser: Denoise, x_T: Tensor, S: int) -> Tensor:
        import diffusers

        scheduler = getattr(diffusers, cls)(**SETTINGS, **options)
        scheduler.set_timesteps(S)
        if len(scheduler.timesteps) != S:
            raise IndexError(f"{len(scheduler.timesteps)} timesteps for {S}")
        x = x_T * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x_t = scheduler.scale_model_input(x, t)
            row = torch.full((len(x),), round(float(t)))
            v = to_v(denoiser(x_t, row), x_t, *SCHEDULE(row), "sample")
            x = scheduler.step(v, t, x).prev_sample
        return x

    return Contender(f"diffusers {name}", sample)


PAPER = zsnr_sampler("ddim", "trailing")
FOUR_SPACINGS = ("trailing", "log_snr", "karras", "guided")
ZSNR = (
    recommended(),
    PAPER,
    *(zsnr_sampler("ddim", spacing) for spacing in ("log_snr", "karras", "guided", "beta")),
    zsnr_sampler("ddim", "ays"),
    zsnr_sampler("ddim", "kl_optimal"),
    *(zsnr_sampler("multiscale", spacing) for spacing in FOUR_SPACINGS),
    *(zsnr_sampler("dpmpp_2m", spacing) for spacing in FOUR_SPACINGS),
    zsnr_sampler("dpmpp_2m", "ays"),
    zsnr_sampler("dpmpp_2m", "kl_optimal"),
    *(zsnr_sampler("dpmpp_3m", spacing) for spacing in ("log_snr", "karras", "guided")),
    *(zsnr_sampler("unipc", spacing) for spacing in FOUR_SPACINGS),
    *(zsnr_sampler("unipc", spacing, order=3) for spacing in ("log_snr", "karras")),
    *(zsnr_sampler("ipndm", spacing, order=3) for spacing in ("log_snr", "karras", "guided")),
    *(zsnr_sampler("deis", s, order=order) for s in ("log_snr", "karras") for order in (2, 3)),
    zsnr_sampler("heun", "log_snr"),
    zsnr_sampler("heun", "guided"),
    zsnr_sampler("er_sde", "log_snr", random=True),
    zsnr_sampler("dpmpp_2m_sde", "log_snr", random=True),
)
DIFFUSERS = (
    diffusers_sampler("DDIM, trailing", "DDIMScheduler", clip_sample=False),
    diffusers_sampler("Euler, trailing", "EulerDiscreteScheduler"),
    diffusers_sampler("Euler, beta sigmas", "EulerDiscreteScheduler", use_beta_sigmas=True),
    diffusers_sampler("DPM++ 2M, trailing", "DPMSolverMultistepScheduler"),
    diffusers_sampler("DPM++ 2M, Karras", "DPMSolverMultistepScheduler", use_karras_sigmas=True),
    diffusers_sampler(
        "DPM++ 2M, uniform log SNR", "DPMSolverMultistepScheduler", use_lu_lambdas=True
    ),
    diffusers_sampler("DPM++ 3M, trailing", "DPMSolverMultistepScheduler", solver_order=3),
    diffusers_sampler("UniPC, trailing", "UniPCMultistepScheduler", final_sigmas_type="zero"),
    diffusers_sampler(
        "UniPC, Karras",
        "UniPCMultistepScheduler",
        use_karras_sigmas=True,
        final_sigmas_type="zero",
    ),
)
ALL = (*ZSNR, *DIFFUSERS)
