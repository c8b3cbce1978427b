"""What fit, validate, test and predict say while they run: progress, and what a run has come to."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from tqdm import tqdm

from zsnr.checkpoints.run_folder import steps
from zsnr.files import side_file
from zsnr.progress import counted, duration
from zsnr.training.checkpointing import Checkpoints

LOG = "fit.log"
"""Name of the file in a run's folder that holds its lines of progress."""

_SECONDS_BETWEEN_LINES = 10.0  # of validate and predict, which have no logging interval
_NOISE = (
    *("Tip:", "GPU available:", "TPU available:", "HPU available:", "Seed set to"),
    *("`Trainer.fit` stopped:", "`Trainer` was configured", "Restoring states from"),
    *("Restored all states", "Loaded model weights", "Loading `train_dataloader`"),
    *("distributed_backend=", "Initializing distributed:", "All distributed processes"),
    *("LOCAL_RANK:", "You are using a CUDA device", "Using 16bit", "Using bfloat16"),
    "The following callbacks returned in",
)
_WARNINGS = (
    ".*in eval mode at the start of training",  # the averaged weights
    ".*isinstance.treespec, LeafSpec",
    ".*does not have many workers",
    ".*infer the batch indices fetched",
    ".*sync_dist=True",  # values are reduced already
    ".*across ranks is zero",  # no validation data
    ".*broadcast_buffers. is deprecated",
    ".*dirpath has changed from",
    ".*args parameter is intended to run from within",
    ".*`srun` command is available on your system but is not used",
    ".*TensorBoardLogger. directory .* exists",
    ".*Experiment logs directory .* exists",
    ".*The number of training batches .* is smaller than the logging interval",
)


def quiet_lightning() -> None:
    """Hide messages and warnings of Lightning that concern what this package does on purpose."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities"):
        for logger in (name, f"{name}.rank_zero", f"{name}.seed", f"{name}.distributed"):
            logging.getLogger(logger).addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    """Whether a message of Lightning's log tells the user something."""
    message = record.getMessage()
    return bool(message.strip("- \n")) and not any(noise in message for noise in _NOISE)


def on_terminal() -> bool:
    """Whether a person watches, so that bars can be drawn."""
    return sys.stdout.isatty() and sys.stderr.isatty()


