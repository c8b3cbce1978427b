"""Runs that are stopped, killed, damaged or stuck."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import cells
import pytest
import tiny
import torch
import yaml
from faulty_server import Fault, FaultyServer
from lightning.pytorch.callbacks import Callback
from ranks import Command, groups

from zsnr.checkpoints import sharded
from zsnr.checkpoints.checkpoint_file import open_checkpoint, read_checkpoint
from zsnr.checkpoints.run_folder import find_last, steps
from zsnr.cli import main
from zsnr.elastic import former_failure, note_failure
from zsnr.locks import LOCK, Lock, LockedError, unfinished
from zsnr.stops import stop_on_first, stop_on_second, stopping
from zsnr.training import Checkpoints, Preemption, Watchdog
from zsnr.training.run_lock import RunLock
from zsnr.training.strategy import meet


class SignalAt(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step, number=signal.SIGUSR1, rank=0):
        self.step, self.number, self.rank = step, number, rank

    def on_before_backward(self, trainer, module, loss):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            workers = [child.pid for child in multiprocessing.active_children()]
            reached = workers if self.number == signal.SIGINT else []  # as by a terminal
            for process in [*reached, os.getpid()]:
                os.kill(process, self.number)


class Validations(Callback):
    def __init__(self):
        self.steps = []

    def on_validation_start(self, trainer, module):
        self.steps.append(trainer.global_step)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A SLURM job, and what it asked of scontrol."""
    calls = tmp_path / "calls"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    return lambda: calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize(
    ("number", "asked"), [(signal.SIGUSR1, ["requeue 42"]), (signal.SIGTERM, [])]
)
def test_a_signal_saves_stops_and_requeues(shards, tmp_path, scontrol, number, asked):
    before = signal.getsignal(number)
    validations = Validations()
    callbacks = [SignalAt(2, number), Preemption(), validations]
    run = cells.fit(shards, tmp_path, steps=6, callbacks=callbacks)
    assert len(run["logged"]) == 3  # the step that was under way is finished
    assert [path.name for path in steps(tmp_path / "checkpoints")] == ["step-00000003.ckpt"]
    assert validations.steps == [2]  # not once more, on leaving
    assert scontrol() == asked
    straight = cells.fit(shards, tmp_path / "straight", steps=6)
    on = cells.fit(shards, tmp_path, steps=6, checkpoint=cells.newest(tmp_path))
    for row, wanted in zip(on["logged"], straight["logged"][3:], strict=True):
        assert row == {name: wanted[name] for name in row}
    for name, weight in straight["weights"].items():
        assert torch.equal(on["weights"][name], weight)
    signal.signal(number, before)


@pytest.mark.parametrize(
    ("step", "number", "code"),
    [(1, signal.SIGTERM, 143), (1, signal.SIGINT, 130), (3, signal.SIGINT, 0)],
)
def test_a_run_that_is_stopped_early_is_no_success(shards, tmp_path, capfd, step, number, code):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    stop = {"step": step, "number": int(number)}
    callbacks = [{"class_path": "test_stops.SignalAt", "init_args": stop}]
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    try:
        found = main([*config(tmp_path, shards), "-c", str(more), "--data.num_workers", "1"])
    except SystemExit as end:
        found = end.code
    assert found == code
    assert steps(tmp_path / "run/checkpoints")[-1].name == f"step-{step + 1:08d}.ckpt"
    said = capfd.readouterr()
    assert ("Press Ctrl-C again to end it at once" in said.err) == (number == signal.SIGINT)
    assert ("resume: run the same command with --ckpt_path last" in said.out) == (code != 0)
    assert before == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]


def test_a_signal_stops_whatever_min_steps_says(shards, tmp_path):
    options = {"trainer_options": {"min_steps": 5}, "steps": 6}
    run = cells.fit(shards, tmp_path, callbacks=[SignalAt(1), Preemption()], **options)
    assert len(run["logged"]) == 2


def test_all_ranks_stop_when_one_is_asked(ranks, shards, tmp_path):
    callbacks = [SignalAt(1, signal.SIGTERM, rank=1), Preemption()]
    runs = ranks[2](cells.fit, shards, tmp_path, "sharded", steps=6, callbacks=callbacks)
    assert [len(run["logged"]) for run in runs] == [2, 2]
    assert open_checkpoint(cells.newest(tmp_path))["global_step"] == 2


