"""The parts of a latent diffusion model, wherever they came from."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    codec: LatentCodec
    conditioner: Conditioner
    unet: UNet
    schedule: NoiseSchedule
    prediction_type: PredictionType
    image_size: int
