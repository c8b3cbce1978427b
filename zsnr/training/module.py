"""The LightningModule: UNet, schedule and v loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from zsnr.checkpoints import Model
from zsnr.checkpoints.own import KEY, describe_model
from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner, Remembered
from zsnr.data.cache import Cache, check_cache
from zsnr.data.prompts import PromptRequest
from zsnr.denoiser import Conditioning
from zsnr.loss import LossWeighting, diffusion_loss
from zsnr.networks import UNet, UNetConfig
from zsnr.noise import offset_noise
from zsnr.pipeline import Sampling, TextToImage
from zsnr.prediction import PredictionType, check_prediction_type, prediction_target
from zsnr.schedule import NoiseSchedule
from zsnr.timesteps import get_timesteps, trailing
from zsnr.training.draws import Draws, training_draws, validation_draws
from zsnr.training.ema import EMAConfig, averaged_copy, update_average


@dataclass(frozen=True)
class LearningRate:
    """The optimizer's learning rate over the run, as a factor of its own.

    Args:
        warmup_steps: Steps of linear growth from 0.
        decay: After it: "constant", or "cosine" or "linear" down to `final` at trainer.max_steps.
        final: Factor at the end of a decay.
    """

    warmup_steps: int = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final: float = 0.0

    def factor(self, step: int, max_steps: int) -> float:
        """Return the factor of optimizer step `step`, from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left


