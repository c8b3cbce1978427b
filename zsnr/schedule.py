"""Noise schedules, and their rescale to zero terminal SNR (section 3.1).

`alpha_t` and `sigma_t` are scales everywhere in this package: x_t = alpha_t x_0 + sigma_t eps.
Code counts timesteps t = 0 .. T-1 where the paper counts 1 .. T; t = -1 means clean data, whose
scales are (1, 0).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from operator import mul
from reprlib import repr as brief
from typing import Any, Literal, Protocol, Self, overload

import torch
from torch import Tensor

BetaKind = Literal["linear", "cosine", "scaled_linear"]

# beta_start and beta_end by kind, where None asks for them
USUAL_BETAS = {"linear": (0.0001, 0.02), "scaled_linear": (0.00085, 0.012)}
MAX_TIMESTEPS = 100_000  # the tables are Python floats, and published schedules have 1000
_LARGEST_SHIFT = 1e4  # of rectified flow
WITHOUT_FLOAT64 = {"mps"}  # types of devices


def widest(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has no float64."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


class DeviceTables:
    """Tables of numbers that are looked up where the index is, copied to each device once.

    Args:
        values: Tables of equal length N.
    """

    def __init__(self, *values: Sequence[float]) -> None:
        self.values = tuple(map(tuple, values))
        self._on_device: dict[torch.device, tuple[Tensor, ...]] = {}

    def __call__(self, index: Tensor) -> tuple[Tensor, ...]:
        """Look up each table at `index`, integers of any shape in {0, ..., N-1}; no host sync.

        Returns:
            Tensors of index's shape on its device: float64, or float32 where the device has no
            float64.

        Raises:
            IndexError: An index is out of range (on an accelerator: its own device-side assertion).
        """
        rows = index.flatten()  # index_select refuses what is negative
        return tuple(
            table.index_select(0, rows).view(index.shape) for table in self._tables_for(index)
        )

    def _tables_for(self, index: Tensor) -> tuple[Tensor, ...]:
        tables = self._on_device.get(index.device)
        if tables is not None and type(index) is Tensor:
            return tables
        dtype = widest(index.device)
        tables = tuple(torch.tensor(v, dtype=dtype, device=index.device) for v in self.values)
        if type(tables[0]) is Tensor:  # a fake tensor must not outlive its mode
            self._on_device[index.device] = tables
        return tables


class Schedule(Protocol):
    """A decreasing SNR curve on T timesteps: x_t = alpha_t x_0 + sigma_t eps.

    Everything in this package that takes a schedule takes any object of this form, such as a
    NoiseSchedule or a RectifiedFlow. Schedules are values: compared with ==, and hashable.

    Attributes:
        num_timesteps: T.
        snr: (alpha_t / sigma_t)^2, shape (T,), float64 on the CPU, strictly decreasing.
        log_snr: Natural logarithm of `snr`, shape (T,); -inf where `snr` is 0.
    """

    @property
    def num_timesteps(self) -> int: ...

    @property
    def snr(self) -> Tensor: ...

    @property
    def log_snr(self) -> Tensor: ...

    @overload
    def __call__(self, t: int) -> tuple[float, float]: ...

    @overload
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    def time(self, t: Tensor) -> Tensor:
        """Return what the network is told at timesteps t from -1 on; it increases with t."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        ...

    def __hash__(self) -> int: ...


