"""What a scheduler_config.json of diffusers declares, including the defaults of its class.

The table of classes is part of this package, so that a config can be judged without diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from operator import mul
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import torch

from zsnr.interop.config_values import is_real, reader
from zsnr.interop.processes import declare_flow, process_of, refusal
from zsnr.prediction import PredictionType
from zsnr.schedule import MAX_TIMESTEPS, NoiseSchedule, RectifiedFlow, positive
from zsnr.untrusted import shown

# How a class makes its grid of S timesteps:
# whole       S integers
# fractional  the same, but linspace is not rounded
# one_more    linspace and leading divide by S + 1 and leave the last timestep out
# repeated    integers, some of them twice (PNDM)
# distilled   a subset of a distilled model's timesteps; timestep_spacing is not read
GridKind = Literal["whole", "fractional", "one_more", "repeated", "distilled"]

ADAPTER = "DiffusersScheduler"
"""This package's own scheduler class for diffusers, whose grid is exact."""
_WARPS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)
_SPACINGS = ("leading", "linspace", "trailing")
_COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
_RESCALED = {"rescale_betas_zero_snr": False}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_WARPED = dict.fromkeys(_WARPS[:3], False)
_SOLVER = {**_WARPED, "use_flow_sigmas": False, "thresholding": False}
_ALPHAS = {
    **_COMMON,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    **_RESCALED,
    "clip_sample": True,
    "thresholding": False,
}
_DISTILLED = {
    **_ALPHAS,
    **_SD_BETAS,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
}
_CLIPPED = {"lambda_min_clipped": -math.inf}
_PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True)
class SchedulerClass:
    """One of diffusers' scheduler classes with a variance-preserving schedule.

    Args:
        defaults: Defaults of the relevant keys. The class does not know any other key.
        grid: How it makes its timesteps.
        finite_at_zero: Whether its step is finite where abar_t is exactly 0.
        patches: Whether it replaces abar_T by 2^-24 when it rescales.
        recomputes_next: Whether its step goes to t - T // S instead of the grid's next timestep.
        eta_fails: Whether its step may be NaN for eta = 1 at zero SNR.
    """

    defaults: Mapping[str, Any]
    grid: GridKind
    finite_at_zero: bool = False
    patches: bool = False
    recomputes_next: bool = False
    eta_fails: bool = False

    @property
    def rescales(self) -> bool:
        """Whether it knows rescale_betas_zero_snr; otherwise it drops the key."""
        return "rescale_betas_zero_snr" in self.defaults


def _cogvideox(recomputes_next: bool) -> SchedulerClass:
    defaults = {**_ALPHAS, **_SD_BETAS, "beta_schedule": "scaled_linear", "set_alpha_to_one": True}
    del defaults["thresholding"]
    return SchedulerClass(
        {**defaults, "snr_shift_scale": 3.0},
        "whole",
        finite_at_zero=True,
        recomputes_next=recomputes_next,
    )


def _ddim() -> SchedulerClass:
    return SchedulerClass(
        {**_ALPHAS, "set_alpha_to_one": True},
        "whole",
        finite_at_zero=True,
        recomputes_next=True,
        eta_fails=True,
    )


