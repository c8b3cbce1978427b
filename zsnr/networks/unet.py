"""The UNet, diffusers' UNet2DConditionModel, new or pretrained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zsnr.denoiser import Conditioning
from zsnr.networks.base import DiffusionNetwork, without_variance
from zsnr.untrusted import shown
from zsnr.weights.pretrained import check_depth, load_whole

_SIZES = 6  # numbers in a row of Conditioning.sizes
_WIDEST = 65536
_UNSUPPORTED = ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type")
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


class UNet(DiffusionNetwork):
    """A UNet2DConditionModel as a network (x_t, t, conditioning) -> raw output.

    A learned variance, the second half of twice as many output channels, is left out.

    Args:
        config: Size of a new UNet, with `channels` and `context_dim`; or a full config of
            diffusers as a dict.
        channels: Channels of the latents.
        context_dim: Width of the context.
        pretrained: A folder, a single file (.safetensors) in the ldm layout, or a hub id with the
            initial weights; `config` must then be None.
        subfolder: Folder inside `pretrained`.
        pooled_dim: Width of the pooled embedding; 0 = there is none. None = not known yet.
        num_labels: Number of class labels, with the null class; 0 = there are none. None = not
            known yet.
        concat_channels: Input channels beyond those of the latents, for Conditioning.concat: 5 for
            models for inpainting, 4 for those that edit or measure an image.

    Raises:
        ValueError: Neither or both of `config` and `pretrained` are set, the UNet has an input that
            this package does not provide, or the pretrained UNet has other channels or requires
            other conditioning.
    """

    def __init__(
        self,
        config: UNetConfig | dict[str, Any] | None = None,
        channels: int | None = None,
        context_dim: int | None = None,
        pretrained: str | None = None,
        subfolder: str | None = "unet",
        pooled_dim: int | None = None,
        num_labels: int | None = None,
        concat_channels: int = 0,
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
                settings = _diffusers_config(config, channels, context_dim, num_labels)
                settings["in_channels"] += concat_channels
            check_depth(settings)
            _check_inputs(settings)
            self.unet = UNet2DConditionModel.from_config(settings)
        self.concat_channels = concat_channels
        _check_inputs(self.unet.config)
        self._check_channels()
        self.check_fits(channels, context_dim, pooled_dim, num_labels)

    @property
    def takes_sizes(self) -> bool:
        """Whether its inputs include a pooled embedding and sizes, as in SDXL."""
        return bool(self.unet.config["addition_embed_type"] == "text_time")

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor:
        if conditioning is None:
            raise ValueError("This UNet needs conditioning: pass Conditioning, such as null().")
        self._check_conditioning(conditioning)
        added, concat = None, conditioning.concat
        if self.takes_sizes:
            added = {"text_embeds": conditioning.pooled, "time_ids": conditioning.sizes}
        output: Tensor = self.unet(
            x_t if concat is None else torch.cat([x_t, concat.to(x_t)], dim=1),
            t,
            encoder_hidden_states=conditioning.context,
            class_labels=conditioning.labels,
            encoder_attention_mask=conditioning.mask,
            added_cond_kwargs=added,
        ).sample
        return without_variance(output, x_t.shape[1])

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments of this UNet, without the source of its weights."""
        keep = {k: v for k, v in self.unet.config.items() if not k.startswith("_")}
        config = {k: list(v) if isinstance(v, tuple) else v for k, v in keep.items()}
        extra = {"concat_channels": self.concat_channels} if self.concat_channels else {}
        return {"config": config, **extra}

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order of the forward pass, to shard or compile separately."""
        middle = [] if self.unet.mid_block is None else [self.unet.mid_block]
        return [*self.unet.down_blocks, *middle, *self.unet.up_blocks]

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory: recompute activations in the backward pass."""
        self.unet.enable_gradient_checkpointing()

    def check_fits(
        self,
        channels: int | None,
        context_dim: int | None,
        pooled_dim: int | None,
        num_labels: int | None = None,
    ) -> None:
        """Refuse a codec or a conditioner that the UNet was not made for; None = not known yet.

        Raises:
            ValueError: One does not fit.
        """
        config = self.unet.config
        inputs = config["in_channels"] - self.concat_channels
        outputs = config["out_channels"]
        if channels is not None and outputs == 2 * channels:
            outputs = channels  # the other half is a variance
        for name, number in (("in_channels", inputs), ("out_channels", outputs)):
            if channels is not None and number != channels:
                raise ValueError(
                    f"The UNet has {name}={config[name]} but the codec's latents have {channels} "
                    "channels: choose a matching codec and UNet."
                )
        if num_labels is not None and (config["num_class_embeds"] or 0) != num_labels:
            raise ValueError(
                f"The UNet has num_class_embeds={config['num_class_embeds']} but the conditioner "
                f"has {num_labels or 'no'} labels, with its null class: choose a matching UNet and "
                "conditioner."
            )
        attends = context_dim is not None and self._attends
        if attends and config["cross_attention_dim"] != context_dim:
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

    def _check_channels(self) -> None:
        """Refuse the UNet of an image-conditional model whose further channels nobody gives.

        Raises:
            ValueError: It is one.
        """
        config = self.unet.config
        more = config["in_channels"] - config["out_channels"]
        if not self.concat_channels and config["in_channels"] in (8, 9) and more in (4, 5):
            raise ValueError(
                f"The UNet has {config['in_channels']} input channels, as in models for inpainting "
                "and editing: wanted a text-to-image model, or concat_channels="
                f"{more} and Conditioning with as many channels in concat."
            )

    def _check_conditioning(self, conditioning: Conditioning) -> None:
        """Refuse conditioning that lacks an input of the UNet, or has channels that it lacks.

        Raises:
            ValueError: It does.
        """
        if self.takes_sizes and (conditioning.pooled is None or conditioning.sizes is None):
            lacking = "pooled" if conditioning.pooled is None else "sizes"
            raise ValueError(
                "This UNet needs a pooled embedding and sizes, as in SDXL, but got no "
                f"{lacking}: wanted Conditioning(context, pooled=(B, P), sizes=(B, 6))."
            )
        if (conditioning.labels is None) != (self.unet.config["num_class_embeds"] is None):
            has, wants = ("none", "needs") if conditioning.labels is None else ("some", "has no")
            raise ValueError(
                f"This UNet {wants} class labels (num_class_embeds), and the conditioning has "
                f"{has}."
            )
        got = 0 if conditioning.concat is None else conditioning.concat.shape[1]
        if got != self.concat_channels:
            raise ValueError(
                f"The conditioning has {got} channels in concat: wanted {self.concat_channels}, "
                "the UNet's concat_channels."
            )
        if conditioning.context is None and self._attends:
            raise ValueError("This UNet attends to a context, and the conditioning has none.")

    @property
    def _attends(self) -> bool:
        config = self.unet.config
        types = (*config["down_block_types"], config["mid_block_type"], *config["up_block_types"])
        return any("CrossAttn" in str(name) for name in types)