class Pace:
    """Images per second of training, without the time of validation, and the time left.

    Args:
        trainer: What trains.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._began = self._since = time.monotonic()
        self._first = self._step = trainer.global_step
        self._paused: float | None = None

    def pause(self) -> None:
        """Stop the clock of the rate."""
        self._paused = time.monotonic()

    def resume(self) -> None:
        """Let the clock of the rate run again."""
        if self._paused is not None:
            self._since += time.monotonic() - self._paused
        self._paused = None

    def steps(self, trainer: L.Trainer) -> int:
        """Return the number of steps since the last lap."""
        steps: int = trainer.global_step - self._step
        return steps

    def lap(self, trainer: L.Trainer, batch_size: int) -> tuple[float, float]:
        """Return images per second and seconds since the last lap."""
        now, steps = time.monotonic(), self.steps(trainer)
        seconds = max(now - self._since, 1e-9)
        self._since, self._step = now, trainer.global_step
        return steps * batch_size / seconds, seconds

    def line(self, trainer: L.Trainer, batch_size: int) -> str:
        """Say the step, the loss, images per second since the last line, and the time left."""
        step, total = trainer.global_step, trainer.max_steps
        rate, _ = self.lap(trainer, batch_size)
        left = (total - step) * (self._since - self._began) / max(1, step - self._first)
        return f"step {step} of {total}, {loss_and_rate(trainer, rate)}, {duration(left)} left"


class Paced(Callback):
    """A callback that measures the pace of training, whose clock stands during validation."""

    pace: Pace | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.pace = Pace(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.pace is not None:
            self.pace.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.pace is not None:
            self.pace.resume()


class ProgressLines(Paced):
    """Prints one line for each logging interval, to stderr and to fit.log in the run's folder.

    A line has the step and the number of steps, the loss, images per second over all devices and
    the time left. It also says at the end what the run has come to.

    Args:
        printing: Whether to print lines; the file is written in any case.
    """

    def __init__(self, printing: bool = True) -> None:
        self.printing = printing
        self._verdict = ""  # the last line of model.watch in the file

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._start, self._first = time.monotonic(), trainer.global_step
        self._last = trainer.global_step
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        begin = "begins" if trainer.global_step == 0 else f"resumes at step {trainer.global_step}"
        ranks = trainer.world_size
        self._say(
            trainer,
            f"training {begin}: {trainer.max_steps} steps, {trained / 1e6:.1f} M trained "
            f"parameters on {ranks} {trainer.strategy.root_device.type} "
            f"device{'s' if ranks > 1 else ''}, precision {trainer.precision}",
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._write_verdict(trainer, pl_module)  # of the settings, or of the last step
        step = trainer.global_step
        last = step == trainer.max_steps
        interval = max(1, trainer.log_every_n_steps)
        if step == self._last or (step % interval and not last) or not trainer.is_global_zero:
            return
        self._last = step
        assert self.pace is not None
        self._say(trainer, self.pace.line(trainer, batch["global_batch_size"]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn == "fit" and loss is not None and not trainer.sanity_checking:
            step = trainer.global_step
            self._say(
                trainer, f"step {step} of {trainer.max_steps}, validation loss {float(loss):.4g}"
            )
        self._write_verdict(trainer, pl_module)

    def _write_verdict(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the last line of model.watch to the log, unless it is written."""
        watcher = getattr(pl_module, "watcher", None)
        if trainer.is_global_zero and watcher is not None and watcher.line != self._verdict:
            self._verdict = watcher.line
            self._write(trainer, watcher.line)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._write_verdict(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        steps = trainer.global_step - self._first
        seconds = time.monotonic() - self._start
        size = getattr(trainer.datamodule, "batch_size", 0)
        rate = f", {steps * size / seconds:.3g} images/s" if seconds > 0 and steps else ""
        self.summary = f"{counted(steps, 'step')} in {duration(seconds)}{rate}"
        self._write(trainer, f"trained {self.summary}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_validation_start(trainer, pl_module)
        self._validating = self._shown_batch = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        now = time.monotonic()
        if now - self._shown_batch < _SECONDS_BETWEEN_LINES:
            return
        self._shown_batch = now
        if trainer.is_global_zero and self.printing:
            total, done = _batches(trainer.num_val_batches), batch_idx + 1
            left = ""
            if total is not None:
                left = f", {duration((total - done) * (now - self._validating) / done)} left"
            _print(f"validating: {done} of {total or 'unknown'} batches{left}")

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._start = self._shown = time.monotonic()
        self._done = 0

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        now = time.monotonic()
        self._done += len(batch)
        total = _images(trainer)
        if now - self._shown < _SECONDS_BETWEEN_LINES and self._done < total:
            return
        self._shown = now
        rate = self._done / max(now - self._start, 1e-9)
        left = duration((total - self._done) / rate) if rate else "unknown time"
        if trainer.is_global_zero and self.printing and self._done:
            each = f" of rank 0, one of {trainer.world_size}" if trainer.world_size > 1 else ""
            _print(f"{self._done} of {total} images{each}, {rate:.3g} images/s, {left} left")

    def _say(self, trainer: L.Trainer, line: str) -> None:
        if trainer.is_global_zero:
            self._write(trainer, line)
            if self.printing:
                _print(line)

    def _write(self, trainer: L.Trainer, line: str) -> None:
        folder = Path(trainer.default_root_dir)
        append_line(folder / LOG, line)


def append_line(log: Path, line: str) -> None:
    """Append a line with the time to a log; a command continues if it cannot be written."""
    with side_file(log), open(log, "a", encoding="utf-8") as file:
        file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC  {line}\n")


def loss_and_rate(trainer: L.Trainer, rate: float) -> str:
    """Say the last logged loss, if there is one, and images per second."""
    loss = trainer.callback_metrics.get("train/loss")
    said = "" if loss is None else f"loss {float(loss):.4g}, "
    return f"{said}{rate:.3g} images/s"


class StepBar(Paced, ProgressBar):
    """A bar on the terminal: steps of training, batches of validation, images of predict."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm[Any] | None = None
        self._inner: tqdm[Any] | None = None
        self._shown = True

    def disable(self) -> None:
        self._shown = False

    def enable(self) -> None:
        self._shown = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        tqdm.write(" ".join(map(str, args)))

    def _open(self, what: str, total: int | None, unit: str, initial: int = 0) -> tqdm[Any]:
        size = shutil.get_terminal_size()  # with its own idea of a terminal that has no size
        return tqdm(
            desc=what,
            total=total,
            unit=unit,
            initial=initial,
            ncols=size.columns,
            nrows=size.lines,
            disable=not self._shown,
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._bar = self._open("training", trainer.max_steps, "step", trainer.global_step)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._bar is not None
        assert self.pace is not None
        self._bar.update(trainer.global_step - self._bar.n)
        if self.pace.steps(trainer) >= max(1, trainer.log_every_n_steps):
            rate, _ = self.pace.lap(trainer, batch["global_batch_size"])
            self._bar.set_postfix_str(loss_and_rate(trainer, rate))

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_validation_start(trainer, pl_module)
        self._inner = self._open("validating", _batches(trainer.num_val_batches), "batch")
        self._inner.leave = trainer.state.fn != "fit"

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._inner = self._open("testing", _batches(trainer.num_test_batches), "batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._inner = self._open("generating", _images(trainer), "image")

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        assert self._inner is not None
        self._inner.update()

    on_test_batch_end = on_validation_batch_end

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any
    ) -> None:
        assert self._inner is not None
        self._inner.update(len(batch))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._inner is not None:
            self._inner.close()
            self._inner = None

    on_test_end = on_predict_end = on_validation_end

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)
        self.on_train_end(trainer, pl_module)


def progress_callbacks(bar: bool) -> list[Callback]:
    """Return what shows progress: a bar on a terminal, else lines; lines go to fit.log always.

    Args:
        bar: Whether progress is to be shown at all, as trainer.enable_progress_bar says.
    """
    terminal = on_terminal()
    lines: list[Callback] = [ProgressLines(printing=bar and not terminal)]
    return [*lines, StepBar()] if bar and terminal else lines


def shows_progress(trainer: L.Trainer) -> bool:
    """Whether this rank shows progress, by a bar or by lines."""
    lines = any(isinstance(each, ProgressLines) and each.printing for each in trainer.callbacks)
    return trainer.is_global_zero and (lines or trainer.progress_bar_callback is not None)


def print_summary(trainer: L.Trainer, stopped: bool) -> None:
    """Print to stdout what fit has come to: time, checkpoint, and what to do next.

    Args:
        trainer: What has trained.
        stopped: Whether a signal stopped it before its end.
    """
    if not trainer.is_global_zero:
        return
    folder, step, total = Path(trainer.default_root_dir), trainer.global_step, trainer.max_steps
    lines = [each for each in trainer.callbacks if isinstance(each, ProgressLines)]
    took = getattr(lines[0], "summary", "") if lines else ""
    early = stopped or step < total
    what = f"{'stopped' if stopped else 'ended'} at step {step} of {total}" if early else "done"
    if took:
        print(f"{what}: trained {took}")
    elif not early and lines:  # training has not begun
        print(f"done: nothing is left to train at step {step} of {total}")
    else:
        print(what)
    checkpoints = [each for each in trainer.callbacks if isinstance(each, Checkpoints)]
    written = steps(Path(checkpoints[0].dirpath or "checkpoints")) if checkpoints else []
    last = written[-1] if written else None
    commands = []
    if last is not None:
        print(f"checkpoint: {_near(last)}")
        usual = last.parent.parent == folder
        model = shlex.quote(_near(folder if usual else last))
        commands.append(f'zsnr sample {model} "a prompt"')
    if any(isinstance(each, TensorBoardLogger) for each in trainer.loggers):
        commands.append(f"tensorboard --logdir {shlex.quote(_near(folder))}")
    for i, command in enumerate(commands):
        print(f"{'      ' if i else 'next: '}{command}")
    if early and last is not None:
        print("resume: run the same command with --ckpt_path last")
    sys.stdout.flush()


def _images(trainer: L.Trainer) -> int:
    """Count the images that this rank generates in a predict."""
    data: Any = trainer.datamodule
    left = [request for request in data.requests if request.filename not in data.done]
    return len(left[trainer.global_rank :: trainer.world_size])


def _batches(counts: Any) -> int | None:
    """Return the number of batches; None if it is not known."""
    return int(sum(count for count in counts if count != float("inf"))) or None


def _near(path: Path) -> str:
    """Say a path from here, where it lies here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
