"""What one rank does or meets while the others wait: it reaches all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from zsnr.locks import LockedError

T = TypeVar("T")
_Told = tuple[type[Exception], str]


def on_first_rank(work: Callable[[], T]) -> T:
    """Do something on rank 0 while the other ranks wait, and return its result on all of them.

    Raises:
        Exception: The work raised it on rank 0; on other ranks a LockedError, ValueError, OSError
            or RuntimeError with its message.
    """
    failure: Exception | None = None
    told: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            told[1] = work()
        except Exception as error:  # whatever it is, the other ranks must not wait
            failure, told[0] = error, _told(error)
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    _raise(failure, told[0])
    result: T = told[1]
    return result


def raise_on_all(error: Exception | None) -> None:
    """Raise what any rank has met on all of them; every rank calls it.

    Args:
        error: What this rank has met, or None.

    Raises:
        Exception: This rank's, or one with the message of the first rank that has one, as of
            `on_first_rank`.
    """
    told = [None if error is None else _told(error)]
    if dist.is_initialized():
        own, told = told[0], [None] * dist.get_world_size()
        dist.all_gather_object(told, own)
    _raise(error, next((each for each in told if each is not None), None))


def _told(error: Exception) -> _Told:
    """Return what other ranks are told: not each exception can be sent, or made of a message."""
    kinds: tuple[type[Exception], ...] = (LockedError, ValueError, OSError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    return kind, str(error) or type(error).__name__


def _raise(own: Exception | None, told: _Told | None) -> None:
    if own is not None:
        raise own
    if told is not None:
        kind, message = told
        raise kind(message)
