"""Training with Lightning."""

from zsnr.training.callbacks import PredictionWriter, Previews, Throughput
from zsnr.training.data import DataModule
from zsnr.training.ema import EMAConfig
from zsnr.training.module import LatentDiffusion, LearningRate

__all__ = [
    "DataModule",
    "EMAConfig",
    "LatentDiffusion",
    "LearningRate",
    "PredictionWriter",
    "Previews",
    "Throughput",
]
