"""Errors of guidance methods in brightness and spread at equal adherence, with exact denoisers.

    python benchmarks/guidance.py [--models RUN ...] [--write]

Classes of the data overlap, so that samples of the exact conditional denoiser do not always belong
to their class, and guidance increases adherence: the mean posterior p(class | sample) of the
requested class, by Bayes' rule. Its costs are

bias: the distance between the mean brightness of a class's samples and of its data, averaged over
    classes, in units of the data's standard deviation of brightness;
loss of spread: 1 - (standard deviation of a class's samples / of its data), averaged over classes
    and components; negative if spread grows.

Each method is swept over its scale; at the adherence of the paper's 7.5 with rescale 0.7, its bias
and loss are interpolated linearly. Two kinds of data: a mixture of Gaussians in 16 dimensions, and
2 x 2 crops of five textures of scikit-image, each with a Gaussian around it. The intervals were
chosen on another mixture and on crops of its color photographs. Autoguidance guides away from the
conditional denoiser of the same, smoothed data. 100 steps of `multiscale` on `guided`; for CFG++,
whose strength depends on the steps, of `ddim` on `trailing`.

Trained models are runs of configs/quickstart.yaml: there the bias is the distance between the mean
luma of samples whose prompt names a background and of the data with that background, averaged over
the five backgrounds, in levels of 255, at common scales, without adherence.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import SCHEDULE, Denoise
from guided import TEXTURES, name_of, photographs
from torch import Tensor
from torch.nn.functional import avg_pool2d

from zsnr import (
    Conditioning,
    Denoiser,
    EmpiricalDenoiser,
    Guidance,
    SampleNoise,
    get_sampler,
    get_timesteps,
)
from zsnr.reports.images import save_figure

SCALES = (1.25, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 25.0)
LAMBDAS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
STEPS = 100


@dataclass(frozen=True)
class Method:
    """A guidance method.

    Args:
        name: Name in the table.
        guidance: Maps the scale to guidance.
        scales: Scales of the sweep.
        weak: Whether it guides away from a weaker network.
    """

    name: str
    guidance: Callable[[float], Guidance]
    scales: Sequence[float] = SCALES
    weak: bool = False


def plain(name: str, rescale: float = 0.0, **options: Any) -> Method:
    """Classifier-free guidance with other options."""
    return Method(name, lambda w: Guidance(w, rescale, **options))


def curve(w: float) -> Guidance:
    """Full scale at medium noise levels, none at both ends."""
    return Guidance(rescale=0.0, curve=((-8.0, 1.0), (-3.0, w), (1.0, w), (4.0, 1.0)))


METHODS = (
    plain("plain, rescale 0"),
    plain("the paper's, rescale 0.7", 0.7),
    plain("rescale 1", 1.0),
    plain("not at SNR 0", at_zero_snr=False),
    plain("interval (0.3, 5), rescale 0.7", 0.7, interval=(0.3, 5.0)),
    plain("interval (0.1, 1), rescale 0", interval=(0.1, 1.0)),
    plain("interval (0.1, 1), rescale 0.7", 0.7, interval=(0.1, 1.0)),
    plain("interval (0.1, 0.7), rescale 0.7", 0.7, interval=(0.1, 0.7)),
    Method("curve over log SNR", curve),
    plain("APG", method="apg"),
    plain("APG, eta 0.5", method="apg", apg_parallel=0.5),
    plain("APG, norm 2", method="apg", apg_norm=2.0),
    plain("CFG-Zero*", method="cfg_zero_star"),
    Method("CFG++", lambda w: Guidance(w, 0.0, method="cfg_pp"), LAMBDAS),
    Method("autoguidance", lambda w: Guidance(w, 0.0), weak=True),
    plain("dynamic threshold 0.995", threshold=0.995),
)
PAPER = METHODS[1].name


@dataclass(frozen=True)
class Data:
    """Members of a dataset, with a Gaussian around each."""

    name: str
    members: Tensor
    classes: Tensor
    std: float
    weaker: float


def kinds() -> list[Data]:
    """Make both datasets; std and centers result in a posterior of about 0.8 without guidance."""
    generator = torch.Generator().manual_seed(23)
    center = torch.randn(4, 1, 16, generator=generator, dtype=torch.float64) * 0.05
    center += torch.linspace(-0.15, 0.15, 4, dtype=torch.float64).view(4, 1, 1)
    spread = torch.tensor([0.2, 0.25, 0.25, 0.3], dtype=torch.float64).view(4, 1, 1)
    noise = torch.randn(4, 24, 16, generator=generator, dtype=torch.float64)
    images, classes = photographs(40, TEXTURES, seed=1)
    small = avg_pool2d(images, 16)
    return [
        Data(
            "Gaussians",
            (center + spread * noise).flatten(0, 1),
            torch.arange(4).repeat_interleave(24),
            0.3,
            0.45,
        ),
        Data("textures", small.flatten(1), classes, 0.3, 0.45),
    ]


@torch.no_grad()
def sweep(data: Data, method: Method, samples: int) -> list[dict[str, float]]:
    """Measure a method at each of its scales."""
    oracle, weak = (
        EmpiricalDenoiser(
            SCHEDULE, data.members, classes=data.classes, std=std, batch_invariant=False
        )
        for std in (data.std, data.weaker)
    )
    labels = torch.arange(samples) % oracle.num_classes
    x_T = SampleNoise(range(samples)).randn(data.members.shape[1:], dtype=torch.float64)
    rows = []
    for scale in method.scales:
        guidance = method.guidance(scale)
        denoiser: Denoise = oracle.guided(labels, guidance)
        if method.weak:
            cond = Conditioning(labels.to(torch.float64).view(-1, 1, 1))
            denoiser = Denoiser(
                oracle.network, SCHEDULE, cond=cond, guidance=guidance, weak_network=weak.network
            )
        pair = ("ddim", "trailing") if guidance.method == "cfg_pp" else ("multiscale", "guided")
        grid = get_timesteps(pair[1], STEPS, schedule=SCHEDULE)
        x_0 = get_sampler(pair[0]).sample(denoiser, SCHEDULE, x_T, grid)
        rows.append({"scale": scale, **measure(oracle, data, x_0, labels)})
    return rows


def measure(oracle: EmpiricalDenoiser, data: Data, x_0: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute adherence, bias and loss of spread of samples (B, D)."""
    p = oracle.posterior(x_0, -1)[torch.arange(len(labels)), labels]
    bias, loss = [], []
    brightness = data.members.mean(1)
    unit = float((brightness.var(correction=0) + data.std**2 / data.members.shape[1]).sqrt())
    for k in range(oracle.num_classes):
        members, samples = data.members[data.classes == k], x_0[labels == k]
        bias.append(abs(float(samples.mean() - members.mean())) / unit)
        spread = (members.var(0, correction=0) + data.std**2).mean().sqrt()
        loss.append(1 - float(samples.var(0, correction=0).mean().sqrt() / spread))
    return {
        "adherence": float(p.mean()),
        "bias": float(np.mean(bias)),
        "loss": float(np.mean(loss)),
    }


