"""What loggers show besides scalars, how a resumed run continues their files, and how a run
continues where they cannot be written.
"""

from __future__ import annotations

import csv
import io
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from zsnr.files import replacing, side_file
from zsnr.untrusted import clipped, read_small

if TYPE_CHECKING:
    import lightning as L
    from PIL.Image import Image

_MAX_TEXT, _MAX_HEADER = 1 << 26, 1 << 20  # bytes of metrics.csv, and of its first line
_BINS = 30  # of a histogram; as many as TensorBoard draws, which then moves no counts
_RECORD = 16  # bytes of an event's length and checksums


def default_loggers(folder: str | Path) -> list[TensorBoardLogger | CSVLogger]:
    """Return the loggers by default: `tensorboard` and `metrics` (CSV) in the folder of a run."""
    return [
        TensorBoardLogger(folder, name="tensorboard", version=""),
        CSVLogger(folder, name="metrics"),
    ]


class _SideFiles(Logger):
    """Mixin for the class of a logger: a run continues, with a warning, where it cannot write."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log scalars; Lightning's `epoch`, which is no curve, only where each is a column."""
        if not isinstance(self, CSVLogger):
            metrics = {name: value for name, value in metrics.items() if name != "epoch"}
        with _side(self):
            super().log_metrics(metrics, step)

    def save(self) -> None:
        with _side(self):
            super().save()

    def finalize(self, status: str) -> None:
        with _side(self):
            super().finalize(status)


class _SideExperiment(_SideFiles):
    """The same for a logger that opens its files, or reaches its server, at the first use."""

    _unreachable = False  # a server, which is not tried again: it may take minutes to fail

    @property
    def experiment(self) -> Any:
        if not self._unreachable:
            with _side(self):
                return super().experiment
            self._unreachable = not isinstance(self, TensorBoardLogger | CSVLogger)
        return DummyLogger().experiment


def guard_loggers(loggers: Iterable[Logger]) -> None:
    """Let a run continue where its loggers cannot write; called again, this does nothing."""
    for logger in loggers:
        cls = type(logger)
        if not isinstance(logger, _SideFiles):
            mixed = _SideExperiment if hasattr(cls, "experiment") else _SideFiles
            # the name of a local class, which no config can name
            name = f"guard_loggers.<locals>.Guarded{cls.__name__}"
            said = {"__module__": __name__, "logs_to": cls.__name__}
            logger.__class__ = type(name, (mixed, cls), said)
        if isinstance(logger, TensorBoardLogger):
            _guard_events()


def _guard_events() -> None:
    """Let TensorBoard's writing thread continue after an event that could not be written."""
    from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

    base: Any = event_file_writer.RecordWriter
    if base.__module__ == __name__:
        return

    class Records(base):
        size = 0

        def write(self, data: bytes) -> None:
            path = os.fsdecode(self._writer.filename)
            with side_file(Path(path).parent):
                try:
                    super().write(data)
                except BaseException:
                    with suppress(OSError):  # half an event would hide all later ones
                        os.truncate(path, self.size)
                    raise
                self.size += _RECORD + len(data)

    event_file_writer.RecordWriter = Records


def _side(logger: Logger) -> AbstractContextManager[None]:
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return side_file(f"{logger.save_dir or '.'}/{logger.name}")
    # another logger may ask its server for its name
    return side_file(f"The log of {getattr(logger, 'logs_to', type(logger).__name__)}")


def config_folder(trainer: L.Trainer) -> Path:
    """Return the folder for the configuration of a run: beside its logs if they are files.

    All ranks call it.
    """
    files = isinstance(trainer.logger, TensorBoardLogger | CSVLogger)
    return Path((trainer.log_dir if files else trainer.default_root_dir) or ".")


def log_image(loggers: Iterable[Any], name: str, image: Image, step: int) -> None:
    """Show an image in TensorBoard, W&B and MLflow.

    Args:
        loggers: Loggers of the trainer.
        name: Tag of the image.
        image: Image to show.
        step: Number of optimizer steps before the one that the image belongs to, as for scalars.
    """
    import numpy as np

    for logger in loggers:
        with _side(logger):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_image(logger.run_id, image, key=name, step=step)
            elif hasattr(logger, "log_image"):  # W&B
                logger.log_image(name, [image], step=step)


def log_luma(loggers: Iterable[Any], name: str, means: Tensor, pixels: Tensor, step: int) -> None:
    """Show histograms of luma in TensorBoard, from -1 (black) to 1 (white).

    Args:
        loggers: Loggers of the trainer.
        name: Set of images that is measured, such as "previews".
        means: Mean luma of each image, on the CPU.
        pixels: Luma of all pixels of these images, or of a regular part of them, on the CPU.
        step: As in `log_image`.
    """
    groups = {"luma_of_images": means.flatten(), "luma_of_pixels": pixels.flatten()}
    edges = torch.linspace(-1, 1, _BINS + 1, dtype=torch.float64)
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger):
            continue
        for group, values in groups.items():
            counts = torch.histogram(values.double(), edges).hist
            with _side(logger):
                logger.experiment.add_histogram_raw(
                    f"{group}/{name}",
                    min=-1.0,
                    max=1.0,
                    num=len(values),
                    sum=float(values.double().sum()),
                    sum_squares=float(values.double().square().sum()),
                    bucket_limits=edges[1:].tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=step,
                )


