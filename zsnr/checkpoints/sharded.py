"""Sharded checkpoints: a folder in the format of torch.distributed.checkpoint, and a full file.

A folder holds the tensors of `state_dict` and of the optimizers' states under flat names, one file
per rank, and everything else in `meta.pt`. So only tensors and plain values need to be unpickled,
and a checkpoint can be read by any number of ranks.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zsnr.agreement import on_first_rank
from zsnr.checkpoints.shard_index import INDEX, read_index
from zsnr.files import replacing
from zsnr.locks import unfinished
from zsnr.untrusted import check_archive, open_archive

REST = "meta.pt"


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a folder that `write_sharded` wrote."""
    return (Path(path) / INDEX).is_file() and (Path(path) / REST).is_file()


def write_sharded(
    checkpoint: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint whose tensors are sharded over the ranks; every rank calls it.

    The folder gets its name once it is complete.

    Args:
        checkpoint: Lightning's checkpoint, with DTensors.
        folder: Output folder, shared by all ranks; an existing one is replaced.
        group: As in `on_first_rank`.

    Raises:
        OSError: The folder cannot be written, or the ranks do not share it.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors, rest = _split(checkpoint)
    part = unfinished(folder)  # the first rank's name is used

    def begin() -> Path:
        part.mkdir(parents=True)
        return part

    def complete() -> None:
        files = {info.relative_path for info in read_index(part).storage_data.values()}
        lost = sorted(name for name in files if not (part / name).is_file())
        if lost:
            raise OSError(
                f"{part} lacks {', '.join(lost[:3])} after all ranks have written: the folder of "
                "checkpoints must be shared by all nodes"
            )
        torch.save(rest, part / REST)
        replace_folder(part, folder)

    try:
        shared = on_first_rank(begin, group)
        save(dict(tensors), storage_writer=FileSystemWriter(shared), process_group=group)
        on_first_rank(complete, group)
    except (Exception, CheckpointException) as error:  # on all ranks
        shutil.rmtree(part, ignore_errors=True)
        is_torch_error = isinstance(error, CheckpointException)
        raise _unwritten(folder, _reason(error) if is_torch_error else str(error)) from error


def replace_folder(part: Path, folder: Path) -> None:
    """Rename a complete folder to its final name, and remove the previous one of that name."""
    previous = unfinished(folder)
    if folder.is_dir():
        os.replace(folder, previous)
    elif folder.exists():
        folder.unlink()
    os.replace(part, folder)
    shutil.rmtree(previous, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a checkpoint (file or folder); a crash leaves no partial one under its name."""
    if path.is_dir() and not path.is_symlink():
        removed = unfinished(path)
        os.replace(path, removed)
        shutil.rmtree(removed)
    else:
        path.unlink(missing_ok=True)


def check(folder: str | Path) -> None:
    """Check that a folder holds all files of its index, without reading weights.

    Raises:
        ValueError: The folder is damaged.
    """
    _checked_index(Path(folder))


def read_rest(folder: str | Path) -> dict[str, Any]:
    """Read everything except weights and optimizer states.

    Raises:
        ValueError: The folder is damaged.
    """
    return open_archive(Path(folder) / REST)


def read_tensors(folder: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """Read full tensors to the CPU, in this process alone.

    Args:
        folder: A sharded checkpoint.
        prefix: Prefix of the names to read, such as "state_dict/ema.".

    Raises:
        ValueError: The folder is damaged.
    """
    index = _checked_index(Path(folder))
    tensors = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in index.state_dict_metadata.items()
        if name.startswith(prefix)
    }
    _fill(tensors, Path(folder), index, alone=True)
    return tensors


def save_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a full checkpoint to a file, which gets its name once it is synced to disk.

    Raises:
        OSError: The file cannot be written.
    """
    try:
        with replacing(path) as beside, open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:  # a callback's state may fail in any way
        raise _unwritten(path, str(error)) from error


def _unwritten(path: Path, reason: str) -> OSError:
    """Return the error of a failed write; torch reports a full disk as "unexpected pos"."""
    free = ""
    with suppress(OSError):
        free = f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free)"
    return OSError(f"{path} could not be written: {reason}{free}")


def consolidate(folder: str | Path, *, with_optimizers: bool = True) -> dict[str, Any]:
    """Read a sharded checkpoint as the full checkpoint that training on one device would write.

    Args:
        folder: A sharded checkpoint.
        with_optimizers: Whether to read the tensors of the optimizer states too.

    Raises:
        ValueError: The folder is damaged.
    """
    rest = read_rest(folder)
    tensors = read_tensors(folder, "" if with_optimizers else "state_dict/")
    try:
        return _merge(rest, tensors)
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is damaged: {REST} does not match the other files.") from error


def restore(
    path: Path,
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    unused: str | None = None,
) -> dict[str, Any]:
    """Load weights and optimizer states into parameters that may be sharded; every rank calls it.

    Args:
        path: A sharded folder, or a full file.
        model: Model to load, whose parameters may be DTensors.
        optimizers: Optimizers to load.
        unused: Prefix of the names of weights that the model does not need. None = it needs all.

    Returns:
        The checkpoint without its weights and optimizer states.

    Raises:
        ValueError: The checkpoint is damaged, or belongs to another model.
    """
    parameters = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    optimizers = list(optimizers)
    if is_sharded(path):
        rest, index = read_rest(path), _checked_index(path)
        saved = {name: facts.size for name, facts in index.state_dict_metadata.items()}
        weights = {name for name in saved if name.startswith("state_dict/")}
        names = {name.removeprefix("state_dict/") for name in weights}
        _check_names(path, parameters, names, unused)
        targets = {f"state_dict/{name}": tensor for name, tensor in parameters.items()}
        states = {
            name: _like(optimizers[int(name.split("/")[1])], name, size)
            for name, size in saved.items()
            if optimizers and name not in weights
        }
        _fill({**targets, **states}, path, index)
        full = _merge(rest, states)
    else:
        full = open_archive(path)
        _check_names(path, parameters, set(full["state_dict"]), unused)
        for name, tensor in parameters.items():
            copy_part(tensor, full["state_dict"][name])
        for number, optimizer in enumerate(optimizers):
            for index, state in full["optimizer_states"][number]["state"].items():
                parameter = _parameters(optimizer)[index].detach()
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[key] = torch.empty_like(parameter, dtype=value.dtype)
                        copy_part(state[key], value)
    for optimizer, state in zip(optimizers, full["optimizer_states"], strict=False):
        optimizer.load_state_dict(state)
    rest = {key: value for key, value in full.items() if key != "state_dict"}
    return {**rest, "optimizer_states": []}


def gather(checkpoint: dict[str, Any], keep: bool) -> dict[str, Any]:
    """Gather a checkpoint's DTensors; every rank calls it, and ranks with `keep` get the result."""

    def gathered(value: Any) -> Any:
        if isinstance(value, Tensor):
            full = value.full_tensor() if hasattr(value, "full_tensor") else value
            return full.cpu() if keep else None
        if isinstance(value, dict):
            return {key: gathered(item) for key, item in value.items()}
        if isinstance(value, list):
            return [gathered(item) for item in value]
        return value

    names = {"state_dict", "optimizer_states"} & checkpoint.keys()
    parts = {name: checkpoint[name] for name in sorted(names)}
    return {**checkpoint, **gathered(parts)}


def _split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate the tensors of weights and optimizers from the rest of a checkpoint."""
    tensors = {f"state_dict/{name}": t for name, t in checkpoint["state_dict"].items()}
    optimizers = []
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        plain: dict[int, dict[str, Any]] = {}
        for index, state in optimizer["state"].items():
            plain[index] = {}
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer_states/{number}/state/{index}/{key}"] = value
                else:
                    plain[index][key] = value
        optimizers.append({**optimizer, "state": plain})
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
    return tensors, {**rest, "optimizer_states": optimizers}


def _merge(rest: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Undo `_split`."""
    weights = {}
    for name, tensor in tensors.items():
        kind, _, key = name.partition("/")
        if kind == "state_dict":
            weights[key] = tensor
        else:
            number, _, index, key = key.split("/")
            rest["optimizer_states"][int(number)]["state"][int(index)][key] = tensor
    return {**rest, "state_dict": weights}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _like(optimizer: torch.optim.Optimizer, name: str, size: torch.Size) -> Tensor:
    """Allocate an optimizer's tensor, sharded like its parameter."""
    parameter = _parameters(optimizer)[int(name.split("/")[3])].detach()
    same = parameter.shape == size
    return torch.empty_like(parameter) if same else torch.empty(size)


def copy_part(target: Tensor, full: Tensor) -> None:
    """Copy this rank's part of a tensor into a DTensor, or the whole of it into another tensor.

    No more than the part is read where the tensor is memory-mapped.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(target, DTensor):
        target.copy_(full)
        return
    if full.shape != target.shape:
        raise ValueError(
            f"A tensor has the shape {tuple(full.shape)}: wanted {tuple(target.shape)}."
        )
    shape, offset = compute_local_shape_and_global_offset(
        target.shape, target.device_mesh, target.placements
    )
    part = full[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    target.to_local().copy_(part)


def _checked_index(folder: Path) -> Any:
    """Read the index, and check that the files are at least as long as it requires."""
    index = read_index(folder)
    ends: dict[str, int] = {}
    for info in index.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else 0
        if size < end:
            raise ValueError(f"{folder} is damaged: {name} has {size} of {end} bytes.")
    return index


def _fill(tensors: dict[str, Tensor], folder: Path, index: Any, *, alone: bool = False) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return index

        def _slice_file(self, file: Any, sinfo: Any) -> Any:
            file.seek(sinfo.offset)
            part = io.BytesIO(file.read(sinfo.length))
            check_archive(part, sinfo.length, f"{sinfo.relative_path} at {sinfo.offset}")
            part.seek(0)
            return part

    try:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(
            tensors,
            storage_reader=Reader(folder),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=alone or not dist.is_initialized(),
        )
    except CheckpointException as error:
        raise ValueError(f"{folder} is damaged: {_reason(error)}") from error


def _reason(error: Any) -> str:
    """Return the error of the first rank that failed."""
    return str(next(iter(error.failures.values()))[0])


def _check_names(
    path: Path, parameters: Mapping[str, Tensor], saved: set[str], unused: str | None
) -> None:
    if unused is not None:
        saved = {name for name in saved if not name.startswith(unused)}
    lacking, foreign = sorted(parameters.keys() - saved), sorted(saved - parameters.keys())
    if lacking or foreign:
        difference = f"lacks {lacking[0]}" if lacking else f"has {foreign[0]}, unlike the model"
        raise ValueError(f"{path} belongs to another model: it {difference}.")
