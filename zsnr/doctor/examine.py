"""Diagnosis of a model from its small files, without loading it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from zsnr.checkpoints.run_facts import NAME
from zsnr.doctor.diagnosis import Diagnosis
from zsnr.doctor.recipes import examine_recipe
from zsnr.doctor.runs import examine_checkpoint, examine_run, examine_yaml
from zsnr.doctor.schedulers import examine_config, examine_diffusers, fix_scheduler
from zsnr.doctor.single_file import examine_single
from zsnr.doctor.trainers import read_settings
from zsnr.schedule import MAX_TIMESTEPS
from zsnr.untrusted import check_inside, clipped, read_json

_CONFIG = "scheduler_config.json"


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
    return fix_scheduler(path, examine(path), in_place=in_place)


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
        return examine_diffusers(target, path.absolute().parent, num_steps)
    if path.name == NAME:
        return examine_run(target, path, read_json(path), num_steps)
    match suffix:
        case ".json" | ".toml" | ".sh" | ".bat" | ".ps1" | ".txt" if (
            settings := read_settings(path)
        ) is not None:
            return examine_recipe(target, settings)
        case ".json":
            return examine_config(target, "scheduler config", path, read_json(path), num_steps)
        case ".safetensors":
            return examine_single(target, path)
        case ".yaml" | ".yml":
            return examine_yaml(target, path, num_steps)
        case ".ckpt":
            return examine_checkpoint(target, path, num_steps, open_pickle)
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
        return examine_diffusers(target, path, num_steps)
    for facts in (path / "checkpoints" / NAME, path / NAME):
        if facts.exists():
            check_inside(facts, path)
            return examine_run(target, facts, read_json(facts), num_steps)
    if is_sharded(path):
        return examine_checkpoint(target, path, num_steps, open_pickle)
    checkpoints = checkpoints_of(path)
    if checkpoints:
        check_inside(checkpoints[-1], path)
        return examine_checkpoint(target, checkpoints[-1], num_steps, open_pickle)
    if (path / _CONFIG).exists():
        check_inside(path / _CONFIG, path)
        config = read_json(path / _CONFIG)
        return examine_config(target, "scheduler config", path / _CONFIG, config, num_steps)
    raise ValueError(
        f"{path} holds no model_index.json (of diffusers), {NAME} or checkpoint (of this package) "
        f"or {_CONFIG}."
    )
