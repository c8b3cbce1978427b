"""The parts of a latent diffusion model, independent of their source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        network: The network.
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
    network: UNet
    schedule: Schedule
    prediction_type: PredictionType
    image_size: int
    raw_network: UNet | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
