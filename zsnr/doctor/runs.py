"""Verdicts on this package's checkpoints and YAML, and on files beside the original code's YAML."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

from zsnr.checkpoints.run_facts import FORMAT, NAME
from zsnr.doctor.diagnosis import TRAIN, Diagnosis, judge, late, schedule_facts
from zsnr.doctor.schedulers import step_counts
from zsnr.guidance import Guidance
from zsnr.interop.ldm_yaml import LdmYaml, declared_by, is_ldm, read_beside
from zsnr.loss import LossWeighting
from zsnr.prediction import PredictionType
from zsnr.samplers import get_sampler, recommend_sampling
from zsnr.samplers.recommend import AUTO, resolve_sampling
from zsnr.sampling import Sampling, describe_sampling, recorded_guidance
from zsnr.schedule import NoiseSchedule, RectifiedFlow, Schedule
from zsnr.timestep_law import MIN_TERMINAL_SHARE, TimestepLaw
from zsnr.timesteps import check_timesteps, get_timesteps, is_grid_file
from zsnr.untrusted import check_inside, clipped, open_regular, read_json, read_yaml, shown

DEFAULT_SAMPLING = describe_sampling(Sampling())
RENAMED_KEYS = {"model.unet": "model.network"}
"""Settings that had another name in earlier versions."""
# The cost of spacings that leave out noise levels next to SNR 0: the spread of the brightness of
# 64x64 images at 5 to 10 steps (5 to 25 for beta), with DDIM and DPM-Solver++ 2M.
_LATE_LEVELS = (
    "was made for schedules that end at SNR > 0: 2 to 8 times the brightness error of log_snr at "
    "few steps, measured without guidance"
)
_COMPARED_SPACINGS = {
    "ays": _LATE_LEVELS,
    "kl_optimal": _LATE_LEVELS,
    "beta": "was not made for zero SNR: 1.3 to 7 times the brightness error of log_snr at few "
    "steps, measured without guidance",
}
_SHOWN_GUIDANCE = ("guidance_method", "guidance_against", "guidance_curve", "guidance_interval")


def examine_checkpoint(
    target: str, path: Path, num_steps: Sequence[int], open_pickle: bool
) -> Diagnosis:
    folder = path.resolve().parent
    facts = folder / NAME
    if facts.exists():
        check_inside(facts, folder)
        return examine_run(target, facts, read_json(facts), num_steps)
    beside = None if path.is_dir() else read_beside(path)
    if beside is not None:
        return _examine_beside(target, path, beside)
    if not open_pickle:
        raise ValueError(
            f"{path} has no {NAME} beside it, which training writes. Use --open to read the "
            "checkpoint itself (tensors and plain values only)."
        )
    return examine_run(target, path, _open(path), num_steps)


def _examine_beside(target: str, path: Path, beside: LdmYaml) -> Diagnosis:
    """Judge a .ckpt of another program by the YAML beside it, without reading it."""
    with open_regular(path):
        pass  # it is a regular file
    schedule, T = beside.schedule, beside.schedule.num_timesteps
    verdict, reason = judge(schedule, beside.prediction_type, {}, None)
    facts = {"prediction_type": beside.prediction_type, **schedule_facts(schedule)}
    facts["schedule_from"] = beside.path.name
    start = f"a single file stores no spacing: start at t = {T - 1} (trailing)"
    changes = () if verdict == "fixed" else (TRAIN,)
    return Diagnosis(target, "checkpoint and YAML", verdict, reason, facts, (start,), changes)


def _open(path: Path) -> dict[str, Any]:
    """Read the description in a checkpoint."""
    from zsnr.checkpoints.checkpoint_file import KEY, open_checkpoint
    from zsnr.checkpoints.sharded import is_sharded, read_rest
    from zsnr.checkpoints.snapshots import refuse_snapshot

    checkpoint = read_rest(path) if is_sharded(path) else open_checkpoint(path)
    refuse_snapshot(path, checkpoint)
    run, model = checkpoint.get("run"), checkpoint.get(KEY)
    if isinstance(run, dict):
        return run
    if not isinstance(model, dict):
        raise ValueError(f"{path} was not written by zsnr: it has no {KEY!r} entry.")
    return {"format": FORMAT, **{key: model.get(key) for key in ("schedule", "prediction_type")}}


def examine_run(
    target: str, path: Path, run: Mapping[str, Any], num_steps: Sequence[int]
) -> Diagnosis:
    if run.get("format") != FORMAT:
        raise ValueError(f"{path} is not a {NAME} of format {FORMAT}, which this version reads.")
    if run.get("schedule") is None:
        raise ValueError(f"{path} does not record the run's schedule.")
    notes = []
    if run.get("sampling") is None:
        notes.append("it does not record sampling settings: the package's defaults are assumed")
    sampling = _block(path, "sampling", run.get("sampling"))
    _check_guidance(f"{path}: sampling", recorded_guidance(sampling))
    diagnosis = _examine_training(
        target,
        "zsnr checkpoint",
        f"{path.name}: ",
        schedule=_schedule(path, "schedule", run["schedule"]),
        prediction_type=run.get("prediction_type", "v_prediction"),
        loss=_built(path, "loss", LossWeighting, run.get("loss")),
        law=_built(path, "timestep_law", TimestepLaw, run.get("timestep_law")),
        sampling=sampling,
        num_steps=num_steps,
    )
    facts = {
        key: run[key]
        for key in ("zsnr_version", "global_step", "image_size", "offset_noise")
        if _is_plain_number(run.get(key)) or (isinstance(run.get(key), str) and len(run[key]) < 40)
    }
    facts |= diagnosis.facts
    return replace(diagnosis, facts=facts, warnings=(*diagnosis.warnings, *notes))


def examine_yaml(target: str, path: Path, num_steps: Sequence[int]) -> Diagnosis:
    document = read_yaml(path)
    if is_ldm(document):
        yaml = declared_by(path, document)
        raise ValueError(
            f"{path} is a config of the original latent diffusion code ({yaml.prediction_type}, "
            f"betas {yaml.schedule.betas!r}, {yaml.schedule.num_timesteps} timesteps), which "
            "describes a single file of the same name beside it: pass that file instead."
        )
    block = document.get("model") if isinstance(document, dict) else None
    model = _init_args(block)
    if not isinstance(block, dict) or not isinstance(model, dict):
        raise ValueError(f"{path} has no `model:` block: wanted a YAML of `zsnr fit`.")
    if "class_path" not in block:  # another class has other parameters
        _check_keys(path, "model", model, model_settings())
    sampling = _block(path, "model.sampling", _init_args(model.get("sampling")))
    _check_keys(path, "model.sampling", sampling, [*inspect.signature(Sampling).parameters])
    guidance = _block(path, "model.sampling.guidance", _init_args(sampling.get("guidance")))
    options = [option.name for option in fields(Guidance)]
    _check_keys(path, "model.sampling.guidance", guidance, options)
    guides = _check_guidance(f"{path}: model.sampling.guidance", guidance)
    guidance_settings = {f"guidance_{key}": value for key, value in guidance.items()}
    sampler, spacing = sampling.get("sampler", AUTO), sampling.get("spacing", AUTO)
    if isinstance(sampler, dict):
        sampler = sampler.get("class_path")
    if isinstance(sampler, str) and "." not in sampler and sampler.islower() and sampler != AUTO:
        get_sampler(sampler)  # an unknown name is refused
    elif not isinstance(sampler, str):
        raise ValueError(f"{path}: model.sampling.sampler is {shown(sampler)}: wanted a sampler.")
    S = sampling.get("num_steps", DEFAULT_SAMPLING["num_steps"])
    if isinstance(spacing, str) and type(S) is int and S > 0:  # else it is refused later
        sampler, spacing = resolve_sampling(sampler, spacing, S, guides)
    return _examine_training(
        target,
        "zsnr YAML",
        f"{path.name}: ",
        schedule=_schedule(path, "model.schedule", model.get("schedule")),
        prediction_type=model.get("prediction_type", "v_prediction"),
        loss=_built(path, "model.loss", LossWeighting, model.get("loss")),
        law=_built(path, "model.timestep_law", TimestepLaw, model.get("timestep_law")),
        sampling={**guidance_settings, "sampler": sampler, "num_steps": S, "spacing": spacing},
        num_steps=num_steps,
    )


def _examine_training(
    target: str,
    kind: str,
    where: str,
    *,
    schedule: Schedule,
    prediction_type: Any,
    loss: LossWeighting,
    law: TimestepLaw,
    sampling: Mapping[str, Any],
    num_steps: Sequence[int],
) -> Diagnosis:
    """Judge a run of this package, with exact grids and one schedule."""
    if prediction_type not in get_args(PredictionType):
        known = ", ".join(map(repr, get_args(PredictionType)))
        raise ValueError(f"prediction_type={shown(prediction_type)} is unknown. Known: {known}.")
    prediction_type = cast(PredictionType, prediction_type)
    settings = {**DEFAULT_SAMPLING, **sampling}
    T, spacing, S = schedule.num_timesteps, settings["spacing"], settings["num_steps"]
    if type(S) is not int or not 1 <= S <= T:
        raise ValueError(f"num_steps={shown(S)}: wanted 1 to {T}.")
    if not isinstance(spacing, str):
        raise ValueError(f"spacing={shown(spacing)}: wanted a name.")
    custom_grid = settings.get("timesteps") if is_grid_file(spacing) else None
    if custom_grid is None:
        counts = [S] if is_grid_file(spacing) else step_counts(T, (S, *num_steps), None)
        starts = {n: int(get_timesteps(spacing, n, T, schedule=schedule)[0]) for n in counts}
    elif isinstance(custom_grid, list) and len(custom_grid) == S:
        starts = {S: check_timesteps(custom_grid, T)[0]}
    else:
        raise ValueError(f"sampling.timesteps={shown(custom_grid)}: wanted a list of {S}.")
    verdict, reason = judge(schedule, prediction_type, starts, None)
    # What a checkpoint records is no file to edit: a run with another config replaces it.
    edited = "the config of a new run: model." if kind == "zsnr checkpoint" else where
    zero = float(schedule.snr[-1]) == 0
    warnings, changes = [], []
    facts: dict[str, Any] = {
        "prediction_type": prediction_type,
        **schedule_facts(schedule),
        "sampler": settings["sampler"] if isinstance(settings["sampler"], str) else None,
        "timestep_spacing": spacing,
        "first_timestep": starts,
        "num_steps": S,
        "loss_weighting": loss.name,
    }
    if not (zero and prediction_type == "epsilon"):
        table = replace(loss, allow_zero_terminal_weight=True).table(schedule, prediction_type)
        share = float(table[-1] / table.mean())
        if loss.name == "learned":
            share = loss.min_terminal_share
        if not (table.isfinite().all() and math.isfinite(share)):
            raise ValueError(f"loss weighting {loss.name!r} has weights that are not finite.")
        facts["terminal_loss_weight"] = share
        if share < 0.01 or loss.starves_the_end(schedule):
            gives = "may give" if loss.name == "learned" else "gives"
            warnings.append(
                f"loss weighting {loss.name!r} {gives} the last timestep {share:.2g} of the mean "
                "weight: the model barely learns to start from pure noise"
            )
            changes.append(f"{where}loss.name: uniform")
    if law.name != "uniform":
        visits = law.terminal_share(T)
        facts |= {"timestep_law": law.name, "terminal_visits": visits}
        if visits < MIN_TERMINAL_SHARE:
            warnings.append(
                f"timestep law {law.name!r} visits the last timestep {visits:.2g} times as often "
                "as 'uniform': the model barely learns to start from pure noise"
            )
            changes.append(f"{edited}timestep_law.name: uniform")
    for key in ("guidance_scale", "guidance_rescale"):
        value = settings[key]
        if not _is_plain_number(value):
            raise ValueError(f"{key}={shown(value)}: wanted a number.")
        facts[key] = value
    facts |= {key: settings[key] for key in _SHOWN_GUIDANCE if settings.get(key) is not None}
    guidance = _check_guidance(f"{where}guidance", recorded_guidance(settings))
    unanswered = guidance.method == "cfg" and guidance.threshold is None
    if zero and unanswered and guidance.rescale == 0 and max(guidance.scales) > 1:
        warnings.append("guidance without rescale over-exposes at zero SNR: rescale 0.7 is usual")
    if zero and spacing in _COMPARED_SPACINGS:
        warnings.append(f"timestep spacing {spacing!r} {_COMPARED_SPACINGS[spacing]}")
        changes.append(f"{where}sampling.spacing: {recommend_sampling(S, guidance)[1]}")
    if verdict == "inconsistent" and prediction_type == "epsilon":
        changes.insert(0, f"{edited}prediction_type: v_prediction, and train with it")
    elif verdict == "inconsistent":
        changes.insert(0, f"{where}sampling.spacing: trailing")
    elif verdict == "flawed":
        if late(starts, T):
            warnings.insert(0, f"sampling does not start at T: {late(starts, T)}")
        correction = "schedule.zero_terminal_snr: true"
        if prediction_type == "epsilon":
            correction += " with prediction_type: v_prediction"
        if late(starts, T):
            correction += " and sampling.spacing: trailing"
        changes.insert(0, f"{edited}{correction}, and train anew")
    return Diagnosis(target, kind, verdict, reason, facts, tuple(warnings), tuple(changes))


def _schedule(path: Path, name: str, settings: Any) -> NoiseSchedule | RectifiedFlow:
    """Build the schedule that settings in a file describe: a RectifiedFlow by its class or shift.

    Raises:
        ValueError: The settings are not valid, or name another class.
    """
    classes = {cls.__name__: cls for cls in (NoiseSchedule, RectifiedFlow)}
    options = _block(path, name, _init_args(settings))
    cls: type[Any] = RectifiedFlow if "shift" in options else NoiseSchedule
    if isinstance(settings, dict) and "class_path" in settings:
        stated = str(settings["class_path"]).removeprefix("zsnr.schedule.").removeprefix("zsnr.")
        if stated not in classes:
            raise ValueError(
                f"{path}: {name} is a {shown(settings['class_path'])}, whose SNR cannot be told "
                f"without running it. Known: {', '.join(classes)}."
            )
        cls = classes[stated]
    return cast(NoiseSchedule | RectifiedFlow, _built(path, name, cls, options))


def _built(path: Path, name: str, cls: type[Any], settings: Any) -> Any:
    """Build a frozen dataclass, such as a schedule, from settings in a file."""
    options = _block(path, name, _init_args(settings))
    plain = (str, int, float, bool, type(None))
    for key, value in options.items():
        if key != "alphas_cumprod_table" and not isinstance(value, plain):
            raise ValueError(f"{path}: {name}.{clipped(str(key))} is {shown(value)}.")
        if isinstance(value, int) and abs(value) > 2**63:
            raise ValueError(f"{path}: {name}.{clipped(str(key))} is {shown(value)}.")
    try:
        return cls(**options)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        reason = str(error).replace(f"{cls.__name__}.__init__() ", "")
        raise ValueError(f"{path}: {name}: {clipped(reason, 300)}") from error


def _check_guidance(where: str, settings: Mapping[str, Any]) -> Guidance:
    """Build guidance, as sampling does.

    Raises:
        ValueError: A setting is unknown or out of range.
    """
    try:
        return Guidance(**settings)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {clipped(str(error), 300)}") from error


def _is_plain_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**63


def _block(path: Path, name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{path}: {name} is {shown(value)}: wanted settings by name.")
    return value


@cache
def model_settings() -> tuple[str, ...]:
    """Return the names of LatentDiffusion's settings, read from its source.

    Without them, a typo would be judged as the default; importing the class imports Lightning.
    """
    source = Path(__file__).parents[1] / "training" / "module.py"
    [init] = [
        function
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "LatentDiffusion"
        for function in node.body
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
    ]
    return tuple(argument.arg for argument in init.args.args[1:])


def _check_keys(path: Path, name: str, settings: Mapping[Any, Any], known: Sequence[str]) -> None:
    """Refuse settings that training would refuse.

    Raises:
        ValueError: A setting is unknown.
    """
    for key in settings:
        new_name = RENAMED_KEYS.get(f"{name}.{key}")
        if new_name is not None:
            raise ValueError(f"{path}: {name}.{key} is now {new_name}.")
        if key not in known:
            raise ValueError(f"{path}: {name} has no {shown(key)}. Known: {', '.join(known)}.")


def _init_args(value: Any) -> Any:
    """Return init_args of {class_path, init_args}, and any other value unchanged."""
    if isinstance(value, dict) and "class_path" in value:
        return value.get("init_args")
    return value
