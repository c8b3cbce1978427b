"""Power-function averages of weights, and their combinations.

The average of sigma_rel at step t weighs the weights of step tau by

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 < tau <= t,

whose standard deviation is sigma_rel t. Averages of any other length are combinations of some that
were kept (Karras et al., arXiv:2312.02696, section 3 and appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 12**-0.5
"""The sigma_rel of the average that weighs all steps alike: gamma = 0."""

SHORTEST = 1e-6
"""The smallest sigma_rel: one step of a million. Far below, gamma is beyond float64."""

_SMALLEST_EIGENVALUE = 1e-13  # of the largest one; smaller ones are rounding


def check_sigma_rel(name: str, sigma_rel: float) -> None:
    """Refuse a relative width that no power-function average has.

    Args:
        name: The setting, for the message.
        sigma_rel: Its value.

    Raises:
        ValueError: It is out of range.
    """
    if not SHORTEST <= sigma_rel < LONGEST:
        raise ValueError(
            f"{name}={sigma_rel}: wanted at least {SHORTEST} and below {LONGEST:.4f}, the "
            "length of the average that weighs all steps alike."
        )


def exponent(sigma_rel: float) -> float:
    """Return gamma: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), by bisection.

    Raises:
        ValueError: No gamma > 0 has that length.
    """
    check_sigma_rel("sigma_rel", sigma_rel)
    low, high = 0.0, 1 / sigma_rel
    while low < (middle := (low + high) / 2) < high:
        width = math.sqrt((middle + 1) / (middle + 3)) / (middle + 2)
        low, high = (middle, high) if width > sigma_rel else (low, middle)
    return low


def decay_between(sigma_rel: float, start: int, end: int) -> float:
    """Return the product of the decays (1 - 1 / t)^(gamma + 1) of the steps start < t <= end."""
    return float((start / end) ** (exponent(sigma_rel) + 1))


@dataclass(frozen=True)
class Average:
    """A power-function average.

    Args:
        sigma_rel: Its relative width.
        end: Its last step, t.
    """

    sigma_rel: float
    end: int


@dataclass(frozen=True)
class Combination:
    """A sum of averages that comes nearest to another one.

    Args:
        coefficients: The factor of each average; their sum is 1.
        residual: Norm of the difference of the two weight profiles, divided by that of the wanted
            profile. 0 = the combination is exact.
    """

    coefficients: list[float]
    residual: float


def combine(kept: Sequence[Average], wanted: Average) -> Combination:
    """Find the least-squares combination of averages for another one, in float64.

    It minimizes the squared norm of the difference of the profiles, where the inner product of two
    of them is

        <p_a, p_b> = (gamma_a + 1) (gamma_b + 1) r^gamma / ((gamma_a + gamma_b + 1) max(t_a, t_b)),

    with r = min(t_a, t_b) / max(t_a, t_b) and the gamma of the later one, subject to coefficients
    that sum to 1, which keeps weights that do not change as they are.

    Args:
        kept: Averages to combine, at least one.
        wanted: The average to come near to.
    """
    if wanted in kept:
        found = [float(number == kept.index(wanted)) for number in range(len(kept))]
        return Combination(found, 0.0)
    A, b = _inner_products(kept, kept), _inner_products(kept, [wanted])[:, 0]
    square = _inner_products([wanted], [wanted]).item()
    scale = A.diagonal().rsqrt()
    values, vectors = torch.linalg.eigh(scale[:, None] * A * scale)
    inverse = torch.where(values > _SMALLEST_EIGENVALUE * values[-1], 1 / values, 0.0)

    def solve(right: Tensor) -> Tensor:
        solution: Tensor = scale * (vectors @ (inverse * (vectors.T @ (scale * right))))
        return solution

    free, ones = solve(b), solve(torch.ones_like(b))
    x = free + (1 - free.sum()) / ones.sum() * ones
    x = x / x.sum()
    squared = (x @ A @ x - 2 * (x @ b)).item() + square
    return Combination(x.tolist(), math.sqrt(max(0.0, squared / square)))


def _inner_products(a: Sequence[Average], b: Sequence[Average]) -> Tensor:
    """Return <p_a, p_b> (A, B) of all pairs."""
    exponents = {each: exponent(each) for each in {average.sigma_rel for average in (*a, *b)}}

    def columns(averages: Sequence[Average]) -> tuple[Tensor, Tensor]:
        gamma = [exponents[average.sigma_rel] for average in averages]
        ends = [average.end for average in averages]
        return torch.tensor(gamma, dtype=torch.float64), torch.tensor(ends, dtype=torch.float64)

    gamma_a, t_a = (column[:, None] for column in columns(a))
    gamma_b, t_b = columns(b)
    last = torch.maximum(t_a, t_b)
    ratio = torch.minimum(t_a, t_b) / last
    of_later = torch.where(t_a > t_b, gamma_a, gamma_b)
    factor = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * last)
    products: Tensor = factor * ratio**of_later
    return products
