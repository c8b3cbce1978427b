"""The diffusion loss and its weight lambda_t (section 3.2)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from zsnr.prediction import PredictionType, check_prediction_type
from zsnr.schedule import Schedule, per_sample
from zsnr.timestep_law import MIN_TERMINAL_SHARE

WeightingName = Literal[
    "uniform",
    "min_snr",
    "soft_min_snr",
    "snr",
    "snr_plus_one",
    "truncated_snr",
    "debiased",
    "p2",
    "learned",
]


@dataclass(frozen=True)
class LossWeighting:
    """The weight lambda_t of the squared error of the network's own output (equation 12).

    uniform is lambda_t = 1, the paper's. The others are published as a weight w_t of the squared
    error of x_0 (or of eps; a weight u_t there is w_t = u_t SNR). The error of x_0 is that of eps
    over sqrt(SNR), that of v times sigma_t / (alpha_t^2 + sigma_t^2), and that of flow times
    sigma_t / (alpha_t + sigma_t), so

    lambda_t = w_t / SNR for epsilon,  w_t for sample,  w_t / (SNR + 1) for v_prediction on a
    variance-preserving schedule,  w_t sigma_t^2 for flow on rectified flow.

    | name          | w_t                     | source                                         |
    |---------------|-------------------------|------------------------------------------------|
    | min_snr       | min(SNR, gamma)         | Hang et al., arXiv:2303.09556                  |
    | soft_min_snr  | SNR gamma / (SNR+gamma) | Crowson et al., arXiv:2401.11605               |
    | snr           | SNR                     | the plain loss on eps, Ho et al. 2006.11239    |
    | snr_plus_one  | SNR + 1                 | Salimans and Ho, arXiv:2202.00512              |
    | truncated_snr | max(SNR, 1)             | Salimans and Ho, arXiv:2202.00512              |
    | debiased      | sqrt(SNR)               | Yu et al., arXiv:2310.08442 (1/sqrt(SNR) on eps) |
    | p2            | SNR / (1 + SNR)         | Choi et al., arXiv:2204.00227 (k = 1, gamma = 1) |

    At zero terminal SNR, all but uniform, snr_plus_one, truncated_snr and learned give the last
    timestep the weight 0: the timestep that determines brightness would not be trained.

    learned has lambda_t = 1, and training multiplies it by the weight that a `LearnedWeight` learns
    from the losses (Karras et al., arXiv:2312.02696). Losses of validation, and all that are
    logged, are without it.

    Args:
        name: Weighting of the timesteps: uniform (the paper's), snr_plus_one or truncated_snr;
            learned, the inverse of each timestep's mean loss; or min_snr, soft_min_snr, snr,
            debiased or p2, which give the last timestep of a zero-SNR schedule no weight.
        gamma: The bound of min_snr and soft_min_snr, positive.
        allow_zero_terminal_weight: Accept a weighting whose last weight is 0, or a learned one
            whose last weight may become less than a tenth of the mean.
        min_terminal_share: Lower bound of learned's weight of the last timestep, relative to the
            mean weight of the others. 1 = it keeps the share that uniform gives it, 0 = no bound.
    """

    name: WeightingName = "uniform"
    gamma: float = 5.0
    allow_zero_terminal_weight: bool = False
    min_terminal_share: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in get_args(WeightingName):
            known = ", ".join(repr(name) for name in get_args(WeightingName))
            raise ValueError(f"Loss weighting {self.name!r} is unknown. Known: {known}.")
        number = isinstance(self.gamma, (int, float))
        if not (number and math.isfinite(self.gamma) and self.gamma > 0):
            raise ValueError(f"gamma={self.gamma!r}: wanted a positive number.")
        if not isinstance(self.allow_zero_terminal_weight, bool):
            raise ValueError(
                f"allow_zero_terminal_weight={self.allow_zero_terminal_weight!r}: wanted True or "
                "False."
            )
        share = self.min_terminal_share
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not (number and math.isfinite(share) and share >= 0):
            raise ValueError(f"min_terminal_share={share!r}: wanted a number, 0 or more.")
        if share != type(self).min_terminal_share and self.name != "learned":
            raise ValueError(
                f"min_terminal_share={share:g} with the loss weighting {self.name!r}: it is a "
                "setting of 'learned'. Omit it, or choose that weighting."
            )

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values; only those of learned have its bound."""
        settings = asdict(self)
        if self.name != "learned":
            del settings["min_terminal_share"]
        return settings

    def table(self, schedule: Schedule, prediction_type: PredictionType = "v_prediction") -> Tensor:
        """Compute lambda_t for every timestep.

        Returns:
            float64 on the CPU, shape (T,).

        Raises:
            ValueError: epsilon is combined with zero SNR, or the last weight is 0 or may become
                nearly 0, and this is not allowed.
        """
        check_prediction_type(prediction_type, schedule)
        snr = schedule.snr
        if self.starves_the_end(schedule) and not self.allow_zero_terminal_weight:
            raise ValueError(
                f"min_terminal_share={self.min_terminal_share:g}: the learned weight of the last "
                f"timestep, t={len(snr) - 1}, whose loss is mostly the largest, could become less "
                "than a tenth of the mean, and the model would hardly learn to start from pure "
                f"noise. Wanted at least {MIN_TERMINAL_SHARE}, or set "
                "allow_zero_terminal_weight=True."
            )
        if self.name in ("uniform", "learned"):
            return torch.ones_like(snr)
        w = self._x0_weight(snr)
        alpha, sigma = schedule(torch.arange(schedule.num_timesteps))
        match prediction_type:
            case "v_prediction":
                table = w * (sigma / (alpha**2 + sigma**2)) ** 2
            case "flow":
                table = w * (sigma / (alpha + sigma)) ** 2
            case "epsilon":
                table = w / snr
            case "sample":
                table = w
        if table[-1] == 0 and not self.allow_zero_terminal_weight:
            raise ValueError(
                f"Loss weighting {self.name!r} gives the last timestep, t={len(table) - 1}, the "
                "weight 0, so the model never learns to start from pure noise. Use 'uniform' (the "
                "paper's), 'snr_plus_one' or 'truncated_snr', or set "
                "allow_zero_terminal_weight=True."
            )
        return table

    def starves_the_end(self, schedule: Schedule) -> bool:
        """Whether learned may give the last timestep of a zero-SNR schedule hardly any weight."""
        rare = self.min_terminal_share < MIN_TERMINAL_SHARE
        return self.name == "learned" and rare and float(schedule.snr[-1]) == 0

    def _x0_weight(self, snr: Tensor) -> Tensor:
        match self.name:
            case "min_snr":
                return snr.clamp(max=self.gamma)
            case "soft_min_snr":
                return snr * self.gamma / (snr + self.gamma)
            case "snr_plus_one":
                return snr + 1
            case "truncated_snr":
                return snr.clamp(min=1)
            case "debiased":
                return snr.sqrt()
            case "p2":
                return snr / (1 + snr)
            case _:
                return snr


def diffusion_loss(
    output: Tensor,
    target: Tensor,
    lambda_t: Tensor | float = 1.0,
    *,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """Compute lambda_t ||target - output||^2, a mean over all but the batch    (equation 12).

    Args:
        output: Network output, (B, *).
        target: Its target, (B, *).
        lambda_t: Weight of each sample, (B,), or one number.
        reduction: "mean" over the batch, or "none" for one loss per sample.

    Returns:
        A scalar, or (B,); in float32, or float64 if an input is.

    Raises:
        ValueError: Shapes or the reduction are wrong.
    """
    if output.shape != target.shape:
        raise ValueError(
            f"The network's output has shape {tuple(output.shape)}, its target "
            f"{tuple(target.shape)}: wanted equal shapes."
        )
    dtype = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown. Known: 'mean', 'none'.")
    if isinstance(lambda_t, Tensor) and lambda_t.shape not in ((), output.shape[:1]):
        raise ValueError(
            f"lambda_t has shape {tuple(lambda_t.shape)}: wanted one weight per sample, "
            f"{tuple(output.shape[:1])}, such as table[t]."
        )
    error = (output.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
    losses = per_sample(lambda_t, error) * error
    return losses.mean() if reduction == "mean" else losses
