"""Snapshots of averaged weights beside the checkpoints of a run, and averages made of them.

A snapshot is a checkpoint in the folder `snapshots` without the state of training: its weights are
the power-function averages post_hoc.0.*, post_hoc.1.*, ..., and as trained.* what is not averaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zsnr.checkpoints import sharded
from zsnr.checkpoints.opening import KEY, open_checkpoint
from zsnr.checkpoints.remote import fetch_snapshots, is_address
from zsnr.checkpoints.run_folder import checkpoints_of, step_of, steps
from zsnr.power_average import Average, Combination, check_sigma_rel
from zsnr.progress import progress_bar
from zsnr.public import public_url
from zsnr.untrusted import near_path, shown

FOLDER = "snapshots"
PREFIX = "post_hoc."
AVERAGES = "post_hoc_ema"
"""The entry of a checkpoint that says which averages it holds: their sigma_rel, and their end."""

_OF_TRAINING = (AVERAGES, "callbacks", "loops", "lr_schedulers", "optimizer_states", "state_dict")


def snapshot_of(checkpoint: Mapping[str, Any], averaged: Collection[str]) -> dict[str, Any]:
    """Return the part of a checkpoint that a snapshot holds.

    Args:
        checkpoint: A checkpoint whose state has power-function averages.
        averaged: Names of the weights that are averaged, without a prefix.
    """
    kept = {}
    for name, tensor in checkpoint["state_dict"].items():
        if name.startswith(PREFIX):
            is_kept = name.removeprefix(PREFIX).partition(".")[2] in averaged
        else:
            group, _, rest = name.partition(".")
            is_kept = group == "trained" and rest not in averaged
        if is_kept:
            kept[name] = tensor
    rest = {name: value for name, value in checkpoint.items() if name not in _OF_TRAINING}
    return {**rest, AVERAGES: checkpoint[AVERAGES], "state_dict": kept}


def is_snapshot(checkpoint: Mapping[str, Any]) -> bool:
    """Whether an opened checkpoint is a snapshot."""
    return AVERAGES in checkpoint and not can_resume(checkpoint)


def can_resume(checkpoint: Mapping[str, Any]) -> bool:
    """Whether an opened checkpoint has the state of training, and not weights alone."""
    return "loops" in checkpoint


def check_can_resume(name: str, checkpoint: Mapping[str, Any]) -> None:
    """Refuse weights alone where a run is to be resumed.

    Raises:
        ValueError: The opened checkpoint has no state of training.
    """
    if not can_resume(checkpoint):
        raise ValueError(
            f"{name} holds weights alone, so that no run resumes from it: write them with `zsnr "
            "export`, and start a new run from them with --model.network FOLDER."
        )


def refuse_snapshot(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a snapshot where a model is wanted.

    Raises:
        ValueError: The opened checkpoint is a snapshot.
    """
    if is_snapshot(checkpoint):
        raise ValueError(
            f"{path} is a snapshot of averages and no model: `zsnr checkpoint average RUN "
            "--sigma-rel 0.1` makes a model from the snapshots of a run."
        )


