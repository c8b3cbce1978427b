"""Timestep spacings: the timesteps that a sampler visits (section 3.3).

A grid is a 1-D int64 tensor, 0-based, strictly descending. The arithmetic of the paper's spacings
is exact, in integers; grids in log SNR are the nearest timesteps of a schedule.
"""

from __future__ import annotations

import inspect
import json
import math
import operator
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from zsnr.beta_distribution import symmetric_beta_quantile
from zsnr.schedule import NoiseSchedule, Schedule, schedule_from_settings

_MAX_GRID_FILE = 2**20  # bytes


class TimestepSpacing(Protocol):
    """A rule (num_steps, num_timesteps) -> grid; it may also have a keyword `schedule`."""

    def __call__(self, num_steps: int, num_timesteps: int = 1000) -> Tensor: ...


_Spacing = TypeVar("_Spacing", bound=Callable[..., Tensor])
_SPACINGS: dict[str, Callable[..., Tensor]] = {}


def register_spacing(name: str) -> Callable[[_Spacing], _Spacing]:
    """Register a rule (num_steps, num_timesteps[, *, schedule]) -> grid under a name.

    A reloaded rule replaces its previous version.

    Raises:
        ValueError: Another rule has the name.
    """

    def register(spacing: _Spacing) -> _Spacing:
        if name == "auto":
            raise ValueError("'auto' selects the recommended spacing. Choose another name.")
        registered = _SPACINGS.get(name)
        if registered is not None and registered.__qualname__ != spacing.__qualname__:
            raise ValueError(f"Spacing {name!r} is already registered. Choose another name.")
        _SPACINGS[name] = spacing
        return spacing

    return register


def available_spacings() -> list[str]:
    """List the registered names."""
    return sorted(_SPACINGS)


@register_spacing("trailing")
def trailing(num_steps: int, num_timesteps: int = 1000) -> Tensor:
    """Count back from the last timestep: t_i = round(T (S - i) / S) - 1    (Table 2).

    Rounds half to even. S points for every S in 1..T, the first is T-1.

    Args:
        num_steps: S, 1 to T.
        num_timesteps: T.

    Returns:
        int64, shape (S,), descending.

    Raises:
        ValueError: S or T is out of range.
    """
    S, T = _check_counts(num_steps, num_timesteps)
    return _grid(_round_half_even(T * (S - i), S) - 1 for i in range(S))


