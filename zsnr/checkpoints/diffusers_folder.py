"""Stable Diffusion folders of diffusers, local or on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from zsnr.checkpoints.model import Model
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import TransformersConditioner
from zsnr.networks import UNet
from zsnr.prediction import PredictionType
from zsnr.schedule import NoiseSchedule


def schedule_from_diffusers(config: Mapping[str, Any]) -> NoiseSchedule:
    """Read the schedule that a scheduler_config.json declares.

    Keys that are missing have diffusers' defaults, those of DDIMScheduler.

    Raises:
        ValueError: A beta_schedule this package does not know.
    """
    cls = str(config.get("_class_name", ""))
    if cls.startswith(("FlowMatch", "EDM", "CM", "VQ")):
        raise ValueError(f"{cls} is no variance-preserving schedule: this package has none for it.")
    zero = bool(config.get("rescale_betas_zero_snr", False))
    betas = config.get("trained_betas")
    if betas is not None:
        table, abar = [], 1.0
        for beta in betas:
            abar *= 1 - beta
            table.append(abar)
        return NoiseSchedule.from_alphas_cumprod(table, zero_terminal_snr=zero)
    num_timesteps = config.get("num_train_timesteps", 1000)
    name = config.get("beta_schedule", "linear")
    if name == "squaredcos_cap_v2":
        capped = NoiseSchedule("cosine", num_timesteps, zero_terminal_snr=False)
        if not zero:
            return capped
        return NoiseSchedule.from_alphas_cumprod(capped.alphas_cumprod, zero_terminal_snr=True)
    if name not in ("linear", "scaled_linear"):
        known = "'linear', 'scaled_linear', 'squaredcos_cap_v2'"
        raise ValueError(f"beta_schedule={name!r} is unknown. Known: {known}, or trained_betas.")
    return NoiseSchedule(
        cast(Any, name),
        num_timesteps,
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        zero_terminal_snr=zero,
    )


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
