"""`zsnr validate RUN` and `--follow`: the checkpoints of a run, measured beside its training."""

import json
import os
import shutil
import signal
from contextlib import ExitStack

import cells
import pytest
import tiny
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zsnr.checkpoints.sharded import write_sharded
from zsnr.cli import main
from zsnr.locks import LOCK, Lock
from zsnr.training import follow, lightning_cli
from zsnr.training.help import help_text
from zsnr.training.lightning_cli import ZsnrCLI
from zsnr.training.module import LatentDiffusion
from zsnr.training.short_options import take_run
from zsnr.untrusted import open_archive


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps that validated and measured images at each, with all checkpoints."""
    root = tmp_path_factory.mktemp("follow")
    tiny.write_shards(root / "data", [6])
    tiny.write_shards(root / "data", [4], "val")
    (root / "captions.txt").write_text("snow\nnight\n")
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "log_every_n_steps": 1,
            "val_check_interval": 1,
            "enable_progress_bar": False,
            "default_root_dir": str(root / "run"),
        },
        "model": {**tiny.MODEL, "sampling": {"num_steps": 2}},
        "data": {
            "train": f"{root}/data/train-*.tar",
            "val": f"{root}/data/val-*.tar",
            "image_size": 16,
            "batch_size": 2,
            "num_workers": 0,
        },
        "checkpoint": {"every_n_train_steps": 1, "keep": 9},
        "metrics": {
            "captions": str(root / "captions.txt"),
            "num_images": 2,
            "output": str(root / "numbers.json"),
        },
        "board": {"samples": 0},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", str(root / "config.yaml")]) == 0
    return root / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of its folder, without checkpoints."""
    ignored = shutil.ignore_patterns("*.ckpt")
    return shutil.copytree(finished, tmp_path / "run", ignore=ignored)


def copy(finished, run, *numbers):
    for step in numbers:
        name = f"step-{step:08d}.ckpt"
        shutil.copy2(finished / "checkpoints" / name, run / "checkpoints" / name)


def table(folder):
    return [json.loads(line) for line in (folder / "validate.jsonl").read_text().splitlines()]


