"""What all ranks agree on about an optimizer step, and steps that are skipped.

A step whose loss or gradient is not finite changes no weights. That is decided on the device, in
the reduction that also sums the losses, and the host reads it when it needs a value: on the logging
interval at once, otherwise while the next step is computed.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zsnr.conditioning.cuts import Cut, describe_cuts, longest_cut
from zsnr.files import side_file
from zsnr.schedule import widest
from zsnr.training.progress import NonFiniteError, Progress
from zsnr.training.strategy import squared_norm

NUM_GROUPS = 5
"""Number of groups of timesteps: the quarters, and the last timestep alone."""
_HEAD = 6  # numbers before the sums by group: four requests, the gradient's square, cut captions
_FILE = "skipped_steps.jsonl"
_MOST_AT_THE_END = 3  # skipped steps in a row with which a run is no success
_CURE = (
    "Set trainer.gradient_clip_val, use bf16 instead of fp16, and resume from an earlier "
    "checkpoint, or start from scratch with a lower learning rate."
)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a step.

    Args:
        keys: Keys of its samples.
        losses: Their losses, (B,).
        t: Their timesteps, (B,).
        cuts: Those of their captions that are cut.
        groups: Numbers of the groups that each sample is in, (B, G). None = there are no groups.
        learned: Its sums for a learned weight of the losses, (K,). None = none is learned.
    """

    keys: list[str]
    losses: Tensor
    t: Tensor
    cuts: tuple[Cut, ...] = ()
    groups: Tensor | None = None
    learned: Tensor | None = None


class StepReport:
    """Sums over all ranks about one optimizer step. Every rank makes it.

    Making it reads nothing from the device.

    Args:
        step: Number of optimizer steps before this one.
        batches: Micro-batches of this rank.
        grads: Gradients, averaged over the ranks, or DTensors.
        requests: Whether this rank asks to stop, to be requeued, and to save a checkpoint, and
            whether it has failed.
        num_timesteps: T.
        names: Names of the groups of samples whose losses are summed, the same on all ranks.
    """

    def __init__(
        self,
        step: int,
        batches: Sequence[MicroBatch],
        grads: Sequence[Tensor],
        requests: Sequence[bool],
        num_timesteps: int,
        names: Sequence[str] = (),
    ) -> None:
        self.step, self.batches, self.counted = step, batches, False
        self._names = names
        learned = [batch.learned for batch in batches if batch.learned is not None]
        self._num_learned = len(learned[0]) if learned else 0
        losses = torch.cat([batch.losses for batch in batches])
        groups = sums_by_group(losses, torch.cat([batch.t for batch in batches]), num_timesteps)
        parts = [groups.new_full((1,), float(request)) for request in requests]
        parts.append(squared_norm(grads).to(groups)[None])
        parts.append(groups.new_full((1,), float(sum(len(batch.cuts) for batch in batches))))
        parts.append(groups.flatten())
        if names:
            numbers = torch.cat([batch.groups for batch in batches if batch.groups is not None])
            parts.append(sums_by_name(losses, numbers, len(names)).flatten())
        if learned:
            parts.append(torch.stack(learned).sum(0).to(groups))
        self._sums = torch.cat(parts)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        self._host, self._copied = self._sums, None
        if self._sums.is_cuda:
            self._host = self._sums.to("cpu", non_blocking=True)  # into pinned memory
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    @property
    def skips(self) -> Tensor:
        """1.0 where the step is not to change the weights, else 0.0: (), on the device."""
        failed, measured = self._sums[3], self._sums[4:].sum()
        return ((failed > 0) | ~measured.isfinite()).float()

    @property
    def learned(self) -> tuple[Tensor, Tensor]:
        """The sums for a learned weight, (K,), and the number of samples, (), on the device.

        The sums are 0 in a step that is skipped.
        """
        count = self._sums[_HEAD + NUM_GROUPS : _HEAD + 2 * NUM_GROUPS].sum()
        return torch.where(self.skips > 0, 0.0, self._sums[-self._num_learned :]), count

    def clip_factor(self, limit: float) -> Tensor:
        """The factor that brings the norm of the gradient down to `limit`: (), on the device."""
        return (limit / self._sums[4].sqrt()).clamp(max=1.0)

    @cached_property
    def numbers(self) -> Numbers:
        """The sums on the host, which waits for the device to have computed them."""
        if self._copied is not None:
            self._copied.synchronize()
        stop, requeue, save, failed, squared, cut, *sums = self._host.tolist()
        named = len(self._names)
        by_name = sums[2 * NUM_GROUPS : 2 * (NUM_GROUPS + named)]
        return Numbers(
            stop=stop > 0,
            requeue=requeue > 0,
            save=save > 0,
            failed=failed > 0,
            grad_norm=math.sqrt(squared),
            cut_captions=round(cut),
            totals=sums[:NUM_GROUPS],
            counts=sums[NUM_GROUPS : 2 * NUM_GROUPS],
            by_name=dict(
                zip(self._names, zip(by_name[:named], by_name[named:], strict=True), strict=True)
            ),
        )


