"""Settings that a resumed run changes, and the history of its starts."""

import dataclasses
import inspect
import json
import shutil
import typing
import warnings
from unittest.mock import patch

import cells
import pytest
import torch
from lightning.pytorch import Trainer

from zsnr.checkpoints.checkpoint_file import open_checkpoint
from zsnr.checkpoints.run_facts import add_start, published
from zsnr.loss import LossWeighting
from zsnr.training import DataModule, EMAConfig, LatentDiffusion, LearningRate
from zsnr.training.resuming import RULES, Verdict, changes, check_changes, verdict_on


def fields(annotation):
    """The dataclasses of an annotation, such as `LoRA | None`, but not those in a list."""
    if dataclasses.is_dataclass(annotation):
        return [annotation]
    if typing.get_origin(annotation) is list:
        return []
    return [found for part in typing.get_args(annotation) for found in fields(part)]


def names_of(prefix, cls):
    hints = typing.get_type_hints(cls.__init__)
    for name in inspect.signature(cls.__init__).parameters:
        if name != "self":
            yield f"{prefix}.{name}"
            for part in fields(hints.get(name)):
                yield from names_of(f"{prefix}.{name}", part)


def test_every_setting_stands_in_the_table():
    names = [*names_of("model", LatentDiffusion), *names_of("data", DataModule)]
    names += [f"trainer.{name}" for name in inspect.signature(Trainer).parameters]
    optimizer = inspect.signature(torch.optim.AdamW).parameters
    names += [f"optimizer.{name}" for name in optimizer if name != "params"]
    names = {name for name in names if not name.startswith(("model.network.", "model.optimizer"))}
    assert not sorted(names - RULES.keys())
    known = {*names, "optimizer", "trainer.strategy.param_dtype", "trainer.strategy.reduce_dtype"}
    assert not sorted(RULES.keys() - known)


def test_settings_of_other_optimizers_and_parts_have_a_rule():
    assert verdict_on("optimizer.momentum") is Verdict.KEPT
    assert verdict_on("model.codec.init_args.scale") is Verdict.NEW
    with pytest.raises(ValueError, match="No rule says"):
        verdict_on("model.new_setting")


@pytest.fixture(scope="module")
def stopped(shards, tmp_path_factory):
    """The folder of a run that was stopped after two steps."""
    root = tmp_path_factory.mktemp("stopped")
    cells.fit(shards, root, stop_at=2)
    return root


def resume(stopped, shards, root, trainer_options=None, **model):
    """Resume a copy of a run with other settings; return what is warned of."""
    shutil.copytree(stopped, root, symlinks=True, dirs_exist_ok=True)
    quiet = patch.object(cells, "quiet", lambda: None)
    with quiet, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        checkpoint = cells.newest(root)
        options = {"model": model, "trainer_options": trainer_options}
        cells.fit(shards, root, checkpoint=checkpoint, **options)
    return [str(each.message) for each in told if "other settings" in str(each.message)]


def adamw(**options):
    return {"optimizer": lambda p: torch.optim.AdamW(p, **{"lr": 2e-3, **options})}


CHANGES = {
    "nothing": ({}, []),
    "weight decay": (adamw(weight_decay=0.1), ["optimizer.weight_decay was 0.01, is 0.1 now"]),
    "betas": (adamw(betas=(0.8, 0.9)), ["optimizer.betas was [0.9, 0.999], is [0.8, 0.9] now"]),
    "loss": (
        {"loss": LossWeighting("truncated_snr")},
        ["model.loss.name was uniform, is truncated_snr now", "the new values are used"],
    ),
    "dropout": ({"caption_dropout": 0.5}, ["model.caption_dropout was 0.1, is 0.5 now"]),
    "offset": ({"offset_noise": 0.1}, ["model.offset_noise was 0.0, is 0.1 now"]),
    "average": ({"ema": EMAConfig(0.5)}, ["model.ema.decay was 0.9, is 0.5 now"]),
    "schedule of the learning rate": (
        {"learning_rate": LearningRate(2, "linear")},
        ["model.learning_rate.decay was cosine, is linear now"],
    ),
    "clipping": (
        {"trainer_options": {"gradient_clip_val": 1.0}},
        ["trainer.gradient_clip_val was not set, is 1.0 now"],
    ),
    "precision": (
        {"trainer_options": {"precision": "bf16-mixed"}},
        ["trainer.precision was 32-true, is bf16-mixed now"],
    ),
    "implementation": (adamw(fused=True), []),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resumed_run_says_what_it_changes(stopped, shards, tmp_path, name):
    options, wanted = CHANGES[name]
    told = resume(stopped, shards, tmp_path, **options)
    assert len(told) == bool(wanted)
    assert all(text in told[0] for text in wanted)
    [first, second] = json.loads((tmp_path / "checkpoints/run.json").read_text())["history"]
    assert (first["from_step"], second["from_step"]) == (0, 2)
    assert first["changed"] == {}
    assert bool(second["changed"]) == bool(wanted)
    assert second["ranks"] == 1
    run = open_checkpoint(cells.newest(tmp_path))["run"]
    assert run["history"] == [first, second]


def test_another_optimizer_is_refused(stopped, shards, tmp_path):
    with pytest.raises(ValueError, match=r"optimizer was torch.*AdamW, is torch.*SGD now.*export"):
        resume(stopped, shards, tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))


def test_changed_data_is_named_with_both_values(stopped, shards, tmp_path):
    shutil.copytree(stopped, tmp_path, symlinks=True, dirs_exist_ok=True)
    options = {"checkpoint": cells.newest(tmp_path)}
    with pytest.raises(ValueError, match=r"seed was 0, is 3 now.*accept_changed_data"):
        cells.fit(shards, tmp_path, data_options={"seed": 3}, **options)
    data = {"seed": 3, "accept_changed_data": True}
    told = pytest.warns(UserWarning, match="other training data: seed was 0, is 3 now")
    with told, patch.object(cells, "quiet", lambda: None):
        cells.fit(shards, tmp_path, data_options=data, **options)


def test_refused_settings_are_all_named():
    changed = changes({"model.ema.decay": 1, "data.seed": 1, "optimizer": "a"}, {"optimizer": "b"})
    with pytest.raises(ValueError, match="data.seed was 1, is not set now; optimizer was a, is b"):
        check_changes(changed)


def test_the_history_is_bounded_and_private():
    facts = {"history": "not a list"}
    for step in range(300):
        facts = {"history": add_start(facts, {"from_step": step})}
    assert [start["from_step"] for start in facts["history"]] == [*range(200, 300)]
    assert "history" not in published(facts)
