"""What a run started from, and how far it has come from there.

A run from Stable Diffusion's weights changes what the network predicts and on which schedule. Its
errors are then measured against those of the model it started from, converted: at first they are
many times as large, and training brings them down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zsnr.checkpoints import schedule_from_diffusers
from zsnr.checkpoints.single_file import read_marks
from zsnr.denoiser import Conditioning, Network
from zsnr.ldm_file import is_single_file
from zsnr.prediction import PredictionType, to_eps, to_v, to_x0
from zsnr.schedule import NoiseSchedule
from zsnr.untrusted import read_json

_CONVERT = {"v_prediction": to_v, "sample": to_x0, "epsilon": to_eps}


@dataclass(frozen=True)
class Start:
    """What the weights were trained for before this run.

    Args:
        source: Where they came from.
        schedule: Their schedule.
        prediction_type: What the network predicted.
    """

    source: str
    schedule: NoiseSchedule
    prediction_type: PredictionType

    def facts(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "unet": self.source,
            "schedule": self.schedule.settings(),
            "prediction_type": self.prediction_type,
        }

    def output(
        self,
        network: Network,
        x_t: Tensor,
        t: Tensor,
        conditioning: Conditioning | None,
        schedule: NoiseSchedule,
        prediction_type: PredictionType,
    ) -> Tensor:
        """Ask the unchanged network at noise of another schedule, and convert what it says.

        It is told the timestep at which its own schedule has the nearest log SNR.

        Args:
            network: With the weights of the start.
            x_t: Noisy data on `schedule`, (B, *).
            t: Timesteps of `schedule`, (B,).
            conditioning: As the network takes it.
            schedule: The run's.
            prediction_type: The run's: what to convert to.

        Returns:
            (B, *), float32; not finite where there is no such conversion, as from epsilon at zero
            SNR.
        """
        table = self.schedule.log_snr.to(x_t.device)
        wanted = schedule.log_snr.to(x_t.device)[t]
        own_t = (table[None] - wanted[:, None]).abs().argmin(dim=1)
        own_t = torch.where(wanted.isneginf(), len(table) - 1, own_t)
        output = network(x_t, own_t, conditioning)
        convert = _CONVERT[prediction_type]
        return convert(output.float(), x_t, *schedule(t), self.prediction_type)


def read_start(source: str) -> Start | None:
    """Read what a pretrained model was trained for; None where nothing says so.

    A scheduler that this package has no schedule for, such as flow matching, is warned of.

    Raises:
        ValueError: Its scheduler's config cannot be read.
    """
    if is_single_file(source):
        return Start(source, *read_marks(source))
    config = _scheduler_config(source)
    if config is None:
        return None
    try:
        schedule = schedule_from_diffusers(config)
    except ValueError as error:
        rank_zero_warn(f"How far the run is from {source} is not logged: {error}")
        return None
    prediction_type = cast(PredictionType, config.get("prediction_type", "epsilon"))
    return Start(source, schedule, prediction_type)


def _scheduler_config(source: str) -> Mapping[str, Any] | None:
    if Path(source).is_dir():
        path = Path(source, "scheduler", "scheduler_config.json")
        return read_json(path) if path.is_file() else None
    from diffusers import DDIMScheduler

    try:
        config: Mapping[str, Any] = DDIMScheduler.load_config(source, subfolder="scheduler")
    except (OSError, ValueError):  # a UNet alone
        return None
    return config
