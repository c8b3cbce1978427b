"""report.md of a data set: what is in it, and what the usual schedule would do to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsnr.codecs import LatentCodec
from zsnr.data.buckets import AspectBuckets
from zsnr.data.dataset import ShardDataset
from zsnr.data.faults import Fault, summarize
from zsnr.data.filters import Filter
from zsnr.data.images import to_unit_range
from zsnr.data.index import counted, load_index
from zsnr.data.samples import Samples, select
from zsnr.data.sources import Sources, as_sources, find_shards
from zsnr.data.storage import Storage
from zsnr.files import replacing
from zsnr.metrics import brightness, kept_fraction, moved_mean, principal_mean
from zsnr.oracle import GaussianDenoiser
from zsnr.pipeline import to_image
from zsnr.reports.arms import Arm
from zsnr.reports.flaw import oracle_samples
from zsnr.reports.pictures import figure_of, picture_grid, save_figure
from zsnr.samplers import get_sampler
from zsnr.schedule import NoiseSchedule
from zsnr.timesteps import get_timesteps

if TYPE_CHECKING:
    import numpy as np

ORIGINAL = NoiseSchedule(zero_terminal_snr=False)

_SMALL = 64  # pixels a side for statistics of means, which hardly depend on it
_ORACLE = 256  # pictures that the exact denoiser knows
_LATENTS = 200  # pictures that are encoded
_LARGEST = 4 * 64 * 64  # numbers of a sample; of larger ones the exact denoiser takes minutes
_NUM_STEPS = 50
_AHEAD = 32  # pictures that wait in memory
_ARMS = (
    Arm("original schedule", "original", "trailing", "ddim", num_steps=_NUM_STEPS),
    Arm("rescaled schedule", "rescaled", "trailing", "ddim", num_steps=_NUM_STEPS),
)


@dataclass(frozen=True)
class SpaceReport:
    """What the original schedule does along the direction in which means differ most.

    Args:
        name: Of the space.
        mode: S.
        mean: m of the data along the direction.
        std: Spread of the data along it, sqrt(L).
        kept: Fraction of the spread that the original schedule keeps.
        moved: Where it moves the mean.
        shown: Mean and spread of the exact denoiser's samples, by schedule. Empty = the space is
            too large for it.
        expected: The same for a Gaussian of that mean and spread, in as many steps.
    """

    name: str
    mode: float
    mean: float
    std: float
    kept: float
    moved: float
    shown: dict[str, tuple[float, float]]
    expected: dict[str, tuple[float, float]]


def write_data_report(
    sources: Sources,
    folder: Path,
    *,
    image_size: int = 512,
    most: int = 2000,
    filters: Sequence[Filter] = (),
    aspect: AspectBuckets | None = None,
    codec: LatentCodec | None = None,
    device: str = "cpu",
    index_folder: Path | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Write FOLDER/report.md and its pictures.

    Args:
        sources: The data.
        folder: Where to write; must be empty or not exist.
        image_size: Height and width in training, in pixels.
        most: Pictures that are looked at, evenly from the whole set.
        filters: What training would keep.
        aspect: Count the buckets of these.
        codec: Measure its latents too.
        device: Where the codec is.
        index_folder: Where index files are. None = beside the shards.

    Returns:
        Path of the report, and its figures as plain values.

    Raises:
        ValueError: The folder is not empty, there are no pictures, or a source is a cache.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty and stays as it is: choose another --output.")
    for option, value, least in (("samples", most, 2), ("image-size", image_size, 1)):
        if value < least:
            raise ValueError(f"--{option} {value}: wanted at least {least}.")
    cached = [shard.url for shard in find_shards(sources) if shard.kind == "cache"]
    if cached:
        raise ValueError(f"{cached[0]} holds no pictures: give the shards it was cached from.")
    names = [each.field for each in filters]
    index = load_index(sources, Storage(), folder=index_folder, fields=names)
    samples = select(index, image_size, filters=filters, aspect=aspect)
    images, captions, faults = look_at(samples, min(image_size, _SMALL), even_rows(samples, most))
    if len(images) < 2:
        raise ValueError(f"{len(images)} readable pictures: wanted at least 2. {summarize(faults)}")

    spaces = _pixel_spaces(images, image_size)
    if codec is not None:
        spaces.append(_latent_space(samples, codec, image_size, device))
    values = brightness(images)
    heights, widths = samples.size[:, 0], samples.size[:, 1]
    words, characters = [len(text.split()) for text in captions], [len(text) for text in captions]
    pictures = folder / "report"
    _plot_counts({"height, pixels": heights, "width, pixels": widths}, pictures / "sizes.png")
    _plot_ratios(widths / heights, pictures / "ratios.png")
    _plot_counts(
        {"words of a caption": words, "characters of a caption": characters},
        pictures / "captions.png",
    )
    _plot_brightness(values, pictures / "brightness.png")
    _save_extremes(images, values, pictures / "extremes.png")

    facts = {
        "samples": samples.total,
        "shards": len(samples.shards),
        "kept": len(samples),
        "removed": samples.removed,
        "faults": sum(fault.kind != "note" for fault in samples.faults) + len(faults),
        "looked_at": len(images),
        "height": _quantiles(heights),
        "width": _quantiles(widths),
        "megapixels": _quantiles(heights * (widths / 1e6)),
        "aspect_ratio": _quantiles(widths / heights),
        "smaller_than_image_size": _share(samples.size.min(1) < image_size),
        "caption_words": _quantiles(words),
        "caption_characters": _quantiles(characters),
        "empty_captions": _share([not text for text in captions]),
        "brightness_mean": float(values.mean()),
        "brightness_std": float(values.std()),
        "darker_than_-0.8": _share((values < -0.8).tolist()),
        "brighter_than_0.8": _share((values > 0.8).tolist()),
        "buckets": _buckets(samples),
        "spaces": [vars(space) for space in spaces],
    }
    sections = [
        f"# Data\n\n{_counts(sources, samples, faults)}",
        f"## Sizes\n\n{_table(facts, ('height', 'width', 'megapixels', 'aspect_ratio'))}\n\n"
        f"{facts['smaller_than_image_size']:.1%} have a side below {image_size} pixels.\n\n"
        f"![sizes](report/sizes.png)\n\n![ratios](report/ratios.png){_bucket_table(facts)}",
        f"## Captions\n\n{_table(facts, ('caption_words', 'caption_characters'))}\n\n"
        f"{facts['empty_captions']:.1%} are empty.\n\n![captions](report/captions.png)",
        "## Brightness\n\n![brightness](report/brightness.png)\n\n"
        f"Of {len(images)} pictures, each its central square: mean {values.mean():.2f}, standard "
        f"deviation {values.std():.2f}; {facts['darker_than_-0.8']:.1%} are darker than -0.8, "
        f"{facts['brighter_than_0.8']:.1%} brighter than 0.8. The darkest, the middle ones and "
        "the brightest:\n\n![extremes](report/extremes.png)",
        _schedule_section(spaces),
    ]
    report = folder / "report.md"
    with replacing(report) as beside:
        beside.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return report, facts


def measure_space(name: str, latents: Tensor, size: int | None = None) -> SpaceReport:
    """Measure S of a space and what the original schedule does there.

    Args:
        name: Of the space.
        latents: (B, C, h, w), scaled as the network sees them.
        size: Height and width, if it is larger than that of `latents`: S grows with it.
    """
    mode, mean, direction = principal_mean(latents)
    h, w = latents.shape[-2:]
    std = mode / (h * w) ** 0.5
    shown, expected = {}, {}
    if size is None:

        def along(x: Tensor) -> Tensor:
            return x.double().mean((2, 3)) @ direction

        found = oracle_samples(latents, along, _ARMS)
        shown = {arm: (float(x.mean()), float(x.std())) for arm, x in found.items()}
        expected = {arm.name: gaussian_samples(arm, mean, std, h * w) for arm in _ARMS}
    else:
        mode = std * size
    kept, moved = kept_fraction(ORIGINAL, mode), moved_mean(ORIGINAL, mode, mean)
    return SpaceReport(name, mode, mean, std, kept, moved, shown, expected)


def gaussian_samples(arm: Arm, mean: float, std: float, pixels: int) -> tuple[float, float]:
    """Sample a Gaussian mode with its exact denoiser, by the arm's deterministic sampler.

    Each step is linear, so x_T = 0 ends at the samples' mean and x_T = 1 a spread beside it.

    Args:
        arm: The way to sample.
        mean: m, of the channels' means along a direction.
        std: Their spread along it.
        pixels: h w, over which they are means: the noise's spread is 1 / sqrt(h w).

    Returns:
        Mean and spread of the samples, in the units of `mean`.
    """
    arm, schedule = arm.resolved(guided=False), arm.schedule_of(NoiseSchedule())
    denoiser = GaussianDenoiser(schedule, mean * pixels**0.5, std * pixels**0.5)
    x_T = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    timesteps = get_timesteps(arm.spacing, arm.num_steps, schedule=schedule)
    ends = get_sampler(arm.sampler).sample(denoiser, schedule, x_T, timesteps)
    middle, beside = (ends.double().flatten() / pixels**0.5).tolist()
    return middle, beside - middle


def look_at(
    samples: Samples, size: int, rows: Sequence[int]
) -> tuple[Tensor, list[str], list[Fault]]:
    """Decode some pictures of a set as squares; broken ones are left out.

    Args:
        samples: The set.
        size: Height and width, in pixels.
        rows: Which ones.

    Returns:
        Images (N, 3, size, size) in [-1, 1], their captions, and what was broken.
    """
    images, captions, faults = [torch.empty(0, 3, size, size, dtype=torch.uint8)], [], []
    for item in _load(samples, size, rows, "pictures"):
        if isinstance(item, Fault):
            faults.append(item)
        else:
            images.append(item["image"][None])
            captions.append(item["caption"])
    return to_unit_range(torch.cat(images)), captions, faults


def even_rows(samples: Samples, most: int) -> list[int]:
    """Choose at most so many rows, evenly from the set."""
    count = min(most, len(samples))
    return [i * (len(samples) - 1) // max(1, count - 1) for i in range(count)]


def _load(
    samples: Samples, size: int, rows: Sequence[int], what: str
) -> Iterator[dict[str, Any] | Fault]:
    """Load samples as squares, with a bar; broken ones become faults."""
    from zsnr.progress import progress_bar

    dataset = ShardDataset(
        replace(samples, shapes=[(size, size)], bucket=samples.bucket * 0, counts=None)
    )

    def load(row: int) -> dict[str, Any] | Fault:
        try:
            return dataset.load(row)
        except (ValueError, EOFError) as error:  # a server that is down is not a broken image
            sample, reason = samples[row], " ".join(str(error).split())
            return Fault("sample", sample.shard, sample.key, reason)

    with ThreadPoolExecutor(8) as pool, progress_bar(len(rows), what, "image") as bar:
        for start in range(0, len(rows), _AHEAD):
            for item in pool.map(load, rows[start : start + _AHEAD]):
                yield item
                bar.update()


def _pixel_spaces(images: Tensor, image_size: int) -> list[SpaceReport]:
    """Measure pixels at the training size, and those that the exact denoiser can do."""
    some = images[:: -(-len(images) // _ORACLE)]
    size = images.shape[-1]
    small = measure_space(f"{size}x{size} pixels, {len(some)} pictures", some)
    if image_size <= _SMALL:
        return [small]
    return [measure_space(f"{image_size}x{image_size} pixels", images, size=image_size), small]


def _latent_space(
    samples: Samples, codec: LatentCodec, image_size: int, device: str
) -> SpaceReport:
    """Measure the latents of some pictures; of large ones only the channels' means are kept."""
    shape = codec.latent_shape(image_size, image_size)
    large = math.prod(shape) > _LARGEST
    codec.to(device)
    parts = []
    for item in _load(samples, image_size, even_rows(samples, _LATENTS), "latents"):
        if not isinstance(item, Fault):
            images = to_unit_range(item["image"][None]).to(device)
            latents = codec.latents(codec.encode(images)).cpu()
            parts.append(latents.double().mean((2, 3), keepdim=True) if large else latents)
    if len(parts) < 2:
        raise ValueError(f"{len(parts)} pictures to encode could be read: wanted at least 2.")
    name = f"{'x'.join(map(str, shape))} latents, {len(parts)} pictures"
    return measure_space(name, torch.cat(parts), shape[-1] if large else None)


