"""Samplers by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from zsnr.samplers.base import Sampler

_SamplerClass = TypeVar("_SamplerClass", bound=type[Sampler])
_SAMPLERS: dict[str, type[Sampler]] = {}


def register_sampler(name: str) -> Callable[[_SamplerClass], _SamplerClass]:
    """Register a Sampler class under a name.

    A reloaded class takes its own place again.

    Raises:
        ValueError: Another class has the name.
        TypeError: Not a subclass of Sampler, or one without `calls` and `sample`.
    """

    def register(sampler: _SamplerClass) -> _SamplerClass:
        if name == "auto":
            raise ValueError("Sampler 'auto' stands for what is recommended. Choose another name.")
        if not (isinstance(sampler, type) and issubclass(sampler, Sampler)):
            raise TypeError(f"{sampler!r} is not a subclass of zsnr.Sampler.")
        known = _SAMPLERS.get(name)
        if known is not None and known.__qualname__ != sampler.__qualname__:
            raise ValueError(f"Sampler {name!r} is registered already. Choose another name.")
        if sampler.calls is Sampler.calls and sampler.sample is Sampler.sample:
            raise TypeError(f"{sampler.__name__} has no `calls` and no `sample` method: write one.")
        _SAMPLERS[name] = sampler
        return sampler

    return register


def get_sampler(name: str, **options: Any) -> Sampler:
    """Build the sampler of a name with its options, such as "ddim" with eta=0.5.

    Raises:
        ValueError: Unknown name or option; the known ones are listed.
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
    own_path = f"{cls.__module__}.{cls.__qualname__}"
    return next((name for name, known in _SAMPLERS.items() if known is cls), own_path)