SCHEDULERS: Mapping[str, SchedulerClass] = MappingProxyType(
    {
        "DDIMScheduler": _ddim(),
        "DDIMParallelScheduler": _ddim(),
        "DDPMScheduler": SchedulerClass(_ALPHAS, "whole", finite_at_zero=True),
        "DDPMParallelScheduler": SchedulerClass(_ALPHAS, "whole", finite_at_zero=True),
        "PNDMScheduler": SchedulerClass(
            {
                **_COMMON,
                "timestep_spacing": "leading",
                "steps_offset": 0,
                "set_alpha_to_one": False,
                "skip_prk_steps": False,
            },
            "repeated",
            recomputes_next=True,
        ),
        "LMSDiscreteScheduler": SchedulerClass({**_COMMON, **_SPACED, **_WARPED}, "fractional"),
        "HeunDiscreteScheduler": SchedulerClass(
            {**_COMMON, **_SD_BETAS, **_SPACED, **_WARPED, "clip_sample": False}, "fractional"
        ),
        "EulerDiscreteScheduler": SchedulerClass(
            {**_COMMON, **_SPACED, **_RESCALED, **_WARPED}, "fractional", patches=True
        ),
        "EulerAncestralDiscreteScheduler": SchedulerClass(
            {**_COMMON, **_SPACED, **_RESCALED}, "fractional", patches=True
        ),
        "KDPM2DiscreteScheduler": SchedulerClass(
            {**_COMMON, **_SD_BETAS, **_SPACED, **_WARPED}, "fractional"
        ),
        "KDPM2AncestralDiscreteScheduler": SchedulerClass(
            {**_COMMON, **_SD_BETAS, **_SPACED, **_WARPED}, "fractional"
        ),
        "DPMSolverSDEScheduler": SchedulerClass(
            {**_COMMON, **_SD_BETAS, **_SPACED, **_WARPED}, "fractional"
        ),
        "DPMSolverMultistepScheduler": SchedulerClass(
            {
                **_COMMON,
                **_SPACED,
                **_RESCALED,
                **_SOLVER,
                **_CLIPPED,
                "use_lu_lambdas": False,
            },
            "one_more",
            patches=True,
        ),
        "DPMSolverSinglestepScheduler": SchedulerClass(
            {**_COMMON, **_SOLVER, **_CLIPPED}, "one_more"
        ),
        "DEISMultistepScheduler": SchedulerClass({**_COMMON, **_SPACED, **_SOLVER}, "one_more"),
        "UniPCMultistepScheduler": SchedulerClass(
            {**_COMMON, **_SPACED, **_RESCALED, **_SOLVER}, "one_more", patches=True
        ),
        "SASolverScheduler": SchedulerClass(
            {**_COMMON, **_SPACED, **_SOLVER, **_CLIPPED}, "one_more"
        ),
        "LCMScheduler": SchedulerClass(_DISTILLED, "distilled", finite_at_zero=True),
        "TCDScheduler": SchedulerClass(_DISTILLED, "distilled", finite_at_zero=True),
        "CogVideoXDDIMScheduler": _cogvideox(recomputes_next=True),
        "CogVideoXDPMScheduler": _cogvideox(recomputes_next=True),
    }
)


@dataclass(frozen=True)
class Declared:
    """What a scheduler config declares.

    Args:
        class_name: The scheduler's class.
        schedule: The schedule that the class uses.
        prediction_type: What the network predicts.
        spacing: leading, linspace or trailing, as the class will use it.
        num_train_timesteps: T, as the grids use it.
        steps_offset: Offset that is added to a leading grid.
        drops_rescale: Whether the config requests the rescale, and the class drops the key.
        patched: Whether the class replaces abar_T by 2^-24.
        warp: The key that spaces timesteps by noise level instead, if one is set.
        clip_sample: Whether x_0 is clipped to [-1, 1]; None = the class has no such key.
        thresholding: Whether x_0 is thresholded dynamically; None = the class has no such key.
        set_alpha_to_one: Whether the last step goes to clean data; None = there is no such key.
        skip_prk_steps: PNDM's flag of that name.
        original_inference_steps: Number of timesteps of a distilled model.
        lambda_min_clipped: Timesteps with a lower half log SNR than this are left out.
        missing: Keys that have the class's default, and "_class_name" if the config lacks it.
    """

    class_name: str
    schedule: NoiseSchedule
    prediction_type: PredictionType
    spacing: str
    num_train_timesteps: int
    steps_offset: int = 0
    drops_rescale: bool = False
    patched: bool = False
    warp: str | None = None
    clip_sample: bool | None = None
    thresholding: bool | None = None
    set_alpha_to_one: bool | None = None
    skip_prk_steps: bool = False
    original_inference_steps: int = 0
    lambda_min_clipped: float = -math.inf
    missing: tuple[str, ...] = ()

    @property
    def scheduler(self) -> SchedulerClass:
        """Properties of the class."""
        return SCHEDULERS[self.class_name]


