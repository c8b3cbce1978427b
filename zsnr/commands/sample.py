"""`zsnr sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Unpack

from zsnr.commands.options import (
    SamplingOptions,
    check_device,
    find_network,
    given_process,
    read_sampling,
)
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
    image: str | None = None,
    strength: float | None = None,
    mask: str | None = None,
    mask_corrections: int = 2,
    batch_size: int = 8,
    device: str | None = None,
    lora: Sequence[str] = (),
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None,
    zero_terminal_snr: bool = False,
    flow_shift: float | None = None,
    dtype: str = "auto",
    vae: str | None = None,
    vae_tiling: bool = False,
    offload: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    max_tokens: int | None = None,
    clip_skip: int | None = None,
    prompt_weights: bool = False,
    network: str | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Result:
    """Make images of text prompts with any model.

    The images are PNG files that hold all the settings that made them, in a new folder with a
    manifest.jsonl. Sampling settings that are not given are those that the model declares; a model
    that declares none is sampled in 50 steps with guidance scale 7.5 and guidance rescale 0.7.

    Examples:
        zsnr sample runs/quickstart "a red apple" --num-images 4
        zsnr sample model.safetensors "a red apple" --lora style.safetensors:0.8
        zsnr sample runs/quickstart "a red apple" --image photo.png --strength 0.6

    Args:
        model: A checkpoint, the folder of a run (its last checkpoint is taken), a diffusers folder,
            a single .safetensors file, or a hub id.
        prompts: Text prompts of the images.
        output: New folder for the images. Default: samples, or samples-2 and so on.
        num_images: Number of images of each prompt.
        seed: The first seed. The images have the seeds SEED, SEED + 1, ..., prompt after prompt.
        negative_prompt: Text prompt that guidance moves away from.
        height: Height of the images, in pixels. Default: the size that the model was trained at.
        width: Width of the images, in pixels. Default: the size that the model was trained at.
        image: Image to start from instead of noise. Its size is that of the images.
        strength: Share of the sampling steps that are made from --image, above 0, up to 1. Default:
            0.6, or 1 with --mask.
        mask: Image of the same size that is white where --image is repainted, and black where it is
            kept.
        mask_corrections: Number of additional network calls in each step that fit the repainted
            part to the rest. 0 is fastest.
        batch_size: Number of images sampled at a time.
        device: Device to sample on. Default: the GPU if there is one.
        lora: An adapter (LoRA, LoHa, LoKr, DoRA) of any program to merge into the model, as FILE or
            FILE:SCALE, such as style.safetensors:0.8. May be repeated.
        prediction_type: What the network predicts. Default: what the model declares.
        zero_terminal_snr: Take Stable Diffusion's schedule with zero terminal SNR instead of the
            schedule that the model declares.
        flow_shift: Take rectified flow with this shift, such as 3, instead of the schedule that
            the model declares, for weights that do not say that they are of rectified flow.
        dtype: Data type of all parts: float32, float16 or bfloat16. auto: on a GPU that of the
            file, on a CPU float32.
        vae: Another VAE: a folder, a hub id or a .safetensors file.
        vae_tiling: Decode in overlapping tiles, to save GPU memory for large images.
        offload: Keep only the part in use on the device, to save GPU memory.
        revision: Branch, tag or commit of a hub id. Default: main.
        variant: Variant of the weights to prefer if there are several, such as fp16.
        max_tokens: Number of tokens of a prompt that CLIP reads, in chunks of 75, such as 225.
            Default: as the model was trained, else 75.
        clip_skip: Layer of the text encoder that the context is taken from, counted from the end: 1
            is the last, 2 the penultimate. Default: as the model was trained.
        prompt_weights: Read weights such as (word:1.2) in prompts, as A1111 does.
        network: Import path of the class of a network of your own, such as mine.Net, whose weights
            the checkpoint holds.
        **sampling: How to sample, such as num_steps=8.
    """
    from zsnr.checkpoints.checkpoint_file import sampling_of
    from zsnr.checkpoints.run_folder import check_model
    from zsnr.data.images import read_image
    from zsnr.data.prompts import PromptRequest
    from zsnr.editing import read_edit
    from zsnr.files import check_new, new_folder
    from zsnr.interop.adapter_file import read_loras
    from zsnr.noise import sample_generator
    from zsnr.pipeline import TextToImage, write_sample
    from zsnr.sampling import choose_sampling, recorded_guidance
    from zsnr.weights.source import at_revision

    if num_images < 1 or batch_size < 1:
        raise ValueError("--num-images and --batch-size: wanted at least 1.")
    if isinstance(prompts, str):
        prompts = [prompts]
    for extreme in (seed, seed + max(1, num_images * len(prompts)) - 1):
        sample_generator(extreme)
    check_model(model)
    check_device(device)
    folder = _new_name() if output is None else Path(output).expanduser()
    check_new(folder)
    loras = read_loras(lora)
    given = read_sampling(sampling)
    chosen = choose_sampling(
        sampling_of(at_revision(model, revision)),
        sampler=given.get("sampler"),
        num_steps=given.get("num_steps"),
        spacing=given.get("spacing"),
        guidance=recorded_guidance(given),
    )
    start = None if image is None else read_image(image)
    shape = None if mask is None else read_image(mask)
    edit = read_edit(start, strength, shape, mask_corrections, num_images * len(prompts))
    if edit is not None:
        edit.first_step(chosen.num_steps)
        height, width = edit.size(height, width)
    requests = [
        PromptRequest(prompt, negative_prompt, seed + i, height, width, 1 + i // num_images)
        for i, prompt in enumerate(prompt for prompt in prompts for _ in range(num_images))
    ]
    raw_beside = chosen.guidance.against == "raw"
    schedule, prediction_type = given_process(zero_terminal_snr, flow_shift, prediction_type)
    pipe = TextToImage.from_pretrained(
        model,
        schedule,
        prediction_type=prediction_type,
        device=device,
        dtype=dtype,
        vae=vae,
        vae_tiling=vae_tiling,
        offload=offload,
        revision=revision,
        variant=variant,
        raw_beside=raw_beside,
        max_tokens=max_tokens,
        clip_skip=clip_skip,
        prompt_weights=prompt_weights or None,
        network=find_network(network),
    )
    for file, scale in loras:
        pipe.load_lora(file, scale)
    with new_folder(folder) as unfinished:
        images = pipe(
            [request.prompt for request in requests],
            negative_prompts=[request.negative_prompt for request in requests],
            seeds=[request.seed for request in requests],
            height=height,
            width=width,
            sampling=chosen,
            image=start,
            strength=strength,
            mask=shape,
            mask_corrections=mask_corrections,
            batch_size=batch_size,
        )
        for request, made in zip(requests, images, strict=True):
            write_sample(made, unfinished / request.filename, unfinished / "manifest.jsonl")
    paths = [str(folder / request.filename) for request in requests]
    facts = {"model": pipe.name, "folder": str(folder), "images": paths, **pipe.describe(chosen)}
    facts |= {} if edit is None else edit.facts()
    return Result(facts, "\n".join(paths))


def _new_name() -> Path:
    """Return "samples", or the first of "samples-2", "samples-3", ... that does not exist."""
    folder, number = Path("samples"), 1
    while folder.exists():
        number += 1
        folder = Path(f"samples-{number}")
    return folder
