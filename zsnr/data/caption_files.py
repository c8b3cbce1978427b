"""Captions to evaluate a model on: selection from a file, and the seed of each image."""

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
    """An image to generate.

    Args:
        caption: Prompt of the image.
        seed: Seed of its noise.
        group: Group of the image in the file; "" = none.
        number: Image id in COCO, or line number in the file, from 1.
    """

    caption: str
    seed: int
    group: str
    number: int


def read_captions(path: str | Path, num_images: int, seed: int = 0) -> list[Captioned]:
    """Choose captions from a file.

    .json: COCO's format, `annotations` with `image_id`, `id` and `caption`; the caption with the
    smallest id is used for each image. .txt: one caption per line. .jsonl: one object per line,
    with `caption` or `prompt` and, optionally, `group`. Empty lines are skipped.

    The `num_images` images (lines) with the smallest hash of (seed, number) are chosen, in the
    order of that hash, which is also the seed of the image. So a larger number of images extends
    the same selection, and a smaller number shortens it.

    Raises:
        ValueError: The file does not exist, is of an unsupported type, has fewer captions than
            `num_images`, or holds an entry without a caption.
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
        captions = readers[path.suffix](text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(captions) < num_images:
        raise ValueError(
            f"{path} has captions of {len(captions)} images, and num_images={num_images}: lower it."
        )
    chosen = [
        Captioned(caption, derive_seed(seed, number), group, number)
        for number, (caption, group) in captions.items()
    ]
    return sorted(chosen, key=lambda item: (item.seed, item.number))[:num_images]


def _coco(text: str) -> dict[int, tuple[str, str]]:
    content = parse_json(text, limit=_MAX_ENTRIES)
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
    captions = {}
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
        captions[number] = (caption, group)
    return captions


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
