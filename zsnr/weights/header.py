"""Reading of a safetensors file's header: names, shapes and metadata without weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import torch
from torch import Tensor

from zsnr.schedule import MAX_TIMESTEPS, NoiseSchedule
from zsnr.untrusted import open_regular, parse_object, shown

MAX_HEADER = 100_000_000  # bytes; the format's own bound
_MAX_DIMENSIONS = 64

_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class TensorFacts:
    """A header's description of one tensor.

    Args:
        dtype: The format's name of the data type, such as "F16".
        shape: Shape of the tensor.
        start: Offset of the first byte from the start of the file.
        end: Offset after the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Args:
        tensors: Facts by name, in the header's order.
        metadata: Free text by name.
    """

    tensors: dict[str, TensorFacts]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """Read the header of a safetensors file, without its weights.

    Raises:
        ValueError: The file does not exist, or violates the format.
    """
    path = Path(path)
    with open_regular(path) as (file, size):
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(
                f"{path} is not a safetensors file: its header would have {length} bytes, the file "
                f"has {size} (and a header at most {MAX_HEADER})."
            )
        data = file.read(length)
    if len(data) < length or not data.startswith(b"{"):
        raise ValueError(f"{path} is not a safetensors file: it does not start with a header.")
    entries = parse_object(data, f"The header of {path}", strict=True)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    try:
        tensors = {name: _facts(name, entry, 8 + length) for name, entry in entries.items()}
        _check_places(tensors, 8 + length, size)
    except ValueError as error:
        raise ValueError(f"The header of {path} is damaged: {error}") from error
    return Header(tensors, metadata)


def read_tensor(path: str | Path, header: Header, name: str) -> Tensor:
    """Read a single tensor to the CPU.

    Args:
        path: The file.
        header: The result of `read_header`.
        name: Name of the tensor.

    Raises:
        ValueError: There is no tensor of this name, torch does not have its dtype, or the file is
            truncated.
    """
    if name not in header.tensors:
        raise ValueError(f"{path} holds no tensor {name!r}.")
    facts = header.tensors[name]
    if facts.dtype not in _DTYPES:
        raise ValueError(f"{name!r} in {path} is {facts.dtype}: wanted a dtype that torch has.")
    with open_regular(Path(path)) as (file, _):
        file.seek(facts.start)
        data = bytearray(file.read(facts.end - facts.start))
    if len(data) < facts.end - facts.start:
        raise ValueError(f"{path} ends within {name!r}: it has changed since its header was read.")
    dtype = _DTYPES[facts.dtype]
    if not data:
        return torch.empty(facts.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(facts.shape)


def read_schedule(path: str | Path, header: Header) -> NoiseSchedule | None:
    """Read a file's alphas_cumprod, if it holds one that is a valid schedule."""
    facts = header.tensors.get("alphas_cumprod")
    if facts is None or facts.dtype not in ("F16", "BF16", "F32", "F64"):
        return None
    if len(facts.shape) != 1 or not 2 <= facts.shape[0] <= MAX_TIMESTEPS:
        return None
    table = read_tensor(path, header, "alphas_cumprod").double()
    try:
        return NoiseSchedule.from_alphas_cumprod(table)
    except ValueError:  # half precision repeats values
        return None


def _metadata(path: Path, entry: Any) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
        raise ValueError(f"The header of {path} has a __metadata__ that is not a map of strings.")
    return entry


def _facts(name: str, entry: Any, base: int) -> TensorFacts:
    label = shown(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{label} is not described by dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{label} has the unknown dtype {shown(dtype)}.")
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{label} has the shape {brief(shape)}.")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{label} has the data_offsets {brief(offsets)}.")
    start, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (end - start):
        takes = f"{bits / 8:g}" if bits < 2**64 else "far more"
        size = brief(shape)
        raise ValueError(
            f"{label} has {end - start} bytes, but {dtype} of shape {size} takes {takes}."
        )
    return TensorFacts(dtype, tuple(shape), base + start, base + end)


def _is_sizes(value: Any) -> bool:
    """Whether a value is a list of counts that fit into 64 bits."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_places(tensors: dict[str, TensorFacts], base: int, size: int) -> None:
    """Check that the tensors cover the file from the header to its end, each byte once."""
    place = base
    for name, facts in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if facts.start != place:
            wrong = "overlaps the previous one" if facts.start < place else "leaves a gap before it"
            raise ValueError(f"{shown(name)} {wrong}, at byte {facts.start}.")
        place = facts.end
    if place != size:
        wrong = "extends beyond the file" if place > size else "is followed by other bytes"
        raise ValueError(f"the last tensor ends at byte {place} of {size}: it {wrong}.")
