"""Combination of two predictions: classifier-free guidance, its rescale (section 3.4), and others.

Each method is a function of tensors. `Guidance` in guidance.py selects the method and the scale,
and whether it acts on raw network outputs or on x_0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zsnr.schedule import per_sample


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Guide: x_cfg = x_neg + w (x_pos - x_neg)    (equation 13).

    Args:
        cond: Network output for the prompt, (B, *).
        uncond: Network output for the negative or null prompt, (B, *).
        scale: w, a float or (B, 1, ...); 1 returns `cond`, 0 returns `uncond`.
    """
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """Rescale the guided output towards the conditional output's standard deviation.

    x_final = x_cfg (phi s_pos / s_cfg + 1 - phi)    (Algorithm 2; equations 14 to 16)

    s_pos, s_cfg are standard deviations of each sample over all axes but the batch. A sample with
    s_cfg = 0 is not changed. Gradients are finite.

    Args:
        guided: x_cfg, (B, *).
        cond: x_pos, (B, *).
        rescale: phi in [0, 1]; 0 = no rescale.
    """
    if rescale == 0:
        return guided
    s_pos, s_cfg = _std(cond), _std(guided)
    constant = s_cfg == 0
    ratio = torch.where(constant, 1.0, s_pos / torch.where(constant, 1.0, s_cfg))
    return guided * (rescale * ratio + (1 - rescale)).to(guided.dtype)


def adaptive_projected_guidance(
    cond: Tensor,
    uncond: Tensor,
    scale: float | Tensor,
    parallel: float = 0.0,
    norm: float | None = None,
) -> Tensor:
    """Guide x_0 mostly orthogonally to itself: APG (Sadat et al., arXiv:2410.02416).

    d = D_c - D_u, times min(1, r / |d|)
    d_par = (<d, D_c> / |D_c|^2) D_c
    x_0 = D_c + (w - 1) (d - d_par + eta d_par)

    The component of d along D_c mostly increases contrast and saturation. Products and norms are
    computed per sample, over all axes but the batch, in at least float32. If D_c is 0, d_par is 0.
    The paper's negative momentum is omitted: it carries d over from one step to the next, while a
    denoiser is a function of (x_t, t).

    Args:
        cond: D_c, the conditional prediction of x_0, (B, *).
        uncond: D_u, the unconditional one, (B, *).
        scale: w, a float or (B, 1, ...); 1 returns `cond`.
        parallel: eta, the weight of d_par; 1 is classifier-free guidance.
        norm: r, the largest |d|, positive. None = no bound.
    """
    D_c, D_u = _at_least_float32(cond), _at_least_float32(uncond)
    d = D_c - D_u
    if norm is not None:
        square = inner(d, d)
        zero = square == 0  # where the square root has no gradient
        length = torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())
        d = d * per_sample(norm / length.clamp(min=norm), d)
    d_par = share(d, D_c) * D_c
    return (D_c + (scale - 1) * (d + (parallel - 1) * d_par)).to(cond.dtype)


def zero_star_guidance(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Guide away from the multiple of x_neg closest to x_pos: CFG-Zero* (arXiv:2503.18886).

    s = <x_pos, x_neg> / |x_neg|^2
    x_cfg = s x_neg + w (x_pos - s x_neg)

    Products are computed per sample, over all axes but the batch, in at least float32; if x_neg is
    0, s is 0. The paper's zero-init, a first step of flow matching that does not move, is omitted,
    because the first step from SNR 0 determines brightness.

    Args:
        cond: x_pos, network output for the prompt, (B, *).
        uncond: x_neg, network output for the negative or null prompt, (B, *).
        scale: w, a float or (B, 1, ...); 1 returns `cond`.
    """
    x_pos, x_neg = _at_least_float32(cond), _at_least_float32(uncond)
    x_neg = share(x_pos, x_neg) * x_neg
    return classifier_free_guidance(x_pos, x_neg, scale).to(cond.dtype)


def dynamic_threshold(x_0: Tensor, percentile: float) -> Tensor:
    """Clamp to a quantile of each sample and scale back to [-1, 1] (Imagen, arXiv:2205.11487).

    s = max(1, quantile of |x_0| over all axes but the batch)
    x_0 <- clamp(x_0, -s, s) / s

    Args:
        x_0: Predicted pixels, (B, *), whose range is [-1, 1].
        percentile: Quantile of |x_0|, in (0, 1], such as 0.995; interpolated linearly.
    """
    size = _at_least_float32(x_0).abs().flatten(1)
    position = percentile * (size.shape[1] - 1)
    below = math.floor(position)
    # torch.quantile supports at most 2^24 elements.
    top = size.topk(size.shape[1] - below, dim=1).values
    low, high = top[:, -1], top[:, max(-2, -top.shape[1])]
    s = per_sample((low + (position - below) * (high - low)).clamp(min=1), x_0)
    return (x_0.clamp(-s, s) / s).to(x_0.dtype)


def _std(x: Tensor) -> Tensor:
    """Compute each sample's standard deviation, (B, 1, ...), at least float32, gradient 0 at 0."""
    shape = (-1, *(1,) * (x.ndim - 1))
    x = _at_least_float32(x).flatten(1)
    # Shifted by its first element, since a constant such as 0.1 would have a variance of 1e-17.
    # correction=0: only ratios matter, and a single element is allowed.
    variance = (x - x[:, :1].detach()).var(dim=1, correction=0)
    constant = variance == 0
    return torch.where(constant, 0.0, torch.where(constant, 1.0, variance).sqrt()).view(shape)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Compute <x, y> of each sample, (B,), of (B, *).

    Axes are summed one after the other: a sum over all axes at once is divided among threads if the
    batch is one, and would round differently than in a larger batch.
    """
    product = x * y
    while product.ndim > 1:
        product = product.sum(-1)
    return product


def share(x: Tensor, y: Tensor) -> Tensor:
    """Compute <x, y> / |y|^2 of each sample, (B, 1, ...); 0 where y is 0."""
    square = inner(y, y)
    zero = square == 0
    return per_sample(torch.where(zero, 0.0, inner(x, y) / torch.where(zero, 1.0, square)), x)
