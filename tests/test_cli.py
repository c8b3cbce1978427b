"""The command line, in one process: imports are paid once."""

import csv
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from zsnr.checkpoints.checkpoint_file import sampling_of
from zsnr.cli import COMMANDS, GROUPS, TRAINING, find_function, main
from zsnr.commands.figure import figure
from zsnr.commands.options import SamplerOptions, SamplingOptions
from zsnr.commands.parsing import make_parser, parameters_of, parse_arguments
from zsnr.commands.sample import sample
from zsnr.files import path_metavar
from zsnr.guidance import Guidance
from zsnr.pipeline import TextToImage
from zsnr.progress import progress_bar
from zsnr.reports.arms import declared_arm, make_arms
from zsnr.samplers import DDIM, registry
from zsnr.sampling import Sampling, choose_sampling, describe_sampling
from zsnr.schedule import NoiseSchedule
from zsnr.training import Previews
from zsnr.training.lightning_cli import parse_fit

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny.write_shards(folder / "shards", [6, 5])
    tiny.write_shards(folder / "shards", [4], "val")
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "log_every_n_steps": 1,
            "val_check_interval": 2,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder / "run"),
            "logger": [
                {
                    "class_path": "TensorBoardLogger",
                    "init_args": {"save_dir": str(folder / "run"), "name": "tb", "version": ""},
                },
                {
                    "class_path": "CSVLogger",
                    "init_args": {"save_dir": str(folder / "run"), "name": "metrics"},
                },
            ],
            "callbacks": [
                {
                    "class_path": "zsnr.training.Previews",
                    "init_args": {"prompts": ["grey 3", ""], "every_n_steps": 2},
                },
            ],
        },
        "checkpoint": {"every_n_train_steps": 3},  # 4 steps: the last one counts too
        "model": {
            **tiny.MODEL,
            "sampling": {"num_steps": 3},
        },
        "data": {
            "train": f"{folder}/shards/train-*.tar",
            "val": f"{folder}/shards/val-*.tar",
            "image_size": 16,
            "batch_size": 4,
            "num_workers": 0,
            "prompts": [{"prompt": "grey 1 on a black background"}, {"prompt": "", "count": 3}],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A finished training run."""
    assert main(["fit", "-c", str(folder / "config.yaml")]) == 0
    return folder / "run"


def predict(folder, *options):
    checkpoint = str(folder / "run" / "checkpoints" / "last.ckpt")
    config = str(folder / "config.yaml")
    return main(["predict", "-c", config, "--ckpt_path", checkpoint, *options])


def checkpoints(run):
    return sorted(path.name for path in run.rglob("*.ckpt"))


def test_fit_writes_checkpoints_logs_and_previews(run):
    assert checkpoints(run) == ["last.ckpt", "step-00000003.ckpt", "step-00000004.ckpt"]
    assert (run / "checkpoints" / "last.ckpt").resolve().name == "step-00000004.ckpt"
    last = run / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert sorted(p.name for p in (run / "previews").iterdir()) == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    with open(run / "metrics" / "version_0" / "metrics.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = {name for row in rows for name, value in row.items() if value}
    assert {
        "train/loss",
        "train/grad_norm",
        "train/images_per_second",
        "val/loss",
        "val_by_timestep/t0999",
        "train_by_timestep/t0750_0999",
    } <= names


def test_tensorboard_holds_scalars_and_previews(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    assert "train/loss" in events.Tags()["scalars"]
    assert [image.step for image in events.Images("previews")] == [1, 3]


def test_saved_config_runs_again(run, folder, tmp_path):
    saved = next(run.rglob("run_config.yaml"))
    out = ["--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false"]
    more = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--trainer.callbacks", "null"]
    assert main(["fit", "-c", str(saved), *out, *more, "--trainer.max_steps", "8"]) == 0


def test_an_earlier_runs_checkpoints_are_kept(run, folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.ckpt")}
    assert main(["fit", "-c", str(folder / "config.yaml")]) == 2
    assert "`--ckpt_path last` resumes it" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.ckpt")} == before
    more = ["--ckpt_path", "last", "--trainer.max_steps", "6"]
    assert main(["fit", "-c", str(folder / "config.yaml"), *more]) == 0
    assert checkpoints(run) == ["last.ckpt", "step-00000004.ckpt", "step-00000006.ckpt"]
    with open(run / "metrics" / "version_0" / "metrics.csv", newline="") as lines:
        steps = [int(row["step"]) for row in csv.DictReader(lines) if row["train/loss"]]
    assert steps == [0, 1, 2, 3, 4, 5]
    assert not (run / "metrics" / "version_1").exists()


def test_a_validation_between_is_no_part_of_the_log(folder, tmp_path):
    fit = ["-c", str(folder / "config.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    fit += ["--trainer.callbacks", "null", "--trainer.logger"]
    fit += [json.dumps({"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}})]
    assert main(["fit", *fit]) == 0
    assert main(["validate", *fit, "--ckpt_path", "last"]) == 0
    assert main(["fit", *fit, "--ckpt_path", "last", "--trainer.max_steps", "6"]) == 0
    logs = tmp_path / "lightning_logs"
    with open(logs / "version_0" / "metrics.csv", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(6))


def test_validate(run, folder, capsys):
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    config = str(folder / "config.yaml")
    assert main(["validate", "-c", config, "--ckpt_path", checkpoint]) == 0
    assert "val_by_timestep/t0999" in capsys.readouterr().out


def test_predict_resumes_and_keeps_to_its_folder(run, folder, tmp_path, capsys):
    out = tmp_path / "samples"
    assert predict(folder, "--output", str(out)) == 0
    entries = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    files = sorted(entry["file"] for entry in entries)
    assert files == sorted(path.name for path in out.glob("*.png"))
    assert files == ["00001-0.png", "00002-0.png", "00002-1.png", "00002-2.png"]
    with Image.open(out / files[0]) as image:
        facts = json.loads(image.info["zsnr"])
    assert facts["num_steps"] == 3
    before = {name: (out / name).stat().st_mtime_ns for name in files}

    # A crash: one picture missing, one line cut short.
    pixels = np.asarray(Image.open(out / files[2]))
    (out / files[2]).unlink()
    with open(out / "manifest.jsonl", "a") as manifest:
        manifest.write('{"file": "00')
    assert predict(folder, "--output", str(out)) == 0
    assert np.array_equal(np.asarray(Image.open(out / files[2])), pixels)
    lines = (out / "manifest.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["file"] for line in lines) == files
    for name in (files[0], files[1], files[3]):
        assert (out / name).stat().st_mtime_ns == before[name]

    capsys.readouterr()
    assert predict(folder, "--output", str(out), "--num-steps", "4") == 2
    assert "choose another --output" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    assert predict(folder, "--output", str(other)) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in other.iterdir()] == ["mine.txt"]


def test_predict_refuses_what_cannot_be_before_it_samples(run, folder, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": "a", "height": 15}\n')
    for options, message in (
        (["--output", "OUT", "--prompts", "/no.txt"], "no such prompts file"),
        (["--output", "OUT", "--prompts", str(bad)], "Prompt 2: height=15"),
        (["--output", "OUT", "--model.schedule.zero_terminal_snr", "false"], "schedule has"),
        (["--output", "OUT", "--model.prediction_type", "sample"], "prediction_type has"),
        ([], "predict needs --prompts FILE and --output FOLDER"),
    ):
        options = [str(tmp_path / "out") if o == "OUT" else o for o in options]
        assert predict(folder, *options) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_predict_with_short_options_and_a_file(run, folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "grey 2", "seed": 5, "height": 8}\n{"prompt": "b", "negative_prompt": "c"}\n'
    )
    grid = tmp_path / "my grid.json"
    grid.write_text('{"timesteps": [999, 300]}')
    options = [
        *("--prompts", str(prompts), "--output", str(tmp_path / "out"), "--sampler", "ddpm"),
        *("--num-steps=2", "--spacing", str(grid), "--guidance-scale", "2"),
        *("--guidance-rescale", "0.5", "--guidance-interval", "[0.2,.inf]", "--seed", "9"),
    ]
    assert predict(folder, *options) == 0
    assert (tmp_path / "out" / "00002-9.png").is_file()  # --seed is for lines without their own
    with Image.open(tmp_path / "out" / "00001-5.png") as image:
        assert image.size == (16, 8)
        facts = json.loads(image.info["zsnr"])
    wanted = {
        "sampler": "ddpm",
        "num_steps": 2,
        "spacing": str(grid),
        "timesteps": [999, 300],
        "guidance_scale": 2.0,
        "guidance_rescale": 0.5,
        "guidance_interval": [0.2, None],
    }
    assert {name: facts[name] for name in wanted} == wanted
    grid.write_text('{"timesteps": [999, 200]}')  # is another run, by the same name
    assert predict(folder, *options) == 2


def test_predict_with_options_of_guidance(run, folder, tmp_path):
    for number, options in enumerate(
        (
            [
                *("--guidance-method", "apg", "--guidance-apg-parallel", "0.5"),
                *("--guidance-apg-norm=2.5", "--guidance-threshold", "0.995"),
            ],
            ["--guidance-curve", "[[-6,1],[0,7.5]]", "--guidance-at-zero-snr", "false"],
            ["--guidance-method=cfg_pp", "--guidance-scale=0.6", "--guidance-rescale=0"],
            ["--guidance-against", "raw", "--guidance-method", "cfg_zero_star"],
        )
    ):
        out = tmp_path / str(number)
        assert predict(folder, "--output", str(out), *options) == 0
        with Image.open(out / "00001-0.png") as image:
            facts = json.loads(image.info["zsnr"])
        names, values = [], []
        for word in " ".join(options).replace("=", " ").split():
            (names if word.startswith("--") else values).append(word)
        for name, value in zip(names, values, strict=True):
            assert facts[name[2:].replace("-", "_")] == yaml.safe_load(value), name


@pytest.mark.parametrize(
    ("yaml_text", "options", "wanted"),
    [
        ("num_steps: 8", [], ("multiscale", "guided")),
        ("num_steps: 8", ["--guidance-scale=1"], ("multiscale", "log_snr")),
        ("num_steps: 50", [], ("ddim", "trailing")),
        ("num_steps: 8", ["--num-steps=4"], ("multiscale", "guided")),
        ("sampler: auto", ["--num-steps", "8", "--spacing", "auto"], ("multiscale", "guided")),
        ("sampler: multiscale", ["--num-steps=8"], ("multiscale", "guided")),
        ("sampler: DDIM", ["--num-steps=8"], ("ddim", "trailing")),
        ("sampler: {class_path: zsnr.samplers.Heun}", [], ("heun", "trailing")),
        ("spacing: leading", ["--num-steps=8"], ("ddim", "leading")),
        (
            "{sampler: {class_path: zsnr.samplers.ddim.DDIM}, spacing: trailing}",
            ["--num-steps=8", "--sampler", "auto", "--spacing=auto"],
            ("multiscale", "guided"),
        ),
    ],
)
def test_the_number_of_steps_is_enough(run, folder, tmp_path, yaml_text, options, wanted):
    config = tmp_path / "own.yaml"
    config.write_text(f"model:\n  sampling:\n    {yaml_text}\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("grey 1\n")
    options = ["--prompts", str(prompts), "--output", str(tmp_path / "out"), *options]
    assert predict(folder, "-c", str(config), *options) == 0
    [line] = (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()
    with Image.open(tmp_path / "out" / "00001-0.png") as image:
        png = json.loads(image.info["zsnr"])
    for facts in (json.loads(line), png):
        assert (facts["sampler"], facts["spacing"]) == wanted


def test_a_sampler_that_is_none_is_one_line(tmp_path):
    (tmp_path / "own.yaml").write_text("model: {sampling: {sampler: 3}}")
    with pytest.raises(
        ValueError, match=r"model.sampling.sampler: there is no class '3'. Known: DDIM"
    ):
        parse_fit(["-c", str(ROOT / "configs/tiny.yaml"), "-c", str(tmp_path / "own.yaml")])


OWN_SAMPLER = """
from dataclasses import dataclass
import torch
from zsnr import DDIM, Sampler, register_sampler

@register_sampler("own")
@dataclass(frozen=True)
class Own(Sampler):
    gain: float = 1.0

    def sample(self, denoiser, schedule, x_T, timesteps, *, randn_like=torch.randn_like,
               callback=None):
        return self.gain * DDIM().sample(denoiser, schedule, x_T, timesteps)
"""


def test_an_own_sampler_by_its_class_path(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_SAMPLERS", dict(registry._SAMPLERS))
    (tmp_path / "own_sampler.py").write_text(OWN_SAMPLER)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own.yaml").write_text(
        "model:\n  sampling:\n    sampler:\n      class_path: own_sampler.Own\n"
        "      init_args: {gain: 0.5}\n"
    )
    out = str(tmp_path / "out")
    assert predict(folder, "-c", str(tmp_path / "own.yaml"), "--output", out) == 0
    entry = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert (entry["sampler"], entry["sampler_options"]) == ("own", {"gain": 0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.lerning_rate", "1"], "Did you mean --model.learning_rate?"),
        (["--modle.x=1"], "modle.x"),
        (["-c", "BAD"], "model has no `schedul`. Did you mean `schedule`?"),
        (["-c", "/nowhere.yaml"], "/nowhere.yaml cannot be read: No such file"),
        (["-c", "quickstart"], "`zsnr configs copy quickstart` copies a shipped file"),
        (["-c", f"{ROOT}/configs/tinny.yaml"], f"Did you mean {ROOT}/configs/tiny.yaml?"),
        (["--model.codec=Pixels"], "Known: AutoencoderKLCodec, PixelCodec"),
        (["--model.sampling.sampler=plms"], "Sampler 'plms' is unknown. Known: 'ddim'"),
        (["--model.sampling.sampler.class_path=PLMS"], "Known: DDIM, DDPM, DEIS, DPMpp2M"),
        (["--model.sampling.sampler.eta=0.5"], "Known: DDIM, DDPM, DEIS, DPMpp2M"),
        (["--num-steps=0"], "num_steps=0: wanted an int of at least 1"),
        (["--sampler", "plms"], "Sampler 'plms' is unknown. Known: 'ddim'"),
        (
            ["--model.codec.init_args.patchsize=3"],
            "Did you mean --model.codec.init_args.patch_size?",
        ),
        (["--model.schedule.betas=sigmoid"], "'linear', 'cosine', 'scaled_linear'"),
        (["--trainer.max_steps=many"], "trainer.max_steps"),
        (["--model.prediction_type=epsilon"], "no x_0 at t=999"),
        (["--model.loss.name=min_snr"], "allow_zero_terminal_weight=True"),
        (["--num-steps=1001"], "num_steps=1001"),
        (["--spacing=bosh"], "Known: 'ays', 'beta', 'guided', 'karras'"),
        (["--guidance-rescale=2"], "Guidance rescale 2.0"),
        (["--guidance-method=apgg"], "'cfg', 'apg', 'cfg_zero_star', 'cfg_pp'"),
        (["--guidance-method=cfg_pp"], "Guidance scale 7.5 with method 'cfg_pp'"),
        (["--guidance-curve=[[0,1],[0,2]]"], "wanted knots that ascend"),
        (["--guidance-apg-norm=2"], "is a setting of method 'apg'"),
        (["--guidance-against=raw", "--model.ema=null"], "but model.ema is null"),
        (
            [
                *("--guidance-method=cfg_pp", "--guidance-scale=0.6", "--guidance-rescale=0"),
                *("--sampler=heun", "--num-steps=5"),
            ],
            "Use the sampler 'ddim' or 'euler'",
        ),
        (
            ["--guidance-threshold=0.9", "--model.codec.init_args.scale=0.5"],
            "is for models of pixels",
        ),
        (["--data.image_size=15"], "height=15: wanted a positive multiple of 2"),
        (["--data.train=/nowhere"], "/nowhere does not exist"),
        (["--data.batch_size=0"], "data.batch_size=0"),
        (["--trainer.max_steps=-1"], "trainer.max_steps is not set"),
        (["--ckpt_path=/nowhere.ckpt"], "/nowhere.ckpt does not exist"),
        (["--ckpt_path=CONFIG"], "is not a readable checkpoint"),
        (["--data.num_workers=-1"], "data.num_workers=-1"),
        (["--trainer.accelerator=gpu"], "gpu"),
        (["--data.val=SHARDS"], "is in data.train and in data.val"),
        (
            ["--model.codec={class_path: AutoencoderKLCodec, init_args: {pretrained: ./x}}"],
            "x holds no config.json: wanted a folder with an AutoencoderKL",
        ),
        (["--model.network=./nowhere"], "holds no config.json"),
        (["--model.network.attention=[true]"], "wanted one for each resolution"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folder, tmp_path, capsys, options, message):
    (tmp_path / "bad.yaml").write_text("model:\n  schedul: {betas: linear}\n")
    names = {"CONFIG": str(folder / "config.yaml"), "SHARDS": str(folder / "shards")}
    options = [str(tmp_path / "bad.yaml") if o == "BAD" else o for o in options]
    for name, path in names.items():
        options = [option.replace(name, path) for option in options]
    out = ["--trainer.default_root_dir", str(tmp_path / "run"), "--trainer.logger", "false"]
    assert main(["fit", "-c", str(folder / "config.yaml"), *out, *options]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    assert error[0].startswith("zsnr: error: ")
    assert message in error[0]
    assert len(error[0]) < 400
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "-c", "CONFIG"], "predict needs a checkpoint"),
        (["validate", "-c", "CONFIG"], "validate needs a checkpoint"),
        (["report", "RUN", "--data", "DATA"], "`python -m zsnr.reports.run RUN --data DATA`"),
        (["compare", "a.ckpt", "b.ckpt"], "write `zsnr compare models MODEL MODEL -o PAGE`"),
        (["compare", "--oracle", "x"], "write `zsnr compare oracle DATA -o PAGE`"),
        (["compare", "modles", "x"], "compare modles; did you mean `zsnr compare models`?"),
        (["data", "reprot", "x"], "data reprot; did you mean `zsnr data report`?"),
        (["configs", "shwo"], "configs shwo; did you mean `zsnr configs show`?"),
        (["checkpoint", "consolidat"], "did you mean `zsnr checkpoint consolidate`?"),
        (["timesteps", "optimise"], "did you mean `zsnr timesteps optimize`?"),
        (["dta", "report"], "unknown command dta; did you mean `zsnr data report`?"),
        (["config"], "unknown command config; did you mean `zsnr configs`?"),
        (["index", "photos"], "unknown command index; did you mean `zsnr data index`?"),
        (["compare"], "`zsnr compare` needs one of: models, oracle"),
        ([], "a command is missing"),
        (["dcotor", "x"], "unknown command dcotor; did you mean `zsnr doctor`?"),
        (["frobnicate"], "unknown command frobnicate; `zsnr --help` lists the commands"),
        (["configs", "show", "nothing"], "Known: "),
        (["configs", "show", "quikstart"], "did you mean quickstart?"),
        (["export", "a.ckpt"], "`zsnr export` needs --output"),
        (["sample", "a.ckpt"], "`zsnr sample` needs PROMPT"),
        (["schedule", "cosine", "linear"], "unexpected argument linear"),
        (["schedule", "--num-steps"], "--num-steps needs a value"),
        (["schedule", "--num-steps", "many"], "--num-steps many: wanted a whole number"),
        (
            ["sample", "a", "b", "--guidance-scale", "high"],
            "--guidance-scale high: wanted a number",
        ),
        (["figure", "3", "-o", "x.png"], "NUMBER 3: wanted one of 2, 4, 5, 6"),
        (["export", "a", "-o", "b", "--dtype", "int8"], "--dtype int8: wanted one of float32, "),
        (["schedule", "-plot", "x.png"], "unknown option -plot; did you mean --plot?"),
        (["schedule", "--num_steps=4"], "unknown option --num_steps; did you mean --num-steps?"),
        (["plan", "CONFIG", "--memry", "8"], "unknown option --memry; did you mean --memory?"),
        (["plan", "CONFIG", "--data.batch_sise", "8"], "data.batch_size"),
        (["sample", "CONFIG", "a", "--num-steps", "2"], "is not a model: wanted a .ckpt"),
        (["sample", "nowhere", "a"], "nowhere does not exist: wanted a checkpoint, folder"),
        (["sample", "CONFIG", "a", "--device", "gpu"], "--device 'gpu' is not a device here"),
        (["sample", "CONFIG", "a", "-o", "FULL"], "exists: choose another name"),
        (["sample", "CONFIG", "a", "--num-images", "0"], "--num-images"),
        (["data", "openmoji", "FULL"], "not empty"),
    ],
)
def test_other_wrong_input(folder, capsys, arguments, message):
    names = {"CONFIG": str(folder / "config.yaml"), "FULL": str(folder)}
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


# --- every command ------------------------------------------------------------------------------

FUNCTIONS = [name for name in COMMANDS if name not in TRAINING]


def test_a_network_and_a_dataset_of_ones_own(tmp_path, monkeypatch, capsys):
    """By class_path from YAML: planned, trained, resumed, validated, and sampled by class."""
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {
            "codec": {"class_path": "PixelCodec", "init_args": {"patch_size": 2}},
            "conditioner": {"class_path": "ClassLabels", "init_args": {"num_classes": 3}},
            "network": {"class_path": "tiny.Own", "init_args": {"depth": 3}},
            "gradient_checkpointing": True,
            "sampling": {"num_steps": 2},
        },
        "data": {
            "train": {"class_path": "tiny.Numbers", "init_args": {"count": 9}},
            "val": {"class_path": "tiny.Numbers"},
            "image_size": 16,
            "batch_size": 4,
            "num_workers": 0,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "val_check_interval": 2,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "zsnr.training.Previews", "init_args": {"prompts": ["2", ""]}}
            ],
            "default_root_dir": "run",
        },
    }
    Path("own.yaml").write_text(yaml.safe_dump(config))
    assert main(["plan", "-c", "own.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["Own"] > 0
    assert main(["fit", "-c", "own.yaml"]) == 0
    assert main(["fit", "-c", "own.yaml", "--max-steps", "3", "--ckpt_path", "last"]) == 0
    described = torch.load("run/checkpoints/last.ckpt", weights_only=True)["zsnr"]["network"]
    assert described["init_args"] == {"channels": 12, "width": 8, "depth": 3}
    assert main(["validate", "-c", "own.yaml", "--ckpt_path", "run"]) == 0
    assert main(["validate", "run", "--follow"]) == 0  # the saved settings of a run name classes
    assert main(["sample", "run", "2", "-o", "samples", "--network", "tiny.Own"]) == 0
    assert len([*Path("samples").glob("*.png")]) == 1
    predict = ["predict", "--ckpt_path", "run", "--prompts", "prompts.txt", "-o", "predicted"]
    Path("prompts.txt").write_text("2\n0\n")
    assert main([*predict, "--model.network", "tiny.Own"]) == 0
    assert len([*Path("predicted").glob("*.png")]) == 2
    capsys.readouterr()
    for arguments, answer in (
        (
            ["sample", "run", "2"],
            "no checkpoint chooses code to run. Name it yourself: network=Own",
        ),
        (["validate", "--ckpt_path", "run"], "no checkpoint chooses code to run"),
        (["sample", "run", "2", "--network", "nowhere.Net"], "in PYTHONPATH?"),
        (["sample", "run", "2", "--network", "tiny.png"], "tiny.png is not an nn.Module"),
        (
            ["sample", "run", "9", "--network", "tiny.Own"],
            "'9' is no class: wanted a number from 0",
        ),
        (["export", "run", "-o", "out"], "The network is a Own, but a Stable Diffusion pipeline"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err.splitlines()
        assert answer in said[-1]


@pytest.mark.parametrize("command", FUNCTIONS)
def test_the_help_of_a_command_describes_every_parameter_of_its_function(command, capsys):
    function = find_function(command)
    hints = get_type_hints(function)
    assert hints.keys() == {*inspect.signature(function).parameters, "return"}
    parameters = parameters_of(function)
    with pytest.raises(SystemExit) as end:
        main([*command.split(), "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith(f"usage: zsnr {command} ")
    assert " ".join(inspect.getdoc(function).partition("\n")[0].split()) in text
    described = {action.dest: action.help for action in make_parser(command, function)._actions}
    for name, parameter in parameters.items():
        if name == "settings":
            assert "Settings of `zsnr fit`" in text
            continue
        assert len(described[name]) > 10, name
        assert not re.search(r"None|Likewise|\btype:", described[name]), name
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert f"--{name.replace('_', '-')}" in text
    assert ("--json" in text) == hasattr(hints["return"], "to_json")
    if "output" in parameters:
        kind = path_metavar(described["output"])
        # Python 3.13 names the path once.
        assert re.search(f"-o( {kind})?, --output {kind}", text)


@pytest.mark.parametrize("command", FUNCTIONS)
def test_every_mistyped_option_gets_a_suggestion(command, capsys):
    flags = [
        flag
        for action in make_parser(command, find_function(command))._actions
        for flag in action.option_strings
        if flag.startswith("--")
    ]
    for flag in flags:
        for wrong in (flag[:-1], f"{flag[:3]}{flag[4]}{flag[3]}{flag[5:]}", f"{flag}{flag[-1]}"):
            if wrong in flags:
                continue
            assert main([*command.split(), wrong, "1"]) == (3 if command == "doctor" else 2)
            error = capsys.readouterr().err.splitlines()
            assert len(error) == 1
            assert error[0].startswith(f"zsnr: error: unknown option {wrong}; did you mean --")


@pytest.mark.parametrize(
    ("description", "metavar"),
    [
        ("New folder for the page.", "FOLDER"),
        ("The folder that `zsnr data index --output` wrote.", "FOLDER"),
        ("New .json file for the grid.", "FILE"),
        ("File with the prompts, .txt or .jsonl.", "FILE"),
        ("File or folder to write, which must not exist.", "PATH"),
        ("Shards of a folder.", "PATH"),
    ],
)
def test_a_path_stands_for_a_folder_or_a_file(description, metavar):
    assert path_metavar(description) == metavar


def test_commands_are_listed_in_groups_a_line_each(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for title, commands in GROUPS.items():
        start = lines.index(f"{title}:")
        for line, name in zip(lines[start + 1 :], commands, strict=False):
            assert re.match(rf"  {name}  +[A-Z].*\.$", line)
            assert len(line) <= 110
    for group in ("data", "compare", "configs"):
        with pytest.raises(SystemExit, match="0"):
            main([group, "--help"])
        text = capsys.readouterr().out
        listed = [name for name in COMMANDS if f"  {name} " in text]
        assert listed == [name for name in COMMANDS if name.split()[0] == group]


def test_arguments_may_stand_anywhere_and_begin_with_a_minus_sign():
    values, as_json = parse_arguments(
        "sample",
        find_function("sample"),
        ["m", "--guidance-curve", "-6:1/0:7.5", "a", "-oout", "--json", "a - b", "--", "-b"],
    )
    assert (values["guidance_curve"], values["output"], as_json) == ("-6:1/0:7.5", "out", True)
    assert values["prompts"] == ["a", "a - b", "-b"]


def test_commands_share_the_options_of_sampling():
    parsers = {
        name: make_parser(name, find_function(name))
        for name in ("sample", "compare models", "figure")
    }
    helps = {
        name: {action.dest: action.help for action in parser._actions}
        for name, parser in parsers.items()
    }
    shared = get_type_hints(SamplingOptions)
    assert shared.keys() == {
        *("sampler", "num_steps", "spacing"),
        *(f"guidance_{option.name}" for option in fields(Guidance)),
    }
    for name in shared:
        assert helps["sample"][name] == helps["compare models"][name]
        of_figure = name in get_type_hints(SamplerOptions) or name == "num_steps"
        assert (name in helps["figure"]) == of_figure
    assert "10 in Figure 5" in helps["figure"]["num_steps"]  # a text of its own
    values, _ = parse_arguments(
        "figure", find_function("figure"), ["5", "-o", "x", "--guidance-scale", "3", "--seed=-1"]
    )
    given = {"number": 5, "output": "x", "guidance_scale": 3.0, "seed": -1, "samples": 1000}
    assert values == given


# --- sample, and one default of all ------------------------------------------------------------


def png_facts(path):
    with Image.open(path) as image:
        return json.loads(image.info["zsnr"])


def test_sample_takes_everything_from_the_checkpoint(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last = run / "checkpoints" / "last.ckpt"
    prompt = "grey 1 on a black background"
    assert main(["sample", str(last), prompt, "", "--num-images", "2"]) == 0
    printed = capsys.readouterr()
    files = [f"0000{1 + seed // 2}-{seed}.png" for seed in range(4)]
    assert printed.out.split() == [f"samples/{file}" for file in files]
    assert printed.err == ""  # progress is shown where it takes long
    lines = (tmp_path / "samples" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == files
    assert [(json.loads(line)["prompt"], json.loads(line)["seed"]) for line in lines] == [
        (prompt, 0), (prompt, 1), ("", 2), ("", 3),
    ]  # fmt: skip
    facts = png_facts("samples/00001-1.png")
    assert {"file": files[1], **facts} == json.loads(lines[1])
    wanted = {"num_steps": 3, "sampler": "multiscale", "spacing": "guided", "guidance_scale": 7.5}
    assert {name: facts[name] for name in wanted} == wanted
    # the folder of the run is its last checkpoint, and nothing is overwritten
    assert main(["sample", str(run), prompt]) == 0
    assert capsys.readouterr().out.split() == ["samples-2/00001-0.png"]
    first, again = (Image.open(f"samples{n}/00001-0.png") for n in ("", "-2"))
    assert np.array_equal(first, again)
    assert main(["sample", str(run), prompt, "-o", "samples"]) == 2


def test_sample_with_options(run, tmp_path, capsys):
    options = [
        *("--num-steps=2", "--sampler", "ddim", "--guidance-scale", "2", "--seed", "9"),
        *("--guidance-interval", "0.3:inf", "--negative-prompt", "grey 3", "--height", "8"),
    ]
    out = tmp_path / "made"
    assert main(["sample", str(run), "grey 2", *options, "-o", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == [str(out / "00001-9.png")]
    with Image.open(out / "00001-9.png") as image:
        assert image.size == (16, 8)
        facts = json.loads(image.info["zsnr"])
    wanted = {
        "negative_prompt": "grey 3",
        "num_steps": 2,
        "sampler": "ddim",
        "spacing": "trailing",
        "guidance_scale": 2.0,
        "guidance_interval": [0.3, None],
    }
    assert {name: facts[name] for name in wanted} == wanted
    same = ["--guidance-interval", "[0.3,.inf]", "--guidance-curve", "[[-6,1],[0,7.5]]"]
    assert main(["sample", str(run), "a", *same, "-o", str(tmp_path / "b")]) == 0
    facts = png_facts(tmp_path / "b" / "00001-0.png")
    assert facts["guidance_interval"] == [0.3, None]
    assert facts["guidance_curve"] == [[-6, 1], [0, 7.5]]


def test_sample_as_rectified_flow(run, tmp_path, capsys):
    command = ["sample", str(run / "checkpoints/last.ckpt"), "a", "--num-steps", "2"]
    flow = ["--flow-shift", "3"]
    assert main([*command, *flow, "-o", str(tmp_path / "flow")]) == 0
    [image] = (tmp_path / "flow").glob("*.png")
    facts = png_facts(image)
    assert facts["schedule"] == {"shift": 3.0, "num_timesteps": 1000}
    assert facts["prediction_type"] == "flow"
    assert main([*command, *flow, "--zero-terminal-snr"]) == 2
    assert "name two schedules: give one" in capsys.readouterr().err
    assert main([*command, "--flow-shift", "0"]) == 2
    assert "shift=0.0: wanted a positive number" in capsys.readouterr().err


def test_sample_reads_long_prompts(run, tmp_path, capsys):
    prompt = "grey 1 on a black background and a white frame"
    with pytest.warns(UserWarning, match="'and a white frame'") as caught:
        assert main(["sample", str(run), prompt, "-o", str(tmp_path / "a")]) == 0
    assert len(caught) == 1
    options = ["--max-tokens", "10", "--clip-skip", "1", "--prompt-weights"]
    prompt = prompt.replace("white", "(white:1.2)")
    assert main(["sample", str(run), prompt, *options, "-o", str(tmp_path / "b")]) == 0
    facts = png_facts(tmp_path / "b" / "00001-0.png")
    assert (facts["max_tokens"], facts["clip_skip"], facts["prompt_weights"]) == (10, 1, True)
    assert main(["sample", str(run), prompt, "--clip-skip", "9", "-o", str(tmp_path / "c")]) == 2
    assert "clip_skip=9: wanted 1 to" in capsys.readouterr().err


def test_sample_starts_from_an_image(run, tmp_path, capsys):
    size = TextToImage.from_pretrained(run).model.image_size
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.new("RGB", (size, size), (10, 200, 30)).save(photo)
    half = Image.new("L", (size, size), "black")
    half.paste("white", (0, 0, size // 2, size))
    half.save(mask)
    (tmp_path / "text.png").write_text("This is not an image.")
    common = ["sample", str(run), "grey 1", "--num-steps", "4", "--image", str(photo)]
    assert main([*common, "--strength", "0.5", "-o", str(tmp_path / "a")]) == 0
    assert png_facts(tmp_path / "a/00001-0.png")["strength"] == 0.5
    assert main([*common, "--mask", str(mask), "-o", str(tmp_path / "b")]) == 0
    made = np.asarray(Image.open(tmp_path / "b/00001-0.png"))
    assert (made[:, size // 2 :] == (10, 200, 30)).all()
    assert (made[:, : size // 2] != (10, 200, 30)).any()
    assert png_facts(tmp_path / "b/00001-0.png")["mask_corrections"] == 2
    capsys.readouterr()
    out = ["-o", str(tmp_path / "c")]
    for options, message in (
        (["--strength", "0.1"], "strength=0.1 of 4 steps leaves no step"),
        (["--strength", "2"], "strength=2.0: wanted a number above 0"),
        (["--mask", str(tmp_path / "none.png")], "none.png"),
        (["--mask", str(tmp_path / "text.png")], "text.png: not a readable image"),
        (["--height", "48"], "height=48, but the image is"),
    ):
        assert main([*common, *options, *out]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(["sample", str(run), "a", "--mask", str(mask), *out]) == 2
    assert "mask without image" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_predict_and_compare_warn_once_of_prompts_that_are_cut(run, folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"grey {i} on a black background and more\n" for i in range(3)))
    options = ["--prompts", str(prompts), "--output", str(tmp_path / "out")]
    with pytest.warns(UserWarning, match="3 of 3 prompts are cut") as caught:
        assert predict(folder, *options, "--data.predict_batch_size", "1") == 0
    assert sum("cut" in str(warning.message) for warning in caught) == 1
    compared = ["compare", "models", str(run), "--vary", "num_steps=1,2", "--batch-size", "1"]
    options = ["--prompts", str(prompts), "--count", "1", "-o", str(tmp_path / "page")]
    with pytest.warns(UserWarning, match="3 of 3 prompts are cut") as caught:
        assert main([*compared, *options]) == 0
    # Python shows a text once
    assert len({str(w.message) for w in caught if "cut" in str(w.message)}) == 1


def test_images_without_seeds_have_one_after_the_other(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = ["grey 1", "grey 2"]
    assert main(["sample", str(run), *prompts, "--num-images", "2", "-o", "sample"]) == 0
    made = {path.name: Image.open(path) for path in Path("sample").glob("*.png")}
    assert sorted(made) == ["00001-0.png", "00001-1.png", "00002-2.png", "00002-3.png"]
    twice = [prompt for prompt in prompts for _ in range(2)]
    images = TextToImage.from_pretrained(run)(twice, progress=False)
    for image, (_, other) in zip(images, sorted(made.items()), strict=True):
        assert json.loads(image.info["zsnr"])["seed"] == json.loads(other.info["zsnr"])["seed"]
        difference = np.asarray(image).astype(int) - np.asarray(other).astype(int)
        assert np.abs(difference).max() <= 1  # one rounding of 255, in another batch
    assert main(["sample", str(run), *prompts, "--seed", "7", "-o", "again"]) == 0
    assert sorted(path.name for path in Path("again").glob("*.png")) == [
        "00001-7.png",
        "00002-8.png",
    ]
    assert Previews(prompts).seeds == [0, 1]


def test_a_mistyped_option_of_the_function_is_an_error(run, tmp_path):
    with pytest.raises(TypeError, match="no option 'num_step' of sampling; did you mean num_steps"):
        sample(str(run), ["a"], output=tmp_path / "out", num_step=2)
    with pytest.raises(TypeError, match="no option 'guidance_method' of sampling"):
        figure(5, output=tmp_path / "x.png", model=str(run), guidance_method="apg")


def test_sample_of_a_diffusers_folder_is_the_papers(tmp_path, capsys):
    tiny.sdxl_folder(tmp_path / "model")
    result = sample(str(tmp_path / "model"), ["a"], output=tmp_path / "out", num_steps=None)
    facts = png_facts(result.facts["images"][0])
    wanted = {
        "num_steps": 50,
        "sampler": "ddim",
        "spacing": "trailing",
        "guidance_scale": 7.5,
        "guidance_rescale": 0.7,
    }
    assert {name: facts[name] for name in wanted} == wanted


def test_every_entry_point_samples_as_the_checkpoint_declares(
    run, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    prompt = "grey 1 on a black background"
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    assert main(["sample", str(run), prompt, "-o", "sample"]) == 0
    made = Image.open("sample/00001-0.png")
    wanted = describe_sampling(choose_sampling(sampling_of(str(run))))
    assert wanted["num_steps"] == 3

    [image] = TextToImage.from_pretrained(run)([prompt], progress=False)
    assert np.array_equal(image, made)
    assert wanted.items() <= json.loads(image.info["zsnr"]).items()

    assert predict(folder, "--prompts", "prompts.jsonl", "--output", "predict") == 0
    assert np.array_equal(Image.open("predict/00001-0.png"), made)

    compare = ["compare", "models", str(run), "--vary", "guidance_rescale=0.7,0"]
    options = ["--prompts", "prompts.jsonl", "--count", "1", "-o", "compare", "--json"]
    capsys.readouterr()
    assert main([*compare, *options]) == 0
    arm, other = json.loads(capsys.readouterr().out)["arms"]
    assert (arm["settings"]["num_steps"], other["settings"]["num_steps"]) == (3, 3)
    assert np.array_equal(Image.open(next(Path("compare").glob("*/01*/*.png"))), made)

    arms = []
    monkeypatch.setattr(
        "zsnr.reports.figures.draw_figure", lambda _, arm, *a, **k: arms.append(arm)
    )
    assert main(["figure", "5", "--model", str(run), "-o", "figure.png"]) == 0
    assert describe_sampling(arms[0].sampling()) == wanted


@pytest.mark.parametrize(
    ("declared", "asked", "wanted"),
    [
        ({}, {}, ("ddim", 50, "trailing", 7.5, 0.7)),
        ({}, {"num_steps": 8}, ("multiscale", 8, "guided", 7.5, 0.7)),
        ({"num_steps": 3}, {}, ("multiscale", 3, "guided", 7.5, 0.7)),
        ({"num_steps": 3}, {"num_steps": 50}, ("ddim", 50, "trailing", 7.5, 0.7)),
        ({"num_steps": 8}, {"guidance": {"scale": 1.0}}, ("multiscale", 8, "log_snr", 1.0, 0.7)),
        ({"sampler": "heun", "num_steps": 8}, {"num_steps": 9}, ("heun", 9, "trailing", 7.5, 0.7)),
        ({"spacing": "leading"}, {"sampler": "euler"}, ("euler", 50, "leading", 7.5, 0.7)),
        ({"spacing": "leading"}, {"spacing": "auto"}, ("ddim", 50, "trailing", 7.5, 0.7)),
        ({"num_steps": 8}, {"sampler": "ddim"}, ("ddim", 8, "trailing", 7.5, 0.7)),
    ],
)
def test_what_is_not_asked_for_is_as_declared(declared, asked, wanted):
    told = json.loads(json.dumps(describe_sampling(Sampling(**declared)))) if declared else {}
    found = describe_sampling(choose_sampling(told, **asked))
    names = ("sampler", "num_steps", "spacing", "guidance_scale", "guidance_rescale")
    assert tuple(found[name] for name in names) == wanted


def test_declared_options_and_timesteps_are_kept(tmp_path):
    (tmp_path / "grid.json").write_text('{"timesteps": [999, 300]}')
    guidance = Guidance(interval=(0.3, np.inf), method="apg", apg_norm=2.0)
    sampling = Sampling(DDIM(eta=0.5), 2, str(tmp_path / "grid.json"), guidance)
    told = json.loads(json.dumps(describe_sampling(sampling)))
    (tmp_path / "grid.json").unlink()  # as on another machine
    found = choose_sampling(told)
    assert describe_sampling(found) == describe_sampling(sampling)
    assert found.timesteps(NoiseSchedule()).tolist() == [999, 300]
    assert choose_sampling(told, num_steps=3).spacing == "trailing"
    for asked in ({}, {"num_steps": 3}, {"spacing": "leading"}, {"sampler": "euler"}):
        [arm] = make_arms(["a"], given=asked, declared=lambda _: told)  # in compare and figure
        arm.check(NoiseSchedule())
        wanted = choose_sampling(told, **asked)
        assert describe_sampling(arm.sampling()) == describe_sampling(wanted)
    assert declared_arm({**told, "spacing": "trailing"}).sampling().sampler == DDIM(eta=0.5)
    [arm] = make_arms(["a"], declared=lambda _: {"sampler_options": {"knots": [1, 2]}})
    assert arm.sampling() == Sampling()  # the options of no sampler
    for wrong in ({"num_steps": "3"}, {"timesteps": [5]}, {"sampler": 3}, {"guidance_scale": []}):
        with pytest.raises(ValueError, match="sampling that the model declares is unreadable"):
            choose_sampling({**told, **wrong})


def test_progress_is_lines_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("zsnr.progress.INTERVAL", 0.0)
    with progress_bar(3, "sampling", "step") as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("sampling: 3/3 steps, 00:00")
    assert all(re.fullmatch(r"sampling: \d/3 steps, [\d:]+, [\d:?]+ left", line) for line in lines)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_parsed_and_says_what_it_does(config, capsys):
    assert config.read_text().startswith("# ")
    overlays = ("trainer", "ablation", "recipes")
    over = ["-c", str(ROOT / "configs/tiny.yaml")] if config.parent.name in overlays else []
    with pytest.raises(SystemExit) as end:
        main(["fit", *over, "-c", str(config), "--print_config"])
    assert end.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    flawed = {"original": 0.0, "offset_noise": 0.1}  # section 5.4's other arms
    if config.stem in ("flow", "sdxl_flow"):
        assert model["prediction_type"] == "flow"
        assert model["schedule"]["class_path"] == "zsnr.RectifiedFlow"
        return
    assert model["prediction_type"] == "v_prediction"
    assert model["schedule"]["zero_terminal_snr"] == (config.stem not in flawed)
    assert model["offset_noise"] == flawed.get(config.stem, 0.0)


def test_configs_list_show_copy(tmp_path, capsys):
    assert main(["configs", "list"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["configs", "show", "quickstart"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "quickstart.yaml").read_text()
    assert main(["configs", "copy", "quickstart", str(tmp_path)]) == 0
    assert main(["configs", "copy", "quickstart", str(tmp_path)]) == 2


@pytest.mark.parametrize("command", [[], ["--version"], ["data", "openmoji", "--help"]])
def test_help_and_version_load_nothing_heavy(command):
    code = (
        "import sys\nfrom zsnr.cli import main\n"
        f"try: main({[*command] or ['--help']})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'lightning', 'diffusers', 'transformers', 'open_clip'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_shim_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "configs", "show", "nothing"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("zsnr: error: There is no config 'nothing'.")
