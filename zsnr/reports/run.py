"""index.html of a run: its samples, its losses, and how bright its samples are.

`python -m zsnr.reports.run RUN --data DATA` writes it.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsnr import __version__
from zsnr.checkpoints import read_checkpoint
from zsnr.data.dataset import ShardDataset, collate
from zsnr.data.formats import MAX_PIXELS, image_size
from zsnr.data.images import decode_image, to_unit_range
from zsnr.data.index import load_index
from zsnr.data.samples import select
from zsnr.data.storage import Storage
from zsnr.failures import told
from zsnr.files import replacing
from zsnr.metrics import brightness, kept_fraction, mean_mode
from zsnr.public import public_text
from zsnr.reports.arms import GUIDANCE, guidance_text
from zsnr.reports.charts import COLORS, draw_brightness_histograms
from zsnr.reports.flaw import oracle_brightness
from zsnr.reports.images import image_pixels
from zsnr.reports.page import draw_chart, embed, render_page
from zsnr.schedule import NoiseSchedule
from zsnr.untrusted import clipped, parse_object, printable, read_small, shown

if TYPE_CHECKING:
    from markupsafe import Markup
    from PIL.Image import Image

ORIGINAL = NoiseSchedule(zero_terminal_snr=False)
_MAX_TEXT, _MAX_IMAGE = 1 << 26, 1 << 28  # bytes
_MAX_SAMPLES = 96  # with and without a prompt each
_GREY = "#808080"
_SHOWS_FLAW = 0.4  # retained fraction of latents that show the flaw well
_SAMPLE = {  # what every entry of a manifest holds
    **dict.fromkeys(("file", "prompt", "sampler", "spacing"), str),
    **{"num_steps": int, "guidance_scale": int | float, "guidance_rescale": int | float},
}
_LOSSES = {
    "train/loss": "training loss, smoothed",
    "train_by_timestep/terminal": "training loss at the last timestep",
    "val/loss": "validation loss, averaged weights",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page of a run and print its path; return the exit code, 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m zsnr.reports.run", description=__doc__)
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run, with samples")
    parser.add_argument("--data", metavar="DATA", required=True, help="the training data")
    options = parser.parse_args(arguments)
    try:
        print(printable(str(write_report(options.run_folder, options.data))))
    except Exception as error:
        text = told(error, "report")
        if text is None:
            raise
        print(f"zsnr: error: {printable(public_text(text), one_line=True)}", file=sys.stderr)
        return 2
    return 0


def write_report(run_folder: str | Path, data: str | Sequence[str]) -> Path:
    """Write RUN/index.html, a page that stands alone.

    Reads RUN/samples (written by predict), RUN/metrics (written by a CSV logger of that name) and
    RUN/checkpoints/last.ckpt.

    Args:
        run_folder: The folder of the run.
        data: The shards it was trained on.

    Returns:
        Path of the page.

    Raises:
        ValueError: One of these is missing or cannot be read.
    """
    run = Path(run_folder)
    samples = read_samples(run / "samples")
    model = read_checkpoint(run / "checkpoints" / "last.ckpt")
    images, captions = _read_data(data, model.image_size)
    losses = read_losses(run / "metrics")
    prompted = [sample for sample in samples if sample["prompt"]]
    unprompted = [sample for sample in samples if not sample["prompt"]]
    data_brightness, free_brightness = brightness(images), _brightness_of(unprompted)
    flaw = oracle_brightness(images)
    codec = model.codec
    latents = torch.cat([codec.latents(codec.encode(part[None])) for part in images])
    modes = {
        "this run's latents": mean_mode(latents),
        f"{model.image_size}x{model.image_size} pixels": mean_mode(images),
    }
    retained = {name: kept_fraction(ORIGINAL, mode) for name, mode in modes.items()}
    values = {
        "title": f"Samples and data of the run {run.absolute().name}",
        "zsnr_version": __version__,
        "sampling": _sampling_text(samples[0]),
        "prompted": _gallery(prompted),
        "unprompted": _gallery(unprompted),
        "by_background": _by_background(prompted, data_brightness, captions),
        "unconditional": [
            ["mean", *(_statistic(x, Tensor.mean) for x in (free_brightness, data_brightness))],
            [
                "standard deviation",
                *(_statistic(x, Tensor.std) for x in (free_brightness, data_brightness)),
            ],
        ],
        "brightness_chart": _histograms(
            {"data": data_brightness, "unconditional samples": free_brightness}
        ),
        "loss_chart": draw_chart(lambda axes: _draw_losses(axes, losses), 9, 3.6),
        "losses": [
            [_LOSSES[name].partition(", smoothed")[0], f"{points[-1][1]:.4f}", points[-1][0]]
            for name, points in losses.items()
        ],
        "flaw_chart": _histograms({"data": data_brightness, **flaw}),
        "flaw": [
            [name, *(_statistic(x, measure) for measure in (Tensor.mean, Tensor.std))]
            for name, x in {"data": data_brightness, **flaw}.items()
        ],
        "spaces": [[name, f"{mode:.1f}", f"{retained[name]:.2f}"] for name, mode in modes.items()],
        "shows_flaw": retained["this run's latents"] <= _SHOWS_FLAW,
    }
    page = run / "index.html"
    with replacing(page) as beside:
        beside.write_text(render_page("run.html", values), encoding="utf-8")
    return page


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Read what predict wrote: the entries of its manifest by file name, each with its `image`.

    Raises:
        ValueError: There is no manifest, or an entry or an image of it cannot be read.
    """
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        raise ValueError(f"{manifest} is missing: run `zsnr predict ... --output {folder}` first.")
    samples = []
    for number, line in enumerate(read_small(manifest, _MAX_TEXT).splitlines(), start=1):
        where = f"{manifest}, line {number}"
        sample = parse_object(line, where)
        for name, kind in _SAMPLE.items():
            if not isinstance(sample.get(name), kind):
                raise ValueError(
                    f"{where}: {name}={shown(sample.get(name))}: wanted what predict wrote."
                )
        file = sample["file"]
        if Path(file).name != file:
            raise ValueError(f"{where}: file={shown(file)}: wanted a name in {folder}.")
        samples.append({**sample, "image": _read_image(folder / file)})
    if not samples:
        raise ValueError(f"{manifest} is empty: wanted at least one sample.")
    return sorted(samples, key=lambda sample: str(sample["file"]))


