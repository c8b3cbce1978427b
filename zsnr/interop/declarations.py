"""What a single file declares about itself: the one reading that loaders and the doctor share.

What a file does not say is None, and never the default of a program. Programs that cannot ask take
epsilon and Stable Diffusion's schedule, which is a choice of theirs and no declaration.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, cast, get_args

from zsnr.interop.ldm_yaml import LdmYaml, read_beside
from zsnr.prediction import PredictionType
from zsnr.schedule import NoiseSchedule, RectifiedFlow, Schedule, schedule_from_settings
from zsnr.untrusted import parse_object
from zsnr.weights.header import Header, read_header, read_schedule

_PREDICTIONS: dict[str, PredictionType] = {
    **dict.fromkeys(("v", "vpred", "vprediction", "vparam", "vparameterization"), "v_prediction"),
    **dict.fromkeys(("epsilon", "eps", "epsprediction", "noise"), "epsilon"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
_FLAGS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}
# Words of metadata that name a model's family, from the more to the less telling.
_BASES = {
    "SDXL": ("xl",),
    "SD 2": ("stable-diffusion-v2", "sd_v2", "sd2"),
    "SD 1": ("stable-diffusion-v1", "sd_v1", "sd1"),
}
_ENCODERS = {  # text encoders that only one family has
    "SDXL": ("conditioner.embedders.1.model.", "lora_te1_", "lora_te2_"),
    "SD 2": ("cond_stage_model.model.",),
    "SD 1": ("cond_stage_model.transformer.",),
}
FAMILIES = {768: "SD 1", 1024: "SD 2", 2048: "SDXL"}  # by the width of the context
_ADAPTERS = {  # a part of the tensors' names, by the kind of adapter, the special ones first
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": ("hada_w1",),
    "LoKr": ("lokr_w1", "lokr_w2"),
    "OFT": ("oft_blocks", "oft_diag", "oft_R"),
    "IA3": ("on_input",),
    "LoRA": (".lora_", ".lora.", "_lora.", "lora_unet_", "lora_te"),
}
_ENDINGS = {True: "zero terminal SNR", False: "a schedule that keeps signal"}
_BY_EPSILON = "epsilon prediction"
_TELLING = (
    *("modelspec.prediction_type", "modelspec.predict_key", "prediction_type"),
    *("modelspec.architecture", "modelspec.title", "ss_v_parameterization"),
    *("ss_zero_terminal_snr", "ss_base_model_version", "ss_network_module"),
)


@dataclass(frozen=True)
class Declaration:
    """What a file says of itself; None = it does not say.

    Attributes:
        family: "SD 1", "SD 2" or "SDXL".
        adapter: Kind of the adapter that the file holds, such as "LoRA". None = it holds none.
        prediction_type: What the network predicts.
        schedule: The schedule that the network was trained on.
        said_by: Where the prediction type and the schedule are declared, by these two names.
        contradictions: Declarations of the file that disagree; the first of each is followed.
        marks: Whether the empty tensors `v_pred` and `ztsnr` are there, which A1111, ComfyUI and
            other programs read.
    """

    family: str | None
    adapter: str | None
    prediction_type: PredictionType | None
    schedule: NoiseSchedule | RectifiedFlow | None
    said_by: dict[str, str] = field(default_factory=dict)
    contradictions: tuple[str, ...] = ()
    marks: dict[str, bool] = field(default_factory=dict)

    @property
    def zero_terminal_snr(self) -> bool | None:
        """Whether the declared schedule ends at SNR 0."""
        return None if self.schedule is None else float(self.schedule.snr[-1]) == 0


def read_declaration(path: str | Path) -> tuple[Header, Declaration]:
    """Read the header of a safetensors file, and what it and a YAML beside it declare.

    Raises:
        ValueError: The file or the YAML is not readable.
    """
    path = Path(path)
    header = read_header(path)
    beside = None if _adapter(header.shapes) else read_beside(path)
    return header, declares(
        header.shapes, header.metadata, table=read_schedule(path, header), beside=beside
    )


def declares(
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    *,
    table: NoiseSchedule | None = None,
    beside: LdmYaml | None = None,
) -> Declaration:
    """Return what a file declares.

    Of several declarations the first counts: the marks `v_pred` and `ztsnr`, the metadata, the YAML
    beside the file, a stored `alphas_cumprod`. One mark without the other declares that the other
    one does not hold. Epsilon prediction declares a schedule that keeps signal, because eps has no
    x_0 at SNR 0.

    Args:
        shapes: Shapes of the tensors by name.
        metadata: The header's free text by name.
        table: The schedule of a stored `alphas_cumprod`.
        beside: The YAML of the original code beside the file.
    """
    marks = {name: name in shapes for name in ("v_pred", "ztsnr")}
    predictions = [*_predictions(marks, metadata, beside)]
    if not predictions and marks["ztsnr"]:
        predictions = [("the mark ztsnr without v_pred", "epsilon")]
    prediction_type = predictions[0][1] if predictions else None
    zeros = [*_zeros(marks, metadata, beside, table)]
    if not zeros and marks["v_pred"]:
        zeros = [("the mark v_pred without ztsnr", False)]
    elif not zeros and prediction_type == "epsilon":
        zeros = [(_BY_EPSILON, False)]
    schedule = _schedule(zeros[0][1], metadata, beside, table) if zeros else None
    said_by = {
        name: said[0][0]
        for name, said in (("prediction_type", predictions), ("schedule", zeros))
        if said
    }
    endings = [(where, _ENDINGS[zero]) for where, zero in zeros]
    contradictions = (*_contradictions(predictions), *_contradictions(endings))
    return Declaration(
        _family(shapes, metadata),
        _adapter(shapes),
        prediction_type,
        schedule,
        said_by,
        contradictions,
        marks,
    )


def settle(
    path: str | Path,
    declaration: Declaration,
    schedule: Schedule | None = None,
    prediction_type: PredictionType | None = None,
) -> tuple[Schedule, PredictionType]:
    """Return the schedule and prediction type to use a file with.

    What is neither given nor declared is taken as other programs take it, epsilon and Stable
    Diffusion's schedule, with one warning.

    Args:
        path: Path of the file, for messages.
        declaration: What it declares.
        schedule: Schedule to use instead of the declared one.
        prediction_type: Prediction type to use instead of the declared one.

    Raises:
        ValueError: The prediction type is not declared, and to take epsilon would be a mere guess,
            as for Stable Diffusion 2, or impossible, as at zero SNR.
    """
    declared = declaration.schedule
    other = prediction_type not in (None, declaration.prediction_type)
    if other and declaration.said_by.get("schedule") == _BY_EPSILON:
        declared = None
    prediction_type = prediction_type or declaration.prediction_type
    schedule = schedule or declared
    unsaid = [] if prediction_type else ["what its network predicts"]
    if prediction_type is None:
        zero = schedule is not None and float(schedule.snr[-1]) == 0
        if zero or declaration.family == "SD 2":
            why = "epsilon has no x_0 at zero SNR" if zero else "half of SD 2's models predict v"
            raise ValueError(
                f"{path} does not declare what its network predicts, and {why}: set "
                "prediction_type to 'v_prediction' or 'epsilon', with --prediction-type on the "
                "command line."
            )
        prediction_type = "epsilon"
    if schedule is None:
        schedule = NoiseSchedule(zero_terminal_snr=False)
        if prediction_type != "epsilon":
            unsaid.append("its noise schedule")
    if unsaid:
        warnings.warn(
            f"{path} does not declare {' or '.join(unsaid)}: {prediction_type} on Stable "
            "Diffusion's schedule is taken, as by other programs. If it was trained otherwise, set "
            "prediction_type or schedule.",
            stacklevel=3,
        )
    for text in declaration.contradictions:
        warnings.warn(f"{path}: {text}; the first is followed.", stacklevel=3)
    return schedule, prediction_type


def telling(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of the metadata that tell what the file is."""
    return {name: metadata[name] for name in metadata if name in _TELLING}