def declare(config: Mapping[str, Any]) -> Declared:
    """Read what a scheduler_config.json declares.

    A missing key has the default of the config's class (DDIMScheduler if the config names none); a
    key that the class does not know has no effect.

    Raises:
        ValueError: The class is unknown or has no variance-preserving schedule, or diffusers would
            not accept a value.
    """
    name = config.get("_class_name", "DDIMScheduler")
    match process_of(config):
        case "flow":
            raise ValueError(f"{name} is rectified flow, which has no schedule of betas.")
        case "exploding" | "continuous" | "tokens":
            raise ValueError(refusal(config))
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ValueError(
            f"Scheduler class {shown(name)} is unknown. Known: {', '.join(SCHEDULERS)}."
        )
    cls = SCHEDULERS[name]
    values = {key: config.get(key, default) for key, default in cls.defaults.items()}
    flag, count = reader(values, bool), reader(values, int)
    prediction_type = values["prediction_type"]
    if prediction_type not in _PREDICTIONS:
        known = ", ".join(map(repr, _PREDICTIONS))
        raise ValueError(f"prediction_type={shown(prediction_type)} is unknown. Known: {known}.")
    spacing = values.get("timestep_spacing", "linspace")
    if spacing not in _SPACINGS:
        known = ", ".join(map(repr, _SPACINGS))
        raise ValueError(f"timestep_spacing={shown(spacing)} is unknown. Known: {known}.")
    clipped = values.get("lambda_min_clipped", -math.inf)
    if not is_real(clipped) or math.isnan(clipped):
        raise ValueError(f"lambda_min_clipped={shown(clipped)}: wanted a number.")
    T = count("num_train_timesteps")
    if not 2 <= T <= MAX_TIMESTEPS:
        raise ValueError(f"num_train_timesteps={shown(T)}: wanted 2 to {MAX_TIMESTEPS}.")
    offset = count("steps_offset")
    if not 0 <= offset <= MAX_TIMESTEPS:
        raise ValueError(f"steps_offset={shown(offset)}: wanted 0 to {MAX_TIMESTEPS}.")
    original = count("original_inference_steps")
    if cls.grid == "distilled" and not 1 <= original <= T:
        raise ValueError(f"original_inference_steps={shown(original)}: wanted 1 to {T}.")
    rescale = flag("rescale_betas_zero_snr")
    return Declared(
        class_name=name,
        schedule=_schedule(values, T, rescale),
        prediction_type=cast(PredictionType, prediction_type),
        spacing=spacing,
        num_train_timesteps=T,
        steps_offset=offset,
        drops_rescale=not cls.rescales and config.get("rescale_betas_zero_snr") is True,
        patched=cls.patches and rescale,
        warp=next((key for key in _WARPS if flag(key)), None),
        clip_sample=flag("clip_sample") if "clip_sample" in values else None,
        thresholding=flag("thresholding") if "thresholding" in values else None,
        set_alpha_to_one=flag("set_alpha_to_one") if "set_alpha_to_one" in values else None,
        skip_prk_steps=flag("skip_prk_steps"),
        original_inference_steps=original,
        lambda_min_clipped=float(clipped),
        missing=tuple(key for key in ("_class_name", *cls.defaults) if key not in config),
    )


def schedule_from_diffusers(config: Mapping[str, Any]) -> NoiseSchedule | RectifiedFlow:
    """Read the schedule that a scheduler_config.json declares: that of `process_from_diffusers`."""
    return process_from_diffusers(config)[0]


def process_from_diffusers(
    config: Mapping[str, Any],
) -> tuple[NoiseSchedule | RectifiedFlow, PredictionType]:
    """Read the schedule and the prediction type that a scheduler_config.json declares.

    Missing keys have the defaults of the config's class (DDIMScheduler if the config names none).
    rescale_betas_zero_snr counts even if that class would drop it, because it says what the network
    was trained on. Classes of rectified flow have the prediction type "flow".

    Raises:
        ValueError: The class or beta_schedule is unknown or has no schedule on timesteps, a value
            is invalid, or the shift depends on the size of the image.
    """
    if config.get("_class_name") == ADAPTER:
        return _process_of_adapter(config)
    if process_of(config) == "flow":
        return declare_flow(config).process()
    declared = declare(config)
    schedule = rescaled(declared.schedule) if declared.drops_rescale else declared.schedule
    return schedule, declared.prediction_type


