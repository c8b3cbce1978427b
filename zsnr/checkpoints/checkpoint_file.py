"""Reading of the checkpoints that training writes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from zsnr.checkpoints import sharded
from zsnr.checkpoints.exported_sampling import read_exported
from zsnr.checkpoints.model import Model
from zsnr.checkpoints.opening import KEY as KEY
from zsnr.checkpoints.opening import current_names as current_names
from zsnr.checkpoints.opening import open_checkpoint as open_checkpoint
from zsnr.checkpoints.run_folder import check_model, is_checkpoint, resolve_model
from zsnr.checkpoints.snapshots import refuse_snapshot
from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.described import build, describe
from zsnr.lora import AdaptedUNet, add_text_adapters, with_base
from zsnr.networks import DiffusionNetwork, describe_network
from zsnr.prediction import PredictionType
from zsnr.schedule import Schedule, schedule_from_settings
from zsnr.untrusted import clipped, shown
from zsnr.weights.ldm_file import open_ldm_file
from zsnr.weights.pretrained import is_weightless, reason
from zsnr.weights.source import is_single_file

MAX_IMAGE_SIZE = 2**16  # pixels


def describe_model(model: Model) -> dict[str, Any]:
    """Return the plain values from which `read_checkpoint` builds the model."""
    return {
        "codec": describe(model.codec),
        "conditioner": {**describe(model.conditioner), **(model.conditioner.adapted or {})},
        "network": describe_network(model.network),
        "schedule": model.schedule.settings(),
        "prediction_type": model.prediction_type,
        "image_size": model.image_size,
    }


def read_checkpoint(
    path: str | Path,
    *,
    ema: bool = True,
    base: str | None = None,
    raw_beside: bool = False,
    network: nn.Module | type[nn.Module] | None = None,
) -> Model:
    """Read a checkpoint that training wrote, on the CPU; see also `without_weights`.

    Args:
        path: The .ckpt file or sharded folder.
        ema: Use the averaged weights if there are any, else the raw ones.
        base: Path of the UNet on which adapters were trained. None = its original path.
        raw_beside: Read the raw network too, beside the averaged one.
        network: A network of your own that the checkpoint holds the weights of, or its class, which
            is then built with the arguments that the checkpoint records. No checkpoint names code
            to run: only classes of this package, and those derived from DiffusionNetwork whose
            module is imported, are built without it.

    Returns:
        The model; with adapters in its UNet, if they were trained.

    Raises:
        ValueError: The path does not exist, or is not a checkpoint of this package; or the UNet
            that adapters were trained on is missing, or has other weights; or `raw_beside` is set
            and the checkpoint has no averaged weights; or `network` is needed, or does not fit.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path)
    refuse_snapshot(path, checkpoint)
    description = checkpoint[KEY]
    schedule = _check_description(path, description)
    if base is not None:
        description = {**description, "network": with_base(description["network"], base)}

    make = partial(build_network, path, description["network"], network)

    def with_network(network: nn.Module, raw_network: nn.Module | None = None) -> Model:
        return Model(
            codec=build(description["codec"], LatentCodec),  # type: ignore[type-abstract]
            conditioner=build(description["conditioner"], Conditioner),  # type: ignore[type-abstract]
            network=network,
            schedule=schedule,
            prediction_type=description["prediction_type"],
            image_size=description["image_size"],
            raw_network=raw_network,
            sampling=declared_sampling(checkpoint),
        )

    if is_weightless():
        return _with_text_adapters(with_network(make(), make() if raw_beside else None))
    prefix, weights = _weights(path, checkpoint, ema)
    if raw_beside and prefix != "ema":
        raise ValueError(
            f"{path} has no averaged weights, which guidance against 'raw' needs beside the raw "
            "ones. Use guidance against 'negative', or train with model.ema."
        )
    is_new = network is None and _is_new(description["network"])
    if is_new:
        _check_fits(path, make, weights, f"{prefix}.unet.")
    if _is_new(description["conditioner"]):
        build_conditioner = partial(build, description["conditioner"], Conditioner)  # type: ignore[type-abstract]
        _check_fits(path, build_conditioner, weights, f"{prefix}.conditioner.")
    model = with_network(_read_network(path, make, is_new, weights, f"{prefix}.unet."))
    model = _with_text_adapters(model)
    check_text_weights(str(path), description["conditioner"], model.conditioner.adapted or {})
    if model.conditioner.trainable:
        _load(model.conditioner, weights, f"{prefix}.conditioner.", path)
    if not raw_beside:
        return model
    prefix, weights = _weights(path, checkpoint, ema=False)
    raw = _read_network(path, make, is_new, weights, f"{prefix}.unet.")
    return replace(model, raw_network=raw)


def _with_text_adapters(model: Model) -> Model:
    """Add the adapters of the text encoder that the network's settings tell, in place."""
    if isinstance(model.network, AdaptedUNet):
        add_text_adapters(model.conditioner, model.network.lora)
    return model


