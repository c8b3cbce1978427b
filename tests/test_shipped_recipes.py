"""The recipes of configs/recipes train a few steps, at a small size and with other optimizers."""

from pathlib import Path

import pytest
import tiny
import torch
from test_single_file import stable_diffusion

from zsnr.checkpoints.checkpoint_file import open_checkpoint
from zsnr.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
BASES = {  # recipe: the family, and the config that it is added to
    "sd15_24gb": ("v1", "sd15_zsnr"),
    "sdxl_8gpu": ("xl", "sdxl_zsnr"),
    "sdxl_lora_12gb": ("xl", "sdxl_zsnr"),
    "sdxl_lora_24gb": ("xl", "sdxl_zsnr"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small models of diffusers, by family."""
    folders = {family: tmp_path_factory.mktemp(family) for family in ("v1", "xl")}
    stable_diffusion(folders["v1"], "v1")
    tiny.sdxl_folder(folders["xl"])
    return folders


def arguments(recipe, models, shards, root, *more):
    family, base = BASES[recipe]
    start = str(models[family])
    files = ["-c", f"{CONFIGS / base}.yaml", "-c", f"{CONFIGS / 'recipes' / recipe}.yaml"]
    small = {
        "model.network": start,
        "model.codec.init_args.pretrained": start,
        "model.conditioner.init_args.pretrained": start,
        "data.train": f"{shards}/train-*.tar",
        "data.image_size": 16,
        "data.aspect": "null",
        "data.batch_size": 4,
        "data.max_batch_size_per_device": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 2,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": str(root),
    }
    return [*files, *(f"--{name}={value}" for name, value in small.items()), *more]


@pytest.mark.parametrize("recipe", BASES)
def test_a_recipe_is_planned(models, shards, tmp_path, capsys, recipe):
    assert main(["plan", *arguments(recipe, models, shards, tmp_path)]) == 0
    assert "activations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("sdxl_8gpu", ()),
        ("sdxl_lora_12gb", ()),
        ("sd15_24gb", ("--model.optimizer", "torch.optim.Adafactor")),
        (
            "sdxl_lora_12gb",  # Muon: adapters of linear layers are matrices
            ("--model.optimizer", "torch.optim.Muon", "--model.lora.target_modules", "[to_q]"),
        ),
        (
            "sdxl_lora_24gb",
            ("--model.optimizer", "test_optimizers.ScheduleFreeSGD", "--model.ema", "null"),
        ),
    ],
)
def test_a_recipe_trains(models, shards, tmp_path, recipe, more):
    assert main(["fit", *arguments(recipe, models, shards, tmp_path, *more)]) == 0
    checkpoint = open_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 2
    assert checkpoint["zsnr"]["prediction_type"] == "v_prediction"
    lora = [name for name in checkpoint["state_dict"] if "lora_B" in name]
    assert bool(lora) == ("lora" in recipe)
    changed = [checkpoint["state_dict"][name] for name in lora if name.startswith("trained")]
    assert all(torch.count_nonzero(weight) for weight in changed)  # they begin at 0


def test_every_recipe_is_here():
    assert {path.stem for path in (CONFIGS / "recipes").glob("*.yaml")} == {*BASES}
