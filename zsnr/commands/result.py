"""What commands return, and the one place that prints it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsnr.untrusted import printable


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


def show(result: Result | Path | str | None, *, as_json: bool = False) -> int:
    """Print the result of a command, which may hold text that strangers wrote.

    Returns:
        The exit code.
    """
    if isinstance(result, Result):
        text = json.dumps(result.facts, ensure_ascii=False) if as_json else result.text
        print(printable(text))
        for note in result.notes:
            print(printable(note), file=sys.stderr)
        return result.exit_code
    if result is not None:
        print(printable(str(result)))
    return 0
