"""Sources of data: local or remote tar shards, and plain folders of images."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from zsnr.data.storage import Storage, is_remote, local_path
from zsnr.public import public_url
from zsnr.untrusted import near_path, parse_object, read_small, shown

IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "png", "webp", "gif", "jfif", "jpe", "mpo", "apng", "bmp", "tif", "tiff"),
    *("avif", "jp2", "j2k", "jpf", "jpx", "ppm", "pgm", "pbm", "pnm", "qoi", "sgi", "psd", "pcx"),
    "tga",
)
"""Suffixes of images. If a sample has several, the first in this order is used. A file with another
suffix is an image if its contents are."""

METADATA = "metadata.jsonl"
"""File with the captions of a folder of images, one line each."""

_PACKED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")

CACHE = "cache.json"
"""File with the description of a cache, in the folder of its shards."""

_MAX_NAMES = 10_000_000  # shards that one pattern may match
_MAX_CACHE = 1 << 28  # bytes of cache.json; a million shards
_MAX_NAME = 64  # characters of a source's name


@dataclass(frozen=True)
class Source:
    """One source of data.

    Args:
        path: A folder of tar shards; a pattern such as "data/{000..099}.tar" or "data/train-*.tar",
            also with http://, https://, s3:// or gs://; a list of these; a folder of images with
            KEY.txt beside each image or metadata.jsonl in it or its subfolders; or "pipe:COMMAND",
            a command that prints one shard, which data.local_cache then caches.
        weight: Occurrences of each sample per epoch: 2 = twice, 0.5 = every second epoch.
        ratio: Share of each global batch, relative to the other sources' ratios, whatever the
            number of samples. Each source then has epochs of its own. If one source has a ratio,
            all must, and none may have a weight. None = by the number of samples and the weight.
        name: Name in the logs, of letters, digits, and ".", "_" and "-"; sources of one name are
            counted together. None = what its path does not share with those of the other sources.
    """

    path: str | list[str]
    weight: float = 1.0
    ratio: float | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for name, share in (("weight", self.weight), ("ratio", self.ratio)):
            if share is not None and not _is_share(share):
                raise ValueError(f"{name}={share:g}: wanted a number from 0.001 to 1000.")
        if self.name is not None and not _is_name(self.name):
            raise ValueError(
                f"name={shown(self.name)}: wanted letters, digits, and '.', '_' and '-', at most "
                f"{_MAX_NAME} characters."
            )
        object.__setattr__(self, "weight", float(self.weight))  # 3 and 3.0 are one weight
        object.__setattr__(self, "ratio", None if self.ratio is None else float(self.ratio))


@dataclass(frozen=True)
class Shard:
    """A tar file, or a folder of images.

    Args:
        url: Path or address.
        weight: Weight of its source.
        kind: "tar" = a tar file, "folder" = a folder of images, "cache" = a tar file of a cache.
        ratio: Ratio of its source.
        source: Number of its source.
        source_name: Name of its source in the logs.
    """

    url: str
    weight: float = 1.0
    kind: Literal["tar", "folder", "cache"] = "tar"
    ratio: float | None = None
    source: int = 0
    source_name: str = ""

    @property
    def name(self) -> str:
        """The last part of its path, which is the same after shards are moved or signed again."""
        return public_url(self.url).rstrip("/").rpartition("/")[2]


Sources = str | Sequence[str | Source]
"""Type of data.train and data.val."""


def as_sources(sources: Sources) -> list[Source]:
    """Convert every source to a `Source`.

    Raises:
        ValueError: One source has a ratio, and another has no ratio or has a weight.
    """
    items = [sources] if isinstance(sources, str) else sources
    full = [item if isinstance(item, Source) else Source(item) for item in items]
    if any(source.ratio is not None for source in full):
        for source in full:
            if source.ratio is None or source.weight != 1:
                raise ValueError(
                    f"The source {source.path!r} has ratio={source.ratio} and "
                    f"weight={source.weight:g}, but another source has a ratio: wanted a ratio for "
                    "every source, and no weights."
                )
    return full


def _is_share(value: float) -> bool:
    return 0.001 <= value <= 1000


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(rf"[\w.-]{{1,{_MAX_NAME}}}", value) is not None


def _common_start(paths: Sequence[Sequence[str]]) -> int:
    """Return the number of first parts that all paths have in common."""
    columns = zip(*paths, strict=False)  # to the end of the shortest
    return sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, columns))


def source_names(sources: Sequence[Source]) -> list[str]:
    """Name each source: as it says, or by the part of its path that other sources do not share."""
    firsts = [
        each.path if isinstance(each.path, str) else "".join(each.path[:1]) for each in sources
    ]
    paths = [public_url(path).strip("/").split("/") for path in firsts]
    head, tail = _common_start(paths), _common_start([path[::-1] for path in paths])
    names: list[str] = []
    for number, (source, path) in enumerate(zip(sources, paths, strict=True), 1):
        text = re.sub(r"[^\w.-]+", "_", "/".join(path[head : len(path) - tail])).strip("_")
        name = text[-_MAX_NAME:] or f"source-{number}"
        name = f"{name[: _MAX_NAME - 8]}-{number}" if name in names else name
        names.append(source.name or name)
    return names


def is_cache(path: str) -> bool:
    """Whether a source is a folder that `zsnr data cache` wrote."""
    return not is_remote(path) and (local_path(path) / CACHE).is_file()


def find_shards(sources: Sources) -> list[Shard]:
    """List the shards of all sources, sorted within each folder or pattern, without opening them.

    Local files of a pattern with braces may be missing as long as one exists: indexing reports
    them.

    Raises:
        FileNotFoundError: A source has no shards.
    """
    shards: list[Shard] = []
    full = as_sources(sources)
    for number, (source, name) in enumerate(zip(full, source_names(full), strict=True)):
        for path in [source.path] if isinstance(source.path, str) else source.path:
            if is_cache(path):
                shards += _cached(local_path(path) / CACHE, source.weight)
                continue
            for url in _expand(path):
                folder = not is_remote(url) and Path(url).is_dir()
                kind: Literal["tar", "folder"] = "folder" if folder else "tar"
                shards.append(Shard(url, source.weight, kind, source.ratio, number, name))
    if not shards:
        raise FileNotFoundError(f"No shards at {sources!r}: the list is empty.")
    return shards


def folder_files(folder: Path) -> list[Path]:
    """List the files of a folder and its subfolders, sorted, without hidden ones.

    A subfolder with a metadata file is a separate source, listed by `_image_folders`, and left
    out. Links to folders are listed, but not followed.

    Raises:
        OSError: A folder cannot be listed.
    """
    files_found = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        if METADATA in files and Path(parent) != folder:
            folders.clear()
            continue
        links = [name for name in folders if os.path.islink(f"{parent}/{name}")]
        files_found += [Path(parent, name) for name in files + links if not name.startswith(".")]
    return sorted(files_found)


def _image_folders(folder: Path) -> list[str]:
    """List the folder, if it has images, and the subfolders that have metadata files."""
    below = [
        parent
        for parent, _, files in os.walk(folder, onerror=_raise)
        if METADATA in files and Path(parent) != folder
    ]
    has_images = any(_may_be_image(path) for path in folder_files(folder))
    return [str(folder)] * has_images + sorted(below)


def _may_be_image(path: Path) -> bool:
    """Whether a file has an image suffix, or no suffix."""
    suffix = path.suffix.lower().lstrip(".")
    return suffix in IMAGE_SUFFIXES or (not suffix and path.is_file())


def _raise(error: OSError) -> None:
    raise error


def read_cache(file: Path) -> dict[str, Any]:
    """Read the description of a cache that `zsnr data cache` wrote.

    Raises:
        ValueError: The file is not a cache description, or lists shards outside of its folder.
    """
    facts = parse_object(read_small(file, _MAX_CACHE), str(file))
    if "picture" in facts:  # the name of this field in older caches, which take hours to make
        facts["images"] = facts.pop("picture")
    shards = facts.get("shards")
    if not isinstance(shards, list) or not all(map(_is_cached_shard, shards)):
        raise ValueError(
            f"{file} is not what `zsnr data cache` writes: wanted a list of shards, each with the "
            "name of a file beside it and a weight. Cache the data again, in another folder."
        )
    return facts


def _is_cached_shard(shard: object) -> bool:
    optional = {"ratio", "source", "source_name"}
    if not isinstance(shard, dict) or shard.keys() - optional != {"file", "weight"}:
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
        and _is_name(shard.get("source_name", "source"))
    )


def _cached(cache: Path, weight: float) -> list[Shard]:
    shards = []
    for shard in read_cache(cache)["shards"]:
        product = weight * shard["weight"]
        if not _is_share(product):
            raise ValueError(
                f"{cache.parent} was cached with weight={shard['weight']:g}, so weight={weight:g} "
                f"results in {product:g}: wanted a number from 0.001 to 1000."
            )
        of_source = {key: shard[key] for key in ("ratio", "source", "source_name") if key in shard}
        shards.append(Shard(str(cache.parent / shard["file"]), product, "cache", **of_source))
    return shards


def _expand(item: str) -> list[str]:
    if item.startswith("pipe:"):
        return [item]
    if is_remote(item):
        return _expand_address(item)
    path = local_path(item)
    if path.is_dir():
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        shards = [path / name for name in names if name.lower().endswith(".tar")]
        packed = [name for name in names if name.lower().endswith(_PACKED)]
        if shards and packed:
            warnings.warn(
                f"{path} holds {len(packed)} compressed shards, such as {packed[0]}, which are not "
                "read: unpack them.",
                stacklevel=2,
            )
        if not shards and not packed:
            folders = _image_folders(path)
            if folders:
                return folders
    else:
        shards, packed = _local_files(path), []
    if not any(p.exists() for p in shards):
        if not path.is_dir():
            problem = "does not exist" if shards == [path] else "matches no file"
            raise FileNotFoundError(
                f"{item} {problem}: wanted a folder of images or of shards, or .tar files."
                f"{near_path(path)}"
            )
        tip = f" {packed[0]} is compressed: unpack it." if packed else _describe_contents(path)
        raise FileNotFoundError(
            f"No shards at {item}: wanted .tar files with images and captions, such as "
            f"`zsnr data openmoji DIR` writes, or a folder of images with captions.{tip}"
        )
    return [str(p) for p in shards]


def _local_files(path: Path) -> list[Path]:
    """List the files that match a path or a pattern; an existing file matches itself."""
    if os.path.lexists(path):
        return [path]
    name, parent = path.name, path.parent
    while not parent.is_dir():
        name, parent = f"{parent.name}/{name}", parent.parent
    files: list[Path] = []
    for expanded in _expanded(name):
        if not (parent / expanded).exists() and any(c in expanded for c in "*?["):
            files += sorted(parent.glob(expanded))
        else:
            files.append(parent / expanded)
    return files


def _expanded(pattern: str) -> list[str]:
    """Expand the braces of a pattern."""
    from webdataset.shardlists import expand_urls

    spans = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", pattern)
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in spans)
    if count > _MAX_NAMES:
        raise ValueError(
            f"{public_url(pattern)} lists {count:.3g} shards: wanted at most {_MAX_NAMES}."
        )
    return list(expand_urls(pattern))


def _describe_contents(path: Path) -> str:
    """Describe a folder that is not a source: a subfolder with shards, or its kinds of files."""
    below = next(path.rglob("*.[tT][aA][rR]"), None)
    if below is not None:
        return f" There are some in {below.parent}."
    endings = Counter(p.suffix or p.name for p in path.iterdir())
    counts = ", ".join(f"{count} x {ending}" for ending, count in endings.most_common(5))
    return f" It holds {counts}." if counts else " It is empty."


def _expand_address(item: str) -> list[str]:
    pattern = item + "*.tar" if item.endswith("/") else item
    if "*" not in pattern:
        return _expanded(pattern)
    if pattern.startswith(("http://", "https://")):
        raise FileNotFoundError(
            f"No shards at {public_url(item)}: a web server cannot list files. List them with a "
            "pattern such as {000..099}.tar"
        )
    addresses = Storage().glob(pattern)
    if not addresses:
        raise FileNotFoundError(f"No shards at {public_url(item)}.")
    return addresses
