"""Denoisers (x_t, t) -> x_0 from networks: guidance of the output, then conversion to x_0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zsnr.guidance import Guidance
from zsnr.guidance_methods import dynamic_threshold
from zsnr.prediction import PredictionType, check_prediction_type, to_x0
from zsnr.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Inputs of a network in addition to x_t and t, one row per sample.

    At least one part is needed; each network says which it requires.

    Args:
        context: Token embeddings, (B, L, D).
        mask: True for tokens that are attended to, (B, L). None = all tokens.
        pooled: One embedding of the whole prompt, (B, P).
        sizes: Original height and width, crop top and left, target height and width in pixels,
            (B, 6).
        labels: Numbers of classes, int64, (B,).
        concat: Channels that the network sees beside those of x_t, (B, C', *), such as the latents
            of another image, or those of a masked image and the mask.

    Raises:
        ValueError: There is no part, the parts have unequal numbers of rows, or labels are no
            int64.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    sizes: Tensor | None = None
    labels: Tensor | None = None
    concat: Tensor | None = None

    def __post_init__(self) -> None:
        rows = {name: len(part) for name, part in self.parts().items()}
        if not rows:
            raise ValueError(f"Conditioning has no part: wanted one of {', '.join(_PARTS)}.")
        first = next(iter(rows))
        for name, number in rows.items():
            if number != rows[first]:
                raise ValueError(
                    f"Conditioning {name} has {number} rows, {first} {rows[first]}: wanted one row "
                    "per sample in each."
                )
        if self.labels is not None and (self.labels.dtype != torch.int64 or self.labels.ndim != 1):
            kind, shape = str(self.labels.dtype).removeprefix("torch."), tuple(self.labels.shape)
            raise ValueError(
                f"Conditioning labels are {kind} of shape {shape}: wanted int64 numbers of "
                "classes, (B,), as in torch.tensor([3, 207])."
            )

    def __len__(self) -> int:
        return len(next(iter(self.parts().values())))

    def parts(self) -> dict[str, Tensor]:
        """Return the parts that there are, by name."""
        named = {name: getattr(self, name) for name in _PARTS}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def device(self) -> torch.device:
        """Device of the parts."""
        return next(iter(self.parts().values())).device

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Change every part."""
        return Conditioning(**{name: change(part) for name, part in self.parts().items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move all parts to a device, and cast context, pooled and concat; the others are exact."""
        return Conditioning(
            **{
                name: part.to(device, dtype if name in _CAST else None)
                for name, part in self.parts().items()
            }
        )

    def rows(self, start: int, stop: int) -> Conditioning:
        """Return the rows from `start` up to `stop`."""
        return self.map(lambda part: part[start:stop])

    def expand(self, batch_size: int) -> Conditioning:
        """Repeat a single row batch_size times; batch_size rows are returned unchanged.

        Raises:
            ValueError: The number of rows is neither 1 nor batch_size.
        """
        if len(self) == batch_size:
            return self
        if len(self) != 1:
            raise ValueError(f"{len(self)} rows of conditioning for a batch of {batch_size}.")
        return self.map(lambda part: part.expand(batch_size, *part.shape[1:]))

    def where(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """Use rows of `self` where `keep` (B,) is True, otherwise rows of `other` (B or 1 rows).

        Raises:
            ValueError: The two have different parts or row shapes, or `keep` is not (B,).
        """
        if keep.shape != (len(self),) or keep.dtype != torch.bool:
            raise ValueError(
                f"keep is {keep.dtype} of shape {tuple(keep.shape)}: wanted bool, ({len(self)},)."
            )
        other = other.expand(len(self))
        _check_rows([self, other])
        theirs = other.parts()
        return Conditioning(
            **{
                name: torch.where(
                    keep.to(part.device).view(-1, *(1,) * (part.ndim - 1)),
                    part,
                    theirs[name].to(part),
                )
                for name, part in self.parts().items()
            }
        )

    @staticmethod
    def cat(conditionings: Sequence[Conditioning]) -> Conditioning:
        """Concatenate batches.

        Raises:
            ValueError: The batches have different parts or row shapes.
        """
        _check_rows(conditionings)
        return Conditioning(
            **{
                name: torch.cat([getattr(each, name) for each in conditionings])
                for name in conditionings[0].parts()
            }
        )


_PARTS = tuple(f.name for f in fields(Conditioning))
_CAST = ("context", "pooled", "concat")


def _check_rows(conditionings: Sequence[Conditioning]) -> None:
    """Refuse conditionings whose rows cannot be concatenated."""
    first, *others = conditionings
    for name in _PARTS:
        first_part = getattr(first, name)
        for other in others:
            other_part = getattr(other, name)
            if (first_part is None) != (other_part is None):
                raise ValueError(
                    f"One conditioning has {name}, the other has none: wanted both or neither."
                )
            if first_part is not None and first_part.shape[1:] != other_part.shape[1:]:
                raise ValueError(
                    f"Conditioning {name} has rows of shape {tuple(first_part.shape[1:])} and "
                    f"{tuple(other_part.shape[1:])}: wanted one shape."
                )


class Network(Protocol):
    """A function (x_t (B, *), t (B,), conditioning or None) -> raw output (B, *).

    t is what the schedule's `time` tells networks: the timestep itself, int64, or 1000 u in float32
    for rectified flow. The output may be overwritten by the next call, as by a CUDA graph or a
    TensorRT engine.
    """

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor: ...


@runtime_checkable
class TimestepDenoiser(Protocol):
    """A denoiser (x_t, t) -> x_0 that is told the timesteps of a step on the host."""

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor: ...

    def at(self, t: int, s: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the denoiser of the step from t to s."""
        ...


class Denoiser:
    """A network as a function (x_t, t) -> x_0.

    With guidance, the network is called on the doubled batch [uncond, cond]; guidance and its
    rescale act on the raw output (on x_0 with "apg"), in float32, before the conversion to x_0. At
    timesteps without guidance, or with a scale of 1, `denoiser.at(t, s)`, which samplers use, skips
    the unconditional pass; a call with t as a tensor makes both passes, because it cannot decide
    without waiting for the device.

    Args:
        network: (x_t, t, conditioning) -> raw output.
        schedule: The schedule the network was trained on.
        prediction_type: What the raw output is.
        cond: The prompts, one row per sample. None = an unconditional network.
        uncond: Negative or null prompts, one row per sample or one for all.
        guidance: None = no guidance. A scale of 1 skips the unconditional pass.
        max_rows: Maximum number of rows per network call, to bound memory; larger batches are
            divided. None = no limit; guidance needs two rows per sample. If the network is sharded,
            all ranks must have the same number of samples, otherwise they deadlock.
        dtype: Data type of x_t and the conditioning for the network. None = the dtype of the
            network's parameters if it is a module, otherwise unchanged.
        weak_network: A weaker version of the network with the same prediction type; its output with
            `cond` replaces the unconditional output, and `uncond` is not used (autoguidance, Karras
            et al., arXiv:2406.02507). Two calls instead of a doubled batch.

    Raises:
        ValueError: epsilon is combined with zero SNR; or guidance lacks `cond` or `uncond`; or
            guidance away from raw weights lacks a weak network.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        prediction_type: PredictionType = "v_prediction",
        cond: Conditioning | None = None,
        uncond: Conditioning | None = None,
        guidance: Guidance | None = None,
        *,
        dtype: torch.dtype | None = None,
        max_rows: int | None = None,
        weak_network: Network | None = None,
    ) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: wanted at least 1.")
        check_prediction_type(prediction_type, schedule)
        self.network, self.schedule, self.prediction_type = network, schedule, prediction_type
        acts = guidance is not None and (guidance.guides or guidance.threshold is not None)
        self.guidance = guidance if acts else None
        self.dtype = dtype or _parameter_dtype(network)
        self.max_rows = max_rows
        self._cond = self._both = _cast(cond, self.dtype)
        self._weak: tuple[Network, torch.dtype | None, Conditioning | None] | None = None
        if self.guidance is None or not self.guidance.guides:
            return
        if weak_network is not None:
            weak_dtype = dtype or _parameter_dtype(weak_network)
            self._weak = weak_network, weak_dtype, _cast(cond, weak_dtype)
        elif self.guidance.against == "raw":
            raise ValueError(
                "Guidance against 'raw' needs the network with raw weights: pass it as "
                "weak_network."
            )
        elif self._cond is None or uncond is None:
            raise ValueError(
                f"Guidance of scale {self.guidance.scale} needs both cond and uncond: pass "
                "both, or guidance=None."
            )
        else:
            uncond = uncond.to(uncond.device, self.dtype)
            self._both = Conditioning.cat([uncond.expand(len(self._cond)), self._cond])

    @property
    def device(self) -> torch.device | None:
        """Device of the conditioning, and required device of x_t. None = no conditioning."""
        return None if self._cond is None else self._cond.device

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict clean data.

        Args:
            x_t: Noisy data, (B, *), float32.
            t: int64 timesteps, (B,).

        Returns:
            x_0, (B, *), in x_t's dtype, at least float32.

        Raises:
            ValueError: The guidance method is "cfg_pp", whose scale depends on the next timestep.
        """
        scale = None
        if self.guidance is not None and self.guidance.guides:
            scale = self.guidance.scales_at(*self.schedule(t))
        return self._predict(x_t, t, scale)

    def at(self, t: int, s: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the denoiser of one timestep, which is known on the host.

        Args:
            t: The timestep.
            s: The timestep of the next state; -1 is clean data. None = unknown, which only the
                guidance method "cfg_pp" refuses.

        Returns:
            (x_t, t) -> x_0, like the denoiser itself, for x_t (B, *) and t (B,) of that timestep.
        """
        scale = None
        if self.guidance is not None and self.guidance.guides:
            at_s = () if s is None else self.schedule(s)
            scale = self.guidance.scale_at(*self.schedule(t), *at_s)
        return lambda x_t, t_row: self._predict(x_t, t_row, scale)

    def _predict(self, x_t: Tensor, t: Tensor, scale: Tensor | float | None) -> Tensor:
        """Predict clean data with a guidance scale, or one per sample, (B,); None = no guidance."""
        alpha_t, sigma_t = self.schedule(t)

        def to_data(output: Tensor) -> Tensor:
            return to_x0(output, x_t, alpha_t, sigma_t, self.prediction_type)

        guidance = self.guidance
        if guidance is None or scale is None or (not isinstance(scale, Tensor) and scale == 1):
            is_x_0 = self.prediction_type == "sample"
            x_0 = to_data(self._run(self.network, self.dtype, x_t, t, self._cond, keep=is_x_0))
        elif guidance.guides_x0:
            cond, uncond = self._outputs(x_t, t)
            x_0 = guidance(to_data(cond), to_data(uncond), scale)
        else:
            x_0 = to_data(guidance(*self._outputs(x_t, t), scale))
        if guidance is None or guidance.threshold is None:
            return x_0
        return dynamic_threshold(x_0, guidance.threshold)

    def _outputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the conditional output, and the one to guide away from."""
        if self._weak is not None:
            network, dtype, conditioning = self._weak
            cond = self._run(self.network, self.dtype, x_t, t, self._cond, keep=True)
            return cond, self._run(network, dtype, x_t, t, conditioning)
        doubled = torch.cat([x_t, x_t]), torch.cat([t, t])
        output = self._run(self.network, self.dtype, *doubled, self._both, times=2)
        uncond, cond = output.chunk(2)
        return cond, uncond

    def _run(
        self,
        network: Network,
        dtype: torch.dtype | None,
        x_t: Tensor,
        t: Tensor,
        c: Conditioning | None,
        *,
        times: int = 1,
        keep: bool = False,
    ) -> Tensor:
        """Call a network, in several calls if there are more rows than `max_rows`.

        Args:
            network: The network.
            dtype: Data type of its input. None = unchanged.
            x_t: (times B, *).
            t: (times B,).
            c: The same number of rows, or None.
            times: Rows per sample.
            keep: Copy the output, because it is needed after the network's next call.
        """
        if c is not None and len(c) != len(x_t):
            raise ValueError(
                f"{len(x_t) // times} samples but {len(c) // times} rows of conditioning: "
                "wanted one row per sample."
            )
        x = x_t if dtype is None else x_t.to(dtype)
        time = self.schedule.time(t)
        rows, limit = len(x_t), self.max_rows
        if limit is None or rows <= limit:
            return _call(network, x, time, c, x_t.dtype, keep)
        spans = [(i, min(i + limit, rows)) for i in range(0, rows, limit)]
        pieces = [
            _call(network, x[i:j], time[i:j], None if c is None else c.rows(i, j), x_t.dtype, True)
            for i, j in spans
        ]
        return torch.cat(pieces)


def _call(
    network: Network,
    x: Tensor,
    t: Tensor,
    c: Conditioning | None,
    dtype: torch.dtype,
    keep: bool,
) -> Tensor:
    """Call a network once; its output in at least float32, copied if it is kept."""
    output = network(x, t, c)
    if not isinstance(output, Tensor) or output.shape != x.shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"The network returned {got}: wanted a tensor of shape {tuple(x.shape)}.")
    return output.to(torch.promote_types(dtype, torch.float32), copy=keep)


def _parameter_dtype(network: Network) -> torch.dtype | None:
    if not isinstance(network, nn.Module):
        return None
    floating = (p.dtype for p in network.parameters() if p.is_floating_point())
    return next(floating, None)


def _cast(conditioning: Conditioning | None, dtype: torch.dtype | None) -> Conditioning | None:
    return None if conditioning is None else conditioning.to(conditioning.device, dtype)
