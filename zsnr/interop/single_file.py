"""Single .safetensors files in the ldm layout, which A1111, ComfyUI and diffusers load."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsnr.checkpoints.exported_sampling import file_settings, read_exported
from zsnr.checkpoints.model import Model, as_unet
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import Conditioner, SDXLConditioner, TransformersConditioner
from zsnr.conditioning.tokenizers import BPE, Tokenizer, bpe_tokenizer
from zsnr.files import check_new, new_file
from zsnr.interop.declarations import is_stable_diffusions, read_declaration, settle
from zsnr.interop.diffusers_folder import read_parts, text_problem, used_layers
from zsnr.lora import AdaptedUNet
from zsnr.prediction import PredictionType
from zsnr.schedule import Schedule
from zsnr.untrusted import shown
from zsnr.weights.ldm_file import (
    NAMES,
    PUBLIC,
    TOKENIZERS,
    ZEROS,
    Family,
    LdmFile,
    instead,
    open_ldm_file,
    part_names,
)
from zsnr.weights.ldm_layout import to_ldm
from zsnr.weights.pretrained import Precision, as_dtype, cast_weight

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_IMPLEMENTATIONS: dict[Family, str] = {
    "v1": "https://github.com/CompVis/stable-diffusion",
    "v2": "https://github.com/Stability-AI/stablediffusion",
    "xl": "https://github.com/Stability-AI/generative-models",
}
# Settings of a part that may differ from the public model's: they change no weight and no result.
_IRRELEVANT = (
    *("_class_name", "model_type", "architectures", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("force_upcast", "projection_dim", "sample_size", "upcast_attention", "dropout"),
)
# What a UNet is conditioned on, by its addition_embed_type
_POOLED = {
    None: "the tokens of the prompt alone",
    "text": "a vector pooled from the prompt too (pooled_context: true)",
    "text_time": "the pooled prompt and the image size too",
}
_LENGTH = 77  # tokens of a prompt
# Without "!", which transformers treats as padding if that is the padding token.
_PROBES = (
    "",
    "A black cat at night, 35mm photo; it's 8k.",
    "the quick brown fox jumps over the lazy dog 0123456789",
    "caf\u00e9 na\u00efve \u732b \U0001f431 (re-touched) [v2.1] #1 @home 50% off",
    "antidisestablishmentarianism " * 40,
)


def write_single_file(
    model: Model,
    path: str | Path,
    *,
    dtype: Precision = "float32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model as one file in the ldm layout.

    The empty tensors `v_pred` and `ztsnr` tell readers how to sample. `alphas_cumprod` is not
    written: readers rescale their own if the mark is present. Weights are cast one at a time.

    Args:
        model: The model.
        path: NAME.safetensors, which must not exist.
        dtype: Data type of the weights.
        metadata: Texts for the header, such as "modelspec.title"; the model's own facts override
            them.

    Raises:
        ValueError: The layout cannot hold the model, or the dtype its weights; nothing is written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: wanted a name that ends in .safetensors.")
    check_new(path)
    stored = as_dtype(dtype)
    for name, text in (metadata or {}).items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"metadata {name!r}: {shown(text)}: wanted texts only.")
    family, parts = _parts(model)
    facts = {
        "modelspec.title": path.stem,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **_hint(model),
        **(metadata or {}),
        **_facts(model, family),
    }
    weights: dict[str, Tensor] = {}
    for part, state in parts.items():
        weights |= to_ldm(state, part_names(family, part, state))
    marks = []
    if model.prediction_type == "v_prediction":
        marks.append("v_pred")
    if float(model.schedule.snr[-1]) == 0:
        marks.append("ztsnr")
    _write(path, weights, marks, stored, facts)


def check_single_file(model: Model) -> None:
    """Refuse a model that the ldm layout cannot hold.

    Raises:
        ValueError: The layout cannot hold a part of the model.
    """
    _parts(model)


def read_single_file(
    source: str,
    schedule: Schedule | None = None,
    prediction_type: PredictionType | None = None,
) -> Model:
    """Read a Stable Diffusion model in a single file; its weights become float32.

    Args:
        source: The .safetensors file.
        schedule: Schedule to use. None = the one the file declares, see `declares` and `settle`.
        prediction_type: Prediction type to use. None = the one the file declares.

    Raises:
        ValueError: The file is not a single-file model, its tensors do not match its family, or it
            does not declare its prediction type and that must be known.
    """
    file = open_ldm_file(source)
    if file.family == "vae":
        raise ValueError(f"{source} is not a model: {instead(file.shapes)}.")
    _, declaration = read_declaration(file.path)
    schedule, prediction_type = settle(source, declaration, schedule, prediction_type)
    exported = read_exported(file)
    codec, conditioner, unet = read_parts(source, exported, xl=file.family == "xl")
    return Model(
        codec=codec,
        conditioner=conditioner,
        network=unet,
        schedule=schedule,
        prediction_type=prediction_type,
        image_size=_image_size(file, prediction_type, codec.factor),
        sampling=exported.sampling,
    )


def _image_size(file: LdmFile, prediction_type: PredictionType, factor: int) -> int:
    square = re.fullmatch(r"(\d{1,4})x\1", file.metadata.get("modelspec.resolution", ""))
    large_v2 = prediction_type == "v_prediction"
    usual = {"v1": 512, "v2": 768 if large_v2 else 512, "xl": 1024}[file.family]
    size = int(square[1]) if square else usual
    if not 0 < size <= 1 << 14 or size % factor:
        raise ValueError(f"{file.path} has an invalid image size: {size} pixels.")
    return size


def _parts(model: Model) -> tuple[Family, dict[str, dict[str, Tensor]]]:
    """Return the family that a model is of, and the weights of its parts.

    Raises:
        ValueError: The layout cannot hold the model.
    """
    _check_marks(model)
    unet = as_unet(model.network, "A single file").unet
    if not isinstance(model.codec, AutoencoderKLCodec):
        raise _cannot_hold(f"a codec other than AutoencoderKL, {_name(model.codec)}", folder=False)
    if isinstance(model.network, AdaptedUNet):
        raise _cannot_hold("adapters beside the UNet, which --merge merges into it")
    family, parts = _text_parts(model.conditioner)
    codec = model.codec.load()
    pooled, usual = unet.config.get("addition_embed_type"), "text_time" if family == "xl" else None
    if pooled != usual:
        raise _cannot_hold(
            f"a UNet that is conditioned on {_POOLED.get(pooled, pooled)}, where that of "
            f"{NAMES[family]} is conditioned on {_POOLED[usual]}"
        )
    vae = codec.vae
    scales = {"scaling_factor": float(codec.scale), "shift_factor": float(codec.shift) or None}
    _check_public(family, "unet", type(unet), unet.config)
    _check_public(family, "vae", type(vae), {**vae.config, **scales})
    return family, {**parts, "unet": unet.state_dict(), "vae": vae.state_dict()}


def _check_marks(model: Model) -> None:
    """Refuse a model whose schedule or prediction type the marks cannot express."""
    if model.prediction_type not in ("v_prediction", "epsilon"):
        raise _cannot_hold(
            f"prediction_type={model.prediction_type!r}, for which files have no mark"
        )
    if not is_stable_diffusions(model.schedule):
        raise _cannot_hold(
            "another noise schedule than Stable Diffusion's (scaled_linear, 0.00085 to 0.012, 1000 "
            "timesteps, with or without zero_terminal_snr), on which every program would sample it"
        )


def _text_parts(conditioner: Conditioner) -> tuple[Family, dict[str, dict[str, Tensor]]]:
    conditioner = getattr(conditioner, "described", conditioner)
    if isinstance(conditioner, SDXLConditioner):
        return "xl", _sdxl_text_parts(conditioner)
    if not isinstance(conditioner, TransformersConditioner):
        raise _cannot_hold(f"no CLIP text encoder but {_name(conditioner)}", folder=False)
    encoder: Any = conditioner.encoder
    problem = text_problem(conditioner.settings(), encoder.config.model_type)
    if problem is not None:
        raise _cannot_hold(problem, folder=False)
    used = used_layers(conditioner)
    _check_length(conditioner.max_length)
    tokenizer = _tokenizer(conditioner.tokenize, encoder)
    family: Family = "v1" if tokenizer == "clip" else "v2"
    config = {**encoder.config.to_dict(), "num_hidden_layers": used}
    _check_public(family, "text_encoder", type(encoder), config)
    # Stable Diffusion 2's files also hold the layer after the last one that is used.
    stored_layers = used if family == "v1" else used + 1
    return family, {"text_encoder": _first_layers(encoder.state_dict(), stored_layers)}


def _sdxl_text_parts(conditioner: SDXLConditioner) -> dict[str, dict[str, Tensor]]:
    first: Any = conditioner.encoder
    second: Any = conditioner.encoder_2
    _check_length(conditioner.max_length)
    for (part, expected), tokenize, encoder in zip(
        TOKENIZERS["xl"].items(), conditioner.tokenizer.tokenizers, (first, second), strict=True
    ):
        if _tokenizer(tokenize, encoder) != expected:
            raise _cannot_hold(
                f"a {part} that adds other tokens after the prompt than the one other programs "
                f"use, which this package calls {expected!r}"
            )
    _check_public("xl", "text_encoder", type(first), first.config.to_dict())
    _check_public("xl", "text_encoder_2", type(second), second.config.to_dict())
    return {"text_encoder": first.state_dict(), "text_encoder_2": second.state_dict()}


def _check_length(max_length: int) -> None:
    if max_length != _LENGTH:
        raise _cannot_hold(f"prompts of {max_length} tokens, where other programs use {_LENGTH}")


def _first_layers(weights: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    def layer(name: str) -> int:
        match = re.search(r"\bencoder\.layers\.(\d+)\.", name)
        return -1 if match is None else int(match[1])

    return {name: weight for name, weight in weights.items() if layer(name) < count}


def _tokenizer(tokenize: Tokenizer, encoder: Any) -> str:
    """Identify which of CLIP's tokenizers it is, by the embeddings of some prompts."""
    rows = encoder.get_input_embeddings().weight
    ids = tokenize(_PROBES)[0].to(rows.device)
    for name in BPE:
        expected = bpe_tokenizer(name, _LENGTH)[0](_PROBES)[0].to(rows.device)
        # The padding token may have another id, with the same embedding.
        fits = ids.shape == expected.shape and bool(expected.max() < len(rows))
        if fits and rows[ids].equal(rows[expected]):
            return name
    raise _cannot_hold("a tokenizer other than CLIP's, which other programs use")


