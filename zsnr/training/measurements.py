"""What `zsnr validate RUN --follow` has measured: a table, a log, and curves on the run's board."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from zsnr.files import side_file
from zsnr.locks import SILENCE, Lock
from zsnr.training.console import append_line
from zsnr.training.loggers import guard_loggers
from zsnr.training.preemption import restarted
from zsnr.untrusted import parse_object, printable, read_text, shown

TABLE, LOG, BOARD = "validate.jsonl", "validate.log", "validate"

_MAX_BYTES = 1 << 30  # of the table


@dataclass(frozen=True)
class Measurement:
    """What was measured of one checkpoint.

    Args:
        step: Optimizer steps of the checkpoint.
        checkpoint: Its name.
        version: Size and modification time of its file, by which a checkpoint that a resumed run
            has written again is told from the first one.
        time: When it was measured, in seconds since 1970.
        seconds: How long that took.
        metrics: Values by tag; None = not finite.
        settings: What decides the values besides the checkpoint, by name.
    """

    step: int
    checkpoint: str
    version: str
    time: float
    seconds: float
    metrics: Mapping[str, float | None]
    settings: Mapping[str, Any]


class Measurements:
    """The measurements of a run in a folder: validate.jsonl, validate.log, tensorboard/validate.

    A line of the table is on disk when `add` returns, and its last line for a step counts. The
    board follows from the table: it is written again where a command starts, or a step is not
    later than the last one, so that a curve never runs backwards.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._lock: Lock | None = None
        self._rows: dict[int, Measurement] = {}  # by step
        self._settings: Mapping[str, Any] = {}
        self._logger: Any = None
        self._shown = -1  # last step on the board

    def open(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Lock the folder and read what is measured.

        Args:
            folder: The folder; it is created.
            settings: Those of the measurements, which must be those of the table.

        Raises:
            LockedError: Another process measures into the folder.
            OSError: The table cannot be written.
            ValueError: The table is damaged, or was measured with other settings.
        """
        table = folder / TABLE
        patience = SILENCE + 30.0 if restarted() else 0.0  # as of a run
        lock = Lock(folder / f".{BOARD}.lock", table, patience)
        lock.take()
        self._folder, self._lock = folder, lock
        self._settings = json.loads(json.dumps(settings, default=str))
        self._rows = {row.step: row for row in _read(table)}
        for row in self._rows.values():
            _check_same(table, row.settings, self._settings)
        with open(table, "a"):  # before anything is measured
            pass
        self._show(self._rows.values())

    def close(self) -> None:
        """Close the files, and release the lock."""
        if self._logger is not None:
            self._logger.finalize("success")
        if self._lock is not None:
            self._lock.release()

    def has(self, step: int, version: str) -> bool:
        """Whether this version of the checkpoint of a step is measured."""
        return step in self._rows and self._rows[step].version == version

    def add(
        self, checkpoint: Path, step: int, version: str, seconds: float, metrics: Mapping[str, Any]
    ) -> None:
        """Record what was measured of a checkpoint, and show it.

        Raises:
            OSError: The table cannot be written.
        """
        assert self._folder is not None
        finite = {tag: float(x) if math.isfinite(x) else None for tag, x in metrics.items()}
        now = datetime.now(UTC).timestamp()
        row = Measurement(
            step, checkpoint.name, version, now, round(seconds, 3), finite, self._settings
        )
        table = self._folder / TABLE
        try:
            with open(table, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{table} cannot be written: {error.strerror or error}.") from error
        self._rows[step] = row
        self._show([row] if step > self._shown else self._rows.values())

    def say(self, line: str, *, result: bool = False) -> None:
        """Print a line, results to stdout and all else to stderr, and append it to the log."""
        line = printable(line, one_line=True)
        print(line, file=sys.stdout if result else sys.stderr, flush=True)
        if self._folder is not None:
            append_line(self._folder / LOG, line)

    def _show(self, rows: Iterable[Measurement]) -> None:
        """Show measurements on the board: later ones, or all of them anew."""
        assert self._folder is not None
        rows = sorted(rows, key=lambda row: row.step)
        if not rows:
            return
        with side_file(self._folder / "tensorboard" / BOARD):
            if self._logger is None or rows[0].step <= self._shown:
                if self._logger is not None:
                    self._logger.finalize("success")
                self._logger = TensorBoardLogger(
                    self._folder, name="tensorboard", version=BOARD, purge_step=0
                )
                guard_loggers([self._logger])
            self._shown = rows[-1].step
            for row in rows:
                for tag, value in row.metrics.items():
                    value = math.nan if value is None else value
                    self._logger.experiment.add_scalar(tag, value, row.step, walltime=row.time)
            self._logger.experiment.flush()


def _read(table: Path) -> list[Measurement]:
    """Read the lines of a table; one that was cut off while it was written is removed.

    Raises:
        ValueError: A line is not in the format that this package writes.
    """
    if not table.is_file():
        return []
    *lines, rest = read_text(table, _MAX_BYTES).split("\n")
    if rest:
        os.truncate(table, table.stat().st_size - len(rest.encode()))
    rows = []
    for number, line in enumerate(lines, start=1):
        where = f"{table}, line {number}"
        values: Mapping[str, Any] = {}
        with suppress(ValueError):
            values = parse_object(line.encode(), where)
        if not _is_measurement(values):
            raise ValueError(
                f"{where} is {shown(line)}: wanted a line that `zsnr validate` wrote. Move the "
                "file away to measure all checkpoints again."
            )
        rows.append(Measurement(**values))
    return rows


def _is_measurement(values: Mapping[str, Any]) -> bool:
    metrics, settings = values.get("metrics"), values.get("settings")
    return (
        values.keys() == {field.name for field in fields(Measurement)}
        and type(values["step"]) is int
        and isinstance(values["time"], float)
        and isinstance(settings, dict)
        and isinstance(metrics, dict)
        and all(value is None or isinstance(value, float) for value in metrics.values())
    )


def _check_same(table: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to put measurements of other settings into one table.

    Raises:
        ValueError: The settings differ.
    """
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(
            f"{name} was {shown(before.get(name))}, is {shown(now.get(name))} now"
            for name in names[:3]
        )
        raise ValueError(
            f"{table} holds measurements with other settings ({changes}): use the same ones, or "
            "another folder with --output FOLDER."
        )