TRAINED = {
    "no guidance": Guidance(1.0),
    "the paper's: 7.5, rescale 0.7": Guidance(),
    "plain 7.5": Guidance(7.5, 0.0),
    "3, rescale 0.7": Guidance(3.0, 0.7),
    "7.5, rescale 0.7, not at SNR 0": Guidance(7.5, 0.7, at_zero_snr=False),
    "7.5, rescale 0.7, interval (0.3, 5)": Guidance(7.5, 0.7, interval=(0.3, 5.0)),
    "7.5, rescale 0.7, interval (0.1, 1)": Guidance(7.5, 0.7, interval=(0.1, 1.0)),
    "APG 7.5": Guidance(7.5, 0.0, method="apg"),
    "CFG-Zero* 7.5": Guidance(7.5, 0.0, method="cfg_zero_star"),
    "CFG++ 0.3": Guidance(0.3, 0.0, method="cfg_pp"),
    "autoguidance 3": Guidance(3.0, 0.0, against="raw"),
}


def trained_bias(run: Path) -> dict[str, float]:
    """Measure the bias of a trained model's brightness, by guidance."""
    import yaml

    from zsnr.data.openmoji import BACKGROUNDS, list_glyphs, render
    from zsnr.metrics import mean_luma
    from zsnr.pipeline import TextToImage
    from zsnr.reports.images import image_pixels

    def brightness(images: list[Any]) -> float:
        return float(mean_luma(image_pixels(images)).mean()) * 127.5

    config = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    listed = yaml.safe_load(config.read_text())["data"]["prompts"]
    prompts = [line["prompt"] for line in listed if line["prompt"]]
    pipe = TextToImage.from_pretrained(
        run / "checkpoints" / "last.ckpt", device="cpu", raw_beside=True
    )
    biases = {}
    for name, guidance in TRAINED.items():
        images = pipe(
            prompts,
            seeds=range(len(prompts)),
            num_steps=25,
            guidance=guidance,
            batch_size=40,
            progress=False,
        )
        apart = []
        for background, rgb in BACKGROUNDS.items():
            generated = [
                image
                for image, prompt in zip(images, prompts, strict=True)
                if prompt.endswith(f"on a {background} background")
            ]
            shown = {prompt.partition(" on a ")[0] for prompt in prompts}
            data = [render(g, 64, rgb) for g in list_glyphs("demo") if g.name in shown]
            apart.append(abs(brightness(generated) - brightness(data)))
        biases[name] = float(np.mean(apart))
    return biases


