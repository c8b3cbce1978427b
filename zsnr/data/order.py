"""Which sample stands where: the global batch of step k is a function of (seed, k) only."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from zsnr.noise import derive_seed, sample_generator


class ShuffledOrder:
    """An endless seeded order: a fresh permutation of the data set each time through.

    Args:
        num_samples: Size of the data set.
        seed: Of the order.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples, self.seed = num_samples, seed
        self._pass, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> int:
        """Return the index of the sample at a position 0, 1, 2, ... of the stream."""
        number, offset = divmod(position, self.num_samples)
        if number != self._pass:
            generator = sample_generator(derive_seed(self.seed, number))
            self._permutation = torch.randperm(self.num_samples, generator=generator)
            self._pass = number
        return int(self._permutation[offset])


class StepBatches(Sampler[list[int]]):
    """The positions that one rank loads, batch after batch, from a given step on, endlessly.

    The global batch of step k holds the positions k batch_size .. (k + 1) batch_size - 1; ranks
    and accumulation only divide it.

    Args:
        batch_size: Of the global batch.
        rank: This process.
        num_ranks: All processes.
        accumulate: Micro-batches of a step.
        first_step: Where to start; a resumed run starts where it stopped.

    Raises:
        ValueError: The numbers do not divide.
    """

    def __init__(
        self,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        accumulate: int = 1,
        first_step: int = 0,
    ) -> None:
        parts = num_ranks * accumulate
        if batch_size < 1 or batch_size % parts:
            raise ValueError(
                f"The global batch of {batch_size} does not divide into {num_ranks} ranks times "
                f"{accumulate} accumulated batches: wanted a multiple of {parts}."
            )
        self._size, self._parts = batch_size, parts
        self._rank, self._ranks, self._accumulate = rank, num_ranks, accumulate
        self._first = first_step

    def __iter__(self) -> Iterator[list[int]]:
        each, k = self._size // self._parts, self._first
        while True:
            for micro in range(self._accumulate):
                start = k * self._size + (micro * self._ranks + self._rank) * each
                yield list(range(start, start + each))
            k += 1
