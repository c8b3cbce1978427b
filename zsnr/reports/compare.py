"""Models or sampling settings side by side: the same prompts and seeds, images and numbers.

An arm is one of the sides: a model, or several trained alike, and a way to sample it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zsnr.checkpoints.checkpoint_file import KEY, open_checkpoint
from zsnr.checkpoints.run_folder import check_model, is_checkpoint, resolve_model
from zsnr.codecs import LatentCodec, PixelCodec
from zsnr.data.faults import summarize
from zsnr.data.index import load_index
from zsnr.data.prompts import PromptRequest, brightness_suite, read_prompts
from zsnr.data.samples import select
from zsnr.data.sources import Sources, find_shards
from zsnr.data.storage import Storage
from zsnr.files import check_new, new_folder
from zsnr.interop.adapter_file import open_adapter
from zsnr.metrics import kept_fraction, mean_mode
from zsnr.noise import derive_seed, sample_generator
from zsnr.pipeline import (
    TextToImage,
    check_raw_beside,
    check_threshold,
    save_png,
    to_image,
)
from zsnr.prediction import check_prediction_type
from zsnr.reports.arms import Arm
from zsnr.reports.compare_page import comparison_page
from zsnr.reports.data import look_at, public_paths
from zsnr.reports.flaw import oracle_samples
from zsnr.reports.images import image_pixels
from zsnr.reports.outcomes import MEASURES, ModelImages, Outcome, groups_of, measure, measure_arms
from zsnr.schedule import NoiseSchedule, Schedule, schedule_from_settings
from zsnr.untrusted import printable

if TYPE_CHECKING:
    from PIL.Image import Image

_ENCODED = 256  # images whose latents tell the signal-to-noise ratio of their mean


def compare_models(
    arms: Sequence[Arm],
    output: Path,
    *,
    prompts: str | None = None,
    num_prompts: int = 64,
    count: int | None = None,
    seed: int = 0,
    data: Sources | None = None,
    most: int = 1000,
    batch_size: int = 8,
    device: str | None = None,
) -> dict[str, Any]:
    """Sample every arm by `TextToImage`; write OUTPUT/index.html, compare.json and the images.

    Args:
        arms: The models and settings that are compared.
        output: The folder; must not exist.
        prompts: A prompts file; "data" for captions of the data; "empty" for the empty prompt.
            None = the shipped brightness suite, which is for general models.
        num_prompts: Number of captions that "data" draws.
        count: Images per prompt, with seeds s .. s+n-1. None = as the file says; 2 for the suite,
            1 for a caption, 64 for the empty prompt.
        seed: The first seed.
        data: The images whose brightness is the target.
        most: Largest number of images drawn from `data`.
        batch_size: Images sampled at a time.
        device: Where to sample. None = the GPU if there is one.

    Returns:
        What compare.json holds.

    Raises:
        ValueError: An argument is wrong; before anything slow where that can be known.
    """
    arms = [arm.resolved() for arm in arms]
    check_new(output)
    check_numbers(count=count, num_prompts=num_prompts, samples=most, batch_size=batch_size)
    sample_generator(seed)
    if data is not None:
        check_images(data)
    if prompts == "data" and data is None:
        raise ValueError("--prompts data takes captions of the data: give --data SHARDS.")
    if prompts not in ("data", "empty"):
        _requests(prompts, count, seed, [])
    for arm in arms:
        check_models(arm)
    loads = list(
        dict.fromkeys((path, arm.lora, arm.max_tokens) for arm in arms for path in arm.models)
    )

    images: Tensor | None = None
    captions: list[str] = []
    requests: list[PromptRequest] = []
    bar: Any = None
    images_of: dict[tuple[str, str], ModelImages] = {}
    schedules: dict[str, Schedule] = {}
    retained: dict[str, float | None] = {}
    with new_folder(output) as folder:
        for number, (path, loras, max_tokens) in enumerate(loads):
            arms_of_model = [
                arm
                for arm in arms
                if path in arm.models and (arm.lora, arm.max_tokens) == (loras, max_tokens)
            ]
            raw_beside = any(arm.guidance_against == "raw" for arm in arms_of_model)
            pipe = TextToImage.from_pretrained(
                path, device=device, raw_beside=raw_beside, max_tokens=max_tokens
            )
            for file, scale in loras:
                pipe.load_lora(file, scale)
            for arm in arms_of_model:
                arm.check(pipe.model.schedule)
                check_threshold(arm.sampling().guidance, pipe.model.codec)
                check_prediction_type(
                    pipe.model.prediction_type, arm.schedule_of(pipe.model.schedule)
                )
            if number == 0:
                if data is not None:
                    images, captions = read_data(data, pipe.model.image_size, most, seed)
                if prompts == "data":
                    captions = _choose(captions, num_prompts, seed)
                requests = _requests(prompts, count, seed, captions)
                bar = _bar(arms, requests, batch_size)
            mode = None
            if images is not None:
                device_of = next(pipe.model.network.parameters()).device
                mode = mean_mode(encode(images[:_ENCODED], pipe.model.codec, device_of))
            for arm in arms_of_model:
                schedule = arm.schedule_of(pipe.model.schedule)
                _check_same(arm, schedules.setdefault(arm.name, schedule), schedule)
                retained.setdefault(
                    arm.name, None if mode is None else kept_fraction(schedule, mode)
                )
                place = f"images/{arms.index(arm) + 1:02d}-{_slug(arm.name)}"
                if len(arm.models) > 1:
                    place += f"/model-{arm.models.index(path) + 1}"
                model = replace(pipe.model, schedule=schedule)
                images_of[arm.name, path] = _sample_arm(
                    TextToImage(model, pipe.network, path, pipe.loras),
                    arm,
                    requests,
                    folder,
                    place,
                    batch_size,
                    bar,
                )
            del pipe
        if bar is not None:
            bar.close()
        outcomes = [
            Outcome(
                arm,
                schedules[arm.name],
                retained[arm.name],
                [images_of[arm.name, path] for path in arm.models],
            )
            for arm in arms
        ]
        facts = {
            "kind": "models",
            "prompts": prompts or "suite",
            **measure_arms(outcomes, requests, None if images is None else measure(images)),
        }
        if data is not None:
            facts["data"]["source"] = public_paths(data)
        _write(facts, folder)
    return facts


def compare_exact(
    arms: Sequence[Arm],
    output: Path,
    *,
    data: Sources,
    image_size: int = 32,
    codec: LatentCodec | None = None,
    most: int = 1000,
    count: int = 256,
    seed: int = 0,
    schedule: Schedule = NoiseSchedule(),
    batch_size: int = 64,
) -> dict[str, Any]:
    """Compare sampling settings as `compare_models` does, with an exact denoiser and no model.

    Args:
        arms: The settings that are compared, without models.
        output: The folder; must not exist.
        data: The images whose exact denoiser takes the place of a network.
        image_size: Height and width, in pixels.
        codec: Defines the space, with its scale. None = pixels.
        most: Largest number of images drawn from `data`.
        count: Samples per arm.
        seed: The first seed.
        schedule: The schedule whose original and rescaled form the arms name.
        batch_size: Samples drawn at a time.

    Raises:
        ValueError: An argument is wrong.
    """
    arms = [arm.resolved(guided=False) for arm in arms]
    check_new(output)
    check_numbers(count=count, samples=most, batch_size=batch_size, image_size=image_size)
    for last in (seed, seed + count - 1):
        sample_generator(last)
    codec = codec or PixelCodec(1)
    shape = codec.latent_shape(image_size, image_size)
    check_images(data)
    for arm in arms:
        arm.check(schedule)
    with new_folder(output) as folder:
        images, _ = read_data(data, image_size, most, seed)
        latents = encode(images, codec)
        mode = mean_mode(latents)
        seeds = range(seed, seed + count)
        samples = oracle_samples(latents, lambda x: x, arms, seeds, batch_size, schedule)
        requests = [PromptRequest("", seed=s, line=1) for s in seeds]
        outcomes = []
        for number, arm in enumerate(arms, start=1):
            pixels = (codec.decode(part) for part in torch.split(samples[arm.name], batch_size))
            generated = [to_image(each) for part in pixels for each in part]
            place = f"images/{number:02d}-{_slug(arm.name)}"
            files = _save(generated, requests, folder, place)
            sampled_on = arm.schedule_of(schedule)
            images_of = ModelImages("", files, measure(image_pixels(generated)))
            outcomes.append(Outcome(arm, sampled_on, kept_fraction(sampled_on, mode), [images_of]))
        facts = {
            "kind": "exact denoiser",
            "prompts": "empty",
            **measure_arms(outcomes, requests, measure(images)),
        }
        facts["data"]["source"] = public_paths(data)
        facts["space"] = {"shape": list(shape), "codec": codec.settings(), "mode": mode}
        _write(facts, folder)
    return facts


def read_data(data: Sources, size: int, max_images: int, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Read randomly chosen images of a dataset as squares, the same ones each time.

    Returns:
        Images (N, 3, size, size) in [-1, 1], and their captions.

    Raises:
        ValueError: Fewer than two can be read.
    """
    samples = select(load_index(data, Storage()), size)
    generator = sample_generator(derive_seed(seed, 0))
    rows = torch.randperm(len(samples), generator=generator)[:max_images].sort().values.tolist()
    images, captions, faults = look_at(samples, size, rows)
    if faults:
        print(printable(f"broken images: {summarize(faults)}"), file=sys.stderr)
    if len(images) < 2:
        raise ValueError(f"{len(images)} readable images: wanted at least 2.")
    return images, captions


