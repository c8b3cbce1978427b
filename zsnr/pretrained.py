"""Pretrained models in a folder, a file or on the hub: loading parts, finding and hashing files."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from zsnr.ldm_file import (
    config_folder,
    file_index,
    is_single_file,
    map_tensors,
    open_ldm_file,
    part_config,
    read_part,
    read_shapes,
)
from zsnr.untrusted import clipped, read_json

_MAX_LAYERS = 1000
_HUB = " A name that is not a local folder is looked up on the hub."
Precision = Literal["float32", "float16", "bfloat16"]

_WEIGHTLESS: ContextVar[bool] = ContextVar("weightless", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Make parts from their configs alone, with random weights.

    With fake tensors (FakeTensorMode) they then need no memory, whatever their size.
    """
    token = _WEIGHTLESS.set(True)
    try:
        yield
    finally:
        _WEIGHTLESS.reset(token)


def is_weightless() -> bool:
    """Whether parts are made from their config alone."""
    return _WEIGHTLESS.get()


def reason(error: BaseException) -> str:
    """Return a library's error message for an untrusted file, as one short line."""
    return clipped(str(error).strip() or repr(error), 300)


def check_precision(dtype: str, name: str = "dtype") -> torch.dtype:
    """Return the torch dtype of a Precision.

    Raises:
        ValueError: The name is unknown.
    """
    if dtype not in get_args(Precision):
        known = ", ".join(map(repr, get_args(Precision)))
        raise ValueError(f"{name}={dtype!r} is unknown. Known: {known}.")
    torch_dtype: torch.dtype = getattr(torch, dtype)
    return torch_dtype


def cast_weight(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a weight before writing; a file with inf or NaN would only generate black images.

    Raises:
        ValueError: The dtype cannot hold its values, or they are not finite.
    """
    cast = weight.detach().to(dtype)
    if not cast.isfinite().all():
        if weight.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} has values that {kind} cannot hold: use bfloat16.")
        raise ValueError(f"{name} has values that are not finite: this model is broken.")
    return cast


def load_pretrained(
    cls: Any,
    source: str,
    subfolder: str | None,
    *,
    label: str,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Call cls.from_pretrained on safetensors weights; never unpickle, never run remote code.

    Args:
        cls: A diffusers or transformers class.
        source: A local folder, a single file in the ldm layout, or a hub id.
        subfolder: Folder inside it, or None; for a single file, the part of that name.
        label: The required object, for the error.
        options: Other arguments of from_pretrained.

    Raises:
        ValueError: The object cannot be loaded.
    """
    if is_single_file(source):
        with config_folder(source, str(subfolder)) as folder_of_file:
            try:
                return load_pretrained(cls, folder_of_file, subfolder, label=label, options=options)
            except ValueError as error:
                raise ValueError(str(error).replace(folder_of_file, source)) from error
    where = source if subfolder is None else f"{source} (subfolder {subfolder})"
    folder = Path(source) if subfolder is None else Path(source) / subfolder
    looks_local = Path(source).exists() or source.startswith((".", "/", "~"))
    _refuse_pickle(source)
    if looks_local and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: wanted a folder with {label}.")
    try:
        check_depth(read_config(source, subfolder) or {})
        return cls.from_pretrained(
            source, subfolder=subfolder or "", use_safetensors=True, **(options or {})
        )
    except Exception as error:  # an untrusted config may fail in any way
        hint = "" if looks_local else _HUB
        raise ValueError(f"Cannot load {label} from {where}: {reason(error)}{hint}") from error


def load_whole(
    cls: Any,
    source: str,
    subfolder: str | None,
    *,
    label: str,
    options: Mapping[str, Any] | None = None,
    spare: str | None = None,
) -> Any:
    """Load weights as `load_pretrained`, and refuse incomplete files.

    Args:
        cls: As in `load_pretrained`.
        source: As in `load_pretrained`.
        subfolder: As in `load_pretrained`.
        label: As in `load_pretrained`.
        options: As in `load_pretrained`.
        spare: Part of the names of tensors that may be missing.

    Raises:
        ValueError: The object cannot be loaded, or its weights are incomplete.
    """
    unloaded = SimpleNamespace(from_pretrained=partial(_from_config, cls))
    if is_weightless():
        return load_pretrained(unloaded, source, subfolder, label=label, options=options)
    if is_single_file(source):
        with torch.device("meta"):
            model = load_pretrained(unloaded, source, subfolder, label=label)
        dtype = (options or {}).get("torch_dtype", torch.float32)
        return _fill(model, source, str(subfolder), dtype)
    _check_filled(unloaded, source, subfolder, label, spare)
    all_options = {**(options or {}), "output_loading_info": True}
    model, info = load_pretrained(cls, source, subfolder, label=label, options=all_options)
    lacking = {name for name, weight in model.named_parameters() if weight.is_meta}
    lacking |= {str(name) for name in info["missing_keys"]}
    lacking = {name for name in lacking if spare is None or spare not in name}
    if lacking:
        raise ValueError(
            f"The weights in {source} lack {len(lacking)} of the tensors, such as {min(lacking)}: "
            "wanted weights that match its config."
        )
    return model


def _check_filled(
    unloaded: Any, source: str, subfolder: str | None, label: str, spare: str | None
) -> None:
    """Refuse a config whose network has more weights than its files, before memory is allocated.

    Raises:
        ValueError: The files have too few weights, or are not safetensors.
    """
    stems = ("diffusion_pytorch_model", "model")
    files = next((paths for stem in stems if (paths := find_weights(source, subfolder, stem))), [])
    if not files:
        return  # the library reports what is missing, and allocates nothing
    stored = sum(math.prod(shape) for path in files for shape in read_shapes(path).values())
    with torch.device("meta"):
        model = load_pretrained(unloaded, source, subfolder, label=label)
    needed = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if spare is None or spare not in name
    )
    if needed > 2 * stored:  # otherwise the library lists the missing tensors
        raise ValueError(
            f"The weights in {source} are {stored} numbers, but its config describes {label} of "
            f"{needed}: wanted weights that match its config."
        )


