"""How far a run is, from the files in its folder."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from zsnr.progress import duration

State = Literal["running", "finished", "stopped", "silent"]

_MOST_TAIL = 1 << 16  # bytes of the end of a log
_MOST_LINES = 1 << 26  # bytes of a file whose lines are counted
_WAITING = 60.0  # seconds without progress that are worth a word


@dataclass(frozen=True)
class RankStatus:
    """What one process of a run has last said of itself.

    Args:
        rank: Its rank.
        host: The host that it runs on.
        pid: Its process id there.
        step: Optimizer steps it has done.
        doing: What it was doing.
        waited: Seconds it had been doing that.
        written: When it said so, UTC.
    """

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    waited: float
    written: str


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Args:
        run: Folder of the run.
        state: "running"; "finished", if it has done all its steps; "stopped", if it has ended
            earlier and can be resumed; or "silent", if its process is gone without a word.
        since: When it was last heard of, UTC. None = never.
        step: Optimizer steps done.
        max_steps: Optimizer steps of the whole run. None = not known.
        loss: The last training loss in the logs.
        val_loss: The last validation loss in the logs.
        images_per_second: The last throughput in the logs, over all devices.
        seconds_left: Time left at that throughput. None = not known, or not running.
        checkpoint: Path of the newest checkpoint.
        checkpoint_age: Seconds since it was written. None = not known.
        skipped_steps: Steps that were skipped because loss or gradient was not finite.
        faults: Number of faults of data and storage, by kind.
        ranks: What each process has last said of itself.
        notes: What else is worth a look.
    """

    run: str
    state: State
    since: str | None
    step: int
    max_steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint: str | None = None
    checkpoint_age: float | None = None
    skipped_steps: int = 0
    faults: Mapping[str, int] = field(default_factory=dict)
    ranks: tuple[RankStatus, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return it as a JSON object; a number that is not finite is null."""
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }
        return json.dumps(values)

    def to_text(self) -> str:
        """Return it as a few lines."""
        state = f"{self.state} since {self.since}" if self.state == "silent" else self.state
        total = "" if self.max_steps is None else f" of {self.max_steps}"
        share = f" ({self.step / self.max_steps:.0%})" if self.max_steps else ""
        speed = "unknown"
        if self.images_per_second is not None:
            speed = f"{self.images_per_second:.3g} images/s"
        left = None if self.seconds_left is None else duration(self.seconds_left)
        checkpoint = "none"
        if self.checkpoint is not None:
            checkpoint = self.checkpoint
            if self.checkpoint_age is not None:
                checkpoint += f", written {duration(self.checkpoint_age)} ago"
        faults = ", ".join(f"{count} {kind}" for kind, count in self.faults.items())
        rows = [
            ("run", self.run),
            ("state", state),
            ("step", f"{self.step}{total}{share}"),
            ("loss", _number(self.loss)),
            ("validation loss", None if self.val_loss is None else _number(self.val_loss)),
            ("speed", speed),
            ("time left", left),
            ("last checkpoint", checkpoint),
            ("skipped steps", str(self.skipped_steps)),
            ("faults", faults or "none"),
        ]
        lines = [f"{name + ':':18}{value}" for name, value in rows if value is not None]
        lines += [f"{'note:':18}{note}" for note in self.notes]
        return "\n".join(lines)


def read_status(run: str | Path) -> Status:
    """Read how far a run is.

    Args:
        run: Folder of the run, its folder of checkpoints, or a checkpoint in that.

    Raises:
        ValueError: The folder is not one of a run.
    """
    folder = run_of(Path(run).expanduser())
    config = read_run_config(folder)
    checkpoints = checkpoints_of_run(folder, config)
    facts = _facts(checkpoints)
    ranks = tuple(_heartbeats(folder))
    newest = _newest_checkpoint(checkpoints)
    if not ranks and not facts and not config and newest is None:
        raise ValueError(
            f"{run} is not the folder of a run: it has no heartbeats, no checkpoints/run.json and "
            "no run_config.yaml. Wanted what trainer.default_root_dir was."
        )
    logs = _metrics(folder)
    max_steps = _plain(config.get("trainer"), "max_steps", int)
    steps = [rank.step for rank in ranks[:1]]
    steps += [int(logs["step"]) + 1] if math.isfinite(logs.get("step", math.nan)) else []
    steps += [newest[0]] if newest is not None else []
    step = max(steps, default=_plain(facts, "global_step", int) or 0)
    state, notes = _state(checkpoints, ranks, step, max_steps)
    rate, batch = logs.get("train/images_per_second"), _plain(facts, "batch_size", int)
    batch = batch or _plain(config.get("data"), "batch_size", int)
    left = None
    if state == "running" and batch and max_steps is not None and rate and 0 < rate < math.inf:
        left = max(0, max_steps - step) * max(0, batch) / rate
    return Status(
        run=str(folder),
        state=state,
        since=max((rank.written for rank in ranks), default=None),
        step=step,
        max_steps=max_steps if max_steps is None or max_steps > 0 else None,
        loss=logs.get("train/loss"),
        val_loss=logs.get("val/loss"),
        images_per_second=rate,
        seconds_left=left,
        checkpoint=None if newest is None else str(newest[1]),
        checkpoint_age=None if newest is None else _age(newest[1]),
        skipped_steps=sum(1 for _ in _lines(folder / "skipped_steps.jsonl")),
        faults=_faults(folder),
        ranks=ranks,
        notes=(*notes, *_hung(folder)),
    )


def run_of(path: Path) -> Path:
    """Return the run's folder, also for its folder of checkpoints or a checkpoint in that."""
    for folder in (path, path.parent):
        if folder.absolute().name == "checkpoints":
            return folder.parent if folder.name else folder.absolute().parent
    return path


def _state(
    checkpoints: Path, ranks: tuple[RankStatus, ...], step: int, max_steps: int | None
) -> tuple[State, list[str]]:
    from zsnr.locks import LOCK, lock_owner

    held = lock_owner(checkpoints / LOCK)
    if held is not None and held[1]:
        notes = []
        slow = max(ranks, key=lambda rank: rank.waited, default=None)
        if slow is not None and slow.waited > _WAITING:
            notes.append(
                f"rank {slow.rank} on {slow.host} has made no progress for {slow.waited:.0f} s: it "
                f"{slow.doing}"
            )
        return "running", notes
    if max_steps is not None and 0 < max_steps <= step:
        return "finished", []
    if held is not None:
        owner = held[0]
        return "silent", [
            f"the process {owner.pid} on {owner.host} is gone without having ended the run: start "
            "it again with --ckpt_path last"
        ]
    return "stopped", ["the same command with --ckpt_path last resumes it"]


def _heartbeats(folder: Path) -> Iterator[RankStatus]:
    from zsnr.untrusted import printable, read_json

    for path in sorted((folder / "heartbeats").glob("rank-*.json")):
        try:
            beat = read_json(path)
            waited = float(beat["waited"])
            yield RankStatus(
                rank=int(beat["rank"]),
                host=printable(str(beat["host"])[:100], one_line=True),
                pid=int(beat["pid"]),
                step=int(beat["step"]),
                doing=printable(str(beat["doing"])[:200], one_line=True),
                waited=waited if math.isfinite(waited) else 0.0,
                written=printable(str(beat["written"])[:40], one_line=True),
            )
        except (ValueError, OSError, KeyError, TypeError, OverflowError):
            continue  # a heartbeat that is just being replaced, or of another version


def _hung(folder: Path) -> list[str]:
    reports = sorted((folder / "heartbeats").glob("rank-*.hung"))
    return [f"a process hung and was ended; {path} says where" for path in reports[:3]]


def read_run_config(folder: Path) -> dict[str, Any]:
    """Read the newest run_config.yaml, in the folder of the run or beside its logs.

    Those of runs inside the folder are left out.
    """
    from zsnr.untrusted import read_yaml

    found = (
        path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}run_config.yaml")
    )
    files = [path for path in found if not _is_of_an_inner_run(folder, path)]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            values = read_yaml(path)
        except (ValueError, OSError):
            continue
        if isinstance(values, dict):
            return values
    return {}


