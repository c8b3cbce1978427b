"""Warm-up and decay of the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LearningRate:
    """Warm-up and decay of the learning rate, as a factor of the optimizer's.

    Args:
        warmup_steps: Number of optimizer steps over which the learning rate grows linearly from 0.
            0 = no warm-up.
        decay: Course of the learning rate after the warm-up: "constant", or "cosine" or "linear"
            down to `final` at trainer.max_steps.
        final: Learning rate at the end of a decay, as a fraction of the optimizer's.
    """

    warmup_steps: int = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final: float = 0.0

    def factor(self, step: int, max_steps: int) -> float:
        """Return the factor at optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left
