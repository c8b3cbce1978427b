"""Speed and memory on one GPU, in one command; nothing is downloaded, weights are random.

    bash benchmarks/gpu.sh                                   # on the machine with the GPU
    python benchmarks/gpu.py --device cpu --tiny             # the same code in small, on a CPU

Sections run in this order, and each is written to the result before the next begins, so that a
machine that is taken away leaves what was measured:

tests: the tests marked `cuda`.
train: training steps under Lightning (EMA, guards, logging; bfloat16 autocast, fused AdamW, cached
    latents in memory) in turn with steps of a bare loop of the same network and with diffusers'
    training recipe, in the same process;
    images per second, share of the GPU's peak in bfloat16 (MFU), peak memory beside `zsnr plan`'s
    formula for weights, gradients, optimizer state and averages.
idle: the share of time in which no kernel runs, from a trace of some training steps.
sample: images per second of TextToImage beside StableDiffusionPipeline with the same weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from train_step import Race

from zsnr.denoiser import Conditioning

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "gpu.md"
LR = {"lr": 1e-4, "weight_decay": 0.01}
WARMUP = 1  # blocks of steps that are not counted
BLOCK = 5  # steps that are timed together: the host may be ahead of the device meanwhile
TOKENS = 77


@dataclass(frozen=True)
class Size:
    """A network of a training run.

    Args:
        name: In the table.
        config: Arguments of UNetConfig.
        context_dim: Width of the text embeddings.
        pixels: Height and width of the images.
        batch_size: Images per step.
        recipe: Whether diffusers' recipe fits into memory beside the other two.
    """

    name: str
    config: dict[str, Any]
    context_dim: int
    pixels: int
    batch_size: int
    recipe: bool = True


SIZES = (
    Size("SD 2.1, 256 px", {}, 1024, 256, 64),
    Size("SD 2.1, 512 px", {}, 1024, 512, 16),
    Size("SDXL's channels, 1024 px", {"block_out_channels": (320, 640, 1280), "attention":
         (False, True, True), "transformer_layers": 4}, 2048, 1024, 4, recipe=False),
)  # fmt: skip
TINY = (
    Size(
        "tiny, 64 px",
        {
            "block_out_channels": (16, 32),
            "attention": (False, True),
            "layers_per_block": 1,
            "attention_head_dim": 8,
            "norm_groups": 8,
        },
        32,
        64,
        4,
    ),
)


class Latents(Dataset[dict[str, Any]]):
    """Endless cached latents and text embeddings, as training reads them from a cache."""

    def __init__(self, size: Size, steps: int, prepare: Callable[[Any], Any]) -> None:
        self.prepare = prepare
        generator = torch.Generator().manual_seed(0)
        side = size.pixels // 8
        self.mean = torch.randn(64, 4, side, side, generator=generator)
        self.context = torch.randn(64, TOKENS, size.context_dim, generator=generator)
        self.size, self.length = size, steps * size.batch_size

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> dict[str, Any]:
        mean = self.mean[position % len(self.mean)]
        return {
            "key": str(position),
            "position": position,
            "moments": torch.cat([mean, torch.full_like(mean, 0.1)]),
            "context": self.context[position % len(self.context)],
        }

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch with the keys that training_step reads."""
        return self.prepare(
            {
                "key": [item["key"] for item in items],
                "position": torch.tensor([item["position"] for item in items]),
                "global_batch_size": self.size.batch_size,
                "moments": torch.stack([item["moments"] for item in items]),
                "text_embedding": Conditioning(torch.stack([item["context"] for item in items])),
            }
        )


def module(size: Size, vae: Path, compiled: bool) -> Any:
    """Build the LightningModule of a size."""
    from zsnr.codecs import AutoencoderKLCodec
    from zsnr.conditioning import NullConditioner
    from zsnr.networks import UNetConfig
    from zsnr.training import LatentDiffusion

    torch.manual_seed(0)
    return LatentDiffusion(
        codec=AutoencoderKLCodec(str(vae)),
        conditioner=NullConditioner(size.context_dim),
        network=UNetConfig(**size.config),
        caption_dropout=0.0,
        image_size=size.pixels,
        optimizer=lambda p: torch.optim.AdamW(p, **LR, fused=True),
        compile="inductor" if compiled else None,
    )


