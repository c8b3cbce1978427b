"""The help of fit, validate, test and predict: what people use on one page, the rest by group."""

from __future__ import annotations

import dataclasses
import difflib
import re
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple, get_origin

from zsnr.files import path_metavar
from zsnr.guidance import Guidance
from zsnr.training.settings import (
    BASES,
    CLASSES,
    DEFAULTS,
    GROUPS,
    LINKED,
    REQUIRED,
    choices_of,
    dataclasses_of,
    default_optimizer,
    descriptions,
    is_scalar,
    item_of,
    known_classes,
    options_of,
    settings_of,
)
from zsnr.training.short_options import TRAINING_OPTIONS, expand_option

WIDTH, _COLUMN = 100, 38

_PURPOSES = {
    "fit": "Train a latent diffusion model, with validation and previews.",
    "validate": "Compute the validation loss of a checkpoint, and metrics of its images; with "
    "--follow, of every checkpoint of a run while training goes on.",
    "test": "Compute the validation loss of a checkpoint, as `zsnr validate` does.",
    "predict": "Generate the images of a prompts file with a checkpoint.",
}
_USAGES = {
    "fit": "zsnr fit -c FILE [-c FILE ...] [options]",
    "validate": "zsnr validate RUN [--follow] [options], or zsnr validate --ckpt_path CHECKPOINT "
    "--data.val DATA [options]",
    "test": "zsnr test --ckpt_path CHECKPOINT --data.val DATA [options]",
    "predict": "zsnr predict --ckpt_path CHECKPOINT --prompts FILE --output FOLDER [options]",
}
_FROM_CHECKPOINT = (
    "The checkpoint says what the model is, how it is sampled and the image size. Files that "
    "follow -c, and options, only override what it says."
)
_FROM_RUN = (
    "RUN is the folder of a run, whose newest checkpoint is taken, or a checkpoint in it. The "
    "configuration that the run has saved then gives the validation data, the metrics of images "
    "and the precision too. One device is used unless --trainer.devices sets another number."
)
_FOLLOW = (
    "Measure all checkpoints of the run, the oldest first, and each new one, until the run has "
    "ended; started again, it resumes. Results are written to validate.jsonl, validate.log "
    "and tensorboard/validate in the folder of the run, or in that of --output. (default: only one "
    "checkpoint is measured)"
)
GROUP_TEXTS = {
    "model": "The network, the noise schedule, the loss, the optimizer and sampling.",
    "data": "Training data, validation data, batches, and the prompts of predict.",
    "trainer": "Devices, precision and the length of training (Lightning's Trainer).",
    "output": "The folder that predict writes to.",
    "checkpoint": "When checkpoints are written, and how many are kept.",
    "metrics": "FID, CLIP score and other metrics of generated images, after validations.",
    "board": "What TensorBoard shows of the data.",
    "watchdog": "How long a process may hang before it is ended.",
    "preemption": "What a signal to stop does.",
}
"""What each group of settings is about."""
_USED = {
    "model": (
        *("network", "codec", "conditioner", "prediction_type", "schedule.betas"),
        *("schedule.zero_terminal_snr", "loss.name", "caption_dropout", "optimizer"),
        *("learning_rate.warmup_steps", "learning_rate.decay", "ema.decay", "lora.rank"),
        *("gradient_checkpointing", "compile"),
    ),
    "data": (
        *("train", "val", "image_size", "max_batch_size_per_device", "num_workers"),
        *("val_samples", "pixels.flip", "filters", "aspect"),
    ),
    "trainer": (
        *("default_root_dir", "accelerator", "devices", "num_nodes", "strategy", "precision"),
        *("gradient_clip_val", "val_check_interval", "log_every_n_steps"),
    ),
    "checkpoint": ("every_n_train_steps", "every_n_minutes", "keep", "keep_every_n_steps"),
    "metrics": ("captions", "num_images"),
}
_USED_ELSEWHERE: dict[str, dict[str, tuple[str, ...]]] = {
    "validate": {
        "data": ("val", "val_samples", "num_workers"),
        "trainer": ("default_root_dir", "accelerator", "devices", "precision"),
        "metrics": (
            *("captions", "num_images", "real", "statistics", "inception", "clip"),
            *("save_images", "output"),
        ),
    },
    "predict": {"trainer": ("accelerator", "devices", "precision")},
}
_USED_ELSEWHERE["test"] = _USED_ELSEWHERE["validate"]
_SHORT_TEXTS = {
    "--lr": "Learning rate of the optimizer, before warm-up and decay.",
    "--max-steps": "Number of optimizer steps to train.",
    "--batch-size": "Global batch size, summed over all devices and accumulation steps.",
    "--num-steps": "Number of sampling steps. Sampler and spacing follow from it where they are "
    "auto.",
    "--sampler": "Sampler: the name of one, or auto.",
    "--spacing": "Spacing of the timesteps: the name of one, the file of a grid, or auto.",
    "--seed": "Seed of every random number in training.",
    "--output": "Folder of the run, for checkpoints and logs.",
    "--prompts": "File with the prompts, .txt or .jsonl.",
}
_PREDICT_TEXTS = {
    "--seed": "Seed of the prompts that name none.",
    "--batch-size": "Number of images generated at a time, on each device.",
    "--output": "Folder for the images and manifest.jsonl.",
}
_CHECKPOINT = (
    "Checkpoint of the model: a file, a folder of shards, or the folder of a run, whose newest "
    "checkpoint is taken."
)
_TRAINER_TEXTS = {
    "default_root_dir": "Folder of the run, for checkpoints and logs.",
    "accelerator": "Kind of device: cpu, gpu, mps, or auto for the fastest that is there.",
    "devices": "Number of devices on each node, a list of their indices, or auto for all.",
    "num_nodes": "Number of nodes.",
    "strategy": "How several devices share the work: auto, ddp, or a class such as "
    "zsnr.training.FullyShardedStrategy.",
    "precision": "32-true, bf16-mixed or 16-mixed; null stands for 32-true.",
    "max_steps": "Number of optimizer steps to train.",
    "gradient_clip_val": "Norm to which gradients are clipped; null clips nothing.",
    "val_check_interval": "Number of optimizer steps between two validations.",
    "log_every_n_steps": "Number of optimizer steps between two entries of the logs; null stands "
    "for 50.",
    "logger": "Loggers by class_path; null stands for TensorBoard and CSV files, false for none.",
    "callbacks": "Additional callbacks by class_path, such as zsnr.training.Previews.",
    "fast_dev_run": "Number of batches of training and validation to run as a trial, or true for "
    "one.",
    "min_epochs": "Minimum number of epochs, even if max_time is over.",
    "min_steps": "Minimum number of optimizer steps, even if max_time is over.",
    "max_time": "Time after which training stops, as DD:HH:MM:SS; null sets no limit.",
    "limit_train_batches": "Not supported: set trainer.max_steps.",
    "limit_val_batches": "Number or fraction of the validation batches to use; null stands for "
    "all.",
    "limit_test_batches": "Number or fraction of the batches that test uses; null stands for all.",
    "limit_predict_batches": "Number or fraction of the batches that predict uses; null stands for "
    "all.",
    "overfit_batches": "Number or fraction of the batches to train on again and again.",
    "check_val_every_n_epoch": "Number of epochs between two validations; null counts steps alone.",
    "num_sanity_val_steps": "Number of validation batches to run before training.",
    "enable_checkpointing": "Whether Lightning may write checkpoints; null stands for true.",
    "enable_progress_bar": "Whether to show progress; null stands for true.",
    "enable_model_summary": "Whether to print a summary of the layers.",
    "accumulate_grad_batches": "Follows from data.batch_size and data.max_batch_size_per_device; "
    "leave it at 1.",
    "gradient_clip_algorithm": "How gradients are clipped: norm or value; null stands for norm.",
    "deterministic": "Whether to use deterministic algorithms of PyTorch only: true, false, or "
    "warn where there is none.",
    "max_epochs": "Number of epochs after which training stops; -1 stands for no limit.",
    "benchmark": "Whether cuDNN chooses its algorithms by measuring them.",
    "inference_mode": "Whether evaluation uses torch.inference_mode instead of torch.no_grad.",
    "use_distributed_sampler": "Whether Lightning divides the samples among the ranks; the data "
    "module does it already.",
    "profiler": "Profiler of the steps: simple, advanced or pytorch; null stands for none.",
    "barebones": "Whether to switch off all that may slow training: logs, checkpoints, progress.",
    "plugins": "Plugins of Lightning for precision, clusters and layers.",
    "sync_batchnorm": "Whether batch norms share their statistics among all ranks.",
    "reload_dataloaders_every_n_epochs": "Number of epochs after which the data loaders are made "
    "again; 0 stands for never.",
    "model_registry": "Name of the model in Lightning's model registry.",
}
_METAVARS = {
    **dict.fromkeys(("data.train", "data.val", "metrics.real"), "DATA"),
    **dict.fromkeys(("model.network", "metrics.clip"), "MODEL"),
    **dict.fromkeys(("model.compile", "model.sampling.spacing", "trainer.accelerator"), "NAME"),
    "data.prompts": "FILE",
    "trainer.devices": "DEVICES",
    "trainer.val_check_interval": "N",
}
"""What stands for a value that is text of a kind."""
_MAIN_TEXTS = {
    "-c, --config FILE": "YAML file with settings. It may be repeated: later files override "
    "earlier ones.",
    "--ckpt_path CHECKPOINT": "Checkpoint to resume from; `last` is the newest of the run.",
    "--seed_everything N": "Seed of the global random generators; training does not "
    "use them, see --seed. (default: 0)",
    "--print_config": "Print all settings as YAML, and exit.",
    "--help GROUP": "Explain every setting of a group, or of every group with `all`.",
}


