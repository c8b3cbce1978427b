"""Arms: models and sampling settings that are compared side by side."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import product
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

from zsnr.guidance import Curve, Guidance, GuidanceMethod, GuidanceSource
from zsnr.interop.adapter_file import parse_lora
from zsnr.pipeline import check_steps
from zsnr.reports.schedule import both
from zsnr.samplers import Sampler, get_sampler
from zsnr.samplers.recommend import AUTO, resolve_sampling
from zsnr.sampling import Sampling, choose_sampling, read_declared
from zsnr.schedule import Schedule
from zsnr.timesteps import is_grid_file
from zsnr.untrusted import parse_yaml

ScheduleKind = Literal["original", "rescaled"]


@dataclass(frozen=True)
class Arm:
    """A model, or several trained alike, and how it is sampled.

    Args:
        name: Name of the arm.
        schedule: The schedule as it was published, or rescaled to zero terminal SNR. None = as the
            model declares it; rescaled, for an exact denoiser.
        spacing: The timestep spacing, or "auto", see `resolved`.
        sampler: The sampler, by its registered name, or "auto".
        num_steps: S.
        guidance_scale: w. An exact denoiser of one dataset has no guidance.
        guidance_rescale: phi.
        models: Paths or hub ids; several are pooled in one arm, such as trainings of several seeds.
            Empty = an exact denoiser.
        guidance_interval: Noise levels sigma / alpha that are guided; this and the following are
            options of `Guidance`.
        guidance_method: How w acts.
        guidance_curve: Knots (log SNR, w), instead of guidance_scale.
        guidance_at_zero_snr: Whether the timestep of SNR 0 is guided.
        guidance_threshold: Percentile of the dynamic threshold.
        guidance_apg_parallel: eta of APG.
        guidance_apg_norm: r of APG.
        guidance_against: What to guide away from.
        sampler_options: Options of the sampler, such as eta, by name; those that the model
            declares, if the sampler is the one that it declares.
        timesteps: Timesteps that the model declares, if its spacing is a grid file; the file need
            not exist. Empty = those of the spacing.
        lora: Adapter files that are merged into each model, with their scales.
        max_tokens: Number of tokens of a prompt that are read, in chunks. None = as the model
            declares.
    """

    name: str = ""
    schedule: ScheduleKind | None = None
    spacing: str = AUTO
    sampler: str = AUTO
    num_steps: int = Sampling.num_steps
    guidance_scale: float = Guidance.scale
    guidance_rescale: float = Guidance.rescale
    models: tuple[str, ...] = ()
    guidance_interval: tuple[float, float] | None = Guidance.interval
    guidance_method: GuidanceMethod = Guidance.method
    guidance_curve: Curve | None = Guidance.curve
    guidance_at_zero_snr: bool = Guidance.at_zero_snr
    guidance_threshold: float | None = Guidance.threshold
    guidance_apg_parallel: float = Guidance.apg_parallel
    guidance_apg_norm: float | None = Guidance.apg_norm
    guidance_against: GuidanceSource = Guidance.against
    sampler_options: tuple[tuple[str, Any], ...] = ()
    timesteps: tuple[int, ...] = ()
    lora: tuple[tuple[str, float], ...] = ()
    max_tokens: int | None = None

    def schedule_of(self, declared: Schedule) -> Schedule:
        """Return the schedule to sample on.

        Raises:
            ValueError: `schedule` is "original", but only the rescaled table is known.
        """
        if self.schedule is None:
            return declared
        schedule = both(declared)[self.schedule]
        if self.schedule == "original" and schedule.snr[-1] == 0:
            raise ValueError(
                f"arm {self.name!r}: schedule=original, but the model's table ends at SNR 0, "
                "and the table before the rescale is not known. Leave schedule out."
            )
        return schedule

    def resolved(self, *, guided: bool = True) -> Arm:
        """Return the arm with the sampler and the spacing that "auto" resolves to.

        Args:
            guided: Whether its guidance counts. An exact denoiser of one dataset has none.

        Raises:
            ValueError: Guidance or the number of steps is out of range, or a grid file cannot be
                read.
        """
        guidance = self._guidance() if guided else None
        sampler, spacing = resolve_sampling(self.sampler, self.spacing, self.num_steps, guidance)
        return replace(self, sampler=sampler, spacing=spacing)

    def _guidance(self) -> Guidance:
        return Guidance(
            **{name.removeprefix("guidance_"): getattr(self, name) for name in GUIDANCE}
        )

    def sampling(self) -> Sampling:
        """Return its sampling settings.

        Raises:
            ValueError: The sampler is unknown, or guidance is out of range.
        """
        sampler: Sampler | str = self.sampler
        if self.sampler_options:
            sampler = get_sampler(self.sampler, **dict(self.sampler_options))
        if self.timesteps and is_grid_file(self.spacing) and len(self.timesteps) == self.num_steps:
            recorded = {name: getattr(self, name) for name in ("num_steps", "spacing", "timesteps")}
            return choose_sampling(recorded, sampler=sampler, guidance=self._guidance())
        return Sampling(sampler, self.num_steps, self.spacing, self._guidance())

    def check(self, declared: Schedule) -> None:
        """Refuse settings that cannot be sampled.

        Raises:
            ValueError: The sampler, the spacing, the number of steps and the schedule do not fit.
        """
        schedule, sampling = self.schedule_of(declared), self.sampling()
        check_steps(sampling, schedule)
        sampling.timesteps(schedule)


def _or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _pair(text: str) -> tuple[float, float]:
    left, right = parse_yaml(text) if text.startswith("[") else text.split(":")
    return float(left), float(right)


def _pair_or_none(text: str) -> tuple[float, float] | None:
    return None if text == "none" else _pair(text)


def _pairs_or_none(text: str) -> Curve | None:
    if text.startswith("["):
        return tuple((float(log_snr), float(w)) for log_snr, w in parse_yaml(text))
    return None if text == "none" else tuple(map(_pair, text.split("/")))


def _loras(text: str) -> tuple[tuple[str, float], ...]:
    words = [] if text == "none" else text.split("+")
    loras = []
    while words:
        n = next((n for n in range(1, len(words) + 1) if _is_lora("+".join(words[:n]))), 1)
        loras.append(parse_lora("+".join(words[:n])))
        words = words[n:]
    return tuple(loras)


def _is_lora(text: str) -> bool:
    """Whether it is FILE or FILE:SCALE of an existing file, whose name may hold a plus."""
    try:
        return Path(parse_lora(text)[0]).expanduser().exists()
    except ValueError:
        return False


GUIDANCE = tuple(f"guidance_{option.name}" for option in fields(Guidance))
"""The settings of guidance, by the names of the command-line options."""

_PARSED: Mapping[str, Callable[[str], Any]] = {
    "schedule": str,
    "spacing": str,
    "sampler": str,
    "num_steps": int,
    "guidance_scale": float,
    "guidance_rescale": float,
    "guidance_interval": _pair_or_none,
    "guidance_method": str,
    "guidance_curve": _pairs_or_none,
    "guidance_at_zero_snr": _flag,
    "guidance_threshold": _or_none,
    "guidance_apg_parallel": float,
    "guidance_apg_norm": _or_none,
    "guidance_against": str,
    "lora": _loras,
    "max_tokens": int,
}
_WANTED: Mapping[Callable[[str], Any], str] = {
    _pair_or_none: "LOW:HIGH, such as 0.3:5 or 0.3:inf, or none",
    _pairs_or_none: "knots LOG_SNR:W with slashes between, such as -6:1/0:7.5, or none",
    _flag: "true or false",
    _loras: "FILE or FILE:SCALE, several with + between, such as a.safetensors:0.8, or none",
    _or_none: "a number or none",
    int: "an integer",
}
SETTINGS = tuple(_PARSED)
"""The settings that a comparison may vary, by the names of the sampling options."""

_LABELS: Mapping[str, Callable[[Any], str]] = {
    "models": lambda models: ", ".join(models),
    "lora": lambda loras: lora_text(loras) if loras else "no LoRA",
    "max_tokens": lambda count: f"{count} tokens" if count else "declared tokens",
    "schedule": lambda kind: f"{kind} schedule" if kind else "declared schedule",
    "spacing": str,
    "sampler": str,
    "num_steps": lambda S: f"S = {S}",
    "guidance_scale": lambda w: f"w = {w:g}",
    "guidance_rescale": lambda phi: f"phi = {phi:g}",
    "guidance_interval": lambda ends: (
        f"sigma / alpha {guidance_text(ends)}" if ends else "all noise levels"
    ),
    "guidance_method": str,
    "guidance_curve": lambda knots: f"w by log SNR {guidance_text(knots)}" if knots else "one w",
    "guidance_at_zero_snr": lambda on: f"{'' if on else 'not '}guided at SNR 0",
    "guidance_threshold": lambda q: "no threshold" if q is None else f"threshold {q:g}",
    "guidance_apg_parallel": lambda eta: f"eta = {eta:g}",
    "guidance_apg_norm": lambda r: "no bound" if r is None else f"r = {r:g}",
    "guidance_against": lambda source: f"against {source}",
    "sampler_options": lambda options: ", ".join(f"{name} = {value}" for name, value in options),
}


def guidance_text(value: Any) -> str:
    """Write an option of guidance as `parse_setting` reads it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"{value:g}"
        case (tuple() | list(), *_):
            return "/".join(map(guidance_text, value))
        case tuple() | list():
            return ":".join(map(guidance_text, value))
    return str(value)


