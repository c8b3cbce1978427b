"""What a conditioner is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from zsnr.denoiser import Conditioning


class Conditioner(nn.Module):
    """Prompts to Conditioning, one row each.

    Attributes:
        context_dim: D of the context (B, L, D).
        trainable: Whether training changes it. A frozen one belongs to nobody's state dict.
        pretrained: Whether its settings alone give its weights again.
    """

    context_dim: int
    trainable: bool = False
    pretrained: bool = True

    @abstractmethod
    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts."""

    def null(self) -> Conditioning:
        """Encode no prompt, one row: serves caption dropout and guidance."""
        encoded: Conditioning = self([""])
        return encoded

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the arguments that build this conditioner again."""
