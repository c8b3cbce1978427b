"""What a training or validation batch gets where it is loaded: random numbers and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zsnr.conditioning.tokenizers import PromptTokenizer
from zsnr.data.cache import TEXT
from zsnr.draws import Draws, training_draws, validation_draws
from zsnr.timestep_law import TimestepLaw

DRAWS, PROMPTS, TOKENS = "draws", "prompts", "tokens"  # keys of a batch


@dataclass(frozen=True)
class Preparation:
    """Adds random numbers, and captions as the text encoder reads them, to a batch.

    It does so in the processes that load data, so that the training process need not. What it adds
    is a function of the seed and the positions, wherever it runs.

    Args:
        seed: Seed of the run.
        channels: C of the latents.
        factor: Downsampling factor of the codec.
        num_timesteps: T.
        caption_dropout: Probability that a caption is replaced by the empty prompt.
        tokenizer: That of the text encoder. None = it takes prompts.
        strata: Timesteps of validation, (S,). None = draw as training does.
        timestep_law: Distribution of the timesteps of training.
    """

    seed: int
    channels: int
    factor: int
    num_timesteps: int
    caption_dropout: float = 0.0
    tokenizer: PromptTokenizer | None = None
    strata: Tensor | None = None
    timestep_law: TimestepLaw = TimestepLaw()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch with `draws`, `prompts`, and `tokens` where there is a tokenizer.

        Args:
            batch: image (B, 3, H, W), moments (B, 2 C, h, w) or latents (B, C, h, w), caption
                unless there are embeddings, position (B,) and global_batch_size.

        Raises:
            ValueError: The batch lacks one of these.
        """
        missing = [name for name in ("position", "global_batch_size") if name not in batch]
        embedded = "text_embedding" in batch or any(name.startswith(TEXT) for name in batch)
        if "caption" not in batch and not embedded:
            missing.append("caption")
        if not batch.keys() & {"image", "moments", "latents"}:
            missing.append("image, moments or latents")
        if missing:
            raise ValueError(
                f"The batch has no {' and no '.join(missing)}. Give your dataset to "
                "zsnr.training.DataModule(train=...), and that as datamodule to Trainer.fit, in "
                "place of a DataLoader: the random numbers of a sample follow from its position."
            )
        draws = self._draws(batch["position"].tolist(), batch)
        batch = {**batch, DRAWS: draws}
        if "caption" not in batch or any(name.startswith(TEXT) for name in batch):
            return batch
        captions = zip(batch["caption"], draws.keep.tolist(), strict=True)
        batch[PROMPTS] = [text if keeps else "" for text, keeps in captions]
        if self.tokenizer is not None:
            batch[TOKENS] = self.tokenizer(batch[PROMPTS])
        return batch

    def _draws(self, positions: Sequence[int], batch: dict[str, Any]) -> Draws:
        if "latents" in batch:
            channels, h, w = batch["latents"].shape[1:]
            if channels != self.channels:
                raise ValueError(
                    f"The dataset's latents have {channels} channels: wanted {self.channels}, as "
                    "those of the codec."
                )
        elif "moments" in batch:
            h, w = batch["moments"].shape[-2:]
        else:
            h, w = (side // self.factor for side in batch["image"].shape[-2:])
        shape = self.channels, h, w
        if self.strata is not None:
            return validation_draws(self.seed, positions, self.strata, shape)
        size, T = batch["global_batch_size"], self.num_timesteps
        return training_draws(
            self.seed, positions, size, shape, T, self.caption_dropout, self.timestep_law
        )
