"""Optimizer steps whose loss or gradient is not finite: skipped, recorded, and at last refused."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from torch import Tensor

from zsnr.files import side_file
from zsnr.training.progress import NonFiniteError, Progress

_FILE = "skipped_steps.jsonl"
_MOST_AT_THE_END = 3  # skipped steps in a row with which a run is no success
_CURE = (
    "Set trainer.gradient_clip_val, use bf16 instead of fp16, and resume from an earlier "
    "checkpoint, or start from scratch with a lower learning rate."
)


def record_skipped(
    trainer: L.Trainer,
    progress: Progress,
    loss: float,
    norm: float,
    batches: Sequence[tuple[list[str], Tensor]],
    max_in_a_row: int,
) -> None:
    """Record a step that is not finite; every rank calls it.

    Args:
        trainer: Trainer of the run.
        progress: Counts of the run; the step is added.
        loss: Mean loss of the global batch.
        norm: Norm of the gradient.
        batches: Keys and losses of the samples of this rank, by micro-batch.
        max_in_a_row: Number of skipped steps in a row that are allowed.

    Raises:
        NonFiniteError: More than `max_in_a_row` steps in a row were not finite.
    """
    progress.skipped_in_a_row += 1
    progress.skipped += 1
    step = trainer.global_step
    bad = [
        key
        for keys, losses in batches
        for key, value in zip(keys, losses.tolist(), strict=True)
        if not math.isfinite(value)
    ]
    keys = bad or [key for keys, _ in batches for key in keys]
    by_rank: list[Any] = [keys]
    if dist.is_initialized():
        by_rank = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, (bool(bad), keys))
        any_bad = any(is_bad for is_bad, _ in by_rank)
        by_rank = [keys for is_bad, keys in by_rank if is_bad or not any_bad]
    keys = [key for keys in by_rank for key in keys]
    line = {"step": step, "loss": str(loss), "grad_norm": str(norm), "keys": keys}
    path = Path(trainer.default_root_dir) / _FILE
    if trainer.is_global_zero:
        with side_file(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        warnings.warn(
            f"Step {step} is skipped: loss {loss:g}, gradient norm {norm:g}, samples "
            f"{', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}; {path} lists all of them.",
            stacklevel=2,
        )
    if progress.skipped_in_a_row > max_in_a_row:
        raise NonFiniteError(
            f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not "
            f"finite, the last with samples {', '.join(keys[:4])}; see {path}. {_CURE}"
        )


def check_last_steps(trainer: L.Trainer, progress: Progress, steps: int) -> None:
    """Refuse a run whose last steps, or all `steps` of this start, were skipped.

    Raises:
        NonFiniteError: They were.
    """
    row = progress.skipped_in_a_row
    if steps and row >= min(steps, _MOST_AT_THE_END):
        raise NonFiniteError(
            f"The run has ended, but the last {row} of {trainer.global_step} steps were skipped: "
            f"their loss or gradient was not finite; see {Path(trainer.default_root_dir) / _FILE}. "
            f"{_CURE}"
        )
