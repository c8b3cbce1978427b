"""Aspect-ratio buckets: shapes of about equal area, and the assignment of images to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class AspectBuckets:
    """Shapes whose sides are multiples of `step` and whose area is at most image_size^2.

    An image goes to the shape nearest in aspect ratio, and is resized and cropped to it.

    Args:
        step: Step between sides, in pixels; a multiple of the codec's times the UNet's factor.
        max_ratio: Largest ratio of longer to shorter side. Longer images are cropped to it.
    """

    step: int = 64
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"aspect.step={self.step}: wanted at least 1.")
        if self.max_ratio < 1:
            raise ValueError(f"aspect.max_ratio={self.max_ratio:g}: wanted at least 1.")

    def shapes(self, image_size: int) -> list[tuple[int, int]]:
        """List the (height, width) of all buckets, from the widest to the tallest.

        Raises:
            ValueError: image_size is not a multiple of step.
        """
        if image_size % self.step:
            raise ValueError(
                f"data.image_size={image_size} is not a multiple of data.aspect.step={self.step}."
            )
        shapes = set()
        for short in range(self.step, image_size + 1, self.step):
            long = image_size**2 // short // self.step * self.step
            if long / short <= self.max_ratio:
                shapes |= {(short, long), (long, short)}
        return sorted(shapes)


_BLOCK = 1 << 20  # images that are assigned at a time


def assign(heights: np.ndarray, widths: np.ndarray, shapes: list[tuple[int, int]]) -> np.ndarray:
    """Choose for each image the shape nearest in log aspect ratio: (N,) int16."""
    import numpy as np

    logs = np.log([h / w for h, w in shapes])
    chosen = np.empty(len(heights), np.int16)
    for i in range(0, len(heights), _BLOCK):
        part = slice(i, i + _BLOCK)
        log_ratios = np.log(heights[part] / widths[part])
        chosen[part] = np.abs(log_ratios[:, None] - logs).argmin(1)
    return chosen
