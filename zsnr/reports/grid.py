"""A grid of timesteps optimized for a dataset, by its exact denoiser and without training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsnr.data.dataset import ShardDataset, collate
from zsnr.data.images import to_unit_range
from zsnr.data.index import load_index
from zsnr.data.samples import select
from zsnr.data.sources import Sources, find_shards
from zsnr.data.storage import Storage
from zsnr.files import check_new, new_file
from zsnr.metrics import wasserstein_1
from zsnr.noise import SampleNoise
from zsnr.oracle import EmpiricalDenoiser, span
from zsnr.reports.data import even_rows
from zsnr.samplers import Sampler, get_sampler
from zsnr.schedule import NoiseSchedule, Schedule
from zsnr.timesteps import get_timesteps

STARTS = {
    "log_snr": "start: equal steps in log SNR",
    "karras": "start: equal steps in (sigma / alpha)^(1/7)",
    "trailing": "start: equal steps in t",
}
_FINE = 200  # steps of the solution that grids are measured by
_MODES = 64  # principal components of the images whose spread is compared
_MOVES = (0.5, 0.25, 0.125, 0.0625)  # of the gap to the neighbor
_REPORT_EVERY = 20  # grids


@dataclass(frozen=True)
class Loss:
    """Distance of the samples of a grid from those of many steps, from the same noise.

    Args:
        brightness: 1-Wasserstein distance of brightness, over the standard deviation of the data's.
        spread: Mean relative error of the standard deviation along the principal components of the
            data.
        to_data: 1-Wasserstein distance of brightness to the data, in units of brightness; that of
            many steps is not 0 either, since there are few samples.
    """

    brightness: float
    spread: float
    to_data: float

    @property
    def total(self) -> float:
        return self.brightness + self.spread


class GridLoss:
    """`Loss` of a grid on a set of images.

    Args:
        images: (N, 3, h, w) in [-1, 1].
        schedule: The noise schedule.
        sampler: The sampler.
        num_samples: Samples per grid.
        seed: The first of their seeds.

    Raises:
        ValueError: The images all have the same brightness.
    """

    def __init__(
        self,
        images: Tensor,
        schedule: Schedule,
        sampler: Sampler,
        num_samples: int,
        seed: int,
    ) -> None:
        self._data = images.flatten(1).double().mean(1)
        if self._data.std() < 1e-6:
            raise ValueError(
                "The images all have the same brightness, but a grid is chosen by its spread: use "
                "images that differ in brightness."
            )
        coordinates, basis = span(images)
        self._schedule, self._sampler = schedule, sampler
        self._denoiser = EmpiricalDenoiser(schedule, coordinates, batch_invariant=False)
        self._noise = [seed + i for i in range(num_samples)]
        noise = SampleNoise(self._noise)
        z = noise.randn(images.shape[1:], dtype=torch.float64)
        self._x_T = z.flatten(1) @ basis.T
        self._brightness = basis.mean(1)
        _, sizes, modes = torch.linalg.svd(coordinates - coordinates.mean(0), full_matrices=False)
        self._modes = modes[sizes > sizes[0] * 1e-9][:_MODES]  # along others there is no spread
        fine = min(_FINE, schedule.num_timesteps)
        exact = self._sample(
            get_timesteps("log_snr", fine, schedule.num_timesteps, schedule=schedule)
        )
        self._exact = exact @ self._brightness, (exact @ self._modes.T).std(0)
        self.fine_to_data = wasserstein_1(self._exact[0], self._data)

    def __call__(self, grid: Tensor | Sequence[int]) -> Loss:
        ends = self._sample(grid)
        brightness, (exact, spread) = ends @ self._brightness, self._exact
        return Loss(
            wasserstein_1(brightness, exact) / float(self._data.std()),
            float(((ends @ self._modes.T).std(0) / spread - 1).abs().mean()),
            wasserstein_1(brightness, self._data),
        )

    def _sample(self, grid: Tensor | Sequence[int]) -> Tensor:
        seeds = iter(range(len(grid)))  # noise of a step: the same for every grid

        def randn_like(x: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(next(seeds))
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)

        return self._sampler.sample(
            self._denoiser, self._schedule, self._x_T, grid, randn_like=randn_like
        )


def optimize_grid(loss: GridLoss, start: Sequence[int], bar: Any) -> tuple[list[int], Loss]:
    """Move one timestep at a time as long as that lowers the loss; the first stays at T-1.

    Args:
        loss: The loss to minimize.
        start: The grid to begin with.
        bar: Progress, of `_MOVES` rounds.
    """
    grid, best, tried = [int(t) for t in start], loss(start), 0
    for share in _MOVES:
        before = None
        while before != grid:
            before = grid
            for i in range(1, len(grid)):
                for candidate in _moves(grid, i, share):
                    candidate_loss = loss(candidate)
                    tried += 1
                    if tried % _REPORT_EVERY == 0:
                        bar.set_postfix_str(f"{tried} grids tried, loss {best.total:.4f}")
                    if candidate_loss.total < best.total:
                        grid, best = candidate, candidate_loss
                        break
        bar.update()
    return grid, best


def _moves(grid: list[int], i: int, share: float) -> Iterator[list[int]]:
    """Move timestep i by a share of the gap to its neighbors, where that keeps the order."""
    below = grid[i + 1] if i + 1 < len(grid) else -1
    for gap in (below - grid[i], grid[i - 1] - grid[i]):
        moved = grid[i] + (1 if gap > 0 else -1) * max(1, round(abs(gap) * share))
        if below < moved < grid[i - 1]:
            yield [*grid[:i], moved, *grid[i + 1 :]]


def write_grid(
    sources: Sources,
    output: Path,
    num_steps: int,
    *,
    sampler: str = "multiscale",
    schedule: Schedule = NoiseSchedule(),
    image_size: int = 32,
    num_images: int = 1000,
    samples: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Optimize a grid for a dataset and write it as a spacing: `spacing: grid.json`.

    Half of the images choose the grid; the other half evaluates it.

    Args:
        sources: Shards, or folders of images.
        output: The file; must not exist.
        num_steps: S, at least 2.
        sampler: Name of the sampler that the grid is for.
        schedule: The noise schedule.
        image_size: Height and width of the images that the denoiser knows, in pixels.
        num_images: Largest number of them, evenly spaced in the dataset.
        samples: Samples per grid that is tried.
        seed: The first of their seeds.

    Returns:
        What the file holds.

    Raises:
        ValueError: A setting is out of range, or there are too few images.
    """
    from zsnr import __version__
    from zsnr.progress import progress_bar

    check_new(output)
    if output.suffix != ".json":
        raise ValueError(f"{output}: wanted a name that ends in .json.")
    T = schedule.num_timesteps
    if not 2 <= num_steps <= T:
        raise ValueError(f"num_steps={num_steps}: wanted 2 to {T}.")
    for option, value, least in (
        ("image-size", image_size, 2),
        ("num-images", num_images, 8),
        ("samples", samples, 8),
    ):
        if value < least:
            raise ValueError(f"--{option} {value}: wanted at least {least}.")
    solver = get_sampler(sampler)
    images = _read(sources, image_size, num_images)
    chosen, held_out = (
        GridLoss(half, schedule, solver, samples, seed) for half in (images[::2], images[1::2])
    )
    starts = {
        name: get_timesteps(name, num_steps, T, schedule=schedule).tolist() for name in STARTS
    }
    rounds = len(starts) * len(_MOVES)
    with progress_bar(rounds, "optimizing timesteps", "round") as bar:
        ends = [optimize_grid(chosen, start, bar) for start in starts.values()]
    grid, best = min(ends, key=lambda end: end[1].total)
    judged = {name: held_out(start) for name, start in starts.items()} | {"this": held_out(grid)}
    facts = {
        "timesteps": grid,
        "schedule": schedule.settings(),
        "sampler": sampler,
        "images": len(images),
        "image_size": image_size,
        "samples": samples,
        "seed": seed,
        "loss": vars(best),
        "held_out": {name: vars(loss) for name, loss in judged.items()},
        "held_out_many_steps": held_out.fine_to_data,
        "many_steps": min(_FINE, T),
        "zsnr_version": __version__,
    }
    with new_file(output) as beside:
        beside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def grid_text(facts: dict[str, Any], output: Path) -> str:
    """Write the result as a table for a terminal, with a word on each row and column."""
    many = facts["many_steps"]
    errors = {name: tuple(loss.values()) for name, loss in facts["held_out"].items()}
    rows = [
        *((name, *errors[name], note) for name, note in STARTS.items()),
        ("this grid", *errors["this"], "the optimized timesteps"),
        ("many steps", 0.0, 0.0, facts["held_out_many_steps"], f"{many} steps, the target"),
    ]
    lines = [
        f"{output}: {' '.join(map(str, facts['timesteps']))}",
        "",
        f"Errors on the {facts['images'] // 2} images that the grid was not chosen on, with "
        f"{facts['sampler']} in {len(facts['timesteps'])} steps; lower is better:",
        f"{'':12}{'brightness':>12}{'spread':>10}{'W1 to data':>12}",
        *(f"{a:12}{b:12.4f}{c:10.4f}{d:12.4f}   {note}" for a, b, c, d, note in rows),
        "",
        f"brightness: 1-Wasserstein distance of the samples' brightness from that of {many} steps,",
        "            in standard deviations of the data's brightness",
        "spread:     mean relative error of the samples' standard deviations along the principal",
        f"            components of the data, also against {many} steps",
        f"W1 to data: 1-Wasserstein distance of the brightness of {facts['samples']} samples from",
        "            the data's; sampling noise keeps it above 0",
    ]
    totals = {name: brightness + spread for name, (brightness, spread, _) in errors.items()}
    best = min(totals, key=lambda name: totals[name])
    if best != "this":
        lines += [
            "",
            f"The optimized grid is no better than {best} on these images: use --spacing {best}, "
            "or optimize on more --num-images.",
        ]
    return "\n".join(lines)


def _read(sources: Sources, size: int, max_images: int) -> Tensor:
    """Read evenly spaced images of a dataset, (N, 3, size, size) in [-1, 1]."""
    cached = [shard.url for shard in find_shards(sources) if shard.kind == "cache"]
    if cached:
        raise ValueError(f"{cached[0]} holds no images: give the shards it was cached from.")
    samples = select(load_index(sources, Storage()), size)
    rows, dataset = even_rows(samples, max_images), ShardDataset(samples)
    if len(rows) < 8:
        raise ValueError(f"{len(rows)} images: wanted at least 8.")
    return to_unit_range(collate([dataset[row] for row in rows])["image"])