def lora_text(loras: Sequence[tuple[str, float]]) -> str:
    """Write adapters as `parse_setting` reads them."""
    return "+".join(name if scale == 1 else f"{name}:{scale:g}" for name, scale in loras)


def make_arms(
    models: Sequence[str] = (),
    texts: Sequence[str] = (),
    variations: Sequence[str] = (),
    defaults: Arm = Arm(),
    *,
    given: Mapping[str, Any] | None = None,
    declared: Callable[[str], Mapping[str, Any]] | None = None,
    exact: bool = False,
) -> list[Arm]:
    """Make the arms that a command line specifies.

    Each of `texts` is an arm; one that names no model is an arm of each of `models`. Without texts,
    each of `models` is an arm. Each variation multiplies them by its values. In the end "auto" is
    replaced by the sampler and the spacing that it resolves to in each arm.

    Args:
        models: Paths or hub ids; "a,b" is one arm of two models.
        texts: Such as "name=fixed model=a.ckpt,b.ckpt spacing=trailing num_steps=25".
        variations: Such as "guidance_rescale=0,0.5,1" or "guidance_curve=none,-6:1/0:7.5".
        defaults: Settings of an arm that names none and whose models declare none.
        given: Settings of all arms that do not name them, by name.
        declared: Returns the sampling settings that a model declares, which are then the defaults
            of its arm; see `choose_sampling`. None = every arm has `defaults`.
        exact: Whether the arms are of an exact denoiser: no models, no guidance.

    Raises:
        ValueError: A text cannot be read, an arm has no model, or two arms are the same.
    """
    if not (models or texts or exact):
        raise ValueError(
            "There is nothing to compare: name models, or compare the exact denoiser of a dataset."
        )
    asked = [{**(given or {}), **_settings(text)} for text in texts] or [dict(given or {})]
    if exact and (models or any("models" in settings for settings in asked)):
        raise ValueError("The exact denoiser is compared without a model: leave the models out.")
    named: list[dict[str, Any]] = []
    for settings in asked:
        if exact or "models" in settings:
            named.append(settings)
        elif not models:
            raise ValueError(
                f"arm {settings.get('name', '1')!r} has no model: name one or more as arguments, "
                "or model=PATH in --arm."
            )
        else:
            named += [{**settings, "models": _paths(model)} for model in models]
    varied = [_variation(text) for text in variations]
    names = [name for name, _ in varied]
    if len(set(names)) < len(names):
        raise ValueError(f"--vary {', '.join(names)}: wanted each setting once.")
    arms = [
        _arm(_base(settings, defaults, declared), settings | dict(zip(names, values, strict=True)))
        for settings in named
        for values in product(*(values for _, values in varied))
    ]
    for arm in arms:
        if exact and any(getattr(arm, name) != getattr(defaults, name) for name in GUIDANCE):
            raise ValueError("An exact denoiser of one dataset has no guidance: leave it out.")
        if exact and arm.lora:
            raise ValueError("An exact denoiser has no weights to merge a LoRA into: leave it out.")
        if exact and arm.max_tokens is not None:
            raise ValueError("An exact denoiser reads no prompts: leave max_tokens out.")
        if arm.schedule not in (None, *get_args(ScheduleKind)):
            known = ", ".join(get_args(ScheduleKind))
            raise ValueError(f"schedule={arm.schedule!r} is unknown. Known: {known}.")
    return _named([arm.resolved(guided=not exact) for arm in arms])


