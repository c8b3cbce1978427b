"""What commands return, and the one place that prints it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from zsnr.untrusted import printable


@runtime_checkable
class Printable(Protocol):
    """What is printed as text, or with `--json` as JSON."""

    def to_text(self) -> str: ...

    def to_json(self) -> str: ...


@dataclass(frozen=True)
class Result:
    """The outcome of a command, for programs and for people.

    Args:
        facts: Plain values, which `--json` prints.
        text: What is printed without `--json`.
        exit_code: The exit code of the command.
        notes: Lines for stderr.
    """

    facts: Mapping[str, Any]
    text: str
    exit_code: int = 0
    notes: tuple[str, ...] = ()

    def to_text(self) -> str:
        return self.text

    def to_json(self) -> str:
        return json.dumps(self.facts, ensure_ascii=False)


def show(result: Printable | Path | str | None, *, as_json: bool = False) -> int:
    """Print the result of a command, which may hold text that strangers wrote.

    Returns:
        The exit code.
    """
    if isinstance(result, Printable):
        print(printable(result.to_json() if as_json else result.to_text()))
    elif result is not None:
        print(printable(str(result)))
    if not isinstance(result, Result):
        return 0
    for note in result.notes:
        print(printable(note), file=sys.stderr)
    return result.exit_code
