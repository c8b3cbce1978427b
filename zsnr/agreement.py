"""Results and errors of one rank, shared with all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from zsnr.locks import LockedError

T = TypeVar("T")
_Failure = tuple[type[Exception], str]


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do something on rank 0 while the other ranks wait, and return its result on all of them.

    Args:
        work: What rank 0 does.
        group: All ranks, in a group of their own where a thread calls it. None = the default group.

    Raises:
        Exception: The work raised it on rank 0; on other ranks a LockedError, ValueError, OSError
            or RuntimeError with its message.
    """
    failure: Exception | None = None
    shared: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            shared[1] = work()
        except Exception as error:  # the other ranks must not wait forever
            failure, shared[0] = error, _as_message(error)
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0, group=group)
    _raise(failure, shared[0])
    result: T = shared[1]
    return result


def is_first_process() -> bool:
    """Whether this process is the only or the first one, by the environment of its launcher."""
    ranks = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


def raise_on_all(error: Exception | None) -> None:
    """Raise an error of any rank on all ranks; every rank calls it.

    Args:
        error: This rank's error, or None.

    Raises:
        Exception: This rank's error, or one with the message of the first rank that failed, as in
            `on_first_rank`.
    """
    failures = [None if error is None else _as_message(error)]
    if dist.is_initialized():
        this_failure, failures = failures[0], [None] * dist.get_world_size()
        dist.all_gather_object(failures, this_failure)
    _raise(error, next((failure for failure in failures if failure is not None), None))


def _as_message(error: Exception) -> _Failure:
    """Return an error's class and message: not every exception can be sent, or rebuilt from it."""
    kinds: tuple[type[Exception], ...] = (LockedError, ValueError, OSError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    return kind, str(error) or type(error).__name__


def _raise(this_failure: Exception | None, failure: _Failure | None) -> None:
    if this_failure is not None:
        raise this_failure
    if failure is not None:
        kind, message = failure
        raise kind(message)
