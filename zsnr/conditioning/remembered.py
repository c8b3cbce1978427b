"""A cache of encoded prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch

from zsnr.conditioning.base import Conditioner
from zsnr.conditioning.cuts import Cut
from zsnr.denoiser import Conditioning


class Remembered(Conditioner):
    """A frozen conditioner that encodes each prompt once and is released afterwards.

    For prompts that are used repeatedly, such as those of previews and the null prompt. Checkpoints
    describe the inner conditioner.

    Args:
        inner: Encodes new prompts. Its weights are loaded only for those.

    Raises:
        ValueError: The weights of `inner` are trained jointly, or random.
    """

    def __init__(self, inner: Conditioner) -> None:
        super().__init__()
        inner.check_lasting()
        self.inner = inner
        self.context_dim, self.pooled_dim = inner.context_dim, inner.pooled_dim
        self.to(inner._place.device)
        self._rows: dict[str, Conditioning] = {}
        self._null: Conditioning | None = None  # on the device
        self._passing = False

    @property
    def described(self) -> Conditioner:
        """The conditioner that a checkpoint describes."""
        return self.inner

    def add(self, prompt: str, row: Conditioning) -> None:
        """Store the embedding of a prompt, such as the null prompt's ("") from a cache.

        Raises:
            ValueError: The embedding is not one row of this conditioner's width.
        """
        shape = (len(row), 0, 0) if row.context is None else tuple(row.context.shape)
        if len(row) != 1 or shape[-1] != self.context_dim:
            raise ValueError(
                f"An embedding of shape {shape} for {prompt!r}: wanted one row, "
                f"(1, L, {self.context_dim})."
            )
        pooled = 0 if row.pooled is None else row.pooled.shape[-1]
        if pooled != self.pooled_dim:
            raise ValueError(
                f"A pooled embedding of width {pooled} for {prompt!r}: wanted {self.pooled_dim}."
            )
        self._rows[prompt] = _row(row, 0)
        self._null = None

    def null(self) -> Conditioning:
        """Encode the null prompt, one row; training uses it in every step."""
        if self._null is None or self._null.device != self._place.device:
            self._null = super().null()
        return self._null

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Keep the encoder loaded and store no embeddings, for many prompts that are used once."""
        self._passing = True
        try:
            yield
        finally:
            self._passing = False
            self.inner.release()

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        rows = self._rows
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in rows]
        if missing:
            # An embedding must not depend on where the prompt was first encoded: in sampling, or in
            # training under a trainer's precision.
            with torch.no_grad(), torch.autocast(self._place.device.type, enabled=False):
                encoded = self.inner(missing)
            rows = rows | {prompt: _row(encoded, i) for i, prompt in enumerate(missing)}
            if not self._passing:
                self._rows = rows
                self.inner.release()
        return Conditioning.cat([rows[prompt] for prompt in prompts]).to(self._place.device)

    @property
    def context_length(self) -> int:
        return self.inner.context_length

    def cuts(self, prompts: Sequence[str]) -> tuple[Cut, ...]:
        return self.inner.cuts(prompts)

    def settings(self) -> dict[str, Any]:
        return self.inner.settings()

    def fingerprint(self) -> dict[str, Any]:
        return self.inner.fingerprint()

    def release(self) -> Self:
        self.inner.release()
        return self


def _row(cond: Conditioning, i: int) -> Conditioning:
    """Copy a row to the CPU."""
    return cond.map(lambda part: part[i : i + 1].detach().to("cpu", copy=True))
