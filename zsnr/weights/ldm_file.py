"""A single .safetensors file in the ldm layout, read as if it were a diffusers folder.

The layout is that of the first Stable Diffusion releases: all parts in one file, distinguished by
the prefixes of their tensors' names. It does not store settings: they are those of the three public
models, in public_models.json, and the tensors must match them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from zsnr.untrusted import parse_object
from zsnr.weights.header import open_safetensors, read_header
from zsnr.weights.ldm_layout import Network, from_ldm, ldm_names, to_ldm
from zsnr.weights.source import fetch_file, is_single_file

Family = Literal["v1", "v2", "xl", "vae"]

ZEROS = "force_zeros_for_empty_prompt"
_MAX_TEXT = 1 << 20
NAMES = {
    "v1": "Stable Diffusion 1",
    "v2": "Stable Diffusion 2",
    "xl": "Stable Diffusion XL",
    "vae": "Stable Diffusion's VAE",
}
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
PREFIXES["vae"] = {"vae": ""}

# The settings of Stable Diffusion 1.5, 2.1 and XL 1.0. In 2.1, the last of the text encoder's 24
# layers is not used: its context is the penultimate hidden state.
PUBLIC: dict[Family, dict[str, dict[str, Any]]] = json.loads(
    Path(__file__).with_name("public_models.json").read_text(encoding="utf-8")
)
# A VAE in its own file: those of Stable Diffusion 1, 2 and XL differ in their scale alone, which
# the file does not tell.
PUBLIC["vae"] = {"vae": {**PUBLIC["v1"]["vae"], "scaling_factor": None}}

TOKENIZERS: dict[Family, dict[str, str]] = {
    "v1": {"tokenizer": "clip"},
    "v2": {"tokenizer": "open_clip"},
    "xl": {"tokenizer": "clip", "tokenizer_2": "open_clip"},
}


# Tensors that no part needs: the averages and tables of training, marks, and what text encoders
# hold beside the part that reads prompts.
_IDLE = re.compile(
    r"(model_ema|loss|denoiser|first_stage_model\.loss|embedding_manager)\..*"
    r"|(alphas_cumprod|betas|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar).*"
    r"|scale_factor|global_step|v_pred|ztsnr"
    r"|.*\.(position_ids|logit_scale)"
    r"|(cond_stage_model\.(model|transformer)|conditioner\.embedders\.0\.transformer)"
    r"\.text_projection(\.weight)?"
)
_SCALES = ("scale_weight", "weight_scale", "scaled_fp8", "comfy_quant", "input_scale")


@dataclass(frozen=True)
class LdmFile:
    """The header of a single file.

    Attributes:
        path: Path of the file.
        family: Public model whose layout the file has.
        shapes: Shapes of the tensors by their names in the file.
        metadata: Free text by name.
    """

    path: Path
    family: Family
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def default_part(source: str, subfolder: str | None, part: str) -> str | None:
    """Return `subfolder`, or `part` if it is None and `source` holds all parts of a model.

    That is a single file, or a folder or hub id with a model_index.json.
    """
    if subfolder is not None:
        return subfolder
    whole = is_single_file(source) or fetch_file(source, "model_index.json") is not None
    return part if whole else None


def open_ldm_file(source: str | Path) -> LdmFile:
    """Read the header of a single file.

    Raises:
        ValueError: The file does not exist, is not a safetensors file, is not a Stable Diffusion
            model in the ldm layout, or holds tensors that would be left out.
    """
    path = Path(source).expanduser()
    header = read_header(path)
    if _is_vae(header.shapes):
        return LdmFile(path, "vae", header.shapes, header.metadata)
    family = _family(path, header.shapes)
    _refuse_unknown(path, family, header.shapes)
    return LdmFile(path, family, header.shapes, header.metadata)


def part_config(file: LdmFile, part: str) -> dict[str, Any]:
    """Return a part's settings in the form of a config.json.

    Raises:
        ValueError: The file does not have the part.
    """
    prefix = PREFIXES[file.family].get(part)
    if prefix is None or not any(name.startswith(prefix) for name in file.shapes):
        raise ValueError(f"{file.path} holds no {part}: no tensor's name starts with {prefix!r}.")
    return dict(PUBLIC[file.family][part])


def part_tokenizer(file: LdmFile, part: str) -> tuple[str, int]:
    """Return the name of a part's tokenizer ("clip" or "open_clip") and its maximum length."""
    return TOKENIZERS[file.family][part], 77


def file_index(file: LdmFile) -> dict[str, Any]:
    """Return the file's parts in the form of a model_index.json."""
    xl = file.family == "xl"
    pipeline = f"StableDiffusion{'XL' if xl else ''}Pipeline"
    index: dict[str, Any] = {"_class_name": pipeline}
    for part, config in PUBLIC[file.family].items():
        diffusers = "_class_name" in config
        index[part] = (
            ["diffusers", config["_class_name"]]
            if diffusers
            else ["transformers", config["architectures"][0]]
        )
    if xl:
        index[ZEROS] = file.metadata.get(f"zsnr.{ZEROS}") != "false"
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
    part_config(file, part)  # the file has it
    names = part_names(file.family, part, expected)
    if file.family == "vae" and "decoder.mid_block.resnets.0.conv1.weight" in file.shapes:
        names = {name: name for name in expected}  # diffusers' own
    with torch.device("meta"):
        empty = {name: torch.empty(shape) for name, shape in expected.items()}
    stored = _stored_names(file, part)
    _check_shapes(file, part, to_ldm(empty, names), stored)
    weights = {}
    with open_safetensors(file.path) as opened:
        for name, ldm_name in names.items():
            weight = from_ldm(name, ldm_name, opened.get_tensor(stored[_spelled(ldm_name)]))
            if dtype is not None:  # copied, because truncating a mapped file would kill the process
                weight = weight.to(dtype, copy=True)
            weights[name] = weight.contiguous()
    return weights