class TabledSchedule:
    """A schedule whose scales are tables, derived from its settings once."""

    num_timesteps: int
    _scales: DeviceTables

    def _derive(
        self, alpha: Sequence[float], sigma: Sequence[float], **tables: list[float]
    ) -> None:
        """Keep the tables of alpha_t and sigma_t, t = 0 .. T-1, and others as attributes."""
        object.__setattr__(self, "_scales", DeviceTables((1.0, *alpha), (0.0, *sigma)))
        for name, values in tables.items():
            tensor = torch.tensor(values, dtype=torch.float64, device="cpu")
            object.__setattr__(self, name, tensor)

    @overload
    def __call__(self, t: int) -> tuple[float, float]: ...

    @overload
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]: ...

    def __call__(self, t: int | Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Look up alpha_t and sigma_t.

        Args:
            t: Timesteps in {-1, ..., T-1}: int64 of any shape, or one Python int. -1 is clean
                data, with the scales (1, 0).

        Returns:
            (alpha_t, sigma_t): float64 tensors of t's shape on t's device (float32 if the device
            has no float64), or two floats for an int. No host sync.

        Raises:
            TypeError: t is not an integer.
            IndexError: t is out of range (on an accelerator: a device-side assertion).
        """
        if not isinstance(t, Tensor):
            if isinstance(t, bool) or not hasattr(t, "__index__"):
                raise TypeError(f"t={t!r}: wanted an int or an integer tensor.")
            t = operator.index(t)
            if not -1 <= t < self.num_timesteps:
                raise IndexError(_out_of_range(self.num_timesteps))
            return self._scales.values[0][t + 1], self._scales.values[1][t + 1]
        alpha_t, sigma_t = self._look_up(self._scales, t)
        return alpha_t, sigma_t

    def _look_up(self, tables: DeviceTables, t: Tensor) -> tuple[Tensor, ...]:
        """Look up tables that begin with t = -1."""
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"t has dtype {t.dtype}: wanted int64, timesteps are indices.")
        try:
            return tables(t + 1)
        except IndexError as error:
            raise IndexError(_out_of_range(self.num_timesteps)) from error

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noise clean data: x_t = alpha_t x_0 + sigma_t eps    (equation 4).

        Args:
            x_0: Clean data, (B, *).
            eps: Standard normal noise, (B, *).
            t: int64 timesteps, (B,) or with as many axes as x_0.

        Returns:
            x_t (B, *) in the common dtype of x_0 and eps, at least float32.

        Raises:
            ValueError: The shapes do not match.
        """
        return noised(x_0, eps, *self(t))

    @classmethod
    def from_settings(cls, settings: Any) -> Self:
        """Build a schedule from the result of `settings`, or from settings in a file.

        Raises:
            ValueError: The values are not valid settings of a schedule.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"schedule={brief(settings)}: wanted settings by name.")
        known = [option.name for option in fields(cls) if option.init]  # type: ignore[arg-type]
        for name in settings:
            if name not in known:
                raise ValueError(f"schedule has no {brief(name)}. Known: {', '.join(known)}.")
        return cls(**settings)

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, such that `from_settings(settings)` is equal."""
        values = {
            option.name: getattr(self, option.name)
            for option in fields(self)  # type: ignore[arg-type]
            if option.init
        }
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[dict[str, Any]]]:
        return type(self).from_settings, (self.settings(),)


