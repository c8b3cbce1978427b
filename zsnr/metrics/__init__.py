"""Measures of brightness and quality of images."""

from zsnr.metrics.brightness import (
    brightness,
    kept_fraction,
    mean_mode,
    moved_mean,
    principal_mean,
)
from zsnr.metrics.luma import (
    Interval,
    bootstrap_interval,
    luma,
    luma_percentile,
    mean_luma,
    rms_contrast,
    wasserstein_1,
)

__all__ = [
    "Interval",
    "bootstrap_interval",
    "brightness",
    "kept_fraction",
    "luma",
    "luma_percentile",
    "mean_luma",
    "mean_mode",
    "moved_mean",
    "principal_mean",
    "rms_contrast",
    "wasserstein_1",
]