def config(folder, shards):
    settings = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "logger": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder / "run"),
        },
        "checkpoint": {"every_n_train_steps": 1, "keep": 2, "keep_every_n_steps": 3},
        "model": {
            **tiny.MODEL,
        },
        "data": {"train": f"{shards}/train-*.tar", "image_size": 16, "batch_size": 4},
    }
    settings["data"]["num_workers"] = 0
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return ["fit", "-c", str(folder / "config.yaml")]


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A run of four steps that is refused to begin a second time, and its command."""
    root = tmp_path_factory.mktemp("finished")
    fit = config(root, shards)
    assert main(fit) == 0
    assert [path.name for path in steps(root / "run" / "checkpoints")] == [
        "step-00000003.ckpt",  # of those to keep for good
        "step-00000004.ckpt",
    ]
    assert main([*fit, "--trainer.max_steps", "5"]) == 2  # an earlier run's, and nobody restarted
    return root / "run", fit


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_RESTART_COUNT": "1"},
        {"TORCHELASTIC_RESTART_COUNT": "1"},
        {"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2"},
    ],
    ids=["slurm", "torchrun", "nodes"],
)
def test_a_restarted_run_resumes_by_itself(finished, tmp_path, monkeypatch, variables):
    root, fit = finished
    folder = shutil.copytree(root, tmp_path / "run", symlinks=True) / "checkpoints"
    fit = [*fit, "--trainer.default_root_dir", str(tmp_path / "run")]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # what the first start was told to begin with is behind it
    began = ["--ckpt_path", str(folder / "step-00000003.ckpt")]
    for steps_wanted, more in (("5", []), ("6", began)):
        assert main([*fit, "--trainer.max_steps", steps_wanted, *more]) == 0
    assert open_checkpoint(folder / "last.ckpt")["global_step"] == 6
    assert not list(folder.glob("*.abandoned"))


def test_resuming_goes_back_to_the_newest_that_can_be_read(shards, tmp_path):
    cells.fit(shards, tmp_path, every=1)
    folder = tmp_path / "checkpoints"
    newest, before = steps(folder)[::-1]
    assert find_last(folder) == newest
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="Looking for an earlier one"):
        assert find_last(folder) == before
    before.write_bytes(b"")
    with pytest.raises(ValueError, match="No checkpoint in .* can be read"):
        find_last(folder)
    assert find_last(tmp_path / "nowhere") is None


@pytest.fixture(scope="module")
def stopped_at_2(ranks, shards, tmp_path_factory):
    """The folder of a run of two ranks that shard, with one checkpoint."""
    root = tmp_path_factory.mktemp("sharded")
    ranks[2](cells.fit, shards, root, "sharded", stop_at=2)
    return root


@pytest.fixture
def sharded_root(stopped_at_2, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped_at_2, tmp_path, symlinks=True, dirs_exist_ok=True)


def test_what_a_killed_save_left_is_no_checkpoint_and_goes(ranks, shards, tmp_path, sharded_root):
    folder = tmp_path / "checkpoints"
    name = unfinished(folder / "step-00000003.ckpt").name.replace(f"-{os.getpid()}-", "-4194303-")
    half = folder / name
    shutil.copytree(cells.newest(tmp_path), half)
    (half / sharded.REST).unlink()
    (folder / name.replace("00000003", "00000005")).write_bytes(b"half")
    assert find_last(folder).name == "step-00000002.ckpt"
    found = cells.newest(tmp_path)
    ranks[2](cells.fit, shards, tmp_path, "sharded", checkpoint=found)
    assert sorted(path.name for path in folder.iterdir()) == [
        "last.ckpt",
        "run.json",
        "step-00000002.ckpt",
        "step-00000004.ckpt",
    ]


def test_going_back_sets_later_checkpoints_aside(shards, tmp_path):
    folder = tmp_path / "checkpoints"
    cells.fit(shards, tmp_path, steps=6, every=2)
    back = folder / "step-00000004.ckpt"
    cells.fit(shards, tmp_path, steps=6, every=1, stop_at=5, checkpoint=str(back))
    assert sorted(path.name for path in folder.iterdir()) == [
        "last.ckpt",
        "run.json",
        "step-00000004.ckpt",
        "step-00000005.ckpt",
        "step-00000006.ckpt.abandoned",
    ]
    assert find_last(folder).name == (folder / "last.ckpt").resolve().name == "step-00000005.ckpt"


def test_saving_by_the_clock_waits_for_the_end_of_a_step(shards, tmp_path):
    late = Checkpoints(f"{tmp_path}/late", every_n_train_steps=0, every_n_minutes=1e-9, keep=9)
    options = {"data_options": {"max_batch_size_per_device": 2}, "callbacks": [late]}
    straight = cells.fit(shards, tmp_path, **options)
    names = [path.name for path in steps(tmp_path / "late")]
    assert names == [f"step-{step:08d}.ckpt" for step in (1, 2, 3, 4)]
    on = cells.fit(shards, tmp_path / "on", checkpoint=str(tmp_path / "late" / names[1]))
    for row, wanted in zip(on["logged"], straight["logged"][2:], strict=True):
        assert row["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)


def test_a_resumed_run_makes_each_preview_once(shards, tmp_path):
    options = {"previews": True, "data_options": {"max_batch_size_per_device": 2}}
    cells.fit(shards, tmp_path, stop_at=2, **options)
    [preview] = (tmp_path / "previews").iterdir()
    preview.unlink()
    cells.fit(shards, tmp_path, checkpoint=cells.newest(tmp_path), **options)
    assert [path.name for path in (tmp_path / "previews").iterdir()] == ["step-00000004.png"]


def test_a_failed_save_leaves_the_last_good_one(shards, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    cells.fit(shards, tmp_path, stop_at=2)
    before = find_last(tmp_path / "checkpoints")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        cells.fit(shards, tmp_path, checkpoint=str(before))
    assert find_last(tmp_path / "checkpoints") == before
    assert sorted(p.name for p in before.parent.iterdir()) == ["last.ckpt", "run.json", before.name]


def fit_on_a_full_disk(full_at, *args, **kwargs):
    """Train where writing shards fails on all ranks, or what rank 0 writes alone on that."""
    from unittest.mock import patch

    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    owner = {"shards": FileSystemWriter, "rest": torch}[full_at]
    with patch.object(owner, {"shards": "write_data", "rest": "save"}[full_at], full):
        return cells.fit(*args, **kwargs)


@pytest.mark.parametrize("full_at", ["shards", "rest"])
def test_a_failed_save_of_shards_leaves_the_last_good_one(
    ranks, shards, tmp_path, sharded_root, full_at
):
    before = find_last(tmp_path / "checkpoints")
    options = {"checkpoint": str(before)}
    for error in ranks[2].errors(
        fit_on_a_full_disk, full_at, shards, tmp_path, "sharded", **options
    ):
        assert "could not be written: No space left on device" in error
    assert find_last(tmp_path / "checkpoints") == before
    for part in before.parent.glob(".*"):
        shutil.rmtree(part)  # the next run would
    assert sorted(p.name for p in before.parent.iterdir()) == ["last.ckpt", "run.json", before.name]


def fit_where_saving_fails(*args, **kwargs):
    """Train where rank 0 cannot write its file, or a callback's state cannot be saved."""
    from unittest.mock import patch

    from zsnr.checkpoints import sharded

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with patch.object(sharded, "save_file", full):
        return cells.fit(*args, **kwargs)


