"""What a sampler is, and the loop that the one-step samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zsnr.schedule import NoiseSchedule
from zsnr.timesteps import check_timesteps, timestep_pairs
from zsnr.transition import reverse_transition

DenoiserFunction = Callable[[Tensor, Tensor], Tensor]
RandnLike = Callable[[Tensor], Tensor]
Callback = Callable[[int, int, Tensor, Tensor], None]
Coefficients = tuple[float, float, float]


class Sampler(ABC):
    """A rule from noise to data. A sampler is a frozen value: all that changes is an argument."""

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
            ValueError: The grid is not a descending list of the schedule's timesteps.
        """


def transition_coefficients(
    schedule: NoiseSchedule, timesteps: Tensor | Sequence[int], eta: float
) -> list[Coefficients]:
    """Compute (a, b, c) of `reverse_transition` for every step of a grid, in float64."""
    check_timesteps(timesteps, schedule.num_timesteps)
    return [
        reverse_transition(*schedule(t), *schedule(s), eta) for t, s in timestep_pairs(timesteps)
    ]


def step(x_0: Tensor, x_t: Tensor, coefficients: Coefficients, z: Tensor | None = None) -> Tensor:
    """Apply one step: x_s = a x_0 + b x_t + c z; two fused operations, three with noise."""
    a, b, c = coefficients
    x_s = torch.mul(x_0, a).add_(x_t, alpha=b)
    return x_s if z is None else x_s.add_(z, alpha=c)


def run_steps(
    coefficients: Sequence[Coefficients],
    denoiser: DenoiserFunction,
    x_T: Tensor,
    timesteps: Tensor | Sequence[int],
    randn_like: RandnLike,
    callback: Callback | None,
) -> Tensor:
    """Run the loop: predict x_0, step, repeat. Arguments as `Sampler.sample`."""
    grid = check_timesteps(timesteps)
    x_t = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    t_rows = torch.tensor(grid, device=x_T.device).view(-1, 1).repeat(1, len(x_T)).unbind()
    for i, (t, t_row, abc) in enumerate(zip(grid, t_rows, coefficients, strict=True)):
        x_0 = denoiser(x_t, t_row).to(x_t.dtype)
        x_t = step(x_0, x_t, abc, randn_like(x_t) if abc[2] > 0 else None)
        if callback is not None:
            callback(i, t, x_0, x_t)
    return x_t.to(x_T.dtype)