class DescribedSetting(NamedTuple):
    """One setting in the help and on the site.

    Args:
        name: Its name inside its group, with dots where it is nested.
        hint: Its type.
        metavar: What stands for its value in the help.
        default: Its default, as YAML writes it. "" = it is required; None = the settings in it have
            defaults of their own.
        text: What it is.
    """

    name: str
    hint: Any
    metavar: str
    default: str | None
    text: str


def help_text(command: str, topic: str | None = None) -> str:
    """Return the help of fit, validate, test or predict.

    Args:
        command: Its name.
        topic: A group of settings, or "all". None = the settings that people use.

    Raises:
        ValueError: There is no such group.
    """
    if topic is None:
        return _overview(command)
    topic = topic.strip("-").rstrip(".")
    if topic == "all":
        return "\n\n".join([_overview(command), *(_group(group) for group in GROUPS)])
    if topic not in GROUPS:
        near = difflib.get_close_matches(topic.partition(".")[0], GROUPS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"There is no group {topic!r} in the help.{hint} Known: {', '.join(GROUPS)}, all."
        )
    return _group(topic)


def _overview(command: str) -> str:
    settings = {
        f"{group}.{line.name}": line for group in GROUPS for line in describe_settings(group)
    }
    parts = [f"usage: {_USAGES[command]}", _PURPOSES[command]]
    if command == "fit":
        parts.append(
            "Settings come from YAML files, and options override them: --data.image_size 256 "
            "stands for `data: {image_size: 256}`. `zsnr configs list` shows the files that come "
            "with the package."
        )
    else:
        parts += [_FROM_CHECKPOINT, *([_FROM_RUN] if command == "validate" else [])]
    lines = ["\n\n".join(textwrap.fill(part, WIDTH) for part in parts), "", "Options:"]
    follow = {"--follow": _FOLLOW} if command == "validate" else {}
    for name, text in {**follow, **_MAIN_TEXTS}.items():
        if name.startswith("--ckpt_path") and command != "fit":
            when = "required without RUN" if command == "validate" else "required"
            text = f"{_CHECKPOINT} ({when})"
        lines += _entry(name, text)
    for name in _short_names(command):
        target = expand_option(name, command).removeprefix("--")
        line = settings.get(target)
        default = _shown(default_optimizer_rate()) if name == "--lr" else line and line.default
        if name == "--prompts" or (name, command) == ("--output", "predict"):
            default = ""
        if command != "fit" and target.startswith("model.sampling."):
            default = "the checkpoint's"
        texts = {**_SHORT_TEXTS, **(_PREDICT_TEXTS if command == "predict" else {})}
        text = texts.get(name) or _first_sentence(line.text if line else "")
        metavar = "NAME" if name == "--sampler" else line.metavar if line else "X"
        if name == "--output":
            metavar = "FOLDER"
        shown = f"-o, {name}" if name == "--output" else name
        lines += _entry(f"{shown} {metavar}", _with_default(text, default))
    if command == "predict":
        lines += ["", *textwrap.wrap(_guidance_text(), WIDTH, break_on_hyphens=False)]
    for group, used in _USED_ELSEWHERE.get(command, _USED).items():
        lines += ["", f"{GROUP_TEXTS[group]} (More: zsnr {command} --help {group})"]
        for name in used:
            line = settings[f"{group}.{name}"]
            needed = f"{group}.{name}" == "data.val" and command != "fit"
            text = _with_default(_first_sentence(line.text), "" if needed else line.default)
            lines += _entry(f"--{group}.{name} {line.metavar}", text)
    lines += ["", f"Groups, each explained by `zsnr {command} --help GROUP`:"]
    for group, text in GROUP_TEXTS.items():
        lines += _entry(group, text)
    return "\n".join(lines)


