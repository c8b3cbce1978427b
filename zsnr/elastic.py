"""What torchrun is told of a failure, so that a run does not fail in the same way again and again.

torchrun starts a failed process again whatever its exit code says. It gives each attempt a file for
its error, in a folder beside those of the attempts before it: an attempt that finds a lasting error
of the one before stops with the same line, before anything slow.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from zsnr.locks import LockedError
from zsnr.untrusted import read_json

_LASTING = (
    *(ValueError, IndexError, ImportError, LockedError, PermissionError),
    *(FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError),
)


def note_failure(line: str, error: Exception) -> None:
    """Write the error file of this attempt, which torchrun shows; does nothing without torchrun.

    Args:
        line: What the user is told.
        error: Why. Of errors of storage and network only those that stay are lasting.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not file or "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return
    told = {
        "message": line,
        "timestamp": int(time.time()),
        "zsnr_lasting": isinstance(error, _LASTING),
    }
    with suppress(OSError):  # only torchrun's report is poorer
        Path(file).write_text(json.dumps(told), encoding="utf-8")


def former_failure() -> str | None:
    """Return the line of a lasting error that ended the attempt before this one on this node."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE") or os.devnull)
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    if not count.isdecimal() or int(count) < 1 or len(file.parents) < 3:
        return None
    for other in sorted((file.parents[2] / f"attempt_{int(count) - 1}").glob("*/error.json")):
        with suppress(OSError, ValueError):
            told = read_json(other)
            if told.get("zsnr_lasting") is True:
                return str(told.get("message"))
    return None
