"""Merging of adapter files into the weights of a model.

With W the weight, s the scale, alpha / r the factor that the file declares (1 if it declares none)
and D the change, W becomes W + s D, where

    LoRA     D = (alpha / r) B A, with a core between both for the convolutions of LoCon,
    LoHa     D = (alpha / r) (B_1 A_1) * (B_2 A_2), element by element,
    LoKr     D = (alpha / r) kron(C_1, C_2); no factor if both are whole matrices,
    full     D itself, as LyCORIS writes it.

DoRA gives W + D the norms m, which are stored: with V = W + D, V becomes m V / |V|. The programs
differ where s is not 1. A `dora_scale` of LyCORIS is merged as A1111 does, W + s (m V / |V| - W); a
`lora_magnitude_vector` as peft and diffusers do, m V_s / |V_s| with V_s = W + s D.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsnr.checkpoints.model import Model, as_unet
from zsnr.conditioning import (
    Conditioner,
    OpenClipConditioner,
    SDXLConditioner,
    TransformersConditioner,
)
from zsnr.conditioning.remembered import Remembered
from zsnr.interop.adapter_file import AdapterFile, check_scale, open_adapter
from zsnr.interop.declarations import Declaration
from zsnr.lora import is_adapter, with_norms
from zsnr.networks import UNet
from zsnr.weights.header import open_safetensors
from zsnr.weights.ldm_layout import from_ldm, ldm_layers, ldm_names

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FAMILIES = {768: "SD 1", 1024: "SD 2"}
_SAID = {"SD 1": "a Stable Diffusion 1", "SD 2": "a Stable Diffusion 2", "SDXL": "an SDXL"}
_COMFY = {  # names of the text encoders in files that ComfyUI saves
    None: ("clip_l", "clip_h"),
    "text_encoder": ("clip_l",),
    "text_encoder_2": ("clip_g",),
}
_TRANSFORMERS = re.compile(r"^transformer\.|(?:double|single|joint)_blocks")


@dataclass(frozen=True)
class MergedAdapter:
    """What was merged into a model.

    Attributes:
        name: Name of the file, or of the folder that holds it under a standard name.
        scale: What its change was multiplied by.
    """

    name: str
    scale: float

    def facts(self) -> dict[str, Any]:
        """Return name and scale as plain values."""
        return {"name": self.name, "scale": self.scale}


@dataclass(frozen=True)
class _Layer:
    """A layer of a model: its name, its part of the model, its parameters."""

    name: str
    part: str
    weight: nn.Parameter
    bias: nn.Parameter | None


@dataclass(frozen=True)
class _Change:
    """A layer of a model, and by part the tensors that change it; `factor` is alpha / r."""

    layer: _Layer
    parts: Mapping[str, Tensor]
    factor: float


def merge_adapter(
    model: Model, adapter: str | Path | AdapterFile, scale: float = 1.0
) -> MergedAdapter:
    """Merge an adapter into the weights of a model, in place; several add up.

    The arithmetic is in float32; weights keep their dtype. A model with `raw_network` gets it in
    both networks. A refused file changes nothing.

    Args:
        model: The model, with loaded weights on any device.
        adapter: A .safetensors file, a folder of peft or diffusers that holds one, or an opened
            file.
        scale: What the change is multiplied by.

    Raises:
        ValueError: The file is not a readable adapter, a tensor of it fits no layer of the model or
            is not finite, or the model's weights are sharded, quantized or not loaded.
    """
    check_scale(scale, "load_lora")
    file = adapter if isinstance(adapter, AdapterFile) else open_adapter(adapter)
    conditioner = getattr(model.conditioner, "described", model.conditioner)
    pairs = [*_matched(file, model, _layers(model, conditioner))]
    for layer, _ in pairs:
        _check_weights(file, layer)
    tensors = _read(file)
    changes = [
        _Change(
            layer,
            {part: tensors[tensor] for part, tensor in file.layers[name].items()},
            _factor(file, name, tensors),
        )
        for layer, name in pairs
    ]
    for change in changes:  # all are checked before the first is made
        if not _is_bounded(change, scale):
            _changed(file, change, scale)
    _warn(file, model)
    for change in changes:
        for parameter, value in _changed(file, change, scale):
            parameter.data.copy_(value)
    if any(layer.part != "UNet" for layer, _ in pairs):
        conditioner.pretrained = False  # its settings alone no longer tell its weights
    return MergedAdapter(file.name, float(scale))


def _read(file: AdapterFile) -> dict[str, Tensor]:
    """Read the tensors.

    Raises:
        ValueError: A value is not finite, or the file is damaged.
    """
    tensors = {}
    with open_safetensors(file.path) as opened:
        for parts in file.layers.values():
            for name in parts.values():
                # Copied, because truncating a memory-mapped file would kill the process.
                tensors[name] = opened.get_tensor(name).clone()
                if not all(end.isfinite() for end in tensors[name].float().aminmax()):
                    raise ValueError(
                        f"{file.path}: {name} has values that are not finite: the adapter is "
                        "broken."
                    )
    return tensors


def _layers(model: Model, conditioner: Conditioner) -> dict[str, list[_Layer]]:
    """List the layers of a model by each name that a program has for them.

    Averaged and raw weights are two layers of one name.
    """
    named: dict[str, list[_Layer]] = {}

    def add(layer: _Layer, *names: str) -> None:
        for name in dict.fromkeys(names):
            named.setdefault(name, []).append(layer)

    for network in (model.network, model.raw_network):
        if network is None:
            continue
        unet = as_unet(network, "An adapter of another program")
        layers = {layer.name: layer for layer in _parameters(unet.unet, "UNet")}
        for name, original in _original_names(unet, layers).items():
            flat = [each.replace(".", "_") for each in (name, original)]
            add(
                layers[name],
                *(name, f"unet.{name}", f"diffusion_model.{original}", f"lycoris_{flat[0]}"),
                *(f"lora_unet_{each}" for each in flat),
            )
    encoders = _encoders(model.conditioner, conditioner)
    for part, encoder_layers in encoders.items():
        for layer in encoder_layers:
            short = layer.name.removeprefix("text_model.")
            name = clip_layer(layer.name)
            flat_name = name.replace(".", "_")
            number = part.removeprefix("text_encoder").removeprefix("_") or "1"
            single = len(encoders) == 1
            add(
                layer,
                *(f"{part}.{each}" for each in (name, short)),
                f"lora_te_{flat_name}" if single else f"lora_te{number}_{flat_name}",
                *(
                    f"text_encoders.{each}.transformer.{name}"
                    for each in _COMFY[None if single else part]
                ),
            )
    return named


def clip_layer(name: str) -> str:
    """Return the name of a layer of CLIP's text encoder in files, which transformers shortens."""
    short = name.removeprefix("text_model.")
    return short if short == "text_projection" else f"text_model.{short}"


