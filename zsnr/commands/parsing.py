"""The command line of a function: its signature gives the arguments, its docstring the help.

Parameters before `*` are positional. `Sequence[str]` as an option may be repeated; `str |
Sequence[str]` takes several values at once; `bool` is a switch; `settings` collects what is meant
for the configuration of `zsnr fit`. `--json` belongs to functions whose result has `to_json`.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
from argparse import HelpFormatter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from docstring_parser import DocstringStyle, parse
from jsonargparse import ArgumentError, ArgumentParser

from zsnr.commands.result import Printable
from zsnr.untrusted import clipped

SHORT = {"output": "-o", "config": "-c"}
_SETTINGS = "settings"
_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}


class UsageError(ValueError):
    """A command line that cannot be understood."""


def parse_arguments(
    command: str, function: Callable[..., Any], arguments: Sequence[str]
) -> tuple[dict[str, Any], bool]:
    """Read the arguments of a command.

    Args:
        command: Its name, such as "data index".
        function: What the command calls.
        arguments: The words after its name.

    Returns:
        The arguments of the function, and whether `--json` is given.

    Raises:
        UsageError: An argument is unknown, missing or has a wrong value.
        SystemExit: `--help` is given, and has been printed.
    """
    parser, hints = make_parser(command, function), get_type_hints(function)
    of_command, settings = _split(command, parser, _SETTINGS in _parameters(function), arguments)
    try:
        values = vars(parser.parse_args(of_command))
    except ArgumentError as error:
        _refuse(command, parser, hints, str(error), error)
    as_json = values.pop("json", False)
    if settings is not None:
        values[_SETTINGS] = settings
    given = {
        name: _numbers(name, value) if _kind(hints[name]) == (int, False, True) else value
        for name, value in values.items()
        if value is not None
    }
    return given, as_json


def make_parser(command: str, function: Callable[..., Any]) -> ArgumentParser:
    """Make the parser of a function's signature and docstring."""
    hints = get_type_hints(function)
    doc = parse(inspect.getdoc(function) or "", DocstringStyle.GOOGLE)
    described = {p.arg_name: p.description or "" for p in doc.params}
    parser = ArgumentParser(
        prog=f"zsnr {command}",
        description=doc.description,
        formatter_class=_Formatter,
        exit_on_error=False,
        default_env=False,
    )
    examples = [
        line for example in doc.examples for line in (example.description or "").split("\n")
    ]
    if examples:
        parser.epilog = "\n  ".join(["examples:", *map(str.strip, examples)])
    for name, parameter in _parameters(function).items():
        text = " ".join(described.get(name, "").split()).replace("%", "%%")
        if name == _SETTINGS:
            parser.epilog = f"Other options such as --data.val FOLDER: {text}"
        else:
            _add(parser, parameter, hints[name], text)
    if _returns_facts(hints):
        parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    return parser


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the nearest of the known names, else an empty text."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _Formatter(HelpFormatter):
    """Paragraphs of the description stay apart, and examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = [
            part
            if part.startswith("examples:")
            else super(_Formatter, self)._fill_text(part, width, "")
            for part in text.split("\n\n")
        ]
        return "\n\n".join(filled)


def _returns_facts(hints: dict[str, Any]) -> bool:
    kind = hints.get("return")
    return isinstance(kind, type) and issubclass(kind, Printable)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _add(parser: ArgumentParser, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    """Add the argument of one parameter."""
    name, required = parameter.name, parameter.default is parameter.empty
    default = None if required else parameter.default
    kind, several, repeated = _kind(hint)
    options: dict[str, Any] = {"help": text} | ({} if required else {"default": default})
    if default is not None and default not in ((), "") and "default" not in text.lower():
        options["help"] = f"{text} (default: {default})"
    if kind is bool and default is False:
        parser.add_argument(_flag(name), action="store_true", help=text)
        return
    options["type"] = kind
    if get_origin(kind) is not Literal:
        options["metavar"] = _METAVARS.get(kind, name.rpartition("_")[2].upper())
        if Path in get_args(hint):
            options |= {"type": str, "metavar": _METAVARS[Path]}
        elif kind is str and bool in get_args(hint):
            options["metavar"] = "true|false"
    if parameter.kind is not parameter.KEYWORD_ONLY:
        if several or repeated:
            options |= {
                "nargs": "+" if required else "*",
                "metavar": name.removesuffix("s").upper(),
            }
        elif not required:
            options["nargs"] = "?"
        parser.add_argument(name, **options)
        return
    if several:
        options["nargs"] = "+"
    elif repeated:
        # jsonargparse would check the whole list against the type of one value
        options |= {"action": "append", "default": None, "type": str}
    flags = [SHORT[name]] if name in SHORT else []
    parser.add_argument(*flags, _flag(name), required=required, **options)


def _kind(hint: Any) -> tuple[Any, bool, bool]:
    """Say of which type one value is, whether several come at once, and whether it repeats."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    members = tuple(member for member in members if member is not type(None))
    for member in members:
        if get_origin(member) is Sequence and get_args(member)[0] in (str, int):
            return get_args(member)[0], str in members, str not in members
    return (str if str in members else members[0]), False, False


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _split(
    command: str, parser: ArgumentParser, takes_settings: bool, arguments: Sequence[str]
) -> tuple[list[str], list[str] | None]:
    """Refuse unknown options, and set apart those that are settings of a configuration.

    Positional arguments may stand anywhere: argparse wants several of one kind in one place.
    """
    counts = {flag: action.nargs for action in parser._actions for flag in action.option_strings}
    options: list[str] = []
    places: list[str] = []
    settings: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        flag, equals, _ = word.partition("=")
        if word == "--":
            places, rest = [*places, *rest], []
        elif flag in counts:
            options.append(word)
            while counts[flag] != 0 and not equals and rest and not _is_option(rest[0]):
                value = rest.pop(0)
                if value.startswith("-"):  # else argparse takes a negative value for an option
                    options[-1:] = [f"{flag}={value}"]
                else:
                    options.append(value)
                if counts[flag] != "+":
                    break
        elif not _is_option(word):
            places.append(word)
        elif word[:2] in counts and f"-{flag}" not in counts:
            options.append(word)  # -oFOLDER
        else:
            near = suggestion(flag if flag.startswith("--") else f"-{flag}", counts)
            if not takes_settings or (near and "." not in flag):
                see = "" if near else f"; `zsnr {command} --help` lists the options"
                raise UsageError(f"unknown option {clipped(flag)}{near or see}")
            settings.append(word)
            if not equals and rest and not rest[0].startswith("--"):
                settings.append(rest.pop(0))
    of_command = [*options, "--", *places] if places else options
    return of_command, settings if takes_settings else None


