"""Losses of 20 steps, as they were when tests/golden/losses.json was written.

A change that is meant to keep training keeps them; one that is meant to change it renews the file
by `python tests/test_golden.py`, and its commit says why.
"""

import json
import tempfile
from hashlib import sha256
from pathlib import Path

import cells
import pytest
import ranks as processes
import tiny
import torch
from lightning.pytorch.callbacks import Callback

from zsnr.data.buckets import AspectBuckets
from zsnr.data.captions import Captions
from zsnr.data.dataset import Pixels

FILE = Path(__file__).parent / "golden" / "losses.json"
STEPS = 20
RUNS = {  # name: ranks, options of cells.fit
    "one process": (1, {}),
    "loaded by workers, cropped and mirrored": (
        1,
        {"data_options": {"num_workers": 2, "pixels": Pixels("random", flip=True)}},
    ),
    "aspect-ratio buckets": (1, {"data_options": {"aspect": AspectBuckets(step=8)}}),
    "offset noise, no captions": (
        1,
        {
            "model": {"offset_noise": 0.1, "caption_dropout": 0.9, "ema": None},
            "data_options": {"captions": Captions()},
        },
    ),
    "gradients clipped and accumulated": (
        1,
        {
            "trainer_options": {"gradient_clip_val": 0.05},
            "data_options": {"max_batch_size_per_device": 2},
        },
    ),
    "two ranks": (2, {"kind": "ddp"}),
    "two ranks, sharded": (2, {"kind": "sharded"}),
}


class Keys(Callback):
    """Follows which samples are trained on, at which timesteps."""

    def __init__(self):
        self.digest = sha256()

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.digest.update(json.dumps([batch["key"], batch["position"].tolist()]).encode())


def run(shards, options):
    keys = Keys()
    with tempfile.TemporaryDirectory() as root:
        model = {"network": tiny.UNET, **options.get("model", {})}
        options = {**options, "model": model, "steps": STEPS, "saves": False}
        result = cells.fit(shards, root, callbacks=[keys], **options)
    losses = [row["train/loss"] for row in result["logged"]]
    norms = [row["train/grad_norm"] for row in result["logged"]]
    return {"samples": keys.digest.hexdigest()[:16], "losses": losses, "grad_norms": norms}


def losses(ranks, number, shards, options):
    if number == 1:  # here: a rank must not have workers
        return [run(shards, options)]
    return ranks[number](run, str(shards), options)


def here():
    """What floating-point results may depend on."""
    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


@pytest.mark.parametrize("name", RUNS)
def test_training_takes_the_same_steps_as_before(name, ranks, shards):
    golden = json.loads(FILE.read_text())
    number, options = RUNS[name]
    results = losses(ranks, number, shards, options)
    exact = golden["machine"] == here()
    for result, expected in zip(results, golden["runs"][name], strict=True):
        assert result["samples"] == expected["samples"]
        for key in ("losses", "grad_norms"):
            tolerance = {"rel": 0, "abs": 0} if exact else {"rel": 1e-3}
            assert result[key] == pytest.approx(expected[key], **tolerance)


def main():
    with tempfile.TemporaryDirectory() as folder, processes.groups() as groups:
        tiny.write_shards(Path(folder), [7, 6])
        shards = tiny.write_shards(Path(folder), [5], "val")
        runs = {
            name: losses(groups, number, shards, options)
            for name, (number, options) in RUNS.items()
        }
    FILE.write_text(json.dumps({"machine": here(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
