"""Checks of YAML files and command-line settings against the classes that they are for.

They run before jsonargparse reads anything, and say in words which setting is wrong, which value it
has and what was wanted.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml  # type: ignore[import-untyped]
from jsonargparse import get_loader, set_loader
from torch import Tensor
from torch.utils.data import Dataset

from zsnr.doctor.runs import RENAMED_KEYS
from zsnr.public import public_text
from zsnr.training.settings import (
    CLASSES,
    GROUPS,
    LINKED,
    LOOSE,
    choices_of,
    dataclass_of,
    dataclasses_of,
    default_optimizer,
    is_scalar,
    item_of,
    known_classes,
    options_of,
    settings_of,
    words_for,
)
from zsnr.training.short_options import SHORT_OPTIONS, option_values
from zsnr.training.suggestions import find_class, known_text, no_class, spelled, suggest
from zsnr.untrusted import clipped, compose_yaml, near_path, parse_yaml, read_yaml_text, shown

_TAG = "tag:yaml.org,2002:"
_NUMBERS = (int, float)
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_LEARNING_RATE = "The learning rate itself is --lr, or model.optimizer.init_args.lr in a YAML file."


def check_configs(arguments: Sequence[str], complete: bool = True) -> None:
    """Check the files that follow -c and --config, and the other settings of a command line.

    Args:
        arguments: The command line, with short options.
        complete: Whether they are all that is set, and no checkpoint names classes too.

    Raises:
        ValueError: A file is not readable, or a setting does not exist or has a value of another
            type; names the file, the setting and the value.
    """
    check = _Check(complete)
    for path in config_files(arguments):
        node = _read(path)
        try:
            check.document(node)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    for name, value in option_values(arguments):
        check.option(name, value)


def list_overrides(arguments: Sequence[str]) -> list[str]:
    """List what a config file replaces of the files before it, one line for each setting."""
    before: dict[str, str] = {}
    lines: list[str] = []
    for path in config_files(arguments):
        values = dict(_leaves(_read(path)))
        for name, value in values.items():
            if name in before and before[name] != value:
                change = f"{clipped(before[name], 60)} -> {clipped(value, 60)}"
                lines.append(public_text(f"{path} overrides {name}: {change}"))
        before |= values
    return lines


def separate_networks(arguments: Sequence[str]) -> list[str]:
    """Let a network that is named by its class replace one that is given by sizes, and the reverse.

    Jsonargparse would build the settings of both into one. A name of a network between them, which
    the next setting replaces, keeps them apart.

    Args:
        arguments: The command line, with short options expanded.
    """
    kind: str | None = None
    separated: list[str] = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        value = value if equals else "".join(arguments[i + 1 : i + 2])
        node = None
        if argument.startswith(("-c", "--config")):
            [file, *_] = config_files([argument, *([] if equals else [value])])
            model = _entries(_read(file)).get("model")
            node = _entries(model).get("network") if isinstance(model, yaml.MappingNode) else None
        elif name == "--model.network":
            node = _composed(value)
        named = {*_entries(node)} if isinstance(node, yaml.MappingNode) else {"class_path"}
        if node is not None or name == "--model.network.class_path":
            follows = "class" if named & {*_CLASS_KEYS} else "sizes"
            if kind not in (None, follows):
                separated.append("--model.network=replaced")
            kind = follows
        separated.append(argument)
    return separated


def _composed(text: str) -> Any:
    try:
        return compose_yaml(text)
    except ValueError:
        return yaml.ScalarNode(f"{_TAG}str", text)


def _leaves(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """List settings of a document with their values as text; a class stands for its setting."""
    if isinstance(node, yaml.MappingNode):
        entries = _entries(node)
        for name, value in entries.items():
            if name == "class_path":
                yield where, getattr(value, "value", "")
            else:
                inside = where if name == "init_args" else f"{where}.{name}".lstrip(".")
                yield from _leaves(value, inside)
    elif isinstance(node, yaml.SequenceNode):
        yield where, _on_one_line(node)
    elif node is not None:
        yield where, node.value or "null"


def _on_one_line(node: Any) -> str:
    """Write a list of a document as YAML without line breaks."""
    nodes = [node]
    for each in nodes:
        if isinstance(each, yaml.CollectionNode):
            each.flow_style = True
            nodes += [part for entry in each.value for part in _parts(entry)]
    return str(yaml.serialize(node, width=math.inf)).strip()


def _parts(entry: Any) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


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


def config_files(arguments: Sequence[str]) -> Iterator[Path]:
    """List the files that follow -c and --config."""
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


def _read(path: Path) -> Any:
    if not path.exists():
        hint = near_path(path)
        if not path.suffix:
            hint = f" `zsnr configs copy {path}` copies a shipped file of that name." + hint
        raise ValueError(f"{path} cannot be read: No such file or directory.{hint}")
    text = read_yaml_text(path)
    try:
        return compose_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not readable YAML: {error}.") from error


class _Check:
    """Documents and options, in their order, against the settings of all groups.

    Args:
        complete: Whether they are all that is set, and no checkpoint names classes too.
    """

    def __init__(self, complete: bool) -> None:
        self.complete = complete
        self.classes: dict[str, Any] = {"model.optimizer": default_optimizer()}
        self.typed = False  # whether a setting stands on the command line
        self.shell = False  # whether its value is text, which need not be quoted there

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
            group = name.partition(".")[0]
            if group not in (*GROUPS, *LOOSE):
                hint = suggest(name, {each: f"`{each}`" for each in (*GROUPS, *LOOSE)})
                raise ValueError(f"there is no `{_said(name)}`. {hint}")
            if name in GROUPS and not isinstance(value, yaml.MappingNode):
                raise ValueError(f"{name} is {_kind(value)}: wanted settings by name.")
            if name in GROUPS:
                self._arguments(value, GROUPS[name], name, name)
            elif group in GROUPS:
                self._key(name, value)

    def option(self, name: str, text: str | None) -> None:
        """Check a setting of the command line.

        Args:
            name: Its name without dashes; in dots, where it is nested.
            text: Its value. None = it has none.
        """
        if name in LOOSE or name in GROUPS:
            if text is None:
                raise ValueError(f"--{name} needs a value.")
            return
        group, dot, _ = name.partition(".")
        if not dot or group not in GROUPS:
            known = [short for short in SHORT_OPTIONS if short.startswith("--")]
            known += [f"--{setting}" for setting in (*LOOSE, "config", "help", "print_config")]
            hint = suggest(f"--{name}", {each: each for each in known}, typed=True)
            raise ValueError(f"There is no option --{_said(name)}. {hint}")
        if text is None:
            raise ValueError(f"--{name} needs a value.")
        node = _composed(text)
        self.typed, self.shell = True, not isinstance(node, yaml.CollectionNode)
        try:
            self._key(name.removesuffix("+"), node or yaml.ScalarNode(f"{_TAG}null", ""))
        finally:
            self.typed = self.shell = False

    def _key(self, name: str, node: Any) -> None:
        """Check a value of a setting whose name has dots."""
        where, *parts = name.split(".")
        cls, hint, said, is_class = GROUPS[where], None, where, False
        for part in parts:
            several = len(dataclasses_of(hint)) > 1  # of which class_path names one
            if part in _CLASS_KEYS and not several and _names_class(hint):
                is_class, cls = True, self.classes.get(where)
            if (is_class or several) and part == "class_path":
                self._class(node, where, CLASSES.get(where, _base_of(hint)))
                return
            if is_class and self.complete and where not in self.classes:
                raise ValueError(
                    f"{where} names no class, so it has no `{_said(parts[-1])}`: name one first, "
                    f"as in --{where} CLASS.{known_text(CLASSES.get(where, object))}"
                )
            if cls is None:  # a class that is not known here
                near = difflib.get_close_matches(part, _CLASS_KEYS, n=1, cutoff=0.8)
                if is_class and near and near[0] != part:
                    meant = spelled(f"{said}.{near[0]}", self.typed)
                    raise ValueError(f"{said} has no `{_said(part)}`. Did you mean {meant}?")
                options = [option for option in options_of(hint) if option is not Dataset]
                if not is_class and _are_simple(options, is_list=False):
                    raise ValueError(
                        f"{where} has no `{_said(part)}`: it takes {_wanted(options)}."
                    )
                return
            if is_class and part == "dict_kwargs":
                _check_takes_any(cls, where)
                return
            if not (is_class and part == "init_args"):
                hint = self._hint(cls, part, where, said, dotted=True)
                if hint is None:
                    return
                where = f"{where}.{part}"
                is_class = where in CLASSES or where in self.classes or _is_class(hint)
                cls = self.classes.get(where) if is_class else _group_of(hint)
            said = f"{said}.{part}"
        if hint is not None:
            self._value(node, hint, where)

    def _hint(self, cls: Any, name: str, where: str, place: str, dotted: bool = False) -> Any:
        """Return the type of a setting; None if the class takes any.

        Args:
            cls: The class or dataclass that takes it.
            name: Its name there.
            where: The setting that the class is the value of.
            place: Where it stands: `where`, or the init_args there.
            dotted: Whether it is named in full, as on a command line.

        Raises:
            ValueError: The class has no such setting.
        """
        settings, takes_any = settings_of(cls)
        hints = {setting.name: setting.hint for setting in settings}
        if f"{where}.{name}" in LINKED:
            other = LINKED[f"{where}.{name}"]
            raise ValueError(f"{where}.{name} follows {other}: set that instead.")
        if name in hints:
            return hints[name]
        new_name = RENAMED_KEYS.get(f"{where}.{name}")
        if new_name is not None:
            raise ValueError(f"{where}.{name} is now {new_name}.")
        is_class = where in self.classes
        beside = _CLASS_KEYS if is_class and place == where else ()
        if takes_any and not (beside and difflib.get_close_matches(name, beside, cutoff=0.8)):
            return None
        siblings = {
            each: spelled(f"{place}.{each}", self.typed) if dotted else f"`{each}`"
            for each in (*hints, *beside)
        }
        elsewhere = not is_class or name == "learning_rate"
        hint = suggest(name, siblings, self.typed, elsewhere)
        for other, kind in _siblings(cls).items():
            if name in [setting.name for setting in settings_of(kind)[0]]:
                inside = f"`class_path: {other}`, `init_args: {{{name}: ...}}`"
                hint = f"It is a setting of {other}: {inside}."
        raise ValueError(f"{place} has no `{_said(name)}`. {hint}")

    def _settings(self, node: Any, hint: Any, where: str) -> None:
        """Check the arguments of a dataclass, or a class and its arguments."""
        listed = _listed(where)
        is_item = listed != where and listed in CLASSES
        if isinstance(node, yaml.ScalarNode) and is_item:
            self._class(node, where, CLASSES[listed])
        if not isinstance(node, yaml.MappingNode):
            return
        entries = _entries(node)
        if "class_path" in entries:
            self._class(entries["class_path"], where, CLASSES.get(listed, _base_of(hint)))
        elif where not in self.classes and (is_item or (self.complete and where in CLASSES)):
            raise ValueError(
                f"{where} names no class: wanted class_path, and init_args for its arguments."
            )
        elif where not in self.classes or not entries.keys() & {*_CLASS_KEYS}:
            if len(dataclasses_of(hint)) == 1:  # it replaces a class
                self.classes.pop(where, None)
            self._arguments(node, self.classes.get(where) or dataclass_of(hint), where, where)
            return
        cls = self.classes.get(where)
        names = [setting.name for setting in settings_of(cls)[0]]
        for name, inside in entries.items():
            if name not in _CLASS_KEYS:
                siblings = {each: f"`{each}`" for each in _CLASS_KEYS}
                siblings |= {each: f"`init_args: {{{each}: ...}}`" for each in names}
                hint = suggest(name, siblings, elsewhere=False)
                raise ValueError(f"{where} has no `{_said(name)}` beside class_path. {hint}")
            if name == "init_args":
                self._arguments(inside, cls, where, f"{where}.init_args")
            elif name == "dict_kwargs":
                _check_takes_any(cls, where)

    def _arguments(self, node: Any, cls: Any, where: str, place: str) -> None:
        for name, value in _entries(node).items() if isinstance(node, yaml.MappingNode) else ():
            inside = name.partition(".")[0]
            hint = self._hint(cls, inside, where, place)
            if inside == name and hint is not None:
                self._value(value, hint, f"{where}.{name}")
            elif inside != name and where in GROUPS:
                self._key(f"{where}.{name}", value)

    def _class(self, node: Any, where: str, base: type[Any]) -> None:
        """Check the name of a class, and remember it for settings of its arguments."""
        path = node.value if isinstance(node, yaml.ScalarNode) else node
        self.classes[where] = find_class(path, base, where)

    def _value(self, node: Any, hint: Any, where: str) -> None:
        options = [option for option in options_of(hint) if option not in (Tensor, Dataset)]
        if isinstance(node, yaml.ScalarNode) and where in CLASSES:
            self._named(node, options, where)
        elif isinstance(node, yaml.ScalarNode):
            several = dataclasses_of(hint)[1:] and known_classes(_base_of(hint))
            if several and node.value in several:
                self._class(node, where, _base_of(hint))
                return
            sized = _names_class(hint) and dataclass_of(hint) is not None
            if (sized or _is_class(hint)) and node.tag != f"{_TAG}null":
                self.classes[where] = None  # a class, or a word for one, that is not looked up here
            self._scalar(node, options, where)
        elif isinstance(node, yaml.MappingNode) and (
            where in CLASSES or ("class_path" in _entries(node) and _names_class(hint))
        ):
            self._settings(node, hint, where)
        elif _are_simple(options, isinstance(node, yaml.SequenceNode)):
            raise ValueError(f"{where} is {_kind(node)}: wanted {_wanted(options)}.")
        elif isinstance(node, yaml.SequenceNode):
            if where in CLASSES:
                for i, part in enumerate(node.value):
                    self._settings(part, None, f"{where}[{i}]")
                if node.value:  # what options that follow change
                    self.classes[where] = self.classes.get(f"{where}[{len(node.value) - 1}]")
                return
            items = [item for item in map(item_of, options) if item is not None]
            if len(items) == 1:
                for i, part in enumerate(node.value):
                    self._value(part, items[0], f"{where}[{i}]")
        elif any(get_origin(option) is dict for option in options):
            return  # a mapping of any names
        elif "class_path" in _entries(node) or dataclass_of(hint) is not None:
            self._settings(node, hint, where)

    def _named(self, node: Any, options: Sequence[Any], where: str) -> None:
        """Check one word in the place of a class: its name, or what else the setting takes."""
        kind, word = node.tag.removeprefix(_TAG), node.value
        known = words_for(where)
        if kind != "str":
            if (type(None) in options and kind == "null") or (bool in options and kind == "bool"):
                return
            raise ValueError(no_class(where, word, CLASSES[where]))
        if word in known:
            self.classes.pop(where, None)
            return
        if known and "." not in word and word not in known_classes(CLASSES[where]):
            near = difflib.get_close_matches(word, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            if where == "model.sampling.sampler":
                listed = ", ".join(map(repr, known))
                raise ValueError(
                    f"{where}: Sampler {shown(word)} is unknown. Known: {listed}.{hint}"
                )
            if near:
                raise ValueError(f"{where}: `{_said(word)}` is unknown.{hint}")
            return  # registered by somebody else
        self._class(node, where, CLASSES[where])

    def _scalar(self, node: Any, options: Sequence[Any], where: str) -> None:
        """Refuse a word of YAML that is not of the type that is wanted."""
        kind, word = node.tag.removeprefix(_TAG), node.value
        said, subject = _said(word), _subject(where)
        text, number = str in options, any(option in options for option in _NUMBERS)
        choices = choices_of(options)
        groups = all(map(dataclasses.is_dataclass, options))
        group = dataclass_of(options[0]) if groups else None
        if group is not None and not (kind == "str" and Path(word).expanduser().is_file()):
            inside = ", ".join(setting.name for setting in settings_of(group)[0])
            hint = f" {_LEARNING_RATE}" if where == "model.learning_rate" else ""
            raise ValueError(f"{where} is {_kind(node)}: wanted settings by name: {inside}.{hint}")
        if kind == "null" and Any not in options:
            if type(None) in options:
                return
            raise ValueError(f"{where} is null: wanted {_wanted(options)}.")
        if kind == "str" and word not in (known := words_for(where)):
            near = difflib.get_close_matches(word, known, n=1)
            if near:
                listed = ", ".join(map(repr, known))
                raise ValueError(
                    f"{where}: `{said}` is unknown. Did you mean `{near[0]}`? Known: {listed}."
                )
        if not all(is_scalar(o) or item_of(o) or dataclass_of(o) for o in options):
            return  # jsonargparse knows more of it
        if kind == "bool" and bool not in options and (text or choices or number):
            if self.shell and text:
                return
            value = "true" if word.lower() in ("yes", "on", "true", "y") else "false"
            if text or choices:
                what = f"{subject}`{said}`{_comma(where)} is the boolean {value} in YAML"
                raise ValueError(f"{what}: quote it, as in '{said}'.")
            raise ValueError(f"{subject}`{said}` is {value}: wanted {_wanted(options)}.")
        if choices and not text and not number and word not in map(str, choices):
            near = difflib.get_close_matches(word, map(str, choices), n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"{subject}`{said}` is unknown: wanted {_wanted(options)}.{hint}")
        if kind in ("int", "float") and text and not number and not self.shell:
            raise ValueError(f"{subject}`{said}`{_comma(where)} is a number in YAML: quote it.")
        if kind == "float" and options in ([int], [int, type(None)]):
            raise ValueError(f"{subject}`{said}` is not a whole number: write its digits.")
        if number and not text and where[-1:] != "]" and not _is_finite(word, kind):
            raise ValueError(f"{subject}`{said}` is not finite: wanted {_wanted(options)}.")
        if kind == "str" and number and not text and bool not in options and word not in choices:
            raise ValueError(f"{subject}`{said}` is text: wanted {_wanted(options)}.")
        if kind != "bool" and set(options) <= {bool, type(None)}:
            raise ValueError(f"{subject}`{said}` is unknown: wanted {_wanted(options)}.")
        if where == "trainer.devices" and not re.fullmatch(r"auto|-?\d+(,\d*)*", word):
            raise ValueError(f"{where}: `{said}` is unknown: wanted a number, a list or auto.")


def _check_takes_any(cls: Any, where: str) -> None:
    """Refuse dict_kwargs of a class that takes no other arguments than those it names."""
    settings, takes_any = settings_of(cls)
    if not takes_any:
        names = ", ".join(setting.name for setting in settings) or "none"
        raise ValueError(
            f"{where}.dict_kwargs: {cls.__name__} takes no arguments but those of init_args: "
            f"{names}."
        )


def _base_of(hint: Any) -> type[Any]:
    """Return the only class that a type allows; object, if it restricts no class_path."""
    classes = [each for each in options_of(hint) if isinstance(each, type) and not is_scalar(each)]
    if len(dataclasses_of(hint)) > 1:  # of one kind, such as schedules
        return _kind_of(classes[0])
    plain = [each for each in classes if not dataclasses.is_dataclass(each)]
    wide = [each for each in plain if all(issubclass(other, each) for other in plain)]
    [base] = wide if len(wide) == 1 else [object]
    simple = base.__module__ == "builtins" or dataclasses.is_dataclass(base)
    return object if simple or getattr(base, "_is_protocol", False) else base


def _siblings(cls: Any) -> dict[str, type[Any]]:
    """Return the dataclasses of the same kind as a dataclass, such as the other schedules."""
    base = _kind_of(cls) if dataclasses.is_dataclass(cls) else object
    return {} if base is object else known_classes(base)


def _kind_of(cls: Any) -> type[Any]:
    """Return the class that a dataclass is derived from."""
    base: type[Any] = cls.__mro__[1]
    return base


def _names_class(hint: Any) -> bool:
    """Whether the value of a setting may be a class with arguments, beside other things."""
    return hint is not None and _base_of(hint) is not object


def _is_class(hint: Any) -> bool:
    """Whether the value of a setting can only be a class with arguments, or one word."""
    options = options_of(hint)
    return _names_class(hint) and not any(
        dataclasses.is_dataclass(option) or get_origin(option) in (dict, list) for option in options
    )


def _group_of(hint: Any) -> Any:
    """Return the dataclass whose fields a type has: its own, or those of a list's only item."""
    items = [item_of(option) for option in options_of(hint)]
    return next(filter(None, map(dataclass_of, [hint, *items])), None)


