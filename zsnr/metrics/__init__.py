"""Measures of what samples look like."""

from zsnr.metrics.brightness import brightness, kept_fraction, mean_mode

__all__ = ["brightness", "kept_fraction", "mean_mode"]
