"""Short options, and the settings that they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import yaml  # type: ignore[import-untyped]

from zsnr.guidance import Guidance
from zsnr.reports.arms import parse_setting
from zsnr.samplers import get_sampler
from zsnr.samplers.recommend import AUTO

TRAINING_OPTIONS = {
    "--lr": "--model.optimizer.init_args.lr",
    "--max-steps": "--trainer.max_steps",
    "--batch-size": "--data.batch_size",
}
"""Short options of fit, and of commands that read its configs."""

SHORT_OPTIONS = {
    **TRAINING_OPTIONS,
    "--num-steps": "--model.sampling.num_steps",
    "--spacing": "--model.sampling.spacing",
    **{
        f"--guidance-{option.name.replace('_', '-')}": f"--model.sampling.guidance.{option.name}"
        for option in dataclasses.fields(Guidance)
    },
    "--prompts": "--data.prompts",
    "--output": "--trainer.default_root_dir",
    "-o": "--trainer.default_root_dir",
    "--sampler": "--model.sampling.sampler",
    "--seed": "--data.seed",
}
"""Short options of fit, validate and test; predict has other settings for some of them."""

_OF_PREDICT = {
    "--seed": "--data.prompt_seed",
    "--batch-size": "--data.predict_batch_size",
    **dict.fromkeys(("--output", "-o"), "--output.folder"),
}
_FLAGS = ("-h", "--help", "--print_config", "--print-config")


def expand_option(name: str, command: str) -> str:
    """Return the setting that a short option stands for; any other name as it is."""
    if command == "predict" and name in _OF_PREDICT:
        return _OF_PREDICT[name]
    return SHORT_OPTIONS.get(name, name)


def expand_short_options(arguments: Sequence[str]) -> list[str]:
    """Replace short options by the settings they stand for.

    Args:
        arguments: The command line, with or without the command's name.

    Raises:
        ValueError: A short option lacks its value or cannot be read, or --sampler is neither a
            registered name nor "auto".
    """
    command = arguments[0] if arguments else ""
    expanded: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.startswith("-o") and not name.startswith("--") and len(name) > 2:
            name, equals, value = "-o", "=", argument[2:].removeprefix("=")
        if name not in SHORT_OPTIONS:
            expanded.append(argument)
            continue
        if not equals:
            following = next(rest, None)
            if following is None or (following.startswith("--") and following != "--"):
                raise ValueError(f"{name} needs a value.")
            value = following
        if name == "--sampler" and value != AUTO and "." not in value:
            cls = type(get_sampler(value))
            value = f"{cls.__module__}.{cls.__qualname__}"
        if name in ("--guidance-interval", "--guidance-curve"):
            value = _as_yaml(name, value)
        expanded.append(f"{expand_option(name, command)}={value}")
    return expanded


def _as_yaml(name: str, text: str) -> str:
    """Write an interval or a curve as YAML; `zsnr sample` reads the same texts."""
    setting = parse_setting(name.removeprefix("--").replace("-", "_"), text)
    if setting is None:
        return "null"
    parts = [list(part) if isinstance(part, tuple) else part for part in setting]
    return str(yaml.safe_dump(parts, default_flow_style=True, width=math.inf)).strip()


def take_run(arguments: Sequence[str]) -> tuple[list[str], str | None, bool]:
    """Take the run, and --follow, out of the command line of validate.

    Args:
        arguments: The command line with short options expanded, and without the command's name.

    Returns:
        The other words; the run, None if there is none; and whether it is followed.

    Raises:
        ValueError: Several runs are named, or --follow has a value or no run.
    """
    rest: list[str] = []
    runs: list[str] = []
    words = iter([word for word in arguments if word != "--follow"])
    follows = "--follow" in arguments
    for word in words:
        if word.startswith("--follow="):
            raise ValueError(f"{word}: --follow takes no value.")
        if not word.startswith("-"):
            runs.append(word)
            continue
        rest.append(word)
        takes = word in ("-c", "--config") or (word.startswith("--") and word not in _FLAGS)
        if takes and "=" not in word:
            rest += [value for value in [next(words, None)] if value is not None]
    if len(runs) > 1:
        raise ValueError(
            f"{runs[1]!r} belongs to no option: one run is named, {runs[0]!r}. Settings are given "
            "by name, as in --data.val FOLDER, and config files follow -c."
        )
    if follows and not runs:
        raise ValueError("--follow needs the folder of a run: zsnr validate RUN --follow.")
    return rest, runs[0] if runs else None, follows


def option_values(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """List the settings of a command line by name, with their values; without configs and flags.

    Args:
        arguments: The command line with short options expanded, and without the command's name.

    Raises:
        ValueError: A word belongs to no option.
    """
    words = list(arguments)
    i = 0
    while i < len(words):
        word, i = words[i], i + 1
        name, equals, value = word.partition("=")
        if name in _FLAGS:
            continue
        if word.startswith("-c") and not word.startswith("--") and word not in ("-c",):
            continue
        if name in ("-c", "--config"):
            i += not equals
            continue
        if not word.startswith("--"):
            raise ValueError(
                f"{word!r} belongs to no option: settings are given by name, as in --max-steps "
                "100, and config files follow -c."
            )
        if equals:
            yield name.removeprefix("--"), value
        elif i < len(words) and not words[i].startswith("--"):
            yield name.removeprefix("--"), words[i]
            i += 1
        else:
            yield name.removeprefix("--"), None
