"""index.html of a dataset: what is in it, and the effect of the usual schedule on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsnr import __version__
from zsnr.codecs import LatentCodec
from zsnr.conditioning.tokenizers import (
    BPE,
    ChunkTokenizer,
    PromptTokenizer,
    bpe_tokenizer,
    transformers_tokenizer,
)
from zsnr.data.buckets import AspectBuckets
from zsnr.data.captions import NO_CAPTION
from zsnr.data.dataset import ShardDataset
from zsnr.data.faults import Fault, Tally, summarize
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
from zsnr.public import public_url
from zsnr.reports.arms import Arm
from zsnr.reports.charts import BRIGHTNESS_BINS, COLORS
from zsnr.reports.flaw import oracle_samples
from zsnr.reports.page import draw_chart, embed, render_page
from zsnr.samplers import get_sampler
from zsnr.schedule import NoiseSchedule
from zsnr.timesteps import get_timesteps
from zsnr.untrusted import clipped

if TYPE_CHECKING:
    import numpy as np
    from markupsafe import Markup

ORIGINAL = NoiseSchedule(zero_terminal_snr=False)

IMAGE_SIZE = 512
"""Height and width of the images where nothing else is said, in pixels."""

_SMALL = 64  # pixels a side for statistics of means, which hardly depend on it
_ORACLE = 256  # images that the exact denoiser knows
_LATENTS = 200  # images that are encoded
_LARGEST = 4 * 64 * 64  # numbers per sample; for larger ones the exact denoiser takes minutes
_NUM_STEPS = 50
_AHEAD = 32  # images that wait in memory
_EXTREMES = 8  # images shown of each kind
_QUANTILES = ("", "minimum", "10 %", "median", "90 %", "maximum")
_ARMS = (
    Arm("original schedule", "original", "trailing", "ddim", num_steps=_NUM_STEPS),
    Arm("rescaled schedule", "rescaled", "trailing", "ddim", num_steps=_NUM_STEPS),
)


@dataclass(frozen=True)
class SpaceReport:
    """Effect of the original schedule along the direction in which means differ most.

    Args:
        name: Name of the space.
        mode: S, the signal-to-noise ratio of the mean.
        mean: m of the data along the direction.
        std: Spread of the data along it, sqrt(L).
        kept: Fraction of the spread that the original schedule retains.
        moved: The mean that it shifts m to.
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
    image_size: int | None = None,
    most: int = 2000,
    filters: Sequence[Filter] = (),
    aspect: AspectBuckets | None = None,
    codec: LatentCodec | None = None,
    device: str = "cpu",
    index_folder: Path | None = None,
    tokenizer: str = "clip",
    max_tokens: int | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Write FOLDER/index.html, a page that stands alone.

    Args:
        sources: The data.
        folder: Where to write; must be empty or not exist.
        image_size: Height and width in training, in pixels. None = `IMAGE_SIZE`.
        most: Largest number of images that are read, evenly spaced.
        filters: The filters of the training.
        aspect: Count the samples of each of these buckets.
        codec: Measure its latents too.
        device: Where the codec computes.
        index_folder: Where index files are. None = beside the shards.
        tokenizer: Tokenizer that counts the captions' tokens: "clip", or a folder or hub id of
            transformers.
        max_tokens: Number of tokens of a caption that the text encoder reads, see
            TransformersConditioner. None = those of one chunk.

    Returns:
        Path of the page, and its figures as plain values.

    Raises:
        ValueError: The folder is not empty, fewer than two images can be read, or a source is a
            cache of latents.
    """
    size_is_given = image_size is not None
    image_size = IMAGE_SIZE if image_size is None else image_size
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty and stays as it is: choose another --output.")
    for option, value, least in (("samples", most, 2), ("image-size", image_size, 1)):
        if value < least:
            raise ValueError(f"--{option} {value}: wanted at least {least}.")
    cached = [shard.url for shard in find_shards(sources) if shard.kind == "cache"]
    if cached:
        raise ValueError(f"{cached[0]} holds no images: give the shards it was cached from.")
    counter, limit = _counter(tokenizer, max_tokens)
    names = [each.field for each in filters]
    index = load_index(sources, Storage(), folder=index_folder, fields=names)
    samples = select(index, image_size, filters=filters, aspect=aspect)
    images, captions, faults = look_at(samples, min(image_size, _SMALL), even_rows(samples, most))
    if len(images) < 2:
        raise ValueError(f"{len(images)} readable images: wanted at least 2. {summarize(faults)}")
    spaces = _pixel_spaces(images, image_size)
    if codec is not None:
        spaces.append(_latent_space(samples, codec, image_size, device))
    faults = [*samples.faults, *faults]
    num_tokens = [len(tokens) for tokens in counter.encode(captions)]
    facts = {
        **_facts(samples, images, captions, faults, image_size, spaces),
        "image_size_is_given": size_is_given,
        "tokenizer": "CLIP" if tokenizer in BPE else tokenizer,
        "caption_tokens": _quantiles(num_tokens),
        "token_limit": limit,
        "cut_captions": _share([count > limit for count in num_tokens]),
    }
    values = {
        "title": "Data report",
        "zsnr_version": __version__,
        "sources": public_paths(sources),
        "containers": counted(samples.shards),
        "facts": facts,
        "quantiles": _QUANTILES,
        "sizes": _quantile_rows(facts, ("height", "width", "megapixels", "aspect_ratio")),
        "captions": _quantile_rows(
            facts, ("caption_words", "caption_characters", "caption_tokens")
        ),
        "max_tokens": -(-max(num_tokens) // counter.room) * counter.room,
        **_charts(samples, images, captions),
        "extremes": _extremes(images, captions),
        "trace": f"{ORIGINAL.alphas_cumprod[-1] ** 0.5:.4f}",
        "predicted": [
            [
                space.name,
                f"{space.mode:.1f}",
                f"{space.std:.3f}",
                f"{space.kept:.2f}",
                f"{space.mean:.3f}",
                f"{space.moved:.3f}",
            ]
            for space in spaces
        ],
        "sampled": [
            [space.name, arm, *(f"{x:.3f}" for x in _spreads_then_means(space, arm))]
            for space in spaces
            for arm in space.shown
        ],
        "num_steps": _NUM_STEPS,
    }
    page = folder / "index.html"
    with replacing(page) as beside:
        beside.write_text(render_page("data.html", values), encoding="utf-8")
    return page, facts


def report_text(facts: Mapping[str, Any], page: Path) -> str:
    """Write the main findings of a report for a terminal."""
    size = facts["image_size"]
    given = facts["image_size_is_given"]
    origin = "as --image-size says" if given else "the default of --image-size"
    pixels = facts["spaces"][0]
    used = f", of which {facts['kept']} are used" * (facts["kept"] < facts["samples"])
    rows = [
        ("samples", f"{facts['samples']}{used}; {facts['looked_at']} images were looked at"),
        (
            "captions",
            f"samples without one, which are left out: {facts['without_caption']}; empty: "
            f"{_percent(facts['empty_captions'])}; longer than the {facts['token_limit']} tokens "
            f"that {facts['tokenizer']} reads: {_percent(facts['cut_captions'])}",
        ),
        ("image size", f"{size} pixels ({origin})"),
        ("", f"{_percent(facts['smaller_than_image_size'])} of the images have a side below it"),
        (
            "brightness",
            f"mean {facts['brightness_mean']:.2f}, standard deviation "
            f"{facts['brightness_std']:.2f}, from -1 (black) to 1 (white)",
        ),
        (
            "",
            f"sampling on the original schedule would retain {_percent(pixels['kept'])} of the "
            f"spread at {size} pixels",
        ),
        *(("broken", reason) for reason in facts["broken"] or ["nothing"]),
        *(("not read", reason) for reason in facts["not_read"]),
        ("page", str(page)),
    ]
    return "\n".join(f"{name:12}{text}" for name, text in rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _counter(tokenizer: str, max_tokens: int | None) -> tuple[ChunkTokenizer, int]:
    """Return a tokenizer, and the number of tokens of a prompt that its text encoder reads."""
    if tokenizer in BPE:
        counter, _ = bpe_tokenizer(tokenizer, 77)
    else:
        counter, _, _ = transformers_tokenizer(tokenizer, None, None)
    return counter, PromptTokenizer(counter, max_tokens=max_tokens).num_chunks * counter.room


def public_paths(sources: Sources) -> list[str]:
    """List the paths of sources without passwords, tokens and commands."""
    paths = (source.path for source in as_sources(sources))
    each = (path for group in paths for path in ([group] if isinstance(group, str) else group))
    return [public_url(path) for path in each]


def _facts(
    samples: Samples,
    images: Tensor,
    captions: Sequence[str],
    faults: Sequence[Fault],
    image_size: int,
    spaces: Sequence[SpaceReport],
) -> dict[str, Any]:
    """Collect the figures of the report as plain values."""
    values = brightness(images)
    heights, widths = samples.size[:, 0], samples.size[:, 1]
    return {
        "samples": samples.total,
        "shards": len(samples.shards),
        "kept": len(samples),
        "removed": samples.removed,
        "faults": sum(fault.kind != "note" for fault in faults),
        "broken": Tally(faults).reasons(("shard", "sample", "passing")),
        "not_read": Tally(faults).reasons(("note",)),
        "image_size": image_size,
        "looked_at": len(images),
        "height": _quantiles(heights),
        "width": _quantiles(widths),
        "megapixels": _quantiles(heights * (widths / 1e6)),
        "aspect_ratio": _quantiles(widths / heights),
        "smaller_than_image_size": _share(samples.size.min(1) < image_size),
        "caption_words": _quantiles([len(text.split()) for text in captions]),
        "caption_characters": _quantiles([len(text) for text in captions]),
        "without_caption": sum(fault.reason.startswith(NO_CAPTION) for fault in faults),
        "empty_captions": _share([not text for text in captions]),
        "brightness_mean": float(values.mean()),
        "brightness_std": float(values.std()),
        "darker_than_-0.8": _share((values < -0.8).tolist()),
        "brighter_than_0.8": _share((values > 0.8).tolist()),
        "buckets": _buckets(samples),
        "spaces": [vars(space) for space in spaces],
    }


def measure_space(name: str, latents: Tensor, size: int | None = None) -> SpaceReport:
    """Measure S of a space and the effect of the original schedule there.

    Args:
        name: Name of the space.
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

        samples = oracle_samples(latents, along, _ARMS)
        shown = {arm: (float(x.mean()), float(x.std())) for arm, x in samples.items()}
        expected = {arm.name: gaussian_samples(arm, mean, std, h * w) for arm in _ARMS}
    else:
        mode = std * size
    kept, moved = kept_fraction(ORIGINAL, mode), moved_mean(ORIGINAL, mode, mean)
    return SpaceReport(name, mode, mean, std, kept, moved, shown, expected)


