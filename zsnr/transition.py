"""The step from x_t to x_s that every sampler shares (section 6)."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Scale = TypeVar("Scale", float, Tensor)


def reverse_transition(
    alpha_t: Scale, sigma_t: Scale, alpha_s: Scale, sigma_s: Scale, eta: float = 0.0
) -> tuple[Scale, Scale, Scale]:
    """Compute the coefficients of x_s = a x_0 + b x_t + c z, with z standard normal.

    r = alpha_t sigma_s / (alpha_s sigma_t)
    c = eta sigma_s sqrt(1 - r^2)
    b = (sigma_s / sigma_t) sqrt(1 - eta^2 + eta^2 r^2)
    a = alpha_s - b alpha_t

    eta = 1 is ancestral sampling, DDPM (equation 20 with the variance of equation 9); 0 < eta < 1
    is DDIM (equations 21 and 22); eta = 0 is deterministic. There is no division by alpha_t, so the
    step is exact at zero SNR.

    Args:
        alpha_t: Scale of x_0 in x_t, in [0, 1); a float, or a float64 tensor.
        sigma_t: Scale of eps in x_t, positive.
        alpha_s: Scale of x_0 at the next, less noisy step, in (alpha_t, 1].
        sigma_s: Scale of eps there; 0 for clean data, where the result is (1, 0, 0).
        eta: Fraction of ancestral noise, in [0, 1].

    Returns:
        (a, b, c), floats or tensors like the scales.

    Raises:
        ValueError: eta is out of range, or s is not less noisy than t (checked for floats).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta!r}: wanted a number in [0, 1].")
    if isinstance(sigma_t, float) and not (sigma_t > 0 and sigma_s <= sigma_t):
        raise ValueError(
            f"sigma_t={sigma_t}, sigma_s={sigma_s}: wanted 0 <= sigma_s <= sigma_t and "
            "0 < sigma_t, a step towards less noise."
        )
    r = alpha_t * sigma_s / (alpha_s * sigma_t)
    c = eta * sigma_s * ((1 - r) * (1 + r)) ** 0.5
    b = sigma_s / sigma_t * (1 - eta**2 + (eta * r) ** 2) ** 0.5
    a = alpha_s - b * alpha_t
    return a, b, c
