"""The facts of a run as plain values, for run.json, checkpoints and model cards."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import lightning as L
import torch
from torch.utils.data import Dataset

from zsnr import __version__
from zsnr.checkpoints.run_facts import FORMAT
from zsnr.data.sources import Sources, as_sources
from zsnr.described import class_path
from zsnr.public import public
from zsnr.training.module import LatentDiffusion

_LIBRARIES = ("torch", "lightning", "diffusers", "transformers")


def run_facts(
    trainer: L.Trainer, module: LatentDiffusion, history: Sequence[Any]
) -> dict[str, Any]:
    """Return the settings that define a run and the metrics it has reached.

    Args:
        trainer: Trainer of the run.
        module: Model in training.
        history: One entry for each start of the run, as `start_facts` returns it.

    Returns:
        schedule: NoiseSchedule.settings(). loss: settings of LossWeighting. sampling: as in the
        metadata of an image. start: the pretrained weights, or None. metrics: those of the last
        validation. data: locations of the training data, without secrets. history: as given.
    """
    data: Any = getattr(trainer, "datamodule", None)
    optimizers = trainer.optimizers
    metrics = {
        name: float(value)
        for name, value in trainer.callback_metrics.items()
        if (name == "val/loss" or name.startswith("metrics/")) and torch.as_tensor(value).isfinite()
    }
    return {
        "format": FORMAT,
        "zsnr_version": __version__,
        "versions": {name: version(name) for name in _LIBRARIES},
        "global_step": trainer.global_step,
        **module.facts(),
        "batch_size": getattr(data, "batch_size", None),
        "learning_rate": optimizers[0].defaults.get("lr") if optimizers else None,
        "data": _named(getattr(data, "train", None)),
        "metrics": metrics,
        "history": [*history],
    }


def _named(source: Any) -> list[Any]:
    if source is None:
        return []
    return [class_path(source)] if isinstance(source, Dataset) else public_sources(source)


def start_facts(trainer: L.Trainer, module: LatentDiffusion) -> dict[str, Any]:
    """Return the entry of run.json's history for this start of the run."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "zsnr_version": __version__,
        "from_step": trainer.global_step,
        "host": socket.gethostname(),
        "nodes": trainer.num_nodes,
        "ranks": trainer.world_size,
        "changed": module.changed_settings,
    }


def public_sources(sources: Sources) -> list[str]:
    """List the locations of data without commands, user names, passwords or signatures."""
    return [
        public(path)
        for source in as_sources(sources)
        for path in ([source.path] if isinstance(source.path, str) else source.path)
    ]


def public_config(config: str, mark: str = "") -> str:
    """Return the YAML of a config without secrets, as `public` leaves them out."""
    import yaml  # type: ignore[import-untyped]

    values = public(yaml.safe_load(config), mark)
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return text
