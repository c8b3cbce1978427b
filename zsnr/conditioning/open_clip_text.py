"""Text towers of open_clip, as Stable Diffusion 2 uses them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zsnr.conditioning.base import Conditioner
from zsnr.conditioning.prompt_weights import weigh
from zsnr.conditioning.tokenizers import (
    CLIPTokenizer,
    PromptTokenizer,
    Tokenizer,
    Tokens,
    join_chunks,
    split_chunks,
)
from zsnr.denoiser import Conditioning
from zsnr.weights.pretrained import is_weightless
from zsnr.weights.source import digest, find_file


class OpenClipConditioner(Conditioner):
    """The text tower of an open_clip model, frozen or trained jointly.

    Args:
        model: Architecture name, such as "ViT-H-14".
        pretrained: Path of a safetensors or weights-only checkpoint, or one of open_clip's tags.
            None = untrained weights, to be trained jointly.
        layer: "penultimate" (Stable Diffusion 2) or "last", both with the final layer norm.
        trainable: Train it jointly with the UNet; otherwise it is frozen.
        max_tokens: Number of tokens of a prompt that are read, in chunks of 75: 75, 150 or 225,
            which kohya's sd-scripts calls max_token_length. Every prompt takes as many chunks, each
            with its own start and end token, and the context holds them one after the other. None =
            one chunk.
        prompt_weights: Read weights such as (word:1.2) in prompts, as A1111 does: the context of a
            token is multiplied by its weight, and the mean of each chunk is restored.
    """

    tokenizer: PromptTokenizer
    parts = ("token_embedding", "transformer", "ln_final", "positional_embedding", "attn_mask")

    def __init__(
        self,
        model: str = "ViT-H-14",
        pretrained: str | None = None,
        layer: Literal["penultimate", "last"] = "penultimate",
        trainable: bool = False,
        max_tokens: int | None = None,
        prompt_weights: bool = False,
    ) -> None:
        super().__init__(trainable, pretrained is not None)
        import open_clip

        if model not in open_clip.list_models():
            raise ValueError(
                f"open_clip has no model {model!r}. open_clip.list_models() lists them; "
                "'ViT-H-14' is Stable Diffusion 2's."
            )
        text = open_clip.CLIPTextCfg(**open_clip.get_model_config(model)["text_cfg"])
        if text.hf_model_name:
            raise ValueError(
                f"{model!r} has no text tower of CLIP's kind: use a TransformersConditioner with "
                f"{text.hf_model_name!r}."
            )
        _check_tag(model, pretrained)
        self._settings = {
            "model": model,
            "pretrained": pretrained,
            "layer": layer,
            "trainable": trainable,
        }
        tokenizer = open_clip.get_tokenizer(model)
        self.max_length = int(tokenizer.context_length)
        self.tokenizer = PromptTokenizer(
            _tokenizer(tokenizer), max_tokens=max_tokens, prompt_weights=prompt_weights
        )
        self._settings |= self.tokenizer.settings()
        self.layer = layer
        self.context_dim = int(text.width)
        if not self.reloadable:
            self.load()

    def forward(self, prompts: Sequence[str] | Tokens) -> Conditioning:
        tokens = self._tokens(prompts, self.positional_embedding.device)
        [ids], n = tokens.ids, self.tokenizer.num_chunks
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            ids = split_chunks(ids, n)
            x: Tensor = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
            blocks = self.transformer.resblocks
            if not getattr(self.transformer, "batch_first", True):
                x = x.transpose(0, 1)
            for block in blocks[: len(blocks) - (self.layer == "penultimate")]:
                x = block(x, attn_mask=self.attn_mask)
            if not getattr(self.transformer, "batch_first", True):
                x = x.transpose(0, 1)
            x = self.ln_final(x)
            if tokens.weights:
                x = weigh(x, split_chunks(tokens.weights[0], n))
            return Conditioning(join_chunks(x, n))

    def _skip_layers(self, clip_skip: int) -> None:
        layers: dict[int, Literal["penultimate", "last"]] = {1: "last", 2: "penultimate"}
        if clip_skip not in layers:
            raise ValueError(f"clip_skip={clip_skip}: wanted 1 or 2 for a text tower of open_clip.")
        self.layer = self._settings["layer"] = layers[clip_skip]

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def _decisive(self) -> dict[str, Any]:
        model, pretrained = self._settings["model"], self._settings["pretrained"]
        file = _weight_file(str(model), str(pretrained))
        return {
            "model": model,
            "layer": self.layer,
            **self.tokenizer.decisive(),
            "weights": None if file is None else digest([file]),
        }

    def _read(self) -> dict[str, nn.Module | Tensor | None]:
        import open_clip
        from safetensors import SafetensorError

        model, pretrained = str(self._settings["model"]), self._settings["pretrained"]
        options: dict[str, Any] = {"pretrained": pretrained}
        if is_weightless():
            options = {"pretrained": None, "device": torch.get_default_device()}
        try:
            clip = open_clip.create_model(model, weights_only=True, **options)
        except (OSError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(f"Cannot load {model} from {pretrained!r}: {reason}") from error
        text = getattr(clip, "text", clip)  # CLIP has a flat tower, CustomTextCLIP has .text
        return {name: getattr(text, name, None) for name in self.parts}


class _Uncounted:
    """A tokenizer of open_clip that is not CLIP's, as a Tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids: Tensor = self._tokenizer(list(prompts))
        return ids, torch.ones_like(ids, dtype=torch.bool)


def _tokenizer(tokenizer: Any) -> Tokenizer:
    import open_clip

    is_clip = isinstance(tokenizer, open_clip.SimpleTokenizer) and tokenizer.reduction_fn is None
    return CLIPTokenizer(tokenizer) if is_clip else _Uncounted(tokenizer)


def _check_tag(model: str, pretrained: str | None) -> None:
    """Refuse a value that is neither a tag nor a path. A path need not exist yet."""
    import open_clip

    if pretrained is None or open_clip.is_pretrained_cfg(model, pretrained):
        return
    path = Path(pretrained)
    if not (path.suffix or len(path.parts) > 1 or path.exists()):
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ValueError(
            f"pretrained={pretrained!r}: wanted a path, or a tag of {model!r}. "
            f"Known: {', '.join(tags) or 'none'}."
        )


def _weight_file(model: str, pretrained: str) -> Path | None:
    """Find a checkpoint in open_clip's local caches, without network access."""
    import open_clip
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if tag.get("hf_hub"):
        repository, _, name = tag["hf_hub"].rpartition("/")
        name = name or HF_WEIGHTS_NAME
        safe = str(Path(name).with_suffix(".safetensors"))
        names = (HF_SAFE_WEIGHTS_NAME if name == HF_WEIGHTS_NAME else safe, name)
        files = (find_file(repository, None, name) for name in names)
        return next((path for path in files if path is not None), None)
    path = Path(pretrained)
    if tag:
        path = Path("~/.cache/clip", Path(tag["url"]).name).expanduser()
    return path if path.is_file() else None
