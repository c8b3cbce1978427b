"""Options that several commands share."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, get_type_hints

from zsnr.commands.parsing import suggestion

if TYPE_CHECKING:
    from torch import nn

    from zsnr.codecs import LatentCodec
    from zsnr.prediction import PredictionType
    from zsnr.schedule import NoiseSchedule, RectifiedFlow


class SamplerOptions(TypedDict, total=False):
    """Sampler, spacing and guidance; what is left out or None is as the model declares."""

    sampler: Annotated[
        str | None,
        """The sampler, such as ddim, multiscale or euler; auto chooses sampler and spacing for the
        number of steps and the guidance scale.""",
    ]
    spacing: Annotated[
        str | None,
        "The timestep spacing, such as trailing, guided or log_snr; a grid file; or auto.",
    ]
    guidance_scale: Annotated[float | None, "The guidance scale w."]
    guidance_rescale: Annotated[float | None, "The guidance rescale phi, 0 to 1."]


class SamplingOptions(SamplerOptions, total=False):
    """All options of sampling: those of `SamplerOptions`, the steps, the rest of `Guidance`."""

    num_steps: Annotated[
        int | None,
        """Number of sampling steps. It is enough to set this alone: where sampler and spacing are
        auto, they follow from it.""",
    ]
    guidance_interval: Annotated[
        str | tuple[float, float] | None,
        "Noise levels sigma / alpha that are guided, such as 0.3:inf.",
    ]
    guidance_method: Annotated[str | None, "cfg, apg, cfg_zero_star or cfg_pp."]
    guidance_curve: Annotated[
        str | Sequence[tuple[float, float]] | None,
        "The scale w as a function of log SNR, such as -6:1/0:7.5.",
    ]
    guidance_at_zero_snr: Annotated[str | bool | None, "Whether to guide at SNR 0, true or false."]
    guidance_threshold: Annotated[
        float | None, "Percentile of the dynamic threshold, for models of pixels, such as 0.995."
    ]
    guidance_apg_parallel: Annotated[
        float | None, "With apg, the weight eta of the part of the difference along x_0."
    ]
    guidance_apg_norm: Annotated[float | None, "With apg, the largest norm of the difference."]
    guidance_against: Annotated[
        str | None,
        """What to guide away from: negative (the negative prompt) or raw (the raw weights of a
        checkpoint).""",
    ]


def given_process(
    zero_terminal_snr: bool, flow_shift: float | None, prediction_type: PredictionType | None
) -> tuple[NoiseSchedule | RectifiedFlow | None, PredictionType | None]:
    """Return the schedule and prediction type that options name; None = the model declares it.

    Raises:
        ValueError: Two options contradict each other.
    """
    from zsnr.schedule import NoiseSchedule, RectifiedFlow

    if flow_shift is None:
        return NoiseSchedule() if zero_terminal_snr else None, prediction_type
    if zero_terminal_snr:
        raise ValueError(
            "--flow-shift and --zero-terminal-snr name two schedules: give one. Rectified flow "
            "ends at zero SNR by itself."
        )
    return RectifiedFlow(flow_shift), prediction_type or "flow"


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


def find_network(path: str | None) -> type[nn.Module] | None:
    """Import the network that --network names; None = the option is not given.

    Raises:
        ValueError: There is no such class.
    """
    from torch import nn

    if path is None:
        return None
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--network {path}: {error}. Is the folder of the file in PYTHONPATH?"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"--network {path} is not an nn.Module.")
    return cls


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


def read_sampling(
    options: SamplerOptions, known: type[SamplerOptions] = SamplingOptions
) -> dict[str, Any]:
    """Return the options of sampling that are given, by name; texts are read as in an arm.

    Args:
        options: The options.
        known: The TypedDict that lists them.

    Raises:
        TypeError: There is no such option.
        ValueError: A text cannot be read.
    """
    from zsnr.reports.arms import parse_setting

    names = get_type_hints(known)
    for name in options.keys() - names.keys():
        raise TypeError(f"there is no option {name!r} of sampling{suggestion(name, names)}")
    return {
        name: parse_setting(name, value) if isinstance(value, str) else value
        for name, value in options.items()
        if value is not None
    }
