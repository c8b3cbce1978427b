"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsnr.codecs import LatentCodec


def path_or_none(path: str | Path | None) -> Path | None:
    """Return a path with `~` replaced by the home folder; None stays None."""
    return None if path is None else Path(path).expanduser()


def check_device(name: str | None) -> None:
    """Refuse a device that this machine lacks, before anything is loaded onto it.

    Raises:
        ValueError: The machine lacks it, or there is no device of that name.
    """
    import torch

    if name is None:
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        known = ["cpu", "cuda", *(f"cuda:{i}" for i in range(count))] if count else ["cpu"]
        raise ValueError(
            f"--device {name!r} is not a device here. Known: {', '.join(known)}."
        ) from error


def default_device(name: str | None) -> str:
    """Return the device of that name, checked; None is the GPU if there is one, else the CPU."""
    import torch

    check_device(name)
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def find_codec(name: str | None, subfolder: str | None) -> LatentCodec | None:
    """Find the codec that --codec and --codec-subfolder name.

    Raises:
        ValueError: A subfolder is given without a folder.
    """
    from zsnr.codecs import AutoencoderKLCodec, PixelCodec

    if subfolder is not None and name in (None, "pixels"):
        raise ValueError(f"--codec-subfolder {subfolder} needs --codec FOLDER, which is not given.")
    if name is None:
        return None
    return PixelCodec() if name == "pixels" else AutoencoderKLCodec(name, subfolder=subfolder)


def refuse(given: Mapping[str, Any], why: str) -> None:
    """Refuse options that would have no effect.

    Args:
        given: Options by the name of their parameter; None = not given.
        why: The rest of the sentence.

    Raises:
        ValueError: One of them is given.
    """
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} {why}: leave it out.")


def read_guidance(**options: Any) -> dict[str, Any]:
    """Return the options of `Guidance` that are given; texts are read as `zsnr compare` does.

    Raises:
        ValueError: A text cannot be read.
    """
    from zsnr.reports.arms import parse_setting

    return {
        name: parse_setting(f"guidance_{name}", value) if isinstance(value, str) else value
        for name, value in options.items()
        if value is not None
    }
