"""Reading models: diffusers folders and this package's own checkpoints."""

from zsnr.checkpoints.declared import schedule_from_diffusers
from zsnr.checkpoints.diffusers_folder import read_diffusers_folder
from zsnr.checkpoints.model import Model
from zsnr.checkpoints.own import read_checkpoint

__all__ = ["Model", "read_checkpoint", "read_diffusers_folder", "schedule_from_diffusers"]