def _check_public(family: Family, part: str, cls: type, config: Mapping[str, Any]) -> None:
    """Refuse a part whose settings are not those of the public model, which readers assume.

    Raises:
        ValueError: A setting differs.
    """
    public = PUBLIC[family][part]
    wanted = dict(public)
    if not part.startswith("text"):  # a text encoder's config has many settings of other kinds
        for name, parameter in inspect.signature(cls.__init__).parameters.items():  # type: ignore[misc]
            if name != "self":
                wanted.setdefault(name, parameter.default)
    for name, value in wanted.items():
        actual = config.get(name, value)
        if name not in _IRRELEVANT and _per_block(name, actual, config) != _per_block(
            name, value, public
        ):
            label = part.replace("_", " ").replace("unet", "UNet").replace("vae", "VAE")
            raise _cannot_hold(
                f"a {label} with {name}={actual!r}, where {NAMES[family]}, whose settings every "
                f"program assumes, has {value!r}"
            )


def _per_block(name: str, value: Any, settings: Mapping[str, Any]) -> Any:
    """Return one value per block if a single number stands for all blocks."""
    if name in ("attention_head_dim", "transformer_layers_per_block") and type(value) is int:
        return [value] * len(settings["block_out_channels"])
    return list(value) if isinstance(value, tuple) else value


