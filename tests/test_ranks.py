"""One run on several ranks: the same numbers, whatever the strategy; one cell of each kind.

tests/cluster holds the whole matrix.
"""

import copy
import json
import math
from collections import defaultdict
from pathlib import Path

import cells
import pytest
import tiny
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler

from zsnr.checkpoints.checkpoint_file import read_checkpoint
from zsnr.cli import main
from zsnr.conditioning import NullConditioner
from zsnr.data.buckets import AspectBuckets
from zsnr.data.caption_tags import Tags
from zsnr.data.order import accumulation
from zsnr.data.sources import Source
from zsnr.loss import LossWeighting
from zsnr.networks import UNet
from zsnr.training import EMAConfig
from zsnr.training.guard import sums_by_group
from zsnr.training.progress import NonFiniteError, Progress

STEPS = 4


@pytest.fixture(scope="module")
def alone(shards, tmp_path_factory):
    """The run on one process that all others are compared with, and its folder."""
    root = tmp_path_factory.mktemp("alone")
    return {**cells.fit(shards, root, previews=True), "root": root}


@pytest.fixture(scope="module")
def sharded(ranks, shards, tmp_path_factory):
    """A run of two ranks that shard, with checkpoints of steps 2 and 4; what rank 0 tells."""
    root = tmp_path_factory.mktemp("sharded")
    return {**ranks[2](cells.fit, shards, root, "sharded", every=2)[0], "root": root}


def checkpoint_of(root, step):
    return str(root / "checkpoints" / f"step-{step:08d}.ckpt")


def losses(run):
    return [row["train/loss"] for row in run["logged"]]


@pytest.fixture(scope="module")
def attentive(shards, tmp_path_factory):
    """A run on one process of a network with attention and several resolutions."""
    root, model = tmp_path_factory.mktemp("attentive"), {"network": tiny.UNET}
    return {**cells.fit(shards, root, previews=True, model=model, saves=False), "root": root}


