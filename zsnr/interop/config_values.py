"""Values of scheduler configs, which are untrusted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zsnr.untrusted import shown


def is_real(value: Any) -> bool:
    """Whether a value is a number of a size that computations bear."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**63


def reader(values: Mapping[str, Any], kind: type) -> Any:
    """Return a function that reads values of one type; null and unknown keys are False or 0."""

    def read(key: str) -> Any:
        value = values.get(key)
        if value is None:
            return kind()
        if type(value) is not kind:
            type_name = "true or false" if kind is bool else "a whole number"
            raise ValueError(f"{key}={shown(value)}: wanted {type_name}.")
        return value

    return read
