"""The lock that lets only one run at a time use a folder of checkpoints."""

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
    """Locks a folder of checkpoints against other runs.

    Args:
        folder: Folder of checkpoints, which all nodes must see.
    """

    def __init__(self, folder: Path) -> None:
        # a restarted run waits until its former owner is certainly dead
        patience = SILENCE + 30.0 if restarted() else 0.0
        self._lock = Lock(folder / LOCK, folder, patience)

    def take(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Take the lock on rank 0 before anything is written; all ranks learn of a failure.

        Args:
            trainer: Trainer of the run.
            module: Model in training, to which a sharding strategy gives the mesh of its ranks.

        Raises:
            LockedError: Another run uses the folder.
            OSError: The folder cannot be written.
        """
        strategy = trainer.strategy
        if (
            isinstance(strategy, ParallelStrategy)
            and isinstance(strategy.cluster_environment, SLURMEnvironment | TorchElasticEnvironment)
            and trainer.world_size > 1
        ):
            strategy.connect(module)
            strategy.setup_environment()  # Lightning will use this process group
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
