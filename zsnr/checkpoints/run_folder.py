"""The folder of a run: where its checkpoints are, and which is the newest."""

from __future__ import annotations

from pathlib import Path


def steps(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, the newest last."""
    return sorted(folder.glob("step-*.ckpt"), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint; -1 if there is none."""
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def resolve_model(source: str | Path) -> str:
    """Return the checkpoint that is meant where a model's name is the folder of a run.

    That is the newest one in the folder `checkpoints` of the run, or in the folder itself. Every
    other name (a file, a diffusers folder, a hub id) is returned as it is, but for `~`.
    """
    name = str(source)
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    if path.is_dir() and path.suffix != ".ckpt":
        for folder in (path / "checkpoints", path):
            newest = [folder / "last.ckpt"] * (folder / "last.ckpt").exists() + steps(folder)
            if newest:
                return str(newest[-1])
    return str(path) if name.startswith("~") else name


def check_model(source: str) -> None:
    """Refuse the name of a model that is neither a path that exists nor a hub id.

    Raises:
        ValueError: It is so.
    """
    hub_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if not (hub_id or Path(source).expanduser().exists()):
        raise ValueError(
            f"{source} does not exist: wanted a checkpoint, folder, single file or hub id."
        )
