"""The settings that a run has saved, for `zsnr validate RUN`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zsnr.checkpoints.run_facts import read_run_facts
from zsnr.reports.status import read_run_config
from zsnr.training.from_checkpoint import checkpoint_config
from zsnr.training.resuming import flat

_LEFT_OUT = {
    # what only training uses, and may need much memory, or a library
    "model": {"optimizer", "learning_rate", "post_hoc_ema", "watch"},
    "data": {"train", "prompts", "accept_changed_data"},
    # files of the run that validation would write over
    "metrics": {"save_images", "output", "every_n_validations"},
}
_SAMPLES = {
    "data": (
        *("val", "val_samples", "image_size", "seed", "filters", "aspect", "pixels", "captions"),
    ),
    "trainer": ("limit_val_batches",),
}
_OF_IMAGES = {
    "metrics": (
        *("captions", "num_images", "seed", "real", "num_real", "statistics", "inception"),
        *("features", "inception_splits", "clip"),
    ),
    "model": ("sampling",),
}
_KEPT_OF_TRAINER = (
    *("accelerator", "precision", "limit_val_batches", "deterministic", "benchmark"),
    "enable_progress_bar",
)


def validation_config(run: Path, checkpoint: Path) -> dict[str, Any]:
    """Return a config that validates a checkpoint as its run does, on one device.

    The checkpoint says what the model is, see `checkpoint_config`. The configuration that the run
    has saved adds the validation data, the metrics of images, the precision, and the classes of
    other packages; its devices, strategy, loggers and callbacks are left out.

    Args:
        run: Folder of the run.
        checkpoint: One of its checkpoints.

    Returns:
        Settings by group, plain values.

    Raises:
        ValueError: It is no checkpoint of this package, or describes what this package does not
            build.
    """
    saved = read_run_config(run)
    groups = {
        group: {
            name: value for name, value in _mapping(saved.get(group)).items() if name not in out
        }
        for group, out in _LEFT_OUT.items()
    }
    model, data = groups["model"], groups["data"]
    foreign = {name for name in ("codec", "conditioner") if _is_foreign(model.get(name))}
    named = _mapping(model.get("network")).get("class_path")
    described = checkpoint_config(checkpoint, foreign, named)
    trainer = _mapping(saved.get("trainer"))
    return {
        "model": {**model, **described["model"], "watch": None},
        "data": {**data, **described["data"], **_batch_of_a_rank(checkpoint, data)},
        "metrics": groups["metrics"],
        "trainer": {
            **{name: trainer[name] for name in _KEPT_OF_TRAINER if name in trainer},
            "devices": 1,
            "default_root_dir": str(run),
        },
    }


def decisive_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the values of a validation besides the checkpoint, by name.

    Args:
        config: All settings of validate, by group.
    """
    groups = {**_SAMPLES, **({} if config["metrics"]["captions"] is None else _OF_IMAGES)}
    chosen = {g: {name: config[g][name] for name in names} for g, names in groups.items()}
    chosen["trainer"]["precision"] = config["trainer"]["precision"]
    return flat(chosen)


def keeps_samples(names: Iterable[str]) -> bool:
    """Whether validation with other values of these settings has the samples of the run.

    Args:
        names: Names with dots, such as "data.val".
    """
    decisive = {f"{group}.{name}" for group, named in _SAMPLES.items() for name in named}
    return not decisive & {".".join(name.split(".")[:2]) for name in names}


def _batch_of_a_rank(checkpoint: Path, data: Mapping[str, Any]) -> dict[str, int]:
    """Return the setting by which one device validates the batches that a rank of the run does."""
    facts: Mapping[str, Any] = {}
    with suppress(ValueError):  # a file that the run goes on without, too
        facts = read_run_facts(checkpoint.parent) or {}
    history, size = facts.get("history"), facts.get("batch_size")
    last = _mapping(history[-1]) if isinstance(history, list) and history else {}
    ranks = last.get("ranks")
    if type(ranks) is not int or type(size) is not int or ranks < 2:
        return {}
    if data.get("max_batch_size_per_device") is not None:
        return {}
    return {"max_batch_size_per_device": max(1, size // ranks)}


def _is_foreign(part: Any) -> bool:
    """Whether the class of a part is that of another package."""
    name = _mapping(part).get("class_path")
    return isinstance(name, str) and "." in name and not name.startswith("zsnr.")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
