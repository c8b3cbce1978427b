"""Conditioner of unconditional models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zsnr.conditioning.base import Conditioner
from zsnr.denoiser import Conditioning


class NullConditioner(Conditioner):
    """Encodes every prompt as one token of zeros, for unconditional models.

    Args:
        context_dim: D.
    """

    _zeros: Tensor

    def __init__(self, context_dim: int = 8) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.register_buffer("_zeros", torch.zeros(1, 1, context_dim), persistent=False)

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(self._zeros.expand(len(prompts), -1, -1))

    def settings(self) -> dict[str, Any]:
        return {"context_dim": self.context_dim}
