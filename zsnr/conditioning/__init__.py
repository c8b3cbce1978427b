"""Conditioners: encoders of prompts into the network's conditioning."""

from zsnr.conditioning.base import Conditioner
from zsnr.conditioning.class_labels import ClassLabels
from zsnr.conditioning.null import NullConditioner
from zsnr.conditioning.open_clip_text import OpenClipConditioner
from zsnr.conditioning.remembered import Remembered
from zsnr.conditioning.sd3_text import SD3Conditioner
from zsnr.conditioning.sdxl_text import SDXLConditioner
from zsnr.conditioning.transformers_text import TransformersConditioner

__all__ = [
    "ClassLabels",
    "Conditioner",
    "NullConditioner",
    "OpenClipConditioner",
    "Remembered",
    "SD3Conditioner",
    "SDXLConditioner",
    "TransformersConditioner",
]