@dataclass(frozen=True)
class NoiseSchedule(TabledSchedule):
    """A variance-preserving noise schedule.

    x_t = alpha_t x_0 + sigma_t eps,  alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t)

    (equation 4).

    Equality, hash, pickle and `settings()` use the settings only; the tables are derived from them
    once, in float64 on the CPU, and must not be changed. Checkpoints store `settings()`.

    Args:
        betas: Kind of schedule (Table 1). Must be left at its default with a custom table.
        num_timesteps: Number of timesteps T, 2 to 100,000.
        beta_start: First beta, in (0, 1). None = the usual value of the kind: 0.0001 for linear,
            0.00085 for scaled_linear. Must be None for cosine and with a custom table.
        beta_end: Last beta, in (0, 1). None = 0.02 for linear, 0.012 for scaled_linear.
        zero_terminal_snr: Rescale to zero terminal SNR: Algorithm 1 for linear, scaled_linear and a
            custom table; cosine drops its cap of 0.999 instead. False = the published schedule.
        alphas_cumprod_table: Custom abar_t, T numbers, strictly decreasing in (0, 1), the last may
            be 0. None = computed from `betas`.
        snr_shift: Divides the SNR of the published schedule, before the rescale:
            abar_t / (snr_shift + (1 - snr_shift) abar_t). Larger images need more noise, see
            `resolution_shift`; CogVideoX calls it snr_shift_scale. 1 = unchanged.

    Attributes:
        alphas_cumprod: abar_t, shape (T,).
        snr: abar_t / (1 - abar_t), shape (T,) (equation 5).
        log_snr: Natural logarithm of `snr`, shape (T,); -inf where `snr` is 0.
        beta_table: 1 - abar_t / abar_{t-1}, shape (T,).

    Raises:
        ValueError: The settings contradict each other or do not result in a decreasing table.
    """

    betas: BetaKind = "scaled_linear"
    num_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    zero_terminal_snr: bool = True
    alphas_cumprod_table: tuple[float, ...] | None = None
    snr_shift: float = 1.0

    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)
    snr: Tensor = field(init=False, repr=False, compare=False)
    log_snr: Tensor = field(init=False, repr=False, compare=False)
    beta_table: Tensor = field(init=False, repr=False, compare=False)
    _scales: DeviceTables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.alphas_cumprod_table is not None:
            object.__setattr__(self, "alphas_cumprod_table", _floats(self.alphas_cumprod_table))
        if not isinstance(self.zero_terminal_snr, bool):
            raise ValueError(
                f"zero_terminal_snr={brief(self.zero_terminal_snr)}: wanted True or False."
            )
        abar = _shifted(_alphas_cumprod(self), positive("snr_shift", self.snr_shift))
        if self.zero_terminal_snr:
            abar = _rescale(abar)
        snr = [a / (1 - a) for a in abar]
        self._derive(
            [math.sqrt(a) for a in abar],
            [math.sqrt(1 - a) for a in abar],
            alphas_cumprod=abar,
            snr=snr,
            log_snr=_logarithms(snr),
            beta_table=[1 - a / p for p, a in zip([1.0, *abar], abar, strict=False)],
        )

    def time(self, t: Tensor) -> Tensor:
        """Return what the network is told at timesteps t: t itself."""
        return t

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain values, such that `from_settings(settings)` is equal."""
        settings = super().settings()
        if self.snr_shift == 1:  # files without a shift remain readable by earlier versions
            del settings["snr_shift"]
        return settings

    @classmethod
    def from_alphas_cumprod(
        cls, table: Tensor | Sequence[float], zero_terminal_snr: bool = False
    ) -> NoiseSchedule:
        """Build a schedule from a custom table of abar_t, shape (T,), strictly decreasing."""
        values = _floats(table)
        return cls(
            num_timesteps=len(values),
            zero_terminal_snr=zero_terminal_snr,
            alphas_cumprod_table=values,
        )


@dataclass(frozen=True)
class RectifiedFlow(TabledSchedule):
    """Rectified flow: x_t = (1 - u) x_0 + u eps (Liu et al., arXiv:2209.03003).

    u = shift tau / (1 + (shift - 1) tau),  tau = (t + 1) / T

    It ends at u = 1, zero SNR, by construction. The network is told 1000 u. The shift is that of
    Esser et al., arXiv:2403.03206, equation 23, which divides the SNR by shift^2.

    Equality, hash, pickle and `settings()` use the settings only, as with NoiseSchedule.

    Args:
        shift: 1 = u is linear in the timestep; above 1 = more noise, for larger images, positive.
        num_timesteps: Number of timesteps T, 2 to 100,000.

    Attributes:
        snr: ((1 - u) / u)^2, shape (T,).
        log_snr: Natural logarithm of `snr`, shape (T,); -inf at the last timestep.

    Raises:
        ValueError: A setting is out of range.
    """

    shift: float = 1.0
    num_timesteps: int = 1000

    snr: Tensor = field(init=False, repr=False, compare=False)
    log_snr: Tensor = field(init=False, repr=False, compare=False)
    _scales: DeviceTables = field(init=False, repr=False, compare=False)
    _times: DeviceTables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        T, shift = _check_num_timesteps(self.num_timesteps), positive("shift", self.shift)
        if not 1 / _LARGEST_SHIFT <= shift <= _LARGEST_SHIFT:
            raise ValueError(f"shift={shift:g}: wanted a number of moderate size, such as 3.")
        # in integers as far as possible, so that u is exactly 1 and alpha exactly 0 at the end
        scale = [T + (shift - 1) * (t + 1) for t in range(T)]
        alpha = [(T - t - 1) / s for t, s in enumerate(scale)]
        sigma = [*(shift * (t + 1) / s for t, s in enumerate(scale[:-1])), 1.0]
        snr = [(a / s) ** 2 for a, s in zip(alpha, sigma, strict=True)]
        self._derive(alpha, sigma, snr=snr, log_snr=_logarithms(snr))
        object.__setattr__(self, "_times", DeviceTables([0.0, *(1000 * u for u in sigma)]))

    def time(self, t: Tensor) -> Tensor:
        """Return what the network is told at timesteps t: 1000 u, float32; errors as `__call__`."""
        [times] = self._look_up(self._times, t)
        return times.to(torch.float32)


def schedule_from_settings(settings: Any) -> NoiseSchedule | RectifiedFlow:
    """Build a schedule from the result of `settings`: a RectifiedFlow if they name its shift.

    Raises:
        ValueError: The values are not valid settings of a schedule.
    """
    flow = isinstance(settings, Mapping) and "shift" in settings
    return (RectifiedFlow if flow else NoiseSchedule).from_settings(settings)


def resolution_shift(size: int | tuple[int, int], base: int | tuple[int, int]) -> float:
    """Return the `snr_shift` that keeps the SNR of an image's mean at another size.

    (h w) / (h_0 w_0): averaging over more pixels removes noise, and not the mean (Hoogeboom et al.,
    arXiv:2301.11093). The square root of it is the equivalent `shift` of a RectifiedFlow.

    Args:
        size: Side, or height and width, of the images or latents.
        base: Those that the unshifted schedule is meant for.

    Raises:
        ValueError: A side is not positive.
    """
    areas = []
    for name, sides in (("size", size), ("base", base)):
        height, width = (sides, sides) if isinstance(sides, int) else sides
        areas.append(positive(name, height) * positive(name, width))
    return areas[0] / areas[1]


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Rescale abar_t to end at zero SNR, keeping the first value.

    s_t = sqrt(abar_t),  s_t <- (s_t - s_T) s_1 / (s_1 - s_T)    (Algorithm 1)

    Args:
        alphas_cumprod: abar_t, shape (T,), strictly decreasing in (0, 1), the last may be 0.

    Returns:
        A new float64 tensor, shape (T,): first value unchanged, last value exactly 0.

    Raises:
        ValueError: The table does not have this form.
    """
    values = list(_floats(alphas_cumprod))
    _check_table(values, "alphas_cumprod")
    return torch.tensor(_rescale(values), dtype=torch.float64, device="cpu")


