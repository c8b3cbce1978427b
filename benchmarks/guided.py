"""Errors at few steps under guidance, for exact guided denoisers and trained models.

    python benchmarks/guided.py [--models RUN ...] [--write]

For each guidance scale and rescale, and S network calls:

path: the root mean square distance from the converged solution of the same guided denoiser, from
    the same noise; in data units for the exact denoisers, in levels of 255 for trained models.
W1: the 1-Wasserstein distance between the brightness of samples of a class and of the class's
    data, averaged over classes.
adherence: the mean posterior p(class | sample) of the requested class, by Bayes' rule.
range: the largest |x| of the samples over the largest of the data.

Three kinds of data, whose denoisers are known exactly with and without a class: OpenMoji glyphs by
background, 32 x 32 (60 glyphs of the half that was not used for any choice), crops of the
photographs of scikit-image by photograph, 32 x 32, and a mixture of Gaussians in 16 dimensions.
Trained models are runs of configs/quickstart.yaml with other seeds; their prompts are the config's.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from contenders import ALL, SCHEDULE, Denoise
from torch import Tensor

from zsnr import EmpiricalDenoiser, Guidance, SampleNoise, get_sampler, get_timesteps
from zsnr.metrics import wasserstein_1
from zsnr.oracle import span

COUNTS = (5, 8, 10, 15, 20)
GUIDANCE = tuple(
    Guidance(w, phi) for w in (1.0, 3.0, 5.0, 7.5) for phi in (0.7, 0.0) if w > 1 or phi > 0
)
Row = dict[str, object]
TRAINED_GUIDANCE = tuple(g for g in GUIDANCE if g.rescale > 0 or g.scale == 7.5)
FIRST_ORDER = ("ddim, trailing", "ddim, log_snr")
EXACT = ("OpenMoji", "photographs", "Gaussians")
MEASURES = ("path", "w1", "adherence", "range")
SMOOTHING = 250
"""The timestep of the noise that smooths the posterior: sigma / alpha = 0.35."""


@dataclass(frozen=True)
class Case:
    """One dataset, or one model.

    Args:
        name: Name in the table.
        noise: x_T, (B, *).
        denoiser: Maps guidance to the denoiser.
        show: Maps samples to the compared values, (B, *).
        measure: Maps shown samples to W1, adherence and range; None = only path.
        steps: Number of steps of the converged solution.
        guidance: Guidance settings to measure.
    """

    name: str
    noise: Tensor
    denoiser: Callable[[Guidance], Denoise]
    show: Callable[[Tensor], Tensor]
    measure: Callable[[Tensor], dict[str, float]] | None
    steps: int
    guidance: tuple[Guidance, ...] = GUIDANCE


def glyphs(count: int = 60) -> tuple[Tensor, Tensor]:
    """Return glyphs of the held-out half on each background, (N, 3, 32, 32), and backgrounds."""
    from zsnr.data.openmoji import BACKGROUNDS, list_glyphs, render

    chosen = list_glyphs()[1::2]
    chosen = chosen[:: max(1, len(chosen) // count)][:count]
    images = [
        np.asarray(render(glyph, 32, rgb), dtype=np.float64).transpose(2, 0, 1) / 127.5 - 1
        for glyph in chosen
        for rgb in BACKGROUNDS.values()
    ]
    classes = torch.arange(len(BACKGROUNDS)).repeat(len(chosen))
    return torch.from_numpy(np.stack(images)), classes


PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
TEXTURES = ("brick", "grass", "gravel", "moon", "coins")


def photographs(
    count: int = 60, names: Sequence[str] = PHOTOGRAPHS, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return crops of photographs, (N, 3, 32, 32), and the photograph of each."""
    import skimage.data
    from skimage.transform import resize

    generator, images = np.random.default_rng(seed), []
    for name in names:
        photo = getattr(skimage.data, name)().astype(np.float64) / 127.5 - 1
        if photo.ndim == 2:
            photo = np.stack([photo] * 3, axis=2)
        for _ in range(count):
            size = int(generator.integers(48, 160))
            y, x = (int(generator.integers(0, side - size)) for side in photo.shape[:2])
            crop = resize(photo[y : y + size, x : x + size], (32, 32), anti_aliasing=True)
            images.append(crop.transpose(2, 0, 1))
    return torch.from_numpy(np.stack(images)), torch.arange(len(names)).repeat_interleave(count)


