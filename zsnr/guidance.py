"""Guidance of a network's predictions: its scale, noise levels and method.

Unless stated otherwise it acts on the raw network output, before the conversion to x_0 (section
3.4).
x_0 is affine in the raw output, so the same w guides x_0 too; only the rescale, which compares
standard deviations, depends on what it acts on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from zsnr.guidance_methods import (
    adaptive_projected_guidance,
    classifier_free_guidance,
    rescale_guidance,
    zero_star_guidance,
)
from zsnr.schedule import per_sample

GuidanceMethod = Literal["cfg", "apg", "cfg_zero_star", "cfg_pp"]
GuidanceSource = Literal["negative", "raw"]
Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with rescale; the defaults are the paper's.

    Args:
        scale: w, the guidance scale. 1 = no guidance. With "cfg_pp": lambda in [0, 1].
        rescale: phi in [0, 1], the guidance rescale. 0 = plain guidance. It acts on the same
            quantity as the method: x_0 with "apg", otherwise the raw output.
        interval: Noise levels sigma_t / alpha_t that are guided, above the first number, up to the
            second (which may be infinite, as is the level of SNR 0). Elsewhere only the conditional
            output is used, at half the cost (Kynkaanniemi et al., arXiv:2404.07724). None = all
            noise levels.
        method: Guidance method. "cfg": equation 13. "apg": on x_0, mostly orthogonal to it, see
            `adaptive_projected_guidance`. "cfg_zero_star": from a multiple of the unconditional
            output, see `zero_star_guidance`. "cfg_pp": CFG++, see `scale_at`; it requires a
            deterministic sampler with one call per step (ddim, euler), and rescale 0.
        curve: Knots (log SNR, w), ascending in log SNR = 2 log(alpha / sigma); linear between
            them, constant beyond, so that SNR 0 has the first w. None = `scale` everywhere.
        at_zero_snr: Guide at the timestep of SNR 0, if the schedule has one.
        threshold: Percentile of the dynamic threshold of x_0 in (0, 1], for pixel-space models; it
            acts at all timesteps, guided or not. None = no threshold.
        apg_parallel: eta, with "apg": the weight of the difference's part along x_0.
        apg_norm: r, with "apg": the largest norm of the difference of a sample. None = no bound.
        against: Prediction to guide away from: "negative" = that of the negative or null prompt,
            "raw" = that of a checkpoint's raw weights with the same prompt, while the averaged
            weights are guided (autoguidance, Karras et al., arXiv:2406.02507).

    Raises:
        ValueError: A setting is out of range, or incompatible with the method.
    """

    scale: float = 7.5
    rescale: float = 0.7
    interval: tuple[float, float] | None = None
    method: GuidanceMethod = "cfg"
    curve: tuple[tuple[float, float], ...] | None = None
    at_zero_snr: bool = True
    threshold: float | None = None
    apg_parallel: float = 0.0
    apg_norm: float | None = None
    against: GuidanceSource = "negative"

    def __post_init__(self) -> None:
        numbers = (int, float)
        if not isinstance(self.scale, numbers) or not math.isfinite(self.scale):
            raise ValueError(f"Guidance scale {self.scale!r}: wanted a finite number.")
        if not isinstance(self.rescale, numbers) or not 0 <= self.rescale <= 1:
            raise ValueError(f"Guidance rescale {self.rescale!r}: wanted a number in [0, 1].")
        if self.interval is not None:
            object.__setattr__(self, "interval", _interval(self.interval))
        if self.curve is not None:
            object.__setattr__(self, "curve", _curve(self.curve))
        _check_name("method", self.method, get_args(GuidanceMethod))
        _check_name("against", self.against, get_args(GuidanceSource))
        if not isinstance(self.at_zero_snr, bool):
            raise ValueError(f"Guidance at_zero_snr {self.at_zero_snr!r}: wanted True or False.")
        if self.threshold is not None and not (
            _is_number(self.threshold) and 0 < self.threshold <= 1
        ):
            raise ValueError(
                f"Guidance threshold {self.threshold!r}: wanted a percentile in (0, 1], such as "
                "0.995, or None."
            )
        self._check_apg()
        if self.method == "cfg_pp":
            self._check_cfg_pp()

    def _check_apg(self) -> None:
        if not _is_number(self.apg_parallel):
            raise ValueError(f"Guidance apg_parallel {self.apg_parallel!r}: wanted a number.")
        if self.apg_norm is not None and not (_is_number(self.apg_norm) and self.apg_norm > 0):
            raise ValueError(
                f"Guidance apg_norm {self.apg_norm!r}: wanted a positive number, or None."
            )
        for name, default in (("apg_parallel", 0.0), ("apg_norm", None)):
            if self.method != "apg" and getattr(self, name) != default:
                raise ValueError(
                    f"Guidance {name} {getattr(self, name)!r} with method {self.method!r}: it is "
                    "a setting of method 'apg'. Omit it."
                )

    def _check_cfg_pp(self) -> None:
        wrong = [w for w in self.scales if not 0 <= w <= 1]
        if wrong:
            raise ValueError(
                f"Guidance scale {wrong[0]!r} with method 'cfg_pp': wanted a number in [0, 1], "
                "such as 0.6. CFG++ interpolates between both predictions."
            )
        for name, required in (("rescale", 0), ("threshold", None)):
            if getattr(self, name) != required:
                raise ValueError(
                    f"Guidance {name} {getattr(self, name)!r} with method 'cfg_pp': its x_0 "
                    f"includes unconditional noise and has no fixed range. Set {name} to "
                    f"{required}."
                )

    @property
    def guides(self) -> bool:
        """Whether any step may need both outputs, which is not the case if w is 1 everywhere."""
        return self.method == "cfg_pp" or any(w != 1 for w in self.scales)

    @property
    def scales(self) -> tuple[float, ...]:
        """The scale, or those of the curve's knots."""
        return (self.scale,) if self.curve is None else tuple(w for _, w in self.curve)

    @overload
    def acts(self, alpha_t: float, sigma_t: float) -> bool: ...

    @overload
    def acts(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor | bool: ...

    def acts(self, alpha_t: float | Tensor, sigma_t: float | Tensor) -> bool | Tensor:
        """Return whether a noise level is guided: low alpha_t < sigma_t <= high alpha_t.

        SNR 0 is not guided if `at_zero_snr` is False.
        """
        acts: bool | Tensor = True
        if self.interval is not None:
            low, high = self.interval
            acts = low * alpha_t < sigma_t
            acts = acts if high == math.inf else acts & (sigma_t <= high * alpha_t)
        return acts if self.at_zero_snr else acts & (alpha_t > 0)

    def scale_at(
        self,
        alpha_t: float,
        sigma_t: float,
        alpha_s: float | None = None,
        sigma_s: float | None = None,
    ) -> float:
        """Compute w of the step from t to s; 1 at noise levels without guidance.

        With "cfg_pp" (Chung et al., arXiv:2406.08070) the deterministic step adds the unconditional
        noise again, with D_g = D_u + lambda (D_c - D_u):

        x_s = alpha_s D_g + (sigma_s / sigma_t) (x_t - alpha_t D_u)

        which is the usual step, `reverse_transition` with eta = 0, from
        x_0 = D_u + w (D_c - D_u),  w = lambda / (1 - r),  r = alpha_t sigma_s / (alpha_s sigma_t).
        So w is lambda from SNR 0 and to clean data, and grows as steps get shorter. This x_0 is
        only used for the step; it is not a prediction of the image.

        Args:
            alpha_t: Scale of x_0 in x_t.
            sigma_t: Scale of eps in x_t.
            alpha_s: Scale of x_0 at the next timestep. Only "cfg_pp" needs it.
            sigma_s: Scale of eps at the next timestep.

        Raises:
            ValueError: The method is "cfg_pp", and s is unknown or not less noisy than t.
        """
        if not self.acts(alpha_t, sigma_t):
            return 1.0
        scale = float(self.scale)
        if self.curve is not None:
            scale = _at(self.curve, _log_snr(alpha_t, sigma_t))
        if self.method != "cfg_pp":
            return scale
        if alpha_s is None or sigma_s is None:
            raise _needs_step()
        if not alpha_t * sigma_s < alpha_s * sigma_t:
            raise ValueError(
                "Guidance method 'cfg_pp' has no scale if the noise does not decrease from t to s."
            )
        return scale / (1 - alpha_t * sigma_s / (alpha_s * sigma_t))

    def scales_at(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor | float:
        """Compute w of each sample, (B,), or one for all; like `scale_at`, without a host sync.

        Raises:
            ValueError: The method is "cfg_pp", whose w also depends on the next timestep.
        """
        if self.method == "cfg_pp":
            raise _needs_step()
        acts = self.acts(alpha_t, sigma_t)
        if self.curve is not None:
            scale = _each_at(self.curve, 2 * (alpha_t.log() - sigma_t.log()))
        elif isinstance(acts, Tensor):
            scale = torch.full_like(alpha_t, self.scale)
        else:
            return self.scale
        return torch.where(acts, scale, 1.0) if isinstance(acts, Tensor) else scale

    @property
    def guides_x0(self) -> bool:
        """Whether `__call__` takes predictions of x_0, not raw network outputs."""
        return self.method == "apg"

    def __call__(self, cond: Tensor, uncond: Tensor, scale: float | Tensor | None = None) -> Tensor:
        """Guide and rescale raw network outputs, or with "apg" predictions of x_0, both (B, *).

        Args:
            cond: Prediction for the prompt.
            uncond: Prediction to guide away from.
            scale: w of `scale_at` or `scales_at`, a float or (B,). None = the scale of all steps.

        Raises:
            ValueError: `scale` is None, but w depends on the step.
        """
        if scale is None:
            if self.method == "cfg_pp":
                raise _needs_step()
            if self.curve is not None:
                raise ValueError("Guidance with a curve needs a noise level: pass scale_at(...).")
            scale = self.scale
        w = per_sample(scale.to(cond.dtype), cond) if isinstance(scale, Tensor) else scale
        match self.method:
            case "apg":
                guided = adaptive_projected_guidance(
                    cond, uncond, w, self.apg_parallel, self.apg_norm
                )
            case "cfg_zero_star":
                guided = zero_star_guidance(cond, uncond, w)
            case _:
                guided = classifier_free_guidance(cond, uncond, w)
        guided = rescale_guidance(guided, cond, self.rescale)
        return torch.where(w == 1, cond, guided) if isinstance(w, Tensor) else guided


def _log_snr(alpha_t: float, sigma_t: float) -> float:
    if alpha_t == 0:
        return -math.inf
    return math.inf if sigma_t == 0 else 2 * math.log(alpha_t / sigma_t)


def _at(curve: Curve, x: float) -> float:
    """Interpolate linearly; constant beyond the ends, and exact at the knots."""
    for (x_0, y_0), (x_1, y_1) in pairwise(curve):
        if x < x_1:
            return y_0 if x <= x_0 else y_0 + (x - x_0) / (x_1 - x_0) * (y_1 - y_0)
    return curve[-1][1]


def _each_at(curve: Curve, x: Tensor) -> Tensor:
    """Apply `_at` to every element."""
    y = torch.full_like(x, curve[-1][1])
    for (x_0, y_0), (x_1, y_1) in reversed([*pairwise(curve)]):
        share = ((x - x_0) / (x_1 - x_0)).clamp(min=0)
        y = torch.where(x < x_1, y_0 + share * (y_1 - y_0), y)
    return y


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)


def _interval(ends: Any) -> tuple[float, float]:
    if not _is_pair(ends):
        raise ValueError(
            f"Guidance interval {ends!r}: wanted two noise levels; the second may be inf."
        )
    if not 0 <= ends[0] < ends[1]:
        raise ValueError(f"Guidance interval {ends!r}: wanted 0 or more, then a higher level.")
    return ends[0], ends[1]


def _curve(knots: Any) -> Curve:
    listed = isinstance(knots, tuple | list) and len(knots) > 0 and all(map(_is_pair, knots))
    if not listed or not all(_is_number(x) for knot in knots for x in knot):
        raise ValueError(
            f"Guidance curve {knots!r}: wanted knots (log SNR, w) of finite numbers, such as "
            "((-6, 1), (0, 7.5))."
        )
    if any(x >= y for (x, _), (y, _) in pairwise(knots)):
        raise ValueError(f"Guidance curve {knots!r}: wanted knots that ascend in log SNR.")
    return tuple((x, w) for x, w in knots)


def _check_name(label: str, name: Any, known: Sequence[str]) -> None:
    if name not in known:
        listed = ", ".join(map(repr, known))
        raise ValueError(f"Guidance {label} {name!r} is unknown. Known: {listed}.")


def _needs_step() -> ValueError:
    return ValueError(
        "Guidance method 'cfg_pp' needs the next timestep: use a sampler, or denoiser.at(t, s)."
    )