def _check_inputs(config: Mapping[str, Any]) -> None:
    """Refuse a UNet with an input that conditioning does not have.

    Raises:
        ValueError: It has one.
    """
    if config.get("addition_embed_type") not in (None, "text", "text_time"):
        raise ValueError(
            f"The UNet has addition_embed_type={shown(config['addition_embed_type'])}, which this "
            "package does not support: wanted a UNet of Stable Diffusion 1, 2 or XL."
        )
    for name in _UNSUPPORTED:
        if config.get(name) is not None:
            raise ValueError(
                f"The UNet has {name}={shown(config[name])}, an input that this package does not "
                "provide: wanted a UNet whose config leaves it out."
            )


def _diffusers_config(
    config: UNetConfig, channels: int, context_dim: int, num_labels: int | None
) -> dict[str, Any]:
    sizes = asdict(config)
    kind = "CrossAttn" if context_dim else "Attn"
    down = [f"{kind}DownBlock2D" if a else "DownBlock2D" for a in config.attention]
    up = [f"{kind}UpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)]
    pooled = {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    # diffusers counts heads under the name attention_head_dim, but for blocks without a context
    heads = [c // sizes["attention_head_dim"] for c in sizes["block_out_channels"]]
    return {
        **(pooled if config.pooled_context else {}),
        **({"num_class_embeds": num_labels} if num_labels else {}),
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": list(sizes["block_out_channels"]),
        "layers_per_block": sizes["layers_per_block"],
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if context_dim else "UNetMidBlock2D",
        "cross_attention_dim": context_dim,
        "attention_head_dim": heads if context_dim else [sizes["attention_head_dim"]] * len(heads),
        "transformer_layers_per_block": sizes["transformer_layers"],
        "norm_num_groups": sizes["norm_groups"],
        "use_linear_projection": True,
    }
