"""Adapters of a pretrained UNet and its text encoders: LoRA and its variants, by peft."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from zsnr.conditioning import Conditioner, SDXLConditioner, TransformersConditioner
from zsnr.denoiser import Conditioning
from zsnr.described import build, describe
from zsnr.networks import UNet
from zsnr.untrusted import shown
from zsnr.weights.pretrained import Precision, as_dtype, is_weightless
from zsnr.weights.source import digest, find_weights

Variant = Literal["lora", "rslora", "dora", "loha", "lokr"]

_STEM = "diffusion_pytorch_model"
_MAX_RANK = 10_000  # no layer of Stable Diffusion is wider
_ADAPTER = "default"  # peft's name of a single adapter


@dataclass(frozen=True)
class LoRA:
    """Adapters: the pretrained weight W is frozen, and a change D of few parameters is trained.

    | variant | weight                               | source                               |
    |---------|--------------------------------------|--------------------------------------|
    | lora    | W + (alpha / rank) B A               | Hu et al., arXiv:2106.09685          |
    | rslora  | W + (alpha / sqrt(rank)) B A         | Kalajdzievski, arXiv:2312.03732      |
    | dora    | m V / abs(V), V = W + (alpha/rank) B A | Liu et al., arXiv:2402.09353       |
    | loha    | W + (alpha / rank) (B1 A1) * (B2 A2) | Hyeon-Woo et al., arXiv:2108.06098   |
    | lokr    | W + (alpha / rank) kron(C1, C2)      | Yeh et al., arXiv:2309.14859         |

    The product of loha is element by element; abs(V) of dora are the norms of V's rows, and m is
    trained. C1 of lokr is a whole matrix, and so is C2 if both its sides are at most twice `rank`,
    otherwise C2 = B A.

    Training starts from the pretrained network, because one factor starts at 0. There is no
    dropout: it would use global random numbers, so that a resumed run would not be reproducible.

    Args:
        rank: Rank of the adapters: rows of A and columns of B. Memory and file size grow with it.
        alpha: Strength of the adapters, see above. None = rank.
        target_modules: Suffixes of the names of the linear layers and convolutions to adapt, such
            as to_q, or "all". The move from epsilon to v takes all of them
            (benchmarks/results/adapters.md).
        base_dtype: Data type of the frozen weights W; the adapters are always float32.
        variant: Kind of the adapters: "lora", "rslora", "dora", "loha" or "lokr".
        text_encoder_modules: Suffixes of the names of the text encoders' linear layers to adapt,
            such as q_proj, k_proj, v_proj and out_proj of CLIP, or "all". Empty = text encoders are
            frozen.
        decompose_factor: Rows of C1 for lokr, and its columns: this number where it divides a
            layer's width, else the largest divisor up to it and to the square root of the width. -1
            = the largest divisor up to the square root.

    Raises:
        ValueError: A setting is out of range.
    """

    rank: int = 16
    alpha: float | None = None
    target_modules: tuple[str, ...] | Literal["all"] = "all"
    base_dtype: Precision = "float32"
    variant: Variant = "lora"
    text_encoder_modules: tuple[str, ...] | Literal["all"] = ()
    decompose_factor: int = -1

    def __post_init__(self) -> None:
        for name in ("target_modules", "text_encoder_modules"):
            targets = getattr(self, name)
            if targets == "all":
                continue
            listed = isinstance(targets, list | tuple)
            if not listed or not all(isinstance(t, str) and t for t in targets):
                raise ValueError(
                    f"lora.{name}={shown(targets)}: wanted a list such as ['to_q'], or 'all'."
                )
            object.__setattr__(self, name, tuple(targets))
        if not self.target_modules:
            raise ValueError("lora.target_modules=[]: wanted a list such as ['to_q'], or 'all'.")
        if self.variant not in get_args(Variant):
            known = ", ".join(map(repr, get_args(Variant)))
            raise ValueError(f"lora.variant={shown(self.variant)} is unknown. Known: {known}.")
        factor = self.decompose_factor
        if type(factor) is not int or (factor != -1 and not 1 <= factor <= _MAX_RANK):
            raise ValueError(
                f"lora.decompose_factor={shown(factor)}: wanted -1, or 1 to {_MAX_RANK}."
            )
        if factor != -1 and self.variant != "lokr":
            raise ValueError(
                f"lora.decompose_factor={factor} is for the variant lokr, and this is "
                f"{self.variant}: leave it out."
            )
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

    @property
    def factor(self) -> float:
        """What the product of the factors is multiplied by."""
        root = self.variant == "rslora"
        return self.strength / (math.sqrt(self.rank) if root else self.rank)

    def settings(self) -> dict[str, Any]:
        """Return the arguments as plain values."""
        return {n: list(x) if isinstance(x, tuple) else x for n, x in asdict(self).items()}


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
        self.unet.register_state_dict_pre_hook(_refuse_whole)
        _hold_adapters_alone(self)

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor:
        dtype: torch.dtype = self.unet.conv_in.weight.dtype  # the base may be in half precision
        if conditioning is not None:
            conditioning = conditioning.to(x_t.device, dtype)
        return super().forward(x_t.to(dtype), t, conditioning).to(x_t.dtype)

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, but not the adapters, which would draw random numbers there."""
        super().train(mode)
        for _, layer in _adapted_layers(self):
            layer.train(False)
        return self

    def settings(self) -> dict[str, Any]:
        return {**self._source, "lora": self.lora.settings()}


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


