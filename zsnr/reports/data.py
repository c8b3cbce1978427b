"""report.md of a data set: what is in it, and what the usual schedule would do to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from zsnr.codecs import LatentCodec
from zsnr.data.buckets import AspectBuckets
from zsnr.data.dataset import Pixels, ShardDataset
from zsnr.data.faults import Fault, summarize
from zsnr.data.filters import Filter
from zsnr.data.images import to_unit_range
from zsnr.data.index import load_index
from zsnr.data.samples import Samples, select
from zsnr.data.sources import Sources
from zsnr.data.storage import Storage
from zsnr.files import replacing
from zsnr.metrics import brightness, kept_fraction, moved_mean, principal_mean
from zsnr.pipeline import to_image
from zsnr.reports.flaw import Arm, oracle_samples
from zsnr.reports.pictures import figure_of, picture_grid, save_figure
from zsnr.schedule import NoiseSchedule

if TYPE_CHECKING:
    import numpy as np

ORIGINAL = NoiseSchedule(zero_terminal_snr=False)

_SMALL = 64  # pixels a side for statistics of means, which hardly depend on it
_ORACLE = 256  # pictures that the exact denoiser knows
_LATENTS = 200  # pictures that are encoded
_ARMS = (
    Arm("original schedule", False, "trailing"),
    Arm("rescaled schedule", True, "trailing"),
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
        shown: By the exact denoiser's samples: their mean and spread, by schedule. Empty = the
            space is too large for it.
    """

    name: str
    mode: float
    mean: float
    std: float
    kept: float
    moved: float
    shown: dict[str, tuple[float, float]]