def _counts(sources: Sources, samples: Samples, faults: Sequence[Fault]) -> str:
    names = "\n".join(f"- {source.path}" for source in as_sources(sources))
    lines = [
        names,
        "",
        f"{samples.total} samples in {counted(samples.shards)}; {len(samples)} are kept.",
    ]
    if samples.removed:
        lines += ["", "| filter | removed |", "|---|---|"]
        lines += [f"| {name} | {count} |" for name, count in samples.removed.items()]
    notes = [fault for fault in samples.faults if fault.kind == "note"]
    broken = [*(fault for fault in samples.faults if fault.kind != "note"), *faults]
    for what, each in (("Broken", broken), ("Not read", notes)):
        if each:
            lines += ["", f"{what}: {summarize(each)}."]
    return "\n".join(lines)


def _table(facts: Mapping[str, Any], names: Sequence[str]) -> str:
    lines = ["| | least | 10 % | median | 90 % | most |", "|---|---|---|---|---|---|"]
    for name in names:
        shown = " | ".join(f"{value:.4g}" for value in facts[name])
        lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    return "\n".join(lines)


def _bucket_table(facts: Mapping[str, Any]) -> str:
    if not facts["buckets"]:
        return ""
    lines = ["", "", "| bucket, height x width | samples |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {n} |" for name, n in facts["buckets"].items()])