def add_lora(module: nn.Module, lora: LoRA) -> None:
    """Freeze a UNet of diffusers, or a text encoder, and add adapters, in place.

    Raises:
        ValueError: A target does not exist, or is neither a linear layer nor a convolution.
    """
    peft = require_peft()
    of_text = isinstance(module, Conditioner)
    name = "text_encoder_modules" if of_text else "target_modules"
    targets: Sequence[str] = getattr(lora, name)
    if targets == "all":
        layers = (nn.Linear, nn.Conv2d)
        targets = [name for name, part in module.named_modules() if isinstance(part, layers)]
    else:
        _check_targets(module, targets, f"lora.{name}", "text encoder" if of_text else "UNet")
    nn.Module.to(module, getattr(torch, lora.base_dtype))  # diffusers' `to` would warn
    shared = {"r": lora.rank, "target_modules": list(targets)}
    match lora.variant:
        case "loha":
            config = peft.LoHaConfig(**shared, alpha=lora.strength)
        case "lokr":
            config = peft.LoKrConfig(
                **shared, alpha=lora.strength, decompose_factor=lora.decompose_factor
            )
        case kind:
            config = peft.LoraConfig(
                **shared,
                lora_alpha=lora.strength,
                use_rslora=kind == "rslora",
                use_dora=kind == "dora",
            )
    peft.inject_adapter_in_model(config, module, adapter_name=_ADAPTER)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()


def add_text_adapters(conditioner: Conditioner, lora: LoRA) -> None:
    """Add adapters to a frozen, pretrained text encoder, in place: it becomes trainable.

    Its state dict then holds only the adapters, and it stays in evaluation mode, without dropout.
    Where `lora` names no modules of text encoders, nothing is done.

    Raises:
        ValueError: A target does not exist, or cannot be adapted.
    """
    if not lora.text_encoder_modules:
        return
    if not isinstance(conditioner, SDXLConditioner | TransformersConditioner):
        raise ValueError(
            f"lora.text_encoder_modules: a {type(conditioner).__name__} has no adapters: wanted a "
            "TransformersConditioner or an SDXLConditioner, or omit the setting."
        )
    if not conditioner.pretrained:
        raise ValueError("lora.text_encoder_modules: wanted a pretrained text encoder.")
    weights = None if is_weightless() else conditioner.fingerprint()["weights"]
    conditioner.load()
    conditioner.trainable, conditioner.adapted = True, {"weights": weights}
    add_lora(conditioner, lora)
    conditioner.eval()
    _hold_adapters_alone(conditioner)


