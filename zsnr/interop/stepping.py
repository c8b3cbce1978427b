"""Sampling loops that are advanced from outside, one network call at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from zsnr.samplers import Sampler
from zsnr.samplers.base import ASSUMED_GUIDANCE
from zsnr.schedule import Schedule


class Loop(Protocol):
    """A sampling loop between two network calls.

    Attributes:
        timesteps: The timestep of every network call.
    """

    timesteps: Sequence[int]

    def advance(self, x_0: Tensor, randn_like: Callable[[Tensor], Tensor]) -> Tensor:
        """Use the prediction of the current call, and return x_t of the next one, or x_0."""
        ...

    def change(self, x_t: Tensor) -> bool:
        """Continue from another x_t; False = the loop cannot, and has to start again."""
        ...


def begin_loop(sampler: Sampler, schedule: Schedule, grid: Sequence[int], x_T: Tensor) -> Loop:
    """Start a sampling loop at the first timestep of a grid."""
    kind = PlannedLoop if type(sampler).sample is Sampler.sample else ReplayedLoop
    return kind(sampler, schedule, grid, x_T)


class PlannedLoop:
    """The loop of a sampler that plans its network calls."""

    def __init__(
        self, sampler: Sampler, schedule: Schedule, grid: Sequence[int], x_T: Tensor
    ) -> None:
        self._sampler = sampler
        self._plan = sampler.plan(schedule, grid, ASSUMED_GUIDANCE)
        self._state = sampler.begin(self._plan, x_T)
        self.timesteps: Sequence[int] = self._plan.timesteps

    def advance(self, x_0: Tensor, randn_like: Callable[[Tensor], Tensor]) -> Tensor:
        self._state = self._sampler.advance(self._plan, self._state, x_0, randn_like)
        return self._state.x_t

    def change(self, x_t: Tensor) -> bool:
        self._state = self._sampler.change(self._plan, self._state, x_t)
        return True


class _UnansweredError(Exception):
    """Ends a replay when the sampler requests a prediction that is not available yet."""

    def __init__(self, x_t: Tensor) -> None:
        super().__init__()
        self.x_t = x_t


class ReplayedLoop:
    """The loop of a sampler with its own `sample`, which is run again for every network call."""

    def __init__(
        self, sampler: Sampler, schedule: Schedule, grid: Sequence[int], x_T: Tensor
    ) -> None:
        self._sampler, self._schedule, self._grid, self._x_T = sampler, schedule, grid, x_T
        self._answers: list[Tensor] = []  # x_0 of each call
        self._noises: list[Tensor] = []
        self.timesteps: Sequence[int] = self._timesteps_of_calls()

    def advance(self, x_0: Tensor, randn_like: Callable[[Tensor], Tensor]) -> Tensor:
        self._answers.append(x_0.clone())
        answers, noises = iter(self._answers), iter([*self._noises])

        def answer(x_t: Tensor, t: Tensor) -> Tensor:
            value = next(answers, None)
            if value is None:
                raise _UnansweredError(x_t)
            return value

        def noise(like: Tensor) -> Tensor:
            value = next(noises, None)
            if value is None:
                value = randn_like(like)
                self._noises.append(value)
            return value

        try:
            return self._sampler.sample(
                answer, self._schedule, self._x_T, self._grid, randn_like=noise
            )
        except _UnansweredError as reached:
            return reached.x_t

    def change(self, x_t: Tensor) -> bool:
        return False

    def _timesteps_of_calls(self) -> list[int]:
        """Run the sampler on a single number to record at which timesteps it calls the network."""
        calls: list[int] = []

        def listen(x_t: Tensor, t: Tensor) -> Tensor:
            calls.append(int(t))
            return torch.zeros_like(x_t)

        x_T = torch.zeros(1, 1)  # and no random numbers, so that the caller's are not consumed
        self._sampler.sample(listen, self._schedule, x_T, self._grid, randn_like=torch.zeros_like)
        return calls
