"""Conditioner of class-conditional models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zsnr.conditioning.base import Conditioner
from zsnr.denoiser import Conditioning
from zsnr.untrusted import shown


class ClassLabels(Conditioner):
    """Reads a prompt as the number of a class, or as its name.

    The empty prompt is the null class, whose number is `num_classes`: a network needs
    num_classes + 1 embeddings, or whatever else it makes of a label.

    Args:
        num_classes: Number of classes, without the null class.
        names: Names of the classes, in their order, which then are prompts too. None = prompts are
            numbers, from 0 to num_classes - 1.
    """

    context_dim = 0

    def __init__(self, num_classes: int, names: list[str] | None = None) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: wanted at least 1.")
        if names is not None and len({*names, ""}) != num_classes + 1:
            raise ValueError(
                f"{len(names)} names of {num_classes} classes: wanted one for each, all different."
            )
        self.num_classes, self.names = num_classes, names
        self.num_labels = num_classes + 1
        self._numbers = {str(number): number for number in range(num_classes)}
        for number, name in enumerate(names or ()):
            if self._numbers.get(name, number) != number:
                raise ValueError(
                    f"names has {name!r} for class {number}, but that is the number of another "
                    "class: wanted names that are not numbers."
                )
            self._numbers[name] = number
        self._numbers[""] = num_classes

    def forward(self, prompts: Sequence[str | int]) -> Conditioning:
        """Look up classes.

        Raises:
            ValueError: A prompt is no class.
        """
        numbers = [self._numbers.get(str(prompt), -1) for prompt in prompts]
        if -1 in numbers:
            wrong = shown(prompts[numbers.index(-1)])
            known = "" if self.names is None else f", or a name such as {shown(self.names[0])}"
            raise ValueError(
                f"{wrong} is no class: wanted a number from 0 to {self.num_classes - 1}{known}; or "
                "nothing, for the null class."
            )
        labels = torch.tensor(numbers, dtype=torch.int64)
        return Conditioning(labels=labels.to(self._place.device, non_blocking=True))

    def settings(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "names": self.names}