def _parameters(module: nn.Module, part: str) -> Iterator[_Layer]:
    """Yield the layers that have a weight; those under adapters have the name of the whole."""
    parameters = dict(module.named_parameters())
    for name, weight in parameters.items():
        layer, _, last = name.rpartition(".")
        if last == "weight" and not is_adapter(name):
            bias = parameters.get(f"{layer}.bias")
            yield _Layer(layer.removesuffix(".base_layer"), part, weight, bias)


def _original_names(unet: UNet, layers: Iterable[str]) -> dict[str, str]:
    """Return the names of a UNet's layers in the original code, or diffusers' if it has none."""
    try:
        return ldm_layers(layers, unet.unet.config)
    except (ValueError, TypeError):  # a UNet of another kind
        return {name: name for name in layers}


def _encoders(used: Conditioner, conditioner: Conditioner) -> dict[str, list[_Layer]]:
    """Return the layers of the CLIP text encoders, by the encoders' folders in diffusers.

    They have transformers' names.
    """
    from transformers import CLIPTextModel

    if isinstance(used, Remembered):  # it has released them
        return {}
    if isinstance(conditioner, OpenClipConditioner):
        return {"text_encoder": [*_open_clip_layers(conditioner)]}
    encoders: dict[str, Any] = {}
    if isinstance(conditioner, SDXLConditioner):
        encoders = {"text_encoder": conditioner.encoder, "text_encoder_2": conditioner.encoder_2}
    elif isinstance(conditioner, TransformersConditioner):
        encoders = {"text_encoder": conditioner.encoder}
        if not isinstance(conditioner.encoder, CLIPTextModel):
            return {}
    return {part: [*_parameters(each, "text encoder")] for part, each in encoders.items()}


