"""This package's samplers with the scheduler interface of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zsnr.interop.declared import process_from_diffusers, rescaled
from zsnr.interop.scheduler_config import scheduler_config
from zsnr.prediction import PredictionType, to_x0
from zsnr.samplers import Sampler, get_sampler
from zsnr.samplers.recommend import AUTO
from zsnr.samplers.registry import sampler_name
from zsnr.schedule import NoiseSchedule
from zsnr.timesteps import check_spacing, check_timesteps, get_timesteps


class _Config(dict[str, Any]):
    """Settings by key and by attribute, as pipelines access them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _UnansweredError(Exception):
    """Ends a replay when the sampler requests a prediction that is not available yet."""

    def __init__(self, x_t: Tensor) -> None:
        super().__init__()
        self.x_t = x_t


class DiffusersScheduler:
    """Any sampler of this package as a scheduler for pipelines of diffusers.

    pipe.scheduler = DiffusersScheduler.from_config(pipe.scheduler.config)

    uses the schedule and prediction type that the pipeline declares, and samples from the last
    timestep of the unmodified schedule, on the grid of `spacing`.

    Args:
        sampler: A sampler or the name of a registered one. "auto" is refused: it depends on the
            number of steps and the guidance scale, and a pipeline does not tell its scheduler the
            scale. `zsnr.recommend_sampling` returns a sampler and a spacing for both.
        schedule: The schedule the network was trained on.
        prediction_type: What the network predicts.
        spacing: A registered timestep spacing, or the path of a grid file; "auto" is refused.

    The sampler "multiscale" adapts its steps to the guidance scale. It assumes 3 unless it is given
    the scale that the pipeline is called with:

    DiffusersScheduler(get_sampler("multiscale", guidance=7.5), spacing="guided")

    Attributes:
        timesteps: t of every network call, int64, (calls,), after `set_timesteps`.
        order: Always 1, because `timesteps` holds every call. So image-to-image pipelines, which
            count S of them, start earlier with Heun's method than their `strength` says.
        init_noise_sigma: Always 1: x_T is noise of unit variance.

    Raises:
        ValueError: A name is unknown or "auto", or epsilon is combined with zero SNR.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(
        self,
        sampler: Sampler | str = "ddim",
        schedule: NoiseSchedule = NoiseSchedule(),
        prediction_type: PredictionType = "v_prediction",
        spacing: str = "trailing",
    ) -> None:
        declared = scheduler_config(schedule, prediction_type)  # refuses epsilon at zero SNR
        if AUTO in (sampler, spacing):
            raise ValueError(
                f"sampler={sampler!r}, spacing={spacing!r}: 'auto' depends on the number of steps "
                "and the guidance scale, which a scheduler does not know. Pass the two names that "
                "zsnr.recommend_sampling(num_steps, guidance_scale) returns, and pass the scale to "
                "multiscale: get_sampler('multiscale', guidance=7.5)."
            )
        check_spacing(spacing)
        self.sampler = get_sampler(sampler) if isinstance(sampler, str) else sampler
        self.schedule, self.prediction_type, self.spacing = schedule, prediction_type, spacing
        self.config = _Config(
            {**declared, "timestep_spacing": spacing, "sampler": sampler_name(self.sampler)}
        )
        self.timesteps = torch.arange(schedule.num_timesteps - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self._grid: list[int] = []
        self._calls: list[int] = []
        self._x: Tensor | None = None  # the state at the start of the history
        self._answers: list[Tensor] = []  # x_0 of each call since then
        self._noises: list[Tensor] = []
        self._returned: Tensor | None = None
        self._first, self._next = 0, 0  # indices of calls: the first of the history, and the next

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        sampler: Sampler | str = "ddim",
        *,
        spacing: str = "trailing",
        zero_terminal_snr: bool | None = None,
    ) -> DiffusersScheduler:
        """Take schedule and prediction type from the config of a scheduler of diffusers.

        Args:
            config: A scheduler config, such as pipe.scheduler.config.
            sampler: See the class.
            spacing: See the class; the spacing of the config is not used.
            zero_terminal_snr: Whether the network was trained on the rescaled schedule. None = as
                the config says. Pass True if a scheduler class without that flag dropped it.
        """
        # The spacing is not used, and diffusers may not know it.
        schedule, declared = process_from_diffusers({**config, "timestep_spacing": "trailing"})
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(f"{config['_class_name']} is rectified flow: wanted betas.")
        if zero_terminal_snr is not None:
            plain = replace(schedule, zero_terminal_snr=False)
            schedule = rescaled(plain) if zero_terminal_snr else plain
        return cls(sampler, schedule, declared, spacing)

    def __len__(self) -> int:
        return self.schedule.num_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the grid.

        Args:
            num_inference_steps: S, 1 to T.
            device: Device of `timesteps`.
            timesteps: A custom grid, descending, instead of the spacing's.

        Raises:
            ValueError: Neither or both are given, or they are out of range.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give either num_inference_steps or timesteps.")
        T = self.schedule.num_timesteps
        if timesteps is None:
            assert num_inference_steps is not None
            grid = get_timesteps(self.spacing, num_inference_steps, T, schedule=self.schedule)
            self._grid = grid.tolist()
        else:
            self._grid = check_timesteps(timesteps, T)
        self._calls = self._timesteps_of_calls()
        self.num_inference_steps = len(self._grid)
        self.timesteps = torch.tensor(self._calls, device=device)
        self._forget()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of the next timestep; image-to-image starts inside the list.

        Without it the next timestep is identified by its value, the first of two equal ones.
        """
        self._forget()
        self._next = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """Return the sample as it is: x_t has unit variance at every timestep."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Advance from one network call to the next.

        The state may have been changed since the last step, as inpainting does; a sampler with a
        history then starts a new one.

        Args:
            model_output: Output of the network at (sample, timestep), after guidance, (B, *).
            timestep: One of `timesteps`.
            sample: x_t, (B, *).
            generator: Generator of the noise, if the sampler draws any.
            return_dict: Return an object with prev_sample and pred_original_sample, else a tuple.

        Returns:
            x_t of the next call, or x_0 after the last, in the sample's dtype; and the predicted
            x_0.

        Raises:
            ValueError: `set_timesteps` was not called, or the timestep is not of the grid.
        """
        index = self._index(int(timestep))
        x_t = sample.to(torch.promote_types(sample.dtype, torch.float32))
        alpha_t, sigma_t = self.schedule(self._calls[index])
        x_0 = to_x0(model_output, x_t, alpha_t, sigma_t, self.prediction_type)
        follows = self.sampler.keeps_history and self._follows(index, sample)
        if not follows:
            if self._calls[index] not in self._grid:
                raise ValueError(
                    f"timestep={self._calls[index]} lies inside a step of this sampler, and the "
                    "sample is not the result of the previous call: start at one of "
                    f"{self._grid}."
                )
            if self._calls[index + 1 : index + 2] == [self._calls[index]]:
                # The end of one step and the start of the next, both at t: start with the latter.
                self._forget()
                self._next = index + 1
                return self._answer(sample, x_0, return_dict)
            self._forget()
            self._first, self._x = index, x_t
        self._answers.append(x_0)
        x_s = self._replay(lambda like: _randn_like(like, generator))
        self._next, self._returned = index + 1, x_s.to(sample.dtype)
        return self._answer(self._returned, x_0, return_dict)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean data (equation 4), in its dtype."""
        t = timesteps.to(original_samples.device, torch.int64)
        return self.schedule.add_noise(original_samples, noise, t).to(original_samples.dtype)

    def _answer(self, x_s: Tensor, x_0: Tensor, return_dict: bool) -> Any:
        if not return_dict:
            return x_s, x_0
        from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

        return DDIMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0)

    def _timesteps_of_calls(self) -> list[int]:
        """Run the sampler on a single number to record at which timesteps it calls the network."""
        calls: list[int] = []

        def listen(x_t: Tensor, t: Tensor) -> Tensor:
            calls.append(int(t))
            return torch.zeros_like(x_t)

        x_T = torch.zeros(1, 1)  # and no random numbers, so that the caller's are not consumed
        self.sampler.sample(listen, self.schedule, x_T, self._grid, randn_like=torch.zeros_like)
        return calls

    def _index(self, t: int) -> int:
        if not self._grid:
            raise ValueError("step() was called before set_timesteps().")
        if self._next < len(self._calls) and self._calls[self._next] == t:
            return self._next
        if t not in self._calls:
            raise ValueError(f"timestep={t} is not in the grid: {self._calls}.")
        return self._calls.index(t)

    def _follows(self, index: int, sample: Tensor) -> bool:
        """Whether a step continues from the result of the last one."""
        last = self._returned
        return (
            index == self._next
            and last is not None
            and (last is sample or (last.shape == sample.shape and bool(torch.equal(last, sample))))
        )

    def _forget(self) -> None:
        self._first, self._next, self._x, self._returned = 0, 0, None, None
        self._answers, self._noises = [], []

    def _replay(self, randn_like: Any) -> Tensor:
        """Run the sampler from the start of its history to the first call without an answer."""
        answers, noises = iter(self._answers), iter([*self._noises])
        assert self._x is not None

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

        grid = self._grid[self._grid.index(self._calls[self._first]) :]
        if not self.sampler.keeps_history:
            grid = grid[:2]
        try:
            return self.sampler.sample(answer, self.schedule, self._x, grid, randn_like=noise)
        except _UnansweredError as reached:
            return reached.x_t


def _randn_like(like: Tensor, generator: Any) -> Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    noise: Tensor = randn_tensor(
        like.shape, generator=generator, device=like.device, dtype=like.dtype
    )
    return noise
