"""report.md of a run: what it makes, how it learned, how bright it is."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsnr.checkpoints import read_checkpoint
from zsnr.data.dataset import ShardDataset, collate
from zsnr.data.formats import MAX_PIXELS, image_size
from zsnr.data.images import decode_image, to_unit_range
from zsnr.data.index import load_index
from zsnr.data.samples import select
from zsnr.data.storage import Storage
from zsnr.files import replacing
from zsnr.metrics import brightness, kept_fraction, mean_mode
from zsnr.reports.arms import GUIDANCE, guidance_text
from zsnr.reports.flaw import oracle_brightness
from zsnr.reports.images import image_grid, image_pixels, save_figure, stacked_axes
from zsnr.schedule import NoiseSchedule
from zsnr.untrusted import clipped, parse_object, read_small, shown

if TYPE_CHECKING:
    from PIL.Image import Image

ORIGINAL = NoiseSchedule(zero_terminal_snr=False)
_MOST_TEXT, _MOST_IMAGE = 1 << 26, 1 << 28  # bytes
_SAMPLE = {  # what every entry of a manifest holds
    **dict.fromkeys(("file", "prompt", "sampler", "spacing"), str),
    **{"num_steps": int, "guidance_scale": int | float, "guidance_rescale": int | float},
}


def write_report(run_folder: str | Path, data: str | Sequence[str]) -> Path:
    """Write RUN/report.md and its pictures.

    Reads RUN/samples (written by predict), RUN/metrics (the CSV logger's, named so) and
    RUN/checkpoints/last.ckpt.

    Args:
        run_folder: The run.
        data: The shards it was trained on.

    Returns:
        Path of the report.

    Raises:
        ValueError: One of these is missing.
    """
    run = Path(run_folder)
    samples = read_samples(run / "samples")
    model = read_checkpoint(run / "checkpoints" / "last.ckpt")
    images, captions = _read_data(data, model.image_size)
    prompted = [s for s in samples if s["prompt"]]
    free = [s for s in samples if not s["prompt"]]

    pictures = run / "report"
    _save_grid(prompted, pictures / "prompted.png")
    _save_grid(free, pictures / "unprompted.png")
    losses = _plot_losses(run / "metrics", pictures / "loss.png")
    free_brightness = _brightness_of(free)
    flaw = oracle_brightness(images)
    data_brightness = brightness(images)
    _plot_histograms(
        {"data": data_brightness, "samples without a prompt": free_brightness},
        pictures / "brightness.png",
    )
    _plot_histograms({"data": data_brightness, **flaw}, pictures / "flaw.png")

    codec = model.codec
    latents = torch.cat([codec.latents(codec.encode(part[None])) for part in images])
    spaces = {
        "this run's latents": mean_mode(latents),
        f"{model.image_size}x{model.image_size} pixels": mean_mode(images),
    }
    first = samples[0]
    named = {name: first[name] for name in GUIDANCE[2:] if first.get(name) is not None}
    others = "".join(
        f", {name.removeprefix('guidance_').replace('_', ' ')} {guidance_text(value)}"
        for name, value in named.items()
        if name != "guidance_interval"
    )
    sections = [
        f"# {run.name}\n\n{len(prompted)} prompted and {len(free)} unprompted samples, "
        f"{first['sampler']} in {first['num_steps']} steps, {first['spacing']} timesteps, guidance "
        f"{first['guidance_scale']:g} rescaled by {first['guidance_rescale']:g}{others}. Every "
        "sample of the manifest is shown, in its order.",
        f"## Prompted\n\n![prompted samples](report/prompted.png)\n\n{_prompt_list(prompted)}",
        "## Without a prompt\n\n![unprompted samples](report/unprompted.png)",
        _brightness_section(prompted, free_brightness, images, captions),
        f"## Loss\n\n![loss](report/loss.png)\n\n{losses}",
        _flaw_section(flaw, data_brightness, spaces),
    ]
    report = run / "report.md"
    with replacing(report) as beside:
        beside.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return report


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Read what predict wrote: the entries of its manifest by file name, each with its `image`.

    Raises:
        ValueError: There is no manifest, or an entry or an image of it cannot be read.
    """
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        raise ValueError(f"{manifest} is missing: run `zsnr predict ... --output {folder}` first.")
    samples = []
    for number, line in enumerate(read_small(manifest, _MOST_TEXT).splitlines(), start=1):
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

    data = read_small(path, _MOST_IMAGE)
    try:
        pixels = decode_image(data, *image_size(data, MAX_PIXELS))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _read_data(data: str | Sequence[str], size: int, most: int = 1500) -> tuple[Tensor, list[str]]:
    dataset = ShardDataset(select(load_index(data, Storage()), size))
    rows = range(0, len(dataset), max(1, len(dataset) // most))
    batch = collate([dataset[row] for row in rows])
    return to_unit_range(batch["image"]), batch["caption"]


def _brightness_of(samples: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.cat(
        [brightness(image_pixels([sample["image"]])) for sample in samples] or [torch.empty(0)]
    )


def _save_grid(samples: Sequence[Mapping[str, Any]], path: Path, columns: int = 8) -> None:
    if samples:
        grid = image_grid([sample["image"] for sample in samples], columns)
        zoom = max(1, 96 * columns // grid.width)
        with replacing(path) as beside:
            grid.resize((grid.width * zoom, grid.height * zoom), 0).save(beside, format="PNG")


def _prompt_list(samples: Sequence[Mapping[str, Any]], columns: int = 8) -> str:
    """Say what each row asked for, as one line a row."""
    rows = [samples[i : i + columns] for i in range(0, len(samples), columns)]
    lines = []
    for number, row in enumerate(rows, start=1):
        prompts = [str(sample["prompt"]) for sample in row]
        ground = {_background(prompt) for prompt in prompts}
        if len(ground) == 1 and None not in ground:
            things = ", ".join(prompt.partition(" on a ")[0] for prompt in prompts)
            lines.append(f"{number}. *on a {ground.pop()} background*: {things}")
        else:
            lines.append(f"{number}. {', '.join(prompts)}")
    return "\n".join(lines)


def _background(text: str) -> str | None:
    found = re.search(r" on a (.+) background$", text)
    return found[1] if found else None


def _brightness_section(
    prompted: Sequence[Mapping[str, Any]], free: Tensor, images: Tensor, captions: Sequence[str]
) -> str:
    data_by, samples_by = defaultdict(list), defaultdict(list)
    for value, caption in zip(brightness(images).tolist(), captions, strict=True):
        data_by[_background(caption)].append(value)
    for sample, value in zip(prompted, _brightness_of(prompted).tolist(), strict=True):
        samples_by[_background(sample["prompt"])].append(value)
    lines = ["| prompted background | samples | data |", "|---|---|---|"]
    for ground in sorted(samples_by.keys() & data_by.keys() - {None}, key=str):
        lines.append(f"| {ground} | {_mean(samples_by[ground])} | {_mean(data_by[ground])} |")
    everything = brightness(images)
    lines += ["", "| without a prompt | samples | data |", "|---|---|---|"]
    for name, measure in (("mean", Tensor.mean), ("standard deviation", Tensor.std)):
        own = f"{measure(free):.2f}" if len(free) > 1 else "-"
        lines.append(f"| {name} | {own} | {measure(everything):.2f} |")
    table = "\n".join(lines)
    return (
        "## Brightness\n\nMean over pixels and channels, from -1 (black) to 1 (white).\n\n"
        f"{table}\n\n![brightness](report/brightness.png)"
    )


def _flaw_section(flaw: Mapping[str, Tensor], data: Tensor, spaces: Mapping[str, float]) -> str:
    lines = ["| 50 steps of DDIM | brightness, mean | standard deviation |", "|---|---|---|"]
    lines.append(f"| data | {data.mean():.2f} | {data.std():.2f} |")
    for name, values in flaw.items():
        lines.append(f"| {name} | {values.mean():.2f} | {values.std():.2f} |")
    kept = ["| space | S | kept fraction |", "|---|---|---|"]
    for name, mode in spaces.items():
        kept.append(f"| {name} | {mode:.1f} | {kept_fraction(ORIGINAL, mode):.2f} |")
    fractions = [kept_fraction(ORIGINAL, mode) for mode in spaces.values()]
    where = (
        "So this run's latents are too small to show the flaw well; the pixels above are not."
        if fractions[0] > 0.4
        else "So this run's latents show the flaw as well."
    )
    table, kept_table = "\n".join(lines), "\n".join(kept)
    return (
        "## The flaw, without training\n\nThe same pictures with the exact denoiser in place of a "
        "network, in pixels, from the same noise: what differs is the schedule and the steps.\n\n"
        f"![the flaw](report/flaw.png)\n\n{table}\n\n"
        "How much of the brightness range the original schedule keeps in a space depends on how "
        "far the mean stands out of the noise there: S = sqrt(h w L) with L the largest variance "
        "of the channels' means, and the kept fraction 1 / sqrt(abar_T S^2 + 1 - abar_T).\n\n"
        f"{kept_table}\n\n{where}"
    )


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f}"


def read_losses(metrics: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a run's losses by step from what the CSV logger wrote, all of its versions together.

    Raises:
        ValueError: There are none, or one of the files is damaged.
    """
    parts = sorted(metrics.glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not parts:
        raise ValueError(f"{metrics} holds no metrics.csv: add the CSV logger to trainer.logger.")
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for part in parts:  # a resumed run writes another one
        text = read_small(part, _MOST_TEXT)
        try:
            for row in csv.DictReader(io.StringIO(text.decode(), newline="")):
                for name in ("train/loss", "train_by_timestep/terminal", "val/loss"):
                    if row.get(name):
                        found[name][int(row["step"])] = float(row[name])
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise ValueError(
                f"{part} is not what the CSV logger writes: {clipped(str(error))}."
            ) from error
    return {name: sorted(points.items()) for name, points in found.items()}


def _plot_losses(metrics: Path, path: Path) -> str:
    curves = read_losses(metrics)
    figure, axes = stacked_axes(8, 3.5)
    for name, points in curves.items():
        steps, values = [step for step, _ in points], [value for _, value in points]
        if name == "train/loss":
            axes.plot(steps, values, color="0.85", linewidth=0.8)
            axes.plot(steps, _smooth(values), color="C0", label="train, smoothed")
        elif name == "val/loss":
            axes.plot(steps, values, color="C3", marker="o", label="validation, averaged weights")
        else:
            # The logger repeats a value until the last timestep is drawn again.
            new = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
            steps, values = [steps[i] for i in new], [values[i] for i in new]
            axes.scatter(steps, values, color="C1", s=12, label="train, last timestep alone")
    axes.set(xlabel="optimizer step", ylabel="v loss", yscale="log")
    axes.legend(frameon=False)
    save_figure(figure, path)
    last = {name: points[-1] for name, points in curves.items()}
    return ", ".join(f"{name} {value:.3f} at step {step}" for name, (step, value) in last.items())


def _smooth(values: Sequence[float], decay: float = 0.8) -> list[float]:
    smooth, weight, out = 0.0, 0.0, []
    for value in values:
        smooth, weight = decay * smooth + (1 - decay) * value, decay * weight + 1 - decay
        out.append(smooth / weight)
    return out


def _plot_histograms(groups: Mapping[str, Tensor], path: Path) -> None:
    import numpy as np

    shown = {name: values for name, values in groups.items() if len(values)}
    figure, axes = stacked_axes(8, 1.2 * len(shown) + 0.6, rows=len(shown))
    bins = np.linspace(-1, 1, 41)
    for axis, (name, values) in zip(np.atleast_1d(axes), shown.items(), strict=True):
        colour = "0.5" if name == "data" else "C2" if "fixed" in name else "C0"
        weights = np.full(len(values), 1 / len(values))
        axis.hist(values.clamp(-1, 1).numpy(), bins=bins, weights=weights, color=colour)
        axis.set_title(f"{name}: std {values.std():.2f}", fontsize=9, loc="left", pad=2)
        axis.set(yticks=[], xlim=(-1, 1))
    np.atleast_1d(axes)[-1].set_xlabel("brightness of a picture, -1 black to 1 white")
    save_figure(figure, path)
