"""The whole matrix of ranks, strategies, options and resumes; test_ranks.py has one cell each.

One group of processes for each number of ranks runs all its cells.
"""

import itertools

import cells
import pytest
import tiny
import torch

pytestmark = pytest.mark.cluster

RANKS = (1, 2, 4)
KINDS = ("ddp", "sharded")
OPTIONS = {
    "plain": {},
    "clipped": {"trainer_options": {"gradient_clip_val": 0.05}},
    "accumulated": {"data_options": {"max_batch_size_per_device": 1}},
    "checkpointed": {"model": {"gradient_checkpointing": True}},
    "all of these": {
        "trainer_options": {"gradient_clip_val": 0.05},
        "data_options": {"max_batch_size_per_device": 1},
        "model": {"gradient_checkpointing": True},
    },
}
for each in OPTIONS.values():  # with attention, and several resolutions
    each["model"] = {"network": tiny.UNET, **each.get("model", {})}


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """Each kind of options on one process."""
    made = {}

    def run(name):
        if name not in made:
            root = tmp_path_factory.mktemp("alone")
            made[name] = cells.fit(shards, root, **OPTIONS[name])
        return made[name]

    return run


def losses(run):
    return [row["train/loss"] for row in run["logged"]]


def largest(pairs):
    return max(abs(a - b) for a, b in pairs)


def test_losses_and_averages(ranks, shards, alone, tmp_path, report):
    worst, worst_ema, tries = 0.0, 0.0, 0
    for number, kind, name in itertools.product(RANKS, KINDS, OPTIONS):
        root = tmp_path / f"{number}-{kind}-{name}"
        run = ranks[number](cells.fit, shards, root, kind, **OPTIONS[name])[0]
        tries += 1
        difference = largest(zip(losses(run), losses(alone(name)), strict=True))
        assert difference <= 1e-5, (number, kind, name)
        worst = max(worst, difference)
        for key, weight in run["ema"].items():
            error = (weight.double() - run["ema64"][key]).abs().max().item()
            assert error <= 1e-6, (number, kind, name, key)
            worst_ema = max(worst_ema, error)
    report(tries, f"losses within {worst:.1e} of one process, averages within {worst_ema:.1e}")


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_resumes(ranks, shards, tmp_path, report, kind):
    straight = {
        number: ranks[number](cells.fit, shards, tmp_path / f"straight-{number}", kind)[0]
        for number in RANKS
    }
    worst, tries = 0.0, 0
    for first in RANKS:
        root = tmp_path / f"first-{first}"
        stopped = ranks[first](cells.fit, shards, root, kind, stop_at=2)[0]
        checkpoint = cells.newest(root)
        for second in RANKS:
            on = ranks[second](
                cells.fit, shards, tmp_path / f"{first}-{second}", kind, checkpoint=checkpoint
            )[0]
            tries += 1
            if second == first:  # the same run, to the last bit
                assert losses(on) == losses(straight[first])[2:]
                for part in ("weights", "ema"):
                    for name, weight in straight[first][part].items():
                        assert torch.equal(on[part][name], weight)
            for name, weight in stopped["weights"].items():
                assert torch.equal(on["start"][name], weight)
            difference = largest(zip(losses(on), losses(straight[first])[2:], strict=True))
            assert difference <= 1e-6, (first, second)
            worst = max(worst, difference)
    report(tries, f"losses within {worst:.1e} of the unbroken run, bit for bit on as many ranks")
