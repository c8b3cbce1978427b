"""A UNet whose weights are made or read on each rank for its own shards only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from zsnr.checkpoints.sharded import copy_part
from zsnr.weights.pretrained import map_weights, without_weights

_DEFERS: ContextVar[bool] = ContextVar("defers", default=False)


@contextmanager
def deferred_weights() -> Iterator[None]:
    """Let a LatentDiffusion allocate the weights of its UNet only once they are sharded.

    Until then the UNet is on PyTorch's meta device, and takes no memory.
    """
    token = _DEFERS.set(True)
    try:
        yield
    finally:
        _DEFERS.reset(token)


class DeferredUNet:
    """A UNet on the meta device, and what its weights will be.

    Random weights are the ones that `make` would have drawn here: it is called again with the same
    state of the random number generator, and the weights of each of its modules are copied and
    freed as soon as they are drawn.

    Args:
        make: Builds the UNet with its weights.
        source: Folder, single file or hub id of the weights. None = `make` draws them.
    """

    def __init__(self, make: Callable[[], Any], source: str | None) -> None:
        self._make, self._random_state = make, torch.get_rng_state()
        parameters: list[nn.Parameter] = []

        def note(parameter: nn.Parameter) -> nn.Parameter:
            parameters.append(parameter)
            return parameter

        with torch.device("meta"), without_weights(), _each_parameter(note):
            self.unet = make()
        names = {id(parameter): name for name, parameter in self.unet.named_parameters()}
        self._names = [names.pop(id(parameter), "") for parameter in parameters]
        shapes = {name: tuple(p.shape) for name, p in self.unet.unet.state_dict().items()}
        self._stored = None if source is None else map_weights(source, "unet", shapes)
        same = self._stored is not None if source is not None else not names
        self.is_possible = same and not any(True for _ in self.unet.buffers())

    def fill(self, unet: nn.Module) -> None:
        """Give a UNet its weights, or this rank's shards of them; all of it is allocated."""
        targets = {name: parameter.detach() for name, parameter in unet.named_parameters()}
        if self._stored is not None:
            for name, weight in self._stored.items():
                copy_part(targets[f"unet.{name}"], weight)
            return
        names = iter(self._names)

        def take(parameter: nn.Parameter) -> nn.Parameter:
            copy_part(targets[next(names)], parameter.detach())
            return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

        with torch.random.fork_rng(devices=[]), _each_parameter(take):
            torch.set_rng_state(self._random_state)
            self._make()


def defer(make: Callable[[], Any], source: str | None) -> DeferredUNet | None:
    """Return a UNet without weights where that is wanted and possible, see `deferred_weights`.

    It is not possible where the weights have to be downloaded or renamed first.
    """
    if not _DEFERS.get():
        return None
    deferred = DeferredUNet(make, source)
    return deferred if deferred.is_possible else None


@contextmanager
def _each_parameter(visit: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """Visit each parameter of a network being built, once the module that owns it is complete.

    Args:
        visit: Returns the parameter that takes the place of one.
    """
    seen: set[nn.Module] = set()

    def complete(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        for part in () if module is None else module.modules():
            if part in seen:
                continue
            seen.add(part)
            for key, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[key] = visit(parameter)

    handle = nn.modules.module.register_module_module_registration_hook(complete)
    try:
        yield
    finally:
        handle.remove()
