"""What one rank does or meets while the others wait: it reaches all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from lightning.pytorch.strategies import Strategy

T = TypeVar("T")
_Told = tuple[type[Exception], str]


def on_first_rank(strategy: Strategy, work: Callable[[], T]) -> T:
    """Do something on rank 0 while the other ranks wait, and return its result on all of them.

    Raises:
        Exception: The work raised it on rank 0; on other ranks a ValueError, OSError or
            RuntimeError with its message.
    """
    failure: Exception | None = None
    result: T | None = None
    if strategy.is_global_zero:
        try:
            result = work()
        except Exception as error:  # whatever it is, the other ranks must not wait
            failure = error
    told, result = strategy.broadcast((_told(failure), result))
    _raise(failure, told)
    return result


def raise_on_all(error: Exception | None) -> None:
    """Raise what any rank has met on all of them; every rank calls it.

    Args:
        error: What this rank has met, or None.

    Raises:
        Exception: This rank's, or one with the message of the first rank that has one, as of
            `on_first_rank`.
    """
    told = [_told(error)]
    if dist.is_initialized():
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, _told(error))
    _raise(error, next((each for each in told if each is not None), None))


def _told(error: Exception | None) -> _Told | None:
    """Return what other ranks are told: not each exception can be sent, or made of a message."""
    if error is None:
        return None
    kinds: tuple[type[Exception], ...] = (ValueError, OSError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    return kind, str(error) or type(error).__name__


def _raise(own: Exception | None, told: _Told | None) -> None:
    if own is not None:
        raise own
    if told is not None:
        kind, message = told
        raise kind(message)
