"""How often training visits each timestep."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import Literal, get_args

from zsnr.beta_distribution import beta_cdf
from zsnr.schedule import positive

TimestepLawName = Literal["uniform", "logit_normal", "beta", "shift"]
MIN_TERMINAL_SHARE = 0.1
_LARGEST = 20.0  # parameter of beta


@dataclass(frozen=True)
class TimestepLaw:
    """The distribution of the timesteps of training: t = floor(T F^-1(r)), r uniform in [0, 1).

    | name         | F(x), x in [0, 1]                     | source                               |
    |--------------|---------------------------------------|--------------------------------------|
    | uniform      | x                                     | the paper                            |
    | logit_normal | Phi((log(x / (1 - x)) - mean) / std)  | Esser et al., arXiv:2403.03206       |
    | beta         | that of Beta(a, b)                    | as for steps, Lee et al., 2407.12173 |
    | shift        | x / (shift - (shift - 1) x)           | Esser et al., equation 23            |

    The last timestep determines the brightness of images. A law whose density vanishes there, as
    that of logit_normal and of beta with b > 1, starves it: laws that visit it less than
    MIN_TERMINAL_SHARE (a tenth) as often as uniform does are refused unless allowed.

    Args:
        name: uniform, logit_normal, beta or shift.
        mean: Mean of the logit, of logit_normal.
        std: Standard deviation of the logit, of logit_normal, positive.
        a: First parameter of beta, positive; below 1 the density rises at t = 0.
        b: Second parameter of beta, positive; below 1 the density rises at t = T - 1.
        shift: Above 1 = more noise, of shift, positive.
        allow_rare_terminal: Accept a law that visits the last timestep less often.

    Raises:
        ValueError: A setting is out of range, or belongs to another law.
    """

    name: TimestepLawName = "uniform"
    mean: float = 0.0
    std: float = 1.0
    a: float = 1.0
    b: float = 1.0
    shift: float = 1.0
    allow_rare_terminal: bool = False

    def __post_init__(self) -> None:
        if self.name not in get_args(TimestepLawName):
            known = ", ".join(repr(name) for name in get_args(TimestepLawName))
            raise ValueError(f"Timestep law {self.name!r} is unknown. Known: {known}.")
        if not (isinstance(self.mean, int | float) and math.isfinite(self.mean)):
            raise ValueError(f"mean={self.mean!r}: wanted a finite number.")
        for option in ("std", "a", "b", "shift"):
            value = positive(option, getattr(self, option))
            if option in ("a", "b") and not 1 / _LARGEST <= value <= _LARGEST:
                raise ValueError(
                    f"{option}={value}: wanted a number from {1 / _LARGEST:g} to {_LARGEST:g}."
                )
        if not isinstance(self.allow_rare_terminal, bool):
            raise ValueError(
                f"allow_rare_terminal={self.allow_rare_terminal!r}: wanted True or False."
            )
        owners = {"mean": "logit_normal", "std": "logit_normal", "a": "beta", "b": "beta"}
        for option, owner in {**owners, "shift": "shift"}.items():
            changed = getattr(self, option) != getattr(type(self), option)
            if changed and self.name != owner:
                raise ValueError(
                    f"{option}={getattr(self, option)} with the timestep law {self.name!r}: it is "
                    f"a setting of {owner!r}. Omit it, or choose that law."
                )

    def timestep(self, r: float, num_timesteps: int) -> int:
        """Return the timestep of r, uniform in [0, 1)."""
        t = bisect_right(_table(self, num_timesteps), r) - 1
        return min(t, num_timesteps - 1)

    def cdf(self, x: float) -> float:
        """Compute F(x), the share of training at positions below x, x in [0, 1]."""
        match self.name:
            case "logit_normal":
                if not 0 < x < 1:
                    return float(x >= 1)
                return NormalDist().cdf((math.log(x / (1 - x)) - self.mean) / self.std)
            case "beta":
                return beta_cdf(x, self.a, self.b)
            case "shift":
                return x / (self.shift - (self.shift - 1) * x)
            case _:
                return x

    def probabilities(self, num_timesteps: int) -> list[float]:
        """Return the probability of each timestep, F((t + 1) / T) - F(t / T)."""
        return [after - before for before, after in pairwise(_table(self, num_timesteps))]

    def terminal_share(self, num_timesteps: int) -> float:
        """Compute how often the last timestep is visited, relative to uniform: T P(t = T - 1)."""
        return num_timesteps * (1 - self.cdf(1 - 1 / num_timesteps))

    def check(self, num_timesteps: int) -> None:
        """Refuse a law that starves the last timestep.

        Raises:
            ValueError: It visits the last timestep less than a tenth as often as uniform, and this
                is not allowed.
        """
        share = self.terminal_share(num_timesteps)
        if share < MIN_TERMINAL_SHARE and not self.allow_rare_terminal:
            raise ValueError(
                f"The timestep law {self.name!r} visits the last timestep, "
                f"t={num_timesteps - 1}, {share:.2g} times as often as 'uniform' does: the model "
                "would hardly learn to start from pure noise, which determines the brightness of "
                f"images. Wanted at least {MIN_TERMINAL_SHARE}: use 'uniform', 'shift' or 'beta' "
                "with b up to 1, or set allow_rare_terminal=True."
            )


@lru_cache(maxsize=8)
def _table(law: TimestepLaw, num_timesteps: int) -> tuple[float, ...]:
    """Compute F(t / T) for t = 0 .. T."""
    return tuple(law.cdf(t / num_timesteps) for t in range(num_timesteps + 1))
