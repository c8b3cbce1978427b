"""What a sampler is, and the loop that one-step and multistep samplers share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from zsnr.schedule import NoiseSchedule
from zsnr.timesteps import check_timesteps
from zsnr.transition import reverse_transition

DenoiserFunction = Callable[[Tensor, Tensor], Tensor]
RandnLike = Callable[[Tensor], Tensor]
Callback = Callable[[int, int, Tensor, Tensor], None]
Coefficients = tuple[float, float, float]

_MOST = 3  # predictions that a step may use


class MultistepCoefficients(NamedTuple):
    """Of x_s = a_0 x_0 + a_1 x_0' + ... + b x_t + c z; the newest prediction comes first."""

    a: tuple[float, ...]
    b: float
    c: float = 0.0


class Sampler(ABC):
    """A rule from noise to data. A sampler is a frozen value: all that changes is an argument.

    Attributes:
        keeps_history: Whether a step depends on more than x_t and x_0 of its own timestep, or
            calls the denoiser more than once. Who drives a sampler step by step asks.
    """

    keeps_history: ClassVar[bool] = True

    @abstractmethod
    def sample(
        self,
        denoiser: DenoiserFunction,
        schedule: NoiseSchedule,
        x_T: Tensor,
        timesteps: Tensor | Sequence[int],
        *,
        randn_like: RandnLike = torch.randn_like,
        callback: Callback | None = None,
    ) -> Tensor:
        """Sample x_0 from x_T.

        Args:
            denoiser: (x_t, t) -> x_0 with x_t (B, *) and t int64 (B,).
            schedule: The schedule the denoiser was made for.
            x_T: Noise of the first timestep, (B, *). Not changed.
            timesteps: The grid, 1-D, descending, such as `trailing(25)`.
            randn_like: Source of noise, called once for every step that needs it.
            callback: Called after step i with (i, t, x_0, x_s): the step's timestep, the
                prediction, and the state it led to.

        Returns:
            x_0, (B, *), in x_T's dtype; the loop itself runs in float32 at least.

        Raises:
            ValueError: The grid is not a descending list of the schedule's timesteps, or the
                denoiser says it was made for another schedule.
        """


def transition_coefficients(
    schedule: NoiseSchedule, timesteps: Tensor | Sequence[int], eta: float
) -> list[Coefficients]:
    """Compute (a, b, c) of `reverse_transition` for every step of a grid, in float64."""
    scales = [schedule(t) for t in (*check_timesteps(timesteps, schedule.num_timesteps), -1)]
    return [reverse_transition(*at_t, *at_s, eta) for at_t, at_s in pairwise(scales)]


def log_snr_steps(schedule: NoiseSchedule, grid: Sequence[int]) -> list[float]:
    """Compute h = l_s - l_t of every step, l = log(alpha / sigma), half the log SNR.

    Infinite for the step from SNR 0 and for the step to clean data.
    """
    levels = [
        -math.inf if alpha == 0 else math.inf if sigma == 0 else math.log(alpha / sigma)
        for alpha, sigma in (schedule(t) for t in (*grid, -1))
    ]
    return [l_s - l_t for l_t, l_s in pairwise(levels)]


def step(x_0: Tensor, x_t: Tensor, coefficients: Coefficients, z: Tensor | None = None) -> Tensor:
    """Apply one step: x_s = a x_0 + b x_t + c z; two fused operations, three with noise.

    The coefficients are floats, so a compiler that specialises on floats compiles it once a step:
    compile the network instead.
    """
    a, b, c = coefficients
    return multistep((x_0,), x_t, MultistepCoefficients((a,), b, c), z)


def multistep(
    history: Sequence[Tensor],
    x_t: Tensor,
    coefficients: MultistepCoefficients,
    z: Tensor | None = None,
) -> Tensor:
    """Apply one step: x_s = a_0 x_0 + a_1 x_0' + ... + b x_t + c z.

    Args:
        history: The predictions x_0, x_0' (of the step before), ..., newest first; those beyond
            the coefficients' are not used.
        x_t: The state.
        coefficients: Of this step.
        z: Noise. None = no noise.
    """
    a, *older = coefficients.a
    x_s = torch.mul(history[0], a).add_(x_t, alpha=coefficients.b)
    for x_0, weight in zip(history[1:], older, strict=False):
        x_s.add_(x_0, alpha=weight)
    return x_s if z is None else x_s.add_(z, alpha=coefficients.c)


def run_steps(
    eta: float,
    denoiser: DenoiserFunction,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timesteps: Tensor | Sequence[int],
    randn_like: RandnLike,
    callback: Callback | None,
) -> Tensor:
    """Run the loop: predict x_0, step with this eta, repeat. The rest as `Sampler.sample`."""
    grid = check_run(denoiser, schedule, timesteps)
    steps = [
        MultistepCoefficients((a,), b, c)
        for a, b, c in transition_coefficients(schedule, grid, eta)
    ]
    return run_multistep(steps, denoiser, x_T, grid, randn_like, callback)


def run_multistep(
    steps: Sequence[MultistepCoefficients],
    denoiser: DenoiserFunction,
    x_T: Tensor,
    grid: Sequence[int],
    randn_like: RandnLike,
    callback: Callback | None,
) -> Tensor:
    """Run the loop of a linear multistep sampler: predict x_0, remember it, step, repeat.

    Args:
        steps: Coefficients of each step.
        denoiser: See `Sampler.sample`, and so the rest.
        x_T: Noise of the first timestep.
        grid: Timesteps that `check_run` returned.
        randn_like: Source of noise.
        callback: Called after each step.
    """
    x_t, t_rows = begin(x_T, grid)
    history: tuple[Tensor, ...] = ()
    for i, (t, t_row, coefficients) in enumerate(zip(grid, t_rows, steps, strict=True)):
        x_0 = predict(denoiser, x_t, t, t_row)
        history = (x_0, *history[: _MOST - 1])
        z = randn_like(x_t) if coefficients.c > 0 else None
        x_t = multistep(history, x_t, coefficients, z)
        if callback is not None:
            callback(i, t, x_0, x_t)
    return x_t.to(x_T.dtype)


def check_run(
    denoiser: DenoiserFunction, schedule: NoiseSchedule, timesteps: Tensor | Sequence[int]
) -> list[int]:
    """Return the grid as ints, or say why this denoiser cannot be sampled on it.

    Raises:
        ValueError: See `Sampler.sample`.
    """
    theirs = getattr(denoiser, "schedule", schedule)
    if theirs != schedule:
        raise ValueError(
            f"The denoiser was made for {theirs}, the sampler got {schedule}: wanted one schedule."
        )
    return check_timesteps(timesteps, schedule.num_timesteps)


def predict(denoiser: DenoiserFunction, x_t: Tensor, t: int, t_row: Tensor) -> Tensor:
    """Ask a denoiser for x_0 at a timestep known here as well as on the device.

    One that has a method `at` is told: it may save a pass without waiting for the device.
    """
    at = getattr(denoiser, "at", None)
    x_0: Tensor = (denoiser if at is None else at(t))(x_t, t_row)
    return x_0.to(x_t.dtype)


def begin(x_T: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return x_T in float32 at least, and t of every step as a row (B,) on its device."""
    x_t = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    t_rows = torch.tensor(grid, device=x_T.device).view(-1, 1).repeat(1, len(x_T)).unbind()
    return x_t, t_rows
