"""The same global batch size on any number of devices."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from zsnr.data.order import accumulation
from zsnr.progress import counted

# Validation intervals that trainers were given, in optimizer steps; one may fit more than once.
_INTERVALS: WeakKeyDictionary[L.Trainer, Any] = WeakKeyDictionary()


class GlobalBatch(L.Callback):
    """Sets gradient accumulation by data.batch_size, data.max_batch_size_per_device and the ranks.

    trainer.val_check_interval then counts optimizer steps, as all other intervals do.
    """

    _limit: int | float | None = None  # of validation batches, as the trainer was asked for

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Set the accumulation before training starts.

        Raises:
            ValueError: The number of ranks does not divide the batch size, or the trainer has
                settings that contradict it.
        """
        data: Any = trainer.datamodule
        if stage != "fit" or not hasattr(data, "max_batch_size_per_device"):
            return
        maximum = data.max_batch_size_per_device
        steps = accumulation(data.batch_size, trainer.world_size, maximum)
        configured = trainer.accumulate_grad_batches
        if configured not in (1, steps):
            raise ValueError(
                f"trainer.accumulate_grad_batches={configured}, but data.batch_size="
                f"{data.batch_size} on {trainer.world_size} ranks with "
                f"data.max_batch_size_per_device={maximum} needs {steps}: leave it out, and set "
                "data.max_batch_size_per_device."
            )
        if any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks):
            raise ValueError(
                "GradientAccumulationScheduler would take other steps than data.batch_size sets: "
                "leave it out of trainer.callbacks, and set "
                "data.max_batch_size_per_device."
            )
        if trainer.limit_train_batches != 1.0 and not (
            trainer.fast_dev_run or trainer.overfit_batches
        ):
            raise ValueError(
                f"trainer.limit_train_batches={trainer.limit_train_batches} would train on the "
                "same batches repeatedly: set trainer.max_steps."
            )
        self._limit = trainer.limit_val_batches
        if getattr(data, "val", None) is None:
            trainer.limit_val_batches = 0  # Lightning warns of a loader without batches
        interval = _INTERVALS.setdefault(trainer, trainer.val_check_interval)
        if isinstance(interval, int):
            trainer.val_check_interval = interval * steps
        trainer.accumulate_grad_batches = steps
        each = data.batch_size // trainer.world_size // steps
        rank_zero_info(
            f"Global batch of {data.batch_size} = {counted(trainer.world_size, 'rank')} x "
            f"{counted(steps, 'accumulation step')} x {counted(each, 'sample')}."
        )
        if maximum is not None and steps > 1 and 2 * each <= maximum:
            rank_zero_warn(
                f"A device could process {maximum} samples but gets {each} at a time: "
                f"{data.batch_size // trainer.world_size}, its share of data.batch_size, has no "
                "larger divisor. Choose a batch size that has one."
            )

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self._limit is not None:
            trainer.limit_val_batches = self._limit

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Convert the batch counts of a run with another accumulation to those of this one."""
        loop = checkpoint.get("loops", {}).get("fit_loop")
        if loop is None:
            return
        progress = loop["epoch_loop.batch_progress"]
        was = progress["total"]["ready"] // max(1, checkpoint["global_step"])
        for counts in (progress["total"], progress["current"]):
            ready = counts["ready"]
            shift = ready // max(1, was) * trainer.accumulate_grad_batches - ready
            for name in counts:
                counts[name] += shift

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        # the step of the loggers, of which Lightning counts one too many after some resumes
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
