"""A schedule as the scheduler_config.json that diffusers samples it by."""

from __future__ import annotations

from typing import Any

import numpy as np

from zsnr.prediction import PredictionType, check_prediction_type
from zsnr.schedule import NoiseSchedule, beta_ends

_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_ULP = 2.0**-24  # the finest step of 1 - beta in float32


def scheduler_config(schedule: NoiseSchedule, prediction_type: PredictionType) -> dict[str, Any]:
    """Say a schedule in the words of diffusers' DDIMScheduler, with trailing timesteps.

    linear and scaled_linear go out as their ends and the rescale flag, capped cosine by its name.
    What those cannot say, uncapped cosine and own tables, goes out as `trained_betas`; the last of
    a zero-SNR table is 1 and the flag is false, since there is nothing left to rescale.

    Raises:
        ValueError: epsilon prediction with zero terminal SNR.
    """
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


def needs_table(schedule: NoiseSchedule) -> bool:
    """Whether diffusers has no name and flag for it, so that it goes out as `trained_betas`."""
    own = schedule.alphas_cumprod_table is not None
    return own or (schedule.betas == "cosine" and schedule.zero_terminal_snr)


def _float32_betas(alphas_cumprod: list[float]) -> list[float]:
    """Choose float32 betas whose running product stays closest to abar_t.

    Each beta makes up for the rounding of those before it; rounded one by one, a thousand errors
    would add up.
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
