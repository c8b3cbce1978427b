"""Brightness as torchmetrics classes, accumulated over batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.wrappers.abstract import WrapperMetric

from zsnr.metrics.luma import luma_percentile, mean_luma, rms_contrast, wasserstein_1


class MeanLuma(Metric):
    """Mean of `mean_luma` over images (B, 3, H, W) in [-1, 1]."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _add_sums(self)

    def update(self, images: Tensor) -> None:
        _add(self, mean_luma(images))

    def compute(self) -> Tensor:
        return _mean(self)


class RMSContrast(Metric):
    """Mean of `rms_contrast` over images (B, 3, H, W) in [-1, 1]."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        _add_sums(self)

    def update(self, images: Tensor) -> None:
        _add(self, rms_contrast(images))

    def compute(self) -> Tensor:
        return _mean(self)


class LumaPercentile(Metric):
    """Mean of `luma_percentile` over images (B, 3, H, W) in [-1, 1].

    Args:
        q: Percentage: 1 measures the black level, and 99 the white level.
        **options: Options of torchmetrics.Metric.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, q: float, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= q <= 100:
            raise ValueError(f"q={q:g}: wanted a percentage in [0, 100].")
        self.q = q
        _add_sums(self)

    def update(self, images: Tensor) -> None:
        _add(self, luma_percentile(images, self.q))

    def compute(self) -> Tensor:
        return _mean(self)


class LatentMean(Metric):
    """Mean of each channel of latents (B, C, h, w), over pixels and images: (C,).

    Args:
        channels: C.
        **options: Options of torchmetrics.Metric.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(**options)
        self.channels = channels
        _add_sums(self, channels)

    def update(self, latents: Tensor) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.channels or not latents.numel():
            raise ValueError(
                f"Latents of shape {tuple(latents.shape)}: wanted (B, {self.channels}, h, w) with "
                "at least one."
            )
        _add(self, latents.double().mean((2, 3)))

    def compute(self) -> Tensor:
        return _mean(self)


class LumaSpread(Metric):
    """Standard deviation of `mean_luma` over images (B, 3, H, W), which the flaw reduces."""

    full_state_update = False
    values: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, images: Tensor) -> None:
        self.values.append(mean_luma(images).float())

    def compute(self) -> Tensor:
        return _collected(self, self.values).double().std(correction=0).float()


class LumaWasserstein(Metric):
    """1-Wasserstein distance between the mean luma of images and that of data.

    Args:
        reference: Mean luma of each image of the data, (N,).
        **options: Options of torchmetrics.Metric.
    """

    full_state_update = False
    values: list[Tensor]
    reference: Tensor

    def __init__(self, reference: Tensor, **options: Any) -> None:
        super().__init__(**options)
        wasserstein_1(reference, reference)  # refuses an invalid distribution
        self.register_buffer("reference", reference.detach().float(), persistent=False)
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, images: Tensor) -> None:
        self.values.append(mean_luma(images).float())

    def compute(self) -> Tensor:
        values = _collected(self, self.values)
        return torch.tensor(wasserstein_1(values, self.reference), device=values.device)


class PromptGroups(WrapperMetric):
    """A separate metric for each group of prompts, such as "dark" and "bright".

    Args:
        metric: An unused metric, which is copied for each group.
        groups: Names of the groups, the same and in the same order on every rank.
    """

    def __init__(self, metric: Metric, groups: Sequence[str]) -> None:
        super().__init__()
        if not groups or len(set(groups)) < len(groups):
            raise ValueError(f"groups={list(groups)}: wanted at least one name, each once.")
        self.groups = tuple(groups)
        self.metrics = nn.ModuleList(metric.clone() for _ in groups)

    def update(self, values: Tensor, groups: Sequence[str]) -> None:
        """Add a batch.

        Args:
            values: Input of the metric, one row per image.
            groups: The group of each image.
        """
        if len(values) != len(groups):
            raise ValueError(f"{len(groups)} groups for {len(values)} images: wanted one for each.")
        unknown = set(groups) - set(self.groups)
        if unknown:
            raise ValueError(f"Group {min(unknown)!r} is unknown. Known: {', '.join(self.groups)}.")
        for name, metric in zip(self.groups, self.metrics, strict=True):
            rows = [i for i, group in enumerate(groups) if group == name]
            if rows:
                metric.update(values[rows])  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """Return the metric by group."""
        return {
            name: metric.compute()  # type: ignore[operator]
            for name, metric in zip(self.groups, self.metrics, strict=True)
        }

    def reset(self) -> None:
        for metric in self.metrics:
            metric.reset()  # type: ignore[operator]


class InOrder(Metric):
    """Collects the rows of all ranks in the order of the images.

    `compute` returns (N, *), one row per image, independent of the number of ranks.
    """

    full_state_update = False
    rows: list[Tensor]
    places: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("places", [], dist_reduce_fx="cat")

    def update(self, rows: Tensor, places: Sequence[int]) -> None:
        """Add rows (B, *), each with the number of its image."""
        if len(rows) != len(places):
            raise ValueError(f"{len(places)} places for {len(rows)} rows: wanted one per row.")
        self.rows.append(rows.detach())
        self.places.append(torch.tensor(list(places), device=rows.device))

    def compute(self) -> Tensor:
        rows, places = _collected(self, self.rows), dim_zero_cat(self.places)
        return rows[places.argsort()]


def _add_sums(metric: Metric, *shape: int) -> None:
    zero = torch.zeros(shape, dtype=torch.float64)
    metric.add_state("total", zero, dist_reduce_fx="sum")
    metric.add_state("count", torch.tensor(0), dist_reduce_fx="sum")


def _add(metric: MeanLuma | RMSContrast | LumaPercentile | LatentMean, values: Tensor) -> None:
    metric.total += values.double().sum(0)
    metric.count += len(values)


def _mean(metric: MeanLuma | RMSContrast | LumaPercentile | LatentMean) -> Tensor:
    if not metric.count:
        raise ValueError(_NONE.format(type(metric).__name__))
    return (metric.total / metric.count).float()


def _collected(metric: Metric, values: list[Tensor]) -> Tensor:
    rows: Tensor = dim_zero_cat(values) if len(values) else torch.empty(0)
    if not len(rows):
        raise ValueError(_NONE.format(type(metric).__name__))
    return rows


_NONE = "{} has no images: wanted at least one."
