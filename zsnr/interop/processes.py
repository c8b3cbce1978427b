"""Scheduler configs of diffusers without a schedule of betas: flow, exploding variance, tokens.

Their tables are part of this package, so that such a config can be judged without diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, cast

from zsnr.interop.config_values import is_real, reader
from zsnr.prediction import PredictionType
from zsnr.schedule import MAX_TIMESTEPS, RectifiedFlow, positive
from zsnr.untrusted import shown

# betas       a variance-preserving schedule, or a class that this file does not know
# flow        rectified flow
# exploding   x = x_0 + sigma eps, up to sigma_max
# continuous  EulerDiscreteScheduler with v prediction, which tells the network 0.25 log sigma
# tokens      discrete tokens, which are masked or replaced
Process = Literal["betas", "flow", "exploding", "continuous", "tokens"]

TOLD_TIMES = 1000
"""Networks of rectified flow are told 1000 u here, and num_train_timesteps times u by diffusers."""
YOUR_OWN = "give its schedule and prediction type yourself: schedule=..., prediction_type=..."
TOKENS = frozenset(
    {
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "DiscreteDDIMScheduler",
        "EntropyBoundScheduler",
        "VQDiffusionScheduler",
    }
)
_WARPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def _pure(T: int, shift: float) -> float:
    return 1.0


def _below(T: int, shift: float) -> float:
    """Return u of the step before the last of T, after the shift."""
    return shift * (T - 1) / (T + (shift - 1) * (T - 1))


def _nearly_pure(T: int, shift: float) -> float:
    return 1 - 1e-6


def _in_stages(T: int, shift: float) -> float:
    return min(_below(T, shift), 0.999)


@dataclass(frozen=True)
class FlowClass:
    """One of diffusers' scheduler classes for rectified flow.

    Args:
        defaults: Defaults of the relevant keys.
        flag: Key that makes a solver of diffusion a solver of flow; None = the class is for flow.
        first_sigma: u of its first step, by T and the shift.
        whole: Whether its timesteps are cut to integers.
    """

    defaults: Mapping[str, Any]
    flag: str | None = None
    first_sigma: Callable[[int, float], float] = _pure
    whole: bool = False


_SHIFTED = {"num_train_timesteps": 1000, "shift": 1.0}
_DYNAMIC = {
    **_SHIFTED,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "time_shift_type": "exponential",
    "invert_sigmas": False,
    **dict.fromkeys(_WARPS, False),
}
_SOLVER = {
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "flow_shift": 1.0,
    **dict.fromkeys(_WARPS, False),
}


_DYNAMIC_SOLVER = {
    **_SOLVER,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}


def _solver(
    defaults: Mapping[str, Any], first_sigma: Callable[[int, float], float] = _below
) -> FlowClass:
    return FlowClass(defaults, "use_flow_sigmas", first_sigma, whole=True)


def _staged(time_shift_type: str) -> FlowClass:
    defaults = {
        **_SHIFTED,
        "stages": 3,
        "prediction_type": "flow_prediction",
        "use_dynamic_shifting": False,
        "time_shift_type": time_shift_type,
    }
    return FlowClass(defaults, first_sigma=_in_stages)


FLOWS: Mapping[str, FlowClass] = MappingProxyType(
    {
        "FlowMatchEulerDiscreteScheduler": FlowClass(_DYNAMIC),
        "FlowMatchHeunDiscreteScheduler": FlowClass(_SHIFTED),
        "FlowMatchLCMScheduler": FlowClass(_DYNAMIC),
        "LTXEulerAncestralRFScheduler": FlowClass(_DYNAMIC),
        "FlowMapEulerDiscreteScheduler": FlowClass(_SHIFTED),
        "HeliosScheduler": _staged("exponential"),
        "HeliosDMDScheduler": _staged("linear"),
        "DPMSolverMultistepScheduler": _solver({**_DYNAMIC_SOLVER, "use_lu_lambdas": False}),
        "DPMSolverSinglestepScheduler": _solver(_DYNAMIC_SOLVER),
        "DEISMultistepScheduler": _solver(_DYNAMIC_SOLVER),
        "SASolverScheduler": _solver(_SOLVER),
        "UniPCMultistepScheduler": _solver(_DYNAMIC_SOLVER, _nearly_pure),
    }
)


@dataclass(frozen=True)
class ExplodingClass:
    """One of diffusers' scheduler classes for x = x_0 + sigma eps.

    Args:
        sigma_max: Default of the key of that name.
        told: What the network is told at the first of S steps, by sigma_max and S.
        num_train_timesteps: Default of the key, which limits S; None = nothing does.
    """

    sigma_max: float
    told: Callable[[float, int], float]
    num_train_timesteps: int | None = None


EXPLODING: Mapping[str, ExplodingClass] = MappingProxyType(
    {
        "EDMEulerScheduler": ExplodingClass(80.0, lambda sigma, S: math.log(sigma) / 4),
        "EDMDPMSolverMultistepScheduler": ExplodingClass(
            80.0, lambda sigma, S: math.log(sigma) / 4
        ),
        "CosineDPMSolverMultistepScheduler": ExplodingClass(
            500.0, lambda sigma, S: math.atan(sigma) * 2 / math.pi
        ),
        "CMStochasticIterativeScheduler": ExplodingClass(
            80.0, lambda sigma, S: 250 * math.log(sigma), num_train_timesteps=40
        ),
        "KarrasVeScheduler": ExplodingClass(100.0, lambda sigma, S: S - 1),
        "ScoreSdeVeScheduler": ExplodingClass(1348.0, lambda sigma, S: 1.0),
    }
)


def process_of(config: Mapping[str, Any]) -> Process:
    """Return the kind of process that a config's class, and its keys, belong to."""
    name = config.get("_class_name")
    if not isinstance(name, str):
        return "betas"
    if name in FLOWS and (FLOWS[name].flag is None or config.get(str(FLOWS[name].flag)) is True):
        return "flow"
    if name in EXPLODING:
        return "exploding"
    if name in TOKENS:
        return "tokens"
    continuous = config.get("timestep_type") == "continuous"
    if (
        name == "EulerDiscreteScheduler"
        and continuous
        and config.get("prediction_type") == "v_prediction"
    ):
        return "continuous"
    return "betas"


