"""The same small model, trained and sampled with and without the fixes: whose brightness is right?

    python benchmarks/flawed_against_fixed.py [--folder runs/ablation] [--jobs 2] [--write]

Trains configs/ablation/openmoji.yaml with all fixes, on the original schedule, and on the original
schedule with offset noise, on the same data with the same seeds, steps and learning rate; the model
of the original schedule is sampled with leading and with trailing timesteps. `zsnr compare` makes
the pictures and measures. Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "ablation"
TRAINED = ("fixed", "original", "offset_noise")
STEPS = 500


def zsnr(*arguments: str | Path, log: Path | None = None) -> None:
    """Run a command of zsnr on one thread; its output goes to `log` if there is one."""
    command = [sys.executable, "-m", "zsnr.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if log is None:
        subprocess.run(command, check=True, env=environment)
        return
    with open(log, "w") as file:
        subprocess.run(command, check=True, env=environment, stdout=file, stderr=file)


def train(folder: Path, arm: str, seed: int) -> Path:
    """Train one model, or find that it is trained; return its checkpoint."""
    run = folder / f"{arm}-{seed}"
    if not (run / "checkpoints" / f"step-{STEPS:08d}.ckpt").exists():
        overlay = () if arm == "fixed" else ("-c", CONFIGS / f"{arm}.yaml")
        shards = folder / "data"
        zsnr(
            *("fit", "-c", CONFIGS / "openmoji.yaml", *overlay),
            *("--seed_everything", str(seed), "--data.seed", str(seed)),
            *("--data.train", f"{shards}/train-*.tar", "--data.val", f"{shards}/val-*.tar"),
            *("--trainer.max_steps", str(STEPS), "--trainer.default_root_dir", run),
            *("--trainer.enable_progress_bar", "false", "--ckpt_path", "last"),
            log=folder / f"{arm}-{seed}.log",
        )
    return run / "checkpoints" / "last.ckpt"
