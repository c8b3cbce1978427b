"""Formats of other programs: diffusers' folders and schedulers, single files, LoRA files."""

import importlib
from typing import TYPE_CHECKING, Any

from zsnr.interop.declared import process_from_diffusers, schedule_from_diffusers
from zsnr.interop.diffusers_folder import read_diffusers_folder
from zsnr.interop.single_file import read_single_file, write_single_file

if TYPE_CHECKING:
    from zsnr.interop.adapter import DiffusersScheduler

# SchedulerMixin is where diffusers looks up how to load a scheduler of another package.
_IMPORT_DIFFUSERS = ("DiffusersScheduler", "SchedulerMixin")

__all__ = [
    "DiffusersScheduler",
    "process_from_diffusers",
    "read_diffusers_folder",
    "read_single_file",
    "schedule_from_diffusers",
    "write_single_file",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _IMPORT_DIFFUSERS:
            return getattr(importlib.import_module("zsnr.interop.adapter"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
