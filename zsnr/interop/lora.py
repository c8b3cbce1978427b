"""Export of adapters: files in the formats of diffusers, kohya and LyCORIS, and merged weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zsnr.checkpoints.model import Model
from zsnr.conditioning import SDXLConditioner
from zsnr.files import check_new, new_file
from zsnr.interop.adapter_merge import clip_layer
from zsnr.lora import AdaptedUNet, LoRA, lora_state_dict, merge_lora, merge_text_adapters
from zsnr.weights.ldm_layout import ldm_layers
from zsnr.weights.pretrained import Precision, as_dtype, cast_weight

Layout = Literal["diffusers", "kohya"]

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def merge(model: Model) -> Model:
    """Return a model with a plain UNet and text encoder, with the adapters merged, in float32.

    Raises:
        ValueError: The model has no adapters, or the pretrained text encoder cannot be loaded.
    """
    conditioner = model.conditioner
    if conditioner.adapted is not None:
        conditioner = merge_text_adapters(conditioner)
    return replace(model, network=merge_lora(_adapted(model)), conditioner=conditioner)


def write_lora(
    model: Model,
    path: str | Path,
    *,
    layout: Layout = "diffusers",
    dtype: Precision = "float32",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model's adapters as a safetensors file.

    The file's metadata declare prediction type and schedule, but a LoRA cannot change a tool's
    sampler settings: users must set v prediction and zero terminal SNR there. The empty tensors
    `v_pred` and `ztsnr` that mark whole models are left out, because diffusers refuses a LoRA file
    with tensors other than adapters.

    Args:
        model: A model whose UNet has adapters.
        path: A file NAME.safetensors; with layout "diffusers", it may also be a folder for
            pytorch_lora_weights.safetensors.
        layout: "diffusers": unet.MODULE.lora_A.weight and lora_B.weight, with alpha / rank
            multiplied into B, so that readers do not need it, and lora_magnitude_vector.weight for
            DoRA; diffusers has no layout for LoHa and LoKr. "kohya":
            lora_unet_MODULE.lora_down.weight, lora_up.weight and alpha, and the network in the
            metadata; modules have diffusers' names, or for SDXL those of its original code. DoRA,
            LoHa and LoKr have the tensors of LyCORIS; diffusers ignores those of DoRA in this
            layout. Text encoders are text_encoder and text_encoder_2, or lora_te, for SDXL lora_te1
            and lora_te2.
        dtype: Data type of the tensors.
        metadata: Additional or replaced metadata.

    Returns:
        The path of the file.

    Raises:
        ValueError: The model has no adapters, the file exists, or the layout has no name for a
            module, or cannot hold the variant.
    """
    lora, path = _adapted(model).lora, Path(path).expanduser()
    title = path.stem
    if layout not in ("diffusers", "kohya"):
        raise ValueError(f"layout={layout!r}: wanted 'diffusers' or 'kohya'.")
    if layout == "diffusers" and lora.variant in ("loha", "lokr"):
        raise ValueError(
            f"diffusers has no layout for adapters of the variant {lora.variant}: write them in "
            "LyCORIS's layout (`--format lora-kohya`), or the whole model (`--merge`)."
        )
    stored = as_dtype(dtype)
    if path.suffix != ".safetensors":
        if layout == "kohya":
            raise ValueError(f"{path}: wanted a file NAME.safetensors.")
        path = path / DIFFUSERS_NAME
    check_new(path)
    for name, value in (metadata or {}).items():
        if not isinstance(value, str):
            raise ValueError(f"metadata {name!r} is a {type(value).__name__}: wanted a text.")
    if layout == "diffusers":
        tensors, facts = _diffusers_tensors(model), _facts(model, title)
    else:
        tensors, facts = _kohya_tensors(model), {**_facts(model, title), **_kohya(model)}
    tensors = {  # an alpha has no dimensions, and is stored exactly
        name: cast_weight(name, tensor, stored if tensor.ndim else tensor.dtype).cpu().contiguous()
        for name, tensor in tensors.items()
    }
    from safetensors.torch import save_file

    with new_file(path) as beside:
        save_file(tensors, beside, {"format": "pt", **facts, **(metadata or {})})
    return path


def _adapted(model: Model) -> AdaptedUNet:
    if not isinstance(model.network, AdaptedUNet):
        raise ValueError(
            "The model has no adapters (it was trained without model.lora): export the whole model."
        )
    return model.network


