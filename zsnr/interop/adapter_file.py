"""Adapter files of any program: which tensors adapt which layer, and what else the file says.

The layouts of kohya's scripts, LyCORIS, OneTrainer, ComfyUI, diffusers (today's and earlier ones)
and peft are told apart tensor by tensor: the end of a tensor's name says which factor it is, the
rest which layer it belongs to. Files are untrusted; only the header is read here.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from zsnr.interop.declarations import Declaration, read_declaration
from zsnr.untrusted import clipped, parse_object, read_json, shown
from zsnr.weights.header import Header

T = TypeVar("T")
ADAPTER_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_PEFT_CONFIG = "adapter_config.json"
_DIFFUSERS_CONFIG = "lora_adapter_metadata"
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# The part of an adapter that a tensor is, by the end of its name; "default" is peft's name of a
# single adapter.
_PARTS = {
    "down": r"\.lora_(?:down|A(?:\.default)?)\.weight|[._]lora(?:_linear_layer)?\.down\.weight",
    "up": r"\.lora_(?:up|B(?:\.default)?)\.weight|[._]lora(?:_linear_layer)?\.up\.weight",
    "mid": r"\.lora_mid\.weight",
    "up_bias": r"\.lora_B(?:\.default)?\.bias",
    "magnitude": r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?",
    "dora_scale": r"\.dora_scale",
    "alpha": r"\.alpha",
    **{name: rf"\.{name}" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: rf"\.{name}" for name in ("hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b")},
    **{name: rf"\.{name}" for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    "diff": r"\.diff|\.w_norm",
    "diff_bias": r"\.diff_b|\.b_norm",
}
_END = re.compile("|".join(f"(?P<{part}>(?:{pattern})$)" for part, pattern in _PARTS.items()))
_ASIDE = {"alpha", "dora_scale", "magnitude", "up_bias", "diff_bias"}  # of the parts of a weight
_HADA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_COMPLETE = (
    frozenset({"down", "up"}),
    frozenset({"down", "up", "mid"}),
    _HADA,
    _HADA | {"hada_t1", "hada_t2"},
    *(
        frozenset({*first, *second})
        for first, second in product(
            (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")),
            (
                ("lokr_w2",),
                ("lokr_w2_a", "lokr_w2_b"),
                ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            ),
        )
    ),
    frozenset({"diff"}),
)
_UNSUPPORTED = {  # kinds of adapters, by a part of a tensor's name
    "OFT": "oft_|boft_",
    "IA3": r"\.on_input$|ia3_l",
    "GLoRA": r"\.(?:[ab][12]|bm[12])\.weight$",
    "VeRA": "vera_lambda",
    "embedding": "lora_embedding_",
}
_IDLE = ("v_pred", "ztsnr")  # read as declarations
_EMBEDDINGS = "bundle_emb."
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these change the base's weights too


@dataclass(frozen=True)
class AdapterConfig:
    """What a config beside the tensors says of alpha and rank; None = it does not say.

    Attributes:
        alpha: alpha of alpha / rank.
        rank: Rank, where the shapes do not tell it.
        by_square_root: Whether alpha is divided by the square root of the rank (rsLoRA).
        alphas: Other values of alpha, by the end of the layer's name.
        ranks: Other ranks, by the end of the layer's name.
        encodes: For a config of peft, the class of the adapted model.
    """

    alpha: float | None = None
    rank: int | None = None
    by_square_root: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    encodes: str | None = None

    def alpha_of(self, layer: str) -> float | None:
        """Return alpha of a layer."""
        return _by_end(self.alphas, layer, self.alpha)

    def rank_of(self, layer: str) -> int | None:
        """Return the rank of a layer."""
        return _by_end(self.ranks, layer, self.rank)


@dataclass(frozen=True)
class AdapterFile:
    """The header of an adapter's file.

    Attributes:
        path: Path of the file.
        name: Name of the file, or of the folder that holds it under a standard name.
        header: Names and shapes of the tensors.
        declaration: What the file declares about itself.
        layers: Names of the tensors by part, for each layer by its name in the file.
        configs: What configs say, by the prefix of the layers they are about; "" = all others.
        idle: Names of tensors that have no effect on images.
    """

    path: Path
    name: str
    header: Header
    declaration: Declaration
    layers: dict[str, dict[str, str]]
    configs: dict[str, AdapterConfig]
    idle: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What the file holds, such as "LoRA"."""
        return self.declaration.adapter or "adapter"

    def config_of(self, layer: str) -> tuple[AdapterConfig, str]:
        """Return the config of a layer, and the layer's name in it."""
        prefix, _, rest = layer.partition(".")
        if prefix in self.configs:
            return self.configs[prefix], rest
        return self.configs.get("", AdapterConfig()), layer


