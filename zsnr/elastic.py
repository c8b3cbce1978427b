"""Error files of torchrun, which prevent a run from failing repeatedly with the same error.

torchrun restarts a failed process whatever its exit code is. Each attempt has a file for its error,
in a folder beside those of the previous attempts: an attempt that finds a permanent error of the
previous one stops with the same message, before anything slow.
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
        line: The message for the user.
        error: The cause. Transient errors of storage and network are not permanent.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not file or "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return
    report = {
        "message": line,
        "timestamp": int(time.time()),
        "zsnr_lasting": isinstance(error, _LASTING),
    }
    with suppress(OSError):  # only torchrun's report is less detailed
        Path(file).write_text(json.dumps(report), encoding="utf-8")


def former_failure() -> str | None:
    """Return the message of a permanent error that ended the previous attempt on this node."""
    file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE") or os.devnull)
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    if not count.isdecimal() or int(count) < 1 or len(file.parents) < 3:
        return None
    for error_file in sorted((file.parents[2] / f"attempt_{int(count) - 1}").glob("*/error.json")):
        with suppress(OSError, ValueError):
            report = read_json(error_file)
            if report.get("zsnr_lasting") is True:
                return str(report.get("message"))
    return None
