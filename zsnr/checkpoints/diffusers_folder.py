"""Stable Diffusion folders of diffusers, local or on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from zsnr.checkpoints.model import Model
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import Conditioner, SDXLConditioner, TransformersConditioner
from zsnr.networks import UNet
from zsnr.prediction import PredictionType
from zsnr.pretrained import load_index
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
    """Read a Stable Diffusion 1, 2 or XL folder: unet, vae, text encoders, scheduler.

    Args:
        source: A folder with model_index.json, or a hub id.
        schedule: Instead of the one its scheduler declares.

    Raises:
        ValueError: A part is missing or unreadable, or the folder is of another kind.
    """
    from diffusers import DDIMScheduler

    index = load_index(source)
    kind = index.get("_class_name")
    if "unet" not in index:
        raise ValueError(f"{source} is a {kind} without unet: wanted Stable Diffusion 1, 2 or XL.")
    if index.get("requires_aesthetics_score"):
        raise ValueError(
            f"{source} is a refiner, which takes an aesthetic score: wanted the base model."
        )
    try:
        config = DDIMScheduler.load_config(source, subfolder="scheduler")
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(f"Cannot read the scheduler's config in {source}: {reason}") from error
    codec = AutoencoderKLCodec(source, subfolder="vae")
    conditioner: Conditioner
    if _has(index, "text_encoder_2"):
        conditioner = SDXLConditioner(source)
    else:
        conditioner = TransformersConditioner(
            source, subfolder="text_encoder", tokenizer_subfolder="tokenizer"
        )
    unet = UNet(
        pretrained=source,
        channels=codec.channels,
        context_dim=conditioner.context_dim,
        pooled_dim=conditioner.pooled_dim,
    )
    return Model(
        codec=codec,
        conditioner=conditioner,
        unet=unet,
        schedule=schedule or schedule_from_diffusers(config),
        prediction_type=cast(PredictionType, config.get("prediction_type", "epsilon")),
        image_size=(unet.unet.config["sample_size"] or 64) * codec.factor,
    )


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a model_index.json names a part; [null, null] = it is left out."""
    named = index.get(part)
    return isinstance(named, list | tuple) and named[0] is not None