def parse_lora(text: str) -> tuple[str, float]:
    """Read FILE or FILE:SCALE; a drive or a colon in the path is part of it.

    Raises:
        ValueError: There is no such file, or the scale is not a finite number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    try:
        scale = float(number)
    except ValueError:
        if path and Path(path).expanduser().exists():
            raise ValueError(
                f"{text}: {number!r} is not a number: wanted FILE or FILE:SCALE, such as {path}:0.8"
            ) from None
        return text, 1.0
    check_scale(scale, text)
    return path, scale


def read_loras(texts: Sequence[str]) -> list[tuple[AdapterFile, float]]:
    """Open the adapters of FILE or FILE:SCALE, before a model is loaded.

    Raises:
        ValueError: As in `parse_lora` and `open_adapter`.
    """
    return [(open_adapter(path), scale) for path, scale in map(parse_lora, texts)]


def check_scale(scale: float, what: str) -> None:
    """Refuse a scale that is not a finite number.

    Raises:
        ValueError: It is not.
    """
    real = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not real or not math.isfinite(scale):
        raise ValueError(f"{what}: the scale is {shown(scale)}: wanted a finite number.")


def open_adapter(path: str | Path) -> AdapterFile:
    """Read the header of an adapter.

    Args:
        path: A .safetensors file, or a folder of peft or diffusers that holds one.

    Raises:
        ValueError: The file is not readable, not an adapter, of a kind that cannot be merged, or
            incomplete.
    """
    given = Path(path).expanduser()
    path = _find(given)
    header, declaration = read_declaration(path)
    layers: dict[str, dict[str, str]] = {}
    idle = []
    for name in sorted(header.shapes):
        if name in _IDLE or name.startswith(_EMBEDDINGS):
            idle.append(name)
            continue
        end = _END.search(name)
        if end is None or end.lastgroup is None or not end.start():
            raise ValueError(f"{path}{_not_an_adapter(name, declaration)}")
        layer = layers.setdefault(_layer(name[: end.start()]), {})
        if end.lastgroup in layer:
            raise ValueError(
                f"{path}: {layer[end.lastgroup]} and {name} both adapt one layer: wanted one of "
                "them."
            )
        layer[end.lastgroup] = name
    if not layers:
        raise ValueError(f"{path} holds no adapter: it has {len(header.shapes)} tensors.")
    for layer in layers.values():
        _check_parts(path, header, layer)
    configs = _configs(path, header, layers)
    named = path.parent if given.is_dir() or path.name in ADAPTER_NAMES else path
    return AdapterFile(
        path, named.resolve().name, header, declaration, layers, configs, tuple(idle)
    )


def _find(path: Path) -> Path:
    """Return the file itself, or the adapter's file in a folder."""
    if path.suffix.lower() in (".bin", ".pt", ".ckpt", ".pth"):
        raise ValueError(f"{path} is a pickle: convert it to .safetensors.")
    if not path.is_dir():
        return path
    names = sorted(file.name for file in path.glob("*.safetensors"))
    standard = [name for name in ADAPTER_NAMES if name in names]
    if standard or len(names) == 1:
        return path / (standard or names)[0]
    held = ", ".join(names[:5]) or "none"
    raise ValueError(
        f"{path} is a folder without {' or '.join(ADAPTER_NAMES)} (.safetensors files: {held}): "
        "name the adapter's file."
    )


def _layer(name: str) -> str:
    """Return a layer's name without what earlier layouts and peft add to it."""
    name = re.sub(r"(^|\.)base_model\.model\.", r"\1", name).replace(".processor.", ".")
    name = re.sub(r"\.to_(q|k|v|out)_lora$", r".to_\1", name)
    if ".self_attn.to_" in name:  # an earlier layout's names of a text encoder's projections
        return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    return f"{name}.0" if name.endswith(".to_out") else name


def _not_an_adapter(name: str, declaration: Declaration) -> str:
    for kind, pattern in _UNSUPPORTED.items():
        if declaration.adapter == kind or re.search(pattern, name):
            return (
                f": {kind} adapters, as {name} is a part of, are not supported: merge it with the "
                "program that made it, and load the merged model."
            )
    if declaration.adapter is None:
        return f" is not an adapter: {name} is not a part of one. Load it as the model."
    return f": {name} is not a known part of an adapter: merge it with the program that made it."


