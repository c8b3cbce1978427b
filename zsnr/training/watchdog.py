"""A rank that hangs is named, and does not keep the others waiting forever."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L

from zsnr.files import replacing, side_file
from zsnr.locks import EXIT_CODE, remove_leftovers
from zsnr.untrusted import clipped, printable, read_json

_BEAT = {"host": str, "pid": int, "step": int, "doing": str, "waited": float, "written": str}


class Watchdog(L.Callback):
    """Ends a training process that makes no progress, and reports which ranks are behind.

    Each rank writes its current activity to `heartbeats/rank-00000.json` in the folder of the run.
    A rank that has made no progress for too long prints its stack and the state of all ranks and
    exits, so that torchrun or SLURM can restart the run.

    Args:
        minutes: Minutes that a start, a batch, a validation batch or a checkpoint may take. Choose
            less than the strategy's timeout, which ends a run without naming the rank that is
            behind. 0 = no limit.

    Raises:
        ValueError: The number of minutes is negative.
    """

    def __init__(self, minutes: float = 20.0) -> None:
        if not minutes >= 0:
            raise ValueError(f"watchdog.minutes={minutes:g}: wanted 0 or more.")
        self.minutes = minutes
        self._stop: threading.Event | None = None
        self._state: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if not self.minutes or stage != "fit":
            return
        self._folder = Path(trainer.default_root_dir) / "heartbeats"
        self._rank, self._ranks = trainer.global_rank, trainer.world_size
        with side_file(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._rank == 0:
                remove_leftovers(self._folder)
                for file in self._folder.glob("rank-*.json"):
                    number = file.stem.removeprefix("rank-")
                    if number.isdecimal() and int(number) >= self._ranks:
                        file.unlink(missing_ok=True)
        self.note(trainer, "starts")
        self._stop = threading.Event()
        threading.Thread(target=self._watch, args=[self._stop], daemon=True).start()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.note(trainer, "waits for data")

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.note(trainer, "trains on a batch, or waits for other ranks")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.note(trainer, "saves, makes previews, or waits for data")

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.note(trainer, "validates")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.note(trainer, "has validated")

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self._stop is not None:
            self._stop.set()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def note(self, trainer: L.Trainer, doing: str) -> None:
        """Note that this rank makes progress, and what it begins to do."""
        self._state = {
            "rank": trainer.global_rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": trainer.global_step,
            "doing": doing,
        }

    def _watch(self, stop: threading.Event) -> None:
        patience = 60 * self.minutes
        interval = min(10.0, patience / 4)
        name = f"rank-{self._rank:05d}"
        seen: dict[str, Any] = {}
        earlier: list[dict[str, Any] | None] | None = None
        waited, before = 0.0, time.monotonic()
        while True:
            now, state = time.monotonic(), self._state
            # Time in which this thread did not run either, as in a suspend, does not count.
            waited = waited + min(now - before, 2 * interval) if state is seen else 0.0
            seen, before = state, now
            written = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"  # for people
            beat = {**state, "waited": waited, "written": written}
            with side_file(self._folder):  # a full disk is not a rank that hangs
                _write(self._folder / f"{name}.json", json.dumps(beat))
            if waited <= patience:
                earlier = None
            elif earlier is None:
                earlier = self._heartbeats()  # all ranks that live write two more until the report
            elif waited > patience + 2 * interval:
                report = self.report(beat, earlier)
                print(report, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                with side_file(self._folder):
                    _write(self._folder / f"{name}.hung", report)
                os._exit(EXIT_CODE)
            if stop.wait(interval):
                return

    def report(self, beat: dict[str, Any], earlier: list[dict[str, Any] | None]) -> str:
        """Report what this rank waits for, and which ranks are behind it.

        A rank is silent if its heartbeat has not changed: the clocks of hosts cannot be compared.
        """
        lines = [
            f"zsnr: error: rank {beat['rank']} ({beat['host']}, pid {beat['pid']}) has made no "
            f"progress for {beat['waited']:.0f} s at step {beat['step']}; it {beat['doing']}. "
            "All ranks:"
        ]
        for rank, (then, now) in enumerate(zip(earlier, self._heartbeats(), strict=True)):
            if now is None:
                lines.append(f"  rank {rank}: has written nothing")
                continue
            silent = now == then and rank != beat["rank"]
            line = (
                f"  rank {rank} ({now['host']}, pid {now['pid']}): step {now['step']}, "
                f"{now['doing']}, for {now['waited']:.0f} s"
                + (f"; SILENT since {now['written']}" if silent else "")
            )
            lines.append(printable(clipped(line, 300)))
        lines.append(
            "Look at the rank that is behind the others, or silent. trainer.default_root_dir holds "
            "these heartbeats; watchdog.minutes sets the limit."
        )
        return "\n".join(lines)

    def _heartbeats(self) -> list[dict[str, Any] | None]:
        """Read the heartbeat of every rank; None = there is none that can be read."""
        return [_read(self._folder / f"rank-{rank:05d}.json") for rank in range(self._ranks)]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        beat = read_json(path)
    except (ValueError, OSError):
        return None
    typed = all(type(beat.get(name)) is kind for name, kind in _BEAT.items())
    return beat if typed else None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)  # not the run's folder, should it be gone
    with replacing(path) as beside:
        beside.write_text(text + "\n")