def _open_clip_layers(tower: OpenClipConditioner) -> Iterator[_Layer]:
    """Yield the layers of open_clip's text tower; query, key and value are thirds of one."""
    parameters, depth = dict(tower.named_parameters()), len(tower.transformer.resblocks)
    kinds = [*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]
    layers = [f"encoder.layers.{i}.{kind}" for i in range(depth) for kind in kinds]
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    places = ldm_names("open_clip", names, {"num_hidden_layers": depth})
    views = {
        name: nn.Parameter(from_ldm(name, place, parameters[place].data), requires_grad=False)
        for name, place in places.items()
    }
    for layer in layers:
        yield _Layer(layer, "text encoder", views[f"{layer}.weight"], views[f"{layer}.bias"])


def _matched(
    file: AdapterFile, model: Model, layers: Mapping[str, list[_Layer]]
) -> Iterator[tuple[_Layer, str]]:
    """Yield the layers of the model that a file changes, each with its name in the file.

    Raises:
        ValueError: A tensor fits no layer, or two of the file's layers are the same one.
    """
    changed: dict[int, str] = {}
    for name, parts in file.layers.items():
        first = min(parts.values())
        candidates = layers.get(name) or layers.get(_with_part(file, name), [])
        if not candidates:
            raise ValueError(f"{file.path}: {_misfit(file, model, first, _unknown(model, first))}.")
        for layer in candidates:
            twice = changed.setdefault(id(layer.weight), first)
            if twice != first:
                raise ValueError(f"{file.path}: {twice} and {first} both adapt {layer.name}.")
            shapes = {part: file.header.shapes[tensor] for part, tensor in parts.items()}
            problem = _shape_problem(layer, shapes)
            if problem is not None:
                reason = f"{first} does not fit: {problem}"
                raise ValueError(f"{file.path}: {_misfit(file, model, first, reason)}.")
            yield layer, name


def _with_part(file: AdapterFile, name: str) -> str:
    """Return a text encoder's layer that peft's file names without its part."""
    config, _ = file.config_of(name)
    second = config.encodes == "CLIPTextModelWithProjection"
    return f"text_encoder_2.{name}" if second else f"text_encoder.{name}"


def _family(model: Model) -> str | None:
    unet = as_unet(model.network, "An adapter of another program")
    if unet.takes_sizes:
        return "SDXL"
    width = unet.unet.config["cross_attention_dim"]
    return _FAMILIES.get(width) if isinstance(width, int) else None


def _misfit(file: AdapterFile, model: Model, tensor: str, problem: str) -> str:
    """Say why a tensor does not fit: most often the adapter is for another family."""
    adapts, family = file.declaration.family, _family(model)
    if _TRANSFORMERS.search(tensor):
        problem = f"{tensor} is of a transformer, such as Flux or Stable Diffusion 3"
    if adapts is None or adapts == family or (family is None and adapts != "SDXL"):
        return problem
    other = f"{_SAID[family]} model" if family else "a model that is not SDXL"
    return f"it is {_SAID[adapts]} {file.kind}, to be merged into {other}: {problem}"


