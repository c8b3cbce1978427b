"""Codecs between images and latents."""

from zsnr.codecs.autoencoder_kl import AutoencoderKLCodec
from zsnr.codecs.base import LatentCodec, measure_scale
from zsnr.codecs.pixels import PixelCodec

__all__ = ["AutoencoderKLCodec", "LatentCodec", "PixelCodec", "measure_scale"]
