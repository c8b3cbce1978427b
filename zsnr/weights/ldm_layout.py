"""The ldm layout: the original releases' names and forms of diffusers' and transformers' weights.

Writing and reading share one table of names for each kind of network. What is written is tested to
be what diffusers' own converters read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Network = Literal["unet", "vae", "clip", "open_clip"]

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection": "text_projection",
}
_INSIDE: dict[Network, dict[str, str]] = {  # of a block
    "unet": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "vae": {
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    },
    "clip": {},
    "open_clip": {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
        **{f"self_attn.{x}_proj": "attn.in_proj" for x in "qkv"},
    },
}


def ldm_names(network: Network, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return the layout's names of a network's weights.

    open_clip stacks query, key and value in one matrix, so that these three have one name.

    Args:
        network: "unet" (UNet2DConditionModel), "vae" (AutoencoderKL), or the layout of a
            CLIPTextModel: "clip" in Stable Diffusion 1 and as SDXL's first, "open_clip" in Stable
            Diffusion 2 and as SDXL's second.
        names: Names of weights.
        config: Config of the network.

    Raises:
        ValueError: The layout has no name for a weight.
    """
    if network == "clip":
        return {name: f"text_model.{name.removeprefix('text_model.')}" for name in names}
    make = {"unet": _unet_modules, "vae": _vae_modules, "open_clip": _open_clip_modules}[network]
    modules, inside = make(config), _INSIDE[network]

    def renamed(name: str) -> str:
        path, _, kind = name.removeprefix("text_model.").rpartition(".")
        block, rest = path, ""
        while block not in modules:
            if not block:
                raise ValueError(f"The ldm layout has no name for the weight {name}.")
            block, _, last = block.rpartition(".")
            rest = f"{last}.{rest}".rstrip(".")
        path = f"{modules[block]}.{inside.get(rest, rest)}".rstrip(".")
        if path in ("positional_embedding", "text_projection"):  # parameters, not modules
            return path
        return f"{path}_{kind}" if path.endswith(".in_proj") else f"{path}.{kind}"

    return {name: renamed(name) for name in names}


def ldm_layers(layers: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """Return the layout's names of a UNet's layers.

    Raises:
        ValueError: The layout has no name for a layer.
    """
    weights = ldm_names("unet", [f"{layer}.weight" for layer in layers], config)
    return {name[: -len(".weight")]: weights[name][: -len(".weight")] for name in weights}


def to_ldm(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return weights in the layout's form; only stacked ones are copied.

    The projection of the pooled text is transposed, and the VAE's attention uses 1x1 convolutions.

    Args:
        weights: A network's weights.
        names: Their names in the layout, see `ldm_names`.
    """
    stacks: dict[str, list[str]] = {}
    for name in weights:
        stacks.setdefault(names[name], []).append(name)
    converted = {}
    for name, stack in stacks.items():
        parts = [weights[each] for each in sorted(stack, key=_third)]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        if name.endswith("text_projection"):
            weight = weight.T
        elif ".mid.attn_1." in name and weight.ndim == 2:
            weight = weight[:, :, None, None]
        converted[name] = weight
    return converted


def from_ldm(name: str, ldm_name: str, weight: Tensor) -> Tensor:
    """Return one of a network's weights from the layout's form, the inverse of `to_ldm`."""
    if ldm_name.endswith("text_projection"):
        return weight.T
    if ".in_proj_" in ldm_name:
        return weight.chunk(3)[_third(name)]
    return weight[:, :, 0, 0] if ".mid.attn_1." in ldm_name and weight.ndim == 4 else weight


def _third(name: str) -> int:
    """Return the place of a weight in a stack of query, key and value."""
    return next((i for i, x in enumerate("qkv") if f".{x}_proj." in name), 0)


def _unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the layout's names of a UNet's blocks and other modules.

    Block b has L resnets on the way down and L + 1 on the way up, each followed by its attention.
    The layout numbers them consecutively: `input_blocks.0` is conv_in, followed by L resnets and a
    downsampler for each block; `output_blocks` are the resnets on the way up, where the last one of
    a block has the upsampler after its attention.
    """
    length = int(config["layers_per_block"]) + 1
    modules = dict(_UNET)
    for i, kind in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        modules[f"mid_block.{kind}"] = f"middle_block.{i}"
    for b, up in enumerate(config["up_block_types"]):
        for i in range(length):
            for slot, kind in enumerate(("resnets", "attentions")):
                modules[f"down_blocks.{b}.{kind}.{i}"] = f"input_blocks.{1 + b * length + i}.{slot}"
                modules[f"up_blocks.{b}.{kind}.{i}"] = f"output_blocks.{b * length + i}.{slot}"
        end = (b + 1) * length
        modules[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{end}.0.op"
        slot = 2 if up.startswith("CrossAttn") else 1
        modules[f"up_blocks.{b}.upsamplers.0"] = f"output_blocks.{end - 1}.{slot}"
    return modules


def _vae_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the layout's names of a VAE's blocks and other modules.

    The decoder's blocks are numbered from the finest resolution on.
    """
    modules = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        modules |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        modules[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        modules[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        modules |= {f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in (0, 1)}
    count = len(config["block_out_channels"])
    for b in range(count):
        for side, way, to in (("encoder", "down", b), ("decoder", "up", count - 1 - b)):
            block, ldm_block = f"{side}.{way}_blocks.{b}", f"{side}.{way}.{to}"
            modules[f"{block}.{way}samplers.0"] = f"{ldm_block}.{way}sample"
            for i in range(config["layers_per_block"] + 1):
                modules[f"{block}.resnets.{i}"] = f"{ldm_block}.block.{i}"
    return modules


def _open_clip_modules(config: Mapping[str, Any]) -> dict[str, str]:
    layers = range(config["num_hidden_layers"] + 1)  # one more than is used may be stored
    return _OPEN_CLIP | {f"encoder.layers.{i}": f"transformer.resblocks.{i}" for i in layers}