@dataclass(frozen=True)
class Numbers:
    """A step in numbers, equal on all ranks.

    Args:
        stop: Whether a rank asks to stop.
        requeue: Whether a rank asks to be requeued.
        save: Whether a rank asks for a checkpoint.
        failed: Whether a rank could not read its batch.
        grad_norm: Norm of the gradient before it is clipped.
        cut_captions: Number of captions that are cut.
        totals: Sums of the losses by group of timesteps, as Progress has them.
        counts: Numbers of samples in these sums.
        by_name: Sum of the losses, and number of samples, by name of a group of samples.
    """

    stop: bool
    requeue: bool
    save: bool
    failed: bool
    grad_norm: float
    cut_captions: int
    totals: list[float]
    counts: list[float]
    by_name: dict[str, tuple[float, float]]

    @property
    def loss(self) -> float:
        """Mean loss of the global batch."""
        return sum(self.totals) / sum(self.counts)

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def sums_by_group(losses: Tensor, t: Tensor, num_timesteps: int) -> Tensor:
    """Sum losses (B,) at timesteps t (B,), and count them, by group of timesteps: (2, 5)."""
    T = num_timesteps
    return _sums(losses, torch.where(t == T - 1, NUM_GROUPS - 1, t * 4 // T), NUM_GROUPS)


def sums_by_name(losses: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sum losses (B,) of samples in the groups (B, G), and count them, by group: (2, count)."""
    return _sums(losses[:, None].expand_as(groups).flatten(), groups.flatten(), count)


def _sums(losses: Tensor, group: Tensor, count: int) -> Tensor:
    dtype = widest(losses.device)
    values = torch.stack([losses.to(dtype), torch.ones_like(losses, dtype=dtype)])
    return losses.new_zeros(2, count, dtype=dtype).index_add_(1, group, values)


def warn_of_cut_captions(report: StepReport) -> None:
    """Warn of a step's captions that are cut; every rank calls it."""
    cuts = [cut for batch in report.batches for cut in batch.cuts]
    longest: list[Any] = [longest_cut(cuts) if cuts else None]
    if dist.is_initialized():
        mine, longest = longest[0], [None] * dist.get_world_size()
        dist.all_gather_object(longest, mine)
    numbers = report.numbers
    message = describe_cuts(
        longest_cut([cut for cut in longest if cut is not None]),
        numbers.cut_captions,
        round(sum(numbers.counts)),
        "caption",
    )
    rank_zero_warn(f"Step {report.step}: {message} train/cut_captions in the log counts them.")


def record_skipped(trainer: L.Trainer, report: StepReport, in_a_row: int, allowed: int) -> None:
    """Record a step that was skipped; every rank calls it.

    Args:
        trainer: Trainer of the run.
        report: Report of the step.
        in_a_row: Number of steps skipped in a row, this one included.
        allowed: How many of them are allowed.

    Raises:
        NonFiniteError: More steps in a row were skipped than is allowed.
    """
    step, loss, norm = report.step, report.numbers.loss, report.numbers.grad_norm
    bad = [
        key
        for batch in report.batches
        for key, value in zip(batch.keys, batch.losses.tolist(), strict=True)
        if not math.isfinite(value)
    ]
    keys = bad or [key for batch in report.batches for key in batch.keys]
    by_rank: list[Any] = [keys]
    if dist.is_initialized():
        by_rank = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, (bool(bad), keys))
        any_bad = any(is_bad for is_bad, _ in by_rank)
        by_rank = [keys for is_bad, keys in by_rank if is_bad or not any_bad]
    keys = [key for keys in by_rank for key in keys]
    line = {"step": step, "loss": str(loss), "grad_norm": str(norm), "keys": keys}
    path = Path(trainer.default_root_dir) / _FILE
    if trainer.is_global_zero:
        with side_file(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        warnings.warn(
            f"Step {step} is skipped: loss {loss:g}, gradient norm {norm:g}, samples "
            f"{', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}; {path} lists all of them.",
            stacklevel=2,
        )
    if in_a_row > allowed:
        raise NonFiniteError(
            f"{in_a_row} steps in a row had a loss or gradient that is not "
            f"finite, the last with samples {', '.join(keys[:4])}; see {path}. {_CURE}"
        )


def check_last_steps(trainer: L.Trainer, progress: Progress, steps: int) -> None:
    """Refuse a run whose last steps, or all `steps` of this start, were skipped.

    Raises:
        NonFiniteError: They were.
    """
    row = progress.skipped_in_a_row
    if steps and row >= min(steps, _MOST_AT_THE_END):
        raise NonFiniteError(
            f"The run has ended, but the last {row} of {trainer.global_step} steps were skipped: "
            f"their loss or gradient was not finite; see {Path(trainer.default_root_dir) / _FILE}. "
            f"{_CURE}"
        )
