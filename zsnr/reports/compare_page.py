"""index.html of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsnr.reports.arms import GUIDANCE, Arm, guidance_text, lora_text
from zsnr.reports.charts import COLORS, draw_brightness_histograms, draw_group_means
from zsnr.reports.page import draw_chart, embed, images_per_column, render_page

if TYPE_CHECKING:
    from markupsafe import Markup

_MAX_ROWS = 24  # of images
_PER_PROMPT = 4
_ONLY_PROMPT = 16  # images of a prompt that is the only one
_MAX_PAIRS = 6  # that are named

MEASURES = {
    "mean_luma": "mean luma",
    "rms_contrast": "RMS contrast",
    "p1": "1st percentile",
    "p99": "99th percentile",
}
_COLUMNS = {
    "models": "source",
    "num_steps": "steps",
    "guidance_scale": "guidance",
    "guidance_rescale": "rescale",
}


def comparison_page(facts: Mapping[str, Any], folder: Path) -> str:
    """Render the page.

    Args:
        facts: What compare.json holds.
        folder: Where the images are that they name.
    """
    arms, data = facts["arms"], facts["data"]
    colored = [{**arm, "color": COLORS[i % len(COLORS)]} for i, arm in enumerate(arms)]
    order = arms[0]["order"]
    rows, images_left = _image_rows(arms, folder)
    values = {
        **facts,
        "title": "Brightness comparison" if len(arms) > 1 else f"Brightness: {arms[0]['name']}",
        "noun": arm_noun(facts),
        "arms": colored,
        "ranked": [] if data is None else sorted(colored, key=lambda arm: arm["w1"]["estimate"]),
        "floors": list({arm["noise_floor"]["images"]: arm["noise_floor"] for arm in arms}.values())
        if data is not None
        else [],
        "any_at_floor": any(arm["at_noise_floor"] for arm in arms),
        "follows_data": follows_data(facts),
        "per_arm": len(arms[0]["images"]),
        "most_models": max(len(arm["by_model"]) for arm in arms),
        "ordered": order is not None,
        "equal_ranks": [] if order is None else order["equal_ranks"],
        "most_pairs": _MAX_PAIRS,
        "measures": MEASURES,
        "settings": _settings(facts),
        "histograms": _histograms(facts),
        "group_chart": _group_chart(facts) if len(facts["groups"]) > 1 else None,
        "rows": rows,
        "images_left": images_left,
    }
    return render_page("compare.html", values)


def arm_noun(facts: Mapping[str, Any]) -> str:
    """Name what is compared: models, or configurations of the sampler."""
    models = {tuple(arm["models"]) for arm in facts["arms"]}
    return "model" if facts["kind"] == "models" and len(models) == len(facts["arms"]) else "setting"


def follows_data(facts: Mapping[str, Any]) -> bool:
    """Whether the prompts leave the brightness to the data, so that W_1 to it is meaningful."""
    return facts["prompts"] in ("data", "empty")


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the columns of the settings that matter, a row per arm, and where rows differ."""
    exact = facts["kind"] == "exact denoiser"
    names = ["models", "schedule", "sampler", "num_steps", "spacing"]
    if exact:
        names.remove("models")
    else:
        names += [
            name
            for name in ("lora", "max_tokens")
            if any(arm["settings"][name] for arm in facts["arms"])
        ]
        names += ["guidance_scale", "guidance_rescale"]
        names += [
            name
            for name in GUIDANCE[2:]
            if any(arm["settings"][name] != getattr(Arm, name) for arm in facts["arms"])
        ]
    retained = any(arm["kept_fraction"] is not None for arm in facts["arms"])
    rows = [
        [
            *(_setting(arm, name) for name in names),
            f"{arm['snr_T']:.4g}",
            f"{arm['first_timestep']} of {arm['schedule']['num_timesteps'] - 1}",
            *([f"{arm['kept_fraction']:.2f}"] if retained else []),
        ]
        for arm in facts["arms"]
    ]
    return {
        "columns": [
            _COLUMNS.get(name, name.removeprefix("guidance_").replace("_", " ")) for name in names
        ],
        "retained": retained,
        "rows": rows,
        "differs": [
            any(cell != column[0] for cell in column) for column in zip(*rows, strict=True)
        ],
    }