def _numbers(name: str, texts: Sequence[str]) -> list[int]:
    """Read the values of an option that may be repeated."""
    for text in texts:
        if not re.fullmatch(r"-?\d{1,20}", text):
            raise UsageError(f"{_flag(name)} {clipped(text)}: wanted a whole number")
    return [int(text) for text in texts]


def _is_option(word: str) -> bool:
    """Whether a word is an option, and neither a negative number nor a text with spaces."""
    return re.match(r"-[^\d.\s]", word) is not None and " " not in word.partition("=")[0]


def _refuse(
    command: str, parser: ArgumentParser, hints: dict[str, Any], message: str, error: Exception
) -> NoReturn:
    """Say what is wrong with the arguments without words of the parsing library."""
    names = {action.dest: action for action in parser._actions}

    def called(name: str) -> str:
        action = names[name]
        if action.option_strings:
            return str(action.option_strings[-1])
        return (name.removesuffix("s") if action.nargs in ("+", "*") else name).upper()

    see = f"`zsnr {command} --help` shows the arguments"
    key = re.search(r'Parser key "(\w+)"', message)
    if key and key[1] in names:
        value = re.search(r"(?:Given value: |Got value: )(.*)", message)
        shown = f" {clipped(value[1])}" if value else ""
        text = f"{called(key[1])}{shown}: wanted {_wanted(_kind(hints[key[1]])[0])}"
    elif missing := re.search(r"arguments are required: (.*)", message):
        listed = ", ".join(called(name) for name in missing[1].split(", "))
        text = f"`zsnr {command}` needs {listed}; {see}"
    elif surplus := re.search(r"unrecognized arguments: (.*)", message):
        text = f"unexpected argument {clipped(surplus[1])}; {see}"
    elif lacking := re.search(r"argument (?:\S+/)?(\S+): expected (?:one|at least one)", message):
        text = f"{lacking[1]} needs a value; {see}"
    else:
        text = " ".join(message.split())
    raise UsageError(text) from error


def _wanted(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, "text")