def comparison_text(facts: Mapping[str, Any], page: Path) -> str:
    """Write the main numbers as a table for a terminal, without columns that have no value."""
    data, arms = facts["data"], facts["arms"]
    rows = [["", "mean luma", "contrast", "W1 to the data", "pairs in order"]]
    if data is not None:
        floor = f"{data['noise_floor']['mean']:.3f} expected of real data"
        rows.append(["data", f"{data['mean_luma']:.3f}", f"{data['rms_contrast']:.3f}", floor, ""])
    for arm in arms:
        w1, order = "", ""
        if arm["w1"] is not None:
            w1 = "{estimate:.3f} [{low:.3f}, {high:.3f}]".format(**arm["w1"])
            w1 += ", at the floor" if arm["at_noise_floor"] else ""
        if arm["order"] is not None:
            order = f"{arm['order']['in_order']} of {arm['order']['pairs']}"
        rows.append(
            [arm["name"], f"{arm['mean_luma']:.3f}", f"{arm['rms_contrast']:.3f}", w1, order]
        )
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in zip(*columns, strict=True)
    ]
    notes = []
    if facts["prompts"] == "suite":
        notes.append(
            "The prompts are the brightness suite for general models. For a model of one kind of "
            "image, use --prompts data with --data."
        )
    if arms[0]["order"] is not None and arms[0]["order"]["equal_ranks"]:
        equal = "; ".join(" = ".join(names) for names in arms[0]["order"]["equal_ranks"])
        notes.append(f"The order of prompt groups of equal rank is not judged: {equal}.")
    return "\n".join([*lines, *notes, str(page)])


