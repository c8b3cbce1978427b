"""`zsnr configs list`, `show` and `copy`: the shipped YAML."""

from __future__ import annotations

import re
import textwrap
from itertools import dropwhile, takewhile
from pathlib import Path

from zsnr.commands.parsing import suggestion


def list_configs() -> str:
    """List the shipped configurations, each with what it does.

    `zsnr configs show NAME` prints one, and `zsnr configs copy NAME` copies it.
    """
    lines = []
    for name in _names():
        indent = " " * 25
        said = textwrap.fill(
            _purpose(_find(name)), 100, initial_indent=indent, subsequent_indent=indent
        )
        lines.append(f"{name:24} {said.lstrip()}")
    return "\n".join(lines)


def _purpose(path: Path) -> str:
    """Return the first sentence of the comment at the top of a file."""
    comment = takewhile(
        lambda line: line.startswith("# "),
        dropwhile(lambda line: line.startswith("#!"), path.read_text().splitlines()),
    )
    return re.split(r"(?<=\.) ", " ".join(line[2:].strip() for line in comment))[0]


def show_config(name: str) -> str:
    """Print a shipped configuration.

    Args:
        name: A name that `zsnr configs list` prints.
    """
    return _find(name).read_text().removesuffix("\n")


def copy_config(name: str, to: str = ".") -> Path:
    """Copy a shipped configuration, to change it.

    Args:
        name: A name that `zsnr configs list` prints.
        to: A file, or a folder. Default: the current folder.
    """
    source, path = _find(name), Path(to).expanduser()
    target = path / source.name if path.is_dir() else path
    if target.exists():
        raise ValueError(f"{target} exists: choose another name.")
    if not target.parent.is_dir():
        raise ValueError(f"The folder {target.parent} does not exist.")
    target.write_text(source.read_text())
    return target


def _folder() -> Path:
    package = Path(__file__).parents[1]
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def _find(name: str) -> Path:
    path = _folder() / (name if Path(name).suffix else f"{name}.yaml")
    if not path.is_file():
        known = _names()
        near = suggestion(name, known) or f". Known: {', '.join(known)}."
        raise ValueError(f"There is no config {name!r}{near}")
    return path


def _names() -> list[str]:
    folder = _folder()
    yaml = [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")]
    return sorted(yaml) + sorted(str(p.relative_to(folder)) for p in folder.rglob("*.sbatch"))
