"""What a run is, in plain values: for run.json, checkpoints and model cards."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from zsnr import __version__
from zsnr.checkpoints.run_facts import FORMAT
from zsnr.data.sources import Sources, as_sources
from zsnr.data.storage import public_url

if TYPE_CHECKING:
    import lightning as L

    from zsnr.training.module import LatentDiffusion

_LIBRARIES = ("torch", "lightning", "diffusers", "transformers")


def run_facts(trainer: L.Trainer, module: LatentDiffusion) -> dict[str, Any]:
    """Return what decides a run and what it has come to.

    Returns:
        schedule: NoiseSchedule.settings(). loss: of LossWeighting. sampling: as in a picture's
        metadata. start: what the weights started from, if not from nothing. metrics: the last
        validation's. data: where the training data came from, without passwords.
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
    }


def public_sources(sources: Sources) -> list[str]:
    """List where data comes from, for all to see: no commands, users, passwords or signatures."""
    return [
        _public(path)
        for source in as_sources(sources)
        for path in ([source.path] if isinstance(source.path, str) else source.path)
    ]


def _public(path: str) -> str:
    return "pipe:..." if path.startswith("pipe:") else public_url(path)


def public_config(config: str) -> str:
    """Write a config's YAML again for all to see, as `public_sources` does."""
    import yaml  # type: ignore[import-untyped]

    values = _published(yaml.safe_load(config))
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return text


def _published(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _published(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_published(part) for part in value]
    return _public(value) if isinstance(value, str) else value
