"""Prompts files: one prompt per line, as plain text or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from zsnr.assets import resolve_asset
from zsnr.untrusted import near_path, parse_json, read_text, shown

_MAX_IMAGES = 1_000_000
_MAX_SIDE = 2**16  # pixels


@dataclass(frozen=True)
class PromptRequest:
    """One image that a prompts file requests.

    Args:
        prompt: Prompt of the image.
        negative_prompt: Prompt to guide away from; "" = none.
        seed: Seed of the image.
        height: Height in pixels. None = the model's default.
        width: Width in pixels. None = the model's default.
        line: Line in the file, from 1.
        group: Group whose images are averaged in comparisons.
        brightness_rank: Rank of the group, from dark to bright. None = the group is not ranked.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    height: int | None = None
    width: int | None = None
    line: int = 0
    group: str = field(default="", repr=False)  # neither of the two decides the image
    brightness_rank: int | None = field(default=None, repr=False)

    @property
    def filename(self) -> str:
        return f"{self.line:05d}-{self.seed}.png"


_TYPES = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "count": int,
    "height": int,
    "width": int,
    "group": str,
    "brightness_rank": int,
}
_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(PromptRequest)}


def read_prompts(path: str | Path, seed: int = 0) -> list[PromptRequest]:
    """Read a prompts file.

    In a .txt file, every line is a prompt; in a .jsonl file, every line is an object with prompt
    and, optionally, negative_prompt, seed, count (seeds s .. s+n-1), height, width, group,
    brightness_rank. Empty lines are skipped. `seed` is the default seed.

    Raises:
        ValueError: The file does not exist, has another suffix, holds no prompts, or has an
            invalid line, which the message names.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: wanted a prompts file that ends in .txt or .jsonl.")
    if not path.exists():
        raise ValueError(f"{path}: no such prompts file.{near_path(path)}")
    lines = read_text(path).split("\n")
    requests: list[PromptRequest] = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        if path.suffix == ".txt":
            requests.append(PromptRequest(text.strip(), seed=seed, line=number))
            continue
        try:
            requests += _parse(parse_json(text), number, seed)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        _check_total(requests)
    if not requests:
        raise ValueError(f"{path} holds no prompts.")
    return requests


def parse_prompts(records: Sequence[Any], seed: int = 0) -> list[PromptRequest]:
    """Read prompts from a list of objects in a YAML file; `line` is the number in the list.

    `seed` is the default seed.

    Raises:
        ValueError: The list is empty, or has an invalid entry, which the message names.
    """
    requests: list[PromptRequest] = []
    for number, record in enumerate(records, start=1):
        try:
            requests += _parse(record, number, seed)
        except ValueError as error:
            raise ValueError(f"data.prompts, entry {number}: {error}") from error
        _check_total(requests)
    if not requests:
        raise ValueError("data.prompts holds no prompts.")
    return requests


def brightness_suite() -> Path:
    """Return the bundled prompts file for the paper's claim: groups from solid black to white."""
    return Path(resolve_asset("asset:prompts")) / "brightness.jsonl"


def _check_total(requests: Sequence[PromptRequest]) -> None:
    if len(requests) > _MAX_IMAGES:
        raise ValueError(f"The prompts request over {_MAX_IMAGES} images: use several files.")


def _parse(record: Any, line: int, default_seed: int) -> list[PromptRequest]:
    if not isinstance(record, dict):
        raise ValueError('wanted an object such as {"prompt": "a black cat", "seed": 0}.')
    for name, value in record.items():
        if name not in _TYPES:
            raise ValueError(f"{shown(name)} is unknown. Known: {', '.join(_TYPES)}.")
        nothing = value is None and name not in ("prompt", "count")
        if not nothing and (not isinstance(value, _TYPES[name]) or isinstance(value, bool)):
            type_name = "text" if _TYPES[name] is str else "a whole number"
            raise ValueError(f"{name}={shown(value)}: wanted {type_name}.")
    if "prompt" not in record:
        raise ValueError("there is no prompt.")
    defaults = {**_DEFAULTS, "seed": default_seed}
    values = {k: defaults[k] if v is None else v for k, v in record.items()}
    count, seed = values.pop("count", 1), values.pop("seed", default_seed)
    for name in ("height", "width"):
        if values.get(name) is not None and not 1 <= values[name] <= _MAX_SIDE:
            raise ValueError(
                f"{name}={shown(values[name])}: wanted at least 1, at most {_MAX_SIDE}."
            )
    if not 1 <= count <= _MAX_IMAGES:
        raise ValueError(f"count={shown(count)}: wanted at least 1, at most {_MAX_IMAGES}.")
    if not 0 <= seed <= 2**32 - count:
        raise ValueError(f"seed={shown(seed)}: wanted 0 to 4294967295, with count={count}.")
    return [PromptRequest(**values, seed=seed + i, line=line) for i in range(count)]
