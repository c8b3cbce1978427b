"""Folders of diffusers whose network is a transformer: PixArt and Stable Diffusion 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zsnr.checkpoints.exported_sampling import read_exported
from zsnr.checkpoints.model import Model
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import Conditioner, SD3Conditioner, TransformersConditioner
from zsnr.interop.declared import declare, schedule_from_diffusers
from zsnr.networks import Transformer, inputs_of
from zsnr.prediction import PredictionType
from zsnr.schedule import RectifiedFlow, Schedule
from zsnr.untrusted import shown

PIXART_TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Tokens of a prompt that a pipeline reads."""

_SD3 = "StableDiffusion3Pipeline"
_FLOW = "FlowMatchEulerDiscreteScheduler"
_OTHER_FLOWS = (  # settings that make other noise levels than a shift
    *("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)


def read_transformer_folder(
    source: str,
    index: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    schedule: Schedule | None = None,
) -> Model:
    """Read a PixArt or Stable Diffusion 3 folder: transformer, vae, text encoders, scheduler.

    Args:
        source: A folder, or a hub id.
        index: Its model_index.json.
        scheduler: The config of its scheduler.
        schedule: Schedule to use instead of the declared one.

    Raises:
        ValueError: A part is missing, unreadable, or of a class that this package does not know.
    """
    kind = index.get("_class_name")
    if kind not in (*PIXART_TOKENS, _SD3):
        raise ValueError(
            f"{source} is a {shown(kind)[1:-1]}, whose transformer is a "
            f"{_class_of(index, 'transformer')}: wanted {', '.join((*PIXART_TOKENS, _SD3))}, or a "
            "folder with a UNet of Stable Diffusion 1, 2 or XL."
        )
    declared, prediction_type = _declared(source, scheduler)
    codec = AutoencoderKLCodec(source, subfolder="vae")
    conditioner: Conditioner
    if kind == _SD3:
        conditioner = SD3Conditioner(source)
    else:
        conditioner = TransformersConditioner(
            source,
            subfolder="text_encoder",
            tokenizer_subfolder="tokenizer",
            max_length=PIXART_TOKENS[str(kind)],
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
        schedule=schedule or declared,
        prediction_type=prediction_type,
        image_size=side * codec.factor,
        sampling=read_exported(source).sampling,
    )


def _declared(source: str, config: Mapping[str, Any]) -> tuple[Schedule, PredictionType]:
    """Return what a scheduler's config says of the schedule and the prediction type."""
    if config.get("_class_name") != _FLOW:
        return schedule_from_diffusers(config), declare(config).prediction_type
    for name in _OTHER_FLOWS:
        if config.get(name):
            raise ValueError(
                f"The scheduler of {source} has {name}={shown(config[name])}, which this package "
                "does not read: give the schedule, such as RectifiedFlow(shift=3.0)."
            )
    shift, timesteps = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
    if not isinstance(shift, int | float) or type(timesteps) is not int:
        raise ValueError(
            f"The scheduler of {source} has shift={shown(shift)} and num_train_timesteps="
            f"{shown(timesteps)}: wanted numbers."
        )
    return RectifiedFlow(float(shift), timesteps), "flow"


def _class_of(index: Mapping[str, Any], part: str) -> str:
    entry = index.get(part)
    name = entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 else None
    return shown(name)[1:-1] if isinstance(name, str) else "model of no class"
