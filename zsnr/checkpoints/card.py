"""The model card of an exported folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from zsnr.checkpoints.declared import SCHEDULERS
from zsnr.checkpoints.run_facts import published
from zsnr.checkpoints.scheduler_config import needs_table
from zsnr.checkpoints.single_file import is_marked_schedule
from zsnr.guidance import Guidance
from zsnr.schedule import NoiseSchedule, beta_ends

_UNKNOWN = "not recorded"
_OTHER_GUIDANCE = tuple(
    f"guidance_{option.name}"
    for option in fields(Guidance)
    if option.name not in ("scale", "rescale", "interval")
)

# What diffusers' schedulers make of this folder's scheduler config by `from_config`.
EXACT = tuple(name for name, cls in SCHEDULERS.items() if cls.finite_at_zero)
PATCHED = tuple(name for name, cls in SCHEDULERS.items() if cls.patches)
DROPPING = tuple(name for name, cls in SCHEDULERS.items() if not cls.rescales)
DISTILLED = tuple(name for name, cls in SCHEDULERS.items() if cls.grid == "distilled")


def model_card(name: str, facts: Mapping[str, Any]) -> str:
    """Write the README.md of a model.

    Args:
        name: Title of the card, the folder's name.
        facts: What is known: `schedule` (settings), `prediction_type`, `image_size`, `dtype`,
            `pipeline` (class in diffusers), and of run.json what there is: `sampling`, `loss`,
            `data`, `global_step`, `batch_size`, `learning_rate`, `ema`, `metrics`, `start`,
            `caption_dropout`, `offset_noise`, `versions`, `zsnr_version`. What is missing is
            called not recorded.
    """
    schedule = NoiseSchedule.from_settings(facts["schedule"])
    fixed = float(schedule.snr[-1]) == 0
    parts = [
        _front_matter(name, facts, fixed),
        f"# {_plain(name)}",
        _summary(facts, schedule, fixed),
        _proof(facts, schedule, fixed),
        _usage(name, facts, schedule, fixed),
        _schedulers(facts, schedule, fixed),
        _elsewhere(facts, schedule, fixed),
        _training(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(name: str, facts: Mapping[str, Any], fixed: bool) -> str:
    pipeline = facts.get("pipeline", "StableDiffusionPipeline")
    tags = [
        "stable-diffusion-xl" if "XL" in pipeline else "stable-diffusion",
        f"diffusers:{pipeline}",
        "zsnr",
        *(["zero-terminal-snr"] if fixed else []),
        str(facts["prediction_type"]).replace("_", "-"),
    ]
    return "\n".join(
        [
            "---",
            "library_name: diffusers",
            "pipeline_tag: text-to-image",
            "license: other  # fill in, and the name: that of the start's weights and of your data",
            "license_name: unknown",
            "tags:",
            *(f"- {json.dumps(tag)}" for tag in tags),
            "---",
        ]
    )


def _summary(facts: Mapping[str, Any], schedule: NoiseSchedule, fixed: bool) -> str:
    size = facts.get("image_size", _UNKNOWN)
    if fixed:
        return (
            f"A text-to-image model of {size} x {size} pixels, trained on a noise schedule that "
            "ends in pure noise (zero terminal SNR, [arXiv:2305.08891]"
            "(https://arxiv.org/abs/2305.08891)), so that its pictures may be as dark and as "
            "bright as the prompt says. Sample it as below: from the last timestep, on this "
            "schedule, as the prediction type says, with rescaled guidance."
        )
    return (
        f"A text-to-image model of {size} x {size} pixels.\n\n"
        "**Its noise schedule is flawed, as the usual ones are:** it keeps signal at the last "
        f"timestep, x_T = {schedule(schedule.num_timesteps - 1)[0]:.6f} x_0 + "
        f"{schedule(schedule.num_timesteps - 1)[1]:.6f} eps, while sampling starts from pure "
        "noise. Pictures lean to medium brightness, and no scheduler setting cures that: changing "
        "`rescale_betas_zero_snr` alone gives another schedule than the model was trained on. "
        "Training it on a schedule with zero terminal SNR and v prediction does "
        "([arXiv:2305.08891](https://arxiv.org/abs/2305.08891))."
    )


def _proof(facts: Mapping[str, Any], schedule: NoiseSchedule, fixed: bool) -> str:
    last = schedule.num_timesteps - 1
    snr, alpha = float(schedule.snr[-1]), schedule(last)[0]
    rows = [
        ("schedule", _schedule(schedule)),
        ("sqrt(abar_T)", "0" if fixed else f"{alpha:.6f}"),
        ("SNR_T", "0, exactly" if fixed else f"{snr:.6g}"),
        ("prediction type", f"`{facts['prediction_type']}`"),
        ("timestep spacing", "trailing"),
        ("first timestep sampled", f"{last} of 0 .. {last}"),
    ]
    text = "## Schedule\n\n" + _table(rows)
    if needs_table(schedule):
        text += (
            "\n\ndiffusers has no name and flag for this schedule, so `scheduler_config.json` "
            "holds it as `trained_betas`"
            + (
                ". The last one is 1, which is SNR 0; `rescale_betas_zero_snr` is false because "
                "there is nothing left to rescale."
                if fixed
                else "."
            )
        )
    return text


def _usage(name: str, facts: Mapping[str, Any], schedule: NoiseSchedule, fixed: bool) -> str:
    sampling = _mapping(published(facts).get("sampling"))
    # A method that a pipeline of diffusers lacks does not tell which w plain guidance needs there.
    others = {name: sampling[name] for name in _OTHER_GUIDANCE if sampling.get(name) is not None}
    own_w = sampling.get("guidance_method", Guidance.method) == Guidance.method
    own_w = own_w and "guidance_curve" not in others
    scale = _number(sampling.get("guidance_scale") if own_w else None, Guidance.scale)
    rescale = _rescale(facts, fixed)
    pipeline = facts.get("pipeline", "StableDiffusionPipeline")
    T = schedule.num_timesteps
    wanted = _number(sampling.get("num_steps"), 50)
    steps = min((s for s in range(1, T + 1) if T % s == 0), key=lambda s: abs(s - wanted))
    dtype = facts.get("dtype", "float32")
    half = "" if dtype == "float32" else f", torch_dtype=torch.{dtype}"
    source = json.dumps(f"path/to/{name}", ensure_ascii=False)
    code = f"""```python
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained({source}{half})
image = pipe(
    "a black cat at night",
    num_inference_steps={steps},
    guidance_scale={scale},
    guidance_rescale={rescale},
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("image.png")
```"""
    tried = "guidance_scale" in sampling and not others
    notes = [
        "- **Pass `guidance_rescale`.** A folder cannot store it, and the pipeline's own is 0, "
        "which over-exposes at zero terminal SNR."
        if fixed
        else "- `guidance_rescale` is no part of how this model was trained; 0 is plain guidance.",
        f"- Guidance scale {scale} and rescale {rescale} are "
        + (
            "those of this model's own previews."
            if tried
            else "the paper's, not tried out on this model; 0.5 to 0.75 looks best there."
            if fixed
            else "common values, not tried out on this model."
        ),
        f"- **Choose a number of steps that divides {T}**, such as {_divisors(T)}. With "
        f"others diffusers' DDIM steps to t - {T} // steps, which is not where its next step "
        "starts; for a few, such as 61 of 1000, it makes one step more, at t = -1.",
    ]
    spacing, sampler = sampling.get("spacing", "trailing"), sampling.get("sampler", "ddim")
    if spacing != "trailing" or sampler != "ddim":
        own = sampling.get("timesteps")
        grid = f"the timesteps {_said(own)}" if own else f"{_said(spacing)} timesteps"
        notes.append(
            f"- This model's own previews were made with {_said(sampler)} on {grid}; the folder "
            "says DDIM and trailing."
        )
    if sampling.get("guidance_interval") is not None:
        notes.append(
            "- This model's own previews were guided at some noise levels only, "
            f"{_interval(sampling['guidance_interval'])}; a pipeline of diffusers guides them all."
        )
    if others:
        said = ", ".join(
            f"{name.removeprefix('guidance_').replace('_', ' ')} {_guidance(value)}"
            for name, value in {
                "guidance_scale": sampling.get("guidance_scale"),
                "guidance_rescale": sampling.get("guidance_rescale"),
                **others,
            }.items()
        )
        notes.append(
            f"- This model's own previews were guided otherwise ({said}): a pipeline of diffusers "
            "has classifier-free guidance and its rescale alone."
        )
    if dtype == "float16":
        notes.append(
            "- In float16 a VAE may overflow to black pictures; bfloat16 does not. A VAE whose "
            "config says `force_upcast` is stored in float32."
        )
    if fixed:
        notes.append("- `eta=1` gives NaN at SNR 0 in diffusers' DDIM for some numbers of steps.")
    return "## Use\n\n" + code + "\n\n" + "\n".join(notes)


def _schedulers(facts: Mapping[str, Any], schedule: NoiseSchedule, fixed: bool) -> str:
    distilled = ", ".join(f"`{name}`" for name in DISTILLED)
    if not fixed:
        return (
            "## Other schedulers\n\nThe folder's is DDIM with trailing steps. By "
            "`OtherScheduler.from_config(pipe.scheduler.config)` others keep schedule, prediction "
            f"type and spacing; {distilled} are for distilled models."
        )
    lost = ", ".join(f"`{name}`" for name in DROPPING)
    patched = ", ".join(f"`{name}`" for name in PATCHED)
    exact = ", ".join(f"`{name}`" for name in EXACT if name not in DISTILLED)
    if needs_table(schedule):
        rows = [
            ("keep SNR 0", exact),
            ("give NaN or fail: they divide by sqrt(abar_T)", f"{patched}, {lost}"),
        ]
    else:
        rows = [
            ("keep SNR 0", exact),
            ("set abar_T to 2^-24, close to it", patched),
            ("**lose the rescale without a word: do not use**", lost),
        ]
    text = (
        "## Other schedulers\n\nThe folder's is DDIM. What others make of its config, by "
        "`OtherScheduler.from_config(pipe.scheduler.config)` in diffusers 0.42.1:\n\n"
    )
    repair = (
        "\n\nFor any number of steps, and for zsnr's own samplers, one line gives a script the "
        "right scheduler, on this schedule and without a patch:\n\n"
        "```python\n"
        "from zsnr.checkpoints import DiffusersScheduler\n\n"
        "pipe.scheduler = DiffusersScheduler.from_config(pipe.scheduler.config)\n"
        "```"
    )
    rows.append(("keep SNR 0, but are for distilled models", distilled))
    return text + _table(rows, ("effect", "schedulers")) + repair


def _elsewhere(facts: Mapping[str, Any], schedule: NoiseSchedule, fixed: bool) -> str:
    head = "## ComfyUI and A1111\n\n"
    if not is_marked_schedule(schedule):
        return head + (
            "They know Stable Diffusion's schedule, with and without zero terminal SNR. This model "
            "has another one: they cannot sample it right."
        )
    if facts["prediction_type"] == "sample":
        return head + (
            "No mark in a single file says that a model predicts x_0. In ComfyUI the node "
            f"ModelSamplingDiscrete does, with sampling `x0` and zsnr {'on' if fixed else 'off'}. "
            "A1111 has no setting for it."
        )
    files = (
        "They read single files, which `zsnr export THIS_FOLDER --output FILE.safetensors` writes "
        "where that layout can hold the model"
    )
    if not fixed:
        return f"{head}{files}."
    node = "node ModelSamplingDiscrete, sampling `v_prediction`, zsnr on"
    if "XL" in facts.get("pipeline", ""):
        comfy = f"ComfyUI and Forge read the marks. In older ones: {node}."
        a1111 = "A1111 reads `ztsnr`, and `v_pred` where it has `configs/sd_xl_v.yaml`."
    else:
        comfy = f"ComfyUI reads the marks of SDXL alone. Set them: {node}."
        a1111 = (
            "A1111 reads `ztsnr`. For v prediction it wants a YAML of the file's name with "
            '`parameterization: "v"`.'
        )
    return head + (
        f"{files}, with the marks `v_pred` and `ztsnr`.\n\n"
        f"- {comfy} Guidance: node RescaleCFG, multiplier {_rescale(facts, fixed)}. Scheduler "
        "`simple` or `sgm_uniform`: both start at the last timestep.\n"
        f"- {a1111} Older releases have the setting *Noise schedule for sampling: Zero Terminal "
        "SNR*. Rescaled guidance needs an extension."
    )


def _training(facts: Mapping[str, Any]) -> str:
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
        ("averaging of weights", facts.get("ema")),
        ("weights here", facts.get("weights")),
        ("stored as", facts.get("dtype")),
        *(sorted((_mapping(facts.get("metrics")) or {"val/loss": None}).items())),
        ("zsnr", facts.get("zsnr_version")),
        *(sorted(_mapping(facts.get("versions")).items())),
    ]
    return "## Training\n\n" + _table([(name, _said(value)) for name, value in rows])


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any, default: float) -> float:
    """Take a number, and nothing else: it goes into code that people run."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fine else default


