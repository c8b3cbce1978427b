"""The parts of the site that are generated from the code: a hook of mkdocs.

A page holds a marker such as `<!-- generated: commands -->`, which is replaced when the site is
built. Links to benchmarks/results lead to pages that hold the same text.
"""

from __future__ import annotations

import contextlib
import html
import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
WIDTH = "92"  # columns of a command's help


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
    for name in listed(command_help()):
        text = command_help(*name.split())
        has_commands = "COMMAND" in text.splitlines()[0]
        names += [f"{name} {second}" for second in listed(text)] if has_commands else [name]
    return names


def listed(text: str) -> list[str]:
    """Find the names of commands in a help text: indented, and followed by what they do."""
    return re.findall(r"^ {2,4}([a-z][\w-]*(?: [a-z][\w-]*)?)(?: {2,}|$)", text, re.MULTILINE)


@cache
def command_help(*words: str) -> str:
    """Return what `zsnr WORDS --help` prints.

    Raises:
        ValueError: The command did not end as `--help` does.
    """
    from zsnr.cli import main

    printed, arguments = io.StringIO(), [*words, "--help"]
    try:
        with (
            contextlib.redirect_stdout(printed),
            mock.patch.dict(os.environ, COLUMNS=WIDTH),
            mock.patch.object(sys, "argv", ["zsnr", *arguments]),
        ):
            code: Any = main(arguments)
    except SystemExit as stop:
        code = stop.code
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
    from zsnr.training.lightning_cli import ZsnrCLI

    class OnlyParser(ZsnrCLI):
        """Builds the parser, and nothing that it describes."""

        def before_instantiate_classes(self) -> None:
            """Check nothing."""

        def instantiate_classes(self) -> None:
            """Make nothing."""

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # "Seed set to 0"
    tiny = str(ROOT / "configs/tiny.yaml")
    cli = OnlyParser("fit", run=False, args=["-c", tiny], save_config_callback=None)
    return [action for action in cli.parser._actions if type(action).__name__ == "ActionTypeHint"]


def type_name(annotation: Any) -> str:
    """Write a type as a reader would: names without modules, choices as they are."""
    if annotation is type(None):
        return "`null`"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(type_name(one) for one in arguments))
    if origin is not None and origin is not Annotated:
        if getattr(origin, "__name__", "") == "Callable":
            return "class"
        inner = ", ".join(type_name(one) for one in arguments if one is not ...)
        return f"{getattr(origin, '__name__', origin)} of {inner}"
    name = f"`{getattr(annotation, '__name__', annotation)}`"
    module = str(getattr(annotation, "__module__", ""))
    described = module.startswith("zsnr.")  # in reference/python.md, or the strict build fails
    return f"[{name}][{module}.{annotation.__qualname__}]" if described else name


def configuration() -> str:
    """Write the settings of `zsnr fit` by group: name, type and default, then the help."""
    groups: dict[str, list[str]] = {}
    for action in fit_settings():
        group, _, rest = action.dest.partition(".")
        if not rest or "SUPPRESS" in f"{action.default} {action.help}":
            continue
        shown = "required" if action.required else f"default `{default_text(action.default)}`"
        text = " ".join(str(action.help or "").split()).replace("%%", "%")
        groups.setdefault(group, []).append(
            f"`{action.dest}` · {type_name(getattr(action, '_typehint', None))} · {shown}\n"
            f":   {html.escape(text, quote=False) or 'See the class.'}\n"
        )
    return "\n".join(f"## {group}\n\n" + "\n".join(rows) for group, rows in groups.items())


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
    rows = [row("results", "date", "commit", "command"), "|---|---|---|---|"]
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
                commit[1] if commit else added_by(path),
                f"`{command[1]}`",
            )
        )
    return "\n".join(rows)


def added_by(path: Path) -> str:
    """Name the commit that last changed a file; "-" outside of a clone."""
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", str(path)]
    try:
        answer = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "-"
    return answer.stdout.strip() or "-"


def functions() -> str:
    """Name the function behind every command that is a file of zsnr/commands/."""
    names = [name.replace(" ", "_") for name in command_names()]
    files = [name for name in names if (ROOT / f"zsnr/commands/{name}.py").is_file()]
    return "\n".join(f"::: zsnr.commands.{name}.{name}" for name in files)


def tags() -> str:
    """Write the table of TensorBoard's tags."""
    from zsnr.training.tags import tag_table

    return tag_table()


GENERATORS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "configuration": configuration,
    "benchmarks": benchmarks,
    "functions": functions,
    "tags": tags,
}
