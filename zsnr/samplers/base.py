"""What a sampler is, and the loop that the one-step samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from zsnr.schedule import NoiseSchedule
from zsnr.timesteps import check_timesteps
from zsnr.transition import reverse_transition

DenoiserFunction = Callable[[Tensor, Tensor], Tensor]
RandnLike = Callable[[Tensor], Tensor]
Callback = Callable[[int, int, Tensor, Tensor], None]
Coefficients = tuple[float, float, float]


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


def step(x_0: Tensor, x_t: Tensor, coefficients: Coefficients, z: Tensor | None = None) -> Tensor:
    """Apply one step: x_s = a x_0 + b x_t + c z; two fused operations, three with noise.

    The coefficients are floats, so a compiler that specialises on floats compiles it once a step:
    compile the network instead.
    """
    a, b, c = coefficients
    x_s = torch.mul(x_0, a).add_(x_t, alpha=b)
    return x_s if z is None else x_s.add_(z, alpha=c)


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
    theirs = getattr(denoiser, "schedule", schedule)
    if theirs != schedule:
        raise ValueError(
            f"The denoiser was made for {theirs}, the sampler got {schedule}: wanted one schedule."
        )
    grid = check_timesteps(timesteps, schedule.num_timesteps)
    steps = transition_coefficients(schedule, grid, eta)
    x_t = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    t_rows = torch.tensor(grid, device=x_T.device).view(-1, 1).repeat(1, len(x_T)).unbind()
    for i, (t, t_row, abc) in enumerate(zip(grid, t_rows, steps, strict=True)):
        x_0 = denoiser(x_t, t_row).to(x_t.dtype)
        x_t = step(x_0, x_t, abc, randn_like(x_t) if abc[2] > 0 else None)
        if callback is not None:
            callback(i, t, x_0, x_t)
    return x_t.to(x_T.dtype)
