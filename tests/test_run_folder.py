"""Files of a run's folder that are damaged or hostile: samples, losses, logs that go on."""

import csv
import json
import os

import pytest
import tiny
from lightning.pytorch.loggers import CSVLogger

from zsnr.reports.run import read_losses, read_samples
from zsnr.training.loggers import continue_loggers

ENTRY = {
    "prompt": "a cat",
    "sampler": "ddim",
    "num_steps": 10,
    "spacing": "trailing",
    "guidance_scale": 5.0,
    "guidance_rescale": 0.7,
}


def write_samples(folder, *entries):
    folder.mkdir(exist_ok=True)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_samples_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b.png", "a.png"):
        (tmp_path / name).write_bytes(tiny.png((9, 9, 9), (8, 6)))
    folder = write_samples(tmp_path, *({**ENTRY, "file": name} for name in ("b.png", "a.png")))
    samples = read_samples(folder)
    assert [sample["file"] for sample in samples] == ["a.png", "b.png"]
    assert samples[0]["image"].size == (8, 6)
    assert samples[0]["image"].getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"file": "../outside.png"}, "line 1: file='../outside.png': wanted a name in"),
        ({"file": 3}, "line 1: file=3: wanted what predict wrote"),
        ({"guidance_scale": "5"}, "guidance_scale='5'"),
        ({"prompt": None}, "prompt=None"),
        ({"file": "pipe.png"}, "pipe.png is no"),
        ({"file": "text.png"}, "text.png: .*readable"),
        ({"file": "missing.png"}, "missing.png"),
    ],
)
def test_a_manifest_that_predict_did_not_write_is_refused(tmp_path, changed, message):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("no image, although it is named so")
    (tmp_path / "a.png").write_bytes(tiny.png((9, 9, 9)))
    with pytest.raises(ValueError, match=message):
        read_samples(write_samples(tmp_path, {**ENTRY, "file": "a.png", **changed}))


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[1]", '{"file": "a", "file": "b"}'])
def test_a_manifest_without_entries_is_refused(tmp_path, text):
    (tmp_path / "manifest.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.jsonl"):
        read_samples(tmp_path)


def metrics(folder, text, version=0):
    path = folder / "metrics" / f"version_{version}" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    return path


def test_losses_of_all_versions_are_one_curve(tmp_path):
    os.utime(metrics(tmp_path, b"step,train/loss,val/loss\n0,1.5,\n9,1.0,\n"), (1, 1))
    metrics(tmp_path, b"val/loss,step,train/loss\n0.5,10,\n,9,0.9\n", 1)
    losses = read_losses(tmp_path / "metrics")
    assert losses == {"train/loss": [(0, 1.5), (9, 0.9)], "val/loss": [(10, 0.5)]}


@pytest.mark.parametrize(
    "text",
    [
        b"train/loss\n1.0\n",
        b"step,train/loss\nx,1.0\n",
        b"step,train/loss\n1,\x1b[31m\n",
        b"step,train/loss\n,1.0\n",
        b"step,train/loss\n1," + b"1" * 200_000 + b"\n",
        b"step,train/loss\n1,\xff\n",
    ],
)
def test_losses_that_are_damaged_are_refused_in_one_line(tmp_path, text):
    metrics(tmp_path, text)
    with pytest.raises(
        ValueError, match=r"metrics\.csv is not what the CSV logger writes"
    ) as error:
        read_losses(tmp_path / "metrics")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_a_giant_of_metrics_is_not_read(tmp_path):
    os.truncate(metrics(tmp_path, b"step,train/loss\n"), 3 << 30)
    with pytest.raises(ValueError, match="wanted at most"):
        read_losses(tmp_path / "metrics")


def test_a_log_goes_on_without_rows_that_are_no_steps(tmp_path):
    rows = "step,train/loss\n0,1.0\n\u00b2,1.0\n,1.0\n7,0.5,extra\n7\n8,0.4\nx\n"
    path = metrics(tmp_path, rows.encode())
    continue_loggers([CSVLogger(tmp_path, name="metrics")], 8)
    with open(path, newline="") as file:
        kept = list(csv.reader(file))
    assert kept == [["step", "train/loss"], ["0", "1.0"], ["7", "0.5"], ["7", ""]]


@pytest.mark.parametrize("damage", [b"\xff", b'"' + b"x" * 200_000, None])
def test_a_log_that_cannot_be_read_stays_and_another_is_begun(tmp_path, damage):
    path = metrics(tmp_path, b"step,train/loss\n0,1.0\n" + (damage or b""))
    if damage is None:
        os.truncate(path, 3 << 30)
    was = path.stat().st_size
    logger = CSVLogger(tmp_path, name="metrics")
    with pytest.warns(UserWarning, match="another file is begun"):
        continue_loggers([logger], 8)
    assert path.stat().st_size == was
    assert logger.version == 1


def test_only_folders_of_versions_are_gone_on_with(tmp_path):
    path = metrics(tmp_path, b"step,train/loss\n0,1.0\n")
    (tmp_path / "metrics" / "version_3").touch()
    (tmp_path / "metrics" / ("version_" + "9" * 30)).mkdir()
    logger = CSVLogger(tmp_path, name="metrics")
    continue_loggers([logger], 8)
    assert logger.version == 0
    assert path.read_bytes() == b"step,train/loss\r\n0,1.0\r\n"
