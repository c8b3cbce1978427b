"""Pretrained models in a folder, a file or on the hub: loading parts, finding and hashing files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zsnr.untrusted import clipped, read_json
from zsnr.weights.header import map_tensors, read_header
from zsnr.weights.ldm_file import (
    PREFIXES,
    config_folder,
    file_index,
    open_ldm_file,
    part_config,
    read_part,
)
from zsnr.weights.source import (
    WEIGHT_STEMS,
    find_file,
    find_variant,
    find_weights,
    is_local,
    is_single_file,
    local_path,
)

_MAX_LAYERS = 1000
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


_PRECISIONS = {
    **dict.fromkeys(("float32", "fp32", "full", "32"), torch.float32),
    **dict.fromkeys(("float16", "fp16", "half", "16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}
_DTYPE: ContextVar[torch.dtype | None] = ContextVar("dtype", default=None)


def as_dtype(dtype: torch.dtype | str, name: str = "dtype") -> torch.dtype:
    """Return the torch dtype that a dtype, or a name such as "float16" or "bf16", stands for.

    Raises:
        ValueError: It is not one that weights are computed in.
    """
    found = _PRECISIONS.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"{name}={dtype!r} is unknown. Known: float32, float16, bfloat16.")
    return found


@contextmanager
def loading_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Load networks and text encoders in one data type, instead of that of their files."""
    token = _DTYPE.set(dtype)
    try:
        yield
    finally:
        _DTYPE.reset(token)


def stored_dtype(source: str, subfolder: str) -> torch.dtype:
    """Return the data type that most weights of a part have in their files; float32 if unknown."""
    prefix = ""
    if is_single_file(source):
        file = open_ldm_file(source)
        prefix = PREFIXES[file.family].get(subfolder, "")
    local_path(source, subfolder)  # a hub id that is not in the cache is downloaded
    counts: Counter[str] = Counter()
    for path in (p for stem in WEIGHT_STEMS for p in find_weights(source, subfolder, stem)):
        header = read_header(path)
        for name, shape in header.shapes.items():
            if name.startswith(prefix):
                counts[header.dtypes[name]] += math.prod(shape)
    most = counts.most_common(1)
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(
        most[0][0] if most else "", torch.float32
    )


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
    _refuse_pickle(source)
    root = local_path(source, subfolder)
    assert root is not None
    folder = root / (subfolder or "")
    if not (folder / "config.json").is_file():
        shown_folder = folder if is_local(source) else where
        raise ValueError(f"{shown_folder} holds no config.json: wanted a folder with {label}.")
    try:
        check_depth(read_config(source, subfolder) or {})
        return cls.from_pretrained(
            str(root.absolute()),  # a relative path could be taken for a hub id
            subfolder=subfolder or "",
            use_safetensors=True,
            **_loading_options(cls, source, subfolder),
            **(options or {}),
        )
    except Exception as error:  # an untrusted config may fail in any way
        raise ValueError(f"Cannot load {label} from {where}: {reason(error)}") from error


def _loading_options(cls: Any, source: str, subfolder: str | None) -> dict[str, Any]:
    """Return what from_pretrained needs: the only variant that exists, and no code of others."""
    if isinstance(cls, SimpleNamespace):
        return {}
    options: dict[str, Any] = {}
    if cls.__module__.partition(".")[0] == "transformers":
        options["trust_remote_code"] = False
    variant = find_variant(source, subfolder)
    return options if variant is None else {**options, "variant": variant}


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
    dtype = _DTYPE.get()
    if dtype is not None:
        of_transformers = cls.__module__.partition(".")[0] == "transformers"
        options = {"dtype" if of_transformers else "torch_dtype": dtype, **(options or {})}
    unloaded = SimpleNamespace(from_pretrained=partial(_from_config, cls))
    if is_weightless():
        return load_pretrained(unloaded, source, subfolder, label=label, options=options)
    if is_single_file(source):
        with torch.device("meta"):
            model = load_pretrained(unloaded, source, subfolder, label=label)
        _fill(model, source, str(subfolder), _dtype_of(options))
        check_finite(source, label, model.named_parameters())
        return model
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
    _refuse_left_out(source, label, map(str, info["unexpected_keys"]))
    check_finite(source, label, model.named_parameters())
    return model