def _short_names(command: str) -> list[str]:
    sampling = ["--num-steps", "--sampler", "--spacing"]
    guidance = ["--guidance-scale", "--guidance-rescale"]
    if command == "fit":
        return [*TRAINING_OPTIONS, "--seed", "--output"]
    if command == "predict":
        return ["--prompts", "--output", *sampling, *guidance, "--seed", "--batch-size"]
    return ["--output", *sampling, *guidance]


def _guidance_text() -> str:
    others = [f"--guidance-{option.name.replace('_', '-')}" for option in _other_guidance()]
    return f"More options of guidance, which `--help model` explains: {', '.join(others)}."


def _other_guidance() -> list[Any]:
    return [o for o in dataclasses.fields(Guidance) if o.name not in ("scale", "rescale")]


def _group(group: str) -> str:
    lines = [f"{group}: {GROUP_TEXTS[group]}"]
    if not settings_of(GROUPS[group])[0]:
        lines += textwrap.wrap(f"It has no settings. {_summary(GROUPS[group])}", WIDTH)
    for line in describe_settings(group):
        lines += _entry(
            f"--{group}.{line.name} {line.metavar}", _with_default(line.text, line.default)
        )
    for name, base in BASES.items():
        setting = next((key for key in CLASSES if key.endswith(f".{name}")), "")
        if not setting.startswith(f"{group}."):
            continue
        for title, cls in known_classes(base).items():
            texts = descriptions(cls)
            lines += ["", f"{setting}: class_path: {title}"]
            lines += _entry("", _summary(cls))
            for each in settings_of(cls)[0]:
                text = _with_default(_sentence(texts.get(each.name, "")), _shown(each.default))
                lines += _entry(f"init_args.{each.name} {_metavar(each.hint)}", text)
    return "\n".join(lines)


