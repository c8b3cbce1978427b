"""Which warnings of model.watch good and bad recipes raise: a confusion matrix.

    python benchmarks/early_warnings.py [--folder runs/warnings] [--seeds 1 2 3] [--write]

Each seed trains a small model with epsilon-prediction on the original schedule, then fine-tunes it
to v-prediction at zero terminal SNR by every recipe: 48 steps on encoded latents, one thread. The
bounds of the warnings are derived, and were not changed after these runs; seed 0 served to find
faults. An interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import Dataset

from zsnr import Guidance, LossWeighting, NoiseSchedule
from zsnr.cli import main as zsnr
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import TransformersConditioner
from zsnr.draws import Draws
from zsnr.networks import UNetConfig
from zsnr.noise import sample_generator
from zsnr.pipeline import Sampling
from zsnr.reports.compare import encode, read_data
from zsnr.training import DataModule, EMAConfig, LatentDiffusion, LearningRate, Previews
from zsnr.training.prepared import DRAWS
from zsnr.training.watch import WarningName

START_STEPS, STEPS, INTERVAL = 200, 48, 16
LEARNING_RATE = 1e-3
SCALE = AutoencoderKLCodec("asset:openmoji_vae").scale
NETWORK = UNetConfig(
    block_out_channels=(16, 32),
    attention=(False, True),
    layers_per_block=1,
    attention_head_dim=16,
    norm_groups=8,
    pooled_context=True,
    scale_shift=True,
)
TEXT = {
    "model_type": "clip_text_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
PROMPTS = [
    "grinning face on a black background",
    "red heart on a gray background",
    "evergreen tree on a white background",
    "",
]
ORIGINAL = NoiseSchedule(zero_terminal_snr=False)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}

Choice = Callable[[Tensor, Tensor], Tensor]


class Latents(Dataset[dict[str, Any]]):
    """Latents and captions of the images of shards.

    Args:
        shards: Folder of the shards.
        split: "train" or "val".
        scale: Scale of the latents.
    """

    def __init__(self, shards: Path, split: str, scale: float) -> None:
        images, self.captions = read_data(f"{shards}/{split}-*.tar", 64, 1000)
        self.latents = encode(images, AutoencoderKLCodec("asset:openmoji_vae", scale=scale))

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"latents": self.latents[row], "caption": self.captions[row]}


def nearest_of(x_0: Tensor, noises: Tensor) -> Tensor:
    """Choose the noise with the largest inner product with each image.

    Args:
        x_0: Latents, (B, *).
        noises: Candidates, (K, B, *).
    """
    best = (noises * x_0).flatten(2).sum(2).argmax(0)
    return noises[best, torch.arange(len(x_0))]


def paired(x_0: Tensor, noises: Tensor) -> Tensor:
    """Assign the noises of the batch to its images, as near as they can be (arXiv:2406.12303)."""
    from scipy.optimize import linear_sum_assignment

    cost = -x_0.flatten(1) @ noises[0].flatten(1).T
    return noises[0][linear_sum_assignment(cost.numpy())[1]]


class Coupled(LatentDiffusion):
    """A model whose noise in training is chosen by the images.

    Args:
        choose: Function of latents (B, *) and candidates (K, B, *).
        candidates: K.
        **options: Those of LatentDiffusion.
    """

    def __init__(self, choose: Choice, candidates: int, **options: Any) -> None:
        super().__init__(**options)
        self.choose, self.candidates = choose, candidates

    def prepared(self, batch: dict[str, Any], training: bool) -> dict[str, Any]:
        batch = super().prepared(batch, training)
        if not training:
            return batch
        draws: Draws = batch[DRAWS]
        generator = sample_generator(self.trainer.global_step)
        more = [
            torch.randn(draws.eps.shape, generator=generator) for _ in range(1, self.candidates)
        ]
        chosen = self.choose(batch["latents"], torch.stack([draws.eps, *more]))
        return {**batch, DRAWS: replace(draws, eps=chosen)}


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Args:
        name: Its name in the table.
        wanted: The warning that it is to raise. None = none.
        options: Settings of LatentDiffusion that differ from the good ones.
        start: Declared prediction type of the start. None = random weights.
        learning_rate: The optimizer's.
        scale: Scale of the latents.
        coupled: Choice of the noise and number of candidates.
    """

    name: str
    wanted: WarningName | None = None
    options: dict[str, Any] = field(default_factory=dict)
    start: str | None = "epsilon"
    learning_rate: float = LEARNING_RATE
    scale: float = SCALE
    coupled: tuple[Choice, int] | None = None