def scalars(folder):
    """{tag: {step: value}} of the event files in a folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {event.step: event.value for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def followed(run, monkeypatch, *actions, options=()):
    """Follow a run; while it waits, one action after the other is taken."""
    left = list(actions)

    def act(seconds):
        assert left, "the command waits for nothing"
        left.pop(0)()

    monkeypatch.setattr(follow, "sleep", act)
    try:
        return main(["validate", str(run), "--follow", *options])
    except SystemExit as stop:
        return stop.code
    finally:
        assert not left


def test_every_checkpoint_gives_the_values_of_training(finished, run, monkeypatch, capsys):
    copy(finished, run, 1, 2, 3)
    before, numbers = contents(run), contents(finished.parent)
    assert followed(run, monkeypatch) == 0
    printed = capsys.readouterr()
    assert [line.split(":")[0] for line in printed.out.splitlines()] == [
        "step 1",
        "step 2",
        "step 3",
    ]
    assert "finished at step 3 of 3: 3 checkpoints measured (step 1, 2, 3)" in printed.err
    new = contents(run).keys() - before.keys()
    assert {path.parts[0] for path in new} == {"tensorboard", "validate.jsonl", "validate.log"}
    assert {path.parts[1] for path in new if len(path.parts) > 1} == {"validate"}
    assert all(contents(run)[name] == data for name, data in before.items())
    assert contents(finished.parent) == numbers

    trained, shown = scalars(run / "tensorboard"), scalars(run / "tensorboard" / "validate")
    wanted = {tag for tag in trained if not tag.startswith(("train", "watch", "output_gradient"))}
    assert shown.keys() == wanted
    assert "metrics/luma_mean" in wanted
    rows = table(run)
    for tag in wanted:  # training logs a step as the number of steps before it
        same = {step + 1: value for step, value in trained[tag].items()}
        assert shown[tag] == same, tag
        assert {row["step"]: row["metrics"][tag] for row in rows} == same, tag

    assert followed(run, monkeypatch) == 0  # nothing is left
    assert capsys.readouterr().out == ""
    lines = (run / "validate.jsonl").read_text().splitlines(keepends=True)
    (run / "validate.jsonl").write_text("".join(lines[:2]) + lines[2][:50])  # killed in between
    assert followed(run, monkeypatch) == 0
    assert capsys.readouterr().out.startswith("step 3: val/loss ")
    assert [row["metrics"] for row in table(run)] == [row["metrics"] for row in rows]
    assert scalars(run / "tensorboard" / "validate") == shown


def test_a_run_that_is_being_written(finished, run, tmp_path, monkeypatch, capsys):
    later = run.rename(tmp_path / "later")
    step = [run / "checkpoints" / f"step-{n:08d}.ckpt" for n in range(4)]
    half = tmp_path / "half"
    stack = ExitStack()
    monkeypatch.setattr(follow, "SETTLED", 1e6)

    def begin():
        later.rename(run)
        stack.enter_context(Lock(run / "checkpoints" / LOCK, run))

    def first():
        copy(finished, run, 1)

    def shards_without_their_end():
        write_sharded(open_archive(finished / "checkpoints" / step[2].name), half)
        shutil.copytree(half, step[2], ignore=shutil.ignore_patterns("meta.pt"))

    def complete():
        shutil.copy(half / "meta.pt", step[2])

    def cut_off():
        data = (finished / "checkpoints" / step[3].name).read_bytes()
        step[3].write_bytes(data[:-1000])

    def removed():
        step[3].unlink()

    def foreign():
        checkpoint = open_archive(finished / "checkpoints" / step[3].name)
        weights = checkpoint["state_dict"]
        name = next(iter(weights))
        torch.save({**checkpoint, "state_dict": {**weights, name: weights[name][:1]}}, step[3])

    def damaged():
        step[3].write_bytes(b"no checkpoint")
        os.utime(step[3], (0, 0))

    def gone():
        stack.close()

    def still():
        pass

    code = followed(
        run,
        monkeypatch,
        *(begin, first, shards_without_their_end, complete, cut_off, removed, foreign, damaged),
        *(still, gone),
        options=["--metrics.captions", "null"],
    )
    assert code == 1
    printed = capsys.readouterr()
    said = [line for line in printed.err.splitlines() if "data.val" not in line]
    wanted = [
        "waiting for the first checkpoint: ",  # the run does not exist yet
        "waiting for the first checkpoint: ",  # it has none
        "waiting for the next checkpoint of",
        f"waiting for {step[2].name}, which is being written",
        "waiting for the next checkpoint of",
        f"waiting for {step[3].name}, which is being written",
        "step 3: skipped, since the run has removed the checkpoint",
        "waiting for the next checkpoint of",
        "step 3: not measured: ",
        "step 3: not measured: ",
        "2 checkpoints measured (step 1, 2), 1 failed (step 3), 1 skipped",
    ]
    for line, part in zip(said, wanted, strict=True):
        assert part in line
    assert "has finished at step 3 of 3" in said[-1]
    trained = scalars(finished / "tensorboard")["val/loss"]
    assert [row["metrics"]["val/loss"] for row in table(run)] == [trained[0], trained[1]]
    log = (run / "validate.log").read_text()
    assert all(line in log for line in [*said[2:], *printed.out.splitlines()])


def test_a_checkpoint_that_is_removed_while_it_is_read(finished, run, monkeypatch, capsys):
    copy(finished, run, 1, 2)
    load = follow.CheckpointFiles.load_checkpoint

    def removing(self, path, *args, **kwargs):
        (run / "checkpoints" / "step-00000001.ckpt").unlink(missing_ok=True)
        return load(self, path, *args, **kwargs)

    monkeypatch.setattr(follow.CheckpointFiles, "load_checkpoint", removing)
    options = ["--metrics.captions", "null"]
    assert followed(run, monkeypatch, options=options) == 0
    assert [row["step"] for row in table(run)] == [1, 2]  # a link has held it
    assert not (run / "validate").exists()

    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    copy(finished, run, 1, 3)

    def no_links(*paths):
        raise OSError

    monkeypatch.setattr(os, "link", no_links)
    capsys.readouterr()
    options += ["-o", str(run / "without")]
    assert followed(run, monkeypatch, options=options) == 0
    printed = capsys.readouterr()
    assert "step 1: skipped, since the run has removed the checkpoint" in printed.err
    assert [row["step"] for row in table(run / "without")] == [3]


def test_an_interrupt_says_what_was_measured(finished, run, monkeypatch, capsys):
    copy(finished, run, 1)
    with Lock(run / "checkpoints" / LOCK, run):
        code = followed(
            run,
            monkeypatch,
            lambda: signal.raise_signal(signal.SIGINT),
            options=["--metrics.captions", "null"],
        )
        assert code == 130
        assert "stopped: 1 checkpoint measured (step 1)" in capsys.readouterr().err
        copy(finished, run, 2)
        interrupt = lambda *_: signal.raise_signal(signal.SIGINT)  # noqa: E731
        monkeypatch.setattr(LatentDiffusion, "validation_step", interrupt)
        assert followed(run, monkeypatch, options=["--metrics.captions", "null"]) == 130
    assert "stopped: 0 checkpoints measured" in capsys.readouterr().err
    assert [row["step"] for row in table(run)] == [1]
    assert not (run / ".validate.lock").exists()
    assert not (run / "validate").exists()


def test_two_ranks_measure_together(finished, run, ranks):
    copy(finished, run, 1, 2)
    (run / "checkpoints" / "step-00000003.ckpt").write_bytes(b"no checkpoint")
    os.utime(run / "checkpoints" / "step-00000003.ckpt", (0, 0))
    assert ranks[2](cells.follow, str(run)) == [1, 1]
    trained = scalars(finished / "tensorboard")["val/loss"]
    losses = [row["metrics"]["val/loss"] for row in table(run)]
    assert losses == pytest.approx([trained[0], trained[1]], rel=1e-6)


def test_a_checkpoint_that_is_written_again_is_measured_again(finished, run, monkeypatch):
    copy(finished, run, 1, 3)
    options = ["--metrics.captions", "null"]
    assert followed(run, monkeypatch, options=options) == 0
    before = scalars(run / "tensorboard" / "validate")["val/loss"]
    third, first = (run / "checkpoints" / f"step-0000000{n}.ckpt" for n in (3, 1))
    shutil.copy(third, first)
    assert followed(run, monkeypatch, options=options) == 0
    assert [row["step"] for row in table(run)] == [1, 3, 1]
    after = scalars(run / "tensorboard" / "validate")["val/loss"]
    assert after == {1: before[3], 3: before[3]}
    assert list(after) == [1, 3]  # in this order, as TensorBoard draws them


def test_a_second_command_and_other_settings_are_refused(
    finished, run, tmp_path, monkeypatch, capsys
):
    checkpoint = open_archive(finished / "checkpoints" / "step-00000002.ckpt")
    path = run / "checkpoints" / "step-00000002.ckpt"
    torch.save({**checkpoint, "start_losses": [2.0] * 10}, path)  # as of a pretrained start
    options = ["--metrics.captions", "null"]
    with monkeypatch.context() as patch:
        patch.setattr(ZsnrCLI, "instantiate_classes", None)  # nothing slow before
        with Lock(run / ".validate.lock", run / "validate.jsonl"):
            assert followed(run, monkeypatch, options=options) == 2
    assert "validate.jsonl is in use by another process" in capsys.readouterr().err
    assert followed(run, monkeypatch, options=options) == 0
    [row] = table(run)
    losses = {tag.partition("/")[2]: x for tag, x in row["metrics"].items() if "timestep/" in tag}
    adapted = {tag.partition("/")[2]: x for tag, x in row["metrics"].items() if "adap" in tag}
    assert {end: 2 * x for end, x in adapted.items()} == losses

    options += ["--data.val_samples", "3"]
    capsys.readouterr()
    assert followed(run, monkeypatch, options=options) == 2
    said = capsys.readouterr().err
    assert "other settings (data.val_samples was None, is 3 now)" in said
    assert said.count("\n") == 1
    assert followed(run, monkeypatch, options=[*options, "-o", str(tmp_path / "three")]) == 0
    [row] = table(tmp_path / "three")
    assert row["settings"]["data.val_samples"] == 3
    assert not [tag for tag in row["metrics"] if "adap" in tag]  # the start has no such losses
    assert (tmp_path / "three" / "tensorboard" / "validate").is_dir()


def test_one_checkpoint_needs_no_config(finished, run, capsys):
    copy(finished, run, 1, 2)
    trained, before = scalars(run / "tensorboard"), contents(run)
    for source, step in ((run, 2), (run / "checkpoints" / "step-00000001.ckpt", 1)):
        assert main(["validate", str(source)]) == 0
        assert str(trained["val/loss"][step - 1])[:8] in capsys.readouterr().out
    assert contents(run) == before
    assert main(["validate", str(run), "--ckpt_path", "last"]) == 2
    assert "both name what is validated" in capsys.readouterr().err


def test_the_run_is_named_in_other_ways(finished, run, tmp_path, monkeypatch, capsys):
    copy(finished, run, 1)
    loss = scalars(run / "tensorboard")["val/loss"][0]
    monkeypatch.chdir(run / "checkpoints")
    (tmp_path / "link").symlink_to(run)
    assert followed(".", monkeypatch, options=["--metrics.captions", "null"]) == 0
    assert [row["metrics"]["val/loss"] for row in table(run)] == [loss]
    assert followed(tmp_path / "link", monkeypatch, options=["--metrics.captions", "null"]) == 0
    assert len(table(run)) == 1
    for source in (".", "step-00000001.ckpt"):
        capsys.readouterr()
        assert main(["validate", source]) == 0
        assert str(loss)[:8] in capsys.readouterr().out
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").touch()
    for wrong, message in (
        ("s3://bucket/run", "--follow needs a local folder: s3://bucket/run is an address"),
        ("step-00000001.ckpt", "is not one"),
        (tmp_path / "model", "model is a model: --follow needs the folder of a run"),
    ):
        assert followed(wrong, monkeypatch) == 2
        assert message in capsys.readouterr().err


def test_config_files_of_the_run_itself(finished, run, tmp_path, monkeypatch, capsys):
    copy(finished, run, 1)
    before = contents(run)
    (tmp_path / "mine.yaml").write_text("trainer: {limit_val_batches: 0}\n")  # it trains only
    saved = run / "tensorboard" / "run_config.yaml"
    options = ["-c", str(saved), "-c", str(tmp_path / "mine.yaml"), "--metrics.captions", "null"]
    assert main(["validate", str(run), *options, "--metrics.output", "null"]) == 0
    assert str(scalars(run / "tensorboard")["val/loss"][0])[:8] in capsys.readouterr().out
    assert contents(run) == before  # nor do its loggers write there
    assert followed(run, monkeypatch, options=[*options, "-o", str(run)]) == 0
    new = {path.parts[:2] for path in contents(run).keys() - before.keys()}
    assert new == {("validate.jsonl",), ("validate.log",), ("tensorboard", "validate")}
    (tmp_path / "mine.yaml").write_text(f"ckpt_path: {run}\n")
    assert followed(tmp_path / "later", monkeypatch, options=options) == 2  # before it waits
    assert "both name what is validated" in capsys.readouterr().err


def test_a_table_that_cannot_be_continued(finished, run, tmp_path, monkeypatch, capsys):
    copy(finished, run, 1)
    options = ["--metrics.captions", "null"]
    for text in ("[]\n", "{}\n", "\0\n"):
        (run / "validate.jsonl").write_text(text)
        assert followed(run, monkeypatch, options=options) == 2
        said = capsys.readouterr().err
        assert "validate.jsonl, line 1 is" in said
        assert "Move the file away to measure all checkpoints again" in said
    (run / "validate.jsonl").unlink()
    (run / "validate.jsonl").mkdir()
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(ZsnrCLI, "instantiate_classes", None)  # nothing slow before
        assert followed(run, monkeypatch, options=options) == 2
        assert "validate.jsonl: Is a directory" in capsys.readouterr().err
        assert followed(run, monkeypatch, options=[*options, "-o", str(tmp_path / "file")]) == 2
        assert "validate.jsonl cannot be written: File exists" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "validate.jsonl").symlink_to("/dev/full")
    assert followed(run, monkeypatch, options=[*options, "-o", str(tmp_path / "full")]) == 2
    said = capsys.readouterr().err
    assert "full/validate.jsonl cannot be written: No space left on device." in said


def test_the_first_checkpoint_is_removed_while_the_command_starts(
    finished, run, monkeypatch, capsys
):
    copy(finished, run, 1)
    first = run / "checkpoints" / "step-00000001.ckpt"
    check = lightning_cli.check_model

    def next_one(model):
        if first.exists():
            first.unlink()
            copy(finished, run, 2)
        check(model)

    monkeypatch.setattr(lightning_cli, "check_model", next_one)
    assert followed(run, monkeypatch, options=["--metrics.captions", "null"]) == 0
    assert [row["step"] for row in table(run)] == [2]


def test_a_run_without_checkpoints_that_has_ended(run, monkeypatch, capsys):
    (run / "heartbeats" / "rank-00000.json").unlink(missing_ok=True)
    assert followed(run, monkeypatch) == 2
    assert "it has no checkpoints" in capsys.readouterr().err
    assert not (run / "validate.jsonl").exists()


def test_a_run_whose_process_is_gone_has_ended_after_a_while(run):
    lock = run / "checkpoints" / LOCK
    with Lock(lock, run):
        owner = json.loads(lock.read_text())
    for each in ("metrics", "heartbeats"):
        shutil.rmtree(run / each)
    (run / "checkpoints" / "run.json").unlink()
    assert "stopped at step" in follow.how_it_ended(run)
    lock.write_text(json.dumps({**owner, "pid": 2**22 + 1}))
    assert follow.how_it_ended(run) is None
    os.utime(lock, (0, 0))
    assert "ended without a word" in follow.how_it_ended(run)


def test_the_help_of_validate_asks_for_no_checkpoint_beside_a_run():
    assert "(required without RUN)" in " ".join(help_text("validate").split())
    assert "(required)" in " ".join(help_text("predict").split())


def test_the_run_on_the_command_line():
    words = ["--data.val", "v", "-c", "a.yaml", "runs/mine", "--data.batch_size=2", "--follow"]
    rest = ["--data.val", "v", "-c", "a.yaml", "--data.batch_size=2"]
    assert take_run(words) == (rest, "runs/mine", True)
    assert take_run(["--follow", "runs/mine"]) == ([], "runs/mine", True)
    assert take_run(["--ckpt_path", "x"]) == (["--ckpt_path", "x"], None, False)
    for wrong, message in (
        (["a", "b"], "'b' belongs to no option"),
        (["--follow"], "zsnr validate RUN --follow"),
        (["a", "--follow=1"], "takes no value"),
    ):
        with pytest.raises(ValueError, match=message):
            take_run(wrong)
