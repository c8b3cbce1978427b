"""Error messages of commands, and safe output of untrusted text to the terminal."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

from zsnr.untrusted import clipped, printable

# Libraries that raise ValueError or RuntimeError because of a file or the environment
_LIBRARIES = (
    *("PIL", "fsspec", "huggingface_hub", "jsonargparse", "pyarrow", "safetensors", "yaml"),
    *("tarfile", "zipfile", "lightning.fabric.plugins.environments"),
    *("lightning.pytorch.trainer.connectors", "lightning.fabric.utilities.device_parser"),
    *("lightning.pytorch.accelerators", "lightning.fabric.accelerators"),
    *("torch.distributed.rendezvous", "torch.distributed.distributed_c10d"),
    *("torch.optim", "lightning.fabric.utilities.seed"),
)
_WORLD = {"MisconfigurationException", "DistError", "DistNetworkError", "DistStoreError"}
_NO_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


def told(error: BaseException, command: str) -> str | None:
    """Describe an error in one line, if it concerns the user's input, files or machine.

    Args:
        error: The exception that a command raised.
        command: Name of the command.

    Returns:
        The line. None = the error is a bug, for which a traceback is more useful.
    """
    lacks_memory = isinstance(error, RuntimeError) and any(m in str(error) for m in _NO_MEMORY)
    if isinstance(error, MemoryError) or lacks_memory:
        return f"`zsnr {command}` ran out of memory: {clipped(str(error)) or 'no details'}"
    if isinstance(error, RecursionError):
        return f"`zsnr {command}`: a file or a setting is nested too deeply"
    if isinstance(error, OSError):
        return _os_text(error)
    if is_ours(error) and isinstance(error, ValueError | IndexError | ImportError):
        return _unwrapped(error)
    if isinstance(error, UnicodeError) or _is_of_world(error):
        return clipped(str(error) or repr(error), 500)
    return None


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this package, so that its text is meant for the user."""
    if type(error).__module__.startswith("zsnr."):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _is_our_file(frames[-1].filename)


def _is_our_file(name: str) -> bool:
    return Path(name).is_relative_to(Path(__file__).parent)


def tame_output() -> None:
    """Escape control and unprintable characters in all output; warnings are plain sentences."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _format_warning
    logging.setLogRecordFactory(_Record)


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: object = None
) -> str:
    if _is_our_file(filename):  # what the user should know, and not a fault of the code
        return f"zsnr: warning: {printable(' '.join(str(message).split()))}\n"
    return printable(f"{filename}:{lineno}: {category.__name__}: {message}\n")


def _unwrapped(error: BaseException) -> str:
    """Return an error's text, without the traceback that a loader process adds to it."""
    text, name = str(error), type(error).__name__
    if not text.startswith(f"Caught {name} in DataLoader worker"):
        return text
    return text.strip().rpartition(f"{name}: ")[2]


def _os_text(error: OSError) -> str:
    text = _unwrapped(error)
    if error.errno is None or error.strerror is None or text != str(error):
        return text
    names = (error.filename, error.filename2)
    paths = [os.fsdecode(name) for name in names if isinstance(name, str | bytes | os.PathLike)]
    return f"{' -> '.join(paths)}: {error.strerror}" if paths else error.strerror


def _is_of_world(error: BaseException) -> bool:
    if {cls.__name__ for cls in type(error).__mro__} & _WORLD:
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    raised = isinstance(error, ValueError | RuntimeError) or type(error).__module__ in _LIBRARIES
    return raised and any(f"{module}.".startswith(f"{name}.") for name in _LIBRARIES)