class LatentDiffusion(L.LightningModule):
    """A latent diffusion model in training.

    Args:
        codec: Images to latents; frozen.
        conditioner: Prompts to conditioning; frozen, or trained along.
        unet: Size of a new UNet, or a folder of diffusers or hub id whose `unet` to start from.
        schedule: The noise schedule; loss, previews and predict all use this one.
        prediction_type: What the network predicts.
        loss: The weight lambda_t.
        caption_dropout: Probability that a caption is replaced by null in training.
        offset_noise: Strength of offset noise (section 5.4), to compare with; 0 = none.
        optimizer: AdamW by default.
        learning_rate: Its warm-up and decay.
        ema: Averaged weights. None = no averaging.
        sampling: How previews and predict sample.
        gradient_checkpointing: Trade time for memory in the UNet.
        image_size: Height and width, in pixels. Set by data.image_size.
        seed: Of every random number in training. Set by data.seed.

    Raises:
        ValueError: Parts that do not fit each other.
    """

    def __init__(
        self,
        codec: LatentCodec,
        conditioner: Conditioner,
        unet: UNetConfig | str,
        schedule: NoiseSchedule = NoiseSchedule(),
        prediction_type: PredictionType = "v_prediction",
        loss: LossWeighting = LossWeighting(),
        caption_dropout: float = 0.1,
        offset_noise: float = 0.0,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-4, weight_decay=0.01, fused=True),
        learning_rate: LearningRate = LearningRate(),
        ema: EMAConfig | None = EMAConfig(),
        sampling: Sampling = Sampling(),
        gradient_checkpointing: bool = False,
        image_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_settings(schedule, prediction_type, loss, sampling.spacing, sampling.num_steps)
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"caption_dropout={caption_dropout}: wanted a number in [0, 1].")
        if not conditioner.trainable and not conditioner.pretrained:
            raise ValueError(
                "The text encoder has random weights and is frozen: set trainable: true, or give "
                "it pretrained weights."
            )
        self.schedule, self.prediction_type = schedule, prediction_type
        self.caption_dropout, self.offset_strength = caption_dropout, offset_noise
        self.make_optimizer, self.learning_rate = optimizer, learning_rate
        self.sampling, self.image_size, self.seed = sampling, image_size, seed
        codec.latent_shape(image_size, image_size)  # refuses sizes it cannot encode
        self.register_buffer(
            "lambda_table", loss.table(schedule, prediction_type).float(), persistent=False
        )
        self.trained = nn.ModuleDict({"unet": _new_unet(unet, codec, conditioner)})
        # Frozen parts stay out of state dict, optimizer, EMA and any sharding: a plain container.
        self._frozen: dict[str, Any] = {"codec": codec}
        if conditioner.trainable:
            self.trained["conditioner"] = conditioner
        else:
            self._frozen["conditioner"] = conditioner
        if gradient_checkpointing:
            self.trained["unet"].enable_gradient_checkpointing()  # type: ignore[operator]
        self.ema_config = ema
        self.ema = None if ema is None else averaged_copy(self.trained)
        self._val_strata = trailing(min(10, schedule.num_timesteps), schedule.num_timesteps)

    # Parts

    @property
    def codec(self) -> LatentCodec:
        codec: LatentCodec = self._frozen["codec"]
        return codec

    def model(self, *, ema: bool = True) -> Model:
        """Return the parts, with averaged weights if there are any and `ema` asks for them."""
        weights: Any = self.ema if ema and self.ema is not None else self.trained
        return Model(
            codec=self.codec,
            conditioner=weights["conditioner"]
            if "conditioner" in weights
            else self._frozen["conditioner"],
            unet=weights["unet"],
            schedule=self.schedule,
            prediction_type=self.prediction_type,
            image_size=self.image_size,
        )

    @contextmanager
    def pipeline(self) -> Iterator[TextToImage]:
        """Give the model as a sampling pipeline, in evaluation mode while it is open."""
        model = self.model()
        modes = [(part, part.training) for part in (model.unet, model.conditioner)]
        try:
            for part, _ in modes:
                part.eval()
            source = None if self._trainer is None else self._trainer.ckpt_path
            yield TextToImage(model, name=str(source or ""))
        finally:
            for part, mode in modes:
                part.train(mode)

    # Lightning's hooks

    def setup(self, stage: str) -> None:
        caches: dict[str, Cache] = getattr(self.trainer.datamodule, "caches", {})
        for name, cache in caches.items():
            self._use_cache(name, cache)
        if stage != "predict" and not caches:
            for part in self._frozen.values():  # what cannot be loaded is found now, not later
                part.load()
        for part in self._frozen.values():  # Lightning moves what is registered, and later
            part.to(self.trainer.strategy.root_device)

    def _use_cache(self, name: str, cache: Cache) -> None:
        """See that a cache fits, and encode only those prompts that it does not hold."""
        check_cache(name, cache, codec=self.codec.fingerprint())
        if cache.conditioner is None:
            return
        if "conditioner" not in self._frozen:
            raise ValueError(
                f"{name}={cache.folder} holds text embeddings, but model.conditioner is trained "
                "along: cache without --text, or freeze it."
            )
        conditioner = self._frozen["conditioner"]
        check_cache(name, cache, conditioner=conditioner.fingerprint())
        null = cache.null()
        if name == "data.train" and null is not None and not isinstance(conditioner, Remembered):
            self._frozen["conditioner"] = Remembered(conditioner)
            self._frozen["conditioner"].add("", null)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(p for p in self.trained.parameters() if p.requires_grad)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: self.learning_rate.factor(step, self.trainer.max_steps),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        draws = training_draws(
            self.seed,
            batch["position"].tolist(),
            batch["global_batch_size"],
            self._latent_shape(batch),
            self.schedule.num_timesteps,
            self.caption_dropout,
        )
        losses = self._losses(batch, draws, ema=False)
        self._log_losses(losses.detach(), draws.t)
        return losses.mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None and self.ema_config is not None:
            done = self.trainer.global_step  # counts this step only after this hook
            update_average(self.ema, self.trained, self.ema_config.decay_at(done))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.global_step % self.trainer.log_every_n_steps == 0:
            grads = [p.grad for p in self.trained.parameters() if p.grad is not None]
            self.log("train/grad_norm", nn.utils.get_total_norm(grads))

    def on_validation_epoch_start(self) -> None:
        self._val_sums = torch.zeros(2, len(self._val_strata), device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        draws = validation_draws(
            self.seed, batch["position"].tolist(), self._val_strata, self._latent_shape(batch)
        )
        losses = self._losses(batch, draws, ema=True)
        stratum = batch["position"] % len(self._val_strata)
        self._val_sums[0].index_add_(0, stratum, losses)
        self._val_sums[1].index_add_(0, stratum, torch.ones_like(losses))

    def on_validation_epoch_end(self) -> None:
        sums, counts = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum")
        # Reduced already, so the same on every rank.
        self.log("val/loss", sums.sum() / counts.sum(), prog_bar=True, rank_zero_only=True)
        for t, total, count in zip(self._val_strata.tolist(), sums, counts, strict=True):
            if count > 0:
                self.log(f"val_by_timestep/t{t:04d}", total / count, rank_zero_only=True)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: list[PromptRequest], batch_idx: int) -> list[Any]:
        with self.pipeline() as pipe:
            return pipe(
                [r.prompt for r in batch],
                negative_prompts=[r.negative_prompt for r in batch],
                seeds=[r.seed for r in batch],
                height=batch[0].height,
                width=batch[0].width,
                sampler=self.sampling.sampler,
                num_steps=self.sampling.num_steps,
                spacing=self.sampling.spacing,
                guidance=self.sampling.guidance,
                batch_size=len(batch),
                progress=False,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = describe_model(self.model())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = describe_model(self.model())
        check_resumed(
            checkpoint[KEY], {name: own[name] for name in ("schedule", "prediction_type", "unet")}
        )

    # The loss

    def _losses(self, batch: dict[str, Any], draws: Draws, *, ema: bool) -> Tensor:
        """Compute lambda_t ||v - v~||^2 for each sample, (B,)."""
        model, device = self.model(ema=ema), self.device
        t, z, eps = (part.to(device) for part in (draws.t, draws.z, draws.eps))
        if self.offset_strength:
            eps = offset_noise(eps, draws.d.to(device), self.offset_strength)
        with torch.no_grad():
            moments = batch["moments"] if "moments" in batch else self.codec.encode(batch["image"])
            x_0 = self.codec.latents(moments, z)
        x_t = self.schedule.add_noise(x_0, eps, t)
        target = prediction_target(x_0, eps, *self.schedule(t), self.prediction_type)
        cond = _conditioning(model.conditioner, batch, draws.keep)
        output = model.unet(x_t, t, cond)
        weights = self.lambda_table
        assert isinstance(weights, Tensor)
        return diffusion_loss(output, target, weights[t], reduction="none")

    def _latent_shape(self, batch: dict[str, Any]) -> tuple[int, int, int]:
        """Return (C, h, w) of a batch's latents; batches of other buckets have others."""
        if "moments" in batch:
            _, channels, h, w = batch["moments"].shape
            return channels // 2, h, w
        return self.codec.latent_shape(*batch["image"].shape[-2:])

    def _log_losses(self, losses: Tensor, t: Tensor) -> None:
        """Log the loss, by quarter of the timesteps, and at the last one on its own."""
        T = self.schedule.num_timesteps
        size = len(losses)
        several = self.trainer.world_size > 1
        self.log("train/loss", losses.mean(), prog_bar=True, batch_size=size, sync_dist=several)
        terminal = t == T - 1
        groups = {"terminal": terminal}
        for quarter in range(4):
            lo, hi = quarter * T // 4, (quarter + 1) * T // 4
            groups[f"t{lo:04d}_{hi - 1:04d}"] = (t >= lo) & (t < hi) & ~terminal
        for name, members in groups.items():
            if members.any():
                members = members.to(losses.device)
                self.log(f"train_by_timestep/{name}", losses[members].mean(), batch_size=size)


def check_settings(
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    loss: LossWeighting,
    spacing: str,
    num_steps: int,
) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    Raises:
        ValueError: epsilon at zero SNR, a terminal step without weight, or a grid that cannot be.
    """
    check_prediction_type(prediction_type, schedule)
    loss.table(schedule, prediction_type)
    get_timesteps(spacing, num_steps, schedule.num_timesteps, schedule=schedule)


def check_resumed(theirs: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse a checkpoint that was made with other settings than these.

    Raises:
        ValueError: One differs; says how.
    """
    for name, value in own.items():
        if theirs[name] == value:
            continue
        was, now = theirs[name], value
        if name == "unet":
            was, now = was["init_args"]["config"], now["init_args"]["config"]
        if isinstance(was, dict):
            keys = [key for key in now if was.get(key) != now[key]]
            was, now = {k: was.get(k) for k in keys}, {k: now[k] for k in keys}
        raise ValueError(
            f"The checkpoint's {name} has {was}, the config has {now}: a checkpoint goes on with "
            "the settings it was made with."
        )


def _conditioning(conditioner: Conditioner, batch: dict[str, Any], keep: Tensor) -> Conditioning:
    """Take captions' embeddings from the batch or the encoder, null's where they are dropped."""
    cond: Conditioning | None = batch.get("text_embedding")
    if cond is None:
        cond = conditioner(batch["caption"])
    return cond if keep.all() else cond.where(keep, conditioner.null())


def _new_unet(unet: UNetConfig | str, codec: LatentCodec, conditioner: Conditioner) -> UNet:
    wanted: dict[str, Any] = {"channels": codec.channels, "context_dim": conditioner.context_dim}
    if isinstance(unet, str):
        return UNet(pretrained=unet, **wanted)
    return UNet(unet, **wanted)
