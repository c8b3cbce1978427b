"""Classifier-free guidance and its rescale (section 3.4).

Both act on the raw network output, before it becomes x_0: the rescale compares standard deviations
of what the network says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Guide: x_cfg = x_neg + w (x_pos - x_neg)    (equation 13).

    Args:
        cond: Network output for the prompt, (B, *).
        uncond: Network output for the negative or null prompt, (B, *).
        scale: w; 1 gives `cond`, 0 gives `uncond`.
    """
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """Bring the guided output's standard deviation back to the conditional one's.

    x_final = x_cfg (phi s_pos / s_cfg + 1 - phi)    (Algorithm 2; equations 14 to 16)

    s_pos, s_cfg are standard deviations of each sample over all axes but the batch. Where s_cfg is
    0 there is nothing to rescale, and the sample stays as it is. Gradients stay finite.

    Args:
        guided: x_cfg, (B, *).
        cond: x_pos, (B, *).
        rescale: phi in [0, 1]; 0 changes nothing.
    """
    if rescale == 0:
        return guided
    s_pos, s_cfg = _std(cond), _std(guided)
    constant = s_cfg == 0
    ratio = torch.where(constant, 1.0, s_pos / torch.where(constant, 1.0, s_cfg))
    return guided * (rescale * ratio + (1 - rescale)).to(guided.dtype)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with rescale; the defaults are the paper's.

    Args:
        scale: w, the guidance scale. 1 = no guidance.
        rescale: phi in [0, 1], the guidance rescale. 0 = plain guidance.
        interval: Noise levels sigma_t / alpha_t that are guided, above the first number, up to the
            second (which may be infinite, as the level of SNR 0 is). Elsewhere the conditional
            output stands alone, at half the cost (Kynkaanniemi et al., arXiv:2404.07724). None =
            all are.
    """

    scale: float = 7.5
    rescale: float = 0.7
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        numbers = (int, float)
        if not isinstance(self.scale, numbers) or not math.isfinite(self.scale):
            raise ValueError(f"Guidance scale {self.scale!r}: wanted a finite number.")
        if not isinstance(self.rescale, numbers) or not 0 <= self.rescale <= 1:
            raise ValueError(f"Guidance rescale {self.rescale!r}: wanted a number in [0, 1].")
        if self.interval is not None:
            ends = self.interval
            pair = isinstance(ends, tuple | list) and len(ends) == 2
            plain = pair and all(isinstance(x, numbers) and not isinstance(x, bool) for x in ends)
            if not plain:
                raise ValueError(
                    f"Guidance interval {ends!r}: wanted two noise levels; the second may be inf."
                )
            if not 0 <= ends[0] < ends[1]:
                raise ValueError(
                    f"Guidance interval {self.interval!r}: wanted 0 or more, then a higher level."
                )
            object.__setattr__(self, "interval", tuple(ends))

    @overload
    def acts(self, alpha_t: float, sigma_t: float) -> bool: ...

    @overload
    def acts(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor | bool: ...

    def acts(self, alpha_t: float | Tensor, sigma_t: float | Tensor) -> bool | Tensor:
        """Tell whether a noise level is guided: low alpha_t < sigma_t <= high alpha_t."""
        if self.interval is None:
            return True
        low, high = self.interval
        above = low * alpha_t < sigma_t
        return above if high == math.inf else above & (sigma_t <= high * alpha_t)

    def __call__(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """Guide and rescale raw network outputs, both (B, *)."""
        guided = classifier_free_guidance(cond, uncond, self.scale)
        return rescale_guidance(guided, cond, self.rescale)


def _std(x: Tensor) -> Tensor:
    """Standard deviation a sample, (B, 1, ...), in float32 at least, with gradient 0 at 0."""
    shape = (-1, *(1,) * (x.ndim - 1))
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x.flatten(1)
    # Shifted by its first element: else a constant such as 0.1 has a variance of 1e-17, not 0.
    # correction=0: only ratios count, and so a single element has a value.
    variance = (x - x[:, :1].detach()).var(dim=1, correction=0)
    constant = variance == 0
    return torch.where(constant, 0.0, torch.where(constant, 1.0, variance).sqrt()).view(shape)
