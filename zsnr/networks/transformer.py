"""Transformers of diffusers, new or pretrained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zsnr.denoiser import Conditioning
from zsnr.networks.base import DiffusionNetwork, without_variance
from zsnr.untrusted import read_json, shown
from zsnr.weights.pretrained import check_depth, load_whole
from zsnr.weights.source import find_file, local_path


@dataclass(frozen=True)
class _Kind:
    """How a class of diffusers is called.

    Args:
        call: (module, x_t, t, conditioning) -> (output,).
        context: Setting that is the width of the context.
        pooled: Setting that is the width of the pooled embedding. None = there is none.
    """

    call: Callable[[Any, Tensor, Tensor, Conditioning], tuple[Tensor]]
    context: str
    pooled: str | None = None


def _call_sd3(module: Any, x_t: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor]:
    output: tuple[Tensor] = module(
        x_t,
        encoder_hidden_states=cond.context,
        pooled_projections=cond.pooled,
        timestep=t,
        return_dict=False,
    )
    return output


def _call_pixart(module: Any, x_t: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor]:
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if module.use_additional_conditions:
        assert cond.sizes is not None
        target = cond.sizes[:, 4:].to(x_t.dtype)
        added = {"resolution": target, "aspect_ratio": target[:, :1] / target[:, 1:]}
    output: tuple[Tensor] = module(
        x_t,
        encoder_hidden_states=cond.context,
        encoder_attention_mask=cond.mask,
        timestep=t,
        added_cond_kwargs=added,
        return_dict=False,
    )
    return output


_KINDS = {
    "PixArtTransformer2DModel": _Kind(_call_pixart, "caption_channels"),
    "SD3Transformer2DModel": _Kind(_call_sd3, "joint_attention_dim", "pooled_projection_dim"),
}


class Transformer(DiffusionNetwork):
    """A transformer of diffusers as a network (x_t, t, conditioning) -> raw output.

    Args:
        name: Its class: "SD3Transformer2DModel" (Stable Diffusion 3, made for rectified flow) or
            "PixArtTransformer2DModel" (made for variance-preserving schedules). None = that of
            `pretrained`.
        config: Settings of a new one, by the names of that class, such as in_channels and
            num_layers.
        pretrained: A folder or hub id with the initial weights; `config` must then be None.
        subfolder: Folder inside `pretrained`.

    Raises:
        ValueError: Neither or both of `config` and `pretrained` are set, the class is not one of
            these, or it has no such setting.
    """

    def __init__(
        self,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        subfolder: str | None = "transformer",
    ) -> None:
        super().__init__()
        import diffusers

        if (config is None) == (pretrained is None):
            raise ValueError("A Transformer needs either `config` or `pretrained`.")
        if pretrained is not None:
            self.name = _check_name(stored_class(pretrained, subfolder), pretrained)
            if name not in (None, self.name):
                raise ValueError(f"{pretrained} holds a {self.name}: wanted a {name}.")
            cls = getattr(diffusers, self.name)
            self.transformer = load_whole(cls, pretrained, subfolder, label=f"a {self.name}")
        else:
            assert config is not None
            self.name = _check_name(name, "name")
            check_depth(config)
            cls = getattr(diffusers, self.name)
            _check_settings(cls, config)
            self.transformer = cls.from_config(config)

    @property
    def takes_sizes(self) -> bool:
        """Whether its inputs include the image's size, as in PixArt's large models."""
        return bool(getattr(self.transformer, "use_additional_conditions", False))

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor:
        kind = _KINDS[self.name]
        wanted = {"context": True, "pooled": kind.pooled is not None, "sizes": self.takes_sizes}
        for part, is_wanted in wanted.items():
            if is_wanted and getattr(conditioning, part, None) is None:
                raise ValueError(
                    f"A {self.name} needs Conditioning with {part}, and got none: use the text "
                    "encoders that it was made for."
                )
        assert conditioning is not None
        for part in ("labels", "concat"):
            if getattr(conditioning, part) is not None:
                raise ValueError(f"A {self.name} takes no {part}, and the conditioning has some.")
        patch = self.transformer.config["patch_size"]
        if x_t.shape[-2] % patch or x_t.shape[-1] % patch:
            raise ValueError(
                f"x_t is {tuple(x_t.shape)}: wanted a height and a width that are multiples of "
                f"{patch}, the patch size of the {self.name}."
            )
        [output] = kind.call(self.transformer, x_t, t, conditioning)
        return without_variance(output, x_t.shape[1])

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments of this network, without the source of its weights."""
        config = {k: v for k, v in self.transformer.config.items() if not k.startswith("_")}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        return {"name": self.name, "config": plain}

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order of the forward pass, to shard or compile separately."""
        return list(self.transformer.transformer_blocks)

    def enable_gradient_checkpointing(self) -> None:
        """Trade time for memory: recompute activations in the backward pass."""
        self.transformer.enable_gradient_checkpointing()

    def check_fits(self, channels: int, context_dim: int, pooled_dim: int, num_labels: int) -> None:
        config, kind = self.transformer.config, _KINDS[self.name]
        if config["in_channels"] != channels:
            raise ValueError(
                f"The {self.name} has in_channels={config['in_channels']} but the codec's latents "
                f"have {channels} channels: choose a matching codec and network."
            )
        widths = {kind.context: context_dim, **({kind.pooled: pooled_dim} if kind.pooled else {})}
        for name, width in widths.items():
            if config[name] != width:
                raise ValueError(
                    f"The {self.name} has {name}={config[name]} but the conditioner's width is "
                    f"{width}: choose a matching network and conditioner."
                )


def stored_class(pretrained: str, subfolder: str | None) -> str | None:
    """Return the class that the config.json of a network names.

    Raises:
        ValueError: There is none.
    """
    local_path(pretrained, subfolder)  # a hub id that is not in the cache is downloaded
    path = find_file(pretrained, subfolder, "config.json")
    if path is None:
        raise ValueError(
            f"{pretrained} holds no config.json{f' in {subfolder}' if subfolder else ''}: wanted a "
            "folder with a transformer of diffusers."
        )
    name = read_json(path).get("_class_name")
    return name if isinstance(name, str) else None


def _check_name(name: str | None, where: str) -> str:
    if name not in _KINDS:
        raise ValueError(
            f"{where}: {shown(name)} is not a transformer that this package knows. Known: "
            f"{', '.join(_KINDS)}. Wrap another one in an nn.Module of your own with "
            "forward(x_t, t, conditioning)."
        )
    return name


def _check_settings(cls: Any, config: Mapping[str, Any]) -> None:
    """Refuse settings that the class does not have, which diffusers would ignore."""
    known = inspect.signature(cls.__init__).parameters
    for key in config:
        if key not in known and not key.startswith("_"):
            names = ", ".join(name for name in known if name != "self")
            raise ValueError(f"A {cls.__name__} has no {shown(key)}. Known: {names}.")
