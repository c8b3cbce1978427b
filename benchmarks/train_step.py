"""Time and memory of a training step, compared with a bare PyTorch loop and a diffusers recipe.

    python benchmarks/train_step.py [--write] [--quick] [--only overhead|memory|recipe]

overhead: after every step of the Lightning run, one step of a bare loop (forward, mean squared
    error, backward, AdamW) with the same network, batch size and optimizer, in the same process, so
    that both run under the same conditions. The Lightning step includes data from shards, noise,
    targets, guards, logging and the average. Medians. "post hoc" is the two averages of
    model.post_hoc_ema, which are updated in some steps; their share is that of all steps.
memory: bytes of parameters, gradients, optimizer state and average on one rank, from its tensors
    after a step on 1, 2 and 4 ranks (gloo), and of the activations saved for the backward pass, by
    hooks on saved tensors; compared with the estimate of `zsnr plan`.
recipe: images per second of diffusers' training recipe (its Accelerator, DDPM scheduler, EMAModel,
    gradient clipping; images by PIL and torchvision), written as a plain loop, after every step of
    zsnr, with the same model, images and batch size: from images, and from cached latents and text
    embeddings, which the recipe reads from memory. Needs `pip install zsnr[bench]`.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RESULT = Path(__file__).parent / "results" / "train_step.md"
ROOT = Path(__file__).parents[1]
WARMUP = 3  # steps that are not measured
BIG = {  # 43 M parameters: a step of half a second on two cores
    "block_out_channels": [128, 256, 384],
    "attention": [False, True, True],
    "layers_per_block": 1,
    "attention_head_dim": 32,
    "norm_groups": 32,
}
SMALL = {  # the quickstart's
    "block_out_channels": [32, 64, 96],
    "attention": [False, True, True],
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "norm_groups": 8,
}
OVERHEAD = (  # average, batch, pixels
    ("off", 8, 64),
    ("every step", 8, 64),
    ("post hoc", 8, 64),
    ("every step", 16, 64),
    ("off", 8, 128),
    ("every step", 8, 128),
    ("post hoc", 8, 128),
    ("every step", 6, 256),
)
LR = {"lr": 1e-4, "weight_decay": 0.01}


def openmoji(folder: Path) -> Path:
    """Write OpenMoji shards once."""
    from zsnr.data.openmoji import write_openmoji_shards

    if not folder.exists():
        write_openmoji_shards(folder, glyphs="demo", size=64, progress=False)
    return folder


class Race:
    """A callback that runs contenders' steps after each Lightning step, and records the times.

    Args:
        contenders: Contenders by name; a call is a step.
        block: Number of steps that are taken and timed together, so that a device need not be
            waited for after each.
        wait: Waits for the device.
    """

    def __new__(
        cls,
        contenders: dict[str, Callable[[], object]],
        block: int = 1,
        wait: Callable[[], object] = lambda: None,
    ) -> Any:
        from lightning.pytorch.callbacks import Callback

        class Racing(Callback):
            def __init__(self) -> None:
                self.times: dict[str, list[float]] = {name: [] for name in ["zsnr", *contenders]}

            def on_train_start(self, trainer: Any, module: Any) -> None:
                self.since = time.perf_counter()

            def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
                if trainer.global_step % block:
                    return
                self.note("zsnr")
                for name, step in contenders.items():
                    for _ in range(block):
                        step()
                    self.note(name)

            def note(self, name: str) -> None:
                wait()
                now = time.perf_counter()
                self.times[name].append((now - self.since) / block)
                self.since = now

        return Racing()


def train(
    module: Any, data: Any, steps: int, callbacks: list[Any], root: Path, **options: Any
) -> None:
    """Train for some steps, without progress bars and checkpoints."""
    import logging
    import warnings

    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        logger=CSVLogger(root),
        default_root_dir=root,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, datamodule=data)


def big_module(average: str, image_size: int = 64) -> Any:
    """Make the model of the overhead and memory tables, on latents of 48 x 16 x 16, or larger."""
    from zsnr.codecs import PixelCodec
    from zsnr.conditioning import NullConditioner
    from zsnr.networks import UNetConfig
    from zsnr.training import EMAConfig, LatentDiffusion, PostHocEMA

    torch.manual_seed(0)
    return LatentDiffusion(
        codec=PixelCodec(4),
        conditioner=NullConditioner(64),
        network=UNetConfig(**BIG),
        image_size=image_size,
        optimizer=lambda p: torch.optim.AdamW(p, **LR, fused=True),
        ema=EMAConfig() if average == "every step" else None,
        post_hoc_ema=PostHocEMA() if average == "post hoc" else None,
    )


def bare_loop(network: nn.Module, batch_size: int, image_size: int) -> Callable[[], object]:
    """Make the lower bound: only the same network and optimizer."""
    from zsnr.denoiser import Conditioning

    network = copy.deepcopy(network).train()
    optimizer = torch.optim.AdamW(network.parameters(), **LR, fused=True)
    x_t, target = torch.randn(2, batch_size, 48, image_size // 4, image_size // 4)
    t = torch.randint(0, 1000, (batch_size,))
    conditioning = Conditioning(torch.zeros(batch_size, 1, 64))

    def step() -> None:
        loss = (network(x_t, t, conditioning) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def overhead(folder: Path, steps: int) -> list[str]:
    """Compare the Lightning step with the bare loop, and time the average alone."""
    from zsnr.training import DataModule, ema
    from zsnr.training import module as training

    lines = ["| average | batch | latents | Lightning step, s | bare step, s | ratio "]
    lines[0] += "| average's share |"
    lines += ["|---|---|---|---|---|---|---|"]
    updates: list[float] = []
    for average, batch_size, size in OVERHEAD:
        shares: list[float] = []

        def timed(*args: Any, shares: list[float] = shares) -> None:
            start = time.perf_counter()
            ema.update_average(*args)
            shares.append(time.perf_counter() - start)

        net = big_module(average, size)
        race = Race({"bare": bare_loop(net.trained["unet"], batch_size, size)})
        data = DataModule(
            f"{folder}/train-*.tar", image_size=size, batch_size=batch_size, num_workers=0
        )
        training.update_average = timed
        with tempfile.TemporaryDirectory() as root:
            train(net, data, steps + WARMUP, [race], Path(root))
        training.update_average = ema.update_average
        zsnr, bare = (statistics.median(times[WARMUP:]) for times in race.times.values())
        pairs = zip(race.times["zsnr"][WARMUP:], race.times["bare"][WARMUP:], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        updates += shares[WARMUP:]
        per_step = len(shares) / len(race.times["zsnr"])
        share = per_step * statistics.median(shares[WARMUP:]) / zsnr if shares else 0
        lines.append(
            f"| {average} | {batch_size} | {size // 4}x{size // 4} | "
            f"{zsnr:.3f} | {bare:.3f} | {ratio:.3f} | {100 * share:.1f} % |"
        )
    parameters = sum(p.numel() for p in net.trained.parameters())
    return [
        *lines,
        "",
        f"Averaging reads and writes 12 bytes per parameter, {12e-9 * parameters:.2f} GB here, "
        f"for any batch size: {1000 * statistics.median(updates):.1f} ms. One `lerp_` of two "
        f"tensors of that size takes {1000 * flat_lerp(parameters):.1f} ms. Stable Diffusion's "
        "latents are 32x32 at 256 pixels, 64x64 at 512.",
    ]


def flat_lerp(size: int, times: int = 20) -> float:
    """Time the lower bound of averaging: `lerp_` of one tensor of this size. Median, seconds."""
    average, weights = torch.randn(2, size)
    times_found = []
    for _ in range(times):
        start = time.perf_counter()
        average.lerp_(weights, 1e-4)
        times_found.append(time.perf_counter() - start)
    return statistics.median(times_found)


# Memory


def bytes_held(folder: str, root: str, checkpointing: bool) -> dict[str, int]:
    """Train two steps on this rank of several, and count the bytes of its tensors."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback

    from zsnr.training import DataModule, FullyShardedStrategy

    net = big_module("every step")
    if checkpointing:
        net.trained["unet"].enable_gradient_checkpointing()
    sizes: dict[str, int] = {}
    forward = net.training_step

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            # Evaluated now, as FSDP gathers weights block by block, which are not activations.
            parameters = {storage(t) for t in (*net.trained.parameters(), *net.buffers())}
            if storage(tensor) not in parameters:
                saved[storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward(*args, **kwargs)
        sizes["activations"] = sum(saved.values())
        return loss

    class Count(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            sizes["gradients"] = sum(local_bytes(p.grad) for p in module.trained.parameters())

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            state = trainer.optimizers[0].state.values()
            tensors = [v for values in state for v in values.values() if isinstance(v, Tensor)]
            sizes["optimizer"] = sum(map(local_bytes, tensors))
            sizes["parameters"] = sum(local_bytes(p) for p in module.trained.parameters())
            sizes["average"] = sum(local_bytes(p) for p in module.ema.parameters())

    def local_bytes(tensor: Any) -> int:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return local.numel() * local.element_size()

    def storage(tensor: Any) -> int:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return local.untyped_storage().data_ptr()

    net.training_step = counted
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=FullyShardedStrategy(),
        max_steps=2,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=root,
        callbacks=[Count()],
    )
    trainer.fit(
        net,
        datamodule=DataModule(f"{folder}/train-*.tar", image_size=64, batch_size=8, num_workers=0),
    )
    return sizes


def planned(folder: Path, ranks: int, checkpointing: bool) -> dict[str, Any]:
    """Return the estimate of `zsnr plan` for the same run."""
    import yaml

    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "strategy": {"class_path": "zsnr.training.FullyShardedStrategy"},
        },
        "model": {
            "codec": {"class_path": "PixelCodec", "init_args": {"patch_size": 4}},
            "conditioner": {"class_path": "NullConditioner", "init_args": {"context_dim": 64}},
            "network": BIG,
            "gradient_checkpointing": checkpointing,
        },
        "data": {"train": f"{folder}/train-*.tar", "image_size": 64, "batch_size": 8},
    }
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "zsnr.cli", "plan", str(path), "--ranks", str(ranks)]
        process = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    plan: dict[str, Any] = json.loads(process.stdout)
    return plan


