"""FID, KID and IS by torchmetrics, on precomputed features; the statistics of real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsnr.files import replacing

KEPT_FEATURES = 10_000
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


@dataclass(frozen=True)
class RealStatistics:
    """Statistics of real images, with which generated images are compared.

    Args:
        luma: Mean luma of each image, (N,).
        image_size: Height and width they were cropped to, in pixels.
        source: A digest that identifies the images.
        extractor: Fingerprint of the network; "" = only luma.
        mean: Mean of the features, (D,) float64.
        covariance: Covariance of the features, (D, D) float64, divided by N - 1.
        features: A subset of the features (M, D), for KID.
    """

    luma: Tensor
    image_size: int
    source: str
    extractor: str = ""
    mean: Tensor | None = None
    covariance: Tensor | None = None
    features: Tensor | None = None

    @property
    def count(self) -> int:
        """N."""
        return len(self.luma)

    def write(self, path: Path) -> None:
        """Write a safetensors file; a crash leaves none."""
        from safetensors.torch import save_file

        tensors = {
            name: tensor.cpu().contiguous()
            for name in ("luma", "mean", "covariance", "features")
            if (tensor := getattr(self, name)) is not None
        }
        facts = {"image_size": str(self.image_size), "source": self.source}
        facts |= {"extractor": self.extractor, "count": str(self.count), "format": _FORMAT}
        with replacing(path) as beside:
            save_file(tensors, beside, facts)

    @classmethod
    def read(cls, path: Path) -> RealStatistics:
        """Read a file that `write` wrote.

        Raises:
            ValueError: The file does not exist, or was not written by `write`.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ValueError(f"{path}: no such file of statistics.")
        try:
            with safe_open(path, "pt") as file:
                facts: Mapping[str, str] = file.metadata() or {}
                tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        if facts.get("format") != _FORMAT or "luma" not in tensors:
            raise ValueError(f"{path} holds no statistics of real images.")
        names = ("luma", "mean", "covariance", "features")
        try:
            return cls(
                image_size=int(facts["image_size"]),
                source=facts["source"],
                extractor=facts["extractor"],
                **{name: tensors[name] for name in names if name in tensors},
            )
        except KeyError as error:
            raise ValueError(
                f"{path} lacks {error.args[0]}: compute the statistics again."
            ) from error

    def check(self, where: str, image_size: int, extractor: str, source: str | None) -> None:
        """Refuse statistics of other images, or of another feature extractor.

        Args:
            where: The file, for the error.
            image_size: Required image size.
            extractor: Required extractor; "" = no features are needed.
            source: Required source; None = any.

        Raises:
            ValueError: A value differs.
        """
        remedy = "Compute them again: choose another file, or remove this one."
        if self.image_size != image_size:
            raise ValueError(
                f"{where} describes images of {self.image_size} pixels, but the model generates "
                f"{image_size}. {remedy}"
            )
        if extractor and self.extractor != extractor:
            has = f"features of {self.extractor!r}" if self.extractor else "no features"
            raise ValueError(f"{where} has {has}, wanted those of {extractor!r}. {remedy}")
        if source is not None and self.source != source:
            raise ValueError(f"{where} describes other images than metrics.real. {remedy}")


def real_statistics(
    luma: Tensor,
    features: Tensor | None = None,
    *,
    image_size: int,
    source: str,
    extractor: str = "",
) -> RealStatistics:
    """Compute the statistics of real images.

    Args:
        luma: Mean luma of each image, (N,).
        features: (N, D). None = no features were extracted.
        image_size: Height and width of the images, in pixels.
        source: A digest that identifies the images.
        extractor: Fingerprint of the network that computed the features.

    Raises:
        ValueError: There are fewer than two images, or features are all equal or not finite.
    """
    facts: dict[str, Any] = {"image_size": image_size, "source": source, "extractor": extractor}
    if features is None:
        return RealStatistics(luma, **facts)
    check_features(features, "real images")
    rows = features.double()
    chosen = torch.linspace(0, len(rows) - 1, min(len(rows), KEPT_FEATURES)).round().long()
    return RealStatistics(
        luma,
        mean=rows.mean(0),
        covariance=torch.cov(rows.T).reshape(rows.shape[1], -1),
        features=features[chosen.to(features.device)],
        **facts,
    )


