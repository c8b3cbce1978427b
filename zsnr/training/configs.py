"""The YAML of `zsnr fit` checked against the settings that it is for, before anything reads it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader, set_loader

from zsnr.untrusted import compose_yaml, parse_yaml, read_yaml_text, shown

_TAG = "tag:yaml.org,2002:"
_NUMBERS = (int, float)


def check_configs(
    arguments: Sequence[str], groups: Mapping[str, Any], bases: Sequence[type[Any]]
) -> None:
    """Check the files that follow -c and --config.

    Args:
        arguments: The command line.
        groups: What takes the settings of each group, such as {"data": DataModule}.
        bases: Classes whose subclasses a config may name without their module.

    Raises:
        ValueError: A file is not readable, has a setting that does not exist, or has a value of
            another type; names the file and the setting.
    """
    for path in _config_files(arguments):
        text = read_yaml_text(path)
        try:
            node = compose_yaml(text)
        except ValueError as error:
            raise ValueError(f"{path} is not readable YAML: {error}.") from error
        try:
            _Check(groups, bases).document(node)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def read_safely() -> None:
    """Let jsonargparse read only YAML that `parse_yaml` reads, wherever it stands."""
    load = get_loader("yaml")
    if load.__module__ == __name__:
        return

    def load_checked(text: str) -> Any:
        try:
            parse_yaml(text)
        except ValueError as error:
            raise yaml.YAMLError(str(error)) from error
        return load(text)

    set_loader("yaml", load_checked, exceptions=(yaml.YAMLError,))


def _config_files(arguments: Sequence[str]) -> Iterator[Path]:
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("-c", "--config"):
            value = value if equals else "".join(arguments[i + 1 : i + 2])
        elif argument.startswith("-c") and not argument.startswith("--"):
            value = argument[2:]
        else:
            continue
        if not value:
            raise ValueError(f"{name} names no file: wanted {name} FILE.")
        yield Path(value).expanduser()


class _Check:
    """One document against the settings of all groups."""

    def __init__(self, groups: Mapping[str, Any], bases: Sequence[type[Any]]) -> None:
        self.groups, self.bases = groups, bases

    def document(self, node: Any) -> None:
        if node is None:
            raise ValueError("it is empty: wanted settings such as `model:` and `data:`.")
        if not isinstance(node, yaml.MappingNode):
            what = "a list" if isinstance(node, yaml.SequenceNode) else "one value"
            raise ValueError(f"it holds {what}: wanted settings such as `model:` and `data:`.")
        model = _entries(node).get("model")
        named = _entries(model) if isinstance(model, yaml.MappingNode) else {}
        if "target" in named and "params" in named:
            raise ValueError(
                "it is a config of the original latent diffusion code (model.target, "
                "model.params), which describes a single file of the same name beside it. Give "
                "that file, or a YAML of `zsnr fit`."
            )
        for name, value in _entries(node).items():
            near = difflib.get_close_matches(name, self.groups, n=1)
            if name not in self.groups and near and isinstance(value, yaml.MappingNode):
                raise ValueError(f"there is no `{_said(name)}`. Did you mean `{near[0]}`?")
            if name in self.groups and not isinstance(value, yaml.MappingNode):
                raise ValueError(f"{name} is {_kind(value)}: wanted settings by name.")
            self._settings(value, self.groups.get(name), name)

    def _settings(self, node: Any, cls: Any, where: str) -> None:
        """Check the arguments of a class or of a dataclass."""
        if not isinstance(node, yaml.MappingNode):
            return
        entries = _entries(node)
        if "class_path" in entries:
            self._named(entries, cls, where)
            return
        hints, takes_any = _hints(cls)
        for name, value in entries.items():
            inside, here = name.partition(".")[0], f"{where}.{_said(name)}"
            if inside in hints:
                if inside == name:
                    self._value(value, hints[name], here)
            elif not takes_any:
                near = difflib.get_close_matches(inside, hints, n=1)
                hint = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(hints)}."
                raise ValueError(f"{where} has no `{_said(name)}`. {hint}")

    def _named(self, entries: Mapping[str, Any], cls: Any, where: str) -> None:
        """Check {class_path, init_args}, if the class is found."""
        found = self._find(entries["class_path"].value)
        if found is not None and "init_args" in entries:
            self._settings(entries["init_args"], found, f"{where}.init_args")

    def _find(self, path: Any) -> Any:
        module, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
        if module:
            try:
                return getattr(importlib.import_module(module), name, None)
            except (ImportError, TypeError, ValueError):
                return None  # jsonargparse says so
        subclasses = (cls for base in self.bases for cls in base.__subclasses__())
        return next((cls for cls in subclasses if cls.__name__ == name), None)

    def _value(self, node: Any, hint: Any, where: str) -> None:
        options = _options(hint)
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node, options, where)
        elif _are_simple(options, isinstance(node, yaml.SequenceNode)):
            raise ValueError(f"{where} is {_kind(node)}: wanted {_wanted(options)}.")
        elif isinstance(node, yaml.SequenceNode):
            items = [_item(option) for option in options]
            known = [item for item in items if item is not None]
            if len(known) == 1:
                for i, part in enumerate(node.value):
                    self._value(part, known[0], f"{where}[{i}]")
        else:
            classes = [option for option in options if dataclasses.is_dataclass(option)]
            if "class_path" in _entries(node) or len(classes) == 1:
                self._settings(node, classes[0] if classes else None, where)


def _entries(node: Any) -> dict[str, Any]:
    return {key.value: value for key, value in node.value}


def _hints(cls: Any) -> tuple[dict[str, Any], bool]:
    """Return the types of a class's settings, and whether it takes others too."""
    if cls is None:
        return {}, True
    if dataclasses.is_dataclass(cls):
        types_of = get_type_hints(cls)
        return {f.name: types_of[f.name] for f in dataclasses.fields(cls) if f.init}, False
    try:
        parameters = inspect.signature(cls).parameters.values()
        constructor = cls.__init__
        types_of = get_type_hints(constructor if isinstance(cls, type) else cls)
    except (NameError, TypeError, ValueError):  # somebody else's class may hide its types
        return {}, True
    known = {p.name: types_of.get(p.name, Any) for p in parameters}
    return known, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _options(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [option for part in get_args(hint) for option in _options(part)]
    return [hint]


def _are_simple(options: Sequence[Any], is_list: bool) -> bool:
    """Whether a list, or else a mapping, is none of the options."""
    return all(
        _is_scalar(option)
        or (dataclasses.is_dataclass(option) if is_list else _item(option) is not None)
        for option in options
    )


def _is_scalar(option: Any) -> bool:
    return option in (str, bool, type(None), *_NUMBERS) or get_origin(option) is Literal


def _item(option: Any) -> Any:
    """Return what a list's items are; None = it is no list, or has items of several kinds."""
    parts = get_args(option)
    origin = get_origin(option)
    if isinstance(origin, type) and issubclass(origin, Sequence) and parts:
        return parts[0] if len(parts) == 1 or parts[1:] == (Ellipsis,) else None
    return None


def _said(name: str) -> str:
    return shown(name)[1:-1]


def _kind(node: Any) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"`{_said(node.value)}`" if node.value else "empty"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group of settings"


def _check_scalar(node: Any, options: Sequence[Any], where: str) -> None:
    """Refuse a word of YAML that is no text where text is wanted, and the like."""
    kind, said = node.tag.removeprefix(_TAG), _said(node.value)
    text = str in options or any(get_origin(option) is Literal for option in options)
    number = any(option in options for option in _NUMBERS)
    if not all(_is_scalar(o) or _item(o) or dataclasses.is_dataclass(o) for o in options):
        return  # a class's name is text too, and jsonargparse lists the known ones
    if kind == "bool" and bool not in options and (text or number):
        value = node.value.lower() in ("yes", "on", "true", "y")
        if text:
            word = "true" if value else "false"
            raise ValueError(f"{where}: `{said}` is {word} in YAML: quote it.")
        raise ValueError(f"{where}: `{said}` is {str(value).lower()}: wanted {_wanted(options)}.")
    if kind in ("int", "float") and text and not number:
        raise ValueError(f"{where}: `{said}` is a number in YAML: quote it.")
    if kind == "float" and options in ([int], [int, type(None)]):
        raise ValueError(f"{where}: `{said}` is not a whole number in YAML: write its digits.")
    if kind == "str" and number and not text and bool not in options:
        raise ValueError(f"{where}: `{said}` is text: wanted {_wanted(options)}.")


def _wanted(options: Sequence[Any]) -> str:
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    wanted = [names[option] for option in options if option in names]
    wanted += [", ".join(map(repr, get_args(o))) for o in options if get_origin(o) is Literal]
    return " or ".join([*wanted, *["a list" for o in options if _item(o) is not None]])
