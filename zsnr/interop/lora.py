"""Export of adapters: LoRA files in the formats of diffusers and kohya, and merged weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from zsnr.checkpoints.model import Model
from zsnr.files import check_new, new_file
from zsnr.lora import AdaptedUNet, lora_state_dict, merge_lora
from zsnr.weights.ldm_layout import ldm_layers
from zsnr.weights.pretrained import Precision, as_dtype, cast_weight

Layout = Literal["diffusers", "kohya"]

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def merge(model: Model) -> Model:
    """Return a model with a plain UNet into which the adapters are merged, in float32.

    Raises:
        ValueError: The model has no adapters.
    """
    return replace(model, network=merge_lora(_adapted(model)))


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
            multiplied into B, so that readers do not need it. "kohya":
            lora_unet_MODULE.lora_down.weight, lora_up.weight and alpha, and the network in the
            metadata; modules have diffusers' names, or for SDXL those of its original code.
        dtype: Data type of the tensors.
        metadata: Additional or replaced metadata.

    Returns:
        The path of the file.

    Raises:
        ValueError: The model has no adapters, the file exists, or the layout has no name for a
            module.
    """
    unet, path = _adapted(model), Path(path).expanduser()
    title = path.stem
    if layout not in ("diffusers", "kohya"):
        raise ValueError(f"layout={layout!r}: wanted 'diffusers' or 'kohya'.")
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
        tensors, facts = _diffusers_tensors(unet), _facts(model, title)
    else:
        tensors, facts = _kohya_tensors(unet), {**_facts(model, title), **_kohya(model)}
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


def _diffusers_tensors(unet: AdaptedUNet) -> dict[str, Tensor]:
    factor = unet.lora.strength / unet.lora.rank
    return {
        f"unet.{name}": tensor * factor if name.endswith(".lora_B.weight") else tensor
        for name, tensor in lora_state_dict(unet).items()
    }


def _kohya_tensors(unet: AdaptedUNet) -> dict[str, Tensor]:
    tensors, adapters = {}, lora_state_dict(unet)
    layers = {name.rsplit(".", 2)[0] for name in adapters}
    names = ldm_layers(layers, unet.unet.config) if _is_xl(unet) else {}
    for name, tensor in adapters.items():
        layer, part, _ = name.rsplit(".", 2)
        key = "lora_unet_" + names.get(layer, layer).replace(".", "_")
        tensors[f"{key}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{key}.alpha"] = torch.tensor(unet.lora.strength)
    return tensors


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
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": f"{lora.strength:g}",
        "ss_v2": str(base is not None and base[0] == "sd_v2"),
        **({} if base is None else {"ss_base_model_version": base[0]}),
    }
