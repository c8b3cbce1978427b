"""Weights of words in prompts, in A1111's syntax: (word:1.2), ((word)), [word]."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_STEP = 1.1  # of a pair of brackets without a number
_PARTS = re.compile(
    r"""
    \\[()\[\]\\]                                    # an escaped bracket or backslash
    | :\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)           # a weight, with the bracket that it closes
    | [^\\()\[\]:]+                                 # text
    | .                                             # a bracket, a colon, a backslash
    """,
    re.VERBOSE | re.DOTALL,
)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Divide a prompt into texts and their weights.

    (text) has weight 1.1, ((text)) 1.21, [text] 1 / 1.1, (text:1.5) 1.5; \( \) \[ \] are brackets
    of the text. A bracket that is never closed lasts to the end of the prompt; one that was never
    opened is text.

    Args:
        prompt: Such as "a (red:1.3) house".

    Returns:
        Texts with weights, such as [("a ", 1.0), ("red", 1.3), (" house", 1.0)].
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # number of texts before each open bracket

    def multiply(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]

    for part in _PARTS.finditer(prompt):
        text = part[0]
        if text in opened:
            opened[text].append(len(texts))
        elif part[1] is not None and opened["("]:
            multiply("(", float(part[1]))
        elif text == ")" and opened["("]:
            multiply("(", _STEP)
        elif text == "]" and opened["["]:
            multiply("[", 1 / _STEP)
        else:
            texts.append(text.removeprefix("\\"))
            weights.append(1.0)
    while opened["("]:
        multiply("(", _STEP)
    while opened["["]:
        multiply("[", 1 / _STEP)
    return _merged(texts, weights)


def _merged(texts: list[str], weights: list[float]) -> list[tuple[str, float]]:
    """Join texts of one weight that follow one another: a word may be divided between them."""
    merged: list[tuple[str, float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if merged and merged[-1][1] == weight:
            merged[-1] = merged[-1][0] + text, weight
        else:
            merged.append((text, weight))
    return merged


def weigh(context: Tensor, weights: Tensor) -> Tensor:
    """Multiply the embedding of each token by its weight, and restore the mean of each row.

    Rows whose weights are all 1 are unchanged. As A1111's emphasis "Original".

    Args:
        context: Embeddings of chunks, (B, L, D).
        weights: Weight of each token, (B, L).
    """
    weighted = context * weights[..., None].to(context)
    before, after = (x.mean((1, 2), keepdim=True) for x in (context, weighted))
    scale = torch.where(after == 0, 1, before / after)
    changed = (weights != 1).any(1)[:, None, None]
    return torch.where(changed, weighted * scale, context)
