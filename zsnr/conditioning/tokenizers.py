"""Tokenizers: conversion of prompts to token ids and a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zsnr.ldm_file import is_single_file, open_ldm_file, part_tokenizer
from zsnr.pretrained import digest, find_file, reason
from zsnr.untrusted import check_size

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

    def tokenize(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = bpe(list(prompts))
        ends = ids.argmax(dim=1, keepdim=True)  # the end token has the largest id
        mask = torch.arange(max_length) <= ends
        return ids if name == "open_clip" else ids.where(mask, ids.gather(1, ends)), mask

    return tokenize, int(bpe.vocab_size)


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
    for file in (find_file(pretrained, subfolder, name) for name in _FILES):
        if file is not None:
            check_size(file, _LARGEST)
    try:
        auto = AutoTokenizer.from_pretrained(pretrained, subfolder=subfolder or "")
        if auto.pad_token is None:
            auto.pad_token = auto.eos_token
        length = max_length or min(int(auto.model_max_length), 512)
    except Exception as error:  # untrusted files may fail in any way
        where = pretrained if subfolder is None else f"{pretrained} (subfolder {subfolder})"
        raise ValueError(f"Cannot load a tokenizer from {where}: {reason(error)}") from error

    def tokenize(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = auto(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        ids = encoded["input_ids"]
        if auto.pad_token == PADDING:
            ids = ids.masked_fill(ids == auto.pad_token_id, 0)
        return ids, encoded["attention_mask"].bool()

    return tokenize, len(auto), length


def tokenizer_digest(pretrained: str, subfolder: str | None) -> str | None:
    """Return a digest of a tokenizer's files; None = they are not on disk.

    For a single file it is the tokenizer's name.
    """
    if is_single_file(pretrained):
        return part_tokenizer(open_ldm_file(pretrained), subfolder or "tokenizer")[0]
    files = (find_file(pretrained, subfolder, name) for name in _FILES)
    return digest([path for path in files if path is not None])
