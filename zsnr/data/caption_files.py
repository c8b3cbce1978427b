"""Captions to measure a model on: which of a file's, and the seed of each one's image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsnr.data.captions import is_text
from zsnr.noise import derive_seed
from zsnr.untrusted import clipped, parse_json, read_text, shown

_MAX_BYTES = 2**28  # COCO's captions take 92 MB, with 3 million entries
_MAX_ENTRIES = 2**23


@dataclass(frozen=True)
class Captioned:
    """An image to make.

    Args:
        caption: Its prompt.
        seed: Of its noise.
        group: What the file groups it with; "" = nothing.
        number: The id of COCO's image, or the line in the file, from 1.
    """

    caption: str
    seed: int
    group: str
    number: int


def read_captions(path: str | Path, num_images: int, seed: int = 0) -> list[Captioned]:
    """Choose captions of a file.

    .json: as COCO has it, `annotations` with `image_id`, `id` and `caption`; of each image the
    caption with the smallest id. .txt: one a line. .jsonl: one object a line, with `caption` or
    `prompt` and, if wanted, `group`. Empty lines are skipped.

    Of all images (lines), the `num_images` whose hash of (seed, number) is smallest are taken, in
    the order of that hash, which is also the seed of the image: another number of images adds to
    the same ones, or leaves some out.

    Raises:
        ValueError: No such file, another kind, fewer captions than wanted, or one that is none.
    """
    path = Path(path).expanduser()
    readers = {".json": _coco, ".txt": _lines, ".jsonl": _objects}
    if path.suffix not in readers:
        raise ValueError(f"{path}: wanted a captions file that ends in .json, .txt or .jsonl.")
    if not path.exists():
        raise ValueError(f"{path}: no such captions file.")
    if num_images < 1:
        raise ValueError(f"num_images={num_images}: wanted at least 1.")
    text = read_text(path, _MAX_BYTES)
    try:
        found = readers[path.suffix](text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(found) < num_images:
        raise ValueError(
            f"{path} has captions of {len(found)} images, and num_images={num_images}: lower it."
        )
    chosen = [
        Captioned(caption, derive_seed(seed, number), group, number)
        for number, (caption, group) in found.items()
    ]
    return sorted(chosen, key=lambda one: (one.seed, one.number))[:num_images]


def _coco(text: str) -> dict[int, tuple[str, str]]:
    content = parse_json(text, most=_MAX_ENTRIES)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise ValueError("wanted an object with annotations, as COCO's captions have it.")
    first: dict[int, tuple[int, str]] = {}
    for i, annotation in enumerate(annotations):
        try:
            image, number = _id(annotation["image_id"]), _id(annotation["id"])
            caption = _text(annotation["caption"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"annotation {i} is {_short(annotation)}: wanted image_id, id and caption."
            ) from error
        if image not in first or number < first[image][0]:
            first[image] = (number, caption)
    return {image: (caption, "") for image, (_, caption) in first.items()}


def _lines(text: str) -> dict[int, tuple[str, str]]:
    lines = enumerate(text.split("\n"), start=1)
    return {number: (line.strip(), "") for number, line in lines if line.strip()}


def _objects(text: str) -> dict[int, tuple[str, str]]:
    found = {}
    for number, (line, _) in _lines(text).items():
        try:
            record = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {clipped(str(error))}.") from error
        try:
            caption = _text(record["caption" if "caption" in record else "prompt"])
            group = record.get("group") or ""
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f'line {number} is {_short(line)}: wanted an object such as {{"caption": "a cat"}}.'
            ) from error
        if not isinstance(group, str) or not is_text(group):
            raise ValueError(f"line {number}: group={shown(group)}: wanted a name.")
        found[number] = (caption, group)
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str) or not is_text(value):
        raise ValueError("no text")
    return " ".join(value.split())


def _id(value: Any) -> int:
    number = int(value)
    if not 0 <= number < 2**63:
        raise ValueError("no id")
    return number


def _short(value: Any) -> str:
    return clipped(value, 80) if isinstance(value, str) else shown(value)
