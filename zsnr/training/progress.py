"""Losses by timestep, summed over all ranks, and checks that tensors are finite."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Progress:
    """Losses by timestep since they were last logged, and counters of the whole run.

    Args:
        num_timesteps: Number of timesteps of the schedule.
        totals: Sums of the losses of each quarter of the timesteps, and of the last timestep.
        counts: Numbers of losses in these sums.
        terminal: Number of samples trained at the last timestep.
        skipped: Number of steps skipped because loss or gradient was not finite.
        skipped_in_a_row: Number of such steps directly before the current one.
    """

    num_timesteps: int
    totals: list[float] = field(default_factory=lambda: [0.0] * 5)
    counts: list[float] = field(default_factory=lambda: [0.0] * 5)
    terminal: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def sums(self, losses: Tensor, t: Tensor) -> list[Tensor]:
        """Sum a batch's losses, (B,), and count them, by group: two tensors (5,)."""
        T = self.num_timesteps
        group = torch.where(t == T - 1, 4, t * 4 // T).to(losses.device)
        dtype = wide(losses.device)
        totals = losses.new_zeros(2, 5, dtype=dtype)
        totals[0].index_add_(0, group, losses.to(dtype))
        totals[1].index_add_(0, group, torch.ones_like(losses, dtype=dtype))
        return [*totals]

    def add(self, totals: list[float], counts: list[float]) -> None:
        """Add the sums of all ranks."""
        self.totals = [a + b for a, b in zip(self.totals, totals, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.terminal += round(counts[4])

    def means(self) -> dict[str, float]:
        """Return the mean loss of each group that has samples, and reset the sums."""
        T = self.num_timesteps
        names = [f"t{q * T // 4:04d}_{(q + 1) * T // 4 - 1:04d}" for q in range(4)] + ["terminal"]
        groups = zip(names, self.totals, self.counts, strict=True)
        means = {name: total / count for name, total, count in groups if count}
        self.totals, self.counts = [0.0] * 5, [0.0] * 5
        return means

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores."""
        return {k: v for k, v in asdict(self).items() if k != "num_timesteps"}


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype to sum in: float64, where a device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class NonFiniteError(ValueError):
    """Loss or gradients were not finite, too many times in a row."""


def first_not_finite(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> str | None:
    """Name a tensor of weights, averages or optimizer states that is not finite on this rank.

    The largest magnitude of each tensor is computed together, and read once per device and dtype.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    tensors = dict(module.state_dict())
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"the optimizer's {key} of {names.get(id(parameter))}"] = value
    groups = defaultdict[Any, dict[str, Tensor]](dict)
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            if part.numel():
                groups[part.device, part.dtype][name] = part.detach()
    for group in groups.values():
        largest = torch.stack(torch._foreach_norm([*group.values()], math.inf))
        bad = largest.isfinite().logical_not_()
        if bad.any():
            return [*group][int(bad.int().argmax())]
    return None
