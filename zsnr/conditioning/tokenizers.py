"""Tokenizers: conversion of prompts to token ids and a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zsnr.untrusted import check_size
from zsnr.weights.ldm_file import open_ldm_file, part_tokenizer
from zsnr.weights.pretrained import reason
from zsnr.weights.source import digest, find_file, is_single_file, local_path

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)

_LARGEST = 1 << 28  # bytes; files of the largest vocabularies have 40 MB

BPE = ("clip", "open_clip")

# open_clip pads with token 0, "!". A tokenizer of transformers that did so would read every "!" of
# a prompt as padding, so folders that this package writes use another padding token, with the same
# embedding. CLIP's vocabulary has a token for each byte at a word's end; UTF-8 never contains the
# byte 0xFF, so no prompt produces this token, and nobody writes these characters.
PADDING = "\u00ff</w>"

Tokenizer = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Prompts as a text encoder reads them, one row each.

    Args:
        ids: Token ids (B, L) of each tokenizer, int64.
        mask: True up to the end token, by the first tokenizer, (B, L).
        empty: Whether the prompt is "", (B,).
    """

    ids: tuple[Tensor, ...]
    mask: Tensor
    empty: Tensor

    def __len__(self) -> int:
        return len(self.empty)

    def to(self, device: torch.device | str) -> Tokens:
        """Copy to a device; from pinned memory the host does not wait for it."""
        return self._map(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Tokens:
        """Copy to pinned memory, from which a GPU copies by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(tuple(map(change, self.ids)), change(self.mask), change(self.empty))


class PromptTokenizer:
    """Converts prompts to Tokens, in any process.

    Args:
        tokenizers: One for each text encoder.
    """

    def __init__(self, *tokenizers: Tokenizer) -> None:
        self.tokenizers = tokenizers

    def __deepcopy__(self, memo: Any) -> PromptTokenizer:
        return self  # nothing changes it

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        parts = [tokenize(prompts) for tokenize in self.tokenizers]
        empty = torch.tensor([prompt == "" for prompt in prompts], dtype=torch.bool)
        return Tokens(tuple(ids for ids, _ in parts), parts[0][1], empty)


@lru_cache(maxsize=8)  # reading the vocabulary takes 0.1 s; nothing changes a tokenizer
def bpe_tokenizer(name: str, max_length: int) -> tuple[Tokenizer, int]:
    """Make CLIP's BPE tokenizer from the vocabulary in the package open_clip, without network.

    Args:
        name: Padding after the end token: "clip" repeats it, as in Stable Diffusion 1 and the first
            encoder of SDXL; "open_clip" uses zeros, as in Stable Diffusion 2 and SDXL's second.
        max_length: L. Longer prompts are truncated; their last token is the end token.

    Returns:
        The tokenizer, prompts -> (ids (B, L) int64, mask (B, L) True up to the end token), and
        the size of its vocabulary.
    """
    import open_clip

    bpe = open_clip.SimpleTokenizer(context_length=max_length)
    return CLIPTokenizer(bpe, repeats_end=name != "open_clip"), int(bpe.vocab_size)


class CLIPTokenizer:
    """A CLIP tokenizer of open_clip as a Tokenizer.

    Args:
        tokenizer: open_clip's; it pads with zeros.
        repeats_end: Whether to pad with the end token instead.
    """

    def __init__(self, tokenizer: Any, repeats_end: bool = False) -> None:
        self._tokenizer, self._repeats_end = tokenizer, repeats_end

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids: Tensor = self._tokenizer(list(prompts))
        ends = ids.argmax(dim=1, keepdim=True)  # the end token has the largest id
        mask = torch.arange(ids.shape[1]) <= ends
        return ids.where(mask, ids.gather(1, ends)) if self._repeats_end else ids, mask


def transformers_tokenizer(
    pretrained: str, subfolder: str | None, max_length: int | None
) -> tuple[Tokenizer, int, int]:
    """Load any tokenizer of transformers from a folder or the hub, or that of a single file.

    Returns:
        The tokenizer and the size of its vocabulary, as in `bpe_tokenizer`, and L.

    Raises:
        ValueError: The tokenizer cannot be loaded, or one of its files is too large.
    """
    from transformers import AutoTokenizer

    if is_single_file(pretrained):
        name, longest = part_tokenizer(open_ldm_file(pretrained), subfolder or "tokenizer")
        length = max_length or longest
        return *bpe_tokenizer(name, length), length
    root = local_path(pretrained, subfolder)
    assert root is not None
    if root.is_dir() and not (root / (subfolder or "")).is_dir():
        raise ValueError(f"{pretrained} has no folder {subfolder!r}: wanted a tokenizer there.")
    for file in (find_file(pretrained, subfolder, name) for name in _FILES):
        if file is not None:
            check_size(file, _LARGEST)
    try:
        auto = AutoTokenizer.from_pretrained(
            str(root), subfolder=subfolder or "", trust_remote_code=False
        )
        if auto.pad_token is None:
            auto.pad_token = auto.eos_token
        length = max_length or min(int(auto.model_max_length), 512)
    except Exception as error:  # untrusted files may fail in any way
        where = pretrained if subfolder is None else f"{pretrained} (subfolder {subfolder})"
        raise ValueError(f"Cannot load a tokenizer from {where}: {reason(error)}") from error

    return _Padded(auto, length), len(auto), length


class _Padded:
    """A tokenizer of transformers as a Tokenizer, padded to L tokens."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer, self._length = tokenizer, length

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
        )
        ids = encoded["input_ids"]
        if self._tokenizer.pad_token == PADDING:
            ids = ids.masked_fill(ids == self._tokenizer.pad_token_id, 0)
        return ids, encoded["attention_mask"].bool()


def tokenizer_digest(pretrained: str, subfolder: str | None) -> str | None:
    """Return a digest of a tokenizer's files; None = they are not on disk.

    For a single file it is the tokenizer's name.
    """
    if is_single_file(pretrained):
        return part_tokenizer(open_ldm_file(pretrained), subfolder or "tokenizer")[0]
    files = (find_file(pretrained, subfolder, name) for name in _FILES)
    return digest([path for path in files if path is not None])
