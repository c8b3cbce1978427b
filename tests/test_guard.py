"""The step that no device has to wait for: what is read when, and what a skipped step leaves."""

import functools
import math
import os
import traceback
from collections import Counter

import cells
import pytest
import tiny
import torch
from cells import scaled
from lightning.pytorch.callbacks import Callback
from test_ranks import Poison
from torch.overrides import TorchFunctionMode

from zsnr.training import EMAConfig
from zsnr.training.optimizer import skip_where, skips_on_device, with_kernel
from zsnr.training.preemption import Preemption
from zsnr.training.progress import NonFiniteError

STEPS = 6
QUIET = {"log_every_n_steps": 50, "val_check_interval": 100, "limit_val_batches": 0}


def fused(parameters):
    """An optimizer that can skip a step on the device."""
    return torch.optim.AdamW(parameters, lr=2e-3, fused=True)


def unfused(parameters):
    """An optimizer for which the host has to decide."""
    return torch.optim.AdamW(parameters, lr=2e-3, fused=False)


def fit(shards, root, steps=STEPS, poisoned=(), interval=50, kind="one", ema=None, **options):
    model = {"optimizer": fused, **({} if ema is None else {"ema": ema})}
    options = {"log_every_n_steps": interval, "gradient_clip_val": 0.05, **options}
    poison = [Poison({*poisoned}, 0)]
    run = cells.fit(
        shards,
        root,
        kind,
        steps,
        callbacks=poison,
        model=model,
        trainer_options=options,
        saves=False,
    )
    for each in ("totals", "counts"):  # since they were logged last
        del run["progress"][each]
    return run


def check_same(one, other):
    assert one["progress"] == other["progress"]
    for part in ("weights", "ema"):
        assert one[part].keys() == other[part].keys()
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])


@pytest.mark.parametrize(
    ("poisoned", "every", "precision"),
    [
        *(((), 1, dict), ((0,), 1, dict), ((2, 3), 1, dict), ((2, 3), 2, dict)),
        *(((1, STEPS - 1), 2, dict), ((2, 3), 1, scaled)),
    ],
)
def test_numbers_read_a_step_later_change_nothing(shards, tmp_path, poisoned, every, precision):
    options = {"poisoned": poisoned, "ema": EMAConfig(0.9, every_n_steps=every)}
    folders = [tmp_path / "at once", tmp_path / "later"]
    runs = [fit(shards, folders[i], interval=(1, 50)[i], **precision(), **options) for i in (0, 1)]
    check_same(*runs)
    assert runs[1]["progress"]["skipped"] == len(poisoned)
    lines = [folder / "skipped_steps.jsonl" for folder in folders]
    assert [path.exists() for path in lines] == [bool(poisoned)] * 2
    if poisoned:
        assert lines[0].read_text() == lines[1].read_text()


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_ranks_skip_the_same_steps(ranks, shards, tmp_path, kind):
    options = {"poisoned": (1, 2), "steps": 4, "kind": kind}
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


@pytest.mark.parametrize(
    ("options", "precision"),
    [({}, dict), ({"ema": None}, dict), ({"conditioner": "frozen"}, dict), ({}, scaled)],
)
def test_a_step_off_the_logging_interval_reads_nothing(shards, tmp_path, options, precision):
    reads = Reads()
    around = Around(dict.fromkeys(range(5), reads))
    if "conditioner" in options:
        options = {"conditioner": tiny.frozen_conditioner(tmp_path / "text")}
    cells.fit(
        shards,
        tmp_path / "run",
        steps=5,
        saves=False,
        callbacks=[around],
        model={"optimizer": fused, **options},
        trainer_options={**QUIET, "gradient_clip_val": 0.05, "max_steps": 6, **precision()},
    )
    assert reads.functions > 1000
    assert {*reads.places} == set()


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", init_scale=4.0)])
@pytest.mark.parametrize("skips", [0.0, 1.0])
def test_a_step_is_skipped_by_a_tensor_whether_or_not_a_scaler_agrees(scaler, skips):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = fused([weight])
    for skip in (0.0, skips, 0.0):
        before = weight.detach().clone()
        weight.grad = torch.ones(3)
        skip_where(optimizer, torch.tensor(skip), scaler)
        if scaler is None:
            optimizer.step()
        else:
            scaler.scale(weight.sum())
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(weight, before) == bool(skip)


