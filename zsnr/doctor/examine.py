"""Diagnosis of a model from its small files, without loading it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast, get_args

from zsnr.checkpoints.run_facts import FORMAT, NAME
from zsnr.doctor.diagnosis import TRAIN, Diagnosis, Verdict, judge, late, schedule_facts
from zsnr.doctor.recipes import examine_recipe, read_settings
from zsnr.doctor.single_file import examine_single
from zsnr.files import replacing
from zsnr.guidance import Guidance
from zsnr.interop.declarations import FAMILIES
from zsnr.interop.declared import (
    Declared,
    declare,
    first_timestep,
    index_class,
    longer_grids,
    off_grid_steps,
    with_class_of,
)
from zsnr.interop.ldm_yaml import LdmYaml, declared_by, is_ldm, read_beside
from zsnr.loss import LossWeighting
from zsnr.prediction import PredictionType
from zsnr.samplers import get_sampler, recommend_sampling
from zsnr.samplers.recommend import AUTO, resolve_sampling
from zsnr.sampling import recorded_guidance
from zsnr.schedule import MAX_TIMESTEPS, NoiseSchedule
from zsnr.timesteps import check_timesteps, get_timesteps, is_grid_file
from zsnr.untrusted import clipped, open_regular, read_json, read_yaml, shown

NUM_STEPS = (10, 20, 25, 30, 50)
DEFAULT_SAMPLING = {
    "sampler": "ddim",
    "num_steps": 50,
    "spacing": "trailing",
    "guidance_scale": Guidance().scale,
    "guidance_rescale": Guidance().rescale,
    "guidance_interval": Guidance().interval,
}
# Parameters of LatentDiffusion and Sampling: without them, a typo would be judged as the default.
MODEL_KEYS = (
    *("codec", "conditioner", "unet", "schedule", "prediction_type", "loss", "caption_dropout"),
    *("offset_noise", "optimizer", "learning_rate", "ema", "sampling", "gradient_checkpointing"),
    *("compile", "max_skipped_steps", "image_size", "seed", "lora", "terminal_window"),
    "tf32",
)
SAMPLING_KEYS = ("num_steps", "spacing", "sampler", "guidance")
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
_CONFIG = "scheduler_config.json"
_FIXED = "scheduler_config.fixed.json"


def examine(
    target: str | Path, *, num_steps: Sequence[int] = (), open_pickle: bool = False
) -> Diagnosis:
    """Diagnose a target; loads no weights and executes none of its code.

    Args:
        target: A diffusers folder, a scheduler_config.json, a .safetensors file, a checkpoint
            or folder of checkpoints of this package, also in object storage, a YAML of
            `zsnr fit`, or the settings of another trainer (TOML, JSON or a script with its command
            line).
        num_steps: Step counts to examine in addition to the usual ones.
        open_pickle: Open a checkpoint without run.json; reads tensors and plain values only.

    Returns:
        A diagnosis; its verdict is "unreadable" if the target cannot be read.
    """
    from zsnr.checkpoints.remote import fetch_checkpoint, is_address

    try:
        remote = is_address(target)
        path = fetch_checkpoint(str(target)) if remote else Path(target).expanduser()
        return _examine(str(target), path, num_steps, open_pickle)
    except (ValueError, OSError, RuntimeError, RecursionError) as error:
        reason = clipped(str(error), 600) or type(error).__name__
        return Diagnosis(str(target), "unreadable", "unreadable", reason)


def fix(target: str | Path, *, in_place: bool = False) -> list[str]:
    """Write a corrected scheduler config beside a folder's config, or in its place.

    A config can only restore the zero SNR that a scheduler loses for a v or sample model. A model
    that predicts eps, or was not trained at zero SNR, must be trained.

    Args:
        target: A diffusers folder or a scheduler_config.json.
        in_place: Replace the config, instead of writing scheduler_config.fixed.json.

    Returns:
        What was done, and what remains to be done.

    Raises:
        ValueError: A config cannot repair the model, or the output file exists.
    """
    path = Path(target).expanduser()
    diagnosis = examine(path)
    if diagnosis.verdict == "fixed":
        return ["Nothing to fix."]
    if diagnosis.exit_code == 3:
        raise ValueError(diagnosis.reason)
    if diagnosis.kind not in ("diffusers folder", "scheduler config"):
        raise ValueError(
            f"--fix writes scheduler configs, and {path} is a {diagnosis.kind}. "
            f"{'; '.join(diagnosis.changes)}."
        )
    if diagnosis.facts["prediction_type"] == "epsilon":
        raise ValueError(
            "The config declares epsilon, and no config turns an epsilon model into a v model. "
            + "; ".join(diagnosis.changes)
            + "."
        )
    index, config_path = _scheduler_files(path)
    config = read_json(config_path)
    named = None if index is None else index_class(read_json(index))
    if named is not None:
        config["_class_name"] = named
    fixed = _fixed(config)
    class_name = fixed["_class_name"]
    output = config_path if in_place else config_path.with_name(_FIXED)
    if output.exists() and not in_place:
        raise ValueError(f"{output} exists: move it away, or use --in-place.")
    _write_json(output, fixed)
    report = [f"Wrote {output}."]
    if index is not None and class_name != named:
        if in_place:
            _write_json(index, {**read_json(index), "scheduler": ["diffusers", class_name]})
            report.append(f"Wrote {index}.")
        else:
            report.append(f'{index} must say "scheduler": ["diffusers", "{class_name}"].')
    if diagnosis.facts["snr_T"] != 0 and config.get("rescale_betas_zero_snr") is not True:
        report.append(
            "Correct only if the model was trained on the rescaled schedule. If not, " + TRAIN
        )
    return report


def _examine(target: str, path: Path, num_steps: Sequence[int], open_pickle: bool) -> Diagnosis:
    for S in num_steps:
        if not 1 <= S <= MAX_TIMESTEPS:
            raise ValueError(f"num_steps={S}: wanted 1 to {MAX_TIMESTEPS}.")
    if not path.exists():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", target):
            hint = (
                " The doctor reads local files only: for a model on the hub, first download "
                f"model_index.json and scheduler/{_CONFIG}."
            )
        raise ValueError(f"{clipped(target)}: no such file or folder.{hint}")
    if path.is_dir():
        return _examine_folder(target, path, num_steps, open_pickle)
    suffix = path.suffix.lower()
    if path.name == "model_index.json":
        return _examine_diffusers(target, path.absolute().parent, num_steps)
    if path.name == NAME:
        return _examine_run(target, path, read_json(path), num_steps)
    match suffix:
        case ".json" | ".toml" | ".sh" | ".bat" | ".ps1" | ".txt" if (
            settings := read_settings(path)
        ) is not None:
            return examine_recipe(target, settings)
        case ".json":
            return _examine_config(target, "scheduler config", path, read_json(path), num_steps)
        case ".safetensors":
            return examine_single(target, path)
        case ".yaml" | ".yml":
            return _examine_yaml(target, path, num_steps)
        case ".ckpt":
            return _examine_checkpoint(target, path, num_steps, open_pickle)
    raise ValueError(
        f"{path} is not supported: wanted a diffusers folder, a {_CONFIG}, a .safetensors "
        "file, a .ckpt of this package, a YAML of `zsnr fit`, or the settings of a trainer (TOML, "
        "JSON or a command line)."
    )


def _examine_folder(
    target: str, path: Path, num_steps: Sequence[int], open_pickle: bool
) -> Diagnosis:
    from zsnr.checkpoints.run_folder import checkpoints_of
    from zsnr.checkpoints.sharded import is_sharded

    if (path / "model_index.json").exists():
        return _examine_diffusers(target, path, num_steps)
    for facts in (path / "checkpoints" / NAME, path / NAME):
        if facts.exists():
            _check_inside(facts, path)
            return _examine_run(target, facts, read_json(facts), num_steps)
    if is_sharded(path):
        return _examine_checkpoint(target, path, num_steps, open_pickle)
    checkpoints = checkpoints_of(path)
    if checkpoints:
        _check_inside(checkpoints[-1], path)
        return _examine_checkpoint(target, checkpoints[-1], num_steps, open_pickle)
    if (path / _CONFIG).exists():
        _check_inside(path / _CONFIG, path)
        config = read_json(path / _CONFIG)
        return _examine_config(target, "scheduler config", path / _CONFIG, config, num_steps)
    raise ValueError(
        f"{path} holds no model_index.json (of diffusers), {NAME} or checkpoint (of this package) "
        f"or {_CONFIG}."
    )


# Folders and configs of diffusers


def _scheduler_files(path: Path) -> tuple[Path | None, Path]:
    """Return model_index.json, if it exists, and the scheduler's config; both inside the folder."""
    if path.name == "model_index.json":
        path = path.absolute().parent
    if not path.is_dir():
        return None, path
    if not (path / "model_index.json").exists():
        _check_inside(path / _CONFIG, path)
        return None, path / _CONFIG
    index, config = path / "model_index.json", path / "scheduler" / _CONFIG
    for file in (index, config):
        _check_inside(file, path)
    return index, config


