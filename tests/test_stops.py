"""Runs that are stopped, killed, damaged or stuck."""

import json
import os
import pickle
import shutil
import signal
import stat
import time
from pathlib import Path

import cells
import pytest
import tiny
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from ranks import groups

from zsnr.checkpoints import sharded
from zsnr.checkpoints.own import open_checkpoint, read_checkpoint
from zsnr.cli import main
from zsnr.training import Checkpoints, Preemption, Watchdog
from zsnr.training.checkpointing import find_last, steps


class SignalAt(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step, number=signal.SIGUSR1, rank=0):
        self.step, self.number, self.rank = step, number, rank

    def on_before_backward(self, trainer, module, loss):
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


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


@pytest.mark.parametrize(("step", "code"), [(1, 143), (3, 0)])
def test_a_run_that_is_stopped_early_is_no_success(shards, tmp_path, step, code):
    before = signal.getsignal(signal.SIGTERM)
    stop = {"step": step, "number": int(signal.SIGTERM)}
    callbacks = [{"class_path": "test_stops.SignalAt", "init_args": stop}]
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    try:
        found = main([*config(tmp_path, shards), "-c", str(more)])
    except SystemExit as end:
        found = end.code
    assert found == code
    assert steps(tmp_path / "run/checkpoints")[-1].name == f"step-{step + 1:08d}.ckpt"
    signal.signal(signal.SIGTERM, before)


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


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_RESTART_COUNT": "1"},
        {"TORCHELASTIC_RESTART_COUNT": "1"},
        {"TORCHELASTIC_MAX_RESTARTS": "3", "GROUP_WORLD_SIZE": "2"},
    ],
    ids=["slurm", "torchrun", "nodes"],
)
def test_a_restarted_run_resumes_by_itself(shards, tmp_path, monkeypatch, variables):
    fit = config(tmp_path, shards)
    assert main(fit) == 0
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in steps(folder)] == [
        "step-00000003.ckpt",  # of those to keep for good
        "step-00000004.ckpt",
    ]
    assert main([*fit, "--trainer.max_steps", "5"]) == 2  # an earlier run's, and nobody restarted
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


def test_what_a_killed_save_left_is_no_checkpoint_and_goes(ranks, shards, tmp_path):
    ranks[2](cells.fit, shards, tmp_path, "sharded", every=2, stop_at=2)
    folder = tmp_path / "checkpoints"
    half = folder / ".step-00000003.ckpt.part"
    shutil.copytree(cells.newest(tmp_path), half)
    (half / sharded.REST).unlink()
    (folder / ".step-00000003.ckpt.123.part").write_bytes(b"half")
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
def test_a_failed_save_of_shards_leaves_the_last_good_one(ranks, shards, tmp_path, full_at):
    ranks[2](cells.fit, shards, tmp_path, "sharded", stop_at=2)
    before = find_last(tmp_path / "checkpoints")
    with pytest.raises(AssertionError, match=r"could not be written: No space left on device"):
        ranks[2](fit_on_a_full_disk, full_at, shards, tmp_path, "sharded", checkpoint=str(before))
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
    with pytest.raises(AssertionError, match="No space left") as stopped:
        ranks[2](fit_where_saving_fails, shards, tmp_path, kind, steps=1)
    assert "rank 1: OSError" in str(stopped.value)


class Unsavable(Callback):
    def state_dict(self):
        return {"state": lambda: None}


def test_what_cannot_be_pickled_stops_all_ranks(ranks, shards, tmp_path):
    callbacks = [Unsavable()]
    with pytest.raises(AssertionError, match="could not be written") as stopped:
        ranks[2](cells.fit, shards, tmp_path, "sharded", steps=1, callbacks=callbacks)
    assert "rank 1: OSError" in str(stopped.value)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def fit_with_what_each_rank_sees(seen, *args, **kwargs):
    late = Checkpoints(f"{args[1]}/other")
    late.resumed_from = seen[int(os.environ["RANK"])]
    return cells.fit(*args, callbacks=[late], **kwargs)


def test_ranks_that_see_other_checkpoints_all_stop(ranks, shards, tmp_path):
    seen = ["step-00000002.ckpt", ""]
    with pytest.raises(AssertionError, match="do not see the same checkpoints") as stopped:
        ranks[2](fit_with_what_each_rank_sees, seen, shards, tmp_path, "sharded")
    assert "rank 0: OSError" in str(stopped.value)
    assert "rank 1: OSError" in str(stopped.value)


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


# Damage and malice


@pytest.fixture(scope="module")
def folder(ranks, shards, tmp_path_factory):
    """A sharded checkpoint."""
    root = tmp_path_factory.mktemp("sharded")
    ranks[2](cells.fit, shards, root, "sharded", steps=1)
    return Path(cells.newest(root))


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
    with pytest.raises(AssertionError, match="is of another model: it has ema"):
        ranks[1](cells.fit, shards, tmp_path, "sharded", **options)


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


def test_a_watchdog_is_quiet_while_all_goes_well(shards, tmp_path, capfd):
    cells.fit(shards, tmp_path, callbacks=[Watchdog(minutes=1)])
    assert "no progress" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_train_steps": -1}, "every_n_train_steps=-1"),
        ({"keep": 0}, "keep=0"),
        ({"keep_every_n_steps": 0}, "keep_every_n_steps=0"),
        ({"dirpath": "s3://bucket/run"}, "mount the bucket"),
    ],
)
def test_wrong_settings_of_checkpoints(options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(**options)
