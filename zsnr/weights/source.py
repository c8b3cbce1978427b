"""Where a model's files lie: a folder, a single file, or a hub id's snapshot in the local cache.

A hub id, "OWNER/NAME" or "OWNER/NAME@REVISION", is resolved to its local snapshot once; after that
it is a folder like any other. A snapshot that holds what is wanted is used as it is, without
network. Files other than weights and settings are never downloaded.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from zsnr.untrusted import clipped, read_json

_VARIANT: ContextVar[str | None] = ContextVar("variant", default=None)
WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
_SETTINGS = (".json", ".txt", ".model")
_LARGEST_SETTINGS = 1 << 28  # bytes; the largest vocabularies have 40 MB


@contextmanager
def prefer_variant(variant: str | None) -> Iterator[None]:
    """Prefer a variant of the weights, such as "fp16", where there are several."""
    token = _VARIANT.set(variant)
    try:
        yield
    finally:
        _VARIANT.reset(token)


def is_single_file(source: str) -> bool:
    """Whether a model's name is a single file rather than a folder or a hub id."""
    return source.lower().endswith(".safetensors") and not Path(source).expanduser().is_dir()


def is_local(source: str) -> bool:
    """Whether a name is that of a file or folder here, or can be no hub id."""
    return source.startswith((".", "/", "~")) or os.path.exists(source) or _id(source) is None


def at_revision(source: str, revision: str | None) -> str:
    """Return a hub id with another revision; None = the name as it is.

    Raises:
        ValueError: The name is that of a path, which has no revisions.
    """
    if revision is None:
        return source
    if is_local(source):
        raise ValueError(f"revision={revision!r} belongs to a hub id: {source} is a path.")
    return f"{source.partition('@')[0]}@{revision}"


def local_path(source: str, subfolder: str | None = None, *, fetch: bool = True) -> Path | None:
    """Return the folder or file that a model's name stands for.

    Args:
        source: A path, in which `~` is the home folder, or a hub id.
        subfolder: The folder inside it that is needed; None = the folder itself.
        fetch: Whether a hub id's files are downloaded if they are not in the local cache.

    Returns:
        The path, without `subfolder`. None = the hub id is not in the cache, and is not fetched.

    Raises:
        ValueError: The hub id cannot be downloaded, or there is no network.
    """
    if is_local(source):
        return Path(os.path.expanduser(source))
    root = _cached(source)
    if root is not None and (not fetch or _is_complete(root, subfolder)):
        return root
    return _download(source, subfolder, _VARIANT.get()) if fetch else None


def find_file(source: str, subfolder: str | None, name: str) -> Path | None:
    """Find a file of a local folder, or of a hub id in the local cache, without network."""
    root = local_path(source, fetch=False)
    if root is None:
        return None
    path = root / (subfolder or "") / name
    return path if path.is_file() else None


def fetch_file(source: str, name: str) -> Path | None:
    """Find an optional file of a local folder, or of a hub id, from which it is downloaded."""
    try:
        root = local_path(source)
    except ValueError:  # whether the model is there, its parts tell
        return None
    return None if root is None or not (root / name).is_file() else root / name


def find_weights(source: str, subfolder: str | None, stem: str) -> list[Path]:
    """Find the safetensors files of a part, whole or in shards; [] unless all exist.

    Args:
        source: A folder, a hub id in the local cache, or a single file, which holds all parts.
        subfolder: Folder inside it.
        stem: Name of the files, such as "model": STEM.safetensors, the shards that
            STEM.safetensors.index.json lists, or a variant of either, such as
            STEM.fp16.safetensors, if there is no other or `prefer_variant` names it.

    Raises:
        ValueError: An index does not list files.
    """
    root = local_path(source, fetch=False)
    if root is None:
        return []
    if is_single_file(source):
        return [root]
    folder = root / (subfolder or "")
    for variant in (_VARIANT.get(), None, *_variants(folder, stem)):
        paths = _weights(folder, stem, variant)
        if paths:
            return paths
    return []


def has_variant(source: str, subfolder: str, variant: str) -> bool:
    """Whether a part has weights of a variant, such as "fp16"; downloads them from the hub.

    Raises:
        ValueError: The hub id cannot be downloaded.
    """
    with prefer_variant(variant):
        root = local_path(source, subfolder)
        return root is not None and any(
            _weights(root / subfolder, stem, variant) for stem in WEIGHT_STEMS
        )


def find_variant(source: str, subfolder: str | None) -> str | None:
    """Return the variant of a part's weights, such as "fp16", where there are no others."""
    for stem in WEIGHT_STEMS:
        paths = find_weights(source, subfolder, stem)
        if paths:
            rest = paths[0].name.removeprefix(stem).removesuffix(".safetensors")
            return re.sub(r"-\d+-of-\d+", "", rest).removeprefix(".") or None
    return None