def part_names(family: Family, part: str, names: Iterable[str]) -> dict[str, str]:
    """Return the names that a part's weights have in a single file.

    Args:
        family: The public model.
        part: As in `read_part`.
        names: Names in diffusers' or transformers' model.

    Raises:
        ValueError: The layout has no name for a weight.
    """
    prefix, network = PREFIXES[family][part], part
    if part.startswith("text_encoder"):
        network = "clip" if prefix.endswith(".transformer.") else "open_clip"
    inside = ldm_names(cast(Network, network), names, PUBLIC[family][part])
    return {name: prefix + ldm_name for name, ldm_name in inside.items()}


def _is_vae(shapes: Mapping[str, Any]) -> bool:
    """Whether a file holds a VAE alone, under the layout's names or those of diffusers."""
    return {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= shapes.keys()


def _family(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Family:
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    other = other_process(shapes)
    if other is not None or not (has("model.diffusion_model.") or has("first_stage_model.")):
        raise ValueError(
            f"{path} is not a single-file Stable Diffusion model: {other or instead(shapes)}."
        )
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


def other_process(shapes: Mapping[str, Any]) -> str | None:
    """Say which other process than a schedule of betas a file's network is trained on, if any."""
    if any(re.search(r"(double|single|joint|single_transformer)_blocks[._]", n) for n in shapes):
        return "it is a transformer, trained by flow matching"
    edm = next((name for name in shapes if name.startswith("edm_")), None)
    if edm is not None:
        return f"it is trained on EDM's noise levels ({edm}), as CosXL and Playground 2.5 are"
    return None


def instead(shapes: Mapping[str, Any]) -> str:
    """Say what a file that is no model holds instead."""
    if any(".lora_" in name or name.startswith("lora_") for name in shapes):
        return "it is a LoRA: use the model that it was trained on"
    if _is_vae(shapes):
        return "it holds only a VAE, which --vae takes"
    if any(name.startswith(("down_blocks.", "decoder.", "encoder.")) for name in shapes):
        return "it holds only one part. Use the diffusers folder that it is from"
    if any("text_model." in name for name in shapes):
        return "it holds only a text encoder. Use the diffusers folder that it is from"
    return "no tensor's name starts with 'model.diffusion_model.'"


def _refuse_unknown(path: Path, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors that would be left out although they change the result.

    Raises:
        ValueError: The file holds such tensors.
    """
    prefixes = tuple(PREFIXES[family].values())
    for name in shapes:
        if name.rpartition(".")[2] in _SCALES:
            raise ValueError(
                f"{path} holds scaled 8-bit weights ({name}), which only the program that wrote "
                "them reads: use the file in 16 bits."
            )
        if not name.startswith(prefixes) and _IDLE.fullmatch(name) is None:
            raise ValueError(
                f"{path} holds {name!r}, which is no part of {NAMES[family]} and would be left "
                "out: use the diffusers folder, or a file without it."
            )


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
    if len(text) > _MAX_TEXT:
        raise ValueError(f"{label} has {len(text)} characters.")
    return label, parse_object(text.encode(), label)


def _stored_names(file: LdmFile, part: str) -> dict[str, str]:
    """Return the names of a part's tensors in a file by the layout's spelling of them."""
    unused = None  # Stable Diffusion 2 has one more layer than it uses
    if file.family == "v2" and part == "text_encoder":
        layers = PUBLIC["v2"][part]["num_hidden_layers"]
        unused = f"{PREFIXES['v2'][part]}transformer.resblocks.{layers}."
    return {
        _spelled(name): name
        for name in file.shapes
        if name.startswith(PREFIXES[file.family][part])
        and not _IDLE.fullmatch(name)
        and not (unused is not None and name.startswith(unused))
    }


def _spelled(name: str) -> str:
    """Return one of the spellings that files have for the same tensor."""
    name = name.replace(".text_model.", ".")
    for new, old in {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f".mid.attn_1.{new}.", f".mid.attn_1.{old}.")
    return name.replace(".mid.attn_1.group_norm.", ".mid.attn_1.norm.")


def _check_shapes(
    file: LdmFile, part: str, wanted: Mapping[str, Tensor], stored: Mapping[str, str]
) -> None:
    """Refuse a part with other tensors than its model's.

    Raises:
        ValueError: A tensor is missing, has another shape, or would be left out.
    """
    kind = NAMES[file.family]
    spelled = {_spelled(name): (name, tuple(tensor.shape)) for name, tensor in wanted.items()}
    for short, (name, shape) in sorted(spelled.items()):
        actual = file.shapes[stored[short]] if short in stored else None
        if actual == shape or (actual is not None and (*actual, 1, 1) == shape and ".attn" in name):
            continue
        have = "is missing" if actual is None else f"has shape {actual}"
        raise ValueError(
            f"{file.path}: its {part} does not match {kind}: {name} {have}, {shape} wanted. Single "
            "files hold models of that size only: use the diffusers folder of another model."
        )
    surplus = sorted(stored[short] for short in stored.keys() - spelled.keys())
    if surplus:
        raise ValueError(
            f"{file.path} holds {surplus[0]!r}, which {kind} does not have and which would be left "
            "out: it is another model."
        )
