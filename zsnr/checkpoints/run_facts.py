"""run.json: facts about a run as plain values beside its checkpoints, readable without pickle.

{"format": 1, "zsnr_version", "versions", "global_step", "schedule", "prediction_type", "loss",
"sampling", "image_size", "offset_noise", "caption_dropout", "ema", "batch_size", "learning_rate",
"data", "start", "metrics", "history"}; training/facts.py describes each entry. history has an entry
for each of the last starts: {"time", "zsnr_version", "from_step", "host", "nodes", "ranks",
"changed": {setting: [old, new]}}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsnr.files import replacing
from zsnr.public import public
from zsnr.untrusted import read_json

NAME = "run.json"
FORMAT = 1
_STARTS = 100  # length of the history


def write_run_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write run.json into a folder of checkpoints; a crash leaves the old one or the new one."""
    with replacing(folder / NAME) as beside:
        beside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def add_start(facts: Mapping[str, Any], start: Mapping[str, Any]) -> list[Any]:
    """Return the history of facts with one more start."""
    history = facts.get("history")
    previous = history if isinstance(history, list) else []
    return [*previous, dict(start)][-_STARTS:]


def read_run_facts(folder: Path) -> dict[str, Any] | None:
    """Read a folder's run.json. None = there is none.

    Raises:
        ValueError: The file is not a run.json of this package, or has a later format.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    facts = read_json(path)
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path} is not a run.json of format {FORMAT}, which this version reads.")
    return facts


def published(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts for publication: without secrets, starts, and paths of the machine."""
    facts = {name: public(value) for name, value in facts.items() if name != "history"}
    data, start = facts.get("data"), facts.get("start")
    if data is not None:
        facts["data"] = [_named(source) for source in (data if isinstance(data, list) else [data])]
    if isinstance(start, Mapping):
        facts["start"] = {**start, "unet": _named(start.get("unet"))}
    sampling = facts.get("sampling")
    if isinstance(sampling, Mapping) and "spacing" in sampling:
        facts["sampling"] = {**sampling, "spacing": _named(sampling["spacing"])}
    return facts


def _named(source: Any) -> Any:
    """Shorten a local path to its last two parts."""
    local = isinstance(source, str) and source.startswith(("/", "~", "."))
    return "/".join(source.split("/")[-2:]) if local else source