def _unknown(model: Model, tensor: str) -> str:
    of_text = tensor.startswith(("lora_te", "text_"))
    if of_text and isinstance(model.conditioner, Remembered):
        return f"{tensor} adapts a text encoder, but this model keeps only encoded prompts"
    known = SDXLConditioner | TransformersConditioner | OpenClipConditioner
    if of_text and not isinstance(model.conditioner, known):
        kind = type(model.conditioner).__name__
        return f"{tensor} adapts a CLIP text encoder, and the model's is {kind}"
    return f"{tensor} adapts a layer that the model does not have"


def _shape_problem(layer: _Layer, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Multiply without values, to see whether the shapes fit. None = they do."""
    listed = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
    weight = tuple(layer.weight.shape)
    problem = f"{layer.name} has shape {weight}, but the file {listed}"
    if shapes.keys() - {"diff_bias"}:
        try:
            empty = {part: torch.empty(s, device="meta") for part, s in shapes.items()}
            shape = tuple(_whole(empty).shape)
        except (RuntimeError, IndexError, ValueError):
            return problem
        if not _fits(shape, weight):
            return problem
    if "magnitude" in shapes and math.prod(shapes["magnitude"]) != weight[0]:
        return problem
    norms = _trimmed(shapes.get("dora_scale", ()))
    if norms and norms not in (weight[:1], (1, *weight[1:2])):
        return problem
    for part in ("diff_bias", "up_bias"):
        if part in shapes and layer.bias is None:
            return f"{layer.name} has no bias to be changed"
        if part in shapes and layer.bias is not None and shapes[part] != layer.bias.shape:
            return problem
    return None


def _fits(shape: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a change has a weight's shape, up to kernels of size 1 and flattened kernels."""
    return shape == (weight[0], math.prod(weight[1:])) or _trimmed(shape) == _trimmed(weight)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _factor(file: AdapterFile, name: str, tensors: Mapping[str, Tensor]) -> float:
    """Return alpha / r of a layer, 1 if there is no alpha."""
    parts = file.layers[name]
    config, short = file.config_of(name)
    inner = next((p for p in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if p in parts), None)
    rank = None if inner is None else len(tensors[parts[inner]])
    if rank is None and "lokr_w1" in parts and config.alpha is not None:
        rank = config.rank_of(short)  # peft scales whole matrices too
    alpha = config.alpha_of(short) if "alpha" not in parts else float(tensors[parts["alpha"]])
    if rank is None or alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.by_square_root else rank)


def _check_weights(file: AdapterFile, layer: _Layer) -> None:
    """Refuse weights that are not a plain tensor of floating-point numbers.

    Raises:
        ValueError: They are sharded, quantized or not loaded.
    """
    weight = layer.weight.data
    if "DTensor" in type(weight).__name__:
        kind = "sharded over devices: load the adapter before sharding"
    elif type(weight) is not Tensor or weight.dtype not in _PLAIN:
        kind = f"quantized ({weight.dtype}): load the adapter before quantizing"
    elif weight.is_meta:
        kind = "not loaded, or kept elsewhere: load the adapter before offloading"
    else:
        return
    raise ValueError(f"{file.path}: the weights of {layer.name} are {kind}.")


def _is_bounded(change: _Change, scale: float) -> bool:
    """Whether a plain LoRA is known to give values that the weight's dtype can hold.

    By Cauchy and Schwarz, |W + s D| is at most |W| + |s| (alpha / r) |B_i| |A_j|, with the rows of
    B and the columns of A, which takes much less time than the product.
    """
    if not {"down", "up"} <= change.parts.keys() <= {"down", "up", "alpha"}:
        return False
    weight = change.layer.weight.data
    up, down = (change.parts[part].float().flatten(1) for part in ("up", "down"))
    largest = max(abs(float(end)) for end in weight.aminmax())
    lengths = float(up.norm(dim=1).max() * down.norm(dim=0).max())
    bound = largest + abs(scale * change.factor) * lengths
    return bound < 0.99 * torch.finfo(weight.dtype).max


