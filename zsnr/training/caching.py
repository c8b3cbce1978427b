"""`zsnr data cache`: the parts of a training config that caching needs, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.data.cache import Cache, filter_facts, image_facts, shard_files, write_cache
from zsnr.data.faults import check_budget, summarize
from zsnr.locks import Lock
from zsnr.training.data import DataModule, describe_samples
from zsnr.training.lightning_cli import check_environment, parse_fit
from zsnr.training.messages import short_message


def run_cache(
    configs: Sequence[str],
    settings: Sequence[str] = (),
    *,
    output: str | Path,
    source: Literal["train", "val"] = "train",
    text: bool = False,
    dtype: Literal["float16", "bfloat16", "float32"] = "float16",
    batch_size: int = 8,
    device: str | None = None,
    rank: int | None = None,
    ranks: int | None = None,
) -> Path:
    """Write one process's share of a cache of encoded images.

    Args:
        configs: YAML files of `zsnr fit`; later files override earlier ones.
        settings: Further arguments of fit, such as ["--data.train", "FOLDER"].
        output: Folder of the cache. An interrupted cache is continued.
        source: Which dataset to encode.
        text: Cache text embeddings too.
        dtype: Data type of the cached values.
        batch_size: Number of images encoded at a time.
        device: Where to encode. None = the GPU if there is one.
        rank: Index of this process. None = RANK of the environment, else 0.
        ranks: Number of processes. None = WORLD_SIZE of the environment, else 1.

    Returns:
        The folder of the cache.

    Raises:
        ValueError: The config or the data is wrong, or the folder holds something else.
    """
    check_environment()
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    ranks = int(os.environ.get("WORLD_SIZE", 1)) if ranks is None else ranks
    if not 0 <= rank < ranks:
        raise ValueError(f"--rank {rank} --ranks {ranks}: wanted 0 <= rank < ranks.")
    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: wanted at least 1.")
    config = parse_fit([*(part for path in configs for part in ("-c", path)), *settings])
    data: Any = build("data", DataModule, config.data)
    sources = getattr(data, source)
    if sources is None:
        raise ValueError(f"data.{source} is not set: there is nothing to cache.")
    codec: Any = build("codec", LatentCodec, config.model.codec)
    codec.latent_shape(data.image_size, data.image_size)
    conditioner: Any = None
    if text:
        conditioner = build("conditioner", Conditioner, config.model.conditioner)
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
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            on_shard=lambda broken, done: check_budget(
                broken, done, len(samples.shards), data.error_budget
            ),
        )
    if faults:
        rank_zero_info(f"Broken images, which the cache leaves out: {summarize(faults)}")
    return folder


def build(name: str, cls: type[Any], values: Any) -> Any:
    """Instantiate one part of a parsed config.

    Raises:
        ValueError: Its settings are wrong; one line.
    """
    parser = ArgumentParser(exit_on_error=False)
    if cls is DataModule:
        parser.add_class_arguments(cls, name)
    else:
        parser.add_subclass_arguments(cls, name)
    values = values.as_dict() if hasattr(values, "as_dict") else values
    try:
        return parser.instantiate_classes(parser.parse_object({name: values}))[name]
    except (ValueError, TypeError) as error:
        raise ValueError(short_message(str(error))) from error