def same_run(run, other):
    for a, b in zip(run["logged"], other["logged"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # losses, by timestep too, norms, exposures
    # AdamW magnifies rounding where gradients are all but zero
    for name, weight in run["weights"].items():
        torch.testing.assert_close(weight, other["weights"][name], rtol=1e-3, atol=5e-4)


def average_is_exact(run):
    for name, weight in run["ema"].items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.double(), run["ema64"][name], rtol=1e-5, atol=1e-6)


CELLS = {
    "ddp-2": (2, "ddp", {}),
    "sharded-1": (1, "sharded", {}),
    "sharded-2-accumulated-checkpointed": (
        2,
        "sharded",
        {
            "data_options": {"max_batch_size_per_device": 2},
            "model": {"network": tiny.UNET, "gradient_checkpointing": True},
        },
    ),
    "sharded-4-hybrid": (4, "sharded", {"strategy_options": {"shard_ranks": 2}}),
}


@pytest.mark.parametrize("name", CELLS)
def test_ranks_and_strategies_change_nothing_but_rounding(ranks, shards, attentive, tmp_path, name):
    number, kind, options = CELLS[name]
    options = {"previews": True, "saves": False, "model": {"network": tiny.UNET}, **options}
    runs = ranks[number](cells.fit, shards, tmp_path, kind, **options)
    for run in runs:
        same_run(run, attentive)
        average_is_exact(run)
        assert run["logged"] == runs[0]["logged"]  # on every rank
    assert len(list((tmp_path / "previews").iterdir())) == 2
    same_images(attentive["root"] / "previews", tmp_path / "previews")
    if kind == "sharded":
        shard = 2 if "hybrid" in name else number
        whole = attentive["weights"]["unet.unet.conv_in.weight"].shape
        for local in (runs[0]["local"], runs[0]["local_ema"]):
            assert local["unet.unet.conv_in.weight"] == (whole[0] // shard, *whole[1:])


def test_captions_that_are_cut_are_counted_over_all_ranks(ranks, tmp_path):
    captions = ["a very long caption of many words", *"abcdefg"]  # on one of the ranks
    folder = tiny.write_captions(tmp_path / "shards", captions)
    tiny.write_captions(folder, ["a"], "val")
    for run in ranks[2](cells.fit, folder, tmp_path, "ddp", 3, model={"caption_dropout": 0.0}):
        assert [row["train/cut_captions"] for row in run["logged"]] == [1, 2, 3]
        assert run["progress"]["cut_captions"] == 3


def test_ranks_that_shard_learn_the_same_loss_weight_and_resume_it(ranks, shards, tmp_path):
    options = {
        "steps": 3,
        "model": {"loss": LossWeighting("learned")},
        "data_options": {"max_batch_size_per_device": 2},
    }
    alone = cells.fit(shards, tmp_path, saves=False, **options)
    straight = ranks[2](cells.fit, shards, tmp_path, "sharded", every=2, **options)
    options |= {"saves": False, "checkpoint": checkpoint_of(tmp_path, 2)}
    again = ranks[2](cells.fit, shards, tmp_path, "sharded", **options)
    wanted = alone["learned_weight"]["coefficients"]
    for run, resumed in zip(straight, again, strict=True):
        assert run["learned_weight"]["coefficients"] == pytest.approx(wanted, rel=1e-4, abs=1e-8)
        for a, b in zip(run["logged"], alone["logged"], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        assert resumed["learned_weight"] == run["learned_weight"] == straight[0]["learned_weight"]
        assert losses(resumed) == losses(run)[2:]


class Losses(Callback):
    """Keeps the loss and the image's shape of each sample by its position in the run."""

    def __init__(self):
        self.rows, self.shapes = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.shapes += [tuple(batch["image"].shape[-2:])] * len(batch["key"])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for batch in module._micro_batches:
            self.rows += zip(batch.keys, batch.losses.tolist(), strict=True)


def test_losses_by_source_and_bucket_are_means_over_all_ranks(ranks, tmp_path):
    sizes = {"photos": [(16, 16)] * 4 + [(8, 32)] * 8, "glyphs": [(16, 16)] * 7}
    for name, images in sizes.items():
        (tmp_path / name).mkdir()
        members = {f"{name}{i}.png": tiny.png((20 * i,) * 3, size) for i, size in enumerate(images)}
        members |= {f"{name}{i}.txt": b"a" for i in range(len(images))}
        tiny.write_shard(tmp_path / name / "0.tar", members)
    options = {
        "steps": 6,
        "saves": False,
        "data_options": {
            "train": [Source(str(tmp_path / "photos")), Source(str(tmp_path / "glyphs"), 2.0)],
            "val": None,
            "aspect": AspectBuckets(step=8, max_ratio=4),
            "max_batch_size_per_device": 2,
        },
        "trainer_options": {"log_every_n_steps": 3, "val_check_interval": None},
    }
    seen = Losses()
    run = cells.fit(tmp_path, tmp_path, callbacks=[seen], **options)
    for step in (3, 6):
        groups = defaultdict(list)
        for i in range((step - 3) * cells.BATCH, step * cells.BATCH):
            (key, loss), (height, width) = seen.rows[i], seen.shapes[i]
            groups[f"loss_by_source/{key.rstrip('0123456789')}"].append(loss)
            groups[f"loss_by_bucket/{width}x{height}"].append(loss)
        wanted = {name: sum(each) / len(each) for name, each in groups.items()}
        logged = run["logged"][step - 1]
        assert {n: logged[n] for n in wanted} == pytest.approx(wanted, rel=1e-6)
    names = ["source/photos", "source/glyphs", "bucket/16x16", "bucket/8x32"]
    assert {n for n in logged if n.startswith("loss_by_")} == {f"loss_by_{name}" for name in names}
    for rank in ranks[2](cells.fit, tmp_path, tmp_path, "ddp", **options):
        for a, b in zip(rank["logged"], run["logged"], strict=True):
            assert a == pytest.approx(b, rel=1e-5)


def test_ranks_train_on_the_same_tags(ranks, tmp_path):
    captions = [f"{i}, a, b" for i in range(8)]
    folder = tiny.write_captions(tmp_path / "shards", captions)
    tiny.write_captions(folder, ["a"], "val")
    options = {"steps": 2, "data_options": {"tags": Tags(keep=1, dropout=0.2)}}
    alone = cells.fit(folder, tmp_path / "alone", **options)
    for run in ranks[2](cells.fit, folder, tmp_path / "ranks", "ddp", **options):
        same_run(run, alone)


def test_any_module_is_sharded_by_its_blocks(ranks, shards, tmp_path):
    torch.manual_seed(0)
    model = {
        "network": tiny.Own(),
        "conditioner": NullConditioner(),
        "gradient_checkpointing": True,
    }
    alone = cells.fit(shards, tmp_path / "one", model=copy.deepcopy(model), saves=False)
    for run in ranks[2](cells.fit, shards, tmp_path / "two", "sharded", model=model, saves=False):
        same_run(run, alone)
        assert run["local"]["unet.layers.0.weight"] == (4, 8, 3, 3)  # half of it


def test_compiled_blocks_change_nothing_but_rounding(ranks, shards, alone, tmp_path):
    """With few blocks, since each rank compiles each of them twice, for training and without."""
    options = {
        "saves": False,
        "strategy_options": {"reshard_after_forward": False},
        "model": {"compile": "aot_eager"},
    }
    runs = ranks[2](cells.fit, shards, tmp_path, "sharded", previews=True, **options)
    for run in runs:
        same_run(run, alone)
        average_is_exact(run)
        assert run["logged"] == runs[0]["logged"]
    same_images(alone["root"] / "previews", tmp_path / "previews")


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_layers_behind_the_text_that_is_taken_have_no_gradient(ranks, shards, tmp_path, kind):
    alone = cells.fit_text(shards, tmp_path / "one", "one", layer=-2)
    for run in ranks[2](cells.fit_text, shards, tmp_path / kind, kind, layer=-2):
        same_run(run, alone)
        for name, weight in run["weights"].items():
            idle = ".layers.2." in name or "final_layer_norm" in name
            assert torch.equal(weight, run["start"][name]) == idle


@pytest.mark.parametrize("kept", [True, False])
def test_validating_weights_that_are_trained(ranks, shards, alone, tmp_path, kept):
    options = {"model": {"ema": None}, "strategy_options": {"reshard_after_forward": not kept}}
    options |= {"previews": True, "saves": False}
    run = ranks[2](cells.fit, shards, tmp_path, "sharded", **options)[0]
    assert losses(run) == pytest.approx(losses(alone), rel=1e-5)


def test_clipping_by_the_global_norm(ranks, shards, alone, tmp_path):
    norms = sorted(row["train/grad_norm"] for row in alone["logged"])
    clip = (norms[1] + norms[2]) / 2  # some steps are clipped, and some are not
    options = {"trainer_options": {"gradient_clip_val": clip}, "saves": False}
    clipped = cells.fit(shards, tmp_path / "one", **options)
    norms = [row["train/grad_norm"] for row in clipped["logged"]]
    assert min(norms) < clip < max(norms)
    for kind in ("sharded", "ddp"):
        same_run(ranks[2](cells.fit, shards, tmp_path / kind, kind, **options)[0], clipped)


def test_clipped_gradients_have_the_norm(shards, tmp_path):
    class Norms(Callback):
        def __init__(self):
            self.norms = []

        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = [p.grad for p in module.trained.parameters() if p.grad is not None]
            if grads:
                self.norms.append(float(torch.nn.utils.get_total_norm(grads)))

    watch = Norms()
    options = {"trainer_options": {"gradient_clip_val": 0.05}}
    cells.fit(shards, tmp_path, callbacks=[watch], **options)
    assert watch.norms
    assert watch.norms == pytest.approx([0.05] * len(watch.norms), rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [(), (1,)])
def test_scaled_gradients_are_clipped_and_guarded_unscaled(shards, tmp_path, fused, bad):
    plain = cells.fit(shards, tmp_path / "plain", steps=3, callbacks=[Poison(bad, 3)])
    run = cells.fit(
        shards,
        tmp_path / "scaled",
        steps=3,
        callbacks=[Poison(bad, 3)],
        model={"optimizer": lambda p: torch.optim.AdamW(p, lr=2e-3, fused=fused)},
        trainer_options={**cells.scaled(), "gradient_clip_val": 100.0},
    )
    for a, b in zip(run["logged"], plain["logged"], strict=True):
        assert math.isfinite(a["train/grad_norm"]) == math.isfinite(b["train/grad_norm"])
        if math.isfinite(b["train/grad_norm"]):
            assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=0.1)
    assert run["progress"]["skipped"] == len(bad)
    assert all(weight.isfinite().all() for weight in run["weights"].values())


def test_param_dtype_of_the_strategy(ranks, shards, alone, tmp_path):
    options = {"strategy_options": {"param_dtype": "bfloat16"}, "saves": False}
    run = ranks[2](cells.fit, shards, tmp_path, "sharded", **options)[0]
    assert losses(run) == pytest.approx(losses(alone), rel=2e-2)
    assert losses(run) != losses(alone)
    assert all(weight.dtype == torch.float32 for weight in run["weights"].values())
    average_is_exact(run)


# Checkpoints


def straight_on(on, straight):
    """Compare a run that was resumed at step 2 with one that was not stopped."""
    assert losses(on) == pytest.approx(losses(straight)[2:], rel=1e-5)
    assert on["progress"]["terminal"] == straight["progress"]["terminal"]
    for name, weight in straight["ema"].items():
        torch.testing.assert_close(on["ema"][name], weight, rtol=1e-3, atol=5e-4)


def holds_weights(checkpoint, run):
    """Compare a checkpoint's networks with the weights of the run at that step."""
    for ema, name in ((True, "ema"), (False, "weights")):
        for key, weight in read_checkpoint(checkpoint, ema=ema).network.state_dict().items():
            assert torch.equal(weight, run[name][f"unet.{key}"])


SMALLER = {"max_batch_size_per_device": 2}  # accumulates


@pytest.mark.parametrize(
    ("first", "kind", "second", "then"),
    [(2, "full", 2, "ddp"), (1, "one", 2, "sharded"), (4, "sharded", 2, "full")],
)
def test_a_run_resumes_on_other_ranks(ranks, shards, alone, tmp_path, first, kind, second, then):
    if kind == "one":
        stopped = cells.fit(shards, tmp_path, every=2, stop_at=2)
    else:
        stopped = ranks[first](cells.fit, shards, tmp_path, kind, every=2, stop_at=2)[0]
    checkpoint = cells.newest(tmp_path)
    assert Path(checkpoint).is_dir() == (kind == "sharded")
    holds_weights(checkpoint, stopped)
    options = {"checkpoint": checkpoint, "data_options": SMALLER, "saves": False}
    straight_on(ranks[second](cells.fit, shards, tmp_path, then, **options)[0], alone)


def test_a_sharded_run_resumes_on_one_process(ranks, shards, alone, sharded, tmp_path):
    holds_weights(checkpoint_of(sharded["root"], 4), sharded)
    checkpoint = checkpoint_of(sharded["root"], 2)
    options = {"checkpoint": checkpoint, "data_options": SMALLER, "saves": False}
    straight_on(cells.fit(shards, tmp_path / "one", "one", **options), alone)
    straight_on(ranks[1](cells.fit, shards, tmp_path / "1", "sharded", **options)[0], alone)


def test_resuming_on_the_same_ranks_is_the_same_run(ranks, shards, sharded, tmp_path):
    checkpoint = checkpoint_of(sharded["root"], 2)
    options = {"checkpoint": checkpoint, "saves": False}
    on = ranks[2](cells.fit, shards, tmp_path, "sharded", **options)[0]
    assert losses(on) == losses(sharded)[2:]
    for part in ("weights", "ema"):
        for name, weight in sharded[part].items():
            assert torch.equal(on[part][name], weight)


def test_weights_that_are_made_on_each_rank_for_its_shards_are_the_same(
    ranks, shards, sharded, tmp_path
):
    torch.manual_seed(1)
    network = UNet(tiny.SMALLER_UNET, 12, tiny.conditioner().context_dim)
    network.unet.save_pretrained(tmp_path / "p" / "unet")
    start = {"model": {"network": str(tmp_path / "p")}}
    plain = {"kind": "sharded", "saves": False}
    whole = ranks[2](cells.fit, shards, tmp_path / "whole", **plain, **start)[0]
    checkpoint = checkpoint_of(sharded["root"], 2)
    for name, options, same, begin in (
        ("random", {}, sharded, 0),
        ("pretrained", start, whole, 0),
        ("resumed", {"checkpoint": checkpoint}, sharded, 2),
    ):
        run = ranks[2](cells.fit, shards, tmp_path / name, deferred=True, **plain, **options)[0]
        assert losses(run) == losses(same)[begin:]
        for part in ("weights", "ema") if begin else ("start", "weights", "ema"):
            assert run[part].keys() == same[part].keys()
            for key, weight in same[part].items():
                assert torch.equal(run[part][key], weight)


def test_a_module_of_lightning_is_built_without_weights():
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, strategy=cells.strategy("sharded")
    )
    with trainer.init_module():
        module = cells.module()
    for part in (module.trained, module.ema):
        assert all(weight.is_meta for weight in part["unet"].parameters())
        assert not any(weight.is_meta for weight in part["conditioner"].parameters())


def test_consolidating(shards, sharded, tmp_path, capsys):
    folder, file = sharded["root"] / "checkpoints" / "last.ckpt", tmp_path / "one.ckpt"
    assert main(["checkpoint", "consolidate", str(folder), "--output", str(file)]) == 0
    for a, b in zip(cells.weights_of(folder), cells.weights_of(file), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    # a run on one process resumes from it
    on = cells.fit(shards, tmp_path / "on", "one", steps=6, checkpoint=str(file))
    assert len(on["logged"]) == 2
    assert main(["checkpoint", "consolidate", str(folder), "--output", str(file)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["checkpoint", "consolidate", str(file), "--output", str(tmp_path / "x")]) == 2
    assert "a file already" in capsys.readouterr().err


# Evaluation


def test_validate_and_predict_with_unequal_work(ranks, shards, alone, sharded, tmp_path):
    checkpoint, folder = (checkpoint_of(run["root"], 4) for run in (alone, sharded))
    prompts = [{"prompt": f"grey {i}"} for i in range(3)]
    cells.predict(shards, tmp_path, "one", checkpoint, str(tmp_path / "one"), prompts)
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "one").glob("*.png")}
    assert len(wanted) == 3
    alone = cells.evaluate(shards, tmp_path, "one", checkpoint)
    for number, kind in ((2, "ddp"), (4, "sharded")):  # of 4 ranks one has nothing to do
        metrics = ranks[number](cells.evaluate, shards, tmp_path, kind, checkpoint)[0]
        assert metrics == pytest.approx(alone, rel=1e-5)
        out = tmp_path / f"{kind}-images"
        for _ in range(2 if kind == "ddp" else 1):  # the second finds all done
            ranks[number](cells.predict, shards, tmp_path, kind, checkpoint, str(out), prompts)
        assert sorted(p.name for p in out.glob("*.png")) == sorted(wanted)
        lines = (out / "manifest.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["file"] for line in lines) == sorted(wanted)
        assert not list(out.glob(".manifest*"))
        same_images(tmp_path / "one", out)
    metrics = ranks[2](cells.evaluate, shards, tmp_path, "sharded", folder)[0]
    assert metrics == pytest.approx(alone, rel=1e-4)


def same_images(folder, other):
    import numpy as np
    from PIL import Image

    for path in folder.glob("*.png"):
        a, b = (np.asarray(Image.open(p), int) for p in (path, other / path.name))
        assert abs(a - b).max() <= 1


# Guards


class Poison(Callback):
    """Makes the loss of one sample, on the rank that has it, not a number."""

    def __init__(self, steps, position):
        self.steps, self.position = steps, position

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step in self.steps:
            batch["image"][batch["position"] % cells.BATCH == self.position] = math.nan


@pytest.mark.parametrize(("number", "kind"), [(1, None), (2, "ddp"), (2, "sharded")])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(ranks, shards, tmp_path, number, kind):
    poison = [Poison({1}, 5)]
    if kind is None:
        runs = [cells.fit(shards, tmp_path, callbacks=poison)]
    else:
        options = {"callbacks": poison, "saves": False}
        runs = ranks[number](cells.fit, shards, tmp_path, kind, **options)
    for run in runs:
        assert [math.isfinite(loss) for loss in losses(run)] == [True, False, True, True]
        assert all(weight.isfinite().all() for weight in run["weights"].values())
        assert run["progress"]["skipped"] == 1
        assert run["logged"][-1]["train/skipped_steps"] == 1
    [line] = (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line["step"] == 1
    assert len(line["keys"]) == 1


def test_a_skipped_step_changes_nothing(shards, tmp_path):
    before = cells.fit(shards, tmp_path / "a", steps=2)
    after = cells.fit(shards, tmp_path / "b", steps=3, callbacks=[Poison({2}, 0)])
    # one step more, but a learning rate that knows of three: compare up to it
    same = cells.fit(shards, tmp_path / "c", steps=3, stop_at=2)
    for part in ("weights", "ema"):
        for name, weight in same[part].items():
            assert torch.equal(after[part][name], weight)
    assert before["logged"][0] == after["logged"][0]


def test_too_many_in_a_row_stop_the_run(ranks, shards, tmp_path):
    options = {"model": {"max_skipped_steps": 1}, "steps": 9}
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        cells.fit(shards, tmp_path, callbacks=[Poison({1, 3, 4, 5}, 0)], **options)
    lines = (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3, 4]


@pytest.mark.parametrize(("kind", "step"), [("ddp", 1), ("sharded", 2)])
def test_storage_that_fails_on_one_rank_stops_all_with_its_name(
    ranks, shards, tmp_path, kind, step
):
    (error, done), other = ranks[2](cells.fit_until_storage_fails, shards, tmp_path, kind, step)
    assert (error, done) == other
    assert "failed 1 times, the last time with Input/output error" in error
    assert step <= done < cells.BATCH


# Numbers


def test_accumulation_follows_from_batch_ranks_and_bound():
    assert accumulation(64, 2) == 1
    assert accumulation(64, 2, 10) == 4  # 8 each
    assert accumulation(64, 4, 16) == 1
    assert accumulation(6, 2, 2) == 3
    assert accumulation(7, 1, 3) == 7
    with pytest.raises(ValueError, match="does not divide into 3 ranks"):
        accumulation(64, 3)


def test_a_batch_that_does_not_divide_is_refused_before_training(ranks, shards, tmp_path, capsys):
    values = {
        "trainer": {"accelerator": "cpu", "max_steps": 1, "default_root_dir": str(tmp_path)},
        "model": tiny.MODEL,
        "data": {"train": f"{shards}/train-*.tar", "image_size": 16, "batch_size": 5},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    more = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert main(["fit", "-c", str(tmp_path / "config.yaml"), *more]) == 2
    told = capsys.readouterr().err
    assert "data.batch_size=5, the global batch, does not divide into 2 ranks" in told


def test_another_accumulation_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="accumulate_grad_batches=4, but"):
        cells.fit(shards, tmp_path, trainer_options={"accumulate_grad_batches": 4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"callbacks": [GradientAccumulationScheduler({0: 2})]},
            "GradientAccumulationScheduler would take other steps",
        ),
        (
            {"trainer_options": {"limit_train_batches": 2}},
            "limit_train_batches=2 would train on the same batches repeatedly",
        ),
    ],
)
def test_what_changes_the_batch_behind_its_back_is_refused(shards, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        cells.fit(shards, tmp_path, **options)


@pytest.mark.parametrize("option", ["fast_dev_run", "overfit_batches"])
def test_trying_out_on_few_batches_is_not(shards, tmp_path, option):
    run = cells.fit(shards, tmp_path, trainer_options={option: 2})
    assert len(run["logged"]) == {"fast_dev_run": 2, "overfit_batches": 4}[option]


def test_a_strategy_that_would_not_average_gradients_is_refused(shards, tmp_path, capsys):
    values = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "max_steps": 1,
            "default_root_dir": str(tmp_path),
            "strategy": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"},
        },
        "model": tiny.MODEL,
        "data": {"train": f"{shards}/train-*.tar", "image_size": 16, "batch_size": 4},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["fit", "-c", str(tmp_path / "config.yaml")]) == 2
    told = capsys.readouterr().err
    assert "trainer.strategy=ModelParallelStrategy does not shard" in told


