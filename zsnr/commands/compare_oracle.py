"""`zsnr compare oracle`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from zsnr.commands.options import find_codec
from zsnr.commands.result import Result


def compare_oracle(
    data: Sequence[str],
    *,
    output: str | Path,
    arm: Sequence[str] = (),
    vary: Sequence[str] = (),
    count: int = 256,
    samples: int = 1000,
    sampler: str | None = None,
    num_steps: int | None = None,
    spacing: str | None = None,
    image_size: int = 32,
    betas: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear",
    codec: str | None = None,
    codec_subfolder: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Result:
    """Show the flaw of a schedule on your own images, without a model.

    The exact denoiser of the images takes the place of a network, so that what differs between the
    arms is the schedule and the sampling alone. By default the original and the rescaled schedule
    are compared with leading and trailing timesteps. The page is that of `zsnr compare models`.

    Examples:
        zsnr compare oracle shards -o page

    Args:
        data: Folders of shards or images, patterns such as 'https://host/{000..099}.tar', ...
        output: New folder for the page.
        arm: An arm as 'SETTING=VALUE ...'. May be repeated. Settings: name, schedule (original or
            rescaled), sampler, num_steps, spacing.
        vary: SETTING=VALUE,VALUE,... makes one arm with each value out of every arm. May be
            repeated.
        count: Number of samples of each arm.
        samples: Number of images that the denoiser knows, drawn at random.
        sampler: The sampler, such as ddim, multiscale or euler; auto chooses sampler and spacing
            for the number of steps.
        num_steps: Number of sampling steps. Default: 50.
        spacing: The timestep spacing, such as trailing or log_snr; a grid file; or auto.
        image_size: Height and width of the images, in pixels.
        betas: The noise schedule.
        codec: Sample the latents of this codec, in its scale: a folder, hub id, asset:openmoji_vae,
            or pixels. Default: pixels.
        codec_subfolder: Folder of the codec inside --codec, such as vae.
        seed: The first seed. The samples have the seeds SEED, SEED + 1, ...
        batch_size: Number of samples at a time.
    """
    from zsnr.reports import compare
    from zsnr.reports.arms import make_arms
    from zsnr.schedule import NoiseSchedule

    variations = list(vary)
    if not arm and not variations:
        variations = ["schedule=original,rescaled"]
        if spacing is None:
            variations.append("spacing=leading,trailing")
    given = {"sampler": sampler, "num_steps": num_steps, "spacing": spacing}
    given = {name: value for name, value in given.items() if value is not None}
    arms = make_arms((), arm, variations, given=given, exact=True)
    folder = Path(output).expanduser()
    facts = compare.compare_exact(
        arms,
        folder,
        data=list(data),
        image_size=image_size,
        codec=find_codec(codec, codec_subfolder),
        most=samples,
        count=count,
        seed=seed,
        schedule=NoiseSchedule(betas),
        batch_size=batch_size,
    )
    return Result(facts, compare.comparison_text(facts, folder / "index.html"))
