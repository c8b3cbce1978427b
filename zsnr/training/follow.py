"""`zsnr validate RUN --follow`: every checkpoint of a run is measured while training goes on."""

from __future__ import annotations

import os
import sys
import time
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ParallelStrategy

from zsnr.agreement import is_first_process, on_first_rank, raise_on_all
from zsnr.checkpoints import sharded
from zsnr.checkpoints.opening import open_checkpoint
from zsnr.checkpoints.run_folder import step_of, steps
from zsnr.locks import LOCK, SILENCE, remove_leftovers, unfinished
from zsnr.progress import counted, duration
from zsnr.reports.status import checkpoints_of_run, read_status
from zsnr.training.checkpoint_files import CheckpointFiles
from zsnr.training.image_metrics import ImageMetrics
from zsnr.training.measurements import Measurements
from zsnr.training.module import LatentDiffusion
from zsnr.training.preemption import stop_launched
from zsnr.untrusted import printable

POLL = 15.0
"""Seconds between two looks for a new checkpoint."""

SETTLED = 60.0
"""Seconds without a change after which a checkpoint that cannot be read counts as damaged."""

_SAID = ("val/loss", "metrics/luma_w1", "metrics/fid", "metrics/kid", "metrics/clip_score")


def wait_for_first(run: Path) -> Path:
    """Wait for the first checkpoint of a run that may not have begun, and return the newest.

    Raises:
        ValueError: The run has ended without a checkpoint that can be read, or is not a folder.
    """
    said = ""
    while True:
        if run.exists() and not run.is_dir():
            raise ValueError(f"{run} is a file: --follow needs the folder of a run.")
        if (run / "model_index.json").exists():
            raise ValueError(f"{run} is a model: --follow needs the folder of a run.")
        ended = how_it_ended(run)
        problem = ""
        for path in reversed(_numbered(checkpoints_of_run(run))):
            try:
                open_checkpoint(path)
            except (ValueError, OSError) as error:
                problem = str(error)
                if _age(path) < SETTLED:
                    ended = None
            else:
                return path
        if ended:
            problem = problem or "it has no checkpoints."
            raise ValueError(f"There is nothing to measure: {run} {ended}, and {problem}")
        missing = "has no checkpoint yet" if run.exists() else "does not exist yet"
        line = f"waiting for the first checkpoint: {problem or f'{run} {missing}.'}"
        if line != said and is_first_process():
            print(printable(line, one_line=True), file=sys.stderr, flush=True)
        said = line
        sleep(POLL)


def how_it_ended(run: Path) -> str | None:
    """Say how a run has ended; None where it trains, or has not begun.

    A run whose process is gone without a word may be started again: it has ended when the lock has
    not been renewed for `SILENCE` seconds.
    """
    try:
        status = read_status(run)
    except ValueError:
        return None
    of = "" if status.max_steps is None else f" of {status.max_steps}"
    if status.state == "silent":
        lock = checkpoints_of_run(run) / LOCK
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime < SILENCE:
                return None
        return f"has ended without a word at step {status.step}{of}"
    if status.state == "running":
        return None
    return f"has {status.state} at step {status.step}{of}"


