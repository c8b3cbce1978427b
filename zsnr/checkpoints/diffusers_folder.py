"""Stable Diffusion folders of diffusers, local or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from zsnr.checkpoints.declared import schedule_from_diffusers
from zsnr.checkpoints.model import Model
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import TransformersConditioner
from zsnr.networks import UNet
from zsnr.prediction import PredictionType
from zsnr.schedule import NoiseSchedule


def read_diffusers_folder(source: str, schedule: NoiseSchedule | None = None) -> Model:
    """Read a Stable Diffusion 1 or 2 folder: unet, vae, text_encoder, tokenizer, scheduler.

    Args:
        source: A folder with model_index.json, or a hub id.
        schedule: Instead of the one its scheduler declares.

    Raises:
        ValueError: A part is missing or unreadable.
    """
    from diffusers import DDIMScheduler

    if source.startswith((".", "/", "~")) and not Path(source).exists():
        raise ValueError(f"{source}: no such folder or checkpoint.")
    if Path(source).exists() and not (Path(source) / "model_index.json").is_file():
        raise ValueError(f"{source} holds no model_index.json: wanted a folder of diffusers.")
    try:
        config = DDIMScheduler.load_config(source, subfolder="scheduler")
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"Cannot read the scheduler's config in {source}: {reason}") from error
    codec = AutoencoderKLCodec(source, subfolder="vae")
    conditioner = TransformersConditioner(
        source, subfolder="text_encoder", tokenizer_subfolder="tokenizer"
    )
    unet = UNet(pretrained=source, channels=codec.channels, context_dim=conditioner.context_dim)
    return Model(
        codec=codec,
        conditioner=conditioner,
        unet=unet,
        schedule=schedule or schedule_from_diffusers(config),
        prediction_type=cast(PredictionType, config.get("prediction_type", "epsilon")),
        image_size=(unet.unet.config["sample_size"] or 64) * codec.factor,
    )
