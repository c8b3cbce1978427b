"""A grid of timesteps optimised for a data set, by its exact denoiser and without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from zsnr.samplers import Sampler, get_sampler
from zsnr.schedule import NoiseSchedule
from zsnr.timesteps import get_timesteps

STARTS = ("log_snr", "karras", "trailing")
_FINE = 200  # steps of the solution that grids are measured by
_MODES = 64  # principal components of the pictures whose spread is compared
_MOVES = (0.5, 0.25, 0.125, 0.0625)  # of the gap to the neighbour


@dataclass(frozen=True)
class Loss:
    """How far samples of a grid are from those of many steps, from the same noise.

    Args:
        brightness: 1-Wasserstein distance of brightness, over the spread of the data's.
        spread: Mean relative error of the standard deviation along the principal components of the
            data.
        to_data: 1-Wasserstein distance of brightness to the data, in units of brightness; that of
            many steps is not 0 either, since samples are few.
    """

    brightness: float
    spread: float
    to_data: float

    @property
    def total(self) -> float:
        return self.brightness + self.spread


class GridLoss:
    """`Loss` of a grid on a set of pictures.

    Args:
        images: (N, 3, h, w) in [-1, 1].
        schedule: The noise schedule.
        sampler: The sampler.
        num_samples: Samples of each grid.
        seed: The first of their seeds.

    Raises:
        ValueError: The pictures are all of one brightness.
    """

    def __init__(
        self,
        images: Tensor,
        schedule: NoiseSchedule,
        sampler: Sampler,
        num_samples: int,
        seed: int,
    ) -> None:
        self._data = images.flatten(1).double().mean(1)
        if self._data.std() < 1e-6:
            raise ValueError(
                "The pictures are all of one brightness, which a grid is chosen by: wanted others."
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
        loss: Of a grid.
        start: The grid to begin with.
        bar: Progress, one for each move that is tried.
    """
    grid, best = [int(t) for t in start], loss(start)
    for share in _MOVES:
        before = None
        while before != grid:
            before = grid
            for i in range(1, len(grid)):
                below = grid[i + 1] if i + 1 < len(grid) else -1
                for gap in (below - grid[i], grid[i - 1] - grid[i]):
                    moved = grid[i] + (1 if gap > 0 else -1) * max(1, round(abs(gap) * share))
                    if not below < moved < grid[i - 1]:
                        continue
                    tried = [*grid[:i], moved, *grid[i + 1 :]]
                    found = loss(tried)
                    bar.update()
                    if found.total < best.total:
                        grid, best = tried, found
                        break
    return grid, best


def write_grid(
    sources: Sources,
    output: Path,
    num_steps: int,
    *,
    sampler: str = "multiscale",
    schedule: NoiseSchedule = NoiseSchedule(),
    image_size: int = 32,
    pictures: int = 1000,
    samples: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Optimise a grid for a data set and write it as a spacing: `spacing: grid.json`.

    Half of the pictures choose the grid, the other half judges it.

    Args:
        sources: Shards, or folders of pictures.
        output: The file; must not exist.
        num_steps: S, at least 2.
        sampler: Name of the sampler that the grid is for.
        schedule: The noise schedule.
        image_size: Pixels a side of the pictures that the denoiser knows.
        pictures: How many of them, evenly from the set.
        samples: Samples of each grid that is tried.
        seed: The first of their seeds.

    Returns:
        What the file holds.

    Raises:
        ValueError: Settings out of range, or no pictures.
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
        ("pictures", pictures, 8),
        ("samples", samples, 8),
    ):
        if value < least:
            raise ValueError(f"--{option} {value}: wanted at least {least}.")
    solver = get_sampler(sampler)
    images = _read(sources, image_size, pictures)
    chosen, held_out = (
        GridLoss(half, schedule, solver, samples, seed) for half in (images[::2], images[1::2])
    )
    starts = {
        name: get_timesteps(name, num_steps, T, schedule=schedule).tolist() for name in STARTS
    }
    with progress_bar(None, "grids", "grid") as bar:
        ends = [optimize_grid(chosen, start, bar) for start in starts.values()]
    grid, best = min(ends, key=lambda end: end[1].total)
    judged = {name: held_out(start) for name, start in starts.items()} | {"this": held_out(grid)}
    facts = {
        "timesteps": grid,
        "schedule": schedule.settings(),
        "sampler": sampler,
        "pictures": len(images),
        "image_size": image_size,
        "samples": samples,
        "seed": seed,
        "loss": vars(best),
        "held_out": {name: vars(loss) for name, loss in judged.items()},
        "held_out_many_steps": held_out.fine_to_data,
        "zsnr_version": __version__,
    }
    with new_file(output) as beside:
        beside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def grid_text(facts: dict[str, Any], output: Path) -> str:
    """Say what was found, for a terminal."""
    lines = [
        f"{output}: {' '.join(map(str, facts['timesteps']))}",
        "",
        f"on {facts['pictures'] // 2} pictures it was not chosen on, {facts['sampler']}, "
        f"{len(facts['timesteps'])} steps",
        f"{'':14}{'brightness':>12}{'spread':>10}{'W1 to data':>12}",
    ]
    for name, loss in facts["held_out"].items():
        lines.append(
            f"{'this grid' if name == 'this' else name:14}{loss['brightness']:12.4f}"
            f"{loss['spread']:10.4f}{loss['to_data']:12.4f}"
        )
    lines.append(f"{'many steps':14}{0:12.4f}{0:10.4f}{facts['held_out_many_steps']:12.4f}")
    totals = {name: loss["brightness"] + loss["spread"] for name, loss in facts["held_out"].items()}
    best = min(totals, key=lambda name: totals[name])
    if best != "this":
        lines += ["", f"no better than {best} on those: use that one, or more pictures"]
    return "\n".join(lines)


def _read(sources: Sources, size: int, most: int) -> Tensor:
    """Read pictures evenly from the set, (N, 3, size, size) in [-1, 1]."""
    cached = [shard.url for shard in find_shards(sources) if shard.kind == "cache"]
    if cached:
        raise ValueError(f"{cached[0]} holds no pictures: give the shards it was cached from.")
    dataset = ShardDataset(select(load_index(sources, Storage()), size))
    count = min(most, len(dataset))
    if count < 8:
        raise ValueError(f"{count} pictures: wanted at least 8.")
    rows = [i * (len(dataset) - 1) // (count - 1) for i in range(count)]
    return to_unit_range(collate([dataset[row] for row in rows])["image"])
