"""Brightness of pictures, and how much of its range a schedule keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from zsnr.schedule import NoiseSchedule


def brightness(images: Tensor) -> Tensor:
    """Mean over channels and pixels of each picture: (B, C, H, W) -> (B,), float32."""
    return images.float().flatten(1).mean(1)


def mean_mode(latents: Tensor) -> float:
    """Measure how far the mean of a picture stands out of the noise: S = sqrt(h w L).

    L is the largest eigenvalue of the covariance, over pictures, of the channels' means. Noise of
    unit variance has S = 1 along every direction.

    Args:
        latents: (B, C, h, w) of at least two pictures, scaled as the network sees them.

    Raises:
        ValueError: Fewer than two pictures.
    """
    if len(latents) < 2:
        raise ValueError(f"{len(latents)} pictures: wanted at least 2 to measure a spread.")
    h, w = latents.shape[-2:]
    means = latents.double().mean((2, 3))
    means = means - means.mean(0)
    covariance = means.T @ means / (len(means) - 1)
    largest = float(torch.linalg.eigvalsh(covariance)[-1].clamp(min=0))
    return float((h * w * largest) ** 0.5)


def kept_fraction(schedule: NoiseSchedule, mode: float) -> float:
    """Compute which fraction of a mode's spread sampling from pure noise keeps.

    1 / sqrt(abar_T S^2 + 1 - abar_T), which is 1 at zero terminal SNR.

    Args:
        schedule: The schedule a model was trained on.
        mode: S, such as `mean_mode` measures.
    """
    abar_T = float(schedule.alphas_cumprod[-1])
    return float((abar_T * mode**2 + 1 - abar_T) ** -0.5)