@overload
def per_sample(scale: Tensor, data: Tensor) -> Tensor: ...


@overload
def per_sample(scale: Tensor | float, data: Tensor) -> Tensor | float: ...


def per_sample(scale: Tensor | float, data: Tensor) -> Tensor | float:
    """Fit a scale to data: (B,) becomes (B, 1, ...), the dtype becomes the data's.

    Args:
        scale: A float, one number per sample (B,), or a tensor with as many axes as the data.
        data: (B, *).

    Raises:
        ValueError: The scale has another shape, and would broadcast along the wrong axis.
    """
    if not isinstance(scale, Tensor):
        return scale
    if scale.ndim == 1 and len(scale) in (1, len(data)):
        scale = scale.view(-1, *(1,) * (data.ndim - 1))
    elif scale.ndim not in (0, data.ndim):
        raise ValueError(
            f"A scale of shape {tuple(scale.shape)} for data of shape {tuple(data.shape)}: wanted "
            "one number per sample, (B,), or as many axes as the data."
        )
    return scale.to(data.dtype)


def aligned(
    alpha_t: Tensor | float, sigma_t: Tensor | float, a: Tensor, b: Tensor
) -> tuple[Tensor | float, Tensor | float, Tensor, Tensor]:
    """Fit two scales and two data tensors (B, *) to each other.

    Returns:
        (alpha_t, sigma_t, a, b) in the data's common dtype, at least float32: scales never widen
        data.

    Raises:
        ValueError: a and b have different shapes, or a scale's shape does not match.
    """
    if a.shape != b.shape:
        raise ValueError(f"Shapes {tuple(a.shape)} and {tuple(b.shape)}: wanted equal shapes.")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    return per_sample(alpha_t, a), per_sample(sigma_t, a), a, b


