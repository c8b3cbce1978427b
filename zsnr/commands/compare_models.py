"""`zsnr compare models`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsnr.commands.options import check_device, read_guidance
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
    sampler: str | None = None,
    num_steps: int | None = None,
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
    seed: int = 0,
    batch_size: int = 8,
    device: str | None = None,
) -> Result:
    """Compare models, or ways to sample them, side by side on one page.

    Every arm is sampled with the same prompts and seeds. FOLDER/index.html is a page that needs no
    other file: images side by side, luma histograms, numbers, settings, and whether brightness
    follows the prompts. FOLDER/compare.json holds every number. An arm is a model, a way to
    sample, or both; settings that are not given are those that the model declares.

    Examples:
        zsnr compare models a.ckpt b.ckpt -o page
        zsnr compare models a.ckpt --vary guidance_rescale=0,0.35,0.7,1 -o sweep
        zsnr compare models --arm 'model=a.ckpt spacing=leading' --arm model=b.ckpt -o page

    Args:
        models: Checkpoints, folders of runs, diffusers folders, single files or hub ids. Each is an
            arm, or what each --arm without a model of its own samples; A,B is one arm of several
            trainings.
        output: New folder for the page.
        arm: An arm as 'SETTING=VALUE ...'. May be repeated. Settings: name, model, schedule
            (original or rescaled; default: as the model declares), and the sampling options below
            by their names, such as num_steps.
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
        sampler: The sampler, such as ddim, multiscale or euler; auto chooses sampler and spacing
            for the number of steps and the guidance scale.
        num_steps: Number of sampling steps. It is enough to set this alone: where sampler and
            spacing are auto, they follow from it.
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
        seed: The first seed. The images of each prompt have the seeds SEED, SEED + 1, ...
        batch_size: Number of images sampled at a time.
        device: Device to sample on. Default: the GPU if there is one.
    """
    from zsnr.checkpoints.checkpoint_file import sampling_of
    from zsnr.reports import compare
    from zsnr.reports.arms import make_arms

    check_device(device)
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
    given = {"sampler": sampler, "num_steps": num_steps, "spacing": spacing}
    given |= {f"guidance_{name}": value for name, value in guidance.items()}
    arms = make_arms(
        models,
        arm,
        vary,
        given={name: value for name, value in given.items() if value is not None},
        declared=sampling_of,
    )
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
