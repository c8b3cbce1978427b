"""Conditional samples from unconditional denoisers: replacement, resampling and corrections.

    python benchmarks/inpainting.py [--write]

W1 of each unknown number to the exact conditional distribution, in standard deviations of that,
averaged over the 8 unknown ones of 16 numbers and 3 known parts; 1000 samples, DDIM on trailing
timesteps with eta 0 and 1. Three kinds of data, whose denoisers and conditional distributions are
known exactly: a correlated Gaussian (neighbors are alike, and all share a brightness), 8 clusters
of a tenth of that covariance, and 40 members with a standard deviation of 0.2.

"replacement" replaces the known part of each prediction; "resampling" also makes each step r times,
with noise between (RePaint, arXiv:2201.09865); "corrections" are those of InpaintingDenoiser.
"exact samples" is the sampling noise.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from zsnr import DDIM, InpaintingDenoiser, NoiseSchedule, reverse_transition, trailing

D, N, RESULTS = 16, 1000, Path(__file__).parent / "results" / "inpainting.md"
SCHEDULE, UNKNOWN = NoiseSchedule(), torch.arange(D) >= D // 2
INDEX = torch.arange(D, dtype=torch.float64)
COVARIANCE = 0.3 * torch.exp(-(INDEX[:, None] - INDEX).abs() / 3) + 0.5


class Mixture:
    """The exact denoiser of Gaussians of one covariance around members, of equal weight."""

    guidance = None

    def __init__(self, members: Tensor, covariance: Tensor) -> None:
        self.members, self.covariance, self.calls = members, covariance, 0
        self.variances, self.axes = torch.linalg.eigh(covariance)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        alpha, sigma = SCHEDULE(int(t[0]))
        noisy = alpha**2 * self.variances + sigma**2
        x, members = x_t @ self.axes, self.members @ self.axes
        distance = ((x[:, None] - alpha * members).square() / noisy).sum(-1)
        gain = alpha * self.variances / noisy
        means = (-distance / 2).softmax(1) @ (members * (1 - alpha * gain))
        return (means + gain * x) @ self.axes.T

    def sample(self, count: int) -> Tensor:
        members = self.members[torch.randint(len(self.members), (count,))]
        return members + normal(count) @ torch.linalg.cholesky(self.covariance).T

    def conditional(self, known: Tensor, count: int) -> Tensor:
        """Draw unknown numbers, (count, 8)."""
        C, u, k = self.covariance, UNKNOWN, ~UNKNOWN
        gain = torch.linalg.solve(C[k][:, k], C[k][:, u]).T
        away = known - self.members[:, k]
        logits = -(away @ torch.linalg.inv(C[k][:, k]) * away).sum(1) / 2
        chosen = torch.multinomial(logits.softmax(0), count, replacement=True)
        means = self.members[:, u] + away @ gain.T
        spread = torch.linalg.cholesky(C[u][:, u] - gain @ C[k][:, u])
        return means[chosen] + normal(count)[:, u] @ spread.T


def normal(count: int) -> Tensor:
    return torch.randn(count, D, dtype=torch.float64)


def corrected(eta: float, corrections: int) -> Callable[[Mixture, Tensor, int], Tensor]:
    def sample(denoiser: Mixture, data: Tensor, num_steps: int) -> Tensor:
        conditioned = InpaintingDenoiser(denoiser, SCHEDULE, data, UNKNOWN, corrections)
        return DDIM(eta).sample(conditioned, SCHEDULE, normal(N), trailing(num_steps))

    return sample


def resampled(times: int) -> Callable[[Mixture, Tensor, int], Tensor]:
    def sample(denoiser: Mixture, data: Tensor, num_steps: int) -> Tensor:
        replaced = InpaintingDenoiser(denoiser, SCHEDULE, data, UNKNOWN, 0)
        grid, x = trailing(num_steps).tolist(), normal(N)
        for t, s in zip(grid, [*grid[1:], -1], strict=True):
            (alpha_t, sigma_t), (alpha_s, sigma_s) = SCHEDULE(t), SCHEDULE(s)
            a, b, c = reverse_transition(alpha_t, sigma_t, alpha_s, sigma_s, 1.0)
            for i in range(times):
                x_s = a * replaced(x, torch.full((N,), t)) + b * x + c * normal(N)
                if s < 0 or i == times - 1:
                    break
                ratio = alpha_t / alpha_s
                x = ratio * x_s + math.sqrt(sigma_t**2 - (ratio * sigma_s) ** 2) * normal(N)
            x = x_s
        return x

    return sample


METHODS = {
    "exact samples": None,
    "replacement, eta 0": corrected(0.0, 0),
    "replacement, eta 1": corrected(1.0, 0),
    "resampling, r = 3": resampled(3),
    "resampling, r = 5": resampled(5),
    "1 correction, eta 0": corrected(0.0, 1),
    "2 corrections, eta 0": corrected(0.0, 2),
    "2 corrections, eta 1": corrected(1.0, 2),
    "4 corrections, eta 0": corrected(0.0, 4),
    "4 corrections, eta 1": corrected(1.0, 4),
}


def w1(a: Tensor, b: Tensor) -> float:
    distance = (a.sort(0).values - b.sort(0).values).abs().mean(0)
    return float((distance / b.std(0)).mean())


def table(num_steps: int) -> list[str]:
    torch.manual_seed(0)
    spread = torch.linalg.cholesky(COVARIANCE).T
    data = {
        "Gaussian": Mixture(torch.full((1, D), -0.2, dtype=torch.float64), COVARIANCE),
        "8 clusters": Mixture(normal(8) @ spread, 0.1 * COVARIANCE),
        "40 members": Mixture(normal(40) @ spread, 0.04 * torch.eye(D, dtype=torch.float64)),
    }
    parts = {name: mixture.sample(3) for name, mixture in data.items()}
    rows = ["| method | network calls | " + " | ".join(data) + " |", "|---|---" + "|---" * 3 + "|"]
    for method, sample in METHODS.items():
        errors, calls = [], 0
        for name, mixture in data.items():
            found = []
            for part in parts[name]:
                exact = mixture.conditional(part[~UNKNOWN], N)
                mixture.calls = 0
                if sample is None:
                    found.append(w1(mixture.conditional(part[~UNKNOWN], N), exact))
                else:
                    drawn = sample(mixture, part.expand(N, D), num_steps)
                    found.append(w1(drawn[:, UNKNOWN], exact))
                calls = mixture.calls
            errors.append(f"{sum(found) / len(found):.2f}")
        rows.append(f"| {method} | {calls} | " + " | ".join(errors) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    write = parser.parse_args().write
    lines = ["# Conditional samples from unconditional denoisers", ""]
    lines += [f"{date.today()}, torch {torch.__version__}, {platform.machine()}, float64."]
    lines += ["Made by `python benchmarks/inpainting.py --write`.", ""]
    lines += [*(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), ""]
    for num_steps in (25, 100):
        lines += [f"## {num_steps} steps", "", *table(num_steps), ""]
    text = "\n".join(lines)
    print(text)
    if write:
        RESULTS.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
