"""Filters over the fields of a sample's json, evaluated on the index."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

IMAGE_FIELDS = ("image_width", "image_height", "image_bytes")
"""Fields that every sample has, because they are measured from the image itself."""


@dataclass(frozen=True)
class Filter:
    """Keep the samples whose field lies in a range, or in a list.

    Args:
        field: A field of the sample's json, such as aesthetic, pwatermark, punsafe, similarity,
            original_width or LANGUAGE; or image_width, image_height (pixels) or image_bytes,
            measured from the image.
        min: Keep values of at least this.
        max: Keep values of at most this.
        one_of: Keep values of this list.
        none_of: Drop values of this list.
        missing: Treatment of samples in which the field is missing or null: "error" refuses the
            data, "keep" keeps them, "drop" drops them.
    """

    field: str
    min: float | None = None
    max: float | None = None
    one_of: tuple[float | str, ...] | None = None
    none_of: tuple[float | str, ...] | None = None
    missing: Literal["error", "keep", "drop"] = "error"

    def __post_init__(self) -> None:
        for name in ("min", "max"):  # 5 and 5.0 are one filter
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        for name in ("one_of", "none_of"):
            values = getattr(self, name)
            if values is not None:
                same = tuple(v if isinstance(v, str) else float(v) for v in values)
                object.__setattr__(self, name, same)
        limits = (self.min, self.max, self.one_of, self.none_of)
        if all(limit is None for limit in limits):
            raise ValueError(f"The filter of {self.field!r} has no min, max, one_of or none_of.")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"The filter of {self.field!r} keeps nothing: min > max.")
        if self.missing not in ("error", "keep", "drop"):
            raise ValueError(f"missing={self.missing!r}: wanted 'error', 'keep' or 'drop'.")

    def __str__(self) -> str:
        parts = [] if self.min is None else [f">= {self.min:g}"]
        parts += [] if self.max is None else [f"<= {self.max:g}"]
        parts += [] if self.one_of is None else [f"in {', '.join(map(str, self.one_of))}"]
        parts += [] if self.none_of is None else [f"not in {', '.join(map(str, self.none_of))}"]
        return f"{self.field} {' and '.join(parts)}"

    def keeps(self, values: pa.Array | pa.ChunkedArray | None, count: int) -> np.ndarray:
        """Decide for each sample; one that lacks the field is kept only where `missing` is "keep".

        Args:
            values: The field's column, null where it is missing. None = no sample has the field.
            count: Number of samples.

        Returns:
            bool (count,).

        Raises:
            ValueError: The field's type does not match the filter.
        """
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        if values is None:
            return np.full(count, self.missing == "keep")
        absent = values.is_null().to_numpy(False)
        keep = pa.chunked_array([pa.array(np.ones(count, bool))])
        try:
            for limit, test in ((self.min, pc.greater_equal), (self.max, pc.less_equal)):
                if limit is not None:
                    keep = pc.and_(keep, test(values, pa.scalar(float(limit))))
            for listed, include in ((self.one_of, True), (self.none_of, False)):
                if listed is not None:
                    in_list = pc.is_in(values, value_set=_typed(listed, values.type))
                    keep = pc.and_(keep, in_list if include else pc.invert(in_list))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ValueError(
                f"The filter {self} does not match the field, which holds {values.type}."
            ) from error
        result: np.ndarray = pc.fill_null(keep, False).to_numpy()
        return np.where(absent, self.missing == "keep", result)


def parse_filter(text: str, missing: Literal["error", "keep", "drop"] = "error") -> Filter:
    """Parse a filter of the command line: "aesthetic>=5", "LANGUAGE in en,de".

    Raises:
        ValueError: The text is not a filter.
    """
    match = re.fullmatch(r"\s*([\w.-]+?)\s*(>=|<=|\bin\b|\bnot in\b)\s*(\S.*?)\s*", text)
    try:
        if match is None:
            raise ValueError
        field, test, value = match.groups()
        if test in (">=", "<="):
            low, high = (float(value), None) if test == ">=" else (None, float(value))
            return Filter(field, low, high, missing=missing)
        listed = tuple(_number(part.strip()) for part in value.split(","))
        return Filter(
            field,
            missing=missing,
            one_of=listed if test == "in" else None,
            none_of=listed if test == "not in" else None,
        )
    except ValueError as error:
        raise ValueError(
            f"--filter {text!r}: wanted a filter such as 'aesthetic>=5', 'pwatermark<=0.8', "
            "'LANGUAGE in en,de' or 'LANGUAGE not in ru'."
        ) from error


class Sieve:
    """Filters applied in sequence to data that arrive in blocks.

    Args:
        filters: The filters, in order; a sample counts for the first one that drops it.

    Attributes:
        removed: Number of samples that each filter has removed so far.
    """

    def __init__(self, filters: Sequence[Filter]) -> None:
        self._filters = filters
        self.removed = {str(f): 0 for f in filters}
        self._absent = [0] * len(filters)
        self._count = 0

    def keeps(self, columns: Mapping[str, Any], count: int) -> np.ndarray:
        """Decide for each sample of a block, bool (count,).

        Args:
            columns: Arrow columns by field.
            count: Number of samples.

        Raises:
            ValueError: A filter does not match the type of its field.
        """
        import numpy as np

        keep = np.ones(count, bool)
        self._count += count
        for i, f in enumerate(self._filters):
            values = columns.get(f.field)
            if f.missing == "error":  # reported by `check`, once all samples are counted
                self._absent[i] += count if values is None else values.null_count
            still_kept = keep & f.keeps(values, count)
            self.removed[str(f)] += int(keep.sum() - still_kept.sum())
            keep = still_kept
        return keep

    def check(self) -> None:
        """Refuse data in which a required field is missing.

        Raises:
            ValueError: A filter with missing="error" has samples without its field.
        """
        for f, absent in zip(self._filters, self._absent, strict=True):
            if absent:
                raise ValueError(
                    f"{absent} of {self._count} samples have no {f.field!r}, which a filter "
                    "requires: set its `missing` to keep or drop."
                )


def _typed(listed: Sequence[float | str], kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if not all(isinstance(value, str) for value in listed):
            raise pa.ArrowTypeError("numbers listed for text")
        return pa.array(list(listed), kind)
    if any(isinstance(value, str) for value in listed):
        raise pa.ArrowTypeError("text listed for numbers")
    return pa.array([float(value) for value in listed]).cast(kind)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
