"""Which text of a sample is its caption."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TEXT = "txt"
"""The sample's text file, among the fields of its json."""


@dataclass(frozen=True)
class Captions:
    """Where captions come from.

    Args:
        fields: Names of fields with the probability of each: "txt" is the text file, others are
            fields of the json. A field that is a list gives one of its texts, each as likely. A
            field that a sample lacks passes its probability to the others. Empty = the text file,
            else the json's caption or text.
        empty: What to do with an empty caption: "keep" trains it as no prompt, "drop" counts the
            sample as broken.
    """

    fields: dict[str, float] = field(default_factory=dict)
    empty: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if any(not 0 < share <= 1e6 for share in self.fields.values()):
            raise ValueError(f"captions.fields={self.fields}: wanted positive numbers.")
        if self.empty not in ("keep", "drop"):
            raise ValueError(f"captions.empty={self.empty!r}: wanted 'keep' or 'drop'.")

    def is_certain(self, text: bytes | None, record: bytes | None) -> bool:
        """Tell whether a sample has the same caption each time."""
        return sum(map(len, self._candidates(text, record).values())) == 1

    def choose(self, text: bytes | None, record: bytes | None, seed: int) -> str:
        """Choose a sample's caption.

        Args:
            text: Its text file. None = there is none.
            record: Its json, likewise.
            seed: Of the choice.

        Raises:
            ValueError: There is no caption, or it is no UTF-8 or no JSON; one line.
        """
        found = self._candidates(text, record)
        if not found:
            wanted = ", ".join(self.fields) or f"{TEXT}, caption, text"
            raise ValueError(f"it has no caption: no text in {wanted}")
        draw = random.Random(seed)
        names = list(found)
        name = names[0]
        if len(names) > 1:
            name = draw.choices(names, [self.fields[name] for name in names])[0]
        texts = found[name]
        chosen = texts[0] if len(texts) == 1 else draw.choice(texts)
        caption = chosen.strip()
        if not caption and self.empty == "drop":
            raise ValueError("its caption is empty")
        return caption

    def _candidates(self, text: bytes | None, record: bytes | None) -> dict[str, list[str]]:
        """Gather the texts of each field that the sample has; of the usual ones the first."""
        values: dict[str, Any] = {}
        if record is not None and set(self.fields) != {TEXT}:
            values = dict(_parse(record))
        values.pop(TEXT, None)
        if text is not None and (not self.fields or TEXT in self.fields):
            values[TEXT] = _decode(text)
        found: dict[str, list[str]] = {}
        for name in self.fields or (TEXT, "caption", "text"):
            texts = _texts(values.get(name))
            if texts:
                found[name] = texts
                if not self.fields:
                    break
        return found


def _parse(record: bytes) -> Mapping[str, Any]:
    try:
        parsed = json.loads(_decode(record))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its json is unreadable: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError("its json is no object")
    return parsed


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption is not UTF-8: {error.reason}") from error


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for text in value if isinstance(text, str)]
    return []
