"""Stable Diffusion folders of diffusers, local or on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zsnr.checkpoints.exported_sampling import Exported, read_exported
from zsnr.checkpoints.model import Model
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import Conditioner, SDXLConditioner, TransformersConditioner
from zsnr.interop.declared import declare, schedule_from_diffusers, with_class_of
from zsnr.interop.transformer_folder import read_transformer_folder
from zsnr.networks import UNet
from zsnr.schedule import Schedule
from zsnr.weights.pretrained import load_index, reason
from zsnr.weights.source import local_path


def read_diffusers_folder(source: str, schedule: Schedule | None = None) -> Model:
    """Read a folder of Stable Diffusion 1, 2, XL or 3, or of PixArt.

    Args:
        source: A folder with model_index.json, or a hub id.
        schedule: Schedule to use instead of the one its scheduler declares.

    Raises:
        ValueError: A part is missing or unreadable, or the folder holds another kind of model.
    """
    from diffusers import DDIMScheduler

    index = load_index(source)
    kind = index.get("_class_name")
    if "unet" not in index and not _has(index, "transformer"):
        raise ValueError(
            f"{source} is a {kind} without a unet: wanted Stable Diffusion 1, 2 or XL."
        )
    if index.get("requires_aesthetics_score"):
        raise ValueError(
            f"{source} is a refiner, whose input is an aesthetic score: wanted the base model."
        )
    root = local_path(source, "scheduler")
    try:
        config = DDIMScheduler.load_config(str(root), subfolder="scheduler")
    except Exception as error:  # an untrusted file may fail in any way
        raise ValueError(
            f"Cannot read the scheduler's config in {source}: {reason(error)}"
        ) from error
    if not isinstance(config, Mapping):
        raise ValueError(f"Cannot read the scheduler's config in {source}: wanted an object.")
    config = with_class_of(index, config)
    if _has(index, "transformer"):
        return read_transformer_folder(source, index, config, schedule)
    prediction_type = declare(config).prediction_type
    exported = read_exported(source)
    codec, conditioner, unet = read_parts(source, exported, xl=_has(index, "text_encoder_2"))
    return Model(
        codec=codec,
        conditioner=conditioner,
        network=unet,
        schedule=schedule or schedule_from_diffusers(config),
        prediction_type=prediction_type,
        image_size=_side(source, unet.unet.config["sample_size"]) * codec.factor,
        sampling=exported.sampling,
    )


def read_parts(
    source: str, exported: Exported, *, xl: bool
) -> tuple[AutoencoderKLCodec, Conditioner, UNet]:
    """Read the networks of a folder or single file; codec and encoders are loaded when needed.

    Args:
        source: The folder, hub id or file.
        exported: What it declares.
        xl: Whether it has the two text encoders of SDXL.

    Raises:
        ValueError: A part cannot be read, or does not fit the others.
    """
    codec = AutoencoderKLCodec(source, subfolder="vae")
    conditioner: Conditioner
    if xl:
        conditioner = SDXLConditioner(source, **exported.prompts)
    else:
        conditioner = TransformersConditioner(
            source,
            subfolder="text_encoder",
            tokenizer_subfolder="tokenizer",
            **exported.prompts,
        )
    unet = UNet(
        pretrained=source,
        channels=codec.channels,
        context_dim=conditioner.context_dim,
        pooled_dim=conditioner.pooled_dim,
    )
    return codec, conditioner, unet


def _side(source: str, sample_size: Any) -> int:
    """Return the side of the latents in a UNet's config; by default that of Stable Diffusion 1."""
    sides = sample_size if isinstance(sample_size, list | tuple) else [sample_size or 64]
    if len({*sides}) != 1 or type(sides[0]) is not int or sides[0] < 1:
        raise ValueError(
            f"The UNet's config in {source} has sample_size={sample_size!r}: wanted one whole "
            "number, the side of a square."
        )
    return sides[0]


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a model_index.json lists a part; [null, null] = the part is left out."""
    entry = index.get(part)
    return isinstance(entry, list | tuple) and len(entry) > 0 and entry[0] is not None
