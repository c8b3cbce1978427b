"""What a run's loggers show, read back from their files."""

import csv
import io
import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from lightning.pytorch.loggers import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)

from zsnr import EmpiricalDenoiser, NoiseSchedule, to_v
from zsnr.cli import main
from zsnr.metrics.luma import mean_luma
from zsnr.metrics.terminal import TerminalOptimum
from zsnr.training.board import OPTIMUM, charts
from zsnr.training.facts import public_config

TRAIN, VAL = 11, 4  # pictures; picture i is grey level i


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The least loss of the last timestep


@pytest.mark.parametrize("splits", [[10], [1, 9], [3, 3, 4]])
def test_optimum_is_the_unbiased_variance_around_the_mean_picture(splits):
    mean, std = 5 + noise(10, 3, 4, 6), noise(10, 3, 4, 6, seed=1).abs()
    optimum = TerminalOptimum()
    for mu, s in zip(mean.split(splits), std.split(splits), strict=True):
        optimum.add(mu, s)
    wanted = mean.var(0).mean() + std.square().mean()
    assert optimum.value() == pytest.approx(float(wanted), rel=1e-10)


def test_optimum_of_several_shapes_shares_the_degrees_of_freedom():
    tall, wide, lone = noise(4, 2, 6, 3), 2 * noise(7, 2, 3, 4, seed=1), noise(1, 2, 5, 5)
    optimum = TerminalOptimum()
    for part in (tall, wide, lone):
        optimum.add(part, torch.zeros_like(part))
    squares = sum(float((part - part.mean(0)).square().sum()) for part in (tall, wide))
    assert optimum.value() == pytest.approx(squares / (3 * 36 + 6 * 24), rel=1e-10)


def test_optimum_without_two_pictures_is_unknown():
    optimum = TerminalOptimum()
    assert optimum.value() is None
    optimum.add(noise(1, 2, 3, 3), noise(1, 2, 3, 3).abs())
    assert optimum.value() is None


def test_the_exact_denoiser_has_that_loss_at_the_last_timestep():
    images, schedule = noise(6, 3, 4, 4), NoiseSchedule()
    optimum = TerminalOptimum()
    optimum.add(images, torch.zeros_like(images))
    x_T, t = noise(6, 3, 4, 4, seed=1), torch.full((6,), 999)
    scales = schedule(t)
    output = to_v(EmpiricalDenoiser(schedule, images)(x_T, t), x_T, *scales, "sample")
    target = to_v(images, x_T, *scales, "sample")
    loss = (output - target).square().mean()  # of the data it was fitted to: biased
    assert float(loss) * 6 / 5 == pytest.approx(optimum.value(), rel=1e-10)


# A run


def config(folder, **trainer):
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "log_every_n_steps": 1,
            "val_check_interval": 2,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder / "run"),
            "callbacks": [
                {
                    "class_path": "zsnr.training.Previews",
                    "init_args": {
                        "prompts": ["grey 3", "", "grey 1"],
                        "every_n_steps": 2,
                        "columns": 2,
                    },
                }
            ],
            **trainer,
        },
        "checkpoint": {"every_n_train_steps": 2},
        "model": {**tiny.MODEL, "sampling": {"num_steps": 3}},
        "data": {
            "train": f"{folder}/shards/train-*.tar",
            "val": f"{folder}/shards/val-*.tar",
            "image_size": 16,
            "batch_size": 4,
            "num_workers": 0,
        },
    }


def fit(folder, *options, **trainer):
    (folder / "config.yaml").write_text(yaml.safe_dump(config(folder, **trainer)))
    assert main(["fit", "-c", str(folder / "config.yaml"), *options]) == 0


