"""The Beta distribution: its distribution function, and quantiles of its symmetric form."""

from __future__ import annotations

import math


def beta_cdf(x: float, a: float, b: float) -> float:
    """Compute P(X < x) of Beta(a, b), x in [0, 1]."""
    if x > 0.5:
        return 1 - beta_cdf(1 - x, b, a)
    return float(x**a * _series(x, a, b) / _complete(a, b))


def symmetric_beta_quantile(p: float, a: float) -> float:
    """Compute the p-quantile of Beta(a, a), a < 1.

    Newton's method in w = x^a on the series of the lower half; B_x is convex in w, and the
    iteration starts above the quantile, so that it decreases towards it.
    """
    if p > 0.5:
        return 1 - symmetric_beta_quantile(1 - p, a)
    target = p * _complete(a, a)
    w = a * target
    for _ in range(50):
        x = w ** (1 / a)
        # dB / dw = (1 - x)^(a - 1) / a
        lower = w - (w * _series(x, a, a) - target) * a * (1 - x) ** (1 - a)
        if not lower < w:
            break
        w = lower
    return float(w ** (1 / a))


def _complete(a: float, b: float) -> float:
    return math.gamma(a) * math.gamma(b) / math.gamma(a + b)


def _series(x: float, a: float, b: float) -> float:
    """Compute B_x(a, b) / x^a = sum_n (1 - b)_n x^n / (n! (a + n)), x up to 1/2."""
    total, power, n = 0.0, 1.0, 0
    while abs(power) / (a + n) > 1e-17 * abs(total):
        total += power / (a + n)
        power *= (1 - b + n) / (n + 1) * x
        n += 1
    return total
