"""Text towers of open_clip, as Stable Diffusion 2 uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from zsnr.conditioning.base import Conditioner
from zsnr.denoiser import Conditioning


class OpenClipConditioner(Conditioner):
    """The text tower of an open_clip model, frozen or trained along.

    Args:
        model: Architecture name, such as "ViT-H-14".
        pretrained: Path of a safetensors or weights-only checkpoint, or one of open_clip's tags.
            None = untrained weights, to train along.
        layer: "penultimate" (Stable Diffusion 2) or "last"; the final layer norm is put on both.
        trainable: Train it along; else frozen.
    """

    def __init__(
        self,
        model: str = "ViT-H-14",
        pretrained: str | None = None,
        layer: Literal["penultimate", "last"] = "penultimate",
        trainable: bool = False,
    ) -> None:
        super().__init__()
        import open_clip

        if model not in open_clip.list_models():
            raise ValueError(
                f"open_clip has no model {model!r}. open_clip.list_models() lists them; "
                "'ViT-H-14' is Stable Diffusion 2's."
            )
        self._settings = {
            "model": model,
            "pretrained": pretrained,
            "layer": layer,
            "trainable": trainable,
        }
        try:
            whole = open_clip.create_model(model, pretrained=pretrained, weights_only=True)
        except (OSError, RuntimeError, ValueError) as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise ValueError(f"Cannot load {model} from {pretrained!r}: {reason}") from error
        self._tokenize = open_clip.get_tokenizer(model)
        text = getattr(whole, "text", whole)  # CLIP keeps its tower flat, CustomTextCLIP in .text
        for name in ("token_embedding", "transformer", "ln_final", "positional_embedding"):
            if not hasattr(text, name):
                raise ValueError(f"{model!r} has no text tower of CLIP's kind (no {name}).")
        self.token_embedding: Any = text.token_embedding
        self.transformer: Any = text.transformer
        self.ln_final: Any = text.ln_final
        self.positional_embedding = text.positional_embedding
        mask = getattr(text, "attn_mask", None)
        self.register_buffer("attn_mask", mask, persistent=False)
        self.layer = layer
        self.context_dim = int(self.ln_final.weight.shape[0])
        self.trainable, self.pretrained = trainable, pretrained is not None
        if not trainable:
            self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> OpenClipConditioner:
        """Switch to training mode, unless frozen."""
        super().train(mode and self.trainable)
        return self

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        ids = self._tokenize(list(prompts)).to(self.positional_embedding.device)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            x: Tensor = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
            blocks = self.transformer.resblocks
            if not getattr(self.transformer, "batch_first", True):
                x = x.transpose(0, 1)
            for block in blocks[: len(blocks) - (self.layer == "penultimate")]:
                x = block(x, attn_mask=self.attn_mask)
            if not getattr(self.transformer, "batch_first", True):
                x = x.transpose(0, 1)
            return Conditioning(self.ln_final(x))

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)
