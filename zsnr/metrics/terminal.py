"""The lower bound of the loss at the last timestep."""

from __future__ import annotations

import torch
from torch import Tensor


class TerminalOptimum:
    """Variance of latents around their mean image: the unconditional lower bound of the v loss.

    At the last timestep v_T = -x_0 and the network's input is pure noise (sections 3.1, 5.2).
    Without a prompt, the optimal prediction is the mean of the data, with the squared error

    L_T = mean_i Var(x_0,i) = mean_i (Var(mu_i) + E[s_i^2]),  x_0 = mu + s z,

    with i over channels and pixels. With prompts the loss can be lower. Each shape of images has
    its own mean; their degrees of freedom are summed.
    """

    def __init__(self) -> None:
        self._counts: dict[torch.Size, int] = {}
        self._sums: dict[torch.Size, Tensor] = {}
        self._squares: dict[torch.Size, float] = {}
        self._noise = 0.0

    def add(self, mean: Tensor, std: Tensor) -> None:
        """Add latents by their mean mu and standard deviation s, (B, C, h, w) each."""
        mean, std = mean.cpu().double(), std.cpu().double()
        shape = mean.shape[1:]
        self._counts[shape] = self._counts.get(shape, 0) + len(mean)
        self._sums[shape] = self._sums.get(shape, mean.new_zeros(shape)) + mean.sum(0)
        self._squares[shape] = self._squares.get(shape, 0.0) + float(mean.square().sum())
        self._noise += float(std.square().flatten(1).mean(1).sum())

    def value(self) -> float | None:
        """Return the unbiased estimate of L_T; None if no two images have the same shape."""
        freedom = sum((count - 1) * shape.numel() for shape, count in self._counts.items())
        if not freedom:
            return None
        around = sum(
            self._squares[shape] - float(self._sums[shape].square().sum()) / count
            for shape, count in self._counts.items()
        )
        return around / freedom + self._noise / sum(self._counts.values())