def gaussian_samples(arm: Arm, mean: float, std: float, pixels: int) -> tuple[float, float]:
    """Sample a Gaussian mode with its exact denoiser, by the arm's deterministic sampler.

    Each step is linear, so x_T = 0 ends at the samples' mean and x_T = 1 a spread beside it.

    Args:
        arm: How to sample.
        mean: m, the mean of the channels' means along a direction.
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
    """Decode images of a dataset as squares; broken ones are left out.

    Args:
        samples: The dataset.
        size: Height and width, in pixels.
        rows: The samples to decode.

    Returns:
        Images (N, 3, size, size) in [-1, 1], their captions, and the faults of broken ones.
    """
    images, captions, faults = [torch.empty(0, 3, size, size, dtype=torch.uint8)], [], []
    for item in _load(samples, size, rows, "images"):
        if isinstance(item, Fault):
            faults.append(item)
        else:
            images.append(item["image"][None])
            captions.append(item["caption"])
    return to_unit_range(torch.cat(images)), captions, faults


def even_rows(samples: Samples, max_rows: int) -> list[int]:
    """Choose rows of a dataset, evenly spaced, at most `max_rows`."""
    count = min(max_rows, len(samples))
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
    """Measure pixels at the training size, and at one that the exact denoiser can handle."""
    known = images[:: -(-len(images) // _ORACLE)]
    size = images.shape[-1]
    small = measure_space(f"{size}x{size} pixels, {len(known)} images", known)
    if image_size <= _SMALL:
        return [small]
    return [measure_space(f"{image_size}x{image_size} pixels", images, size=image_size), small]


def _latent_space(
    samples: Samples, codec: LatentCodec, image_size: int, device: str
) -> SpaceReport:
    """Measure the latents of a number of images; large ones by their channels' means alone."""
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
        raise ValueError(f"{len(parts)} images to encode could be read: wanted at least 2.")
    name = f"{'x'.join(map(str, shape))} latents, {len(parts)} images"
    return measure_space(name, torch.cat(parts), shape[-1] if large else None)