def _schedule_section(spaces: Sequence[SpaceReport]) -> str:
    lines = [
        "## What the usual schedule would do",
        "",
        "Along the direction in which the means of pictures differ most, a picture stands S times "
        "out of the noise. The original schedule ends with a trace of that mean; sampled from pure "
        f"noise (sqrt(abar_T) = {ORIGINAL.alphas_cumprod[-1] ** 0.5:.4f}), it keeps "
        "1 / sqrt(abar_T S^2 + 1 - abar_T) of the spread and moves the mean m to "
        "m (1 - S sqrt(abar_T) / sqrt(abar_T S^2 + 1 - abar_T)). The rescaled one keeps all.",
        "",
        "| space | S | spread of the data | kept of it | mean of the data | moved to |",
        "|---|---|---|---|---|---|",
    ]
    for space in spaces:
        lines.append(
            f"| {space.name} | {space.mode:.1f} | {space.std:.3f} | {space.kept:.2f} | "
            f"{space.mean:.3f} | {space.moved:.3f} |"
        )
    shown = [space for space in spaces if space.shown]
    if shown:
        lines += [
            "",
            f"What an exact denoiser of these pictures makes, 256 samples, DDIM, {_NUM_STEPS} "
            "trailing steps, beside what that many steps make of a Gaussian. It knows finitely "
            "many pictures, not a Gaussian, so the two agree roughly; few steps lose some of the "
            "spread on any schedule:",
            "",
            "| space | sampled with | spread | a Gaussian's | mean | a Gaussian's |",
            "|---|---|---|---|---|---|",
        ]
    for space in shown:
        for arm, (mean, std) in space.shown.items():
            m, s = space.expected[arm]
            lines.append(f"| {space.name} | {arm} | {std:.3f} | {s:.3f} | {mean:.3f} | {m:.3f} |")
    return "\n".join(lines)


