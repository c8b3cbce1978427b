"""The network of a model of diffusers, whatever its class."""

from __future__ import annotations

from typing import Any

from zsnr.networks.base import DiffusionNetwork
from zsnr.networks.transformer import Transformer
from zsnr.networks.unet import UNet
from zsnr.untrusted import read_json
from zsnr.weights.source import fetch_file, is_single_file


def network_folder(source: str) -> str:
    """Return the folder of a model's network, "unet" or "transformer"; of a file, the part."""
    index = None if is_single_file(source) else fetch_file(source, "model_index.json")
    named = {} if index is None else read_json(index)
    return "transformer" if named.get("transformer") and not named.get("unet") else "unet"


def read_network(source: str, **inputs: Any) -> DiffusionNetwork:
    """Read the network of a folder, a single file or a hub id.

    Args:
        source: The model.
        inputs: What the network must fit, as `inputs_of` returns it.

    Raises:
        ValueError: It cannot be read, or does not fit.
    """
    if network_folder(source) == "unet":
        return UNet(pretrained=source, **inputs)
    network = Transformer(pretrained=source)
    network.check_fits(**inputs)
    return network
