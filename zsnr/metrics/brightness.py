"""Brightness of images, and how much of its spread is retained by a schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zsnr.schedule import Schedule


def brightness(images: Tensor) -> Tensor:
    """Compute the mean over channels and pixels of each image: (B, C, H, W) -> (B,), float32."""
    return images.float().flatten(1).mean(1)


def mean_mode(latents: Tensor) -> float:
    """Measure the signal-to-noise ratio of the mean of an image: S of `principal_mean`."""
    return principal_mean(latents)[0]


def principal_mean(latents: Tensor) -> tuple[float, float, Tensor]:
    """Find the direction of largest variance of the means of images.

    S = sqrt(h w L), with L the largest eigenvalue of the covariance, over images, of the channels'
    means. Noise of unit variance has S = 1 along every direction.

    Args:
        latents: (B, C, h, w) of at least two images, scaled as the network's input.

    Returns:
        S; the mean m along the direction, in units of the latents; and the direction, a unit vector
        (C,) whose sign makes the mean non-negative.

    Raises:
        ValueError: There are fewer than two images.
    """
    if len(latents) < 2:
        raise ValueError(f"{len(latents)} images: wanted at least 2 to measure a spread.")
    h, w = latents.shape[-2:]
    means = latents.double().mean((2, 3))
    center = means.mean(0)
    covariance = (means - center).T @ (means - center) / (len(means) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    direction = vectors[:, -1]
    if direction @ center < 0:
        direction = -direction
    return float((h * w * values[-1].clamp(min=0)) ** 0.5), float(direction @ center), direction


def kept_fraction(schedule: Schedule, mode: float) -> float:
    """Compute `retained_fraction` at the end of a schedule.

    Args:
        schedule: The schedule a model was trained on.
        mode: S, as measured by `mean_mode`.
    """
    return retained_fraction(float(schedule.snr[-1]), mode)


def retained_fraction(snr_T: float, mode: float) -> float:
    """Compute the fraction of a mode's spread that is retained when sampling from pure noise.

    sqrt((SNR_T + 1) / (SNR_T S^2 + 1)) = 1 / sqrt(abar_T S^2 + 1 - abar_T), which is 1 at zero
    terminal SNR.

    Args:
        snr_T: The SNR at which training ends, of any process.
        mode: S, as measured by `mean_mode`.
    """
    abar_T = _abar(snr_T)
    return float((abar_T * mode**2 + 1 - abar_T) ** -0.5)


def moved_mean(schedule: Schedule, mode: float, mean: float) -> float:
    """Compute the shifted mean along a mode when sampling starts from pure noise.

    m (1 - S a / sqrt(a^2 S^2 + 1 - a^2)) with a = sqrt(abar_T): training ends at noise with mean
    a m and variance a^2 S^2 + 1 - a^2, sampling starts at mean 0 and variance 1, and the exact
    probability flow of a Gaussian is linear. At zero terminal SNR it is m.

    Args:
        schedule: The schedule a model was trained on.
        mode: S.
        mean: m, along the same direction.
    """
    a = math.sqrt(_abar(float(schedule.snr[-1])))
    return mean * (1 - mode * a * kept_fraction(schedule, mode))


def _abar(snr: float) -> float:
    """Return SNR / (SNR + 1), abar of the variance-preserving schedule with that SNR."""
    return snr / (snr + 1)