def _buckets(samples: Samples) -> dict[str, int]:
    if len(samples.shapes) == 1:
        return {}
    counts = samples.table.sum(0).tolist()
    return {f"{h} x {w}": n for (h, w), n in zip(samples.shapes, counts, strict=True)}


def _quantiles(values: Any) -> list[float]:
    import numpy as np

    found: list[float] = np.quantile(np.asarray(values, np.float64), [0, 0.1, 0.5, 0.9, 1]).tolist()
    return found


def _share(hits: Any) -> float:
    import numpy as np

    return float(np.mean(np.asarray(hits, bool)))


def _plot_counts(counts: Mapping[str, Any], path: Path) -> None:
    """Draw histograms of whole numbers, one below the other, with bins around each or several."""
    import numpy as np

    figure, axes = figure_of(8, 2.3 * len(counts), rows=len(counts), sharex=False)
    for i, (name, values) in enumerate(counts.items()):
        low, high = int(np.min(values)), int(np.max(values))
        step = -(-(high - low + 1) // 60)
        bins = np.arange(low, high + step + 1, step) - 0.5
        axes[i].hist(values, bins=bins, color=f"C{i}", edgecolor="white", linewidth=0.5)
        axes[i].set(xlabel=name, ylabel="pictures")
        axes[i].locator_params(integer=True)
        if high - low < 10:
            axes[i].set_xticks(range(low, high + 1))
    save_figure(figure, path)


def _plot_ratios(ratios: np.ndarray, path: Path) -> None:
    """Draw aspect ratios on a logarithmic axis, where tall and wide ones are alike."""
    import numpy as np

    figure, axes = figure_of(8, 2.5)
    most = max(2.0, float(np.exp(np.abs(np.log(ratios)).max())))
    bins = np.geomspace(1 / most, most, 62)  # an odd number of bins: one has 1 in its middle
    axes.hist(ratios, bins=bins, color="C2", edgecolor="white", linewidth=0.5)
    axes.set(xlabel="width / height", ylabel="pictures", xscale="log")
    axes.locator_params(axis="y", integer=True)
    ticks = [r for r in (0.1, 0.2, 0.33, 0.5, 0.75, 1, 1.33, 2, 3, 5, 10) if 1 / most <= r <= most]
    axes.set_xticks(ticks, [f"{r:g}" for r in ticks])
    axes.set_xticks([], minor=True)
    save_figure(figure, path)


def _plot_brightness(values: Tensor, path: Path) -> None:
    import numpy as np

    figure, axes = figure_of(8, 2.5)
    axes.hist(values.clamp(-1, 1).numpy(), bins=np.linspace(-1, 1, 41))
    axes.set(xlabel="brightness of a picture, -1 black to 1 white", ylabel="pictures")
    axes.set(xlim=(-1, 1))
    axes.locator_params(axis="y", integer=True)
    save_figure(figure, path)


def _save_extremes(images: Tensor, values: Tensor, path: Path, columns: int = 8) -> None:
    """Show the darkest pictures, those in the middle, and the brightest, one row each."""
    order = values.argsort().tolist()
    number = min(columns, len(order))
    middle = (len(order) - number) // 2
    rows = [order[:number], order[middle : middle + number], order[len(order) - number :]]
    grid = picture_grid([to_image(images[i]) for row in rows for i in row], number)
    with replacing(path) as beside:
        grid.resize((grid.width * 2, grid.height * 2), 0).save(beside, format="PNG")