def describe_settings(group: str) -> Iterator[DescribedSetting]:
    """List the settings of a group, those of the dataclasses in it too."""
    yield from _read(group, "", GROUPS[group], None)


def _read(group: str, prefix: str, cls: Any, values: Any) -> Iterator[DescribedSetting]:
    """List the settings of a class, and those of the dataclasses in it."""
    texts = descriptions(cls)
    for setting in settings_of(cls)[0]:
        name = f"{prefix}{setting.name}"
        if f"{group}.{name}" in LINKED:
            continue
        default = setting.default if values is None else getattr(values, setting.name)
        default = DEFAULTS.get(f"{group}.{name}", default)
        text = texts.get(setting.name, "")
        if group == "trainer":
            text = _TRAINER_TEXTS.get(name) or _plain(text)
        metavar = _metavar(setting.hint, f"{group}.{name}")
        if metavar == "TEXT":
            metavar = path_metavar(text).replace("PATH", _METAVARS.get(f"{group}.{name}", "TEXT"))
        if f"{group}.{name}" == "model.optimizer":
            default = default_optimizer()
        if f"{group}.{name}" == "trainer.max_steps":  # Lightning's default has no end
            default = REQUIRED
        yield DescribedSetting(
            name,
            setting.hint,
            metavar,
            _shown(default),
            _sentence(text),
        )
        listed: set[str] = set()
        for inside in dataclasses_of(setting.hint):
            given = default if isinstance(default, inside) else None
            for each in _read(group, f"{name}.", inside, given):
                if each.name in listed:
                    continue
                owner = f"{inside.__name__}: " if listed and given is None else ""
                yield each._replace(text=f"{owner}{each.text}")
            listed |= {f"{name}.{each.name}" for each in settings_of(inside)[0]}


