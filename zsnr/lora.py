"""Low-rank adapters (LoRA) on a pretrained UNet, implemented by peft."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsnr.denoiser import Conditioning
from zsnr.networks import UNet
from zsnr.untrusted import shown
from zsnr.weights.pretrained import Precision, as_dtype, is_weightless
from zsnr.weights.source import digest, find_weights

_STEM = "diffusion_pytorch_model"
_MAX_RANK = 10_000  # no layer of Stable Diffusion is wider
_ADAPTER = "default"  # peft's name of a single adapter


@dataclass(frozen=True)
class LoRA:
    """W + (alpha / rank) B A: the pretrained W is frozen, A and B are trained (arXiv:2106.09685).

    B starts at 0, so that training starts from the pretrained network. There is no dropout: it
    would use global random numbers, so that a resumed run would not be reproducible.

    Args:
        rank: Rank of the adapters: rows of A and columns of B. Memory and file size grow with it.
        alpha: Strength of the adapters, which are multiplied by alpha / rank. None = rank.
        target_modules: Suffixes of the names of the linear layers and convolutions to adapt. The
            default is the projections of all attentions.
        base_dtype: Data type of the frozen weights W; the adapters are always float32.

    Raises:
        ValueError: A setting is out of range.
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    base_dtype: Precision = "float32"

    def __post_init__(self) -> None:
        targets = self.target_modules
        named = isinstance(targets, list | tuple) and all(isinstance(t, str) and t for t in targets)
        if not targets or not named:
            raise ValueError(
                f"lora.target_modules={shown(targets)}: wanted a list such as ['to_q']."
            )
        object.__setattr__(self, "target_modules", tuple(targets))
        if type(self.rank) is not int or not 1 <= self.rank <= _MAX_RANK:
            raise ValueError(
                f"lora.rank={shown(self.rank)}: wanted a whole number, 1 to {_MAX_RANK}."
            )
        if self.alpha is not None and not (_is_real(self.alpha) and 0 < self.alpha < math.inf):
            raise ValueError(f"lora.alpha={shown(self.alpha)}: wanted a finite number above 0.")
        base_dtype = str(as_dtype(self.base_dtype, "lora.base_dtype")).removeprefix("torch.")
        object.__setattr__(self, "base_dtype", base_dtype)

    @property
    def strength(self) -> float:
        """The alpha of alpha / rank."""
        return float(self.rank if self.alpha is None else self.alpha)


