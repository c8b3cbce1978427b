"""Luma of images, and distances between its distributions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

REC_709 = (0.2126, 0.7152, 0.0722)


def luma(images: Tensor) -> Tensor:
    """Compute Y = 0.2126 R + 0.7152 G + 0.0722 B on the encoded values (Rec. 709).

    Args:
        images: (B, 3, H, W), -1 is black and 1 is white.

    Returns:
        (B, H, W), float32 (float64 for float64 input), in the same range.

    Raises:
        ValueError: The shape is wrong or empty, or a value is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.numel():
        raise ValueError(
            f"Images of shape {tuple(images.shape)}: wanted (B, 3, H, W) with at least one image "
            "and pixel."
        )
    pixels = images if images.dtype == torch.float64 else images.float()
    if not pixels.isfinite().all():
        raise ValueError("Images hold values that are not finite (NaN or inf).")
    red, green, blue = REC_709
    return red * pixels[:, 0] + green * pixels[:, 1] + blue * pixels[:, 2]


def mean_luma(images: Tensor) -> Tensor:
    """Average luma over the pixels of each image: (B, 3, H, W) -> (B,)."""
    return luma(images).flatten(1).mean(1)


def rms_contrast(images: Tensor) -> Tensor:
    """Measure luma's standard deviation over the pixels of each image: (B, 3, H, W) -> (B,).

    sqrt(mean((Y - mean(Y))^2)), 0 for a flat image and at most 1.
    """
    return luma(images).flatten(1).std(1, correction=0)


def saturation(images: Tensor) -> Tensor:
    """Average chroma over the pixels of each image: (B, 3, H, W) -> (B,).

    (max(R, G, B) - min(R, G, B)) / 2 on the encoded values: 0 for gray, 1 for a pure color.
    """
    pixels = images.float()
    return (pixels.amax(1) - pixels.amin(1)).flatten(1).mean(1) / 2


def luma_percentile(images: Tensor, q: float) -> Tensor:
    """Find the luma below which q percent of an image's pixels lie: (B, 3, H, W) -> (B,).

    Values between two pixels are interpolated linearly.

    Raises:
        ValueError: q is not in [0, 100].
    """
    if not 0 <= q <= 100:
        raise ValueError(f"q={q:g}: wanted a percentage in [0, 100].")
    return torch.stack([row.quantile(q / 100) for row in luma(images).flatten(1)])


def wasserstein_1(a: Tensor, b: Tensor) -> float:
    """Measure the 1-Wasserstein distance between two empirical distributions of numbers.

    W_1 = integral |F_a(x) - F_b(x)| dx, exact in float64.

    Args:
        a: (N,), one number per sample.
        b: (M,).

    Raises:
        ValueError: The values are not 1-D, empty, or not finite.
    """
    a, b = (_numbers(values).sort().values for values in (a, b))
    x = torch.cat([a, b]).sort().values
    F_a, F_b = (torch.searchsorted(c, x[:-1], right=True).double() / len(c) for c in (a, b))
    return float(((F_a - F_b).abs() * x.diff()).sum())


class Interval(NamedTuple):
    """A statistic of the samples, and the bounds of its confidence interval."""

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Callable[..., float | Tensor],
    *samples: Tensor | Sequence[Tensor],
    level: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    paired: int = 0,
) -> Interval:
    """Compute a confidence interval of a statistic by the percentile bootstrap.

    Each group of samples is resampled with replacement. A group of several parts, such as one part
    per training seed, is nested: parts are resampled first, then samples within each drawn part.
    The bounds of a distance such as W_1 are biased upwards if it is close to the spread of
    resamples.

    Args:
        statistic: Maps the groups, tensors or lists of tensors, to one number: `wasserstein_1`, or
            `lambda arms, data: wasserstein_1(torch.cat(arms), data)`.
        *samples: Groups, each (N, ...) or a sequence of such tensors.
        level: Confidence level.
        num_resamples: Number of resamples.
        seed: Seed of the resamples.
        paired: The first `paired` groups are resampled with the same indices, such as images that
            different models generated from the same prompts and seeds.

    Raises:
        ValueError: There are no samples, a number is out of range, or paired groups differ in size.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level:g}: wanted a number between 0 and 1.")
    if num_resamples < 1:
        raise ValueError(f"num_resamples={num_resamples}: wanted at least 1.")
    sizes = [[len(part) for part in _parts(group)] for group in samples]
    if not sizes or not all(counts and all(counts) for counts in sizes):
        raise ValueError("There are no samples: wanted at least one in each group and part.")
    if paired > len(samples) or any(counts != sizes[0] for counts in sizes[1:paired]):
        raise ValueError(f"paired={paired}, but the groups' sizes are {sizes}: wanted equal sizes.")
    generator = torch.Generator().manual_seed(seed)
    estimate = float(statistic(*samples))
    statistics = []
    for _ in range(num_resamples):
        drawn: list[_Draw] = []
        for i, counts in enumerate(sizes):
            drawn.append(drawn[0] if 0 < i < paired else _draw(counts, generator))
        statistics.append(float(statistic(*map(_resampled, samples, drawn))))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(statistics, dtype=torch.float64).quantile(tails).tolist()
    return Interval(estimate, low, high)


def _parts(group: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [group] if isinstance(group, Tensor) else group


_Draw = list[tuple[int, Tensor]]  # parts, and the indices of the samples drawn from each


def _draw(counts: Sequence[int], generator: torch.Generator) -> _Draw:
    parts = [0]
    if len(counts) > 1:
        parts = torch.randint(len(counts), (len(counts),), generator=generator).tolist()
    return [(i, torch.randint(counts[i], (counts[i],), generator=generator)) for i in parts]


def _resampled(group: Tensor | Sequence[Tensor], draw: _Draw) -> Tensor | list[Tensor]:
    if isinstance(group, Tensor):
        return group[draw[0][1].to(group.device)]
    return [group[i][rows.to(group[i].device)] for i, rows in draw]


def _numbers(values: Tensor) -> Tensor:
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"Values of shape {tuple(values.shape)}: wanted (N,), one number per sample, N >= 1."
        )
    values = values.detach().to("cpu", torch.float64)
    if not values.isfinite().all():
        raise ValueError("Values are not finite (NaN or inf).")
    return values
