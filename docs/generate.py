"""The parts of the site that are generated from the code: a hook of mkdocs.

A page holds a marker such as `<!-- generated: commands -->`, which is replaced when the site is
built. Links to benchmarks/results lead to pages that hold the same text.
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
WIDTH = "96"  # columns of a command's help


def on_files(files: Any, config: Any) -> Any:
    """Add every file of benchmarks/results to the site."""
    from mkdocs.structure.files import File, InclusionLevel

    for path in sorted(RESULTS.iterdir()):
        if path.suffix in (".md", ".png", ".jsonl"):
            files.append(
                File.generated(
                    config,
                    f"benchmarks/{path.name}",
                    content=path.read_bytes(),
                    inclusion=InclusionLevel.NOT_IN_NAV,
                )
            )
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace markers, and turn links to benchmarks/results into links to pages of the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+benchmarks/results/", f"]({up}benchmarks/", markdown)
    return re.sub(r"<!-- generated: (\w+) -->", lambda marker: GENERATORS[marker[1]](), markdown)


def command_names() -> list[str]:
    """List every command, with its subcommand where it has some, as the command line says."""
    names = []
    for name in subcommands(command_help()):
        inner = subcommands(command_help(name))
        names += [f"{name} {second}" for second in inner] or [name]
    return names


def subcommands(text: str) -> list[str]:
    """Find the names under the heading of subcommands in a help text."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.strip() in ("COMMAND", "Available subcommands:"):
            break
    names = (re.match(r" {4}([a-z][\w-]*)(?: |$)", line) for line in lines)
    return [name[1] for name in names if name]


def command_help(*words: str) -> str:
    """Return what `zsnr WORDS --help` prints.

    Raises:
        ValueError: The command did not end as `--help` does.
    """
    from zsnr.cli import main

    printed = io.StringIO()
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), WIDTH
    try:
        with contextlib.redirect_stdout(printed):
            code: Any = main([*words, "--help"])
    except SystemExit as stop:
        code = stop.code
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    if code not in (0, None):
        raise ValueError(f"zsnr {' '.join(words)} --help ended with exit code {code}.")
    return printed.getvalue()


def commands() -> str:
    """Write one section a command: its `--help`."""
    sections = []
    for name in command_names():
        text = command_help(*name.split()).strip()
        sections.append(f"## zsnr {name}\n\n```text\n{text}\n```\n")
    return "\n".join(sections)


def fit_settings() -> list[Any]:
    """List the actions of the parser of `zsnr fit`, one a setting."""
    from zsnr.training.data import DataModule
    from zsnr.training.lightning_cli import ZsnrCLI
    from zsnr.training.module import LatentDiffusion

    class OnlyParser(ZsnrCLI):
        """Builds the parser, and nothing that it describes."""

        def before_instantiate_classes(self) -> None:
            """Check nothing."""

        def instantiate_classes(self) -> None:
            """Make nothing."""

    tiny = str(ROOT / "configs/tiny.yaml")
    cli = OnlyParser(
        LatentDiffusion, DataModule, run=False, args=["-c", tiny], save_config_callback=None
    )
    return [action for action in cli.parser._actions if type(action).__name__ == "ActionTypeHint"]


def type_name(action: Any) -> str:
    """Write a setting's type as a reader would: names without modules, choices as they are."""
    text = str(getattr(action, "_typehint", "") or "")
    text = re.sub(r"<class '(.*)'>", r"\1", text)
    text = re.sub(r"(?:typing|collections\.abc)\.", "", text)
    if choices := re.findall(r"'([^']+)'", text):
        return " or ".join(f"`{choice}`" for choice in choices)
    return f"`{re.sub(r'[a-z_]+[.](?=[A-Za-z_])', '', text)}`"


def configuration() -> str:
    """Write one table a group of settings of `zsnr fit`: name, type, default and help."""
    groups: dict[str, list[str]] = {}
    for action in fit_settings():
        group, _, rest = action.dest.partition(".")
        default = action.default
        if not rest or default == "==SUPPRESS==" or "SUPPRESS" in str(action.help):
            continue
        shown = "required" if action.required else f"`{default_text(default)}`"
        text = " ".join(str(action.help or "").split()).replace("%%", "%")
        cells = f"`{action.dest}`", type_name(action), shown, html.escape(text, quote=False)
        groups.setdefault(group, []).append(row(*cells))
    head = row("setting", "type", "default", "what it does") + "\n|---|---|---|---|"
    return "\n\n".join(
        f"## {group}\n\n{head}\n" + "\n".join(rows) for group, rows in groups.items()
    )


def default_text(value: Any) -> str:
    """Write a default as YAML would."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict):
        return ", ".join(f"{name}: {default_text(one)}" for name, one in value.items())
    if is_dataclass(value):
        return default_text({f.name: getattr(value, f.name) for f in fields(value) if f.init})
    return getattr(value, "__name__", str(value))


def row(*cells: str) -> str:
    """Write one row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def benchmarks() -> str:
    """Write a table over benchmarks/results: date, commit and command, as each file says.

    Raises:
        ValueError: A file of results does not say its date or the command that made it.
    """
    rows = [row("results", "date", "commit", "made by"), "|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = re.search(r"^# (.+)", text)
        day = re.search(r"^(\d{4}-\d\d-\d\d)", text, re.MULTILINE)
        command = re.search(r"[Mm]ade by `([^`]+)`", text)
        commit = re.search(r"commit ([0-9a-f]{7,40})", text)
        if not (title and day and command):
            raise ValueError(f"{path} does not say its title, date and command in its first lines.")
        rows.append(
            row(
                f"[{title[1]}](../benchmarks/{path.name})",
                day[1],
                commit[1] if commit else "not recorded",
                f"`{command[1]}`",
            )
        )
    return "\n".join(rows)


GENERATORS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "configuration": configuration,
    "benchmarks": benchmarks,
}
