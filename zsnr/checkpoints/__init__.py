"""This package's own checkpoints: files and folders of shards, runs and their facts.

The readers and writers of other programs' formats are also found here by their public names.
"""

import importlib
from typing import TYPE_CHECKING, Any

from zsnr.checkpoints.checkpoint_file import read_checkpoint
from zsnr.checkpoints.model import Model

_INTEROP = (
    "DiffusersScheduler",
    "read_diffusers_folder",
    "read_single_file",
    "schedule_from_diffusers",
    "write_single_file",
)

__all__ = ["Model", "read_checkpoint", *_INTEROP]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _INTEROP:
            return getattr(importlib.import_module("zsnr.interop"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
