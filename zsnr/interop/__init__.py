"""Formats of other programs: diffusers' folders and schedulers, single files, LoRA files."""

from zsnr.interop.adapter import DiffusersScheduler
from zsnr.interop.declared import process_from_diffusers, schedule_from_diffusers
from zsnr.interop.diffusers_folder import read_diffusers_folder
from zsnr.interop.single_file import read_single_file, write_single_file

__all__ = [
    "DiffusersScheduler",
    "process_from_diffusers",
    "read_diffusers_folder",
    "read_single_file",
    "schedule_from_diffusers",
    "write_single_file",
]
