"""How an exported model is sampled and reads prompts, where other programs ignore it.

The formats of diffusers and of single files declare a schedule and a prediction type, but neither
number of steps nor sampler nor guidance, nor how many tokens of a prompt are read. An export
carries them all the same, so that its images here are those of its checkpoint: a folder in
`zsnr.json` beside model_index.json, which diffusers does not read, {"format": 1, "sampling": {...},
"prompts": {...}}; a single file in its metadata as `zsnr.sampling` and `zsnr.prompts`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from zsnr.checkpoints.model import Model
from zsnr.checkpoints.run_facts import published
from zsnr.guidance import Guidance
from zsnr.sampling import read_declared
from zsnr.untrusted import read_json, shown
from zsnr.weights.ldm_file import LdmFile, read_metadata
from zsnr.weights.source import fetch_file

FILE = "zsnr.json"
_FORMAT = 1
_GUIDANCE = tuple(f"guidance_{option.name}" for option in fields(Guidance))
_PARTS = {
    "sampling": ("sampler", "sampler_options", "num_steps", "spacing", "timesteps", *_GUIDANCE),
    "prompts": ("max_tokens", "prompt_weights"),
}


@dataclass(frozen=True)
class Exported:
    """What an export declares, as plain values; empty = it declares nothing.

    Attributes:
        sampling: As `describe_sampling` returns it.
        prompts: Options of a conditioner: max_tokens and prompt_weights.
    """

    sampling: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=dict)


def exported(model: Model) -> dict[str, dict[str, Any]]:
    """Return what the export of a model declares, by name; only what is not empty."""
    tokenizer = getattr(model.conditioner, "described", model.conditioner).tokenizer
    prompts = {} if tokenizer is None else tokenizer.settings()
    sampling = _exported_sampling(model.sampling) if model.sampling else {}
    return {name: v for name, v in (("sampling", sampling), ("prompts", prompts)) if v}


def _exported_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an export declares of sampling, without paths of this machine.

    Guidance against the raw weights is left out, with a warning, because an export has no weights
    but its own.

    Args:
        sampling: What `describe_sampling` returned.
    """
    values: dict[str, Any] = dict(published({"sampling": sampling})["sampling"])
    if values.get("guidance_against", "negative") != "negative":
        warnings.warn(
            "The model declares guidance against its raw weights, which an export does not hold: "
            "the export declares no guidance.",
            stacklevel=3,
        )
        values = {name: value for name, value in values.items() if name not in _GUIDANCE}
    return values


def write_folder_settings(folder: Path, model: Model) -> None:
    """Write the file of a diffusers folder, if its model declares something."""
    settings = exported(model)
    if settings:
        text = json.dumps({"format": _FORMAT, **settings}, indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")


def file_settings(model: Model) -> dict[str, str]:
    """Return the metadata of a single file."""
    return {f"zsnr.{name}": json.dumps(settings) for name, settings in exported(model).items()}


def read_exported(source: str | LdmFile) -> Exported:
    """Read what a diffusers folder, a hub id or a single file declares.

    Raises:
        ValueError: It cannot be read, or declares what cannot be sampled.
    """
    if isinstance(source, LdmFile):
        pairs = [read_metadata(source.path, source.metadata, f"zsnr.{name}") for name in _PARTS]
        return Exported(*(_checked(name, *pair) for name, pair in zip(_PARTS, pairs, strict=True)))
    path = fetch_file(source, FILE)
    if path is None:
        return Exported()
    content = read_json(path)
    if content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not of format {_FORMAT}, which this version of zsnr reads.")
    return Exported(*(_checked(name, f"{path}: {name}", content.get(name)) for name in _PARTS))


def _checked(name: str, label: str, values: Any) -> dict[str, Any]:
    """Return the known settings among untrusted values, and nothing else.

    Raises:
        ValueError: They cannot be sampled.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{label} is {shown(values)}: wanted settings by name.")
    settings = {key: values[key] for key in _PARTS[name] if key in values}
    try:
        if name == "sampling":
            read_declared(settings)
        elif not isinstance(settings.get("prompt_weights", False), bool):
            weights = shown(settings["prompt_weights"])
            raise ValueError(f"prompt_weights={weights}: wanted true or false.")
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    return settings
