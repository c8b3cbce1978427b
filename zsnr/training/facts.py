"""What a run is, in plain values: for run.json, checkpoints and model cards."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from zsnr import __version__
from zsnr.checkpoints.run_facts import FORMAT
from zsnr.data.sources import Sources, as_sources
from zsnr.public import public

if TYPE_CHECKING:
    import lightning as L

    from zsnr.training.module import LatentDiffusion

_LIBRARIES = ("torch", "lightning", "diffusers", "transformers")


def run_facts(trainer: L.Trainer, module: LatentDiffusion) -> dict[str, Any]:
    """Return what decides a run and what it has come to.

    Returns:
        schedule: NoiseSchedule.settings(). loss: of LossWeighting. sampling: as in a picture's
        metadata. start: what the weights started from, if not from nothing. metrics: the last
        validation's. data: where the training data came from, without secrets. history: of starts.
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
        "data": [] if getattr(data, "train", None) is None else public_sources(data.train),
        "metrics": metrics,
        "history": module.history,
    }


def start_facts(trainer: L.Trainer, module: LatentDiffusion) -> dict[str, Any]:
    """Return what is written down of a start: an entry of run.json's history."""
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
    """List where data comes from, for all to see: no commands, users, passwords or signatures."""
    paths = [source.path for source in as_sources(sources)]
    return [
        public(path)
        for several in paths
        for path in ([several] if isinstance(several, str) else several)
    ]


def public_config(config: str, mark: str = "") -> str:
    """Write a config's YAML again for all to see; see `public`."""
    import yaml  # type: ignore[import-untyped]

    values = public(yaml.safe_load(config), mark)
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return text