def to_json(facts: Mapping[str, Any]) -> str:
    """Write the facts as strict JSON."""
    return json.dumps(facts, allow_nan=False, ensure_ascii=False)


def _requests(
    prompts: str | None, count: int | None, seed: int, captions: Sequence[str]
) -> list[PromptRequest]:
    """Read or make the requests for images."""
    if prompts == "data":
        count = count or 1
        sample_generator(seed + max(0, len(captions) * count - 1))  # before there are so many
        read = [
            PromptRequest(text, seed=seed + i * count, line=i + 1)
            for i, text in enumerate(captions)
        ]
    elif prompts == "empty":
        count = count or 64
        read = [PromptRequest("", seed=seed, line=1)]
    else:
        read = read_prompts(prompts or brightness_suite(), seed)
        count = count or (2 if prompts is None else None)
    if count is not None:
        first = {request.line: request for request in reversed(read)}
        sample_generator(max(request.seed for request in first.values()) + count - 1)
        read = [
            replace(first[line], seed=first[line].seed + k)
            for line in sorted(first)
            for k in range(count)
        ]
    for request in read:
        sample_generator(request.seed)
    groups_of(read)
    return read


def _choose(captions: Sequence[str], count: int, seed: int) -> list[str]:
    """Choose captions at random, the same ones each time."""
    if len(captions) < count:
        raise ValueError(
            f"--num-prompts {count}, but only {len(captions)} images of the data are read: raise "
            "--samples, or lower --num-prompts."
        )
    order = torch.randperm(len(captions), generator=sample_generator(derive_seed(seed, 1)))
    return [captions[i] for i in order[:count].tolist()]


def check_numbers(**numbers: int | None) -> None:
    """Refuse numbers below their lower bound: 2 images of the data, 1 of everything else."""
    for name, value in numbers.items():
        if value is not None and value < (2 if name == "samples" else 1):
            least = 2 if name == "samples" else 1
            raise ValueError(f"--{name.replace('_', '-')} {value}: wanted at least {least}.")


