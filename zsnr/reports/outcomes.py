"""Results of each arm: luma of its images, its distance to the data, its order of groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from zsnr.data.prompts import PromptRequest
from zsnr.metrics import (
    Interval,
    bootstrap_interval,
    luma_percentile,
    mean_luma,
    rms_contrast,
    wasserstein_1,
)
from zsnr.noise import sample_generator
from zsnr.pipeline import describe_guidance
from zsnr.reports.arms import SETTINGS, Arm, differing
from zsnr.schedule import Schedule

MEASURES = ("mean_luma", "rms_contrast", "p1", "p99")
_DRAWS = 500  # draws of the data for the noise floor


@dataclass(frozen=True, eq=False)
class ModelImages:
    """The images of one model in one arm.

    Args:
        model: Path of the model; "" = an exact denoiser.
        files: Names of the images in the folder, one per request.
        values: Each of `MEASURES`, (N,).
    """

    model: str
    files: list[str]
    values: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The results of one arm.

    Args:
        arm: The arm.
        schedule: The schedule that it was sampled on.
        retained: Fraction of the data's spread of brightness that this schedule retains. None = not
            known.
        images: The images of each model.
    """

    arm: Arm
    schedule: Schedule
    retained: float | None
    images: list[ModelImages]

    def pooled(self, measure: str) -> Tensor:
        """Join a measure of all models' images, (N,)."""
        return torch.cat([each.values[measure] for each in self.images])


def measure(images: Tensor) -> dict[str, Tensor]:
    """Measure images (N, 3, H, W) in [-1, 1]: each of `MEASURES`, (N,)."""
    return {
        "mean_luma": mean_luma(images),
        "rms_contrast": rms_contrast(images),
        "p1": luma_percentile(images, 1),
        "p99": luma_percentile(images, 99),
    }


def measure_arms(
    outcomes: Sequence[Outcome],
    requests: Sequence[PromptRequest],
    data: Mapping[str, Tensor] | None,
) -> dict[str, Any]:
    """Collect all numbers of a comparison, as plain values.

    Args:
        outcomes: The arms, with one value per request and model.
        requests: The requests that each model sampled.
        data: `measure` of the data. None = there is no data to compare with.
    """
    target = None if data is None else data["mean_luma"]
    arms = [_arm_facts(outcome, outcomes[0], requests, target) for outcome in outcomes]
    facts: dict[str, Any] = {
        "differs": differing([outcome.arm for outcome in outcomes]),
        "groups": groups_of(requests),
        "data": None,
        "arms": arms,
    }
    if data is not None and target is not None:
        facts["data"] = {
            "images": len(target),
            **{name: float(data[name].mean()) for name in MEASURES},
            "mean_luma_std": _std(target),
            "noise_floor": arms[0]["noise_floor"],
            "mean_luma_by_image": target.tolist(),
        }
    return facts


