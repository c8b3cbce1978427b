"""Exact denoisers that need no training: callables (x_t, t) -> x_0, usable as any Denoiser."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from zsnr.schedule import NoiseSchedule, per_sample


class GaussianDenoiser:
    """The optimal denoiser of x_0 ~ N(m, s^2), elementwise.

    E[x_0 | x_t] = m + alpha_t s^2 / (alpha_t^2 s^2 + sigma_t^2) (x_t - alpha_t m)

    Args:
        schedule: The noise schedule.
        mean: m, a number or a tensor that broadcasts with x_t.
        std: s, likewise; not negative.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor | float, std: Tensor | float) -> None:
        self.schedule, self.mean, self.std = schedule, mean, std

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        alpha_t, sigma_t = (per_sample(scale, x_t.to(dtype)) for scale in self.schedule(t))
        m, s = (
            p.to(x_t.device, dtype) if isinstance(p, Tensor) else p for p in (self.mean, self.std)
        )
        variance = s**2
        gain = alpha_t * variance / (alpha_t**2 * variance + sigma_t**2)
        return m + gain * (x_t - alpha_t * m)


class EmpiricalDenoiser:
    """The optimal denoiser of a finite data set: a softmax average of its members.

    E[x_0 | x_t] = sum_i w_i x^i
    w = softmax_i((alpha_t <x_t, x^i> - alpha_t^2 |x^i|^2 / 2) / sigma_t^2)

    At alpha_t = 0 it is the mean of the data whatever x_t is (section 5.2). The logits are float64:
    near t = 0 they reach 1e6.

    Args:
        schedule: The noise schedule.
        images: The data set, (N, *).
        batch_invariant: Give a sample bit for bit the same x_0 whatever stands beside it in the
            batch. False = one matrix product for the batch, which is faster.

    Raises:
        ValueError: The data set is empty.
    """

    def __init__(
        self, schedule: NoiseSchedule, images: Tensor, *, batch_invariant: bool = True
    ) -> None:
        if len(images) == 0:
            raise ValueError("EmpiricalDenoiser got no images: wanted at least one.")
        self.schedule = schedule
        self._shape = images.shape[1:]
        self._images = images.flatten(1).to(torch.float64)
        self._product = _rows_matmul if batch_invariant else torch.matmul
        self._half_norms = self._images.square().sum(1) / 2

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        if x_t.shape[1:] != self._shape:
            raise ValueError(
                f"x_t has samples of shape {tuple(x_t.shape[1:])}, the data set "
                f"{tuple(self._shape)}: wanted equal shapes."
            )
        x = x_t.flatten(1).to(torch.float64)
        alpha_t, sigma_t = (scale.to(torch.float64).view(-1, 1) for scale in self.schedule(t))
        logits = (
            alpha_t * self._product(x, self._images.T) - alpha_t**2 * self._half_norms
        ) / sigma_t**2
        weights = logits.softmax(1)
        weights[weights < torch.finfo(torch.float64).tiny] = 0  # subnormal: say nothing, cost much
        x_0 = self._product(weights, self._images)
        return x_0.view(x_t.shape).to(torch.promote_types(x_t.dtype, torch.float32))


def span(images: Tensor) -> tuple[Tensor, Tensor]:
    """Write images in an orthonormal basis of their span, where the oracle costs less.

    Predictions lie in the span, and logits see nothing else of x_t. So sampling noise z by
    EmpiricalDenoiser(schedule, images) gives x_0, and sampling basis @ z by
    EmpiricalDenoiser(schedule, coordinates) gives basis @ x_0, for any sampler whose steps are
    linear in x_t, x_0 and noise.

    Args:
        images: (N, *), D numbers each.

    Returns:
        coordinates (N, r) and basis (r, D), float64, with images = coordinates @ basis and r the
        rank.
    """
    rows = images.flatten(1).to(torch.float64)
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    kept = sizes > sizes[0] * 1e-12
    return left[:, kept] * sizes[kept], right[kept]


def _rows_matmul(x: Tensor, matrix: Tensor, block: int = 16) -> Tensor:
    """Compute x @ matrix so that no row's rounding depends on the rows beside it.

    A matrix product rounds by its shape, so every product here has the same one: one row where the
    matrix is small, a block of rows filled up with zeros else.
    """
    if matrix.numel() <= 2**16:
        return torch.stack([row @ matrix for row in x])
    blocks = pad(x, (0, 0, 0, -len(x) % block)).split(block)  # type: ignore[no-untyped-call]
    return torch.cat([rows @ matrix for rows in blocks])[: len(x)]
