"""What the network predicts, and the maps between x_0, eps and v (sections 3.2 and 6).

Every function takes data of equal shapes (B, *), and scales alpha_t, sigma_t that are floats, (B,)
tensors or tensors with as many axes as the data. The result has the common dtype of the data, at
least float32.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from zsnr.schedule import NoiseSchedule, aligned

PredictionType = Literal["epsilon", "sample", "v_prediction"]
Scale = Tensor | float


def to_x0(
    output: Tensor, x_t: Tensor, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType
) -> Tensor:
    """Convert a network output to x_0.

    v_prediction:  x_0 = alpha_t x_t - sigma_t v            (equation 19)
    epsilon:       x_0 = (x_t - sigma_t eps) / alpha_t      (equation 4; undefined at alpha_t = 0)

    Args:
        output: Network output, (B, *).
        x_t: Noisy data, (B, *).
        alpha_t: sqrt(abar_t).
        sigma_t: sqrt(1 - abar_t).
        prediction_type: What `output` is.

    Raises:
        ValueError: Unknown prediction type, or shapes that do not fit.
    """
    alpha_t, sigma_t, x_t, output = aligned(alpha_t, sigma_t, x_t, output)
    match prediction_type:
        case "v_prediction":
            return alpha_t * x_t - sigma_t * output
        case "sample":
            return output
        case "epsilon":
            return (x_t - sigma_t * output) / alpha_t
        case _:
            raise _unknown(prediction_type)


def to_eps(
    output: Tensor, x_t: Tensor, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType
) -> Tensor:
    """Convert a network output to eps.

    v_prediction:  eps = sigma_t x_t + alpha_t v            (equation 17)
    sample:        eps = (x_t - alpha_t x_0) / sigma_t      (equation 4)

    Arguments and errors as `to_x0`.
    """
    alpha_t, sigma_t, x_t, output = aligned(alpha_t, sigma_t, x_t, output)
    match prediction_type:
        case "v_prediction":
            return sigma_t * x_t + alpha_t * output
        case "sample":
            return (x_t - alpha_t * output) / sigma_t
        case "epsilon":
            return output
        case _:
            raise _unknown(prediction_type)


def to_v(
    output: Tensor, x_t: Tensor, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType
) -> Tensor:
    """Convert a network output to v = alpha_t eps - sigma_t x_0.

    sample:        v = (alpha_t x_t - x_0) / sigma_t        (equations 4 and 11)
    epsilon:       v = (eps - sigma_t x_t) / alpha_t        (undefined at alpha_t = 0)

    Arguments and errors as `to_x0`.
    """
    alpha_t, sigma_t, x_t, output = aligned(alpha_t, sigma_t, x_t, output)
    match prediction_type:
        case "v_prediction":
            return output
        case "sample":
            return (alpha_t * x_t - output) / sigma_t
        case "epsilon":
            return (output - sigma_t * x_t) / alpha_t
        case _:
            raise _unknown(prediction_type)


def prediction_target(
    x_0: Tensor, eps: Tensor, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType
) -> Tensor:
    """Return what the network is trained to output.

    v_prediction:  v = alpha_t eps - sigma_t x_0            (equation 11)

    Args:
        x_0: Clean data, (B, *).
        eps: The noise that was added, (B, *).
        alpha_t: sqrt(abar_t).
        sigma_t: sqrt(1 - abar_t).
        prediction_type: What the network predicts.

    Raises:
        ValueError: Unknown prediction type, or shapes that do not fit.
    """
    alpha_t, sigma_t, x_0, eps = aligned(alpha_t, sigma_t, x_0, eps)
    match prediction_type:
        case "v_prediction":
            return alpha_t * eps - sigma_t * x_0
        case "sample":
            return x_0
        case "epsilon":
            return eps
        case _:
            raise _unknown(prediction_type)


def check_prediction_type(prediction_type: PredictionType, schedule: NoiseSchedule) -> None:
    """Refuse a prediction type that has no x_0 on a schedule.

    Raises:
        ValueError: The prediction type is unknown, or is epsilon on a schedule whose SNR reaches 0
            (section 3.2).
    """
    if prediction_type not in get_args(PredictionType):
        raise _unknown(prediction_type)
    last = schedule.num_timesteps - 1
    if prediction_type == "epsilon" and schedule(last)[0] == 0:
        raise ValueError(
            f"prediction_type='epsilon' has no x_0 at t={last}, where the schedule's SNR is 0. "
            "Use 'v_prediction' or 'sample', or NoiseSchedule(zero_terminal_snr=False)."
        )


def _unknown(prediction_type: object) -> ValueError:
    known = ", ".join(repr(name) for name in get_args(PredictionType))
    return ValueError(f"prediction_type={prediction_type!r} is unknown. Known: {known}.")
