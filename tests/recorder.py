"""A callback that writes down every batch, and kills its process when it is told to."""

import hashlib
import json
import os
import signal
from pathlib import Path

from lightning.pytorch.callbacks import Callback


class Recorder(Callback):
    """Appends a line a batch: step, rank, positions, keys, and digests of what is trained on.

    Args:
        path: The file; the rank is appended.
        kill_after_step: Kill the process, with no chance to clean up. None = never.
    """

    def __init__(self, path: str, kill_after_step: int | None = None):
        self.path, self.kill_after_step = path, kill_after_step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        pixels = batch["image"] if "image" in batch else batch["moments"]
        line = {
            "step": trainer.global_step,
            "positions": batch["position"].tolist(),
            "keys": batch["key"],
            "captions": batch["caption"],
            "digests": [hashlib.md5(x.cpu().numpy().tobytes()).hexdigest() for x in pixels],
        }
        with open(f"{self.path}.{trainer.global_rank}", "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.kill_after_step is not None and trainer.global_step >= self.kill_after_step:
            os.kill(os.getpid(), signal.SIGKILL)


def read(path):
    """The global batches of a run by step: {step: {position: (key, caption, digest)}}.

    A step that was trained twice, before and after a kill, must be the same both times.
    """
    steps = {}
    for file in sorted(Path(path).parent.glob(Path(path).name + ".*")):
        for text in file.read_text().splitlines():
            line = json.loads(text)
            batch = steps.setdefault(line["step"], {})
            rows = zip(line["keys"], line["captions"], line["digests"], strict=True)
            for position, row in zip(line["positions"], rows, strict=True):
                assert batch.setdefault(position, row) == row, f"step {line['step']} differs"
    return steps