def _read_image(path: Path) -> Image:
    from PIL import Image

    data = read_small(path, _MAX_IMAGE)
    try:
        pixels = decode_image(data, *image_size(data, MAX_PIXELS))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _read_data(
    data: str | Sequence[str], size: int, max_images: int = 1500
) -> tuple[Tensor, list[str]]:
    dataset = ShardDataset(select(load_index(data, Storage()), size))
    rows = range(0, len(dataset), max(1, len(dataset) // max_images))
    batch = collate([dataset[row] for row in rows])
    return to_unit_range(batch["image"]), batch["caption"]


def _brightness_of(samples: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.cat(
        [brightness(image_pixels([sample["image"]])) for sample in samples] or [torch.empty(0)]
    )


def _sampling_text(sample: Mapping[str, Any]) -> str:
    options = {name: sample[name] for name in GUIDANCE[2:] if sample.get(name) is not None}
    others = "".join(
        f", {name.removeprefix('guidance_').replace('_', ' ')} {guidance_text(value)}"
        for name, value in options.items()
        if name != "guidance_interval"
    )
    return (
        f"The images were sampled with the sampler {sample['sampler']} in {sample['num_steps']} "
        f"steps (timestep spacing {sample['spacing']}), guidance scale "
        f"{sample['guidance_scale']:g} and guidance rescale {sample['guidance_rescale']:g}{others}."
    )


def _gallery(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    images = []
    for sample in samples[:_MAX_SAMPLES]:
        seed = sample.get("seed")
        parts = [clipped(sample["prompt"])] if sample["prompt"] else []
        parts += [f"seed {seed}"] if isinstance(seed, int) else []
        images.append({"image": embed(sample["image"]), "caption": ", ".join(parts) or "sample"})
    return {"count": len(samples), "images": images, "left": len(samples) - len(images)}


def _background(text: str) -> str | None:
    match = re.search(r" on a (.+) background$", text)
    return match[1] if match else None


def _by_background(
    prompted: Sequence[Mapping[str, Any]], data_brightness: Tensor, captions: Sequence[str]
) -> list[list[str]]:
    """Average brightness over the backgrounds that prompts and captions name."""
    data, samples = defaultdict(list), defaultdict(list)
    for value, caption in zip(data_brightness.tolist(), captions, strict=True):
        data[_background(caption)].append(value)
    for sample, value in zip(prompted, _brightness_of(prompted).tolist(), strict=True):
        samples[_background(sample["prompt"])].append(value)
    return [
        [ground, *(f"{sum(each[ground]) / len(each[ground]):.2f}" for each in (samples, data))]
        for ground in sorted(samples.keys() & data.keys() - {None}, key=str)
        if ground is not None
    ]


def _statistic(values: Tensor, measure: Callable[[Tensor], Tensor]) -> str:
    return f"{measure(values):.2f}" if len(values) > 1 else "-"


def read_losses(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a run's losses by step from what the CSV logger wrote, all of its versions together.

    Raises:
        ValueError: There are none, or one of the files is damaged.
    """
    parts = sorted(metrics.glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not parts:
        raise ValueError(f"{metrics} holds no metrics.csv: add the CSV logger to trainer.logger.")
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for part in parts:  # a resumed run writes another one
        text = read_small(part, _MAX_TEXT)
        try:
            for row in csv.DictReader(io.StringIO(text.decode(), newline="")):
                for name in _LOSSES:
                    if row.get(name):
                        losses[name][int(row["step"])] = float(row[name])
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise ValueError(
                f"{part} is not what the CSV logger writes: {clipped(str(error))}."
            ) from error
    return {name: sorted(points.items()) for name, points in losses.items()}


def _draw_losses(axes: Any, losses: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for name, points in losses.items():
        steps, values = [step for step, _ in points], [value for _, value in points]
        if name == "train/loss":
            axes.plot(steps, values, color=_GREY, alpha=0.4, linewidth=0.8, label="training loss")
            axes.plot(steps, _smooth(values), color=COLORS[0], label=_LOSSES[name])
        elif name == "val/loss":
            axes.plot(steps, values, color=COLORS[1], marker="o", label=_LOSSES[name])
        else:
            # The logger repeats a value until the last timestep is drawn again.
            new = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
            steps, values = [steps[i] for i in new], [values[i] for i in new]
            axes.scatter(steps, values, color=COLORS[4], s=12, label=_LOSSES[name])
    axes.set(xlabel="optimizer step", ylabel="v loss", yscale="log")
    axes.grid(color="#80808055", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _smooth(values: Sequence[float], decay: float = 0.8) -> list[float]:
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + 1 - decay
        smoothed.append(average / weight)
    return smoothed


def _histograms(groups: Mapping[str, Tensor]) -> Markup:
    """Draw a histogram of brightness for each group that has images."""
    colored = {}
    for name, values in groups.items():
        if len(values):
            spread = f" (standard deviation {values.std():.2f})" if len(values) > 1 else ""
            color = _GREY if name == "data" else COLORS[2 if "fixed" in name else 0]
            colored[f"{name}{spread}"] = values.tolist(), color

    def draw(axes: Any) -> None:
        xlabel = "brightness of an image, from -1 (black) to 1 (white)"
        draw_brightness_histograms(axes, colored, xlabel=xlabel)

    return draw_chart(draw, 9, 1.1 * len(colored) + 0.55, rows=len(colored))


if __name__ == "__main__":
    sys.exit(main())