@pytest.mark.parametrize("asked", [1, 4])
def test_validation_counts_optimizer_steps(shards, tmp_path, asked):
    options = {"data_options": {"max_batch_size_per_device": 2}, "steps": 5}
    options["trainer_options"] = {"accumulate_grad_batches": asked}
    run = cells.fit(shards, tmp_path, **options)
    assert run["accumulate"] == 4
    found = ["val/loss" in row for row in run["logged"]]
    assert found == [False, False, True, True, True]  # after steps 2 and 4


def test_resuming_with_another_accumulation(shards, tmp_path):
    straight = cells.fit(shards, tmp_path / "a", steps=7)
    for first, then in ((2, 8), (8, 2), (4, 2)):
        root = tmp_path / f"{first}-{then}"
        options = [{"max_batch_size_per_device": most} for most in (first, then)]
        cells.fit(shards, root, steps=7, stop_at=3, data_options=options[0])
        checkpoint = cells.newest(root)
        on = cells.fit(shards, root, steps=7, checkpoint=checkpoint, data_options=options[1])
        assert losses(on) == pytest.approx(losses(straight)[3:], rel=1e-5)


def test_average_every_n_steps():
    for warmup in (True, False):
        config, every = EMAConfig(0.9, warmup), EMAConfig(0.9, warmup, every_n_steps=3)
        assert [every.decay_after(step) is None for step in range(6)] == [True, True, False] * 2
        assert every.decay_after(5) == pytest.approx(math.prod(map(config.decay_at, (3, 4, 5))))


def test_average_every_n_steps_in_training(shards, tmp_path):
    run = cells.fit(shards, tmp_path, steps=5, model={"ema": EMAConfig(0.9, every_n_steps=2)})
    average_is_exact(run)


def test_progress_counts_by_timestep():
    progress = Progress(1000, window=32)
    t = torch.tensor([0, 249, 250, 998, 999])
    sums = [each.tolist() for each in sums_by_group(torch.arange(5.0), t, 1000)]
    assert sums == [[1, 2, 0, 3, 4], [2, 1, 0, 1, 1]]
    progress.add(*sums)
    assert progress.terminal == 1
    assert progress.means() == {
        "train_by_timestep/t0000_0249": 0.5,
        "train_by_timestep/t0250_0499": 2,
        "train_by_timestep/t0750_0999": 3,
        "train_by_timestep/terminal": 4,
    }
    assert progress.means() == {"train_by_timestep/terminal": 4}
