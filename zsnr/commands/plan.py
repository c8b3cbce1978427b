"""`zsnr plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from zsnr.commands.options import refuse
from zsnr.commands.result import Result


def plan(
    configs: Sequence[str] = (),
    *,
    config: Sequence[str] = (),
    ranks: int | None = None,
    ranks_per_node: int | None = None,
    memory: float | None = None,
    images_per_second: float | None = None,
    measure: bool = False,
    predict: bool = False,
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = None,
    offload: bool = False,
    vae: str | None = None,
    vae_tiling: bool = False,
    batch_size: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    max_rows: int | None = None,
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None,
    settings: Sequence[str] = (),
) -> Result:
    """Estimate the memory and time of a training run, or the memory of sampling.

    Neither model nor data is loaded. The plan tells the bytes on each rank, how the global batch
    is divided, images and hours. Sizes are those of weights, gradients, optimizer state, averaged
    weights and frozen parts, and of what a forward and backward pass of one micro-batch needs.
    Exit code 1 means that the run does not fit into --memory.

    With --predict the plan tells what `zsnr sample` needs on the GPU: the weights of each part, and
    the peak while prompts are encoded, noise is removed and one image is decoded, with and without
    --offload.

    Examples:
        zsnr plan configs/sd15_zsnr.yaml configs/trainer/gpu.yaml --memory 24
        zsnr plan sdxl.safetensors --predict --dtype float16 --memory 12

    Args:
        configs: YAML files of `zsnr fit`; later files override earlier ones. With --predict also a
            model: a checkpoint, the folder of a run, a diffusers folder, a single .safetensors file
            or a hub id.
        config: The same YAML files, given as `zsnr fit` takes them. May be repeated.
        ranks: Number of processes. Default: that of the trainer.
        ranks_per_node: Number of processes on one node. Default: that of the trainer.
        memory: GiB that one rank may use: say whether the run fits, and if not, what to change. On
            a GPU, leave 1 to 2 GiB for CUDA itself.
        images_per_second: Throughput summed over all ranks, from which the hours follow.
        measure: Measure the throughput with a few steps on this machine, times the ranks, without
            loading and communication. This builds the model, with random weights.
        predict: Plan sampling instead of training.
        dtype: Data type of all parts, as in `zsnr sample`. Default: auto, that of the file.
        offload: Judge by --memory whether sampling with --offload fits.
        vae: Another VAE, as in `zsnr sample`: a folder, a hub id or a .safetensors file.
        vae_tiling: Decode in overlapping tiles.
        batch_size: Number of images sampled at a time. Default: 1.
        height: Height of the images, in pixels. Default: the size that the model was trained at.
        width: Width of the images, in pixels. Default: the size that the model was trained at.
        guidance_scale: The guidance scale; 1 = no guidance, which halves the rows of the UNet.
            Default: what the model declares, else 7.5.
        max_rows: Largest number of rows of one call of the UNet, as TextToImage takes it. Default:
            two for each image with guidance, else one.
        prediction_type: What the network predicts, for files that do not declare it.
        settings: Settings of `zsnr fit`, which override the files.
    """
    from zsnr.files import check_temporary

    sampling = {
        "dtype": dtype,
        "offload": offload or None,
        "vae": vae,
        "vae_tiling": vae_tiling or None,
        "batch_size": batch_size,
        "height": height,
        "width": width,
        "guidance_scale": guidance_scale,
        "max_rows": max_rows,
        "prediction_type": prediction_type,
    }
    training = {
        "ranks": ranks,
        "ranks_per_node": ranks_per_node,
        "images_per_second": images_per_second,
        "measure": measure or None,
    }
    if predict:
        refuse(training, "is of training, and --predict plans sampling")
    else:
        refuse(sampling, "is of sampling, which --predict plans")
    if measure and images_per_second is not None:
        raise ValueError("--measure and --images-per-second exclude each other: leave one out.")
    for name, value in (("memory", memory), ("images-per-second", images_per_second)):
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value:g}: wanted more than 0.")
    files = [*configs, *config]
    if not files:
        raise ValueError("plan needs a config: zsnr plan CONFIG.")
    check_temporary()
    if predict:
        return _plan_sampling(files, settings, sampling, memory)
    for path in map(Path, files):
        if path.is_dir() or path.suffix in (".safetensors", ".ckpt"):
            raise ValueError(
                f"{path} is not a config, but a model: add --predict to plan sampling."
            )
    from zsnr.planning.plan import make_plan
    from zsnr.training.lightning_cli import parse_fit

    estimate = make_plan(
        parse_fit(_fit_arguments(files, settings)),
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        memory=memory,
        images_per_second=images_per_second,
        measure=measure,
    )
    return Result(estimate.facts(), estimate.table(), 1 if estimate.fits is False else 0)


def _plan_sampling(
    files: Sequence[str],
    settings: Sequence[str],
    options: Mapping[str, Any],
    memory: float | None,
) -> Result:
    from zsnr.checkpoints.run_folder import check_model
    from zsnr.planning.sampling import Request, plan_sampling, read_weightless

    request = Request(**{name: value for name, value in options.items() if value is not None})
    if any(file.endswith((".yaml", ".yml")) for file in files):
        from zsnr.planning.plan import read_for_sampling
        from zsnr.training.lightning_cli import parse_fit

        read = partial(read_for_sampling, parse_fit(_fit_arguments(files, settings)))
    elif len(files) > 1 or settings:
        raise ValueError(
            f"{files[0]} is a model, which has no settings: leave out "
            f"{', '.join([*files[1:], *settings])}."
        )
    else:
        check_model(files[0])
        read = partial(read_weightless, files[0])
    estimate = plan_sampling(read, request, memory)
    return Result(estimate.facts(), estimate.table(), 1 if estimate.fits is False else 0)


def _fit_arguments(files: Sequence[str], settings: Sequence[str]) -> list[str]:
    return [*(part for path in files for part in ("-c", path)), *settings]
