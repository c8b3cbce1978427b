"""The samplers and grids that the fidelity benchmarks compare: this package's and diffusers'."""

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
        name: In the table.
        sample: (denoiser, x_T (B, *), S) -> x_0.
        random: Whether it draws noise, and so has no path of its own.
    """

    name: str
    sample: Callable[[Denoise, Tensor, int], Tensor]
    random: bool = False


def ours(sampler: str, spacing: str, *, random: bool = False, **options: Any) -> Contender:
    """One of this package's samplers on one of its grids; heun on as many steps as it may have."""

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

    told = "".join(f" {name}={value}" for name, value in options.items())
    return Contender(f"{sampler}{told}, {spacing}", sample, random)


def recommended() -> Contender:
    """What `recommend_sampling` says for the number of steps and the denoiser's guidance."""

    def sample(denoiser: Denoise, x_T: Tensor, S: int) -> Tensor:
        sampler, spacing = recommend_sampling(S, guidance_of(denoiser))
        return ours(sampler, spacing).sample(denoiser, x_T, S)

    return Contender("recommended", sample)


def theirs(name: str, cls: str, **options: Any) -> Contender:
    """A scheduler of diffusers, on its own grid; the denoiser answers at the timestep it asks for.

    Raises:
        IndexError: On sampling: it makes another number of steps.
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


PAPER = ours("ddim", "trailing")
OURS = (
    recommended(),
    PAPER,
    *(ours("ddim", spacing) for spacing in ("log_snr", "karras", "guided", "beta")),
    ours("ddim", "ays"),
    ours("ddim", "kl_optimal"),
    *(ours("multiscale", spacing) for spacing in ("trailing", "log_snr", "karras", "guided")),
    *(ours("dpmpp_2m", spacing) for spacing in ("trailing", "log_snr", "karras", "guided")),
    ours("dpmpp_2m", "ays"),
    ours("dpmpp_2m", "kl_optimal"),
    *(ours("dpmpp_3m", spacing) for spacing in ("log_snr", "karras", "guided")),
    *(ours("unipc", spacing) for spacing in ("trailing", "log_snr", "karras", "guided")),
    *(ours("unipc", spacing, order=3) for spacing in ("log_snr", "karras")),
    *(ours("ipndm", spacing, order=3) for spacing in ("log_snr", "karras", "guided")),
    *(ours("deis", spacing, order=order) for spacing in ("log_snr", "karras") for order in (2, 3)),
    ours("heun", "log_snr"),
    ours("heun", "guided"),
    ours("er_sde", "log_snr", random=True),
    ours("dpmpp_2m_sde", "log_snr", random=True),
)
THEIRS = (
    theirs("DDIM, trailing", "DDIMScheduler", clip_sample=False),
    theirs("Euler, trailing", "EulerDiscreteScheduler"),
    theirs("Euler, beta sigmas", "EulerDiscreteScheduler", use_beta_sigmas=True),
    theirs("DPM++ 2M, trailing", "DPMSolverMultistepScheduler"),
    theirs("DPM++ 2M, Karras", "DPMSolverMultistepScheduler", use_karras_sigmas=True),
    theirs("DPM++ 2M, uniform log SNR", "DPMSolverMultistepScheduler", use_lu_lambdas=True),
    theirs("DPM++ 3M, trailing", "DPMSolverMultistepScheduler", solver_order=3),
    theirs("UniPC, trailing", "UniPCMultistepScheduler", final_sigmas_type="zero"),
    theirs(
        "UniPC, Karras",
        "UniPCMultistepScheduler",
        use_karras_sigmas=True,
        final_sigmas_type="zero",
    ),
)
ALL = (*OURS, *THEIRS)
