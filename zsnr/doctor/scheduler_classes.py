"""Verdicts on scheduler classes without a schedule of betas, from a table or from the class."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
from torch import Tensor

from zsnr.doctor.diagnosis import (
    SCALE,
    TRAIN,
    Diagnosis,
    Verdict,
    judge,
    late,
    level_facts,
    schedule_facts,
)
from zsnr.interop.processes import (
    DeclaredFlow,
    declare_flow,
    largest_sigma,
    process_of,
    starts_of_exploding,
)
from zsnr.metrics.brightness import retained_fraction
from zsnr.prediction import PredictionType
from zsnr.schedule import MAX_TIMESTEPS, NoiseSchedule
from zsnr.untrusted import clipped, shown

OUR_TABLE = "this package's table"
NUM_STEPS = (10, 20, 25, 30, 50)
_NEARLY_ALL = 0.999  # of the brightness range: a start that keeps it is called a rounding
_NO_SETTING = (
    "no config setting repairs this, since no sigma_max reaches SNR 0: only training on a schedule "
    "that ends there does, such as v prediction with zero terminal SNR or rectified flow"
)
_NOT_SAID = "cannot be told: SNR = 0 at its first step, but what the network predicts is not said"
_PIPELINES = (
    "diffusers' own set_timesteps(S) applies the shift to its least sigma twice; its pipelines "
    "pass sigmas=linspace(1, 1/S, S) instead, which is zsnr's trailing"
)


def examine_process(
    target: str, kind: str, name: str, config: Mapping[str, Any], num_steps: Sequence[int]
) -> Diagnosis:
    """Judge a config whose class has no schedule of betas in this package's table.

    Args:
        target: The path that was examined.
        kind: Kind of the target.
        name: Name of the config's file.
        config: The config, with the name of its class.
        num_steps: Step counts to examine in addition to the usual ones.

    Raises:
        ValueError: diffusers would not accept a value.
    """
    counts = sorted({*NUM_STEPS, *num_steps})
    match process_of(config):
        case "flow":
            return _examine_flow(target, kind, name, config, counts)
        case "exploding" | "continuous":
            return _examine_exploding(target, kind, config, counts)
        case "tokens":
            reason = "it replaces discrete tokens, which have no SNR"
            return _unknown(target, kind, config, f"cannot be told: {reason}")
        case _:
            return _examine_class(target, kind, config, counts)


def _examine_flow(
    target: str, kind: str, name: str, config: Mapping[str, Any], counts: Sequence[int]
) -> Diagnosis:
    flow = declare_flow(config)
    by, first, starts = OUR_TABLE, flow.first_sigma, dict.fromkeys(counts, flow.first_timestep)
    if first is None:
        measured = _measure(config, counts)
        if isinstance(measured, str):
            return _unknown(target, kind, config, measured)
        by, first, starts = measured.by, measured.sigma, dict(measured.starts)
    assert first is not None
    declared = flow.prediction_type
    prediction = "flow" if declared in (None, "flow_prediction") else declared
    shift: float | str = flow.shift
    settings = {"schedule": {"shift": flow.shift, "num_timesteps": flow.num_train_timesteps}}
    if flow.shift_range is not None:
        low, high = flow.shift_range
        shift, settings = f"by the size of the image, {low:.3g} to {high:.3g}", {}
    facts = {
        "scheduler": flow.class_name,
        "judged_by": by,
        "prediction_type": prediction,
        **settings,
        "shift": shift,
        **level_facts(0.0),
        "first_sigma": first,
        "first_timestep": starts,
        "defaults_taken": list(flow.missing),
    }
    twice = flow.class_name.startswith(("FlowMatch", "LTX")) and flow.shift != 1
    texts = [_PIPELINES] if twice and flow.shift_range is None else []
    verdict, reason, change = _judge_flow(flow, first, prediction, shift)
    if verdict == "fixed":
        texts += _rounding(flow.class_name, first)
    changes = (f"{name}: {change}",) if change else ()
    return Diagnosis(target, kind, verdict, reason, facts, tuple(texts), changes)


def _judge_flow(
    flow: DeclaredFlow, first_sigma: float, prediction: str, shift: float | str
) -> tuple[Verdict, str, str]:
    """Return the verdict, the reason, and what to change in the config."""
    verdict, reason = _judge_start(first_sigma)
    said = f"{shift:g}" if isinstance(shift, float) else shift
    reason = reason.replace("rectified flow", f"rectified flow, shift {said}")
    if verdict == "inconsistent":
        if flow.moved_by is None:
            return verdict, reason, "another class, such as FlowMatchEulerDiscreteScheduler"
        if flow.moved_by != "invert_sigmas":
            return verdict, reason, f'"{flow.moved_by}": 1'
        change = '"invert_sigmas": false, unless the network was trained on reversed time'
        return verdict, f"{reason}, for networks of reversed time (invert_sigmas)", change
    why = {
        "epsilon": "rectified flow with epsilon prediction: eps has no x_0 at T",
        "v_prediction": f"{flow.class_name} converts v as if alpha^2 + sigma^2 were 1 on flow",
    }.get(prediction)
    if why is None:
        return verdict, reason, ""
    change = '"prediction_type": "flow_prediction", if that is what the model predicts'
    return "inconsistent", why, change


def _judge_start(first_sigma: float) -> tuple[Verdict, str]:
    """Judge where rectified flow starts."""
    if _kept(first_sigma) < _NEARLY_ALL:
        return "inconsistent", f"rectified flow, but sampling starts at sigma = {first_sigma:g}"
    return "fixed", f"rectified flow: SNR_T = 0, and sampling starts at sigma = {first_sigma:g}"


def _kept(first_sigma: float) -> float:
    if not 0 < first_sigma <= 1:
        return 0.0
    return retained_fraction((1 / first_sigma - 1) ** 2, SCALE)


def _rounding(class_name: str, first_sigma: float) -> list[str]:
    """Mention a start that is nearly pure noise."""
    if first_sigma == 1:
        return []
    return [
        f"{class_name} starts at sigma = {first_sigma:.7g} instead of 1, which keeps "
        f"{100 * _kept(first_sigma):.2f} % of the brightness range"
    ]


def _examine_exploding(
    target: str, kind: str, config: Mapping[str, Any], counts: Sequence[int]
) -> Diagnosis:
    name, sigma = config["_class_name"], largest_sigma(config)
    if sigma is None:  # from the betas of the class
        measured = _measure(config, counts)
        if isinstance(measured, str):
            return _unknown(target, kind, config, measured)
        sigma, by, starts = measured.sigma, measured.by, measured.starts
    else:
        by, starts = OUR_TABLE, starts_of_exploding(config, sigma, counts)
    continuous = process_of(config) == "continuous"
    what = "continuous noise levels" if continuous else "variance-exploding"
    snr = sigma**-2
    prediction = config.get("prediction_type")
    if not isinstance(prediction, str | None):
        raise ValueError(f"prediction_type={shown(prediction)}: wanted a name.")
    facts = {
        "scheduler": name,
        "judged_by": by,
        "prediction_type": prediction,
        "sigma_max": sigma,
        **level_facts(snr),
        **({"network_is_told": "0.25 log sigma"} if continuous else {}),
        "first_timestep": starts,
    }
    reason = f"{what}: sampling starts at sigma = {sigma:g}, SNR_T = 1 / sigma^2 = {snr:.3g}, not 0"
    warped = continuous and by == OUR_TABLE
    notes = ("its betas are not used, and say nothing about it",) if warped else ()
    return Diagnosis(target, kind, "flawed", reason, facts, notes, (_NO_SETTING,))


@dataclass(frozen=True)
class _Measured:
    """What an instance of a class of diffusers says about its first step.

    Args:
        by: The class and the version of diffusers.
        alpha: Scale of x_0 at the noisiest step.
        sigma: Scale of eps there.
        starts: The noisiest timestep by step count.
        schedule: The table of a variance-preserving class.
        prediction_type: What the network predicts, if the class says.
        shift: The shift of rectified flow, if it is that.
    """

    by: str
    alpha: float
    sigma: float
    starts: Mapping[int, float]
    schedule: NoiseSchedule | None = None
    prediction_type: PredictionType | None = None
    shift: float | None = None
    notes: tuple[str, ...] = field(default=())


def _examine_class(
    target: str, kind: str, config: Mapping[str, Any], counts: Sequence[int]
) -> Diagnosis:
    measured = _measure(config, counts)
    if isinstance(measured, str):
        return _unknown(target, kind, config, measured)
    schedule, prediction = measured.schedule, measured.prediction_type
    if not abs(measured.alpha) < 1e6 * measured.sigma:  # nor of NaN
        reason = "cannot be told: the noise of its first step is not a number, or next to none"
        return _unknown(target, kind, config, reason)
    snr = (measured.alpha / measured.sigma) ** 2
    notes, changes = list(measured.notes), list[str]()
    verdict: Verdict
    if schedule is not None:
        known = prediction or ("epsilon" if snr else None)
        if known is None:
            verdict, reason = "unknown", _NOT_SAID
        else:
            verdict, reason = judge(schedule, known, measured.starts, None)
        if verdict == "flawed" and (missed := late(measured.starts, schedule.num_timesteps)):
            notes.append(f"sampling does not start at T: {missed}")
    elif snr and prediction == "flow":
        verdict, reason = _judge_start(measured.sigma)
        notes += _rounding(config["_class_name"], measured.sigma) if verdict == "fixed" else []
    elif snr:
        verdict, reason = "flawed", f"its first step keeps signal: SNR = {snr:.3g}"
    elif prediction is None:
        verdict, reason = "unknown", _NOT_SAID
    else:
        verdict = "fixed"
        reason = f"SNR = 0 at its first step, {prediction}"
    if verdict == "flawed":
        exploding = schedule is None and measured.alpha == 1
        changes.append(_NO_SETTING if exploding else TRAIN)
    elif verdict == "inconsistent":
        changes.append("another scheduler class, whose first step is pure noise")
    facts = {
        "scheduler": config["_class_name"],
        "judged_by": measured.by,
        "prediction_type": prediction,
        **({} if measured.shift is None else {"shift": measured.shift}),
        **(level_facts(snr) if schedule is None else schedule_facts(schedule)),
        "first_timestep": dict(measured.starts),
    }
    return Diagnosis(target, kind, verdict, reason, facts, tuple(notes), tuple(changes))


def _unknown(target: str, kind: str, config: Mapping[str, Any], reason: str) -> Diagnosis:
    by = OUR_TABLE if process_of(config) == "tokens" else _diffusers()
    facts = {"scheduler": clipped(config["_class_name"], 100), "judged_by": by}
    return Diagnosis(target, kind, "unknown", reason, facts)


def _diffusers() -> str:
    import diffusers

    return f"diffusers {diffusers.__version__}"


def _measure(config: Mapping[str, Any], counts: Iterable[int]) -> _Measured | str:
    """Ask the class of the installed diffusers; a text says why it cannot be told."""
    name = config["_class_name"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _instance(config)
        if isinstance(made, str):
            return made
        try:
            starts, grid = _starts(made, name, counts)
            return _measured(made, name, config, starts, grid)
        except Exception as error:  # any class of diffusers, with any config
            return f"cannot be told: {name} of {_diffusers()} fails with {_brief(error)}"


def _instance(config: Mapping[str, Any]) -> Any:
    """Build the scheduler, of classes of the installed diffusers only; a text says why not."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    name, version = config["_class_name"], _diffusers()
    try:
        cls = getattr(diffusers.schedulers, name) if name.isidentifier() else None
    except (AttributeError, ImportError):
        cls = None
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        return (
            f"cannot be told: {version}, which is installed, has no scheduler class {shown(name)}"
        )
    if cls is SchedulerMixin:
        return f"cannot be told: {name} is the base of diffusers' schedulers, and has no schedule"
    large = next((key for key, value in config.items() if not _is_moderate(value)), None)
    if large is not None:
        return f"cannot be told: {clipped(str(large), 60)}={shown(config[large])} is too large"
    parameters = inspect.signature(cls).parameters
    needed = [
        key
        for key, each in parameters.items()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    lacking = [key for key in needed if key not in config]
    if lacking:
        return f"cannot be told: {name} needs {', '.join(lacking)}, which the config lacks"
    try:
        known = {key: value for key, value in config.items() if key in parameters}
        return cast(Any, cls).from_config(known)
    except Exception as error:  # any class of diffusers, with any config
        return f"cannot be told: {name} of {version} refuses the config: {_brief(error)}"


def _is_moderate(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= MAX_TIMESTEPS and all(map(_is_moderate, value))
    if isinstance(value, int):
        return abs(value) <= MAX_TIMESTEPS
    return True


def _starts(scheduler: Any, name: str, counts: Iterable[int]) -> tuple[dict[int, float], Tensor]:
    """Return the noisiest timestep by step count, and the last grid."""
    starts, error = dict[int, float](), None
    for tried in (counts, (2,)):  # some classes support few step counts
        for S in tried:
            try:
                scheduler.set_timesteps(S)
            except Exception as refused:
                error = refused
                continue
            grid = torch.as_tensor(scheduler.timesteps)
            starts[S] = float(grid.max() if _inverse(name) else grid[0])
        if starts:
            return starts, grid
    raise ValueError(str(error)) from error


def _inverse(name: str) -> bool:
    """Whether a class runs from images to noise."""
    return "Inverse" in name


def _measured(
    scheduler: Any,
    name: str,
    config: Mapping[str, Any],
    starts: dict[int, float],
    grid: Tensor,
) -> _Measured | str:
    by = f"{_diffusers()}'s class"
    declared = getattr(scheduler.config, "prediction_type", None)
    prediction: PredictionType | None = declared if declared in get_args(PredictionType) else None
    notes = ("it runs from images to noise: its last timestep is shown",) * _inverse(name)
    sigmas = getattr(scheduler, "sigmas", None)
    table = getattr(scheduler, "alphas_cumprod", None)
    match name:
        case "IPNDMScheduler":  # its betas are sigma_t, its alphas alpha_t; it steps with v
            scales = float(scheduler.alphas[0]), float(scheduler.betas[0])
            return _Measured(by, *scales, starts, None, "v_prediction")
        case "SCMScheduler":  # TrigFlow: x_t = cos(t) x_0 + sin(t) eps, and the network predicts v
            t = min(max(starts.values()), math.pi / 2)
            alpha = 0.0 if t == math.pi / 2 else math.cos(t)
            return _Measured(by, alpha, math.sin(t), starts, None, "v_prediction")
        case "ScoreSdeVpScheduler":  # continuous betas, integrated up to t = 1
            alpha = math.exp(-(scheduler.config.beta_min + scheduler.config.beta_max) / 4)
            return _Measured(by, alpha, math.sqrt(1 - alpha**2), starts, None, "epsilon")
        case "RePaintScheduler":  # it has no other prediction type
            prediction = "epsilon"
    in_betas = table is not None and not config.get("use_flow_sigmas")
    if in_betas and process_of(config) == "betas":
        schedule = NoiseSchedule.from_alphas_cumprod(torch.as_tensor(table).double())
        alpha, sigma = schedule(schedule.num_timesteps - 1)
        return _Measured(by, alpha, sigma, starts, schedule, prediction, notes=notes)
    shift = getattr(scheduler.config, "shift", None)
    if table is None and (noised := list(_noised(scheduler, grid))):
        if all(math.isclose(alpha + sigma, 1, abs_tol=1e-5) for alpha, sigma in noised):
            return _Measured(by, *noised[0], starts, None, "flow", shift, notes)
        return _Measured(by, *noised[0], starts, None, prediction, notes=notes)
    if sigmas is not None:
        sigma = float(torch.as_tensor(sigmas).max())
        if sigma <= 1:
            return _Measured(by, 1 - sigma, sigma, starts, None, "flow", shift, notes)
        return _Measured(by, 1.0, sigma, starts, None, prediction, notes=notes)
    return f"cannot be told: {name} has neither a table of noise levels nor a way to add noise"


def _noised(scheduler: Any, grid: Tensor) -> Iterator[tuple[float, float]]:
    """Noise data with the class at the first and at a middle timestep: yield (alpha, sigma)."""
    add = getattr(scheduler, "scale_noise", None) or getattr(scheduler, "add_noise", None)
    if add is None:
        return
    one, none = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    for t in (grid[:1], grid[len(grid) // 2 : len(grid) // 2 + 1]):
        names = list(inspect.signature(add).parameters)
        data, noise, time = (
            next(name for name in names if part in name) for part in ("sample", "noise", "time")
        )
        yield (
            float(add(**{data: one, noise: none, time: t}).item()),
            float(add(**{data: none, noise: one, time: t}).item()),
        )


def _brief(error: BaseException) -> str:
    return clipped(" ".join(str(error).split()), 200) or type(error).__name__
