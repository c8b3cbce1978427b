"""The command line of a function: its signature gives the arguments, its docstring the help.

Parameters before `*` are positional. `Sequence[str]` as an option may be repeated; `str |
Sequence[str]` takes several values at once; `bool` is a switch; `settings` collects what is meant
for the configuration of `zsnr fit`. `**options: Unpack[T]` stands for options that commands share:
the keys of the TypedDict T, each `Annotated` with its help. `--json` belongs to functions whose
result has `to_json`.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
from argparse import ArgumentParser, ArgumentTypeError, HelpFormatter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from docstring_parser import Docstring, DocstringStyle, parse

from zsnr.commands.result import Printable
from zsnr.files import path_metavar
from zsnr.untrusted import clipped

SHORT = {"output": "-o", "config": "-c"}
_SETTINGS = "settings"
_METAVARS: dict[Any, str] = {int: "N", float: "X"}
_WANTED = {int: "a whole number", float: "a number", str: "text"}


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
    parser = make_parser(command, function)
    takes_settings = _SETTINGS in parameters_of(function)
    of_command, settings = _split(command, parser, takes_settings, arguments)
    values = vars(parser.parse_args(of_command))
    as_json = values.pop("json", False)
    if takes_settings:
        values[_SETTINGS] = settings
    return {name: value for name, value in values.items() if value is not None}, as_json


def make_parser(command: str, function: Callable[..., Any]) -> ArgumentParser:
    """Make the parser of a function's signature and docstring."""
    doc = _docstring(function)
    texts = {each.arg_name: each.description or "" for each in doc.params}
    parser = _Parser(
        prog=f"zsnr {command}",
        description=doc.description,
        formatter_class=_Formatter,
    )
    examples = [
        line for example in doc.examples for line in (example.description or "").split("\n")
    ]
    if examples:
        parser.epilog = "\n  ".join(["examples:", *map(str.strip, examples)])
    for name, parameter in parameters_of(function).items():
        hint, shared = parameter.annotation, ""
        if get_origin(hint) is Annotated:
            hint, shared = get_args(hint)
        text = " ".join((shared or texts.get(name, "")).split()).replace("%", "%%")
        if name == _SETTINGS:
            parser.epilog = f"Other options such as --data.val FOLDER: {text}"
        else:
            _add(parser, parameter, hint, text)
    kind = get_type_hints(function).get("return")
    if isinstance(kind, type) and issubclass(kind, Printable):
        parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    return parser


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """List the parameters of a function with their types, those that `**` stands for too."""
    hints = get_type_hints(function)
    listed: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.VAR_KEYWORD:
            listed[name] = parameter.replace(annotation=hints[name])
            continue
        [shared] = get_args(hints[name])
        for key, hint in get_type_hints(shared, include_extras=True).items():
            listed[key] = inspect.Parameter(
                key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint
            )
    return listed


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


class _Parser(ArgumentParser):
    """Raises what argparse would print, in the words of this package."""

    def error(self, message: str) -> NoReturn:
        see = f"`{self.prog} --help` shows the arguments"
        argument = re.match(r"argument (?:\S+/)?(\S+): (.*)", message)
        _, required, names = message.partition("arguments are required: ")
        _, unrecognized, words = message.partition("unrecognized arguments: ")
        if argument:
            needs = argument[2].startswith("expected ")
            message = f"{argument[1]} needs a value; {see}" if needs else argument[2]
        elif required:
            choices = {action.metavar: action.dest.upper() for action in self._actions}
            listed = ", ".join(
                choices[name] if name.startswith("{") else name.rpartition("/")[2]
                for name in names.split(", ")
            )
            message = f"`{self.prog}` needs {listed}; {see}"
        elif unrecognized:
            message = f"unexpected argument {clipped(words)}; {see}"
        raise UsageError(message)


def _docstring(function: Callable[..., Any]) -> Docstring:
    return parse(inspect.getdoc(function) or "", DocstringStyle.GOOGLE)


def _add(parser: ArgumentParser, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    """Add the argument of one parameter."""
    name, required = parameter.name, parameter.default is parameter.empty
    default = None if required else parameter.default
    kind, several, repeated = _kind(hint)
    if kind is bool and default is False:
        parser.add_argument(_flag(name), action="store_true", help=text)
        return
    if default not in (None, (), "") and "default" not in text.lower():
        text = f"{text} (default: {default})"
    is_option = parameter.kind is parameter.KEYWORD_ONLY
    places = name.removesuffix("s") if several or repeated else name
    options: dict[str, Any] = {"help": text, "default": default}
    options["type"] = _reader(_flag(name) if is_option else places.upper(), kind)
    if get_origin(kind) is Literal:
        options["metavar"] = f"{{{','.join(map(str, get_args(kind)))}}}"
    elif Path in get_args(hint) and is_option:
        options["metavar"] = path_metavar(text)
    elif kind is str and bool in get_args(hint):
        options["metavar"] = "true|false"
    else:
        options["metavar"] = _METAVARS.get(kind, name.rpartition("_")[2].upper())
    if is_option:
        if several:
            options["nargs"] = "+"
        elif repeated:
            options |= {"action": "append", "default": None}
        flags = [SHORT[name]] if name in SHORT else []
        parser.add_argument(*flags, _flag(name), required=required, **options)
        return
    if several or repeated:
        options |= {"nargs": "+" if required else "*", "metavar": places.upper()}
    elif not required:
        options["nargs"] = "?"
    parser.add_argument(name, **options)


def _kind(hint: Any) -> tuple[Any, bool, bool]:
    """Say of which type one value is, whether several come at once, and whether it repeats."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    members = tuple(member for member in members if member is not type(None))
    for member in members:
        if get_origin(member) is Sequence and get_args(member)[0] in (str, int):
            return get_args(member)[0], str in members, str not in members
    return (str if str in members else members[0]), False, False


def _reader(name: str, kind: Any) -> Callable[[str], Any]:
    """Return what reads a value of a type.

    Args:
        name: What the value belongs to, for messages.
        kind: int, float, str or a Literal.
    """
    choices = {str(value): value for value in get_args(kind)}
    wanted = f"one of {', '.join(choices)}" if choices else _WANTED[kind]

    def read(text: str) -> Any:
        if kind is int and not re.fullmatch(r"-?\d{1,20}", text):
            raise ArgumentTypeError(f"{name} {clipped(text)}: wanted {wanted}")
        try:
            return choices[text] if choices else kind(text)
        except (KeyError, ValueError) as error:
            raise ArgumentTypeError(f"{name} {clipped(text)}: wanted {wanted}") from error

    return read


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _split(
    command: str, parser: ArgumentParser, takes_settings: bool, arguments: Sequence[str]
) -> tuple[list[str], list[str]]:
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
    return of_command, settings


def _is_option(word: str) -> bool:
    """Whether a word is an option, and neither a negative number nor a text with spaces."""
    return re.match(r"-[^\d.\s]", word) is not None and " " not in word.partition("=")[0]
