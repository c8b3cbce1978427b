"""Text encoders of transformers: CLIP, T5, BERT and similar ones."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zsnr.conditioning.base import Conditioner
from zsnr.conditioning.prompt_weights import weigh
from zsnr.conditioning.tokenizers import (
    BPE,
    Lowercased,
    PromptTokenizer,
    Tokens,
    bpe_tokenizer,
    join_chunks,
    split_chunks,
    tokenizer_digest,
    transformers_tokenizer,
)
from zsnr.denoiser import Conditioning
from zsnr.weights.ldm_file import default_part
from zsnr.weights.pretrained import check_depth, load_pretrained, load_whole, read_config
from zsnr.weights.source import digest, find_weights, is_single_file


class TransformersConditioner(Conditioner):
    """A text encoder of transformers, pretrained or newly built from a config.

    Args:
        pretrained: A folder, a single file (.safetensors) in the ldm layout, or a hub id. None =
            build a new encoder from `config`.
        config: Settings of a new encoder: `model_type` such as "clip_text_model", "t5" or "bert",
            and that model's settings (hidden_size, num_hidden_layers, ...). The vocabulary size and
            the maximum prompt length are filled in.
        tokenizer: "open_clip" or "clip" for the CLIP tokenizer of the package open_clip, padded
            with zeros or end tokens; otherwise a folder or hub id. None = the tokenizer of
            `pretrained`.
        subfolder: Folder of the encoder inside `pretrained`, such as "text_encoder".
        tokenizer_subfolder: Folder of the tokenizer, such as "tokenizer".
        max_length: L, tokens of a prompt, with start and end; of a chunk where there are several.
            Longer prompts are truncated. None = the tokenizer's length, at most 512.
        layer: Index of the hidden state that is the context: -1 = last, -2 = penultimate, which
            other programs call clip_skip 1 and 2.
        final_norm: Apply the encoder's final layer norm to an earlier hidden state, as in Stable
            Diffusion 2. The last hidden state always includes it.
        use_mask: Mask padding in the encoder and the network. Stable Diffusion's CLIP does not; T5
            and BERT require it. None = by model type.
        trainable: Train it jointly with the UNet; otherwise it is frozen.
        max_tokens: Number of tokens of a prompt that CLIP reads, in chunks of max_length tokens:
            75, 150 or 225, which kohya's sd-scripts calls max_token_length. Every prompt takes as
            many chunks, each with its own start and end token, and the context holds them one after
            the other. None = one chunk.
        prompt_weights: Read weights such as (word:1.2) in prompts, as A1111 does: the context of a
            token is multiplied by its weight, and the mean of each chunk is restored.
        lowercase: Read prompts in lower case, as PixArt does.
    """

    tokenizer: PromptTokenizer
    parts = ("encoder",)

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        subfolder: str | None = None,
        tokenizer_subfolder: str | None = None,
        max_length: int | None = None,
        layer: int = -1,
        final_norm: bool = True,
        use_mask: bool | None = None,
        trainable: bool = False,
        max_tokens: int | None = None,
        prompt_weights: bool = False,
        lowercase: bool = False,
    ) -> None:
        super().__init__(trainable, pretrained is not None)
        if (pretrained is None) == (config is None):
            raise ValueError("A text encoder needs either `pretrained` or `config`.")
        if tokenizer is None and pretrained is None:
            raise ValueError("A text encoder from a config needs `tokenizer`, such as 'open_clip'.")
        self._settings: dict[str, Any] = {
            "pretrained": pretrained,
            "config": config,
            "tokenizer": tokenizer,
            "subfolder": subfolder,
            "tokenizer_subfolder": tokenizer_subfolder,
            "max_length": max_length,
            "layer": layer,
            "final_norm": final_norm,
            "use_mask": use_mask,
            "trainable": trainable,
        }
        self._subfolder = subfolder
        if pretrained is not None:
            self._subfolder = default_part(pretrained, subfolder, "text_encoder")
            if not is_single_file(pretrained):
                self._settings["subfolder"] = self._subfolder
        if tokenizer in BPE:
            max_length = max_length or 77
            tokenize, vocabulary = bpe_tokenizer(tokenizer, max_length)
        else:
            source = tokenizer or str(pretrained)
            folder = default_part(source, tokenizer_subfolder or None, "tokenizer")
            if not is_single_file(source):
                self._settings["tokenizer_subfolder"] = folder
            tokenize, vocabulary, max_length = transformers_tokenizer(source, folder, max_length)
        if lowercase:
            tokenize = Lowercased(tokenize)
            self._settings["lowercase"] = True
        self._vocabulary, self.max_length = vocabulary, max_length
        self._layer, self._final_norm = layer, final_norm
        if pretrained is None:
            encoder_config = self.encoder.config
        else:
            encoder_config = pretrained_config(pretrained, self._subfolder)
        is_clip = encoder_config.model_type.startswith("clip")
        self.tokenizer = PromptTokenizer(
            tokenize, max_tokens=max_tokens, prompt_weights=prompt_weights, is_clip=is_clip
        )
        self._settings |= self.tokenizer.settings()
        self._num_layers: int = encoder_config.num_hidden_layers if is_clip else 0
        if is_clip and max_length > encoder_config.max_position_embeddings:
            raise ValueError(
                f"max_length={max_length}: the text encoder has "
                f"{encoder_config.max_position_embeddings} positions. Longer prompts are read in "
                f"chunks: set max_tokens={max_length}."
            )
        self._use_mask = not is_clip if use_mask is None else use_mask
        self.context_dim = int(encoder_config.hidden_size)
        if not self.reloadable:
            self.load()

    def forward(self, prompts: Sequence[str] | Tokens) -> Conditioning:
        tokens = self._tokens(prompts, next(self.encoder.parameters()).device)
        [ids], n = tokens.ids, self.tokenizer.num_chunks
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            # Stable Diffusion's CLIP attends to padding: a mask would change tokens after the end.
            mask = split_chunks(tokens.mask, n).long() if self._use_mask else None
            out = self.encoder(split_chunks(ids, n), attention_mask=mask, output_hidden_states=True)
            context: Tensor = out.last_hidden_state
            if self._layer != -1:
                context = out.hidden_states[self._layer]
                norm = _final_norm(self.encoder)
                if self._final_norm and norm is not None:
                    context = norm(context)
            if tokens.weights:
                context = weigh(context, split_chunks(tokens.weights[0], n))
        return Conditioning(join_chunks(context, n), tokens.mask if self._use_mask else None)

    def _skip_layers(self, clip_skip: int) -> None:
        if not self._num_layers:
            raise ValueError(
                f"clip_skip={clip_skip}: it is for CLIP's text encoders. Leave it out."
            )
        if not 1 <= clip_skip <= self._num_layers:
            raise ValueError(
                f"clip_skip={clip_skip}: wanted 1 to {self._num_layers}, the number of layers of "
                "the text encoder."
            )
        self._layer = self._settings["layer"] = -clip_skip

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids (B, L) of one chunk and a mask (B, L), True up to the end token."""
        [tokenize] = self.tokenizer.tokenizers
        return tokenize(prompts)

    def settings(self) -> dict[str, Any]:
        return dict(self._settings)

    def _decisive(self) -> dict[str, Any]:
        settings = self._settings
        source, subfolder = str(settings["pretrained"]), self._subfolder
        tokenizer = settings["tokenizer"]
        return {
            "config": read_config(source, subfolder),
            "tokenizer": tokenizer
            if tokenizer in BPE
            else tokenizer_digest(tokenizer or source, settings["tokenizer_subfolder"]),
            "max_length": self.max_length,
            "layer": self._layer,
            "final_norm": self._final_norm,
            "use_mask": self._use_mask,
            **({"lowercase": True} if "lowercase" in settings else {}),
            **self.tokenizer.decisive(),
            "weights": digest(find_weights(source, subfolder, "model")),
        }

    def _read(self) -> dict[str, nn.Module]:
        settings = self._settings
        if settings["config"] is not None:
            return {"encoder": _new_encoder(settings["config"], self._vocabulary, self.max_length)}
        return {"encoder": pretrained_encoder(str(settings["pretrained"]), self._subfolder)}


