"""Rectified flow from the weights of a v model with zero terminal SNR, and from random weights.

    python benchmarks/converted_start.py [--folder runs/converted_start] [--jobs 2] [--write]

Trains configs/ablation/openmoji.yaml (v), configs/ablation/flow.yaml from random weights (flow),
and the same from the weights of v in a third of the steps (converted). `zsnr compare` generates the
images and measures their brightness. An interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from flawed_against_fixed import CONFIGS, STEPS, by_seed, interval, side_by_side, zsnr
from tqdm import tqdm

from zsnr.reports.arms import Arm

THIRD = STEPS // 3
ARMS = {"v": STEPS, "flow": STEPS, "converted": THIRD}


class StartFrom(L.Callback):
    """Begins training with the averaged weights of another run of the same networks.

    Args:
        checkpoint: Its last checkpoint.
    """

    def __init__(self, checkpoint: str) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step:
            return
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
        averaged = {n.removeprefix("ema."): w for n, w in state.items() if n.startswith("ema.")}
        for modules in (pl_module.trained, pl_module.ema):
            modules.load_state_dict(averaged)


def train(folder: Path, arm: str, seed: int) -> Path:
    """Train one model unless it is trained; return its checkpoint."""
    run, steps = folder / f"{arm}-{seed}", ARMS[arm]
    if not (run / "checkpoints" / f"step-{steps:08d}.ckpt").exists():
        shards, overlay, start = folder / "data", (), ()
        if arm != "v":
            overlay = ("-c", CONFIGS / "flow.yaml")
        if arm == "converted":
            origin = train(folder, "v", seed)
            start = (
                *("--trainer.callbacks+", "converted_start.StartFrom"),
                *("--trainer.callbacks.checkpoint", origin),
            )
        zsnr(
            *("fit", "-c", CONFIGS / "openmoji.yaml", *overlay),
            *("--seed_everything", str(seed), "--data.seed", str(seed)),
            *("--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/val-*.tar"),
            *("--trainer.max_steps", str(steps), "--trainer.default_root_dir", run),
            *("--trainer.val_check_interval", "50", "--trainer.enable_progress_bar", "false"),
            *("--ckpt_path", "last", *start),
            log=folder / f"{arm}-{seed}.log",
        )
    return run / "checkpoints" / "last.ckpt"


def losses(run: Path) -> dict[int, float]:
    """Read the validation losses of a run from its log, by step."""
    found = {}
    for line in (run / "fit.log").read_text().splitlines():
        words = line.replace(",", "").split()
        if "validation" in words:
            found[int(words[words.index("step") + 1])] = float(words[-1])
    return found


def final_loss(folder: Path, arm: str, seed: int) -> float:
    """Return the validation loss of the last checkpoint."""
    overlay = () if arm == "v" else ("-c", CONFIGS / "flow.yaml")
    log = folder / f"{arm}-{seed}.validation.log"
    if not log.exists():
        zsnr(
            *("validate", "-c", CONFIGS / "openmoji.yaml", *overlay, "--data.seed", str(seed)),
            *("--data.train", f"{folder}/data/train-*.tar"),
            *("--data.val", f"{folder}/data/val-*.tar"),
            *("--trainer.default_root_dir", folder / "validation"),
            *("--ckpt_path", train(folder, arm, seed)),
            log=log,
        )
    [found] = re.findall(r"val/loss\s+\S\s+([0-9.]+)", log.read_text())
    return float(found)


def table(facts: dict[str, Any], final: dict[str, list[float]]) -> str:
    """Tabulate the last validation losses and the brightness of each arm."""
    lines = [
        "| arm | steps | validation loss by seed | W1 to the data, 95 % interval | W1 by seed |",
        "|---|---|---|---|---|",
    ]
    for arm in facts["arms"]:
        last = ", ".join(f"{loss:.3f}" for loss in final[arm["name"]])
        lines.append(
            f"| {arm['name']} | {ARMS[arm['name']]} | {last} | {interval(arm['w1'])} "
            f"| {by_seed(arm)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/converted_start"), help="of runs")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, one thread each")
    parser.add_argument("--seeds", type=int, default=3, help="training runs of each arm")
    parser.add_argument("--num-steps", type=int, default=25, help="number of sampling steps")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    folder, S = options.folder.resolve(), options.num_steps
    shards = f"{folder}/data/train-*.tar"
    if not (folder / "data").exists():
        zsnr("data", "openmoji", folder / "data", "--glyphs", "demo")
    torch.set_num_threads(1)
    here = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, here))  # where runs find StartFrom
    seeds = range(options.seeds)
    with ThreadPoolExecutor(options.jobs) as pool:
        for arm in ARMS:  # converted runs begin from those of v
            list(tqdm(pool.map(lambda s, arm=arm: train(folder, arm, s), seeds), arm, len(seeds)))
    by_step = {arm: [losses(folder / f"{arm}-{seed}") for seed in seeds] for arm in ARMS}
    final = {arm: [final_loss(folder, arm, seed) for seed in seeds] for arm in ARMS}
    models = {arm: tuple(str(train(folder, arm, seed)) for seed in seeds) for arm in ARMS}
    plain = Arm(num_steps=S, guidance_scale=1.0)
    arms = [replace(plain, name=arm, models=models[arm], spacing="trailing") for arm in ARMS]
    sections = []
    for title, name, prompts, count in (
        ("Captions of the data as prompts", "prompted", "data", 2),
        ("Without a prompt", "unprompted", "empty", 108),
    ):
        facts = side_by_side(folder / f"{name}-{S}", arms, shards, prompts, count)
        sections.append(f"## {title}\n\n{table(facts, final)}")
    reached = []
    for seed in seeds:
        losses_of = {**by_step["converted"][seed], THIRD: final["converted"][seed]}
        goal = final["flow"][seed]
        reached.append(min((step for step, loss in losses_of.items() if loss <= goal), default=0))
    said = ", ".join(str(step) if step else f"not in {THIRD}" for step in reached)
    sections.append(
        f"Steps in which a converted start reaches the last validation loss of {STEPS} steps from "
        f"random weights (measured every 50 steps and at the end), by seed: {said}."
    )
    text = "\n\n".join(sections)
    print(text)
    if options.write:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
        out = Path(__file__).parent / "results" / "converted_start.md"
        out.write_text(
            f"# Rectified flow from a v model\n\n{date.today()}, {versions}, Python "
            f"{platform.python_version()}, {platform.machine()}. Made by `python benchmarks/"
            "converted_start.py --write`.\n\nconfigs/ablation/openmoji.yaml (v, zero terminal SNR) "
            f"and ablation/flow.yaml (rectified flow), {options.seeds} seeds each, {STEPS} steps "
            f"with batch size 32; converted begins with the weights of v and takes {THIRD}. DDIM, "
            f"S = {S}, trailing, no guidance, the same prompts and seeds in all arms. The losses "
            "of v and of flow are of different targets. Intervals resample seeds, then images; the "
            "W1 of resampled images is biased upward, so that an interval may lie above its "
            "estimate.\n\n"
            f"{text}\n"
        )


if __name__ == "__main__":
    main()
