"""A single .safetensors file in the ldm layout, read as if it were a diffusers folder.

The layout is that of the first Stable Diffusion releases: all parts in one file, distinguished by
the prefixes of their tensors' names. Other programs use it too, but it does not store settings:
they are those of the three public models, or those that this package wrote into the metadata. Files
are untrusted: settings are bounded, and the tensors must match them.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from zsnr.untrusted import clipped, open_regular, parse_object, shown

Family = Literal["v1", "v2", "xl"]

CONFIG = "zsnr.config"
ZEROS = "force_zeros_for_empty_prompt"
NAMES = {"v1": "Stable Diffusion 1", "v2": "Stable Diffusion 2", "xl": "Stable Diffusion XL"}
_MAX_TENSORS = 20_000  # Stable Diffusion XL has 2515
_MAX_CONFIG = 1 << 20

PREFIXES: dict[Family, dict[str, str]] = {
    "v1": {"text_encoder": "cond_stage_model.transformer."},
    "v2": {"text_encoder": "cond_stage_model.model."},
    "xl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
for _prefixes in PREFIXES.values():
    _prefixes.update({"unet": "model.diffusion_model.", "vae": "first_stage_model."})

_CLASSES: dict[str, dict[str, Any]] = {
    "unet": {"_class_name": "UNet2DConditionModel"},
    "vae": {"_class_name": "AutoencoderKL"},
    "text_encoder": {"model_type": "clip_text_model", "architectures": ["CLIPTextModel"]},
    "text_encoder_2": {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection"],
    },
}


def _unet(width: int, heads: int | list[int], linear: bool, size: int) -> dict[str, Any]:
    return {
        "sample_size": size,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "cross_attention_dim": width,
        "attention_head_dim": heads,
        "transformer_layers_per_block": 1,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "use_linear_projection": linear,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
    }


def _vae(scale: float, size: int) -> dict[str, Any]:
    return {
        "sample_size": size,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 32,
        "scaling_factor": scale,
        "shift_factor": None,
    }


def _text(width: int, layers: int, act: str, projection: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "projection_dim": projection,
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


# The settings of Stable Diffusion 1.5, 2.1 and XL 1.0. In 2.1, the last of the text encoder's 24
# layers is not used: its context is the penultimate hidden state.
PUBLIC: dict[Family, dict[str, dict[str, Any]]] = {
    "v1": {
        "unet": _unet(768, 8, False, 64),
        "vae": _vae(0.18215, 512),
        "text_encoder": _text(768, 12, "quick_gelu", 768),
    },
    "v2": {
        "unet": _unet(1024, [5, 10, 20, 20], True, 64),
        "vae": _vae(0.18215, 512),
        "text_encoder": _text(1024, 23, "gelu", 1024),
    },
    "xl": {
        "unet": {
            **_unet(2048, [5, 10, 20], True, 128),
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {**_vae(0.13025, 1024), "force_upcast": True},
        "text_encoder": _text(768, 12, "quick_gelu", 768),
        "text_encoder_2": _text(1280, 32, "gelu", 1280),
    },
}

TOKENIZERS: dict[Family, dict[str, str]] = {
    "v1": {"tokenizer": "clip"},
    "v2": {"tokenizer": "open_clip"},
    "xl": {"tokenizer": "clip", "tokenizer_2": "open_clip"},
}


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= 1 << 20


def _is_depth(value: object) -> bool:
    return type(value) is int and 1 <= value <= 1000


def _is_token(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value <= 1 << 20)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast(float, value))


def _is_epsilon(value: object) -> bool:
    return type(value) is float and 0 < value < 1


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _one_of(*known: object) -> Callable[[object], bool]:
    return lambda value: isinstance(value, str | None) and value in known


def _listed(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, list) and 1 <= len(value) <= 16 and all(map(check, value))
    )


def _either(*checks: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: any(check(value) for check in checks)


_is_none = _one_of(None)
_TEXT_SETTINGS: dict[str, Callable[[object], bool]] = {
    "hidden_size": _is_size,
    "intermediate_size": _is_size,
    "num_hidden_layers": _is_depth,
    "num_attention_heads": _is_size,
    "max_position_embeddings": _is_size,
    "vocab_size": _is_size,
    "projection_dim": _is_size,
    "hidden_act": _one_of("quick_gelu", "gelu", "gelu_new", "relu", "silu"),
    "layer_norm_eps": _is_epsilon,
    "bos_token_id": _is_token,
    "eos_token_id": _is_token,
    "pad_token_id": _is_token,
}
# Allowed settings of each part; other settings have the default of their class.
SETTINGS: dict[str, dict[str, Callable[[object], bool]]] = {
    "unet": {
        "sample_size": _either(_is_none, _is_size),
        "in_channels": _is_size,
        "out_channels": _is_size,
        "block_out_channels": _listed(_is_size),
        "layers_per_block": _is_depth,
        "down_block_types": _listed(_one_of("CrossAttnDownBlock2D", "DownBlock2D")),
        "up_block_types": _listed(_one_of("CrossAttnUpBlock2D", "UpBlock2D")),
        "cross_attention_dim": _is_size,
        "attention_head_dim": _either(_is_size, _listed(_is_size)),
        "transformer_layers_per_block": _either(_is_depth, _listed(_is_depth)),
        "norm_num_groups": _is_size,
        "norm_eps": _is_epsilon,
        "use_linear_projection": _is_flag,
        "upcast_attention": _either(_is_none, _is_flag),
        "addition_embed_type": _one_of(None, "text_time"),
        "addition_time_embed_dim": _either(_is_none, _is_size),
        "projection_class_embeddings_input_dim": _either(_is_none, _is_size),
    },
    "vae": {
        "sample_size": _either(_is_none, _is_size),
        "in_channels": _is_size,
        "out_channels": _is_size,
        "latent_channels": _is_size,
        "block_out_channels": _listed(_is_size),
        "layers_per_block": _is_depth,
        "down_block_types": _listed(_one_of("DownEncoderBlock2D")),
        "up_block_types": _listed(_one_of("UpDecoderBlock2D")),
        "norm_num_groups": _is_size,
        "scaling_factor": lambda value: _is_number(value) and value != 0,
        "shift_factor": _either(_is_none, _is_number),
        "force_upcast": _is_flag,
    },
    "text_encoder": _TEXT_SETTINGS,
    "text_encoder_2": _TEXT_SETTINGS,
}


@dataclass(frozen=True)
class LdmFile:
    """The header of a single file.

    Attributes:
        path: Path of the file.
        family: Public model whose layout the file has.
        shapes: Shapes of the tensors by their names in the file.
        metadata: Free text by name.
        config: Validated settings that this package wrote; {} in files of other programs.
    """

    path: Path
    family: Family
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    config: dict[str, Any]


def is_single_file(source: str) -> bool:
    """Whether a model's name is a single file rather than a folder or a hub id."""
    return source.lower().endswith(".safetensors") and not Path(source).is_dir()