def refusal(config: Mapping[str, Any]) -> str:
    """Return why a config has no schedule of betas or of flow, for a process that has none."""
    name, process = config.get("_class_name"), process_of(config)
    why = {
        "exploding": "has noise levels up to sigma_max and no timesteps",
        "continuous": (
            "with timestep_type='continuous' has its own noise levels, up to sigma_max, and no "
            "schedule of betas"
        ),
        "tokens": "replaces discrete tokens, which have no SNR",
    }[process]
    return f"{name} {why}: {YOUR_OWN}."


@dataclass(frozen=True)
class DeclaredFlow:
    """What a scheduler config of rectified flow declares.

    Args:
        class_name: The scheduler's class.
        prediction_type: What the network predicts, in diffusers' words; None = flow, by the class.
        num_train_timesteps: T.
        shift: The shift, without dynamic shifting.
        shift_range: The least and the largest shift of dynamic shifting; None = it is not dynamic.
        first_sigma: u of the first step; None = the config spaces noise levels in its own way.
        first_timestep: The timestep of that step; None as `first_sigma`.
        moved_by: The key that makes the first step miss u = 1.
        missing: Keys that have the class's default.
    """

    class_name: str
    prediction_type: str | None
    num_train_timesteps: int
    shift: float
    shift_range: tuple[float, float] | None = None
    first_sigma: float | None = 1.0
    first_timestep: float | None = None
    moved_by: str | None = None
    missing: tuple[str, ...] = field(default=())

    def process(self) -> tuple[RectifiedFlow, PredictionType]:
        """Return the schedule and the prediction type.

        Raises:
            ValueError: The shift depends on the image's size, or the prediction type or the times
                that the network is told are not those of this package.
        """
        if self.shift_range is not None:
            low, high = self.shift_range
            raise ValueError(
                f"use_dynamic_shifting=true: the shift depends on the size of the image, {low:.3g} "
                f"to {high:.3g}, and a schedule has one: {YOUR_OWN}, such as "
                f"RectifiedFlow(shift={high:.3g})."
            )
        if self.moved_by == "invert_sigmas":
            raise ValueError(
                "invert_sigmas=true: the network is told reversed times, 0 at pure noise: "
                f"{YOUR_OWN}, with a network that reverses them."
            )
        if self.num_train_timesteps != TOLD_TIMES:
            raise ValueError(
                f"num_train_timesteps={self.num_train_timesteps} with rectified flow: the network "
                f"is told {self.num_train_timesteps} u, and networks of RectifiedFlow are told "
                f"{TOLD_TIMES} u. Wanted {TOLD_TIMES}."
            )
        if self.prediction_type not in (None, "flow_prediction"):
            raise ValueError(
                f"{self.class_name} with flow sigmas and prediction_type="
                f"{shown(self.prediction_type)}: wanted 'flow_prediction', or {YOUR_OWN}."
            )
        return RectifiedFlow(self.shift, self.num_train_timesteps), "flow"


