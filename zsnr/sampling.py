"""How images are sampled: as a value, as plain values, and as a model declares it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsnr.guidance import Guidance
from zsnr.samplers import Sampler, get_sampler
from zsnr.samplers.recommend import AUTO, resolve_sampling
from zsnr.samplers.registry import sampler_name, sampler_options
from zsnr.schedule import Schedule
from zsnr.timesteps import check_timesteps, get_timesteps, is_grid_file, read_grid


@dataclass(frozen=True)
class Sampling:
    """How images are sampled. The number of steps alone is enough.

    "auto" is replaced by what it stands for when this is made, see `resolve_sampling`: with 50
    steps and more it is the paper's DDIM and trailing timesteps, with fewer steps what the
    measurements favor at this guidance scale. So `dataclasses.replace` keeps what was chosen.

    Args:
        sampler: The sampler, its registered name, or "auto". "auto" chooses the sampler for the
            number of steps and the guidance scale, or takes DDIM where a spacing is given.
        num_steps: Number of sampling steps S, from which sampler and spacing follow where they are
            "auto". Each step calls the network once; with Heun's method, all but the last call it
            twice.
        spacing: A registered timestep spacing; the path of a grid that `zsnr timesteps optimize`
            wrote, seen from the folder where the command runs; or "auto". "auto" chooses the
            spacing with the sampler, or takes trailing timesteps where a sampler is given.
        guidance: Guidance scale, rescale, interval and method.

    Attributes:
        grid: What that file held; None where the spacing is none.

    Raises:
        ValueError: The sampler's name is unknown, the number of steps is not positive, or the file
            holds no grid.
        OSError: The file cannot be read.
    """

    sampler: Sampler | str = AUTO
    num_steps: int = 50
    spacing: str = AUTO
    guidance: Guidance = field(default_factory=Guidance)

    grid: tuple[int, ...] | None = field(init=False, repr=False)
    _recorded: bool = field(init=False, repr=False, default=False)  # the grid, not the file, counts

    def __post_init__(self) -> None:
        if not isinstance(self.guidance, Guidance):
            raise ValueError(f"guidance={self.guidance!r}: wanted a Guidance.")
        sampler, spacing = resolve_sampling(
            self.sampler, self.spacing, self.num_steps, self.guidance
        )
        steps = read_grid(Path(spacing)).timesteps if is_grid_file(spacing) else None
        object.__setattr__(self, "grid", None if steps is None else tuple(steps))
        object.__setattr__(self, "spacing", spacing)
        sampler = get_sampler(sampler) if isinstance(sampler, str) else sampler
        if not isinstance(sampler, Sampler):
            raise ValueError(f"sampler={sampler!r}: wanted a sampler, the name of one, or 'auto'.")
        object.__setattr__(self, "sampler", sampler)

    def timesteps(self, schedule: Schedule) -> Tensor:
        """Return the timesteps on a schedule, as `get_timesteps` does.

        Raises:
            ValueError: There are fewer than num_steps, or a grid file is for something else.
        """
        T = schedule.num_timesteps
        if self._recorded and self.grid is not None:
            return torch.tensor(check_timesteps(self.grid, T))
        return get_timesteps(self.spacing, self.num_steps, T, schedule=schedule)


def describe_sampling(sampling: Sampling) -> dict[str, Any]:
    """Return how images are sampled, as plain values.

    A grid of a file is written out as `timesteps`: the file may change, or be on another machine.
    """
    sampler: Any = sampling.sampler
    return {
        "sampler": sampler_name(sampler),
        "sampler_options": sampler_options(sampler),
        "num_steps": sampling.num_steps,
        "spacing": sampling.spacing,
        **({} if sampling.grid is None else {"timesteps": list(sampling.grid)}),
        **describe_guidance(sampling.guidance),
    }


def describe_guidance(guidance: Guidance) -> dict[str, Any]:
    """Return guidance as plain values: scale, rescale and interval, and what is not the default."""
    described: dict[str, Any] = {
        "guidance_scale": guidance.scale,
        "guidance_rescale": guidance.rescale,
        "guidance_interval": _ends(guidance.interval),
    }
    for option in fields(Guidance):
        value, name = getattr(guidance, option.name), f"guidance_{option.name}"
        if name not in described and value != option.default:
            described[name] = [list(knot) for knot in value] if option.name == "curve" else value
    return described


def _ends(interval: tuple[float, float] | None) -> list[float | None] | None:
    """Write an interval as JSON has it: null for an infinite end."""
    return None if interval is None else [x if math.isfinite(x) else None for x in interval]


def choose_sampling(
    declared: Mapping[str, Any] | None = None,
    *,
    sampler: Sampler | str | None = None,
    num_steps: int | None = None,
    spacing: str | None = None,
    guidance: Guidance | Mapping[str, Any] | None = None,
) -> Sampling:
    """Choose how to sample a model: as asked, else as it declares, else as the paper does.

    Every entry point takes its defaults from here, so that the same model gives the same images
    from all of them. A sampler and a spacing that "auto" stands for are chosen again where the
    number of steps or the guidance is another one, and declared timesteps of a grid file are only
    for their number of steps.

    Args:
        declared: What `describe_sampling` returned, as checkpoints and run.json hold it. None =
            the model declares nothing.
        sampler: A sampler, its registered name, or "auto". None = as declared.
        num_steps: Number of steps S. None = as declared, else 50.
        spacing: A registered spacing, the path of a grid file, or "auto". None = as declared.
        guidance: The guidance, or the options of it that are other than declared. None = as
            declared, else scale 7.5 and rescale 0.7.

    Raises:
        ValueError: A setting is unknown or out of range.
        OSError: A grid file cannot be read.
    """
    recorded = read_declared(declared)
    if not isinstance(guidance, Guidance):
        guidance = replace(recorded.guidance, **(guidance or {}))
    if sampler is None:
        sampler = recorded.make_sampler()
    steps = recorded.num_steps if num_steps is None else num_steps
    if recorded.grid is None:
        return Sampling(sampler, steps, recorded.spacing if spacing is None else spacing, guidance)
    if spacing is None and steps == recorded.num_steps:
        return _on_grid(sampler, recorded.spacing, guidance, recorded.grid)
    return Sampling(sampler, steps, AUTO if spacing is None else spacing, guidance)


@dataclass(frozen=True)
class DeclaredSampling:
    """How a model declares that it is sampled, with "auto" for names that "auto" stands for.

    Args:
        sampler: The name of the sampler.
        sampler_options: Its options; empty = the defaults.
        num_steps: Number of steps S.
        spacing: The spacing, or the path of a grid file.
        guidance: The guidance.
        grid: Timesteps of that file. None = the spacing is not a file.
    """

    sampler: str = AUTO
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    num_steps: int = Sampling.num_steps
    spacing: str = AUTO
    guidance: Guidance = field(default_factory=Guidance)
    grid: tuple[int, ...] | None = None

    def make_sampler(self) -> Sampler | str:
        """Return the sampler, or "auto".

        Raises:
            ValueError: No sampler of that name is registered, or it has other options.
        """
        if not self.sampler_options:
            return self.sampler
        return get_sampler(self.sampler, **self.sampler_options)


def read_declared(declared: Mapping[str, Any] | None) -> DeclaredSampling:
    """Read what `describe_sampling` wrote.

    Args:
        declared: Plain values. None or empty = the paper's sampling.

    Raises:
        ValueError: They are of another kind.
    """
    told = declared or {}
    try:
        guidance = Guidance(**recorded_guidance(told))
        S, grid = told.get("num_steps", Sampling.num_steps), told.get("timesteps")
        sampler, spacing = told.get("sampler", AUTO), told.get("spacing", AUTO)
        options: Any = told.get("sampler_options") or {}
        if not (isinstance(sampler, str) and isinstance(spacing, str)):
            raise ValueError("sampler and spacing are not named.")
        if not (isinstance(options, Mapping) and all(isinstance(name, str) for name in options)):
            raise ValueError("the options of the sampler have no names.")
        if grid is None and is_grid_file(spacing):
            raise ValueError("the spacing is a file, and there are no timesteps of it.")
        if grid is not None and len(check_timesteps(grid)) != S:
            raise ValueError(f"there are {len(grid)} timesteps for {S} steps.")
        auto = resolve_sampling(AUTO, AUTO, S, guidance)
        if (sampler, spacing) == auto and options in ({}, sampler_options(get_sampler(auto[0]))):
            sampler, spacing, options = AUTO, AUTO, {}
        options = {} if sampler == AUTO else options
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"The sampling that the model declares is unreadable: {error}") from error
    steps = None if grid is None else tuple(check_timesteps(grid))
    return DeclaredSampling(sampler, options, S, spacing, guidance, steps)


def recorded_guidance(declared: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `Guidance` in what `describe_guidance` wrote.

    There null ends an interval at infinity.
    """
    names = [option.name for option in fields(Guidance)]
    guidance = {n: declared[f"guidance_{n}"] for n in names if f"guidance_{n}" in declared}
    if isinstance(guidance.get("interval"), list):
        guidance["interval"] = [math.inf if x is None else x for x in guidance["interval"]]
    return guidance


def _on_grid(
    sampler: Sampler | str, path: str, guidance: Guidance, grid: tuple[int, ...]
) -> Sampling:
    """Sample on timesteps that are written out: their file may have changed, or be elsewhere."""
    sampling = Sampling(sampler, len(grid), "trailing", guidance)
    object.__setattr__(sampling, "spacing", path)
    object.__setattr__(sampling, "grid", grid)
    object.__setattr__(sampling, "_recorded", True)
    return sampling
