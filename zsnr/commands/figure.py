"""`zsnr figure`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

from zsnr.commands.options import SamplerOptions, check_device, find_codec, read_sampling, refuse

# Options that a figure varies by itself, or that would have no effect on it
_FIXED: dict[int, tuple[str, ...]] = {
    2: ("schedule", "spacing", "sampler", "guidance_scale", "guidance_rescale"),
    4: ("num_steps", "spacing"),
    5: (),
    6: ("guidance_rescale",),
}


def figure(
    number: Literal[2, 4, 5, 6],
    *,
    output: str | Path,
    model: str | None = None,
    oracle: str | Sequence[str] | None = None,
    prompt: Sequence[str] = (),
    count: int | None = None,
    schedule: Literal["original", "rescaled"] | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    samples: int = 1000,
    image_size: int | None = None,
    betas: Literal["scaled_linear", "linear", "cosine"] | None = None,
    codec: str | None = None,
    codec_subfolder: str | None = None,
    device: str | None = None,
    **sampling: Unpack[SamplerOptions],
) -> Path:
    """Draw Figure 2, 4, 5 or 6 of the paper, with a model or without one.

    2: log SNR and sqrt(abar), original and rescaled. 4: leading, linspace and trailing timesteps
    at 5 and 25 steps. 5: the prediction of x_0 after each step; at zero terminal SNR the first is
    the same whatever the noise. 6: guidance rescale 0, 0.25, 0.5, 0.75 and 1. With --oracle, the
    exact denoiser of your own images is the model, and a prompt is a group of them. Settings that
    are not given are those that the model declares.

    Examples:
        zsnr figure 4 --model a.ckpt -o figure4.png
        zsnr figure 5 --oracle shards -o figure5.png

    Args:
        number: The number of the figure.
        output: New .png file for the figure.
        model: A checkpoint, the folder of a run, a diffusers folder, a single file or a hub id. For
            Figure 2 also linear, cosine or scaled_linear.
        oracle: Take the exact denoiser of these images instead of a model; one or more folders or
            patterns of shards.
        prompt: Text prompt. May be repeated. Default: three prompts of the suite. With --oracle:
            words of captions, which make a group. Default there: the whole dataset; in Figure 6 its
            darkest and brightest quarter.
        count: Number of seeds of each prompt. Default: 2, or more for a single prompt.
        schedule: The noise schedule to sample on. Default: as the model declares; rescaled with
            --oracle.
        num_steps: Number of sampling steps. Default: 10 in Figure 5 and 25 in Figure 6, if the
            model declares nothing.
        seed: The first seed. The images of each prompt have the seeds SEED, SEED + 1, ...
        samples: With --oracle, number of images that the denoiser knows, drawn at random.
        image_size: With --oracle, height and width of the images in pixels. Default: 32.
        betas: With --oracle, the noise schedule. Default: scaled_linear.
        codec: With --oracle, sample the latents of this codec, in its scale: a folder, hub id,
            asset:openmoji_vae, or pixels. Default: pixels.
        codec_subfolder: Folder of the codec inside --codec, such as vae.
        device: Device to sample on. Default: the GPU if there is one.
        **sampling: How to sample otherwise, such as spacing="trailing".
    """
    from zsnr.reports.compare import check_images
    from zsnr.reports.figures import draw_figure, draw_schedule

    path = Path(output).expanduser()
    settings = read_sampling(sampling, SamplerOptions)
    given = {"schedule": schedule, "num_steps": num_steps}
    settings |= {name: value for name, value in given.items() if value is not None}
    refuse({name: settings.get(name) for name in _FIXED[number]}, f"is not free in Figure {number}")
    sources = [oracle] if isinstance(oracle, str) else oracle
    if sources is None:
        of_oracle = {"image_size": image_size, "betas": betas, "codec": codec}
        refuse({**of_oracle, "codec_subfolder": codec_subfolder}, "belongs to --oracle")
    elif model is not None:
        raise ValueError("--model and --oracle exclude each other: leave one out.")
    if number == 2:
        others: dict[str, Any] = {"prompt": prompt or None, "count": count, "device": device}
        refuse(others, "has no effect in Figure 2")
        if sources is not None:
            check_images(list(sources))
        draw_schedule(model or betas or "scaled_linear", num_steps or 10, path)
        return path
    if model is None and sources is None:
        raise ValueError(f"Figure {number} needs --model MODEL or --oracle SHARDS.")
    check_device(device)
    draw_figure(
        number,
        _arm(number, model, settings),
        path,
        model=model,
        data=None if sources is None else list(sources),
        prompts=list(prompt) or None,
        count=count,
        seed=seed,
        image_size=32 if image_size is None else image_size,
        codec=find_codec(codec, codec_subfolder),
        betas=betas or "scaled_linear",
        most=samples,
        device=device,
    )
    return path


def _arm(number: int, model: str | None, settings: dict[str, Any]) -> Any:
    """Return how to sample: as asked, else as the model declares, else as the paper does there."""
    from zsnr.checkpoints.checkpoint_file import sampling_of
    from zsnr.reports.arms import Arm, make_arms
    from zsnr.reports.figures import DEFAULTS

    declared = sampling_of(model) if model is not None else {}
    if not declared:
        return Arm(**{**DEFAULTS[number], **settings})
    [arm] = make_arms([str(model)], given=settings, declared=lambda _: declared)
    return arm