def _new_encoder(config: dict[str, Any], vocabulary: int, max_length: int) -> nn.Module:
    from transformers import AutoConfig, AutoModel, T5EncoderModel

    check_depth(config)
    settings = dict(config)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ValueError("The text encoder's config has no model_type, such as 'clip_text_model'.")
    _check_keys(model_type, settings)
    defaults = {"vocab_size": vocabulary, "max_position_embeddings": max(max_length, 16)}
    full = AutoConfig.for_model(model_type, **{**defaults, **settings})
    if model_type == "clip_text_model" and "eos_token_id" not in settings:
        full.eos_token_id = vocabulary - 1
    encoder: nn.Module = T5EncoderModel(full) if model_type == "t5" else AutoModel.from_config(full)
    return encoder


def _check_keys(model_type: str, settings: dict[str, Any]) -> None:
    """Refuse settings that the model's config does not have, which transformers would ignore."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type={model_type!r} is not one of transformers'.")
    cls = CONFIG_MAPPING[model_type]
    known = {*cls().to_dict(), *cls.attribute_map}
    for name in settings.keys() - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"The config of {model_type!r} has no {name!r}.{hint}")


def pretrained_config(pretrained: str, subfolder: str | None) -> Any:
    """Read the text encoder's config; for a full CLIP model, that of its text tower."""
    from transformers import AutoConfig

    config = load_pretrained(AutoConfig, pretrained, subfolder, label="a text encoder's config")
    return getattr(config, "text_config", config)


def pretrained_encoder(
    pretrained: str, subfolder: str | None, *, projected: bool = False
) -> nn.Module:
    """Read a text encoder.

    Args:
        pretrained: A folder or hub id.
        subfolder: Folder inside it.
        projected: Include CLIP's projection, which returns a pooled embedding.

    Raises:
        ValueError: The encoder cannot be loaded, or its weights are incomplete.
    """
    from transformers import (
        AutoModel,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        T5EncoderModel,
    )

    clip = CLIPTextModelWithProjection if projected else CLIPTextModel
    by_type: dict[str, Any] = {"clip_text_model": clip, "t5": T5EncoderModel}
    model_type = pretrained_config(pretrained, subfolder).model_type
    cls = by_type.get(model_type, AutoModel)
    encoder: nn.Module = load_whole(
        cls, pretrained, subfolder, label="a text encoder", spare="pooler"
    )
    return encoder


def _final_norm(encoder: nn.Module) -> nn.Module | None:
    modules = {name.rpartition(".")[2]: module for name, module in encoder.named_modules()}
    return modules.get("final_layer_norm") if "final_layer_norm" in modules else None