class HeldCheckpoints(CheckpointFiles):
    """Reads checkpoints that a run may remove meanwhile: a hard link keeps what is being read.

    All ranks learn of a checkpoint that one of them cannot read.

    Args:
        folder: Folder of the links; it should be on the disk of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(with_optimizers=False)
        self._folder = folder
        self._held: Path | None = None
        self.reading = False

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        problem, checkpoint = None, {}
        self.reading = True
        try:
            checkpoint = super().load_checkpoint(self._hold(Path(path)))
        except Exception as error:  # of any kind: the other ranks must not wait
            problem = error
        raise_on_all(problem)
        return checkpoint

    def _hold(self, path: Path) -> Path:
        """Link a file, or the files of a folder; return the path where links are not possible."""
        held = unfinished(self._folder / path.name)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._held = held
            if path.is_dir():
                held.mkdir()
                for file in path.iterdir():
                    os.link(file, held / file.name)
            else:
                os.link(path.resolve(), held)
        except OSError:
            return path
        return held

    def release(self) -> None:
        """Remove the link."""
        held, self._held = self._held, None
        if held is not None:
            with suppress(OSError):
                sharded.remove(held)


@dataclass(frozen=True)
class _Next:
    """What all ranks do next: measure a checkpoint, end because the run has ended, or else wait."""

    checkpoint: str | None = None
    ended: str | None = None


class Follower(L.Callback):
    """Measures the checkpoints of a run, the oldest first, until the run has ended.

    Args:
        trainer: A trainer of validate.
        module: The model, whose weights each checkpoint replaces.
        data: The validation data.
        run: Folder of the run.
        results: Where measurements are recorded, opened on the first rank.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        module: LatentDiffusion,
        data: L.LightningDataModule,
        run: Path,
        results: Measurements,
    ) -> None:
        self._trainer, self._module, self._data = trainer, module, data
        self._run, self._results = run, results
        self._checkpoints = checkpoints_of_run(run)
        self._files = HeldCheckpoints(Path(trainer.default_root_dir))
        trainer.strategy.checkpoint_io = self._files
        for callback in trainer.callbacks:
            if isinstance(callback, ImageMetrics):
                callback.each_step = True
        trainer.callbacks.append(self)
        self._measured: list[int] = []  # steps, in this start of the command
        self._failed: dict[int, str] = {}  # version of the checkpoint by step
        self._pending: set[int] = set()  # steps of checkpoints that were seen
        self._skipped = 0
        self._said = ""  # what is being waited for

    def follow(self) -> bool:
        """Measure all checkpoints; every rank calls it.

        Returns:
            Whether none has failed.
        """
        self._meet()
        if self._trainer.is_global_zero:
            remove_leftovers(Path(self._trainer.default_root_dir))
        ended = "stopped"
        try:
            while True:
                todo = on_first_rank(self._look)
                if todo.checkpoint is not None:
                    self._measure(Path(todo.checkpoint))
                elif todo.ended is not None:
                    ended = f"{self._run} {todo.ended}"
                    break
                else:
                    sleep(POLL)
        except SystemExit:
            stop_launched(self._trainer)  # they wait for this rank
            raise
        finally:
            with suppress(OSError):  # it is empty unless data or images were written into it
                Path(self._trainer.default_root_dir).rmdir()
            if self._trainer.is_global_zero:
                self._results.say(f"{ended}: {self._summary()}")
        return on_first_rank(lambda: not self._failed)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._files.reading = False

    def _meet(self) -> None:
        """Let the ranks form the process group that Lightning will use."""
        strategy = self._trainer.strategy
        if self._trainer.world_size == 1 or not isinstance(strategy, ParallelStrategy):
            return
        strategy.connect(self._module)
        if strategy.launcher is None:
            strategy.setup_environment()
        else:
            strategy.launcher.launch(strategy.setup_environment)

    def _look(self) -> _Next:
        """Decide on rank 0 what all ranks do next; storage may fail for a while."""
        try:
            return self._decide()
        except OSError as error:
            return self._wait(f"waiting for {self._run}: {error}")

    def _decide(self) -> _Next:
        """Find the oldest checkpoint that is complete and not measured."""
        ended = how_it_ended(self._run)  # before the listing: its last checkpoint is there by then
        listed = _numbered(self._checkpoints)
        self._tell_removed(listed)
        incomplete = None
        for path in listed:
            step, version = step_of(path), _version(path)
            if self._results.has(step, version) or self._failed.get(step) == version:
                continue
            self._pending.add(step)
            if _is_complete(path):
                return _Next(str(path))
            if _age(path) < SETTLED:
                incomplete = path
            elif path.exists():
                self._fail(path, version, ValueError(f"{path} is not complete."))
        if incomplete is None and ended is not None:
            return _Next(ended=ended)
        if incomplete is None:
            return self._wait(f"waiting for the next checkpoint of {self._run}.")
        return self._wait(f"waiting for {incomplete.name}, which is being written.")

    def _wait(self, line: str) -> _Next:
        """Let all ranks wait, and say for what."""
        if line != self._said:
            self._said = line
            self._results.say(line)
        return _Next()

    def _tell_removed(self, listed: Sequence[Path]) -> None:
        """Tell of checkpoints that were removed before they were measured."""
        for step in sorted(self._pending - {step_of(path) for path in listed}):
            self._pending.discard(step)
            self._skipped += 1
            self._results.say(
                f"step {step}: skipped, since the run has removed the checkpoint; checkpoint.keep "
                "sets how many it keeps."
            )

    def _measure(self, path: Path) -> None:
        """Measure a checkpoint; every rank calls it."""
        step, version, began = step_of(path), _version(path), time.monotonic()
        try:
            [metrics] = self._trainer.validate(
                self._module, datamodule=self._data, ckpt_path=str(path), verbose=False
            )
        except Exception as error:
            if not self._files.reading:
                raise  # of data, device or settings, which every checkpoint would meet
            on_first_rank(partial(self._cannot_read, path, version, error))
            return
        finally:
            self._files.release()
            self._files.reading = False
        seconds = time.monotonic() - began
        on_first_rank(partial(self._record, path, step, version, seconds, metrics))

    def _record(
        self, path: Path, step: int, version: str, seconds: float, metrics: dict[str, float]
    ) -> None:
        values = {tag: value for tag, value in metrics.items() if tag not in ("epoch", "step")}
        self._results.add(path, step, version, seconds, values)
        self._measured.append(step)
        self._failed.pop(step, None)
        self._pending.discard(step)
        said = ", ".join(f"{tag} {values[tag]:.4g}" for tag in _SAID if tag in values)
        self._results.say(f"step {step}: {said}, measured in {duration(seconds)}", result=True)

    def _cannot_read(self, path: Path, version: str, error: Exception) -> None:
        if path.exists():
            self._fail(path, version, error)  # else the next listing tells that it was removed

    def _fail(self, path: Path, version: str, error: Exception) -> None:
        step = step_of(path)
        self._failed[step] = version
        self._pending.discard(step)
        self._results.say(f"step {step}: not measured: {error}")

    def _summary(self) -> str:
        parts = [f"{counted(len(self._measured), 'checkpoint')} measured{_at(self._measured)}"]
        if self._failed:
            parts.append(f"{len(self._failed)} failed{_at(sorted(self._failed))}")
        if self._skipped:
            parts.append(f"{self._skipped} skipped")
        return ", ".join(parts)


def _at(steps: Sequence[int]) -> str:
    """Say at which steps; of many, at the last."""
    if not steps:
        return ""
    first = f"{len(steps) - 5} earlier, " if len(steps) > 5 else ""
    return f" (step {first}{', '.join(map(str, steps[-5:]))})"


def _numbered(folder: Path) -> list[Path]:
    return [path for path in steps(folder) if step_of(path) >= 0]


def _is_complete(path: Path) -> bool:
    """Whether what is written last is there: the index of an archive, or the end of a folder."""
    try:
        return sharded.is_sharded(path) if path.is_dir() else zipfile.is_zipfile(path)
    except OSError:
        return False


def _version(path: Path) -> str:
    """Return size and modification time of a checkpoint's file, or of the last one of a folder."""
    with suppress(OSError):
        rest = path / sharded.REST
        stat = (rest if rest.exists() else path).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return ""


def _age(path: Path) -> float:
    """Return the seconds since a file, or one of a folder, was changed; of none, a long time."""
    newest = 0.0
    for each in (path, *path.glob("*")):
        with suppress(OSError):
            newest = max(newest, each.stat().st_mtime)
    return time.time() - newest
