"""`zsnr data cache`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def data_cache(
    *,
    config: Sequence[str],
    output: str | Path,
    source: Literal["train", "val"] = "train",
    text: bool = False,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    batch_size: int = 8,
    device: str | None = None,
    rank: int | None = None,
    ranks: int | None = None,
    settings: Sequence[str] = (),
) -> Path:
    """Encode the images of a training configuration once.

    Training then needs neither VAE nor text encoder: use --data.train FOLDER. The cache holds the
    mean and standard deviation that the VAE gives for each image (and for its mirror image, with
    data.pixels.flip), captions, JSON fields and, with --text, text embeddings. It is written shard
    by shard: run the same command again and it resumes. Under torchrun, or with --rank and
    --ranks, each process caches its share.

    Args:
        config: A YAML of `zsnr fit`. May be repeated; later files override earlier ones.
        output: Folder of the cache.
        source: Which dataset to cache.
        text: Cache text embeddings too.
        dtype: Data type of the cached values.
        batch_size: Number of images encoded at a time.
        device: Device to encode on. Default: the GPU if there is one.
        rank: Index of this process. Default: the environment variable RANK, else 0.
        ranks: Number of processes. Default: the environment variable WORLD_SIZE, else 1.
        settings: Settings of `zsnr fit`, which override the files.
    """
    from zsnr.commands.options import check_device
    from zsnr.files import check_temporary

    check_temporary()
    check_device(device)
    from zsnr.training.caching import run_cache

    return run_cache(
        list(config),
        settings,
        output=output,
        source=source,
        text=text,
        dtype=dtype,
        batch_size=batch_size,
        device=device,
        rank=rank,
        ranks=ranks,
    )
