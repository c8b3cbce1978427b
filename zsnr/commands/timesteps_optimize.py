"""`zsnr timesteps optimize`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsnr.commands.result import Result


def timesteps_optimize(
    source: Sequence[str],
    *,
    output: str | Path,
    num_steps: int = 10,
    sampler: str = "multiscale",
    schedule: str = "scaled_linear",
    image_size: int = 32,
    num_images: int = 1000,
    samples: int = 256,
    seed: int = 0,
) -> Result:
    """Choose the timesteps of few steps for a dataset.

    Timesteps are chosen by the exact denoiser of half of the images, without a model: one timestep
    moves at a time, as long as brightness and spread of the samples come nearer to those of many
    steps. The other half judges the grid side by side with log_snr, karras and trailing.
    Everything is measured without guidance: with a guidance scale above 1, compare the grid with
    log_snr before you use it. Use the file as any spacing: --spacing grid.json.

    Args:
        source: A folder of shards or images, a pattern such as 'https://host/{000..099}.tar', ...
        output: New .json file for the grid.
        num_steps: Number of timesteps of the grid.
        sampler: The sampler that the grid is for.
        schedule: The noise schedule, as for `zsnr schedule`, rescaled to zero terminal SNR where
            it is named.
        image_size: Height and width of the images that the denoiser knows, in pixels.
        num_images: Number of images, evenly from the dataset.
        samples: Number of samples of each grid that is tried.
        seed: The first seed of the samples.
    """
    from zsnr.reports.grid import grid_text, write_grid
    from zsnr.reports.schedule import find_schedule

    path = Path(output).expanduser()
    facts = write_grid(
        list(source),
        path,
        num_steps,
        sampler=sampler,
        schedule=find_schedule(schedule),
        image_size=image_size,
        num_images=num_images,
        samples=samples,
        seed=seed,
    )
    return Result(facts, grid_text(facts, path))
