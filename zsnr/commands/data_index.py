"""`zsnr data index`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zsnr.commands.options import path_or_none
from zsnr.commands.result import Result


def data_index(
    source: Sequence[str],
    *,
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    timeout: float = 30.0,
    processes: int = 0,
    attempts: int = 5,
    header: Sequence[str] = (),
    local_cache: str | Path | None = None,
    max_gib: float = 100.0,
) -> Result:
    """List the samples of shards, and what is broken in them.

    An index file is written beside each shard, or into --output: one row for each sample, with its
    place in the shard, the size of the image and the fields of its JSON. Broken and missing
    samples and shards are named. Training indexes small datasets by itself.

    Args:
        source: A folder of shards or images, a pattern such as 'https://host/{000..099}.tar', ...
        output: Folder for the index files. Shards behind an address need it; folders of images
            have no index files.
        ledger: File for a list of what is broken, as JSON lines.
        timeout: Seconds until a server counts as stalled.
        processes: Number of processes that read shards at once. Default: threads of one process.
        attempts: Number of attempts at one read.
        header: Send 'NAME: VALUE' to http servers, such as 'Authorization: Bearer ${TOKEN}', where
            ${TOKEN} is an environment variable. May be repeated.
        local_cache: Folder that keeps whole remote shards, as training does.
        max_gib: Largest size of --local-cache, in GiB.
    """
    from zsnr.data.index import write_indices
    from zsnr.data.local_cache import LocalCache

    folder = path_or_none(local_cache)
    facts, text = write_indices(
        list(source),
        path_or_none(output),
        ledger=path_or_none(ledger),
        attempts=attempts,
        timeout=timeout,
        processes=processes,
        headers=dict(_header(text) for text in header),
        local_cache=None if folder is None else LocalCache(str(folder), max_gib),
    )
    return Result(facts, text)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = (part.strip() for part in text.partition(":"))
    if not (name and colon):  # the text may be a secret
        raise ValueError(f"--header: wanted 'NAME: VALUE', but {len(text)} characters were given.")
    return name, value