def _check_targets(module: nn.Module, targets: Sequence[str], setting: str, where: str) -> None:
    modules = dict(module.named_modules())
    for target in targets:
        found = [name for name in modules if f".{name}".endswith(f".{target}")]
        if not found:
            raise ValueError(f"{setting}: the {where} has no module {target!r}.")
        for name in found:
            if not isinstance(modules[name], nn.Linear | nn.Conv2d):
                kind = type(modules[name]).__name__
                raise ValueError(
                    f"{setting}: {target!r} is of type {kind}: wanted linear layers or "
                    "convolutions."
                )


def lora_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the adapters, such as MODULE.lora_A.weight, in the module's own names and peft's."""
    module = module.unet if isinstance(module, AdaptedUNet) else module
    return {
        f"{name}.".replace(f".{_ADAPTER}.", ".").removesuffix("."): parameter.detach()
        for name, parameter in module.named_parameters()
        if is_adapter(name)
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
    """Return a plain UNet with the changed weights, in float32.

    Float32 weights without adapters are shared with the adapted UNet, not copied.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in unet.unet.named_parameters():
        if not is_adapter(name):
            weights[name.replace(".base_layer.", ".")] = parameter.detach().float()
    for name, layer in _adapted_layers(unet.unet):
        weights[f"{name}.weight"] = _merged_weight(layer)
    with torch.device("meta"):
        merged = UNet(**UNet.settings(unet))
    merged.unet.load_state_dict(weights, assign=True)
    return merged.train(unet.training)


def merge_text_adapters(conditioner: Conditioner) -> Conditioner:
    """Return a plain text encoder with the changed weights, in float32.

    Raises:
        ValueError: The pretrained text encoder cannot be loaded.
    """
    merged = build(describe(conditioner), Conditioner).load().float()  # type: ignore[type-abstract]
    parameters = dict(merged.named_parameters())
    for name, layer in _adapted_layers(conditioner):
        parameters[f"{name}.weight"].data = _merged_weight(layer)
    merged.pretrained = False  # its settings alone no longer tell its weights
    return merged


def _adapted_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers of peft that hold a base layer and adapters, with their names."""
    kind = require_peft().tuners.tuners_utils.BaseTunerLayer
    for name, layer in module.named_modules():
        if isinstance(layer, kind):
            yield name, layer


def _merged_weight(layer: Any) -> Tensor:
    """Return the weight of a layer with its adapter, in float32."""
    weight: Tensor = layer.get_base_layer().weight.detach().float()
    changed: Tensor = weight + layer.get_delta_weight(_ADAPTER).detach()
    norms = getattr(layer, "lora_magnitude_vector", {})
    if _ADAPTER not in norms:
        return changed
    return with_norms(changed, norms[_ADAPTER].weight.detach().flatten(), on_output=True)


def with_norms(weight: Tensor, norms: Tensor, *, on_output: bool) -> Tensor:
    """Return m V / |V| of DoRA, with the norms of a matrix's rows (outputs) or columns (inputs).

    Args:
        weight: V, (outputs, inputs, *).
        norms: m, (outputs,) or (inputs,).
        on_output: Whether m are the norms of the rows.
    """
    kept = 0 if on_output else 1
    others = [i for i in range(weight.ndim) if i != kept]
    shape = [len(norms) if i == kept else 1 for i in range(weight.ndim)]
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return weight * (norms.reshape(shape) / lengths)


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted module is that of an adapter, by its name."""
    return _ADAPTER in name.split(".")


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


def _hold_adapters_alone(module: nn.Module) -> None:
    """Let the state dict of a module with adapters hold only these."""
    hooked: Any = module  # torch has no types for these hooks
    hooked.register_state_dict_post_hook(_leave_out_base)
    hooked.register_load_state_dict_pre_hook(_put_in_base)


def _leave_out_base(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for name in [name for name in state_dict if name.startswith(prefix) and not is_adapter(name)]:
        del state_dict[name]


def _put_in_base(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Add the base's current weights, so that a strict load requires only the adapters."""
    for part, child in module.named_children():
        for name, tensor in child.state_dict(prefix=f"{prefix}{part}.").items():
            if not is_adapter(name):
                state_dict.setdefault(name, tensor)