def order_of_groups(
    values: Tensor, requests: Sequence[PromptRequest], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Compare the order of groups' mean luma with the expected one.

    A pair counts if its expected ranks differ; it is in order if the group of the lower rank is
    darker.

    Args:
        values: Mean luma, (k N,): k rows of one value per request.
        requests: The N requests.
        groups: The groups, as `groups_of` lists them.

    Returns:
        pairs, their number; in_order, how many of them are; wrong, the others as pairs of names,
        also where both means are equal; equal_ranks, lists of names that share a rank, so that
        their order is not judged; range, from the mean of the lowest rank's groups to that of the
        highest's. None = there are fewer than two ranks.
    """
    means = _group_means(values, requests)
    ranked = [g for g in groups if g["brightness_rank"] is not None]
    pairs = [
        (a["name"], b["name"])
        for a, b in combinations(ranked, 2)
        if a["brightness_rank"] < b["brightness_rank"]
    ]
    if not pairs:
        return None
    wrong = [[a, b] for a, b in pairs if means[a] >= means[b]]
    by_rank: dict[int, list[str]] = {}
    for group in ranked:
        by_rank.setdefault(group["brightness_rank"], []).append(group["name"])
    low, high = ([means[name] for name in by_rank[end(by_rank)]] for end in (min, max))
    return {
        "pairs": len(pairs),
        "in_order": len(pairs) - len(wrong),
        "wrong": wrong,
        "equal_ranks": [names for names in by_rank.values() if len(names) > 1],
        "range": sum(high) / len(high) - sum(low) / len(low),
    }


def _arm_facts(
    outcome: Outcome, first: Outcome, requests: Sequence[PromptRequest], target: Tensor | None
) -> dict[str, Any]:
    arm, schedule = outcome.arm, outcome.schedule
    groups = groups_of(requests)
    sampling = arm.sampling()
    grid = sampling.timesteps(schedule)
    settings = {name: getattr(arm, name) for name in SETTINGS}
    settings |= describe_guidance(sampling.guidance)  # as JSON has it
    parts = [each.values["mean_luma"] for each in outcome.images]
    w1 = difference = floor = None
    if target is not None:
        w1 = _distance(parts, target)
        floor = _noise_floor(target, sum(map(len, parts)))
        if outcome is not first:
            theirs = [each.values["mean_luma"] for each in first.images]
            difference = _difference(parts, theirs, target)
    pooled = {name: outcome.pooled(name) for name in MEASURES}
    by_group = {name: _group_means(pooled[name], requests) for name in MEASURES}
    return {
        "name": arm.name,
        "models": list(arm.models),
        "settings": settings,
        "schedule": schedule.settings(),
        "snr_T": float(schedule.snr[-1]),
        "sqrt_abar_T": schedule(schedule.num_timesteps - 1)[0],
        "kept_fraction": outcome.retained,
        "first_timestep": int(grid[0]),
        "timesteps": grid.tolist(),
        **{name: float(pooled[name].mean()) for name in MEASURES},
        "mean_luma_std": _std(pooled["mean_luma"]),
        "w1": w1,
        "noise_floor": floor,
        "at_noise_floor": None if floor is None or w1 is None else w1["estimate"] <= floor["mean"],
        "w1_minus_first": difference,
        "order": order_of_groups(pooled["mean_luma"], requests, groups),
        "groups": {
            group["name"]: {name: by_group[name][group["name"]] for name in MEASURES}
            for group in groups
        },
        "by_model": [
            {
                "model": made.model,
                **{name: float(made.values[name].mean()) for name in MEASURES},
                "mean_luma_std": _std(made.values["mean_luma"]),
                "w1": None if target is None else _distance([made.values["mean_luma"]], target),
                "order": order_of_groups(made.values["mean_luma"], requests, groups),
            }
            for made in outcome.images
        ],
        "images": [
            {
                "file": file,
                "model": made.model,
                "prompt": request.prompt,
                "seed": request.seed,
                "group": request.group,
                **{name: float(made.values[name][i]) for name in MEASURES},
            }
            for made in outcome.images
            for i, (file, request) in enumerate(zip(made.files, requests, strict=True))
        ],
    }


def _distance(parts: Sequence[Tensor], target: Tensor) -> dict[str, float]:
    """Measure W_1 of pooled images to the data; models are drawn first, then images of each."""
    return _plain(
        bootstrap_interval(lambda draw: wasserstein_1(_joined(draw), target), _group(parts))
    )


def _difference(
    parts: Sequence[Tensor], theirs: Sequence[Tensor], target: Tensor
) -> dict[str, float]:
    """Measure W_1 minus another arm's, from the same draws of models and images."""
    alike = [len(part) for part in parts] == [len(part) for part in theirs]
    return _plain(
        bootstrap_interval(
            lambda a, b: wasserstein_1(_joined(a), target) - wasserstein_1(_joined(b), target),
            _group(parts),
            _group(theirs),
            paired=2 if alike else 0,
        )
    )


def _plain(interval: Interval) -> dict[str, float]:
    return interval._asdict()


def _group(parts: Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    return parts[0] if len(parts) == 1 else parts


def _joined(parts: Tensor | Sequence[Tensor]) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(list(parts))


def _noise_floor(target: Tensor, count: int) -> dict[str, float]:
    """Measure W_1 between the data and `count` draws of it, which a perfect sampler reaches."""
    generator = sample_generator(0)
    distances = torch.tensor(
        [
            wasserstein_1(target[torch.randint(len(target), (count,), generator=generator)], target)
            for _ in range(_DRAWS)
        ],
        dtype=torch.float64,
    )
    return {
        "images": count,
        "mean": float(distances.mean()),
        "p95": float(distances.quantile(0.95)),
    }


def groups_of(requests: Sequence[PromptRequest]) -> list[dict[str, Any]]:
    """List the groups by rank, those without one last.

    Raises:
        ValueError: Two prompts of a group have different ranks.
    """
    groups: dict[str, dict[str, Any]] = {}
    for request in requests:
        if not request.group:
            continue
        rank = request.brightness_rank
        group = groups.setdefault(
            request.group, {"name": request.group, "brightness_rank": rank, "images": 0}
        )
        group["images"] += 1
        if group["brightness_rank"] != rank:
            raise ValueError(
                f"Prompts of group {request.group!r} have brightness_rank "
                f"{group['brightness_rank']} and {rank}: wanted the same rank throughout a group."
            )
    infinite = math.inf
    return sorted(
        groups.values(),
        key=lambda g: infinite if g["brightness_rank"] is None else g["brightness_rank"],
    )


def _group_means(values: Tensor, requests: Sequence[PromptRequest]) -> dict[str, float]:
    names = [request.group for request in requests] * (len(values) // len(requests))
    return {
        group: float(values[[i for i, name in enumerate(names) if name == group]].mean())
        for group in dict.fromkeys(names)
    }


def _std(values: Tensor) -> float:
    return float(values.double().std(correction=0))
