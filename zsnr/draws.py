"""Every random number of training, as a function of (seed, position) only.

A position counts samples over the whole run: sample j of the global batch of step k has position
k B + j. Therefore neither the division of a batch over ranks nor a restart changes the draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from zsnr.noise import derive_seed, sample_generator
from zsnr.timestep_law import TimestepLaw
from zsnr.timesteps import trailing

_TIMESTEPS, _SAMPLES, _VALIDATION = 0, 1, 2  # independent streams of one seed


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers of one batch.

    Args:
        t: Timesteps, (B,).
        keep: Whether the caption of each sample is used and not dropped, (B,).
        z: Noise of the codec's posterior, (B, C, *).
        eps: Noise of the diffusion, (B, C, *).
        d: Offset noise of each channel, (B, C).
    """

    t: Tensor
    keep: Tensor
    z: Tensor
    eps: Tensor
    d: Tensor

    def to(self, device: torch.device | str) -> Draws:
        """Copy to a device; from pinned memory the host does not wait for it."""
        return self._map(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Draws:
        """Copy to pinned memory, from which a GPU copies by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Draws:
        return Draws(*(change(getattr(self, part.name)) for part in fields(self)))


def training_draws(
    seed: int,
    positions: Sequence[int],
    global_batch_size: int,
    shape: Sequence[int],
    num_timesteps: int,
    caption_dropout: float = 0.0,
    timestep_law: TimestepLaw = TimestepLaw(),
) -> Draws:
    """Draw timesteps stratified over the global batch, and all other numbers for each sample.

    They are drawn on the CPU.

    Args:
        seed: Seed of the run.
        positions: Places of the samples in the run, (B,): sample j of step k has k B' + j.
        global_batch_size: B', the number of samples of a step on all devices.
        shape: Shape of one sample, (C, *).
        num_timesteps: T.
        caption_dropout: Probability that `keep` is False.
        timestep_law: Distribution of the timesteps.
    """
    B, T = global_batch_size, num_timesteps
    t = torch.tensor([_timestep(seed, *divmod(p, B), B, T, timestep_law) for p in positions])
    return _draws(seed, _SAMPLES, positions, t, shape, caption_dropout)


def validation_timesteps(num_timesteps: int) -> Tensor:
    """Return the at most ten timesteps at which validation measures the loss, from the last on."""
    return trailing(min(10, num_timesteps), num_timesteps)


def validation_draws(
    seed: int, positions: Sequence[int], strata: Tensor, shape: Sequence[int]
) -> Draws:
    """Draw fixed noise; the sample at position p gets timestep strata[p modulo len(strata)]."""
    t = strata[torch.tensor(positions) % len(strata)]
    return _draws(seed, _VALIDATION, positions, t, shape, 0.0)


def _draws(
    seed: int,
    stream: int,
    positions: Sequence[int],
    t: Tensor,
    shape: Sequence[int],
    caption_dropout: float,
) -> Draws:
    keep, z, eps, d = [], [], [], []
    for position in positions:
        generator = sample_generator(derive_seed(seed, stream, position))
        keep.append(torch.rand((), generator=generator, dtype=torch.float32) >= caption_dropout)
        z.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float32))
        eps.append(torch.randn(tuple(shape), generator=generator, dtype=torch.float32))
        d.append(torch.randn(shape[0], generator=generator, dtype=torch.float32))
    return Draws(t, *(torch.stack(rows) for rows in (keep, z, eps, d)))


def _timestep(
    seed: int, step: int, slot: int, batch_size: int, num_timesteps: int, law: TimestepLaw
) -> int:
    """Return the timestep of a random number in one of B equal slices of [0, 1).

    Each slot of the batch has another slice.
    """
    permutation, offsets = _strata(seed, step, batch_size)
    T = num_timesteps
    if law.name == "uniform":
        return (permutation[slot] * T + int(offsets[slot] * T)) // batch_size
    return law.timestep((permutation[slot] + offsets[slot]) / batch_size, T)


@lru_cache(maxsize=4)
def _strata(seed: int, step: int, batch_size: int) -> tuple[list[int], list[float]]:
    generator = sample_generator(derive_seed(seed, _TIMESTEPS, step))
    permutation: list[int] = torch.randperm(batch_size, generator=generator).tolist()
    offsets: list[float] = torch.rand(batch_size, generator=generator, dtype=torch.float64).tolist()
    return permutation, offsets