def default_part(source: str, subfolder: str | None, part: str) -> str | None:
    """Return `subfolder`, or `part` if it is None and `source` is a file, which holds all parts."""
    return part if subfolder is None and is_single_file(source) else subfolder


def open_ldm_file(source: str | Path) -> LdmFile:
    """Read the header of a single file.

    Raises:
        ValueError: The file does not exist, is not a safetensors file, or is not a Stable Diffusion
            model in the ldm layout.
    """
    path = Path(source)
    with _opened(path) as file:
        shapes = _shapes(path, file)
        metadata = file.metadata() or {}
    family = _family(path, shapes)
    return LdmFile(path, family, shapes, metadata, _stored_config(path, family, metadata))


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a file's tensors by their names.

    Raises:
        ValueError: The file does not exist, or is not a safetensors file.
    """
    with _opened(path) as file:
        return _shapes(path, file)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Open a file's tensors by their names, memory-mapped.

    Raises:
        ValueError: The file does not exist, or is not a safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in _shapes(path, file)}


def part_config(file: LdmFile, part: str) -> dict[str, Any]:
    """Return a part's settings in the form of a config.json.

    Raises:
        ValueError: The file does not have the part, or its settings are inconsistent.
    """
    prefix = PREFIXES[file.family].get(part)
    if prefix is None or not any(name.startswith(prefix) for name in file.shapes):
        raise ValueError(f"{file.path} holds no {part}: no tensor's name starts with {prefix!r}.")
    settings = file.config.get(part) or PUBLIC[file.family][part]
    _check_settings(file, part, settings)
    _bound_work(file, part, settings)
    return {**_CLASSES[part], **settings}


def part_tokenizer(file: LdmFile, part: str) -> tuple[str, int]:
    """Return the name of a part's tokenizer ("clip" or "open_clip") and its maximum length."""
    stored = file.config.get(part)
    if stored is not None:
        return stored["name"], stored["max_length"]
    return TOKENIZERS[file.family][part], 77