@pytest.mark.parametrize("kind", ["ddp", "full"])
def test_what_rank_0_cannot_save_stops_all_ranks(ranks, shards, tmp_path, kind):
    for error in ranks[2].errors(fit_where_saving_fails, shards, tmp_path, kind, steps=1):
        assert ": OSError" in error
        assert "No space left" in error


class Unsavable(Callback):
    def state_dict(self):
        return {"state": lambda: None}


def test_what_cannot_be_pickled_stops_all_ranks(ranks, shards, tmp_path):
    options = {"steps": 1, "callbacks": [Unsavable()]}
    for error in ranks[2].errors(cells.fit, shards, tmp_path, "sharded", **options):
        assert ": OSError" in error
        assert "could not be written" in error
    assert not list((tmp_path / "checkpoints").glob(".*"))


def fit_with_what_each_rank_sees(seen, *args, **kwargs):
    late = Checkpoints(f"{args[1]}/other")
    late.resumed_from = seen[int(os.environ["RANK"])]
    return cells.fit(*args, callbacks=[late], **kwargs)


def test_ranks_that_see_other_checkpoints_all_stop(ranks, shards, tmp_path):
    seen = ["step-00000002.ckpt", ""]
    for error in ranks[2].errors(fit_with_what_each_rank_sees, seen, shards, tmp_path, "sharded"):
        assert ": OSError" in error
        assert "do not see the same checkpoints" in error


def test_a_folder_that_cannot_be_written_is_found_before_training(shards, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    more = ["--checkpoint.dirpath", str(tmp_path / "file" / "checkpoints")]
    assert main([*config(tmp_path, shards), *more]) == 2
    told = capsys.readouterr().err
    assert "file/checkpoints cannot be written" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--trainer.gradient_clip_val", "-1"], "gradient_clip_val=-1: wanted 0 or more"),
        (["--model.compile", "foo"], "no such backend. Known: "),
        (["--watchdog.minutes", "-1"], "watchdog.minutes=-1"),
        (["--checkpoint.every_n_minutes", "0"], "every_n_minutes=0: wanted more than 0"),
    ],
)
def test_wrong_numbers_are_refused_before_training(shards, tmp_path, capsys, more, message):
    assert main([*config(tmp_path, shards), *more]) == 2
    assert message in capsys.readouterr().err