def default_optimizer_rate() -> float:
    """Return the learning rate of a config that sets none."""
    import inspect

    import torch

    from zsnr.training.module import LatentDiffusion

    make: Any = inspect.signature(LatentDiffusion).parameters["optimizer"].default
    rate: float = make([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]
    return rate


def _entry(name: str, text: str) -> list[str]:
    """Lay out a name and its text in two columns."""
    wrapped = textwrap.wrap(text, WIDTH - _COLUMN, break_on_hyphens=False)
    left = f"  {name}"
    if len(left) < _COLUMN and wrapped:
        return [
            f"{left:{_COLUMN}}{wrapped[0]}",
            *(f"{'':{_COLUMN}}{each}" for each in wrapped[1:]),
        ]
    return [left, *(f"{'':{_COLUMN}}{each}" for each in wrapped)]


def _with_default(text: str, default: str | None) -> str:
    if default is None:
        return text
    return f"{text} ({'required' if default == '' else f'default: {default}'})".strip()


def _shown(default: Any) -> str | None:
    """Say a default; "" if there is none, None if the settings in it have their own."""
    if default is REQUIRED:
        return ""
    if isinstance(default, type):
        return default.__name__
    if dataclasses.is_dataclass(default):
        return None
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "null"}[default]
    if isinstance(default, tuple | list):
        return f"[{', '.join(str(_shown(each)) for each in default)}]"
    return str(default) or "''"


def _metavar(hint: Any, where: str = "") -> str:
    options = [option for option in options_of(hint) if option is not type(None)]
    choices = choices_of(options)
    if where in CLASSES:
        return "CLASS"
    if choices and len(choices) < 5:
        words = [*("true", "false") * (bool in options), *map(str, choices)]
        return "{" + ",".join(words) + "}"
    if any(item_of(option) is not None or get_origin(option) is tuple for option in options):
        return "LIST" if str not in options else "TEXT"
    kinds = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
    scalars = [kinds[option] for option in options if option in kinds]
    if len(scalars) == 1 and all(map(is_scalar, options)):
        return scalars[0]
    return "NAME" if choices else (scalars or ["SETTINGS"])[-1]


def _summary(cls: Any) -> str:
    return _sentence(" ".join((cls.__doc__ or "").split("\n\n")[0].split()))


def _first_sentence(text: str) -> str:
    first = re.match(r"(.+?[.])(?= [A-Z]|$)", text)
    return first[1] if first else text


def _sentence(text: str) -> str:
    text = text.strip()
    for word, name in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{word}\b", name, text)
    return text if not text or text[-1] in ".!?" else f"{text}."


def _plain(text: str) -> str:
    """Take the markup out of Lightning's description, and its default, which may not be ours."""
    text = re.sub(r":\w+:`~?([^`<]*?)(?: <[^>]*>)?`", lambda match: match[1].split(".")[-1], text)
    text = re.sub(r"Defaults?(?: to|:) ``[^`]*``\.?", "", text)
    text = text.replace("``", "").replace("`", "")
    return _first_sentence(" ".join(text.split()))