def _is_of_an_inner_run(folder: Path, path: Path) -> bool:
    inside = [parent for parent in path.parents if folder in parent.parents]
    return any((parent / "checkpoints").exists() for parent in inside)


def checkpoints_of_run(folder: Path, config: Mapping[str, Any] | None = None) -> Path:
    """Return the folder of a run's checkpoints, which its configuration may name.

    Args:
        folder: Folder of the run.
        config: Its configuration. None = it is read.
    """
    config = read_run_config(folder) if config is None else config
    dirpath = _plain(config.get("checkpoint"), "dirpath", str)
    return folder / "checkpoints" if dirpath is None else Path(dirpath)


def _facts(checkpoints: Path) -> dict[str, Any]:
    from zsnr.checkpoints.run_facts import read_run_facts

    try:
        return read_run_facts(checkpoints) or {}
    except (ValueError, OSError):
        return {}


def _newest_checkpoint(checkpoints: Path) -> tuple[int, Path] | None:
    """Return the step and path of the newest checkpoint."""
    numbered = [
        (int(path.stem.removeprefix("step-")), path)
        for path in checkpoints.glob("step-*.ckpt")
        if path.stem.removeprefix("step-").isdecimal()
    ]
    return max(numbered, default=None)


def _age(path: Path) -> float | None:
    """Return the seconds since a checkpoint was written; None if it has been removed meanwhile."""
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _metrics(folder: Path) -> dict[str, float]:
    """Read the last value of each column of the newest metrics.csv that training wrote."""
    files = [*folder.glob("metrics/*/metrics.csv"), *folder.glob("*/*/metrics.csv")]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        header, *rows = _ends(path)
        if "train/loss" not in header:
            continue
        names = next(csv.reader([header]), [])
        last: dict[str, float] = {}
        for row in csv.reader(rows):
            if len(row) == len(names):
                last |= {
                    name: _float(value) for name, value in zip(names, row, strict=True) if value
                }
        return last
    return {}


def _ends(path: Path) -> list[str]:
    """Return the first line of a file, and the last lines of it that are complete."""
    try:
        with open(path, "rb") as file:
            header = file.readline(_MOST_TAIL)
            start = max(len(header), os.fstat(file.fileno()).st_size - _MOST_TAIL)
            file.seek(start)
            lines = file.read(_MOST_TAIL).decode(errors="replace").splitlines(keepends=True)
    except OSError:
        return [""]
    whole = [line.rstrip("\r\n") for line in lines if line.endswith("\n")]
    return [header.decode(errors="replace").strip(), *whole[start > len(header) :]]


def _faults(folder: Path) -> dict[str, int]:
    kinds: Counter[str] = Counter()
    for path in sorted((folder / "faults").glob("rank-*.jsonl")):
        for line in _lines(path):
            try:
                kind = json.loads(line).get("kind")
            except (ValueError, AttributeError, RecursionError):
                continue
            if isinstance(kind, str) and kind.isidentifier():
                kinds[kind] += 1
    return dict(kinds)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            yield from file.read(_MOST_LINES).splitlines()
    except OSError:
        return


def _plain(values: Any, name: str, kind: type[Any]) -> Any:
    """Return a value of a mapping, if both are what they should be."""
    value = values.get(name) if isinstance(values, Mapping) else None
    return value if type(value) is kind else None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
