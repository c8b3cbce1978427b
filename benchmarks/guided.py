"""What few steps lose under guidance: exact guided denoisers and trained models, all contenders.

    python benchmarks/guided.py [--models RUN ...] [--write]

For each guidance scale and rescale, and S network calls:

path: the root mean square distance from the converged solution of the same guided denoiser, from
    the same noise; in data units for the exact denoisers, in levels of 255 for trained models.
W1: the 1-Wasserstein distance between the brightness of samples of a class and of the class's
    data, averaged over classes.
adherence: the mean posterior p(class | sample) of the class that was asked for, by Bayes' rule.
range: the largest |x| of the samples over the largest of the data.

Three kinds of data, whose denoisers are known exactly with and without a class: OpenMoji glyphs by
background, 32 x 32 (60 glyphs of the half that nothing was chosen on), crops of the
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
"""The timestep whose noise smooths the posterior: sigma / alpha = 0.35."""


@dataclass(frozen=True)
class Case:
    """One kind of data, or one model.

    Args:
        name: In the table.
        noise: x_T, (B, *).
        denoiser: From guidance to the denoiser.
        show: From samples to what is compared, (B, *).
        measure: From shown samples to W1, adherence and range; None = only path.
        steps: Of the converged solution.
        guidance: What is measured.
    """

    name: str
    noise: Tensor
    denoiser: Callable[[Guidance], Denoise]
    show: Callable[[Tensor], Tensor]
    measure: Callable[[Tensor], dict[str, float]] | None
    steps: int
    guidance: tuple[Guidance, ...] = GUIDANCE


def glyphs(count: int = 60) -> tuple[Tensor, Tensor]:
    """Glyphs of the held-out half on each background, (N, 3, 32, 32), and the backgrounds."""
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
    """Crops of photographs, (N, 3, 32, 32), and which photograph each is of."""
    import skimage.data
    from skimage.transform import resize

    generator, images = np.random.default_rng(seed), []
    for name in names:
        picture = getattr(skimage.data, name)().astype(np.float64) / 127.5 - 1
        if picture.ndim == 2:
            picture = np.stack([picture] * 3, axis=2)
        for _ in range(count):
            size = int(generator.integers(48, 160))
            y, x = (int(generator.integers(0, side - size)) for side in picture.shape[:2])
            crop = resize(picture[y : y + size, x : x + size], (32, 32), anti_aliasing=True)
            images.append(crop.transpose(2, 0, 1))
    return torch.from_numpy(np.stack(images)), torch.arange(len(names)).repeat_interleave(count)


def gaussians(members: int = 12, seed: int = 7) -> tuple[Tensor, Tensor, float]:
    """Centers of four classes that differ in brightness and spread, (N, 16), and the std."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 0.2, 0.35, 0.5], dtype=torch.float64).view(4, 1, 1)
    shift = torch.linspace(-0.4, 0.4, 4, dtype=torch.float64).view(4, 1, 1)
    center = torch.randn(4, 1, 16, generator=generator, dtype=torch.float64) / 4 + shift
    noise = torch.randn(4, members, 16, generator=generator, dtype=torch.float64)
    classes = torch.arange(4).repeat_interleave(members)
    return (center + spread * noise).flatten(0, 1), classes, 0.15


def exact(name: str, samples: int) -> Case:
    """An exact guided denoiser of one kind of data."""
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
    of = torch.arange(samples) % oracle.num_classes
    noise = SampleNoise(range(samples)).randn(images.shape[1:], dtype=torch.float64)

    def measure(x: Tensor) -> dict[str, float]:
        p = oracle.posterior(x @ basis.T, -1 if std else SMOOTHING)
        w1 = [
            wasserstein_1(x[of == k].mean(1), data[classes == k].mean(1))
            for k in range(oracle.num_classes)
        ]
        return {
            "w1": float(np.mean(w1)),
            "adherence": float(p[torch.arange(samples), of].mean()),
            "range": float(x.abs().max() / data.abs().max()),
        }

    return Case(
        name,
        noise.flatten(1) @ basis.T,
        lambda guidance: oracle.guided(of, None if guidance.scale == 1 else guidance),
        lambda x: x @ basis,
        measure,
        500,
    )


def trained(run: Path, prompts: int) -> Case:
    """A model that was trained, by its checkpoint."""
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
    """Name a case by what it is made from."""
    return kind.name if isinstance(kind, Path) else str(kind)


def converged(case: Case, denoiser: Denoise) -> Tensor:
    """Solve with many steps of second order, where guidance is no longer stiff."""
    grid = get_timesteps("log_snr", case.steps, schedule=SCHEDULE)
    return get_sampler("dpmpp_2m").sample(denoiser, SCHEDULE, case.noise, grid)


