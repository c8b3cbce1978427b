"""The diffusion loss and its weight lambda_t (section 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from zsnr.prediction import PredictionType, check_prediction_type
from zsnr.schedule import Schedule, per_sample

WeightingName = Literal[
    "uniform", "min_snr", "soft_min_snr", "snr", "snr_plus_one", "truncated_snr", "debiased", "p2"
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

    At zero terminal SNR, all but uniform, snr_plus_one and truncated_snr give the last timestep the
    weight 0: the timestep that determines brightness would not be trained.

    Args:
        name: Weighting of the timesteps: uniform (the paper's), snr_plus_one or truncated_snr; or
            min_snr, soft_min_snr, snr, debiased or p2, which give the last timestep of a zero-SNR
            schedule no weight.
        gamma: The bound of min_snr and soft_min_snr, positive.
        allow_zero_terminal_weight: Accept a weighting whose last weight is 0.
    """

    name: WeightingName = "uniform"
    gamma: float = 5.0
    allow_zero_terminal_weight: bool = False

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

    def table(self, schedule: Schedule, prediction_type: PredictionType = "v_prediction") -> Tensor:
        """Compute lambda_t for every timestep.

        Returns:
            float64 on the CPU, shape (T,).

        Raises:
            ValueError: epsilon is combined with zero SNR, or the last weight is 0 and this is not
                allowed.
        """
        check_prediction_type(prediction_type, schedule)
        snr = schedule.snr
        if self.name == "uniform":
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
