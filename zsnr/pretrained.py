"""Loading a part of somebody's model from a folder or the hub, with errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def load_pretrained(cls: Any, source: str, subfolder: str | None, *, what: str) -> Any:
    """Call cls.from_pretrained on safetensors weights; never unpickle, never run remote code.

    Args:
        cls: A diffusers or transformers class.
        source: A local folder or a hub id.
        subfolder: Folder inside it, or None.
        what: What is wanted, for the error.

    Raises:
        ValueError: It cannot be loaded; says where it looked.
    """
    where = source if subfolder is None else f"{source} (subfolder {subfolder})"
    folder = Path(source) if subfolder is None else Path(source) / subfolder
    looks_local = Path(source).exists() or source.startswith((".", "/", "~"))
    if looks_local and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: wanted a folder with {what}.")
    try:
        return cls.from_pretrained(source, subfolder=subfolder or "", use_safetensors=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        hint = "" if looks_local else " A name that is no local folder is looked up on the hub."
        raise ValueError(f"Cannot load {what} from {where}: {reason}{hint}") from error
