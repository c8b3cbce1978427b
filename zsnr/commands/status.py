"""`zsnr status`."""

from __future__ import annotations

from pathlib import Path

from zsnr.reports.status import Status, read_status


def status(run: str | Path) -> Status:
    """Say how far a run is: its step, loss, speed, time left, last checkpoint and faults.

    Reads the files that training writes into the run's folder: heartbeats, run.json, the metrics
    logs and the ledgers of faults. It works while the run trains, on any machine that sees the
    folder, and loads no model.

    Args:
        run: Folder of the run (trainer.default_root_dir).

    Returns:
        The state of the run, as text or JSON.

    Raises:
        ValueError: The folder is not one of a run.
    """
    return read_status(run)
