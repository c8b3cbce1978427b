"""Charts of brightness, drawn on the axes of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zsnr.reports.page import INK
from zsnr.untrusted import printable

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
BRIGHTNESS_BINS = 40  # from -1 to 1


def draw_brightness_histograms(
    axes: Any,
    groups: Mapping[str, tuple[Sequence[float], str]],
    *,
    xlabel: str,
    outline: Sequence[float] | None = None,
) -> None:
    """Draw a histogram of brightness for each group, one below the other.

    Args:
        axes: As many as there are groups.
        groups: Title of each histogram: its values in [-1, 1], and its color.
        xlabel: What is measured.
        outline: Values that each histogram is compared with.
    """
    import numpy as np

    bins = np.linspace(-1, 1, BRIGHTNESS_BINS + 1)
    every = np.atleast_1d(axes)
    for axis, (title, (values, color)) in zip(every, groups.items(), strict=True):
        shares = np.full(len(values), 1 / max(1, len(values)))
        axis.hist(np.clip(values, -1, 1), bins=bins, weights=shares, color=color, alpha=0.85)
        if outline is not None:
            shares = np.full(len(outline), 1 / len(outline))
            options = {"histtype": "step", "color": INK, "linewidth": 1.1}
            axis.hist(np.clip(outline, -1, 1), bins=bins, weights=shares, **options)
        axis.set_title(printable(title), fontsize=9, loc="left", pad=2, parse_math=False)
        axis.set(xlim=(-1, 1))
        axis.locator_params(axis="y", nbins=3)
        axis.tick_params(labelsize=8)
        axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        axis.spines[["top", "right"]].set_visible(False)
    every[len(every) // 2].set_ylabel("share of images", fontsize=8)
    every[-1].set_xlabel(xlabel, fontsize=9)


def draw_group_means(
    axes: Any,
    arms: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    rank_labels: Mapping[int, str],
) -> None:
    """Draw the mean luma of each group as a dot, and the mean of each rank as a line.

    Groups of one rank are expected to be equally bright, so no line connects them.

    Args:
        axes: The axes.
        arms: Of the facts of a comparison.
        groups: Likewise, by rank.
        rank_labels: What to call each rank.
    """
    ranks = [group["brightness_rank"] for group in groups]
    names = [group["name"] for group in groups]
    for i, rank in enumerate(rank_labels):
        rows = [row for row, other in enumerate(ranks) if other == rank]
        if i % 2 == 0:
            axes.axhspan(rows[0] - 0.5, rows[-1] + 0.5, color="#80808022", linewidth=0)
        middle = (rows[0] + rows[-1]) / 2
        label = {"fontsize": 8, "va": "center", "parse_math": False}
        axes.text(1.02, middle, rank_labels[rank], transform=axes.get_yaxis_transform(), **label)
    for i, arm in enumerate(arms):
        color = COLORS[i % len(COLORS)]
        luma = [arm["groups"][name]["mean_luma"] for name in names]
        axes.plot(luma, range(len(groups)), "o", color=color, label=printable(arm["name"]))
        points = []
        for rank in rank_labels:
            rows = [row for row, other in enumerate(ranks) if other == rank]
            mean = sum(luma[row] for row in rows) / len(rows)
            points += [(mean, rows[0] - 0.3), (mean, rows[-1] + 0.3)]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=0.9, alpha=0.7)
    labels = [printable(name) for name in names]
    axes.set_yticks(range(len(groups)), labels, fontsize=9, parse_math=False)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set(xlim=(-1.02, 1.02))
    axes.set_xlabel("mean luma of the group, from -1 (black) to 1 (white)", fontsize=9)
    axes.grid(axis="x", color="#80808055", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(
        frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=min(3, len(arms))
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