def _rescale(facts: Mapping[str, Any], fixed: bool) -> float:
    sampling = _mapping(facts.get("sampling"))
    own = sampling.get("guidance_method", Guidance.method) == Guidance.method
    recorded = sampling.get("guidance_rescale") if own else None
    return _number(recorded, Guidance.rescale if fixed else 0.0)


def _schedule(schedule: NoiseSchedule) -> str:
    zero = schedule.zero_terminal_snr
    T = f"T = {schedule.num_timesteps}"
    if schedule.alphas_cumprod_table is not None:
        return f"own table, {T}" + (", rescaled to zero terminal SNR" if zero else "")
    if schedule.betas == "cosine":
        return f"cosine, {T}, " + ("without its cap of 0.999" if zero else "capped at 0.999")
    first, last = beta_ends(schedule)
    return f"{schedule.betas}, {T}, beta {first:g} to {last:g}" + (
        ", rescaled to zero terminal SNR" if zero else ""
    )


def _divisors(T: int) -> str:
    few = [s for s in (5, 10, 20, 25, 40, 50, 100) if T % s == 0]
    return ", ".join(str(s) for s in few or [s for s in range(1, T + 1) if T % s == 0][-7:])


def _table(rows: list[tuple[str, str]], head: tuple[str, str] = ("", "")) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])


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
    return _plain(str(value))


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


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
