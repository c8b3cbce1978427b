"""The loss weight of EDM2 by noise level, bounded and not, against uniform weights.

    python benchmarks/learned_weight.py [--folder runs/learned_weight] [--jobs 2] [--write]

Trains configs/ablation/openmoji.yaml with uniform weights (the paper's), with learned weights among
which the last timestep keeps its share (ablation/learned_weight.yaml), and without that bound
(ablation/unbounded_weight.yaml), on the same data with the same seeds, steps and learning rate.
`zsnr compare` generates the images and measures their brightness. An interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from adapters import scalars
from flawed_against_fixed import STEPS, brightness, by_seed, draw, side_by_side, train, zsnr
from tqdm import tqdm

from zsnr.draws import validation_timesteps
from zsnr.reports.arms import Arm
from zsnr.training.tags import at_timestep

ARMS = {"uniform": "fixed", "learned": "learned_weight", "learned, no bound": "unbounded_weight"}
"""Name of the runs of each arm, as `train` takes it."""
ENDS = [at_timestep(t) for t in sorted(validation_timesteps(1000).tolist())]
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/learned_weight"), help="of runs")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, one thread each")
    parser.add_argument("--seeds", type=int, default=3, help="training runs of each arm")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    parser.add_argument("--count", type=int, default=108, help="images of each model, no prompts")
    parser.add_argument("--num-steps", type=int, default=25, help="number of sampling steps")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    folder, S, seeds = options.folder.resolve(), options.num_steps, range(options.seeds)
    shards = f"{folder}/data/train-*.tar"
    if not (folder / "data").exists():
        zsnr("data", "openmoji", folder / "data", "--glyphs", "demo")
    jobs = [(name, seed) for seed in seeds for name in ARMS.values()]
    with ThreadPoolExecutor(options.jobs) as pool:
        paths = pool.map(lambda job: train(folder, *job, options.steps), jobs)
        checkpoints = dict(zip(jobs, tqdm(paths, "training", len(jobs)), strict=True))
    runs = {
        arm: [scalars(checkpoints[name, seed].parents[1]) for seed in seeds]
        for arm, name in ARMS.items()
    }
    plain = Arm(num_steps=S, guidance_scale=1.0, spacing="trailing")
    arms = [
        replace(plain, name=arm, models=tuple(str(checkpoints[name, seed]) for seed in seeds))
        for arm, name in ARMS.items()
    ]
    torch.set_num_threads(1)
    sections = []
    for title, name, prompts, count in (
        ("Captions of the data as prompts", "prompted", "data", max(1, options.count // 54)),
        ("Without a prompt", "unprompted", "empty", options.count),
    ):
        facts = side_by_side(folder / f"{name}-{S}", arms, shards, prompts, count)
        sections.append(f"## {title}\n\n{brightness_table(facts)}")
        if options.write and name == "unprompted":
            draw(facts, folder / f"{name}-{S}", RESULTS / "learned_weight.png")
    sections.append(f"## Losses\n\n{loss_table(runs)}")
    sections.append(f"## Learned weights\n\n{weight_table(runs)}")
    text = "\n\n".join(sections)
    print(text)
    if options.write:
        write(text, options.seeds, options.steps, S)


def brightness_table(facts: dict[str, Any]) -> str:
    """Tabulate the distance of each arm's brightness to that of the data."""
    lines = [
        "| arm | mean luma | spread | W1 to the data, 95 % interval | difference from uniform "
        "| W1 by seed |",
        "|---|---|---|---|---|---|",
    ]
    for arm in facts["arms"]:
        lines.append(f"| {brightness(arm)} | {by_seed(arm)} |")
    data = facts["data"]
    lines.append(f"| data | {data['mean_luma']:.3f} | {data['mean_luma_std']:.3f} | | | |")
    floor = data["noise_floor"]
    return "\n".join(
        [
            *lines,
            "",
            f"{floor['images']} images of each arm. The same number drawn from the data has an "
            f"expected W1 of {floor['mean']:.3f}.",
        ]
    )


def loss_table(runs: dict[str, list[dict[str, float]]]) -> str:
    """Tabulate validation losses, without the learned weights, and the terminal loss."""
    lines = [
        "| arm | validation loss by seed | terminal loss over its bound, by seed | "
        + " | ".join(f"t = {int(end[1:])}" for end in ENDS)
        + " |",
        "|" + "---|" * (3 + len(ENDS)),
    ]
    for arm, found in runs.items():
        total, over = (
            ", ".join(f"{each.get(tag, float('nan')):.3f}" for each in found)
            for tag in ("val/loss", "watch/terminal_over_bound")
        )
        lines.append(f"| {arm} | {total} | {over} | {means(found, 'val_by_timestep')} |")
    return "\n".join(lines)


def weight_table(runs: dict[str, list[dict[str, float]]]) -> str:
    """Tabulate the weights at the end of training, means over the seeds."""
    lines = [
        "| arm | " + " | ".join(f"t = {int(end[1:])}" for end in ENDS) + " |",
        "|" + "---|" * (1 + len(ENDS)),
    ]
    learned = {arm: found for arm, found in runs.items() if arm != "uniform"}
    lines += [f"| {arm} | {means(found, 'loss_weight')} |" for arm, found in learned.items()]
    return "\n".join(lines)


def means(found: list[dict[str, float]], group: str) -> str:
    """Return the means of a group's scalars over runs, as cells of a row."""
    columns = [[each.get(f"{group}/{end}", float("nan")) for each in found] for end in ENDS]
    return " | ".join(f"{mean(column):.3f}" for column in columns)


def write(text: str, seeds: int, steps: int, S: int) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    (RESULTS / "learned_weight.md").write_text(
        f"# Learned loss weights\n\n{date.today()}, {versions}, Python "
        f"{platform.python_version()}, {platform.machine()}. Made by `python benchmarks/"
        f"learned_weight.py --num-steps {S} --write`.\n\nconfigs/ablation/openmoji.yaml with "
        "uniform weights, with the learned weight of EDM2 (ablation/learned_weight.yaml), and with "
        "that weight without "
        f"a bound (ablation/unbounded_weight.yaml), {seeds} seeds each: the same 108 images, "
        f"{steps} steps with batch size 32, clipped gradients, and the learning rate of the "
        "config, which is not tuned for any arm; all models are included. DDIM, "
        f"S = {S}, trailing, no guidance, the same prompts and seeds in all arms. W1 is the "
        "1-Wasserstein distance between the mean luma of images and that of the data; intervals "
        "resample seeds, then images; the W1 of resampled images is biased upward, so that an "
        "interval may lie above its estimate. Losses are those of the last validation, without "
        "the learned weights, of the averaged network; by timestep they are means over the seeds. "
        "The bound of the terminal loss is that of a network without prompts.\n\n"
        f"{text}\n\n![Images](learned_weight.png)\n"
    )


if __name__ == "__main__":
    main()
