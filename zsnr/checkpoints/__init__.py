"""Models in and out: diffusers folders, this package's own checkpoints, diffusers' schedulers."""

from zsnr.checkpoints.adapter import DiffusersScheduler
from zsnr.checkpoints.diffusers_folder import read_diffusers_folder, schedule_from_diffusers
from zsnr.checkpoints.model import Model
from zsnr.checkpoints.own import read_checkpoint

__all__ = [
    "DiffusersScheduler",
    "Model",
    "read_checkpoint",
    "read_diffusers_folder",
    "schedule_from_diffusers",
]
