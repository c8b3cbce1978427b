"""The folder of a run: where its checkpoints are, and which of them the folder stands for.

Every command finds the newest checkpoint here: `resolve_model` for a model that is named by the
folder of its run (sample, compare, figure, export; and `--ckpt_path` of fit, validate, test and
predict), `find_last` for `--ckpt_path last` and for a run that is restarted. Two differ on purpose:

- `fit --ckpt_path last` starts from scratch where there is no checkpoint, so that the same command
  can begin a run and resume it. A folder that is named must hold one.
- `zsnr doctor` opens no checkpoint unless it is told to, so it takes the newest by name, even if
  that one is damaged; see `checkpoints_of`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from zsnr.agreement import is_first_process
from zsnr.checkpoints.opening import open_checkpoint
from zsnr.checkpoints.remote import fetch_checkpoint, is_address
from zsnr.checkpoints.sharded import is_sharded
from zsnr.untrusted import near_path
from zsnr.weights.source import is_local


def steps(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, the newest last."""
    return sorted(folder.glob("step-*.ckpt"), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint; -1 if there is none."""
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def checkpoints_of(folder: Path) -> list[Path]:
    """List the checkpoints of a run by their names, the newest last; opens none.

    They are those in its folder `checkpoints`, or else in the folder itself. `last.ckpt`, which
    training makes a link to the newest, counts only where it is something else, and as the oldest.
    """
    for place in (folder / "checkpoints", folder):
        checkpoints, last = steps(place), place / "last.ckpt"
        if last.exists() and last.resolve() not in [path.resolve() for path in checkpoints]:
            checkpoints.insert(0, last)
        if checkpoints:
            return checkpoints
    return []


def find_last(folder: Path) -> Path | None:
    """Find the newest checkpoint that can be read; None if the folder has no checkpoints.

    Args:
        folder: The folder of a run, or of its checkpoints.

    Raises:
        ValueError: The folder has checkpoints, but none can be read.
    """
    problems = []
    for path in reversed(checkpoints_of(folder)):
        try:
            open_checkpoint(path)
        except ValueError as error:
            problems.append(str(error))
            if is_first_process():
                warnings.warn(f"{error} Looking for an earlier one.", stacklevel=2)
        else:
            return path
    if problems:
        raise ValueError(f"No checkpoint in {folder} can be read: {problems[0]}")
    return None


def is_checkpoint(source: str | Path) -> bool:
    """Whether a model's name is that of a checkpoint of this package, a file or sharded folder."""
    return Path(source).suffix == ".ckpt" or is_sharded(source)


def resolve_model(source: str | Path) -> str:
    """Return the checkpoint that is meant where a model's name is the folder of a run.

    That is the newest one that can be read, see `find_last`. Where the name is an address, such as
    s3://bucket/run, it is a local copy, see `fetch_checkpoint`. Every other name (a checkpoint, a
    single file, a diffusers folder, a hub id) is returned as it is, but for `~`.

    Raises:
        ValueError: The folder has checkpoints, but none can be read; or there is nothing at the
            address.
    """
    name = str(source)
    if is_address(name):
        return str(fetch_checkpoint(name))
    path = Path(name).expanduser()
    if path.is_dir() and not (is_sharded(path) or (path / "model_index.json").exists()):
        newest = find_last(path)
        if newest is not None:
            return str(newest)
    return str(path) if name.startswith("~") else name


def check_model(source: str) -> None:
    """Refuse the name of a model that is neither a path that exists nor a hub id.

    Raises:
        ValueError: It is so.
    """
    hub_id = source.partition("@")[0].count("/") == 1 and not is_local(source)
    if not (hub_id or is_address(source) or Path(source).expanduser().exists()):
        raise ValueError(
            f"{source} does not exist: wanted a checkpoint, folder, single file or hub id."
            f"{near_path(Path(source).expanduser())}"
        )
