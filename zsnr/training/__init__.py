"""Training with Lightning."""

from zsnr.training.board import TrainingBoard
from zsnr.training.callbacks import PredictionWriter
from zsnr.training.checkpoint_files import CheckpointFiles
from zsnr.training.checkpointing import Checkpoints
from zsnr.training.data import DataModule
from zsnr.training.ema import EMAConfig, PostHocEMA
from zsnr.training.image_metrics import ImageMetrics
from zsnr.training.learning_rate import LearningRate
from zsnr.training.module import LatentDiffusion
from zsnr.training.preemption import Preemption
from zsnr.training.previews import Previews
from zsnr.training.strategy import FullyShardedStrategy
from zsnr.training.watch import Watch
from zsnr.training.watchdog import Watchdog

__all__ = [
    "CheckpointFiles",
    "Checkpoints",
    "DataModule",
    "EMAConfig",
    "FullyShardedStrategy",
    "ImageMetrics",
    "LatentDiffusion",
    "LearningRate",
    "PostHocEMA",
    "PredictionWriter",
    "Preemption",
    "Previews",
    "TrainingBoard",
    "Watch",
    "Watchdog",
]