SAMPLING = Sampling("ddim", 10, "trailing", Guidance(scale=3.0, rescale=0.7))
RECIPES = (
    Recipe("good: fine-tune from epsilon"),
    Recipe("good: from scratch", start=None),
    Recipe("good: noises paired within a batch", coupled=(paired, 1)),
    Recipe(
        "min-SNR without its guard",
        "terminal_weight",
        {"loss": LossWeighting("min_snr", allow_zero_terminal_weight=True)},
    ),
    Recipe("epsilon weights labelled v", "prediction_type", start="v_prediction"),
    Recipe("leading previews", "spacing", {"sampling": replace(SAMPLING, spacing="leading")}),
    Recipe("nearest of 2 noises", "noise", coupled=(nearest_of, 2)),
    Recipe("nearest of 4 noises", "noise", coupled=(nearest_of, 4)),
    Recipe("learning rate times 100", "divergence", learning_rate=100 * LEARNING_RATE),
    Recipe(
        "learning rate times 100, from scratch",
        "divergence",
        start=None,
        learning_rate=100 * LEARNING_RATE,
    ),
    Recipe("VAE scale left out (5.5 times)", "latent_scale", scale=SCALE / 0.18215),
    Recipe("VAE scale of SD for SDXL (1.4 times)", "latent_scale", scale=SCALE * 0.18215 / 0.13025),
)


def model(
    recipe: Recipe, start: Path, seed: int, max_steps: int, **options: Any
) -> LatentDiffusion:
    """Make the model of a recipe."""
    torch.manual_seed(seed)
    tuned = recipe.start is not None
    settings = {
        "codec": AutoencoderKLCodec("asset:openmoji_vae", scale=recipe.scale),
        "conditioner": TransformersConditioner(
            str(start / "text") if tuned else None,
            config=None if tuned else TEXT,
            tokenizer="open_clip",
            max_length=16,
            trainable=True,
        ),
        "network": str(start / str(recipe.start)) if tuned else NETWORK,
        "caption_dropout": 0.2,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=recipe.learning_rate, betas=(0.9, 0.99)),
        "learning_rate": LearningRate(warmup_steps=20),
        "ema": EMAConfig(decay=0.95),
        "sampling": SAMPLING,
        "image_size": 64,
        "seed": seed,
        **recipe.options,
        **options,
    }
    if recipe.coupled is None:
        return LatentDiffusion(**settings)
    return Coupled(*recipe.coupled, **settings)


def fit(net: LatentDiffusion, folder: Path, data: Path, seed: int, steps: int) -> None:
    """Train a model on latents, with previews and validations at regular steps."""
    from lightning.pytorch.loggers import CSVLogger

    from zsnr.training import TrainingBoard

    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        val_check_interval=INTERVAL,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        logger=CSVLogger(folder),
        callbacks=[Previews(PROMPTS, every_n_steps=INTERVAL), TrainingBoard()],
        default_root_dir=folder,
    )
    loaded = DataModule(
        train=Latents(data, "train", net.codec.scale),
        val=Latents(data, "val", net.codec.scale),
        image_size=64,
        batch_size=16,
        num_workers=0,
        seed=seed,
    )
    trainer.fit(net, datamodule=loaded)


def make_start(folder: Path, data: Path, seed: int) -> Path:
    """Train the model that all recipes of a seed start from, declared in two ways."""
    start = folder / f"start-{seed}"
    if (start / "done").exists():
        return start
    good = Recipe("start", start=None)
    options = {"schedule": ORIGINAL, "prediction_type": "epsilon", "watch": None}
    net = model(good, start, seed, START_STEPS, **options)
    fit(net, start / "run", data, seed, START_STEPS)
    parts = net.model()
    parts.conditioner.encoder.save_pretrained(start / "text")
    for declared in ("epsilon", "v_prediction"):
        parts.network.unet.save_pretrained(start / declared / "unet")
        (start / declared / "scheduler").mkdir()
        config = {**SCHEDULER, "prediction_type": declared}
        path = start / declared / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(config))
    (start / "done").touch()
    return start


