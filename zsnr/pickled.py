"""Parsing of pickles without unpickling: nothing that they name is imported or called.

Unpickling executes the file: it calls functions, and sets attributes, also those of classes. Here
each object becomes an `Inert`, which only stores its name, arguments and state.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

_FREE_STEPS = 2_000_000
_BYTES_PER_STEP = 30  # a tensor takes about 40 steps, and over a kilobyte of its file
_MAX_DEPTH = 100
_MAX_VALUES = 10_000_000
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(eq=False, slots=True)
class Inert:
    """A pickle's description of an object, or the name of a class or function.

    Args:
        name: Module and name, such as "torch.Size".
        args: Arguments of the call. None = a name that is not called.
        state: State that the pickle sets on the object. None = none.
        items: Items that it adds to the object: entries of a list, (key, value) of a dict.
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    items: list[Any] = field(default_factory=list)


def read_inert(data: bytes, size: int) -> Any:
    """Read a pickle of plain values and `Inert`s.

    Args:
        data: The pickle.
        size: Size of the files that it describes, in bytes, which limits its number of steps.

    Raises:
        ValueError: The pickle holds anything else, or takes too many steps.
    """
    try:
        return _interpret(data, _FREE_STEPS + size // _BYTES_PER_STEP)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("it is not a pickle of plain values") from error


def _interpret(data: bytes, max_steps: int) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    argument: Any
    for steps, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        kind = opcode.name
        if steps > max_steps:
            raise ValueError(f"it takes over {max_steps} steps")
        if kind == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif kind in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif kind in _LITERALS:
            stack.append(argument)
        elif kind in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif kind in _TUPLES:
            count = _TUPLES[kind]
            parts = tuple(stack[len(stack) - count :])
            del stack[len(stack) - count :]
            stack.append(parts)
        elif kind in _CONSTANTS:
            stack.append(_CONSTANTS[kind])
        elif kind == "MARK":
            marks.append(len(stack))
        elif kind == "EMPTY_DICT":
            stack.append({})
        elif kind == "EMPTY_LIST":
            stack.append([])
        elif kind == "TUPLE":
            stack.append(tuple(since_mark()))
        elif kind == "SETITEMS":
            values = since_mark()
            _set_items(stack[-1], values)
        elif kind == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif kind == "APPENDS":
            values = since_mark()
            _append(stack[-1], values)
        elif kind == "APPEND":
            value = stack.pop()
            _append(stack[-1], [value])
        elif kind in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            if function.args is not None or not isinstance(arguments, tuple):
                raise ValueError("it calls something that is not a name")
            if _allocates(function.name):
                raise ValueError(f"it calls {function.name[:80]}, which allocates any size")
            stack.append(Inert(function.name, arguments))
        elif kind == "BUILD":
            state = stack.pop()
            if stack[-1].args is None or stack[-1].state is not None:
                raise ValueError(f"it sets attributes of {stack[-1].name[:80]!r}")
            stack[-1].state = state
        elif kind == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if not isinstance(name, str) or not isinstance(module, str):
                raise ValueError("it holds a name that is not text")
            stack.append(Inert(f"{module}.{name}"))
        elif kind == "GLOBAL":
            stack.append(Inert(argument.replace(" ", ".", 1)))
        elif kind == "BINPERSID":
            stack.append(Inert("persistent", (stack.pop(),)))
        elif kind == "STOP":
            break
        elif kind not in ("PROTO", "FRAME"):
            raise ValueError(f"it holds {kind}, which plain values do not need")
    return stack.pop()


def _allocates(name: str) -> bool:
    """Whether a function that torch's weights-only unpickler may call allocates any given size."""
    module, _, last = name.rpartition(".")
    return last == "bytearray" or (module == "torch" and last not in ("Size", "device"))


def _set_items(target: Any, values: list[Any]) -> None:
    keys, entries = values[::2], values[1::2]
    # The hash of nested tuples is recursive in C: deep ones crash the process.
    if not all(isinstance(key, str | int | float | Inert | None) for key in keys):
        raise ValueError("it has keys that are neither text nor numbers")
    if isinstance(target, dict):
        target.update(zip(keys, entries, strict=True))
    else:
        target.items += zip(keys, entries, strict=True)


def _append(target: Any, values: list[Any]) -> None:
    (target if isinstance(target, list) else target.items).extend(values)


def check_extent(value: Any) -> None:
    """Limit the nesting depth of a value, and its number of values when shared parts are expanded.

    Raises:
        ValueError: The value is nested too deeply, contains itself, or expands to too many values.
    """
    extents: dict[int, tuple[int, int] | None] = {}  # number and depth; None = in progress
    waiting = [value]
    while waiting:
        current = waiting[-1]
        parts = _parts(current)
        if not parts or extents.get(id(current)):
            waiting.pop()
        elif id(current) not in extents:
            extents[id(current)] = None
            waiting += [part for part in parts if id(part) not in extents]
            if any(id(part) in extents and extents[id(part)] is None for part in parts):
                raise ValueError("it contains itself")
        else:
            waiting.pop()
            sizes = [extents.get(id(part)) or (1, 0) for part in parts]
            count, depth = 1 + sum(n for n, _ in sizes), 1 + max(d for _, d in sizes)
            if count > _MAX_VALUES:
                raise ValueError("its shared parts expand to too many values")
            if depth > _MAX_DEPTH:
                raise ValueError("it is nested too deeply")
            extents[id(current)] = (count, depth)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        return [*value]
    if isinstance(value, Inert):
        return [*(value.args or ()), value.state, *value.items]
    return []