def _process_of_adapter(
    config: Mapping[str, Any],
) -> tuple[NoiseSchedule | RectifiedFlow, PredictionType]:
    """Read the config of this package's DiffusersScheduler: that of DDIM, a shift, or both."""
    prediction_type = config.get("prediction_type", "v_prediction")
    if prediction_type not in get_args(PredictionType):
        known = ", ".join(map(repr, get_args(PredictionType)))
        raise ValueError(f"prediction_type={shown(prediction_type)} is unknown. Known: {known}.")
    described = {
        **as_diffusers(config),
        "prediction_type": None,
        "timestep_spacing": "trailing",  # diffusers may not know that of the adapter
    }
    if process_of(described) == "flow":
        flow = declare_flow(described)
        return RectifiedFlow(flow.shift, flow.num_train_timesteps), prediction_type
    return declare({**described, "prediction_type": "v_prediction"}).schedule, prediction_type


def index_class(index: Mapping[str, Any]) -> str | None:
    """Return the scheduler's class that model_index.json names, which a pipeline uses."""
    entry = index.get("scheduler")
    if isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], str):
        return entry[1]
    return None


def with_class_of(index: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's config with the class that model_index.json names, if it names one."""
    name = index_class(index)
    return dict(config) if name is None else {**config, "_class_name": name}


def as_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's config, that of this package's adapter as one of diffusers' classes."""
    if config.get("_class_name") != ADAPTER:
        return dict(config)
    shifted = "CogVideoXDDIMScheduler" if "snr_shift_scale" in config else "DDIMScheduler"
    flow = "shift" in config and "beta_schedule" not in config
    return {**config, "_class_name": "FlowMatchEulerDiscreteScheduler" if flow else shifted}


def rescaled(schedule: NoiseSchedule) -> NoiseSchedule:
    """Rescale a schedule as diffusers does: by Algorithm 1, including the capped cosine."""
    if schedule.betas == "cosine" and not schedule.zero_terminal_snr:
        return NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod, zero_terminal_snr=True)
    return replace(schedule, zero_terminal_snr=True)