def check_images(data: Sources) -> None:
    """Refuse data that does not exist or holds no images."""
    for shard in find_shards(data):
        if shard.kind == "cache":
            raise ValueError(f"{shard.url} holds no images: give the shards it was cached from.")
        if shard.url.endswith((".ckpt", ".safetensors")):
            raise ValueError(
                f"{shard.url} is a model, but images were wanted there: name models before --data "
                "and --oracle."
            )


def check_models(arm: Arm) -> None:
    """Refuse what can be known to fail without loading a model."""
    for file, _ in arm.lora:
        open_adapter(file)
    first: Schedule | None = None
    for path in map(resolve_model, arm.models):
        if arm.guidance_against == "raw":
            check_raw_beside(path)
        if is_checkpoint(path):
            said = open_checkpoint(path)[KEY]
            declared = schedule_from_settings(said["schedule"])
            schedule = arm.schedule_of(declared)
            check_prediction_type(said["prediction_type"], schedule)
            first = first or schedule
            _check_same(arm, first, schedule)
            arm.check(declared)
        else:
            check_model(path)
            arm.check(NoiseSchedule())


def _check_same(arm: Arm, first: Schedule, schedule: Schedule) -> None:
    """Refuse models of one arm that have different schedules."""
    if first != schedule:
        raise ValueError(
            f"arm {arm.name!r}: its models have different schedules; wanted models that differ in "
            "the seed of their training alone."
        )


def _bar(arms: Sequence[Arm], requests: Sequence[PromptRequest], batch_size: int) -> Any:
    from zsnr.progress import progress_bar

    batches = sum(1 for _ in _batches(requests, batch_size))
    steps = sum(arm.num_steps * len(arm.models) for arm in arms)
    return progress_bar(batches * steps, "sampling", "step")


def _batches(
    requests: Sequence[PromptRequest], batch_size: int
) -> Iterable[list[tuple[int, PromptRequest]]]:
    """Divide requests into batches of images of one size."""
    sizes: dict[tuple[int | None, int | None], list[tuple[int, PromptRequest]]] = {}
    for i, request in enumerate(requests):
        sizes.setdefault((request.height, request.width), []).append((i, request))
    for alike in sizes.values():
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def _sample_arm(
    pipe: TextToImage,
    arm: Arm,
    requests: Sequence[PromptRequest],
    folder: Path,
    place: str,
    batch_size: int,
    bar: Any,
) -> ModelImages:
    """Sample all requests, and save and measure the images."""
    sampling = arm.sampling()
    files = [""] * len(requests)
    values = {name: torch.empty(len(requests)) for name in MEASURES}
    bar.set_postfix_str(arm.name, refresh=False)
    pipe.warn_of_cuts([text for r in requests for text in (r.prompt, r.negative_prompt)])
    for batch in _batches(requests, batch_size):
        rows, asked = [i for i, _ in batch], [request for _, request in batch]
        generated = pipe(
            [request.prompt for request in asked],
            negative_prompts=[request.negative_prompt for request in asked],
            seeds=[request.seed for request in asked],
            height=asked[0].height,
            width=asked[0].width,
            sampling=sampling,
            batch_size=batch_size,
            progress=False,
            callback=lambda *_: bar.update(),
        )
        for i, file in zip(rows, _save(generated, asked, folder, place), strict=True):
            files[i] = file
        for name, measured in measure(image_pixels(generated)).items():
            values[name][rows] = measured
    return ModelImages(pipe.name, files, values)


def _save(
    images: Sequence[Image], requests: Sequence[PromptRequest], folder: Path, place: str
) -> list[str]:
    files = [f"{place}/{request.filename}" for request in requests]
    for image, file in zip(images, files, strict=True):
        save_png(image, folder / file)
    return files


@torch.no_grad()
def encode(images: Tensor, codec: LatentCodec, device: torch.device | str = "cpu") -> Tensor:
    """Encode images (N, 3, H, W) to latents (N, C, h, w) on the CPU, without noise."""
    parts = (codec.encode(part.to(device)) for part in torch.split(images, 8))
    return torch.cat([codec.latents(moments).cpu() for moments in parts])


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "arm"


def _write(facts: dict[str, Any], folder: Path) -> None:
    from zsnr import __version__

    facts["zsnr_version"] = __version__
    (folder / "compare.json").write_text(to_json(facts) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(comparison_page(facts, folder), encoding="utf-8")