def noised(x_0: Tensor, eps: Tensor, alpha_t: Tensor | float, sigma_t: Tensor | float) -> Tensor:
    """Noise clean data: alpha_t x_0 + sigma_t eps, see `NoiseSchedule.add_noise`."""
    alpha_t, sigma_t, x_0, eps = aligned(alpha_t, sigma_t, x_0, eps)
    return alpha_t * x_0 + sigma_t * eps


def positive(name: str, value: Any) -> float:
    """Return a setting that has to be a positive number.

    Raises:
        ValueError: It is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        if number and math.isfinite(value) and value > 0:
            return float(value)
    except OverflowError:  # of an int that no float holds
        pass
    raise ValueError(f"{name}={brief(value)}: wanted a positive number.")


def timesteps_at(schedule: Schedule, time: Tensor) -> Tensor:
    """Return the timesteps, int64, at which networks are told `time`: the nearest ones."""
    if not time.is_floating_point():
        return time
    told = schedule.time(torch.arange(schedule.num_timesteps, device=time.device)).to(time.dtype)
    return torch.bucketize(time, (told[1:] + told[:-1]) / 2)


def _logarithms(snr: Sequence[float]) -> list[float]:
    return [math.log(r) if r > 0 else -math.inf for r in snr]


def _floats(table: Tensor | Sequence[float]) -> tuple[float, ...]:
    if isinstance(table, Tensor):
        if table.ndim != 1:
            shape = tuple(table.shape)
            raise ValueError(f"The table of abar_t has shape {shape}: wanted one axis, (T,).")
        if table.is_complex():
            raise ValueError("The table of abar_t is complex: wanted numbers in [0, 1).")
    if isinstance(table, str | Mapping) or not hasattr(table, "__len__"):
        raise ValueError(f"The table of abar_t is {brief(table)}: wanted a list of numbers.")
    if len(table) > MAX_TIMESTEPS:
        raise ValueError(
            f"The table of abar_t has {len(table)} entries: wanted {MAX_TIMESTEPS} at most."
        )
    values = table.tolist() if isinstance(table, Tensor) else [*table]
    for t, value in enumerate(values):
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise ValueError(f"The table of abar_t has {brief(value)} at t={t}: wanted a number.")
    try:
        return tuple(map(float, values))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"The table of abar_t is not of numbers: {error}.") from error


def beta_ends(schedule: NoiseSchedule) -> tuple[float, float]:
    """Return the first and last beta of a linear or scaled_linear schedule as published."""
    first, last = USUAL_BETAS[schedule.betas]
    return (
        first if schedule.beta_start is None else schedule.beta_start,
        last if schedule.beta_end is None else schedule.beta_end,
    )


def _alphas_cumprod(schedule: NoiseSchedule) -> list[float]:
    """Compute abar_t before any rescale; cosine is capped only without zero terminal SNR."""
    T = _check_num_timesteps(schedule.num_timesteps)
    ends = schedule.beta_start, schedule.beta_end
    if schedule.alphas_cumprod_table is not None:
        return _custom_table(schedule)
    if schedule.betas == "cosine":
        if ends != (None, None):
            raise ValueError(
                "betas='cosine' has no beta_start and beta_end: leave both None, or choose "
                "'linear' or 'scaled_linear'."
            )
        return _cosine(T, capped=not schedule.zero_terminal_snr)
    if not isinstance(schedule.betas, str) or schedule.betas not in USUAL_BETAS:
        known = ", ".join(repr(kind) for kind in ("linear", "cosine", "scaled_linear"))
        raise ValueError(f"betas={brief(schedule.betas)} is unknown. Known: {known}.")
    first, last = beta_ends(schedule)
    for name, beta in (("beta_start", first), ("beta_end", last)):
        if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta < 1:
            raise ValueError(
                f"{name}={brief(beta)}: wanted a number between 0 and 1, both excluded."
            )
    power = 2 if schedule.betas == "scaled_linear" else 1
    lo, hi = first ** (1 / power), last ** (1 / power)
    betas = [(lo * (1 - i / (T - 1)) + hi * (i / (T - 1))) ** power for i in range(T)]
    abar = list(accumulate((1 - beta for beta in betas), mul))
    _check_table(abar, f"betas={schedule.betas!r} from {first} to {last} over {T} timesteps")
    return abar


def _check_num_timesteps(T: int) -> int:
    if isinstance(T, bool) or not isinstance(T, int) or not 2 <= T <= MAX_TIMESTEPS:
        raise ValueError(f"num_timesteps={brief(T)}: wanted an int, 2 to {MAX_TIMESTEPS}.")
    return T


def _custom_table(schedule: NoiseSchedule) -> list[float]:
    table = list(schedule.alphas_cumprod_table or ())
    if (schedule.beta_start, schedule.beta_end) != (None, None) or (
        schedule.betas != NoiseSchedule.betas
    ):
        raise ValueError(
            "alphas_cumprod_table replaces betas, beta_start and beta_end: leave those at their "
            "defaults, or drop the table."
        )
    if len(table) != schedule.num_timesteps:
        raise ValueError(
            f"alphas_cumprod_table has {len(table)} entries but num_timesteps is "
            f"{schedule.num_timesteps}: set num_timesteps={len(table)}."
        )
    _check_table(table, "alphas_cumprod_table")
    return table


def _cosine(T: int, capped: bool) -> list[float]:
    """abar_t = f(t/T) / f(0), f(i) = cos((i + 0.008) / 1.008 pi/2)^2, t = 1 .. T    (Table 1)."""
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    if not capped:
        return [*(f[t] / f[0] for t in range(1, T)), 0.0]
    return list(accumulate((1 - min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)), mul))


def _shifted(abar: list[float], shift: float) -> list[float]:
    """Divide the SNR by a number."""
    if shift == 1:
        return abar
    shifted = [a / (shift + (1 - shift) * a) for a in abar]
    _check_table(shifted, f"the table after snr_shift={shift}")
    return shifted


def _rescale(abar: list[float]) -> list[float]:
    """Apply Algorithm 1 to plain floats; a table that ends at 0 is returned unchanged."""
    if abar[-1] == 0:
        return abar
    s = [math.sqrt(a) for a in abar]
    stretch = s[0] / (s[0] - s[-1])
    # Both ends are set rather than computed: rounding would change abar_1 by an ulp.
    rescaled = [abar[0], *(((s_t - s[-1]) * stretch) ** 2 for s_t in s[1:-1]), 0.0]
    _check_table(rescaled, "the table after its rescale to zero terminal SNR")
    return rescaled


def _check_table(abar: Sequence[float], label: str) -> None:
    if len(abar) < 2:
        raise ValueError(f"{label} has {len(abar)} entries: wanted at least 2.")
    if not all(math.isfinite(a) for a in abar):
        raise ValueError(f"{label} has values that are not finite: wanted abar_t in [0, 1).")
    if not (abar[0] < 1 and abar[-1] >= 0):
        raise ValueError(
            f"{label}: abar_t runs from {abar[0]} to {abar[-1]}: wanted values below 1, none "
            "negative."
        )
    for t, (p, a) in enumerate(pairwise(abar), start=1):
        if not a < p:
            raise ValueError(
                f"{label}: abar_t does not decrease at t={t} ({p} then {a}): wanted a strictly "
                "decreasing table. Check the betas."
            )


def _out_of_range(num_timesteps: int) -> str:
    return (
        f"A timestep is out of range: wanted -1 (clean data) to {num_timesteps - 1}, since the "
        f"schedule has {num_timesteps} timesteps."
    )