def file_index(file: LdmFile) -> dict[str, Any]:
    """Return the file's parts in the form of a model_index.json."""
    xl = file.family == "xl"
    pipeline = f"StableDiffusion{'XL' if xl else ''}Pipeline"
    index: dict[str, Any] = {"_class_name": pipeline}
    for part in PUBLIC[file.family]:
        kind = _CLASSES[part]
        architectures = kind.get("architectures")
        index[part] = (
            ["transformers", architectures[0]]
            if architectures
            else ["diffusers", kind["_class_name"]]
        )
    if xl:
        index[ZEROS] = file.config.get(ZEROS, True)
    return index


@contextmanager
def config_folder(source: str, part: str) -> Iterator[str]:
    """Write a part's config.json to a temporary folder, for libraries that read folders.

    Raises:
        ValueError: As in `part_config`.
    """
    config = part_config(open_ldm_file(source), part)
    with tempfile.TemporaryDirectory(prefix="zsnr-") as folder:
        Path(folder, part).mkdir()
        Path(folder, part, "config.json").write_text(json.dumps(config))
        yield folder


def read_part(
    source: str, part: str, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Read a part's weights under diffusers' or transformers' names.

    Args:
        source: The file.
        part: "unet", "vae", "text_encoder" or "text_encoder_2".
        expected: Shapes of the weights in the part's model, by name.
        dtype: Data type of the result. None = as in the file, whose tensors are memory-mapped.

    Raises:
        ValueError: The file's tensors do not match; no weights are read in this case.
    """
    file = open_ldm_file(source)
    config, prefix = part_config(file, part), PREFIXES[file.family][part]
    shapes = {name: shape for name, shape in file.shapes.items() if name.startswith(prefix)}
    with torch.device("meta"):
        empty = {name: torch.empty(shape) for name, shape in shapes.items()}
    converted = _convert(file, part, config, empty, expected)
    _compare(file, part, {name: tuple(t.shape) for name, t in converted.items()}, expected)
    if part == "unet" and len(converted) < len(shapes):
        raise ValueError(
            f"{file.path} has {len(shapes)} tensors in its UNet, but {NAMES[file.family]} has "
            f"{len(converted)}: it is another model."
        )
    with _opened(file.path) as opened:
        tensors = {name: opened.get_tensor(name) for name in shapes}
        if dtype is not None:  # copied, because truncating a mapped file would kill the process
            tensors = {name: weight.to(dtype, copy=True) for name, weight in tensors.items()}
    return {
        name: tensor.contiguous()
        for name, tensor in _convert(file, part, config, tensors, expected).items()
    }


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise ValueError(f"{path}: no such file.")
    with open_regular(path):
        pass  # it is a regular file
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, UnicodeError) as error:
        reason = clipped(str(error).strip() or repr(error))
        raise ValueError(f"{path} is not a readable .safetensors file: {reason}") from error


def _shapes(path: Path, file: Any) -> dict[str, tuple[int, ...]]:
    names = file.keys()
    if len(names) > _MAX_TENSORS:
        raise ValueError(f"{path} has {len(names)} tensors: wanted at most {_MAX_TENSORS}.")
    return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def _family(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Family:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    others = any("double_blocks." in name or "joint_blocks." in name for name in shapes)
    if others or not (has("model.diffusion_model.") or has("first_stage_model.")):
        raise ValueError(f"{path} is not a single-file Stable Diffusion model: {_instead(shapes)}.")
    first = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    if first is not None and len(first) == 4 and first[1] > 4:
        raise ValueError(
            f"{path}: its UNet has {first[1]} input channels, as in models for inpainting and "
            "editing. Wanted a text-to-image model."
        )
    if has("conditioner.embedders.1.model."):
        return "xl"
    if has("conditioner."):
        raise ValueError(f"{path} is a refiner or another model: wanted the SDXL base model.")
    if has("cond_stage_model.model."):
        return "v2"
    if has("cond_stage_model.transformer."):
        return "v1"
    widths = {s[-1] for n, s in shapes.items() if n.endswith(".attn2.to_k.weight") and s}
    by_width: dict[int, Family] = {768: "v1", 1024: "v2", 2048: "xl"}
    families = [by_width[width] for width in widths if width in by_width]
    if len(families) != 1 or len(widths) != 1:
        raise ValueError(
            f"{path} has no text encoder, and its UNet's cross-attention has width "
            f"{sorted(widths)}: wanted 768, 1024 or 2048, as in Stable Diffusion 1, 2 and XL."
        )
    return families[0]


def _instead(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if any(".lora_" in name or name.startswith("lora_") for name in shapes):
        return "it is a LoRA: use the model that it was trained on"
    if any(name.startswith(("down_blocks.", "decoder.", "encoder.")) for name in shapes):
        return "it holds only one part. Use the diffusers folder that it is from"
    if any("text_model." in name for name in shapes):
        return "it holds only a text encoder. Use the diffusers folder that it is from"
    if any("double_blocks." in name or "joint_blocks." in name for name in shapes):
        return "it is a transformer, trained by flow matching"
    return "no tensor's name starts with 'model.diffusion_model.'"


def read_metadata(
    path: Path, metadata: Mapping[str, str], name: str
) -> tuple[str, dict[str, Any] | None]:
    """Read a JSON object in the metadata of a file.

    Returns:
        What errors call it; and the object, or None if there is none.

    Raises:
        ValueError: It is not a JSON object, or is too long.
    """
    label, text = f"{path}: {name!r} in its metadata", metadata.get(name)
    if text is None:
        return label, None
    if len(text) > _MAX_CONFIG:
        raise ValueError(f"{label} has {len(text)} characters.")
    return label, parse_object(text.encode(), label)


def _stored_config(path: Path, family: Family, metadata: Mapping[str, str]) -> dict[str, Any]:
    label, config = read_metadata(path, metadata, CONFIG)
    if config is None:
        return {}
    if config.get("format") != 1:
        raise ValueError(f"{label} has a format that this version of zsnr cannot read.")
    for part, public in PUBLIC[family].items():
        settings = config.get(part)
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise ValueError(f"{label}: {part} is {shown(settings)}: wanted settings by name.")
        for name in sorted(public.keys() - settings.keys()):
            raise ValueError(f"{label} lacks {part}.{name}.")
        for name, value in settings.items():
            check = SETTINGS[part].get(name)
            if check is None or not check(value):
                raise ValueError(
                    f"{label} has {part}.{shown(name)[1:-1]}={shown(value)}: wanted settings of a "
                    "Stable Diffusion model."
                )
    if type(config.get(ZEROS, True)) is not bool:
        raise ValueError(f"{label}: {ZEROS}: wanted true or false.")
    for part in TOKENIZERS[family]:
        settings = config.get(part)
        if settings is not None and not (
            isinstance(settings, dict)
            and settings.keys() == {"name", "max_length"}
            and settings["name"] in ("clip", "open_clip")
            and type(settings["max_length"]) is int
            and 2 <= settings["max_length"] <= 1000
        ):
            raise ValueError(f"{label}: {part} is {shown(settings)}: wanted name and max_length.")
    return config


def _check_settings(file: LdmFile, part: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that contradict each other."""
    if part.startswith("text"):
        tokenizer = file.config.get(part.replace("text_encoder", "tokenizer"))
        longest = settings["max_position_embeddings"]
        fit = settings["hidden_size"] % settings["num_attention_heads"] == 0
        fit = fit and (tokenizer is None or tokenizer["max_length"] <= longest)
        fit = fit and settings["vocab_size"] >= 49408  # of CLIP's BPE
    else:
        blocks = len(settings["block_out_channels"])
        fit = all(len(value) == blocks for value in settings.values() if isinstance(value, list))
        groups = settings["norm_num_groups"]
        fit = fit and all(size % groups == 0 for size in settings["block_out_channels"])
    if not fit:
        raise ValueError(f"{file.path}: the settings of its {part} contradict each other.")


def _bound_work(file: LdmFile, part: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings with more layers than the file has tensors, which cannot belong to it."""
    if part.startswith("text"):
        layers = settings["num_hidden_layers"]
    else:
        blocks = len(settings["block_out_channels"])
        inner = settings.get("transformer_layers_per_block", 1)
        per_block = inner if isinstance(inner, list) else [inner] * blocks
        layers = settings["layers_per_block"] * sum(per_block)
    tensors = sum(name.startswith(PREFIXES[file.family][part]) for name in file.shapes)
    if layers > tensors:
        raise ValueError(f"{file.path}: its {part} has {tensors} tensors for {layers} layers.")


def _convert(
    file: LdmFile,
    part: str,
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """Rename tensors with the conversion rules of diffusers."""
    from diffusers.loaders import single_file_utils as rules

    try:
        if part == "unet":
            converted = rules.convert_ldm_unet_checkpoint(tensors, dict(config))
        elif part == "vae":
            converted = rules.convert_ldm_vae_checkpoint(tensors, dict(config))
        elif PREFIXES[file.family][part].endswith(".transformer."):
            converted = rules.convert_ldm_clip_checkpoint(tensors)
        else:
            size = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
            prefix = PREFIXES[file.family][part]
            converted = rules.convert_open_clip_checkpoint(size, tensors, prefix=prefix)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"{file.path}: its {part}'s tensors are not named as in {NAMES[file.family]}: {reason}"
        ) from error
    if any(tensor is None for tensor in converted.values()):
        raise ValueError(f"{file.path}: its {part} lacks tensors of {NAMES[file.family]}.")
    if not part.startswith("text"):
        return cast(dict[str, Tensor], converted)
    # Releases of transformers differ in this prefix; files may hold unused tensors.
    plain = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
    renamed = {name: plain.get(name.removeprefix("text_model.")) for name in expected}
    return {name: tensor for name, tensor in renamed.items() if tensor is not None}


def _compare(
    file: LdmFile,
    part: str,
    actual: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    kind = NAMES[file.family] if part not in file.config else "its metadata"
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) == actual.get(name):
            continue
        have = f"has shape {actual[name]}" if name in actual else "is missing"
        want = f"{expected[name]} wanted" if name in expected else "not wanted"
        raise ValueError(f"{file.path}: its {part} does not match {kind}: {name} {have}, {want}.")
