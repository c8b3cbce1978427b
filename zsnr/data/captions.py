"""Which text of a sample is its caption, and whether it has one."""

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
"""The sample's text file, among the fields of its json."""

TEXTS = "texts"
"""The column of the index that names the fields with texts, see `text_fields`."""

_USUAL = (TEXT, "caption", "text")
_MOST_NAMES = 256  # fields of one json that may hold captions
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Captions:
    """Where captions come from.

    Args:
        fields: Names of fields with the probability of each: "txt" is the text file, others are
            fields of the json. A field that is a list gives one of its texts, each as likely. A
            field that a sample lacks passes its probability to the others. Empty = the text file,
            else the json's caption or text.
        empty: What to do with an empty caption: "keep" trains it as no prompt, "drop" takes
            another field's, and counts the sample as broken where there is none.
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
            ValueError: There is no caption, or it is not UTF-8 or not JSON; one line.
        """
        found = self._candidates(text, record)
        if not found:
            raise ValueError(self._lacks(text, record))
        draw = random.Random(seed)
        names = list(found)
        name = names[0]
        if len(names) > 1:
            name = draw.choices(names, [self.fields[name] for name in names])[0]
        texts = found[name]
        chosen = texts[0] if len(texts) == 1 else draw.choice(texts)
        return chosen.strip()

    def usable(self, texts: pa.ChunkedArray) -> np.ndarray:
        """Tell which samples have a caption.

        Args:
            texts: What `text_fields` says of each, as a dictionary column. null = it has one, as
                the samples of a cache do.

        Returns:
            bool (count,).
        """
        import numpy as np

        parts = [np.zeros(0, bool)]
        for chunk in texts.chunks:
            known = [self._accepts(each) for each in chunk.dictionary.to_pylist()]
            answers = np.array([*known, True])
            parts.append(answers[chunk.indices.fill_null(len(known)).to_numpy()])
        return np.concatenate(parts)

    def lacking(self) -> str:
        """Say what a sample lacks that has no caption."""
        how = "is empty or not" if self.empty == "drop" else "is not"
        return (
            f"it has no caption: no text in {', '.join(self.fields or _USUAL)}, or it {how} UTF-8"
        )

    def _accepts(self, texts: str) -> bool:
        filled, blank = parse_text_fields(texts)
        kept = filled if self.empty == "drop" else filled + blank
        return any(name in kept for name in self.fields or _USUAL)

    def _lacks(self, text: bytes | None, record: bytes | None) -> str:
        if text is not None and _decode(text) is None:
            return "its caption is not UTF-8"
        if self.empty == "drop" and Captions(self.fields)._candidates(text, record):
            return "its caption is empty"
        return self.lacking()

    def _candidates(self, text: bytes | None, record: bytes | None) -> dict[str, list[str]]:
        """Gather the texts of each field that the sample has; of the usual ones the first."""
        values: dict[str, Any] = {}
        if record is not None and set(self.fields) != {TEXT}:
            values = parse_record(record)
        values[TEXT] = None if text is None else _decode(text)
        found: dict[str, list[str]] = {}
        for name in self.fields or _USUAL:
            texts = _texts(values.get(name))
            if self.empty == "drop":
                texts = [each for each in texts if each.strip()]
            if texts:
                found[name] = texts
                if not self.fields:
                    break
        return found


def parse_record(record: bytes) -> dict[str, Any]:
    """Read a sample's json; of a repeated key the last value counts.

    Raises:
        ValueError: It is not a JSON object; one line.
    """
    return parse_object(record, "its json", repeated=True)


def text_fields(text: bytes | None, record: Mapping[str, Any]) -> str:
    """Name the fields that hold texts, and those whose texts are all blank, as JSON.

    The index keeps this, so that a run's captions are judged without reading them. Samples of a
    data set have few different answers.

    Args:
        text: The text file. None = there is none.
        record: The fields of the json.
    """
    values = {TEXT: None if text is None else _decode(text)}
    values |= {name: value for name, value in record.items() if name != TEXT}
    filled: list[str] = []
    blank: list[str] = []
    for name, value in values.items():
        if not isinstance(value, str | list) or len(name) > 64 or not is_text(name):
            continue
        texts = _texts(value)
        if texts and len(filled) + len(blank) < _MOST_NAMES:
            (filled if any(map(str.strip, texts)) else blank).append(name)
    return json.dumps([filled, blank])


def parse_text_fields(texts: str) -> tuple[list[str], list[str]]:
    """Read what `text_fields` has written.

    Raises:
        ValueError: Another wrote it.
    """
    value = parse_json(texts)
    lists = value if isinstance(value, list) else []
    if [type(part) for part in lists] != [list, list] or any(
        not isinstance(name, str) for part in lists for name in part
    ):
        raise ValueError(f"its {TEXTS} hold {shown(texts)}: wanted two lists of fields")
    return lists[0], lists[1]


def field_names(texts: pa.ChunkedArray, most: int = 5) -> list[str]:
    """List the fields that most samples fill with text, the commonest first.

    Args:
        texts: As of `Captions.usable`.
        most: How many to list.
    """
    counts: Counter[str] = Counter()
    for value, count in Counter(texts.to_pylist()).items():
        counts.update(dict.fromkeys(parse_text_fields(value)[0], count))
    return [name for name, _ in counts.most_common(most)]


def is_text(text: str) -> bool:
    """Whether UTF-8 can hold it: it has no half of a character, and no byte of a name as one."""
    return text.isascii() or not _SURROGATE.search(text)


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _texts(value: Any) -> list[str]:
    """Gather the texts of a field that are text: not those with halves of characters."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and is_text(text)]