KINDS = ("parameters", "gradients", "optimizer", "average", "activations")


def memory(folder: Path) -> list[str]:
    """Tabulate bytes per rank, measured and estimated."""
    from ranks import groups

    lines = [
        "| ranks | checkpointing | " + " | ".join(f"{kind}, MiB (plan)" for kind in KINDS),
        "|---|---|" + "---|" * len(KINDS),
    ]
    lines[0] += " | all but activations x ranks / 1 rank's |"
    lines[1] += "---|"
    alone = 0.0
    with groups() as runners, tempfile.TemporaryDirectory() as root:
        for ranks, checkpointing in ((1, False), (1, True), (2, False), (4, False)):
            measured = runners[ranks](bytes_held, str(folder), root, checkpointing)[-1]
            plan = planned(folder, ranks, checkpointing)["bytes_per_rank"]
            cells = [f"{measured[kind] / 2**20:.1f} ({plan[kind] / 2**20:.1f})" for kind in KINDS]
            state = sum(measured[kind] for kind in KINDS[:4])
            alone = alone or state
            lines.append(
                f"| {ranks} | {'on' if checkpointing else 'off'} | "
                + " | ".join(cells)
                + f" | {state * ranks / alone:.3f} |"
            )
    return lines


# The recipe


def recipe(folder: Path, steps: int) -> list[str]:
    """Compare images per second with diffusers' recipe."""
    from zsnr.training import DataModule

    lines = ["| data | batch | zsnr, images/s | diffusers recipe, images/s | zsnr / recipe |"]
    lines += ["|---|---|---|---|---|"]
    batch_size = 16
    for cached in (False, True):
        with tempfile.TemporaryDirectory() as root:
            net = small_module(Path(root) / "text")
            source: Path | str = f"{folder}/train-*.tar"
            if cached:
                source = cache(folder, Path(root) / "text", Path(root) / "cache")
            loop = recipe_steps(net, folder, batch_size, cached)
            race = Race({"recipe": lambda loop=loop: next(loop)})
            data = DataModule(str(source), image_size=64, batch_size=batch_size, num_workers=0)
            train(net, data, steps + WARMUP, [race], Path(root), gradient_clip_val=1.0)
        zsnr, recipe_rate = (
            batch_size / statistics.median(times[WARMUP:]) for times in race.times.values()
        )
        name = "cached latents and text" if cached else "images"
        lines.append(
            f"| {name} | {batch_size} | {zsnr:.1f} | {recipe_rate:.1f} | {zsnr / recipe_rate:.2f} |"
        )
    return lines


