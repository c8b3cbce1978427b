"""Runs of `zsnr fit` on a small model, and what is compared of them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import recorder
import tiny
import torch
import yaml

from zsnr.cli import main
from zsnr.data.openmoji import write_openmoji_shards
from zsnr.locks import LOCK

REPOSITORY = Path(__file__).parents[2]
TRAINER = REPOSITORY / "configs" / "trainer"
EXACT = 1e-6  # between runs of the same processes, disturbed or not
SAME = 1e-5  # between losses of different numbers of processes

# What the shipped trainer files say of GPUs, changed to what runs here.
ON_CPU = ["--trainer.accelerator=cpu", "--trainer.precision=32-true"]
ON_CPU_SHARDED = [*ON_CPU, "--trainer.strategy.init_args.param_dtype=null"]


def environment(**more: str) -> dict[str, str]:
    """The environment of every process: one thread each, and this checkout."""
    paths = [str(REPOSITORY), str(REPOSITORY / "tests")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        **more,
    }


def write_data(folder: Path) -> Path:
    write_openmoji_shards(folder, glyphs="demo", size=16, samples_per_shard=40, progress=False)
    return folder


class Run:
    """A folder with a config, and afterwards with losses, checkpoints and recorded batches."""

    def __init__(self, folder: Path, data: Path, steps: int, save_every: int):
        folder.mkdir(parents=True)
        self.folder, self.steps = folder, steps
        self.config = folder / "config.yaml"
        record = {"path": str(folder / "batches")}
        values = {
            "trainer": {
                "accelerator": "cpu",
                "devices": 1,
                "max_steps": steps,
                "log_every_n_steps": 1,
                "val_check_interval": 10**6,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": str(folder),
                "logger": {
                    "class_path": "CSVLogger",
                    "init_args": {
                        "save_dir": str(folder),
                        "name": "log",
                        "flush_logs_every_n_steps": 1,
                    },
                },
                "callbacks": [{"class_path": "recorder.Recorder", "init_args": record}],
            },
            "checkpoint": {"every_n_train_steps": save_every},
            "model": {
                **tiny.MODEL,
                "caption_dropout": 0.3,
                "ema": {"decay": 0.9},
            },
            "data": {
                "train": f"{data}/train-*.tar",
                "image_size": 16,
                "batch_size": 4,
                "num_workers": 0,
            },
        }
        self.config.write_text(yaml.safe_dump(values))

    def command(self, *options: str) -> list[str]:
        return ["-m", "zsnr.cli", "fit", "-c", str(self.config), *options]

    def train(self, *options: str, timeout: float = 500) -> Run:
        """Train in one process, undisturbed."""
        done = subprocess.run(
            [sys.executable, *self.command(*options)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return self

    def recorded(self, rank: int = 0) -> int:
        """Count the batches that a rank has begun, repeated ones too."""
        path = Path(f"{self.folder}/batches.{rank}")
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def batches(self) -> dict:
        """{step: {position: (key, caption, digest)}} of all ranks; repeated steps must agree."""
        return recorder.read(self.folder / "batches")

    def losses(self) -> dict[int, float]:
        """{step: loss}; steps that were trained twice must agree."""
        found: dict[int, float] = {}
        logs = (self.folder / "log").glob("version_*/metrics.csv")
        for path in sorted(logs, key=lambda path: int(path.parent.name.removeprefix("version_"))):
            with open(path, newline="") as lines:
                for row in csv.DictReader(lines):
                    if row["train/loss"]:
                        step, loss = int(row["step"]), float(row["train/loss"])
                        assert abs(found.setdefault(step, loss) - loss) <= EXACT, f"step {step}"
        return found

    def weights(self) -> dict[str, torch.Tensor]:
        """The last checkpoint's weights and their average, of a file or a sharded folder."""
        last = self.folder / "checkpoints" / "last.ckpt"
        if last.is_dir():
            file = self.folder / "consolidated.ckpt"
            file.unlink(missing_ok=True)
            assert main(["checkpoint", "consolidate", str(last), "--output", str(file)]) == 0
            last = file
        checkpoint = torch.load(last, weights_only=True)
        assert checkpoint["global_step"] == self.steps
        return checkpoint["state_dict"]

    def unfinished(self) -> list[str]:
        """Names beside the checkpoints that are none: what a killed save left."""
        folder = self.folder / "checkpoints"
        names = sorted(set(os.listdir(folder)) - {"run.json", LOCK}) if folder.exists() else []
        return [n for n in names if not (n.startswith(("step-", "last")) and n.endswith(".ckpt"))]


def difference(mine: dict, theirs: dict) -> float:
    """The largest difference of two runs' losses or weights, which must have the same names."""
    assert mine.keys() == theirs.keys(), sorted(mine.keys() ^ theirs.keys())[:9]
    return max(float((torch.as_tensor(mine[n]) - torch.as_tensor(theirs[n])).abs().max())
               for n in theirs)  # fmt: skip


def assert_same_run(mine: Run, theirs: Run, kills: int = 0) -> dict[str, float]:
    """Hold that a disturbed run is the undisturbed one; return the largest differences.

    Lightning logs a step after its checkpoint is written, so each kill may cost one row of the log.
    """
    assert mine.batches() == theirs.batches()
    assert len(theirs.batches()) == theirs.steps
    losses, whole = mine.losses(), theirs.losses()
    unlogged = whole.keys() - losses.keys()
    assert len(unlogged) <= kills, sorted(unlogged)
    found = {
        "losses": difference(losses, {step: whole[step] for step in whole.keys() - unlogged}),
        "weights": difference(mine.weights(), theirs.weights()),
    }
    assert max(found.values()) <= EXACT, found
    return found


def as_settings(**values: object) -> list[str]:
    """Settings for the command line."""
    return [f"--{name.replace('__', '.')}={json.dumps(value)}" for name, value in values.items()]
