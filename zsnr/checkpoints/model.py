"""The parts of a latent diffusion model, wherever they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.networks import UNet
from zsnr.prediction import PredictionType
from zsnr.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class Model:
    """What a checkpoint holds and says.

    Args:
        codec: Images to latents and back.
        conditioner: Prompts to conditioning.
        unet: The network.
        schedule: The schedule it was trained on.
        prediction_type: What the network predicts.
        image_size: Height and width it was trained at, in pixels.
        raw_unet: The network with the weights of the last step where `unet` has averaged ones, for
            guidance away from it. None = not there, or not asked for.
        sampling: How it declares that it is sampled, as plain values; see `choose_sampling`. Empty
            = it declares nothing.
    """

    codec: LatentCodec
    conditioner: Conditioner
    unet: UNet
    schedule: NoiseSchedule
    prediction_type: PredictionType
    image_size: int
    raw_unet: UNet | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
