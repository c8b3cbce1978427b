"""The parts of a latent diffusion model, independent of their source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.networks import UNet
from zsnr.prediction import PredictionType
from zsnr.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Model:
    """A latent diffusion model and its settings.

    Args:
        codec: Converts images to latents and back.
        conditioner: Converts prompts to conditioning.
        network: The network, (x_t, t, conditioning) -> raw output.
        schedule: The schedule it was trained on.
        prediction_type: What the network predicts.
        image_size: Height and width it was trained at, in pixels.
        raw_network: The network with the weights of the last step, if `network` has averaged
            weights, for guidance away from it. None = not available, or not requested.
        sampling: The sampling settings that the model declares, as plain values; see
            `choose_sampling`. Empty = it declares none.
    """

    codec: LatentCodec
    conditioner: Conditioner
    network: nn.Module
    schedule: Schedule
    prediction_type: PredictionType
    image_size: int
    raw_network: nn.Module | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)


def as_unet(network: nn.Module, purpose: str) -> UNet:
    """Return a network that is a UNet of diffusers.

    Args:
        network: A network of a model.
        purpose: What a UNet is wanted for, as the beginning of a sentence.

    Raises:
        ValueError: It is another network.
    """
    if not isinstance(network, UNet):
        raise ValueError(
            f"{purpose} needs a UNet of diffusers, and the model's network is a "
            f"{type(network).__name__}: sample its checkpoint as it is, by "
            "zsnr.pipeline.TextToImage."
        )
    return network