def _null_facts(conditioner: Conditioner) -> dict[str, str]:
    conditioner = getattr(conditioner, "described", conditioner)
    if isinstance(conditioner, SDXLConditioner) and not conditioner.settings()["zero_null"]:
        return {f"zsnr.{ZEROS}": "false"}
    return {}


def _hint(model: Model) -> dict[str, str]:
    if float(model.schedule.snr[-1]) != 0:
        return {}
    return {
        "modelspec.usage_hint": "Zero terminal SNR: sample v from the last timestep on (trailing "
        "spacing), with guidance rescale about 0.7."
    }


def _facts(model: Model, family: Family) -> dict[str, str]:
    v = model.prediction_type == "v_prediction"
    architecture = {
        "v1": "stable-diffusion-v1",
        "v2": "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512",
        "xl": "stable-diffusion-xl-v1-base",
    }[family]
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": _IMPLEMENTATIONS[family],
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.resolution": f"{model.image_size}x{model.image_size}",
        "modelspec.timestep_range": f"0,{model.schedule.num_timesteps - 1}",
        "zsnr.schedule": json.dumps(model.schedule.settings()),
        **_null_facts(model.conditioner),
        **file_settings(model),
    }


def _write(
    path: Path,
    weights: Mapping[str, Tensor],
    marks: list[str],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    """Write safetensors tensor by tensor: 8 bytes of length, a JSON header, the data."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, weight in weights.items():
        start, end = end, end + weight.numel() * dtype.itemsize
        shape = list(weight.shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    for name in marks:
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with new_file(path) as beside, beside.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in _cast(weights, dtype):
            file.write(data.numpy().data)


def _cast(weights: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield each weight's bytes."""
    for name, weight in weights.items():
        cast = cast_weight(name, weight, dtype).cpu().contiguous()
        yield cast.view(-1).view(torch.uint8)


def _name(part: object) -> str:
    return type(part).__name__


def _cannot_hold(feature: str, folder: bool = True) -> ValueError:
    """Say why a model cannot be a single file, and the way out.

    Args:
        feature: What it has, as an object of "has".
        folder: Whether a diffusers folder can hold the model.
    """
    way_out = (
        "Write a diffusers folder instead, with an --output that does not end in .safetensors."
        if folder
        else "Use the checkpoint itself, as `zsnr sample` does."
    )
    return ValueError(
        "This model cannot be a single file, which other programs read as Stable Diffusion 1, 2 or "
        f"XL: it has {feature}. {way_out}"
    )
