"""Tar shards on disk: what is in them and where, without reading pictures."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Span:
    """Bytes inside a shard."""

    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """One sample: a picture and its caption file, `KEY.png` and `KEY.txt` or `KEY.json`."""

    shard: str
    key: str
    image: Span
    caption: Span
    caption_suffix: str


def find_shards(source: str | Sequence[str]) -> list[Path]:
    """Find tar files.

    Args:
        source: A folder, a file, a pattern such as "data/train-{000000..000009}.tar" or
            "data/train-*.tar", or a list of them.

    Returns:
        Paths, sorted within each folder or pattern.

    Raises:
        FileNotFoundError: One of them matches nothing.
    """
    from webdataset.shardlists import expand_urls

    shards: list[Path] = []
    for item in [source] if isinstance(source, str) else source:
        path = Path(item).expanduser()
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
        elif any(c in path.name for c in "*?["):
            found = sorted(path.parent.glob(path.name))
        else:
            found = [Path(p) for p in expand_urls(str(path))]
        missing = [str(p) for p in found if not p.is_file()]
        if missing or not found:
            raise FileNotFoundError(
                f"No shards at {', '.join(missing) or item}: wanted .tar files with pictures and "
                "captions, such as `zsnr data openmoji DIR` writes."
            )
        shards += found
    return shards


def index_shard(shard: Path) -> list[Sample]:
    """List the samples of one shard by reading its headers.

    Raises:
        ValueError: The file is no tar, is cut short, or a picture has no caption.
    """
    groups: dict[str, dict[str, Span]] = {}
    end = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = folder.removeprefix("./").removeprefix(".") + slash * (folder != ".") + stem
                if member.offset_data + member.size > end:
                    raise ValueError(f"{shard} is cut short inside {member.name}: copy it again.")
                parts = groups.setdefault(key, {})
                if suffix.lower() in parts:
                    raise ValueError(f"{shard} has {member.name} twice: give each sample a key.")
                parts[suffix.lower()] = Span(member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a readable tar file: {error}.") from error
    return [_sample(shard, key, parts) for key, parts in groups.items()]


def _sample(shard: Path, key: str, parts: dict[str, Span]) -> Sample:
    image = next((parts[s] for s in IMAGE_SUFFIXES if s in parts), None)
    caption = next((s for s in ("txt", "json") if s in parts), None)
    if image is None or caption is None:
        raise ValueError(
            f"{shard}: sample {key!r} has {', '.join(sorted(parts))}: wanted a picture "
            f"({', '.join(IMAGE_SUFFIXES)}) and a caption (txt or json)."
        )
    return Sample(str(shard), key, image, parts[caption], caption)


def index_shards(source: str | Sequence[str]) -> list[Sample]:
    """List the samples of all shards, in order, with a progress bar when there are many.

    Raises:
        FileNotFoundError: There are no shards.
        ValueError: A shard is broken, or all are empty.
    """
    from tqdm import tqdm

    shards = find_shards(source)
    bar = tqdm(shards, desc="indexing shards", unit="shard", disable=len(shards) < 20)
    samples = [sample for shard in bar for sample in index_shard(shard)]
    if not samples:
        raise ValueError(f"{len(shards)} shards at {source} hold no samples.")
    return samples
