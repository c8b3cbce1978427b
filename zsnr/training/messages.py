"""What jsonargparse and Lightning say of a wrong setting, in one sentence about the setting."""

from __future__ import annotations

import difflib
import re
import sys

from zsnr.training.settings import BASES, accepted_arguments, known_classes, names
from zsnr.untrusted import clipped

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "settings by name",
    "NoneType": "null",
}
_KEY = re.compile(r"Parser key \"([\w.\[\]]+)\":?")
_REQUIRED = ("codec", "conditioner", "network")


def short_message(message: str) -> str:
    """Make one sentence of a message of jsonargparse, with the known names where a name is wrong.

    Args:
        message: Its text, which may list several attempts on several lines.

    Returns:
        The setting, its value and what was wanted, without the library's own terms.
    """
    line = " ".join(message.split())
    keys = _KEY.findall(line)
    nested = re.search(r"NestedArg\(key='([\w.]+)'", line)
    if nested and keys and ("dot import path" in line or "is abstract" in line):
        return (
            f"{keys[0]} names no class, so it has no `{nested[1]}`: name one first, as in "
            f"--{keys[0]} CLASS."
        )
    for suffix, base in BASES.items():
        wrong = "import path" in line or "Not a valid subclass" in line
        if keys and keys[0].endswith(suffix) and wrong:
            known = ", ".join(known_classes(base))
            return f"{keys[0]}: no such class. Known: {known}, or the import path of your own."
    missing = re.findall(r"[Kk]ey ['\"]([\w.]+)['\"] is required|required: ([\w., -]+)", line)
    if missing and "class_path" not in line:
        wanted = ", ".join(first or second for first, second in missing).replace("--", "")
        wanted = re.sub(r"\b(?:fit|validate|test|predict)\.", "", wanted)
        if any(f"model.{part}" in wanted for part in _REQUIRED):
            return (
                f"{wanted} {'are' if ',' in wanted else 'is'} not set: give a config with -c FILE. "
                "`zsnr configs list` shows those that come with the package."
            )
        return f"{wanted} is not set."
    lacks = re.search(r"class_path '([\w.]+)': .*arguments are required: (\w+(?:, \w+)*)", line)
    if lacks:
        return f"{_setting(keys)}{lacks[1]} needs {lacks[2]}."
    refused = re.search(r"class_path '([\w.]+)': Option '(\w+)' is not accepted", line)
    if refused:
        return f"{keys[0]}.init_args has no `{refused[2]}`.{_argument_hint(*refused.groups())}"
    unknown = re.search(r"(?:accept option '|[Oo]ption '|arguments: --)([\w.]+)", line)
    if unknown:
        near = difflib.get_close_matches(unknown[1], names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else " `zsnr fit --help` shows the options."
        return f"{_setting(keys)}there is no setting {unknown[1]!r}.{hint}"
    union = re.search(r"Errors:\s+- (.*?)(?:\n *- |\nGiven |$)", message, re.DOTALL)
    if union and "Expected a" not in union[1]:  # of this package, from the class itself
        return _setting(keys[:1]) + _without_terms(" ".join(union[1].split()), keys)
    value = re.search(r"(?:Got value|Given value): (.+?)(?:\.? Got value|$| - )", line)
    types = re.findall(
        r"Expected an? (<class '[\w.]+'>|typing\.Literal\[[^\]]*\]|tuple with \d+ elements)", line
    )
    if types:
        said = value is not None and "Namespace" not in value[1]
        came = f"`{clipped(value[1])}` is wrong: " if value and said else ""
        return f"{_setting(keys)}{came}wanted {' or '.join(map(_type, dict.fromkeys(types)))}."
    return clipped(_without_terms(line, keys), 400)


def _argument_hint(path: str, name: str) -> str:
    """Suggest an argument of a class that jsonargparse has imported."""
    module, _, cls = path.rpartition(".")
    known = accepted_arguments(getattr(sys.modules.get(module), cls, object))
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f" Did you mean `{near[0]}`?"
    return f" Known: {', '.join(known)}." if known else ""


def _setting(keys: list[str]) -> str:
    return f"{'.'.join(dict.fromkeys(keys))}: " if keys else ""


def _type(name: str) -> str:
    if name.startswith("tuple with"):
        return f"a list of {name.split()[2]} values"
    if "Literal" in name:
        return name.partition("[")[2].rstrip("]")
    return _TYPES.get(name[8:-2].rpartition(".")[2], name[8:-2])


def _without_terms(line: str, keys: list[str]) -> str:
    """Take the library's own terms out of a message."""
    line = _KEY.sub(lambda match: "" if match[1] in keys else f"{match[1]}:", line)
    line = re.sub(r"Does not validate against any of the Union subtypes.*?Errors: ", "", line)
    line = re.sub(r"Problem with given class_path '([\w.]+)':", r"\1:", line)
    line = re.sub(r"Subtypes: \[.*?\] ", "", line)
    line = re.sub(r"<class '([\w.]+)'>", lambda match: _TYPES.get(match[1], match[1]), line)
    line = re.sub(r"\bNamespace\((.*)\)", r"\1", line)
    return line.replace("Union", "types").removeprefix("- ")
