"""The UNet, diffusers' UNet2DConditionModel, new or pretrained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zsnr.denoiser import Conditioning
from zsnr.untrusted import shown
from zsnr.weights.pretrained import check_depth, load_whole

_SIZES = 6  # numbers in a row of Conditioning.sizes
_WIDEST = 65536
_COUNTS = (
    *("block_out_channels", "layers_per_block", "attention_head_dim", "transformer_layers"),
    "norm_groups",
)


@dataclass(frozen=True)
class UNetConfig:
    """Size of a new UNet. The input's channels and the context's width come from the codec and
    the conditioner.

    Args:
        block_out_channels: Channels of each resolution, finest first.
        layers_per_block: Residual blocks at each resolution.
        attention: Whether each resolution has self- and cross-attention.
        attention_head_dim: Channels of each attention head.
        transformer_layers: Transformer blocks in each attention.
        norm_groups: Groups of the group norms; must divide every number of channels.
        pooled_context: Add a learned pooling of the context to the time embedding.
        scale_shift: Let the time embedding scale as well as shift each residual block.
    """

    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)
    attention_head_dim: int = 64
    transformer_layers: int = 1
    norm_groups: int = 32
    pooled_context: bool = False
    scale_shift: bool = False

    def __post_init__(self) -> None:
        for name in ("block_out_channels", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in _COUNTS:
            value = getattr(self, name)
            for side in value if isinstance(value, tuple) else (value,):
                if not 1 <= side <= _WIDEST:
                    raise ValueError(f"{name}={shown(value)}: wanted 1 to {_WIDEST}.")
        if len(self.attention) != len(self.block_out_channels):
            raise ValueError(
                f"attention has {len(self.attention)} entries, block_out_channels "
                f"{len(self.block_out_channels)}: wanted one for each resolution."
            )
        for channels in self.block_out_channels:
            if channels % self.norm_groups:
                raise ValueError(
                    f"block_out_channels={self.block_out_channels}: {channels} is not a multiple "
                    f"of norm_groups={self.norm_groups}."
                )
            if channels % self.attention_head_dim:
                raise ValueError(
                    f"block_out_channels={self.block_out_channels}: {channels} is not a multiple "
                    f"of attention_head_dim={self.attention_head_dim}."
                )


class UNet(nn.Module):
    """A UNet2DConditionModel as a network (x_t, t, conditioning) -> raw output.

    Args:
        config: Size of a new UNet, with `channels` and `context_dim`; or a full config of
            diffusers as a dict.
        channels: Channels of the latents.
        context_dim: Width of the context.
        pretrained: A folder, a single file (.safetensors) in the ldm layout, or a hub id with the
            initial weights; `config` must then be None.
        subfolder: Folder inside `pretrained`.
        pooled_dim: Width of the pooled embedding; 0 = there is none. None = not known yet.

    Raises:
        ValueError: Neither or both of `config` and `pretrained` are set, or the pretrained UNet has
            other channels or requires other conditioning.
    """

    def __init__(
        self,
        config: UNetConfig | dict[str, Any] | None = None,
        channels: int | None = None,
        context_dim: int | None = None,
        pretrained: str | None = None,
        subfolder: str | None = "unet",
        pooled_dim: int | None = None,
    ) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        if (config is None) == (pretrained is None):
            raise ValueError("A UNet needs either `config` or `pretrained`.")
        if pretrained is not None:
            self.unet = load_whole(
                UNet2DConditionModel, pretrained, subfolder, label="a UNet2DConditionModel"
            )
        else:
            settings = config if isinstance(config, dict) else None
            if settings is None:
                assert isinstance(config, UNetConfig)
                if channels is None or context_dim is None:
                    raise ValueError("A new UNet needs `channels` and `context_dim`.")
                settings = _diffusers_config(config, channels, context_dim)
            check_depth(settings)
            self.unet = UNet2DConditionModel.from_config(settings)
        self._check(channels, context_dim, pooled_dim)

    @property
    def takes_sizes(self) -> bool:
        """Whether its inputs include a pooled embedding and sizes, as in SDXL."""
        return bool(self.unet.config["addition_embed_type"] == "text_time")

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor:
        if conditioning is None:
            raise ValueError("This UNet needs conditioning: pass Conditioning, such as null().")
        added = None
        if self.takes_sizes:
            if conditioning.pooled is None or conditioning.sizes is None:
                lacking = "pooled" if conditioning.pooled is None else "sizes"
                raise ValueError(
                    "This UNet needs a pooled embedding and sizes, as in SDXL, but got no "
                    f"{lacking}: wanted Conditioning(context, pooled=(B, P), sizes=(B, 6))."
                )
            added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
        output: Tensor = self.unet(
            x_t,
            t,
            encoder_hidden_states=conditioning.context,
            encoder_attention_mask=conditioning.mask,
            added_cond_kwargs=added,
        ).sample
        return output

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments of this UNet, without the source of its weights."""
        keep = {k: v for k, v in self.unet.config.items() if not k.startswith("_")}
        return {"config": {k: list(v) if isinstance(v, tuple) else v for k, v in keep.items()}}

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order of the forward pass, to shard or compile separately."""
        middle = [] if self.unet.mid_block is None else [self.unet.mid_block]
        return [*self.unet.down_blocks, *middle, *self.unet.up_blocks]

    def compile_blocks(self, backend: str, *, several_shapes: bool = False) -> None:
        """Compile each block by itself, in place; hooks stay outside.

        Args:
            backend: Of torch.compile, such as "inductor".
            several_shapes: Whether inputs have several heights and widths: they are then compiled
                for any size. Otherwise each new shape would be compiled anew, up to a limit.
        """
        for block in self.blocks():
            block.forward = torch.compile(
                block.forward, backend=backend, dynamic=True if several_shapes else None
            )

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory: recompute activations in the backward pass."""
        self.unet.enable_gradient_checkpointing()

    def _check(self, channels: int | None, context_dim: int | None, pooled_dim: int | None) -> None:
        config = self.unet.config
        if config["addition_embed_type"] not in (None, "text", "text_time"):
            raise ValueError(
                f"The UNet has addition_embed_type={config['addition_embed_type']!r}, which this "
                "package does not support: wanted a UNet of Stable Diffusion 1, 2 or XL."
            )
        if config["in_channels"] in (8, 9) and config["out_channels"] == 4:
            raise ValueError(
                f"The UNet has {config['in_channels']} input channels, as in models for inpainting "
                "and editing: wanted a text-to-image model."
            )
        for name, expected in (("in_channels", channels), ("out_channels", channels)):
            if expected is not None and config[name] != expected:
                raise ValueError(
                    f"The UNet has {name}={config[name]} but the codec's latents have {expected} "
                    "channels: choose a matching codec and UNet."
                )
        if context_dim is not None and config["cross_attention_dim"] != context_dim:
            raise ValueError(
                f"The UNet's cross-attention has width {config['cross_attention_dim']} but the "
                f"conditioner has {context_dim}: choose a matching UNet and conditioner."
            )
        if pooled_dim is not None and self.takes_sizes:
            width = config["addition_time_embed_dim"] or 0
            total = config["projection_class_embeddings_input_dim"]
            if total != pooled_dim + _SIZES * width:
                got = f"one of width {pooled_dim}" if pooled_dim else "none"
                raise ValueError(
                    f"The UNet needs a pooled embedding and {_SIZES} sizes, {total} = "
                    f"{total - _SIZES * width} + {_SIZES} x {width}, but the conditioner returns "
                    f"{got}: use SDXL's UNet with its SDXLConditioner."
                )


def _diffusers_config(config: UNetConfig, channels: int, context_dim: int) -> dict[str, Any]:
    sizes = asdict(config)
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)]
    pooled = {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    return {
        **(pooled if config.pooled_context else {}),
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(sizes["block_out_channels"]),
        "layers_per_block": sizes["layers_per_block"],
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": context_dim,
        # diffusers counts heads under the name attention_head_dim
        "attention_head_dim": [
            c // sizes["attention_head_dim"] for c in sizes["block_out_channels"]
        ],
        "transformer_layers_per_block": sizes["transformer_layers"],
        "norm_num_groups": sizes["norm_groups"],
        "use_linear_projection": True,
    }
