"""What training asks of a network beside its forward pass, with defaults for any module.

A network is any nn.Module with forward(x_t (B, *), t (B,), conditioning) -> (B, *).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.described import Described, class_path, describe

_SHARE = 0.1  # of the network's weights, at least, that a list of blocks holds
_ARGUMENTS = "_zsnr_arguments"


class DiffusionNetwork(nn.Module):
    """A network (x_t (B, *), t (B,), conditioning) -> raw output, (B, *).

    Any other nn.Module with this forward pass is trained and sampled as well. A class derived from
    this one can replace the defaults below, and is built again from a checkpoint once its module
    is imported, without being named.
    """

    @property
    def takes_sizes(self) -> bool:
        """Whether its inputs include the sizes of Conditioning."""
        return False

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments that recreate this network, as plain values.

        By default those that a config built it with.
        """
        return dict(getattr(self, _ARGUMENTS, {}))

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order of the forward pass, to shard or compile separately."""
        return listed_blocks(self)

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory: recompute activations in the backward pass.

        Raises:
            ValueError: It has no blocks.
        """
        _checkpoint_blocks(self)

    def check_fits(self, channels: int, context_dim: int, pooled_dim: int, num_labels: int) -> None:
        """Refuse a codec or a conditioner that the network was not made for.

        Args:
            channels: Channels of the latents.
            context_dim: Width of the context; 0 = there is none.
            pooled_dim: Width of the pooled embedding; 0 = there is none.
            num_labels: Number of class labels, with the null class; 0 = there are none.

        Raises:
            ValueError: One does not fit.
        """


def check_network(network: nn.Module) -> None:
    """Refuse a module that cannot be called as a network, or has nothing to train.

    Raises:
        ValueError: Its forward pass takes other arguments, or it has no parameters.
    """
    name = class_path(network)
    signature = inspect.signature(network.forward)
    try:
        signature.bind("x_t", "t", "conditioning")
    except TypeError as error:
        raise ValueError(
            f"{name}: forward{signature} cannot be called with three arguments: wanted "
            "forward(x_t, t, conditioning)."
        ) from error
    if not _count(network):
        raise ValueError(f"{name} has no parameters to train.")


def inputs_of(codec: LatentCodec, conditioner: Conditioner) -> dict[str, int]:
    """Return the arguments of `check_fits`."""
    return {
        "channels": codec.channels,
        "context_dim": conditioner.context_dim,
        "pooled_dim": conditioner.pooled_dim,
        "num_labels": conditioner.num_labels,
    }


def takes_sizes(network: nn.Module) -> bool:
    """Whether a network's inputs include the sizes of Conditioning, as in SDXL."""
    return isinstance(network, DiffusionNetwork) and network.takes_sizes


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network, to shard or compile separately; empty if it has none."""
    return network.blocks() if isinstance(network, DiffusionNetwork) else listed_blocks(network)


def listed_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the children of a module's outermost nn.ModuleList and nn.Sequential, in their order.

    Lists that hold less than a tenth of the module's weights are no blocks.
    """
    least = _SHARE * _count(module)
    return [child for found in _lists(module) if _count(found) >= least for child in _flat(found)]


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Recompute a network's activations in the backward pass.

    Raises:
        ValueError: It has no blocks.
    """
    if isinstance(network, DiffusionNetwork):
        network.enable_gradient_checkpointing()
    else:
        _checkpoint_blocks(network)


def compile_blocks(network: nn.Module, backend: str, *, several_shapes: bool = False) -> None:
    """Compile each block of a network by itself, in place; hooks stay outside.

    A network without blocks is compiled as a whole.

    Args:
        network: The network.
        backend: Of torch.compile, such as "inductor".
        several_shapes: Whether inputs have several heights and widths: they are then compiled for
            any size. Otherwise each new shape would be compiled again, up to a limit.
    """
    for block in blocks_of(network) or [network]:
        block.forward = torch.compile(
            block.forward, backend=backend, dynamic=True if several_shapes else None
        )


def without_variance(output: Tensor, channels: int) -> Tensor:
    """Return the prediction of an output that may also hold a learned variance, (B, 2 C, *).

    Args:
        output: (B, C, *), or (B, 2 C, *) whose second half is the variance.
        channels: C.
    """
    return output[:, :channels] if output.shape[1] == 2 * channels else output


def record_arguments(network: nn.Module, arguments: Mapping[str, Any] | None) -> None:
    """Let a checkpoint describe a network by the arguments it was built with.

    Arguments that are not plain values, such as other modules, are not recorded.
    """
    if arguments is not None and _is_plain(arguments):
        setattr(network, _ARGUMENTS, arguments)


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Return {"class_path": ..., "init_args": ...} of a network.

    The arguments are those that its `settings()` returns, or that were recorded when a config built
    it. A network with neither is described by its class alone.
    """
    if isinstance(network, Described):
        return describe(network)
    arguments = getattr(network, _ARGUMENTS, None)
    known = {} if arguments is None else {"init_args": arguments}
    return {"class_path": class_path(network), **known}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "class_path" not in value and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _lists(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield child
        else:
            yield from _lists(child)


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from _flat(child)
        elif _count(child):
            yield child


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _checkpoint_blocks(network: nn.Module) -> None:
    blocks = blocks_of(network)
    if not blocks:
        raise ValueError(
            f"model.gradient_checkpointing: {type(network).__name__} has no nn.ModuleList or "
            "nn.Sequential of blocks. Put its blocks into one, or derive it from "
            "zsnr.networks.DiffusionNetwork and list them in blocks()."
        )
    for block in blocks:
        block.forward = partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run a block, and in training again in its backward pass."""
    if block.training and torch.is_grad_enabled():
        return checkpoint(forward, *args, use_reentrant=False, **options)
    return forward(*args, **options)
