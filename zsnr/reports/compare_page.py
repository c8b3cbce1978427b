"""index.html of a comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from zsnr.reports.arms import GUIDANCE, Arm, guidance_text
from zsnr.reports.page import chart, document, embedded, fitting, table
from zsnr.reports.pictures import figure_of

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
_ROWS = 24  # prompts shown
_PER_PROMPT = 4
_WRONG = 6  # pairs named
_ALONE = 16  # of a prompt that is the only one

_MEASURES = {
    "mean_luma": "mean luma",
    "rms_contrast": "RMS contrast",
    "p1": "1st percentile",
    "p99": "99th percentile",
}


def comparison_page(facts: Mapping[str, Any], folder: Path) -> str:
    """Write the page.

    Args:
        facts: What compare.json holds.
        folder: Where the pictures are that they name.
    """
    arms = facts["arms"]
    title = "Brightness, arm beside arm" if len(arms) > 1 else f"Brightness: {arms[0]['name']}"
    sections = [
        f"<h1>{escape(title)}</h1>\n<p>{' &nbsp; '.join(_name(facts, arm) for arm in arms)}</p>",
        _lead(facts),
        _verdict(facts),
        f"<h2>Numbers</h2>\n{_numbers(facts)}\n{_notes(facts)}\n{_by_model(facts)}",
        f"<h2>Settings</h2>\n{_settings(facts)}",
        f"<h2>Brightness</h2>\n{_histograms(facts)}",
    ]
    if facts["groups"]:
        sections.append(f"<h2>By group of prompts</h2>\n{_groups(facts)}")
    sections.append(f"<h2>Pictures</h2>\n{_pictures(facts, folder)}")
    return document(title, sections)


def _name(facts: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    colour = COLOURS[facts["arms"].index(arm) % len(COLOURS)]
    return f'<span class="swatch" style="background:{colour}"></span>{escape(arm["name"])}'


def _lead(facts: Mapping[str, Any]) -> str:
    arms = facts["arms"]
    per_arm = len(arms[0]["pictures"])
    lines = [f"{per_arm} pictures of each arm, by the same prompts and seeds in all."]
    if facts["kind"] == "exact denoiser":
        shape = " x ".join(str(n) for n in facts["space"]["shape"])
        lines = [
            f"{per_arm} samples of each arm, by the same seeds in all. No model was trained: the "
            f"network is the exact denoiser of {facts['data']['pictures']} pictures in a space of "
            f"{shape} numbers, where their mean stands out of the noise by S = "
            f"{facts['space']['mode']:.1f}. So what differs is the fault of schedule, timesteps "
            "and sampler alone."
        ]
    elif facts["prompts"] == "suite":
        lines.append("The prompts are those that zsnr ships for this question.")
    elif facts["prompts"] == "data":
        lines.append("The prompts are captions of the data, chosen by chance.")
    elif facts["prompts"] == "empty":
        lines.append("There is no prompt.")
    else:
        lines.append(f"The prompts are those of {facts['prompts']}.")
    if facts["kind"] == "models" and len(arms[0]["models"]) > 1:
        lines.append(f"They are of {len(arms[0]['models'])} models an arm; the first is shown.")
    lines.append("Luma is 0.2126 R + 0.7152 G + 0.0722 B, from -1 (black) to 1 (white).")
    return f'<p class="dim">{escape(" ".join(lines))}</p>'


def _verdict(facts: Mapping[str, Any]) -> str:
    """Say in a sentence or two which arm is best."""
    lines = []
    arms = facts["arms"]
    if arms[0]["order"] is not None:
        each = "; ".join(
            f"<b>{escape(arm['name'])}</b> {arm['order']['in_order']} of {arm['order']['pairs']}, "
            f"{arm['order']['range']:.2f}"
            for arm in arms
        )
        lines.append(
            "Pairs of groups whose brightness is in the order the prompts ask for, and range from "
            f"the darkest group to the brightest: {each}."
        )
    if facts["data"] is not None:
        ranked = sorted(arms, key=lambda arm: arm["w1"]["estimate"])
        each = "; ".join(f"<b>{escape(arm['name'])}</b> {_interval(arm['w1'])}" for arm in ranked)
        floor = facts["data"]["noise_floor"]
        fits = facts["prompts"] in ("data", "empty")
        lines.append(
            f"Distance of brightness to the data (W<sub>1</sub>, less is better): {each}. "
            f"{floor['pictures']} pictures of the data itself have {floor['mean']:.3f}."
            f"{'' if fits else ' Mind that these prompts need not follow the data.'}"
        )
    if not lines:
        lines.append("With --data SHARDS, the distance of brightness to the data stands here.")
    return f'<div class="verdict">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def _numbers(facts: Mapping[str, Any]) -> str:
    data, arms = facts["data"], facts["arms"]
    ordered = arms[0]["order"] is not None
    head = ["arm", *_MEASURES.values(), "std of mean luma"]
    if data is not None:
        head += ["W<sub>1</sub> to the data, 95 %"]
        if len(arms) > 1:
            head += ["W<sub>1</sub> less the first arm's"]
    if ordered:
        head += ["pairs in order", "range"]
    rows = []
    least = None if data is None else min(arm["w1"]["estimate"] for arm in arms)
    for arm in arms:
        row = [_name(facts, arm), *(f"{arm[name]:.3f}" for name in _MEASURES)]
        row.append(f"{arm['mean_luma_std']:.3f}")
        if data is not None:
            best = ' class="best"' if arm["w1"]["estimate"] == least else ""
            row.append(f"<td{best}>{_in_cell(arm['w1'])}</td>")
            if len(arms) > 1:
                row.append("" if arm is arms[0] else _in_cell(arm["w1_minus_first"], signed=True))
        if ordered:
            order = arm["order"]
            row += [f"{order['in_order']} of {order['pairs']}", f"{order['range']:.3f}"]
        rows.append(row)
    if data is not None:
        row = [f"data, {data['pictures']} pictures", *(f"{data[name]:.3f}" for name in _MEASURES)]
        floor = data["noise_floor"]
        row += [f"{data['mean_luma_std']:.3f}", f"floor {floor['mean']:.3f}"]
        rows.append([*row, *[""] * (len(head) - len(row))])
    return table(head, rows)


def _notes(facts: Mapping[str, Any]) -> str:
    data = facts["data"]
    notes = [
        "Each number is a mean over pictures; percentiles and contrast (standard deviation of "
        "luma) are those of a picture's pixels."
    ]
    if data is not None:
        floor = data["noise_floor"]
        pooled = len(facts["arms"][0]["by_model"]) > 1
        notes.append(
            "W1 is the 1-Wasserstein distance between the pictures' mean luma and the data's. The "
            f"interval is a bootstrap over {'models and, within each, ' if pooled else ''}"
            f"pictures. The floor is what {floor['pictures']} draws of the data have: "
            f"{floor['mean']:.4f} on average, {floor['p95']:.4f} in one of twenty."
        )
        if len(facts["arms"]) > 1:
            notes.append(
                "The difference to the first arm is drawn with the same models and pictures on "
                "both sides: above 0, the arm is further from the data."
            )
        if facts["prompts"] not in ("data", "empty"):
            notes.append(
                "Mind that W1 means something only for prompts that follow the data, such as its "
                "own captions (--prompts data) or none: these prompts ask for a brightness of "
                "their own."
            )
        elif facts["prompts"] == "data":
            notes.append("The prompts follow the data, so a perfect model reaches the floor.")
        elif facts["kind"] == "models":
            notes.append(
                "A model that has learned to answer no prompt with any picture of the data reaches "
                "the floor."
            )
    return '<p class="dim">' + escape(" ".join(notes)) + "</p>"


def _by_model(facts: Mapping[str, Any]) -> str:
    if all(len(arm["by_model"]) == 1 for arm in facts["arms"]):
        return ""
    head = ["model", *_MEASURES.values(), "std of mean luma"]
    if facts["data"] is not None:
        head.append("W<sub>1</sub> to the data, 95 %")
    rows = []
    for arm in facts["arms"]:
        for model in arm["by_model"]:
            row = [f"{_name(facts, arm)}<span class=interval>{escape(model['model'])}</span>"]
            row += [f"{model[name]:.3f}" for name in (*_MEASURES, "mean_luma_std")]
            if facts["data"] is not None:
                row.append(_in_cell(model["w1"]))
            rows.append(row)
    return f"<h3>Each model</h3>\n{table(head, rows)}"


def _settings(facts: Mapping[str, Any]) -> str:
    exact = facts["kind"] == "exact denoiser"
    columns = ["models", "schedule", "sampler", "num_steps", "spacing"]
    if not exact:
        columns += ["guidance_scale", "guidance_rescale"]
        columns += [
            name
            for name in GUIDANCE[2:]
            if any(arm["settings"][name] != getattr(Arm, name) for arm in facts["arms"])
        ]
    if exact:
        columns.remove("models")
    names = {
        "models": "model",
        "num_steps": "steps",
        "guidance_scale": "guidance",
        "guidance_rescale": "rescale",
    }
    head = ["arm", *(names.get(name, _words(name)) for name in columns)]
    head += ["SNR<sub>T</sub>", "first t", "kept"]
    cells = [
        [
            *(_setting(arm, name) for name in columns),
            f"{arm['snr_T']:.4g}",
            f"{arm['first_timestep']}&nbsp;of&nbsp;{_num_timesteps(arm) - 1}",
            "-" if arm["kept_fraction"] is None else f"{arm['kept_fraction']:.2f}",
        ]
        for arm in facts["arms"]
    ]
    differs = [len(set(column)) > 1 for column in zip(*cells, strict=True)]
    rows = []
    for arm, row in zip(facts["arms"], cells, strict=True):
        marked = []
        for name, text, mark in zip([*columns, "", "", ""], row, differs, strict=True):
            kinds = ["path"] * (name == "models") + ["differs"] * mark
            marked.append(f'<td class="{" ".join(kinds)}">{text}</td>')
        rows.append([_name(facts, arm), *marked])
    return table(head, rows) + (
        '<p class="dim">What differs is marked. Timesteps count from 0. Kept is the fraction of '
        "the brightness range that sampling from pure noise keeps on this schedule, 1 / "
        "sqrt(abar_T S^2 + 1 - abar_T), whatever the timesteps; S is measured on the data, "
        "so it needs --data.</p>"
    )


def _words(name: str) -> str:
    return name.removeprefix("guidance_").replace("_", " ")


def _num_timesteps(arm: Mapping[str, Any]) -> int:
    return int(arm["schedule"]["num_timesteps"])


def _setting(arm: Mapping[str, Any], name: str) -> str:
    if name == "models":
        return "<br>".join(escape(model) for model in arm["models"])
    if name == "schedule":
        settings = arm["schedule"]
        kind = "own table" if settings["alphas_cumprod_table"] else settings["betas"]
        return f"{escape(kind)}, {'rescaled' if arm['snr_T'] == 0 else 'original'}"
    value = arm["settings"][name]
    if name in GUIDANCE[2:]:
        if name == "guidance_interval" and value is not None:
            value = [math.inf if end is None else end for end in value]
        return escape(guidance_text(value))
    return escape(f"{value:g}" if isinstance(value, float) else str(value))


def _interval(interval: Mapping[str, float]) -> str:
    return "{estimate:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def _in_cell(interval: Mapping[str, float], signed: bool = False) -> str:
    """Write an interval below its estimate."""
    sign = "+" if signed else ""
    text = "{estimate:{s}.3f}<span class=interval>{low:{s}.3f} to {high:{s}.3f}</span>"
    return text.format(**interval, s=sign)


def _histograms(facts: Mapping[str, Any]) -> str:
    import numpy as np

    arms, data = facts["arms"], facts["data"]
    figure, axes = figure_of(11.5, 0.95 * len(arms) + 0.55, rows=len(arms))
    bins = np.linspace(-1, 1, 41)
    for i, (axis, arm) in enumerate(zip(np.atleast_1d(axes), arms, strict=True)):
        values = [picture["mean_luma"] for picture in arm["pictures"]]
        weights = np.full(len(values), 1 / len(values))
        axis.hist(values, bins=bins, weights=weights, color=COLOURS[i % len(COLOURS)], alpha=0.85)
        if data is not None:
            theirs = data["mean_luma_by_picture"]
            axis.hist(
                theirs,
                bins=bins,
                weights=np.full(len(theirs), 1 / len(theirs)),
                histtype="step",
                color="0.25",
                linewidth=1.1,
            )
        text = arm["name"] + ("" if data is None else f"    W1 {arm['w1']['estimate']:.3f}")
        axis.set_title(text, fontsize=9, loc="left", pad=2, parse_math=False)
        axis.set(yticks=[], xlim=(-1, 1))
        axis.spines[["top", "left", "right"]].set_visible(False)
    np.atleast_1d(axes)[-1].set_xlabel("mean luma of a picture, -1 black to 1 white", fontsize=9)
    outline = "" if data is None else " The outline is the data."
    caption = f'<p class="dim">Share of pictures by mean luma.{outline}</p>'
    return chart(figure) + caption


def _groups(facts: Mapping[str, Any]) -> str:
    arms, groups = facts["arms"], facts["groups"]
    parts = [_group_chart(facts)] if len(groups) > 1 else []
    for measure, text in _MEASURES.items():
        head = [f"{text} of", *(_name(facts, arm) for arm in arms)]
        rows = []
        for group in groups:
            row = [escape(group["name"])]
            for arm in arms:
                value = arm["groups"][group["name"]][measure]
                row.append(f"{value:.3f}" if measure == "rms_contrast" else _grey(value))
            rows.append(row)
        parts.append(table(head, rows))
        if measure == "mean_luma":
            parts.append(_wrong(facts))
            parts.append("<details><summary>Contrast and percentiles by group</summary>")
    return "\n".join([*parts, "</details>"])


def _wrong(facts: Mapping[str, Any]) -> str:
    if facts["arms"][0]["order"] is None:
        return ""
    lines = []
    for arm in facts["arms"]:
        wrong = [f"{a} before {b}" for a, b in arm["order"]["wrong"]]
        what = f"not {', not '.join(wrong[:_WRONG])}" if wrong else "all as the prompts ask"
        if len(wrong) > _WRONG:
            what += f", and {len(wrong) - _WRONG} more"
        lines.append(f"<li>{_name(facts, arm)}: {escape(what)}</li>")
    return f"<p>Order from dark to bright:</p><ul>{''.join(lines)}</ul>"


def _grey(value: float) -> str:
    """A cell as bright as its number."""
    level = round((min(1.0, max(-1.0, value)) + 1) * 127.5)
    ink = "#fff" if level < 128 else "#000"
    return f'<td style="background:rgb({level},{level},{level});color:{ink}">{value:.3f}</td>'


def _group_chart(facts: Mapping[str, Any]) -> str:
    arms, groups = facts["arms"], facts["groups"]
    figure, axes = figure_of(11.5, 0.32 * len(groups) + 0.9)
    for i, arm in enumerate(arms):
        luma = [arm["groups"][group["name"]]["mean_luma"] for group in groups]
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(luma, range(len(groups)), "o-", color=colour, label=arm["name"], linewidth=0.8)
    names = [group["name"] for group in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=9, parse_math=False)
    axes.invert_yaxis()
    axes.set(xlim=(-1, 1))
    axes.set_xlabel("mean luma of the group, -1 black to 1 white", fontsize=9)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, fontsize=8, loc="lower left").get_texts():
        text.set_parse_math(False)
    return chart(figure)


def _pictures(facts: Mapping[str, Any], folder: Path) -> str:
    """Show the first prompts and seeds, one column an arm, of its first model."""
    from PIL import Image

    arms = facts["arms"]
    columns = [arm["pictures"][: len(arm["pictures"]) // len(arm["by_model"])] for arm in arms]
    with Image.open(folder / columns[0][0]["file"]) as image:
        rows = _rows(columns[0], fitting(image, len(arms)))
    per = _ALONE if len(rows) == 1 else _PER_PROMPT
    style = f"grid-template-columns: repeat({len(arms)}, minmax(0, 1fr))"
    cells = [f'<div class="name">{_name(facts, arm)}</div>' for arm in arms]
    for row in rows[:_ROWS]:
        first = columns[0][row[0]]
        group = f'<span class="group">{escape(first["group"])}</span>' if first["group"] else ""
        prompts = dict.fromkeys(columns[0][i]["prompt"] for i in row)
        prompt = escape(" | ".join(prompts)) or '<span class="dim">no prompt</span>'
        seeds = ", ".join(str(columns[0][i]["seed"]) for i in row[:per])
        of = "seed" if len(row) == 1 else "seeds"
        cells.append(
            f'<div class="prompt">{group}{prompt} <span class="dim">({of} {seeds})</span></div>'
        )
        for arm, column in zip(arms, columns, strict=True):
            shown = "".join(_picture(folder, arm, column[i]) for i in row[:per])
            cells.append(f'<div class="cell">{shown}</div>')
    note = ""
    left = len(arms[0]["pictures"]) - sum(len(row[:per]) for row in rows[:_ROWS])
    if left:
        note = (
            f'<p class="dim">{left} more of each arm are beside this page, in the folder '
            "pictures, and all their numbers in compare.json.</p>"
        )
    return f'<div class="pictures" style="{style}">{"".join(cells)}</div>{note}'


def _picture(folder: Path, arm: Mapping[str, Any], picture: Mapping[str, Any]) -> str:
    from PIL import Image

    with Image.open(folder / picture["file"]) as image:
        what = picture["prompt"] or "no prompt"
        text = f"{arm['name']}: {what}, seed {picture['seed']}, luma {picture['mean_luma']:.2f}"
        return embedded(image.convert("RGB"), text)


def _rows(pictures: Sequence[Mapping[str, Any]], across: int) -> list[list[int]]:
    """Put the pictures of one prompt that follow each other into one row.

    Where each prompt has one picture, a row takes those of several of a group, as many as fit.
    """
    rows: list[list[int]] = []
    for i, picture in enumerate(pictures):
        if rows and pictures[rows[-1][0]]["prompt"] == picture["prompt"]:
            rows[-1].append(i)
        else:
            rows.append([i])
    if any(len(row) > 1 for row in rows):
        return rows
    joined: list[list[int]] = []
    for (i,) in rows:
        alike = joined and pictures[joined[-1][0]]["group"] == pictures[i]["group"]
        if alike and len(joined[-1]) < min(across, _PER_PROMPT):
            joined[-1].append(i)
        else:
            joined.append([i])
    return joined