def test_a_resumed_run_says_which_learning_rate_it_has(shards, tmp_path):
    cells.fit(shards, tmp_path, stop_at=2)
    other = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-5)}
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zsnr.training.module.rank_zero_warn", told.append)
        cells.fit(shards, tmp_path, checkpoint=cells.newest(tmp_path), model=other)
    assert [line for line in told if "learning rate, 0.002; the config's, 1e-05" in line]


@pytest.mark.parametrize("averaged", [True, False])
def test_a_run_goes_on_with_averages_as_it_began(shards, tmp_path, averaged):
    ema = cells.module().ema_config
    cells.fit(shards, tmp_path, stop_at=1, model={"ema": ema if averaged else None})
    model = {"ema": None if averaged else ema}
    wanted = "has averaged weights: set" if averaged else "has no averaged weights: unset"
    with pytest.raises(ValueError, match=wanted):
        cells.fit(shards, tmp_path, checkpoint=cells.newest(tmp_path), model=model)


# Signals to what saves nothing


class SignalIn(Callback):
    """Sends this process signals when a batch of validation or prediction begins."""

    def __init__(self, batch, numbers, rank=0):
        self.batch, self.numbers, self.rank, self.begun = batch, numbers, rank, []

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.begun.append(batch_idx)
        if batch_idx == self.batch and trainer.global_rank == self.rank:
            for number in self.numbers:
                signal.raise_signal(number)

    def on_predict_batch_start(self, *args):
        self.on_validation_batch_start(*args)