def _dtype_of(options: Mapping[str, Any] | None) -> torch.dtype:
    options = options or {}
    dtype: torch.dtype = options.get("torch_dtype", options.get("dtype", torch.float32))
    return dtype


# What a file may hold beside the part that is read: the other half of CLIP, T5 or BERT.
_IDLE = re.compile(
    r"(vision_model|visual_projection|visual|decoder|lm_head|cls|pooler|text_projection)\b.*"
    r"|(.*\.)?(position_ids|logit_scale)"
)


def _refuse_left_out(source: str, label: str, names: Iterable[str]) -> None:
    """Refuse weights that the library leaves out although they change the result.

    Raises:
        ValueError: The file holds such weights.
    """
    unknown = sorted(name for name in names if _IDLE.fullmatch(name) is None)
    if unknown:
        raise ValueError(
            f"{source} holds {len(unknown)} tensors that {label} of its config does not have, such "
            f"as {unknown[0]}: they would be left out. Wanted weights that match its config."
        )


def check_finite(source: str, label: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse weights with inf or NaN, which would only generate black images.

    Raises:
        ValueError: A weight is not finite.
    """
    for name, weight in weights:
        if weight.is_meta or not weight.is_floating_point() or not weight.numel():
            continue
        if not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            if weight.dtype == torch.float16:
                raise ValueError(
                    f"The weights of {label} in {source} are not finite in float16 ({name}): use "
                    "bfloat16 or float32, or another file if it is broken."
                )
            raise ValueError(
                f"The weights of {label} in {source} are not finite: the file is broken ({name}). "
                "Download or export it again."
            )


def _check_filled(
    unloaded: Any, source: str, subfolder: str | None, label: str, spare: str | None
) -> None:
    """Refuse a config whose network has more weights than its files, before memory is allocated.

    Raises:
        ValueError: The files have too few weights, are incomplete, or are not safetensors.
    """
    with torch.device("meta"):
        model = load_pretrained(unloaded, source, subfolder, label=label)
    root = str(local_path(source, subfolder))
    files = next(
        (paths for stem in WEIGHT_STEMS if (paths := find_weights(root, subfolder, stem))), []
    )
    if not files:
        where = source if subfolder is None else f"{source} (subfolder {subfolder})"
        raise ValueError(
            f"{where} holds no complete weights of {label}: wanted "
            f"{' or '.join(f'{stem}.safetensors' for stem in WEIGHT_STEMS)}, or all shards of it. "
            "Pickles (.bin) are never opened."
        )
    stored = sum(math.prod(shape) for path in files for shape in read_header(path).shapes.values())
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
    dtype: Any = None,
) -> Any:
    """Build a model like from_pretrained, without reading weights."""
    if hasattr(cls, "load_config"):  # diffusers
        model = cls.from_config(cls.load_config(source, subfolder=subfolder))
        return model if torch_dtype is None else nn.Module.to(model, torch_dtype)
    from transformers import AutoConfig, AutoModel

    if cls is AutoModel:
        config = AutoConfig.from_pretrained(source, subfolder=subfolder, trust_remote_code=False)
        return AutoModel.from_config(config, dtype=dtype or config.dtype, trust_remote_code=False)
    config = cls.config_class.from_pretrained(source, subfolder=subfolder)
    return cls._from_config(config, dtype=dtype or config.dtype)


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
    root = local_path(source)
    assert root is not None
    if not root.exists():
        raise ValueError(f"{source}: no such folder or checkpoint.")
    if root.is_file():
        raise ValueError(
            f"{source} is not a model: wanted a .ckpt, a .safetensors file, a folder or a hub id."
        )
    if not (root / "model_index.json").is_file():
        raise ValueError(f"{source} holds no model_index.json: wanted a diffusers folder.")
    try:
        index: Any = DiffusionPipeline.load_config(str(root))
    except Exception as error:  # an untrusted file may fail in any way
        raise ValueError(f"Cannot read model_index.json of {source}: {reason(error)}") from error
    if not isinstance(index, Mapping):
        raise ValueError(f"Cannot read model_index.json of {source}: wanted an object.")
    return dict(index)


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
    for path in find_weights(source, subfolder, WEIGHT_STEMS[0]):
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