def _check_inside(file: Path, folder: Path) -> None:
    """Check that a file is in the folder, or in the blob store of the folder's hub cache.

    Raises:
        ValueError: The file is a link to another place.
    """
    real, home = file.resolve(), folder.resolve()
    snapshots = (above.parent / "blobs" for above in home.parents if above.name == "snapshots")
    if not any(real.is_relative_to(place) for place in (home, *snapshots)):
        raise ValueError(f"{file} is a link out of {folder}: wanted a file inside the folder.")


def _examine_diffusers(target: str, folder: Path, num_steps: Sequence[int]) -> Diagnosis:
    index_path, path = _scheduler_files(folder)
    assert index_path is not None
    index, config = read_json(index_path), read_json(path)
    facts: dict[str, Any] = {}
    warnings = []
    named, config_class = index_class(index), config.get("_class_name")
    config = with_class_of(index, config)
    if named is not None and config_class is not None and config_class != named:
        warnings.append(
            f"model_index.json names {shown(named)}, {_CONFIG} {shown(config_class)}: "
            "diffusers uses the first."
        )
    unet = folder / "unet" / "config.json"
    if unet.exists():
        _check_inside(unet, folder)
        facts["model"] = _unet_facts(read_json(unet))
    diagnosis = _examine_config(target, "diffusers folder", path, config, num_steps)
    changes = [
        f"scheduler/{line}" if line.startswith(_CONFIG) else line for line in diagnosis.changes
    ]
    for i, line in enumerate(changes):
        if "_class_name" in line and named is not None:
            fixed_class = _fixed(config)["_class_name"]
            changes[i : i + 1] = [f'model_index.json: "scheduler": ["diffusers", "{fixed_class}"]']
            changes += [line] if config_class != fixed_class else []
            break
    return replace(
        diagnosis,
        facts={**facts, **diagnosis.facts},
        warnings=(*warnings, *diagnosis.warnings),
        changes=tuple(changes),
    )


