"""Verdicts on .safetensors files: models, networks alone and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zsnr.doctor.diagnosis import TRAIN, Diagnosis, Verdict, schedule_facts, signal
from zsnr.doctor.recipes import recipe_warnings
from zsnr.doctor.trainers import trained_with
from zsnr.interop.declarations import Declaration, read_declaration, telling
from zsnr.untrusted import clipped
from zsnr.weights.header import Header
from zsnr.weights.ldm_file import instead, open_ldm_file, other_process

_MARKS = "`zsnr export` writes single files with both marks"
_START = "a single file stores no spacing: start at T (trailing, or the tool's `sgm_uniform`)"
_RETRAIN = (
    "train the adapter again, on a base that predicts v with zero terminal SNR (`zsnr fit` with "
    "model.lora): no setting repairs what was never trained on pure noise"
)
_SETTLE = (
    "ask who trained it, then load it with prediction_type (`--prediction-type`), and with "
    "`--zero-terminal-snr` if it was trained that way"
)


def examine_single(target: str, path: Path) -> Diagnosis:
    """Judge a .safetensors file by what it declares.

    Raises:
        ValueError: The file is not readable, or holds no model of a known kind.
    """
    header, declared = read_declaration(path)
    other = other_process(header.shapes)
    if other is not None:
        reason = f"cannot be told: {other}, and not on a schedule of betas"
        return Diagnosis(target, "safetensors file", "unknown", reason)
    kind = _kind(header, declared)
    silent = declared.prediction_type is None and declared.schedule is None
    if silent and kind.endswith("of diffusers"):
        raise ValueError(
            f"{path} is a UNet of diffusers, which does not declare its schedule: wanted the "
            "folder that holds model_index.json."
        )
    if silent and kind == "other":
        raise ValueError(
            f"{path} does not declare a schedule, and is not a single-file Stable Diffusion "
            f"model: {instead(header.shapes)}."
        )
    verdict, reason = _judge(declared)
    metadata = {key: clipped(text, 60) for key, text in telling(header.metadata).items()}
    facts: dict[str, Any] = {
        "model": kind,
        **({} if declared.adapter else {"marks": declared.marks}),
        "prediction_type": declared.prediction_type,
        **({} if declared.schedule is None else schedule_facts(declared.schedule)),
        **{f"{name}_from": where for name, where in declared.said_by.items()},
        **({} if declared.adapter else {"guidance_rescale": None}),
        "metadata": metadata,
    }
    warnings = [f"{text}; the first is followed" for text in declared.contradictions]
    refusal = _refusal(path, header)
    if refusal is not None:
        warnings.append(f"zsnr does not load it: {refusal}")
    trained = trained_with(header.metadata)
    if trained is not None:
        warnings += recipe_warnings(trained)
    changes: list[str] = []
    if "other" in kind:
        warnings.append("its tensor names match no known Stable Diffusion model")
    if verdict == "fixed" and not declared.adapter:
        warnings.append(_START)
    elif verdict == "flawed":
        changes.append(_RETRAIN if declared.adapter else TRAIN)
    elif verdict == "inconsistent":
        changes.append("declare v prediction if it predicts v, else train it again")
    elif verdict == "unknown" and not declared.adapter:
        if declared.prediction_type is None:
            warnings.append(
                "other programs sample a file without declarations as epsilon on Stable "
                "Diffusion's schedule, which keeps signal at T: that is their guess"
            )
        changes.append(_SETTLE)
    missing = [] if declared.adapter else _missing_marks(declared)
    if missing:
        warnings.append(
            "A1111, ComfyUI and others read the marks and no metadata: the file lacks "
            + " and ".join(missing)
        )
        changes.append(f"add an empty tensor {' and one '.join(missing)}; {_MARKS}")
    return Diagnosis(
        target, "safetensors file", verdict, reason, facts, tuple(warnings), tuple(changes)
    )


def _judge(declared: Declaration) -> tuple[Verdict, str]:
    prediction, zero = declared.prediction_type, declared.zero_terminal_snr
    if prediction is None and zero is None:
        if declared.adapter:
            return "unknown", (
                "cannot be told: an adapter has no schedule of its own, and its metadata does not "
                "declare how it was trained"
            )
        return "unknown", "cannot be told: it declares neither prediction type nor schedule"
    if prediction is None:
        if not zero:
            assert declared.schedule is not None
            return "flawed", signal(declared.schedule)
        return "unknown", (
            "cannot be told: it declares a schedule that ends at SNR 0, but not what it predicts"
        )
    by = declared.said_by["prediction_type"]
    if zero is None:
        return "unknown", (
            f"cannot be told: it predicts {prediction} by {by}, but does not declare its schedule"
        )
    if zero and prediction == "epsilon":
        return "inconsistent", "zero SNR with epsilon prediction: eps has no x_0 at T"
    if zero:
        both = all(declared.marks.values())
        where = "both marks" if both else "its declarations"
        return "fixed", f"{where}: {prediction} on a schedule that ends at SNR 0"
    assert declared.schedule is not None
    return "flawed", f"{prediction} by {by}: {signal(declared.schedule)}"


def _refusal(path: Path, header: Header) -> str | None:
    """Return why the loader refuses a model in one file, if it does."""
    if not any(name.startswith("model.diffusion_model.") for name in header.shapes):
        return None
    try:
        open_ldm_file(path)
    except ValueError as error:
        return str(error)
    return None


def _missing_marks(declared: Declaration) -> list[str]:
    """List the marks that other programs need, and the file lacks."""
    wanted = {
        "v_pred": declared.prediction_type == "v_prediction",
        "ztsnr": declared.zero_terminal_snr is True,
    }
    return [name for name, needed in wanted.items() if needed and not declared.marks[name]]


def _kind(header: Header, declared: Declaration) -> str:
    """Describe the file by the names and shapes of its tensors."""
    family = declared.family
    if declared.adapter:
        return f"{family or 'unknown'} {declared.adapter}"
    if any(name.startswith("model.diffusion_model.") for name in header.shapes):
        return family or "other, in the layout of ldm"
    if any(name.startswith("down_blocks.") for name in header.shapes):
        return f"{family or 'other'} UNet of diffusers"
    return "other"