def gaussians(members: int = 12, seed: int = 7) -> tuple[Tensor, Tensor, float]:
    """Return members of four classes of different brightness and spread, classes, and the std."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 0.2, 0.35, 0.5], dtype=torch.float64).view(4, 1, 1)
    shift = torch.linspace(-0.4, 0.4, 4, dtype=torch.float64).view(4, 1, 1)
    center = torch.randn(4, 1, 16, generator=generator, dtype=torch.float64) / 4 + shift
    noise = torch.randn(4, members, 16, generator=generator, dtype=torch.float64)
    classes = torch.arange(4).repeat_interleave(members)
    return (center + spread * noise).flatten(0, 1), classes, 0.15


def exact(name: str, samples: int) -> Case:
    """Make the case of an exact guided denoiser of one dataset."""
    std = 0.0
    if name == "Gaussians":
        images, classes, std = gaussians()
        coordinates, basis = images, torch.eye(16, dtype=torch.float64)
        data = images  # brightness and range: those of members, with their spread below
    else:
        images, classes = {"OpenMoji": glyphs, "photographs": photographs}[name]()
        coordinates, basis = span(images)
        data = images.flatten(1)
    oracle = EmpiricalDenoiser(
        SCHEDULE, coordinates, classes=classes, std=std, batch_invariant=False
    )
    if std:
        generator = torch.Generator().manual_seed(1)
        rows = data.repeat(64, 1)
        data = rows + std * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        classes = classes.repeat(64)
    labels = torch.arange(samples) % oracle.num_classes
    noise = SampleNoise(range(samples)).randn(images.shape[1:], dtype=torch.float64)

    def measure(x: Tensor) -> dict[str, float]:
        p = oracle.posterior(x @ basis.T, -1 if std else SMOOTHING)
        w1 = [
            wasserstein_1(x[labels == k].mean(1), data[classes == k].mean(1))
            for k in range(oracle.num_classes)
        ]
        return {
            "w1": float(np.mean(w1)),
            "adherence": float(p[torch.arange(samples), labels].mean()),
            "range": float(x.abs().max() / data.abs().max()),
        }

    return Case(
        name,
        noise.flatten(1) @ basis.T,
        lambda guidance: oracle.guided(labels, None if guidance.scale == 1 else guidance),
        lambda x: x @ basis,
        measure,
        500,
    )


def trained(run: Path, prompts: int) -> Case:
    """Make the case of a trained model."""
    import yaml

    from zsnr.pipeline import TextToImage

    pipe = TextToImage.from_pretrained(run / "checkpoints" / "last.ckpt", device="cpu")
    config = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    listed = yaml.safe_load(config.read_text())["data"]["prompts"]
    texts = [line["prompt"] for line in listed if line["prompt"]]
    texts = texts[:: max(1, len(texts) // prompts)][:prompts]
    size = pipe.model.image_size
    shape = pipe.model.codec.latent_shape(size, size)

    def denoiser(guidance: Guidance) -> Denoise:
        return pipe.denoiser(texts, guidance=guidance)

    def show(x: Tensor) -> Tensor:
        return pipe.model.codec.decode(x.float()).clamp(-1, 1) * 127.5

    noise = SampleNoise(range(len(texts))).randn(shape)
    return Case(name_of(run), noise, denoiser, show, None, 250, TRAINED_GUIDANCE)


def name_of(kind: object) -> str:
    """Return the name of a case."""
    return kind.name if isinstance(kind, Path) else str(kind)


def converged(case: Case, denoiser: Denoise) -> Tensor:
    """Solve with many second-order steps, so that guidance is no longer stiff."""
    grid = get_timesteps("log_snr", case.steps, schedule=SCHEDULE)
    return get_sampler("dpmpp_2m").sample(denoiser, SCHEDULE, case.noise, grid)


@torch.no_grad()
def measure_case(
    make: tuple[Callable[..., Case], tuple[object, ...]], contenders: Sequence[str]
) -> list[Row]:
    """Measure every contender with every guidance and S, one row each."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    case = make[0](*make[1])
    by_name = {contender.name: contender for contender in ALL}
    rows: list[Row] = []
    for guidance in case.guidance:
        denoiser = case.denoiser(guidance)
        solution = case.show(converged(case, denoiser))
        facts = {"case": case.name, "scale": guidance.scale, "rescale": guidance.rescale}
        if case.measure is not None:
            end = {**facts, "contender": "converged", "S": case.steps, "path": 0.0}
            rows.append(end | case.measure(solution))
        start = time.perf_counter()
        for name in contenders:
            for S in COUNTS:
                row: Row = {**facts, "contender": name, "S": S}
                try:
                    shown = case.show(by_name[name].sample(denoiser, case.noise, S))
                except (IndexError, AssertionError):  # diffusers' schedulers, for some S
                    rows.append(row)
                    continue
                if not by_name[name].random:
                    row["path"] = float((shown - solution).square().mean().sqrt())
                if case.measure is not None and bool(shown.isfinite().all()):
                    row |= case.measure(shown)
                rows.append(row)
        seconds = time.perf_counter() - start
        line = f"{case.name}, {guidance.scale:g}, {guidance.rescale:g}: {seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)
    return rows


def cell(rows: Sequence[Row], measure: str, **wanted: object) -> float | None:
    """Find one value; None if it was not measured."""
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()):
            value = row.get(measure)
            return float(value) if isinstance(value, (int, float)) else None
    return None