def check_depth(config: Mapping[str, Any]) -> None:
    """Refuse a config whose network would take extremely long to build.

    Raises:
        ValueError: The config has too many layers.
    """

    def largest(value: Any) -> int:
        if isinstance(value, list | tuple):
            return max((largest(item) for item in value), default=0)
        return value if type(value) is int else 0

    counts = {name: largest(value) for name, value in config.items() if "layer" in name}
    blocks = max(len(value) for value in [[0], *config.values()] if isinstance(value, list))
    deep = max(1, largest([n for name, n in counts.items() if name.startswith("transformer")]))
    deep = max(deep, counts.get("reverse_transformer_layers_per_block", 0))
    counts["layers in all blocks"] = blocks * max(1, counts.get("layers_per_block", 1)) * deep
    for name, count in counts.items():
        if count > _MAX_LAYERS:
            raise ValueError(f"its config has {name}={count:.3g}: wanted {_MAX_LAYERS} at most.")
    for value in config.values():
        if isinstance(value, Mapping):
            check_depth(value)


def _from_config(
    cls: Any,
    source: str,
    subfolder: str,
    use_safetensors: bool,
    torch_dtype: Any = None,
) -> Any:
    """Build a model like from_pretrained, without reading weights."""
    if hasattr(cls, "load_config"):  # diffusers
        model = cls.from_config(cls.load_config(source, subfolder=subfolder))
        return model if torch_dtype is None else nn.Module.to(model, torch_dtype)
    from transformers import AutoConfig, AutoModel

    if cls is AutoModel:
        config = AutoConfig.from_pretrained(source, subfolder=subfolder)
        return AutoModel.from_config(config, dtype=config.dtype)
    config = cls.config_class.from_pretrained(source, subfolder=subfolder)
    return cls._from_config(config, dtype=config.dtype)


def _refuse_pickle(source: str) -> None:
    if source.lower().endswith((".ckpt", ".pt", ".pth", ".bin")) and Path(source).is_file():
        raise ValueError(f"{source} is a pickle: convert it to .safetensors, or use a folder.")


