"""Upload of an export to the hub."""

from __future__ import annotations

import re
from pathlib import Path

from zsnr.untrusted import clipped


def check_push(repo: str) -> None:
    """Refuse what cannot be uploaded, before anything slow.

    Args:
        repo: OWNER/NAME on the hub.

    Raises:
        ValueError: The name is no hub id, or nobody is logged in here.
    """
    from huggingface_hub import get_token

    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo) is None:
        raise ValueError(f"--push {repo!r}: wanted OWNER/NAME, such as me/my-model.")
    if get_token() is None:
        raise ValueError(
            f"--push {repo}: nobody is logged in to the hub here. Run `hf auth login`, or set "
            "HF_TOKEN."
        )


def push(path: Path, repo: str) -> str:
    """Upload a file or folder to a model repository, which is made private if it is new.

    Args:
        path: The file or folder.
        repo: OWNER/NAME on the hub.

    Returns:
        The address of the repository.

    Raises:
        ValueError: The upload failed; the export is complete on disk.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        if path.is_dir():
            api.upload_folder(repo_id=repo, folder_path=path)
        else:
            api.upload_file(repo_id=repo, path_or_fileobj=path, path_in_repo=path.name)
    except Exception as error:  # the network, the hub or its permissions
        reason = clipped(str(error).strip().partition("\n")[0] or repr(error), 300)
        raise ValueError(
            f"{path} is complete, but was not uploaded to {repo}: {reason} Try again with `hf "
            f"upload {repo} {path}`."
        ) from error
    return str(address)
