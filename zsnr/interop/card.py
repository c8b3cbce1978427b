"""The model card of an exported folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsnr.checkpoints.run_facts import published
from zsnr.guidance import Guidance
from zsnr.interop.declarations import is_stable_diffusions
from zsnr.interop.declared import SCHEDULERS
from zsnr.interop.scheduler_config import needs_table, schedule_text
from zsnr.render import render
from zsnr.schedule import NoiseSchedule, RectifiedFlow, Schedule, schedule_from_settings
from zsnr.untrusted import printable

if TYPE_CHECKING:
    from markupsafe import Markup

_UNKNOWN = "not recorded"
_OTHER_GUIDANCE = tuple(
    f"guidance_{option.name}"
    for option in fields(Guidance)
    if option.name not in ("scale", "rescale", "interval")
)

# What diffusers' schedulers make of this folder's scheduler config by `from_config`.
EXACT = tuple(
    name
    for name, cls in SCHEDULERS.items()
    if cls.finite_at_zero and "snr_shift_scale" not in cls.defaults
)
PATCHED = tuple(name for name, cls in SCHEDULERS.items() if cls.patches)
DROPPING = tuple(name for name, cls in SCHEDULERS.items() if not cls.rescales)
DISTILLED = tuple(name for name, cls in SCHEDULERS.items() if cls.grid == "distilled")


def model_card(name: str, facts: Mapping[str, Any]) -> str:
    """Write the README.md of a model.

    Args:
        name: Title of the card, the folder's name.
        facts: What is known: `schedule` (settings), `prediction_type`, `image_size`, `dtype`,
            `pipeline` (class in diffusers), and of run.json what there is: `sampling`, `loss`,
            `data`, `global_step`, `batch_size`, `learning_rate`, `ema`, `averaged`, `metrics`,
            `start`, `caption_dropout`, `offset_noise`, `versions`, `zsnr_version`; `loras`, the
            names and scales of merged adapters. What is missing is called not recorded.
    """
    schedule = schedule_from_settings(facts["schedule"])
    flow = isinstance(schedule, RectifiedFlow)
    last = schedule.num_timesteps - 1
    alpha, sigma = schedule(last)
    fixed = float(schedule.snr[-1]) == 0
    pipeline = facts.get("pipeline", "StableDiffusionPipeline")
    values = {
        "name": name,
        "tags": _tags(pipeline, facts["prediction_type"], fixed, flow),
        "fixed": fixed,
        "flow": flow,
        "shift": f"{schedule.shift:g}" if isinstance(schedule, RectifiedFlow) else "1",
        "size": facts.get("image_size", _UNKNOWN),
        "alpha": float(alpha),
        "sigma": float(sigma),
        "snr": float(schedule.snr[-1]),
        "T": schedule.num_timesteps,
        "schedule": schedule_text(schedule),
        "prediction_type": facts["prediction_type"],
        "table_needed": isinstance(schedule, NoiseSchedule) and needs_table(schedule),
        "standard_schedule": is_stable_diffusions(schedule),
        "pipeline": pipeline,
        "xl": "XL" in pipeline,
        "source": _string(f"path/to/{name}"),
        "dtype": facts.get("dtype", "float32"),
        "divisors": _divisors(schedule.num_timesteps),
        **_sampling(facts, schedule, fixed),
        "exact": [name for name in EXACT if name not in DISTILLED],
        "patched": list(PATCHED),
        "dropping": list(DROPPING),
        "distilled": list(DISTILLED),
        "training": _training(facts),
    }
    return render(Path(__file__).parent / "templates" / "card.md", values)


def _tags(pipeline: str, prediction_type: str, fixed: bool, flow: bool) -> list[Markup]:
    return [
        _string("stable-diffusion-xl" if "XL" in pipeline else "stable-diffusion"),
        _string(f"diffusers:{pipeline}"),
        _string("zsnr"),
        *([_string("zero-terminal-snr")] if fixed else []),
        *([_string("rectified-flow")] if flow else []),
        _string(str(prediction_type).replace("_", "-")),
    ]


def _string(text: str) -> Markup:
    """Write a string of YAML and of Python, on one line and without characters that hide others."""
    from markupsafe import Markup

    return Markup(json.dumps(text, ensure_ascii=printable(text, one_line=True) != text))


def _sampling(facts: Mapping[str, Any], schedule: Schedule, fixed: bool) -> dict[str, Any]:
    """Collect what the card says about sampling, from the settings of the model's previews."""
    sampling = _mapping(published(facts).get("sampling"))
    # A method that a pipeline of diffusers lacks does not tell which w plain guidance needs there.
    others = {name: sampling[name] for name in _OTHER_GUIDANCE if sampling.get(name) is not None}
    plain = sampling.get("guidance_method", Guidance.method) == Guidance.method
    scale = sampling.get("guidance_scale") if plain and "guidance_curve" not in others else None
    T = schedule.num_timesteps
    wanted = _number(sampling.get("num_steps"), 50)
    spacing, sampler = sampling.get("spacing", "trailing"), sampling.get("sampler", "ddim")
    previews_with = None
    if spacing != "trailing" or sampler != "ddim":
        grid = sampling.get("timesteps")
        timesteps = f"the timesteps {_said(grid)}" if grid else f"{_said(spacing)} timesteps"
        previews_with = f"{_said(sampler)} on {timesteps}"
    interval = sampling.get("guidance_interval")
    guidance = {
        "guidance_scale": sampling.get("guidance_scale"),
        "guidance_rescale": sampling.get("guidance_rescale"),
        **others,
    }
    return {
        "steps": min((s for s in range(1, T + 1) if T % s == 0), key=lambda s: abs(s - wanted)),
        "scale": _number(scale, Guidance.scale),
        "rescale": _number(
            sampling.get("guidance_rescale") if plain else None, Guidance.rescale if fixed else 0.0
        ),
        "tried": "guidance_scale" in sampling and not others,
        "previews_with": previews_with,
        "interval": None if interval is None else _interval(interval),
        "guidance": others
        and ", ".join(
            f"{name.removeprefix('guidance_').replace('_', ' ')} {_guidance(value)}"
            for name, value in guidance.items()
        ),
    }


