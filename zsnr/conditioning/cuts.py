"""Prompts that are longer than a text encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zsnr.untrusted import clipped


@dataclass(frozen=True)
class Cut:
    """A prompt whose end the text encoder does not read.

    Args:
        prompt: The whole prompt.
        num_tokens: Its length in tokens, without start and end token.
        limit: Number of tokens that are read.
        lost: The words that are not read.
        max_tokens: Value of max_tokens that reads all of it. None = the encoder has no such
            setting.
    """

    prompt: str
    num_tokens: int
    limit: int
    lost: str
    max_tokens: int | None


def longest_cut(cuts: Sequence[Cut]) -> Cut:
    """Return the longest of some prompts; of several, the first."""
    return max(cuts, key=lambda cut: cut.num_tokens)


def describe_cuts(longest: Cut, count: int, total: int, what: str = "prompt") -> str:
    """Return the warning about prompts that are cut.

    Args:
        longest: The longest of them.
        count: Number of prompts that are cut.
        total: Number of prompts.
        what: What they are: "prompt" or "caption".
    """
    verb = "is" if count == 1 else "are"
    which = f"The {what}" if total == 1 else f"{count} of {total} {what}s"
    length = "it has" if total == 1 else "the longest has"
    if longest.max_tokens is None:
        remedy = "Shorten it, or raise the text encoder's max_length."
    else:
        value = longest.max_tokens
        remedy = (
            f"Set max_tokens={value} to read all of it: --max-tokens {value} in `zsnr sample`, "
            "model.conditioner.init_args.max_tokens in a config."
        )
    return (
        f"{which} {verb} cut: the text encoder reads {longest.limit} tokens, {length} "
        f"{longest.num_tokens}. Lost are the words '{clipped(longest.lost)}' of "
        f"'{clipped(longest.prompt)}'. {remedy}"
    )
