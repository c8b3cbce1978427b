"""What a conditioner is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zsnr.denoiser import Conditioning
from zsnr.described import class_path


class Conditioner(nn.Module):
    """Prompts to Conditioning, one row each.

    A frozen one with pretrained weights loads them when the first prompt comes, and can release
    them again; until then it has no parameters, but knows what its config says. Others hold their
    weights from the start.

    Args:
        trainable: See below.
        pretrained: See below.

    Attributes:
        context_dim: D of the context (B, L, D).
        pooled_dim: P of the pooled embedding (B, P); 0 = there is none.
        trainable: Whether training changes it. A frozen one belongs to nobody's state dict.
        pretrained: Whether its settings alone give its weights again.
        parts: Names of the modules, parameters and buffers that `_read` gives.
    """

    context_dim: int
    pooled_dim: int = 0
    parts: ClassVar[tuple[str, ...]] = ()
    _place: Tensor
    _half_place: Tensor

    def __init__(self, trainable: bool = False, pretrained: bool = True) -> None:
        super().__init__()
        self.trainable, self.pretrained = trainable, pretrained
        self._loaded = False
        self._default_dtype = torch.get_default_dtype()
        if self.reloadable:
            # What .to() and its like do to these, `load` does to the weights: a device, and a
            # dtype if both have come to the same.
            self.register_buffer("_place", torch.empty(0), persistent=False)
            half = torch.empty(0, dtype=torch.float16)
            self.register_buffer("_half_place", half, persistent=False)
            self.eval()

    @property
    def reloadable(self) -> bool:
        """Whether its weights can go and come again: frozen, and given by its settings."""
        return self.pretrained and not self.trainable

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

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides its embeddings, as plain values; loads nothing.

        Returns:
            {"class": ..., "weights": a digest of their file, or None where there is none on
            disk, ...}, the same wherever the files lie.

        Raises:
            ValueError: Its weights are trained along, or random.
        """
        self.check_lasting()
        return {"class": class_path(self), "weights": None, **self._decisive()}

    def check_lasting(self) -> None:
        """Refuse to keep embeddings that do not last.

        Raises:
            ValueError: Its weights are trained along, or random.
        """
        if not self.reloadable:
            reason = "trained along" if self.trainable else "random"
            raise ValueError(
                f"The text encoder's weights are {reason}: its embeddings cannot be kept. Give it "
                "pretrained weights and trainable: false, or encode captions as they come."
            )

    def _decisive(self) -> dict[str, Any]:
        return self.settings()

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, unless frozen: dropout of a frozen encoder stays off."""
        return super().train(mode and self.trainable)

    def load(self) -> Self:
        """Load the weights, if they are not, and return self.

        Raises:
            ValueError: They cannot be read.
        """
        if self._loaded or not self.parts:
            return self
        around = torch.get_default_dtype()
        # The first prompt may come inside sampling or a trainer's precision: neither may leave its
        # mark on weights that stay.
        with torch.inference_mode(False):
            torch.set_default_dtype(self._default_dtype)
            try:
                parts = self._read()
            finally:
                torch.set_default_dtype(around)
            self._loaded = True
            for name, part in parts.items():
                if isinstance(part, nn.Module | nn.Parameter):
                    setattr(self, name, part)
                else:
                    self.register_buffer(name, part, persistent=False)
            if self.reloadable:
                cast = self._place.dtype == self._half_place.dtype
                self.to(self._place.device, self._place.dtype if cast else None)
        if not self.trainable:
            self.requires_grad_(False).eval()
        return self

    def release(self) -> Self:
        """Drop weights that can be loaded again, and return self; the next prompt loads them."""
        if self._loaded and self.reloadable:
            for name in self.parts:
                delattr(self, name)
            self._loaded = False
        return self

    def _read(self) -> Mapping[str, nn.Module | Tensor | None]:
        """Read the parts from disk, or make new ones."""
        return {}

    def __getattr__(self, name: str) -> Any:
        if name in self.parts and not self._loaded:
            self.load()
        return super().__getattr__(name)
