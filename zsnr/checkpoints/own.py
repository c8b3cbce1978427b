"""This package's checkpoints, as training writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from zsnr.checkpoints import sharded
from zsnr.checkpoints.model import Model
from zsnr.checkpoints.run_folder import resolve_model
from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.described import build, describe
from zsnr.lora import moved
from zsnr.networks import UNet
from zsnr.prediction import PredictionType
from zsnr.pretrained import reason
from zsnr.schedule import NoiseSchedule
from zsnr.untrusted import open_archive, shown

KEY = "zsnr"
MAX_IMAGE_SIZE = 2**16  # pixels


def describe_model(model: Model) -> dict[str, Any]:
    """Return plain values that `read_checkpoint` builds the model from."""
    return {
        "codec": describe(model.codec),
        "conditioner": describe(model.conditioner),
        "unet": describe(model.unet),
        "schedule": model.schedule.settings(),
        "prediction_type": model.prediction_type,
        "image_size": model.image_size,
    }


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """Open a checkpoint that training wrote, a file or a folder of shards.

    Returns:
        Its contents; of a file, weights are left on disk, of a folder, they are left out.

    Raises:
        ValueError: No such file, not a checkpoint, or not one of this package's.
    """
    path = Path(path)
    shards = sharded.is_sharded(path)
    if shards:
        sharded.check(path)
        checkpoint = sharded.read_rest(path)
    elif path.is_file():
        checkpoint = open_archive(path)
    else:
        raise ValueError(
            f"{path} is not a file: wanted a checkpoint (.ckpt) that training wrote, a file or a "
            "folder of shards."
        )
    description = checkpoint.get(KEY)
    if not isinstance(description, dict):
        raise ValueError(
            f"{path} was not written by zsnr: it has no {KEY!r} entry. If it is a Stable Diffusion "
            "in one file, convert it to .safetensors."
        )
    if not (shards or _are_weights(checkpoint.get("state_dict"))):
        raise ValueError(f"{path} is damaged: it lacks weights.")
    wanted = {"codec", "conditioner", "unet", "schedule", "prediction_type", "image_size"}
    missing = sorted(wanted - description.keys())
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}.")
    return checkpoint


def _are_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in value.items()
    )


def read_checkpoint(
    path: str | Path, *, ema: bool = True, base: str | None = None, raw_beside: bool = False
) -> Model:
    """Read a checkpoint that training wrote, on the CPU.

    Args:
        path: The .ckpt file, or folder of shards.
        ema: Take the averaged weights, else the raw ones.
        base: Where the UNet under trained adapters is now. None = where it was.
        raw_beside: Read the raw UNet too, beside the averaged one.

    Returns:
        The model; with adapters in its UNet, if they were trained.

    Raises:
        ValueError: No such file, not a checkpoint, or not one of this package's; or the UNet that
            adapters were trained on is not there, or has other weights; or the raw UNet is wanted
            beside the averaged one, and weights were not averaged.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path)
    description = checkpoint[KEY]
    schedule = _check_description(path, description)
    if base is not None:
        description = {**description, "unet": moved(description["unet"], base)}
    prefix, weights = _weights(path, checkpoint, ema)
    if raw_beside and prefix != "ema":
        raise ValueError(
            f"{path} has no averaged weights beside the raw ones, between which guidance against "
            "'raw' is. Use guidance against 'negative', or train with model.ema."
        )
    _check_fits(path, description["unet"], UNet, weights, f"{prefix}.unet.")
    _check_fits(path, description["conditioner"], Conditioner, weights, f"{prefix}.conditioner.")
    model = Model(
        codec=build(description["codec"], LatentCodec),  # type: ignore[type-abstract]
        conditioner=build(description["conditioner"], Conditioner),  # type: ignore[type-abstract]
        unet=build(description["unet"], UNet),
        schedule=schedule,
        prediction_type=description["prediction_type"],
        image_size=description["image_size"],
        sampling=declared_sampling(checkpoint),
    )
    _load(model.unet, weights, f"{prefix}.unet.", path)
    if model.conditioner.trainable:
        _load(model.conditioner, weights, f"{prefix}.conditioner.", path)
    if not raw_beside:
        return model
    raw, (prefix, weights) = build(description["unet"], UNet), _weights(path, checkpoint, ema=False)
    _load(raw, weights, f"{prefix}.unet.", path)
    return replace(model, raw_unet=raw)


def declared_sampling(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how an opened checkpoint declares that it is sampled; empty if it declares nothing."""
    run = checkpoint.get("run")
    sampling = run.get("sampling") if isinstance(run, Mapping) else None
    return sampling if isinstance(sampling, Mapping) else {}


def sampling_of(source: str) -> Mapping[str, Any]:
    """Return how a model declares that it is sampled, without loading it; see `choose_sampling`.

    Args:
        source: What `TextToImage.from_pretrained` takes.

    Returns:
        Plain values; empty if it declares nothing, as models of other programs.

    Raises:
        ValueError: It is a checkpoint that cannot be read.
    """
    path = resolve_model(source)
    return declared_sampling(open_checkpoint(path)) if path.endswith(".ckpt") else {}


def _check_description(path: Path, description: Mapping[str, Any]) -> NoiseSchedule:
    """Return the schedule; see that prediction type and image size are some.

    Raises:
        ValueError: The file says something else.
    """
    kind, size = description["prediction_type"], description["image_size"]
    if kind not in get_args(PredictionType):
        known = ", ".join(map(repr, get_args(PredictionType)))
        raise ValueError(f"{path}: prediction_type={shown(kind)} is unknown. Known: {known}.")
    if type(size) is not int or not 1 <= size <= MAX_IMAGE_SIZE:
        raise ValueError(f"{path}: image_size={shown(size)}: wanted 1 to {MAX_IMAGE_SIZE} pixels.")
    try:
        return NoiseSchedule.from_settings(description["schedule"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_fits(
    path: Path,
    description: Any,
    base: type[nn.Module],
    weights: Mapping[str, Tensor],
    prefix: str,
) -> None:
    """Refuse a network that the checkpoint's weights cannot fill, before it takes memory.

    Raises:
        ValueError: It is larger than they are.
    """
    settings = description.get("init_args") if isinstance(description, Mapping) else None
    if not isinstance(settings, Mapping) or not isinstance(settings.get("config"), Mapping):
        return  # its size is that of a pretrained network, or it has none
    held = sum(w.numel() for name, w in weights.items() if name.startswith(prefix))
    with torch.device("meta"):
        needed = sum(weight.numel() for weight in build(description, base).parameters())
    if needed > held:
        raise ValueError(
            f"{path} has {held} weights in {prefix}*, and describes a network of {needed}: it is "
            "damaged."
        )


def _weights(path: Path, checkpoint: dict[str, Any], ema: bool) -> tuple[str, dict[str, Tensor]]:
    """Return the averaged weights if they are there and wanted, else the raw ones."""
    for prefix in ("ema", "trained") if ema else ("trained",):
        if sharded.is_sharded(path):
            read = sharded.read_tensors(path, f"state_dict/{prefix}.")
            weights = {name.removeprefix("state_dict/"): tensor for name, tensor in read.items()}
        else:
            weights = checkpoint["state_dict"]
        if any(name.startswith(f"{prefix}.") for name in weights):
            return prefix, weights
    raise ValueError(f"{path} is damaged: it lacks weights.")


def _load(module: nn.Module, weights: dict[str, Tensor], prefix: str, path: Path) -> None:
    own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: {prefix}* does not fit its own description: {reason(error)}."
        ) from error