def _check_parts(path: Path, header: Header, layer: Mapping[str, str]) -> None:
    """Refuse a layer whose tensors do not belong together, or are not numbers to multiply.

    Raises:
        ValueError: It is such a layer.
    """
    parts = layer.keys() - _ASIDE
    first = min(layer[part] for part in (parts or layer))
    if parts not in _COMPLETE and layer.keys() != {"diff_bias"}:
        larger = [sorted(complete - parts) for complete in _COMPLETE if complete > parts]
        if not larger:
            raise ValueError(f"{path}: {first} and its partners are of different adapters.")
        lacking: list[str] = min(larger, key=len)
        raise ValueError(
            f"{path}: {first} has no partner ({', '.join(lacking)}): the file is incomplete."
        )
    wrong = {"magnitude", "up_bias"} & layer.keys() if "down" not in parts else set()
    wrong |= {"alpha", "dora_scale"} & layer.keys() if parts <= {"diff"} else set()
    wrong |= (
        {"magnitude", "dora_scale", "diff_bias"} & layer.keys() if "up_bias" in layer else set()
    )
    wrong |= {"magnitude"} & layer.keys() if "dora_scale" in layer else set()
    if wrong:
        raise ValueError(f"{path}: {layer[min(wrong)]} does not belong to {first}.")
    for part, name in layer.items():
        if part == "alpha" and math.prod(header.shapes[name]) != 1:
            raise ValueError(f"{path}: {name} has shape {header.shapes[name]}: wanted one number.")
        if part != "alpha" and header.dtypes[name] not in _FLOATS:
            raise ValueError(
                f"{path}: {name} has values of type {header.dtypes[name]}: wanted one of "
                f"{', '.join(_FLOATS)}."
            )
        if part != "alpha" and 0 in header.shapes[name]:
            raise ValueError(f"{path}: {name} is empty: it has shape {header.shapes[name]}.")


def _configs(
    path: Path, header: Header, layers: Mapping[str, Mapping[str, str]]
) -> dict[str, AdapterConfig]:
    """Read peft's config beside the file, or that of diffusers in the metadata."""
    beside = path.parent / _PEFT_CONFIG
    if any("base_model.model." in name for parts in layers.values() for name in parts.values()):
        if beside.is_file():
            return {"": _config(beside, read_json(beside))}
        if not any("alpha" in parts for parts in layers.values()):
            warnings.warn(
                f"{path} is an adapter of peft without {_PEFT_CONFIG} beside it, which says alpha: "
                "alpha = rank is taken.",
                stacklevel=3,
            )
        return {}
    if path.name == ADAPTER_NAMES[0] and beside.is_file():
        return {"": _config(beside, read_json(beside))}
    text = header.metadata.get(_DIFFUSERS_CONFIG)
    if text is None:
        return {}
    values = parse_object(text.encode(), f"{path}: {_DIFFUSERS_CONFIG}")
    by_prefix: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        prefix, dot, rest = name.partition(".")
        by_prefix.setdefault(prefix if dot else "", {})[rest if dot else name] = value
    return {prefix: _config(path, values) for prefix, values in by_prefix.items()}


def _config(path: Path, values: Mapping[str, Any]) -> AdapterConfig:
    """Check a config of peft, and read what the tensors do not say.

    Raises:
        ValueError: A value is of the wrong type, or the adapter does not hold the whole change.
    """
    kind = values.get("peft_type", "LORA")
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise ValueError(
            f"{path}: peft_type={shown(kind)}: wanted LORA, LOHA or LOKR. Merge it with the "
            "program that made it."
        )
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        raise ValueError(
            f"{path}: init_lora_weights={shown(start)} changes the base's weights as well, which "
            "the file does not hold: convert it to a plain LoRA with peft "
            "(path_initial_model_for_weight_conversion)."
        )
    alpha = values.get("lora_alpha" if kind == "LORA" else "alpha")
    wrapped = values.get("auto_mapping")
    encodes = wrapped.get("base_model_class") if isinstance(wrapped, Mapping) else None
    rank = values.get("r")
    return AdapterConfig(
        None if alpha is None else _number(path, "alpha", alpha),
        None if rank is None else int(_number(path, "r", rank, least=1)),
        bool(values.get("use_rslora")),
        dict(_pattern(path, "alpha_pattern", values)),
        {end: int(rank) for end, rank in _pattern(path, "rank_pattern", values, least=1)},
        encodes if isinstance(encodes, str) else None,
    )


def _number(path: Path, name: str, value: object, least: float = -math.inf) -> float:
    fine = isinstance(value, int | float) and not isinstance(value, bool)
    if not fine or not math.isfinite(value) or value < least:  # type: ignore[arg-type, operator]
        raise ValueError(f"{path}: {name}={shown(value)}: wanted a finite number.")
    return float(value)  # type: ignore[arg-type]


def _pattern(
    path: Path, name: str, values: Mapping[str, Any], least: float = -math.inf
) -> Iterator[tuple[str, float]]:
    """Yield the entries of a pattern; peft takes names for regular expressions.

    Raises:
        ValueError: A name has characters with a special meaning, which could take forever to match.
    """
    for pattern, value in (values.get(name) or {}).items():
        end = re.sub(r"\\\.", ".", pattern.removeprefix("^").removesuffix("$"))
        if not re.fullmatch(r"[\w.]+", end):
            raise ValueError(f"{path}: {name} has {clipped(pattern)!r}: wanted names of layers.")
        yield end, _number(path, f"{name}[{end}]", value, least)


def _by_end(values: Mapping[str, T], layer: str, default: T | None) -> T | None:
    ends = (end for end in values if layer == end or layer.endswith(f".{end}"))
    return next((values[end] for end in ends), default)
