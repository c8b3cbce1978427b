"""The folder of a run: its newest checkpoint, and files in it that are damaged or hostile."""

import csv
import json
import os

import pytest
import tiny
import torch
from lightning.pytorch.loggers import CSVLogger

from zsnr.checkpoints.checkpoint_file import sampling_of
from zsnr.checkpoints.run_folder import find_last, resolve_model
from zsnr.doctor.examine import examine
from zsnr.interop.export import read_exportable
from zsnr.pipeline import TextToImage
from zsnr.reports.arms import Arm
from zsnr.reports.compare import check_models
from zsnr.reports.figures import draw_schedule
from zsnr.reports.run import read_losses, read_samples
from zsnr.training.lightning_cli import _resumed, _with_checkpoint
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


def write_checkpoints(folder, *names, sampling=None):
    """Write checkpoints that can be opened, without a model in them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ("codec", "conditioner", "network", "schedule", "prediction_type", "image_size")
    content = {"zsnr": dict.fromkeys(parts), "state_dict": {"a": torch.zeros(1)}}
    for name in names:
        steps = {"num_steps": int(name.split("-")[-1].removesuffix(".ckpt"))} if "-" in name else {}
        torch.save({**content, "run": {"sampling": steps}}, folder / name)


def test_a_run_stands_for_its_newest_checkpoint_that_can_be_read(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    write_checkpoints(folder, "step-9.ckpt", "step-10.ckpt", "step-100.ckpt")
    (folder / "last.ckpt").symlink_to("step-100.ckpt")
    for source in (run, folder, f"{run}/"):
        assert resolve_model(source) == str(folder / "step-100.ckpt")
        assert sampling_of(str(source)) == {"num_steps": 100}
    (folder / "step-100.ckpt").write_bytes(b"half")
    for source in (run, folder):
        with pytest.warns(
            UserWarning, match=r"step-100\.ckpt .* Looking for an earlier one"
        ) as told:
            assert resolve_model(source) == str(folder / "step-10.ckpt")
        assert len(told) == 1  # last.ckpt is the same file
    for path in folder.glob("step-*"):
        path.write_bytes(b"half")
    with (
        pytest.warns(UserWarning, match="Looking for an earlier one"),
        pytest.raises(ValueError, match=r"No checkpoint in .* can be read: .*step-100\.ckpt"),
    ):
        resolve_model(run)


def test_only_the_first_process_tells_of_damaged_checkpoints(tmp_path, monkeypatch, recwarn):
    write_checkpoints(tmp_path, "step-1.ckpt")
    (tmp_path / "step-2.ckpt").write_bytes(b"half")
    monkeypatch.setenv("RANK", "1")
    assert find_last(tmp_path) == tmp_path / "step-1.ckpt"
    assert not recwarn.list


def test_what_is_not_the_folder_of_a_run_keeps_its_name(tmp_path, monkeypatch):
    write_checkpoints(tmp_path / "exported", "step-1.ckpt")
    (tmp_path / "exported" / "model_index.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    write_checkpoints(tmp_path, "a.ckpt")
    names = ["exported", "empty", "a.ckpt", "missing", "owner/name", "a.safetensors"]
    monkeypatch.chdir(tmp_path)
    assert [resolve_model(name) for name in names] == names
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/a.ckpt") == str(tmp_path / "a.ckpt")


def test_last_ckpt_counts_where_it_is_no_link_to_another(tmp_path):
    write_checkpoints(tmp_path / "a", "last.ckpt")
    assert resolve_model(tmp_path / "a") == str(tmp_path / "a" / "last.ckpt")
    write_checkpoints(tmp_path / "a", "step-1.ckpt")  # beside a copy of an older one
    assert resolve_model(tmp_path / "a") == str(tmp_path / "a" / "step-1.ckpt")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "last.ckpt").symlink_to(tmp_path / "a" / "step-1.ckpt")
    assert find_last(tmp_path / "b") == tmp_path / "b" / "last.ckpt"
    (tmp_path / "a" / "step-1.ckpt").unlink()
    assert find_last(tmp_path / "b") is None


@pytest.mark.filterwarnings("ignore:.*Looking for an earlier one")
def test_every_reader_of_a_run_means_the_same_checkpoint(tmp_path, monkeypatch):
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    write_checkpoints(folder, "step-1.ckpt", "step-2.ckpt")
    (folder / "step-3.ckpt").write_bytes(b"half")
    wanted = str(folder / "step-2.ckpt")
    opened = []

    def note(path, *rest, **options):
        opened.append(str(path))
        raise NotImplementedError

    for name in (
        *("zsnr.interop.models.read_checkpoint", "zsnr.reports.figures.open_checkpoint"),
        *("zsnr.interop.export.open_checkpoint", "zsnr.reports.compare.open_checkpoint"),
        "zsnr.training.lightning_cli.checkpoint_config",
    ):
        monkeypatch.setattr(name, note)
    for reader in (
        lambda: TextToImage.from_pretrained(run),
        lambda: draw_schedule(str(run), 5, tmp_path / "figure.png"),
        lambda: check_models(Arm(models=(str(run),))),
        lambda: read_exportable(resolve_model(run)),
        lambda: _with_checkpoint("predict", ["--ckpt_path", str(run)]),
    ):
        with pytest.raises(NotImplementedError):
            reader()
    assert opened == [wanted] * 5
    assert _resumed(str(run), folder) == _resumed("last", folder) == wanted


def test_fit_alone_begins_where_there_is_no_checkpoint(tmp_path):
    assert _resumed("last", tmp_path / "checkpoints") is None
    assert _resumed(None, tmp_path / "checkpoints") is None
    assert _resumed(str(tmp_path), tmp_path / "checkpoints") == str(tmp_path)  # refused when opened


def test_the_doctor_takes_the_newest_checkpoint_by_name_and_opens_none(tmp_path):
    write_checkpoints(tmp_path / "checkpoints", "step-1.ckpt")
    (tmp_path / "checkpoints" / "step-2.ckpt").write_bytes(b"half")
    assert "step-2.ckpt has no run.json beside it" in examine(tmp_path).reason
    assert "step-2.ckpt" in examine(tmp_path, open_pickle=True).reason