def interrupted(arguments):
    """Run a command that a signal stops; return its exit code."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    return stopped.value.code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_predict_stops_within_a_batch_and_resumes(
    shards, tmp_path, number, code, scontrol, monkeypatch
):
    before = signal.getsignal(signal.SIGUSR1)
    fit = config(tmp_path, shards)
    assert main([*fit, "--trainer.max_steps", "1"]) == 0
    (tmp_path / "prompts.txt").write_text("a\nb\nc\nd\n")
    told = ["--ckpt_path", "last", "--prompts", str(tmp_path / "prompts.txt"), "--num-steps", "2"]
    predict = ["predict", *fit[1:], *told, "--output", str(tmp_path / "images")]
    predict.append("--data.predict_batch_size=1")
    numbers = [int(signal.SIGUSR1), int(number)]  # USR1, of SLURM, stops nothing
    stop = {"class_path": "test_stops.SignalIn", "init_args": {"batch": 2, "numbers": numbers}}
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"trainer": {"callbacks": [stop]}}))
    assert interrupted([*predict, "-c", str(more)]) == code
    assert len(list((tmp_path / "images").glob("*.png"))) == 2
    assert not (tmp_path / "images" / LOCK).exists()
    assert main(predict) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 4
    assert scontrol() == []
    signal.signal(signal.SIGUSR1, before)


def test_validate_stops_within_a_batch(shards, tmp_path, capsys):
    fit = config(tmp_path, shards)
    assert main([*fit, "--trainer.max_steps", "1"]) == 0
    stop = {"batch": 1, "numbers": [int(signal.SIGTERM)]}
    more = tmp_path / "more.yaml"
    callbacks = [{"class_path": "test_stops.SignalIn", "init_args": stop}]
    more.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    val = ["--data.val", f"{shards}/val-*.tar", "--data.batch_size=1", "-c", str(more)]
    assert interrupted(["validate", *fit[1:], "--ckpt_path", "last", *val]) == 143
    assert "val/loss" not in capsys.readouterr().out


def test_a_validation_within_training_is_cut_short(shards, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    stop = SignalIn(0, [signal.SIGTERM])
    callbacks = [stop, Preemption()]
    run = cells.fit(shards, tmp_path, steps=6, callbacks=callbacks, data_options={"batch_size": 2})
    assert stop.begun == [0]
    assert len(run["logged"]) == 3  # validation was after 2
    assert "val/loss" not in run["logged"][-1]
    assert open_checkpoint(cells.newest(tmp_path))["global_step"] == 3
    signal.signal(signal.SIGTERM, before)


def test_all_ranks_cut_a_validation_short(ranks, shards, tmp_path):
    callbacks = [SignalIn(0, [signal.SIGTERM], rank=1), Preemption()]
    options = {"steps": 6, "callbacks": callbacks, "data_options": {"batch_size": 2}}
    runs = ranks[2](cells.fit, shards, tmp_path, "sharded", **options)
    assert [len(run["logged"]) for run in runs] == [3, 3]


@pytest.mark.parametrize("what", ["cache", "index", "openmoji", "compare", "figure"])
def test_a_command_that_is_stopped_resumes(shards, tmp_path, monkeypatch, what):
    output = tmp_path / ("made.png" if what == "figure" else "made")
    many = f"{shards}/train-*.tar"
    oracle = [many, "--image-size", "8", "--num-steps", "2", "--count", "2"]
    command, owner, name = {
        "compare": (
            ["compare", "oracle", *oracle, "--output"],
            "zsnr.reports.compare",
            "measure_arms",
        ),
        "figure": (
            ["figure", "5", "--oracle", *oracle, "--output"],
            "zsnr.reports.figures",
            "make_panels",
        ),
        "cache": (
            [*["data", "cache"], *config(tmp_path, shards)[1:], "--output"],
            "zsnr.data.cache._Encoder",
            "__call__",
        ),
        "index": (["data", "index", many, "--output"], "zsnr.data.index.Ledger", "write"),
        "openmoji": (
            ["data", "openmoji", "--glyphs", "demo", "--size", "8"],
            "zsnr.data.openmoji",
            "caption",
        ),
    }[what]
    if what == "index":
        command = ["data", "index", many, "--ledger", str(tmp_path / "ledger"), "--output"]

    def stop(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(f"{owner}.{name}", stop)
        assert interrupted([*command, str(output)]) == 143
    assert not list(tmp_path.glob(".*"))
    if what in ("cache", "index"):
        assert not [path for path in output.glob(".*") if path.suffix != ".lock"]
    assert main([*command, str(output)]) == 0
    assert not list(output.glob(".*"))


def test_what_does_not_return_is_ended(monkeypatch):
    left, ended = [], threading.Event()
    monkeypatch.setattr("zsnr.stops.GRACE", 0.05)
    monkeypatch.setattr("zsnr.stops.leave", lambda code: (left.append(code), ended.set()))

    @stopping(alone=True)
    def hang():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            assert ended.wait(20)

    with pytest.raises(SystemExit):
        hang()
    assert left == [143, 143]  # the second when the command ends by itself


def test_a_second_signal_ends_at_once(monkeypatch):
    left, ended = [], threading.Event()
    monkeypatch.setattr("zsnr.stops._TWICE", 0.0)
    monkeypatch.setattr("zsnr.stops.leave", lambda code: (left.append(code), ended.set()))

    @stopping(alone=True)
    def hang():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
            assert ended.wait(10)

    with pytest.raises(SystemExit):
        hang()
    assert left[0] == 130


def test_a_first_signal_may_only_ask(monkeypatch):
    asked = []

    def twice():
        stop_on_second(signal.SIGINT, lambda: asked.append(1))
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # within a second, as a launcher may send it

    with stopping(alone=False):
        twice()
        stop_on_first(signal.SIGINT)
        with pytest.raises(SystemExit, match="130"):
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr("zsnr.stops._TWICE", -1.0)
    with stopping(alone=False), pytest.raises(SystemExit, match="130"):
        twice()
    assert asked == [1, 1]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping(alone=False):
        twice()
    assert signal.signal(signal.SIGINT, before) == signal.SIG_IGN
    assert asked == [1, 1]


def test_a_second_ctrl_c_ends_what_does_not_return(monkeypatch):
    left, ended = [], threading.Event()
    monkeypatch.setattr("zsnr.stops._TWICE", 0.0)
    monkeypatch.setattr("zsnr.stops.GRACE", 0.05)
    monkeypatch.setattr("zsnr.stops.leave", lambda code: (left.append(code), ended.set()))

    @stopping(alone=True)
    def hang():
        stop_on_second(signal.SIGINT, lambda: None)
        signal.raise_signal(signal.SIGINT)
        try:
            time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
        finally:
            assert ended.wait(20)

    with pytest.raises(SystemExit):
        hang()
    assert left[0] == 130


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with stopping(alone=False):
        signal.raise_signal(signal.SIGTERM)
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


def test_indexing_a_server_that_stalls_is_stopped(shards, tmp_path):
    name = sorted(shards.glob("train-*.tar"))[0].name
    with (
        FaultyServer(shards, [Fault(None, "stall", times=99)]) as server,
        Command(["data", "index", server.url(name), "--output", tmp_path / "index"]) as command,
    ):
        while not server.requests:
            assert command.poll() is None
            time.sleep(0.05)
        os.kill(command.pid, signal.SIGTERM)
        assert command.wait(20) == 143
        assert "zsnr: stopped by SIGTERM" in command.stderr
    assert not list((tmp_path / "index").iterdir())


# Errors under torchrun


FAILS = """
import sys
from pathlib import Path
from zsnr import cli, files
from zsnr.commands import schedule

