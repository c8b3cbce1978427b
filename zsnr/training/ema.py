"""Exponential moving average of weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class EMAConfig:
    """How weights are averaged: ema <- decay ema + (1 - decay) weights, every optimizer step.

    Args:
        decay: Of the average; 0 = the weights themselves, 0.9999 is the paper's.
        warmup: Start with a smaller decay, (1 + n) / (10 + n) after n steps, so that the first,
            random weights are forgotten.
    """

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"EMA decay {self.decay!r}: wanted a number in [0, 1).")

    def decay_at(self, num_updates: int) -> float:
        """Return the decay of the update after `num_updates` others."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + num_updates) / (10 + num_updates))


def averaged_copy(module: ModuleT) -> ModuleT:
    """Copy a module to hold the average: float32, without gradients, in evaluation mode."""
    return copy.deepcopy(module).float().requires_grad_(False).eval()


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move the average towards the weights, in place; buffers are copied."""
    torch._foreach_lerp_(
        list(average.parameters()),
        [p.float() for p in module.parameters()],
        1 - decay,
    )
    for mine, theirs in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(theirs)
