"""Stable Diffusion's autoencoder, by diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from zsnr.assets import resolve_asset
from zsnr.codecs.base import LatentCodec
from zsnr.pretrained import load_pretrained

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Precision = Literal["float32", "float16", "bfloat16"]


class AutoencoderKLCodec(LatentCodec):
    """A pretrained AutoencoderKL of diffusers, frozen.

    Args:
        pretrained: A folder or hub id, or "asset:openmoji_vae", the small one this package ships.
        subfolder: Folder inside it, such as "vae" in a Stable Diffusion folder.
        scale: Latents are (raw - shift) * scale. None = the config's scaling_factor.
        shift: None = the config's shift_factor, else 0.
        dtype: Precision it runs in. Configs that say force_upcast overflow in float16 and are run
            in float32 whatever this says.
        tiling: Decode and encode in overlapping tiles, for large images in little memory.
        slicing: Decode and encode one image at a time.
    """

    def __init__(
        self,
        pretrained: str,
        subfolder: str | None = None,
        scale: float | None = None,
        shift: float | None = None,
        dtype: Precision = "float32",
        tiling: bool = False,
        slicing: bool = False,
    ) -> None:
        from diffusers import AutoencoderKL

        self._settings = {
            "pretrained": pretrained,
            "subfolder": subfolder,
            "scale": scale,
            "shift": shift,
            "dtype": dtype,
            "tiling": tiling,
            "slicing": slicing,
        }
        vae: AutoencoderKL = load_pretrained(
            AutoencoderKL, resolve_asset(pretrained), subfolder, what="an AutoencoderKL"
        )
        config = vae.config
        overflows = dtype == "float16" and config.get("force_upcast", False)
        vae.requires_grad_(False).eval()
        wanted = torch.float32 if overflows else getattr(torch, dtype)
        if vae.dtype != wanted:
            vae.to(wanted)
        if tiling:
            vae.enable_tiling()
        if slicing:
            vae.enable_slicing()
        self._vae = vae
        self.channels = config["latent_channels"]
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.scale = config["scaling_factor"] if scale is None else scale
        self.shift = (config.get("shift_factor") or 0.0) if shift is None else shift

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        self.latent_shape(*images.shape[-2:])
        with torch.autocast(images.device.type, enabled=False):  # its dtype is its own choice
            posterior = self._vae.encode(images.to(self._vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        raw = latents / self.scale + self.shift
        with torch.autocast(latents.device.type, enabled=False):
            images: Tensor = self._vae.decode(raw.to(self._vae.dtype)).sample
        return images.float()

    def to(self, device: torch.device | str) -> AutoencoderKLCodec:
        self._vae.to(device)
        return self

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)
