"""Training losses by timestep, summed over all ranks, and whether they are finite."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zsnr.training.tags import TERMINAL, quarters


@dataclass
class Progress:
    """Training losses by timestep, and counts of the run.

    Args:
        num_timesteps: Number of timesteps of the schedule, T.
        window: Number of exposures of the last timestep that its mean loss is taken over.
        totals: Sums of the losses since they were last logged: of each quarter of the timesteps,
            and of the last timestep alone.
        counts: Numbers of samples in these sums.
        exposures: Sum of losses and number of samples at the last timestep, of the most recent
            steps that together hold at least `window` of them, the oldest first.
        terminal: Number of samples at the last timestep in the whole run.
        skipped: Number of steps that were not finite.
        skipped_in_a_row: How many of the most recent steps were not finite.
        cut_captions: Number of captions that were longer than the text encoder reads.
        by_name: Sum of the losses, and number of samples, of each source and bucket, since they
            were last logged.
    """

    num_timesteps: int
    window: int
    totals: list[float] = field(default_factory=lambda: [0.0] * 5)
    counts: list[float] = field(default_factory=lambda: [0.0] * 5)
    exposures: list[list[float]] = field(default_factory=list)
    terminal: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    cut_captions: int = 0
    by_name: dict[str, list[float]] = field(default_factory=dict)

    def add(
        self,
        totals: list[float],
        counts: list[float],
        by_name: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Add the sums of one step, taken over all ranks."""
        for name, (total, count) in (by_name or {}).items():
            sums = self.by_name.setdefault(name, [0.0, 0.0])
            sums[:] = sums[0] + total, sums[1] + count
        self.totals = [a + b for a, b in zip(self.totals, totals, strict=True)]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        if counts[4]:
            self.exposures.append([totals[4], counts[4]])
            self.terminal += round(counts[4])
        held = sum(count for _, count in self.exposures)
        while self.exposures and held - self.exposures[0][1] >= self.window:
            held -= self.exposures.pop(0)[1]

    def means(self) -> dict[str, float]:
        """Return the mean losses by tag, and forget all but those of the last timestep.

        That is averaged over `window` exposures, all others since the last call.
        """
        names = [f"train_by_timestep/{quarter}" for quarter in quarters(self.num_timesteps)]
        sums = zip(names, self.totals, self.counts, strict=False)  # the fifth is in `exposures`
        means = {name: total / count for name, total, count in sums if count}
        for name, (total, count) in self.by_name.items():
            if count:
                means[f"loss_by_{name}"] = total / count
        self.by_name = {}
        if self.exposures:
            total, count = (sum(column) for column in zip(*self.exposures, strict=True))
            means[TERMINAL] = total / count
        self.totals, self.counts = [0.0] * 5, [0.0] * 5
        return means

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        settings = ("num_timesteps", "window")
        return {k: v for k, v in asdict(self).items() if k not in settings}


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
