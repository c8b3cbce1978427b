"""The flaw and its fix on the user's own pictures, without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zsnr.metrics import brightness
from zsnr.noise import SampleNoise
from zsnr.oracle import EmpiricalDenoiser
from zsnr.samplers import DDIM
from zsnr.schedule import NoiseSchedule
from zsnr.timesteps import get_timesteps


@dataclass(frozen=True)
class Arm:
    """One way to sample.

    Args:
        name: What to call it in tables.
        zero_terminal_snr: Whether the schedule is rescaled.
        spacing: The timestep spacing.
    """

    name: str
    zero_terminal_snr: bool
    spacing: str


ARMS = (
    Arm("original schedule, leading", False, "leading"),
    Arm("original schedule, trailing", False, "trailing"),
    Arm("rescaled schedule, leading", True, "leading"),
    Arm("rescaled schedule, trailing (fixed)", True, "trailing"),
)


def oracle_brightness(
    images: Tensor, num_samples: int = 256, num_steps: int = 50, batch_size: int = 64
) -> dict[str, Tensor]:
    """Sample each arm with the exact denoiser of `images`, from the same noise, by DDIM.

    Args:
        images: (N, 3, H, W) in [-1, 1].
        num_samples: Samples of each arm, seeds 0, 1, 2, ...
        num_steps: S.
        batch_size: Samples at a time.

    Returns:
        Brightness of the samples, (num_samples,), by the arm's name.
    """
    return oracle_samples(images, brightness, ARMS, num_samples, num_steps, batch_size)


def oracle_samples(
    images: Tensor,
    measure: Callable[[Tensor], Tensor],
    arms: Sequence[Arm] = ARMS,
    num_samples: int = 256,
    num_steps: int = 50,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """Do as `oracle_brightness`, and measure what is asked for.

    Args:
        images: (N, C, h, w), in pixels or latents.
        measure: (B, C, h, w) of samples to (B,).
        arms: The ways to sample.
        num_samples: Samples of each arm.
        num_steps: S.
        batch_size: Samples at a time.
    """
    from tqdm import tqdm

    found: dict[str, Tensor] = {}
    starts = range(0, num_samples, batch_size)
    with tqdm(total=len(arms) * len(starts), desc="exact denoiser", unit="batch") as bar:
        for arm in arms:
            schedule = NoiseSchedule(zero_terminal_snr=arm.zero_terminal_snr)
            denoiser = EmpiricalDenoiser(schedule, images)
            timesteps = get_timesteps(arm.spacing, num_steps)
            rows = []
            for start in starts:
                seeds = range(start, min(start + batch_size, num_samples))
                x_T = SampleNoise(seeds).randn(images.shape[1:])
                rows.append(measure(DDIM().sample(denoiser, schedule, x_T, timesteps)))
                bar.update()
            found[arm.name] = torch.cat(rows)
    return found
