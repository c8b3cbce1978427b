"""One run at a time in a folder of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import ParallelStrategy

from zsnr.agreement import on_first_rank
from zsnr.locks import LOCK, SILENCE, Lock
from zsnr.training.preemption import restarted
from zsnr.training.strategy import meet


class RunLock(L.Callback):
    """Holds a folder of checkpoints against other runs.

    Args:
        folder: Of the checkpoints; all nodes must see it.
    """

    def __init__(self, folder: Path) -> None:
        # A run that is started again waits until its former owner is surely dead.
        patience = SILENCE + 30.0 if restarted() else 0.0
        self._lock = Lock(folder / LOCK, folder, patience)

    def take(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take the lock on rank 0 and tell the others, before anything is written.

        Args:
            trainer: What will train.
            module: What it will train: a sharding strategy gives it the mesh of its ranks.

        Raises:
            LockedError: Another run is in the folder.
            OSError: The folder cannot be written.
        """
        strategy = trainer.strategy
        if (
            isinstance(strategy, ParallelStrategy)
            and isinstance(strategy.cluster_environment, SLURMEnvironment | TorchElasticEnvironment)
            and trainer.world_size > 1
        ):
            strategy.connect(module)
            strategy.setup_environment()  # Lightning finds the process group made
            on_first_rank(self._lock.take)
        elif trainer.is_global_zero:
            self._lock.take()

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        meet("the start of training")

    def release(self) -> None:
        self._lock.release()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.release()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.release()
