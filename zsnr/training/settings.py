"""The settings of fit, validate, test and predict, read from the classes that take them.

Help, checks and suggestions all use these readings, so that a new argument of a class appears in
each of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import Optimizer

from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner, Remembered
from zsnr.networks import DiffusionNetwork
from zsnr.samplers import Sampler, available_samplers
from zsnr.samplers.recommend import AUTO
from zsnr.timesteps import available_spacings
from zsnr.training.board import TrainingBoard
from zsnr.training.callbacks import PredictionWriter
from zsnr.training.checkpointing import Checkpoints
from zsnr.training.data import DataModule
from zsnr.training.image_metrics import ImageMetrics
from zsnr.training.module import LatentDiffusion
from zsnr.training.preemption import Preemption
from zsnr.training.watchdog import Watchdog

GROUPS: dict[str, Any] = {
    "model": LatentDiffusion,
    "data": DataModule,
    "trainer": Trainer,
    "output": PredictionWriter,
    "checkpoint": Checkpoints,
    "metrics": ImageMetrics,
    "board": TrainingBoard,
    "watchdog": Watchdog,
    "preemption": Preemption,
}
"""The groups of settings, and the class that takes each."""

BASES: dict[str, type[Any]] = {
    "codec": LatentCodec,
    "conditioner": Conditioner,
    "sampler": Sampler,
    "network": nn.Module,
}
"""Settings whose classes a config may name without their module."""

CLASSES: dict[str, type[Any]] = {
    "model.codec": LatentCodec,
    "model.conditioner": Conditioner,
    "model.sampling.sampler": Sampler,
    "model.optimizer": Optimizer,
    "trainer.callbacks": Callback,
    "trainer.logger": Logger,
    "trainer.strategy": Strategy,
}
"""Settings that are a class, as {class_path, init_args}, and what it must be derived from."""

LOOSE = {"seed_everything": "0", "ckpt_path": "None", "weights_only": "None"}
"""Settings that belong to no group, with their defaults."""

DEFAULTS: dict[str, Any] = {
    # The train loader is endless: a step counts, an epoch does not.
    "trainer.max_epochs": -1,
    "trainer.check_val_every_n_epoch": None,
    "trainer.val_check_interval": 1000,
    "trainer.use_distributed_sampler": False,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_model_summary": False,
    # The default of LatentDiffusion is resolved for its own number of steps.
    "model.sampling.sampler": AUTO,
    "model.sampling.spacing": AUTO,
}
"""Defaults that differ from those of the classes."""

LINKED = {"model.image_size": "data.image_size", "model.seed": "data.seed"}
"""Settings that follow another one and cannot be set themselves."""


class Setting(NamedTuple):
    """One argument of a class.

    Args:
        name: Name of the argument.
        hint: Its type.
        default: Its default; `REQUIRED` if there is none.
    """

    name: str
    hint: Any
    default: Any


REQUIRED = inspect.Parameter.empty


def settings_of(cls: Any) -> tuple[list[Setting], bool]:
    """List the arguments of a class, and say whether it takes others too."""
    if cls is None:
        return [], True
    if dataclasses.is_dataclass(cls):
        hints = get_type_hints(cls)
        return [
            Setting(f.name, hints[f.name], _default(f)) for f in dataclasses.fields(cls) if f.init
        ], False
    try:
        parameters = inspect.signature(cls).parameters.values()
        constructor = cls.__init__
        hints = get_type_hints(constructor if isinstance(cls, type) else cls)
    except (NameError, TypeError, ValueError):  # somebody else's class may hide its types
        return [], True
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = [p for p in parameters if p.kind not in variable]
    if isinstance(cls, type) and issubclass(cls, Optimizer):
        named = named[1:]  # the parameters that it changes
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [Setting(p.name, hints.get(p.name, Any), p.default) for p in named], takes_any


def accepted_arguments(cls: Any) -> list[str]:
    """List the arguments that a config may give a class, those that pass through **kwargs too."""
    from jsonargparse import ArgumentParser

    names: list[str] = ArgumentParser().add_class_arguments(cls, fail_untyped=False)
    return names


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default


def options_of(hint: Any) -> list[Any]:
    """List the types that a union allows; any other type is its own only option."""
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in options_of(part)]
    return [hint]


def is_scalar(option: Any) -> bool:
    """Whether a type is one value: text, a number, true or false, null, or a choice of words."""
    return option in (str, bool, type(None), int, float) or get_origin(option) is Literal


def item_of(option: Any) -> Any:
    """Return the type of a list's items; None if it is no list, or has items of several types."""
    parts = get_args(option)
    origin = get_origin(option)
    if isinstance(origin, type) and issubclass(origin, Sequence) and parts:
        return parts[0] if len(parts) == 1 or parts[1:] == (Ellipsis,) else None
    return None


