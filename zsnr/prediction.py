"""What the network predicts, and the maps between x_0, eps, v and flow (sections 3.2 and 6).

Every function takes data of equal shapes (B, *), and scales alpha_t, sigma_t that are floats, (B,)
tensors or tensors with as many axes as the data. The result has the common dtype of the data, at
least float32. The maps hold for any scales, with n = alpha_t^2 + sigma_t^2, which is 1 on a
variance-preserving schedule.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from zsnr.schedule import Schedule, aligned, per_sample

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]
Scale = Tensor | float


def to_x0(
    output: Tensor, x_t: Tensor, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType
) -> Tensor:
    """Convert a network output to x_0.

    v_prediction:  x_0 = (alpha_t x_t - sigma_t v) / n                (equation 19, where n = 1)
    epsilon:       x_0 = (x_t - sigma_t eps) / alpha_t                (equation 4; undefined at 0)
    flow:          x_0 = (x_t - sigma_t flow) / (alpha_t + sigma_t)

    Args:
        output: Network output, (B, *).
        x_t: Noisy data, (B, *).
        alpha_t: Scale of x_0 in x_t.
        sigma_t: Scale of eps in x_t.
        prediction_type: What `output` is.

    Raises:
        ValueError: Unknown prediction type, or shapes that do not fit.
    """
    return converted(output, x_t, alpha_t, sigma_t, prediction_type, "sample")


def to_eps(
    output: Tensor, x_t: Tensor, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType
) -> Tensor:
    """Convert a network output to eps.

    v_prediction:  eps = (sigma_t x_t + alpha_t v) / n                (equation 17, where n = 1)
    sample:        eps = (x_t - alpha_t x_0) / sigma_t                (equation 4)
    flow:          eps = (x_t + alpha_t flow) / (alpha_t + sigma_t)

    Arguments and errors as `to_x0`.
    """
    return converted(output, x_t, alpha_t, sigma_t, prediction_type, "epsilon")


def to_v(
    output: Tensor, x_t: Tensor, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType
) -> Tensor:
    """Convert a network output to v = alpha_t eps - sigma_t x_0.

    sample:        v = (alpha_t x_t - n x_0) / sigma_t                (equations 4 and 11)
    epsilon:       v = (n eps - sigma_t x_t) / alpha_t                (undefined at alpha_t = 0)
    flow:          v = ((alpha_t - sigma_t) x_t + n flow) / (alpha_t + sigma_t)

    Arguments and errors as `to_x0`.
    """
    return converted(output, x_t, alpha_t, sigma_t, prediction_type, "v_prediction")


def to_flow(
    output: Tensor, x_t: Tensor, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType
) -> Tensor:
    """Convert a network output to flow = eps - x_0.

    v_prediction:  flow = ((sigma_t - alpha_t) x_t + (alpha_t + sigma_t) v) / n
    sample:        flow = (x_t - (alpha_t + sigma_t) x_0) / sigma_t
    epsilon:       flow = ((alpha_t + sigma_t) eps - x_t) / alpha_t   (undefined at alpha_t = 0)

    Arguments and errors as `to_x0`.
    """
    return converted(output, x_t, alpha_t, sigma_t, prediction_type, "flow")


def converted(
    output: Tensor,
    x_t: Tensor,
    alpha_t: Scale,
    sigma_t: Scale,
    prediction_type: PredictionType,
    to: PredictionType,
) -> Tensor:
    """Convert a network output to another prediction type.

    Every type is a combination p x_0 + q eps, as x_t is. With D = alpha_t q - sigma_t p,

    p' x_0 + q' eps = ((p' q - q' p) x_t + (q' alpha_t - p' sigma_t) output) / D

    Arguments and errors as `to_x0`; `to` is what is wanted.
    """
    p, q = _parts(prediction_type, alpha_t, sigma_t)
    wanted_p, wanted_q = _parts(to, alpha_t, sigma_t)
    if prediction_type == to:
        return aligned(alpha_t, sigma_t, x_t, output)[3]
    a, b = wanted_p * q - wanted_q * p, wanted_q * alpha_t - wanted_p * sigma_t
    D = alpha_t * q - sigma_t * p
    never_zero = prediction_type in ("v_prediction", "flow")
    if never_zero:
        a, b = a / D, b / D
    a, b, x_t, output = aligned(a, b, x_t, output)
    combined = a * x_t + b * output
    return combined if never_zero else combined / per_sample(D, combined)


def prediction_target(
    x_0: Tensor, eps: Tensor, alpha_t: Scale, sigma_t: Scale, prediction_type: PredictionType
) -> Tensor:
    """Return what the network is trained to output.

    v_prediction:  v = alpha_t eps - sigma_t x_0            (equation 11)
    flow:          eps - x_0

    Args:
        x_0: Clean data, (B, *).
        eps: The noise that was added, (B, *).
        alpha_t: Scale of x_0 in x_t.
        sigma_t: Scale of eps in x_t.
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
        case "flow":
            return eps - x_0
        case _:
            raise _unknown(prediction_type)


def check_prediction_type(prediction_type: PredictionType, schedule: Schedule) -> None:
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
            "Use 'v_prediction', 'flow' or 'sample', or a NoiseSchedule with "
            "zero_terminal_snr=False."
        )


def _parts(prediction_type: PredictionType, alpha_t: Scale, sigma_t: Scale) -> tuple[Scale, Scale]:
    """Return (p, q) of a prediction type p x_0 + q eps."""
    match prediction_type:
        case "v_prediction":
            return -sigma_t, alpha_t
        case "sample":
            return 1.0, 0.0
        case "epsilon":
            return 0.0, 1.0
        case "flow":
            return -1.0, 1.0
        case _:
            raise _unknown(prediction_type)


def _unknown(prediction_type: object) -> ValueError:
    known = ", ".join(repr(name) for name in get_args(PredictionType))
    return ValueError(f"prediction_type={prediction_type!r} is unknown. Known: {known}.")