def _training(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = published(facts)
    loss, start = _mapping(facts.get("loss")), facts.get("start")
    if isinstance(start, Mapping):
        start = start.get("unet")
    elif start is None and "start" in facts:
        start = "random weights"
    rows = [
        ("started from", start),
        ("data", facts.get("data") or None),
        ("steps", facts.get("global_step")),
        ("batch", facts.get("batch_size")),
        ("learning rate", facts.get("learning_rate")),
        ("loss weighting", loss.get("name")),
        ("caption dropout", facts.get("caption_dropout")),
        ("offset noise", facts.get("offset_noise")),
        ("averaging of weights", facts.get("averaged") or facts.get("ema")),
        ("weights here", facts.get("weights")),
        *([("merged adapters", facts["loras"])] if facts.get("loras") else []),
        ("stored as", facts.get("dtype")),
        *(sorted((_mapping(facts.get("metrics")) or {"val/loss": None}).items())),
        ("zsnr", facts.get("zsnr_version")),
        *(sorted(_mapping(facts.get("versions")).items())),
    ]
    return [(name, _said(value)) for name, value in rows]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any, default: float) -> float:
    """Take a number, and nothing else: it goes into code that people run."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fine else default


def _divisors(T: int) -> str:
    few = [s for s in (5, 10, 20, 25, 40, 50, 100) if T % s == 0]
    return ", ".join(str(s) for s in few or [s for s in range(1, T + 1) if T % s == 0][-7:])


def _said(value: Any) -> str:
    """Say a recorded value in a cell."""
    if value is None:
        return _UNKNOWN
    if isinstance(value, Mapping):
        said = ", ".join(f"{k}: {_said(v)}" for k, v in value.items() if v is not None)
        return said or _UNKNOWN
    if isinstance(value, list | tuple):
        return ", ".join(_said(v) for v in value) or _UNKNOWN
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _interval(ends: Any) -> str:
    """Say an interval of noise levels, whose infinite end JSON has as null."""
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return _said(ends)
    low, high = (_said(float("inf") if end is None else end) for end in ends)
    return f"sigma / alpha from {low} to {high}"


def _guidance(value: Any) -> str:
    """Say an option of guidance; a curve knot by knot."""
    if isinstance(value, list | tuple):
        return " / ".join(_said(knot).replace(", ", ":") for knot in value)
    return _said(value)
