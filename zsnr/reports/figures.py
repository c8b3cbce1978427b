"""The paper's Figures 4, 5 and 6, by any model or the exact denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from zsnr.checkpoints.checkpoint_file import KEY, open_checkpoint
from zsnr.checkpoints.run_folder import is_checkpoint, resolve_model
from zsnr.codecs import LatentCodec, PixelCodec
from zsnr.data.sources import Sources
from zsnr.files import check_new, new_file
from zsnr.noise import sample_generator
from zsnr.pipeline import TextToImage, to_image
from zsnr.reports.arms import Arm
from zsnr.reports.compare import check_images, check_models, check_numbers, encode, read_data
from zsnr.reports.exact import EXTREMES, exact_pipeline, find_groups
from zsnr.reports.images import image_grid, panel_figure, save_figure
from zsnr.reports.schedule import find_schedule, plot_schedule, schedule_facts
from zsnr.samplers.base import Callback
from zsnr.schedule import BetaKind, NoiseSchedule, Schedule, schedule_from_settings

if TYPE_CHECKING:
    from PIL.Image import Image

SPACINGS = ("leading", "linspace", "trailing")
STEPS = (5, 25)
RESCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
_ACROSS = 4  # images side by side of a prompt that is the only one

DEFAULTS: Mapping[int, Mapping[str, Any]] = {
    4: {},
    5: {"num_steps": 10},
    6: {"num_steps": 25, "guidance_scale": 7.5},
}
"""Settings of a figure that differ from those of the paper's other images, by its text."""

PROMPTS = (
    "solid black background",
    "a starry sky over the sea, no moon",
    "a bald eagle against a white background",
)


@dataclass(frozen=True, eq=False)
class Panels:
    """Images in rows and columns with labels.

    Args:
        title: Above them.
        rows: Labels of the rows.
        columns: Labels of the columns.
        images: One list per row.
        inner: If each image is a grid, the labels of its rows and of its columns.
    """

    title: str
    rows: list[str]
    columns: list[str]
    images: list[list[Image]]
    inner: tuple[list[str], list[str]] = ([], [])


def draw_schedule(target: str, num_steps: int, output: Path) -> None:
    """Draw Figure 2 of what `find_schedule` finds.

    Raises:
        ValueError: There is no schedule, or OUTPUT exists or does not end in .png.
    """
    _check_png(output)
    target = resolve_model(target)
    if is_checkpoint(target):
        schedule = schedule_from_settings(open_checkpoint(target)[KEY]["schedule"])
    else:
        schedule = find_schedule(target)
    plot_schedule(schedule_facts(schedule, num_steps, SPACINGS), output)


def draw_figure(
    number: int,
    arm: Arm,
    output: Path,
    *,
    model: str | None = None,
    data: Sources | None = None,
    prompts: Sequence[str] | None = None,
    count: int | None = None,
    seed: int = 0,
    image_size: int = 32,
    codec: LatentCodec | None = None,
    betas: str = "scaled_linear",
    most: int = 1000,
    device: str | None = None,
) -> Panels:
    """Sample and draw Figure 4, 5 or 6.

    Args:
        number: Number of the figure in the paper.
        arm: How to sample, except for what the figure varies.
        output: A new .png.
        model: The model that samples. None = the exact denoiser of `data`.
        data: The images that the exact denoiser knows.
        prompts: The prompts; with `data`, names of groups, see `find_groups`. None = the default
            ones.
        count: Seeds per prompt. None = 2; for a single prompt 4, and 8 in Figure 4.
        seed: The first seed.
        image_size: Height and width of the exact denoiser's images, in pixels.
        codec: Codec of its space. None = pixels.
        betas: Kind of its schedule.
        most: Largest number of images that it knows.
        device: Where a model samples.

    Raises:
        ValueError: An argument is wrong.
    """
    _check_png(output)
    check_numbers(count=count, samples=most, image_size=image_size)
    sample_generator(seed + (count or 1) - 1)
    schedule = NoiseSchedule(cast(BetaKind, betas))
    if model is None:
        for S in STEPS if number == 4 else (arm.num_steps,):
            replace(arm, num_steps=S).check(schedule)
        pipe, prompts = _exact(number, arm, data, prompts, image_size, codec, schedule, most, seed)
        if prompts == [""]:
            arm = replace(arm, guidance_scale=1.0)  # nothing to guide away from
    else:
        check_models(replace(arm, models=(model,)))
        prompts = list(prompts or PROMPTS)
        pipe = TextToImage.from_pretrained(model, device=device)
        arm.check(pipe.model.schedule)
        rescheduled = replace(pipe.model, schedule=arm.schedule_of(pipe.model.schedule))
        pipe = TextToImage(rescheduled, pipe.network, pipe.name)
    count = count or (2 if len(prompts) > 1 else 2 * _ACROSS if number == 4 else _ACROSS)
    panels = make_panels(number, pipe, arm, prompts, range(seed, seed + count))
    terminal = float(pipe.model.schedule.snr[-1])
    save_panels(panels, output, f"{pipe.name}, terminal SNR {terminal:.3g}")
    return panels