@torch.no_grad()
def measure_case(
    make: tuple[Callable[..., Case], tuple[object, ...]], contenders: Sequence[str]
) -> list[Row]:
    """Measure every contender with every guidance and S; a row each."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    case = make[0](*make[1])
    by_name = {contender.name: contender for contender in ALL}
    rows: list[Row] = []
    for guidance in case.guidance:
        denoiser = case.denoiser(guidance)
        wanted = case.show(converged(case, denoiser))
        facts = {"case": case.name, "scale": guidance.scale, "rescale": guidance.rescale}
        if case.measure is not None:
            end = {**facts, "contender": "converged", "S": case.steps, "path": 0.0}
            rows.append(end | case.measure(wanted))
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
                    row["path"] = float((shown - wanted).square().mean().sqrt())
                if case.measure is not None and bool(shown.isfinite().all()):
                    row |= case.measure(shown)
                rows.append(row)
        seconds = time.perf_counter() - start
        told = f"{case.name}, {guidance.scale:g}, {guidance.rescale:g}: {seconds:.0f} s"
        print(told, file=sys.stderr, flush=True)
    return rows


def cell(rows: Sequence[Row], measure: str, **wanted: object) -> float | None:
    """Find one figure; None where it was not measured."""
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()):
            value = row.get(measure)
            return float(value) if isinstance(value, (int, float)) else None
    return None


def summary(rows: Sequence[Row], case: str) -> str:
    """Write the recommended sampling beside the best of all others and beside DDIM."""
    lines = [
        "| w, rescale | | " + " | ".join(f"S = {S}" for S in COUNTS) + " |",
        "|---" * (len(COUNTS) + 2) + "|",
    ]
    for guidance in GUIDANCE:
        at = {"case": case, "scale": guidance.scale, "rescale": guidance.rescale}
        if not any(all(row[key] == value for key, value in at.items()) for row in rows):
            continue
        named: dict[str, list[str]] = {"recommended": [], "DDIM": [], "best other": []}
        for S in COUNTS:
            found = {
                str(row["contender"]): float(row["path"])  # type: ignore[arg-type]
                for row in rows
                if row.get("S") == S
                and all(row[key] == value for key, value in at.items())
                and isinstance(row.get("path"), float)
                and math.isfinite(row["path"])  # type: ignore[arg-type]
            }
            own = found.pop("recommended", math.nan)
            best = min(found, key=lambda name: found[name])
            ddim = min(found[name] for name in FIRST_ORDER if name in found)
            named["recommended"].append(f"**{own:.3g}**" if own <= found[best] else f"{own:.3g}")
            named["DDIM"].append(f"{ddim:.3g}")
            named["best other"].append(f"{found[best]:.3g} ({best})")
        title = f"{guidance.scale:g}" + ("" if guidance.scale == 1 else f", {guidance.rescale:g}")
        lines += [
            f"| {title if name == 'recommended' else ''} | {name} | " + " | ".join(cells) + " |"
            for name, cells in named.items()
        ]
    return "\n".join(lines)


def full(rows: Sequence[Row], case: str, guidance: Guidance, measure: str) -> str:
    """Write one measure of every contender with one guidance."""
    at = {"case": case, "scale": guidance.scale, "rescale": guidance.rescale}
    known = {row["contender"] for row in rows if row["case"] == case}
    lines = [
        "| | " + " | ".join(f"S = {S}" for S in COUNTS) + " |",
        "|---" * (len(COUNTS) + 1) + "|",
    ]
    for contender in ALL:
        if contender.name not in known:
            continue
        values = [cell(rows, measure, **at, contender=contender.name, S=S) for S in COUNTS]
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
            at = {"case": case, "scale": 7.5, "rescale": 0.7, "contender": "converged"}
            end = cell(rows, measure, **at)
            told = "" if end is None or measure == "path" else f"; converged: {end:.3g}"
            parts.append(f"## {case}: {measure}{told}\n\n{full(rows, case, default, measure)}\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", type=Path, default=[], help="run folders")
    parser.add_argument("--exact", nargs="*", default=list(EXACT), help="kinds of data")
    parser.add_argument("--samples", type=int, default=100, help="of exact denoisers")
    parser.add_argument("--prompts", type=int, default=8, help="of each trained model")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--rows", type=Path, help="keep figures in this file, and use those in it")
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
    known = {row["case"] for row in rows}
    jobs = [(make, given) for make, given in jobs if name_of(given[0]) not in known]
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
        f"exact denoiser and {arguments.prompts} prompts of each trained model; its first lines "
        "say what is measured. Every figure is a row of [guided.jsonl](guided.jsonl). Nothing was "
        "tuned on these data or models; what was is named in zsnr/samplers/multiscale.py.\n\n"
        f"{report(rows)}"
    )


if __name__ == "__main__":
    main()
