"""Noise that depends on the sample rather than the batch; offset noise (section 5.4)."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class SampleNoise:
    """Standard normal noise from one generator per sample.

    Row i of every draw comes from a generator seeded with seeds[i], on the CPU in float32, so a
    sample's noise does not depend on its batch, its position in the batch, or the device.

    Args:
        seeds: One integer per sample, 0 to 2^32 - 1.

    Raises:
        ValueError: There are no seeds, or one is out of range.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self._generators = [sample_generator(seed) for seed in seeds]
        if not self._generators:
            raise ValueError("There are no seeds: wanted one per sample.")

    def randn(
        self,
        shape: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw (B, *shape), where `shape` is that of one sample and B the number of seeds."""
        rows = [
            torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
            for generator in self._generators
        ]
        return torch.stack(rows).to(device=device, dtype=dtype)

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw noise of x's shape, dtype and device; usable as a sampler's `randn_like`.

        Raises:
            ValueError: The number of samples in x is not the number of seeds.
        """
        if len(x) != len(self._generators):
            raise ValueError(
                f"{len(x)} samples but {len(self._generators)} seeds: wanted one seed per sample."
            )
        return self.randn(x.shape[1:], device=x.device, dtype=x.dtype)


def sample_generator(seed: int) -> torch.Generator:
    """Make a CPU generator with a seed.

    Raises:
        ValueError: The seed is not in 0 .. 2^32 - 1 (torch's CPU generator ignores higher bits).
    """
    if isinstance(seed, bool) or not 0 <= operator.index(seed) < 2**32:
        raise ValueError(f"seed={seed!r}: wanted an integer from 0 to 4294967295.")
    return torch.Generator(device="cpu").manual_seed(operator.index(seed))


def derive_seed(*keys: int) -> int:
    """Hash integers, such as (seed, step, sample), to a 32-bit seed."""
    text = ",".join(str(operator.index(key)) for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def offset_noise(z: Tensor, d: Tensor, strength: float = 0.1) -> Tensor:
    """Shift each channel's noise: eps ~ N(0.1 d_c, I), d_c ~ N(0, 1)    (section 5.4).

    The workaround that zero terminal SNR replaces; provided for comparison.

    Args:
        z: Standard normal noise, (B, C, *).
        d: Standard normal, one number per sample and channel, (B, C).
        strength: Scale of the shift; the paper's is 0.1.

    Raises:
        ValueError: d has the wrong shape.
    """
    if d.shape != z.shape[:2]:
        raise ValueError(
            f"d has shape {tuple(d.shape)}: wanted one number per sample and channel, "
            f"{tuple(z.shape[:2])}."
        )
    return z + strength * d.view(*d.shape, *(1,) * (z.ndim - 2))