def _exact(
    number: int,
    arm: Arm,
    data: Sources | None,
    prompts: Sequence[str] | None,
    image_size: int,
    codec: LatentCodec | None,
    schedule: Schedule,
    most: int,
    seed: int,
) -> tuple[TextToImage, list[str]]:
    """Make the exact denoiser's pipeline, and its prompts."""
    if data is None:
        raise ValueError(f"Figure {number} needs a model or images.")
    codec = codec or PixelCodec(1)
    codec.latent_shape(image_size, image_size)
    check_images(data)
    images, captions = read_data(data, image_size, most, seed)
    prompts = list(prompts or (EXTREMES if number == 6 else [""]))
    groups = find_groups(images, captions, [prompt for prompt in prompts if prompt])
    latents = encode(images, codec)
    return exact_pipeline(latents, groups, codec, arm.schedule_of(schedule), image_size), prompts


def _check_png(output: Path) -> None:
    if output.suffix != ".png":
        raise ValueError(f"--output {output}: wanted a name that ends in .png.")
    check_new(output)


def make_panels(
    number: int, pipe: TextToImage, arm: Arm, prompts: Sequence[str], seeds: Sequence[int]
) -> Panels:
    """Sample the images of a figure.

    Args:
        number: 4: timestep spacings, at S = 5 and 25. 5: the prediction of x_0 after each step.
            6: guidance rescale from 0 to 1.
        pipe: The model, or an exact denoiser.
        arm: How to sample, except for what the figure varies. Where its sampler is "auto", Figure 4
            takes ddim on all of its timesteps.
        prompts: The prompts.
        seeds: The seeds of each prompt.
    """
    asked = [prompt for prompt in prompts for _ in seeds]
    every = [seed for _ in prompts for seed in seeds]
    rows = [_row(prompt, seed, len(seeds)) for prompt, seed in zip(asked, every, strict=True)]
    arm = (replace(arm, spacing="trailing") if number == 4 else arm).resolved()
    if number == 4:
        inner = _inner_labels(prompts, seeds)
        gap = max(2, pipe.model.image_size // 32)
        columns = len(seeds) if len(prompts) > 1 else min(_ACROSS, len(seeds))

        def grid(S: int, spacing: str) -> Image:
            sampled = _sample(pipe, replace(arm, spacing=spacing, num_steps=S), asked, every)
            return image_grid(sampled, columns, gap=gap)

        return Panels(
            f"Timestep spacings: {_settings(arm, 'sampler', 'guidance')}",
            [f"{S} steps" for S in STEPS],
            list(SPACINGS),
            [[grid(S, spacing) for spacing in SPACINGS] for S in STEPS],
            inner,
        )
    if number == 5:
        predictions: list[tuple[int, Tensor]] = []
        _sample(pipe, arm, asked, every, lambda i, t, x_0, x_s: predictions.append((t, x_0)))
        decoded = [pipe.model.codec.decode(x_0) for _, x_0 in predictions]
        return Panels(
            "Prediction of x_0 at each timestep, in sampling order: "
            f"{_settings(arm, 'sampler', 'spacing', 'guidance')}",
            rows,
            [f"t = {t}" for t, _ in predictions],
            [[to_image(pixels[i]) for pixels in decoded] for i in range(len(asked))],
        )
    by_phi = [_sample(pipe, replace(arm, guidance_rescale=phi), asked, every) for phi in RESCALES]
    return Panels(
        f"Guidance rescale phi: {_settings(arm, 'sampler', 'num_steps', 'spacing', 'scale')}",
        rows,
        [f"phi = {phi:g}" for phi in RESCALES],
        [list(row) for row in zip(*by_phi, strict=True)],
    )


def _inner_labels(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[str]]:
    """Label the rows and the columns of a grid: prompts by seeds, or one prompt's seeds."""
    if len(prompts) > 1:
        columns = [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else []
        return [prompt or "empty prompt" for prompt in prompts], columns
    rows = [seeds[i : i + _ACROSS] for i in range(0, len(seeds), _ACROSS)]
    prompt = prompts[0] or "empty prompt"
    return [
        f"{prompt}\n" + (f"seeds {row[0]} to {row[-1]}" if len(row) > 1 else f"seed {row[0]}")
        for row in rows
    ], []


def save_panels(panels: Panels, path: Path, note: str = "") -> None:
    """Write panels as PNG, with a line below the title."""
    title = f"{panels.title}\n{note}" if note else panels.title
    figure = panel_figure(panels.images, panels.rows, panels.columns, title, panels.inner)
    with new_file(path) as beside:
        save_figure(figure, beside)


def _sample(
    pipe: TextToImage,
    arm: Arm,
    prompts: Sequence[str],
    seeds: Sequence[int],
    callback: Callback | None = None,
) -> list[Image]:
    return pipe(
        prompts,
        seeds=seeds,
        sampling=arm.sampling(),
        batch_size=8 if callback is None else len(prompts),
        callback=callback,
    )


def _row(prompt: str, seed: int, count: int) -> str:
    text = prompt or "empty prompt"
    return f"{text}\nseed {seed}" if count > 1 else text


def _settings(arm: Arm, *names: str) -> str:
    words = {
        "sampler": arm.sampler,
        "num_steps": f"{arm.num_steps} steps",
        "spacing": f"{arm.spacing} timesteps",
        "scale": f"guidance scale {arm.guidance_scale:g}",
        "guidance": (f"guidance scale {arm.guidance_scale:g}, rescale {arm.guidance_rescale:g}"),
    }
    if arm.guidance_scale == 1:
        words["guidance"] = "no guidance"
    return ", ".join(words[name] for name in names)
