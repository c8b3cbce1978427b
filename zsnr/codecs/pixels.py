"""Lossless codec with pixels as latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from zsnr.codecs.base import LatentCodec


class PixelCodec(LatentCodec):
    """Space to depth: each patch of pixels becomes the channels of one latent pixel.

    Args:
        patch_size: Side of a patch, in pixels; 1 = the image itself. C = 3 patch_size^2.
        scale: Latents are (pixels - shift) * scale.
        shift: Subtracted before the scale is applied.
    """

    def __init__(self, patch_size: int = 4, scale: float = 1.0, shift: float = 0.0) -> None:
        if patch_size < 1:
            raise ValueError(f"patch_size={patch_size}: wanted at least 1.")
        if scale <= 0:
            raise ValueError(f"scale={scale}: wanted a positive number.")
        self.channels, self.factor = 3 * patch_size**2, patch_size
        self.scale, self.shift = scale, shift

    def encode(self, images: Tensor) -> Tensor:
        self.latent_shape(*images.shape[-2:])
        mean = pixel_unshuffle(images.float(), self.factor)
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        return pixel_shuffle(self.raw(latents.float()), self.factor)

    def to(self, device: torch.device | str) -> PixelCodec:
        return self

    def settings(self) -> dict[str, Any]:
        return {"patch_size": self.factor, "scale": self.scale, "shift": self.shift}

    def _decisive(self) -> dict[str, Any]:
        return {"patch_size": self.factor}
