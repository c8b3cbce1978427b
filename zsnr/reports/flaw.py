"""The flaw and its fix on the user's images, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zsnr.metrics import brightness
from zsnr.noise import SampleNoise
from zsnr.oracle import EmpiricalDenoiser
from zsnr.reports.arms import Arm
from zsnr.samplers import get_sampler
from zsnr.schedule import NoiseSchedule, Schedule
from zsnr.timesteps import get_timesteps

ARMS = (
    Arm("original schedule, leading", "original", "leading", "ddim"),
    Arm("original schedule, trailing", "original", "trailing", "ddim"),
    Arm("rescaled schedule, leading", "rescaled", "leading", "ddim"),
    Arm("rescaled schedule, trailing (fixed)", "rescaled", "trailing", "ddim"),
)


def oracle_brightness(
    images: Tensor, num_samples: int = 256, num_steps: int = 50, batch_size: int = 64
) -> dict[str, Tensor]:
    """Sample each arm with the exact denoiser of `images`, from the same noise, by DDIM.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        num_samples: Samples per arm, with seeds 0, 1, 2, ...
        num_steps: S.
        batch_size: Samples drawn at a time.

    Returns:
        Brightness of the samples, (num_samples,), by the arm's name.
    """
    arms = [replace(arm, num_steps=num_steps) for arm in ARMS]
    return oracle_samples(images, brightness, arms, range(num_samples), batch_size)


def oracle_samples(
    images: Tensor,
    measure: Callable[[Tensor], Tensor],
    arms: Sequence[Arm] = ARMS,
    seeds: Sequence[int] = range(256),
    batch_size: int = 64,
    schedule: Schedule = NoiseSchedule(),
) -> dict[str, Tensor]:
    """Sample each arm with the exact denoiser of `images`, from the same noise.

    Args:
        images: (N, C, h, w), in pixels or latents.
        measure: Maps samples (B, C, h, w) to the values (B, *) that are returned.
        arms: The ways to sample; their guidance is ignored.
        seeds: One per sample.
        batch_size: Samples drawn at a time.
        schedule: The schedule whose original and rescaled form the arms name.

    Returns:
        (len(seeds), *), by the arm's name.
    """
    from zsnr.progress import progress_bar

    by_arm: dict[str, Tensor] = {}
    starts = range(0, len(seeds), batch_size)
    steps = len(starts) * sum(arm.num_steps for arm in arms)
    with progress_bar(steps, "exact denoiser", "step") as bar:
        for arm in (arm.resolved(guided=False) for arm in arms):
            arm_schedule = arm.schedule_of(schedule)
            denoiser = EmpiricalDenoiser(arm_schedule, images)
            grid = get_timesteps(
                arm.spacing, arm.num_steps, arm_schedule.num_timesteps, schedule=arm_schedule
            )
            sampler, rows = get_sampler(arm.sampler), []
            for start in starts:
                noise = SampleNoise(seeds[start : start + batch_size])
                samples = sampler.sample(
                    denoiser,
                    arm_schedule,
                    noise.randn(images.shape[1:]),
                    grid,
                    randn_like=noise.randn_like,
                    callback=lambda *_: bar.update(),
                )
                rows.append(measure(samples))
            by_arm[arm.name] = torch.cat(rows)
    return by_arm