def events(folder):
    keep_all = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    read = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance=keep_all)
    read.Reload()
    return read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of four steps that was stopped after three, resumed from the second."""
    folder = tmp_path_factory.mktemp("board")
    tiny.write_shards(folder / "shards", [6, TRAIN - 6])
    tiny.write_shards(folder / "shards", [VAL], "val")
    fit(folder, max_steps=3)
    checkpoints = folder / "run" / "checkpoints"
    fit(folder, "--ckpt_path", str(checkpoints / "step-00000002.ckpt"))
    return folder


@pytest.fixture(scope="module")
def board(folder):
    return events(folder)


def steps(board, name):
    return [event.step for event in board.Scalars(name)]


@pytest.mark.filterwarnings("ignore:The run resumes from step")
def test_scalars_are_there_once_a_step(board):
    always = ("loss", "grad_norm", "learning_rate", "images_per_second", "terminal_exposures")
    for name in [*(f"train/{name}" for name in always), OPTIMUM, "luma_mean/data"]:
        assert steps(board, name) == [0, 1, 2, 3], name
    for name in ("val/loss", "val_by_timestep/t0999", "luma_mean/previews"):
        assert steps(board, name) == [1, 3], name


def levels(count):
    """Pixels of the training pictures, -1 to 1, as 8 bits hold them."""
    return torch.arange(count).double() / 127.5 - 1


def test_constant_lines_are_those_of_the_data(board):
    variance = float(levels(TRAIN).var())  # pixels, each picture flat
    assert {round(event.value, 9) for event in board.Scalars(OPTIMUM)} == {round(variance, 9)}
    mean = float(levels(TRAIN).mean())
    for event in board.Scalars("luma_mean/data"):
        assert event.value == pytest.approx(mean, abs=1e-6)


def test_csv_has_the_same_scalars(folder, board):
    with open(folder / "run" / "metrics" / "version_0" / "metrics.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    for name in ("train/loss", OPTIMUM, "train/learning_rate", "luma_mean/previews"):
        mine = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        theirs = [(event.step, event.value) for event in board.Scalars(name)]
        assert mine == [(step, pytest.approx(value, rel=1e-6)) for step, value in theirs]


def test_pictures(folder, board):
    shown = board.Images("previews")
    assert [(event.step, event.width, event.height) for event in shown] == [
        (step, 2 * 18 - 2, 2 * 18 - 2) for step in (1, 3)
    ]
    written = Image.open(folder / "run" / "previews" / "step-00000004.png")
    assert Image.open(io.BytesIO(shown[1].encoded_image_string)).tobytes() == written.tobytes()
    [schedule] = board.Images("schedule")
    assert schedule.step == 0
    assert min(schedule.width, schedule.height) > 400


def test_histograms_count_pictures_and_pixels(folder, board):
    for name, number, at in (("data", TRAIN, [0]), ("previews", 3, [1, 3])):
        for group, count in (("pictures", number), ("pixels", number * 256)):
            found = board.Histograms(f"luma_of_{group}/{name}")
            assert [event.step for event in found] == at
            for event in found:
                value = event.histogram_value
                assert sum(value.bucket) == value.num == count
                assert (value.min, value.max) == (-1, 1)
    [data] = board.Histograms("luma_of_pictures/data")  # all of them are nearly black
    assert data.histogram_value.sum / TRAIN == pytest.approx(float(levels(TRAIN).mean()), abs=1e-6)
    edge = -1 + 2 / 30
    below = int((levels(TRAIN) < edge).sum())
    assert data.histogram_value.bucket[:2] == [below, TRAIN - below]
    grid = Image.open(folder / "run" / "previews" / "step-00000004.png").convert("RGB")
    last = board.Histograms("luma_of_pictures/previews")[-1].histogram_value
    pictures = [pixels(grid.crop((x, y, x + 16, y + 16))) for x, y in ((0, 0), (18, 0), (0, 18))]
    wanted = float(mean_luma(torch.stack(pictures)).sum())
    assert last.sum == pytest.approx(wanted, abs=1e-5)
    assert board.Scalars("luma_mean/previews")[-1].value == pytest.approx(wanted / 3, abs=1e-5)


def pixels(image):
    data = torch.tensor(list(image.tobytes()), dtype=torch.float64)
    return data.view(16, 16, 3).permute(2, 0, 1) / 127.5 - 1


def text(event):
    return event.tensor_proto.string_val[0].decode()


def test_the_config_is_text_and_runs_again(folder, board, tmp_path):
    found = board.Tensors("config/text_summary")
    assert [event.step for event in found] == [0, 2]  # max_steps changed on the way
    last = text(found[-1])
    assert last.startswith("```yaml\n")
    assert last.endswith("\n```")
    values = yaml.safe_load(last.removeprefix("```yaml\n").removesuffix("\n```"))
    assert values["trainer"]["max_steps"] == 4
    assert values["board"] == {"samples": 256}
    assert "ckpt_path" not in values
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", str(tmp_path / "again.yaml"), "--print_config"])
    assert end.value.code == 0


def test_hyperparameters_stand_beside_logged_metrics(folder, board):
    from tensorboard.plugins.hparams import metadata

    plugin = board.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(plugin["_hparams_/session_start_info"])
    values = dict(start.hparams.items())
    used = [values[f"sampling.{name}"].string_value for name in ("sampler", "spacing")]
    assert used == ["multiscale", "guided"]  # what auto stands for with 3 steps
    assert values["batch_size"].number_value == 4
    assert values["schedule.betas"].string_value == "scaled_linear"
    assert values["schedule.zero_terminal_snr"].number_value == 1
    assert values["sampling.guidance_rescale"].number_value == 0.7
    experiment = metadata.parse_experiment_plugin_data(plugin["_hparams_/experiment"])
    metrics = {metric.name.tag for metric in experiment.metric_infos}
    assert metrics == {"val/loss", "train/loss", "train_by_timestep/terminal"}
    assert {"val/loss", "train/loss"} <= {*board.Tags()["scalars"]}


def test_charts_of_several_curves_find_their_tags(board):
    import re

    from tensorboard.plugins.custom_scalar import layout_pb2

    [event] = board.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    found = {
        chart.title: {
            tag
            for tag in board.Tags()["scalars"]
            for pattern in chart.multiline.tag
            if re.search(pattern, tag)
        }
        for category in layout.category
        for chart in category.chart
    }
    assert found.keys() == {title for group in charts(1000).values() for title in group}
    assert found["training, by timestep"] == {
        f"train_by_timestep/t{start:04d}_{start + 249:04d}" for start in (0, 250, 500, 750)
    }
    assert {OPTIMUM, "val_by_timestep/t0999"} <= found["last timestep; its least without prompts"]
    assert found["mean, of -1 to 1"] == {"luma_mean/data", "luma_mean/previews"}


@pytest.mark.filterwarnings("ignore:The run resumes from step")
def test_a_resumed_run_shows_nothing_twice(folder, tmp_path):
    """Same settings: only scalars go on."""
    tiny.write_shards(tmp_path / "shards", [6])
    tiny.write_shards(tmp_path / "shards", [2], "val")
    fit(tmp_path)
    before = events(tmp_path)
    fit(tmp_path, "--ckpt_path", str(tmp_path / "run" / "checkpoints" / "step-00000002.ckpt"))
    after = events(tmp_path)
    for name in before.Tags()["images"]:
        assert [e.step for e in after.Images(name)] == [e.step for e in before.Images(name)]
    for name in before.Tags()["histograms"]:
        assert [e.step for e in after.Histograms(name)] == [e.step for e in before.Histograms(name)]
    assert [event.step for event in after.Tensors("config/text_summary")] == [0]
    assert steps(after, "train/loss") == [0, 1, 2, 3]


def test_a_run_that_left_no_checkpoint_is_forgotten(tmp_path):
    tiny.write_shards(tmp_path / "shards", [6])
    more = ["--data.val", "null", "--trainer.callbacks", "null"]
    fit(tmp_path, *more, max_steps=2)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.unlink()
    fit(tmp_path, *more, max_steps=1)
    assert steps(events(tmp_path), "train/loss") == [0]


def scalars(board, name):
    return [event.value for event in board.Scalars(name)]


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["--board.samples", "0"], set()),
        (["--board.samples", "1"], {"luma_mean/data"}),  # one picture has no variance
        (["--model.schedule.zero_terminal_snr", "false"], {"luma_mean/data"}),
        (["--model.loss.name", "snr_plus_one"], {OPTIMUM, "luma_mean/data"}),
    ],
)
def test_lines_are_only_where_they_are_true(tmp_path, options, lines):
    tiny.write_shards(tmp_path / "shards", [6])
    more = ["--data.val", "null", "--trainer.callbacks", "null", *options]
    fit(tmp_path, *more, max_steps=1)
    tags = set(events(tmp_path).Tags()["scalars"])
    assert tags & {OPTIMUM, "luma_mean/data"} == lines


def test_samples_are_spread_over_the_data(tmp_path):
    tiny.write_shards(tmp_path / "shards", [6, 5])
    more = ["--data.val", "null", "--trainer.callbacks", "null", "--board.samples", "4"]
    fit(tmp_path, *more, max_steps=1)
    rows = torch.tensor([0, 2, 5, 8])  # i 11 // 4
    [value] = scalars(events(tmp_path), OPTIMUM)
    assert value == pytest.approx(float((rows.double() / 127.5 - 1).var()), rel=1e-5)


def test_a_command_is_measured_and_not_shown(tmp_path):
    tiny.write_shards(tmp_path / "shards", [6])
    tiny.write_shards(tmp_path / "shards", [3], "val")
    source = ["--data.train", f"pipe:cat {tmp_path}/shards/train-000000.tar"]
    local = ["--data.local_cache.folder", str(tmp_path / "local")]
    fit(tmp_path, *source, *local, "--trainer.callbacks", "null", max_steps=1)
    board = events(tmp_path)
    assert scalars(board, OPTIMUM) == [pytest.approx(float(levels(6).var()), rel=1e-5)]
    assert "train: pipe:...\n" in text(board.Tensors("config/text_summary")[0])


@pytest.mark.parametrize("previews", [True, False])
def test_a_cache_has_the_optimum_of_its_pictures(tmp_path, previews):
    tiny.write_shards(tmp_path / "shards", [5])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(tmp_path)))
    cache = ["data", "cache", "-c", str(tmp_path / "config.yaml"), "--output"]
    assert main([*cache, str(tmp_path / "cache"), "--dtype", "float32"]) == 0
    more = ["--data.train", str(tmp_path / "cache"), "--data.val", "null"]
    more += [] if previews else ["--trainer.callbacks", "null"]
    fit(tmp_path, *more, max_steps=1)
    board = events(tmp_path)
    assert scalars(board, OPTIMUM) == [pytest.approx(float(levels(5).var()), rel=1e-4)]
    assert ("luma_mean/data" in board.Tags()["scalars"]) == previews  # else nothing is decoded


class Recorder(Logger):
    """A logger like W&B's: pictures and settings by its own methods."""

    name, version, save_dir = "recorder", 0, None

    def __init__(self, file):
        super().__init__()
        self.file = Path(file)
        self.save_dir = str(self.file.parent)

    def _write(self, kind, **what):
        with open(self.file, "a") as lines:
            lines.write(json.dumps({"kind": kind, **what}) + "\n")

    def log_metrics(self, metrics, step=None):
        self._write("metrics", names=sorted(metrics), step=step)

    def log_hyperparams(self, params):
        self._write("settings", batch_size=params["batch_size"])

    def log_image(self, key, images, step):
        self._write("image", key=key, sizes=[image.size for image in images], step=step)


