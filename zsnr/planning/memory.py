"""Bytes that a computation stores and uses; with fake tensors, before it is run."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedFakeTensorException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def tensors_of(*modules: nn.Module) -> list[Tensor]:
    """List the parameters and buffers of modules, each once."""
    tensors: dict[int, Tensor] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            tensors[id(tensor)] = tensor
    return list(tensors.values())


def size_of(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def with_fake_tensors(
    thing: T, modules: Iterable[nn.Module], dtype: torch.dtype | None = None
) -> T:
    """Copy an object that holds modules; in a FakeTensorMode, with fake tensors on the CPU.

    Args:
        thing: An object that holds the modules, or a module.
        modules: On any device, such as "meta".
        dtype: Dtype of the copy's floating-point tensors. None = unchanged.
    """
    made: dict[int, Any] = {}
    for x in tensors_of(*modules):
        wanted = dtype if dtype is not None and x.is_floating_point() else x.dtype
        made[id(x)] = torch.empty(x.shape, dtype=wanted, device="cpu")
        if isinstance(x, nn.Parameter):
            made[id(x)] = nn.Parameter(made[id(x)], x.requires_grad)
    return copy.deepcopy(thing, made)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Compute with fake tensors.

    Raises:
        ValueError: The control flow of a part depends on the values of tensors.
    """
    try:
        with FakeTensorMode():
            yield
    except UnsupportedFakeTensorException as error:
        raise ValueError(
            f"This model cannot be planned: its flow depends on values of tensors, at {error}."
        ) from error


@contextmanager
def kept_for_backward(known: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Collect what autograd stores for the backward pass: the bytes of each storage.

    Args:
        known: Tensors that exist anyway, such as parameters; they do not count.
    """
    aside = {_key(tensor) for tensor in known}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if _key(x) not in aside:
            kept[_key(x)] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of live tensors.

    Args:
        known: Tensors that exist anyway; they do not count.

    Attributes:
        now: Live bytes.
        peak: Largest number of live bytes so far.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = {_key(tensor) for tensor in known}

    def restart(self) -> int:
        """Return the peak, and measure another from now on."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in self._seen:
                storage = leaf.untyped_storage()
                self._seen.add(_key(leaf))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, _key(leaf), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def norms_in_float32(module: nn.Module) -> None:
    """Let norms compute and answer in float32, as autocast does on a GPU and not on a CPU."""
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.forward = partial(_group_norm, part)  # type: ignore[method-assign]
        elif isinstance(part, nn.LayerNorm):
            part.forward = partial(_layer_norm, part)  # type: ignore[method-assign]


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    weight, bias = _float32(norm.weight), _float32(norm.bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = _float32(norm.weight), _float32(norm.bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
