"""A config that is wrong is one line with its file and its setting."""

import re
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from zsnr import NoiseSchedule, RectifiedFlow
from zsnr.checkpoints.checkpoint_file import describe_model
from zsnr.cli import main
from zsnr.training.configs import check_configs, list_overrides
from zsnr.training.from_checkpoint import checkpoint_config, sampling_config
from zsnr.training.help import help_text
from zsnr.training.lightning_cli import parse_fit, schedule_of
from zsnr.training.settings import GROUPS, names
from zsnr.training.short_options import expand_short_options

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs/tiny.yaml")
ORIGINAL = "model:\n  target: ldm.models.LatentDiffusion\n  params: {parameterization: v}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Words that YAML takes for something else
        (
            "data: {filters: [{field: L, one_of: [en, no]}]}",
            "one_of: the second item, `no`, is the boolean false in YAML: quote it, as in 'no'",
        ),
        (
            "data: {filters: [{field: yes, min: 1}]}",
            "filters[0].field: `yes` is the boolean true in YAML: quote it",
        ),
        ("data: {train: off}", "data.train: `off` is the boolean false in YAML: quote it"),
        (
            "data: {train: [a, 2020]}",
            "data.train: the second item, `2020`, is a number in YAML: quote it",
        ),
        ("data: {index: on}", "data.index: `on` is the boolean true in YAML: quote it"),
        (
            "model: {prediction_type: no}",
            "model.prediction_type: `no` is the boolean false in YAML",
        ),
        ("model: {sampling: {spacing: 1e3}}", "spacing: `1e3` is a number in YAML: quote it"),
        ("trainer: {max_steps: 1e3}", "max_steps: `1e3` is not a whole number: write its digits"),
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
        ("trainer: {steps: 3}", "trainer has no `steps`. Did you mean trainer.max_steps?"),
        ("model: {cfg: 3}", "model has no `cfg`. Did you mean model.sampling.guidance.scale?"),
        ("model: {lora: {ranks: 3}}", "model.lora has no `ranks`. Did you mean `rank`"),
        (
            "model: {network: {norm_group: 3}}",
            "model.network has no `norm_group`. Did you mean",
        ),
        ("model: {unet: {norm_groups: 3}}", "model.unet is now model.network."),
        ("model: {ema: {x: 3}}", "model.ema has no `x`. Known: decay"),
        (
            "model: {optimizer: {class_path: torch.optim.AdamW, init_args: {weight_deacy: 0}}}",
            "model.optimizer.init_args has no `weight_deacy`. Did you mean `weight_decay`",
        ),
        (
            "model: {codec: {class_path: PixelCodec, init_args: {patchsize: 2}}}",
            "model.codec.init_args has no `patchsize`. Did you mean `patch_size`",
        ),
        # Classes and their arguments, at any depth
        ("model: {codec: {patch: 2}}", "model.codec has no `patch`. Did you mean `patch_size`"),
        (
            "model: {codec: {init_args: {patch: 2}}}",
            "model.codec.init_args has no `patch`. Did you mean `patch_size`",
        ),
        (
            "model: {codec.init_args.patch: 2}",
            "Did you mean model.codec.init_args.patch_size",
        ),
        (
            "model: {codec: {class_path: PixelCodec, patch_size: 2}}",
            "no `patch_size` beside class_path. Did you mean `init_args: {patch_size: ...}`",
        ),
        (
            "model: {codec: {class_path: PixelCodec, init_arg: {patch_size: 2}}}",
            "model.codec has no `init_arg` beside class_path. Did you mean `init_args`",
        ),
        (
            "model: {codec: {init_arg: {patch_size: 2}}}",
            "model.codec has no `init_arg`. Did you mean `init_args`",
        ),
        ("model: {codec: {class_pth: PixelCodec}}", "Did you mean `class_path`"),
        (
            "model: {codec: {class_path: zsnr.codecs.PixelCodek}}",
            "there is no class 'zsnr.codecs.PixelCodek'. Did you mean PixelCodec?",
        ),
        (
            "model: {codec: {class_path: zsnr.codec.PixelCodec}}",
            "No module named 'zsnr.codec'. Did you mean PixelCodec?",
        ),
        (
            "model: {codec: {class_path: PixelCodec, dict_kwargs: {patch_size: 2}}}",
            "model.codec.dict_kwargs: PixelCodec takes no arguments but those of init_args: patch_",
        ),
        (
            "model: {optimizer: {class_path: AdamW, init_args: {learning_rate: 1}}}",
            "Did you mean model.optimizer.init_args.lr?",
        ),
        (
            "model: {network: {class_path: zsnr.networks.UNet, init_args: {confg: {}}}}",
            "model.network.init_args has no `confg`. Did you mean `config`",
        ),
        ("model: {network: {class_path: zsnr.networks.Unet}}", "Did you mean UNet? Known: "),
        (
            "model: {network: {class_path: tiny.Own, init_args: {widht: 3}}}",
            "model.network.init_args has no `widht`. Did you mean `width`",
        ),
        ("model: {network: {class_path: tiny.Owm}}", "there is no class 'tiny.Owm'. Did you mean"),
        ("model: {network: {class_path: Transfomer}}", "Did you mean Transformer? Known: "),
        ("model: {network: {class_path: tiny.png}}", "model.network: 'tiny.png' is not a Module"),
        ("model: {network: {class_path: no.Net}}", "named 'no'. Is the folder of the file in PYTH"),
        (
            "model: {network: {class_path: tiny.Own, width: 3}}",
            "no `width` beside class_path. Did you mean `init_args: {width: ...}`",
        ),
        (
            "trainer: {callbacks: [{class_path: zsnr.training.Previews, init_args: {prompt: a}}]}",
            "trainer.callbacks[0].init_args has no `prompt`. Did you mean `prompts`",
        ),
        (
            "trainer: {callbacks: [{class_path: zsnr.training.Previewz}]}",
            "trainer.callbacks[0]: there is no class 'zsnr.training.Previewz'. Did you mean Previ",
        ),
        ("trainer: {callbacks: [Previewz]}", "no class 'Previewz'. Did you mean Previews?"),
        (
            "trainer: {callbacks: [{init_args: {prompts: [a]}}]}",
            "trainer.callbacks[0] names no class: wanted class_path, and init_args",
        ),
        (
            "metrics: {features: {class_path: torch.nn.Linear, init_args: {in_feature: 3}}}",
            "metrics.features.init_args has no `in_feature`. Did you mean `in_features`",
        ),
        (
            "trainer: {profiler: {class_path: lightning.pytorch.profilers.SimpleProfiler, "
            "init_args: {dirpth: x}}}",
            "trainer.profiler.init_args has no `dirpth`. Did you mean `dirpath`",
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
        parse_fit(["-c", TINY, "-c", str(path)])
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


# What users type, and what they are told: (settings after -c configs/tiny.yaml, the answer)
MISTAKES = [
    ("--lr high", "model.optimizer.lr: `high` is text: wanted a number"),
    ("--lr nan", "model.optimizer.lr: `nan` is not finite: wanted a number"),
    ("--model.optimizer.lr nan", "model.optimizer.lr: `nan` is not finite"),
    ("--lr", "--lr needs a value"),
    ("--learning-rate 1e-4", "no option --learning-rate. Did you mean --lr"),
    ("--learning_rate=1e-4", "no option --learning_rate. Did you mean --lr"),
    ("--model.lr 1e-4", "model has no `lr`. Did you mean --lr"),
    ("--model.learning_rate 1e-4", "wanted settings by name: warmup_steps, decay, final. The"),
    ("--batchsize 8", "no option --batchsize. Did you mean --batch-size?"),
    ("--batch_size 8", "no option --batch_size. Did you mean --batch-size?"),
    ("--data.batchsize 8", "data has no `batchsize`. Did you mean --data.batch_size?"),
    ("--data.batch_size eight", "data.batch_size: `eight` is text: wanted a whole number"),
    ("--data.batch_size 2.5", "data.batch_size: `2.5` is not a whole number"),
    ("--trainer.batch_size 8", "trainer has no `batch_size`. Did you mean --data.batch_size?"),
    ("--max_steps 10", "no option --max_steps. Did you mean --max-steps?"),
    ("--max-step 10", "no option --max-step. Did you mean --max-steps?"),
    ("--epochs 3", "no option --epochs. Did you mean --max-steps?"),
    ("--trainer.max_stepss=3", "trainer has no `max_stepss`. Did you mean --trainer.max_steps?"),
    ("--resolution 256", "no option --resolution. Did you mean --data.image_size?"),
    ("--gpus 2", "no option --gpus. Did you mean --trainer.devices?"),
    ("--resume last", "no option --resume. Did you mean --ckpt_path?"),
    ("--trainer.devices two", "trainer.devices: `two` is unknown: wanted a number"),
    ("--trainer.precision bf17", "Did you mean 'bf16'?"),
    ("--trainer.strategy dpp", "trainer.strategy: `dpp` is unknown. Did you mean 'ddp'?"),
    ("--trainer.accelerator gpuu", "`gpuu` is unknown. Did you mean `gpu`?"),
    ("--trainer.callbacks Previewz", "no class 'Previewz'. Did you mean Previews?"),
    ("--trainer.callbacks+=zsnr.training.Previews", "zsnr.training.Previews needs prompts."),
    (
        "--model.optimizer AdamWW",
        "model.optimizer: there is no class 'AdamWW'. Did you mean AdamW?",
    ),
    ("--model.optimizer torch.optim.Adamm", "Did you mean Adam?"),
    ("--model.optimizer torch.nn.Linear", "'torch.nn.Linear' is not a Optimizer"),
    (
        "--model.optimizer.beta 3",
        "model.optimizer has no `beta`. Did you mean --model.optimizer.betas",
    ),
    ("--model.codec PixelCodecc", "no class 'PixelCodecc'. Did you mean PixelCodec?"),
    ("--model.codec mine.Codec", "'mine.Codec' cannot be imported: No module named 'mine'"),
    ("--model.codec.patchsize 2", "Did you mean --model.codec.patch_size?"),
    (
        "--model.codec.init_args.patch 4",
        "model.codec.init_args has no `patch`. Did you mean --model.codec.init_args.patch_size?",
    ),
    ("--model.codec.init_args={patch: 4}", "has no `patch`. Did you mean `patch_size`?"),
    ("--model.codec.init_args.size 4", "Did you mean --model.codec.init_args.patch_size?"),
    ("--model.codec.init_args.vae 4", "has no `vae`. Known: patch_size, scale, shift."),
    ("--model.schedule.zero_snr true", "Did you mean --model.schedule.zero_terminal_snr?"),
    ("--data.filters.fild 1", "data.filters has no `fild`. Did you mean --data.filters.field?"),
    ("--data.train.pth x", "data.train has no `pth`. Did you mean --data.train.path?"),
    ("--data.val.weight 3", "data.val: zsnr.data.sources.Source needs path."),
    ("--data.image_size.height 3", "data.image_size has no `height`: it takes a whole number."),
    ("--trainer.devices.x 3", "trainer.devices has no `x`: it takes text or a whole number or a"),
    ("--model.codec.init_arg.patch_size 4", "`init_arg`. Did you mean --model.codec.init_args?"),
    ("--model.codec.class_pth PixelCodec", "Did you mean --model.codec.class_path?"),
    ("--model.codec.class_path PixelCodecc", "Did you mean PixelCodec?"),
    ("--model.codec.dict_kwargs.patch 4", "takes no arguments but those of init_args: patch_size"),
    (
        "--model.conditioner.init_args.max_len 4",
        "Did you mean --model.conditioner.init_args.max_length?",
    ),
    (
        "--model.optimizer.init_args.learning_rate 1",
        "Did you mean --lr?",
    ),
    ("--model.optimizer.init_args.momentum 1", "Known: lr, betas, eps, weight_decay, amsgrad, "),
    ("--model.network.block 4", "Did you mean --model.network.block_out_channels?"),
    (
        "--model.sampling.sampler.init_args.eta 1",
        "model.sampling.sampler names no class, so it has no `eta`: name one first, as in "
        "--model.sampling.sampler CLASS.",
    ),
    ("--model.sampling.sampler.class_path Huen", "there is no class 'Huen'. Did you mean Heun?"),
    ("--trainer.callbacks.init_args.every_n_step 4", "trainer.callbacks names no class, so"),
    (
        "--model.codec.patch_size two",
        "model.codec.patch_size: `two` is text: wanted a whole number",
    ),
    ("--model.ema.decai 0.9", "model.ema has no `decai`. Did you mean --model.ema.decay?"),
    ("--model.ema.decay much", "model.ema.decay: `much` is text: wanted a number"),
    ("--model.loss.name minsnr", "`minsnr` is unknown: wanted 'uniform', 'min_snr'"),
    ("--model.prediction_type v", "wanted 'epsilon', 'sample', 'v_prediction'"),
    ("--model.schedule linear", "model.schedule is `linear`: wanted settings by name: betas"),
    (
        "--model.schedule.shift 3",
        "model.schedule has no `shift`. It is a setting of RectifiedFlow: "
        "`class_path: RectifiedFlow`, `init_args: {shift: ...}`.",
    ),
    (
        "--model.schedule={class_path: RectifiedFlow, init_args: {shft: 3}}",
        "has no `shft`. Did you mean `shift`?",
    ),
    ("--model.schedule.class_path RectifiedFlw", "Did you mean RectifiedFlow?"),
    ("--model.timestep_law.name logit", "`logit` is unknown: wanted 'uniform', 'logit_normal'"),
    ("--model.guidance.scale 3", "model has no `guidance`. Did you mean --guidance-scale?"),
    ("--guidance-scale high", "model.sampling.guidance.scale: `high` is text: wanted a number"),
    ("--cfg 3", "no option --cfg. Did you mean --guidance-scale?"),
    ("--model.sampling.sampler ddimm", "Sampler 'ddimm' is unknown. Known: 'ddim'"),
    ("--spacing trailling", "`trailling` is unknown. Did you mean `trailing`?"),
    ("--model.unet ./somewhere", "model.unet is now model.network."),
    ("--model.unet.norm_groups 8", "model.unet is now model.network."),
    ("--model.network.class_path tiny.Owm", "there is no class 'tiny.Owm'. Did you mean tiny.Own"),
    ("--model.network.init_args.width 3", "model.network names no class, so it has no `width`"),
    ("--model.network null", "model.network is null: wanted text or settings by name"),
    ("--model.image_size 64", "model.image_size follows data.image_size: set that instead"),
    ("--model.lora.rank big", "model.lora.rank: `big` is text: wanted a whole number"),
    ("--data.pixels.flip maybe", "data.pixels.flip: `maybe` is unknown: wanted true or false"),
    ("--data.train", "--data.train needs a value"),
    (
        "--data.train=[{path: a, weights: 2}]",
        "data.train[0] has no `weights`. Did you mean `weight`?",
    ),
    ("--data.train=[{path: a, weight: heavy}]", "data.train[0].weight: `heavy` is text: wanted"),
    (
        "--data.filters=[{field: L, one_of: [en, no]}]",
        "the second item, `no`, is the boolean false",
    ),
    ("--data.caption.fields x", "data has no `caption`. Did you mean --data.captions?"),
    ("--chekpoint.keep 3", "no option --chekpoint.keep. Did you mean --checkpoint.keep?"),
    ("--metrics.features.class_path mine.Net", "'mine.Net' cannot be imported: No module named"),
    ("data/train", "'data/train' belongs to no option"),
    ("-c", "-c names no file"),
    ("--nonsense 3", "There is no option --nonsense. `zsnr fit --help` shows the options."),
]
INTERNALS = (
    "NestedArg",
    "Parser key",
    "Union",
    "Namespace",
    "Traceback",
    "<class",
    "typing.",
    "class_path '",
)


@pytest.mark.parametrize(("typed", "answer"), MISTAKES)
def test_a_typical_mistake_names_the_setting_and_the_way_out(typed, answer):
    words = [typed] if "=" in typed else typed.split(" ")
    with pytest.raises(ValueError, match=re.escape(answer)) as error:
        parse_fit(["-c", TINY, *words])
    assert not [word for word in INTERNALS if word in str(error.value)]
    assert "\n" not in str(error.value)


def test_a_checkpoint_may_name_the_class_of_an_argument(tmp_path, capsys):
    check_configs(["--model.codec.init_args.scale=2"], complete=False)
    with pytest.raises(ValueError, match="Did you mean --model.codec.init_args?"):
        check_configs(["--model.codec.init_arg.scale=2"], complete=False)
    path = write_checkpoint(tmp_path / "checkpoints" / "a.ckpt")
    predict = ["predict", "--ckpt_path", str(path), "--prompts=x", "--output=x"]
    for typed, answer in {
        "--model.codec.init_args.patch=4": "model.codec.init_args has no `patch`. Did you mean",
        "--trainer.strategy.init_args.x=4": "trainer.strategy names no class, so it has no `x`",
    }.items():
        assert main([*predict, typed]) == 2
        assert answer in capsys.readouterr().err


def test_an_option_of_a_list_is_one_of_its_last_class():
    callback = ["--trainer.callbacks+=zsnr.training.Previews", "--trainer.callbacks.prompts=[a]"]
    parse_fit(["-c", TINY, *callback, "--trainer.callbacks.init_args.every_n_steps=4"])
    with pytest.raises(
        ValueError, match="Did you mean --trainer.callbacks.init_args.every_n_steps"
    ):
        parse_fit(["-c", TINY, *callback, "--trainer.callbacks.init_args.every_n_step=4"])


def test_arguments_of_classes_that_are_not_known_beforehand(tmp_path):
    path = tmp_path / "a.yaml"
    for text, answer in {
        # which pass through **kwargs
        "trainer: {strategy: {class_path: DDPStrategy, init_args: {find_unused: true}}}": (
            "trainer.strategy.init_args has no `find_unused`. Did you mean `find_unused_parameters`"
        ),
        "trainer: {logger: {class_path: TensorBoardLogger, init_args: {save_dirr: x}}}": (
            "trainer.logger.init_args has no `save_dirr`. Did you mean `save_dir`"
        ),
        "model: {sampling: {sampler: {init_args: {eta: 1}}}}": (
            "model.sampling.sampler names no class: wanted class_path, and init_args"
        ),
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(answer)):
            parse_fit(["-c", TINY, "-c", str(path)])


def test_short_options_stand_for_settings():
    config = parse_fit(["-c", TINY, "--lr=3e-4", "--max-steps", "7", "--batch-size=8", "-oruns/x"])
    assert config.model.optimizer.init_args.lr == 3e-4
    assert (config.trainer.max_steps, config.data.batch_size) == (7, 8)
    assert config.trainer.default_root_dir == "runs/x"
    assert expand_short_options(["predict", "-o", "x"]) == ["predict", "--output.folder=x"]
    guidance = ["--guidance-interval", "0.3:inf", "--guidance-curve", "-6:1/0:7.5"]
    assert expand_short_options(guidance) == [
        "--model.sampling.guidance.interval=[0.3, .inf]",
        "--model.sampling.guidance.curve=[[-6.0, 1.0], [0.0, 7.5]]",
    ]
    assert expand_short_options(["--guidance-interval=[0.1, 1]"]) == [
        "--model.sampling.guidance.interval=[0.1, 1.0]"
    ]


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_the_help_is_short_and_explains_every_option(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 150
    assert max(map(len, lines)) <= 110
    text = "\n".join(lines)
    assert "torch.nn" not in text
    for group in GROUPS:
        assert re.search(rf"^  {group}\b", text, re.MULTILINE)
    for line in lines:
        if line.startswith("  -") and not line.startswith(("  -c", "  --help", "  --print")):
            name = line.split()[0]
            entry = text[text.index(f"  {name}") :].partition("\n  -")[0]
            assert re.search(r"default:|required|`last`", entry), line


def test_the_help_gives_the_defaults_that_hold():
    predict = " ".join(help_text("predict").split())
    assert "scale. 1 = no guidance. (default: the checkpoint's)" in predict
    assert "data.train takes. null = no validation. (required)" in help_text("validate").replace(
        "\n" + " " * 38, " "
    )
    trainer = help_text("fit", "trainer")
    assert "Number of optimizer steps to train. (required)" in trainer
    assert "--trainer.deterministic {true,false,warn}" in trainer
    assert "It has no settings. Saves a checkpoint" in help_text("fit", "preemption")


def test_the_help_of_a_group_has_every_setting(capsys):
    for group in GROUPS:
        text = help_text("fit", group)
        for name in names():
            if name.startswith(f"{group}."):
                assert re.search(rf"--{re.escape(name)} .*", text), name
    assert "init_args.patch_size" in help_text("fit", "model")
    assert main(["fit", "--help", "modle"]) == 2
    assert "Did you mean model?" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs/trainer").glob("*.yaml")))
def test_overlays_say_where_to_train_and_not_what(path):
    values = yaml.safe_load(path.read_text())
    settings = {f"{group}.{name}" for group, names in values.items() for name in names}
    allowed = {"model.lora", "model.gradient_checkpointing", "data.max_batch_size_per_device"}
    machine = {"accelerator", "devices", "num_nodes", "strategy", "precision", "benchmark"}
    assert settings <= allowed | {f"trainer.{name}" for name in machine}


def test_what_a_later_file_replaces_is_listed(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("trainer: {precision: bf16-mixed, devices: 1, max_steps: 9}")
    (tmp_path / "b.yaml").write_text(
        "trainer: {precision: bf16-mixed, strategy: {class_path: DDPStrategy}}\n"
        "model: {optimizer: {class_path: SGD, init_args: {lr: 0.1}}}"
    )
    parse_fit([*("-c", TINY), *("-c", f"{tmp_path}/a.yaml"), f"--config={tmp_path}/b.yaml"])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"{tmp_path}/a.yaml overrides trainer.max_steps: 4 -> 9"]


def write_checkpoint(path, **changes):
    """Write what a checkpoint says of a tiny model, with other words for some of its parts."""
    path.parent.mkdir(exist_ok=True)
    description = {**describe_model(tiny.model()), **changes}
    run = {
        "sampling": {
            "sampler": "heun",
            "sampler_options": {},
            "num_steps": 4,
            "spacing": "trailing",
            "guidance_scale": 2.0,
            "guidance_rescale": 0.0,
            "guidance_interval": [0.5, None],
        },
        "ema": None,
        "caption_dropout": 0.3,
    }
    data = {"seed": 3, "batch_size": 2, "image_size": 16}
    weights = {"trained.unet.x": torch.zeros(1)}
    torch.save({"zsnr": description, "run": run, "DataModule": data, "state_dict": weights}, path)
    return path


OWN = "{class_path: tiny.Own, init_args: {width: 5}}"
SIZES = "{block_out_channels: [16], attention: [true]}"


@pytest.mark.parametrize(
    ("networks", "options", "wanted"),
    [
        ([OWN], [], {"class_path": "tiny.Own", "width": 5}),
        ([OWN, SIZES], [], {"block_out_channels": (16,)}),
        ([SIZES, OWN], ["--model.network.init_args.depth=7"], {"width": 5, "depth": 7}),
        ([OWN, OWN.replace("width", "depth")], [], {"width": 5, "depth": 5}),
        (["./folder", OWN], [], {"class_path": "tiny.Own"}),
        ([], ["--model.network", "tiny.Own"], {"class_path": "tiny.Own", "width": 8}),
        ([], ["--model.network.class_path=tiny.Own"], {"class_path": "tiny.Own"}),
        ([], [f"--model.network={OWN}"], {"width": 5}),
        ([OWN], ["--model.network.init_args.width=6"], {"class_path": "tiny.Own", "width": 6}),
        ([OWN], [f"--model.network={SIZES}"], {"block_out_channels": (16,)}),
    ],
)
def test_a_network_replaces_one_of_another_kind(networks, options, wanted, tmp_path):
    files = []
    for i, network in enumerate(networks):
        (tmp_path / f"{i}.yaml").write_text(f"model: {{network: {network}}}")
        files += ["-c", str(tmp_path / f"{i}.yaml")]
    network = parse_fit(["-c", TINY, *files, *options]).model.network.as_dict()
    found = {**network.pop("init_args", {}), **network}
    assert {name: found.get(name) for name in wanted} == wanted
    assert ("class_path" in found) != ("block_out_channels" in found)


def test_a_checkpoint_is_a_config(tmp_path):
    path = write_checkpoint(tmp_path / "checkpoints" / "a.ckpt")
    config = checkpoint_config(path)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    parsed = parse_fit(["-c", str(tmp_path / "a.yaml")])
    assert parsed.model.codec.class_path == "zsnr.codecs.PixelCodec"
    assert parsed.model.network.init_args.config["block_out_channels"] == [16, 32]
    assert parsed.model.sampling.guidance.interval == (0.5, float("inf"))
    assert (parsed.model.sampling.num_steps, parsed.model.ema) == (4, None)
    assert parsed.model.sampling.sampler.class_path == "zsnr.samplers.heun.Heun"
    assert (parsed.data.image_size, parsed.data.seed) == (16, 3)
    assert parsed.trainer.default_root_dir == str(tmp_path)


@pytest.mark.parametrize(
    "typed",
    [
        ["--model.schedule", "RectifiedFlow", "--model.schedule.shift", "3"],
        ["--model.schedule={class_path: zsnr.RectifiedFlow, init_args: {shift: 3}}"],
        ["-c", "FLOW", "--model.schedule.shift", "3"],
        ["--model.schedule.class_path", "RectifiedFlow", "--model.schedule.init_args.shift", "3"],
        ["-c", "FLOW", "-c", "SHIFT"],
    ],
)
def test_a_schedule_of_another_class(tmp_path, typed):
    files = {
        "FLOW": "model: {schedule: {class_path: RectifiedFlow, init_args: {shift: 2}}}",
        "SHIFT": "model: {schedule: {shift: 3}}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    typed = [str(tmp_path / word) if word in files else word for word in typed]
    config = ["-c", TINY, "--model.prediction_type", "flow"]
    model = parse_fit([*config, *typed]).model
    assert schedule_of(model) == RectifiedFlow(3.0)
    schedule = parse_fit(["-c", TINY, "--model.schedule.snr_shift", "4"]).model
    assert schedule_of(schedule) == NoiseSchedule(snr_shift=4.0)


def test_a_list_that_is_overridden_is_said_on_one_line(tmp_path):
    (tmp_path / "a.yaml").write_text("data:\n  train:\n  - path: x\n    weight: 2\n  - y\n")
    (tmp_path / "b.yaml").write_text("data:\n  train: [z]\n")
    lines = list_overrides(["-c", str(tmp_path / "a.yaml"), "-c", str(tmp_path / "b.yaml")])
    assert lines == [f"{tmp_path}/b.yaml overrides data.train: [{{path: x, weight: 2}}, y] -> [z]"]


def test_a_list_of_another_length_is_refused_with_the_length():
    with pytest.raises(
        ValueError, match=r"interval: `\[0.1\]` is wrong: wanted a list of 2 values"
    ):
        parse_fit(
            ["-c", str(ROOT / "configs/tiny.yaml"), "--model.sampling.guidance.interval=[0.1]"]
        )


def test_what_auto_chose_is_chosen_again_for_another_number_of_steps(tmp_path):
    recorded = {"num_steps": 10, "sampler": "multiscale", "spacing": "guided"}
    recorded |= {"guidance_scale": 7.5, "guidance_rescale": 0.7}
    assert sampling_config(tmp_path, recorded).keys() == {"num_steps", "guidance"}
    with pytest.raises(ValueError, match="is not here or has changed: give --spacing"):
        sampling_config(
            tmp_path, {**recorded, "num_steps": 1, "spacing": "grid.json", "timesteps": [999]}
        )


def test_the_options_of_a_recorded_sampler_are_those_of_predict(tmp_path):
    recorded = {"num_steps": 50, "sampler": "ddim", "spacing": "trailing"}
    assert "sampler" not in sampling_config(tmp_path, {**recorded, "sampler_options": {"eta": 0.0}})
    config = sampling_config(tmp_path, {**recorded, "sampler_options": {"eta": 1.0}})
    assert config["sampler"]["init_args"] == {"eta": 1.0}


NESTED = {"class_path": "zsnr.codecs.PixelCodec", "init_args": {"x": [{"class_path": "os.system"}]}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": {"class_path": "harmful.Model"}}, "cannot be imported for a checkpoint"),
        ({"codec": {"class_path": "os.system"}}, "is not a LatentCodec"),
        ({"codec": {"class_path": "zsnr.conditioning.NullConditioner"}}, "is not a LatentCodec"),
        ({"network": {"class_path": "torch.nn.Linear"}}, "no checkpoint chooses code to run"),
        ({"network": {"class_path": "zsnr.codecs.PixelCodec"}}, "is not a DiffusionNetwork"),
        ({"codec": NESTED}, "the arguments of PixelCodec name a class"),
        ({"schedule": {"betas": "linear", "x": 1}}, "schedule has no 'x'"),
        ({"image_size": torch.zeros(1)}, "wanted plain values"),
    ],
)
def test_a_checkpoint_names_no_class_that_is_not_known(tmp_path, monkeypatch, changes, message):
    (tmp_path / "harmful.py").write_text("import os\nos.mkdir('harm')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        checkpoint_config(write_checkpoint(tmp_path / "checkpoints" / "a.ckpt", **changes))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_commands_that_need_a_checkpoint_say_so(command, capsys):
    assert main([command]) == 2
    assert f"{command} needs a checkpoint: --ckpt_path CHECKPOINT" in capsys.readouterr().err
    assert main([command, "--ckpt_path", "last"]) == 2
    assert "`--ckpt_path last` needs the config of the run" in capsys.readouterr().err


def test_a_command_line_without_a_config_names_the_settings_that_are_missing(capsys):
    assert main(["fit"]) == 2
    message = (
        "error: model.codec, model.conditioner, model.network are not set: give a config with -c"
    )
    assert message in capsys.readouterr().err