def test_an_overflow_that_only_the_scaler_sees_is_skipped():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = fused([weight]), torch.amp.GradScaler("cpu", init_scale=4.0)
    weight.grad = torch.full((3,), math.inf)
    scaler.scale(weight.sum())
    skip_where(optimizer, torch.tensor(0.0), scaler)
    scaler.step(optimizer)
    scaler.update()
    assert (weight.tolist(), scaler.get_scale()) == ([1.0] * 3, 2.0)


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_the_fused_kernel_is_the_default_on_a_gpu(make):
    def made(device, **options):
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        groups = [{"params": weights[:1], "lr": 0.5}, {"params": weights[1:]}]
        return with_kernel(make(groups, lr=0.25, weight_decay=0.125, **options), device)

    optimizer, plain = made(GPU), made(CPU)
    assert type(optimizer) is make
    assert skips_on_device(optimizer)
    assert not skips_on_device(plain)
    for name, value in plain.defaults.items():
        assert optimizer.defaults[name] == (True if name == "fused" else value)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    for each in (optimizer, plain):
        for group in each.param_groups:
            group["params"][0].grad = torch.ones(2)
        each.step()
    for one, other in zip(optimizer.param_groups, plain.param_groups, strict=True):
        assert one["weight_decay"] == other["weight_decay"]
        assert torch.allclose(one["params"][0], other["params"][0])
    for chosen in ({"fused": False}, {"foreach": True}, {"differentiable": True}):
        assert not skips_on_device(made(GPU, **chosen))


@pytest.mark.parametrize(
    ("make", "sharded"), [(torch.optim.RMSprop, False), (torch.optim.SGD, True)]
)
def test_an_optimizer_without_a_fused_kernel_stays_as_it_is(make, sharded):
    weight = torch.nn.Parameter(torch.ones(2))
    if sharded:
        weight.to_local = weight.detach  # as a DTensor has it
    optimizer = make([weight])
    assert with_kernel(optimizer, GPU) is optimizer
    assert not skips_on_device(optimizer)


@pytest.mark.parametrize("kernels", [(unfused, fused), (fused, unfused)])
def test_a_resumed_run_has_the_kernel_of_its_config(shards, tmp_path, kernels):
    checkpoint = tmp_path / "checkpoints" / "step-00000002.ckpt"
    parts = [(2, None, kernels[0]), (None, checkpoint, kernels[1]), (None, None, kernels[1])]
    _, resumed, whole = (
        cells.fit(
            shards,
            tmp_path,
            stop_at=stop_at,
            checkpoint=start,
            every=2,
            model={"optimizer": kernel},
            trainer_options=QUIET,
        )
        for stop_at, start, kernel in parts
    )
    for name, weight in resumed["weights"].items():
        assert torch.allclose(weight, whole["weights"][name], atol=2e-4)


def collectives(shards, root, kind, accumulation, strategy_options):
    """Count rank 0's collectives of one optimizer step, with all its micro-batches."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    first = os.environ["RANK"] == "0"
    cells.fit(
        shards,
        root,
        kind,
        steps=4,
        saves=False,
        callbacks=[Preemption(), Around({2: profile} if first else {})],
        model={"optimizer": fused},
        data_options={
            "batch_size": 4 * int(os.environ["WORLD_SIZE"]),
            "max_batch_size_per_device": 4 // accumulation,
        },
        trainer_options=QUIET,
        strategy_options=strategy_options,
    )
    names = [event.name for event in profile.events()] if first else []
    return Counter(name.removeprefix("c10d::") for name in names if name.startswith("c10d::"))


@pytest.fixture(scope="module")
def counted(ranks, shards, tmp_path_factory):
    """Counts of collectives, made once for each case."""

    @functools.cache
    def count(number, kind, accumulation, options):
        arguments = shards, tmp_path_factory.mktemp("counted"), kind, accumulation, dict(options)
        return ranks[number](collectives, *arguments)[0]

    return count


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
def test_accumulation_adds_no_reduction_of_gradients(counted, number, kind, options):
    plain = {name: value for name, value in options.items() if name == "shard_ranks"}
    once = counted(number, kind, 1, frozenset(plain.items()))
    four = counted(number, kind, 4, frozenset(options.items()))
    gathers, scatters = (f"_{name}_base_" for name in ("allgather", "reduce_scatter"))
    assert {*once, *four} <= {"allreduce_", gathers, scatters}
    assert once["allreduce_"] == four["allreduce_"]
    assert four.get(gathers, 0) == 4 * once.get(gathers, 0)
    expected = 4 if options.get("reduce_every_micro_batch") else 1
    assert four.get(scatters, 0) == expected * once.get(scatters, 0)
    if kind == "ddp":
        assert once == {"allreduce_": 2}  # the gradients, and what the ranks agree on
    elif not options:
        assert once["allreduce_"] == 1