def check_text_weights(where: str, described: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a text encoder with other weights than those that its adapters were trained on.

    Args:
        where: Where the adapters are, as the beginning of a sentence.
        described: Description of the conditioner that the adapters were trained on.
        found: That of the conditioner they are to be used with.

    Raises:
        ValueError: The digests differ.
    """
    was, now = described.get("weights"), found.get("weights")
    if None not in (was, now) and was != now:
        raise ValueError(
            f"{where} has adapters of a text encoder with other weights (digest {was}) than this "
            f"one (digest {now}): restore the original."
        )


def build_network(
    path: Path, description: Any, network: nn.Module | type[nn.Module] | None = None
) -> nn.Module:
    """Build the network that a checkpoint describes, without its weights.

    Args:
        path: The checkpoint, for the messages.
        description: The result of `describe_network`.
        network: See `read_checkpoint`. A copy of a module is returned.

    Raises:
        ValueError: It is a class that must be named, or another one is.
    """
    if network is None:
        check_allowed(path, description)
        return build(description, DiffusionNetwork)
    if isinstance(network, nn.Module):
        return copy.deepcopy(network)
    arguments = description.get("init_args") if isinstance(description, Mapping) else None
    if arguments is None:
        raise ValueError(
            f"{path} does not record the arguments of its network, which Python code built: give "
            f"the network itself, as in network={network.__name__}(...)."
        )
    return network(**arguments)


def check_allowed(path: Path, description: Any) -> None:
    """Refuse a network whose class a checkpoint alone may not name.

    Raises:
        ValueError: It is of another package, and not derived from DiffusionNetwork.
    """
    name = description.get("class_path") if isinstance(description, Mapping) else None
    if isinstance(name, str) and not name.startswith("zsnr."):
        module, _, cls = name.rpartition(".")
        known = getattr(sys.modules.get(module), cls, None)
        if not (isinstance(known, type) and issubclass(known, DiffusionNetwork)):
            raise ValueError(
                f"{path} holds the weights of the network {shown(name)}, and no checkpoint chooses "
                f"code to run. Name it yourself: network={clipped(cls, 60)} in Python, "
                f"`zsnr sample --network {clipped(name, 100)}`, or model.network in a config."
            )


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
        Plain values; empty if it declares nothing, as models that zsnr did not write.

    Raises:
        ValueError: It does not exist, is a checkpoint or a single file that cannot be read, or
            declares what cannot be sampled.
    """
    path = resolve_model(source)
    if is_checkpoint(path):
        return declared_sampling(open_checkpoint(path))
    check_model(source)
    return read_exported(open_ldm_file(path) if is_single_file(path) else path).sampling


def _check_description(path: Path, description: Mapping[str, Any]) -> Schedule:
    """Return the schedule; check the prediction type and image size.

    Raises:
        ValueError: A value is invalid.
    """
    kind, size = description["prediction_type"], description["image_size"]
    if kind not in get_args(PredictionType):
        known = ", ".join(map(repr, get_args(PredictionType)))
        raise ValueError(f"{path}: prediction_type={shown(kind)} is unknown. Known: {known}.")
    if type(size) is not int or not 1 <= size <= MAX_IMAGE_SIZE:
        raise ValueError(f"{path}: image_size={shown(size)}: wanted 1 to {MAX_IMAGE_SIZE} pixels.")
    try:
        return schedule_from_settings(description["schedule"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_fits(
    path: Path, make: Callable[[], nn.Module], weights: Mapping[str, Tensor], prefix: str
) -> None:
    """Refuse a network with more weights than the checkpoint, before memory is allocated.

    Raises:
        ValueError: The network is larger than the stored weights.
    """
    stored = sum(w.numel() for name, w in weights.items() if name.startswith(prefix))
    with torch.device("meta"):
        needed = sum(weight.numel() for weight in make().parameters())
    if needed > stored:
        raise ValueError(
            f"{path} has {stored} weights in {prefix}*, and describes a network of {needed}: it is "
            "damaged."
        )


def _is_new(description: Any) -> bool:
    """Whether a network is described by its size, and not by a pretrained model."""
    settings = description.get("init_args") if isinstance(description, Mapping) else None
    return isinstance(settings, Mapping) and isinstance(settings.get("config"), Mapping)


def _weights(path: Path, checkpoint: dict[str, Any], ema: bool) -> tuple[str, dict[str, Tensor]]:
    """Return the averaged weights if `ema` is set and they exist, else the raw ones."""
    for prefix in ("ema", "trained") if ema else ("trained",):
        if sharded.is_sharded(path):
            tensors = sharded.read_tensors(path, f"state_dict/{prefix}.")
            weights = {name.removeprefix("state_dict/"): tensor for name, tensor in tensors.items()}
        else:
            weights = checkpoint["state_dict"]
        if any(name.startswith(f"{prefix}.") for name in weights):
            return prefix, weights
    raise ValueError(f"{path} is damaged: it lacks weights.")


def _read_network(
    path: Path,
    make: Callable[[], nn.Module],
    is_new: bool,
    weights: dict[str, Tensor],
    prefix: str,
) -> nn.Module:
    """Build a network with its stored weights; a new one is not initialized first.

    Raises:
        ValueError: The weights do not fit it.
    """
    if is_new:
        with torch.device("meta"):
            network = make()
        _load(network, weights, prefix, path, assign=True)
        if not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
            return network
    network = make()  # it has weights, or tensors, that the checkpoint does not hold
    _load(network, weights, prefix, path)
    return network


def _load(
    module: nn.Module,
    weights: dict[str, Tensor],
    prefix: str,
    path: Path,
    *,
    assign: bool = False,
) -> None:
    """Copy weights into a module, or let copies of them take the place of its own (`assign`)."""
    state = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    if assign:  # the file that they are mapped from may be replaced
        state = {name: weight.clone() for name, weight in state.items()}
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: {prefix}* does not fit its own description: {reason(error)}."
        ) from error