def _changed(file: AdapterFile, change: _Change, scale: float) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the changed parameters of a layer with their new values, in float32 at least.

    Raises:
        ValueError: The parameter's dtype cannot hold a new value.
    """
    layer, weight = change.layer, change.layer.weight
    exact = torch.promote_types(weight.dtype, torch.float32)
    parts = {part: t.to(weight.device, exact) for part, t in change.parts.items()}
    changed = []
    if parts.keys() - {"diff_bias"}:
        changed.append((weight, _merged(weight.data, parts, change.factor, scale)))
    for part, factor in (("diff_bias", scale), ("up_bias", scale * change.factor)):
        if part in parts and layer.bias is not None:
            changed.append((layer.bias, torch.add(layer.bias.data, parts[part], alpha=factor)))
    for parameter, value in changed:
        low, high = value.aminmax()
        most = torch.finfo(parameter.dtype).max
        if not (-most <= low and high <= most):  # NaN neither
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"{file.path}: with scale {scale:g}, {layer.name} gets values that {kind} cannot "
                "hold: lower the scale, or load the model in another dtype."
            )
    return changed


def _merged(weight: Tensor, parts: Mapping[str, Tensor], factor: float, scale: float) -> Tensor:
    """Return W with the change of an adapter, see the formulas above."""
    change = _whole(parts).reshape(weight.shape)
    if "dora_scale" not in parts:
        merged = torch.add(weight, change, alpha=scale * factor)
        norms = parts.get("magnitude")
        return merged if norms is None else with_norms(merged, norms.flatten(), on_output=True)
    norms = parts["dora_scale"]
    on_output = len(norms) == len(weight)
    merged = torch.add(weight, change, alpha=factor)
    merged = with_norms(merged, norms.flatten(), on_output=on_output)
    return torch.add(weight, merged - weight, alpha=scale)


def _whole(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the change that the factors of an adapter are multiplied to, without alpha / r."""
    if "diff" in parts:
        return parts["diff"]
    if "down" in parts:
        down, up = parts["down"], parts["up"].flatten(1)
        if "mid" in parts:
            return torch.einsum("ijkl,jr,pi->prkl", parts["mid"], down.flatten(1), up)
        return (up @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    if "hada_w1_a" in parts:
        return _product(parts, "hada_w1", "hada_t1") * _product(parts, "hada_w2", "hada_t2")
    first = _product(parts, "lokr_w1").contiguous()
    second = _product(parts, "lokr_w2", "lokr_t2").contiguous()
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


def _product(parts: Mapping[str, Tensor], name: str, core: str = "") -> Tensor:
    """Return a factor of LoHa or LoKr: whole, of low rank, or with a core for convolutions."""
    if name in parts:
        return parts[name]
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return torch.einsum("ijkl,ip,jr->prkl", parts[core], a, b) if core in parts else a @ b


def _warn(file: AdapterFile, model: Model) -> None:
    """Say once what of a file has no effect, or was trained for another kind of model."""
    declared = file.declaration
    differing = [*_differing(declared, model)]
    if differing:
        warnings.warn(
            f"{file.path} declares {' and '.join(said for said, _ in differing)}, but the model "
            f"has {' and '.join(has for _, has in differing)}: its images may be wrong.",
            stacklevel=3,
        )
    embeddings = {name.split(".")[1] for name in file.idle if name.count(".") > 1}
    if embeddings:
        warnings.warn(
            f"{file.path} also holds embeddings ({', '.join(sorted(embeddings))}), which are not "
            "loaded: prompts cannot name them.",
            stacklevel=3,
        )


def _differing(declared: Declaration, model: Model) -> Iterator[tuple[str, str]]:
    """Yield what an adapter declares otherwise than its model, both in words."""
    said, zero = declared.prediction_type, float(model.schedule.snr[-1]) == 0
    if said not in (None, model.prediction_type):
        yield f"prediction type {said}", model.prediction_type
    if declared.zero_terminal_snr not in (None, zero):
        words = {True: "zero terminal SNR", False: "a schedule that keeps signal"}
        yield words[not zero], words[zero]
