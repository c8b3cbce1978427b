"""Loggers of a resumed run go on where the checkpoint was written, in the same files."""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def continue_loggers(loggers: Iterable[Any], step: int) -> None:
    """Make loggers go on in the folder of the run before, without what it logged after `step`.

    Args:
        loggers: Of the trainer, before they have logged anything; others than TensorBoard's and CSV
            are left alone.
        step: Optimizer steps done.
    """
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger | CSVLogger):
            continue
        if logger._version is None:
            versions = {
                int(match[1]): path
                for path in Path(logger.root_dir).glob("version_*")
                if (match := re.fullmatch(r"version_(\d+)", path.name))
            }
            trained = [number for number, path in versions.items() if _is_of_fit(path)]
            logger._version = max(trained or versions, default=None)
        if isinstance(logger, TensorBoardLogger):
            logger._kwargs.setdefault("purge_step", step)
        else:
            _continue_csv(logger, step)


def _is_of_fit(folder: Path) -> bool:
    """Whether training has logged here, and not a validation of its own."""
    metrics = folder / "metrics.csv"
    if not metrics.is_file():
        return (folder / "run_config.yaml").is_file()
    with open(metrics) as file:
        return "train/loss" in file.readline()


def _continue_csv(logger: CSVLogger, step: int) -> None:
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        kept = [row for row in rows if row.get("step", "").isdigit() and int(row["step"]) < step]
        names = list(rows.fieldnames or [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = logger.experiment  # removes the file, and says so
    writer.metrics_keys = names
    with open(path, "w", newline="") as file:
        copy = csv.DictWriter(file, fieldnames=names)
        copy.writeheader()
        copy.writerows(kept)
