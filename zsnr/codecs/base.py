"""The base class of codecs: images to moments to latents of unit scale, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor

from zsnr.described import class_path


class LatentCodec(ABC):
    """A frozen map between images and latents.

    Images are (B, 3, H, W) in [-1, 1]. Moments are (B, 2 C, h, w), the mean and the standard
    deviation of the raw latents, side by side. Latents are (B, C, h, w) = (raw - shift) * scale,
    of about unit variance. h = H / factor, w = W / factor.

    Attributes:
        channels: C.
        factor: Downsampling factor: image pixels per latent pixel along each side.
        scale: Scale of all channels.
        shift: Shift of all channels.
    """

    channels: int
    factor: int
    scale: float
    shift: float

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to moments (B, 2 C, h, w), float32."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W), float32, not clamped."""

    @abstractmethod
    def to(self, device: torch.device | str) -> LatentCodec:
        """Move to a device, in place, and return self."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments that recreate this codec."""

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that determines the moments, as plain values, without loading weights.

        Returns:
            {"class": ..., "weights": a digest of the weights' file, or None if it is not on
            disk, ...}, independent of the files' location.
        """
        return {"class": class_path(self), "weights": None, **self._decisive()}

    def _decisive(self) -> dict[str, Any]:
        return self.settings()

    def load(self) -> Self:
        """Load the weights, unless they are loaded, and return self.

        Raises:
            ValueError: The weights cannot be read.
        """
        return self

    def release(self) -> Self:
        """Free the weights' memory and return self; the next image or latent loads them again."""
        return self

    def latents(self, moments: Tensor, z: Tensor | None = None) -> Tensor:
        """Draw latents: (mean + std z - shift) * scale.

        Args:
            moments: (B, 2 C, h, w).
            z: Standard normal noise (B, C, h, w). None = the mean itself.
        """
        mean, std = moments.chunk(2, dim=1)
        return self.standardized(mean if z is None else mean + std * z)

    def standardized(self, raw: Tensor) -> Tensor:
        """Return latents (raw - shift) * scale."""
        return (raw - self.shift) * self.scale

    def raw(self, latents: Tensor) -> Tensor:
        """Return the raw latents that the decoder takes, latents / scale + shift."""
        return latents / self.scale + self.shift

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of an image's latents.

        Raises:
            ValueError: The size is not a positive multiple of the factor.
        """
        for name, size in (("height", height), ("width", width)):
            if size <= 0 or size % self.factor:
                near = max(1, round(size / self.factor)) * self.factor
                raise ValueError(
                    f"{name}={size}: wanted a positive multiple of {self.factor}, the codec's "
                    f"downsampling factor; the nearest is {near}."
                )
        return self.channels, height // self.factor, width // self.factor


def measure_scale(codec: LatentCodec, images: Tensor) -> tuple[float, float]:
    """Measure (scale, shift) that give the latents of `images` mean 0 and variance 1.

    All channels share one scale and one shift: scaling per channel would reduce the leak of the
    mean unevenly.

    Args:
        codec: The codec; its current scale and shift have no effect.
        images: (B, 3, H, W) in [-1, 1].
    """
    mean, std = codec.encode(images).double().chunk(2, dim=1)
    shift = mean.mean()
    variance = (mean - shift).square().mean() + std.square().mean()
    return 1 / float(variance.sqrt()), float(shift)
