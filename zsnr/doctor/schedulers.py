"""Verdicts on diffusers' folders and scheduler configs, and their correction."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from zsnr.doctor.diagnosis import TRAIN, Diagnosis, Verdict, judge, late, schedule_facts
from zsnr.doctor.scheduler_classes import NUM_STEPS, OUR_TABLE, examine_process
from zsnr.files import replacing
from zsnr.interop.declarations import FAMILIES
from zsnr.interop.declared import (
    ADAPTER,
    SCHEDULERS,
    Declared,
    declare,
    first_timestep,
    index_class,
    longer_grids,
    off_grid_steps,
    process_from_diffusers,
    with_class_of,
)
from zsnr.interop.processes import process_of
from zsnr.timesteps import get_timesteps, is_grid_file
from zsnr.untrusted import check_inside, read_json, shown

_CONFIG = "scheduler_config.json"
_FIXED = "scheduler_config.fixed.json"


def fix_scheduler(path: Path, diagnosis: Diagnosis, *, in_place: bool) -> list[str]:
    """Write a corrected scheduler config, as `zsnr.doctor.examine.fix`.

    Args:
        path: The diffusers folder or scheduler_config.json.
        diagnosis: Its diagnosis.
        in_place: Replace the config, instead of writing scheduler_config.fixed.json.

    Raises:
        ValueError: A config cannot repair the model, or the output file exists.
    """
    if diagnosis.verdict == "fixed":
        return ["Nothing to fix."]
    if diagnosis.exit_code == 3:
        raise ValueError(diagnosis.reason)
    if diagnosis.kind not in ("diffusers folder", "scheduler config"):
        raise ValueError(
            f"--fix writes scheduler configs, and {path} is a {diagnosis.kind}. "
            f"{'; '.join(diagnosis.changes)}."
        )
    index, config_path = scheduler_files(path)
    config = read_json(config_path)
    named = None if index is None else index_class(read_json(index))
    if named is not None:
        config["_class_name"] = named
    if not in_table(config):
        raise ValueError(f"--fix knows schedules of betas only. {'; '.join(diagnosis.changes)}.")
    if diagnosis.facts["prediction_type"] == "epsilon":
        raise ValueError(
            "The config declares epsilon, and no config turns an epsilon model into a v model. "
            + "; ".join(diagnosis.changes)
            + "."
        )
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


def scheduler_files(path: Path) -> tuple[Path | None, Path]:
    """Return model_index.json, if it exists, and the scheduler's config; both inside the folder."""
    if path.name == "model_index.json":
        path = path.absolute().parent
    if not path.is_dir():
        return None, path
    if not (path / "model_index.json").exists():
        check_inside(path / _CONFIG, path)
        return None, path / _CONFIG
    index, config = path / "model_index.json", path / "scheduler" / _CONFIG
    for file in (index, config):
        check_inside(file, path)
    return index, config


def examine_diffusers(target: str, folder: Path, num_steps: Sequence[int]) -> Diagnosis:
    index_path, path = scheduler_files(folder)
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
        check_inside(unet, folder)
        facts["model"] = _unet_facts(read_json(unet))
    diagnosis = examine_config(target, "diffusers folder", path, config, num_steps)
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


def examine_config(
    target: str, kind: str, path: Path, config: Mapping[str, Any], num_steps: Sequence[int]
) -> Diagnosis:
    recognized = {"_class_name", "beta_schedule", "trained_betas", "prediction_type", "beta_start"}
    if not recognized & set(config):
        raise ValueError(
            f"{path} is not a scheduler config: it has none of {', '.join(sorted(recognized))}."
        )
    try:
        if config.get("_class_name") == ADAPTER:
            return _examine_adapter(target, kind, path.name, config, num_steps)
        if not in_table(config):
            return examine_process(target, kind, path.name, config, num_steps)
        declared = declare(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    schedule, T = declared.schedule, declared.num_train_timesteps
    starts = {S: first_timestep(declared, S) for S in step_counts(T, num_steps, declared)}
    zero = float(schedule.snr[-1]) == 0
    lacking = None
    if schedule.num_timesteps != T:
        lacking = f"trained_betas has {schedule.num_timesteps} entries, num_train_timesteps is {T}"
    elif declared.drops_rescale and not zero:
        lacking = f"{declared.class_name} drops rescale_betas_zero_snr"
    verdict, reason = judge(schedule, declared.prediction_type, starts, lacking)
    facts = {
        "scheduler": declared.class_name,
        "judged_by": OUR_TABLE,
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


def _examine_adapter(
    target: str, kind: str, name: str, config: Mapping[str, Any], num_steps: Sequence[int]
) -> Diagnosis:
    """Judge a pipeline that was saved with this package's scheduler."""
    schedule, prediction_type = process_from_diffusers(config)
    spacing, T = config.get("spacing", "trailing"), schedule.num_timesteps
    if not isinstance(spacing, str) or is_grid_file(spacing):
        raise ValueError(f"spacing={shown(spacing)}: wanted a name, to tell where it starts.")
    counts = step_counts(T, num_steps, None)
    starts = {S: int(get_timesteps(spacing, S, T, schedule=schedule)[0]) for S in counts}
    verdict, reason = judge(schedule, prediction_type, starts, None)
    facts = {
        "scheduler": ADAPTER,
        "judged_by": OUR_TABLE,
        "prediction_type": prediction_type,
        **schedule_facts(schedule),
        "timestep_spacing": spacing,
        "first_timestep": starts,
    }
    changes = {
        "flawed": (TRAIN,),
        "inconsistent": (f'{name}: "spacing": "trailing"',),
    }.get(verdict, ())
    if verdict == "inconsistent" and prediction_type == "epsilon":
        changes = (f'{name}: "prediction_type": what the model was trained for; else {TRAIN}',)
    return Diagnosis(target, kind, verdict, reason, facts, (), changes)


def in_table(config: Mapping[str, Any]) -> bool:
    """Whether a config's schedule is of betas, and its class is in this package's table of them."""
    name = config.get("_class_name", "DDIMScheduler")
    return process_of(config) == "betas" and (not isinstance(name, str) or name in SCHEDULERS)


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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def step_counts(T: int, extra: Iterable[int], declared: Declared | None) -> list[int]:
    """Return the step counts to examine: the usual and the extra ones that the grid supports."""
    limit = T
    if declared is not None and declared.scheduler.grid == "distilled":
        limit = declared.original_inference_steps
    counts = sorted({S for S in (*NUM_STEPS, *extra) if limit >= S})
    if declared is not None and declared.scheduler.grid == "repeated":
        counts = [S for S in counts if S >= 4 or declared.skip_prk_steps]
    return counts or [max(1, limit // 2)]
