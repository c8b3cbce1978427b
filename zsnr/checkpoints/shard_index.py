"""The index of a sharded checkpoint: which file holds which part of which tensor.

torch.distributed.checkpoint pickles it. Here it is parsed without unpickling (`read_inert`),
checked, and rebuilt.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from zsnr.pickled import Inert, read_inert
from zsnr.untrusted import read_small

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

T = TypeVar("T")
INDEX = ".metadata"
_MAX_BYTES = 2**30
_MAX_DIMENSIONS = 64
_FILE = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")
_METADATA = "torch.distributed.checkpoint.metadata."
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def read_index(folder: Path) -> Metadata:
    """Read the index of a sharded folder, without the files that it names.

    Raises:
        ValueError: The index is damaged, or its chunks do not cover each tensor exactly once.
    """
    path = folder / INDEX
    described = sum(file.stat().st_size for file in folder.glob("__*.distcp"))
    data = read_small(path, min(_MAX_BYTES, described + 2**20))
    try:
        index = _state(read_inert(data, described), _METADATA + "Metadata")
        return _metadata(index)
    except (ValueError, KeyError, TypeError) as error:
        lacking = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not the index of a sharded checkpoint: {lacking}.") from error


def _metadata(index: dict[str, Any]) -> Metadata:
    from torch.distributed.checkpoint import metadata as facts
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors: dict[str, Any] = {}
    lengths: dict[tuple[str, tuple[int, ...]], int] = {}  # of chunks by tensor and offsets
    for name, entry in _plain(index["state_dict_metadata"], dict).items():
        if not isinstance(name, str):
            raise ValueError("a tensor has no name")
        state = _state(entry, _METADATA + "TensorStorageMetadata")
        dtype, size = _dtype(state["properties"]), _sizes(state["size"])
        chunks = [_chunk(chunk) for chunk in _plain(state["chunks"], list)]
        _check_grid(name, size, chunks)
        for offsets, sizes in chunks:
            lengths[name, offsets] = math.prod(sizes) * dtype.itemsize
        tensors[name] = facts.TensorStorageMetadata(
            facts.TensorProperties(dtype=dtype),
            torch.Size(size),
            [facts.ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks],
        )
    places: dict[Any, Any] = {}
    for entry, storage in _plain(index["storage_data"], dict).items():
        key = _state(entry, _METADATA + "MetadataIndex")
        info = _state(storage, "torch.distributed.checkpoint.filesystem._StorageInfo")
        name, offsets = key["fqn"], _sizes(key["offset"])
        min_length = lengths.pop((name, offsets), None)
        file, start, length = info["relative_path"], info["offset"], info["length"]
        if min_length is None:
            raise ValueError("it locates an unknown chunk, or the same chunk twice")
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise ValueError("it names files outside of the folder")
        if not (_is_count(start) and _is_count(length) and length >= min_length):
            raise ValueError("a chunk's span in its file is shorter than the chunk")
        if info.get("transform_descriptors"):
            raise ValueError("its files are compressed")
        places[facts.MetadataIndex(name, offsets)] = _StorageInfo(file, start, length)
    if lengths:
        raise ValueError("it does not locate all chunks")
    _check_places(places.values())
    return facts.Metadata(tensors, storage_data=places, storage_meta=facts.StorageMeta())


def _state(entry: Any, name: str) -> dict[str, Any]:
    if not isinstance(entry, Inert) or entry.name != name or entry.args != () or entry.items:
        raise ValueError("it holds more than tensors")
    return _plain(entry.state, dict)


def _plain(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise ValueError("it holds more than tensors")
    return value


def _dtype(entry: Any) -> torch.dtype:
    """Read the dtype of a dense tensor."""
    is_properties = isinstance(entry, Inert) and entry.name == _METADATA + "TensorProperties"
    state = entry.state if is_properties else None
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("it lacks a tensor's properties")
    dtype, layout = state[:2]
    is_dtype = isinstance(dtype, Inert) and dtype.args is None and dtype.name in _DTYPES
    if not is_dtype or not isinstance(layout, Inert) or layout.args != ("torch.strided",):
        raise ValueError("it holds a tensor of an unknown dtype or layout")
    return _DTYPES[dtype.name]


def _sizes(entry: Any) -> tuple[int, ...]:
    sizes = entry.args[0] if isinstance(entry, Inert) and entry.args else None
    if not isinstance(entry, Inert) or entry.name != "torch.Size" or not isinstance(sizes, tuple):
        raise ValueError("it lacks a size")
    counts = len(sizes) <= _MAX_DIMENSIONS and all(map(_is_count, sizes))
    if not counts or math.prod(sizes) >= 2**60:
        raise ValueError("it holds an impossible size")
    return sizes


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**60


def _chunk(entry: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    state = _state(entry, _METADATA + "ChunkStorageMetadata")
    return _sizes(state["offsets"]), _sizes(state["sizes"])


def _check_grid(
    name: str, size: tuple[int, ...], chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Check that chunks form a grid that covers the tensor, as sharding makes them."""
    wrong = ValueError(f"the chunks of {name!r} are not the whole tensor")
    if any(not len(size) == len(offsets) == len(sizes) for offsets, sizes in chunks):
        raise wrong
    count = 1
    for axis, length in enumerate(size):
        cuts = sorted({(offsets[axis], sizes[axis]) for offsets, sizes in chunks})
        ends = [0, *(start + part for start, part in cuts)]
        if ends[:-1] != [start for start, _ in cuts] or ends[-1] != length:
            raise wrong
        count *= len(cuts)
    if not len(chunks) == len({offsets for offsets, _ in chunks}) == count:
        raise wrong


def _check_places(places: Any) -> None:
    """Check that no two chunks share bytes of a file."""
    spans = sorted((info.relative_path, info.offset, info.length) for info in places)
    for (file, start, length), (next_file, next_start, _) in pairwise(spans):
        if file == next_file and next_start < start + length:
            raise ValueError(f"two chunks overlap in {file}")
