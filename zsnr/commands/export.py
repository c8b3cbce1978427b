"""`zsnr export`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from zsnr.commands.options import given_process
from zsnr.commands.result import Result
from zsnr.untrusted import printable

if TYPE_CHECKING:
    from zsnr.interop.lora import Layout

Format = Literal["diffusers", "single-file", "lora", "lora-kohya"]
_LAYOUTS: dict[str, Layout] = {"lora": "diffusers", "lora-kohya": "kohya"}


def export(
    checkpoint: str,
    *,
    output: str | Path,
    format: Format | None = None,
    merge: bool = False,
    base: str | None = None,
    lora: Sequence[str] = (),
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    raw: bool = False,
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None,
    zero_terminal_snr: bool = False,
    flow_shift: float | None = None,
    push: str | None = None,
) -> Result:
    """Write a model for diffusers, ComfyUI and A1111.

    The model is written so that other programs sample it correctly: a diffusers folder with a
    scheduler config that declares schedule, prediction type and spacing, and a model card; or a
    single file in the layout that ComfyUI and A1111 read, for models that are built like Stable
    Diffusion 1, 2 or XL. Averaged weights are written, unless --raw is given.

    Args:
        checkpoint: A checkpoint of zsnr (file or shards), the folder of a run (its last checkpoint
            is taken), a diffusers folder, or a single file.
        output: File or folder to write, which must not exist.
        format: What to write. Default: single-file where the name ends in .safetensors, else
            diffusers. lora and lora-kohya write the adapters alone, in the layout of diffusers or
            of kohya's scripts.
        merge: Write the whole model, with its adapters merged.
        base: Where the model under the adapters is, if it has moved.
        lora: An adapter file (LoRA, LoHa, LoKr, DoRA) of any program to merge into the model, as
            FILE or FILE:SCALE, such as style.safetensors:0.8. May be repeated.
        dtype: Data type of the weights.
        raw: Write the raw weights instead of the averaged ones.
        prediction_type: What the network predicts. Default: what the model declares.
        push: Also upload it to this model repository on the hub, OWNER/NAME. A new one is private.
        zero_terminal_snr: Take Stable Diffusion's schedule with zero terminal SNR instead of the
            schedule that the model declares.
        flow_shift: Take rectified flow with this shift, such as 3, instead of the schedule that
            the model declares, for weights that do not say that they are of rectified flow.
    """
    from zsnr.checkpoints.run_folder import resolve_model
    from zsnr.files import check_new
    from zsnr.interop import hub
    from zsnr.interop.adapter_file import read_loras
    from zsnr.interop.adapter_merge import merge_adapter
    from zsnr.interop.export import Form, export_diffusers, read_exportable
    from zsnr.interop.lora import write_lora

    path = Path(output).expanduser()
    check_new(path)
    if push is not None:
        hub.check_push(push)
    kind = _format(path, format, merge)
    adapters = kind in _LAYOUTS
    if adapters and lora:
        raise ValueError(
            f"--lora is merged into a whole model, but --format {kind} writes adapters alone: "
            "leave one of them out."
        )
    loras = read_loras(lora)
    form: Form = "lora" if adapters else "single-file" if kind == "single-file" else "diffusers"
    schedule, prediction_type = given_process(zero_terminal_snr, flow_shift, prediction_type)
    model, facts = read_exportable(
        resolve_model(checkpoint),
        ema=not raw,
        base=base,
        merged=merge,
        form=form,
        schedule=schedule,
        prediction_type=prediction_type,
    )
    if loras:
        merged = [merge_adapter(model, file, scale) for file, scale in loras]
        facts["loras"] = [each.facts() for each in merged]
    print(printable(f"writing {path}"), file=sys.stderr)
    metadata = {"zsnr.run": json.dumps(facts)}
    if adapters:
        write_lora(model, path, layout=_LAYOUTS[kind], dtype=dtype, metadata=metadata)
    elif kind == "single-file":
        from zsnr.interop.single_file import write_single_file

        write_single_file(model, path, dtype=dtype, metadata=metadata)
    else:
        export_diffusers(model, path, dtype=dtype, facts=facts)
    written = {
        **facts,
        "output": str(path),
        "format": kind,
        "dtype": dtype,
        "schedule": model.schedule.settings(),
        "prediction_type": model.prediction_type,
        "image_size": model.image_size,
        "terminal_snr": float(model.schedule.snr[-1]),
    }
    if push is None:
        return Result(written, str(path))
    print(printable(f"uploading to {push}"), file=sys.stderr)
    address = hub.push(path, push)
    return Result({**written, "hub": address}, f"{path}\n{address}")


def _format(path: Path, asked: Format | None, merge: bool) -> Format:
    """Choose the format, and refuse a name or options that do not fit it."""
    file = path.suffix == ".safetensors"
    kind: Format = asked or ("single-file" if file else "diffusers")
    if kind == "diffusers" and file:
        raise ValueError(f"{path}: a diffusers folder is not a file. Use --format single-file.")
    if kind in ("single-file", "lora-kohya") and not file:
        raise ValueError(f"{path}: wanted a name that ends in .safetensors for one file.")
    if kind in _LAYOUTS and merge:
        raise ValueError("--merge writes a whole model: leave it out, or --format lora.")
    return kind