def _predictions(
    marks: Mapping[str, bool], metadata: Mapping[str, str], beside: LdmYaml | None
) -> Iterator[tuple[str, PredictionType]]:
    if marks["v_pred"]:
        yield "the mark v_pred", "v_prediction"
    # predict_key is what ComfyUI writes.
    for name in ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type"):
        word = re.sub(r"[\W_]", "", metadata.get(name, "").lower())
        if word in _PREDICTIONS:
            yield f"the metadata ({name})", _PREDICTIONS[word]
    own = _own(metadata).get("prediction_type")
    if own in get_args(PredictionType):
        yield "the metadata (zsnr)", cast(PredictionType, own)
    trained_v = _flag(metadata, "ss_v_parameterization")
    if trained_v is not None:
        kind: PredictionType = "v_prediction" if trained_v else "epsilon"
        yield "the metadata (ss_v_parameterization)", kind
    architecture = metadata.get("modelspec.architecture", "").lower().partition("/")[0]
    if architecture.endswith("-v"):
        yield "the metadata (modelspec.architecture)", "v_prediction"
    elif architecture == "stable-diffusion-v2-512":
        yield "the metadata (modelspec.architecture)", "epsilon"
    if beside is not None:
        yield beside.path.name, beside.prediction_type


def _zeros(
    marks: Mapping[str, bool],
    metadata: Mapping[str, str],
    beside: LdmYaml | None,
    table: NoiseSchedule | None,
) -> Iterator[tuple[str, bool]]:
    if marks["ztsnr"]:
        yield "the mark ztsnr", True
    said = _flag(metadata, "ss_zero_terminal_snr")
    if said is not None:
        yield "the metadata (ss_zero_terminal_snr)", said
    own = _own_schedule(metadata)
    if own is not None:
        yield "the metadata (zsnr)", float(own.snr[-1]) == 0
    if beside is not None:
        yield beside.path.name, float(beside.schedule.snr[-1]) == 0
    if table is not None and not marks["ztsnr"]:
        yield "the stored alphas_cumprod", float(table.snr[-1]) == 0