def test_other_loggers_get_pictures_settings_and_scalars(tmp_path, monkeypatch):
    tiny.write_shards(tmp_path / "shards", [6])
    logger = {"class_path": "test_board.Recorder", "init_args": {"file": f"{tmp_path}/log"}}
    fit(tmp_path, "--data.val", "null", max_steps=2, logger=logger)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["batch_size"] for line in lines if line["kind"] == "settings"] == [4]
    pictures = [(line["key"], line["step"]) for line in lines if line["kind"] == "image"]
    assert pictures == [("schedule", 0), ("previews", 1)]
    names = {name for line in lines if line["kind"] == "metrics" for name in line["names"]}
    assert {"luma_mean/previews", "luma_mean/data", OPTIMUM, "train/learning_rate"} <= names


def test_a_config_for_all_to_see_has_no_secrets():
    shown = public_config(
        yaml.safe_dump(
            {
                "train": [
                    {"path": "https://me:secret@host/{000..009}.tar?signature=secret", "weight": 2},
                    "pipe:aws s3 cp s3://bucket/0.tar - --token secret",
                ],
                "n": 3,
                "none": None,
            }
        )
    )
    assert yaml.safe_load(shown) == {
        "train": [{"path": "https://host/{000..009}.tar", "weight": 2}, "pipe:..."],
        "n": 3,
        "none": None,
    }
