"""The settings that a checkpoint holds, for validate, test and predict."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from zsnr.checkpoints.checkpoint_file import KEY, check_allowed, open_checkpoint
from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.described import class_of
from zsnr.lora import AdaptedUNet
from zsnr.loss import LossWeighting
from zsnr.networks import DiffusionNetwork
from zsnr.samplers import get_sampler
from zsnr.samplers.recommend import AUTO
from zsnr.sampling import read_declared, recorded_guidance
from zsnr.schedule import schedule_from_settings
from zsnr.timesteps import read_grid
from zsnr.training.settings import known_classes
from zsnr.untrusted import shown

_PLAIN = (str, int, float, bool, type(None))
_BATCHES = ("image_size", "seed", "batch_size", "captions", "pixels")  # of the data module's state


def checkpoint_config(
    path: Path, replaced: Collection[str] = (), named: str | None = None
) -> dict[str, Any]:
    """Return what a checkpoint says of its model and data, as a config of plain values.

    The classes that it names are those of this package, or already imported by the user: the same
    reading that `TextToImage.from_pretrained` builds a model by.

    Args:
        path: The checkpoint, a file or a folder of shards.
        replaced: Parts of the model that are left out, because others replace them: of codec,
            conditioner and network.
        named: Import path of a network that the user names. If it is the checkpoint's, that is
            built with the arguments that the checkpoint records.

    Returns:
        Settings by group. What the checkpoint does not say is left out.

    Raises:
        ValueError: It is no checkpoint of this package, or describes what this package does not
            build.
    """
    checkpoint = open_checkpoint(path)
    description, facts = checkpoint[KEY], _mapping(checkpoint.get("run"))
    data = _mapping(checkpoint.get("DataModule"))
    model: dict[str, Any] = {
        **{
            name: _component(path, description[name], base)
            for name, base in (("codec", LatentCodec), ("conditioner", Conditioner))
            if name not in replaced
        },
        "schedule": _schedule(path, description["schedule"]),
        "prediction_type": description["prediction_type"],
        "ema": facts.get("ema") if "ema" in facts else _averages(checkpoint),
    }
    network = description["network"]
    adapted = _mapping(network).get("class_path") == f"{AdaptedUNet.__module__}.AdaptedUNet"
    settings = _mapping(_mapping(network).get("init_args")) if adapted else {}
    if adapted:
        model["lora"] = settings.get("lora")
    if named is not None and _mapping(network).get("class_path") == named:
        importlib.import_module(named.rpartition(".")[0])
        model["network"] = _component(path, network, nn.Module)
    elif "network" not in replaced:
        check_allowed(path, network)
        source = settings.get("pretrained")
        model["network"] = source if adapted else _component(path, network, DiffusionNetwork)
    loss = _mapping(facts.get("loss"))
    model["loss"] = {f.name: loss[f.name] for f in fields(LossWeighting) if f.name in loss}
    model |= {name: facts[name] for name in ("offset_noise", "caption_dropout") if name in facts}
    sampling = facts.get("sampling")
    if sampling is not None:
        model["sampling"] = sampling_config(path, sampling)
    batches = {name: data[name] for name in _BATCHES if name in data}
    config: dict[str, Any] = {
        "model": {name: value for name, value in model.items() if value != {}},
        "data": {**batches, "image_size": description["image_size"]},
    }
    if path.parent.name in ("checkpoints", "averages"):
        config["trainer"] = {"default_root_dir": str(path.parent.parent)}
    _check_plain(path, config)
    return config


def sampling_config(path: Path, sampling: Any) -> dict[str, Any]:
    """Return the settings of model.sampling for what a checkpoint says of its sampling.

    Sampler and spacing that "auto" stands for are "auto" again, so that another number of steps
    chooses others.

    Raises:
        ValueError: It is not what training writes, or needs a grid file that is not here.
    """
    if not isinstance(sampling, Mapping):
        raise ValueError(f"{path}: sampling is {shown(sampling)}: wanted settings by name.")
    try:
        declared = read_declared(sampling)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config: dict[str, Any] = {
        "num_steps": declared.num_steps,
        "guidance": recorded_guidance(sampling),
    }
    if declared.grid is not None:
        _check_grid(path, Path(declared.spacing), declared.grid)
    if declared.spacing != AUTO:
        config["spacing"] = declared.spacing
    if declared.sampler == AUTO:
        return config
    if "." in declared.sampler:
        raise ValueError(
            f"{path}: the sampler {shown(declared.sampler)} is not one of this package: give "
            "--sampler, or a config with -c that names it."
        )
    cls = type(get_sampler(declared.sampler))
    class_path = f"{cls.__module__}.{cls.__qualname__}"
    options = dict(declared.sampler_options)
    return {**config, "sampler": {"class_path": class_path, "init_args": options}}


def _check_grid(path: Path, file: Path, timesteps: Sequence[int]) -> None:
    """Refuse a grid file that does not hold the timesteps that the checkpoint was sampled at.

    Raises:
        ValueError: The file is missing, or its timesteps are others.
    """
    try:
        same = tuple(read_grid(file).timesteps) == tuple(timesteps)
    except (OSError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"{path} was sampled with the timesteps of {shown(str(file))}, which is not here or "
            "has changed: give --spacing."
        )


def _component(path: Path, description: Any, base: type[Any]) -> dict[str, Any]:
    """Return {class_path, init_args} of a component whose class is known to be harmless.

    Raises:
        ValueError: See `class_of`; or the arguments hold a component of their own.
    """
    cls = class_of(description, base)
    arguments = dict(description.get("init_args", {}))
    if _names_a_class(arguments):
        raise ValueError(
            f"{path}: the arguments of {cls.__name__} name a class, which no checkpoint of this "
            "package does."
        )
    known = known_classes(base).get(cls.__name__) is cls
    name = cls.__name__ if known else f"{cls.__module__}.{cls.__qualname__}"
    return {"class_path": name, "init_args": arguments}


def _names_a_class(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(_names_a_class, value.values()))
    return isinstance(value, list | tuple) and any(map(_names_a_class, value))


def _schedule(path: Path, settings: Any) -> dict[str, Any]:
    try:
        schedule = schedule_from_settings(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return {"class_path": f"zsnr.{type(schedule).__name__}", "init_args": schedule.settings()}


def _averages(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what makes averaged weights, if an older checkpoint has some."""
    weights = checkpoint.get("state_dict", {})
    return {"decay": 0.9999} if any(name.startswith("ema.") for name in weights) else None


def _check_plain(path: Path, value: Any) -> None:
    """Refuse objects in the place of plain values.

    Raises:
        ValueError: There is one.
    """
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check_plain(path, name)
            _check_plain(path, part)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_plain(path, part)
    elif type(value) not in _PLAIN:
        raise ValueError(f"{path} holds {shown(value)} in its settings: wanted plain values.")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
