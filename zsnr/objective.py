"""The training objective: clean data to the loss of each sample (equations 4 and 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from zsnr.denoiser import Conditioning, Network
from zsnr.draws import Draws, training_draws
from zsnr.learned_weight import LearnedWeight
from zsnr.loss import LossWeighting, diffusion_loss
from zsnr.noise import offset_noise
from zsnr.prediction import PredictionType, prediction_target
from zsnr.schedule import DeviceTables, NoiseSchedule, Schedule, noised
from zsnr.timestep_law import TimestepLaw


@dataclass(frozen=True)
class Objective:
    """The loss of a diffusion network, for any training loop.

    x_t = alpha_t x_0 + sigma_t eps,  loss = lambda_t ||network(x_t, time(t)) - target||^2

    with the target of the prediction type, such as v = alpha_t eps - sigma_t x_0.

    Args:
        schedule: The noise schedule.
        prediction_type: What the network predicts.
        loss: The weight lambda_t. A learned one is `learned_weight`, beside the losses.
        timestep_law: How often `draws` visits each timestep.
        offset_noise: Strength of offset noise (section 5.4), for comparison; 0 = none.

    Raises:
        ValueError: epsilon at zero SNR, or a weighting or a law that starves the last timestep.
    """

    schedule: Schedule = NoiseSchedule()
    prediction_type: PredictionType = "v_prediction"
    loss: LossWeighting = LossWeighting()
    timestep_law: TimestepLaw = TimestepLaw()
    offset_noise: float = 0.0

    _weights: DeviceTables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.timestep_law.check(self.schedule.num_timesteps)
        table = self.loss.table(self.schedule, self.prediction_type)
        object.__setattr__(self, "_weights", DeviceTables(table.tolist()))

    def __call__(
        self, network: Network, x_0: Tensor, conditioning: Conditioning | None, draws: Draws
    ) -> Tensor:
        """Compute the loss of each sample; no host sync.

        Args:
            network: (x_t (B, *), time (B,), conditioning) -> (B, *), the raw prediction; time is
                `schedule.time(t)`.
            x_0: Clean data, (B, *).
            conditioning: B rows, passed to the network as they are. None = none.
            draws: The batch's timesteps and noise, from `training_draws`.

        Returns:
            lambda_t times the mean squared error of each sample, (B,), at least float32.

        Raises:
            ValueError: Shapes do not fit each other.
        """
        x_t, target, t = self.noised(x_0, draws)
        return self.losses(network(x_t, self.schedule.time(t), conditioning), target, t)

    def learned_weight(self) -> LearnedWeight | None:
        """Return a weight of the losses to be learned in training; None unless `loss` is learned.

        A training loop keeps it, multiplies the losses by it, and lets it learn from them:

            weight = objective.learned_weight()
            losses, t = objective(network, x_0, conditioning, draws), draws.t.to(x_0.device)
            (weight(t) * losses).mean().backward()
            weight.update(losses, t)
        """
        if self.loss.name != "learned":
            return None
        return LearnedWeight(self.schedule, self.timestep_law, self.loss.min_terminal_share)

    def draws(
        self,
        seed: int,
        positions: Sequence[int],
        global_batch_size: int,
        shape: Sequence[int],
        caption_dropout: float = 0.0,
    ) -> Draws:
        """Draw timesteps and noise of a batch, see `training_draws`."""
        T = self.schedule.num_timesteps
        return training_draws(
            seed, positions, global_batch_size, shape, T, caption_dropout, self.timestep_law
        )

    def noised(self, x_0: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Noise a batch of clean data (B, *).

        Returns:
            x_t (B, *), the target of the network (B, *), and t (B,), on x_0's device.
        """
        t, eps = (part.to(x_0.device, non_blocking=True) for part in (draws.t, draws.eps))
        if self.offset_noise:
            shift = draws.d.to(x_0.device, non_blocking=True)
            eps = offset_noise(eps, shift, self.offset_noise)
        scales = self.schedule(t)
        x_t = noised(x_0, eps, *scales)
        return x_t, prediction_target(x_0, eps, *scales, self.prediction_type), t

    def losses(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Compute lambda_t ||output - target||^2 for each sample, (B,).

        Args:
            output: The network's, (B, *).
            target: As `noised` gives it, (B, *).
            t: Timesteps, (B,).
        """
        return diffusion_loss(output, target, self.weights(t), reduction="none")

    def weights(self, t: Tensor) -> Tensor:
        """Return lambda_t of timesteps, (B,), on their device, (B,)."""
        [weights] = self._weights(t)
        return weights
