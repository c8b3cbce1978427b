"""Errors of samplers and timestep grids at few steps without guidance, with exact denoisers.

    python benchmarks/fidelity.py [--quick] [--write]

Three measures at equal network calls S. std: the worst relative error of the standard deviation on
Gaussian data N(-0.8, s^2) over six s from 0.1 to 1, without sampling error. W1: the 1-Wasserstein
distance of brightness between samples and data, on OpenMoji images; the floor is the expected W1 of
the same number of draws from the data. path: the root mean square distance of pixels to the
solution in 1000 steps from the same noise. The images are every third glyph of one half of the
glyphs, on five backgrounds, 32 x 32; grids and weights were chosen on the other half. All
contenders start from the same noise; diffusers' schedulers get the same exact v, at their
timesteps. With guidance the ranking differs: benchmarks/guided.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contenders import ALL, SCHEDULE, Contender, zsnr_sampler
from torch import Tensor
from tqdm import tqdm

from zsnr import EmpiricalDenoiser, GaussianDenoiser, SampleNoise
from zsnr.data.openmoji import BACKGROUNDS, list_glyphs, render
from zsnr.metrics import wasserstein_1
from zsnr.oracle import span
from zsnr.reports.images import save_figure

COUNTS = (5, 8, 10, 15, 20, 25, 50)
STDS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
MEAN, SIZE = -0.8, 32
RECOMMENDED = "multiscale, log_snr"
CONTENDERS = [c for c in ALL if c.name != "recommended" and not c.random]
PLOTTED = (
    "ddim, trailing",
    "dpmpp_2m, log_snr",
    "dpmpp_2m, karras",
    "unipc, log_snr",
    "ipndm order=3, log_snr",
    "deis order=2, log_snr",
    "dpmpp_3m, log_snr",
    "multiscale, karras",
    RECOMMENDED,
    "diffusers DDIM, trailing",
    "diffusers DPM++ 2M, Karras",
    "diffusers DPM++ 2M, uniform log SNR",
    "diffusers UniPC, trailing",
)
"""Contenders in the figure; the tables list all."""


def glyph_images(half: int) -> Tensor:
    """Return every third of the even (0) or odd (1) glyphs on all backgrounds, (N, 3, 32, 32)."""
    images = [
        np.asarray(render(glyph, SIZE, rgb), dtype=np.float64).transpose(2, 0, 1) / 127.5 - 1
        for glyph in list_glyphs()[half::2][::3]
        for rgb in BACKGROUNDS.values()
    ]
    return torch.from_numpy(np.stack(images))


def std_error(contender: Contender, S: int) -> float:
    """Return the worst |std / s - 1|, from the outputs for x_T = 1 and 0 (samplers are affine)."""
    s = torch.tensor(STDS, dtype=torch.float64)
    ends = torch.stack([torch.zeros_like(s), torch.ones_like(s)])
    low, high = contender.sample(GaussianDenoiser(SCHEDULE, MEAN, s), ends, S)
    return float(((high - low).abs() / s - 1).abs().max())


def measure(
    samples: int, paths: int, batch_size: int = 256
) -> tuple[float, dict[str, dict[int, tuple[float, float, float] | None]]]:
    """Measure every contender at every S.

    Args:
        samples: Samples of each contender, with seeds 0, 1, 2, ...
        paths: Number of samples that are compared with the solution in 1000 steps.
        batch_size: Batch size.

    Returns:
        The floor of W1; and (std, W1, path) by contender and S, None if the contender fails.
    """
    images = glyph_images(half=1)
    coordinates, basis = span(images)
    denoiser = EmpiricalDenoiser(SCHEDULE, coordinates, batch_invariant=False)
    data, brightness = images.flatten(1).mean(1), basis.mean(1)
    generator = np.random.default_rng(0)
    floor = float(
        np.mean(
            [
                wasserstein_1(torch.from_numpy(generator.choice(data.numpy(), samples)), data)
                for _ in range(100)
            ]
        )
    )

    def noises() -> Iterator[Tensor]:
        for start in range(0, samples, batch_size):
            seeds = range(start, min(start + batch_size, samples))
            z = SampleNoise(seeds).randn(images.shape[1:], dtype=torch.float64)
            yield z.flatten(1) @ basis.T

    x_Ts = list(noises())
    calls = len(CONTENDERS) * sum(COUNTS) * len(x_Ts) + 1000
    results: dict[str, dict[int, tuple[float, float, float] | None]] = {}
    with tqdm(total=calls, unit="call", desc="exact denoiser", mininterval=5) as bar:

        def counted(x_t: Tensor, t: Tensor) -> Tensor:
            bar.update()
            return denoiser(x_t, t)

        counted.guidance = None  # type: ignore[attr-defined]
        exact = zsnr_sampler("dpmpp_2m", "trailing").sample(counted, torch.cat(x_Ts)[:paths], 1000)
        for contender in CONTENDERS:
            results[contender.name] = {}
            for S in COUNTS:
                try:
                    error = std_error(contender, S)
                    x_0 = torch.cat([contender.sample(counted, x_T, S) for x_T in x_Ts])
                except (IndexError, AssertionError):  # diffusers' schedulers, for some S
                    results[contender.name][S] = None
                    continue
                apart = (x_0[:paths] - exact).square().sum() / (paths * basis.shape[1])
                results[contender.name][S] = (
                    error,
                    wasserstein_1(x_0 @ brightness, data),
                    float(apart.sqrt()),
                )
    return floor, results


def table(results: dict[str, dict[int, tuple[float, float, float] | None]], measure: int) -> str:
    """Format one measure; the best of each column is bold."""
    scale, digits = ((100, 1), (1, 4), (1, 3))[measure]
    best = {
        S: min(row[S][measure] for row in results.values() if row[S] is not None)  # type: ignore[index]
        for S in COUNTS
    }
    lines = [
        "| | " + " | ".join(f"S = {S}" for S in COUNTS) + " |",
        "|---" * (len(COUNTS) + 1) + "|",
    ]
    for name, row in results.items():
        cells = []
        for S in COUNTS:
            values = row[S]
            if values is None:
                cells.append("fails")
                continue
            text = (
                f"{values[measure] * scale:.{digits}f}" if np.isfinite(values[measure]) else "NaN"
            )
            cells.append(f"**{text}**" if values[measure] == best[S] else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(
    results: dict[str, dict[int, tuple[float, float, float] | None]], floor: float, path: Path
) -> None:
    """Draw the measures against S, and both oracles against each other at S = 5, 10 and 25."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    results = {name: results[name] for name in PLOTTED}
    figure = Figure(figsize=(13, 8), layout="constrained")
    (upper, lower) = figure.subplots(2, 3)
    names = ("worst error of std", "W1 of brightness", "distance to 1000 steps")
    for axes, measure, title in zip(upper, range(3), names, strict=True):
        for name, row in results.items():
            points = [(S, row[S][measure]) for S in COUNTS if row[S] is not None]  # type: ignore[index]
            axes.plot(*zip(*points, strict=True), **_style(name))
        axes.set(title=title, xlabel="network calls S", xscale="log", yscale="log")
        axes.set_xticks(COUNTS, map(str, COUNTS))
        axes.minorticks_off()
    upper[2].set_ylim(bottom=0.01)
    upper[1].axhline(floor, color="gray", linestyle=":", label="floor")
    for axes, S in zip(lower, (5, 10, 25), strict=True):
        for name, row in results.items():
            values = row[S]
            if values is not None:
                axes.plot(values[0], values[1], **{**_style(name), "linestyle": ""})
        axes.axhline(floor, color="gray", linestyle=":")
        axes.set(title=f"both oracles at S = {S}", xscale="log", yscale="log")
        axes.set(xlabel="worst error of std, Gaussians", ylabel="W1 of brightness, OpenMoji")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    figure.legend(*upper[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _style(name: str) -> dict[str, Any]:
    i, foreign = PLOTTED.index(name), name.startswith("diffusers")
    return {
        "label": name,
        "color": "black" if name == RECOMMENDED else f"C{i % 10}",
        "linestyle": "--" if foreign else "-",
        "marker": "x" if foreign else "o",
        "linewidth": 2.5 if name == RECOMMENDED else 1.2,
        "markersize": 8 if name == RECOMMENDED else 5,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512 samples instead of 4096")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    samples, paths = (512, 64) if arguments.quick else (4096, 512)
    start = time.process_time()
    with torch.no_grad():
        floor, measures = measure(samples, paths)
    minutes = (time.process_time() - start) / 60
    if arguments.json:
        print(json.dumps({"samples": samples, "floor": floor, "found": measures}))
    text = (
        "Worst relative error of std over s in "
        f"{', '.join(map(str, STDS))}, percent:\n\n{table(measures, 0)}\n\n"
        f"W1 of brightness, {samples} samples (floor {floor:.4f}):\n\n{table(measures, 1)}\n\n"
        f"Root mean square distance to the solution in 1000 steps, {paths} samples:\n\n"
        f"{table(measures, 2)}\n"
    )
    if not arguments.json:
        print(text)
    if arguments.write:
        results = Path(__file__).parent / "results"
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
        plot(measures, floor, results / "fidelity.png")
        (results / "fidelity.md").write_text(
            "# Samplers and grids at few steps, without guidance\n\n"
            "With guidance the ranking differs: [guided.md](guided.md).\n\n"
            f"{date.today()}, {versions}, Python {platform.python_version()}, "
            f"{platform.machine()}, threads: {torch.get_num_threads()}, {minutes:.0f} processor "
            "minutes.\n"
            f"Made by `python benchmarks/fidelity.py{' --quick' * arguments.quick} --write`; its "
            "docstring describes the measures.\n\n"
            f"{text}\n![the measures against S](fidelity.png)\n"
        )


if __name__ == "__main__":
    main()
