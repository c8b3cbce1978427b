"""Writing checkpoints, naming them, and finding the one that a run resumes from."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from zsnr.agreement import on_first_rank, raise_on_all
from zsnr.checkpoints import sharded
from zsnr.checkpoints.remote import Mirror, is_address
from zsnr.checkpoints.run_facts import NAME, add_start, read_run_facts, write_run_facts
from zsnr.checkpoints.run_folder import step_of, steps
from zsnr.checkpoints.snapshots import FOLDER
from zsnr.files import HeldFolder, side_file
from zsnr.locks import remove_leftovers, unfinished
from zsnr.public import public_url
from zsnr.training.checkpoint_files import CheckpointFiles, SnapshotFile
from zsnr.training.facts import run_facts, start_facts
from zsnr.training.progress import NonFiniteError, first_not_finite
from zsnr.training.strategy import meet


class Checkpoints(Checkpoint):
    """Writes checkpoints step-00001000.ckpt and their facts, run.json; last.ckpt links the newest.

    A checkpoint gets its name when it is complete: a run that is killed while it saves resumes from
    the previous one. A run that resumes from an earlier checkpoint renames later ones to
    step-00001000.ckpt.abandoned; they are never removed.

    Of a run with model.post_hoc_ema, a snapshot of the averages is written after the checkpoint, as
    snapshots/step-00001000.ckpt in the same folder, and kept. If a snapshot cannot be written,
    training continues.

    A checkpoint is written before anything else that follows the same step and may fail: callbacks
    with state in the checkpoint run before this one, all others after it.

    Args:
        dirpath: Folder of the checkpoints, which all nodes must see. None = `checkpoints` in
            trainer.default_root_dir.
        every_n_train_steps: Number of optimizer steps between two checkpoints. 0 = only at the end.
        every_n_minutes: Minutes after which a checkpoint is also written. None = by steps only.
        keep: Number of the newest checkpoints to keep.
        keep_every_n_steps: Checkpoints at multiples of this number of steps are kept forever. None
            = none of them.
        asynchronous: Whether training goes on while a checkpoint is written: it is copied to the
            host's memory first, of shards on each rank. The next checkpoint, and the end of the
            run, wait for it. None = on a GPU.
        mirror: Address in object storage, such as s3://bucket/run, to which every complete
            checkpoint and snapshot is copied while training goes on, and where old checkpoints are
            removed too. A run resumes from there by --ckpt_path ADDRESS. None = no copies.

    Raises:
        ValueError: A number is out of range, the folder is an address, or the mirror is none.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_train_steps: int = 1000,
        every_n_minutes: float | None = None,
        keep: int = 2,
        keep_every_n_steps: int | None = None,
        asynchronous: bool | None = None,
        mirror: str | None = None,
        snapshot_every_n_steps: int | None = None,
    ) -> None:
        if every_n_train_steps < 0:
            raise ValueError(
                f"checkpoint.every_n_train_steps={every_n_train_steps}: wanted 0 or more."
            )
        if every_n_minutes is not None and not every_n_minutes > 0:
            raise ValueError(f"checkpoint.every_n_minutes={every_n_minutes:g}: wanted more than 0.")
        if keep < 1:
            raise ValueError(f"checkpoint.keep={keep}: wanted at least 1.")
        if keep_every_n_steps is not None and keep_every_n_steps < 1:
            raise ValueError(
                f"checkpoint.keep_every_n_steps={keep_every_n_steps}: wanted at least 1."
            )
        if snapshot_every_n_steps is not None and snapshot_every_n_steps < 1:
            raise ValueError(
                f"checkpoint.snapshot_every_n_steps={snapshot_every_n_steps}: wanted at least 1."
            )
        if dirpath is not None and is_address(dirpath):
            raise ValueError(
                f"checkpoint.dirpath={public_url(dirpath)}: wanted a local folder. Set "
                "checkpoint.mirror to the address, to which every checkpoint is then copied."
            )
        self._mirror = None if mirror is None else Mirror(mirror)
        self.dirpath, self.keep = dirpath, keep
        self.every_n_train_steps, self.every_n_minutes = every_n_train_steps, every_n_minutes
        self.keep_every_n_steps, self.asynchronous = keep_every_n_steps, asynchronous
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self._pending: Path | None = None  # a checkpoint that may not be complete yet
        self.resumed_from = ""  # name of a checkpoint
        self._saved, self._seen, self._since = -1, -1, time.monotonic()
        self._asked = False  # rank 0 has asked all ranks for a checkpoint
        self._history: list[Any] = []  # one entry for each start of the run
        self._held: list[HeldFolder] = []  # on rank 0

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        if stage != "fit":
            return
        first = trainer.strategy.broadcast(self.resumed_from)
        if not trainer.strategy.reduce_boolean_decision(first == self.resumed_from, all=True):
            raise OSError(f"The ranks do not see the same checkpoints in {self.dirpath}.")
        folders = Path(self.dirpath), Path(trainer.default_root_dir)
        on_first_rank(lambda: self._prepare(*folders))
        trainer.callbacks = sorted(trainer.callbacks, key=self._order)

    def _prepare(self, folder: Path, root: Path) -> None:
        """Make the folders of the run, check that they can be written, and remove leftovers."""
        try:
            self._held = [HeldFolder(root), HeldFolder(folder)]
            remove_leftovers(folder)
            remove_leftovers(folder / FOLDER)
            probe = folder / ".probe.ckpt"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(f"{folder} cannot be written: {error}") from error

    def _order(self, callback: Callback) -> int:
        if isinstance(callback, Checkpoints):
            return 1
        stateful = any(
            is_overridden(name, callback, Callback) for name in ("state_dict", "on_save_checkpoint")
        )
        return 0 if stateful else 2

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check that all ranks resume from the same step, and record this start in run.json.

        Raises:
            ValueError: They do not.
        """
        first = trainer.strategy.broadcast(trainer.global_step)
        if first != trainer.global_step:
            raise ValueError(
                f"Rank {trainer.global_rank} resumes from step {trainer.global_step}, rank 0 from "
                f"step {first}: all nodes must see the same {self.dirpath}."
            )
        self._saved = self._seen = trainer.global_step
        self._since = time.monotonic()
        if trainer.is_global_zero:
            assert self.dirpath is not None
            folder = Path(self.dirpath)
            _set_aside(folder, trainer.global_step)
            _set_aside(folder / FOLDER, trainer.global_step)
            with side_file(folder / NAME):
                facts = read_run_facts(folder) or run_facts(trainer, pl_module, self._history)
                self._history = add_start(facts, start_facts(trainer, pl_module))
                write_run_facts(folder, {**facts, "history": self._history})
        self._write_missing_snapshot(trainer)
        averages = pl_module.post_hoc_config
        if averages is not None and 0 < trainer.max_steps < averages.first_update:
            rank_zero_warn(
                f"The run of {trainer.max_steps} steps ends before the first update of its "
                f"averages, and writes no snapshots: model.post_hoc_ema.every_n_steps="
                f"{averages.every_n_steps} is too large. Set it to 1."
            )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if step == self._seen:  # another micro-batch of the next step
            return
        self._seen = step
        due = self.every_n_train_steps and step % self.every_n_train_steps == 0
        if self.every_n_minutes is not None and trainer.is_global_zero and not self._asked:
            late = time.monotonic() - self._since > 60 * self.every_n_minutes
            pl_module.save_requested = self._asked = late
            due = due or (late and trainer.world_size == 1)
        if due or pl_module.save_agreed:
            self.save(trainer)
        elif step % max(1, trainer.log_every_n_steps) == 0:
            on_first_rank(self._check_folders)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Put the facts of the run into its checkpoint."""
        checkpoint["run"] = run_facts(trainer, pl_module, self._history)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        self._history = checkpoint.get("run", {}).get("history", [])

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Add the metrics of a validation at the step of the last checkpoint to run.json."""
        if trainer.state.fn == "fit" and trainer.global_step == self._saved:
            self._write_facts(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.save(trainer, wait=True)
        self._write_missing_snapshot(trainer, last=True)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self._pending is not None:  # the run has failed, its last checkpoint need not
            files = trainer.strategy.checkpoint_io
            if isinstance(files, CheckpointFiles) and files.wait() is None:
                self._conclude(trainer, self._pending)
            self._pending = None
        if self._mirror is not None:
            self._mirror.wait()
        for folder in self._held:
            folder.close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def save(self, trainer: L.Trainer, wait: bool = False) -> None:
        """Write a checkpoint of this step, unless there is one; every rank calls it.

        Args:
            trainer: Trainer of the run.
            wait: Whether to return only when it is complete.

        Raises:
            OSError: This checkpoint or the one before cannot be written, or the folder of the run
                is gone.
            NonFiniteError: A tensor of the checkpoint is not finite.
        """
        on_first_rank(self._check_folders)
        files = trainer.strategy.checkpoint_io
        files = files if isinstance(files, CheckpointFiles) else CheckpointFiles()
        self._finish(trainer, files)
        step = trainer.global_step
        if step == self._saved:
            return
        assert self.dirpath is not None
        folder = Path(self.dirpath)
        meet(f"the checkpoint of step {step}")
        module: Any = trainer.lightning_module
        module.settle()
        module.record()
        path = folder / f"step-{step:08d}.ckpt"
        on_gpu = trainer.strategy.root_device.type == "cuda"
        background = on_gpu if self.asynchronous is None else self.asynchronous
        last = wait or step == trainer.max_steps
        with module.evaluated_weights(saves=True):
            broken = first_not_finite(trainer.lightning_module, trainer.optimizers)
            message = (
                f"{path} is not written: {broken} is not finite. Resume from the checkpoint before "
                "it with trainer.gradient_clip_val or bf16 instead of fp16, or start from scratch "
                "with a lower learning rate."
            )
            raise_on_all(None if broken is None else NonFiniteError(message))
            with files.deferring(background, self._snapshot(module, step, last)):
                trainer.save_checkpoint(path, weights_only=False)
        raise_on_all(files.problem)
        self._saved, self._since, self._asked = step, time.monotonic(), False
        module.save_requested = module.save_agreed = False
        self._pending = path
        if wait or not background:
            self._finish(trainer, files)

    def _snapshot(self, module: Any, step: int, last: bool = False) -> SnapshotFile | None:
        """Return the snapshot that belongs to the checkpoint of a step; None = it has none."""
        every = self.snapshot_every_n_steps
        if module.post_hoc_end == 0 or not (last or every is None or step % every == 0):
            return None
        assert self.dirpath is not None
        path = Path(self.dirpath) / FOLDER / f"step-{step:08d}.ckpt"
        return SnapshotFile(path, module.averaged_names())

    def _write_missing_snapshot(self, trainer: L.Trainer, last: bool = False) -> None:
        """Write the snapshot of a step whose checkpoint was written without it.

        A run may have been killed between the two, or end at a step that is not a multiple.
        """
        snapshot = self._snapshot(trainer.lightning_module, trainer.global_step, last)
        files = trainer.strategy.checkpoint_io
        if snapshot is None or not isinstance(files, CheckpointFiles):
            return
        if on_first_rank(lambda: os.path.lexists(snapshot.path)):
            return
        with files.deferring(False, replace(snapshot, alone=True)):
            trainer.save_checkpoint(snapshot.path, weights_only=False)
        if trainer.is_global_zero and self._mirror is not None and snapshot.path.exists():
            self._mirror.copy_snapshot(snapshot.path)

    def _finish(self, trainer: L.Trainer, files: CheckpointFiles) -> None:
        """Wait for the last checkpoint to be complete; every rank calls it.

        Raises:
            OSError: It cannot be written.
        """
        path, self._pending = self._pending, None
        if path is None:
            return
        raise_on_all(files.wait())
        self._conclude(trainer, path)

    def _conclude(self, trainer: L.Trainer, path: Path) -> None:
        """Link a complete checkpoint as the last, record its facts, and remove old ones."""
        self._write_facts(trainer)
        if trainer.is_global_zero:
            folder = path.parent
            with side_file(folder / "last.ckpt"):
                _link(folder / "last.ckpt", path.name)
            with side_file(folder):
                removed = [old for old in steps(folder)[: -self.keep] if not self._stays(old)]
                for old in removed:
                    sharded.remove(old)
                if self._mirror is not None:
                    self._mirror.copy(path, [old.name for old in removed], folder / FOLDER)

    def _stays(self, checkpoint: Path) -> bool:
        """Whether an old checkpoint is kept, or still being copied."""
        every = self.keep_every_n_steps
        copied = self._mirror is not None and self._mirror.copying == checkpoint
        return copied or (every is not None and step_of(checkpoint) % every == 0)

    def _check_folders(self) -> None:
        """Check on rank 0 that the folder of the run is still the one that it began in."""
        for folder in self._held:
            folder.check()

    def _write_facts(self, trainer: L.Trainer) -> None:
        """Write run.json on rank 0; a run continues without it."""
        if trainer.is_global_zero:
            assert self.dirpath is not None
            module: Any = trainer.lightning_module
            with side_file(Path(self.dirpath) / NAME):
                self._check_folders()  # a deleted folder must not be made again
                write_run_facts(Path(self.dirpath), run_facts(trainer, module, self._history))


def _set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints of later steps than the one that the run resumes from."""
    for path in steps(folder):
        if step_of(path) > step:
            aside = path.with_name(f"{path.name}.abandoned")
            with side_file(aside):
                sharded.remove(aside)
                path.rename(aside)
                rank_zero_warn(
                    f"The run resumes from step {step}; {path.name} is now {aside.name}."
                )


def _link(link: Path, name: str) -> None:
    beside = unfinished(link)
    try:
        beside.symlink_to(name)
    except OSError:  # a file system without links: `last` is found without it
        return
    if link.is_dir() and not link.is_symlink():
        sharded.remove(link)
    os.replace(beside, link)