def frechet_distance(real: RealStatistics, features: Tensor) -> float:
    """Compute FID = ||m_r - m||^2 + tr(C_r + C - 2 (C_r C)^(1/2)), in float64.

    Args:
        real: Statistics with features.
        features: Features of the images, (N, D).

    Raises:
        ValueError: There are fewer than two images, or features are all equal or not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    mean, covariance, n = real.mean, real.covariance, real.count
    if mean is None or covariance is None:
        raise ValueError("FID needs the features of real images; these statistics have none.")
    check_features(features, "images")
    metric = FrechetInceptionDistance(_Known(features.shape[1]), sync_on_compute=False)
    metric.real_features_sum = mean * n
    metric.real_features_cov_sum = covariance * (n - 1) + n * mean.outer(mean)
    metric.real_features_num_samples = torch.tensor(n)
    metric.update(features.double().cpu(), real=False)
    return float(metric.compute())


def kernel_distance(real: RealStatistics, features: Tensor, seed: int = 0) -> tuple[float, float]:
    """Compute KID, the squared MMD with kernel (x.y / D + 1)^3, over random subsets.

    100 subsets of 1000 images, or of all images if there are fewer; unbiased for any size.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: As in `frechet_distance`.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    if real.features is None:
        raise ValueError("KID needs the features of real images; these statistics have none.")
    for rows, label in ((real.features, "real images"), (features, "images")):
        check_features(rows, label)
    size = min(KID_SUBSET_SIZE, len(features), len(real.features))
    identity = _Known(features.shape[1])
    metric = _quietly(
        KernelInceptionDistance, identity, KID_SUBSETS, subset_size=size, sync_on_compute=False
    )
    metric.update(real.features.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    return _seeded(metric, seed)


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Compute IS = exp(E KL(p(y|x) || p(y))), over random splits of the images.

    Args:
        logits: (N, K).
        splits: Number of splits, each with its own p(y).
        seed: Seed of the splits.

    Returns:
        Mean and standard deviation over the splits.

    Raises:
        ValueError: A split has fewer than two images, or logits are all equal or not finite.
    """
    from torchmetrics.image.inception import InceptionScore

    check_features(logits, "images", "logits")
    if len(logits) < 2 * splits or splits < 2:
        raise ValueError(
            f"{len(logits)} images in {splits} splits: IS needs at least 2 splits of 2 images."
        )
    metric = _quietly(InceptionScore, _Known(logits.shape[1]), splits=splits, sync_on_compute=False)
    metric.update(logits.double().cpu())
    return _seeded(metric, seed)


def check_features(rows: Tensor, label: str, kind: str = "features") -> None:
    """Refuse features that have no distribution.

    Raises:
        ValueError: There are fewer than two, or they are all equal or not finite.
    """
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} {label}: wanted at least 2 to compare distributions.")
    if not rows.isfinite().all():
        raise ValueError(f"The {kind} of {label} are not finite (NaN or inf).")
    if (rows == rows[:1]).all():
        raise ValueError(
            f"All {len(rows)} {label} have the same {kind}: they have no distribution to compare."
        )


class _Known(nn.Module):
    """A network that returns its input, which already holds the features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _quietly(cls: Any, *arguments: Any, **options: Any) -> Any:
    """Make a metric without its warning that it stores features, which is intended."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(*arguments, **options)


def _seeded(metric: Any, seed: int) -> tuple[float, float]:
    """Compute a metric with a seed; the state of the global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


_FORMAT = "zsnr real statistics 1"
