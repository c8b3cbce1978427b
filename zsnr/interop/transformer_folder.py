"""Folders of diffusers whose network is a transformer: PixArt and Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zsnr.checkpoints.exported_sampling import read_exported
from zsnr.checkpoints.model import Model
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import Conditioner, SD3Conditioner, TransformersConditioner
from zsnr.networks import Transformer, inputs_of
from zsnr.prediction import PredictionType
from zsnr.schedule import Schedule
from zsnr.untrusted import shown

PIXART_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Tokens of a prompt that a pipeline reads."""

SD3 = "StableDiffusion3Pipeline"


def check_transformer(source: str, index: Mapping[str, Any]) -> None:
    """Refuse a folder whose pipeline is not one of these.

    Args:
        source: A folder, or a hub id.
        index: Its model_index.json.

    Raises:
        ValueError: It is another one.
    """
    kind = index.get("_class_name")
    if kind not in (*PIXART_TOKENS, SD3):
        raise ValueError(
            f"{source} is a {shown(kind)[1:-1]}, whose transformer is a "
            f"{_class_of(index, 'transformer')}: wanted {', '.join((*PIXART_TOKENS, SD3))}, or a "
            "folder with a UNet of Stable Diffusion 1, 2 or XL."
        )


def read_transformer_folder(
    source: str, index: Mapping[str, Any], schedule: Schedule, prediction_type: PredictionType
) -> Model:
    """Read a PixArt or Stable Diffusion 3 folder: transformer, vae and text encoders.

    Args:
        source: A folder, or a hub id.
        index: Its model_index.json, as `check_transformer` accepts it.
        schedule: The schedule that it was trained on.
        prediction_type: What its network predicts.

    Raises:
        ValueError: A part is missing, unreadable, or of a class that this package does not know.
    """
    kind = index["_class_name"]
    codec = AutoencoderKLCodec(source, subfolder="vae")
    conditioner: Conditioner
    if kind == SD3:
        conditioner = SD3Conditioner(source)
    else:
        conditioner = TransformersConditioner(
            source,
            subfolder="text_encoder",
            tokenizer_subfolder="tokenizer",
            max_length=PIXART_TOKENS[kind],
            lowercase=True,
        )
    network = Transformer(pretrained=source)
    network.check_fits(**inputs_of(codec, conditioner))
    side = network.transformer.config["sample_size"]
    if type(side) is not int or side < 1:
        raise ValueError(
            f"The transformer's config in {source} has sample_size={shown(side)}: wanted one whole "
            "number, the side of a square."
        )
    return Model(
        codec=codec,
        conditioner=conditioner,
        network=network,
        schedule=schedule,
        prediction_type=prediction_type,
        image_size=side * codec.factor,
        sampling=read_exported(source).sampling,
    )


def _class_of(index: Mapping[str, Any], part: str) -> str:
    entry = index.get(part)
    name = entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 else None
    return shown(name)[1:-1] if isinstance(name, str) else "model of no class"
