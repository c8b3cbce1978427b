"""`zsnr plan`."""

from __future__ import annotations

from collections.abc import Sequence

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
    settings: Sequence[str] = (),
) -> Result:
    """Estimate the memory and the time that a training run needs.

    Neither model nor data is loaded. The plan tells the bytes on each rank, how the global batch
    is divided, images and hours. Sizes are those of weights, gradients, optimizer state, averaged
    weights and frozen parts, and of what a forward and backward pass of one micro-batch needs.
    Exit code 1 means that the run does not fit into --memory.

    Args:
        configs: YAML files of `zsnr fit`; later files override earlier ones.
        config: The same YAML files, given as `zsnr fit` takes them. May be repeated.
        ranks: Number of processes. Default: that of the trainer.
        ranks_per_node: Number of processes on one node. Default: that of the trainer.
        memory: GiB that one rank may use: say whether the run fits, and if not, what to change. On
            a GPU, leave 1 to 2 GiB for CUDA itself.
        images_per_second: Throughput summed over all ranks, from which the hours follow.
        measure: Measure the throughput with a few steps on this machine, times the ranks, without
            loading and communication. This builds the model, with random weights.
        settings: Settings of `zsnr fit`, which override the files.
    """
    from zsnr.files import check_temporary

    if measure and images_per_second is not None:
        raise ValueError("--measure and --images-per-second exclude each other: leave one out.")
    for name, value in (("memory", memory), ("images-per-second", images_per_second)):
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value:g}: wanted more than 0.")
    files = [*configs, *config]
    if not files:
        raise ValueError("plan needs a config: zsnr plan CONFIG.")
    check_temporary()
    from zsnr.planning.plan import make_plan
    from zsnr.training.lightning_cli import parse_fit

    estimate = make_plan(
        parse_fit([*(part for path in files for part in ("-c", path)), *settings]),
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        memory=memory,
        images_per_second=images_per_second,
        measure=measure,
    )
    return Result(estimate.facts(), estimate.table(), 1 if estimate.fits is False else 0)
