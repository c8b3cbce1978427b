"""A network of one schedule and prediction type, used on another (one network, two coordinates)."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor, nn

from zsnr.denoiser import Conditioning, Network
from zsnr.prediction import (
    PredictionType,
    check_prediction_type,
    prediction_target,
    to_eps,
    to_x0,
)
from zsnr.schedule import DeviceTables, Schedule, per_sample, timesteps_at


class ConvertedNetwork(nn.Module):
    """A network that answers on another schedule than it was trained on, exactly.

    x_t = alpha_t x_0 + sigma_t eps of one schedule is a multiple of x_t' of the other at the same
    SNR. The network is given that multiple, and the time that its own schedule has there,
    interpolated in the angle atan2(sigma, alpha), which is finite at SNR 0 and for clean data. From
    its output follow x_0 and eps, and from these the output that is wanted. So a Stable Diffusion
    network is sampled as rectified flow, and the other way round.

    Where the schedule has more noise than the network was trained on, the network is used at its
    own last level: it takes the mean of the noise for the mean of the image, as it always did.
    `missing` says so, and a warning. Where it has less noise, the network is told its own first
    time.

    Args:
        network: (x_t, time, conditioning) -> raw output, on its own schedule.
        trained_on: Schedule the network was trained on.
        trained_to: What the network predicts.
        schedule: Schedule of the x_t and time that `forward` takes.
        prediction_type: What `forward` returns.

    Attributes:
        missing: What the network has not learned of `schedule`, a sentence. None = nothing.

    Raises:
        ValueError: A prediction type has no x_0 on its schedule, or the time of a schedule does
            not increase.
    """

    def __init__(
        self,
        network: Network,
        trained_on: Schedule,
        trained_to: PredictionType,
        schedule: Schedule,
        prediction_type: PredictionType,
    ) -> None:
        super().__init__()
        check_prediction_type(trained_to, trained_on)
        check_prediction_type(prediction_type, schedule)
        self.network = network
        self.trained_on, self.trained_to = trained_on, trained_to
        self.schedule, self.prediction_type = schedule, prediction_type
        self._levels, unseen = _levels(trained_on, schedule)
        self.missing = None
        if unseen:
            last = schedule.num_timesteps - 1
            self.missing = (
                f"The network was trained down to SNR {float(trained_on.snr[-1]):.2g}: at "
                f"t={last - unseen + 1} to {last} of {schedule} it is used at that level, where it "
                "reads the mean of the image from its input, so that images from pure noise are of "
                "medium brightness. Training on the schedule teaches it the rest."
            )
            warnings.warn(self.missing, stacklevel=2)

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor:
        """Predict on `schedule`.

        Args:
            x_t: Noisy data, (B, *).
            t: What networks are told on `schedule`, (B,), see `Schedule.time`.
            conditioning: Passed to the network.

        Returns:
            The prediction, (B, *), at least float32.
        """
        steps = timesteps_at(self.schedule, t)
        time, alpha, sigma, scale, unseen = self._levels(steps)
        scales = self.schedule(steps)
        wide = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
        own_x_t = (per_sample(scale, wide) * wide).to(x_t.dtype)
        output = self.network(own_x_t, time.to(torch.float32), conditioning)
        x_0, eps = (to(output, own_x_t, alpha, sigma, self.trained_to) for to in (to_x0, to_eps))
        # beyond the last level, x_t is not made of this x_0 and this eps
        rest = to_eps(x_0, x_t, *scales, "sample")
        eps = torch.where(per_sample(unseen, eps).bool(), rest, eps)
        return prediction_target(x_0, eps, *scales, self.prediction_type)


@lru_cache(maxsize=8)
def _levels(trained_on: Schedule, schedule: Schedule) -> tuple[DeviceTables, int]:
    """Match every timestep of a schedule with a noise level of another by SNR.

    Returns:
        Tables of the time that the network is told, its alpha and sigma, the multiple of x_t that
        it is given, and whether a timestep is beyond its last level; and how many are.
    """
    own_t = torch.arange(-1, trained_on.num_timesteps)
    own_alpha, own_sigma = (scale.double() for scale in trained_on(own_t))
    own_angle, own_size = torch.atan2(own_sigma, own_alpha), torch.hypot(own_alpha, own_sigma)
    own_time = trained_on.time(own_t).double()
    for name, times in (
        ("trained_on", own_time),
        ("schedule", schedule.time(torch.arange(-1, schedule.num_timesteps)).double()),
    ):
        if not bool((times.diff() > 0).all()):
            raise ValueError(
                f"{name}: its time does not increase from t=-1 to t={len(times) - 2}: wanted a "
                "schedule that tells networks a time that increases with the noise."
            )
    alpha, sigma = (s.double() for s in schedule(torch.arange(schedule.num_timesteps)))
    angle, size = torch.atan2(sigma, alpha), torch.hypot(alpha, sigma)
    unseen = angle > own_angle[-1] + 1e-9
    angle = angle.clamp(max=float(own_angle[-1]))
    after = torch.searchsorted(own_angle, angle).clamp(1, len(own_angle) - 1)
    before = after - 1
    share = (angle - own_angle[before]) / (own_angle[after] - own_angle[before])

    def between(values: Tensor) -> Tensor:
        return torch.lerp(values[before], values[after], share)

    time, matched = between(own_time).clamp(min=float(own_time[1])), between(own_size)
    at_zero = angle >= torch.pi / 2  # where the cosine is rounded
    tables = (
        time,
        torch.where(at_zero, 0.0, matched * angle.cos()),
        matched * angle.sin(),
        matched / size,
        unseen.double(),
    )
    return DeviceTables(*(table.tolist() for table in tables)), int(unseen.sum())
