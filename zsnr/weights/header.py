"""The header of a safetensors file: names, shapes and metadata, without the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from zsnr.schedule import MAX_TIMESTEPS, NoiseSchedule
from zsnr.untrusted import clipped, open_regular, other_format

MAX_TENSORS = 50_000  # Stable Diffusion XL has 2515, an adapter of it up to 20 thousand


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        shapes: Shapes of the tensors by name.
        dtypes: The format's names of their data types, such as "F16", by name.
        metadata: Free text by name.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file with the format's library, which checks its header.

    Raises:
        ValueError: The file does not exist, is another kind of file, or violates the format.
    """
    from safetensors import SafetensorError, safe_open

    with open_regular(path) as (file, _):
        kind = other_format(file.read(64))
    if kind is not None:
        raise ValueError(f"{path} is {kind}.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, UnicodeError) as error:
        reason = clipped(str(error).strip() or repr(error))
        raise ValueError(f"{path} is not a readable .safetensors file: {reason}") from error


def read_header(path: str | Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        ValueError: As in `open_safetensors`, or the file has too many tensors.
    """
    path = Path(path)
    with open_safetensors(path) as file:
        names = file.keys()
        if len(names) > MAX_TENSORS:
            raise ValueError(f"{path} has {len(names)} tensors: wanted at most {MAX_TENSORS}.")
        slices = {name: file.get_slice(name) for name in names}
        return Header(
            {name: tuple(tensor.get_shape()) for name, tensor in slices.items()},
            {name: tensor.get_dtype() for name, tensor in slices.items()},
            file.metadata() or {},
        )


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Open a file's tensors by their names, memory-mapped.

    Raises:
        ValueError: As in `open_safetensors`.
    """
    with open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_schedule(path: Path, header: Header) -> NoiseSchedule | None:
    """Read a file's alphas_cumprod, if it holds one that is a valid schedule.

    Raises:
        ValueError: As in `open_safetensors`.
    """
    shape = header.shapes.get("alphas_cumprod", ())
    if len(shape) != 1 or not 2 <= shape[0] <= MAX_TIMESTEPS:
        return None
    if header.dtypes["alphas_cumprod"] not in ("F16", "BF16", "F32", "F64"):
        return None
    with open_safetensors(path) as file:
        table = file.get_tensor("alphas_cumprod").double()
    try:
        return NoiseSchedule.from_alphas_cumprod(table)
    except ValueError:  # half precision repeats values
        return None
