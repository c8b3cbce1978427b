"""Stable Diffusion's autoencoder, implemented by diffusers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from zsnr.assets import resolve_asset
from zsnr.codecs.base import LatentCodec
from zsnr.untrusted import shown
from zsnr.weights.ldm_file import default_part
from zsnr.weights.pretrained import Precision, as_dtype, load_pretrained, load_whole, read_config
from zsnr.weights.source import digest, find_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


_KIND = "an AutoencoderKL"
_STEM = "diffusion_pytorch_model"
_NOT_THE_MOMENTS = {
    "force_upcast",
    "latents_mean",
    "latents_std",
    "sample_size",
    "scaling_factor",
    "shift_factor",
}


class AutoencoderKLCodec(LatentCodec):
    """A pretrained, frozen AutoencoderKL of diffusers.

    Its config is read immediately, its weights when the first image or latent is processed.

    Args:
        pretrained: A folder or hub id, a single file (.safetensors) of a model or of a VAE alone,
            or "asset:openmoji_vae", the small VAE that is bundled with this package.
        subfolder: Folder inside `pretrained`, such as "vae" in a Stable Diffusion folder.
        scale: Latents are (raw - shift) * scale. None = the config's scaling_factor. The file of a
            VAE alone does not tell it: 0.18215 for Stable Diffusion 1 and 2, 0.13025 for XL. Where
            the config has latents_mean and latents_std, each channel is standardized by them first.
        shift: Subtracted before the scale is applied. None = the config's shift_factor, or 0 if it
            has none.
        dtype: Precision of the computation. VAEs whose config sets force_upcast overflow in float16
            and always use float32.
        tiling: Decode and encode in overlapping tiles, to save memory for large images.
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
        self._settings = {
            "pretrained": pretrained,
            "subfolder": subfolder,
            "scale": scale,
            "shift": shift,
            "dtype": dtype,
            "tiling": tiling,
            "slicing": slicing,
        }
        self._source = resolve_asset(pretrained)
        self._subfolder = default_part(self._source, subfolder, "vae")
        self._tiling, self._slicing = tiling, slicing
        config = load_pretrained(
            SimpleNamespace(from_pretrained=_full_config),
            self._source,
            self._subfolder,
            label=_KIND,
        )
        self.overflows_in_float16 = bool(config["force_upcast"])
        overflows = dtype == "float16" and self.overflows_in_float16
        self._dtype: torch.dtype = torch.float32 if overflows else as_dtype(dtype)
        self._device = torch.get_default_device()  # as that of modules
        self._loaded: AutoencoderKL | None = None
        self.channels = config["latent_channels"]
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.scale = config["scaling_factor"] if scale is None else scale
        self.shift = (config["shift_factor"] or 0.0) if shift is None else shift
        if self.scale is None:
            raise ValueError(
                f"{pretrained} does not tell the scale of its latents: set scale to 0.18215 for "
                "the VAE of Stable Diffusion 1 and 2, or to 0.13025 for that of XL."
            )
        for name, value in (("scaling_factor", self.scale), ("shift_factor", self.shift)):
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} of {pretrained}: wanted a number.")
        self._channels = _channel_statistics(config, pretrained)
        if self.scale == 0:
            raise ValueError(f"scaling_factor=0 of {pretrained}: wanted another number.")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        self.latent_shape(*images.shape[-2:])
        with torch.autocast(images.device.type, enabled=False):  # the codec chooses the dtype
            posterior = self.vae.encode(images.to(self._dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        raw = self.raw(latents)
        with torch.autocast(latents.device.type, enabled=False):
            images: Tensor = self.vae.decode(raw.to(self._dtype)).sample
        return images.float()

    def standardized(self, raw: Tensor) -> Tensor:
        """Return latents, standardized per channel where the VAE's config has latents_mean."""
        if self._channels is not None:
            mean, std = (part.to(raw) for part in self._channels)
            raw = (raw - mean) / std
        return super().standardized(raw)

    def raw(self, latents: Tensor) -> Tensor:
        """Return the raw latents that the decoder takes; the inverse of `standardized`."""
        raw = super().raw(latents)
        if self._channels is None:
            return raw
        mean, std = (part.to(raw) for part in self._channels)
        return raw * std + mean

    def to(self, device: torch.device | str) -> AutoencoderKLCodec:
        self._device = torch.device(device)
        if self._channels is not None:
            self._channels = [part.to(self._device) for part in self._channels]
        if self._loaded is not None:
            self._loaded.to(self._device)
        return self

    def load(self) -> Self:
        if self._loaded is None:
            self._loaded = self._read()
        return self

    def release(self) -> Self:
        self._loaded = None
        return self

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def _decisive(self) -> dict[str, Any]:
        config = read_config(self._source, self._subfolder) or {}
        return {
            "config": {k: v for k, v in config.items() if k not in _NOT_THE_MOMENTS},
            "dtype": str(self._dtype).removeprefix("torch."),
            "tiling": self._tiling,
            "weights": digest(find_weights(self._source, self._subfolder, _STEM)),
        }

    @property
    def vae(self) -> AutoencoderKL:
        self.load()
        return self._loaded

    def _read(self) -> AutoencoderKL:
        from diffusers import AutoencoderKL

        # The first image may be decoded in inference mode, where weights would not be reusable.
        with torch.inference_mode(False):
            vae: AutoencoderKL = load_whole(
                AutoencoderKL,
                self._source,
                self._subfolder,
                label=_KIND,
                options={"torch_dtype": self._dtype},
            )
            vae.requires_grad_(False).eval().to(self._device)
        if self._tiling:
            vae.enable_tiling()
        if self._slicing:
            vae.enable_slicing()
        return vae


def _channel_statistics(config: Mapping[str, Any], pretrained: str) -> list[Tensor] | None:
    """Return latents_mean and latents_std of a config, each (C, 1, 1); None if it has neither.

    Raises:
        ValueError: They are not one number for each channel.
    """
    parts = [config["latents_mean"], config["latents_std"]]
    if parts == [None, None]:
        return None
    for name, part in zip(("latents_mean", "latents_std"), parts, strict=True):
        numbers = part if isinstance(part, list | tuple) else []
        finite = all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        if (
            len(numbers) != config["latent_channels"]
            or not finite
            or (0 in numbers and "std" in name)
        ):
            raise ValueError(
                f"{name}={shown(part)} of {pretrained}: wanted a number for each of the "
                f"{config['latent_channels']} channels."
            )
    return [torch.tensor(part, device="cpu").view(-1, 1, 1) for part in parts]


def _full_config(source: str, subfolder: str, use_safetensors: bool) -> dict[str, Any]:
    """Read the config without weights, and add the defaults of missing settings."""
    from diffusers import AutoencoderKL

    config = AutoencoderKL.load_config(source, subfolder=subfolder)
    name = config.get("_class_name", AutoencoderKL.__name__)
    if name != AutoencoderKL.__name__:
        raise ValueError(f"its config is of {name}.")
    with torch.device("meta"):
        full = dict(AutoencoderKL.from_config(config).config)
    # The class's default, true, would forbid float16 to the VAEs that were made before the key.
    return {**full, "force_upcast": config.get("force_upcast", False)}
