"""Inpainting with any denoiser: the conditional mean, given a part of the clean data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zsnr.denoiser import TimestepDenoiser
from zsnr.guidance_methods import share
from zsnr.samplers.base import DenoiserFunction, check_denoiser, guidance_of
from zsnr.schedule import Schedule


class InpaintingDenoiser:
    """A denoiser of data of which a part is known: (x_t, t) -> E[x_0 | x_t, the known part].

    If the known part of a prediction were just replaced, the rest would be sampled as if only the
    noisy known part were known, which is biased. For Gaussian data of any covariance

    E[x_0 | x_t, known] = D(x'),   x' = x_t on the unknown part, D(x') = known on the known part

    so the known part of the network's input is changed until the network predicts it. Each
    correction is one step of the generalized conjugate residual method (Eisenstat, Elman and
    Schultz, 1983) and one more call of the denoiser: x_t is moved by the residual, known - D, and
    the change of D that this makes is added to D in the amount that leaves the smallest residual.
    A correction therefore never moves the known part further than the residual, whatever the
    network. For D known numbers, D corrections are exact; see docs/how-to/image-to-image.md for
    what few are worth.

    At SNR 0 the prediction does not depend on x_t, and is not corrected.

    Args:
        denoiser: (x_t, t) -> x_0.
        schedule: The schedule the denoiser was made for.
        known: Clean data whose known part is used, (B, *).
        unknown: True where data are sampled, bool; broadcasts with (B, *).
        corrections: Number of corrections of each prediction. 0 = plain replacement.

    Raises:
        ValueError: `unknown` is not boolean, the number of corrections is negative, a network takes
            the denoiser's place, or the denoiser declares another schedule.
    """

    def __init__(
        self,
        denoiser: DenoiserFunction,
        schedule: Schedule,
        known: Tensor,
        unknown: Tensor,
        corrections: int = 2,
    ) -> None:
        if unknown.dtype != torch.bool:
            raise ValueError(
                f"unknown is {unknown.dtype}: wanted bool, True where data are sampled."
            )
        if type(corrections) is not int or corrections < 0:
            raise ValueError(f"corrections={corrections!r}: wanted 0 or more.")
        check_denoiser(denoiser, schedule)
        self.denoiser, self.schedule, self.guidance = denoiser, schedule, guidance_of(denoiser)
        self.known, self.unknown, self.corrections = known, unknown, corrections

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict clean data, (B, *), from noisy data (B, *) and int64 timesteps (B,)."""
        return self._predict(self.denoiser, x_t, t, self.corrections)

    def at(self, t: int, s: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the denoiser of one timestep, which is known on the host; see `Denoiser.at`."""
        evaluate = (
            self.denoiser.at(t, s) if isinstance(self.denoiser, TimestepDenoiser) else self.denoiser
        )
        corrections = self.corrections if self.schedule(t)[0] > 0 else 0
        return lambda x_t, t_row: self._predict(evaluate, x_t, t_row, corrections)

    def _predict(
        self, evaluate: DenoiserFunction, x_t: Tensor, t: Tensor, corrections: int
    ) -> Tensor:
        x_0 = corrected = evaluate(x_t, t).clone()
        residual = torch.where(self.unknown, 0.0, self.known.to(x_0) - x_0)
        used: list[tuple[Tensor, Tensor]] = []  # changes of x_0, and their known parts
        for _ in range(corrections):
            change = evaluate(x_t + residual, t) - x_0
            for earlier, seen in used:
                change = change - share(change, seen) * earlier
            seen = torch.where(self.unknown, 0.0, change)
            used.append((change, seen))
            size = share(residual, seen)
            corrected, residual = corrected + size * change, residual - size * seen
        return torch.where(self.unknown, corrected, self.known.to(x_0))