def choices_of(options: Sequence[Any]) -> list[Any]:
    """List the words that the literals among some types allow."""
    return [
        word for option in options if get_origin(option) is Literal for word in get_args(option)
    ]


def dataclass_of(hint: Any) -> Any:
    """Return the dataclass that a type allows: the first, which needs no class_path."""
    return next(iter(dataclasses_of(hint)), None)


def dataclasses_of(hint: Any) -> list[Any]:
    """List the dataclasses that a type allows."""
    return [option for option in options_of(hint) if dataclasses.is_dataclass(option)]


def known_classes(base: type[Any]) -> dict[str, type[Any]]:
    """Return the classes that a config may give for a base, by their names.

    Of all modules, those are networks that are made for diffusion.
    """
    known: dict[str, type[Any]] = {}
    waiting: list[type[Any]] = [DiffusionNetwork if base is nn.Module else base]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        public = not cls.__name__.startswith("_") and "<locals>" not in cls.__qualname__
        if cls is not base and public and cls is not Remembered and not inspect.isabstract(cls):
            known[cls.__name__] = cls
    return dict(sorted(known.items()))


def words_for(where: str) -> list[str]:
    """List the words that a setting of text takes, where they are registered names."""
    if where == "trainer.strategy":
        from lightning.pytorch.strategies import StrategyRegistry

        return ["auto", *StrategyRegistry.available_strategies()]
    if where == "trainer.accelerator":
        from lightning.pytorch.accelerators import AcceleratorRegistry

        return ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    if where == "model.sampling.sampler":
        return [*available_samplers(), AUTO]
    if where == "model.sampling.spacing":
        return [*available_spacings(), AUTO]
    return []


@cache
def names() -> tuple[str, ...]:
    """List all settings of all groups, down to the fields of dataclasses."""
    listed = [
        name for group, cls in GROUPS.items() for name in _names(group, cls) if name not in LINKED
    ]
    return (*listed, *LOOSE)


def _names(prefix: str, cls: Any) -> Iterator[str]:
    for setting in settings_of(cls)[0]:
        name = f"{prefix}.{setting.name}"
        yield name
        for inside in dataclasses_of(setting.hint):
            yield from _names(name, inside)


def descriptions(cls: Any) -> dict[str, str]:
    """Return the description of each argument of a class, from its docstring, on one line."""
    import docstring_parser

    texts: dict[str, str] = {}
    for each in (cls, getattr(cls, "__init__", None)):
        parsed = docstring_parser.parse(inspect.getdoc(each) or "")
        for param in parsed.params:
            texts.setdefault(param.arg_name, " ".join((param.description or "").split()))
    return texts


def default_optimizer() -> type[Optimizer]:
    """Return the class of the optimizer that a config gets if it names none."""
    import torch

    parameters = [torch.nn.Parameter(torch.zeros(1))]
    make: Any = inspect.signature(LatentDiffusion).parameters["optimizer"].default
    return type(make(parameters))