def declare_flow(config: Mapping[str, Any]) -> DeclaredFlow:
    """Read a config whose process is "flow"; missing keys have the defaults of its class.

    Raises:
        ValueError: diffusers would not accept a value.
    """
    name = config["_class_name"]
    cls = FLOWS[name]
    values = {key: config.get(key, default) for key, default in cls.defaults.items()}
    flag = reader(values, bool)
    T = reader(values, int)("num_train_timesteps")
    if not 2 <= T <= MAX_TIMESTEPS:
        raise ValueError(f"num_train_timesteps={shown(T)}: wanted 2 to {MAX_TIMESTEPS}.")
    key = "flow_shift" if cls.flag else "shift"
    shift = positive(key, values[key])
    RectifiedFlow(shift)  # of moderate size
    prediction_type = values.get("prediction_type")
    known = ("flow_prediction", "epsilon", "sample", "v_prediction")
    if prediction_type is not None and prediction_type not in known:
        wanted = ", ".join(map(repr, known))
        raise ValueError(f"prediction_type={shown(prediction_type)} is unknown. Known: {wanted}.")
    dynamic = flag("use_dynamic_shifting")
    warp = next((key for key in (*_WARPS, "use_lu_lambdas") if flag(key)), None)
    first, moved_by = _first_sigma(config, cls, T, shift, warp)
    if reader(values, int)("stages") == 1:
        first = 1.0
    if flag("invert_sigmas"):
        first, moved_by = 1 - cast(float, first), "invert_sigmas"
    return DeclaredFlow(
        class_name=name,
        prediction_type=prediction_type,
        num_train_timesteps=T,
        shift=shift,
        shift_range=_shift_range(values) if dynamic else None,
        first_sigma=first,
        first_timestep=None if first is None else float(int(first * T) if cls.whole else first * T),
        moved_by=moved_by,
        missing=tuple(key for key in cls.defaults if key not in config),
    )


def _first_sigma(
    config: Mapping[str, Any], cls: FlowClass, T: int, shift: float, warp: str | None
) -> tuple[float | None, str | None]:
    """Return u of the first step, and the key that sets it."""
    if warp is not None and cls.flag is not None:
        return None, None  # the solvers warp the noise levels of their betas
    largest = config.get("sigma_max")
    if warp is not None and largest is not None:
        if not is_real(largest) or not 1e-6 <= largest <= 1:
            raise ValueError(f"sigma_max={shown(largest)}: wanted a number of 1 at most.")
        return float(largest), "sigma_max" if largest < 1 else None
    return cls.first_sigma(T, shift), None


def _shift_range(values: Mapping[str, Any]) -> tuple[float, float]:
    """Return the shifts at the smallest and largest image: exp(mu), or mu itself if linear."""
    low, high = values.get("base_shift", 0.5), values.get("max_shift", 1.15)
    for key, value in (("base_shift", low), ("max_shift", high)):
        if not is_real(value) or not abs(value) <= 20:
            raise ValueError(f"{key}={shown(value)}: wanted a number up to 20.")
    if values["time_shift_type"] == "linear":
        return float(low), float(high)
    return math.exp(low), math.exp(high)


def largest_sigma(config: Mapping[str, Any]) -> float | None:
    """Return sigma_max of a config whose process is "exploding" or "continuous".

    None = the config does not say: the class takes it from its betas.

    Raises:
        ValueError: It is not a positive number of moderate size.
    """
    cls = EXPLODING.get(config["_class_name"])
    value = config.get("sigma_max")
    if value is None:
        return None if cls is None else cls.sigma_max
    if cls is None and not any(config.get(key) is True for key in _WARPS):
        return None  # without a warp the class ignores the key
    if not is_real(value) or not 1e-6 <= value <= 1e9:
        raise ValueError(f"sigma_max={shown(value)}: wanted a positive number of moderate size.")
    return float(value)


def starts_of_exploding(
    config: Mapping[str, Any], sigma_max: float, counts: Sequence[int]
) -> dict[int, float]:
    """Return what the network is told at the first step, by step count, as the class counts."""
    cls = EXPLODING.get(config["_class_name"])
    if cls is None:
        return {S: math.log(sigma_max) / 4 for S in counts}
    if cls.num_train_timesteps is not None:
        limit = reader(config, int)("num_train_timesteps") or cls.num_train_timesteps
        counts = [S for S in counts if limit >= S]
    return {S: cls.told(sigma_max, S) for S in counts}
