"""Choice of a sample's caption among its texts."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from zsnr.untrusted import parse_json, parse_object, shown

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

TEXT = "txt"
"""Name of the sample's text file, beside the fields of its json."""

NO_CAPTION = "it has no caption"
"""How the reason begins why a sample without a caption is broken."""

TEXTS = "texts"
"""The column of the index that lists the fields with texts, see `text_fields`."""

_USUAL = (TEXT, "caption", "text")
_MAX_NAMES = 256  # fields of one json that may hold captions
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Captions:
    """Source of the captions.

    Args:
        fields: Field names with the probability of each: "txt" is the text file, others are fields
            of the json. From a list of texts, one is chosen uniformly. The probability of a missing
            field is distributed among the others. Empty = the text file, else the json's caption or
            text.
        empty: Treatment of empty captions: "keep" trains them as the empty prompt, "drop" uses
            another field, and counts the sample as broken if all are empty.
    """

    fields: dict[str, float] = field(default_factory=dict)
    empty: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if any(not 0 < share <= 1e6 for share in self.fields.values()):
            raise ValueError(f"captions.fields={self.fields}: wanted positive numbers.")
        if self.empty not in ("keep", "drop"):
            raise ValueError(f"captions.empty={self.empty!r}: wanted 'keep' or 'drop'.")

    def is_certain(self, text: bytes | None, record: bytes | None) -> bool:
        """Return whether a sample has exactly one possible caption."""
        return sum(map(len, self._candidates(text, record).values())) == 1

    def choose(self, text: bytes | None, record: bytes | None, seed: int) -> str:
        """Choose a sample's caption.

        Args:
            text: Contents of its text file. None = it has no text file.
            record: Its json. None = it has no json.
            seed: Seed of the random choice.

        Raises:
            ValueError: The sample has no caption, or its text is not UTF-8, or its json is not
                valid.
        """
        candidates = self._candidates(text, record)
        if not candidates:
            raise ValueError(self._lacks(text, record))
        draw = random.Random(seed)
        names = list(candidates)
        name = names[0]
        if len(names) > 1:
            name = draw.choices(names, [self.fields[name] for name in names])[0]
        texts = candidates[name]
        chosen = texts[0] if len(texts) == 1 else draw.choice(texts)
        return chosen.strip()

    def usable(self, texts: pa.ChunkedArray) -> np.ndarray:
        """Return which samples have a caption.

        Args:
            texts: The result of `text_fields` for each sample, as a dictionary column. null = the
                sample has a caption, as the samples of a cache do.

        Returns:
            bool (count,).
        """
        import numpy as np

        parts = [np.zeros(0, bool)]
        for chunk in texts.chunks:
            answers_by_value = [self._accepts(value) for value in chunk.dictionary.to_pylist()]
            answers = np.array([*answers_by_value, True])
            parts.append(answers[chunk.indices.fill_null(len(answers_by_value)).to_numpy()])
        return np.concatenate(parts)

    def lacking(self) -> str:
        """Return the reason why a sample without a usable caption is broken."""
        condition = "is empty or not" if self.empty == "drop" else "is not"
        names = ", ".join(self.fields or _USUAL)
        return f"{NO_CAPTION}: no text in {names}, or it {condition} UTF-8"

    def _accepts(self, texts: str) -> bool:
        filled, blank = parse_text_fields(texts)
        usable = filled if self.empty == "drop" else filled + blank
        return any(name in usable for name in self.fields or _USUAL)

    def _lacks(self, text: bytes | None, record: bytes | None) -> str:
        if text is not None and _decode(text) is None:
            return "its caption is not UTF-8"
        if self.empty == "drop" and Captions(self.fields)._candidates(text, record):
            return "its caption is empty"
        return self.lacking()

    def _candidates(self, text: bytes | None, record: bytes | None) -> dict[str, list[str]]:
        """Collect the texts of each configured field; by default, of the first usual field."""
        values: dict[str, Any] = {}
        if record is not None and set(self.fields) != {TEXT}:
            values = parse_record(record)
        values[TEXT] = None if text is None else _decode(text)
        candidates: dict[str, list[str]] = {}
        for name in self.fields or _USUAL:
            texts = _texts(values.get(name))
            if self.empty == "drop":
                texts = [text for text in texts if text.strip()]
            if texts:
                candidates[name] = texts
                if not self.fields:
                    break
        return candidates


def parse_record(record: bytes) -> dict[str, Any]:
    """Read a sample's json; the last value of a repeated key is used.

    Raises:
        ValueError: The text is not a JSON object.
    """
    return parse_object(record, "its json", repeated=True)


def text_fields(text: bytes | None, record: Mapping[str, Any]) -> str:
    """List the fields that hold texts, and those whose texts are all blank, as JSON.

    The index stores this list, so that samples without a caption are recognized without reading
    the captions. A dataset has few distinct lists.

    Args:
        text: Contents of the text file. None = the sample has no text file.
        record: Fields of the json.
    """
    values = {TEXT: None if text is None else _decode(text)}
    values |= {name: value for name, value in record.items() if name != TEXT}
    filled: list[str] = []
    blank: list[str] = []
    for name, value in values.items():
        if not isinstance(value, str | list) or len(name) > 64 or not is_text(name):
            continue
        texts = _texts(value)
        if texts and len(filled) + len(blank) < _MAX_NAMES:
            (filled if any(map(str.strip, texts)) else blank).append(name)
    return json.dumps([filled, blank])


def parse_text_fields(texts: str) -> tuple[list[str], list[str]]:
    """Parse the result of `text_fields`.

    Raises:
        ValueError: The text is not a result of `text_fields`.
    """
    value = parse_json(texts)
    lists = value if isinstance(value, list) else []
    if [type(part) for part in lists] != [list, list] or any(
        not isinstance(name, str) for part in lists for name in part
    ):
        raise ValueError(f"its {TEXTS} hold {shown(texts)}: wanted two lists of fields")
    return lists[0], lists[1]


def field_names(texts: pa.ChunkedArray, limit: int = 5) -> list[str]:
    """List the fields that hold text in the largest number of samples, most common first.

    Args:
        texts: A column as for `Captions.usable`.
        limit: Maximum number of fields.
    """
    counts: Counter[str] = Counter()
    for value, count in Counter(texts.to_pylist()).items():
        counts.update(dict.fromkeys(parse_text_fields(value)[0], count))
    return [name for name, _ in counts.most_common(limit)]


def is_text(text: str) -> bool:
    """Whether UTF-8 can encode the text: it holds no surrogates, paired or from file names."""
    return text.isascii() or not _SURROGATE.search(text)


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _texts(value: Any) -> list[str]:
    """Collect the valid texts of a field: those without lone surrogates."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and is_text(text)]