def folder_of_run(given: Path) -> Path:
    """Return the folder of a run that was named by it, or by a folder of checkpoints in it."""
    if (given / "checkpoints" / FOLDER).is_dir():
        return given
    folder = given if given.name not in ("", "..") else given.resolve()
    if folder.name == FOLDER:
        folder = folder.parent
    return folder.parent if folder.name == "checkpoints" else folder


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A snapshot on disk.

    Args:
        path: The file or sharded folder.
        step: The optimizer step that it was written after.
        averages: The averages that it holds.
        network: Description of the network.
        mapped: The weights of a file, which stay on disk. None = of a folder of shards, which are
            read when they are needed.
    """

    path: Path
    step: int
    averages: tuple[Average, ...]
    network: Any
    mapped: Mapping[str, Tensor] | None

    def weights(self, number: int) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the weights of one of the averages, without a prefix."""
        return self._weights(f"{PREFIX}{number}.")

    def not_averaged(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the weights that are not averaged, such as frozen ones."""
        return self._weights("trained.")

    def _weights(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        start, weights = prefix, self.mapped
        if weights is None:
            start = f"state_dict/{prefix}"
            weights = sharded.read_tensors(self.path, start)
        for name, weight in weights.items():
            if name.startswith(start):
                yield name.removeprefix(start), weight


def find_snapshots(run: str | Path) -> list[Snapshot]:
    """Open the snapshots of a run, the newest last; those that are damaged are warned of.

    Args:
        run: Folder of the run, of its checkpoints, or of the snapshots; or its address in object
            storage.

    Raises:
        ValueError: There are none, none can be read, or they are of several networks.
    """
    if is_address(run):
        paths = fetch_snapshots(str(run).rstrip("/").removesuffix(f"/{FOLDER}"), FOLDER)
    else:
        paths = _listed(Path(run))
    if not paths:
        raise ValueError(f"{public_url(str(run))} has no snapshots: {_why_none(run)}")
    snapshots, problems = [], []
    for path in paths:
        try:
            snapshots.append(_open(path))
        except ValueError as error:
            problems.append(str(error))
    if not snapshots:
        raise ValueError(f"No snapshot in {paths[0].parent} can be read: {problems[0]}")
    for problem in problems:
        warnings.warn(f"{problem} The averages are made without it.", stacklevel=2)
    others = [each.path for each in snapshots if each.network != snapshots[-1].network]
    if others:
        raise ValueError(
            f"{others[0]} and {snapshots[-1].path} describe different networks: remove the "
            "snapshots that are of another run."
        )
    return snapshots


def _why_none(run: str | Path) -> str:
    """Say why a run has no snapshots, by its newest checkpoint."""
    checkpoints = [] if is_address(run) else checkpoints_of(Path(run))
    try:
        averages = open_checkpoint(checkpoints[-1]).get(AVERAGES) if checkpoints else None
    except ValueError:
        averages = None
    if averages is None:
        return (
            "they are written beside the checkpoints of a run that is trained with "
            "model.post_hoc_ema, as in --model.post_hoc_ema.every_n_steps 5."
        )
    if averages == {**averages, "end": 0}:
        return (
            f"{checkpoints[-1].name} is of a step before the first update of its averages. Train "
            "longer, or with a smaller model.post_hoc_ema.every_n_steps."
        )
    return "it was trained with model.post_hoc_ema, but they were removed or not written."


def _listed(run: Path) -> list[Path]:
    if run.is_file() or sharded.is_sharded(run):
        raise ValueError(
            f"{run} is one checkpoint or snapshot: wanted the folder of the run, such as "
            f"{folder_of_run(run.parent)}."
        )
    if not run.is_dir():
        raise ValueError(f"{run} is not a folder: wanted that of a run.{near_path(run)}")
    found = steps(run / "checkpoints" / FOLDER) or steps(run / FOLDER)
    return found or (steps(run) if run.resolve().name == FOLDER else [])


def _open(path: Path) -> Snapshot:
    checkpoint = open_checkpoint(path)
    said = checkpoint.get(AVERAGES)
    try:
        lengths, end = [float(each) for each in said["sigma_rel"]], said["end"]  # type: ignore[index]
        for length in lengths:
            check_sigma_rel("sigma_rel", length)
        if type(end) is not int or end < 1 or not lengths:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged: its averages are {shown(said)}, wanted their sigma_rel and end."
        ) from error
    averages = tuple(Average(length, end) for length in lengths)
    mapped = None if sharded.is_sharded(path) else checkpoint["state_dict"]
    return Snapshot(path, step_of(path), averages, checkpoint[KEY]["network"], mapped)


def averaged_checkpoint(
    snapshots: Sequence[Snapshot],
    combination: Combination,
    wanted: Average,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Make the checkpoint of an average of another length.

    Snapshots are read one after the other; the sum is in float64.

    Args:
        snapshots: Snapshots to combine; what is not averaged is that of the last one.
        combination: Coefficients of all their averages, in order.
        wanted: The average that they make.
        progress: Whether to show progress on stderr.

    Returns:
        A checkpoint whose weights are averaged; a run cannot resume from it.

    Raises:
        ValueError: A snapshot is damaged, or belongs to another model.
    """
    coefficients = iter(combination.coefficients)
    total: dict[str, Tensor] = {}
    bar = progress_bar(
        len(snapshots), f"sigma_rel {wanted.sigma_rel}", "snapshot", show=progress, delay=1.0
    )
    with bar:
        for snapshot in snapshots:
            for number, _ in enumerate(snapshot.averages):
                coefficient = next(coefficients)
                if coefficient:
                    _add(total, snapshot, number, coefficient)
            bar.update()
    weights = {f"trained.{name}": weight for name, weight in snapshots[-1].not_averaged()}
    for name in [*total]:
        weights[f"trained.{name}"] = total.pop(name).float()
    newest = open_checkpoint(snapshots[-1].path)
    run = newest.get("run")
    facts = {
        "sigma_rel": wanted.sigma_rel,
        "step": snapshots[-1].step,
        "end": wanted.end,
        "snapshots": len(snapshots),
        "residual": combination.residual,
    }
    return {
        **{name: value for name, value in newest.items() if name not in _OF_TRAINING},
        "run": {
            **(run if isinstance(run, dict) else {}),
            "ema": None,
            "averaged": facts,
            "metrics": {},  # they are of other weights
        },
        "state_dict": weights,
    }


def _add(total: dict[str, Tensor], snapshot: Snapshot, number: int, coefficient: float) -> None:
    """Add one average times a coefficient to the sum.

    Raises:
        ValueError: It has other weights than the sum.
    """
    before, count = len(total), 0
    for name, weight in snapshot.weights(number):
        count += 1
        if not before:
            total[name] = weight.double() * coefficient
        elif name in total and total[name].shape == weight.shape:
            total[name].add_(weight, alpha=coefficient)
        else:
            raise ValueError(f"{snapshot.path} belongs to another model: it has {shown(name)}.")
    if count != len(total) or not count:
        raise ValueError(f"{snapshot.path} is damaged: it lacks averaged weights.")