def _unet_facts(config: Mapping[str, Any]) -> str:
    width, size = config.get("cross_attention_dim"), config.get("sample_size")
    family = FAMILIES.get(width) if isinstance(width, int) else None
    parts = [family or "UNet"]
    if isinstance(width, int) and 0 < width < 10**6:
        parts.append(f"context of {width}")
    if isinstance(size, int) and 0 < size < 10**6:
        parts.append(f"latents of {size}x{size}")
    return ", ".join(parts)


def _examine_config(
    target: str, kind: str, path: Path, config: Mapping[str, Any], num_steps: Sequence[int]
) -> Diagnosis:
    recognized = {"_class_name", "beta_schedule", "trained_betas", "prediction_type", "beta_start"}
    if not recognized & set(config):
        raise ValueError(
            f"{path} is not a scheduler config: it has none of {', '.join(sorted(recognized))}."
        )
    try:
        declared = declare(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    schedule, T = declared.schedule, declared.num_train_timesteps
    starts = {S: first_timestep(declared, S) for S in _step_counts(T, num_steps, declared)}
    zero = float(schedule.snr[-1]) == 0
    lacking = None
    if schedule.num_timesteps != T:
        lacking = f"trained_betas has {schedule.num_timesteps} entries, num_train_timesteps is {T}"
    elif declared.drops_rescale and not zero:
        lacking = f"{declared.class_name} drops rescale_betas_zero_snr"
    verdict, reason = judge(schedule, declared.prediction_type, starts, lacking)
    facts = {
        "scheduler": declared.class_name,
        "prediction_type": declared.prediction_type,
        **schedule_facts(schedule),
        "timestep_spacing": _spacing_name(declared),
        "first_timestep": starts,
        "guidance_rescale": None,
        "defaults_taken": list(declared.missing),
    }
    warnings, off = _scheduler_warnings(declared, zero, starts)
    if off is not None:
        facts["off_grid_steps"] = off
    if verdict == "flawed" and late(starts, T):
        warnings.insert(0, f"sampling does not start at T: {late(starts, T)}")
    changes = _config_changes(path.name, declared, config, verdict, zero)
    return Diagnosis(target, kind, verdict, reason, facts, tuple(warnings), tuple(changes))


def _spacing_name(declared: Declared) -> str:
    if declared.scheduler.grid == "distilled":
        return "its own"
    return declared.warp or declared.spacing


def _scheduler_warnings(
    declared: Declared, zero: bool, starts: Mapping[int, float]
) -> tuple[list[str], dict[int, int] | None]:
    """List the problems of the scheduler class."""
    name, texts = declared.class_name, []
    if zero and declared.patched:
        texts.append(f"{name} sets abar_T to 2^-24 instead of 0: a trace of signal is left at T")
    if zero and not declared.patched and not declared.scheduler.finite_at_zero:
        texts.append(
            f"{name} divides by alpha_T = 0: its first step is infinite or NaN. Use DDIMScheduler"
        )
    off = None
    if declared.scheduler.recomputes_next:
        counts = {S: off_grid_steps(declared, S) for S in starts}
        off = {S: count for S, count in counts.items() if count}
        if off:
            examples = ", ".join(f"{count} of {S}" for S, count in off.items())
            texts.append(f"{name} steps to t - T // S, off its own grid: {examples} steps")
    longer = longer_grids(declared) if declared.warp is None else []
    if longer:
        examples = ", ".join(map(str, longer[:3])) + (", ..." if len(longer) > 3 else "")
        texts.append(
            f"trailing has S + 1 timesteps, the last one -1, for {len(longer)} values of S "
            f"({examples})"
        )
    if zero and declared.scheduler.eta_fails:
        texts.append(f"{name} with eta = 1 may be NaN at zero SNR (S = 25, 30, 50)")
    if declared.clip_sample:
        texts.append('x_0 is clipped to [-1, 1], which latents exceed: "clip_sample": false')
    if declared.thresholding:
        texts.append('x_0 is thresholded, which latents must not be: "thresholding": false')
    if declared.warp is not None:
        texts.append(f"{declared.warp} spaces noise levels, not timesteps")
    if zero and declared.warp == "use_beta_sigmas":
        texts.append(
            "use_beta_sigmas divides sigma, which is unbounded at SNR 0: few or no steps are left "
            'at the noise levels where images form. "use_beta_sigmas": false'
        )
    for S, t in starts.items():
        if t >= declared.num_train_timesteps:
            texts.append(f"S = {S} starts at t = {t:g}, outside of the schedule")
    return texts, off


def _config_changes(
    name: str, declared: Declared, config: Mapping[str, Any], verdict: Verdict, zero: bool
) -> list[str]:
    if verdict == "fixed":
        return []
    says_zero = zero or declared.drops_rescale
    if declared.prediction_type == "epsilon":
        T = declared.schedule.num_timesteps
        length = (
            [f'{name}: "num_train_timesteps": {T}'] if declared.num_train_timesteps != T else []
        )
        if not says_zero:
            return [*length, TRAIN]
        undo = '"rescale_betas_zero_snr": false'
        if zero and not config.get("rescale_betas_zero_snr"):
            undo = '"trained_betas": null'
        return [
            *length,
            f'{name}: "prediction_type": "v_prediction", if that is what the model was trained for',
            f"{name}: {undo}, if it predicts eps; then {TRAIN}",
        ]
    now = {
        "_class_name": declared.class_name,
        "num_train_timesteps": declared.num_train_timesteps,
        "timestep_spacing": declared.spacing,
        "lambda_min_clipped": declared.lambda_min_clipped,
        "rescale_betas_zero_snr": config.get("rescale_betas_zero_snr") is True,
    }
    fixed = _fixed(config)
    lines = [
        f"{name}: {json.dumps(key)}: {json.dumps(fixed[key])}"
        for key, value in now.items()
        if value != fixed.get(key, value)
    ]
    if says_zero:
        return lines
    return [f"{line}, if the model was trained this way" for line in lines] + ["if not, " + TRAIN]


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with zero SNR that starts at T, with a class that supports both."""
    declared = declare(config)
    betas = config.get("trained_betas")
    own_zero = betas is not None and betas[-1] == 1
    cls, T = declared.scheduler, declared.schedule.num_timesteps
    keeps = cls.finite_at_zero if own_zero else cls.rescales
    if cls.grid == "distilled":
        keeps = keeps and T % declared.original_inference_steps == 0
    fixed: dict[str, Any] = {
        **config,
        "_class_name": declared.class_name if keeps else "DDIMScheduler",
        "num_train_timesteps": T,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": not own_zero or config.get("rescale_betas_zero_snr") is True,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "clip_sample": False,
        "thresholding": False,
        "prediction_type": declared.prediction_type,
        **{key: config.get(key, cls.defaults[key]) for key in ("beta_start", "beta_end")},
        "beta_schedule": config.get("beta_schedule", cls.defaults["beta_schedule"]),
        "trained_betas": config.get("trained_betas"),
    }
    if "lambda_min_clipped" in config:
        fixed["lambda_min_clipped"] = -math.inf  # no timestep is left out
    return fixed


# This package's checkpoints and YAML


def _examine_checkpoint(
    target: str, path: Path, num_steps: Sequence[int], open_pickle: bool
) -> Diagnosis:
    folder = path.resolve().parent
    facts = folder / NAME
    if facts.exists():
        _check_inside(facts, folder)
        return _examine_run(target, facts, read_json(facts), num_steps)
    beside = None if path.is_dir() else read_beside(path)
    if beside is not None:
        return _examine_beside(target, path, beside)
    if not open_pickle:
        raise ValueError(
            f"{path} has no {NAME} beside it, which training writes. Use --open to read the "
            "checkpoint itself (tensors and plain values only)."
        )
    return _examine_run(target, path, _open(path), num_steps)


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

    checkpoint = read_rest(path) if is_sharded(path) else open_checkpoint(path)
    run, model = checkpoint.get("run"), checkpoint.get(KEY)
    if isinstance(run, dict):
        return run
    if not isinstance(model, dict):
        raise ValueError(f"{path} was not written by zsnr: it has no {KEY!r} entry.")
    return {"format": FORMAT, **{key: model.get(key) for key in ("schedule", "prediction_type")}}


def _examine_run(
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
        schedule=_built(path, "schedule", NoiseSchedule, run["schedule"]),
        prediction_type=run.get("prediction_type", "v_prediction"),
        loss=_built(path, "loss", LossWeighting, run.get("loss")),
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


def _examine_yaml(target: str, path: Path, num_steps: Sequence[int]) -> Diagnosis:
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
        _check_keys(path, "model", model, MODEL_KEYS)
    sampling = _block(path, "model.sampling", _init_args(model.get("sampling")))
    _check_keys(path, "model.sampling", sampling, SAMPLING_KEYS)
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
        schedule=_built(path, "model.schedule", NoiseSchedule, model.get("schedule")),
        prediction_type=model.get("prediction_type", "v_prediction"),
        loss=_built(path, "model.loss", LossWeighting, model.get("loss")),
        sampling={**guidance_settings, "sampler": sampler, "num_steps": S, "spacing": spacing},
        num_steps=num_steps,
    )


def _examine_training(
    target: str,
    kind: str,
    where: str,
    *,
    schedule: NoiseSchedule,
    prediction_type: Any,
    loss: LossWeighting,
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
        counts = [S] if is_grid_file(spacing) else _step_counts(T, (S, *num_steps), None)
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
        if not (table.isfinite().all() and math.isfinite(share)):
            raise ValueError(f"loss weighting {loss.name!r} has weights that are not finite.")
        facts["terminal_loss_weight"] = share
        if share < 0.01:
            warnings.append(
                f"loss weighting {loss.name!r} gives the last timestep {share:.2g} of the mean "
                "weight: the model barely learns to start from pure noise"
            )
            changes.append(f"{where}loss.name: uniform")
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


def _check_keys(path: Path, name: str, settings: Mapping[Any, Any], known: Sequence[str]) -> None:
    """Refuse settings that training would refuse.

    Raises:
        ValueError: A setting is unknown.
    """
    for key in settings:
        if key not in known:
            raise ValueError(f"{path}: {name} has no {shown(key)}. Known: {', '.join(known)}.")


def _init_args(value: Any) -> Any:
    """Return init_args of {class_path, init_args}, and any other value unchanged."""
    if isinstance(value, dict) and "class_path" in value:
        return value.get("init_args")
    return value


# Shared by all kinds


def _step_counts(T: int, extra: Iterable[int], declared: Declared | None) -> list[int]:
    """Return the step counts to examine: the usual and the extra ones that the grid supports."""
    limit = T
    if declared is not None and declared.scheduler.grid == "distilled":
        limit = declared.original_inference_steps
    counts = sorted({S for S in (*NUM_STEPS, *extra) if limit >= S})
    if declared is not None and declared.scheduler.grid == "repeated":
        counts = [S for S in counts if S >= 4 or declared.skip_prk_steps]
    return counts or [max(1, limit // 2)]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
