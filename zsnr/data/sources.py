"""Where data is: tar shards on disk or behind an address, and plain folders of images."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zsnr.data.storage import Storage, is_remote, local_path
from zsnr.public import public_url
from zsnr.untrusted import parse_object, read_small

IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "gif", "jfif", "jpe", "mpo", "apng", "bmp", "tif", "tiff"),
    *("avif", "jp2", "j2k", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "qoi", "sgi", "psd", "pcx"),
    "tga",
)
"""Endings of images; those of a sample that has several are taken in this order. A file of another
ending is an image too if its content is."""

METADATA = "metadata.jsonl"
"""What holds the captions of a folder of images, one line each."""

_PACKED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")

CACHE = "cache.json"
"""What a folder of cached shards holds."""

_MOST_NAMES = 10_000_000  # that one pattern stands for
_MOST_CACHE = 1 << 28  # bytes of that file; a million shards


@dataclass(frozen=True)
class Source:
    """One source of data.

    Args:
        path: A folder of tar shards; a pattern such as "data/{000..099}.tar" or "data/train-*.tar",
            also behind http://, https://, s3:// or gs://; a list of them; a folder of images with
            KEY.txt beside each or metadata.jsonl in it or in folders below; or "pipe:COMMAND", a
            command that prints one shard, which data.local_cache then keeps.
        weight: How often an epoch has each sample: 2 = twice, 0.5 = every second epoch.
        ratio: Share of each global batch, relative to the other sources' ratios, however many
            samples the source has. Each source then has epochs of its own. If one source has a
            ratio, all must, and none a weight. None = by the number of samples and the weight.
    """

    path: str | list[str]
    weight: float = 1.0
    ratio: float | None = None

    def __post_init__(self) -> None:
        for name, share in (("weight", self.weight), ("ratio", self.ratio)):
            if share is not None and not _is_share(share):
                raise ValueError(f"{name}={share:g}: wanted a number from 0.001 to 1000.")
        object.__setattr__(self, "weight", float(self.weight))  # 3 and 3.0 are one weight
        object.__setattr__(self, "ratio", None if self.ratio is None else float(self.ratio))


@dataclass(frozen=True)
class Shard:
    """A tar file, or a folder of images.

    Args:
        url: Path or address.
        weight: Its source's.
        kind: A tar file, a folder of images, or a tar file of a cache.
        ratio: Its source's.
        source: Number of its source.
    """

    url: str
    weight: float = 1.0
    kind: Literal["tar", "folder", "cache"] = "tar"
    ratio: float | None = None
    source: int = 0

    @property
    def name(self) -> str:
        """The last part of its path, which stays when shards are moved or signed anew."""
        return public_url(self.url).rstrip("/").rpartition("/")[2]


Sources = str | Sequence[str | Source]
"""What data.train and data.val may say."""


def as_sources(sources: Sources) -> list[Source]:
    """Give every source its full form.

    Raises:
        ValueError: Some have a ratio and others none, or a weight.
    """
    items = [sources] if isinstance(sources, str) else sources
    found = [item if isinstance(item, Source) else Source(item) for item in items]
    if any(source.ratio is not None for source in found):
        for source in found:
            if source.ratio is None or source.weight != 1:
                raise ValueError(
                    f"The source {source.path!r} has ratio={source.ratio} and "
                    f"weight={source.weight:g}, beside a source with a ratio: wanted a ratio for "
                    "every source, and no weights."
                )
    return found


def _is_share(value: float) -> bool:
    return 0.001 <= value <= 1000


def is_cache(path: str) -> bool:
    """Whether a source is a folder that `zsnr data cache` wrote."""
    return not is_remote(path) and (local_path(path) / CACHE).is_file()


def find_shards(sources: Sources) -> list[Shard]:
    """List the shards of all sources, sorted within each folder or pattern, opening none.

    Local files of a pattern that is spelled out may be missing as long as one is there: indexing
    tells.

    Raises:
        FileNotFoundError: A source matches nothing.
    """
    shards: list[Shard] = []
    for number, source in enumerate(as_sources(sources)):
        for path in [source.path] if isinstance(source.path, str) else source.path:
            if is_cache(path):
                shards += _cached(local_path(path) / CACHE, source.weight)
                continue
            for url in _expand(path):
                folder = not is_remote(url) and Path(url).is_dir()
                kind: Literal["tar", "folder"] = "folder" if folder else "tar"
                shards.append(Shard(url, source.weight, kind, source.ratio, number))
    if not shards:
        raise FileNotFoundError(f"No shards at {sources!r}: the list is empty.")
    return shards


def folder_files(folder: Path) -> list[Path]:
    """List the files of a folder and its folders, sorted, without hidden ones.

    A folder below that has a metadata file is a source of its own and left out, as
    `_image_folders` lists it. Links to folders are listed, and not followed.

    Raises:
        OSError: A folder cannot be listed.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        if METADATA in files and Path(parent) != folder:
            folders.clear()
            continue
        links = [name for name in folders if os.path.islink(f"{parent}/{name}")]
        found += [Path(parent, name) for name in files + links if not name.startswith(".")]
    return sorted(found)