def fail() -> None:
    with open(sys.argv[1], "a") as file:
        file.write("tried\\n")
    files.check_new(Path("/"))

schedule.schedule = fail
sys.exit(cli.main(["schedule"]))
"""


def test_torchrun_does_not_try_a_lasting_error_again(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts=1", "--standalone"]
    done = subprocess.run(
        [*command, "--monitor-interval=0.1", "fails.py", "tries"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.count("zsnr: error: / exists") == 2, done.stderr[-3000:]
    assert (tmp_path / "tries").read_text() == "tried\n"


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (ValueError("wrong"), True),
        (FileNotFoundError(2, "No such file or directory"), True),
        (LockedError("in use"), True),
        (OSError(5, "Input/output error"), False),
        (TimeoutError("the server does not answer"), False),
    ],
)
def test_only_lasting_errors_are_known_to_the_next_attempt(tmp_path, monkeypatch, error, lasting):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for attempt, rank in ((1, 0), (2, 1)):
        (tmp_path / f"attempt_{attempt}" / f"{rank}").mkdir(parents=True)
        file = tmp_path / f"attempt_{attempt}" / f"{rank}" / "error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        if attempt == 1:
            note_failure("the line", error)
    assert json.loads((tmp_path / "attempt_1/0/error.json").read_text())["message"] == "the line"
    assert former_failure() is None  # of attempt 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert former_failure() == ("the line" if lasting else None)
    for strange in ("{", "[]", "[" * 100_000, '{"zsnr_lasting": "yes"}'):
        (tmp_path / "attempt_1/0/error.json").write_text(strange)
        assert former_failure() is None


# Two in one folder


def other_run(path):
    """Write a lock of a process that lives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = {**vars(Lock(path, path)._owner), "token": "other", "command": "zsnr fit -c a.yaml"}
    path.write_text(json.dumps(owner))
    return path


