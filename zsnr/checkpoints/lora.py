"""Adapters out: LoRA files as diffusers and as kohya's scripts write them, and merged weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from zsnr.checkpoints.model import Model
from zsnr.files import check_new, new_file
from zsnr.lora import AdaptedUNet, lora_state_dict, merge_lora
from zsnr.pretrained import Precision, cast_weight, check_precision

Layout = Literal["diffusers", "kohya"]

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def merge(model: Model) -> Model:
    """Return a model whose UNet is a plain one with its adapters merged, in float32.

    Raises:
        ValueError: It has no adapters.
    """
    return replace(model, unet=merge_lora(_adapted(model)))


def write_lora(
    model: Model,
    path: str | Path,
    *,
    layout: Layout = "diffusers",
    dtype: Precision = "float32",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a model's adapters as a safetensors file.

    The file names prediction type and schedule in its metadata, but a LoRA cannot change the
    sampler that a tool puts it in: whoever uses it sets v prediction and zero terminal SNR there.
    The empty tensors `v_pred` and `ztsnr` that mark whole models are left out: diffusers refuses a
    LoRA file with other tensors than adapters.

    Args:
        model: Its UNet has adapters.
        path: A file NAME.safetensors; with layout "diffusers", or a folder, to hold
            pytorch_lora_weights.safetensors.
        layout: "diffusers": unet.MODULE.lora_A.weight and lora_B.weight, with alpha / rank
            multiplied into B, so that no reader needs to know it. "kohya":
            lora_unet_MODULE.lora_down.weight, lora_up.weight and alpha, and the network in the
            metadata; modules are named as diffusers does, of SDXL as its original code does.
        dtype: Of the tensors.
        metadata: More of it, or other values.

    Returns:
        The file.

    Raises:
        ValueError: The model has no adapters, the file exists, or the layout has no name for a
            module.
    """
    unet, path = _adapted(model), Path(path).expanduser()
    title = path.stem
    if layout not in ("diffusers", "kohya"):
        raise ValueError(f"layout={layout!r}: wanted 'diffusers' or 'kohya'.")
    kept = check_precision(dtype)
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
    tensors = {  # an alpha has no dimension, and stays exact
        name: cast_weight(name, tensor, kept if tensor.ndim else tensor.dtype).cpu().contiguous()
        for name, tensor in tensors.items()
    }
    from safetensors.torch import save_file

    with new_file(path) as beside:
        save_file(tensors, beside, {"format": "pt", **facts, **(metadata or {})})
    return path


def _adapted(model: Model) -> AdaptedUNet:
    if not isinstance(model.unet, AdaptedUNet):
        raise ValueError(
            "The model has no adapters: it was not trained with model.lora. Export the whole of it."
        )
    return model.unet


def _diffusers_tensors(unet: AdaptedUNet) -> dict[str, Tensor]:
    factor = unet.lora.strength / unet.lora.rank
    return {
        f"unet.{name}": tensor * factor if name.endswith(".lora_B.weight") else tensor
        for name, tensor in lora_state_dict(unet).items()
    }


def _kohya_tensors(unet: AdaptedUNet) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in lora_state_dict(unet).items():
        module, _, part = name.removesuffix(".weight").rpartition(".")
        if _is_xl(unet):
            module = ldm_name(module, unet.unet.config["layers_per_block"])
        key = "lora_unet_" + module.replace(".", "_")
        tensors[f"{key}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{key}.alpha"] = torch.tensor(unet.lora.strength)
    return tensors


def ldm_name(module: str, layers_per_block: int) -> str:
    """Name a module of an attention as Stability's original code does.

    Args:
        module: Its name in diffusers, such as "down_blocks.1.attentions.0.proj_in".
        layers_per_block: Of the UNet.

    Raises:
        ValueError: It is in no attention.
    """
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.(.+)", module)
    if found is None:
        raise ValueError(
            f"{module} is in no attention: kohya's layout of SDXL has names here for those alone. "
            "Write layout 'diffusers', or merge the adapters."
        )
    side, block, layer, inner = found.groups()
    if side is None:
        return f"middle_block.1.{inner}"
    number = int(block) * (layers_per_block + 1) + int(layer)
    if side == "up":
        return f"output_blocks.{number}.1.{inner}"
    return f"input_blocks.{number + 1}.1.{inner}"  # 0 is conv_in


def _is_xl(unet: AdaptedUNet) -> bool:
    return bool(unet.unet.config["addition_embed_type"] == "text_time")


def _has_v(model: Model) -> bool:
    return model.prediction_type == "v_prediction"


def _base(model: Model) -> tuple[str, str] | None:
    """Name Stable Diffusion's version as kohya and as modelspec do; None if it is none."""
    unet = _adapted(model)
    if _is_xl(unet):
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
    width = unet.unet.config["cross_attention_dim"]
    second = "stable-diffusion-v2-768-v" if _has_v(model) else "stable-diffusion-v2-512"
    known = {768: ("sd_v1", "stable-diffusion-v1"), 1024: ("sd_v2", second)}
    return known.get(width)


def _facts(model: Model, title: str) -> dict[str, str]:
    """Say what the adapters were trained for, as other tools read it."""
    own: dict[str, Any] = {
        "prediction_type": model.prediction_type,
        "schedule": model.schedule.settings(),
    }
    facts = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": title,
        "modelspec.resolution": f"{model.image_size}x{model.image_size}",
        "modelspec.prediction_type": "v" if _has_v(model) else model.prediction_type,
        "ss_v_parameterization": str(_has_v(model)),
        "ss_zero_terminal_snr": str(float(model.schedule.snr[-1]) == 0),
        "zsnr": json.dumps(own),
    }
    base = _base(model)
    if base is not None:
        sgm = "https://github.com/Stability-AI/generative-models"
        facts["modelspec.architecture"] = f"{base[1]}/lora"
        facts["modelspec.implementation"] = sgm if _is_xl(_adapted(model)) else "diffusers"
    return facts


def _kohya(model: Model) -> dict[str, str]:
    """Say what kohya's scripts write of a network."""
    lora, base = _adapted(model).lora, _base(model)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": f"{lora.strength:g}",
        "ss_v2": str(base is not None and base[0] == "sd_v2"),
        **({} if base is None else {"ss_base_model_version": base[0]}),
    }
