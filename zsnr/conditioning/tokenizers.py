"""Tokenizers: conversion of prompts to token ids and a mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zsnr.conditioning.cuts import Cut
from zsnr.conditioning.prompt_weights import parse_weights
from zsnr.untrusted import check_size, shown
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

_MAX_CHUNKS = 100
_LOST = 100  # tokens that are lost and shown


@dataclass(frozen=True, eq=False)
class Tokens:
    """Prompts as a text encoder reads them, one row each.

    Args:
        ids: Token ids (B, L) of each tokenizer, int64; chunks follow one another.
        mask: True from the start to the end token of each chunk, by the first tokenizer, (B, L).
        empty: Whether the prompt is "", (B,).
        cuts: The prompts that are cut.
        weights: Weights of the tokens of each tokenizer, (B, L). Empty = prompts have no weights.
    """

    ids: tuple[Tensor, ...]
    mask: Tensor
    empty: Tensor
    cuts: tuple[Cut, ...] = ()
    weights: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.empty)

    def to(self, device: torch.device | str) -> Tokens:
        """Copy to a device; from pinned memory the host does not wait for it."""
        return self._map(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Tokens:
        """Copy to pinned memory, from which a GPU copies by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        ids, weights = (tuple(map(change, parts)) for parts in (self.ids, self.weights))
        mask, empty = change(self.mask), change(self.empty)
        return replace(self, ids=ids, mask=mask, empty=empty, weights=weights)


