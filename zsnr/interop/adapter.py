"""This package's samplers with the scheduler interface of diffusers.

Only this module imports diffusers when it is imported; `zsnr.interop` does so at the first use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from zsnr.interop.scheduler_settings import (
    BETA_KEYS,
    UNUSED_KEYS,
    describe_schedule,
    read_prediction_type,
    read_schedule,
)
from zsnr.interop.stepping import Loop, begin_loop
from zsnr.prediction import PredictionType, check_prediction_type, to_x0
from zsnr.samplers import Sampler, get_sampler
from zsnr.samplers.recommend import AUTO
from zsnr.samplers.registry import sampler_name, sampler_options
from zsnr.schedule import NoiseSchedule, RectifiedFlow, Schedule, noised, timesteps_at
from zsnr.timesteps import check_spacing, check_timesteps, get_timesteps

_OWN_KEYS = ("sampler", "sampler_options", "spacing", "schedule")


class DiffusersScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Any sampler of this package as a scheduler for pipelines of diffusers.

    pipe.scheduler = DiffusersScheduler.from_config(pipe.scheduler.config)

    uses the schedule and prediction type that the pipeline declares, and samples from the last
    timestep of the unmodified schedule, on the grid of `spacing`. A pipeline that holds it is
    saved, and loaded by a program that has imported `zsnr.interop`; other schedulers are made from
    its config, and it from theirs.

    Args:
        sampler: A sampler or the name of a registered one. "auto" is refused: it depends on the
            number of steps and the guidance scale, and a pipeline does not tell its scheduler the
            scale. `zsnr.recommend_sampling` returns a sampler and a spacing for both.
        schedule: The schedule the network was trained on. None = NoiseSchedule(), changed by the
            settings below.
        prediction_type: What the network predicts. None = "flow" on a RectifiedFlow, else
            "v_prediction".
        spacing: A registered timestep spacing, or the path of a grid file; "auto" is refused.
        num_train_timesteps: T, as diffusers calls it. This and the next five instead of `schedule`.
        beta_start: First beta.
        beta_end: Last beta.
        beta_schedule: Name of the schedule in diffusers.
        trained_betas: Betas of a custom schedule.
        rescale_betas_zero_snr: Whether the schedule is rescaled to zero terminal SNR.

    The sampler "multiscale" adapts its steps to the guidance scale. It assumes 3 unless it is given
    the scale that the pipeline is called with:

    DiffusersScheduler(get_sampler("multiscale", guidance=7.5), spacing="guided")

    Attributes:
        config: The settings as a scheduler of diffusers has them, and those of this one.
        timesteps: What the network is told at every call, (calls,), after `set_timesteps`: int64
            timesteps, or 1000 u as float32 on a RectifiedFlow.
        order: Always 1, because `timesteps` holds every call. So image-to-image pipelines, which
            count S of them, start earlier with Heun's method than their `strength` says.
        init_noise_sigma: Always 1: x_T is noise of unit variance.

    Raises:
        ValueError: A name is unknown or "auto", or epsilon is combined with zero SNR.
    """

    order = 1
    init_noise_sigma = 1.0
    _compatibles: ClassVar[list[str]] = [  # but one needs another package
        each.name for each in KarrasDiffusionSchedulers if each.name != "DPMSolverSDEScheduler"
    ]

    def __init__(
        self,
        sampler: Sampler | str = "ddim",
        schedule: Schedule | None = None,
        prediction_type: PredictionType | None = None,
        spacing: str = "trailing",
        *,
        num_train_timesteps: int | None = None,
        beta_start: float | None = None,
        beta_end: float | None = None,
        beta_schedule: str | None = None,
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool | None = None,
    ) -> None:
        betas = (num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        given = dict(zip(BETA_KEYS, (*betas, rescale_betas_zero_snr), strict=True))
        given = {key: value for key, value in given.items() if value is not None}
        if schedule is not None and given:
            raise ValueError(
                f"schedule and {', '.join(given)} are given: wanted one of the two. Leave one out."
            )
        if schedule is None:
            schedule = NoiseSchedule()
            if "trained_betas" in given:
                given = {"rescale_betas_zero_snr": False, **given}
            if given:
                schedule = read_schedule({**describe_schedule(schedule), **given})
        if prediction_type is None:
            prediction_type = "flow" if isinstance(schedule, RectifiedFlow) else "v_prediction"
        check_prediction_type(prediction_type, schedule)
        if AUTO in (sampler, spacing):
            raise ValueError(
                f"sampler={sampler!r}, spacing={spacing!r}: 'auto' depends on the number of steps "
                "and the guidance scale, which a scheduler does not know. Pass the two names that "
                "zsnr.recommend_sampling(num_steps, guidance_scale) returns, and pass the scale to "
                "multiscale: get_sampler('multiscale', guidance=7.5)."
            )
        check_spacing(spacing)
        self.sampler = get_sampler(sampler) if isinstance(sampler, str) else sampler
        self.prediction_type, self.spacing = prediction_type, spacing
        self.register_to_config(
            **describe_schedule(schedule),
            prediction_type=prediction_type,
            timestep_spacing=spacing if spacing in ("leading", "linspace") else "trailing",
            sampler=sampler_name(self.sampler),
            sampler_options=sampler_options(self.sampler),
            spacing=spacing,
            schedule=schedule.settings(),
            _use_default_values=[],
        )
        self._declared = schedule
        self._use(schedule)
        self._grid: list[int] = []
        self._set_calls(list(range(schedule.num_timesteps - 1, -1, -1)), None)
        self.num_inference_steps: int | None = None
        self._begin_index: int | None = None
        self._loop: Loop | None = None
        self._returned: Tensor | None = None  # the result of the last step
        self._next, self._eta = 0, 0.0  # the index of the next call, and eta of the loop

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        sampler: Sampler | str | None = None,
        *,
        spacing: str | None = None,
        zero_terminal_snr: bool | None = None,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Any:
        """Take schedule and prediction type from the config of a scheduler of diffusers.

        Args:
            config: A scheduler config, such as pipe.scheduler.config.
            sampler: See the class. None = the one that the config names if it is of this class,
                else "ddim".
            spacing: See the class; the spacing of other classes' configs is not used. None = that
                of a config of this class, else "trailing".
            zero_terminal_snr: Whether the network was trained on the rescaled schedule. None = as
                the config says. Pass True if a scheduler class without that flag dropped it.
            return_unused_kwargs: Also return the keys of the config that are not used.
            overrides: Keys of the config with other values.

        Raises:
            TypeError: An override is not a key of the config.
        """
        own = {key: config[key] for key in _OWN_KEYS if key in config}
        unknown = [key for key in overrides if key not in {*config, *BETA_KEYS, "prediction_type"}]
        if unknown:
            raise TypeError(f"from_config() has no option {unknown[0]!r}, nor has the config.")
        values = {key: value for key, value in config.items() if key not in _OWN_KEYS}
        values |= overrides
        schedule = read_schedule(values, own.get("schedule"), zero_terminal_snr)
        if sampler is None:
            sampler = own.get("sampler", "ddim")
            if own.get("sampler_options") and isinstance(sampler, str):
                sampler = get_sampler(sampler, **own["sampler_options"])
        scheduler = cls(
            sampler if sampler is not None else "ddim",
            schedule,
            read_prediction_type(values),
            own.get("spacing", "trailing") if spacing is None else spacing,
        )
        hidden = {k: v for k, v in values.items() if k not in scheduler.config}
        hidden.pop("_use_default_values", None)
        registered = {**scheduler.config, **hidden}
        registered |= {key: values[key] for key in UNUSED_KEYS if key in values}
        if "_use_default_values" not in config:  # a saved config holds every value
            del registered["_use_default_values"]
        if "_class_name" in hidden:
            registered["_class_name"] = cls.__name__
        scheduler._internal_dict = FrozenDict(registered)
        return (scheduler, hidden) if return_unused_kwargs else scheduler

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_internal_dict": dict(self._internal_dict)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "_internal_dict": FrozenDict(state["_internal_dict"])})

    def __len__(self) -> int:
        return self.schedule.num_timesteps

    @property
    def begin_index(self) -> int | None:
        """The index that `set_begin_index` set."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The index of the next network call; None before the first step."""
        return None if self._loop is None else self._next

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the grid.

        Args:
            num_inference_steps: S, 1 to T.
            device: Device of `timesteps`.
            timesteps: A custom grid, descending, instead of the spacing's: what the network is
                told.
            sigmas: A custom grid of a RectifiedFlow, descending in (0, 1]: u before the shift, as
                flow pipelines pass it. The nearest timesteps are used; linspace(1, 1 / S, S) is the
                spacing "trailing".
            mu: Logarithm of the shift for this size, if the config sets use_dynamic_shifting.

        Raises:
            ValueError: Not exactly one of the first, third and fourth is given, the number of steps
                contradicts it, or they are out of range.
        """
        custom = timesteps if sigmas is None else sigmas
        if (timesteps is not None and sigmas is not None) or (
            (num_inference_steps is None) == (custom is None)
            and len([] if custom is None else custom) != num_inference_steps
        ):
            raise ValueError("Give either num_inference_steps or timesteps, or sigmas.")
        if self.config.get("use_dynamic_shifting"):
            self._use(RectifiedFlow(self._dynamic_shift(mu), self._declared.num_timesteps))
        T = self.schedule.num_timesteps
        if sigmas is not None:
            self._grid = check_timesteps(self._from_sigmas(sigmas), T)
        elif timesteps is not None:
            told = torch.as_tensor(timesteps)
            if isinstance(self.schedule, RectifiedFlow):
                told = timesteps_at(self.schedule, told.float())
            self._grid = check_timesteps(told.tolist(), T)
        else:
            assert num_inference_steps is not None
            grid = get_timesteps(self.spacing, num_inference_steps, T, schedule=self.schedule)
            self._grid = grid.tolist()
        loop = begin_loop(self.sampler, self.schedule, self._grid, torch.zeros(1, 1))
        self._set_calls(list(loop.timesteps), device)
        self.num_inference_steps = len(self._grid)
        self._begin_index = None
        self._forget()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the index of the next timestep; image-to-image starts inside the list.

        Without it the next timestep is identified by its value, the first of two equal ones.
        """
        self._forget()
        self._begin_index = self._next = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Return the sample as it is: no schedule of this package scales x_t for the network."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
    ) -> Any:
        """Advance from one network call to the next.

        The state may have been changed since the last step, as inpainting does; a sampler goes on
        from it with its last predictions, and one with its own `sample` starts a new history.

        Args:
            model_output: Output of the network at (sample, timestep), after guidance, (B, *).
            timestep: One of `timesteps`.
            sample: x_t, (B, *).
            generator: Generator of the noise, if the sampler draws any.
            return_dict: Return an object with prev_sample and pred_original_sample, else a tuple.
            eta: Fraction of ancestral noise of samplers that have this option, such as "ddim". 0,
                which pipelines pass unless they are told another one = that of the sampler.

        Returns:
            x_t of the next call, or x_0 after the last, in the sample's dtype; and the predicted
            x_0.

        Raises:
            ValueError: `set_timesteps` was not called, the timestep is not of the grid, or the
                sampler has no eta.
        """
        index = self._index(float(timestep))
        x_t = sample.to(torch.promote_types(sample.dtype, torch.float32))
        alpha_t, sigma_t = self.schedule(self._calls[index])
        x_0 = to_x0(model_output, x_t, alpha_t, sigma_t, self.prediction_type)
        if not self._continues(index, sample, x_t, eta):
            if self._calls[index] not in self._grid:
                raise ValueError(
                    f"timestep={self._calls[index]} lies inside a step of this sampler, and the "
                    "sample is not the result of the previous call: start at one of "
                    f"{self._grid}."
                )
            self._forget()
            if self._calls[index + 1 : index + 2] == [self._calls[index]]:
                # The end of one step and the start of the next, both at t: start with the latter.
                self._next = index + 1
                return self._answer(sample, x_0, return_dict)
            grid = self._grid[self._grid.index(self._calls[index]) :]
            self._loop = begin_loop(self._sampler_with(eta), self.schedule, grid, x_t)
            self._eta = eta
        assert self._loop is not None
        x_s = self._loop.advance(x_0, lambda like: _randn_like(like, generator))
        self._next, self._returned = index + 1, x_s.to(sample.dtype)
        return self._answer(self._returned, x_0, return_dict)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean data (equation 4), in its dtype."""
        t = torch.as_tensor(timesteps, device=original_samples.device)
        if isinstance(self.schedule, RectifiedFlow):
            t = timesteps_at(self.schedule, t.float())
        t = t.to(torch.int64).reshape(-1).expand(len(original_samples))
        return noised(original_samples, noise, *self.schedule(t)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Noise clean data, as flow pipelines call it; see `add_noise`."""
        return self.add_noise(sample, noise, timestep)

    def _use(self, schedule: Schedule) -> None:
        """Set the schedule, and its tables under the names of diffusers."""
        self.schedule = schedule
        if isinstance(schedule, NoiseSchedule):
            self.betas = schedule.beta_table.float()
            self.alphas_cumprod = schedule.alphas_cumprod.float()

    def _set_calls(self, calls: list[int], device: torch.device | str | None) -> None:
        self._calls = calls
        self.timesteps = self.schedule.time(torch.tensor(calls, device=device))
        self._told = [float(t) for t in self.timesteps]
        if isinstance(self.schedule, RectifiedFlow):
            ends = [self.schedule(t)[1] for t in (*calls, -1)]
            self.sigmas = torch.tensor(ends, device=device)

    def _dynamic_shift(self, mu: float | None) -> float:
        if mu is None:
            raise ValueError(
                "The config sets use_dynamic_shifting: wanted mu, the logarithm of the shift for "
                "the size of the images, as the pipeline computes it."
            )
        return mu if self.config.get("time_shift_type") == "linear" else math.exp(mu)

    def _from_sigmas(self, sigmas: Sequence[float]) -> list[int]:
        if not isinstance(self.schedule, RectifiedFlow):
            raise ValueError(
                "sigmas are for rectified flow, but this schedule is a NoiseSchedule: pass "
                "timesteps instead."
            )
        T = self.schedule.num_timesteps
        return [round(float(u) * T) - 1 for u in sigmas]

    def _sampler_with(self, eta: float) -> Sampler:
        if eta == 0:
            return self.sampler
        options = sampler_options(self.sampler)
        if "eta" not in options:
            raise ValueError(
                f"eta={eta}: the sampler {sampler_name(self.sampler)!r} has no such option, unlike "
                "'ddim'. Leave eta out, or use that sampler."
            )
        changed: Sampler = dataclasses.replace(self.sampler, eta=eta)  # type: ignore[type-var]
        return changed

    def _answer(self, x_s: Tensor, x_0: Tensor, return_dict: bool) -> Any:
        if not return_dict:
            return x_s, x_0
        return DDIMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0)

    def _index(self, told: float) -> int:
        if not self._grid:
            raise ValueError("step() was called before set_timesteps().")
        if self._next < len(self._told) and self._told[self._next] == told:
            return self._next
        if told not in self._told:
            shown = [int(t) if t == int(t) else t for t in (told, *self._told)]
            raise ValueError(f"timestep={shown[0]} is not in the grid: {shown[1:]}.")
        return self._told.index(told)

    def _continues(self, index: int, sample: Tensor, x_t: Tensor, eta: float) -> bool:
        """Whether a step continues the loop, from its last result or a changed one."""
        last = self._returned
        if self._loop is None or last is None or index != self._next or eta != self._eta:
            return False
        if last is sample:
            return True
        if last.shape != sample.shape:
            return False
        return bool(torch.equal(last, sample)) or self._loop.change(x_t)

    def _forget(self) -> None:
        self._loop, self._returned = None, None
        self._next, self._eta = 0, 0.0


# Diffusers writes this path into model_index.json, and looks there for SchedulerMixin too.
DiffusersScheduler.__module__ = "zsnr.interop"


def _randn_like(like: Tensor, generator: Any) -> Tensor:
    noise: Tensor = randn_tensor(
        like.shape, generator=generator, device=like.device, dtype=like.dtype
    )
    return noise
