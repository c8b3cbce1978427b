"""`zsnr data cache`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal


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

    Returns:
        The folder of the cache.

    Raises:
        ValueError: The config or the data is wrong, or the folder holds something else.
    """
    from zsnr.commands.options import default_device
    from zsnr.files import check_temporary

    check_temporary()
    device = default_device(device)
    from lightning.pytorch.utilities import rank_zero_info

    from zsnr.codecs import LatentCodec
    from zsnr.conditioning import Conditioner
    from zsnr.data.cache import Cache, filter_facts, image_facts, shard_files, write_cache
    from zsnr.data.faults import check_budget, summarize
    from zsnr.locks import Lock
    from zsnr.training.data import DataModule, check_tags, describe_samples
    from zsnr.training.lightning_cli import build, check_environment, parse_fit

    check_environment()
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    ranks = int(os.environ.get("WORLD_SIZE", 1)) if ranks is None else ranks
    if not 0 <= rank < ranks:
        raise ValueError(f"--rank {rank} --ranks {ranks}: wanted 0 <= rank < ranks.")
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: wanted at least 1.")
    values = parse_fit([*(part for path in config for part in ("-c", path)), *settings])
    data: Any = build("data", DataModule, values.data)
    sources = getattr(data, source)
    if sources is None:
        raise ValueError(f"data.{source} is not set: there is nothing to cache.")
    codec: Any = build("codec", LatentCodec, values.model.codec)
    codec.latent_shape(data.image_size, data.image_size)
    conditioner: Any = None
    if text:
        check_tags(data.tags, "--text")
        conditioner = build("conditioner", Conditioner, values.model.conditioner)
    folder = Path(output).expanduser()
    with Lock(folder / f".share-{rank:05d}-of-{ranks:05d}.lock", folder):
        index, samples = data.select(sources)
        if rank == 0:
            rank_zero_info(describe_samples(samples, f"data.{source}"))
        check_budget(samples.faults, samples.total, len(samples.shards), data.error_budget)
        cache = Cache(
            folder=folder,
            codec=codec.fingerprint(),
            conditioner=None if conditioner is None else conditioner.fingerprint(),
            captions=None if conditioner is None else asdict(data.captions),
            images=image_facts(data.image_size, data.aspect, data.pixels),
            filters=filter_facts(data.filters),
            samples=samples.digest,
            dtype=dtype,
            shards=shard_files(samples.shards),
        )
        faults = write_cache(
            folder,
            samples,
            codec,
            conditioner,
            index,
            cache=cache,
            pixels=data.pixels,
            captions=data.captions,
            **data.reading(),
            batch_size=batch_size,
            num_workers=data.num_workers,
            rank=rank,
            num_ranks=ranks,
            device=device,
            on_shard=lambda broken, done: check_budget(
                broken, done, len(samples.shards), data.error_budget
            ),
        )
    if faults:
        rank_zero_info(f"Broken images, which the cache leaves out: {summarize(faults)}")
    return folder
