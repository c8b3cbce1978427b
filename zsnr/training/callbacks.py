"""The images that predict writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from zsnr.agreement import on_first_rank
from zsnr.checkpoints import sharded
from zsnr.checkpoints.checkpoint_file import describe_model
from zsnr.data.prompts import PromptRequest
from zsnr.files import HeldFolder, replacing
from zsnr.locks import LOCK, Lock, remove_leftovers
from zsnr.pipeline import write_sample
from zsnr.training.module import LatentDiffusion
from zsnr.untrusted import parse_object, read_json, read_text, shown

_MAX_BYTES = 1 << 30  # of a manifest


class PredictionWriter(BasePredictionWriter):
    """Writes the images of predict and a manifest.jsonl; an interrupted command resumes.

    A folder belongs to one checkpoint with the same prompts and settings. With others, it is
    refused.

    Args:
        folder: Folder to write the images to. None = not set, which predict refuses.
    """

    MANIFEST, RUN = "manifest.jsonl", "run.json"

    def __init__(self, folder: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.folder = None if folder is None else Path(folder)
        self._lock: Lock | None = None
        self._held: HeldFolder | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "predict":
            return
        if self.folder is None:
            raise ValueError("--output is not set: name the folder that predict is to write to.")
        data: Any = trainer.datamodule
        for request in data.requests:
            try:
                size = pl_module.image_size
                pl_module.codec.latent_shape(request.height or size, request.width or size)
            except ValueError as error:
                raise ValueError(f"Prompt {request.line}: {error}") from error
        self._rank = trainer.global_rank
        identity = run_identity(pl_module, data.requests, trainer.ckpt_path)
        try:
            data.done = on_first_rank(lambda: self._begin(identity))
        except Exception:
            self._release()
            raise
        self._held = HeldFolder(self.folder)

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: list[PromptRequest],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        assert self.folder is not None
        assert self._held is not None
        self._held.check()
        for request, image in zip(batch, prediction, strict=True):
            write_sample(image, self.folder / request.filename, self._manifest(self._rank))

    def on_predict_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.strategy.barrier()
        on_first_rank(self._finish)
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._release()

    def _begin(self, identity: str) -> set[str]:
        assert self.folder is not None
        self._lock = Lock(self.folder / LOCK, self.folder)
        self._lock.take()
        return self._open(identity)

    def _finish(self) -> None:
        assert self._held is not None
        self._held.check()
        self._join()

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
        if self._lock is not None:
            self._lock.release()

    def _manifest(self, rank: int) -> Path:
        """Return a rank's manifest: several ranks cannot safely append to one file."""
        assert self.folder is not None
        return self.folder / (f".{self.MANIFEST}.{rank:05d}" if rank else self.MANIFEST)

    def _join(self) -> set[str]:
        """Join the manifests of all ranks, and return the names of the files that are done."""
        assert self.folder is not None
        parts = sorted(self.folder.glob(f".{self.MANIFEST}.*[0-9]"))
        lines: dict[str, str] = {}
        for part in [self.folder / self.MANIFEST, *parts]:
            lines |= _finished(part)
        if lines:
            with replacing(self.folder / self.MANIFEST) as beside:
                beside.write_text("".join(lines.values()), encoding="utf-8")
        for part in parts:
            part.unlink()
        return set(lines)

    def _open(self, identity: str) -> set[str]:
        """Make the folder, or read which files an interrupted run has written into it."""
        assert self.folder is not None
        run = self.folder / self.RUN
        remove_leftovers(self.folder)
        if run.is_file():
            if read_json(run).get("identity") != identity:
                raise ValueError(
                    f"{self.folder} holds images of another checkpoint, prompts file or settings: "
                    "choose another --output."
                )
            return self._join()
        if any(path.name != LOCK for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty: choose another --output.")
        with replacing(run) as beside:
            beside.write_text(json.dumps({"identity": identity}) + "\n")
        return set()


def run_identity(
    module: LatentDiffusion, requests: Sequence[PromptRequest], checkpoint: Any
) -> str:
    """Hash all that determines the images: model, checkpoint, prompts and sampling settings."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(requests).encode())
    with module.pipeline() as pipe:
        facts = {**pipe.describe(module.sampling), **describe_model(pipe.model)}
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    if checkpoint is not None:
        path = Path(checkpoint)
        stat = (path / sharded.REST if path.is_dir() else path).stat()
        digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _finished(manifest: Path) -> dict[str, str]:
    """Read the lines of the files that are done: whole lines whose file exists, by its name.

    Raises:
        ValueError: A line is not in the format that predict writes.
    """
    if not manifest.is_file():
        return {}
    lines = read_text(manifest, _MAX_BYTES).split("\n")[:-1]
    done: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{manifest}, line {number}"
        name = parse_object(line.encode(), where).get("file")
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{where}: file={shown(name)}: wanted the name of an image.")
        if (manifest.parent / name).is_file():
            done[name] = line + "\n"
    return done
