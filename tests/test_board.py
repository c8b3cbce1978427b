"""What a run's loggers show, read back from their files."""

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

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
from zsnr.training.board import COMPARED, LOWER_BOUND, MEAN_LUMA, VARIANCE, chart_layout
from zsnr.training.facts import public_config
from zsnr.training.guard import sums_by_group
from zsnr.training.previews import captioned
from zsnr.training.progress import Progress
from zsnr.training.tags import TERMINAL, description, tag_table

COUNT = "train/terminal_exposures"
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
    with pytest.warns(UserWarning, match="The run resumes from step 2; step-00000003"):
        fit(folder, "--ckpt_path", str(checkpoints / "step-00000002.ckpt"))
    return folder


@pytest.fixture(scope="module")
def board(folder):
    return events(folder)


def steps(board, name):
    return [event.step for event in board.Scalars(name)]


def test_scalars_are_there_once_a_step(board):
    always = ("loss", "grad_norm", "learning_rate", "images_per_second", "terminal_exposures")
    for name in always:
        assert steps(board, f"train/{name}") == [0, 1, 2, 3], name
    for name in ("val/loss", "val_by_timestep/t0999", "luma_mean/previews"):
        assert steps(board, name) == [1, 3], name


def test_every_tag_is_described_and_none_is_constant(board):
    for kind, dashboard in (("scalars", "Scalars"), ("images", "Images")):
        for tag in board.Tags()[kind]:
            assert description(dashboard, tag), tag
    for tag in board.Tags()["histograms"]:
        assert description("Histograms", tag), tag
    texts = {tag.removesuffix("/text_summary") for tag in board.Tags()["tensors"]}
    texts -= {"custom_scalars__config__"}
    assert texts == {"config", "data", "tags"}
    assert text(board.Tensors("tags/text_summary")[0]) == tag_table()
    for name in ("train/loss", "val_by_timestep/t0999", "luma_mean_by_group/snow_white"):
        assert description("Scalars", name), name
    for name in ("epoch", "luma_mean/data", "train/loss/2", "val_by_timestep/"):
        assert description("Scalars", name) is None, name


def constants(board):
    """The constants of the data, as the text shows them."""
    if "data/text_summary" not in board.Tags()["tensors"]:
        return {}
    [event] = board.Tensors("data/text_summary")
    rows = [line.strip("| ").split(" | ") for line in text(event).splitlines()[2:]]
    return {name: float(value) for name, value in rows}


def levels(count):
    """Pixels of the training images, -1 to 1, as 8 bits hold them."""
    return torch.arange(count).double() / 127.5 - 1


def test_constants_are_those_of_the_data(board):
    variance = float(levels(TRAIN).var())  # pixels, each image flat
    assert constants(board) == {
        VARIANCE: pytest.approx(variance, rel=1e-3),
        LOWER_BOUND: pytest.approx(variance, rel=1e-3),
        MEAN_LUMA: pytest.approx(float(levels(TRAIN).mean()), rel=1e-3),
    }


