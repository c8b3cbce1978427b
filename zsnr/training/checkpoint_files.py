"""Reading and writing of checkpoints for Lightning, in this thread or in another one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.optim import Optimizer

from zsnr.agreement import raise_on_all
from zsnr.checkpoints import sharded
from zsnr.checkpoints.run_folder import resolve_model
from zsnr.checkpoints.snapshots import snapshot_of
from zsnr.files import side_file
from zsnr.untrusted import open_archive


@dataclass(frozen=True)
class SnapshotFile:
    """A snapshot to write beside a checkpoint, see `snapshot_of`.

    Args:
        path: Its path.
        averaged: Names of the weights that are averaged.
        alone: Whether the checkpoint itself is not written.
    """

    path: Path
    averaged: Collection[str]
    alone: bool = False


class CheckpointFiles(TorchCheckpointIO):
    """Reads and writes checkpoints, files and folders of shards.

    Args:
        with_optimizers: Whether the optimizer states of a folder of shards are read, which only
            training needs. Those of a file stay on disk until they are used.
    """

    def __init__(self, with_optimizers: bool = True) -> None:
        self.with_optimizers = with_optimizers
        self.problem: Exception | None = None
        self._defer, self._background = False, False
        self._snapshot: SnapshotFile | None = None
        self._thread: Thread | None = None
        self._group: Any = None  # of the threads of all ranks

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        snapshot = self._snapshot
        try:
            if not self._background:
                _save(checkpoint, Path(path), snapshot)
                return
            copied = on_host(checkpoint)
        except Exception as error:  # of any kind: the other ranks must not wait
            if not self._defer:
                raise
            self.problem = error
            return
        self._start(lambda: _save(copied, Path(path), snapshot))

    def save_shards(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Write a checkpoint whose tensors are sharded over the ranks; every rank calls it.

        Args:
            checkpoint: Lightning's checkpoint, with DTensors.
            folder: Output folder, shared by all ranks.

        Raises:
            OSError: The folder cannot be written; where a thread writes it, `wait` tells it.
            RuntimeError: A rank has no memory for a copy of its shards.
        """
        snapshot = self._snapshot
        if not self._background:
            _save_shards(checkpoint, folder, snapshot)
            return
        problem, copied = None, {}
        try:
            copied = on_host(checkpoint)
        except Exception as error:  # no rank must wait for the thread of this one
            problem = error
        raise_on_all(problem)
        if self._group is None and dist.is_initialized():  # training uses the default group
            self._group = dist.new_group(backend="gloo")
        self._start(lambda: _save_shards(copied, folder, snapshot, self._group))

    def _start(self, work: Callable[[], None]) -> None:
        """Write in a thread."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # `wait` tells it
                self.problem = error

        self._thread = Thread(target=run)
        self._thread.start()

    def wait(self) -> Exception | None:
        """Wait for the checkpoint that is being written, and return its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.problem

    @contextmanager
    def deferring(self, background: bool, snapshot: SnapshotFile | None = None) -> Iterator[None]:
        """Keep an error as `problem`, because rank 0 saves alone while the others wait for it.

        Args:
            background: Whether a thread writes the checkpoint; `wait` then waits for it.
            snapshot: What is written after the checkpoint, by the same thread. None = nothing.
        """
        self._defer, self._background, self.problem = True, background, None
        self._snapshot = snapshot
        try:
            yield
        finally:
            self._defer, self._background, self._snapshot = False, False, None

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; the tensors of a file are memory-mapped, see `unmap`."""
        path = resolve_model(path)
        if sharded.is_sharded(path):
            return sharded.consolidate(path, with_optimizers=self.with_optimizers)
        return open_archive(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        sharded.remove(Path(path))


def unmap(optimizer: Optimizer) -> None:
    """Copy the state that an optimizer has taken from a memory-mapped checkpoint as it is.

    The file may be overwritten while the run goes on. What was moved to a device is a copy already.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                state[name] = value.clone()


def _save(checkpoint: dict[str, Any], path: Path, snapshot: SnapshotFile | None) -> None:
    if snapshot is None or not snapshot.alone:
        if path.is_dir():
            sharded.remove(path)
        sharded.save_file(checkpoint, path)
    if snapshot is not None:
        with side_file(snapshot.path):
            sharded.save_file(snapshot_of(checkpoint, snapshot.averaged), snapshot.path)


def _save_shards(
    checkpoint: dict[str, Any],
    folder: Path,
    snapshot: SnapshotFile | None,
    group: dist.ProcessGroup | None = None,
) -> None:
    if snapshot is None or not snapshot.alone:
        sharded.write_sharded(checkpoint, folder, group)
    if snapshot is not None:
        with side_file(snapshot.path):  # an error of one rank is raised on all of them
            part = snapshot_of(checkpoint, snapshot.averaged)
            sharded.write_sharded(part, snapshot.path, group)


def on_host(value: Any, copies: dict[int, Any] | None = None) -> Any:
    """Copy what a checkpoint holds to the host's memory, where training does not change it.

    Tensors that occur several times stay one.
    """
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", copy=True)
        return copies[id(value)]
    if isinstance(value, Mapping):
        copied: Any = copy.copy(value)  # with the metadata of a state dict
        for name, part in value.items():
            copied[name] = on_host(part, copies)
        return copied
    if type(value) in (list, tuple):
        return type(value)(on_host(part, copies) for part in value)
    return copy.deepcopy(value)
