"""Images that a model in training makes of the same prompts and seeds, again and again."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from zsnr.data.images import to_unit_range
from zsnr.files import side_file
from zsnr.metrics.luma import luma
from zsnr.noise import sample_generator
from zsnr.pipeline import save_png
from zsnr.reports.images import image_grid
from zsnr.training.loggers import log_image, log_luma
from zsnr.training.module import LatentDiffusion
from zsnr.untrusted import printable

_WIDTH = 128  # minimum width of an image in the grid, in pixels
_FONT = 12  # minimum size of the captions, in pixels
_LINES = 3  # of a prompt in its caption, at most


class Previews(Callback):
    """Images sampled from fixed prompts and seeds at regular steps of training.

    They are sampled as predict samples, by model.sampling. Each grid, with prompt and seed below
    every image, is written to the folder `previews` of the run and shown in TensorBoard, W&B and
    MLflow. The mean luma of the images goes to all loggers, and its histograms to TensorBoard.

    Args:
        prompts: Text prompts, one for each image. "" = an image without a prompt.
        seeds: Seeds of the initial noise, one for each prompt. None = 0, 1, 2, ...
        every_n_steps: Number of optimizer steps between two grids.
        columns: Number of images in a row of the grid.

    Raises:
        ValueError: There are no prompts, another number of seeds, or a number is out of range.
    """

    def __init__(
        self,
        prompts: list[str],
        seeds: list[int] | None = None,
        every_n_steps: int = 1000,
        columns: int = 8,
    ) -> None:
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(
                f"Previews has {len(seeds)} seeds for {len(prompts)} prompts: give one seed for "
                "each prompt, or none."
            )
        if not prompts:
            raise ValueError("Previews has no prompts: give at least one, or drop the callback.")
        for seed in seeds or []:
            sample_generator(seed)
        for name, value in (("every_n_steps", every_n_steps), ("columns", columns)):
            if value < 1:
                raise ValueError(f"Previews {name}={value}: wanted at least 1.")
        self.prompts = prompts
        self.seeds = [*range(len(prompts))] if seeds is None else seeds
        self.every_n_steps, self.columns = every_n_steps, columns
        self._done = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._done = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._done:
            self._done = step
            self._show(trainer, pl_module, step)

    def _show(self, trainer: L.Trainer, module: LatentDiffusion, step: int) -> None:
        """Sample as many images on each rank: a sharded network waits for all ranks."""
        rank, ranks = trainer.global_rank, trainer.world_size
        each = -(-len(self.prompts) // ranks)
        mine = [(rank + i * ranks) % len(self.prompts) for i in range(each)]
        sampling = module.sampling
        module.warn_of_cuts(self.prompts)
        with module.pipeline() as pipe, trainer.precision_plugin.predict_step_context():
            images = pipe(
                [self.prompts[i] for i in mine],
                seeds=[self.seeds[i] for i in mine],
                sampler=sampling.sampler,
                num_steps=sampling.num_steps,
                spacing=sampling.spacing,
                guidance=sampling.guidance,
                progress=False,
            )
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
        everyone = trainer.strategy.all_gather(pixels.to(trainer.strategy.root_device))
        by_prompt = everyone.reshape(ranks, *pixels.shape).transpose(0, 1).flatten(0, 1)
        if trainer.is_global_zero:
            self._write(trainer, module, by_prompt[: len(self.prompts)].cpu(), step)

    def _write(
        self, trainer: L.Trainer, module: LatentDiffusion, pixels: Tensor, step: int
    ) -> None:
        """Write images (N, H, W, 3), uint8, to the run's folder and its loggers."""
        done_before = step - 1  # so are scalars counted, and what a resumed run keeps
        folder = Path(trainer.default_root_dir) / "previews"
        with side_file(folder):
            tiles = zip(map(Image.fromarray, pixels.numpy()), self.prompts, self.seeds, strict=True)
            grid = image_grid([captioned(*each) for each in tiles], self.columns, gap=8)
            log_image(trainer.loggers, "previews", grid, done_before)
            folder.mkdir(exist_ok=True)  # not the run's folder, should it be gone
            save_png(grid, folder / f"step-{step:08d}.png")
        images = to_unit_range(pixels.permute(0, 3, 1, 2))
        if module.watcher is not None:
            module.watcher.see(images)
        values = luma(images).flatten(1)
        log_luma(trainer.loggers, "previews", values.mean(1), values, done_before)
        for logger in trainer.loggers:
            logger.log_metrics({"luma_mean/previews": float(values.mean())}, done_before)


def captioned(image: Image.Image, prompt: str, seed: int) -> Image.Image:
    """Return an image with prompt and seed below it, on white.

    An image that is too narrow for text is enlarged by a whole factor, without interpolation.
    """
    factor = -(-_WIDTH // image.width)
    width, height = image.width * factor, image.height * factor
    size = max(_FONT, width // 32)
    font = ImageFont.load_default(size)
    letters = int(width // font.getlength("n"))
    text = printable(prompt, one_line=True) or "(no prompt)"
    lines = [*wrap(text, letters, max_lines=_LINES, placeholder=" ..."), f"seed {seed}"]
    line_height = size + size // 3
    tile = Image.new("RGB", (width, height + line_height * (len(lines) + 1)), "white")
    tile.paste(image.resize((width, height), Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(tile)
    for i, line in enumerate(lines):
        color = "black" if i < len(lines) - 1 else "gray"
        draw.text((0, height + size // 3 + i * line_height), line, fill=color, font=font)
    return tile
