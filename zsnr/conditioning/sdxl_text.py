"""The two text encoders of Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zsnr.conditioning.base import Conditioner
from zsnr.conditioning.prompt_weights import weigh
from zsnr.conditioning.tokenizers import (
    PromptTokenizer,
    Tokens,
    join_chunks,
    split_chunks,
    tokenizer_digest,
    transformers_tokenizer,
)
from zsnr.conditioning.transformers_text import pretrained_config, pretrained_encoder
from zsnr.denoiser import Conditioning
from zsnr.weights.pretrained import load_index, read_config
from zsnr.weights.source import digest, find_weights

_ENCODERS = ("text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")


class SDXLConditioner(Conditioner):
    """Both CLIP text encoders of an SDXL folder, frozen.

    The context is the concatenation of both penultimate hidden states, without a final norm; the
    pooled embedding is the projected one of the second encoder.

    Args:
        pretrained: A diffusers folder or hub id with text_encoder, text_encoder_2, tokenizer and
            tokenizer_2.
        max_length: L, tokens of a prompt, with start and end; of a chunk where there are several.
            Longer prompts are truncated. None = the tokenizers' length.
        zero_null: Represent the empty prompt by zeros, context and pooled, as in the training of
            SDXL base; otherwise encode it like any other prompt. This applies to dropped captions,
            to the unconditional prediction of guidance, and to the prompt "". None =
            force_zeros_for_empty_prompt of model_index.json.
        max_tokens: Number of tokens of a prompt that are read, in chunks of max_length tokens: 75,
            150 or 225, which kohya's sd-scripts calls max_token_length. Every prompt takes as many
            chunks, each with its own start and end token, and the context holds them one after the
            other; the pooled embedding is that of the first. None = one chunk.
        prompt_weights: Read weights such as (word:1.2) in prompts, as A1111 does: the context of a
            token is multiplied by its weight, and the mean of each chunk is restored.

    Raises:
        ValueError: Parts are missing or incompatible.
    """

    tokenizer: PromptTokenizer
    parts = ("encoder", "encoder_2")

    def __init__(
        self,
        pretrained: str,
        max_length: int | None = None,
        zero_null: bool | None = None,
        max_tokens: int | None = None,
        prompt_weights: bool = False,
    ) -> None:
        super().__init__()
        if zero_null is None:
            zero_null = bool(load_index(pretrained).get("force_zeros_for_empty_prompt", True))
        self._zero_null = zero_null
        self._settings: dict[str, Any] = {
            "pretrained": pretrained,
            "max_length": max_length,
            "zero_null": zero_null,  # a checkpoint stores the folder's setting
        }
        first, second = (_clip_config(pretrained, folder) for folder in _ENCODERS)
        self.context_dim = int(first.hidden_size + second.hidden_size)
        self.pooled_dim = int(second.projection_dim)
        loaded = [transformers_tokenizer(pretrained, name, max_length) for name in _TOKENIZERS]
        lengths = [length for _, _, length in loaded]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"The tokenizers of {pretrained} produce {lengths[0]} and {lengths[1]} tokens: set "
                "max_length, such as 77."
            )
        longest = min(first.max_position_embeddings, second.max_position_embeddings)
        if not 2 <= lengths[0] <= longest:
            raise ValueError(
                f"max_length={lengths[0]}: the text encoders of {pretrained} support 2 to "
                f"{longest} tokens. Longer prompts are read in chunks: set max_tokens."
            )
        self.max_length = self._max_length = lengths[0]
        self.tokenizer = PromptTokenizer(
            *(tokenize for tokenize, _, _ in loaded),
            max_tokens=max_tokens,
            prompt_weights=prompt_weights,
        )
        self._settings |= self.tokenizer.settings()

    def forward(self, prompts: Sequence[str] | Tokens) -> Conditioning:
        tokens = self._tokens(prompts, next(self.encoder.parameters()).device)
        n = self.tokenizer.num_chunks
        encoders = zip((self.encoder, self.encoder_2), tokens.ids, strict=True)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            first, second = (
                encoder(split_chunks(ids, n), output_hidden_states=True)
                for encoder, ids in encoders
            )
        contexts = [out.hidden_states[-2] for out in (first, second)]
        if tokens.weights:
            weights = [split_chunks(each, n) for each in tokens.weights]
            contexts = [weigh(*each) for each in zip(contexts, weights, strict=True)]
        context = torch.cat(contexts, dim=-1)
        context, pooled = join_chunks(context, n), second.text_embeds[::n]
        cond = Conditioning(context, pooled=pooled)
        if not self._zero_null:
            return cond
        zeros = Conditioning(torch.zeros_like(context[:1]), pooled=torch.zeros_like(pooled[:1]))
        return cond.where(~tokens.empty, zeros)

    def _skip_layers(self, clip_skip: int) -> None:
        if clip_skip != 2:
            raise ValueError(
                f"clip_skip={clip_skip}: SDXL's UNet was trained with the penultimate layers of "
                "both text encoders, which is clip_skip 2. Leave it out."
            )

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def _decisive(self) -> dict[str, Any]:
        source = str(self._settings["pretrained"])
        weights = [find_weights(source, folder, "model") for folder in _ENCODERS]
        return {
            "configs": [read_config(source, folder) for folder in _ENCODERS],
            "tokenizers": [tokenizer_digest(source, folder) for folder in _TOKENIZERS],
            "max_length": self.max_length,
            "zero_null": self._zero_null,
            **self.tokenizer.decisive(),
            "weights": digest([*weights[0], *weights[1]]) if all(weights) else None,
        }

    def _read(self) -> dict[str, nn.Module]:
        source = str(self._settings["pretrained"])
        return {
            "encoder": pretrained_encoder(source, _ENCODERS[0]),
            "encoder_2": pretrained_encoder(source, _ENCODERS[1], projected=True),
        }


def _clip_config(pretrained: str, subfolder: str) -> Any:
    config = pretrained_config(pretrained, subfolder)
    if config.model_type != "clip_text_model":
        raise ValueError(
            f"{pretrained} (subfolder {subfolder}) is a {config.model_type!r}: wanted a CLIP text "
            "encoder, as in SDXL."
        )
    if config.num_hidden_layers < 1:
        raise ValueError(f"{pretrained} (subfolder {subfolder}) has no layers: wanted at least 1.")
    return config
