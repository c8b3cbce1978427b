"""Measures of what samples look like."""

from zsnr.metrics.brightness import (
    brightness,
    kept_fraction,
    mean_mode,
    moved_mean,
    principal_mean,
)

__all__ = ["brightness", "kept_fraction", "mean_mode", "moved_mean", "principal_mean"]