def digest(paths: Sequence[Path]) -> str | None:
    """Hash the concatenated contents of files; None if there are no files."""
    content = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: content)
    return content.hexdigest() if paths else None


def _weights(folder: Path, stem: str, variant: str | None) -> list[Path]:
    middle = "" if variant is None else f".{variant}"
    single = folder / f"{stem}{middle}.safetensors"
    if single.is_file():
        return [single]
    index = folder / f"{stem}.safetensors.index{middle}.json"
    if not index.is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise ValueError(f"{index} does not list the file of each tensor.")
    shards = [folder / name for name in sorted({*weight_map.values()})]
    return shards if all(path.is_file() for path in shards) else []


def _variants(folder: Path, stem: str) -> Iterator[str]:
    """Yield the variants of the weights in a folder, such as "fp16"."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(
            rf"{stem}\.(?P<a>[\w-]+?)(-\d+-of-\d+)?\.safetensors"
            rf"|{stem}\.safetensors\.index\.(?P<b>[\w-]+)\.json",
            path.name,
        )
        if match is not None:
            yield match["a"] or match["b"]


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _id(source: str) -> re.Match[str] | None:
    return _HUB_ID.fullmatch(source)


def _cached(source: str) -> Path | None:
    """Return the snapshot of a hub id in the local cache, complete or not."""
    from huggingface_hub import snapshot_download

    match = _id(source)
    assert match is not None
    try:
        return Path(snapshot_download(**_revision(match), local_files_only=True))
    except Exception:  # it is not there, or no valid id
        return None


def _revision(match: re.Match[str]) -> dict[str, Any]:
    return {"repo_id": match["name"], "revision": match["revision"]}


def _is_complete(root: Path, subfolder: str | None) -> bool:
    """Whether a snapshot holds a part, or the list of a pipeline's parts."""
    folder = root / (subfolder or "")
    if not folder.is_dir():
        return False
    if not (folder / "config.json").is_file():
        return any(path.suffix in _SETTINGS for path in folder.iterdir())
    return any(find_weights(str(root), subfolder, stem) for stem in WEIGHT_STEMS)


def _download(source: str, subfolder: str | None, variant: str | None) -> Path:
    """Download one folder of a hub id.

    Raises:
        ValueError: The hub does not have it, or cannot be reached.
    """
    found = _attempt(source, subfolder, variant)
    if isinstance(found, str):
        raise ValueError(found)
    return found


@cache  # also a failure: without network, each attempt takes half a minute
def _attempt(source: str, subfolder: str | None, variant: str | None) -> Path | str:
    """Download one folder of a hub id; return it, or why it cannot be."""
    from huggingface_hub import HfApi, snapshot_download

    match = _id(source)
    assert match is not None
    try:
        info = HfApi().model_info(**_revision(match), files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        names = list(_needed(sizes, subfolder, variant))
        too_large = [
            name for name in names if name.endswith(_SETTINGS) and sizes[name] > _LARGEST_SETTINGS
        ]
        if too_large:
            raise ValueError(f"{too_large[0]} has {sizes[too_large[0]]} bytes, too many")
        return Path(
            snapshot_download(
                match["name"], revision=info.sha, allow_patterns=[_exactly(name) for name in names]
            )
        )
    except Exception as error:  # no network, no such model, no permission, or another failure
        reason = clipped(str(error).strip().partition("\n")[0] or repr(error), 300)
        return (
            f"{source} is not in the local cache, and cannot be downloaded: {reason} (A name that "
            "is not a local folder is looked up on the hub.)"
        )


def _needed(names: Iterable[str], subfolder: str | None, variant: str | None) -> Iterator[str]:
    """Yield the files of one folder that a model is read from: settings, and one set of weights."""
    prefix = f"{subfolder}/" if subfolder else ""
    inside = {
        name.removeprefix(prefix)
        for name in names
        if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
    }
    yield from (prefix + name for name in sorted(inside) if name.endswith(_SETTINGS))
    for stem in WEIGHT_STEMS:
        weights = sorted(n for n in inside if re.match(rf"{stem}([.-].*)?\.safetensors$", n))
        sets = [
            [n for n in weights if re.search(rf"{stem}{v}(-\d+-of-\d+)?\.saf", n)]
            for v in ([rf"\.{re.escape(variant)}"] if variant else []) + [""]
        ]
        yield from (prefix + name for name in next((s for s in sets if s), weights))


def _exactly(name: str) -> str:
    """Return a pattern that only this name matches."""
    return re.sub(r"([*?\[])", r"[\1]", name)
