"""Train the small AutoencoderKL of the quickstart on OpenMoji and measure its latents.

64x64 RGB -> 16x16 with 4 channels. With e = y - x, as means over elements,

    loss = |e| + e^2 + kl_weight KL + a |z_rgb - pool(x)|^2,    a from 1 to 0 by mid-training

Yellow and red dominate the dataset, and with a plain loss greens and purples became gray. So the
first three channels start as the local mean color, and half of the images have permuted RGB
channels. 1600 steps with batch size 8: about 11 minutes on one CPU core, memory 1.6 GB. Writes a
diffusers folder with figures.json and prints one table.

    python benchmarks/train_openmoji_vae.py OUT
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import avg_pool2d

from zsnr import NoiseSchedule
from zsnr.data.openmoji import (
    ATTRIBUTION_NOTICE,
    BACKGROUNDS,
    LICENSE_URL,
    Glyph,
    list_glyphs,
    render,
)
from zsnr.metrics import kept_fraction, mean_mode

SIZE = 64
LATENT_CHANNELS = 4
GRAYS = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1  # (5, 3) in [-1, 1]
ORIGINAL = NoiseSchedule(zero_terminal_snr=False)

README = """\
# OpenMoji autoencoder

A small AutoencoderKL for demonstrations: 64x64 RGB images to 16x16 latents with 4 channels.
Trained by benchmarks/train_openmoji_vae.py on OpenMoji images only. Channel means are folded into
the weights, so the latents need one scale (scaling_factor) and no shift.

"""


LICENSE = f"""\
These weights were trained on OpenMoji images only (https://openmoji.org, CC BY-SA 4.0) and are
shared under the same license, Creative Commons Attribution-ShareAlike 4.0 International.

License summary: {LICENSE_URL}
License text:    {LICENSE_URL}legalcode
"""


@dataclass(frozen=True)
class GlyphImages:
    """All glyphs on any background: image = on_black + coverage (background + 1).

    on_black: (N, 3, 64, 64) in [-1, 1]; coverage: how much background shows, (N, 3, 64, 64).
    """

    on_black: Tensor
    coverage: Tensor

    @classmethod
    def draw(cls, glyphs: list[Glyph]) -> GlyphImages:
        layers = []
        for level in (0, 255):
            images = [render(glyph, SIZE, (level, level, level)) for glyph in glyphs]
            pixels = torch.stack([_to_tensor(p.tobytes()) for p in images])
            layers.append(pixels)
        return cls(layers[0] / 127.5 - 1, (layers[1] - layers[0]) / 255)

    def __len__(self) -> int:
        return len(self.on_black)

    def __call__(self, index: Tensor, background: Tensor) -> Tensor:
        """Compose glyphs `index` (B,) on colors `background` (B, 3) in [-1, 1]."""
        return self.on_black[index] + self.coverage[index] * (background[:, :, None, None] + 1)

    def on_grays(self, index: Tensor) -> Tensor:
        """Return each glyph on its five named grays, (len(index) * 5, 3, 64, 64)."""
        pairs = torch.cartesian_prod(index, torch.arange(len(GRAYS)))
        return self(pairs[:, 0], GRAYS[pairs[:, 1]])


def draw_backgrounds(index: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a color per glyph: half named grays, a fifth other grays, the rest any RGB.

    Glyph i never gets named gray i mod 5, on which reconstruction is measured.
    """
    n = len(index)
    skip = torch.randint(1, len(GRAYS), (n,), generator=generator)
    named = GRAYS[(index + skip) % len(GRAYS)]
    gray = (2 * torch.rand(n, 1, generator=generator) - 1).expand(n, 3)
    color = 2 * torch.rand(n, 3, generator=generator) - 1
    kind = torch.rand(n, 1, generator=generator)
    return torch.where(kind < 0.5, named, torch.where(kind < 0.7, gray, color))


def permute_channels(x: Tensor, generator: torch.Generator) -> Tensor:
    """Permute RGB at random, with one order per image."""
    order = torch.rand(len(x), 3, generator=generator).argsort(dim=1)
    return x.gather(1, order[:, :, None, None].expand_as(x))


def build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )
    # An initial posterior std of 1 would drown the latents in noise.
    torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -5.0)
    return vae