def at_adherence(rows: Sequence[dict[str, float]], adherence: float) -> dict[str, float] | None:
    """Interpolate linearly at the first crossing of an adherence; None if it is not reached."""
    for low, high in pairwise(rows):
        if low["adherence"] <= adherence <= high["adherence"]:
            width = high["adherence"] - low["adherence"]
            share = (adherence - low["adherence"]) / width if width else 0.0
            return {key: low[key] + share * (high[key] - low[key]) for key in low}
    return None


def plot(results: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """Draw bias and loss of spread against adherence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    for row, (kind, methods) in zip(
        figure.subplots(len(results), 2, squeeze=False), results.items(), strict=True
    ):
        for axes, key in zip(row, ("bias", "loss"), strict=True):
            for i, (name, rows) in enumerate(methods.items()):
                axes.plot(
                    [point["adherence"] for point in rows],
                    [point[key] for point in rows],
                    color="black" if name == PAPER else f"C{i % 10}",
                    linestyle="-" if i < 10 else "--",
                    marker="o",
                    markersize=3,
                    label=name,
                )
            axes.set(title=kind, xlabel="adherence", ylabel=AXES[key])
    axes = figure.axes[0]
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save_figure(figure, path)


AXES = {"bias": "bias of brightness", "loss": "loss of spread"}


def table(methods: dict[str, list[dict[str, float]]], free: dict[str, float]) -> str:
    """Tabulate each method at the adherence of the paper's default."""
    paper = next(row for row in methods[PAPER] if row["scale"] == 7.5)
    lines = [
        f"Without guidance: adherence {free['adherence']:.3f}, bias {free['bias']:.3f}, loss "
        f"{free['loss']:.3f}. At adherence {paper['adherence']:.3f}, that of 7.5 with rescale 0.7:",
        "",
        "| method | scale | bias | loss of spread | bias / paper's | abs(loss / paper's) |",
        "|---" * 6 + "|",
    ]
    for name, rows in methods.items():
        row = at_adherence(rows, paper["adherence"])
        if row is None:
            highest = max(row["adherence"] for row in rows)
            lines.append(f"| {name} | not reached: at most {highest:.3f} | - | - | - | - |")
            continue
        ratios = (abs(row[key] / paper[key]) for key in ("bias", "loss"))
        lines.append(
            f"| {name} | {row['scale']:.2f} | {row['bias']:.3f} | {row['loss']:.3f} | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", type=Path, default=[], help="run folders")
    parser.add_argument("--samples", type=int, default=1000, help="samples per method and scale")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    arguments = parser.parse_args()
    start, measured, parts = time.perf_counter(), {}, []
    for data in kinds():
        methods = {}
        free = sweep(data, Method("none", lambda w: Guidance(w, 0.0), (1.0,)), arguments.samples)
        for method in METHODS:
            if method.name.startswith("dynamic") and data.name == "Gaussians":
                continue  # for pixels in [-1, 1]
            methods[method.name] = sweep(data, method, arguments.samples)
        measured[data.name] = methods
        every = "\n".join(
            f"| {name} | {row['scale']:g} | {row['adherence']:.3f} | {row['bias']:.3f} | "
            f"{row['loss']:.3f} |"
            for name, rows in methods.items()
            for row in rows
        )
        parts.append(
            f"## {data.name}\n\n{table(methods, free[0])}\n\nEvery scale:\n\n"
            f"| method | scale | adherence | bias | loss of spread |\n{'|---' * 5}|\n{every}\n"
        )
    if arguments.models:
        biases = {name_of(run): trained_bias(run) for run in arguments.models}
        lines = [
            f"| {name} | "
            + " | ".join(f"{bias[name]:.1f}" for bias in biases.values())
            + f" | {np.mean([bias[name] for bias in biases.values()]):.1f} |"
            for name in TRAINED
        ]
        parts.append(
            f"## Trained models\n\nBias of brightness in levels of 255, 40 prompts each, 25 steps:"
            f"\n\n| guidance | {' | '.join(biases)} | mean |\n{'|---' * (len(biases) + 2)}|\n"
            + "\n".join(lines)
            + "\n"
        )
    text = "\n".join(parts)
    if not arguments.write:
        print(text)
        return
    results = Path(__file__).parent / "results"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    plot(measured, results / "guidance.png")
    (results / "guidance.md").write_text(
        f"# Guidance methods at equal adherence\n\n{date.today()}, commit {commit}, torch "
        f"{version('torch')}, Python {platform.python_version()}, {platform.machine()}, "
        f"{(time.perf_counter() - start) / 60:.0f} minutes.\nMade by `python "
        f"benchmarks/guidance.py --write`, {arguments.samples} samples per row; its docstring "
        f"describes the measures.\n\n![adherence against bias and loss](guidance.png)\n\n{text}"
    )


if __name__ == "__main__":
    main()