def small_module(text: Path) -> Any:
    """Make the quickstart's UNet and VAE, and a frozen CLIP text encoder of its size."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from zsnr.codecs import AutoencoderKLCodec
    from zsnr.conditioning import TransformersConditioner
    from zsnr.networks import UNetConfig
    from zsnr.training import LatentDiffusion

    torch.manual_seed(0)
    settings = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
    CLIPTextModel(CLIPTextConfig(**settings, num_attention_heads=4)).save_pretrained(text)
    return LatentDiffusion(
        codec=AutoencoderKLCodec("asset:openmoji_vae"),
        conditioner=TransformersConditioner(str(text), tokenizer="open_clip", max_length=16),
        network=UNetConfig(**SMALL),
        image_size=64,
        optimizer=lambda p: torch.optim.AdamW(p, **LR, fused=True),
    )


def cache(folder: Path, text: Path, output: Path) -> Path:
    """Encode images and captions once."""
    import yaml

    from zsnr.cli import main

    conditioner = {"pretrained": str(text), "tokenizer": "open_clip", "max_length": 16}
    config = {
        "model": {
            "codec": {
                "class_path": "AutoencoderKLCodec",
                "init_args": {"pretrained": "asset:openmoji_vae"},
            },
            "conditioner": {"class_path": "TransformersConditioner", "init_args": conditioner},
            "network": SMALL,
        },
        "data": {"train": f"{folder}/train-*.tar", "image_size": 64, "num_workers": 0},
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    assert main(["data", "cache", "-c", str(path), "--output", str(output), "--text"]) == 0
    return output


def recipe_steps(net: Any, folder: Path, batch_size: int, cached: bool) -> Iterator[float]:
    """Run the recipe: each `next` makes an optimizer step and returns its loss."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    vae, text = net.codec.load().vae, net._frozen["conditioner"]
    samples: list[tuple[bytes, str]] = []
    for shard in sorted(folder.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
        names = [name for name in members if name.endswith(".png")]
        samples += [(members[n], members[n[:-3] + "txt"].decode()) for n in names]
    transform = transforms.Compose(
        [
            transforms.Resize(64, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def encode(pixels: Tensor) -> Any:
        return vae.encode(pixels).latent_dist

    class Images(Dataset[dict[str, Any]]):
        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, i: int) -> dict[str, Any]:
            data, caption = samples[i]
            image = Image.open(io.BytesIO(data)).convert("RGB")
            return {"pixels": transform(image), "caption": caption}

    class Cached(Images):
        def __init__(self) -> None:
            rows = [Images.__getitem__(self, i) for i in range(len(samples))]
            with torch.no_grad():
                self.moments = torch.cat([encode(row["pixels"][None]).parameters for row in rows])
                self.context = torch.cat([text([row["caption"]]).context for row in rows])

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"moments": self.moments[i], "context": self.context[i]}

    unet = UNet2DConditionModel.from_config(net.trained["unet"].unet.config)
    unet.load_state_dict(net.trained["unet"].unet.state_dict())
    ema_unet = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    optimizer = torch.optim.AdamW(unet.parameters(), **LR)
    rate = get_scheduler("constant", optimizer=optimizer)
    dataset = Cached() if cached else Images()
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True)
    accelerator = Accelerator(cpu=True)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    while True:
        for batch in loader:
            with accelerator.accumulate(unet):
                with torch.no_grad():
                    if cached:
                        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

                        latents = DiagonalGaussianDistribution(batch["moments"]).sample()
                        context = batch["context"]
                    else:
                        latents = encode(batch["pixels"]).sample()
                        context = text(batch["caption"]).context
                latents = latents * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
                noisy = scheduler.add_noise(latents, noise, t)
                target = scheduler.get_velocity(latents, noise, t)
                output = unet(noisy, t, context, return_dict=False)[0]
                loss = nn.functional.mse_loss(output.float(), target.float(), reduction="mean")
                gathered_loss = accelerator.gather(loss.repeat(batch_size)).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                rate.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                ema_unet.step(unet.parameters())
            yield gathered_loss


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--only", choices=("overhead", "memory", "recipe"))
    options = parser.parse_args()
    steps = 6 if options.quick else 20
    text = [
        "# What a training step costs",
        "",
        f"{date.today()}, torch {version('torch')}, lightning {version('lightning')}, diffusers "
        f"{version('diffusers')}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, float32 on the CPU; medians of {steps} interleaved "
        "steps.",
        "Made by `python benchmarks/train_step.py --write`.",
    ]
    with tempfile.TemporaryDirectory() as root:
        folder = openmoji(Path(root) / "openmoji")
        tables: dict[str, Callable[[], list[str]]] = {
            "overhead": lambda: overhead(folder, steps),
            "memory": lambda: memory(folder),
            "recipe": lambda: recipe(folder, 2 * steps),
        }
        for name, make in tables.items():
            if options.only in (None, name):
                table = ["", f"## {name.capitalize()}", "", *make()]
                print("\n".join(table), flush=True)
                text += table
    if options.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