def _listed(where: str) -> str:
    """Return the setting whose value is the list that an item stands in."""
    return re.sub(r"\[\d+\]$", "", where)


def _entries(node: Any) -> dict[str, Any]:
    return {key.value: value for key, value in node.value}


def _are_simple(options: Sequence[Any], is_list: bool) -> bool:
    """Whether a list, or else a mapping, is none of the options."""
    return all(
        is_scalar(option)
        or (dataclass_of(option) is not None if is_list else item_of(option) is not None)
        for option in options
    )


def _said(name: str) -> str:
    return shown(name)[1:-1]


def _subject(where: str) -> str:
    """Begin a sentence on a value: with the setting's name, and the item's number in a list."""
    item = re.fullmatch(r"(.*)\[(\d+)\]", where)
    if item is None:
        return f"{where}: "
    number = int(item[2])
    ordinal = _ORDINALS[number] if number < len(_ORDINALS) else f"{number + 1}th"
    return f"{item[1]}: the {ordinal} item, "


def _comma(where: str) -> str:
    return "," if where.endswith("]") else ""


def _is_finite(word: str, kind: str) -> bool:
    if kind == "float":
        return word.strip("+-.").lower() not in ("nan", "inf")
    try:
        return kind != "str" or math.isfinite(float(word))
    except ValueError:
        return True  # other text


def _kind(node: Any) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"`{_said(node.value)}`" if node.value else "empty"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group of settings"


def _wanted(options: Sequence[Any]) -> str:
    kinds = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    wanted = [kinds[option] for option in options if option in kinds]
    choices = [choice for choice in choices_of(options) if not str(choice).isdigit()]
    wanted += [", ".join(map(repr, choices))] if choices else []
    wanted += ["a list"] * any(item_of(option) is not None for option in options)
    wanted += ["settings by name"] * any(dataclass_of(option) is not None for option in options)
    return " or ".join(dict.fromkeys(wanted))