def declared_arm(declared: Mapping[str, Any]) -> Arm:
    """Return an arm that samples as a model declares; see `choose_sampling`."""
    told = read_declared(declared)
    return Arm(
        sampler=told.sampler,
        spacing=told.spacing,
        num_steps=told.num_steps,
        **{name: getattr(told.guidance, name.removeprefix("guidance_")) for name in GUIDANCE},
        sampler_options=tuple(told.sampler_options.items()),
        timesteps=told.grid or (),
    )


def _arm(base: Arm, settings: Mapping[str, Any]) -> Arm:
    """Override settings; another sampler has other options, and other steps other timesteps."""
    if "sampler" in settings:
        base = replace(base, sampler_options=())
    if base.timesteps and settings.get("num_steps", base.num_steps) != base.num_steps:
        base = replace(base, timesteps=(), spacing=AUTO)
    if "spacing" in settings:
        base = replace(base, timesteps=())
    return replace(base, **settings)


def _base(
    settings: Mapping[str, Any],
    defaults: Arm,
    declared: Callable[[str], Mapping[str, Any]] | None,
) -> Arm:
    """Return the settings that an arm has where it names none.

    Raises:
        ValueError: Its models declare different ones.
    """
    if declared is None or not settings.get("models"):
        return defaults
    first, *others = (declared_arm(declared(path)) for path in settings["models"])
    for other in others:
        for name in differing([first, other]):
            name = "spacing" if name == "timesteps" else name
            if name not in settings:
                raise ValueError(
                    f"The models {', '.join(settings['models'])} of one arm declare different "
                    f"sampling: give --{name.replace('_', '-')}."
                )
    return first


