"""Samplers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

from zsnr.samplers.base import Sampler

_SamplerClass = TypeVar("_SamplerClass", bound=type[Sampler])
_SAMPLERS: dict[str, type[Sampler]] = {}


def register_sampler(name: str) -> Callable[[_SamplerClass], _SamplerClass]:
    """Register a Sampler class under a name.

    A reloaded class replaces its previous version.

    Raises:
        ValueError: Another class has the name.
        TypeError: The class is not a subclass of Sampler, or implements neither `calls` nor
            `sample`.
    """

    def register(sampler: _SamplerClass) -> _SamplerClass:
        if name == "auto":
            raise ValueError("'auto' selects the recommended sampler. Choose another name.")
        if not (isinstance(sampler, type) and issubclass(sampler, Sampler)):
            raise TypeError(f"{sampler!r} is not a subclass of zsnr.Sampler.")
        registered = _SAMPLERS.get(name)
        if registered is not None and registered.__qualname__ != sampler.__qualname__:
            raise ValueError(f"Sampler {name!r} is already registered. Choose another name.")
        if sampler.calls is Sampler.calls and sampler.sample is Sampler.sample:
            raise TypeError(f"{sampler.__name__} must implement `calls` or `sample`.")
        _SAMPLERS[name] = sampler
        return sampler

    return register


def get_sampler(name: str, **options: Any) -> Sampler:
    """Build a registered sampler with its options, such as "ddim" with eta=0.5.

    Raises:
        ValueError: The name or an option is unknown.
    """
    if name not in _SAMPLERS:
        known = ", ".join(repr(known) for known in available_samplers())
        raise ValueError(f"Sampler {name!r} is unknown. Known: {known}.")
    sampler = _SAMPLERS[name]
    try:
        inspect.signature(sampler).bind(**options)
    except TypeError as error:
        accepted = ", ".join(inspect.signature(sampler).parameters) or "none"
        raise ValueError(f"Sampler {name!r}: {error}. Its options: {accepted}.") from error
    return sampler(**options)


def available_samplers() -> list[str]:
    """List the registered names."""
    return sorted(_SAMPLERS)


def sampler_name(sampler: Sampler) -> str:
    """Return the name a sampler's class is registered under, else its import path."""
    cls = type(sampler)
    import_path = f"{cls.__module__}.{cls.__qualname__}"
    return next((name for name, registered in _SAMPLERS.items() if registered is cls), import_path)


def sampler_options(sampler: Any) -> dict[str, Any]:
    """Return the options of a sampler, such that `get_sampler(name, **options)` is equal."""
    return asdict(sampler) if is_dataclass(type(sampler)) else {}
