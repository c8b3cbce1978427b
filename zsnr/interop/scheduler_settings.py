"""The schedule in the config of a scheduler of diffusers, for the adapter: written and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
from torch import Tensor

from zsnr.interop.declared import rescaled, schedule_from_diffusers
from zsnr.interop.scheduler_config import scheduler_config
from zsnr.prediction import PredictionType
from zsnr.schedule import NoiseSchedule, RectifiedFlow, Schedule, schedule_from_settings

BETA_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
_FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_FLOW_WARPS = (
    *("invert_sigmas", "shift_terminal", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)
_SHIFTED_CLASSES = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")


def describe_schedule(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule under the keys of diffusers' schedulers, without a class name."""
    if isinstance(schedule, RectifiedFlow):
        return {"num_train_timesteps": schedule.num_timesteps, "shift": schedule.shift}
    assert isinstance(schedule, NoiseSchedule)
    config = scheduler_config(replace(schedule, snr_shift=1.0), "v_prediction")
    left_out = {"_class_name", "prediction_type", "timestep_spacing"}
    described = {key: value for key, value in config.items() if key not in left_out}
    if schedule.snr_shift != 1:
        described["snr_shift_scale"] = schedule.snr_shift
    return described


def read_schedule(
    config: Mapping[str, Any], exact: Any = None, zero_terminal_snr: bool | None = None
) -> NoiseSchedule | RectifiedFlow:
    """Read the schedule of a scheduler config.

    Args:
        config: The config of any class.
        exact: `settings()` of the schedule, which are used if the config describes the same one.
        zero_terminal_snr: Whether the schedule is rescaled. None = as the config says.

    Raises:
        ValueError: The config is not of a schedule that this package has.
    """
    betas = config.get("trained_betas")
    if isinstance(betas, np.ndarray | Tensor):
        config = {**config, "trained_betas": betas.tolist()}
    if exact is not None:
        schedule = schedule_from_settings(exact)
        same = all(config.get(k, v) == v for k, v in describe_schedule(schedule).items())
        if same and zero_terminal_snr is None:
            return schedule
    if _is_flow(config):
        warps = [key for key in _FLOW_WARPS if config.get(key)]
        if warps:
            raise ValueError(
                f"{warps[0]}={config[warps[0]]!r} of a flow scheduler is not supported: wanted a "
                "shift only."
            )
        T = config.get("num_train_timesteps", 1000)
        return RectifiedFlow(config.get("shift", 1.0), T)
    values = {**config, "timestep_spacing": "trailing"}  # not used, and maybe unknown to diffusers
    shift = values.pop("snr_shift_scale", 1.0)
    if values.get("_class_name") in _SHIFTED_CLASSES:
        values["_class_name"] = "DDIMScheduler"
    plain = schedule_from_diffusers(values)
    if isinstance(plain, RectifiedFlow):
        return plain
    if zero_terminal_snr is not None:
        plain = replace(plain, zero_terminal_snr=False)
        plain = rescaled(plain) if zero_terminal_snr else plain
    return plain if shift == 1 else replace(plain, snr_shift=shift)


def read_prediction_type(config: Mapping[str, Any]) -> PredictionType:
    """Read the prediction type; the default is diffusers'."""
    declared = config.get("prediction_type", "flow" if _is_flow(config) else "epsilon")
    return cast(PredictionType, "flow" if declared == "flow_prediction" else declared)


def _is_flow(config: Mapping[str, Any]) -> bool:
    named = config.get("_class_name") in _FLOW_CLASSES
    return named or ("shift" in config and "beta_schedule" not in config)
