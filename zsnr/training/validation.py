"""Validation losses by timestep: of the averaged and the raw weights, and before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from tqdm import tqdm

from zsnr.training.strategy import reshard
from zsnr.training.tags import at_timestep
from zsnr.training.watchdog import Watchdog


class ValidationLosses:
    """Sums of the losses of a validation by timestep; a sample's position decides its timestep.

    Args:
        timesteps: Timesteps that are validated, (S,).
        device: Device that the losses are on.
    """

    def __init__(self, timesteps: Tensor, device: torch.device) -> None:
        self.timesteps = timesteps
        # losses of the weights that sample, losses of the raw weights, losses of predicting zero,
        # and numbers of samples
        self._sums = torch.zeros(4, len(timesteps), device=device)

    def add(self, positions: Tensor, losses: Sequence[Tensor], zero: Tensor) -> None:
        """Add the losses, (B,), of the weights that sample, and of the raw ones if they differ.

        Args:
            positions: Positions of the samples, (B,). Negative ones only keep the ranks in step.
            losses: One or two tensors.
            zero: Losses of a network that predicts zero.
        """
        counts = (positions >= 0).to(losses[0])
        stratum = (positions % len(self.timesteps)).to(self._sums.device)
        for sums, values in zip(self._sums, losses, strict=False):
            sums.index_add_(0, stratum, values * counts)
        self._sums[2].index_add_(0, stratum, zero * counts)
        self._sums[3].index_add_(0, stratum, counts)

    def reduce(self, strategy: Strategy) -> None:
        """Sum over all ranks; every rank calls it."""
        self._sums = strategy.reduce(self._sums, reduce_op="sum")

    def means(self) -> Tensor:
        """Return the mean loss at each timestep of the weights that sample, (S,); nan = none."""
        return self._sums[0] / self._sums[3]

    def relative(self, t: int) -> float | None:
        """Return the mean loss at a timestep, divided by that of predicting zero; None = none."""
        loss, _, zero, _ = self._sums[:, self.timesteps.tolist().index(t)].tolist()
        return loss / zero if zero > 0 else None

    def metrics(self, *, raw: bool, start: Sequence[float] = ()) -> dict[str, Any]:
        """Return the mean losses by tag.

        Args:
            raw: Whether the raw weights were measured too.
            start: Mean losses of the pretrained model, to which those of the run are compared.
                Empty = no comparison.
        """
        self._sums = self._sums.cpu()  # read once: each value would wait for the device
        sums, raw_sums, _, counts = self._sums
        metrics: dict[str, Any] = {"val/loss": sums.sum() / counts.sum()}
        groups = [("val_by_timestep", sums)]
        if raw:
            metrics["val/loss_raw"] = raw_sums.sum() / counts.sum()
            groups.append(("val_by_timestep_raw", raw_sums))
        ends = [at_timestep(t) for t in self.timesteps.tolist()]
        for group, totals in groups:
            for end, total, count in zip(ends, totals, counts, strict=True):
                if count > 0:
                    metrics[f"{group}/{end}"] = total / count
        if start:
            ratios = self.means() / torch.tensor(start).to(sums)
            for end, ratio in zip(ends, ratios.tolist(), strict=True):
                if ratio > 0:  # not so at zero SNR, where epsilon does not determine v
                    metrics[f"adaptation/{end}"] = ratio
        return metrics


def measure_before_training(
    trainer: L.Trainer, module: Any, measure: Callable[[dict[str, Any]], None]
) -> bool:
    """Call a function with each batch of the validation data, as validation would.

    Args:
        trainer: Trainer that is about to train.
        module: Model, which is in evaluation mode meanwhile.
        measure: Function of a batch on the device.

    Returns:
        Whether there were batches.
    """
    data: Any = getattr(trainer, "datamodule", None)
    batches = [] if data is None else data.val_dataloader()
    limit = trainer.limit_val_batches
    count = min(len(batches), limit) if isinstance(limit, int) else int(len(batches) * limit)
    if not count:
        return False
    bar = trainer.is_global_zero and trainer.progress_bar_callback is not None
    watchdogs = [each for each in trainer.callbacks if isinstance(each, Watchdog)]
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    trainer.validating = True  # the data module counts these batches as not trained on
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        limited = islice(batches, count)
        for batch in tqdm(limited, "measuring the start", total=count, disable=not bar):
            for watchdog in watchdogs:
                watchdog.note(trainer, "measures the start")
            batch = module._on_before_batch_transfer(batch)
            measure(trainer.strategy.batch_to_device(batch))
    trainer.training = True
    for part, mode in modes:
        part.training = mode
    reshard(module)
    return True
