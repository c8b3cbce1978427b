"""`zsnr sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsnr.commands.options import check_device, read_guidance
from zsnr.commands.result import Result


def sample(
    model: str,
    prompts: Sequence[str],
    *,
    output: str | Path | None = None,
    num_images: int = 1,
    seed: int = 0,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    num_steps: int | None = None,
    sampler: str | None = None,
    spacing: str | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float | None = None,
    guidance_interval: str | tuple[float, float] | None = None,
    guidance_method: str | None = None,
    guidance_curve: str | Sequence[tuple[float, float]] | None = None,
    guidance_at_zero_snr: str | bool | None = None,
    guidance_threshold: float | None = None,
    guidance_apg_parallel: float | None = None,
    guidance_apg_norm: float | None = None,
    guidance_against: str | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> Result:
    """Make images of text prompts with any model.

    The images are PNG files that hold all the settings that made them, in a new folder with a
    manifest.jsonl. Sampling settings that are not given are those that the model declares; a model
    that declares none is sampled in 50 steps with guidance scale 7.5 and guidance rescale 0.7.

    Examples:
        zsnr sample runs/quickstart "a red apple" --num-images 4

    Args:
        model: A checkpoint, the folder of a run (its last checkpoint is taken), a diffusers folder,
            a single .safetensors file, or a hub id.
        prompts: Text prompts of the images.
        output: New folder for the images. Default: samples, or samples-2 and so on.
        num_images: Number of images of each prompt.
        seed: The first seed. The images of each prompt have the seeds SEED, SEED + 1, ...
        negative_prompt: Text prompt that guidance moves away from.
        height: Height of the images, in pixels. Default: the size that the model was trained at.
        width: Width of the images, in pixels. Default: the size that the model was trained at.
        num_steps: Number of sampling steps. It is enough to set this alone: where sampler and
            spacing are auto, they follow from it.
        sampler: The sampler, such as ddim, multiscale or euler; auto chooses sampler and spacing
            for the number of steps and the guidance scale.
        spacing: The timestep spacing, such as trailing, guided or log_snr; a grid file; or auto.
        guidance_scale: The guidance scale w.
        guidance_rescale: The guidance rescale phi, 0 to 1.
        guidance_interval: Noise levels sigma / alpha that are guided, such as 0.3:inf.
        guidance_method: cfg, apg, cfg_zero_star or cfg_pp.
        guidance_curve: The scale w as a function of log SNR, such as -6:1/0:7.5.
        guidance_at_zero_snr: Whether to guide at SNR 0, true or false.
        guidance_threshold: Percentile of the dynamic threshold, for models of pixels, such as
            0.995.
        guidance_apg_parallel: With apg, the weight eta of the part of the difference along x_0.
        guidance_apg_norm: With apg, the largest norm of the difference.
        guidance_against: What to guide away from: negative (the negative prompt) or raw (the raw
            weights of a checkpoint).
        batch_size: Number of images sampled at a time.
        device: Device to sample on. Default: the GPU if there is one.
    """
    from zsnr.checkpoints.checkpoint_file import sampling_of
    from zsnr.checkpoints.run_folder import check_model
    from zsnr.data.prompts import PromptRequest
    from zsnr.files import check_new, new_folder
    from zsnr.noise import prompt_seeds, sample_generator
    from zsnr.pipeline import TextToImage, write_sample
    from zsnr.sampling import choose_sampling

    if num_images < 1 or batch_size < 1:
        raise ValueError("--num-images and --batch-size: wanted at least 1.")
    if isinstance(prompts, str):
        prompts = [prompts]
    for last in (seed, seed + num_images - 1):
        sample_generator(last)
    check_model(model)
    check_device(device)
    folder = _new_name() if output is None else Path(output).expanduser()
    check_new(folder)
    guidance = read_guidance(
        scale=guidance_scale,
        rescale=guidance_rescale,
        interval=guidance_interval,
        method=guidance_method,
        curve=guidance_curve,
        at_zero_snr=guidance_at_zero_snr,
        threshold=guidance_threshold,
        apg_parallel=guidance_apg_parallel,
        apg_norm=guidance_apg_norm,
        against=guidance_against,
    )
    sampling = choose_sampling(
        sampling_of(model), sampler=sampler, num_steps=num_steps, spacing=spacing, guidance=guidance
    )
    lines = [line for line in range(len(prompts)) for _ in range(num_images)]
    seeds = prompt_seeds([prompts[line] for line in lines], seed)
    sample_generator(max(seeds, default=seed))
    requests = [
        PromptRequest(prompts[line], negative_prompt, each, height, width, line + 1)
        for line, each in zip(lines, seeds, strict=True)
    ]
    raw_beside = sampling.guidance.against == "raw"
    pipe = TextToImage.from_pretrained(model, device=device, raw_beside=raw_beside)
    with new_folder(folder) as unfinished:
        images = pipe(
            [request.prompt for request in requests],
            negative_prompts=[request.negative_prompt for request in requests],
            seeds=[request.seed for request in requests],
            height=height,
            width=width,
            sampling=sampling,
            batch_size=batch_size,
        )
        for request, image in zip(requests, images, strict=True):
            write_sample(image, unfinished / request.filename, unfinished / "manifest.jsonl")
    paths = [str(folder / request.filename) for request in requests]
    facts = {"model": pipe.name, "folder": str(folder), "images": paths, **pipe.describe(sampling)}
    return Result(facts, "\n".join(paths))


def _new_name() -> Path:
    """Return "samples", or the first of "samples-2", "samples-3", ... that does not exist."""
    folder, number = Path("samples"), 1
    while folder.exists():
        number += 1
        folder = Path(f"samples-{number}")
    return folder
