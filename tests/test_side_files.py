"""Side files that cannot be written, folders that vanish, and runs that are no success."""

import builtins
import errno
import io
import json
import math
import os
import re
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import cells
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from test_ranks import Poison
from test_stops import config

from zsnr.checkpoints.checkpoint_file import open_checkpoint
from zsnr.cli import main
from zsnr.files import HeldFolder
from zsnr.training import ImageMetrics, PredictionWriter
from zsnr.training.board import TrainingBoard
from zsnr.training.checkpointing import steps
from zsnr.training.loggers import default_loggers
from zsnr.training.progress import NonFiniteError, first_not_finite


@contextmanager
def full_disk(part, rank=None):
    """Fail to write whatever has `part` in its path, on one rank or on all."""
    real = builtins.open

    def opened(path, mode="r", *args, **kwargs):
        here = rank is None or int(os.environ["RANK"]) == rank
        if here and set(mode) & set("wax+") and part in os.fsdecode(os.fspath(path)):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, mode, *args, **kwargs)

    with patch.object(builtins, "open", opened), patch.object(io, "open", opened):
        yield


def fit_all(shards, root, part, rank=None, kind="one", **options):
    """Train with all that writes side files where some cannot be written."""
    options = {"previews": True, "steps": 2, "every": 1, **options}
    options.setdefault("callbacks", [Poison({1}, 5)])
    quiet = patch.object(cells, "quiet", lambda: None)
    with full_disk(part, rank), quiet, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        logger = default_loggers(root)
        run = cells.fit(shards, root, kind, logger=logger, **options)
    return run, [str(each.message) for each in told]


# Side files


SIDE_FILES = ["/previews/", "skipped_steps", "run.json", "/tensorboard/", "/metrics/", "/faults/"]


@pytest.fixture(scope="module")
def broken_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    tiny.write_shards(folder, [7, 6])
    tiny.write_shards(folder, [5], "val")
    tiny.write_shard(
        folder / "train-000002.tar", {"broken.png": tiny.png(1)[:60], "broken.txt": b"it"}
    )
    return folder


@pytest.mark.parametrize("part", SIDE_FILES)
def test_a_side_file_that_cannot_be_written_is_said_once(broken_shards, tmp_path, part):
    run, told = fit_all(broken_shards, tmp_path, part)
    assert len(run["logged"]) == 2
    assert [path.name for path in steps(tmp_path / "checkpoints")][-1] == "step-00000002.ckpt"
    lines = [line for line in told if "the run continues without it" in line]
    assert len(lines) == 1
    assert part.strip("/") in lines[0]
    assert "No space left on device" in lines[0]
    assert "\n" not in lines[0]


