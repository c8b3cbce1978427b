"""Conversion of a schedule to diffusers' scheduler_config.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from zsnr.interop.processes import TOLD_TIMES
from zsnr.prediction import PredictionType, check_prediction_type
from zsnr.schedule import NoiseSchedule, RectifiedFlow, Schedule, beta_ends

_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_ULP = 2.0**-24  # the smallest step of 1 - beta in float32


def scheduler_config(schedule: Schedule, prediction_type: PredictionType) -> dict[str, Any]:
    """Return a schedule as the config of a scheduler of diffusers.

    A RectifiedFlow is written for FlowMatchEulerDiscreteScheduler, and a NoiseSchedule for
    DDIMScheduler with trailing timesteps: linear and scaled_linear as their ends and the rescale
    flag, capped cosine by its name. Schedules without such a form, uncapped cosine, custom tables
    and those with an `snr_shift`, are written as `trained_betas`; the last beta of a zero-SNR table
    is 1, and the flag is false because the table is already rescaled.

    Raises:
        ValueError: diffusers has no such schedule, or no such prediction type on it; or epsilon
            prediction is combined with zero terminal SNR.
    """
    if isinstance(schedule, RectifiedFlow):
        return _flow_config(schedule, prediction_type)
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            f"The schedule is a {type(schedule).__name__}, which diffusers does not have: train "
            "with a NoiseSchedule or a RectifiedFlow to export."
        )
    if prediction_type == "flow":
        raise ValueError(
            "prediction_type='flow' on a NoiseSchedule, which no scheduler of diffusers converts: "
            "train with 'v_prediction', or on a RectifiedFlow, to export."
        )
    check_prediction_type(prediction_type, schedule)
    zero = schedule.zero_terminal_snr
    table = needs_table(schedule)
    ends = () if table or schedule.betas == "cosine" else beta_ends(schedule)
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_timesteps,
        **dict(zip(("beta_start", "beta_end"), ends, strict=False)),
        "beta_schedule": "linear" if table else _KINDS[schedule.betas],
        "trained_betas": _float32_betas(schedule.alphas_cumprod.tolist()) if table else None,
        "rescale_betas_zero_snr": zero and not table,
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
    }


def _flow_config(schedule: RectifiedFlow, prediction_type: PredictionType) -> dict[str, Any]:
    if prediction_type != "flow":
        raise ValueError(
            f"prediction_type={prediction_type!r} on a RectifiedFlow, which no scheduler of "
            "diffusers converts: train with 'flow' to export."
        )
    if schedule.num_timesteps != TOLD_TIMES:
        raise ValueError(
            f"RectifiedFlow(num_timesteps={schedule.num_timesteps}): diffusers would tell the "
            f"network {schedule.num_timesteps} u, and it was trained with {TOLD_TIMES} u. Train "
            f"with num_timesteps: {TOLD_TIMES} to export."
        )
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": schedule.num_timesteps,
        "shift": schedule.shift,
        "use_dynamic_shifting": False,
    }


def schedule_text(schedule: NoiseSchedule | RectifiedFlow) -> str:
    """Describe a schedule in words."""
    T = f"T = {schedule.num_timesteps}"
    if isinstance(schedule, RectifiedFlow):
        return f"rectified flow, shift {schedule.shift:g}, {T}"
    zero, shift = schedule.zero_terminal_snr, schedule.snr_shift
    divided = "" if shift == 1 else f", SNR divided by {shift:g}"
    if schedule.betas == "cosine" and schedule.alphas_cumprod_table is None:
        cap = "without its cap of 0.999" if zero else "capped at 0.999"
        return f"cosine, {T}, {cap}{divided}"
    text = f"custom table, {T}"
    if schedule.alphas_cumprod_table is None:
        first, last = beta_ends(schedule)
        text = f"{schedule.betas}, {T}, beta {first:g} to {last:g}"
    return text + divided + (", rescaled to zero terminal SNR" if zero else "")


def needs_table(schedule: NoiseSchedule) -> bool:
    """Whether diffusers has no name for a schedule, so that it is written as `trained_betas`."""
    custom = schedule.alphas_cumprod_table is not None or schedule.snr_shift != 1
    return custom or (schedule.betas == "cosine" and schedule.zero_terminal_snr)


def _float32_betas(alphas_cumprod: list[float]) -> list[float]:
    """Choose float32 betas whose running product stays closest to abar_t.

    Each beta compensates for the rounding of the previous ones; if they were rounded independently,
    a thousand errors would accumulate.
    """
    betas, product = [], 1.0
    for abar in alphas_cumprod:
        if abar == 0:
            betas.append(1.0)
            break
        beta = np.float32(min(max(1 - abar / product, _ULP), 1 - _ULP))
        betas.append(float(beta))
        product *= float(np.float32(1) - beta)
    return betas
