"""Reading and writing of models: diffusers folders and schedulers, single files, checkpoints."""

from zsnr.checkpoints.adapter import DiffusersScheduler
from zsnr.checkpoints.checkpoint_file import read_checkpoint
from zsnr.checkpoints.declared import schedule_from_diffusers
from zsnr.checkpoints.diffusers_folder import read_diffusers_folder
from zsnr.checkpoints.model import Model
from zsnr.checkpoints.single_file import read_single_file, write_single_file

__all__ = [
    "DiffusersScheduler",
    "Model",
    "read_checkpoint",
    "read_diffusers_folder",
    "read_single_file",
    "schedule_from_diffusers",
    "write_single_file",
]
