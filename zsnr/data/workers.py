"""Resources of the machine for loading in worker processes: open files and shared memory."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, multiprocessing
from torch.utils.data import get_worker_info

_FILES, _FILES_PER_WORKER = 40, 8  # open files of a process, and additional ones per worker
_REQUESTED_FILES = 65536  # limit on open files to request
_MIN_FILES_FOR_DESCRIPTORS = 1024  # limit above which batches are passed as file descriptors


class MachineError(OSError):
    """The machine lacks resources for loading in worker processes."""


class Shared:
    """Collates in a worker process, and moves the tensors to shared memory there.

    If the queue between the processes did this, a full /dev/shm would lose the batch without any
    error in the process that waits for it.

    Args:
        collate: Collates a batch.
        num_workers: Number of worker processes.

    Raises:
        MachineError: The limit on open files is too low for this number of processes.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], num_workers: int) -> None:
        self._collate, self._num_workers = collate, num_workers
        if not num_workers:
            return
        now, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        if resource.RLIM_INFINITY in (now, limit):
            return
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, min(limit, _REQUESTED_FILES)), limit))
        if limit < _MIN_FILES_FOR_DESCRIPTORS:
            multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
        required = _FILES + _FILES_PER_WORKER * num_workers
        if limit < required:
            raise MachineError(
                f"data.num_workers={num_workers} needs about {required} open files, and a process "
                f"may have {limit} here: raise it (ulimit -n), or set data.num_workers to at most "
                f"{max(0, (limit - _FILES) // _FILES_PER_WORKER)}."
            )

    def __call__(self, samples: list[Any]) -> Any:
        batch = self._collate(samples)
        if get_worker_info() is not None:
            try:
                _share(batch)
            except RuntimeError as error:
                raise MachineError(
                    f"{error}: data.num_workers={self._num_workers} processes pass batches through "
                    "shared memory. Make it larger (docker run --shm-size=8g), or set "
                    "data.num_workers=0."
                ) from error
        return batch


def _share(value: Any) -> None:
    if isinstance(value, Tensor):
        value.share_memory_()  # type: ignore[no-untyped-call]
    elif isinstance(value, Mapping):
        for part in value.values():
            _share(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _share(part)
    elif dataclasses.is_dataclass(value):
        _share(vars(value))
