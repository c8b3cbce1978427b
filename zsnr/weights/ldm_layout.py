"""The ldm layout: diffusers' and transformers' weights under the names of the original releases.

Each function is the inverse of the converter with which diffusers reads such files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def ldm_unet(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a UNet2DConditionModel's weights without copying them.

    Block b of n has L resnets on the way down and L + 1 on the way up, each followed by its
    attention. The layout numbers them consecutively: `input_blocks.0` is conv_in, followed by L
    resnets and a downsampler for each block; `output_blocks` are the resnets on the way up, where
    the last one of a block has the upsampler after its attention.

    Args:
        weights: State dict of the UNet.
        config: Config of the UNet.

    Raises:
        ValueError: The layout has no name for a weight.
    """
    depth = int(config["layers_per_block"])
    attends = [kind.startswith("CrossAttn") for kind in config["up_block_types"]]

    def down(match: re.Match[str]) -> str:
        b, kind, i, rest = int(match[1]), match[2], int(match[3]), match[4]
        block = f"input_blocks.{1 + b * (depth + 1) + i}"
        if kind == "resnets":
            return f"{block}.0.{_renamed(rest, _RESNET)}"
        if kind == "attentions":
            return f"{block}.1.{rest}"
        return f"input_blocks.{(b + 1) * (depth + 1)}.0.{rest.replace('conv', 'op')}"

    def up(match: re.Match[str]) -> str:
        b, kind, i, rest = int(match[1]), match[2], int(match[3]), match[4]
        block = f"output_blocks.{b * (depth + 1) + i}"
        if kind == "resnets":
            return f"{block}.0.{_renamed(rest, _RESNET)}"
        if kind == "attentions":
            return f"{block}.1.{rest}"
        return f"output_blocks.{b * (depth + 1) + depth}.{1 + attends[b]}.{rest}"

    def middle(match: re.Match[str]) -> str:
        kind, i, rest = match[1], int(match[2]), match[3]
        if kind == "resnets":
            return f"middle_block.{2 * i}.{_renamed(rest, _RESNET)}"
        return f"middle_block.{2 * i + 1}.{rest}"

    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.(.+)", down),
        (r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.(.+)", up),
        (r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", middle),
        (f"({_any_of(_UNET)})" + r"\.(weight|bias)", lambda m: f"{_UNET[m[1]]}.{m[2]}"),
    ]
    return {_by_rule(name, rules): weight for name, weight in weights.items()}


def ldm_vae(weights: Mapping[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """Rename an AutoencoderKL's weights without copying them.

    The decoder's blocks are numbered from the finest resolution on. Attention uses 1x1
    convolutions.

    Args:
        weights: State dict of the VAE.
        num_blocks: Number of its resolutions.

    Raises:
        ValueError: The layout has no name for a weight.
    """

    def down(match: re.Match[str]) -> str:
        i, kind, j, rest = match[1], match[2], match[3], match[4]
        if kind == "resnets":
            return f"encoder.down.{i}.block.{j}.{_renamed(rest, _VAE)}"
        return f"encoder.down.{i}.downsample.{rest}"

    def up(match: re.Match[str]) -> str:
        i, kind, j, rest = num_blocks - 1 - int(match[1]), match[2], match[3], match[4]
        if kind == "resnets":
            return f"decoder.up.{i}.block.{j}.{_renamed(rest, _VAE)}"
        return f"decoder.up.{i}.upsample.{rest}"

    def middle(match: re.Match[str]) -> str:
        side, kind, i, rest = match[1], match[2], int(match[3]), match[4]
        if kind == "resnets":
            return f"{side}.mid.block_{i + 1}.{_renamed(rest, _VAE)}"
        return f"{side}.mid.attn_{i + 1}.{_renamed(rest, _VAE_ATTENTION)}"

    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (r"encoder\.down_blocks\.(\d+)\.(resnets|downsamplers)\.(\d+)\.(.+)", down),
        (r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", up),
        (r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)", middle),
        (
            r"(encoder|decoder)\.(conv_in|conv_out|conv_norm_out)\.(weight|bias)",
            lambda m: f"{m[1]}.{_VAE.get(m[2], m[2])}.{m[3]}",
        ),
        (r"(quant_conv|post_quant_conv)\.(weight|bias)", lambda m: m[0]),
    ]
    renamed = {_by_rule(name, rules): weight for name, weight in weights.items()}
    return {
        name: weight[:, :, None, None] if ".attn_" in name and weight.ndim == 2 else weight
        for name, weight in renamed.items()
    }


def ldm_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIPTextModel's weights as in Stable Diffusion 1 and SDXL's first encoder."""
    return {f"text_model.{name.removeprefix('text_model.')}": w for name, w in weights.items()}


def ldm_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIPTextModel's weights as in open_clip: Stable Diffusion 2, SDXL's second encoder.

    Query, key and value are stacked in one matrix; the projection of the pooled text, if it exists,
    is transposed.

    Raises:
        ValueError: open_clip has no name for a weight.
    """
    plain = {name.removeprefix("text_model."): weight for name, weight in weights.items()}

    def layer(match: re.Match[str]) -> str:
        return f"transformer.resblocks.{match[1]}.{_renamed(match[2], _OPEN_CLIP_LAYER)}"

    rules: list[tuple[str, Callable[[re.Match[str]], str]]] = [
        (_any_of(_OPEN_CLIP), lambda m: _OPEN_CLIP[m[0]]),
        (r"encoder\.layers\.(\d+)\.(.+)", layer),
    ]
    renamed: dict[str, Tensor] = {}
    for name, weight in plain.items():
        stacked = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(.+)", name)
        if name == "text_projection.weight":
            renamed["text_projection"] = weight.T
        elif stacked is None:
            renamed[_by_rule(name, rules)] = weight
        elif stacked[2] == "q":
            three = [plain[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
            joined = f"transformer.resblocks.{stacked[1]}.attn.in_proj_{stacked[3]}"
            renamed[joined] = torch.cat(three)
    return renamed


def _any_of(names: Mapping[str, str]) -> str:
    return "|".join(map(re.escape, names))


def _by_rule(name: str, rules: list[tuple[str, Callable[[re.Match[str]], str]]]) -> str:
    for pattern, rename in rules:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return rename(match)
    raise ValueError(f"The ldm layout has no name for the weight {name}.")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Rename the module that a weight belongs to, if it is among `names`."""
    module, _, last = name.rpartition(".")
    return f"{names.get(module, module)}.{last}"
