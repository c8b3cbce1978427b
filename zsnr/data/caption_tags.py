"""Captions that are lists of tags: shuffled, and with some of them left out, in training."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Tags:
    """Changes of captions that are lists of tags, such as "1girl, solo, long hair".

    A function of the seed and the sample's place in the run. It shuffles, then leaves out, as
    kohya's sd-scripts with shuffle_caption, keep_tokens and caption_tag_dropout_rate.

    Args:
        shuffle: Shuffle the tags.
        keep: Number of first tags that keep their place and are never left out, such as a trigger
            word.
        dropout: Probability that a tag is left out. Each is drawn by itself.
        separator: Text between two tags. A caption without it is one tag.

    Raises:
        ValueError: A setting is out of range, or nothing is changed.
    """

    shuffle: bool = True
    keep: int = 0
    dropout: float = 0.0
    separator: str = ","

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ValueError(f"tags.keep={self.keep}: wanted 0 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"tags.dropout={self.dropout:g}: wanted a number in [0, 1).")
        if not self.separator:
            raise ValueError("tags.separator is empty: wanted a text such as ','.")
        if not self.shuffle and not self.dropout:
            raise ValueError(
                "data.tags changes nothing: set tags.shuffle: true or tags.dropout above 0, or "
                "leave it out."
            )

    def __call__(self, caption: str, seed: int) -> str:
        """Return a caption with its tags shuffled, and some of them left out.

        Args:
            caption: The tags.
            seed: Seed of the random choices.
        """
        draw = random.Random(seed)
        tags = [tag for part in caption.split(self.separator) if (tag := part.strip())]
        kept, others = tags[: self.keep], tags[self.keep :]
        if self.shuffle:
            draw.shuffle(others)
        if self.dropout:
            others = [tag for tag in others if draw.random() >= self.dropout]
        between = f"{self.separator.strip()} " if self.separator.strip() else self.separator
        return between.join([*kept, *others])