@pytest.mark.parametrize("harm", ["file", "deleted", "read-only"])
@pytest.mark.parametrize("name", ["previews", "tensorboard", "metrics"])
def test_a_side_folder_that_is_lost_does_not_end_a_run(shards, tmp_path, harm, name):
    if harm == "read-only" and os.geteuid() == 0:
        pytest.skip("root writes everywhere")

    class Harm(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            folder = tmp_path / name
            if trainer.global_step == 1:
                if harm == "read-only":
                    folder.chmod(0o500)
                    return
                shutil.rmtree(folder, ignore_errors=True)
                if harm == "file":
                    folder.write_text("")

    run, _ = fit_all(shards, tmp_path, "nothing like it", callbacks=[Harm()])
    assert len(run["logged"]) == 2
    assert steps(tmp_path / "checkpoints")[-1].name == "step-00000002.ckpt"


def test_a_config_and_a_board_that_cannot_be_written_do_not_end_a_run(
    shards, tmp_path, capfd, monkeypatch
):
    def broken(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr("zsnr.files._WARNED", set())
    monkeypatch.setattr(TrainingBoard, "_measure", broken)
    monkeypatch.setattr("zsnr.training.board.schedule_figure", broken)
    settings = tmp_path / "logger.yaml"
    settings.write_text("trainer: {logger: null}")
    with full_disk("run_config"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main([*config(tmp_path, shards), "-c", str(settings)]) == 0
    lines = [str(each.message) for each in told]
    for part in ("run_config.yaml", "settings in the logs", "constants of the data"):
        assert sum(part in line and "continues without it" in line for line in lines) == 1
    assert steps(tmp_path / "run/checkpoints")[-1].name == "step-00000004.ckpt"


@pytest.mark.parametrize("part", ["numbers", "/images/"])
def test_measured_images_are_side_files_of_training_alone(shards, tmp_path, part):
    (tmp_path / "captions.txt").write_text("a\nb\n")
    options = {
        "save_images": str(tmp_path / "images"),
        "output": str(tmp_path / "numbers.json"),
        "captions": str(tmp_path / "captions.txt"),
        "num_images": 2,
    }
    run, told = fit_all(shards, tmp_path, part, callbacks=[ImageMetrics(**options)])
    assert len(run["logged"]) == 2
    assert [line for line in told if "continues without it" in line and part.strip("/") in line]
    shutil.rmtree(tmp_path / "images", ignore_errors=True)
    trainer = cells._plain(tmp_path, "one", callbacks=[ImageMetrics(**options)])
    with full_disk(part), pytest.raises(OSError, match="No space left"):
        trainer.validate(cells.module(), cells.data(shards), cells.newest(tmp_path), verbose=False)


class Failure(Callback):
    """Fails after a step."""

    def on_train_batch_end(self, trainer, module, *args):
        raise RuntimeError("this callback fails")


def test_the_checkpoint_is_written_before_what_may_fail(shards, tmp_path):
    with pytest.raises(RuntimeError, match="this callback fails"):
        cells.fit(shards, tmp_path, every=1, callbacks=[Failure()])
    [checkpoint] = steps(tmp_path / "checkpoints")
    assert open_checkpoint(checkpoint)["global_step"] == 1


def test_a_callback_with_a_state_comes_before_the_checkpoint(shards, tmp_path):
    class Counter(Callback):
        count = 0

        def on_train_batch_end(self, trainer, module, *args):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

    cells.fit(shards, tmp_path, steps=1, every=1, callbacks=[Counter()])
    states = open_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["callbacks"]
    assert {"count": 1} in states.values()


def test_one_rank_that_cannot_write_does_not_keep_the_others(ranks, shards, tmp_path):
    for part in ("/previews/", "/tensorboard/"):
        root = str(tmp_path / str(len(part)))
        runs = ranks[2](fit_all, shards, root, part, 0, "ddp", callbacks=[])
        assert [len(run["logged"]) for run, _ in runs] == [2, 2]


# What rank 0 does alone


def fail_alone(kind, number):
    """Fail on one rank, and tell what the others raise."""
    from lightning.pytorch import Trainer

    from zsnr.agreement import on_first_rank, raise_on_all

    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    trainer.strategy.setup_environment()
    error = {"os": OSError, "value": json.JSONDecodeError, "key": KeyError}[kind]
    error = error("it", "x", 0) if kind == "value" else error("it")

    def work():
        raise error

    own = error if trainer.global_rank == number else None
    try:
        on_first_rank(work) if number == 0 else raise_on_all(own)
    except Exception as raised:
        return type(raised).__name__, str(raised)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("kind", "others"), [("os", "OSError"), ("value", "ValueError"), ("key", "RuntimeError")]
)
def test_what_one_rank_meets_reaches_all(ranks, kind, number, others):
    found = ranks[2](fail_alone, kind, number)
    assert found[1 - number][0] == others
    assert "it" in found[1 - number][1]
    assert found[number][0] in (others, "JSONDecodeError", "KeyError")


# The output folder


class Vanish(Callback):
    """Deletes, moves or replaces a folder before a step; on one rank."""

    def __init__(self, folder, how, step=1):
        self.folder, self.how, self.step = Path(folder), how, step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.is_global_zero:
            if self.how == "moved":
                self.folder.rename(f"{self.folder}-moved")
            else:
                shutil.rmtree(self.folder)
            if self.how == "a file":
                self.folder.write_text("")
            if self.how == "made again":
                self.folder.mkdir()


@pytest.mark.parametrize("how", ["deleted", "moved", "a file", "made again"])
@pytest.mark.parametrize("name", ["run", "run/checkpoints"])
def test_an_output_folder_that_vanishes_stops_the_run(shards, tmp_path, name, how):
    root = tmp_path / "run"
    callbacks = [Vanish(tmp_path / name, how)]
    with pytest.raises(OSError, match="was deleted, moved or replaced") as stopped:
        fit_all(shards, root, "nothing like it", callbacks=callbacks)
    assert str(tmp_path / name) in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert (tmp_path / name).exists() == (how in ("a file", "made again"))
    assert not (root / "checkpoints" / "last.ckpt").exists()


def test_a_folder_that_vanishes_after_the_last_checkpoint_is_no_success(shards, tmp_path):
    root = tmp_path / "run"

    class AtValidation(Vanish):
        def on_validation_start(self, trainer, module):
            self.on_train_batch_start(trainer, module, None, 0)

    with pytest.raises(OSError, match="was deleted, moved or replaced"):
        cells.fit(shards, root, steps=2, every=1, callbacks=[AtValidation(root, "deleted", 2)])
    assert not root.exists()


def test_all_ranks_stop_where_the_output_folder_vanishes(ranks, shards, tmp_path):
    root = str(tmp_path / "run")
    callbacks = [Vanish(root, "deleted")]
    for error in ranks[2].errors(cells.fit, shards, root, "ddp", callbacks=callbacks):
        assert re.search("OSError.*was deleted", error)


def test_a_folder_of_the_same_name_is_another_one(tmp_path):
    held = HeldFolder(tmp_path / "run")
    held.check()
    for _ in range(3):  # a file system may give the same inode again
        (tmp_path / "run").rmdir()
        (tmp_path / "run").mkdir()
        with pytest.raises(OSError, match="replaced"):
            held.check()
    held.close()
    held.close()


def test_predict_stops_where_its_output_folder_vanishes(shards, tmp_path):
    cells.fit(shards, tmp_path / "run", steps=1)

    class Vanishing(PredictionWriter):
        def write_on_batch_end(self, *args):
            super().write_on_batch_end(*args)
            shutil.rmtree(self.folder)

    output = tmp_path / "images"
    prompts = [{"prompt": "a", "count": 4}]
    checkpoint = cells.newest(tmp_path / "run")
    lost = pytest.raises(OSError, match="images was deleted")
    with patch.object(cells, "PredictionWriter", Vanishing), lost:
        cells.predict(shards, tmp_path, "one", checkpoint, output, prompts)
    assert not output.exists()


# Numbers that are not finite


@pytest.mark.parametrize(
    ("poisoned", "count"), [({0, 1, 2, 3}, 4), ({2, 3, 4}, 3), ({0}, 0), ({4}, 0)]
)
def test_a_run_that_ends_with_skipped_steps_is_no_success(shards, tmp_path, poisoned, count):
    number = 4 if count == 4 else 5
    options = {"steps": number, "callbacks": [Poison(poisoned, 0)]}
    if not count:
        cells.fit(shards, tmp_path, **options)
        return
    with pytest.raises(NonFiniteError, match=f"last {count} of {number} steps were skipped"):
        cells.fit(shards, tmp_path, **options)
    assert open_checkpoint(cells.newest(tmp_path))["global_step"] == number


class Spoil(Callback):
    """Makes one number of what a checkpoint holds not finite."""

    def __init__(self, what, value):
        self.what, self.value = what, value

    def state_dict(self):  # so that it comes before the checkpoint
        return {"what": self.what}

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step != 2:
            return
        [optimizer] = trainer.optimizers
        tensors = {
            "trained": module.trained["unet"].parameters(),
            "ema": module.ema["unet"].parameters(),
            "exp_avg_sq": (state["exp_avg_sq"] for state in optimizer.state.values()),
        }
        tensor = next(iter(tensors[self.what]))
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if tensor.numel() and trainer.is_global_zero:
            tensor.view(-1)[0] = self.value


@pytest.mark.parametrize("what", ["trained", "ema", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_that_is_not_finite_is_not_written(shards, tmp_path, what, value):
    with pytest.raises(NonFiniteError, match=rf"{what}.*is not finite") as stopped:
        cells.fit(shards, tmp_path, every=2, steps=4, callbacks=[Early(), Spoil(what, value)])
    assert "step-00000002.ckpt is not written" in str(stopped.value)
    assert [path.name for path in steps(tmp_path / "checkpoints")] == ["step-00000001.ckpt"]


class Early(Callback):
    """Saves the first step."""

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == 1:
            trainer.checkpoint_callback.save(trainer)


def test_all_ranks_stop_where_a_shard_is_not_finite(ranks, shards, tmp_path):
    options = {"every": 2, "callbacks": [Early(), Spoil("ema", math.nan)]}
    for error in ranks[2].errors(cells.fit, shards, tmp_path, "sharded", **options):
        assert re.search("Error.*ema.*is not finite", error)
    assert [path.name for path in steps(tmp_path / "checkpoints")] == ["step-00000001.ckpt"]


def test_large_numbers_and_empty_tensors_are_finite():
    module = torch.nn.ParameterList([torch.full((9,), 3e38), torch.empty(0), torch.zeros(2)])
    assert first_not_finite(module, []) is None
    module[2].data[1] = -math.inf
    assert first_not_finite(module, []) == "2"


# Files of an output folder that somebody else wrote


@pytest.mark.parametrize(
    ("run", "manifest", "message"),
    [
        ("[" * 100_000, "", r"run\.json is not readable JSON: nested too deeply"),
        ("5", "", r"run\.json is 5: wanted a JSON object"),
        ("{}", "", "holds images of another checkpoint"),
        (None, "5\n", r"manifest\.jsonl, line 1 is 5: wanted a JSON object"),
        (None, '{"file": "../a.png"}\n', "line 1: file='../a.png': wanted the name of an image"),
        (None, '{"file": []}\n', "line 1: file=a list: wanted the name of an image"),
    ],
)
def test_a_folder_that_predict_did_not_write_is_refused(tmp_path, run, manifest, message):
    (tmp_path / "run.json").write_text('{"identity": "a"}' if run is None else run)
    (tmp_path / "manifest.jsonl").write_text(manifest)
    with pytest.raises(ValueError, match=message):
        PredictionWriter(str(tmp_path))._open("a")
