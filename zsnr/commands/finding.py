"""The command that a command line names, and the help that lists the commands."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zsnr.commands.parsing import UsageError
from zsnr.untrusted import clipped

_HELP = ("-h", "--help")
_MOVED = {
    "report": "`zsnr report` is no longer a command: `python -m zsnr.reports.run RUN --data DATA` "
    "writes the page of a run, and `zsnr compare models` compares checkpoints",
}


def find_command(
    arguments: Sequence[str],
    groups: Mapping[str, Mapping[str, str]],
    described: Mapping[str, str],
    find_function: Callable[[str], Callable[..., Any]],
) -> str | None:
    """Return the name of the command, such as "data index"; None where help was asked for.

    Args:
        arguments: The command line.
        groups: Names of commands by the heading of their group.
        described: What some commands do, in a sentence.
        find_function: Finds the function of every other command.

    Raises:
        UsageError: There is no such command.
    """
    names = [name for group in groups.values() for name in group]
    first, second = [*arguments, "", ""][:2]
    inner = {name.split()[1]: name for name in names if name.startswith(f"{first} ")}
    if first in names:
        return first
    if f"{first} {second}" in names:
        return f"{first} {second}"
    if first == "--version":
        from zsnr import __version__

        print(f"zsnr {__version__}")
        return None
    if first in _HELP or (inner and second in _HELP):
        listed = {
            title: {
                name: described.get(name) or _summary(find_function(name))
                for name in group
                if not inner or name.startswith(f"{first} ")
            }
            for title, group in groups.items()
        }
        print(_help(f"zsnr {first}" if inner else "zsnr", listed))
        return None
    if inner:
        _refuse_subcommand(first, second, inner)
    if first in _MOVED:
        raise UsageError(_MOVED[first])
    see = "`zsnr --help` lists the commands"
    if not first:
        raise UsageError(f"a command is missing; {see}")
    whole = {name: name for name in names}
    parts = {name.split()[0]: name.split()[0] for name in names}
    parts |= {name.split()[-1]: name for name in names}
    near = _meant(f"{first} {second}", whole, 0.8) or _meant(first, whole | parts)
    raise UsageError(f"unknown command {clipped(first)}{near or f'; {see}'}")


def _meant(typed: str, commands: Mapping[str, str], cutoff: float = 0.6) -> str:
    """Suggest the command that is probably meant, from what people may write for each."""
    near = difflib.get_close_matches(typed, commands, n=1, cutoff=cutoff)
    return f"; did you mean `zsnr {commands[near[0]]}`?" if near else ""


def _refuse_subcommand(first: str, second: str, inner: Mapping[str, str]) -> None:
    near = "" if second.startswith("--oracle") else _meant(second, inner)
    if first == "compare" and second and not near:
        form = "oracle DATA" if second.startswith("--oracle") else "models MODEL MODEL"
        raise UsageError(f"`zsnr compare` has two forms: write `zsnr compare {form} -o PAGE`")
    if not second:
        raise UsageError(f"`zsnr {first}` needs one of: {', '.join(inner)}")
    known = near or f"; `zsnr {first}` has: {', '.join(inner)}"
    raise UsageError(f"unknown command {first} {clipped(second)}{known}")


def _summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _help(program: str, groups: Mapping[str, Mapping[str, str]]) -> str:
    lines = [f"usage: {program} COMMAND ..."]
    if program == "zsnr":
        lines += ["", "Train and sample latent diffusion models with zero terminal SNR."]
    width = max(len(name) for group in groups.values() for name in group)
    for title, commands in groups.items():
        if commands:
            lines += ["", f"{title}:"]
            lines += [f"  {name:{width}}  {text}" for name, text in commands.items()]
    lines += ["", f"`{program} COMMAND --help` explains every option of a command."]
    if program == "zsnr":
        lines += [
            "`zsnr --version` prints the version. After an error of one line, ZSNR_TRACEBACK=1",
            "shows where it came from.",
        ]
    return "\n".join(lines)
