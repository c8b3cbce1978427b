"""Networks (x_t, t, conditioning) -> raw output: those of diffusers, and any nn.Module."""

from zsnr.networks.base import (
    DiffusionNetwork,
    blocks_of,
    check_network,
    compile_blocks,
    describe_network,
    enable_gradient_checkpointing,
    inputs_of,
    record_arguments,
    takes_sizes,
)
from zsnr.networks.pretrained import network_folder, read_network
from zsnr.networks.transformer import Transformer
from zsnr.networks.unet import UNet, UNetConfig

__all__ = [
    "DiffusionNetwork",
    "Transformer",
    "UNet",
    "UNetConfig",
    "blocks_of",
    "check_network",
    "compile_blocks",
    "describe_network",
    "enable_gradient_checkpointing",
    "inputs_of",
    "network_folder",
    "read_network",
    "record_arguments",
    "takes_sizes",
]
