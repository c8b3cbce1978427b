"""Exponential moving average of weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

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
