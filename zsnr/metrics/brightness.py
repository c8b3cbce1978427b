"""Brightness of pictures, and how much of its range a schedule keeps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zsnr.schedule import NoiseSchedule


def brightness(images: Tensor) -> Tensor:
    """Mean over channels and pixels of each picture: (B, C, H, W) -> (B,), float32."""
    return images.float().flatten(1).mean(1)


def mean_mode(latents: Tensor) -> float:
    """Measure how far the mean of a picture stands out of the noise: S of `principal_mean`."""
    return principal_mean(latents)[0]


def principal_mean(latents: Tensor) -> tuple[float, float, Tensor]:
    """Find the direction along which the means of pictures differ most.

    S = sqrt(h w L), with L the largest eigenvalue of the covariance, over pictures, of the
    channels' means. Noise of unit variance has S = 1 along every direction.

    Args:
        latents: (B, C, h, w) of at least two pictures, scaled as the network sees them.

    Returns:
        S; the mean m along the direction, in units of the latents; and the direction, a unit vector
        (C,) that points to where the mean is not negative.

    Raises:
        ValueError: Fewer than two pictures.
    """
    if len(latents) < 2:
        raise ValueError(f"{len(latents)} pictures: wanted at least 2 to measure a spread.")
    h, w = latents.shape[-2:]
    means = latents.double().mean((2, 3))
    centre = means.mean(0)
    covariance = (means - centre).T @ (means - centre) / (len(means) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    direction = vectors[:, -1]
    if direction @ centre < 0:
        direction = -direction
    return float((h * w * values[-1].clamp(min=0)) ** 0.5), float(direction @ centre), direction


def kept_fraction(schedule: NoiseSchedule, mode: float) -> float:
    """Compute which fraction of a mode's spread sampling from pure noise keeps.

    1 / sqrt(abar_T S^2 + 1 - abar_T), which is 1 at zero terminal SNR.

    Args:
        schedule: The schedule a model was trained on.
        mode: S, such as `mean_mode` measures.
    """
    abar_T = float(schedule.alphas_cumprod[-1])
    return float((abar_T * mode**2 + 1 - abar_T) ** -0.5)


def moved_mean(schedule: NoiseSchedule, mode: float, mean: float) -> float:
    """Compute where the mean along a mode comes to lie when sampling starts from pure noise.

    m (1 - S a / sqrt(a^2 S^2 + 1 - a^2)) with a = sqrt(abar_T): training ends at noise with mean
    a m and variance a^2 S^2 + 1 - a^2, sampling starts at mean 0 and variance 1, and the exact
    probability flow of a Gaussian is linear. At zero terminal SNR it is m.

    Args:
        schedule: The schedule a model was trained on.
        mode: S.
        mean: m, along the same direction.
    """
    a = math.sqrt(schedule.alphas_cumprod[-1])
    return mean * (1 - mode * a * kept_fraction(schedule, mode))
