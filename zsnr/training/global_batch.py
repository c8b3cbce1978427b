"""One global batch size, whatever the number of devices."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from zsnr.data.order import accumulation

# What trainers were asked for, in optimizer steps; a trainer may fit more than once.
_INTERVALS: WeakKeyDictionary[L.Trainer, Any] = WeakKeyDictionary()


class GlobalBatch(L.Callback):
    """Sets the accumulation that data.batch_size, data.max_batch_size_per_device and ranks give.

    trainer.val_check_interval then counts optimizer steps, as everything else does.
    """

    _limit: int | float | None = None  # of validation batches, as the trainer was asked for

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Set it, before training starts.

        Raises:
            ValueError: The batch does not divide by the ranks, or the trainer asks for another
                accumulation.
        """
        data: Any = trainer.datamodule
        if stage != "fit" or not hasattr(data, "max_batch_size_per_device"):
            return
        most = data.max_batch_size_per_device
        wanted = accumulation(data.batch_size, trainer.world_size, most)
        asked = trainer.accumulate_grad_batches
        if asked not in (1, wanted):
            raise ValueError(
                f"trainer.accumulate_grad_batches={asked}, but data.batch_size={data.batch_size} "
                f"on {trainer.world_size} ranks with data.max_batch_size_per_device={most} is "
                f"{wanted}: leave it out, and set data.max_batch_size_per_device."
            )
        if any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks):
            raise ValueError(
                "GradientAccumulationScheduler would take other steps than data.batch_size says: "
                "leave it out of trainer.callbacks, and set data.max_batch_size_per_device."
            )
        if trainer.limit_train_batches != 1.0 and not (
            trainer.fast_dev_run or trainer.overfit_batches
        ):
            raise ValueError(
                f"trainer.limit_train_batches={trainer.limit_train_batches} would train on the "
                "same batches again and again: set trainer.max_steps."
            )
        self._limit = trainer.limit_val_batches
        if getattr(data, "val", None) is None:
            trainer.limit_val_batches = 0  # Lightning would wonder at a loader without batches
        interval = _INTERVALS.setdefault(trainer, trainer.val_check_interval)
        if isinstance(interval, int):
            trainer.val_check_interval = interval * wanted
        trainer.accumulate_grad_batches = wanted
        each = data.batch_size // trainer.world_size // wanted
        rank_zero_info(
            f"Global batch {data.batch_size} = {trainer.world_size} ranks x {wanted} accumulated "
            f"x {each} samples."
        )
        if most is not None and wanted > 1 and 2 * each <= most:
            rank_zero_warn(
                f"A device could hold {most} samples but gets {each} at a time: "
                f"{data.batch_size // trainer.world_size}, its share of data.batch_size, has no "
                "larger divisor. Choose a batch size that has."
            )

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self._limit is not None:
            trainer.limit_val_batches = self._limit

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Count the batches of a run that had another accumulation as this one would have."""
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
        # what loggers call a step; Lightning counts one too many after some resumes
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
