"""Components as plain values, from which a checkpoint rebuilds them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from zsnr.failures import is_ours
from zsnr.untrusted import clipped, shown


@runtime_checkable
class Described(Protocol):
    """A component that returns its constructor arguments as plain values."""

    def settings(self) -> dict[str, Any]: ...


T = TypeVar("T")


def describe(component: Described) -> dict[str, Any]:
    """Return {"class_path": ..., "init_args": ...}, as in a YAML config.

    Args:
        component: The component. A wrapper returns the component it wraps as `described`.
    """
    stands_for = getattr(component, "described", None)
    if stands_for is not None:
        return describe(stands_for)
    return {"class_path": class_path(component), "init_args": component.settings()}


def class_path(component: object) -> str:
    """Return the import path of its class, without the wrapper class that sharding adds."""
    classes = type(component).__mro__
    cls = next(c for c in classes if not c.__module__.startswith("torch.distributed."))
    return f"{cls.__module__}.{cls.__qualname__}"


def build(description: Mapping[str, Any], base: type[T]) -> T:
    """Build a component from its description.

    Args:
        description: The result of `describe`.
        base: The required base class.

    Raises:
        ValueError: The class is not installed, belongs to a module outside this package that has
            not been imported, is not a `base`, or refuses the arguments.
    """
    cls = class_of(description, base)
    try:
        return cls(**description.get("init_args", {}))
    except (OSError, ImportError):
        raise
    except Exception as error:  # of arguments that somebody else wrote, in any way
        if isinstance(error, ValueError) and is_ours(error):
            raise
        path = description["class_path"]
        raise ValueError(f"{path}: {clipped(str(error) or repr(error), 300)}.") from error


def class_of(description: Mapping[str, Any], base: type[T]) -> type[T]:
    """Return the class that a description names, without building it.

    Args:
        description: What `describe` returned.
        base: The class it must be derived from.

    Raises:
        ValueError: The class is not installed, is of a module outside this package that has not
            been imported, or is no `base`.
    """
    if not isinstance(description, Mapping):
        raise ValueError(f"A {base.__name__} is described by {shown(description)}: wanted a class.")
    path = description.get("class_path", "")
    if not isinstance(path, str) or not isinstance(description.get("init_args", {}), Mapping):
        raise ValueError(
            f"A {base.__name__} is described by class_path={shown(path)}: wanted text."
        )
    module_name, _, name = path.rpartition(".")
    if module_name.split(".")[0] != "zsnr" and module_name not in sys.modules:
        raise ValueError(
            f"{path!r} cannot be imported for a checkpoint, because that would execute its "
            f"module: import {module_name or 'it'} first."
        )
    try:
        cls = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path!r} cannot be imported: {error}. Install the package that defines it."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{path!r} is not a {base.__name__}.")
    return cls