def write_data_report(
    sources: Sources,
    folder: Path,
    *,
    image_size: int = 512,
    most: int = 2000,
    filters: Sequence[Filter] = (),
    aspect: AspectBuckets | None = None,
    codec: LatentCodec | None = None,
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
        index_folder: Where index files are. None = beside the shards.

    Returns:
        Path of the report, and its figures as plain values.

    Raises:
        ValueError: The folder is not empty, or there are no pictures.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty and stays as it is: choose another --output.")
    if most < 2:
        raise ValueError(f"--samples {most}: wanted at least 2.")
    names = [each.field for each in filters]
    index = load_index(sources, Storage(), folder=index_folder, fields=names)
    samples = select(index, image_size, filters=filters, aspect=aspect)
    images, captions, faults = _look(samples, most)
    if len(images) < 2:
        raise ValueError(f"{len(images)} readable pictures: wanted at least 2. {summarize(faults)}")

    pictures = folder / "report"
    values = brightness(images)
    _plot_sizes(samples, pictures / "sizes.png")
    _plot_histogram(
        [len(text.split()) for text in captions], pictures / "captions.png", "words of a caption"
    )
    _plot_histogram(
        values.tolist(),
        pictures / "brightness.png",
        "brightness of a picture, -1 black to 1 white",
        limits=(-1, 1),
    )
    _save_extremes(images, values, pictures / "extremes.png")
    spaces = _pixel_spaces(images, image_size)
    if codec is not None:
        spaces.append(_latent_space(samples, codec, image_size))

    facts = {
        "samples": samples.total,
        "shards": len(samples.shards),
        "kept": len(samples),
        "removed": samples.removed,
        "faults": len(samples.faults) + len(faults),
        "looked_at": len(images),
        "height": _quantiles(samples.size[:, 0]),
        "width": _quantiles(samples.size[:, 1]),
        "aspect_ratio": _quantiles(samples.size[:, 1] / samples.size[:, 0]),
        "smaller_than_image_size": _share(samples.size.min(1) < image_size),
        "caption_words": _quantiles([len(text.split()) for text in captions]),
        "empty_captions": _share([not text for text in captions]),
        "brightness_mean": float(values.mean()),
        "brightness_std": float(values.std()),
        "darker_than_-0.8": _share((values < -0.8).tolist()),
        "brighter_than_0.8": _share((values > 0.8).tolist()),
        "buckets": _buckets(samples),
        "spaces": [vars(space) for space in spaces],
    }
    sections = [
        f"# Data\n\n{_counts(samples, faults)}",
        f"## Sizes\n\n![sizes](report/sizes.png)\n\n{_table(facts)}",
        f"## Captions\n\n![captions](report/captions.png)\n\n"
        f"{facts['empty_captions']:.1%} are empty.",
        "## Brightness\n\n![brightness](report/brightness.png)\n\n"
        f"Of {len(images)} pictures: mean {values.mean():.2f}, standard deviation "
        f"{values.std():.2f}; {facts['darker_than_-0.8']:.1%} are darker than -0.8, "
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
    shown = {}
    if size is None:

        def along(x: Tensor) -> Tensor:
            return x.double().mean((2, 3)) @ direction

        found = oracle_samples(latents, along, _ARMS)
        shown = {arm: (float(x.mean()), float(x.std())) for arm, x in found.items()}
    else:
        mode = std * size
    kept, moved = kept_fraction(ORIGINAL, mode), moved_mean(ORIGINAL, mode, mean)
    return SpaceReport(name, mode, mean, std, kept, moved, shown)


def _look(samples: Samples, most: int) -> tuple[Tensor, list[str], list[Fault]]:
    """Decode pictures evenly from the set, small; broken ones are left out."""
    from tqdm import tqdm

    dataset = ShardDataset(_square(samples, _SMALL), pixels=Pixels())
    rows = torch.linspace(0, len(samples) - 1, min(most, len(samples))).round().long().tolist()
    images, captions, faults = [], [], []
    for row in tqdm(rows, desc="pictures", unit="picture", delay=1):
        item = dataset[row]
        broken = [fault for fault in item["faults"] if fault.kind == "sample"]
        if broken:
            faults.append(broken[0])
            continue
        images.append(item["image"])
        captions.append(item["caption"])
    pixels = to_unit_range(torch.stack(images)) if images else torch.empty(0, 3, _SMALL, _SMALL)
    return pixels, captions, faults


def _square(samples: Samples, size: int) -> Samples:
    """Put all samples into one square bucket."""
    return replace(samples, shapes=[(size, size)], bucket=samples.bucket * 0)


def _pixel_spaces(images: Tensor, image_size: int) -> list[SpaceReport]:
    """Measure pixels at the training size, and those that the exact denoiser can do."""
    some = images[:: -(-len(images) // _ORACLE)]
    size = min(image_size, _SMALL)
    small = measure_space(
        f"{size}x{size} pixels, {len(some)} pictures", interpolate(some, size, mode="area")
    )
    if image_size <= _SMALL:
        return [small]
    return [measure_space(f"{image_size}x{image_size} pixels", images, size=image_size), small]


def _latent_space(samples: Samples, codec: LatentCodec, image_size: int) -> SpaceReport:
    from tqdm import tqdm

    dataset = ShardDataset(_square(samples, image_size), pixels=Pixels())
    rows = torch.linspace(0, len(samples) - 1, min(_LATENTS, len(samples))).round().long().tolist()
    parts = []
    for row in tqdm(rows, desc="latents", unit="picture", delay=1):
        moments = codec.encode(to_unit_range(dataset[row]["image"][None]))
        parts.append(codec.latents(moments))
    latents = torch.cat(parts)
    name = f"latents {'x'.join(map(str, latents.shape[1:]))}"
    size = latents.shape[-1]
    return measure_space(name, latents, None if latents[0].numel() <= 3 * _SMALL**2 else size)


def _counts(samples: Samples, faults: Sequence[Fault]) -> str:
    shards = f"{len(samples.shards)} shard" + "s" * (len(samples.shards) > 1)
    lines = [f"{samples.total} samples in {shards}; {len(samples)} are kept."]
    if samples.removed:
        lines += ["", "| filter | removed |", "|---|---|"]
        lines += [f"| {name} | {count} |" for name, count in samples.removed.items()]
    broken = [*samples.faults, *faults]
    if broken:
        lines += ["", f"Broken: {summarize(broken)}."]
    return "\n".join(lines)


def _table(facts: Mapping[str, Any]) -> str:
    lines = ["| | least | 10 % | median | 90 % | most |", "|---|---|---|---|---|---|"]
    for name in ("height", "width", "aspect_ratio", "caption_words"):
        shown = " | ".join(f"{value:.4g}" for value in facts[name])
        lines.append(f"| {name.replace('_', ' ')} | {shown} |")
    small = facts["smaller_than_image_size"]
    lines += ["", f"{small:.1%} have a side that is smaller than the training size."]
    if facts["buckets"]:
        lines += ["", "| bucket, height x width | samples |", "|---|---|"]
        lines += [f"| {name} | {count} |" for name, count in facts["buckets"].items()]
    return "\n".join(lines)


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
            "What an exact denoiser of these pictures makes, 256 samples, DDIM, 50 trailing steps. "
            "It knows finitely many pictures, not a Gaussian, and 50 steps lose some of the spread "
            "themselves, so the two agree roughly:",
            "",
            "| space | sampled with | spread | mean | spread / data's |",
            "|---|---|---|---|---|",
        ]
    for space in shown:
        for arm, (mean, std) in space.shown.items():
            share = f"{std / space.std:.2f}" if space.std else "-"
            lines.append(f"| {space.name} | {arm} | {std:.3f} | {mean:.3f} | {share} |")
    return "\n".join(lines)


def _buckets(samples: Samples) -> dict[str, int]:
    if len(samples.shapes) == 1:
        return {}
    return {
        f"{h} x {w}": int((samples.bucket == i).sum()) for i, (h, w) in enumerate(samples.shapes)
    }


def _quantiles(values: Any) -> list[float]:
    import numpy as np

    found: list[float] = np.quantile(np.asarray(values, np.float64), [0, 0.1, 0.5, 0.9, 1]).tolist()
    return found


def _share(hits: Any) -> float:
    import numpy as np

    return float(np.mean(np.asarray(hits, bool)))


def _plot_sizes(samples: Samples, path: Path) -> None:
    figure, axes = figure_of(8, 5, rows=2, sharex=False)
    height, width = samples.size[:, 0], samples.size[:, 1]
    for values, name in ((height, "height"), (width, "width")):
        axes[0].hist(values, bins=_bins(values), histtype="step", label=name, linewidth=1.5)
    axes[0].set(xlabel="pixels", ylabel="pictures")
    axes[0].legend(frameon=False)
    ratio = width / height
    axes[1].hist(ratio, bins=_bins(ratio), color="C2")
    axes[1].set(xlabel="width / height", ylabel="pictures")
    save_figure(figure, path)


def _bins(values: Any) -> np.ndarray:
    """Choose 40 bins that are not empty where all values are one."""
    import numpy as np

    low, high = float(np.min(values)), float(np.max(values))
    room = 0.05 * max(abs(low), 1e-3) if low == high else 0.0
    return np.linspace(low - room, high + room, 41)


def _plot_histogram(
    values: Sequence[float], path: Path, name: str, limits: tuple[float, float] | None = None
) -> None:
    import numpy as np

    figure, axes = figure_of(8, 2.5)
    axes.hist(values, bins=_bins(values) if limits is None else np.linspace(*limits, 41))
    axes.set(xlabel=name, ylabel="pictures", xlim=limits)
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
