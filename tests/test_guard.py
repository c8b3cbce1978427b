"""The step that no device has to wait for: what is read when, and what a skipped step leaves."""

import os
import traceback
from collections import Counter

import cells
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from test_ranks import Poison
from torch.overrides import TorchFunctionMode

from zsnr.training import EMAConfig
from zsnr.training.preemption import Preemption
from zsnr.training.progress import NonFiniteError

STEPS = 6
QUIET = {"log_every_n_steps": 50, "val_check_interval": 100, "limit_val_batches": 0}


def fused(parameters):
    """An optimizer that can skip a step on the device."""
    return torch.optim.AdamW(parameters, lr=2e-3, fused=True)


def fit(shards, root, steps=STEPS, poisoned=(), interval=50, kind="one", ema=None, **options):
    model = {"optimizer": fused, **({} if ema is None else {"ema": ema})}
    options = {"log_every_n_steps": interval, "gradient_clip_val": 0.05, **options}
    poison = [Poison({*poisoned}, 0)]
    run = cells.fit(
        shards, root, kind, steps, callbacks=poison, model=model, trainer_options=options
    )
    for each in ("totals", "counts"):  # since they were logged last
        del run["progress"][each]
    return run


def check_same(one, other):
    assert one["progress"] == other["progress"]
    for part in ("weights", "ema"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])


@pytest.mark.parametrize("poisoned", [(), (0,), (2, 3), (1, STEPS - 1)])
@pytest.mark.parametrize("every", [1, 2])
def test_numbers_read_a_step_later_change_nothing(shards, tmp_path, poisoned, every):
    options = {"poisoned": poisoned, "ema": EMAConfig(0.9, every_n_steps=every)}
    folders = [tmp_path / "at once", tmp_path / "later"]
    runs = [fit(shards, folders[i], interval=(1, 50)[i], **options) for i in range(2)]
    check_same(*runs)
    assert runs[1]["progress"]["skipped"] == len(poisoned)
    lines = [folder / "skipped_steps.jsonl" for folder in folders]
    assert [path.exists() for path in lines] == [bool(poisoned)] * 2
    if poisoned:
        assert lines[0].read_text() == lines[1].read_text()


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_ranks_skip_the_same_steps(ranks, shards, tmp_path, kind):
    options = {"poisoned": (1, 3), "kind": kind}
    at_once = ranks[2](fit, shards, tmp_path / "at once", interval=1, **options)
    later = ranks[2](fit, shards, tmp_path / "later", interval=50, **options)
    for run in (*at_once, *later):
        check_same(at_once[0], run)
    assert later[0]["progress"]["skipped"] == 2


def test_too_many_skipped_steps_stop_a_run_that_reads_later(shards, tmp_path):
    with pytest.raises(NonFiniteError, match="11 steps in a row"):
        fit(shards, tmp_path, steps=20, poisoned=range(2, 20), limit_val_batches=0)
    assert len((tmp_path / "skipped_steps.jsonl").read_text().splitlines()) == 11


class Reads(TorchFunctionMode):
    """Notes where the host reads a tensor, for which it would have to wait for a device."""

    READS = frozenset(
        getattr(torch.Tensor, name)
        for name in (
            *("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__"),
            *("__index__", "__contains__"),
        )
    )

    def __init__(self):
        super().__init__()
        self.places, self.functions = [], 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions += 1
        if function in self.READS:
            stack = traceback.extract_stack(limit=8)[:-1]
            if not any(frame.name == "numbers" for frame in stack):
                self.places.append(f"{stack[-1].filename}:{stack[-1].lineno}")
        return function(*args, **(kwargs or {}))


class Around(Callback):
    """Enters a context when a step's first batch is on the device, and leaves it after the step."""

    def __init__(self, contexts):
        self.contexts, self.inside = contexts, None

    def on_train_start(self, trainer, module):
        step = module.optimizer_step

        def optimizer_step(*args, **kwargs):
            step(*args, **kwargs)
            if self.inside is not None:
                self.inside.__exit__(None, None, None)
            self.inside = None

        module.optimizer_step = optimizer_step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.inside is None and trainer.global_step in self.contexts:
            self.inside = self.contexts[trainer.global_step]
            self.inside.__enter__()


@pytest.mark.parametrize("options", [{}, {"ema": None}, {"conditioner": "frozen"}])
def test_a_step_off_the_logging_interval_reads_nothing(shards, tmp_path, options):
    reads = Reads()
    around = Around(dict.fromkeys(range(5), reads))
    if "conditioner" in options:
        options = {"conditioner": tiny.frozen_conditioner(tmp_path / "text")}
    cells.fit(
        shards,
        tmp_path / "run",
        steps=5,
        callbacks=[around],
        model={"optimizer": fused, **options},
        trainer_options={**QUIET, "gradient_clip_val": 0.05, "max_steps": 6},
    )
    assert reads.functions > 1000
    assert {*reads.places} == set()


def collectives(shards, root, kind, accumulation, strategy_options):
    """Count the collectives of one optimizer step, with all its micro-batches."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    cells.fit(
        shards,
        root,
        kind,
        steps=4,
        callbacks=[Preemption(), Around({2: profile})],
        model={"optimizer": fused},
        data_options={
            "batch_size": 2 * int(os.environ["WORLD_SIZE"]),
            "max_batch_size_per_device": 2 // accumulation,
        },
        trainer_options=QUIET,
        strategy_options=strategy_options,
    )
    names = [event.name for event in profile.events()]
    return Counter(name.removeprefix("c10d::") for name in names if name.startswith("c10d::"))


@pytest.mark.parametrize(
    ("number", "kind", "options"),
    [
        (2, "ddp", {}),
        (2, "sharded", {}),
        (4, "sharded", {"shard_ranks": 2}),
        (4, "sharded", {"shard_ranks": 2, "reduce_every_micro_batch": True}),
    ],
    ids=["ddp", "fsdp", "hybrid", "hybrid, every micro-batch"],
)
def test_accumulation_adds_no_reduction_of_gradients(
    ranks, shards, tmp_path, number, kind, options
):
    [once, *_], [twice, *_] = (
        ranks[number](collectives, shards, tmp_path / str(passes), kind, passes, options)
        for passes in (1, 2)
    )
    gathers, scatters = (f"_{name}_base_" for name in ("allgather", "reduce_scatter"))
    assert {*once, *twice} <= {"allreduce_", gathers, scatters}
    assert once["allreduce_"] == twice["allreduce_"]
    expected = 2 if options.get("reduce_every_micro_batch") else 1
    assert twice.get(scatters, 0) == expected * once.get(scatters, 0)
    if kind == "ddp":
        assert once == {"allreduce_": 2}  # the gradients, and what the ranks agree on
    elif not options:
        assert once["allreduce_"] == 1
