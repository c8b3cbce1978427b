"""The pretrained model that a run starts from, and how far the run has adapted it.

A run from Stable Diffusion's weights changes the prediction type and the schedule of the network.
Its errors are then measured against those of the pretrained model, converted: at first they are
many times as large, and training reduces them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zsnr.denoiser import Conditioning, Network
from zsnr.interop import process_from_diffusers
from zsnr.interop.declarations import read_declaration, settle
from zsnr.interop.declared import with_class_of
from zsnr.prediction import PredictionType, converted
from zsnr.schedule import Schedule, per_sample
from zsnr.untrusted import read_json
from zsnr.weights.source import find_file, is_single_file


@dataclass(frozen=True)
class Start:
    """The prediction type and schedule of the pretrained weights.

    Args:
        source: Folder, file or hub id of the pretrained model.
        schedule: Noise schedule of the pretrained model.
        prediction_type: Quantity that the pretrained model predicts.
    """

    source: str
    schedule: Schedule
    prediction_type: PredictionType

    def facts(self) -> dict[str, Any]:
        """Return these settings as plain values."""
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
        schedule: Schedule,
        prediction_type: PredictionType,
    ) -> Tensor:
        """Convert the prediction of the pretrained network to the schedule and type of the run.

        The network is given the timestep at which its own schedule has the nearest log SNR.

        Args:
            network: Network with the pretrained weights.
            x_t: Noisy data on `schedule`, (B, *).
            t: Timesteps of `schedule`, (B,).
            conditioning: Conditioning of the network.
            schedule: Noise schedule of the run.
            prediction_type: Prediction type of the run.

        Returns:
            (B, *), float32; not finite where there is no conversion, such as from epsilon at zero
            SNR.
        """
        table = self.schedule.log_snr.to(x_t.device)
        log_snr = schedule.log_snr.to(x_t.device)[t]
        nearest = (table[None] - log_snr[:, None]).abs().argmin(dim=1)
        nearest = torch.where(log_snr.isneginf(), len(table) - 1, nearest)
        scales = schedule(t)
        # the same x_0 and eps in the scales of the pretrained model
        ratio = per_sample(torch.hypot(*self.schedule(nearest)) / torch.hypot(*scales), x_t)
        output = network(ratio * x_t, self.schedule.time(nearest), conditioning).float()
        if self.prediction_type == "v_prediction":  # the others do not depend on the scales
            output = output / ratio
        return converted(output, x_t, *scales, self.prediction_type, prediction_type)


def read_start(source: str) -> Start | None:
    """Read the prediction type and schedule of a pretrained model; None if they are unknown.

    A scheduler that this package has no schedule for, such as EDM's, causes a warning.

    Raises:
        ValueError: The config of the scheduler cannot be read.
    """
    if is_single_file(source):
        return Start(source, *settle(source, read_declaration(source)[1]))
    config = _scheduler_config(source)
    if config is None:
        return None
    try:
        return Start(source, *process_from_diffusers(config))
    except ValueError as error:
        rank_zero_warn(f"The adaptation from {source} is not logged: {error}")
        return None


def _scheduler_config(source: str) -> Mapping[str, Any] | None:
    path = find_file(source, "scheduler", "scheduler_config.json")
    index = find_file(source, None, "model_index.json")
    if path is None:
        return None
    return with_class_of({} if index is None else read_json(index), read_json(path))
