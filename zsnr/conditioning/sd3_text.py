"""The text encoders of Stable Diffusion 3: two of CLIP, and T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from zsnr.conditioning.base import Conditioner
from zsnr.conditioning.tokenizers import (
    PromptTokenizer,
    Tokens,
    tokenizer_digest,
    transformers_tokenizer,
)
from zsnr.conditioning.transformers_text import pretrained_config, pretrained_encoder
from zsnr.denoiser import Conditioning
from zsnr.weights.pretrained import read_config
from zsnr.weights.source import digest, find_weights

_CLIP = ("text_encoder", "text_encoder_2")
_T5 = "text_encoder_3"
_CLIP_LENGTH = 77


class SD3Conditioner(Conditioner):
    """The three text encoders of a Stable Diffusion 3 folder, frozen.

    The context holds the penultimate hidden states of both CLIP encoders, side by side and padded
    with zeros to the width of T5, and after them the tokens of T5, which attend to its padding. The
    pooled embedding holds those of both CLIP encoders.

    Args:
        pretrained: A diffusers folder or hub id with text_encoder, text_encoder_2, their
            tokenizers, and text_encoder_3 and tokenizer_3, which may be missing: its tokens are
            then zeros.
        max_length: Tokens of a prompt that T5 reads.
    """

    parts = ("encoder", "encoder_2", "encoder_3")
    tokenizer: PromptTokenizer

    def __init__(self, pretrained: str, max_length: int = 256) -> None:
        super().__init__()
        self._settings: dict[str, Any] = {"pretrained": pretrained, "max_length": max_length}
        self._t5_length = max_length
        configs = [pretrained_config(pretrained, folder) for folder in _CLIP]
        self.pooled_dim = sum(int(config.projection_dim) for config in configs)
        clip_width = sum(int(config.hidden_size) for config in configs)
        self.has_t5 = read_config(pretrained, _T5) is not None
        if self.has_t5:
            self.context_dim = int(pretrained_config(pretrained, _T5).hidden_size)
        else:
            transformer = read_config(pretrained, "transformer") or {}
            self.context_dim = int(transformer.get("joint_attention_dim", clip_width))
        if self.context_dim < clip_width:
            raise ValueError(
                f"The CLIP text encoders of {pretrained} have a width of {clip_width}, more than "
                f"the {self.context_dim} of its T5: it is no Stable Diffusion 3."
            )
        longest = [min(_CLIP_LENGTH, int(each.max_position_embeddings)) for each in configs]
        names = [("tokenizer", longest[0]), ("tokenizer_2", longest[1])]
        names += [("tokenizer_3", max_length)] * self.has_t5
        tokenizers = [transformers_tokenizer(pretrained, *each)[0] for each in names]
        self.tokenizer = PromptTokenizer(*tokenizers, is_clip=False)
        self.max_length = longest[0] + max_length

    @torch.no_grad()
    def forward(self, prompts: Sequence[str] | Tokens) -> Conditioning:
        tokens = self._tokens(prompts, next(self.encoder.parameters()).device)
        first, second = (
            encoder(ids, output_hidden_states=True)
            for encoder, ids in zip((self.encoder, self.encoder_2), tokens.ids[:2], strict=True)
        )
        clip = torch.cat([each.hidden_states[-2] for each in (first, second)], dim=-1)
        if self.has_t5:
            t5: Tensor = self.encoder_3(tokens.ids[2])[0]
        else:
            t5 = clip.new_zeros(len(clip), self._t5_length, self.context_dim)
        clip = pad(clip, (0, self.context_dim - clip.shape[-1]))
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return Conditioning(torch.cat([clip, t5], dim=-2), pooled=pooled)

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def _decisive(self) -> dict[str, Any]:
        source = str(self._settings["pretrained"])
        encoders = [*_CLIP, *[_T5] * self.has_t5]
        weights = [find_weights(source, folder, "model") for folder in encoders]
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
        return {
            "configs": [read_config(source, folder) for folder in encoders],
            "tokenizers": [tokenizer_digest(source, folder) for folder in tokenizers],
            "max_length": self._t5_length,
            "context_dim": self.context_dim,
            "weights": digest([path for paths in weights for path in paths])
            if all(weights)
            else None,
        }

    def _read(self) -> dict[str, nn.Module | None]:
        source = str(self._settings["pretrained"])
        clip = [pretrained_encoder(source, folder, projected=True) for folder in _CLIP]
        t5 = pretrained_encoder(source, _T5) if self.has_t5 else None
        return {"encoder": clip[0], "encoder_2": clip[1], "encoder_3": t5}