def diffusers_timesteps(declared: Declared, num_steps: int) -> tuple[float, ...]:
    """Return the timesteps that diffusers' class actually uses, descending.

    They are those of its outer steps: if a class calls the network twice in a step, or repeats a
    timestep, each is listed once. diffusers' trailing counts with a float step, so that some S have
    an additional timestep of -1.

    Args:
        declared: What the config declares; its `warp` must be None.
        num_steps: S, 1 to T.

    Raises:
        ValueError: The class refuses this S, or spaces noise levels instead of timesteps.
    """
    S, T = num_steps, declared.num_train_timesteps
    _check_steps(declared, S)
    if declared.warp is not None:
        raise ValueError(f"{declared.warp} spaces noise levels: there is no grid of timesteps.")
    kind = declared.scheduler.grid
    if kind == "distilled":
        count = declared.original_inference_steps
        distilled = [(i + 1) * (T // count) - 1 for i in reversed(range(count))]
        return tuple(distilled[math.floor(i * (count / S))] for i in range(S))
    last = T - _clipped(declared)
    skipped = 1 if kind == "one_more" else 0
    match declared.spacing:
        case "leading":
            ratio = (last if skipped else T) // (S + skipped)
            indices = reversed(range(skipped, S + skipped))
            return tuple(ratio * i + declared.steps_offset for i in indices)
        case "trailing":
            return tuple(round(value) - 1 for value in _count_down(last, T / S))
        case _:
            values = _evenly(last - 1, S + skipped)[skipped:][::-1]
            if kind == "fractional":
                exact = declared.class_name == "DPMSolverSDEScheduler"
                return tuple(values if exact else torch.tensor(values).tolist())
            return tuple(round(value) for value in values)


def first_timestep(declared: Declared, num_steps: int) -> float:
    """Return the timestep at which diffusers' class starts.

    Raises:
        ValueError: The class refuses this S.
    """
    _check_steps(declared, num_steps)
    if declared.warp is None:
        return diffusers_timesteps(declared, num_steps)[0]
    if declared.scheduler.grid == "one_more":  # from the schedule's largest noise level
        return declared.num_train_timesteps - 1
    return diffusers_timesteps(replace(declared, warp=None), num_steps)[0]


def off_grid_steps(declared: Declared, num_steps: int) -> int:
    """Count the steps to t - T // S that miss the grid's next timestep.

    Raises:
        ValueError: The class refuses this S.
    """
    if not declared.scheduler.recomputes_next:
        return 0
    grid = diffusers_timesteps(declared, num_steps)
    stride = declared.num_train_timesteps // num_steps
    off = sum(t - stride != s for t, s in pairwise(grid))
    return off + (grid[-1] - stride >= 0)


def longer_grids(declared: Declared) -> list[int]:
    """List the S for which trailing has one additional timestep."""
    T = declared.num_train_timesteps
    if declared.spacing != "trailing" or declared.scheduler.grid == "distilled":
        return []
    last = T - _clipped(declared)
    return [S for S in range(1, T + 1) if last == T and math.ceil(-T / -(T / S)) > S]


def _check_steps(declared: Declared, num_steps: int) -> None:
    highest = declared.num_train_timesteps
    if declared.scheduler.grid == "distilled":
        highest = declared.original_inference_steps
    lowest = 4 if declared.scheduler.grid == "repeated" and not declared.skip_prk_steps else 1
    if not lowest <= num_steps <= highest:
        raise ValueError(
            f"num_steps={num_steps}: {declared.class_name} supports {lowest} to {highest} steps."
        )


def _clipped(declared: Declared) -> int:
    """Count the noisiest timesteps, which lambda_min_clipped leaves out."""
    if declared.lambda_min_clipped == -math.inf:
        return 0
    half = declared.schedule.log_snr / 2
    if declared.patched:
        half[-1] = math.log(2**-24 / (1 - 2**-24)) / 2
    out = int((half < declared.lambda_min_clipped).sum())
    return min(out, declared.num_train_timesteps - 1)


def _evenly(last: int, count: int) -> list[float]:
    """Divide 0..last in floats, as numpy's linspace does; a single point is 0."""
    if count == 1:
        return [0.0]
    step = last / (count - 1)
    return [*(i * step for i in range(count - 1)), float(last)]


def _count_down(last: int, step: float) -> list[float]:
    """Count down to above 0 in floats, as numpy's arange does: rounding may add a last 0."""
    difference = (last - step) - last
    return [last + i * difference for i in range(math.ceil(-last / -step))]


def _schedule(values: Mapping[str, Any], T: int, rescale: bool) -> NoiseSchedule:
    betas = values["trained_betas"]
    shift = positive("snr_shift_scale", values.get("snr_shift_scale", 1.0))
    if betas is not None:
        return replace(_from_betas(betas, rescale), snr_shift=shift)
    name = values["beta_schedule"]
    if name == "squaredcos_cap_v2":
        capped = NoiseSchedule("cosine", T, zero_terminal_snr=False, snr_shift=shift)
        return rescaled(capped) if rescale else capped
    if name not in ("linear", "scaled_linear"):
        known = "'linear', 'scaled_linear', 'squaredcos_cap_v2'"
        raise ValueError(
            f"beta_schedule={shown(name)} is unknown. Known: {known}, or trained_betas."
        )
    for key in ("beta_start", "beta_end"):
        if not is_real(values[key]):
            raise ValueError(f"{key}={shown(values[key])}: wanted a number between 0 and 1.")
    return NoiseSchedule(
        cast(Any, name),
        T,
        beta_start=float(values["beta_start"]),
        beta_end=float(values["beta_end"]),
        zero_terminal_snr=rescale,
        snr_shift=shift,
    )


def _from_betas(betas: Any, rescale: bool) -> NoiseSchedule:
    if isinstance(betas, torch.Tensor) or type(betas).__module__ == "numpy":  # a config in memory
        betas = betas.tolist()
    if not isinstance(betas, Sequence) or not betas or not all(map(is_real, betas)):
        raise ValueError(f"trained_betas={shown(betas)}: wanted a list of numbers, or null.")
    if len(betas) > MAX_TIMESTEPS:
        raise ValueError(f"trained_betas has {len(betas)} entries: wanted {MAX_TIMESTEPS} at most.")
    if not all(0 < beta <= 1 for beta in betas):
        raise ValueError("trained_betas has values outside of (0, 1].")
    return NoiseSchedule.from_alphas_cumprod(
        list(accumulate((1 - beta for beta in betas), mul)), zero_terminal_snr=rescale
    )