def _settings(text: str) -> dict[str, Any]:
    """Read the settings of an arm from words such as "name=fixed spacing=trailing num_steps=25".

    Raises:
        ValueError: A setting is unknown or given twice, or its value cannot be read.
    """
    settings: dict[str, Any] = {}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"arm {text!r}: {error}.") from error
    for word in words:
        name, _, value = word.partition("=")
        name = name.replace("-", "_")
        if name == "model":
            name = "models"
        known = ("name", "model", *_PARSED)
        if name not in (*known, "models"):
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            raise ValueError(f"arm {text!r}: unknown setting {name!r}; {hint}")
        if not value:
            raise ValueError(f"arm {text!r}: {word!r} has no value: wanted {word}=VALUE.")
        if name in settings:
            raise ValueError(f"arm {text!r}: {word.partition('=')[0]} is given twice.")
        settings[name] = _paths(value) if name == "models" else parse_setting(name, value)
    return settings


def differing(arms: Sequence[Arm]) -> list[str]:
    """List the settings in which arms differ, `models` among them."""
    names = [f.name for f in fields(Arm) if f.name != "name"]
    return [
        name
        for name in names
        if any(getattr(arm, name) != getattr(arms[0], name) for arm in arms[1:])
    ]


def _variation(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    name = name.replace("-", "_")
    if not equals or name not in _PARSED:
        near = get_close_matches(name, _PARSED, n=1) if name not in _PARSED else []
        hint = f"; did you mean {near[0]}?" if near else f" with one of {', '.join(_PARSED)}."
        raise ValueError(f"--vary {text}: wanted SETTING=VALUE,VALUE,...{hint}")
    return name, [parse_setting(name, value) for value in values.split(",")]


def parse_setting(name: str, text: str) -> Any:
    """Read a setting of an arm from a word without spaces and commas.

    An interval is LOW:HIGH, such as 0.3:inf; a curve is knots LOG_SNR:W with slashes between, such
    as -6:1/0:7.5; "none" is no interval, curve, threshold or bound. Lists of YAML, as a config
    holds them, are read too.

    Raises:
        ValueError: The text cannot be read. Whether the value is in range is checked later.
    """
    parse = _PARSED.get(name, str)
    try:
        return parse(text)
    except (TypeError, ValueError) as error:
        wanted = _WANTED.get(parse, "a number")
        raise ValueError(f"{name}={text!r}: wanted {wanted}.") from error


def _paths(text: str) -> tuple[str, ...]:
    if Path(text).expanduser().exists():  # a name may hold a comma
        return (text,)
    paths = tuple(text.split(","))
    if not all(paths):
        raise ValueError(f"model={text!r}: wanted a path, or several with commas between.")
    if len(set(paths)) < len(paths):
        raise ValueError(f"model={text!r}: wanted each model once.")
    return paths


def _named(arms: Sequence[Arm]) -> list[Arm]:
    """Name each arm after the settings in which it differs from the others."""
    short, files = _short(arms), _lora_names(arms)
    named: list[Arm] = []
    for arm in arms:
        alike = [other for other in arms if other.name == arm.name] if arm.name else arms
        parts = [arm.name] if arm.name else []
        for name in _LABELS:
            if name in differing(alike):
                value = getattr(arm, name)
                if name == "models":
                    value = short[value]
                elif name == "lora":
                    value = [(files[path], scale) for path, scale in value]
                parts.append(_LABELS[name](value))
        alone = ", ".join(PurePath(model).name for model in arm.models) or "exact denoiser"
        named.append(replace(arm, name=", ".join(parts) or alone))
    names = [arm.name for arm in named]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        arm = next(arm for arm in named if arm.name == twice[0])
        of = f" of {', '.join(arm.models)}" if arm.models else ""
        raise ValueError(
            f"Two arms{of} are the same: {twice[0]!r}, sampler {arm.sampler}, spacing "
            f"{arm.spacing}, which 'auto' may also resolve to. Wanted arms that differ."
        )
    return named


def _lora_names(arms: Sequence[Arm]) -> dict[str, str]:
    """Name adapters by their files without ending, by their paths where two have one name."""
    paths = list(dict.fromkeys(path for arm in arms for path, _ in arm.lora))
    names = [PurePath(path).name.removesuffix(".safetensors") for path in paths]
    return {
        path: name if names.count(name) == 1 else path
        for path, name in zip(paths, names, strict=True)
    }


def _short(arms: Sequence[Arm]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Remove from paths the parts that all have in common, at both ends."""
    every = list(dict.fromkeys(path for arm in arms for path in arm.models))
    parts = {path: list(PurePath(path).parts) for path in every}
    if len(every) > 1:
        for end in (0, -1):
            while len({p[end] for p in parts.values()}) == 1 and all(
                len(p) > 1 for p in parts.values()
            ):
                for p in parts.values():
                    p.pop(end)
    return {arm.models: tuple("/".join(parts[path]) for path in arm.models) for arm in arms}