def test_csv_has_the_same_scalars(folder, board):
    with open(folder / "run" / "metrics" / "version_0" / "metrics.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    for name in ("train/loss", "val/loss", "train/learning_rate", "luma_mean/previews"):
        mine = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        theirs = [(event.step, event.value) for event in board.Scalars(name)]
        assert mine == [(step, pytest.approx(value, rel=1e-6)) for step, value in theirs]


SIDE, TILE = 128, 128 + 3 * 16  # of an enlarged preview, and with its two lines of text


def test_previews_stand_over_their_prompts_and_seeds(folder, board):
    shown = board.Images("previews")
    assert [(event.step, event.width, event.height) for event in shown] == [
        (step, 2 * SIDE + 8, 2 * TILE + 8) for step in (1, 3)
    ]
    written = Image.open(folder / "run" / "previews" / "step-00000004.png")
    assert Image.open(io.BytesIO(shown[1].encoded_image_string)).tobytes() == written.tobytes()
    below = [written.crop((x, y + SIDE, x + SIDE, y + TILE)) for x, y in corners()]
    for i, prompt in enumerate(["grey 3", "", "grey 1"]):
        wanted = captioned(Image.new("RGB", (16, 16)), prompt, i).crop((0, SIDE, SIDE, TILE))
        assert below[i].tobytes() == wanted.tobytes()
        assert below[i].convert("L").getextrema()[0] < 50  # some of it is text


def corners():
    return [(0, 0), (SIDE + 8, 0), (0, TILE + 8)]


def test_captions_fit_any_prompt():
    for width, prompt in (
        (16, "x" * 500),
        (64, "a b " * 99),
        (512, "a\nb\x1b[31m"),
        (1024, "\u732b"),
    ):
        tile = captioned(Image.new("RGB", (width, width)), prompt, 2**63)
        assert tile.width >= 128
        assert tile.height <= 2 * tile.width


def test_the_schedule_is_shown(board):
    [schedule] = board.Images("schedule")
    assert schedule.step == 0
    assert min(schedule.width, schedule.height) > 400


def test_histograms_count_images_and_pixels(folder, board):
    for name, number, at in (("data", TRAIN, [0]), ("previews", 3, [1, 3])):
        for group, count in (("images", number), ("pixels", number * 256)):
            found = board.Histograms(f"luma_of_{group}/{name}")
            assert [event.step for event in found] == at
            for event in found:
                value = event.histogram_value
                assert sum(value.bucket) == value.num == count
                assert (value.min, value.max) == (-1, 1)
    [data] = board.Histograms("luma_of_images/data")  # all of them are nearly black
    assert data.histogram_value.sum / TRAIN == pytest.approx(float(levels(TRAIN).mean()), abs=1e-6)
    edge = -1 + 2 / 30
    below = int((levels(TRAIN) < edge).sum())
    assert data.histogram_value.bucket[:2] == [below, TRAIN - below]
    grid = Image.open(folder / "run" / "previews" / "step-00000004.png").convert("RGB")
    last = board.Histograms("luma_of_images/previews")[-1].histogram_value
    images = [pixels(grid.crop((x, y, x + SIDE, y + SIDE))) for x, y in corners()]
    wanted = float(mean_luma(torch.stack(images)).sum())
    assert last.sum == pytest.approx(wanted, abs=1e-5)
    assert board.Scalars("luma_mean/previews")[-1].value == pytest.approx(wanted / 3, abs=1e-5)


def pixels(image):
    data = torch.tensor(list(image.tobytes()), dtype=torch.float64)
    return data.view(SIDE, SIDE, 3).permute(2, 0, 1) / 127.5 - 1


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


def test_hyperparameters_stand_beside_logged_metrics(board):
    from tensorboard.plugins.hparams import metadata

    plugin = board.PluginTagToContent("hparams")
    start = metadata.parse_session_start_info_plugin_data(plugin["_hparams_/session_start_info"])
    values = dict(start.hparams.items())
    used = [values[f"sampling.{name}"].string_value for name in ("sampler", "spacing")]
    assert used == ["multiscale", "guided"]  # what auto stands for with 3 steps
    assert values["batch_size"].number_value == 4
    assert values["schedule.zero_terminal_snr"].number_value == 1
    assert values["sampling.guidance_rescale"].number_value == 0.7
    experiment = metadata.parse_experiment_plugin_data(plugin["_hparams_/experiment"])
    columns = [info.name for info in experiment.hparam_infos]
    assert columns == list(COMPARED)
    assert columns[:4] == [
        *("learning_rate", "batch_size"),
        *("schedule.zero_terminal_snr", "prediction_type"),
    ]
    metrics = {metric.name.tag for metric in experiment.metric_infos}
    assert metrics == {"val/loss", "train/loss", TERMINAL}
    assert {"val/loss", "train/loss"} <= {*board.Tags()["scalars"]}


def layout(board):
    """{title of a chart: the scalars that it finds}, as they stand."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    [event] = board.Tensors("custom_scalars__config__")
    charts = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    scalars = board.Tags()["scalars"]
    return {
        chart.title: [
            [tag for tag in scalars if re.search(pattern, tag)] for pattern in chart.multiline.tag
        ]
        for category in charts.category
        for chart in category.chart
    }


def test_charts_find_their_curves(board):
    charts = layout(board)
    bound, mean = levels(TRAIN).var(), levels(TRAIN).mean()
    last = f"last timestep (lower bound without prompts: {bound:.3g})"
    luma = f"mean, -1 black to 1 white (training images: {mean:.3g})"
    quarters = [f"train_by_timestep/t{i:04d}_{i + 249:04d}" for i in (0, 250, 500, 750)]
    wanted = {
        "all timesteps": ["train/loss", "val/loss", "val/loss_raw"],
        last: [TERMINAL, "val_by_timestep/t0999"],
        "training, by quarter of the timesteps": quarters,
        "gradient at the output, by quarter of the timesteps": [
            each.replace("train", "output_gradient") for each in quarters
        ],
        "validation, t0099 to t0499": [f"val_by_timestep/t0{i}99" for i in range(5)],
        "validation, t0599 to t0999": [f"val_by_timestep/t0{i}99" for i in range(5, 10)],
        luma: ["luma_mean/previews"],
    }
    assert charts.keys() == wanted.keys()
    there = {*board.Tags()["scalars"]}
    for title, tags in wanted.items():
        assert len(charts[title]) == len(tags) <= 5
        # no sample has drawn the last timestep, and four are validated
        assert charts[title] == [[tag] if tag in there else [] for tag in tags], title
    assert charts["all timesteps"] == [[tag] for tag in wanted["all timesteps"]]


def test_sources_buckets_and_learned_weights_have_charts():
    names = ["source/a.b", "source/a-b", *(f"bucket/{8 * i}x8" for i in range(1, 7))]
    data = SimpleNamespace(val=None, loss_groups=names)
    unset = dict.fromkeys(["converted_start", "ema_config", "watcher"])
    module = SimpleNamespace(schedule=NoiseSchedule(), learned_weight=object(), **unset)
    charts = chart_layout(SimpleNamespace(callbacks=[], datamodule=data), module, {})["loss"]
    tags = [f"loss_by_{name}" for name in names]
    assert all(description("Scalars", tag) for tag in (*tags, "loss_weight/t0999"))
    found = {
        title: [n for n in tags for p in curves[1] if re.search(p, n)]
        for title, curves in charts.items()
    }
    assert found["training, by source"] == tags[:2]
    assert found["training, by bucket, part 1"] == tags[2:7]
    assert found["training, by bucket, part 2"] == tags[7:]
    weights = [curves[1] for title, curves in charts.items() if title.startswith("learned weight")]
    assert [len(curves) for curves in weights] == [5, 5]


# The loss of the last timestep


def exposures(*steps, window, **state):
    """Progress after steps of (loss, timestep) each."""
    progress = Progress(1000, window, **state)
    for step in steps:
        losses, t = zip(*step, strict=True)
        sums = sums_by_group(torch.tensor(losses), torch.tensor(t), 1000)
        progress.add(*[part.tolist() for part in sums])
    return progress


@pytest.mark.parametrize("resumed", [False, True])
def test_the_terminal_loss_is_a_mean_over_the_last_exposures(resumed):
    random = torch.Generator().manual_seed(0)
    t = torch.randint(996, 1000, (40, 1), generator=random)
    losses = torch.rand(40, 1, generator=random, dtype=torch.float64)
    steps = [[*zip(a.tolist(), b.tolist(), strict=True)] for a, b in zip(losses, t, strict=True)]
    terminal = losses[t == 999].tolist()
    progress = exposures(window=4)
    for i, step in enumerate(steps):
        state = json.loads(json.dumps(progress.state())) if resumed else progress.state()
        progress = exposures(step, window=4, **state)
        seen = losses[: i + 1][t[: i + 1] == 999].tolist()
        assert progress.terminal == len(seen)
        mean = progress.means().get(TERMINAL)
        assert mean == (pytest.approx(sum(seen[-4:]) / len(seen[-4:]), rel=1e-6) if seen else None)
    assert len(terminal) > 8
    assert len(progress.exposures) == 4  # no more than it needs


def test_the_ranks_sums_add_up():
    losses, t = torch.arange(6.0), torch.tensor([999, 3, 999, 999, 500, 998])
    parts = [sums_by_group(losses[part], t[part], 1000) for part in (slice(0, 2), slice(2, 6))]
    for whole, *shares in zip(sums_by_group(losses, t, 1000), *parts, strict=True):
        assert torch.equal(whole, sum(shares))


def test_steps_of_several_exposures_count_whole():
    first, second = [(1.0, 999), (2.0, 999), (9.0, 5)], [(6.0, 999), (0.0, 999), (0.0, 999)]
    progress = exposures(first, second, window=4)
    assert progress.means()[TERMINAL] == pytest.approx(9 / 5)  # three alone are too few
    progress = exposures(first, second, window=3)
    assert progress.means()[TERMINAL] == pytest.approx(2)
    assert (progress.terminal, progress.means()) == (5, {TERMINAL: pytest.approx(2)})
    progress = exposures(first, second, window=10)
    assert progress.means() == {
        TERMINAL: pytest.approx(9 / 5),
        "train_by_timestep/t0000_0249": 9.0,
    }


@pytest.mark.filterwarnings("ignore:The run resumes from step")
def test_a_resumed_run_shows_nothing_twice(folder, tmp_path):
    """Same settings: only scalars are logged again, with the same values."""
    tiny.write_shards(tmp_path / "shards", [6])
    tiny.write_shards(tmp_path / "shards", [2], "val")
    options = ["--model.schedule.num_timesteps", "4", "--model.terminal_window", "3"]
    fit(tmp_path, *options)
    before = events(tmp_path)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-00000002.ckpt")
    fit(tmp_path, *options, "--ckpt_path", checkpoint)
    after = events(tmp_path)
    terminal, exposed = ([e.value for e in after.Scalars(name)] for name in (TERMINAL, COUNT))
    assert terminal == pytest.approx([e.value for e in before.Scalars(TERMINAL)], rel=1e-6)
    assert exposed == [1, 2, 3, 4]  # a batch of four on four timesteps
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


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--board.samples", "0"], set()),
        (["--board.samples", "1"], {MEAN_LUMA}),  # one image has no variance
        (["--model.schedule.zero_terminal_snr", "false"], {MEAN_LUMA, VARIANCE}),
        (["--model.loss.name", "snr_plus_one"], {MEAN_LUMA, VARIANCE, LOWER_BOUND}),
    ],
)
def test_constants_are_only_where_they_are_true(tmp_path, options, names):
    tiny.write_shards(tmp_path / "shards", [6])
    more = ["--data.val", "null", "--trainer.callbacks", "null", *options]
    fit(tmp_path, *more, max_steps=1)
    board = events(tmp_path)
    assert constants(board).keys() == names
    titles = ["all timesteps", "last timestep", "training, by quarter of the timesteps"]
    titles.append("gradient at the output, by quarter of the timesteps")
    assert [title.partition(" (")[0] for title in layout(board)] == titles  # no empty charts


def test_samples_are_spread_over_the_data(tmp_path):
    tiny.write_shards(tmp_path / "shards", [6, 5])
    more = ["--data.val", "null", "--trainer.callbacks", "null", "--board.samples", "4"]
    fit(tmp_path, *more, max_steps=1)
    rows = torch.tensor([0, 2, 5, 8])  # i 11 // 4
    variance = float((rows.double() / 127.5 - 1).var())
    assert constants(events(tmp_path))[VARIANCE] == pytest.approx(variance, rel=1e-3)


def test_a_command_is_measured_and_not_shown(tmp_path):
    tiny.write_shards(tmp_path / "shards", [6])
    tiny.write_shards(tmp_path / "shards", [3], "val")
    source = ["--data.train", f"pipe:cat {tmp_path}/shards/train-000000.tar"]
    local = ["--data.local_cache.folder", str(tmp_path / "local")]
    fit(tmp_path, *source, *local, "--trainer.callbacks", "null", max_steps=1)
    board = events(tmp_path)
    assert constants(board)[LOWER_BOUND] == pytest.approx(float(levels(6).var()), rel=1e-3)
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
    assert constants(board)[LOWER_BOUND] == pytest.approx(float(levels(5).var()), rel=1e-3)
    assert (MEAN_LUMA in constants(board)) == previews  # else nothing is decoded


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
    assert {"luma_mean/previews", "train/loss", "train/learning_rate"} <= names
    assert "epoch" not in names


class Unreachable(Recorder):
    """A logger that asks its server even for its name, as MLflow's does; nobody answers."""

    tries = 0

    @property
    def name(self):
        return self.experiment

    @property
    def experiment(self):
        Unreachable.tries += 1
        raise ConnectionError("nobody answers")

    def log_metrics(self, metrics, step=None):
        self.experiment.log(metrics)


def test_a_server_that_cannot_be_reached_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.setattr("zsnr.files._WARNED", set())
    monkeypatch.setattr(Unreachable, "tries", 0)
    tiny.write_shards(tmp_path / "shards", [6])
    logger = {"class_path": "test_board.Unreachable", "init_args": {"file": f"{tmp_path}/log"}}
    with pytest.warns(UserWarning, match="The log of Unreachable .* nobody answers") as told:
        fit(tmp_path, "--data.val", "null", logger=logger)
    assert len([line for line in told if "nobody answers" in str(line.message)]) == 1
    assert Unreachable.tries == 1
    assert (tmp_path / "run" / "run_config.yaml").exists()


LOGGED_AT = {"train/loss": [0, 1, 2, 3], "luma_mean/previews": [1, 3], "val/loss": [1, 3]}


def logged_to_wandb(folder, monkeypatch):
    """Train with W&B offline; return settings, the steps of each tag, and files of images."""
    monkeypatch.setenv("WANDB_MODE", "offline")  # Lightning sets it too
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb = pytest.importorskip("wandb")
    rows = []

    def log(run, values, *args, real=wandb.Run.log, **kwargs):
        rows.append(values)
        real(run, values, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", log)
    arguments = {"offline": True, "save_dir": str(folder)}
    try:
        fit(folder, logger={"class_path": "WandbLogger", "init_args": arguments})
        settings = dict(wandb.run.config)
    finally:
        wandb.teardown()
    names = {name for row in rows for name in row}
    at = {name: [row["trainer/global_step"] for row in rows if name in row] for name in names}
    return settings, at, folder.glob("wandb/offline-run-*/files/media/images/*.png")


def logged_to_mlflow(folder, monkeypatch):
    """The same with MLflow in files."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    uri = f"file:{folder}/mlruns"
    fit(folder, logger={"class_path": "MLFlowLogger", "init_args": {"tracking_uri": uri}})
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("lightning_logs").experiment_id
    [run] = client.search_runs([experiment])
    history = {n: client.get_metric_history(run.info.run_id, n) for n in run.data.metrics}
    at = {name: [value.step for value in values] for name, values in history.items()}
    return run.data.params, at, folder.glob("mlruns/*/*/artifacts/images/*.png")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("train", [logged_to_wandb, logged_to_mlflow])
def test_wandb_and_mlflow_get_scalars_settings_and_images(tmp_path, monkeypatch, train):
    monkeypatch.setattr("zsnr.files._WARNED", set())
    tiny.write_shards(tmp_path / "shards", [6])
    tiny.write_shards(tmp_path / "shards", [VAL], "val")
    settings, at, images = train(tmp_path, monkeypatch)
    assert str(settings["batch_size"]) == "4"
    assert str(settings["schedule.zero_terminal_snr"]) == "True"
    assert {name: at[name] for name in LOGGED_AT} == LOGGED_AT
    assert "epoch" not in at
    grids = [Image.open(path) for path in images if path.name.startswith("previews")]
    written = Image.open(tmp_path / "run/previews/step-00000004.png")
    assert len(grids) == 2
    assert written.tobytes() in [grid.convert(written.mode).tobytes() for grid in grids]


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
