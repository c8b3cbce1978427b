"""Prompts encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch

from zsnr.conditioning.base import Conditioner
from zsnr.denoiser import Conditioning


class Remembered(Conditioner):
    """A frozen conditioner that encodes each prompt once and is released in between.

    For prompts that come again and again, as those of previews and null's do. Checkpoints describe
    the conditioner inside.

    Args:
        inner: What encodes prompts that are new. Its weights are loaded for those only.

    Raises:
        ValueError: The weights of `inner` are trained along, or random.
    """

    def __init__(self, inner: Conditioner) -> None:
        super().__init__()
        inner.check_lasting()
        self.inner = inner
        self.context_dim, self.pooled_dim = inner.context_dim, inner.pooled_dim
        self.to(inner._place.device)
        self._rows: dict[str, Conditioning] = {}
        self._passing = False

    @property
    def described(self) -> Conditioner:
        """The conditioner that a checkpoint describes."""
        return self.inner

    def add(self, prompt: str, row: Conditioning) -> None:
        """Remember the embedding of a prompt, such as null's ("") from a cache.

        Raises:
            ValueError: It is not one row of this conditioner's width.
        """
        if len(row) != 1 or row.context.shape[-1] != self.context_dim:
            raise ValueError(
                f"An embedding of shape {tuple(row.context.shape)} for {prompt!r}: wanted one row, "
                f"(1, L, {self.context_dim})."
            )
        pooled = 0 if row.pooled is None else row.pooled.shape[-1]
        if pooled != self.pooled_dim:
            raise ValueError(
                f"A pooled embedding of width {pooled} for {prompt!r}: wanted {self.pooled_dim}."
            )
        self._rows[prompt] = _row(row, 0)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Keep the encoder loaded and remember nothing new, while many prompts come once each."""
        self._passing = True
        try:
            yield
        finally:
            self._passing = False
            self.inner.release()

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        rows = self._rows
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in rows]
        if new:
            # A row must not depend on where its prompt first came: in sampling, or in training
            # under a trainer's precision.
            with torch.no_grad(), torch.autocast(self._place.device.type, enabled=False):
                encoded = self.inner(new)
            rows = rows | {prompt: _row(encoded, i) for i, prompt in enumerate(new)}
            if not self._passing:
                self._rows = rows
                self.inner.release()
        return Conditioning.cat([rows[prompt] for prompt in prompts]).to(self._place.device)

    def settings(self) -> dict[str, Any]:
        return self.inner.settings()

    def fingerprint(self) -> dict[str, Any]:
        return self.inner.fingerprint()

    def release(self) -> Self:
        self.inner.release()
        return self


def _row(cond: Conditioning, i: int) -> Conditioning:
    """Copy a row to the CPU."""
    return Conditioning(
        *(
            None if part is None else part[i : i + 1].detach().to("cpu", copy=True)
            for part in (cond.context, cond.mask, cond.pooled, cond.sizes)
        )  # type: ignore[arg-type]
    )
