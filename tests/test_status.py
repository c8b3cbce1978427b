"""`zsnr status`: a run's state from the files in its folder."""

import json
import math
import shutil
from dataclasses import replace

import pytest

from zsnr.commands.status import status
from zsnr.locks import LOCK, Lock

BEAT = {
    "rank": 0,
    "host": "node1",
    "pid": 1,
    "step": 41,
    "doing": "waits for data",
    "waited": 0.0,
    "written": "2026-11-28 13:00:00 UTC",
}
METRICS = """epoch,step,train/images_per_second,train/loss,val/loss
0,19,,0.9,
0,29,,,0.5
0,39,8.0,0.25,
"""


@pytest.fixture
def run(tmp_path):
    """The folder of a run of 100 steps that is somewhere after its 40th."""
    files = {
        "heartbeats/rank-00000.json": json.dumps(BEAT),
        "heartbeats/rank-00001.json": json.dumps({**BEAT, "rank": 1, "step": 40}),
        "checkpoints/run.json": json.dumps({"format": 1, "global_step": 30, "batch_size": 4}),
        "checkpoints/step-00000030.ckpt": "",
        "tensorboard/run_config.yaml": "trainer: {max_steps: 100}\n",
        "metrics/version_0/metrics.csv": METRICS + "0,49,9.0,0.1",  # a line that is being written
        "skipped_steps.jsonl": '{"step": 3}\n{"step": 4}\n',
        "faults/rank-00000.jsonl": '{"kind": "broken"}\n{"kind": "passing"}\nhalf',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_run_that_trains(run):
    lock = Lock(run / "checkpoints" / LOCK, run)
    with lock:
        facts = status(run)
        text = facts.to_text()
    assert (facts.state, facts.step, facts.max_steps) == ("running", 41, 100)
    assert (facts.loss, facts.val_loss, facts.images_per_second) == (0.25, 0.5, 8.0)
    assert facts.seconds_left == pytest.approx(59 * 4 / 8)
    assert (facts.skipped_steps, facts.faults) == (2, {"broken": 1, "passing": 1})
    assert facts.checkpoint.endswith("step-00000030.ckpt")
    assert [rank.step for rank in facts.ranks] == [41, 40]
    for line in ("41 of 100 (41%)", "0.25", "8 images/s", "30 s", "1 broken, 1 passing"):
        assert line in text
    values = json.loads(facts.to_json())
    assert values["ranks"][1]["host"] == "node1"
    assert json.loads(replace(facts, loss=float("nan")).to_json())["loss"] is None


@pytest.mark.parametrize("place", ["", "metrics/version_0/"])
def test_the_config_lies_in_the_folder_or_beside_the_logs(run, place):
    (run / "tensorboard" / "run_config.yaml").rename(run / place / "run_config.yaml")
    assert status(run).max_steps == 100


def test_a_run_that_was_stopped_is_resumed_by_the_same_command(run):
    facts = status(run / "checkpoints" / "step-00000030.ckpt")
    assert (facts.state, facts.seconds_left) == ("stopped", None)
    assert "--ckpt_path last resumes it" in facts.to_text()


def test_a_run_whose_process_is_gone_is_silent(run):
    lock = Lock(run / "checkpoints" / LOCK, run)
    with lock:
        owner = json.loads((run / "checkpoints" / LOCK).read_text())
    (run / "checkpoints" / LOCK).write_text(json.dumps({**owner, "pid": 2**22 + 1}))
    facts = status(run)
    assert facts.state == "silent"
    assert "silent since 2026-11-28 13:00:00 UTC" in facts.to_text()


def test_a_run_that_has_done_all_steps_is_finished(run):
    (run / "checkpoints" / "step-00000100.ckpt").touch()
    assert (status(run).state, status(run).step) == ("finished", 100)


def test_a_rank_that_makes_no_progress_is_named(run):
    (run / "heartbeats" / "rank-00001.json").write_text(
        json.dumps({**BEAT, "rank": 1, "waited": 300.0})
    )
    with Lock(run / "checkpoints" / LOCK, run):
        assert "rank 1 on node1 has made no progress for 300 s" in status(run).to_text()


def test_damaged_files_do_not_stop_it(run):
    for path in [*run.glob("heartbeats/*"), *run.glob("*/run*"), *run.glob("metrics/*/*")]:
        path.write_bytes(b"\xff[[[")
    facts = status(run)
    assert (facts.step, facts.loss, facts.max_steps) == (30, None, None)


def test_numbers_that_are_not_finite_do_not_stop_it(run):
    (run / "heartbeats" / "rank-00000.json").write_text(json.dumps({**BEAT, "waited": math.nan}))
    (run / "heartbeats" / "rank-00001.json").write_text(json.dumps({**BEAT, "step": math.inf}))
    (run / "metrics" / "version_0" / "metrics.csv").write_text(
        "step,train/loss,train/images_per_second\ninf,nan,nan\n"
    )
    (run / "checkpoints" / "step-00000040.ckpt").symlink_to("removed")
    with Lock(run / "checkpoints" / LOCK, run):
        facts = status(run)
    assert (facts.step, facts.seconds_left, facts.checkpoint_age) == (41, None, None)
    assert "loss:             nan" in facts.to_text()
    assert "NaN" not in facts.to_json()


def test_a_folder_of_runs_is_no_run(run):
    (run / "one").mkdir()
    for name in ("tensorboard", "checkpoints"):
        (run / name).rename(run / "one" / name)
    shutil.rmtree(run / "heartbeats")
    assert status(run / "one").max_steps == 100
    with pytest.raises(ValueError, match="is not the folder of a run"):
        status(run)


def test_a_folder_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run: it has no heartbeats"):
        status(tmp_path)
