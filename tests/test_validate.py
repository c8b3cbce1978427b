"""`zsnr validate` and validation in training, with pictures measured; a small feature network."""

import csv
import json

import cells
import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from zsnr.checkpoints.run_facts import read_run_facts
from zsnr.cli import main
from zsnr.data.caption_files import read_captions
from zsnr.metrics.features import FeatureExtractor, Inception
from zsnr.metrics.fidelity import (
    RealStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    real_statistics,
)
from zsnr.metrics.luma import luma_percentile, mean_luma, rms_contrast, wasserstein_1
from zsnr.pipeline import TextToImage
from zsnr.training.tags import description

FEATURES = {"class_path": "cells.SmallFeatures"}
N = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validate")
    tiny.write_shards(folder / "shards", [6, 5])
    tiny.write_shards(folder / "shards", [4], "val")
    annotations = [
        {"image_id": 100 + i, "id": i, "caption": f"grey {i} on a background"} for i in range(12)
    ]
    (folder / "captions.json").write_text(json.dumps({"annotations": annotations}))
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "log_every_n_steps": 1,
            "val_check_interval": 1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder / "run"),
            "logger": {
                "class_path": "CSVLogger",
                "init_args": {"save_dir": str(folder / "run"), "name": "metrics"},
            },
        },
        "model": {**tiny.MODEL, "sampling": {"num_steps": 2}},
        "data": {
            "train": f"{folder}/shards/train-*.tar",
            "val": f"{folder}/shards/val-*.tar",
            "image_size": 16,
            "batch_size": 4,
            "num_workers": 0,
        },
        "metrics": {
            "captions": str(folder / "captions.json"),
            "num_images": N,
            "batch_size": 3,
            "every_n_validations": 2,
            "real": f"{folder}/shards/train-*.tar",
            "features": FEATURES,
            "inception_splits": 2,
            "output": str(folder / "numbers.json"),
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A finished training run that measured pictures in every second validation."""
    assert main(["fit", "-c", str(folder / "config.yaml")]) == 0
    return folder / "run"


def validate(folder, *options):
    checkpoint = str(folder / "run" / "checkpoints" / "last.ckpt")
    config = str(folder / "config.yaml")
    more = [] if "--trainer.logger" in options else ["--trainer.logger", "false"]
    return main(["validate", "-c", config, "--ckpt_path", checkpoint, *more, *options])


@pytest.fixture(scope="module")
def validated(run, folder):
    """What validate wrote, beside its pictures."""
    out = folder / "validated"
    options = [
        "--metrics.output",
        f"{out}/numbers.json",
        "--metrics.save_images",
        f"{out}/pictures",
    ]
    assert validate(folder, *options, "--metrics.statistics", f"{out}/real.safetensors") == 0
    return out, json.loads((out / "numbers.json").read_text())


def test_every_second_validation_of_training_measures_pictures(run, folder):
    assert sorted(path.name for path in folder.glob("numbers*")) == [
        "numbers-step-00000002.json",
        "numbers-step-00000004.json",
    ]
    with open(run / "metrics" / "version_0" / "metrics.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert sum(bool(row["metrics/fid"]) for row in rows) == 2
    assert sum(bool(row["val/loss"]) for row in rows) == 4
    tags = rows[0].keys() - {"epoch", "step"}
    assert not [name for name in tags if description("Scalars", name) is None]  # nor any constant
    numbers = json.loads((folder / "numbers-step-00000004.json").read_text())
    assert numbers["global_step"] == 4
    facts = read_run_facts(run / "checkpoints")["metrics"]
    assert facts["metrics/luma_w1"] == pytest.approx(numbers["metrics"]["metrics/luma_w1"])
    assert facts["metrics/fid"] == pytest.approx(numbers["metrics"]["metrics/fid"])
    assert not [name for name in facts if name != "val/loss" and "metrics/" not in name]


def test_validate_gives_the_numbers_of_training(run, folder, validated):
    trained = json.loads((folder / "numbers-step-00000004.json").read_text())
    _, numbers = validated
    assert numbers["global_step"] == 4
    assert numbers["checkpoint"].endswith("last.ckpt")
    assert numbers["sampling"]["num_steps"] == 2
    assert (numbers["sampling"]["sampler"], numbers["sampling"]["spacing"]) == (
        "multiscale",
        "guided",
    )
    assert numbers["sampling"]["guidance_rescale"] == 0.7
    assert numbers["metrics"].keys() == trained["metrics"].keys()
    for name, value in numbers["metrics"].items():
        assert value == pytest.approx(trained["metrics"][name], rel=1e-6), name


def test_the_numbers_are_those_of_the_pictures(folder, validated):
    out, numbers = validated
    found = numbers["metrics"]
    captions = read_captions(folder / "captions.json", N)
    paths = sorted((out / "pictures").iterdir())
    assert len(paths) == N
    for path, one in zip(paths, captions, strict=True):
        with Image.open(path) as image:
            facts = json.loads(image.info["zsnr"])
        assert (facts["prompt"], facts["seed"]) == (one.caption, one.seed)
    # By predict's pipeline, from the checkpoint, one by one.
    pipe = TextToImage.from_pretrained(folder / "run/checkpoints/last.ckpt", device="cpu")
    latents, states = [], []
    options = {"callback": lambda i, t, x_0, x_s: states.append(x_s)}
    for path, one in zip(paths, captions, strict=True):
        [image] = pipe([one.caption], seeds=[one.seed], num_steps=2, progress=False, **options)
        latents.append(states[-1])
        assert abs(np.asarray(image, int) - np.asarray(Image.open(path), int)).max() <= 1
    means = torch.cat(latents).double().mean((0, 2, 3))
    for channel, mean in enumerate(means.tolist()):
        name = f"latent_mean_by_channel/c{channel:02d}"
        assert found[name] == pytest.approx(mean, abs=1e-4)

    levels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths])
    levels = levels.permute(0, 3, 1, 2)
    pixels = levels.double() / 127.5 - 1
    real_levels = torch.arange(11, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    real_luma = mean_luma(real_levels.double() / 127.5 - 1)
    network = FeatureExtractor(cells.SmallFeatures())
    features, logits = network(levels)
    real = real_statistics(real_luma, network(real_levels)[0], image_size=16, source="")
    luma = mean_luma(pixels)
    wanted = {
        "luma_mean": luma.mean(),
        "luma_std": luma.std(correction=0),
        "luma_contrast": rms_contrast(pixels).mean(),
        "luma_p01": luma_percentile(pixels, 1).mean(),
        "luma_p99": luma_percentile(pixels, 99).mean(),
        "luma_w1": wasserstein_1(luma, real_luma),
        "fid": frechet_distance(real, features),
        "kid": kernel_distance(real, features)[0],
        "inception_score": inception_score(logits, 2)[0],
    }
    for name, value in wanted.items():
        assert found[f"metrics/{name}"] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert found["metrics_of_data/luma_mean"] == pytest.approx(float(real_luma.mean()), rel=1e-5)


def test_statistics_are_reused_and_refused(folder, validated, tmp_path, capsys):
    out, numbers = validated
    statistics = out / "real.safetensors"
    written = statistics.stat().st_mtime_ns
    assert RealStatistics.read(statistics).count == 11
    options = ["--metrics.statistics", str(statistics), "--metrics.output"]
    assert validate(folder, *options, f"{tmp_path}/a.json", "--metrics.real", "null") == 0
    again = json.loads((tmp_path / "a.json").read_text())["metrics"]
    assert again["metrics/fid"] == pytest.approx(numbers["metrics"]["metrics/fid"], rel=1e-6)
    assert statistics.stat().st_mtime_ns == written
    for more, message in (
        (["--metrics.features.init_args.seed", "1"], "wanted those of 'cells.SmallFeatures"),
        (["--metrics.real", f"{folder}/shards/val-*.tar"], "describes other images"),
    ):
        capsys.readouterr()
        assert validate(folder, *options, f"{tmp_path}/b.json", *more) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_table_shows_the_numbers_and_groups(folder, run, tmp_path, capsys):
    lines = [{"caption": f"grey {i}", "group": "dark" if i < 3 else "snow white"} for i in range(5)]
    (tmp_path / "suite.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--metrics.captions", str(tmp_path / "suite.jsonl"), "--metrics.num_images", "5"]
    options += ["--metrics.features", "null", "--metrics.real", "null", "--metrics.output", "null"]
    options += ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(tmp_path)]
    capsys.readouterr()
    assert validate(folder, *options) == 0
    table = capsys.readouterr().out
    for name in ("metrics/luma_mean", "luma_mean_by_group/dark", "val/loss_raw"):
        assert name in table
    assert "luma_contrast_by_group/snow_white" in table
    assert "metrics/fid" not in table
    [file] = tmp_path.rglob("events.out.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert {"metrics/luma_std", "luma_mean_by_group/dark"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("metrics/luma_mean")] == [4]


def test_inception_by_a_file_of_weights(folder, run, inception_file, tmp_path):
    pictures, output = tmp_path / "pictures", tmp_path / "a.json"
    options = ["--metrics.inception", str(inception_file), "--metrics.features", "null"]
    options += ["--metrics.real", "null", "--metrics.save_images", str(pictures)]
    assert validate(folder, *options, "--metrics.output", str(output)) == 0
    numbers = json.loads(output.read_text())
    levels = torch.stack(
        [torch.from_numpy(np.array(Image.open(p))) for p in sorted(pictures.iterdir())]
    )
    _, logits = FeatureExtractor(Inception(str(inception_file)))(levels.permute(0, 3, 1, 2))
    mean, std = inception_score(logits, 2)
    assert mean > 1 + 1e-4  # 1 is that of pictures that look alike
    found = numbers["metrics"]["metrics/inception_score"]
    assert found - 1 == pytest.approx(mean - 1, rel=1e-3)
    assert numbers["metrics"]["metrics/inception_score_std"] == pytest.approx(std, rel=1e-2)
    assert numbers["features"].startswith("inception ")
    assert "metrics/fid" not in numbers["metrics"]


def test_a_model_that_has_collapsed_is_no_error(folder, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        cells.SmallFeatures, "forward", lambda self, levels: levels[:, 0, 0, :5] * 0
    )
    statistics = real_statistics(
        torch.rand(20),
        torch.randn(20, 5, generator=torch.Generator().manual_seed(0)),
        image_size=16,
        source="",
        extractor=FeatureExtractor(cells.SmallFeatures()).fingerprint,
    )
    statistics.write(tmp_path / "real.safetensors")
    options = ["--metrics.statistics", f"{tmp_path}/real.safetensors", "--metrics.real", "null"]
    fid, kid = (pytest.warns(UserWarning, match=f"metrics/{x} is left out") for x in ("fid", "kid"))
    with fid, kid:
        assert validate(folder, *options, "--metrics.output", f"{tmp_path}/a.json") == 0
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert "metrics/fid" not in numbers["metrics"]
    assert "All 7 images have the same features" in numbers["left_out"]["metrics/fid"]
    assert np.isfinite(numbers["metrics"]["metrics/luma_w1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics.captions", "null"], "nothing is measured without metrics.captions"),
        (["--metrics.captions", "/nowhere.json"], "/nowhere.json: no such captions file"),
        (["--metrics.num_images", "13"], "captions of 12 images, and num_images=13"),
        (["--metrics.num_images", "0"], "num_images=0"),
        (["--metrics.batch_size", "0"], "metrics.batch_size=0"),
        (["--metrics.real", "/nowhere"], "/nowhere does not exist"),
        (["--metrics.statistics", "OUT/real.npz"], "ending in .safetensors"),
        (
            ["--metrics.statistics", "CONFIG/r.safetensors"],
            "config.yaml is not a writable folder",
        ),
        (["--metrics.statistics", "OUT/r.safetensors", "--metrics.real", "null"], "is not there"),
        (["--metrics.inception", "/nowhere.pth"], "FID's Inception weights are weights-inception"),
        (
            ["--metrics.features", "null", "--metrics.inception", "CONFIG"],
            "programs and TorchScript are not opened",
        ),
        (
            [*("--metrics.inception", "CONFIG"), "--metrics.inception_splits=4"],
            "num_images=7 in 4 parts",
        ),
        (["--metrics.clip", "/nowhere"], "Wanted a folder with a CLIPModel"),
        (["--metrics.output", "OUT/a.txt"], "a name that ends in .json"),
        (["--metrics.output", "CONFIG"], "ends in .json"),
        (["--metrics.save_images", "SHARDS"], "exists: choose another name"),
        (["--metrics.featurs", "x"], "Did you mean --metrics.features?"),
        (["--metrics.features.class_path", "nowhere.Net"], "nowhere"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_sampled(
    folder, run, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setattr(TextToImage, "_sample", None)
    names = {"OUT": tmp_path, "CONFIG": folder / "config.yaml", "SHARDS": folder / "shards"}
    for name, path in names.items():
        options = [option.replace(name, str(path)) for option in options]
    if "--metrics.output" not in options:
        options = [*options, "--metrics.output", f"{tmp_path}/a.json"]
    assert validate(folder, *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_several_ranks_share_the_pictures(ranks, folder, run, validated, tmp_path):
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    arguments = (str(folder / "shards"), str(folder / "captions.json"), N, checkpoint)
    for kind in ("ddp", "sharded"):
        out = tmp_path / kind
        ranks[2](cells.measure, *arguments, str(out), kind)
        numbers = json.loads((out / "numbers.json").read_text())
        alone = validated[1]["metrics"]
        assert numbers["metrics"].keys() == alone.keys()
        for name, value in numbers["metrics"].items():
            # a matrix product rounds by batch: a level of one pixel may differ
            assert value == pytest.approx(alone[name], rel=2e-3, abs=1e-4), name
        for path in sorted((validated[0] / "pictures").iterdir()):
            own, theirs = (np.asarray(Image.open(p), int) for p in (out / path.name, path))
            assert abs(own - theirs).max() <= 1


def test_cached_text_embeddings_need_the_encoder_for_captions_alone(folder, tmp_path):
    from zsnr.conditioning import Remembered

    encoder = tiny.frozen_conditioner(tmp_path / "text")
    remembered = Remembered(encoder)
    wanted = encoder(["a", "b"]).context
    kept = remembered(["a"]).context
    torch.testing.assert_close(kept, wanted[:1])
    assert not encoder._loaded
    with remembered.passing():
        torch.testing.assert_close(remembered(["a", "b"]).context, wanted)
        assert encoder._loaded
    assert not encoder._loaded
    assert set(remembered._rows) == {"a"}


def test_suggestions_are_options_that_exist():
    from zsnr.training.settings import names

    assert "metrics.features" in names()
    assert not [name for name in names() if name.endswith((".self", ".args", ".kwargs"))]