def _schedule(
    zero: bool,
    metadata: Mapping[str, str],
    beside: LdmYaml | None,
    table: NoiseSchedule | None,
) -> NoiseSchedule | RectifiedFlow:
    """Return the most exact of the declared schedules that ends as the declaration says."""
    if table is not None and is_stable_diffusions(table):
        table = None  # its name is more exact than a stored table
    exact = (_own_schedule(metadata), None if beside is None else beside.schedule, table)
    for schedule in exact:
        if schedule is not None and (float(schedule.snr[-1]) == 0) == zero:
            return schedule
    return NoiseSchedule(zero_terminal_snr=zero)


def is_stable_diffusions(schedule: Schedule) -> TypeGuard[NoiseSchedule]:
    """Whether it is Stable Diffusion's schedule, rescaled or not, as the marks stand for it."""
    if not isinstance(schedule, NoiseSchedule):
        return False
    table = schedule.alphas_cumprod
    usual = NoiseSchedule(zero_terminal_snr=float(table[-1]) == 0).alphas_cumprod
    return len(table) == len(usual) and bool((table - usual).abs().max() <= 1e-5)


def _own(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what this package wrote into the metadata of an adapter."""
    text = metadata.get("zsnr")
    try:
        return {} if text is None else parse_object(text.encode(), "zsnr")
    except ValueError:
        return {}


def _own_schedule(metadata: Mapping[str, str]) -> NoiseSchedule | RectifiedFlow | None:
    text = metadata.get("zsnr.schedule")
    try:
        settings = _own(metadata).get("schedule") if text is None else json.loads(text)
        return schedule_from_settings(settings) if isinstance(settings, dict) else None
    except (ValueError, TypeError, RecursionError):
        return None


def _flag(metadata: Mapping[str, str], name: str) -> bool | None:
    return _FLAGS.get(metadata.get(name, "").strip().lower())


def _contradictions(said: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yield the declarations that disagree with the first one."""
    for where, value in said[1:]:
        if value != said[0][1]:
            yield f"{said[0][0]} declares {said[0][1]}, but {where} {value}"


def _adapter(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    return next(
        (kind for kind, parts in _ADAPTERS.items() if any(p in n for n in shapes for p in parts)),
        None,
    )


def _family(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str | None:
    """Identify the family by the width of the context, by its encoders, or by the metadata."""
    for family, parts in _ENCODERS.items():
        if any(name.startswith(part) for name in shapes for part in parts):
            return family
    if any(".label_emb." in name for name in shapes):
        return "SDXL"
    widths = {_context_width(name, shapes) for name in shapes if "attn2" in name} - {None}
    families = {FAMILIES[width] for width in widths if width in FAMILIES}
    if len(families) == 1:
        return families.pop()
    said = " ".join(
        metadata.get(name, "").lower()
        for name in ("modelspec.architecture", "ss_base_model_version")
    )
    return next((f for f, words in _BASES.items() if any(w in said for w in words)), None)


def _context_width(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the input width of a cross-attention's key or value projection, if it is one."""
    if not re.search(r"to_[kv](?=[._])", name):
        return None
    shape = shapes[name]
    stem, _, part = name.rpartition("to_")
    module = name[: len(stem) + len("to_k")]
    if part.startswith(("k.lokr_w", "v.lokr_w")):
        factors = [_lokr_input(module, shapes, which) for which in ("1", "2")]
        return factors[0] * factors[1] if None not in factors else None  # type: ignore[operator]
    narrow = ("lora_up", "lora_B", "up.weight", "_w1_a", "_w2_a", "dora_scale", "alpha", "bias")
    if len(shape) < 2 or any(word in part for word in narrow):
        return None
    return shape[1]


def _lokr_input(module: str, shapes: Mapping[str, tuple[int, ...]], which: str) -> int | None:
    """Return the inputs of one factor of a Kronecker product, whole or of low rank."""
    for part in (f"lokr_w{which}", f"lokr_w{which}_b"):
        shape = shapes.get(f"{module}.{part}")
        if shape is not None and len(shape) >= 2:
            return shape[1]
    return None
