"""What a person or a log sees of a run: lines, bars, and the summary at the end."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zsnr.training import console
from zsnr.training.checkpointing import Checkpoints
from zsnr.training.console import LOG, ProgressLines, StepBar, print_summary, progress_callbacks


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture
def trainer(tmp_path):
    return SimpleNamespace(
        global_step=0,
        max_steps=4,
        log_every_n_steps=2,
        world_size=1,
        global_rank=0,
        is_global_zero=True,
        precision="32-true",
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        callback_metrics={},
        state=SimpleNamespace(fn="fit"),
        sanity_checking=False,
        default_root_dir=str(tmp_path),
        datamodule=SimpleNamespace(batch_size=8, requests=[], done=set()),
        callbacks=[],
        loggers=[],
        num_val_batches=[2],
        num_test_batches=[float("inf")],
    )


MODULE = torch.nn.Linear(1000, 1500)
BATCH = {"global_batch_size": 8}


def train(callback, trainer, clock, steps, seconds=1.0):
    """Train so many steps, of two batches each."""
    callback.on_train_start(trainer, MODULE)
    for _ in range(steps):
        callback.on_train_batch_end(trainer, MODULE, None, BATCH, 0)  # no step yet
        clock.seconds += seconds
        trainer.global_step += 1
        trainer.callback_metrics["train/loss"] = torch.tensor(1 / trainer.global_step)
        callback.on_train_batch_end(trainer, MODULE, None, BATCH, 1)
    callback.on_train_end(trainer, MODULE)


def written(trainer):
    """The lines of fit.log without their times."""
    with open(f"{trainer.default_root_dir}/{LOG}", encoding="utf-8") as file:
        lines = file.read().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC  ", line) for line in lines)
    return [line.partition("UTC  ")[2] for line in lines]


def test_lines_have_step_loss_speed_and_time_left(trainer, clock, capsys):
    trainer.max_steps = 5
    train(ProgressLines(), trainer, clock, 5)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "training begins: 5 steps, 1.5 M trained parameters on 1 cpu device, precision 32-true",
        "step 2 of 5, loss 0.5, 8 images/s, 3 s left",
        "step 4 of 5, loss 0.25, 8 images/s, 1 s left",
        "step 5 of 5, loss 0.2, 8 images/s, 0 s left",
    ]
    assert written(trainer)[:-1] == printed.err.splitlines()
    assert written(trainer)[-1] == "trained 5 steps in 5 s, 8 images/s"


def test_lines_of_a_resumed_run_count_from_where_it_resumed(trainer, clock, capsys):
    trainer.global_step, trainer.world_size = 2, 3
    train(ProgressLines(), trainer, clock, 2, seconds=60)
    assert capsys.readouterr().err.splitlines() == [
        "training resumes at step 2: 4 steps, 1.5 M trained parameters on 3 cpu devices, "
        "precision 32-true",
        "step 4 of 4, loss 0.25, 0.133 images/s, 0 s left",
    ]
    assert written(trainer)[-1] == "trained 2 steps in 2 min 0 s, 0.133 images/s"


def test_one_rank_prints_and_a_bar_leaves_the_lines_to_the_file(trainer, clock, capsys):
    train(ProgressLines(printing=False), trainer, clock, 4)
    assert capsys.readouterr().err == ""
    assert len(written(trainer)) == 4
    trainer.is_global_zero, trainer.global_step = False, 0
    train(ProgressLines(), trainer, clock, 4)
    print_summary(trainer, stopped=False)
    assert capsys.readouterr() == ("", "")
    assert len(written(trainer)) == 4


def test_a_validation_says_its_loss_and_a_sanity_check_says_nothing(trainer, clock, capsys):
    lines = ProgressLines()
    lines.on_validation_end(trainer, MODULE)  # no validation data
    trainer.callback_metrics["val/loss"] = torch.tensor(float("nan"))
    lines.on_validation_end(trainer, MODULE)
    trainer.sanity_checking = True
    lines.on_validation_end(trainer, MODULE)
    trainer.sanity_checking, trainer.state.fn = False, "validate"
    lines.on_validation_end(trainer, MODULE)
    assert capsys.readouterr().err == "step 0 of 4, validation loss nan\n"


def test_a_long_validation_has_a_line_now_and_then(trainer, clock, capsys):
    trainer.num_val_batches = [4]
    lines = ProgressLines()
    lines.on_validation_start(trainer, MODULE)
    for number in range(4):
        clock.seconds += 6
        lines.on_validation_batch_end(trainer, MODULE, None, BATCH, number)
    assert capsys.readouterr().err.splitlines() == [
        "validating: 2 of 4 batches, 12 s left",
        "validating: 4 of 4 batches, 0 s left",
    ]


def test_a_folder_that_cannot_be_written_to_does_not_stop_training(trainer, clock, capsys):
    trainer.default_root_dir = "/dev/null/run"
    with pytest.warns(UserWarning, match="the run continues without it"):
        train(ProgressLines(), trainer, clock, 2)
    assert "step 2 of 4" in capsys.readouterr().err


def requests(number):
    return [SimpleNamespace(filename=f"{i}.png") for i in range(number)]


def test_predict_has_a_line_now_and_then(trainer, clock, capsys):
    trainer.datamodule.requests = requests(7)
    trainer.datamodule.done = {"0.png"}  # by an earlier start
    lines = ProgressLines()
    lines.on_predict_start(trainer, MODULE)
    for size in (2, 2, 2):
        clock.seconds += 6
        lines.on_predict_batch_end(trainer, MODULE, None, [None] * size, 0)
    assert capsys.readouterr().err.splitlines() == [
        "4 of 6 images, 0.333 images/s, 6 s left",
        "6 of 6 images, 0.333 images/s, 0 s left",
    ]
    trainer.world_size = 2
    lines.on_predict_start(trainer, MODULE)
    clock.seconds += 20
    lines.on_predict_batch_end(trainer, MODULE, None, [None] * 3, 0)
    assert "3 of 3 images of rank 0, one of 2, 0.15 images/s" in capsys.readouterr().err


def last_drawing(capsys):
    """The last that a bar drew, and that of each bar which stays."""
    return [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n") if line]


def test_the_bar_counts_steps(trainer, clock, capsys):
    train(StepBar(), trainer, clock, 4)
    [drawn] = last_drawing(capsys)
    assert re.match(r"training: 100%\|.*\| 4/4 \[", drawn)
    assert drawn.endswith("loss 0.25, 8 images/s]")


def test_the_bar_of_a_resumed_run_begins_where_it_resumed(trainer, clock, capsys):
    trainer.global_step = 3
    bar = StepBar()
    bar.on_train_start(trainer, MODULE)
    assert " 75%|" in capsys.readouterr().err
    bar.on_train_end(trainer, MODULE)


def test_bars_are_closed_when_a_run_is_interrupted(trainer, clock, capsys):
    bar = StepBar()
    bar.on_train_start(trainer, MODULE)
    bar.on_validation_start(trainer, MODULE)
    bar.on_validation_batch_end(trainer, MODULE)
    bar.on_exception(trainer, MODULE, KeyboardInterrupt())
    drawn = capsys.readouterr().err
    assert "validating: " in drawn
    assert drawn.endswith("\n")  # a message that follows has its own line
    bar.on_exception(trainer, MODULE, KeyboardInterrupt())
    assert capsys.readouterr().err == ""


def test_bars_of_validate_test_and_predict(trainer, clock, capsys):
    bar = StepBar()
    trainer.state.fn = "validate"
    bar.on_validation_start(trainer, MODULE)
    for _ in range(2):
        bar.on_validation_batch_end(trainer, MODULE)
    bar.on_validation_end(trainer, MODULE)
    bar.on_test_start(trainer, MODULE)  # whose number of batches is not known
    bar.on_test_batch_end(trainer, MODULE)
    bar.on_test_end(trainer, MODULE)
    trainer.datamodule.requests = requests(3)
    bar.on_predict_start(trainer, MODULE)
    bar.on_predict_batch_end(trainer, MODULE, None, [None] * 3, 0)
    bar.on_predict_end(trainer, MODULE)
    validated, tested, predicted = last_drawing(capsys)
    assert re.match(r"validating: 100%\|.*\| 2/2 ", validated)
    assert re.match(r"testing: 1batch ", tested)
    assert re.match(r"generating: 100%\|.*\| 3/3 ", predicted)
    bar.disable()
    bar.on_predict_start(trainer, MODULE)
    bar.on_predict_end(trainer, MODULE)
    assert capsys.readouterr().err == ""


def test_a_bar_is_for_terminals(monkeypatch):
    assert [type(each) for each in progress_callbacks(bar=True)] == [ProgressLines]
    monkeypatch.setattr(console, "on_terminal", lambda: True)
    lines, bar = progress_callbacks(bar=True)
    assert (lines.printing, type(bar)) == (False, StepBar)
    [lines] = progress_callbacks(bar=False)
    assert not lines.printing


@pytest.fixture
def finished(trainer, clock, monkeypatch):
    """A trainer that has trained its four steps, with a checkpoint."""
    lines, checkpoints = ProgressLines(printing=False), Checkpoints()
    checkpoints.dirpath = f"{trainer.default_root_dir}/checkpoints"
    trainer.callbacks = [lines, checkpoints]
    train(lines, trainer, clock, 4)
    Path(checkpoints.dirpath).mkdir()
    Path(checkpoints.dirpath, "step-00000004.ckpt").touch()
    monkeypatch.chdir(trainer.default_root_dir)
    return trainer


def summary(capsys, trainer, stopped=False):
    capsys.readouterr()
    print_summary(trainer, stopped)
    return capsys.readouterr().out.splitlines()


def test_the_summary_names_checkpoint_and_what_to_run_next(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(console, "TensorBoardLogger", SimpleNamespace)
    finished.loggers = [SimpleNamespace()]
    assert summary(capsys, finished) == [
        "done: trained 4 steps in 4 s, 8 images/s",
        f"checkpoint: {tmp_path.name}/checkpoints/step-00000004.ckpt",
        f'next: zsnr sample {tmp_path.name} "a prompt"',
        f"      tensorboard --logdir {tmp_path.name}",
    ]
    monkeypatch.chdir("/")
    elsewhere = f"{tmp_path.parent}/my checkpoints"
    finished.callbacks[1].dirpath = elsewhere
    Path(elsewhere).mkdir()
    Path(elsewhere, "step-00000004.ckpt").touch()
    shown = elsewhere.lstrip("/")
    assert summary(capsys, finished)[2] == (
        f"next: zsnr sample '{shown}/step-00000004.ckpt' \"a prompt\""
    )


def test_the_summary_of_a_run_that_a_signal_stopped(finished, capsys):
    finished.max_steps = 9
    first, *_, last = summary(capsys, finished, stopped=True)
    assert first == "stopped at step 4 of 9: trained 4 steps in 4 s, 8 images/s"
    assert last == "resume: run the same command with --ckpt_path last"
    first, *_, last = summary(capsys, finished)  # by trainer.max_time
    assert first == "ended at step 4 of 9: trained 4 steps in 4 s, 8 images/s"
    assert last.startswith("resume: ")


def test_the_summary_where_nothing_was_trained(trainer, capsys, monkeypatch):
    trainer.callbacks = [ProgressLines()]
    trainer.global_step = 4
    assert summary(capsys, trainer) == ["done: nothing is left to train at step 4 of 4"]
    trainer.global_step = 0
    assert summary(capsys, trainer, stopped=True) == ["stopped at step 0 of 4"]
    monkeypatch.setattr(console, "TensorBoardLogger", SimpleNamespace)
    trainer.loggers = [SimpleNamespace()]
    monkeypatch.chdir(trainer.default_root_dir)
    assert summary(capsys, trainer, stopped=True)[1] == "next: tensorboard --logdir ."


def test_the_rate_is_without_the_time_of_validation_and_the_time_left_with_it(
    trainer, clock, capsys
):
    lines = ProgressLines()
    lines.on_train_start(trainer, MODULE)
    for _ in range(2):
        clock.seconds += 1
        trainer.global_step += 1
        lines.on_train_batch_end(trainer, MODULE, None, BATCH, 0)
        if trainer.global_step == 1:
            lines.on_validation_start(trainer, MODULE)
            clock.seconds += 100
            lines.on_validation_end(trainer, MODULE)
    assert capsys.readouterr().err.splitlines()[-1] == "step 2 of 4, 8 images/s, 1 min 42 s left"