def train(
    vae: AutoencoderKL,
    data: GlyphImages,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    kl_weight: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    start = time.monotonic()
    for step in range(steps):
        index = torch.randint(len(data), (batch_size,), generator=generator)
        x = data(index, draw_backgrounds(index, generator))
        x[::2] = permute_channels(x[::2], generator)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator)).sample
        error = y - x
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        anchor = (posterior.mean[:, :3] - avg_pool2d(x, 4)).square().mean()
        loss = error.abs().mean() + error.square().mean() + kl_weight * kl
        loss = loss + max(0.0, 1 - 2 * step / steps) * anchor
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 50 == 0 or step == steps - 1:
            noise = posterior.std.mean() / posterior.mean.std()
            print(
                f"step {step:5d}  l1 {error.abs().mean():.4f}  mse {error.square().mean():.5f}"
                f"  anchor {anchor:.4f}  kl {kl:.2f}  noise/signal {noise:.3f}"
                f"  {time.monotonic() - start:.0f} s",
                flush=True,
            )


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.split(64)])


@torch.no_grad()
def normalize(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold the channels' means into the 1x1 convolutions and store scaling_factor = 1/std."""
    mean = latents.mean(dim=(0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    std = (latents - mean[:, None, None]).std()
    vae.register_to_config(scaling_factor=round(1 / std.item(), 5))


@torch.no_grad()
def measure(
    vae: AutoencoderKL, data: GlyphImages, latents: Tensor, demo: Tensor
) -> dict[str, float]:
    """Measure held-out reconstruction, and the latents of all glyphs on the five grays."""
    index = torch.arange(len(data))
    x = data(index, GRAYS[index % len(GRAYS)])
    y = torch.cat([vae(batch).sample.clamp(-1, 1) for batch in x.split(64)])
    error = y - x
    psnr = -10 * torch.log10((error / 2).square().mean(dim=(1, 2, 3)))
    background = (data.coverage.amin(dim=1, keepdim=True) == 1).expand_as(error)
    scaled = latents * vae.config.scaling_factor
    demo_latents = scaled.unflatten(0, (len(data), len(GRAYS)))[demo].flatten(0, 1)
    s, demo_s = mean_mode(scaled), mean_mode(demo_latents)
    return {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "PSNR (dB), held-out pairs": psnr.mean().item(),
        "PSNR (dB), 5th percentile": psnr.quantile(0.05).item(),
        "L1 in [-1, 1]": error.abs().mean().item(),
        "L1, flat background": error.abs()[background].mean().item(),
        "scaling_factor": vae.config.scaling_factor,
        "scaled mean": scaled.mean().item(),
        "scaled std": scaled.std().item(),
        **{f"scaled std, channel {c}": scaled[:, c].std().item() for c in range(scaled.shape[1])},
        "S, all glyphs": s,
        "kept fraction, all glyphs": kept_fraction(ORIGINAL, s),
        "S, demo glyphs": demo_s,
        "kept fraction, demo glyphs": kept_fraction(ORIGINAL, demo_s),
        "scaled std, demo glyphs": demo_latents.std().item(),
    }


def _to_tensor(pixels: bytes) -> Tensor:
    flat = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
    return flat.view(SIZE, SIZE, 3).permute(2, 0, 1).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("out", type=Path, help="output folder, which must not exist")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists. Choose a folder that does not exist.")

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    glyphs = list_glyphs()
    data = GlyphImages.draw(glyphs)
    demo_codepoints = {glyph.codepoint for glyph in list_glyphs("demo")}
    demo = torch.tensor([i for i, g in enumerate(glyphs) if g.codepoint in demo_codepoints])

    vae = build_vae()
    images = data.on_grays(torch.arange(len(data)))
    start = time.monotonic()
    train(
        vae,
        data,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        kl_weight=args.kl_weight,
        seed=args.seed,
    )
    seconds = time.monotonic() - start

    vae.eval()
    normalize(vae, encode(vae, images))
    figures = measure(vae, data, encode(vae, images), demo)
    figures["training seconds"] = seconds
    vae.save_pretrained(args.out)
    (args.out / "LICENSE").write_text(LICENSE, encoding="utf-8")
    (args.out / "README.md").write_text(README + ATTRIBUTION_NOTICE, encoding="utf-8")
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print("| figure | value |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value:.6g} |")


if __name__ == "__main__":
    main()