class AdaptedUNet(UNet):
    """A frozen pretrained UNet with adapters; its state dict holds only the adapters.

    Args:
        pretrained: A diffusers folder or hub id with the frozen weights.
        lora: The adapters, or their settings as a dict.
        channels: Channels of the latents.
        context_dim: Width of the context.
        subfolder: Folder inside `pretrained`.
        pooled_dim: Width of the pooled embedding, as in UNet.
        num_labels: Number of class labels, as in UNet.
        weights: Required digest of the weights, on which adapters were trained. None = any.

    Raises:
        ValueError: The base cannot be loaded or has another digest, a target does not exist, or
            peft is not installed.
    """

    def __init__(
        self,
        pretrained: str,
        lora: LoRA | dict[str, Any],
        channels: int | None = None,
        context_dim: int | None = None,
        subfolder: str | None = "unet",
        pooled_dim: int | None = None,
        num_labels: int | None = None,
        weights: str | None = None,
    ) -> None:
        require_peft()
        try:
            super().__init__(
                channels=channels,
                context_dim=context_dim,
                pretrained=pretrained,
                subfolder=subfolder,
                pooled_dim=pooled_dim,
                num_labels=num_labels,
            )
        except ValueError as error:
            if weights is None:
                raise
            raise ValueError(
                f"The adapters belong to the UNet in {pretrained}, which cannot be loaded: {error} "
                "Restore it, or set its new path: read_checkpoint(..., base=...), or model.network "
                "of a config."
            ) from error
        self._source: dict[str, Any] = {
            "pretrained": pretrained,
            "subfolder": subfolder,
            "weights": _digest(pretrained, subfolder),
        }
        if weights is not None and self._source["weights"] not in (None, weights):
            raise ValueError(
                f"The UNet in {pretrained} has other weights (digest {self._source['weights']}) "
                f"than the adapters were trained on (digest {weights}): use the original UNet."
            )
        self.lora = lora if isinstance(lora, LoRA) else LoRA(**lora)
        add_lora(self.unet, self.lora)
        hooked: Any = self  # torch has no types for these hooks
        self.unet.register_state_dict_pre_hook(_refuse_whole)
        hooked.register_state_dict_post_hook(_leave_out_base)
        hooked.register_load_state_dict_pre_hook(_put_in_base)

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor:
        dtype: torch.dtype = self.unet.conv_in.weight.dtype  # the base may be in half precision
        if conditioning is not None:
            conditioning = conditioning.to(x_t.device, dtype)
        return super().forward(x_t.to(dtype), t, conditioning).to(x_t.dtype)

    def settings(self) -> dict[str, Any]:
        lora = asdict(self.lora)
        return {**self._source, "lora": {**lora, "target_modules": list(lora["target_modules"])}}


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def require_peft() -> Any:
    """Import peft.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ValueError("LoRA adapters need peft: pip install 'zsnr[lora]'.") from error


def add_lora(unet: nn.Module, lora: LoRA) -> None:
    """Freeze a UNet of diffusers and add adapters, in place.

    Raises:
        ValueError: A target does not exist, or is neither a linear layer nor a convolution.
    """
    peft = require_peft()
    modules = dict(unet.named_modules())
    for target in lora.target_modules:
        targets = [m for name, m in modules.items() if f".{name}".endswith(f".{target}")]
        if not targets:
            raise ValueError(f"lora.target_modules: the UNet has no module {target!r}.")
        for module in targets:
            if not isinstance(module, nn.Linear | nn.Conv2d):
                raise ValueError(
                    f"lora.target_modules: {target!r} is a {type(module).__name__}: wanted linear "
                    "layers or convolutions."
                )
    nn.Module.to(unet, getattr(torch, lora.base_dtype))  # diffusers' `to` would warn
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.strength, target_modules=list(lora.target_modules)
    )
    peft.inject_adapter_in_model(config, unet, adapter_name=_ADAPTER)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
        if _is_adapter(name):
            parameter.data = parameter.data.float()


def lora_state_dict(unet: AdaptedUNet) -> dict[str, Tensor]:
    """Return the adapters as MODULE.lora_A.weight and MODULE.lora_B.weight, in diffusers' names."""
    return {
        name.replace(f".{_ADAPTER}.", "."): parameter.detach()
        for name, parameter in unet.unet.named_parameters()
        if _is_adapter(name)
    }


def is_adapted(description: Mapping[str, Any]) -> bool:
    """Whether a description is that of an adapted UNet."""
    return "lora" in description.get("init_args", {})


def with_base(description: Mapping[str, Any], pretrained: str) -> dict[str, Any]:
    """Return an adapted UNet's description with another path of its base.

    Raises:
        ValueError: The description is not that of an adapted UNet.
    """
    settings = description["init_args"]
    if not is_adapted(description):
        raise ValueError("base: the checkpoint holds a full UNet and no adapters.")
    return {**description, "init_args": {**settings, "pretrained": pretrained}}


def merge_lora(unet: AdaptedUNet) -> UNet:
    """Return a plain UNet with the weights W + (alpha / rank) B A, in float32.

    Float32 weights without adapters are shared with the adapted UNet, not copied.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in unet.unet.named_parameters():
        if not _is_adapter(name):
            weights[name.replace(".base_layer.", ".")] = parameter.detach().float()
    for name, layer in unet.unet.named_modules():
        if hasattr(layer, "lora_A"):
            delta: Tensor = layer.get_delta_weight(_ADAPTER).detach()
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta
    with torch.device("meta"):
        merged = UNet(**UNet.settings(unet))
    merged.unet.load_state_dict(weights, assign=True)
    return merged.train(unet.training)


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _digest(pretrained: str, subfolder: str | None) -> str | None:
    """Hash the base's weights; None if they are not loaded, or their files are not found."""
    if is_weightless():
        return None
    if Path(pretrained).is_file():
        return digest([Path(pretrained)])
    return digest(find_weights(pretrained, subfolder, _STEM))


def _refuse_whole(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Refuse to save diffusers' UNet as a full UNet while its layers have adapters.

    Raises:
        ValueError: The state dict is requested directly, and not as a part of the AdaptedUNet.
    """
    if not prefix:
        raise ValueError(
            "This UNet has adapters (model.lora): first merge them with "
            "zsnr.interop.lora.merge, or write them as a LoRA file."
        )


def _leave_out_base(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for name in [name for name in state_dict if name.startswith(prefix) and not _is_adapter(name)]:
        del state_dict[name]


def _put_in_base(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Add the base's current weights, so that a strict load requires only the adapters."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not _is_adapter(name):
            state_dict.setdefault(prefix + name, tensor)
