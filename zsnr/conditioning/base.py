"""The base class of conditioners."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zsnr.conditioning.cuts import Cut
from zsnr.conditioning.tokenizers import PromptTokenizer, Tokens
from zsnr.denoiser import Conditioning
from zsnr.described import class_path


class Conditioner(nn.Module):
    """Encodes prompts to Conditioning, one row each.

    A frozen conditioner with pretrained weights loads them when the first prompt is encoded, and
    can release them again; until then it has only its config and no parameters. Other conditioners
    hold their weights from the start.

    Args:
        trainable: See below.
        pretrained: See below.

    Attributes:
        context_dim: D of the context (B, L, D); 0 = there is none.
        num_labels: Number of class labels, with the null class; 0 = there are none.
        pooled_dim: P of the pooled embedding (B, P); 0 = there is none.
        trainable: Whether training updates it. A frozen conditioner is not part of a state dict.
        pretrained: Whether its weights can be loaded again from its settings alone.
        adapted: Facts of its pretrained weights, where it has adapters and only these are trained:
            their digest as "weights". None = it has none.
        max_length: Tokens of a chunk, with start and end; 1 where they are not counted.
        configured: The settings that `configure` has changed.
        tokenizer: Converts prompts to the Tokens that `forward` takes as well. None = it takes
            prompts only. The workers that load training data call it.
        parts: Names of the modules, parameters and buffers that `_read` returns.
    """

    context_dim: int
    num_labels: int = 0
    pooled_dim: int = 0
    max_length: int = 1
    tokenizer: PromptTokenizer | None = None
    parts: ClassVar[tuple[str, ...]] = ()
    _place: Tensor
    _half_place: Tensor

    def __init__(self, trainable: bool = False, pretrained: bool = True) -> None:
        super().__init__()
        self.trainable, self.pretrained = trainable, pretrained
        self.adapted: dict[str, Any] | None = None
        self.configured: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}
        self._loaded = False
        self._default_dtype = torch.get_default_dtype()
        if self.reloadable:
            # `load` moves the weights to the device of these buffers, and to their dtype if both
            # have the same, so that .to() applies before the weights are loaded.
            self.register_buffer("_place", torch.empty(0), persistent=False)
            half = torch.empty(0, dtype=torch.float16)
            self.register_buffer("_half_place", half, persistent=False)
            self.eval()

    @property
    def context_length(self) -> int:
        """L of the context (B, L, D): the tokens of all chunks."""
        return self.max_length * (1 if self.tokenizer is None else self.tokenizer.num_chunks)

    @property
    def reloadable(self) -> bool:
        """Whether its weights can be released and loaded again: frozen and pretrained."""
        return self.pretrained and not self.trainable

    @abstractmethod
    def forward(self, prompts: Any) -> Conditioning:
        """Encode a list of prompts, or their Tokens where there is a tokenizer."""

    def null(self) -> Conditioning:
        """Encode the null prompt, one row, for caption dropout and guidance."""
        encoded: Conditioning = self([""])
        return encoded

    def cuts(self, prompts: Sequence[str]) -> tuple[Cut, ...]:
        """Return those prompts that are longer than it reads, as far as its tokens are counted."""
        return () if self.tokenizer is None else self.tokenizer.cuts(prompts)

    def configure(
        self,
        *,
        max_tokens: int | None = None,
        clip_skip: int | None = None,
        prompt_weights: bool | None = None,
    ) -> None:
        """Change how prompts are encoded, in place.

        Args:
            max_tokens: Number of tokens of a prompt that are read, see PromptTokenizer. None =
                unchanged.
            clip_skip: The context is the hidden state -clip_skip: 1 = that of the last layer, 2 =
                the penultimate one. None = unchanged.
            prompt_weights: Whether weights such as (word:1.2) are read. None = unchanged.

        Raises:
            ValueError: The text encoder has no such setting, or the number is out of range.
        """
        read = {"max_tokens": max_tokens, "prompt_weights": prompt_weights}
        read = {name: value for name, value in read.items() if value is not None}
        if read:
            if self.tokenizer is None:
                raise self._lacks(*next(iter(read.items())))
            self.tokenizer = self.tokenizer.changed(max_tokens, prompt_weights)
            self._settings |= read
            self.configured |= read
        if clip_skip is not None:
            self._skip_layers(clip_skip)
            self.configured["clip_skip"] = clip_skip

    def _skip_layers(self, clip_skip: int) -> None:
        """Take the context from another layer."""
        raise self._lacks("clip_skip", clip_skip)

    def _lacks(self, name: str, value: Any) -> ValueError:
        return ValueError(
            f"{name}={value}: a {type(self).__name__} has no such setting. Leave it out."
        )

    def _tokens(self, prompts: Sequence[str] | Tokens, device: torch.device) -> Tokens:
        """Return the tokens of prompts on a device."""
        assert self.tokenizer is not None
        tokens = prompts if isinstance(prompts, Tokens) else self.tokenizer(prompts)
        return tokens.to(device)

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments that recreate this conditioner."""

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that determines the embeddings, as plain values, without loading.

        Returns:
            {"class": ..., "weights": a digest of the weights' file, or None if it is not on
            disk, ...}, independent of the files' location.

        Raises:
            ValueError: The weights are trained jointly, or random.
        """
        self.check_lasting()
        return {"class": class_path(self), "weights": None, **self._decisive()}

    def check_lasting(self) -> None:
        """Refuse to cache embeddings of weights that are not constant.

        Raises:
            ValueError: The weights are trained jointly, or random.
        """
        if not self.reloadable:
            reason = "trained jointly" if self.trainable else "random"
            raise ValueError(
                f"The text encoder's weights are {reason}: its embeddings cannot be cached. Use "
                "pretrained weights and trainable: false, or encode captions during training."
            )

    def _decisive(self) -> dict[str, Any]:
        return self.settings()

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, unless its weights are frozen: no dropout then."""
        return super().train(mode and self.trainable and self.adapted is None)

    def load(self) -> Self:
        """Load the weights, unless they are loaded, and return self.

        Raises:
            ValueError: The weights cannot be read.
        """
        if self._loaded or not self.parts:
            return self
        around = torch.get_default_dtype()
        # The first prompt may be encoded in inference mode or under a trainer's precision, neither
        # of which may affect the loaded weights.
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
        """Free weights that can be loaded again, and return self; the next prompt loads them."""
        if self._loaded and self.reloadable:
            for name in self.parts:
                delattr(self, name)
            self._loaded = False
        return self

    def _read(self) -> Mapping[str, nn.Module | Tensor | None]:
        """Read the parts from disk, or create new ones."""
        return {}

    def __getattr__(self, name: str) -> Any:
        if name in self.parts and not self._loaded:
            self.load()
        return super().__getattr__(name)
