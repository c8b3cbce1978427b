"""The schedule in the config of a scheduler of diffusers, for the adapter: written and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
from torch import Tensor

from zsnr.interop.declared import as_diffusers, rescaled, schedule_from_diffusers
from zsnr.interop.processes import declare_flow, process_of
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
# What other classes do beside the schedule, and this package's samplers do not.
UNUSED_KEYS = ("clip_sample", "set_alpha_to_one", "steps_offset", "thresholding")
_FLOW_WARPS = (
    *("invert_sigmas", "shift_terminal", "stochastic_sampling"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
)


def describe_schedule(schedule: Schedule) -> dict[str, Any]:
    """Return a schedule under the keys of diffusers' schedulers, without a class name."""
    if isinstance(schedule, RectifiedFlow):
        # of which diffusers tells networks this multiple of u
        return {"num_train_timesteps": 1000, "shift": schedule.shift}
    config = scheduler_config(schedule, "v_prediction")
    left_out = {"_class_name", "prediction_type", "timestep_spacing"}
    described = {key: value for key, value in config.items() if key not in left_out}
    if isinstance(schedule, NoiseSchedule) and schedule.snr_shift != 1:
        described["snr_shift_scale"] = 1.0  # trained_betas are shifted already
    return described


def read_schedule(
    config: Mapping[str, Any], exact: Any = None, zero_terminal_snr: bool | None = None
) -> NoiseSchedule | RectifiedFlow:
    """Read the schedule of a scheduler config.

    Args:
        config: The config of any class. A shift that depends on the size counts as the config's.
        exact: `settings()` of the schedule, which are used if the config describes the same one.
        zero_terminal_snr: Whether the schedule is rescaled. None = as the config says.

    Raises:
        ValueError: The config is not of a schedule that this package has.
    """
    betas = config.get("trained_betas")
    if isinstance(betas, np.ndarray | Tensor):
        config = {**config, "trained_betas": betas.tolist()}
    if exact is not None:
        described = schedule_from_settings(exact)
        written = describe_schedule(described).items()
        same = all(config.get(k, v) == v for k, v in written if k not in UNUSED_KEYS)
        if same and zero_terminal_snr is None:
            return described
    config = _with_class(config)
    if process_of(config) == "flow":
        warps = [key for key in _FLOW_WARPS if config.get(key)]
        if warps:
            raise ValueError(
                f"{warps[0]}={config[warps[0]]!r} of a flow scheduler is not supported: wanted a "
                "shift only."
            )
        return declare_flow({**config, "use_dynamic_shifting": False}).process()[0]
    # The spacing is not used, and diffusers may not know it.
    schedule = schedule_from_diffusers({**config, "timestep_spacing": "trailing"})
    if zero_terminal_snr is None or not isinstance(schedule, NoiseSchedule):
        return schedule
    plain = replace(schedule, zero_terminal_snr=False)
    return rescaled(plain) if zero_terminal_snr else plain


def read_prediction_type(config: Mapping[str, Any]) -> PredictionType:
    """Read the prediction type; the default is diffusers'."""
    flow = process_of(_with_class(config)) == "flow"
    declared = config.get("prediction_type", "flow" if flow else "epsilon")
    return cast(PredictionType, "flow" if declared == "flow_prediction" else declared)


def _with_class(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the class of a config in memory, which names it only if it was loaded from a file."""
    if "_class_name" in config:
        return as_diffusers(config)
    if config.get("use_flow_sigmas"):
        return {**config, "_class_name": "UniPCMultistepScheduler"}
    if config.get("timestep_type") == "continuous":
        return {**config, "_class_name": "EulerDiscreteScheduler"}
    others = config.keys() & {"sigma_max", "sigma_data", "scaler", "trained_betas"}
    if others and "beta_schedule" not in config and "shift" not in config:
        raise ValueError(
            f"The config has {sorted(others)[0]} and no beta_schedule: it is not of a schedule of "
            "betas or of rectified flow. Give the schedule and the prediction type yourself: "
            "schedule=..., prediction_type=..."
        )
    if "shift" in config and "beta_schedule" not in config:
        return {**config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    shifted = "snr_shift_scale" in config
    return {**config, "_class_name": "CogVideoXDDIMScheduler" if shifted else "DDIMScheduler"}