def summary(rows: Sequence[Row], case: str) -> str:
    """Compare the recommended sampling with DDIM and with the best other contender."""
    lines = [
        "| w, rescale | | " + " | ".join(f"S = {S}" for S in COUNTS) + " |",
        "|---" * (len(COUNTS) + 2) + "|",
    ]
    for guidance in GUIDANCE:
        setting = {"case": case, "scale": guidance.scale, "rescale": guidance.rescale}
        if not any(all(row[key] == value for key, value in setting.items()) for row in rows):
            continue
        cells_by_name: dict[str, list[str]] = {"recommended": [], "DDIM": [], "best other": []}
        for S in COUNTS:
            errors = {
                str(row["contender"]): float(row["path"])  # type: ignore[arg-type]
                for row in rows
                if row.get("S") == S
                and all(row[key] == value for key, value in setting.items())
                and isinstance(row.get("path"), float)
                and math.isfinite(row["path"])  # type: ignore[arg-type]
            }
            error = errors.pop("recommended", math.nan)
            best = min(errors, key=lambda name: errors[name])
            ddim = min(errors[name] for name in FIRST_ORDER if name in errors)
            cells_by_name["recommended"].append(
                f"**{error:.3g}**" if error <= errors[best] else f"{error:.3g}"
            )
            cells_by_name["DDIM"].append(f"{ddim:.3g}")
            cells_by_name["best other"].append(f"{errors[best]:.3g} ({best})")
        title = f"{guidance.scale:g}" + ("" if guidance.scale == 1 else f", {guidance.rescale:g}")
        lines += [
            f"| {title if name == 'recommended' else ''} | {name} | " + " | ".join(cells) + " |"
            for name, cells in cells_by_name.items()
        ]
    return "\n".join(lines)


def full(rows: Sequence[Row], case: str, guidance: Guidance, measure: str) -> str:
    """Tabulate one measure of every contender with one guidance."""
    setting = {"case": case, "scale": guidance.scale, "rescale": guidance.rescale}
    measured = {row["contender"] for row in rows if row["case"] == case}
    lines = [
        "| | " + " | ".join(f"S = {S}" for S in COUNTS) + " |",
        "|---" * (len(COUNTS) + 1) + "|",
    ]
    for contender in ALL:
        if contender.name not in measured:
            continue
        values = [cell(rows, measure, **setting, contender=contender.name, S=S) for S in COUNTS]
        cells = ("-" if value is None else f"{value:.3g}" for value in values)
        lines.append(f"| {contender.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(rows: Sequence[Row]) -> str:
    """Write all tables."""
    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    default = Guidance()
    parts = []
    for case in cases:
        unit = "levels of 255" if case not in EXACT else "data units"
        parts.append(
            f"## {case}\n\nPath error in {unit}: the recommended sampling, the better of `ddim` on "
            f"`trailing` and on `log_snr`, and the best of all other contenders.\n\n"
            f"{summary(rows, case)}\n"
        )
    parts.append("# Every contender at the default guidance, 7.5 with rescale 0.7\n")
    for case in cases:
        for measure in MEASURES if case in EXACT else MEASURES[:1]:
            setting = {"case": case, "scale": 7.5, "rescale": 0.7, "contender": "converged"}
            end = cell(rows, measure, **setting)
            note = "" if end is None or measure == "path" else f"; converged: {end:.3g}"
            parts.append(f"## {case}: {measure}{note}\n\n{full(rows, case, default, measure)}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", type=Path, default=[], help="run folders")
    parser.add_argument("--exact", nargs="*", default=list(EXACT), help="kinds of data")
    parser.add_argument("--samples", type=int, default=100, help="samples of exact denoisers")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each trained model")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--rows", type=Path, help="file of results, which are reused and added")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    arguments = parser.parse_args()
    names = [contender.name for contender in ALL]
    jobs: list[tuple[Callable[..., Case], tuple[object, ...]]] = [
        *((exact, (name, arguments.samples)) for name in arguments.exact),
        *((trained, (run, arguments.prompts)) for run in arguments.models),
    ]
    results = Path(__file__).parent / "results"
    start = time.perf_counter()
    rows: list[Row] = []
    if arguments.rows and arguments.rows.exists():
        rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    measured = {row["case"] for row in rows}
    jobs = [(make, args) for make, args in jobs if name_of(args[0]) not in measured]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(measure_case, job, names) for job in jobs]):
            rows += future.result()
            if arguments.rows:
                arguments.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = [name_of(kind) for kind in (*EXACT, *arguments.models)]
    rows.sort(key=lambda row: order.index(str(row["case"])) if row["case"] in order else 99)
    if not arguments.write:
        print(report(rows))
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    lines = [json.dumps(row) for row in rows]
    (results / "guided.jsonl").write_text("\n".join(lines) + "\n")
    (results / "guided.md").write_text(
        f"# Few steps under guidance\n\n{date.today()}, commit {commit}, {versions}, Python "
        f"{platform.python_version()}, {platform.machine()}, "
        f"{(time.perf_counter() - start) / 60:.0f} minutes in {arguments.jobs} processes.\n"
        f"Made by `python benchmarks/guided.py --write` with {arguments.samples} samples of each "
        f"exact denoiser and {arguments.prompts} prompts of each trained model; its docstring "
        "describes the measures. Every value is a row of [guided.jsonl](guided.jsonl). Nothing was "
        "tuned on these data or models; zsnr/samplers/multiscale.py lists what was tuned.\n\n"
        f"{report(rows)}"
    )


if __name__ == "__main__":
    main()
