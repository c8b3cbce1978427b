"""Stable Diffusion folders of diffusers, local or on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zsnr.checkpoints.exported_sampling import Exported, read_exported
from zsnr.checkpoints.model import Model
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import Conditioner, SDXLConditioner, TransformersConditioner
from zsnr.interop.declared import process_from_diffusers, with_class_of
from zsnr.interop.transformer_folder import check_transformer, read_transformer_folder
from zsnr.networks import UNet
from zsnr.prediction import PredictionType
from zsnr.schedule import Schedule
from zsnr.weights.pretrained import load_index, reason
from zsnr.weights.source import local_path


def read_diffusers_folder(
    source: str,
    schedule: Schedule | None = None,
    prediction_type: PredictionType | None = None,
) -> Model:
    """Read a folder of Stable Diffusion 1, 2, XL or 3, or of PixArt.

    Args:
        source: A folder with model_index.json, or a hub id.
        schedule: Schedule to use instead of the one its scheduler declares.
        prediction_type: Prediction type to use instead of the declared one. With both, the
            scheduler may be of any class.

    Raises:
        ValueError: A part is missing or unreadable, the folder holds another kind of model, or its
            scheduler has no schedule on timesteps.
    """
    from diffusers import DDIMScheduler

    index = load_index(source)
    kind = index.get("_class_name")
    if "unet" not in index and not _has(index, "transformer"):
        raise ValueError(
            f"{source} is a {kind} without a unet: wanted Stable Diffusion 1, 2 or XL."
        )
    if _has(index, "transformer"):
        check_transformer(source, index)
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
    if schedule is None or prediction_type is None:
        declared_schedule, declared = process_from_diffusers(config)
        schedule, prediction_type = schedule or declared_schedule, prediction_type or declared
    if _has(index, "transformer"):
        return read_transformer_folder(source, index, schedule, prediction_type)
    exported = read_exported(source)
    codec, conditioner, unet = read_parts(source, exported, xl=_has(index, "text_encoder_2"))
    return Model(
        codec=codec,
        conditioner=conditioner,
        network=unet,
        schedule=schedule,
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


def text_problem(settings: Mapping[str, Any], model_type: str) -> str | None:
    """Say what of a text encoder other programs do not have, as an object of "has". None = nothing.

    Args:
        settings: Settings of a TransformersConditioner.
        model_type: That of the encoder's config.
    """
    if model_type not in ("clip", "clip_text_model"):
        return (
            f"a text encoder of type {model_type!r}, where Stable Diffusion has a CLIP text model: "
            "train with one ('clip_text_model') to export"
        )
    if settings.get("use_mask"):
        return (
            "use_mask: true, but other programs do not mask padding in the text encoder: train "
            "with use_mask: false to export"
        )
    if settings.get("layer", -1) != -1 and not settings.get("final_norm", True):
        return (
            "final_norm: false, but other programs always apply the final norm to the context: "
            "train with final_norm: true to export"
        )
    return None


def used_layers(conditioner: TransformersConditioner) -> int:
    """Return how many of a CLIP text encoder's layers the context needs."""
    encoder: Any = conditioner.encoder
    layers, layer = int(encoder.config.num_hidden_layers), conditioner.settings()["layer"]
    # hidden_states[i] is the output of i layers; that of the last layer, [-1], includes the norm.
    return layers if layer == -1 else range(layers + 1)[layer]


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