def bare_loop(network: nn.Module, size: Size, device: torch.device) -> Callable[[], object]:
    """The lower bound: the same network, precision and optimizer, and nothing else."""
    network = copy.deepcopy(network).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), **LR, fused=True)
    side = size.pixels // 8
    x_t, target = torch.randn(2, size.batch_size, 4, side, side, device=device)
    t = torch.randint(0, 1000, (size.batch_size,), device=device)
    context = torch.randn(size.batch_size, TOKENS, size.context_dim, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = network(x_t, t, Conditioning(context))
        (output.float() - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def recipe_loop(network: nn.Module, size: Size, device: torch.device) -> Callable[[], object]:
    """The step of diffusers' training script for text-to-image, from latents in memory."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    network = copy.deepcopy(network).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), **LR)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = EMAModel(network.parameters(), foreach=True)
    average.to(device)
    scheduler = DDPMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    side = size.pixels // 8
    latents = torch.randn(size.batch_size, 4, side, side)
    context = torch.randn(size.batch_size, TOKENS, size.context_dim)
    if device.type == "cuda":
        latents, context = latents.pin_memory(), context.pin_memory()

    def step() -> None:
        x_0, text = (part.to(device, non_blocking=True) for part in (latents, context))
        noise = torch.randn_like(x_0)
        t = torch.randint(0, 1000, (len(x_0),), device=device)
        x_t, target = scheduler.add_noise(x_0, noise, t), scheduler.get_velocity(x_0, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = network(x_t, t, Conditioning(text))
        loss = (output.float() - target.float()).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        loss.item()  # the script logs every step

    return step


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def fit(net: Any, size: Size, steps: int, device: torch.device, callbacks: list[Any]) -> None:
    """Train under Lightning with the settings of configs/trainer/gpu.yaml."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    data = Latents(size, steps, net.preparation(training=True))
    with tempfile.TemporaryDirectory() as root:
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if device.type == "cuda" else "32-true",
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            logger=CSVLogger(root),
            default_root_dir=root,
            callbacks=callbacks,
        )
        loader = DataLoader(
            data,
            size.batch_size,
            num_workers=4 if device.type == "cuda" else 0,
            collate_fn=data.collate,
            pin_memory=device.type == "cuda",
        )
        trainer.fit(net, loader)


def train(sizes: tuple[Size, ...], vae: Path, device: torch.device, blocks: int) -> list[str]:
    """Compare the Lightning step with the bare loop, for each size."""
    from zsnr.training.throughput import network_flops, peak_flops

    lines = [
        "| network | batch | compile | zsnr, images/s | bare loop, images/s | step / bare step "
        "| diffusers' recipe, images/s | MFU | peak memory of all, GiB "
        "| weights, gradients, AdamW and EMA of zsnr, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    peak = peak_flops(device_name()) if device.type == "cuda" else None
    for size in sizes:
        for compiled in (False, True) if device.type == "cuda" else (False,):
            net = module(size, vae, compiled)
            shape, text = (4, size.pixels // 8, size.pixels // 8), (1, TOKENS, size.context_dim)
            work = network_flops(net.trained["unet"], shape, Conditioning(torch.zeros(text)))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            contenders = {"bare": bare_loop(net.trained["unet"], size, device)}
            if not compiled and size.recipe:
                contenders["recipe"] = recipe_loop(net.trained["unet"], size, device)
            race = Race(contenders, BLOCK, lambda: synchronize(device))
            fit(net, size, BLOCK * (blocks + WARMUP), device, [race])
            zsnr, floor, *others = (times[WARMUP:] for times in race.times.values())
            recipe = f"{size.batch_size / statistics.median(others[0]):.1f}" if others else "-"
            ratio = statistics.median(a / b for a, b in zip(zsnr, floor, strict=True))
            rate = size.batch_size / statistics.median(zsnr)
            used = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
            state = 20 * sum(p.numel() for p in net.trained.parameters()) / 2**30
            lines.append(
                f"| {size.name} | {size.batch_size} | {'on' if compiled else 'off'} | {rate:.1f} "
                f"| {size.batch_size / statistics.median(floor):.1f} | {ratio:.3f} "
                f"| {recipe} | {'-' if peak is None else f'{100 * work * rate / peak:.0f} %'} "
                f"| {'-' if used is None else f'{used:.1f}'} | {state:.1f} |"
            )
            del net, race, contenders
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return lines


def idle(size: Size, vae: Path, device: torch.device) -> list[str]:
    """Measure the share of time in which the device runs no kernel, over ten steps."""
    if device.type != "cuda":
        return ["No trace without a GPU."]
    from lightning.pytorch.callbacks import Callback
    from torch.profiler import ProfilerActivity, profile

    class Trace(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == BLOCK:
                torch.cuda.synchronize()
                self.profile = profile(activities=[ProfilerActivity.CUDA])
                self.profile.__enter__()
                self.since = time.perf_counter()

        def on_train_end(self, trainer: Any, module: Any) -> None:
            torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.since
            self.profile.__exit__(None, None, None)

    trace = Trace()
    fit(module(size, vae, False), size, BLOCK + 10, device, [trace])
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in trace.profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, end = 0.0, 0.0
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    share = 1 - busy / 1e6 / trace.seconds
    return [f"{size.name}: no kernel runs in {100 * share:.1f} % of {trace.seconds:.2f} s."]


def sample(folder: Path, device: torch.device, tiny: bool) -> list[str]:
    """Compare TextToImage with StableDiffusionPipeline: same weights, DDIM, guidance, batch."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from zsnr.pipeline import TextToImage

    dtype = torch.float16 if device.type == "cuda" else torch.float32
    theirs = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype).to(device)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    ours = TextToImage.from_pretrained(str(folder), dtype=dtype, device=device)
    prompts = ["a photograph"] * (2 if tiny else 8)
    lines = ["| S | zsnr, images/s | StableDiffusionPipeline, images/s |", "|---|---|---|"]
    for num_steps in (3, 2) if tiny else (50, 8):
        runs = {
            "zsnr": lambda n=num_steps: ours(
                prompts, num_steps=n, sampler="ddim", spacing="trailing", progress=False
            ),
            "diffusers": lambda n=num_steps: theirs(
                prompts, num_inference_steps=n, guidance_scale=7.5, guidance_rescale=0.7
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for round_number in range(1 if tiny else 3):
            for name, run in runs.items():
                synchronize(device)
                start = time.perf_counter()
                run()
                synchronize(device)
                if round_number or tiny:
                    times[name].append(time.perf_counter() - start)
        rates = [len(prompts) / statistics.median(times[name]) for name in runs]
        lines.append(f"| {num_steps} | {rates[0]:.2f} | {rates[1]:.2f} |")
    return lines


def write_pipeline(folder: Path, tiny: bool) -> Path:
    """Write a Stable Diffusion 2.1 pipeline with random weights, or one in small."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    width = 32 if tiny else 1024
    channels = (16, 32) if tiny else (320, 640, 1280, 1280)
    kinds = len(channels)
    unet = UNet2DConditionModel(
        sample_size=8 if tiny else 64,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * (kinds - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (kinds - 1),
        cross_attention_dim=width,
        attention_head_dim=4 if tiny else (5, 10, 20, 20),
        use_linear_projection=True,
        norm_num_groups=8 if tiny else 32,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2 if tiny else 23,
            num_attention_heads=4 if tiny else 16,
        )
    )
    StableDiffusionPipeline(
        vae=autoencoder(tiny),
        text_encoder=text,
        tokenizer=CLIPTokenizer(*vocabulary(folder), model_max_length=TOKENS),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def autoencoder(tiny: bool) -> Any:
    """Build Stable Diffusion's autoencoder with random weights, or one in small."""
    from diffusers import AutoencoderKL

    channels = (8, 8, 8, 8) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1 if tiny else 2,
        latent_channels=4,
        norm_num_groups=8 if tiny else 32,
    )


def vocabulary(folder: Path) -> tuple[str, str]:
    """Write a CLIP vocabulary of single letters: text costs the same whatever the words are."""
    letters = [chr(code) for code in range(97, 123)]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return str(folder / "vocab.json"), str(folder / "merges.txt")


def device_name() -> str:
    """Name the device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def cuda_tests() -> list[str]:
    """Run the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "tests/test_device.py", "-q", "-m", "not cluster"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return [f"`pytest tests/test_device.py`: {done.stdout.strip().splitlines()[-1]}"]


def main() -> None:
    """Run the sections one after the other, and write each result as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps")
    parser.add_argument("--minutes", type=float, default=9.0, help="no section starts later")
    parser.add_argument("--output", type=Path, default=RESULT, help="the table (.md)")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu --tiny runs the same code on the CPU.")
    started, sizes = time.monotonic(), TINY if options.tiny else SIZES
    lines = [
        "# One GPU",
        "",
        f"`python benchmarks/gpu.py --device {device.type}{' --tiny' if options.tiny else ''}`, "
        f"{date.today()}, {device_name()}, torch {torch.__version__}, "
        f"lightning {version('lightning')}, diffusers {version('diffusers')}, Python "
        f"{platform.python_version()}.",
    ]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        autoencoder(options.tiny).save_pretrained(folder / "vae")
        sections: dict[str, Callable[[], list[str]]] = {
            "Tests": cuda_tests,
            "Training": lambda: train(sizes, folder / "vae", device, 1 if options.tiny else 5),
            "Idle device": lambda: idle(sizes[0], folder / "vae", device),
            "Sampling": lambda: sample(write_pipeline(folder, options.tiny), device, options.tiny),
        }
        for title, section in sections.items():
            if time.monotonic() - started > 60 * options.minutes:
                lines += ["", f"## {title}", "", "Not run: the time was up."]
                continue
            print(f"{title} ...", file=sys.stderr, flush=True)
            try:
                found = section()
            except Exception:  # the next section may still be measured
                found = ["```", *traceback.format_exc().strip().splitlines()[-8:], "```"]
            lines += ["", f"## {title}", "", *found]
            options.output.write_text("\n".join(lines) + "\n")
    print(options.output.read_text())


if __name__ == "__main__":
    main()
