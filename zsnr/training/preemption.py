"""Signals that ask a run to stop: all ranks save at the next step together, and exit."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

import lightning as L
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from zsnr.agreement import is_first_process
from zsnr.stops import stop_on, stop_on_first, stop_on_second
from zsnr.training.checkpointing import Checkpoints

_INTERRUPT = (
    b"\nzsnr: Ctrl-C: the run ends after this step, with a checkpoint. "
    b"Press Ctrl-C again to end it at once, without one.\n"
)
_received: set[int] = set()


def listen(*signals: signal.Signals) -> None:
    """Only note these signals from now on."""
    if threading.current_thread() is threading.main_thread():
        for number in signals:
            signal.signal(number, lambda number, frame: _received.add(number))


def _interrupt() -> None:
    """Note Ctrl-C, and say what it does."""
    _received.add(signal.SIGINT)
    if is_first_process():
        os.write(2, _INTERRUPT)  # a handler may interrupt a print


def asked() -> bool:
    """Whether a signal has asked this process to stop."""
    return bool(_received)


class Preemption(L.Callback):
    """Saves a checkpoint and stops on SIGTERM, SIGUSR1, or Ctrl-C in a terminal.

    Under SLURM, SIGUSR1 also requeues the job; a second Ctrl-C ends the run at once.

    A signal handler that saved a checkpoint would interrupt the communication of the ranks and wait
    for them forever. The signal is therefore noted, and all ranks learn of it in the reduction that
    every optimizer step makes anyway.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # replaces Lightning's handlers, which save at once, and its question to rank 0 whether it
        # has had a signal, for which the device would wait in every micro-batch
        listen(signal.SIGTERM, signal.SIGUSR1)
        stop_on_second(signal.SIGINT, _interrupt)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.stop_requested = bool(_received)
        pl_module.requeue_requested = signal.SIGUSR1 in _received

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Cut short a validation within training; its losses are not logged."""
        if stops(trainer):
            pl_module.validation_cut = True
            raise StopIteration

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.validation_cut = False
        if trainer.state.fn != "fit":
            _stop_at_once()

    def on_test_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        _stop_at_once()

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        _stop_at_once()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, SystemExit):
            stop_launched(trainer)
        _received.clear()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if not pl_module.stop_agreed or trainer.should_stop:
            return
        pl_module.interrupted = signal.SIGINT in _received
        step = trainer.global_step
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints):
                callback.save(trainer, wait=True)
        rank_zero_info(f"Stopped by a signal: a checkpoint of step {step} is saved.")
        trainer.strategy.barrier()
        if pl_module.requeue_agreed and trainer.is_global_zero:
            requeue()
        trainer.limit_val_batches = 0  # Lightning would validate once more, or not stop yet
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
        trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        stop_on_first(signal.SIGINT)
        _received.clear()


def stop_launched(trainer: L.Trainer) -> None:
    """Stop the processes that Lightning has started."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        fits = trainer.state.fn == "fit"  # where SIGTERM would only be noted
        launcher.kill(signal.SIGKILL if fits else signal.SIGTERM)


def stops(trainer: L.Trainer) -> bool:
    """Whether a signal has asked any rank of a training run to stop; every rank calls it."""
    if trainer.state.fn != "fit":
        return False
    decision = trainer.strategy.reduce_boolean_decision(asked(), all=False)
    return bool(decision)


def _stop_at_once() -> None:
    """Let SIGTERM end a command that saves no checkpoint at once.

    Lightning would ignore it there, or wait for all ranks. SIGUSR1, which SLURM sends before the
    time limit, does nothing: SIGTERM follows it.
    """
    listen(signal.SIGUSR1)
    stop_on(signal.SIGTERM)


def stopped_early(trainer: L.Trainer, module: Any) -> int:
    """Return the exit code of a run that a signal has stopped before its end.

    Returns:
        143, or 130 for Ctrl-C, so that a script stops with the run. 0 = the run was at its end, or
        SLURM restarts it.
    """
    requeued = module.requeue_agreed and "SLURM_JOB_ID" in os.environ
    ended = 0 <= trainer.max_steps <= trainer.global_step
    if not module.stop_agreed or requeued or ended:
        return 0
    return 128 + (signal.SIGINT if module.interrupted else signal.SIGTERM)


def requeue() -> None:
    """Requeue this SLURM job; outside of SLURM this does nothing."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    if job is not None:
        job += "_" + os.environ["SLURM_ARRAY_TASK_ID"]
    else:
        job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
        rank_zero_info(f"Job {job} is requeued.")
    except (OSError, subprocess.SubprocessError) as error:
        rank_zero_warn(
            f"`scontrol requeue {job}` failed ({error}): the checkpoint is written; submit the job "
            "again to resume."
        )


def restarted() -> bool:
    """Whether SLURM or torchrun may have started this run before.

    torchrun counts restarts on each node, and all nodes must come to the same result: on several
    nodes, a run that may be restarted counts as restarted.
    """
    slurm, torchrun, max_restarts, nodes = (
        int(os.environ.get(name) or 0)
        for name in (
            "SLURM_RESTART_COUNT",
            "TORCHELASTIC_RESTART_COUNT",
            "TORCHELASTIC_MAX_RESTARTS",
            "GROUP_WORLD_SIZE",
        )
    )
    return slurm > 0 or torchrun > 0 or (max_restarts > 0 and nodes > 1)
