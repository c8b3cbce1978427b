"""What loading in processes needs of the machine: open files and shared memory."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, multiprocessing
from torch.utils.data import get_worker_info

_FILES, _FILES_PER_WORKER = 40, 8  # that a process has open, and for each worker
_PLENTY = 65536  # open files that are asked for
_ROOMY = 1024  # open files with which batches may be handed over as files


class MachineError(OSError):
    """The machine does not give what loading in processes needs."""


class Shared:
    """Collates in a worker's process, and puts the tensors into shared memory there.

    Left to the queue between the processes, a full /dev/shm would lose the batch without a word to
    the process that waits for it.

    Args:
        collate: What makes a batch.
        num_workers: How many processes load.

    Raises:
        MachineError: So many processes may not open enough files.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], num_workers: int) -> None:
        self._collate, self._num_workers = collate, num_workers
        if not num_workers:
            return
        now, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        if resource.RLIM_INFINITY in (now, limit):
            return
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, min(limit, _PLENTY)), limit))
        if limit < _ROOMY:
            multiprocessing.set_sharing_strategy("file_system")  # type: ignore[no-untyped-call]
        wanted = _FILES + _FILES_PER_WORKER * num_workers
        if limit < wanted:
            raise MachineError(
                f"data.num_workers={num_workers} needs about {wanted} open files, and a process "
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
                    f"{error}: data.num_workers={self._num_workers} processes hand over batches "
                    "in shared memory. Give it more room (docker run --shm-size=8g), or set "
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