def _setting(arm: Mapping[str, Any], name: str) -> str | list[str]:
    if name == "models":
        return list(arm["models"])
    if name == "schedule":
        settings = arm["schedule"]
        if "shift" in settings:
            return f"rectified flow, shift {settings['shift']:g}"
        kind = "custom table" if settings["alphas_cumprod_table"] else settings["betas"]
        return f"{kind}, {'rescaled' if arm['snr_T'] == 0 else 'original'}"
    value = arm["settings"][name]
    if name == "lora":
        return lora_text(value) or "none"
    if name == "max_tokens":
        return "as declared" if value is None else str(value)
    if name in GUIDANCE[2:]:
        if name == "guidance_interval" and value is not None:
            value = [math.inf if end is None else end for end in value]
        return guidance_text(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _histograms(facts: Mapping[str, Any]) -> Markup:
    arms, data = facts["arms"], facts["data"]
    groups = {}
    for i, arm in enumerate(arms):
        text = arm["name"] + ("" if data is None else f" (W1 {arm['w1']['estimate']:.3f})")
        values = [image["mean_luma"] for image in arm["images"]]
        groups[text] = values, COLORS[i % len(COLORS)]

    def draw(axes: Any) -> None:
        outline = None if data is None else data["mean_luma_by_image"]
        xlabel = "mean luma of an image, from -1 (black) to 1 (white)"
        draw_brightness_histograms(axes, groups, xlabel=xlabel, outline=outline)

    return draw_chart(draw, 9, 0.95 * len(arms) + 0.55, rows=len(arms))


def _group_chart(facts: Mapping[str, Any]) -> Markup:
    arms, groups = facts["arms"], facts["groups"]
    ranks = dict.fromkeys(group["brightness_rank"] for group in groups)
    ordered = arms[0]["order"] is not None
    labels = {rank: f"rank {rank}" for rank in ranks if rank is not None and ordered}
    height = 0.32 * len(groups) + 0.7 + 0.2 * -(-len(arms) // 3)
    return draw_chart(lambda axes: draw_group_means(axes, arms, groups, labels), 9, height)


def _image_rows(
    arms: Sequence[Mapping[str, Any]], folder: Path
) -> tuple[list[dict[str, Any]], int]:
    """Embed the first prompts' images of each arm's first model.

    Returns:
        Rows, each with a group, prompts, and images by arm; and how many images are left.
    """
    from PIL import Image

    by_arm = [arm["images"][: len(arm["images"]) // len(arm["by_model"])] for arm in arms]
    first = by_arm[0]
    with Image.open(folder / first[0]["file"]) as image:
        rows = _rows(first, images_per_column(image, len(arms)))
    per_row = _ONLY_PROMPT if len(rows) == 1 else _PER_PROMPT
    shown = [row[:per_row] for row in rows[:_MAX_ROWS]]
    left = len(arms[0]["images"]) - sum(map(len, shown))
    return [_image_row(arms, by_arm, row, folder) for row in shown], left


def _image_row(
    arms: Sequence[Mapping[str, Any]],
    by_arm: Sequence[Sequence[Mapping[str, Any]]],
    row: Sequence[int],
    folder: Path,
) -> dict[str, Any]:
    prompts = list(dict.fromkeys(by_arm[0][i]["prompt"] for i in row))
    images = []
    for arm, column in zip(arms, by_arm, strict=True):
        cells = []
        for each in (column[i] for i in row):
            number = f"{prompts.index(each['prompt']) + 1}. " if len(prompts) > 1 else ""
            caption = f"{number}seed {each['seed']}, luma {each['mean_luma']:.2f}"
            text = f"{arm['name']}: {each['prompt'] or 'empty prompt'}, {caption}"
            cells.append({"image": _embed(folder / each["file"]), "caption": caption, "text": text})
        images.append(cells)
    return {"group": by_arm[0][row[0]]["group"], "prompts": prompts, "images": images}


def _embed(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return embed(image.convert("RGB"))


def _rows(images: Sequence[Mapping[str, Any]], across: int) -> list[list[int]]:
    """Put consecutive images of one prompt into one row.

    Where each prompt has one image, a row takes those of several prompts of a group, as many as
    fit.
    """
    rows: list[list[int]] = []
    for i, image in enumerate(images):
        if rows and images[rows[-1][0]]["prompt"] == image["prompt"]:
            rows[-1].append(i)
        else:
            rows.append([i])
    if any(len(row) > 1 for row in rows):
        return rows
    joined: list[list[int]] = []
    for (i,) in rows:
        alike = joined and images[joined[-1][0]]["group"] == images[i]["group"]
        if alike and len(joined[-1]) < min(across, _PER_PROMPT):
            joined[-1].append(i)
        else:
            joined.append([i])
    return joined