def _quantile_rows(facts: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    return [[name.replace("_", " "), *(f"{x:.4g}" for x in facts[name])] for name in names]


def _spreads_then_means(space: SpaceReport, arm: str) -> tuple[float, float, float, float]:
    (mean, std), (expected_mean, expected_std) = space.shown[arm], space.expected[arm]
    return std, expected_std, mean, expected_mean


def _buckets(samples: Samples) -> dict[str, int]:
    if len(samples.shapes) == 1:
        return {}
    counts = samples.table.sum(0).tolist()
    return {f"{h} x {w}": n for (h, w), n in zip(samples.shapes, counts, strict=True)}


def _quantiles(values: Any) -> list[float]:
    import numpy as np

    shares = [0, 0.1, 0.5, 0.9, 1]
    quantiles: list[float] = np.quantile(np.asarray(values, np.float64), shares).tolist()
    return quantiles


def _share(hits: Any) -> float:
    import numpy as np

    return float(np.mean(np.asarray(hits, bool)))


def _charts(samples: Samples, images: Tensor, captions: Sequence[str]) -> dict[str, Markup]:
    heights, widths = samples.size[:, 0], samples.size[:, 1]
    sizes = {"height in pixels": heights, "width in pixels": widths}
    lengths = {
        "words per caption": [len(text.split()) for text in captions],
        "characters per caption": [len(text) for text in captions],
    }
    return {
        "size_chart": draw_chart(
            lambda axes: _draw_counts(axes, sizes, "images"), 9, 4.2, rows=2, sharex=False
        ),
        "ratio_chart": draw_chart(lambda axes: _draw_ratios(axes, widths / heights), 9, 2.3),
        "caption_chart": draw_chart(
            lambda axes: _draw_counts(axes, lengths, "captions"), 9, 4.2, rows=2, sharex=False
        ),
        "brightness_chart": draw_chart(
            lambda axes: _draw_brightness(axes, brightness(images)), 9, 2.3
        ),
    }


def _draw_counts(axes: Any, counts: Mapping[str, Any], ylabel: str) -> None:
    """Draw histograms of whole numbers, with a bin for each number or for several."""
    import numpy as np

    for i, (axis, (name, values)) in enumerate(zip(axes, counts.items(), strict=True)):
        low, high = int(np.min(values)), int(np.max(values))
        step = -(-(high - low + 1) // 60)
        bins = np.arange(low, high + step + 1, step) - 0.5
        _draw_histogram(axis, values, bins, i)
        axis.set(xlabel=name, ylabel=ylabel)
        axis.locator_params(integer=True)
        if high - low < 10:
            axis.set_xticks(range(low, high + 1))
            axis.set_xlim((low + high) / 2 - 6, (low + high) / 2 + 6)


def _draw_ratios(axis: Any, ratios: np.ndarray) -> None:
    """Draw aspect ratios on a logarithmic axis, on which 1:2 and 2:1 are equally far from 1."""
    import numpy as np

    end = max(2.0, float(np.exp(np.abs(np.log(ratios)).max())))
    bins = np.geomspace(1 / end, end, 62)  # an odd number of bins: one has 1 in its middle
    _draw_histogram(axis, ratios, bins, 2)
    axis.set(xlabel="aspect ratio, width / height", ylabel="images", xscale="log")
    axis.locator_params(axis="y", integer=True)
    ticks = [r for r in (0.1, 0.2, 0.33, 0.5, 0.75, 1, 1.33, 2, 3, 5, 10) if 1 / end <= r <= end]
    axis.set_xticks(ticks, [f"{r:g}" for r in ticks])
    axis.set_xticks([], minor=True)


def _draw_brightness(axis: Any, values: Tensor) -> None:
    import numpy as np

    bins = np.linspace(-1, 1, BRIGHTNESS_BINS + 1)
    _draw_histogram(axis, values.clamp(-1, 1).numpy(), bins, 0)
    axis.set(xlabel="brightness of an image, from -1 (black) to 1 (white)", ylabel="images")
    axis.set(xlim=(-1, 1))
    axis.locator_params(axis="y", integer=True)


def _draw_histogram(axis: Any, values: Any, bins: Any, color: int) -> None:
    axis.hist(values, bins=bins, color=COLORS[color], alpha=0.85)
    axis.spines[["top", "right"]].set_visible(False)


def _extremes(images: Tensor, captions: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Embed the darkest images, those in the middle, and the brightest."""
    values = brightness(images)
    order = values.argsort().tolist()
    count = min(_EXTREMES, len(order))
    middle = (len(order) - count) // 2
    rows = {
        "Darkest images": order[:count],
        "Images of median brightness": order[middle : middle + count],
        "Brightest images": order[len(order) - count :],
    }
    return {title: [_captioned(images[i], captions[i]) for i in rows[title]] for title in rows}


def _captioned(image: Tensor, caption: str) -> dict[str, Any]:
    text = clipped(caption, 80) or "empty caption"
    level = float(brightness(image[None]))
    return {"image": embed(to_image(image)), "caption": f"{text}, brightness {level:.2f}"}
