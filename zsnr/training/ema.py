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
    """How weights are averaged: ema <- decay ema + (1 - decay) weights, every optimizer step.

    Args:
        decay: Of the average; 0 = the weights themselves, 0.9999 is the paper's.
        warmup: Start with a smaller decay, (1 + n) / (10 + n) after n steps, so that the first,
            random weights are forgotten.
        every_n_steps: Average every n-th step only, by the product of n steps' decays: cheaper, and
            as long a memory.
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
        """Return the decay of the update after optimizer step `step`, from 0. None = no update."""
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

    Of sharded modules each rank moves its shards, without communication.
    """
    pairs = zip(average.parameters(), module.parameters(), strict=True)
    moved = [(mine, theirs) for mine, theirs in pairs if mine is not theirs]  # else frozen
    torch._foreach_lerp_(
        [local(mine) for mine, _ in moved],
        [local(theirs).float() for _, theirs in moved],
        1 - decay,
    )
    for mine, theirs in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(theirs)
