"""Averages of weights: exponential ones, and power functions to combine after training."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import nn

from zsnr.power_average import check_sigma_rel
from zsnr.training.strategy import local

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class EMAConfig:
    """Moving average of the weights: ema <- decay ema + (1 - decay) weights, every optimizer step.

    Args:
        decay: Decay of the average at each optimizer step; 0.9999 in the paper. 0 = the weights
            themselves.
        warmup: Whether the decay is at most (1 + n) / (10 + n) after n steps, so that the random
            weights of the start are forgotten.
        every_n_steps: Number of optimizer steps between two updates of the average, each by the
            product of that many decays: cheaper, with the same memory of the past.

    Raises:
        ValueError: A number is out of range.
    """

    decay: float = 0.9999
    warmup: bool = True
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        if self.every_n_steps < 1:
            raise ValueError(f"EMA every_n_steps={self.every_n_steps}: wanted at least 1.")
        if not 0 <= self.decay < 1:
            raise ValueError(f"EMA decay {self.decay!r}: wanted a number in [0, 1).")

    def decay_at(self, num_steps: int) -> float:
        """Return the decay of one step after `num_steps` others."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + num_steps) / (10 + num_steps))

    def decay_after(self, step: int) -> float | None:
        """Return the decay after optimizer step `step`, counted from 0; None = no update."""
        if (step + 1) % self.every_n_steps:
            return None
        return math.prod(self.decay_at(n) for n in range(step + 1 - self.every_n_steps, step + 1))


@dataclass(frozen=True)
class PostHocEMA:
    """Averages from which `zsnr checkpoint average` makes one of any length after training.

    Each is a power-function average (Karras et al., arXiv:2312.02696, section 3): weights tau steps
    after the start count as tau^gamma. A snapshot of them is written with every checkpoint, and
    kept; see checkpoint.snapshot_every_n_steps. Training, validation and previews do not use them.

    Args:
        sigma_rel: Lengths of the averages that are kept: the standard deviation of each, divided by
            the length of training. Two are enough to make any other.
        every_n_steps: Number of optimizer steps between two updates, each by the product of that
            many decays. The weights in the middle of these steps stand for all of them.

    Raises:
        ValueError: A number is out of range.
    """

    sigma_rel: tuple[float, ...] = (0.05, 0.10)
    every_n_steps: int = 5

    def __post_init__(self) -> None:
        given: Any = self.sigma_rel
        lengths = tuple(given) if isinstance(given, (list, tuple)) else ()
        if any(isinstance(length, bool) or not isinstance(length, Real) for length in lengths):
            lengths = ()
        for length in lengths:
            check_sigma_rel("model.post_hoc_ema.sigma_rel", length)
        if not lengths or len(set(lengths)) < len(lengths):
            raise ValueError(
                f"model.post_hoc_ema.sigma_rel={given!r}: wanted a list of one or more "
                "different lengths, such as [0.05, 0.1]."
            )
        object.__setattr__(self, "sigma_rel", lengths)
        if type(self.every_n_steps) is not int or self.every_n_steps < 1:
            raise ValueError(
                f"model.post_hoc_ema.every_n_steps={self.every_n_steps!r}: wanted a whole number, "
                "at least 1."
            )

    @property
    def first_update(self) -> int:
        """Number of steps before the first update of the averages."""
        return self.every_n_steps // 2 + 1

    def end_after(self, num_steps: int) -> int | None:
        """Return the last of the steps that the weights after `num_steps` steps stand for.

        None = other weights stand for these steps: there is no update.
        """
        before, place = divmod(num_steps - 1, self.every_n_steps)
        return (before + 1) * self.every_n_steps if place == self.every_n_steps // 2 else None


def averaged_copy(module: ModuleT) -> ModuleT:
    """Copy a module to hold the average: float32, without gradients.

    Frozen parameters are shared, not copied.
    """
    shared: dict[int, Any] = {id(p): p for p in module.parameters() if not p.requires_grad}
    average = copy.deepcopy(module, dict(shared))  # deepcopy adds to what it is given
    for tensor in (*average.parameters(), *average.buffers()):
        if id(tensor) not in shared and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return average.requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move the average towards the weights, in place; buffers are copied.

    Each rank moves its own shards of a sharded module, without communication.
    """
    pairs = zip(average.parameters(), module.parameters(), strict=True)
    moved = [(mine, theirs) for mine, theirs in pairs if mine is not theirs]  # frozen are shared
    torch._foreach_lerp_(
        [local(mine) for mine, _ in moved],
        [local(theirs).float() for _, theirs in moved],
        1 - decay,
    )
    for mine, theirs in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(theirs)
