"""Where data is: tar shards on disk or behind an address, and plain folders of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zsnr.data.storage import Storage, is_remote, public_url

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")

CACHE = "cache.json"
"""What a folder of cached shards holds."""


@dataclass(frozen=True)
class Source:
    """One source of data.

    Args:
        path: A folder of tar shards; a pattern such as "data/{000..099}.tar" or "data/train-*.tar",
            also behind http://, https://, s3:// or gs://; a list of them; a folder of pictures with
            KEY.txt beside each or one metadata.jsonl; or "pipe:COMMAND", a command that prints one
            shard, which data.local_cache then keeps.
        weight: How often a pass over the data sees each sample: 2 = twice, 0.5 = every second pass.
    """

    path: str | list[str]
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0.001 <= self.weight <= 1000:
            raise ValueError(f"weight={self.weight:g}: wanted a number from 0.001 to 1000.")
        object.__setattr__(self, "weight", float(self.weight))  # 3 and 3.0 are one weight


@dataclass(frozen=True)
class Shard:
    """A tar file, or a folder of pictures.

    Args:
        url: Path or address.
        weight: Its source's.
        kind: A tar file, a folder of pictures, or a tar file of a cache.
    """

    url: str
    weight: float = 1.0
    kind: Literal["tar", "folder", "cache"] = "tar"

    @property
    def name(self) -> str:
        """The last part of its path, which stays when shards are moved."""
        return public_url(self.url).rstrip("/").rpartition("/")[2]


Sources = str | Sequence[str | Source]
"""What data.train and data.val may say."""


def as_sources(sources: Sources) -> list[Source]:
    """Give every source its full form."""
    items = [sources] if isinstance(sources, str) else sources
    return [item if isinstance(item, Source) else Source(item) for item in items]


def is_cache(path: str) -> bool:
    """Whether a source is a folder that `zsnr data cache` wrote."""
    return not is_remote(path) and (Path(path).expanduser() / CACHE).is_file()


def find_shards(sources: Sources) -> list[Shard]:
    """List the shards of all sources, sorted within each folder or pattern, opening none.

    Local files of a pattern that is spelled out may be missing as long as one is there: indexing
    tells.

    Raises:
        FileNotFoundError: A source matches nothing.
    """
    shards: list[Shard] = []
    for source in as_sources(sources):
        for path in [source.path] if isinstance(source.path, str) else source.path:
            if is_cache(path):
                shards += _cached(Path(path).expanduser() / CACHE, source.weight)
                continue
            for url in _expand(path):
                folder = not is_remote(url) and Path(url).is_dir()
                shards.append(Shard(url, source.weight, "folder" if folder else "tar"))
    if not shards:
        raise FileNotFoundError(f"No shards at {sources!r}: the list is empty.")
    return shards


def pictures(folder: Path) -> Iterator[Path]:
    """List the pictures of a folder and its folders, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and not path.name.startswith("."):
            yield path


def _cached(cache: Path, weight: float) -> list[Shard]:
    return [
        Shard(str(cache.parent / shard["file"]), weight * shard["weight"], "cache")
        for shard in json.loads(cache.read_text(encoding="utf-8"))["shards"]
    ]


def _expand(item: str) -> list[str]:
    if item.startswith("pipe:"):
        return [item]
    if is_remote(item):
        return _expand_address(item)
    from webdataset.shardlists import expand_urls

    path = Path(item.removeprefix("file://")).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
        if not found and any(pictures(path)):
            return [str(path)]
    elif any(c in path.name for c in "*?["):
        found = sorted(path.parent.glob(path.name))
    else:
        found = [Path(p) for p in expand_urls(str(path))]
    if not any(p.is_file() for p in found):
        raise FileNotFoundError(
            f"No shards at {item}: wanted .tar files with pictures and captions, such as "
            "`zsnr data openmoji DIR` writes, or a folder of pictures with captions."
        )
    return [str(p) for p in found]


def _expand_address(item: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    pattern = item + "*.tar" if item.endswith("/") else item
    if "*" not in pattern:
        return list(expand_urls(pattern))
    if pattern.startswith(("http://", "https://")):
        raise FileNotFoundError(
            f"No shards at {public_url(item)}: a web server lists no files. Name them, such as "
            "{000..099}.tar"
        )
    found = Storage().glob(pattern)
    if not found:
        raise FileNotFoundError(f"No shards at {public_url(item)}.")
    return found
