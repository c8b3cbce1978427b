"""Which kernel an optimizer steps with, how it skips a step on the device, and its two modes."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer

_FUSED = (Adam, AdamW, SGD)  # Adagrad's kernel is for the CPU alone in PyTorch 2.6
_FUSED_SHARDED = (Adam, AdamW)  # SGD's takes no DTensor
_KERNEL = ("fused", "foreach", "capturable", "differentiable")


@runtime_checkable
class TwoModes(Protocol):
    """An optimizer that evaluates other weights than it trains, as those of schedulefree do.

    The parameters hold one or the other; it steps in train mode only.
    """

    def train(self) -> None:
        """Let the parameters hold the weights that are trained."""

    def eval(self) -> None:
        """Let the parameters hold the weights that are evaluated and saved."""


def with_kernel(optimizer: Optimizer, device: torch.device) -> Optimizer:
    """Return the optimizer with the fused kernel on a GPU, unless its settings choose another.

    It keeps its kernel where it loads the state of an optimizer that had another one.
    """
    settings = optimizer.defaults
    chosen = any(settings.get(name) for name in _KERNEL) or settings.get("fused") is False
    sharded = any(
        hasattr(p, "to_local") for group in optimizer.param_groups for p in group["params"]
    )
    known = type(optimizer) in (_FUSED_SHARDED if sharded else _FUSED)
    if device.type == "cuda" and known and not chosen:
        arguments = inspect.signature(type(optimizer)).parameters
        settings = {name: value for name, value in settings.items() if name in arguments}
        groups = [
            {name: value for name, value in group.items() if name not in _KERNEL}
            for group in optimizer.param_groups
        ]
        optimizer = type(optimizer)(groups, **{**settings, "fused": True})
    optimizer.register_load_state_dict_pre_hook(_keep_kernel)
    return optimizer


def _keep_kernel(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    kernel = {name: optimizer.defaults[name] for name in _KERNEL if name in optimizer.defaults}
    return {**state, "param_groups": [{**group, **kernel} for group in state["param_groups"]]}


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the optimizer can be told by a tensor to skip a step, as fused kernels can."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def skip_where(optimizer: Optimizer, skips: Tensor, scaler: GradScaler | None) -> None:
    """Let an optimizer that `skips_on_device` decide on the device whether to skip its next step.

    Args:
        optimizer: The optimizer, before its step.
        skips: 1.0 = skip, 0.0 = step: ().
        scaler: Loss scaler, which tells the optimizer by itself where a gradient overflowed.
    """
    if scaler is None:
        optimizer.found_inf = skips  # type: ignore[attr-defined]
        return

    def add(optimizer: Any, args: Any, kwargs: Any) -> None:
        once.remove()
        optimizer.found_inf = torch.maximum(optimizer.found_inf, skips)

    once = optimizer.register_step_pre_hook(add)
