"""`zsnr compare models`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from zsnr.commands.options import SamplingOptions, check_device, read_sampling
from zsnr.commands.result import Result


def compare_models(
    models: Sequence[str] = (),
    *,
    output: str | Path,
    arm: Sequence[str] = (),
    vary: Sequence[str] = (),
    prompts: str | None = None,
    num_prompts: int = 64,
    count: int | None = None,
    data: str | Sequence[str] | None = None,
    samples: int = 1000,
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Result:
    """Compare models, or ways to sample them, side by side on one page.

    Every arm is sampled with the same prompts and seeds. FOLDER/index.html is a page that needs no
    other file: images side by side, luma histograms, numbers, settings, and whether brightness
    follows the prompts. FOLDER/compare.json holds every number. An arm is a model, a way to
    sample, or both; settings that are not given are those that the model declares.

    Examples:
        zsnr compare models a.ckpt b.ckpt -o page
        zsnr compare models a.ckpt --vary guidance_rescale=0,0.35,0.7,1 -o sweep
        zsnr compare models a.safetensors --vary lora=none,b.safetensors:0.5,b.safetensors -o loras
        zsnr compare models --arm 'model=a.ckpt spacing=leading' --arm model=b.ckpt -o page

    Args:
        models: Checkpoints, folders of runs, diffusers folders, single files or hub ids. Each is an
            arm, or what each --arm without a model of its own samples; A,B is one arm of several
            trainings.
        output: New folder for the page.
        arm: An arm as 'SETTING=VALUE ...'. May be repeated. Settings: name, model, schedule
            (original or rescaled; default: as the model declares), lora (FILE or FILE:SCALE of an
            adapter to merge, several with + between, or none), max_tokens (tokens of a prompt that
            are read, in chunks of 75), and the sampling options below by their names, such as
            num_steps.
        vary: SETTING=VALUE,VALUE,... makes one arm with each value out of every arm. May be
            repeated.
        prompts: A .txt or .jsonl file, whose lines may name group and brightness_rank; 'data' for
            captions of --data; 'empty' for no prompt. Default: a suite from solid black to solid
            white, which is for general models.
        num_prompts: Number of captions with --prompts data.
        count: Number of images of each prompt. Default: as the file says, 2 for the suite, 1 for a
            caption, 64 without a prompt.
        data: Measure the distance of brightness to the images of this dataset; one or more folders
            or patterns of shards.
        samples: Number of images of --data to look at, drawn at random.
        seed: The first seed. The images of each prompt have the seeds SEED, SEED + 1, ...
        batch_size: Number of images sampled at a time.
        device: Device to sample on. Default: the GPU if there is one.
        **sampling: How to sample the arms that do not say it, such as num_steps=8.
    """
    from zsnr.checkpoints.checkpoint_file import sampling_of
    from zsnr.reports import compare
    from zsnr.reports.arms import make_arms

    check_device(device)
    arms = make_arms(models, arm, vary, given=read_sampling(sampling), declared=sampling_of)
    folder = Path(output).expanduser()
    facts = compare.compare_models(
        arms,
        folder,
        prompts=prompts,
        num_prompts=num_prompts,
        count=count,
        seed=seed,
        data=[data] if isinstance(data, str) else data and list(data),
        most=samples,
        batch_size=batch_size,
        device=device,
    )
    return Result(facts, compare.comparison_text(facts, folder / "index.html"))