def test_a_second_run_in_a_folder_is_refused(shards, tmp_path, capsys, monkeypatch):
    fit = config(tmp_path, shards)
    folder = tmp_path / "run" / "checkpoints"
    lock = other_run(folder / LOCK)
    assert main(fit) == 2
    told = capsys.readouterr().err
    for part in (str(folder), f"pid {os.getpid()}", "since 20", "zsnr fit -c a.yaml"):
        assert part in told.splitlines()[-1]
    assert [*folder.iterdir()] == [lock]
    assert [*(tmp_path / "run").iterdir()] == [folder]  # not even logs or heartbeats
    lock.write_text(lock.read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194303'))
    assert main(fit) == 0
    assert not lock.exists()
    assert main([*fit, "--ckpt_path", "last", "--trainer.max_steps", "5"]) == 0


def lock_a_run(root, kind):
    """Take a run's lock with the other ranks; return what a rank is told."""
    lock = RunLock(Path(root))
    try:
        lock.take(cells._plain(root, kind), cells.module())
    except LockedError as error:
        return str(error)
    lock.release()
    return ""


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_all_ranks_are_told_of_another_run(ranks, tmp_path, kind):
    lock = other_run(tmp_path / LOCK)
    first, second = ranks[2](lock_a_run, str(tmp_path), kind)
    assert first == second
    assert "is in use by another process" in first
    lock.unlink()
    assert ranks[2](lock_a_run, str(tmp_path), kind) == ["", ""]


def test_a_run_that_fails_leaves_no_lock(shards, tmp_path):
    fit = config(tmp_path, shards)
    lock = tmp_path / "run" / "checkpoints" / LOCK
    with pytest.raises(RuntimeError, match="at step 1"):
        main([*fit, "--trainer.callbacks", "test_stops.Fail"])
    assert lock.parent.exists()
    assert not lock.exists()


class Fail(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        assert (Path(trainer.default_root_dir) / "checkpoints" / LOCK).exists()
        if trainer.global_step == 1:
            raise RuntimeError("at step 1")


def test_a_second_prediction_into_a_folder_is_refused(shards, tmp_path):
    cells.fit(shards, tmp_path, steps=1)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    output = tmp_path / "images"
    prompts = str(tmp_path / "prompts.txt")
    arguments = (shards, tmp_path, "one", cells.newest(tmp_path), str(output))
    lock = other_run(output / LOCK)
    with pytest.raises(LockedError, match="images is in use"):
        cells.predict(*arguments, prompts)
    lock.unlink()
    cells.predict(*arguments, prompts)
    assert len(list(output.glob("*.png"))) == 2
    assert not lock.exists()


def test_a_share_of_a_cache_is_written_by_one(shards, tmp_path, capsys):
    cache = ["data", "cache", *config(tmp_path, shards)[1:], "--output", f"{tmp_path}/cache"]
    lock = other_run(tmp_path / "cache" / ".share-00000-of-00002.lock")
    share = ["--rank", "0", "--ranks", "2"]
    assert main([*cache, *share]) == 2
    assert "cache is in use" in capsys.readouterr().err
    assert main([*cache, "--rank", "1", "--ranks", "2"]) == 0
    lock.unlink()
    assert main([*cache, *share]) == 0
    assert not list((tmp_path / "cache").glob(".*"))


def test_an_index_is_written_by_one(shards, tmp_path, capsys):
    output, many = tmp_path / "index", f"{shards}/train-*.tar"
    with patch.object(Lock, "release"):
        assert main(["data", "index", many, "--output", str(output)]) == 0
    [lock] = output.glob(".*.lock")
    assert main(["data", "index", many, "--output", str(output)]) == 2
    assert "index is in use" in capsys.readouterr().err
    assert main(["data", "index", f"{shards}/val-*.tar", "--output", str(output)]) == 0
    lock.unlink()


# Damage and malice


@pytest.fixture(scope="module")
def folder(stopped_at_2):
    """A sharded checkpoint."""
    return Path(cells.newest(stopped_at_2))


def copy(folder, to):
    return Path(shutil.copytree(folder, to / "copy.ckpt"))


def test_damaged_shards_are_one_clear_error(folder, tmp_path):
    for number, damage in enumerate(
        (
            lambda path: (path / sharded.REST).write_bytes(b"no"),
            lambda path: (path / ".metadata").write_bytes(b"no"),
            lambda path: next(path.glob("*.distcp")).write_bytes(b"no"),
            lambda path: next(path.glob("*.distcp")).unlink(),
        )
    ):
        broken = copy(folder, tmp_path / str(number))
        damage(broken)
        with pytest.raises(ValueError, match=r"copy\.ckpt"):
            read_checkpoint(broken)
        with pytest.raises(ValueError, match=r"copy\.ckpt"):
            open_checkpoint(broken)


class Malice:
    def __reduce__(self):
        return os.system, ("touch /tmp/zsnr-was-here",)


def test_a_strangers_index_runs_no_code(folder, tmp_path):
    broken = copy(folder, tmp_path)
    (broken / ".metadata").write_bytes(pickle.dumps(Malice()))
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_checkpoint(broken)
    (broken / ".metadata").write_bytes((folder / ".metadata").read_bytes())
    torch.save({"zsnr": Malice()}, broken / sharded.REST)
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        read_checkpoint(broken)
    assert not Path("/tmp/zsnr-was-here").exists()


def test_shards_of_another_model_are_refused(ranks, shards, folder, tmp_path):
    options = {"model": {"ema": None}, "checkpoint": str(folder)}
    [error] = ranks[1].errors(cells.fit, shards, tmp_path, "sharded", **options)
    assert "belongs to another model: it has ema" in error


# Ranks that hang


class Hang(Callback):
    def __init__(self, step, rank):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_hangs_is_named_and_not_waited_for(shards, tmp_path):
    with groups() as made:
        callbacks = [Hang(2, rank=1), Watchdog(minutes=0.15)]
        started = time.monotonic()
        with pytest.raises(AssertionError, match="rank 0 died"):
            made[2](cells.fit, shards, tmp_path, "ddp", callbacks=callbacks)
        assert time.monotonic() - started < 200
    told = (tmp_path / "heartbeats" / "rank-00000.hung").read_text()
    assert "rank 0" in told
    assert "has made no progress for" in told
    assert "SILENT" in told.partition("rank 1 (")[2].partition("\n")[0]
    beat = json.loads((tmp_path / "heartbeats" / "rank-00001.json").read_text())
    assert beat["rank"] == 1


def come(ranks_that_come):
    """Return what a rank is told where only some of two come."""
    dist = torch.distributed
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo")
    told = ""
    if dist.get_rank() in ranks_that_come:
        try:
            meet("the checkpoint of step 3", timeout=timedelta(seconds=1))
        except TimeoutError as error:
            told = str(error)
    if mine:
        dist.destroy_process_group()
    return told


def test_a_rank_that_does_not_come_is_named(ranks):
    told = ranks[2](come, [0])
    assert "have come to the checkpoint of step 3: " in told[0]
    assert "anks 1 " in told[0]
    ranks[2].close()  # gloo closes its connections when a rank does not come
    assert ranks[2](come, [0, 1]) == ["", ""]


class Clock:
    """A monotonic clock that jumps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def watched(tmp_path, monkeypatch, advances):
    """Let a watchdog of one minute wait while a clock advances; return whether it has ended."""
    clock, left, watchdog = Clock(), [], Watchdog(minutes=1)
    steps = iter(advances)

    class Stop(threading.Event):
        def wait(self, timeout=None):
            step = next(steps, None)
            clock.now += step or 0.0
            return bool(left) or step is None

    monkeypatch.setattr("zsnr.training.watchdog.time.monotonic", clock)
    monkeypatch.setattr("zsnr.training.watchdog.os._exit", left.append)
    watchdog._folder, watchdog._rank, watchdog._ranks = tmp_path, 0, 1
    watchdog._state = {"rank": 0, "host": "a", "pid": 1, "step": 2, "doing": "waits"}
    watchdog._watch(Stop())
    return bool(left)


@pytest.mark.parametrize(
    ("advances", "ends"),
    [
        ([10.0] * 5, False),
        ([10.0] * 10, True),
        ([10.0, 3600.0, 10.0], False),  # a suspend, stopped or not, is no hang
        ([10.0] * 6 + [3600.0, 10.0, 10.0], True),
    ],
)
def test_a_watchdog_counts_the_time_it_has_seen(tmp_path, monkeypatch, advances, ends):
    monkeypatch.setattr("time.time", lambda: -1e9)  # a clock set back hides nothing
    assert watched(tmp_path, monkeypatch, advances) == ends


STRANGE_BEATS = {
    "a list": b"[]",
    "nothing": b"{}",
    "deep": b"[" * 100_000,
    "no text": b"\xff",
    "a huge number": b'{"pid": ' + b"1" * 10_000 + b"}",
    "huge": b" " * 9_000_000,
    "other types": b'{"host": 1, "pid": "", "step": [], "doing": 1, "waited": "", "written": 1}',
}


@pytest.mark.parametrize("kind", STRANGE_BEATS)
def test_a_heartbeat_of_something_else_is_none(tmp_path, kind):
    watchdog, own = Watchdog(), {"rank": 1, "host": "a", "pid": 1, "step": 2, "doing": "waits"}
    watchdog._folder, watchdog._ranks = tmp_path, 1
    (tmp_path / "rank-00000.json").write_bytes(STRANGE_BEATS[kind])
    report = watchdog.report({**own, "waited": 90.0}, watchdog._heartbeats())
    assert "  rank 0: has written nothing" in report


def test_a_heartbeat_does_not_steer_the_terminal(tmp_path):
    watchdog = Watchdog()
    watchdog._folder, watchdog._ranks = tmp_path, 1
    beat = {"rank": 0, "host": "\x1b[2Ja\nb", "pid": 1, "step": 2, "doing": "waits"}
    beat |= {"waited": 90.0, "written": "now"}
    (tmp_path / "rank-00000.json").write_text(json.dumps(beat))
    report = watchdog.report({**beat, "rank": 1, "host": "c"}, [None])
    assert "rank 0 (\\x1b[2Ja b, pid 1): step 2" in report


def test_files_that_are_named_like_heartbeats_end_no_run(tmp_path):
    folder = tmp_path / "heartbeats"
    (folder / "rank-00007.json").mkdir(parents=True)
    (folder / "rank-x.json").write_text("")
    trainer = SimpleNamespace(default_root_dir=tmp_path, global_rank=0, world_size=1, global_step=0)
    watchdog = Watchdog()
    with pytest.warns(UserWarning, match="heartbeats cannot be written"):
        watchdog.setup(trainer, None, "fit")
    watchdog.teardown(trainer, None, "fit")
    assert (folder / "rank-x.json").exists()


def test_a_watchdog_is_quiet_while_all_goes_well(shards, tmp_path, capfd):
    cells.fit(shards, tmp_path, callbacks=[Watchdog(minutes=1)])
    assert "no progress" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_train_steps": -1}, "every_n_train_steps=-1"),
        ({"keep": 0}, "keep=0"),
        ({"keep_every_n_steps": 0}, "keep_every_n_steps=0"),
        ({"dirpath": "s3://bucket/run"}, "Set checkpoint.mirror to the address"),
    ],
)
def test_wrong_settings_of_checkpoints(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**options)
