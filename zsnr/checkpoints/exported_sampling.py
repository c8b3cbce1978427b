"""How an exported model is sampled, where other programs ignore it.

The formats of diffusers and of single files declare a schedule and a prediction type, but neither
number of steps nor sampler nor guidance. An export carries them all the same, so that its defaults
here are those of its checkpoint: a folder in `zsnr.json` beside model_index.json, which diffusers
does not read, {"format": 1, "sampling": {...}}; a single file in its metadata as `zsnr.sampling`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from zsnr.checkpoints.run_facts import published
from zsnr.guidance import Guidance
from zsnr.sampling import read_declared
from zsnr.untrusted import read_json, shown
from zsnr.weights.ldm_file import LdmFile, read_metadata
from zsnr.weights.source import fetch_file

FILE = "zsnr.json"
METADATA = "zsnr.sampling"
_FORMAT = 1
_GUIDANCE = tuple(f"guidance_{option.name}" for option in fields(Guidance))
_KEYS = ("sampler", "sampler_options", "num_steps", "spacing", "timesteps", *_GUIDANCE)


def exported_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an export declares: what its model declares, without paths of this machine.

    Guidance against the raw weights is left out, with a warning, because an export has no weights
    but its own.

    Args:
        sampling: What `describe_sampling` returned; empty = the model declares nothing.
    """
    values: dict[str, Any] = dict(published({"sampling": sampling})["sampling"])
    if values.get("guidance_against", "negative") != "negative":
        warnings.warn(
            "The model declares guidance against its raw weights, which an export does not hold: "
            "the export declares no guidance.",
            stacklevel=2,
        )
        values = {name: value for name, value in values.items() if name not in _GUIDANCE}
    return values


def write_folder_sampling(folder: Path, sampling: Mapping[str, Any]) -> None:
    """Write the file of a diffusers folder, if its model declares something."""
    if sampling:
        text = json.dumps({"format": _FORMAT, "sampling": exported_sampling(sampling)}, indent=1)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")


def folder_sampling(source: str) -> dict[str, Any]:
    """Read what a diffusers folder or hub id declares; empty if it declares nothing.

    Raises:
        ValueError: Its file cannot be read, or declares what cannot be sampled.
    """
    path = fetch_file(source, FILE)
    if path is None:
        return {}
    content = read_json(path)
    if content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not of format {_FORMAT}, which this version of zsnr reads.")
    return _checked(content.get("sampling"), str(path))


def file_sampling(file: LdmFile) -> dict[str, Any]:
    """Read what a single file declares; empty if it declares nothing.

    Raises:
        ValueError: Its metadata cannot be read, or declares what cannot be sampled.
    """
    label, sampling = read_metadata(file.path, file.metadata, METADATA)
    return {} if sampling is None else _checked(sampling, label)


def _checked(sampling: Any, label: str) -> dict[str, Any]:
    """Return the settings of sampling among untrusted values, and nothing else.

    Raises:
        ValueError: They cannot be sampled.
    """
    if not isinstance(sampling, Mapping):
        raise ValueError(f"{label}: sampling is {shown(sampling)}: wanted settings by name.")
    settings = {name: sampling[name] for name in _KEYS if name in sampling}
    try:
        read_declared(settings)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    return settings