def _fill(model: nn.Module, source: str, part: str, dtype: torch.dtype) -> nn.Module:
    """Load the weights of a single file into a model on the meta device."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(read_part(source, part, shapes, dtype), assign=True)
    for name, buffer in [*model.named_buffers()]:
        if buffer.is_meta:  # transformers' position ids, which are not in the state dict
            path, _, last = name.rpartition(".")
            assert last == "position_ids", name
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            model.get_submodule(path).register_buffer(last, positions, persistent=False)
    return model.eval()


def load_index(source: str) -> dict[str, Any]:
    """Read the model_index.json of a diffusers folder or hub id, which lists its parts.

    For a single file an equivalent index is returned.

    Raises:
        ValueError: There is no readable model_index.json.
    """
    from diffusers import DiffusionPipeline

    if is_single_file(source):
        return file_index(open_ldm_file(source))
    _refuse_pickle(source)
    if source.startswith((".", "/", "~")) and not Path(source).exists():
        raise ValueError(f"{source}: no such folder or checkpoint.")
    if Path(source).is_file():
        raise ValueError(
            f"{source} is not a model: wanted a .ckpt, a .safetensors file, a folder or a hub id."
        )
    if Path(source).exists() and not (Path(source) / "model_index.json").is_file():
        raise ValueError(f"{source} holds no model_index.json: wanted a diffusers folder.")
    try:
        index: Any = DiffusionPipeline.load_config(source)
    except Exception as error:  # an untrusted file may fail in any way
        hint = "" if Path(source).exists() else _HUB
        raise ValueError(
            f"Cannot read model_index.json of {source}: {reason(error)}{hint}"
        ) from error
    if not isinstance(index, Mapping):
        raise ValueError(f"Cannot read model_index.json of {source}: wanted an object.")
    return dict(index)


def find_file(source: str, subfolder: str | None, name: str) -> Path | None:
    """Find a file of a local folder, or of a hub id in the local cache, without network."""
    if Path(source).exists() or source.startswith((".", "/", "~")):
        path = Path(source, subfolder or "", name)
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(source, str(Path(subfolder or "", name)))
    return Path(cached) if isinstance(cached, str) else None


def fetch_file(source: str, name: str) -> Path | None:
    """Find an optional file of a local folder, or of a hub id, from which it is downloaded."""
    if Path(source).exists() or source.startswith((".", "/", "~")):
        return find_file(source, None, name)
    return _fetch_from_hub(source, name)


@cache  # without network, each attempt takes half a minute
def _fetch_from_hub(source: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        known = try_to_load_from_cache(source, name)
        if known is not None:  # a path, or a mark that the cached revision does not have the file
            return Path(known) if isinstance(known, str) else None
        return Path(hf_hub_download(source, name))
    except Exception:  # without it, or without network; whether the model is there, its parts tell
        return None


def find_weights(source: str, subfolder: str | None, stem: str) -> list[Path]:
    """Find STEM.safetensors, or the shards listed in its index; [] unless all exist.

    For a single file, that file is returned, which holds all parts.
    """
    if is_single_file(source):
        return [Path(source)]
    single = find_file(source, subfolder, f"{stem}.safetensors")
    if single is not None:
        return [single]
    index = find_file(source, subfolder, f"{stem}.safetensors.index.json")
    if index is None:
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise ValueError(f"{index} does not list the file of each tensor.")
    names = sorted({*weight_map.values()})
    shards = [find_file(source, subfolder, name) for name in names]
    return [path for path in shards if path is not None] if all(shards) else []


def map_weights(
    source: str, subfolder: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor] | None:
    """Open the memory-mapped weights of a model of diffusers.

    Args:
        source: A local folder, a single file in the ldm layout, or a hub id in the local cache.
        subfolder: Folder inside it; for a single file, the part of that name.
        shapes: Shapes of the model's weights by name.

    Returns:
        The weights by name. None = the files are not here, or name or shape them differently.

    Raises:
        ValueError: A file is damaged, or a single file does not match.
    """
    if is_single_file(source):
        return read_part(source, subfolder, shapes, None)
    weights: dict[str, Tensor] = {}
    for path in find_weights(source, subfolder, "diffusion_pytorch_model"):
        weights |= map_tensors(path)
    same = {name: tuple(weight.shape) for name, weight in weights.items()} == dict(shapes)
    return weights if same else None


def read_config(source: str, subfolder: str | None) -> dict[str, Any] | None:
    """Read config.json without entries that depend on the library's version or the location."""
    if is_single_file(source):
        config = part_config(open_ldm_file(source), str(subfolder))
    else:
        path = find_file(source, subfolder, "config.json")
        if path is None:
            return None
        config = read_json(path)
    return {k: v for k, v in config.items() if k != "transformers_version" and k[0] != "_"}


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def digest(paths: Sequence[Path]) -> str | None:
    """Hash the concatenated contents of files; None if there are no files."""
    content = hashlib.blake2b(digest_size=16)
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: content)
    return content.hexdigest() if paths else None