def log_text(loggers: Iterable[Any], name: str, markdown: str, step: int) -> None:
    """Show text in TensorBoard."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            with _side(logger):
                logger.experiment.add_text(name, markdown, step)


def log_settings(
    loggers: Iterable[Any],
    settings: Mapping[str, Any],
    compared: Iterable[str],
    metrics: Iterable[str],
) -> None:
    """Log the settings of a run: a few in TensorBoard's table of runs, all elsewhere.

    Args:
        loggers: Loggers of the trainer.
        settings: Plain values by name.
        compared: Names of the settings that TensorBoard's table shows, in this order.
        metrics: Tags of the scalars that the table shows beside them.
    """
    columns = {name: settings[name] for name in compared if name in settings}
    for logger in loggers:
        with _side(logger):
            if isinstance(logger, TensorBoardLogger):
                from torch.utils.tensorboard.summary import hparams

                # log_hyperparams would log a value of each metric as well
                writer = logger.experiment._get_file_writer()
                summaries: Any = hparams  # untyped
                for summary in summaries(columns, dict.fromkeys(metrics, 0.0)):
                    writer.add_summary(summary)
            elif not isinstance(logger, CSVLogger):
                logger.log_hyperparams(dict(settings))


def log_layout(loggers: Iterable[Any], layout: Mapping[str, Any]) -> None:
    """Lay out TensorBoard's dashboard "Custom Scalars": {group: {chart: [kind, tags]}}."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            with _side(logger):
                logger.experiment.add_custom_scalars(layout)


def begin_loggers(loggers: Iterable[Any]) -> None:
    """Make TensorBoard forget the logs of an earlier run in the folder that left no checkpoint."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            _purge(logger, 0)


def continue_loggers(loggers: Iterable[Any], step: int) -> None:
    """Make loggers continue the files of the resumed run, without what it logged after `step`.

    Args:
        loggers: Loggers of the trainer, before they have logged anything. Only those of TensorBoard
            and CSV continue files.
        step: Number of optimizer steps that the checkpoint has.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger):
            with _side(logger):
                _continue(logger, step)


def _continue(logger: TensorBoardLogger | CSVLogger, step: int) -> None:
    if logger._version is None:
        versions = {
            int(match[1]): path
            for path in Path(logger.root_dir).glob("version_*/")
            if (match := re.fullmatch(r"version_(\d{1,9})", path.name))
        }
        trained = [number for number, path in versions.items() if _is_of_fit(path)]
        logger._version = max(trained or versions, default=None)
    if isinstance(logger, TensorBoardLogger):
        _purge(logger, step)
    else:
        _continue_csv(logger, step)


def _purge(logger: TensorBoardLogger, step: int) -> None:
    """Make TensorBoard forget this step and later ones in older files."""
    if logger._kwargs.get("purge_step") is None:  # the command line sets it, to None
        logger._kwargs["purge_step"] = step


def _is_of_fit(folder: Path) -> bool:
    """Whether training has logged into this folder, and not a separate validation."""
    metrics = folder / "metrics.csv"
    if not metrics.is_file():
        return (folder / "run_config.yaml").is_file()
    with open(metrics, "rb") as file:
        return b"train/loss" in file.readline(_MAX_HEADER)


def _continue_csv(logger: CSVLogger, step: int) -> None:
    """Keep the rows before a step; if the file cannot be read, it stays and a new one is begun."""
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return
    try:
        names, rows = _rows_before(path, step)
    except ValueError as error:
        rank_zero_warn(f"{error} It stays as it is, and another file is begun.")
        logger._version = None
        return
    with replacing(path) as beside:
        with open(beside, "w", newline="") as file:
            copy = csv.DictWriter(file, fieldnames=names, extrasaction="ignore")
            copy.writeheader()
            copy.writerows(rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            writer = logger.experiment  # removes the file, with a warning
    writer.metrics_keys = names


def _rows_before(path: Path, step: int) -> tuple[list[str], list[dict[str, str]]]:
    """Read the columns of a metrics.csv, and its rows before a step.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        rows = csv.DictReader(io.StringIO(read_small(path, _MAX_TEXT).decode(), newline=""))
        names = list(rows.fieldnames or [])
        numbered = (row for row in rows if re.fullmatch("[0-9]{1,18}", row["step"] or ""))
        return names, [row for row in numbered if int(row["step"]) < step]
    except (ValueError, KeyError, csv.Error) as error:
        raise ValueError(f"{path} cannot be continued: {clipped(str(error))}.") from error
