"""A model by any of its names: our checkpoints, diffusers folders, single files, hub ids."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from zsnr.checkpoints import Model, read_checkpoint
from zsnr.checkpoints.run_folder import is_checkpoint
from zsnr.codecs import AutoencoderKLCodec
from zsnr.interop.diffusers_folder import read_diffusers_folder
from zsnr.interop.single_file import read_single_file
from zsnr.networks import network_folder
from zsnr.prediction import PredictionType
from zsnr.schedule import Schedule
from zsnr.weights.pretrained import as_dtype, loading_in, stored_dtype
from zsnr.weights.source import fetch_file, find_file, is_single_file


def read_model(
    source: str,
    schedule: Schedule | None = None,
    prediction_type: PredictionType | None = None,
    raw_beside: bool = False,
    network: nn.Module | type[nn.Module] | None = None,
) -> Model:
    """Read a model; codec and text encoders are loaded when they are first used.

    Args:
        source: A checkpoint of this package, a diffusers folder, a single file or a hub id.
        schedule: Schedule to use instead of the declared one.
        prediction_type: Prediction type to use instead of the declared one.
        raw_beside: Also load the raw weights of a checkpoint.
        network: See `read_checkpoint`.

    Raises:
        ValueError: The source cannot be read.
    """
    if network is not None and not is_checkpoint(source):
        raise ValueError(
            f"{source} is no checkpoint of zsnr: a network of your own has no weights there."
        )
    if is_single_file(source):
        return read_single_file(source, schedule, prediction_type)
    if not is_checkpoint(source):
        return read_diffusers_folder(source, schedule, prediction_type)
    model = read_checkpoint(source, raw_beside=raw_beside, network=network)
    return replace(
        model,
        schedule=model.schedule if schedule is None else schedule,
        prediction_type=prediction_type or model.prediction_type,
    )


def choose_dtype(dtype: torch.dtype | str, source: str, device: torch.device) -> torch.dtype | None:
    """Return the data type that a model's parts are loaded in.

    Args:
        dtype: A data type, or "auto": on an accelerator float16 or bfloat16 if the network's file
            has it, else float32.
        source: The model.
        device: Where it will be.

    Returns:
        The data type. None = each part as its checkpoint describes it.

    Raises:
        ValueError: It is not one that weights are computed in.
    """
    if dtype != "auto":
        return as_dtype(dtype)
    if is_checkpoint(source):
        return None
    return torch.float32 if device.type == "cpu" else stored_dtype(source, network_folder(source))


def load_parts(
    model: Model,
    dtype: torch.dtype | None,
    vae: str | None = None,
    vae_dtype: torch.dtype | str | None = None,
    vae_tiling: bool = False,
) -> Model:
    """Load the VAE and the text encoders of a model for sampling, and cast its networks.

    Args:
        model: The model.
        dtype: What `choose_dtype` returned.
        vae: See `with_vae`.
        vae_dtype: See `with_vae`.
        vae_tiling: See `with_vae`.

    Raises:
        ValueError: A part cannot be loaded.
    """
    with loading_in(dtype):
        model = with_vae(model, vae, vae_dtype, dtype, vae_tiling)
        model.codec.load()
        model.conditioner.load()
    for unet in (model.network, model.raw_network):
        if unet is not None:
            unet.to(dtype=dtype).eval().requires_grad_(False)
    return model


def with_vae(
    model: Model,
    vae: str | None,
    dtype: torch.dtype | str | None = None,
    default: torch.dtype | None = None,
    tiling: bool = False,
) -> Model:
    """Return a model with another VAE, or with its own in another data type or in tiles.

    Args:
        model: The model.
        vae: A folder, a hub id or a .safetensors file; None = the model's own.
        dtype: Data type of the VAE. None = `default`, or float32 where it overflows in that.
        default: Data type of the other parts; None = as the model describes its VAE.
        tiling: Decode in tiles; False = as the model describes its VAE.

    Raises:
        ValueError: The VAE cannot be read, or has other latents than the model's.
    """
    codec = model.codec
    if not isinstance(codec, AutoencoderKLCodec):
        if vae is not None or tiling:
            option = "vae_tiling=True" if vae is None else f"vae={vae!r}"
            raise ValueError(
                f"{option}: the model's codec is a {type(codec).__name__}, and its network was "
                "not trained on the latents of a VAE."
            )
        return model
    settings = codec.settings()
    if tiling:
        settings["tiling"] = True
    if vae is not None:
        settings |= {"pretrained": vae, "subfolder": None, "scale": None, "shift": None}
        if is_single_file(vae):
            settings |= {"scale": codec.scale, "shift": codec.shift}
        elif find_file(vae, "vae", "config.json") or not fetch_file(vae, "config.json"):
            settings["subfolder"] = "vae"
    if dtype is None and default == torch.float16:
        wide = codec if vae is None else AutoencoderKLCodec(**{**settings, "dtype": "float32"})
        if wide.overflows_in_float16:
            default = torch.float32
    wanted = default if dtype is None else dtype
    if wanted is not None:
        chosen = as_dtype(wanted, "vae_dtype")
        settings["dtype"] = str(chosen).removeprefix("torch.")
    if settings == codec.settings():
        return model
    other = AutoencoderKLCodec(**settings)
    if (other.channels, other.factor) != (codec.channels, codec.factor):
        raise ValueError(
            f"{vae} has latents of {other.channels} channels at 1/{other.factor} of the image's "
            f"size: the model needs {codec.channels} channels at 1/{codec.factor}."
        )
    return replace(model, codec=other)