def simulate(recipe: Recipe, folder: Path, data: Path, seed: int) -> dict[str, Any]:
    """Train by a recipe, unless that is done, and return its warnings, their steps and the time."""
    number = RECIPES.index(recipe)
    path = folder / f"recipe-{seed}-{number:02d}.json"
    if path.exists():
        done: dict[str, Any] = json.loads(path.read_text())
        return done
    start = make_start(folder, data, seed)
    begin = time.process_time()
    net = model(recipe, start, seed, STEPS)
    fit(net, folder / f"run-{seed}-{number:02d}", data, seed, STEPS)
    assert net.watcher is not None
    facts = {
        "recipe": recipe.name,
        "seed": seed,
        "warnings": net.watcher.told,
        "line": net.watcher.line,
        "seconds": time.process_time() - begin,
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def table(facts: list[dict[str, Any]], seeds: list[int]) -> str:
    """Tabulate in how many seeds each recipe raised each warning."""
    names = get_args(WarningName)
    lines = [f"| recipe | {' | '.join(names)} | first at step |", "|---" * (len(names) + 2) + "|"]
    for recipe in RECIPES:
        runs = [each["warnings"] for each in facts if each["recipe"] == recipe.name]
        counts = [sum(name in run for run in runs) for name in names]
        cells = [
            f"**{count}**" if name == recipe.wanted else str(count or "")
            for name, count in zip(names, counts, strict=True)
        ]
        steps = sorted({step for run in runs for step in run.values()})
        lines.append(f"| {recipe.name} | {' | '.join(cells)} | {', '.join(map(str, steps))} |")
    right = sum(
        set(each["warnings"]) == ({recipe.wanted} - {None})
        for recipe in RECIPES
        for each in facts
        if each["recipe"] == recipe.name
    )
    lines += ["", f"{right} of {len(RECIPES) * len(seeds)} runs raised what they are to raise."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/warnings"), help="of runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the runs")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    folder = options.folder.resolve()
    torch.set_num_threads(1)
    if not (folder / "data").exists():
        zsnr(["data", "openmoji", str(folder / "data"), "--glyphs", "demo"])
    facts = []
    for seed in options.seeds:
        for recipe in RECIPES:
            facts.append(simulate(recipe, folder, folder / "data", seed))
            shown = facts[-1]
            print(f"seed {seed}, {recipe.name}: {shown['warnings']}, {shown['seconds']:.0f} s")
            print(f"  {shown['line']}", flush=True)
    text = table(facts, options.seeds)
    print(text)
    if options.write:
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
        seeds = ", ".join(map(str, options.seeds))
        lines = "\n".join(
            f"- {each['recipe']}: `{each['line']}`"
            for each in facts
            if each["seed"] == options.seeds[0]
        )
        out = Path(__file__).parent / "results" / "early_warnings.md"
        out.write_text(
            f"# Early warnings of good and bad recipes\n\n{date.today()}, {versions}, Python "
            f"{platform.python_version()}, {platform.machine()}. Made by `python benchmarks/"
            f"early_warnings.py --seeds {seeds.replace(',', '')} --write`."
            f"\n\nNumber of seeds ({seeds}) in which each recipe raised "
            f"each warning of model.watch, within {STEPS} steps of batch size 16 with a verdict "
            f"every {INTERVAL}. The warning that a bad recipe is to raise is bold. A small model "
            f"of 16x16x4 latents on the 108 images of configs/quickstart.yaml, trained "
            f"{START_STEPS} steps with epsilon-prediction on the original schedule, is fine-tuned "
            "to v-prediction at zero terminal SNR, or trained from scratch where it says so. No "
            "bound was fitted to runs; in seed 0, a learning rate 100 times too high was missed, "
            "and the growth of the weights became a measure."
            f"\n\n{text}\n\n## Last verdicts of seed "
            f"{options.seeds[0]}\n\n{lines}\n"
        )


if __name__ == "__main__":
    main()
