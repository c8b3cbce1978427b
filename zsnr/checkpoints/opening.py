"""Opening of the checkpoints that training writes, without reading their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zsnr.checkpoints import sharded
from zsnr.untrusted import near_path, open_archive

KEY = "zsnr"


def open_checkpoint(path: str | Path) -> dict[str, Any]:
    """Open a checkpoint that training wrote, a file or a folder of shards.

    Returns:
        Its contents. The weights of a file stay on disk (memory-mapped); those of a folder are
        left out.

    Raises:
        ValueError: The path does not exist, or is not a checkpoint of this package.
    """
    path = Path(path)
    shards = sharded.is_sharded(path)
    if shards:
        sharded.check(path)
        checkpoint = sharded.read_rest(path)
    elif path.is_file():
        checkpoint = open_archive(path)
    else:
        raise ValueError(
            f"{path} {'is not a file' if path.exists() else 'does not exist'}: wanted a checkpoint "
            f"(.ckpt) that training wrote, a file or a sharded folder.{near_path(path)}"
        )
    description = checkpoint.get(KEY)
    if not isinstance(description, dict):
        raise ValueError(
            f"{path} was not written by zsnr: it has no {KEY!r} entry. If it is a Stable Diffusion "
            "model in a single file, convert it to .safetensors."
        )
    description = checkpoint[KEY] = current_names(description)
    if not (shards or _are_weights(checkpoint.get("state_dict"))):
        raise ValueError(f"{path} is damaged: it lacks weights.")
    required = {"codec", "conditioner", "network", "schedule", "prediction_type", "image_size"}
    missing = sorted(required - description.keys())
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}.")
    return checkpoint


def current_names(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's description of its model under today's names; older ones say "unet".

    The names of weights are the old ones still: `trained.unet.*` are those of any network.
    """
    return {"network" if name == "unet" else name: part for name, part in description.items()}


def _are_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(weight, Tensor) for name, weight in value.items()
    )