def _image_folders(folder: Path) -> list[str]:
    """List the folder, if it has images, and those below that have metadata files."""
    below = [
        parent
        for parent, _, files in os.walk(folder, onerror=_raise)
        if METADATA in files and Path(parent) != folder
    ]
    own = any(_may_be_image(path) for path in folder_files(folder))
    return [str(folder)] * own + sorted(below)


def _may_be_image(path: Path) -> bool:
    """Whether a file has the ending of an image, or none that says what it is."""
    suffix = path.suffix.lower().lstrip(".")
    return suffix in IMAGE_SUFFIXES or (not suffix and path.is_file())


def _raise(error: OSError) -> None:
    raise error


def read_cache(file: Path) -> dict[str, Any]:
    """Read what a cache was made with, as `zsnr data cache` wrote it.

    Raises:
        ValueError: It is not such a file, or names shards elsewhere.
    """
    facts = parse_object(read_small(file, _MOST_CACHE), str(file))
    shards = facts.get("shards")
    if not isinstance(shards, list) or not all(map(_is_cached_shard, shards)):
        raise ValueError(
            f"{file} is not what `zsnr data cache` writes: wanted a list of shards, each with the "
            "name of a file beside it and a weight. Cache the data again, in another folder."
        )
    return facts


def _is_cached_shard(shard: object) -> bool:
    if not isinstance(shard, dict) or shard.keys() - {"ratio", "source"} != {"file", "weight"}:
        return False
    file, weight = shard["file"], shard["weight"]
    ratio, source = shard.get("ratio", 1.0), shard.get("source", 0)
    return (
        isinstance(file, str)
        and file == Path(file).name
        and file not in ("", "..")
        and "\0" not in file
        and all(type(x) in (int, float) and _is_share(x) for x in (weight, ratio))
        and type(source) is int
    )


def _cached(cache: Path, weight: float) -> list[Shard]:
    shards = []
    for shard in read_cache(cache)["shards"]:
        product, ratio, source = (
            weight * shard["weight"],
            shard.get("ratio"),
            shard.get("source", 0),
        )
        if not _is_share(product):
            raise ValueError(
                f"{cache.parent} was cached with weight={shard['weight']:g}, which "
                f"weight={weight:g} makes {product:g}: wanted a number from 0.001 to 1000."
            )
        shards.append(Shard(str(cache.parent / shard["file"]), product, "cache", ratio, source))
    return shards


def _expand(item: str) -> list[str]:
    if item.startswith("pipe:"):
        return [item]
    if is_remote(item):
        return _expand_address(item)
    path = local_path(item)
    if path.is_dir():
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        found = [path / name for name in names if name.lower().endswith(".tar")]
        packed = [name for name in names if name.lower().endswith(_PACKED)]
        if found and packed:
            warnings.warn(
                f"{path} holds {len(packed)} compressed shards beside others, such as {packed[0]}, "
                "which are not read: unpack them.",
                stacklevel=2,
            )
        if not found and not packed:
            folders = _image_folders(path)
            if folders:
                return folders
    else:
        found, packed = _local_files(path), []
    if not any(p.exists() for p in found):
        tip = f" {packed[0]} is compressed: unpack it." if packed else _what_is_there(path)
        raise FileNotFoundError(
            f"No shards at {item}: wanted .tar files with images and captions, such as "
            f"`zsnr data openmoji DIR` writes, or a folder of images with captions.{tip}"
        )
    return [str(p) for p in found]


def _local_files(path: Path) -> list[Path]:
    """List the files that a path or a pattern means; a file of that very name is that file."""
    if os.path.lexists(path):
        return [path]
    name, parent = path.name, path.parent
    while not parent.is_dir():
        name, parent = f"{parent.name}/{name}", parent.parent
    found: list[Path] = []
    for each in _expanded(name):
        if not (parent / each).exists() and any(c in each for c in "*?["):
            found += sorted(parent.glob(each))
        else:
            found.append(parent / each)
    return found


def _expanded(pattern: str) -> list[str]:
    """List what a pattern with braces names."""
    from webdataset.shardlists import expand_urls

    spans = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", pattern)
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in spans)
    if count > _MOST_NAMES:
        raise ValueError(
            f"{public_url(pattern)} names {count:.3g} shards: wanted at most {_MOST_NAMES}."
        )
    return list(expand_urls(pattern))


def _what_is_there(path: Path) -> str:
    """Name the files of a folder that is not a source, and a folder below that may be one."""
    if not path.is_dir():
        return ""
    below = next(path.rglob("*.[tT][aA][rR]"), None)
    if below is not None:
        return f" There are some in {below.parent}."
    endings = Counter(p.suffix or p.name for p in path.iterdir())
    named = ", ".join(f"{count} x {ending}" for ending, count in endings.most_common(5))
    return f" It holds {named}." if named else " It is empty."


def _expand_address(item: str) -> list[str]:
    pattern = item + "*.tar" if item.endswith("/") else item
    if "*" not in pattern:
        return _expanded(pattern)
    if pattern.startswith(("http://", "https://")):
        raise FileNotFoundError(
            f"No shards at {public_url(item)}: a web server lists no files. Name them, such as "
            "{000..099}.tar"
        )
    found = Storage().glob(pattern)
    if not found:
        raise FileNotFoundError(f"No shards at {public_url(item)}.")
    return found