def _layers(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each adapted layer, by peft's names of the parts of an adapter."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in lora_state_dict(module).items():
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    return layers


def _text_layers(model: Model) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """Yield each adapted layer of the text encoders: its encoder's number, its name, its parts."""
    if model.conditioner.adapted is None:
        return
    kind = model.conditioner.encoder.config.model_type
    if not kind.startswith("clip"):
        raise ValueError(
            f"No layout names the layers of a {kind} text encoder: write the whole model (--merge)."
        )
    for name, parts in _layers(model.conditioner).items():
        encoder, _, layer = name.partition(".")
        yield "2" if encoder == "encoder_2" else "1", clip_layer(layer), parts


def _diffusers_tensors(model: Model) -> dict[str, Tensor]:
    unet = _adapted(model)
    layers = {f"unet.{name}": parts for name, parts in _layers(unet).items()}
    for number, name, parts in _text_layers(model):
        folder = "text_encoder" if number == "1" else "text_encoder_2"
        layers[f"{folder}.{name}"] = parts
    tensors = {}
    for layer, parts in layers.items():
        tensors[f"{layer}.lora_A.weight"] = parts["lora_A"]
        tensors[f"{layer}.lora_B.weight"] = parts["lora_B"] * unet.lora.factor
        if "lora_magnitude_vector" in parts:
            tensors[f"{layer}.lora_magnitude_vector.weight"] = parts["lora_magnitude_vector"]
    return tensors


def _kohya_tensors(model: Model) -> dict[str, Tensor]:
    unet = _adapted(model)
    layers = _layers(unet)
    names = ldm_layers(layers, unet.unet.config) if _is_xl(unet) else {}
    named = {f"lora_unet_{_flat(names.get(name, name))}": layers[name] for name in layers}
    double = isinstance(model.conditioner, SDXLConditioner)
    for number, name, parts in _text_layers(model):
        named[f"lora_te{number if double else ''}_{_flat(name)}"] = parts
    return {
        f"{layer}.{part}": tensor
        for layer, parts in named.items()
        for part, tensor in _lycoris(parts, unet.lora).items()
    }


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _lycoris(parts: Mapping[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """Return the tensors of a layer's adapter in the names of kohya's scripts and LyCORIS."""
    if parts.keys() == {"lokr_w1", "lokr_w2"}:  # LyCORIS does not scale two whole matrices
        return {"lokr_w1": parts["lokr_w1"], "lokr_w2": parts["lokr_w2"] * lora.factor}
    named = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
    tensors = {named.get(part, part): tensor for part, tensor in parts.items()}
    norms = tensors.pop("lora_magnitude_vector", None)
    if norms is not None:
        tensors["dora_scale"] = norms.reshape(-1, *[1] * (parts["lora_A"].ndim - 1))
    return {**tensors, "alpha": torch.tensor(lora.factor * lora.rank)}


def _is_xl(unet: AdaptedUNet) -> bool:
    return bool(unet.unet.config["addition_embed_type"] == "text_time")


def _has_v(model: Model) -> bool:
    return model.prediction_type == "v_prediction"


def _base(model: Model) -> tuple[str, str] | None:
    """Return the Stable Diffusion version in kohya's and modelspec's names; None = unknown."""
    unet = _adapted(model)
    if _is_xl(unet):
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    width = unet.unet.config["cross_attention_dim"]
    second = "stable-diffusion-v2-768-v" if _has_v(model) else "stable-diffusion-v2-512"
    versions = {768: ("sd_v1", "stable-diffusion-v1"), 1024: ("sd_v2", second)}
    return versions.get(width)


def _facts(model: Model, title: str) -> dict[str, str]:
    """Return metadata on the adapters' training, in the form that other tools read."""
    declared: dict[str, Any] = {
        "prediction_type": model.prediction_type,
        "schedule": model.schedule.settings(),
    }
    flow = model.prediction_type == "flow"  # neither v nor epsilon, which the flag tells apart
    facts = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.resolution": f"{model.image_size}x{model.image_size}",
        "modelspec.prediction_type": "v" if _has_v(model) else model.prediction_type,
        **({} if flow else {"ss_v_parameterization": str(_has_v(model))}),
        "ss_zero_terminal_snr": str(float(model.schedule.snr[-1]) == 0),
        "zsnr": json.dumps(declared),
    }
    base = _base(model)
    if base is not None:
        sgm = "https://github.com/Stability-AI/generative-models"
        facts["modelspec.architecture"] = f"{base[1]}/lora"
        facts["modelspec.implementation"] = sgm if _is_xl(_adapted(model)) else "diffusers"
    return facts


def _kohya(model: Model) -> dict[str, str]:
    """Return the metadata that kohya's scripts write about a network."""
    lora, base = _adapted(model).lora, _base(model)
    settings = {
        "dora": {"algo": "lora", "dora_wd": "True"},
        "loha": {"algo": "loha"},
        "lokr": {"algo": "lokr", "factor": str(lora.decompose_factor)},
    }.get(lora.variant)
    return {
        "ss_network_module": "networks.lora" if settings is None else "lycoris.kohya",
        **({} if settings is None else {"ss_network_args": json.dumps(settings)}),
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": f"{lora.factor * lora.rank:g}",
        "ss_v2": str(base is not None and base[0] == "sd_v2"),
        **({} if base is None else {"ss_base_model_version": base[0]}),
    }