@register_spacing("leading")
def leading(num_steps: int, num_timesteps: int = 1000) -> Tensor:
    """Count up from the first timestep: floor(T / S) i    (Table 2).

    Contains the last timestep only if S = T: provided to show the flaw. Otherwise as `trailing`.
    """
    S, T = _check_counts(num_steps, num_timesteps)
    return _grid((T // S) * i for i in reversed(range(S)))


@register_spacing("linspace")
def linspace(num_steps: int, num_timesteps: int = 1000) -> Tensor:
    """Divide 1..T evenly, both ends included: round(1 + (T - 1) i / (S - 1))    (Table 2).

    The paper's 1-based values are rounded, half to even. S = 1 returns the last timestep.
    Otherwise as `trailing`.
    """
    S, T = _check_counts(num_steps, num_timesteps)
    if S == 1:
        return _grid([T - 1])
    return _grid(_round_half_even(S - 1 + (T - 1) * i, S - 1) - 1 for i in reversed(range(S)))


@register_spacing("log_snr")
def log_snr(
    num_steps: int, num_timesteps: int = 1000, *, schedule: Schedule | None = None
) -> Tensor:
    """Start at the last timestep, then divide the log SNR evenly.

    With l = log(alpha_t / sigma_t), half the log SNR, step 0 is at T-1, where l may be minus
    infinity, and steps 1 to S-1 divide l evenly

        from -2 - log S, where noise dominates everything but the mean of an image,
        to   -1 + 2 log S, where the last step has little noise left to remove,

    within the schedule's timesteps. More steps extend the range at both ends, and divide it more
    finely. If l of T-1 lies above the first bound, all S steps divide the range from there. Each
    step is the nearest timestep, moved up or down if that is already used, so that there are S
    distinct ones.

    Args:
        num_steps: S, 1 to T.
        num_timesteps: T.
        schedule: The schedule. None = the paper's with that T.

    Returns:
        int64, shape (S,), descending, the first is T-1.

    Raises:
        ValueError: S or T is out of range.
    """
    S, _ = _check_counts(num_steps, num_timesteps)
    return _between(_log_snr_bounds(S), S, num_timesteps, schedule, lambda level: level)


@register_spacing("karras")
def karras(
    num_steps: int, num_timesteps: int = 1000, *, schedule: Schedule | None = None
) -> Tensor:
    """Divide (sigma_t / alpha_t)^(1/7) evenly (Karras et al., arXiv:2206.00364, equation 5).

    Uses the bounds of `log_snr`. Otherwise as there.
    """
    S, _ = _check_counts(num_steps, num_timesteps)
    bounds = _log_snr_bounds(S)
    return _between(bounds, S, num_timesteps, schedule, lambda level: -math.exp(-level / 7))


@register_spacing("guided")
def guided(
    num_steps: int, num_timesteps: int = 1000, *, schedule: Schedule | None = None
) -> Tensor:
    """Start at the last timestep, then concentrate steps where guidance acts; for few steps.

    Guidance narrows what the condition determines, at medium noise levels: there the path is stiff
    and needs short steps. With l = log(alpha_t / sigma_t), steps 1 to S-1 run

        from -0.7 - log S   to   -2.2 + 2 log S,

    a shorter range than that of `log_snr`, and divide u in [-1, 1] evenly, where sinh(u) / sinh(1)
    is the position of l between the middle of the range and its ends. Bounds were chosen on trained
    models and exact denoisers, see benchmarks/results/guided.md. Otherwise as `log_snr`.
    """
    S, _ = _check_counts(num_steps, num_timesteps)
    low, high = -0.7 - math.log(S), -2.2 + 2 * math.log(S)
    middle, reach = (low + high) / 2, max(high - low, 1) / 2

    def coordinate(level: float) -> float:
        return math.asinh(math.sinh(1) * (level - middle) / reach)

    return _between((low, high), S, num_timesteps, schedule, coordinate)


# Spacings for schedules that end at SNR > 0, provided for comparison.


# Stable Diffusion 1's noise levels of ten steps, and the final level.
_AYS = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
_BETA = 0.6


@register_spacing("ays")
def ays(num_steps: int, num_timesteps: int = 1000, *, schedule: Schedule | None = None) -> Tensor:
    """Follow the noise levels of Align Your Steps for Stable Diffusion 1.

    Sabour et al., arXiv:2404.14507, table 3: eleven values of sigma / alpha, ten steps and the
    final level. They are interpolated linearly in the logarithm to S + 1 values, and the last is
    omitted, since the last step goes to clean data. Each step is the nearest timestep in
    log(sigma / alpha), distinct as in `log_snr`, and the first becomes T-1. On a schedule that ends
    at SNR 0 there is no step between T-1 and the second level: the levels are designed for
    schedules that end at sigma / alpha = 14.6, and provided for comparison. Otherwise as `log_snr`.
    """
    S, T = _check_counts(num_steps, num_timesteps)
    levels = [-math.log(k) for k in _AYS]
    parts = len(levels) - 1
    targets = []
    for i in range(S):
        index, remainder = divmod(i * parts, S)
        targets.append(levels[index] + (levels[index + 1] - levels[index]) * remainder / S)
    return _nearest(targets, T, _half_log_snr(T, schedule))


@register_spacing("kl_optimal")
def kl_optimal(
    num_steps: int, num_timesteps: int = 1000, *, schedule: Schedule | None = None
) -> Tensor:
    """Divide arctan(sigma_t / alpha_t) evenly (Sabour et al., arXiv:2404.14507).

    The grid of minimal Kullback-Leibler divergence for data N(0, 1), from T-1 to t = 0, both
    included, as in common user interfaces. On a schedule that ends at SNR 0 the first step spans
    all noise levels above sigma / alpha of about 2 S / pi: provided for comparison. Each step is
    the nearest timestep, distinct as in `log_snr`. S = 1 returns the last timestep. Otherwise as
    `ays`.
    """
    S, T = _check_counts(num_steps, num_timesteps)
    angles = [-math.atan2(1.0, math.exp(level)) for level in _half_log_snr(T, schedule)]
    first, last = angles[-1], angles[0]
    return _nearest([first + (last - first) * i / max(S - 1, 1) for i in range(S)], T, angles)


@register_spacing("beta")
def beta(num_steps: int, num_timesteps: int = 1000) -> Tensor:
    """Use quantiles of a Beta distribution over the timesteps (Lee et al., arXiv:2407.12173).

    t_i = round((T - 1) q(1 - i / S)), with q the quantile function of Beta(0.6, 0.6): denser at
    both ends. Rounds half to even; equal timesteps are moved apart as in `log_snr`, while user
    interfaces omit some. Otherwise as `trailing`.
    """
    S, T = _check_counts(num_steps, num_timesteps)
    half = (S + 1) // 2
    lower = [
        symmetric_beta_quantile(i / S, _BETA) for i in range(S // 2 + 1)
    ]  # q(1 - p) = 1 - q(p)
    quantiles = [1 - q for q in lower[:half]] + [lower[S - i] for i in range(half, S)]
    return _grid(_distinct([round((T - 1) * q) for q in quantiles], T))


def get_timesteps(
    spacing: str,
    num_steps: int,
    num_timesteps: int = 1000,
    *,
    schedule: Schedule | None = None,
) -> Tensor:
    """Make the grid of a registered spacing, or read a grid from a file.

    Args:
        spacing: A registered name, see `available_spacings`, or the path of a .json file with
            {"timesteps": [...]}, such as the output of `zsnr timesteps optimize`. If the file has a
            schedule, it is valid only for that one.
        num_steps: S, 1 to T.
        num_timesteps: T.
        schedule: Schedule, for grids that depend on it; None = the paper's with that T.

    Returns:
        int64, shape (S,), S distinct timesteps, descending.

    Raises:
        ValueError: The name is unknown, a count is out of range, the schedule has another T, the
            file has another number of steps or schedule, or a registered rule is faulty.
        OSError: The file cannot be read.
    """
    check_spacing(spacing)
    S, T = _check_counts(num_steps, num_timesteps)
    if schedule is not None and schedule.num_timesteps != T:
        raise ValueError(
            f"num_timesteps={T} but the schedule has {schedule.num_timesteps}: pass "
            f"num_timesteps={schedule.num_timesteps}."
        )
    if is_grid_file(spacing):
        return _grid_of_file(Path(spacing), S, T, schedule)
    rule = _SPACINGS[spacing]
    if "schedule" in inspect.signature(rule).parameters:
        grid = rule(S, T, schedule=schedule or NoiseSchedule(num_timesteps=T))
    else:
        grid = rule(S, T)
    steps = check_timesteps(grid, T)
    if len(steps) != S:
        raise ValueError(f"Spacing {spacing!r} returned {len(steps)} timesteps: wanted {S}.")
    return _grid(steps)


def check_spacing(spacing: str) -> None:
    """Refuse an unknown spacing.

    Raises:
        ValueError: The spacing is neither a registered name nor the name of a .json file.
    """
    known_or_file = isinstance(spacing, str) and (spacing in _SPACINGS or is_grid_file(spacing))
    if not known_or_file:
        known = ", ".join(repr(name) for name in available_spacings())
        raise ValueError(
            f"Timestep spacing {brief(spacing)} is unknown. Known: {known}; or a .json file."
        )


def is_grid_file(spacing: str) -> bool:
    """Whether a spacing is the path of a file, which has one number of steps only."""
    return spacing.endswith(".json")


def timestep_pairs(timesteps: Tensor | Sequence[int]) -> list[tuple[int, int]]:
    """Pair each timestep t with the next one, s: [(t, s), ..., (t_last, -1)].

    Raises:
        ValueError: The timesteps are not in descending order.
    """
    steps = check_timesteps(timesteps)
    return list(zip(steps, [*steps[1:], -1], strict=True))


def check_timesteps(
    timesteps: Tensor | Sequence[int], num_timesteps: int | None = None
) -> list[int]:
    """Check a grid, and return it as Python ints.

    Args:
        timesteps: 1-D integers, strictly descending, none negative.
        num_timesteps: T, the upper bound; None = no bound.

    Raises:
        ValueError: The timesteps do not have this form.
    """
    if isinstance(timesteps, Tensor):
        if timesteps.ndim != 1 or timesteps.is_floating_point() or timesteps.is_complex():
            raise ValueError(
                f"timesteps is {timesteps.dtype} of shape {tuple(timesteps.shape)}: wanted 1-D "
                "int64."
            )
        timesteps = timesteps.tolist()
    if isinstance(timesteps, str | Mapping) or not isinstance(timesteps, Iterable):
        raise ValueError(f"timesteps={brief(timesteps)}: wanted a list of integers.")
    steps = list(timesteps)
    if not steps:
        raise ValueError("timesteps is empty: wanted at least one.")
    if any(isinstance(t, bool) or not hasattr(t, "__index__") for t in steps):
        raise ValueError(f"timesteps {brief(steps)} are not all integers.")
    steps = [operator.index(t) for t in steps]
    if any(s >= t for t, s in pairwise(steps)):
        raise ValueError(f"timesteps {brief(steps)} are not strictly descending.")
    if steps[-1] < 0 or (num_timesteps is not None and steps[0] >= num_timesteps):
        bound = "T - 1" if num_timesteps is None else num_timesteps - 1
        first, last = brief(steps[0]), brief(steps[-1])
        raise ValueError(f"timesteps run from {first} to {last}: wanted {bound} to 0.")
    return steps


class GridFile(NamedTuple):
    """The contents of a grid file.

    Args:
        timesteps: The grid, descending.
        schedule: Settings of the schedule that it is valid for. None = any.
        sampler: Name of the sampler that it was optimized for. None = not specified.
    """

    timesteps: list[int]
    schedule: dict[str, Any] | None
    sampler: str | None


def read_grid(path: Path) -> GridFile:
    """Read a grid file.

    Raises:
        ValueError: The file holds no grid.
        OSError: The file cannot be read.
    """
    try:
        facts = json.loads(_read_small(path.expanduser()))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: no such file; the current folder is {Path.cwd()}."
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not JSON: {reason}.") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("timesteps"), list):
        raise ValueError(f'{path} holds no grid: wanted {{"timesteps": [999, ...]}}.')
    settings = facts.get("schedule")
    if not isinstance(settings, dict | None):
        raise ValueError(f"{path}: schedule is {brief(settings)}: wanted settings by name.")
    sampler = facts.get("sampler")
    if not isinstance(sampler, str | None):
        raise ValueError(f"{path}: sampler is {brief(sampler)}: wanted a name.")
    try:
        return GridFile(check_timesteps(facts["timesteps"]), settings, sampler)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_small(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        data = file.read(_MAX_GRID_FILE + 1)
    if len(data) > _MAX_GRID_FILE:
        raise ValueError(f"it has over {_MAX_GRID_FILE} bytes")
    return data


def _grid_of_file(path: Path, S: int, T: int, schedule: Schedule | None) -> Tensor:
    steps, settings, _ = read_grid(path)
    if steps[0] >= T:
        raise ValueError(f"{path}: timesteps run from {brief(steps[0])}: wanted {T - 1} to 0.")
    if len(steps) != S:
        raise ValueError(
            f"{path} is a grid of {len(steps)} steps: wanted {S}. Set num_steps={len(steps)}, or "
            "optimize another one."
        )
    if settings is not None:
        count = settings.get("num_timesteps", 1000)
        if count != T:  # a huge count must not be built
            raise ValueError(
                f"{path} is a grid for a schedule of {brief(count)} timesteps, not {T}."
            )
        try:
            file_schedule = schedule_from_settings(settings)
        except ValueError as error:
            raise ValueError(f"{path}: schedule: {error}") from error
        if file_schedule != (schedule or NoiseSchedule(num_timesteps=T)):
            raise ValueError(f"{path} is for {file_schedule}: optimize one for this schedule.")
    return _grid(steps)


def _log_snr_bounds(num_steps: int) -> tuple[float, float]:
    return -2 - math.log(num_steps), -1 + 2 * math.log(num_steps)


def _between(
    bounds: tuple[float, float],
    num_steps: int,
    num_timesteps: int,
    schedule: Schedule | None,
    coordinate: Callable[[float], float],
) -> Tensor:
    """Divide an increasing function of l = log(alpha / sigma) evenly, as described in `log_snr`."""
    S, T = num_steps, num_timesteps
    levels = _half_log_snr(T, schedule)
    low, high = bounds[0], min(bounds[1], levels[0])
    first = 0 if levels[-1] >= low else 1  # the first of the evenly spaced steps
    low = levels[-1] if first == 0 else max(low, levels[-2])
    start, end = coordinate(low), coordinate(max(low, high))
    parts = S - first - 1
    targets = [start + (end - start) * (i / parts if parts else 0.5) for i in range(S - first)]
    marks = [coordinate(level) for level in levels[: T - first]]
    return _nearest(targets, T, marks)


def _half_log_snr(num_timesteps: int, schedule: Schedule | None) -> list[float]:
    table = (schedule or NoiseSchedule(num_timesteps=num_timesteps)).log_snr.tolist()
    return [level / 2 for level in table]


def _nearest(targets: Sequence[float], num_timesteps: int, marks: Sequence[float]) -> Tensor:
    """Find the timesteps whose marks are nearest to the targets, and make them distinct.

    Args:
        targets: Target marks, increasing.
        num_timesteps: T.
        marks: Marks of timesteps 0, 1, ..., decreasing. The last timesteps, which have no mark,
            come first in the grid.
    """
    up = list(reversed(marks))
    nearest = list(range(num_timesteps - 1, len(marks) - 1, -1))
    for mark in targets:
        i = min(bisect_left(up, mark), len(up) - 1)
        if i > 0 and mark - up[i - 1] <= up[i] - mark:
            i -= 1
        nearest.append(len(up) - 1 - i)
    return _grid(_distinct(nearest, num_timesteps))


def _distinct(steps: Sequence[int], num_timesteps: int) -> list[int]:
    """Make steps strictly descending: move them down as little as possible, or up at the end.

    The first becomes T-1.
    """
    S, distinct = len(steps), [num_timesteps - 1]
    for t in steps[1:]:
        distinct.append(min(t, distinct[-1] - 1))
    return [max(t, S - 1 - i) for i, t in enumerate(distinct)]


def _grid(steps: Iterable[int]) -> Tensor:
    return torch.tensor(list(steps), dtype=torch.int64, device="cpu")


def _check_counts(num_steps: int, num_timesteps: int) -> tuple[int, int]:
    for name, count in (("num_steps", num_steps), ("num_timesteps", num_timesteps)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise ValueError(f"{name}={brief(count)}: wanted an int.")
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"num_steps={num_steps}: wanted 1 to {num_timesteps}, the number of training timesteps."
        )
    return num_steps, num_timesteps


def _round_half_even(numerator: int, denominator: int) -> int:
    quotient, remainder = divmod(numerator, denominator)
    if 2 * remainder > denominator or (2 * remainder == denominator and quotient % 2 == 1):
        quotient += 1
    return quotient
