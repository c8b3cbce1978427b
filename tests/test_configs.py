"""A config that is wrong is one line with its file and its setting."""

from pathlib import Path

import pytest
import torch
import yaml

from zsnr.cli import main
from zsnr.training.lightning_cli import parse_fit

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
ORIGINAL = "model:\n  target: ldm.models.LatentDiffusion\n  params: {parameterization: v}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Words that YAML takes for something else
        (
            "data: {filters: [{field: L, one_of: [en, no]}]}",
            "one_of[1]: `no` is false in YAML",
        ),
        (
            "data: {filters: [{field: yes, min: 1}]}",
            "filters[0].field: `yes` is true in YAML",
        ),
        ("data: {train: off}", "data.train: `off` is false in YAML: quote it"),
        ("data: {train: [a, 2020]}", "data.train[1]: `2020` is a number in YAML: quote it"),
        ("data: {index: on}", "data.index: `on` is true in YAML: quote it"),
        ("model: {prediction_type: no}", "model.prediction_type: `no` is false in YAML"),
        ("model: {sampling: {spacing: 1e3}}", "spacing: `1e3` is a number in YAML: quote it"),
        ("trainer: {max_steps: 1e3}", "max_steps: `1e3` is not a whole number in YAML"),
        ("data: {image_size: yes}", "data.image_size: `yes` is true: wanted a whole number"),
        ("data: {image_size: big}", "data.image_size: `big` is text: wanted a whole number"),
        # Names that nothing has
        (
            "data: {train: [{path: a, weights: 2}]}",
            "data.train[0] has no `weights`. Did you mean",
        ),
        (
            "data: {filters: [{feild: a, min: 1}]}",
            "data.filters[0] has no `feild`. Did you mean",
        ),
        ("trainer: {precison: 32}", "trainer has no `precison`. Did you mean `precision`"),
        ("trainr: {max_steps: 3}", "there is no `trainr`. Did you mean `trainer`"),
        ("model: {schedule: {beta_strat: 1}}", "model.schedule has no `beta_strat`. Did you mean"),
        ("model: {lora: {ranks: 3}}", "model.lora has no `ranks`. Did you mean `rank`"),
        (
            "model: {unet: {norm_group: 3}}",
            "model.unet has no `norm_group`. Did you mean",
        ),
        ("model: {ema: {x: 3}}", "model.ema has no `x`. Known: decay"),
        (
            "model: {optimizer: {class_path: torch.optim.AdamW, init_args: {weight_deacy: 0}}}",
            "model.optimizer.init_args has no `weight_deacy`. Did you mean `weight_decay`",
        ),
        (
            "model: {codec: {class_path: PixelCodec, init_args: {patchsize: 2}}}",
            "model.codec.init_args has no `patchsize`. Did you mean `patch_size`",
        ),
        # Shapes
        ("data: {train: {path: a}}", "data.train is a group of settings: wanted text or a list"),
        ("data: {train: [[a]]}", "data.train[0] is a list: wanted"),
        ("data: [a]", "data is a list: wanted settings by name"),
        ("model: hello", "model is `hello`: wanted settings by name"),
        ("model:", "model is empty: wanted settings by name"),
        ("model: {schedule: {beta_end: [1]}}", "beta_end is a list: wanted a number"),
        ("? [a]\n: b", "found unhashable key"),
        # Files
        ("", "is empty"),
        ("# nothing", "it is empty: wanted settings such as `model:`"),
        ("- a", "it holds a list: wanted settings"),
        ("hello", "it holds one value: wanted settings"),
        (ORIGINAL, "a config of the original latent diffusion code"),
        ("data:\n\ttrain: a", "line 2 is indented with a tab: use spaces"),
        ("data: {train: a}\ndata: {val: b}", "line 2: 'data' appears twice"),
        ("data: {train: a, train: b}", "line 1: 'train' appears twice"),
        ("data: !!python/object/apply:os.system [x]", "line 1: could not determine a constructor"),
        ("data: " + "[" * 5000, "nested too deeply"),
        (BOMB, "its aliases expand to too many values"),
        ("a: " + "b" * 300_000, "wanted at most 200000"),
        ("version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer"),
        ("<!DOCTYPE html><html>", "an HTML page"),
        ("data: {train: caf\udce9}", "is not UTF-8 text"),
    ],
)
def test_a_wrong_config_names_its_file_and_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="mine.yaml") as error:
        parse_fit(["-c", str(path)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_none_are_one_line(tmp_path, capsys):
    (tmp_path / "x.yaml").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path, tmp_path / "x.yaml", Path("/dev/zero")):
        assert main(["plan", str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_jsonargparse_reads_beside_configs_is_bounded_too(tmp_path):
    (tmp_path / "data.yaml").write_text(BOMB)
    (tmp_path / "a.yaml").write_text("data: {}")
    with pytest.raises(ValueError, match="data"):
        parse_fit(["-c", str(tmp_path / "a.yaml"), f"--data={tmp_path}/data.yaml"])


def test_a_byte_order_mark_and_json_are_read(tmp_path):
    whole = yaml.safe_load((Path(__file__).parents[1] / "configs/tiny.yaml").read_text())
    (tmp_path / "a.yaml").write_text("\ufeff" + yaml.safe_dump(whole), encoding="utf-8")
    (tmp_path / "b.json").write_text('{"data": {"image_size": 64}}')
    config = parse_fit(["-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.json")])
    assert config.data.image_size == 64


def test_no_checkpoint_names_a_class_to_import(tmp_path, monkeypatch):
    (tmp_path / "harmful.py").write_text("import os\nos.mkdir('harm')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"hyper_parameters": {"_class_path": "harmful.Model"}}, "a.ckpt")
    config = str(Path(__file__).parents[1] / "configs/tiny.yaml")
    assert main(["fit", "-c", config, "--ckpt_path=a.ckpt"]) == 2
    assert not Path("harm").exists()


@pytest.mark.parametrize("path", ["..b", "a..b", '"a\\0.b"', ".b", "..", "[a]", "{a: b}", "5"])
def test_a_class_path_that_names_nothing_is_one_line(tmp_path, path):
    (tmp_path / "a.yaml").write_text(f"model: {{codec: {{class_path: {path}, init_args: {{}}}}}}")
    with pytest.raises(ValueError, match="codec") as error:
        parse_fit(["-c", str(tmp_path / "a.yaml")])
    assert "\n" not in str(error.value)