class ChunkTokenizer(ABC):
    """A tokenizer that can divide the tokens of a prompt into chunks.

    Called with prompts it returns one chunk of each: ids (B, L), int64, and a mask (B, L), True
    from the start to the end token.

    Args:
        length: L, tokens of a chunk.
        room: Number of these that are a prompt's, without start and end token.
    """

    def __init__(self, length: int, room: int) -> None:
        self.length, self.room = length, room

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.chunks([tokens[: self.room] for tokens in self.encode(prompts)])

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return all tokens of each prompt, without start and end token."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""

    @abstractmethod
    def chunks(self, parts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Make a chunk of each part of a prompt, of at most `room` tokens."""


class Lowercased(ChunkTokenizer):
    """A tokenizer of prompts in lower case, without spaces at their ends, as PixArt reads them.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: ChunkTokenizer) -> None:
        super().__init__(tokenizer.length, tokenizer.room)
        self._tokenizer = tokenizer

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer.encode([prompt.lower().strip() for prompt in prompts])

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)

    def chunks(self, parts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        return self._tokenizer.chunks(parts)


class PromptTokenizer:
    """Converts prompts to Tokens, in any process.

    A prompt becomes `num_chunks` chunks, each with its own start and end token, however short it
    is: its encoding must not depend on the prompts beside it.

    Args:
        tokenizers: One for each text encoder.
        max_tokens: Number of tokens of a prompt that are read, rounded up to whole chunks; CLIP's
            chunks hold 75. None = one chunk.
        prompt_weights: Read weights such as (word:1.2) in prompts, see `parse_weights`.
        is_clip: Whether the text encoder is CLIP's, which max_tokens and prompt_weights need.

    Raises:
        ValueError: max_tokens is out of range, or the text encoder is not CLIP's; or a chunk has no
            room for start and end token.
    """

    def __init__(
        self,
        *tokenizers: Tokenizer,
        max_tokens: int | None = None,
        prompt_weights: bool = False,
        is_clip: bool = True,
    ) -> None:
        self.tokenizers, self._is_clip = tokenizers, is_clip
        self._first = tokenizers[0] if isinstance(tokenizers[0], ChunkTokenizer) else None
        self.max_tokens, self.prompt_weights, self.num_chunks = max_tokens, prompt_weights, 1
        if self._first is not None and self._first.room < 0:
            length = self._first.length
            raise ValueError(f"max_length={length}: wanted at least {length - self._first.room}.")
        clip = self._first is not None and is_clip
        if prompt_weights and not clip:
            raise ValueError(
                "prompt_weights: only CLIP's text encoders take weights such as (word:1.2). Leave "
                "it out."
            )
        if max_tokens is None:
            return
        if self._first is None or not clip:
            raise ValueError(
                f"max_tokens={shown(max_tokens)}: only CLIP's text encoders read a prompt in "
                "chunks; this one reads as many tokens as its max_length."
            )
        room = self._first.room
        most = _MAX_CHUNKS * room
        if type(max_tokens) is not int or not 1 <= max_tokens <= most:
            raise ValueError(
                f"max_tokens={shown(max_tokens)}: wanted 1 to {most}, such as {3 * room} for 3 "
                f"chunks of {room} tokens."
            )
        self.num_chunks = -(-max_tokens // room)

    def changed(self, max_tokens: int | None, prompt_weights: bool | None) -> PromptTokenizer:
        """Return the same tokenizer with other settings; None = the same setting."""
        return PromptTokenizer(
            *self.tokenizers,
            max_tokens=self.max_tokens if max_tokens is None else max_tokens,
            prompt_weights=self.prompt_weights if prompt_weights is None else prompt_weights,
            is_clip=self._is_clip,
        )

    def settings(self) -> dict[str, Any]:
        """Return max_tokens and prompt_weights where they are not the defaults."""
        weights = {"prompt_weights": True} if self.prompt_weights else {}
        return weights if self.max_tokens is None else {"max_tokens": self.max_tokens, **weights}

    def decisive(self) -> dict[str, Any]:
        """Return what determines embeddings beside the vocabulary, where it is not the default."""
        weights = {"prompt_weights": True} if self.prompt_weights else {}
        return weights if self.num_chunks == 1 else {"num_chunks": self.num_chunks, **weights}

    def __deepcopy__(self, memo: Any) -> PromptTokenizer:
        return self  # nothing changes it

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        cuts: tuple[Cut, ...] = ()
        parts, all_weights = [], []
        for tokenize in self.tokenizers:
            if isinstance(tokenize, ChunkTokenizer):
                tokens, weights = self._encode(tokenize, prompts)
                if tokenize is self._first:
                    cuts = self._cuts(tokenize, prompts, tokens)
                parts.append(self._chunks(tokenize, tokens))
                if self.prompt_weights:
                    all_weights.append(self._weights(tokenize, weights))
            else:
                parts.append(tokenize(prompts))
        empty = torch.tensor([prompt == "" for prompt in prompts], dtype=torch.bool)
        ids = tuple(ids for ids, _ in parts)
        return Tokens(ids, parts[0][1], empty, cuts, tuple(all_weights))

    def cuts(self, prompts: Sequence[str]) -> tuple[Cut, ...]:
        """Return those prompts that are cut, by the first tokenizer."""
        if self._first is None or not prompts:
            return ()
        return self._cuts(self._first, prompts, self._encode(self._first, prompts)[0])

    def _encode(
        self, tokenizer: ChunkTokenizer, prompts: Sequence[str]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return the tokens of each prompt, and their weights where prompts have some."""
        if not self.prompt_weights:
            return tokenizer.encode(prompts), []
        texts = [parse_weights(prompt) for prompt in prompts]
        encoded = iter(tokenizer.encode([text for each in texts for text, _ in each]))
        pairs = [[(i, w) for _, w in each for i in next(encoded)] for each in texts]
        return [[i for i, _ in each] for each in pairs], [[w for _, w in each] for each in pairs]

    def _weights(self, tokenizer: ChunkTokenizer, weights: list[list[float]]) -> Tensor:
        """Return the weights of all tokens of all chunks, (B, num_chunks L)."""
        n, room = self.num_chunks, tokenizer.room
        rows = torch.ones(len(weights), n, tokenizer.length)
        for row, each in zip(rows, weights, strict=True):
            for i, chunk in enumerate(row):
                part = each[i * room : (i + 1) * room]
                chunk[1 : 1 + len(part)] = torch.tensor(part)  # after the start token
        return rows.flatten(1)

    def _chunks(self, tokenizer: ChunkTokenizer, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and mask of all chunks, (B, num_chunks L)."""
        n, room = self.num_chunks, tokenizer.room
        ids, mask = tokenizer.chunks(
            [each[i * room : (i + 1) * room] for each in tokens for i in range(n)]
        )
        shape = len(tokens), n * tokenizer.length
        return ids.reshape(shape), mask.reshape(shape)

    def _cuts(
        self, tokenizer: ChunkTokenizer, prompts: Sequence[str], tokens: list[list[int]]
    ) -> tuple[Cut, ...]:
        room = tokenizer.room
        limit = room * self.num_chunks
        return tuple(
            Cut(
                prompt,
                len(each),
                limit,
                _text_from(tokenizer, each[: limit + _LOST], limit),
                -(-len(each) // room) * room if self._is_clip and room else None,
            )
            for prompt, each in zip(prompts, tokens, strict=True)
            if len(each) > limit
        )


def _text_from(tokenizer: ChunkTokenizer, tokens: Sequence[int], start: int) -> str:
    """Return the text of tokens from one on, or from the character that this token is a part of."""
    text = tokenizer.decode(tokens[start:])
    for earlier in range(start - 1, max(0, start - 4), -1):
        if not text.startswith("\ufffd"):
            break
        text = tokenizer.decode(tokens[earlier:])
    return text.strip()


def split_chunks(ids: Tensor, num_chunks: int) -> Tensor:
    """Give each chunk its own row: (B, num_chunks L) -> (B num_chunks, L)."""
    rows, length = ids.shape
    return ids.reshape(rows * num_chunks, length // num_chunks)


def join_chunks(context: Tensor, num_chunks: int) -> Tensor:
    """Concatenate the chunks of each prompt: (B num_chunks, L, D) -> (B, num_chunks L, D).

    Each keeps its start and end token, as in A1111 and ComfyUI. kohya's sd-scripts drops those
    between two chunks.
    """
    rows, length, width = context.shape
    return context.reshape(rows // num_chunks, num_chunks * length, width)


@lru_cache(maxsize=8)  # reading the vocabulary takes 0.1 s; nothing changes a tokenizer
def bpe_tokenizer(name: str, max_length: int) -> tuple[ChunkTokenizer, int]:
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


class CLIPTokenizer(ChunkTokenizer):
    """The CLIP tokenizer of open_clip, SimpleTokenizer.

    Args:
        tokenizer: open_clip's.
        repeats_end: Whether to pad with the end token instead of zeros.
    """

    def __init__(self, tokenizer: Any, repeats_end: bool = False) -> None:
        super().__init__(tokenizer.context_length, tokenizer.context_length - 2)
        self._tokenizer, self._repeats_end = tokenizer, repeats_end

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return [self._tokenizer.encode(prompt) for prompt in prompts]

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens)
        return text

    def chunks(self, parts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        start, end = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id
        ids = torch.zeros(len(parts), self.length, dtype=torch.long)
        for row, part in zip(ids, parts, strict=True):
            row[: len(part) + 2] = torch.tensor([start, *part, end])
        ends = ids.argmax(dim=1, keepdim=True)  # the end token has the largest id
        mask = torch.arange(self.length) <= ends
        return ids.where(mask, ids.gather(1, ends)) if self._repeats_end else ids, mask


def transformers_tokenizer(
    pretrained: str, subfolder: str | None, max_length: int | None
) -> tuple[ChunkTokenizer, int, int]:
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
    if not root.is_dir():
        raise ValueError(f"Cannot load a tokenizer from {pretrained}: there is no such folder.")
    if not (root / (subfolder or "")).is_dir():
        raise ValueError(f"{pretrained} has no folder {subfolder!r}: wanted a tokenizer there.")
    for file in (find_file(pretrained, subfolder, name) for name in _FILES):
        if file is not None:
            check_size(file, _LARGEST)
    try:
        auto = AutoTokenizer.from_pretrained(
            str(root.absolute()), subfolder=subfolder or "", trust_remote_code=False
        )
        if auto.pad_token is None:
            auto.pad_token = auto.eos_token
        length = max_length or min(int(auto.model_max_length), 512)
        tokenizer = _Padded(auto, length)
    except Exception as error:  # untrusted files may fail in any way
        where = pretrained if subfolder is None else f"{pretrained} (subfolder {subfolder})"
        raise ValueError(f"Cannot load a tokenizer from {where}: {reason(error)}") from error
    return tokenizer, len(auto), length


class _Padded(ChunkTokenizer):
    """A tokenizer of transformers, padded to L tokens."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("it has no padding token.")
        [alone] = self._read(tokenizer, ["a"], False)
        [whole] = self._read(tokenizer, ["a"], True)
        starts = (i for i in range(len(whole)) if whole[i : i + len(alone)] == alone)
        place = next(starts)
        self._before, self._after = whole[:place], whole[place + len(alone) :]
        super().__init__(length, length - len(self._before) - len(self._after))
        self._tokenizer = tokenizer

    @staticmethod
    def _read(tokenizer: Any, prompts: list[str], special: bool) -> list[list[int]]:
        # verbose: transformers would warn of every length beyond its own limit
        ids: list[list[int]] = tokenizer(prompts, add_special_tokens=special, verbose=False)[
            "input_ids"
        ]
        return ids

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        return self._read(self._tokenizer, list(prompts), False)

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens)
        return text

    def chunks(self, parts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        padding = self._tokenizer.pad_token_id
        if self._tokenizer.pad_token == PADDING:
            padding = 0
        ids = torch.full((len(parts), self.length), padding, dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, part in enumerate(parts):
            row = torch.tensor([*self._before, *part, *self._after])
            left = self._tokenizer.padding_side == "left"
            place = slice(self.length - len(row), None) if left else slice(len(row))
            ids[i, place], mask[i, place] = row, True
        return ids, mask


def tokenizer_digest(pretrained: str, subfolder: str | None) -> str | None:
    """Return a digest of a tokenizer's files; None = they are not on disk.

    For a single file it is the tokenizer's name.
    """
    if is_single_file(pretrained):
        return part_tokenizer(open_ldm_file(pretrained), subfolder or "tokenizer")[0]
    files = (find_file(pretrained, subfolder, name) for name in _FILES)
    return digest([path for path in files if path is not None])
