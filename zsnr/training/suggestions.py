"""What a mistyped setting or class was probably meant to be."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from zsnr.training.settings import known_classes, names
from zsnr.training.short_options import SHORT_OPTIONS
from zsnr.untrusted import clipped, shown

ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate"), "--lr"),
    **dict.fromkeys(("steps", "epochs", "max_train_steps", "num_epochs"), "--max-steps"),
    **dict.fromkeys(("train_batch_size", "batch", "bs"), "--batch-size"),
    **dict.fromkeys(("resolution", "size"), "--data.image_size"),
    **dict.fromkeys(("gpus", "num_gpus"), "--trainer.devices"),
    **dict.fromkeys(("resume", "resume_from_checkpoint", "checkpoint"), "--ckpt_path"),
    **dict.fromkeys(("train_data_dir", "dataset", "train"), "--data.train"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "guidance_scale"), "--guidance-scale"),
    **dict.fromkeys(("output_dir", "out", "root"), "--trainer.default_root_dir"),
    **dict.fromkeys(("mixed_precision", "precision", "fp16", "bf16"), "--trainer.precision"),
    "optimizer": "--model.optimizer",
    "lr_scheduler": "--model.learning_rate.decay",
}
"""Options by the names that they have in other programs."""


def find_class(path: Any, base: type[Any], where: str) -> Any:
    """Return the class that a config names.

    Args:
        path: Its name or import path.
        base: What it must be derived from, unless it is a function.
        where: The setting, for the message.

    Raises:
        ValueError: There is no such class; suggests one.
    """
    if not isinstance(path, str):
        raise ValueError(no_class(where, "", base))
    module, _, name = path.rpartition(".")
    if not module:
        cls = known_classes(base).get(name) if base is not object else None
        if cls is None and base is not object:
            raise ValueError(no_class(where, path, base))
        return cls
    try:
        cls = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise ValueError(no_class(where, path, base)) from None
    except Exception as error:
        meant = base is not object and name in known_classes(base)
        hint = f" Did you mean {name}?" if meant else ""
        if isinstance(error, ModuleNotFoundError) and not hint and "." not in module:
            hint = " Is the folder of the file in PYTHONPATH?"
        raise ValueError(
            f"{where}: {shown(path)} cannot be imported: {clipped(str(error))}.{hint}"
        ) from error
    if not issubclass(cls, base) if isinstance(cls, type) else base is nn.Module:
        raise ValueError(f"{where}: {shown(path)} is not a {base.__name__}.")
    return cls


def no_class(where: str, path: str, base: type[Any]) -> str:
    """Say that a setting names no class, and which it may have meant."""
    module, _, name = path.rpartition(".")
    near = difflib.get_close_matches(name, known_classes(base) if base is not object else (), n=1)
    if not near and module in sys.modules:
        beside = [
            each for each, value in vars(sys.modules[module]).items() if inspect.isclass(value)
        ]
        near = [f"{module}.{each}" for each in difflib.get_close_matches(name, beside, n=1)]
    hint = f" Did you mean {near[0]}?" if near else ""
    setting = where.removeprefix("--")
    return f"{setting}: there is no class {shown(path)}.{hint}{known_text(base)}"


def known_text(base: type[Any]) -> str:
    """Say which classes a config may name, where something is known of them."""
    known = known_classes(base) if base is not object else {}
    listed = ", ".join(known) if len(known) < 25 else f"the names of {base.__name__} classes"
    return f" Known: {listed}, or the import path of your own." if known else ""


def spelled(name: str, typed: bool) -> str:
    """Spell an option, or a setting that is named in full.

    Args:
        name: Such as "--lr" or "model.ema.decay".
        typed: Whether it is for the command line; else it is for a YAML file.
    """
    name = name if typed else SHORT_OPTIONS.get(name, name)
    return "--" * typed + name.removeprefix("--")


def suggest(
    called: str, siblings: Mapping[str, str], typed: bool = False, elsewhere: bool = True
) -> str:
    """Say what setting was probably meant.

    Args:
        called: The name that does not exist.
        siblings: The names that exist at the same place, and how a suggestion spells each.
        typed: Whether it is an option of the command line; else it stands in a YAML file.
        elsewhere: Whether it may be a setting of another place.
    """
    plain = called.lstrip("-").replace("-", "_").lower()
    last = plain.rpartition(".")[2]
    if elsewhere and last in ELSEWHERE:
        return f"Did you mean {spelled(ELSEWHERE[last], typed)}?"
    near = difflib.get_close_matches(called, siblings, n=1, cutoff=0.75)
    same = [each for each in names() if elsewhere and each.rpartition(".")[2] == last]
    if not near and same:
        [nearest] = difflib.get_close_matches(plain, same, n=1, cutoff=0)
        return f"Did you mean {spelled(nearest, typed)}?"
    words = set(plain.split("_"))
    near = near or [each for each in siblings if words <= set(each.split("_"))]
    near = near or difflib.get_close_matches(called, siblings, n=1, cutoff=0.65)
    if near:
        return f"Did you mean {siblings[near[0]]}?"
    dotted = {each.rpartition(".")[2]: each for each in reversed(names())} if elsewhere else {}
    near = difflib.get_close_matches(last, dotted, n=1, cutoff=0.75)
    if near:
        return f"Did you mean {spelled(dotted[near[0]], typed)}?"
    if called.startswith("--"):
        return "`zsnr fit --help` shows the options."
    return f"Known: {', '.join(siblings)}."
