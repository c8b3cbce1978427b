"""The uncertainty weight of EDM2 by noise level, learned in training and bounded at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zsnr.schedule import Schedule, widest
from zsnr.timestep_law import TimestepLaw

STEP_SIZE = 0.02
"""Step size of gradient descent: u averages over the last 50 optimizer steps."""
_NUM_FEATURES = 16
_MAX_RATIO = 10.0  # of a loss to exp(u): one bad batch must not take a timestep its weight


class LearnedWeight:
    """The weight 1 / exp(u_t) of each timestep, where u_t is learned from the losses.

    Training minimizes over network and u

    E[L_t / exp(u_t) + u_t]    (Karras et al., arXiv:2312.02696, equation 14)

    where L_t is the loss of a sample at timestep t. At the optimum exp(u_t) = E[L_t], so that every
    timestep contributes a loss of 1 (equation 15). u is a linear layer without hidden layers on
    Fourier features of the noise level, zero at the start, where all weights are 1:

    u_t = sum_k c_k f_k(t),  f_0 = 1,  f_k = sqrt(2) cos(2 k atan(sigma_t / alpha_t)),  k = 1 .. 15

    The angle, from 0 to pi / 2, is finite at zero SNR. The features are orthonormal where angles
    are drawn uniformly, and the Hessian of the objective at its optimum is E[f f^T], near the
    identity. So plain gradient descent learns all c_k at about one rate, from sums over the batch
    that ranks can add up: it needs no state of an optimizer, and has no part in the learning rate,
    the weight decay and the clipped gradient of the network.

    **Bound.** The loss of v and of flow at zero SNR is at least the variance of the data that
    prompts do not explain, which no training reduces, and mostly the largest of all timesteps:
    without a bound, the timestep that decides the brightness of images has the least weight. With
    p_t the probability of t,

    w_t = 1 / exp(u_t),  w_{T-1} >= s  sum_{t < T-1} p_t w_t / sum_{t < T-1} p_t

    where s is `min_terminal_share`. With s = 1 the last timestep has at least the share of the
    weights that uniform gives it. u is learned without the bound.

    Args:
        schedule: Noise schedule.
        law: How often training visits each timestep, p_t.
        min_terminal_share: s. 0 = no bound.
    """

    def __init__(
        self,
        schedule: Schedule,
        law: TimestepLaw = TimestepLaw(),
        min_terminal_share: float = 1.0,
    ) -> None:
        T = schedule.num_timesteps
        alpha, sigma = schedule(torch.arange(T, device="cpu"))
        k = torch.arange(_NUM_FEATURES, dtype=torch.float64, device="cpu")
        features = math.sqrt(2) * torch.cos(2 * torch.atan2(sigma, alpha)[:, None] * k)
        features[:, 0] = 1.0
        others = torch.tensor(law.probabilities(T)[:-1], dtype=torch.float64, device="cpu")
        self._features, self._others = features, others / others.sum()
        self._share = min_terminal_share
        self._set(torch.zeros_like(k))

    def __call__(self, t: Tensor) -> Tensor:
        """Return the weight of each timestep t, (B,), on t's device, without gradient; no sync."""
        self._to(t.device)
        return self._weights.index_select(0, t)

    def table(self) -> Tensor:
        """Return the weights of all timesteps, (T,)."""
        return self._weights

    @torch.no_grad()
    def sums(self, losses: Tensor, t: Tensor) -> Tensor:
        """Return the negative gradient with respect to c, summed over a batch, (16,).

        Args:
            losses: Loss of each sample without this weight, (B,).
            t: Timesteps, (B,).
        """
        self._to(t.device)
        features = self._features.index_select(0, t)
        ratios = losses.to(features) * _inverse(features, self._c)
        return ((ratios.clamp(max=_MAX_RATIO) - 1)[:, None] * features).sum(0)

    @torch.no_grad()
    def step(self, sums: Tensor, count: Tensor | int) -> None:
        """Take a step of gradient descent; no sync.

        Args:
            sums: `sums` of all micro-batches and ranks, added up. Not finite = no step.
            count: Number of samples in them.
        """
        mean = sums / count
        self._set(self._c.to(mean) + STEP_SIZE * torch.where(mean.isfinite().all(), mean, 0.0))

    def update(self, losses: Tensor, t: Tensor) -> None:
        """Learn from a batch that is the whole step: `step` with its `sums`."""
        self.step(self.sums(losses, t), len(t))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"coefficients": self._c.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what a checkpoint kept.

        Raises:
            ValueError: It is of another number of features.
        """
        c = torch.tensor(state["coefficients"], dtype=torch.float64)
        if c.shape != self._c.shape:
            raise ValueError(
                f"The checkpoint's learned loss weight has {len(c)} coefficients: wanted "
                f"{len(self._c)}."
            )
        self._set(c.to(self._c))

    def _set(self, c: Tensor) -> None:
        self._c = c
        self._to(c.device)
        weights = _inverse(self._features, c)
        if self._share and len(weights) > 1:
            least = self._share * (self._others * weights[:-1]).sum()
            weights[-1:] = torch.maximum(weights[-1:], least)
        self._weights = weights

    def _to(self, device: torch.device) -> None:
        if self._features.device != device:
            for name in ("_features", "_others", "_c", "_weights"):
                if name in vars(self):
                    setattr(self, name, getattr(self, name).to(device, widest(device)))


def _inverse(features: Tensor, c: Tensor) -> Tensor:
    """Compute 1 / exp(u), without a matrix product, which autocast would round."""
    return (-(features * c).sum(1)).exp()
