"""The parts of the site that are generated from the code: a hook of mkdocs.

A page holds a marker such as `<!-- generated: commands -->`, which is replaced when the site is
built, together with the italics below it that say so to readers of the file. Links to
benchmarks/results lead to pages that hold the same text.
"""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
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
    marker = r"<!-- generated: (\w+) -->(?:\n\*.*?\*\n(?=\n|$))?"  # with what stands in its place
    return re.sub(marker, lambda found: GENERATORS[found[1]]() + "\n", markdown, flags=re.DOTALL)


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


def type_name(annotation: Any) -> str:
    """Write a type as a reader would: names without modules, choices as they are."""
    if annotation is type(None):
        return "`null`"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        options = (option for one in arguments for option in type_name(one).split(" or "))
        return " or ".join(dict.fromkeys(options))
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
    """Write the settings of `zsnr fit` by group, as `zsnr fit --help GROUP` describes them."""
    from zsnr.training.help import GROUP_TEXTS, describe_settings

    sections = []
    for group, about in GROUP_TEXTS.items():
        sections.append(f"## {group}\n\n{about}\n")
        for setting in describe_settings(group):
            default = {"": "required", None: "settings by name"}.get(
                setting.default, f"default `{setting.default}`"
            )
            sections.append(
                f"`{group}.{setting.name}` · {type_name(setting.hint)} · {default}\n"
                f":   {html.escape(setting.text, quote=False) or 'See the class.'}\n"
            )
    return "\n".join(sections)


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
    "nothing": lambda: "",
}
