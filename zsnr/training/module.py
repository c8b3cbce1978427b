"""The LightningModule: network, schedule and v loss in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW

from zsnr.agreement import raise_on_all
from zsnr.checkpoints import Model
from zsnr.checkpoints.checkpoint_file import (
    KEY,
    check_text_weights,
    current_names,
    describe_model,
)
from zsnr.checkpoints.snapshots import AVERAGES, PREFIX, check_can_resume
from zsnr.codecs import LatentCodec, PixelCodec
from zsnr.conditioning import Conditioner, Remembered
from zsnr.data.cache import Cache, check_cache
from zsnr.data.prompts import PromptRequest
from zsnr.denoiser import Conditioning
from zsnr.described import class_path
from zsnr.draws import Draws, validation_timesteps
from zsnr.files import side_file
from zsnr.lora import AdaptedUNet, LoRA, add_text_adapters
from zsnr.loss import LossWeighting
from zsnr.networks import (
    DiffusionNetwork,
    UNet,
    UNetConfig,
    blocks_of,
    check_network,
    compile_blocks,
    enable_gradient_checkpointing,
    inputs_of,
    network_folder,
    read_network,
    record_arguments,
    takes_sizes,
)
from zsnr.objective import Objective
from zsnr.pipeline import (
    Sampling,
    TextToImage,
    check_steps,
    check_threshold,
    describe_sampling,
    report_cuts,
)
from zsnr.power_average import decay_between
from zsnr.prediction import PredictionType
from zsnr.schedule import NoiseSchedule, RectifiedFlow
from zsnr.timestep_law import TimestepLaw
from zsnr.training.adaptation import Start, read_start
from zsnr.training.checkpoint_files import unmap
from zsnr.training.checks import (
    check_guidance,
    check_lora,
    check_resumed,
    check_settings,
    check_shapes,
    check_unsharded,
)
from zsnr.training.deferred import defer
from zsnr.training.ema import EMAConfig, PostHocEMA, averaged_copy, update_average
from zsnr.training.global_batch import GlobalBatch
from zsnr.training.guard import (
    MicroBatch,
    Numbers,
    StepReport,
    check_last_steps,
    record_skipped,
    warn_of_cut_captions,
)
from zsnr.training.learning_rate import LearningRate
from zsnr.training.loggers import guard_loggers
from zsnr.training.optimizer import TwoModes, skip_where, skips_on_device, with_kernel
from zsnr.training.prepared import DRAWS, PROMPTS, TOKENS, Preparation
from zsnr.training.progress import Progress
from zsnr.training.resuming import Verdict, changes, check_changes, flat, verdict_on
from zsnr.training.strategy import (
    FullyShardedStrategy,
    check_strategy,
    local,
    reshard,
    squared_norm,
    without_gradient,
)
from zsnr.training.tags import at_timestep
from zsnr.training.validation import ValidationLosses, measure_before_training
from zsnr.training.watch import Watch
from zsnr.training.watcher import Watcher
from zsnr.weights.pretrained import is_weightless


class LatentDiffusion(L.LightningModule):
    """A latent diffusion model in training.

    Args:
        codec: Encoder and decoder between images and latents. It is frozen.
        conditioner: Text encoder of the prompts: frozen, or trained jointly where its own setting
            `trainable` is true.
        network: Size of a new UNet; the folder, single file or hub id of a pretrained model, from
            whose network training starts; or a network: in a config the class_path and init_args of
            zsnr.networks.Transformer, or of any nn.Module with forward(x_t, t, conditioning).
        schedule: Noise schedule of training, previews, validation and predict alike: the settings
            of a NoiseSchedule, or RectifiedFlow by class_path.
        prediction_type: Quantity that the network predicts: "v_prediction", "epsilon", "sample", or
            "flow".
        loss: Weight lambda_t of the loss at each timestep.
        timestep_law: How often training visits each timestep.
        caption_dropout: Probability that a training caption is replaced by the empty prompt, for
            classifier-free guidance.
        offset_noise: Strength of offset noise (section 5.4 of the paper), for comparison only. 0 =
            no offset noise.
        optimizer: Optimizer of the trained weights, by class_path. AdamW with learning rate 1e-4 by
            default. One with train() and eval(), such as those of schedulefree, evaluates for
            validation, previews and checkpoints.
        learning_rate: Warm-up and decay of the optimizer's learning rate.
        ema: Exponential moving average of the weights, which sampling and validation then use. None
            = no averaging.
        sampling: Sampler, number of steps and guidance of previews, validation images and predict.
        gradient_checkpointing: Recompute the network's activations in the backward pass, which
            takes less memory and more time.
        compile: Backend of torch.compile for the network's blocks, such as "inductor". None = the
            blocks are not compiled.
        max_skipped_steps: Number of optimizer steps in a row that may be skipped because their loss
            or gradient is not finite. One more stops the run.
        image_size: Height and width of the images, in pixels. Set by data.image_size.
        seed: Seed of every random number in training. Set by data.seed.
        lora: Adapters to train on a frozen, pretrained `network`, and on its text encoders where it
            names their modules. None = the whole network is trained.
        tf32: Whether a GPU rounds the factors of float32 products and convolutions to TF32, which
            has the range of float32 and the precision of float16. It does not concern what
            trainer.precision computes in bfloat16 or float16. false = float32 is float32.
        terminal_window: Number of exposures of the last timestep (training samples that drew
            t = T - 1) over which its logged training loss is averaged: the most recent ones. It
            changes what is logged and not what is trained.
        post_hoc_ema: Averages in snapshots beside the checkpoints, from which `zsnr checkpoint
            average` makes one of any length when training is done. None = no snapshots.
        watch: Early warnings: a line for every validation on what is wrong with the run. null =
            none.

    Raises:
        ValueError: A number is out of range, or two settings contradict each other.
    """

    def __init__(
        self,
        codec: LatentCodec,
        conditioner: Conditioner,
        network: DiffusionNetwork | nn.Module | UNetConfig | str,
        schedule: NoiseSchedule | RectifiedFlow = NoiseSchedule(),
        prediction_type: PredictionType = "v_prediction",
        loss: LossWeighting = LossWeighting(),
        timestep_law: TimestepLaw = TimestepLaw(),
        caption_dropout: float = 0.1,
        offset_noise: float = 0.0,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-4, weight_decay=0.01, fused=True),
        learning_rate: LearningRate = LearningRate(),
        ema: EMAConfig | None = EMAConfig(),
        sampling: Sampling = Sampling(),
        gradient_checkpointing: bool = False,
        compile: str | None = None,
        max_skipped_steps: int = 10,
        image_size: int = 512,
        seed: int = 0,
        lora: LoRA | None = None,
        terminal_window: int = 32,
        tf32: bool = False,
        post_hoc_ema: PostHocEMA | None = None,
        watch: Watch | None = Watch(),
    ) -> None:
        super().__init__()
        if terminal_window < 1:
            raise ValueError(f"model.terminal_window={terminal_window}: wanted at least 1.")
        if max_skipped_steps < 0:
            raise ValueError(f"model.max_skipped_steps={max_skipped_steps}: wanted 0 or more.")
        grid = sampling.spacing, sampling.num_steps
        check_settings(schedule, prediction_type, loss, timestep_law, *grid)
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"model.caption_dropout={caption_dropout}: wanted a number in [0, 1].")
        if not conditioner.trainable and not conditioner.pretrained:
            raise ValueError(
                "The text encoder has random weights and is frozen: set the conditioner's "
                "trainable: true, or give it pretrained weights."
            )
        if lora is not None:
            check_lora(network, conditioner.trainable)
            add_text_adapters(conditioner, lora)
        check_guidance(sampling.guidance, averaged=ema is not None)
        check_threshold(sampling.guidance, codec)
        check_steps(sampling, schedule)
        self.schedule, self.prediction_type, self.loss = schedule, prediction_type, loss
        self.terminal_window, self.tf32 = terminal_window, tf32
        self.caption_dropout, self.offset_strength = caption_dropout, offset_noise
        self.make_optimizer, self.learning_rate = optimizer, learning_rate
        self.sampling, self.image_size, self.seed = sampling, image_size, seed
        codec.latent_shape(image_size, image_size)  # refuses sizes it cannot encode
        self.objective = Objective(schedule, prediction_type, loss, timestep_law, offset_noise)
        self.learned_weight = self.objective.learned_weight()
        make = partial(_new_network, network, codec, conditioner, lora)
        source = network if isinstance(network, str) else None
        weighted = isinstance(network, nn.Module) or lora is not None
        others = source is not None and network_folder(source) != "unet"
        self._deferred = None if weighted or others else defer(make, source)
        self.trained = nn.ModuleDict({"unet": self._deferred.unet if self._deferred else make()})
        # Frozen parts stay out of state dict, optimizer, EMA and any sharding: a plain container.
        self._frozen: dict[str, Any] = {"codec": codec}
        if conditioner.trainable:
            self.trained["conditioner"] = conditioner
        else:
            self._frozen["conditioner"] = conditioner
        if gradient_checkpointing:
            enable_gradient_checkpointing(self.trained["unet"])
        for part in self.trained.parameters():
            if part.requires_grad:  # half-precision files too: small updates would be lost
                part.data = part.data.float()
        self.ema_config = ema
        self.ema = None if ema is None else averaged_copy(self.trained)
        self.post_hoc_config = post_hoc_ema
        self.post_hoc: nn.ModuleList | None = None  # one copy for each length, while training
        self.post_hoc_end = 0  # the last step that these averages have counted
        if compile is not None and compile not in torch._dynamo.list_backends(None):
            known = ", ".join(torch._dynamo.list_backends(None))
            raise ValueError(f"model.compile={compile!r}: no such backend. Known: {known}.")
        self.lora = lora
        self.compile_backend, self.max_skipped_steps = compile, max_skipped_steps
        self.resumes = False  # with all weights of a checkpoint; Lightning tells it late
        self._ready = False  # compiled, and sharded if the strategy does
        self.stop_requested, self.requeue_requested = False, False  # by a signal to this process
        self.interrupted = False  # whether that was Ctrl-C
        self.save_requested = False  # by rank 0
        self.stop_agreed, self.requeue_agreed, self.save_agreed = False, False, False  # by all
        self.validation_cut = False  # cut short by a signal
        self._micro_batches: list[MicroBatch] = []  # of the current step
        self._progress = Progress(schedule.num_timesteps, terminal_window)
        self._report: StepReport | None = None  # of the last step, until its average is updated
        self._cut: StepReport | None = None  # of the first step with captions that are cut
        self._cut_prompts: set[str] = set()  # that a warning has counted
        self._unrecorded: StepReport | None = None  # of a step that all ranks are to record
        self._first_step = 0  # of this start of the run
        self._judged = 0  # step of the last verdict
        self._trains = False  # whether optimizers with two modes are in train mode
        self._trained_before = False  # the validation that is under way
        self._kept: list[Tensor] | None = None  # trained weights, while others are evaluated
        self.changed_settings: dict[str, list[Any]] = {}  # since the checkpoint, by name
        self._val_strata = validation_timesteps(schedule.num_timesteps)
        self.start = (
            read_start(network) if isinstance(network, str) and not is_weightless() else None
        )
        self._start_losses: list[float] = []  # of the converted start, by stratum
        self.validates_as_run = False  # outside of training, on what the start was measured on
        self.watcher: Watcher | None = None
        if watch is not None:
            start_type = None if self.start is None else self.start.prediction_type
            scale = None if isinstance(codec, PixelCodec) else codec.scale
            self.watcher = Watcher(watch, self.objective, sampling, start_type, scale)

    # Parts

    @property
    def codec(self) -> LatentCodec:
        codec: LatentCodec = self._frozen["codec"]
        return codec

    def model(self, *, ema: bool = True) -> Model:
        """Return the model's parts, with averaged weights where there are any and `ema` is true."""
        if ema:
            self.settle()
        weights: Any = self.ema if ema and self.ema is not None else self.trained
        return Model(
            codec=self.codec,
            conditioner=weights["conditioner"]
            if "conditioner" in weights
            else self._frozen["conditioner"],
            network=weights["unet"],
            schedule=self.schedule,
            prediction_type=self.prediction_type,
            image_size=self.image_size,
        )

    @property
    def converted_start(self) -> Start | None:
        """The pretrained model, where it has another prediction type or schedule than the run."""
        start = self.start
        if start is None:
            return None
        same = (start.schedule, start.prediction_type) == (self.schedule, self.prediction_type)
        return None if same else start

    @contextmanager
    def pipeline(self) -> Iterator[TextToImage]:
        """Lend the model as a sampling pipeline, in evaluation mode for as long as it is open."""
        model = self.model()
        networks = [model.network]
        if self.sampling.guidance.against == "raw":
            model = replace(model, raw_network=self.trained["unet"])
            networks.append(self.trained["unet"])
        modes = [(part, part.training) for part in (*networks, model.conditioner)]
        try:
            for part, _ in modes:
                part.eval()
            source = None if self._trainer is None else self._trainer.ckpt_path
            pipe = TextToImage(model, name=str(source or ""))
            pipe.warned_of = self._cut_prompts
            with self.evaluated_weights():
                yield pipe
        finally:
            for part, mode in modes:
                part.train(mode)
            for network in networks:
                reshard(network)

    @contextmanager
    def evaluated_weights(self, *, saves: bool = False) -> Iterator[None]:
        """Let optimizers that evaluate other weights than they train show those for a while.

        Every rank enters it. Other optimizers are left alone.

        Args:
            saves: Whether the weights are saved. Training then continues from them, as a run does
                that resumes; otherwise exactly from the weights before.
        """
        trains = self._trains
        self._switch(False, restores=not saves)
        try:
            yield
        finally:
            self._switch(trains)

    def _switch(self, trains: bool, *, restores: bool = True) -> None:
        if trains == self._trains:
            return
        optimizers = [each for each in self.trainer.optimizers if isinstance(each, TwoModes)]
        if not optimizers:
            return
        weights = [p.detach() for p in self.trained.parameters() if p.requires_grad]
        if not trains:
            self.settle()  # model.ema averages the weights that are trained
            self._kept = [weight.clone() for weight in weights] if restores else None
        self._trains = trains
        for optimizer in optimizers:
            if trains:
                optimizer.train()
            else:
                optimizer.eval()
        if trains and self._kept is not None:
            for weight, kept in zip(weights, self._kept, strict=True):
                weight.copy_(kept)
            self._kept = None

    def facts(self) -> dict[str, Any]:
        """Return the settings that define the model, as plain values."""
        return {
            "schedule": self.schedule.settings(),
            "prediction_type": self.prediction_type,
            "loss": self.loss.settings(),
            "sampling": describe_sampling(self.sampling),
            "image_size": self.image_size,
            "offset_noise": self.offset_strength,
            "caption_dropout": self.caption_dropout,
            "ema": None if self.ema_config is None else asdict(self.ema_config),
            "post_hoc_ema": None if self.post_hoc_config is None else asdict(self.post_hoc_config),
            "start": None if self.start is None else self.start.facts(),
            "lora": None if self.lora is None else self.lora.settings(),
        }

    def run_settings(self) -> dict[str, Any]:
        """Return what a resumed run is compared by, besides model and data; see `RULES`."""
        trainer = self.trainer
        # a resumed run is compared before its optimizer exists
        optimizer = next(iter(trainer.optimizers), None) or self._new_optimizer()
        decays = self.learning_rate.decay != "constant"
        settings: dict[str, Any] = {
            "optimizer": class_path(optimizer),
            "trainer.max_steps": trainer.max_steps if decays else None,
            "trainer.precision": str(trainer.precision),
            "trainer.gradient_clip_val": trainer.gradient_clip_val or None,
            "trainer.gradient_clip_algorithm": trainer.gradient_clip_algorithm,
            "model.loss": self.loss.settings(),
            "model.timestep_law": asdict(self.objective.timestep_law),
            "model.caption_dropout": self.caption_dropout,
            "model.offset_noise": self.offset_strength,
            "model.learning_rate": asdict(self.learning_rate),
        }
        if self.ema_config is not None:
            settings["model.ema"] = asdict(self.ema_config)
        if self.post_hoc_config is not None:
            settings["model.post_hoc_ema"] = asdict(self.post_hoc_config)
        strategy = trainer.strategy
        if isinstance(strategy, FullyShardedStrategy) and strategy.param_dtype is not None:
            settings["trainer.strategy.param_dtype"] = strategy.param_dtype
            settings["trainer.strategy.reduce_dtype"] = strategy.reduce_dtype
        settings = {**flat(settings), **flat({"optimizer": optimizer.defaults})}
        free = [name for name in settings if verdict_on(name) is Verdict.FREE]
        return {name: value for name, value in settings.items() if name not in free}

    # Lightning's hooks

    def configure_callbacks(self) -> list[L.Callback]:
        guard_loggers(self.trainer.loggers)  # the first hook, before they open files
        return [GlobalBatch()]

    def configure_model(self) -> None:
        """Compile and shard the trained and the averaged weights."""
        config = self.post_hoc_config
        if config is not None and self.post_hoc is None and self.trainer.state.fn == "fit":
            self.post_hoc = nn.ModuleList(averaged_copy(self.trained) for _ in config.sigma_rel)
        if self._ready:
            return
        self._ready = True
        if self.compile_backend is not None:
            buckets = getattr(self.trainer.datamodule, "aspect", None) is not None
            compile_blocks(self.trained["unet"], self.compile_backend, several_shapes=buckets)
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            # Tables of indices are constants, which DDP would broadcast in every forward pass.
            ignored = [n for n, x in self.named_buffers() if not x.is_floating_point()]
            if "conditioner" in self.trained:
                names = without_gradient(self.trained["conditioner"])
                ignored += [f"trained.conditioner.{name}" for name in names]
            self._ddp_params_and_buffers_to_ignore = ignored
        if isinstance(strategy, FullyShardedStrategy):
            for modules in (self.trained, *self._averages()):
                blocks = blocks_of(modules["unet"])
                strategy.shard(modules.values(), blocks, ema=modules is not self.trained)
        self._fill_deferred()

    def _fill_deferred(self) -> None:
        """Allocate this rank's part of a deferred UNet, and fill it unless a checkpoint will."""
        deferred, self._deferred = self._deferred, None
        if deferred is None:
            return
        unets = [part["unet"] for part in (self.trained, *self._averages())]
        for unet in unets:
            unet.to_empty(device=self.trainer.strategy.root_device)
        if not self.resumes:
            deferred.fill(unets[0])
            for average in unets[1:]:
                pairs = zip(average.parameters(), unets[0].parameters(), strict=True)
                for mine, theirs in pairs:
                    local(mine.detach()).copy_(local(theirs.detach()))

    def _averages(self) -> list[Any]:
        """List the modules that hold averages of the trained weights."""
        exponential = [] if self.ema is None else [self.ema]
        return [*exponential, *(self.post_hoc or ())]

    def averaged_names(self) -> set[str]:
        """Return the names of the weights that are averaged, as in the state of `trained`."""
        named = self.trained.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if parameter.requires_grad}

    def record_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Let checkpoints describe the network by the arguments that a config built it with."""
        for part in (self.trained, self.ema):
            if part is not None:
                record_arguments(part["unet"], arguments)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_strategy(self.trainer.strategy)
        if stage == "fit" and isinstance(self.trainer.strategy, FullyShardedStrategy):
            check_unsharded(isinstance(self.trained["unet"], AdaptedUNet))
        precision = str(self.trainer.precision)
        computes = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}.get(precision)
        base = "float32" if self.lora is None else self.lora.base_dtype
        if computes is not None and base not in ("float32", computes):
            raise ValueError(
                f"trainer.precision={precision} computes in {computes}, but model.lora's "
                f"base_dtype is {base}: set it to {computes} or float32."
            )
        averaged = self.ema is not None or self.post_hoc_config is not None
        if averaged and precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision={precision} would keep averaged weights in half precision, "
                "which loses small updates: use bf16-mixed, FullyShardedStrategy's param_dtype, "
                "or model.ema and model.post_hoc_ema null."
            )
        if (self.trainer.gradient_clip_val or 0) < 0:
            raise ValueError(
                f"trainer.gradient_clip_val={self.trainer.gradient_clip_val:g}: wanted 0 or more."
            )
        if self.trainer.strategy.root_device.type == "cuda":  # PyTorch rounds convolutions only
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        caches: dict[str, Cache] = getattr(self.trainer.datamodule, "caches", {})
        for name, cache in caches.items():
            self._use_cache(name, cache)
        if stage != "predict" and not caches:
            for part in self._frozen.values():  # one that cannot be loaded fails now, not later
                part.load()
        for part in self._frozen.values():  # Lightning moves only registered modules, and later
            part.to(self.trainer.strategy.root_device)

    def _use_cache(self, name: str, cache: Cache) -> None:
        """Check that a cache fits the model, and take its embedding of the empty prompt."""
        check_cache(name, cache, codec=self.codec.fingerprint())
        if cache.conditioner is None:
            return
        if "conditioner" not in self._frozen:
            adapted = self.trained["conditioner"].adapted is not None
            trains = "adapted" if adapted else "trained jointly"
            off = "leave out model.lora.text_encoder_modules" if adapted else "set trainable: false"
            raise ValueError(
                f"{name}={cache.folder} holds text embeddings, but model.conditioner is {trains}: "
                f"cache without --text, or {off}."
            )
        conditioner = self._frozen["conditioner"]
        check_cache(name, cache, conditioner=conditioner.fingerprint())
        null = cache.null()
        if name == "data.train" and null is not None and not isinstance(conditioner, Remembered):
            self._frozen["conditioner"] = Remembered(conditioner)
            self._frozen["conditioner"].add("", null)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        trained = (p for p in self.trained.parameters() if p.requires_grad)
        optimizer = with_kernel(self.make_optimizer(trained), self.trainer.strategy.root_device)
        optimizer.register_load_state_dict_post_hook(unmap)
        return optimizer

    def configure_optimizers(self) -> Any:
        optimizer = self._new_optimizer()
        if isinstance(optimizer, TwoModes) and self.ema is not None:
            rank_zero_warn(
                f"{type(optimizer).__name__} evaluates an average of its own, but model.ema "
                "averages the weights that it trains, and previews and validation use model.ema: "
                "set model.ema to null."
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: self.learning_rate.factor(step, self.trainer.max_steps),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        batch = self.prepared(batch, training=True)
        noised = self._noised(batch)
        output = self._output(batch, noised, ema=False)
        t, losses = noised[2], self.objective.losses(output, *noised[1:])
        weights = sums = None
        if self.learned_weight is not None:
            weights = self.learned_weight(t).to(losses)
            sums = self.learned_weight.sums(losses.detach(), t)
        if self.watcher is not None:
            self.watcher.add(noised, output.detach(), losses.detach(), self.global_step, weights)
        cuts = batch[TOKENS].cuts if TOKENS in batch else ()
        self._micro_batches.append(
            MicroBatch(batch["key"], losses.detach(), t, cuts, batch.get("groups"), sums)
        )
        return (losses if weights is None else weights * losses).mean()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self._report is not None and self._report.counted:
            self.settle()  # the numbers were read before the step, so nothing is to be waited for

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Agree with all ranks on loss, gradient norm and stopping, in a single reduction.

        The host reads the result where it needs it now, otherwise in the next step.

        Raises:
            StorageError, BudgetError: A rank could not read its batch.
            NonFiniteError: Too many steps in a row were not finite.
        """
        self.settle()
        self.record()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and skips_on_device(optimizer):
            scaler.unscale_(optimizer)  # a fused optimizer would unscale later, by itself
        failed = getattr(self.trainer.datamodule, "failure", None) is not None
        self._report = StepReport(
            self.trainer.global_step,
            self._micro_batches,
            [p.grad for p in self.trained.parameters() if p.grad is not None],
            (self.stop_requested, self.requeue_requested, self.save_requested, failed),
            self.schedule.num_timesteps,
            getattr(self.trainer.datamodule, "loss_groups", ()),
        )
        if self.learned_weight is not None:
            self.learned_weight.step(*self._report.learned)
        self._micro_batches, self.save_requested = [], False
        if self.trainer.world_size == 1:
            self.stop_agreed, self.requeue_agreed = self.stop_requested, self.requeue_requested
        if skips_on_device(optimizer):
            skip_where(optimizer, self._report.skips, scaler)
            if not self._reads_now(self._report.step):
                return
        self._read(self._report)
        self.record()
        if not self._report.numbers.finite:
            for p in self.trained.parameters():
                p.grad = None  # an optimizer leaves weights without a gradient alone
        if self._reads_now(self._report.step):
            self._log(self._report.numbers, optimizer)

    def _log(self, numbers: Numbers, optimizer: torch.optim.Optimizer) -> None:
        self.log_agreed("train/loss", numbers.loss, prog_bar=True)
        self.log_agreed("train/grad_norm", numbers.grad_norm)
        self.log_agreed("train/learning_rate", optimizer.param_groups[0]["lr"])
        self.log_agreed("train/terminal_exposures", self._progress.terminal)
        self.log_agreed("train/skipped_steps", self._progress.skipped)
        if self._progress.cut_captions:
            self.log_agreed("train/cut_captions", self._progress.cut_captions)
        for tag, mean in self._progress.means().items():
            self.log_agreed(tag, mean)
        if self.learned_weight is not None:
            weights = self.learned_weight.table()[self._val_strata].tolist()
            for t, weight in zip(self._val_strata.tolist(), weights, strict=True):
                self.log_agreed(f"loss_weight/{at_timestep(t)}", weight)

    def _reads_now(self, step: int) -> bool:
        """Whether a step's numbers are needed at once: it is logged, or the last one."""
        interval, done = self.trainer.log_every_n_steps, step + 1
        last: bool = done == self.trainer.max_steps
        return last or (interval > 0 and done % interval == 0)

    def settle(self) -> None:
        """Bring the averaged weights and the counts of the run up to the last step.

        They are one step behind otherwise, while the device computes. No rank waits for another.
        """
        report, self._report = self._report, None
        if report is None:
            return
        self._read(report)
        self._update_post_hoc(report.step + 1)
        if self.ema is None or self.ema_config is None:
            return
        if not report.numbers.finite and self.ema_config.every_n_steps == 1:
            return  # several steps are averaged with a skipped one among them
        decay = self.ema_config.decay_after(report.step)
        if decay is not None:
            update_average(self.ema, self.trained, decay)

    def _update_post_hoc(self, num_steps: int) -> None:
        """Bring the power-function averages up to the steps that these weights stand for."""
        if self.post_hoc is None or self.post_hoc_config is None:
            return
        end = self.post_hoc_config.end_after(num_steps)
        if end is None or end <= self.post_hoc_end:
            return
        for average, sigma_rel in zip(self.post_hoc, self.post_hoc_config.sigma_rel, strict=True):
            decay = decay_between(sigma_rel, self.post_hoc_end, end)
            update_average(average, self.trained, decay)
        self.post_hoc_end = end

    def _read(self, report: StepReport) -> None:
        """Count a step in the progress of the run, if that has not been done."""
        if report.counted:
            return
        report.counted = True
        numbers, progress = report.numbers, self._progress
        self.stop_agreed, self.requeue_agreed = numbers.stop, numbers.requeue
        self.save_agreed = numbers.save
        if numbers.cut_captions and not progress.cut_captions:
            self._cut = report
        progress.cut_captions += numbers.cut_captions
        if numbers.finite and not numbers.failed:
            progress.skipped_in_a_row = 0
            progress.add(numbers.totals, numbers.counts, numbers.by_name)
            return
        if not numbers.failed:
            progress.skipped_in_a_row += 1
            progress.skipped += 1
        self._unrecorded = report

    def record(self) -> None:
        """Record a step that was skipped, or stop a run that failed; every rank calls it.

        The first captions that are cut are warned of.

        Raises:
            StorageError, BudgetError: A rank could not read its batch.
            NonFiniteError: Too many steps in a row were not finite.
        """
        cut, self._cut = self._cut, None
        if cut is not None:
            warn_of_cut_captions(cut)
        report, self._unrecorded = self._unrecorded, None
        if report is None:
            return
        if report.numbers.failed:
            raise_on_all(getattr(self.trainer.datamodule, "failure", None))
        in_a_row = self._progress.skipped_in_a_row
        record_skipped(self.trainer, report, in_a_row, self.max_skipped_steps)

    def log_agreed(self, tag: str, value: Any, *, prog_bar: bool = False) -> None:
        """Log a value that all ranks have reduced already: once, without another reduction."""
        on_host = torch.tensor(float(value))  # Lightning would copy a number to the device and wait
        # with rank_zero_only, sync_dist reduces nothing and tells Lightning that it is meant
        self.log(tag, on_host, prog_bar=prog_bar, rank_zero_only=True, sync_dist=True)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient by the norm that all ranks have agreed on."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        assert self._report is not None
        grads = [local(p.grad) for p in self.trained.parameters() if p.grad is not None]
        if grads:  # none where the step is skipped
            torch._foreach_mul_(grads, self._report.clip_factor(gradient_clip_val).to(grads[0]))

    def on_train_end(self) -> None:
        """Refuse to call a run a success if it has learned nothing in its last steps.

        Raises:
            NonFiniteError: All its steps, or the last of them, were skipped.
        """
        self.settle()
        self.record()
        steps = self.trainer.global_step - self._first_step
        self._switch(False)
        if not self.stop_agreed:
            check_last_steps(self.trainer, self._progress, steps)

    def on_train_start(self) -> None:
        """Warn where a resumed run keeps another learning rate than the config has.

        Optimizers with two modes begin to train.
        """
        self._first_step = self.trainer.global_step
        configured = self.trainer.optimizers[0].defaults.get("lr")
        [scheduler] = self.trainer.lr_scheduler_configs
        resumed = getattr(scheduler.scheduler, "base_lrs", [configured])[0]
        if configured != resumed:
            rank_zero_warn(
                f"The run resumes with its checkpoint's learning rate, {resumed:g}; the config's, "
                f"{configured:g}, is not used."
            )
        if self.trainer.global_step == 0:
            self._say_how_often_the_last_timestep_is_trained()
            self._measure_start()
        self._trains, self._kept = False, None  # whatever a fit that failed has left
        self._switch(True)
        self._judged = step = self.trainer.global_step
        if self.watcher is not None:
            self.watcher.weigh(self._size(), step)
            line = self.watcher.begin(step)
            if line is not None:
                rank_zero_warn(line)

    def _size(self) -> Tensor:
        """Return this rank's part of the squared norm of the trained weights."""
        return squared_norm([p.detach() for p in self.trained.parameters() if p.requires_grad])

    def _say_how_often_the_last_timestep_is_trained(self) -> None:
        law, T = self.objective.timestep_law, self.schedule.num_timesteps
        if law.name == "uniform":
            return
        share, steps = law.terminal_share(T), self.trainer.max_steps
        samples = steps * getattr(self.trainer.datamodule, "batch_size", 0)
        exposures = (
            f": about {share / T * samples:,.0f} exposures in this run" if samples > 0 else ""
        )
        rank_zero_info(
            f"model.timestep_law is {law.name}: the last timestep, which determines the brightness "
            f"of images, is trained {share:.2g} times as often as with uniform{exposures}."
        )

    def _measure_start(self) -> None:
        """Measure the validation losses of the pretrained model, converted, before training."""
        start = self.converted_start
        if start is None:
            return
        self.on_validation_epoch_start()
        if measure_before_training(
            self.trainer, self, lambda batch: self._add_validation(batch, start)
        ):
            self._validation.reduce(self.trainer.strategy)
            self._start_losses = self._validation.means().tolist()
            rank_zero_info(
                f"{start.source} predicts {start.prediction_type} on a schedule that ends at SNR "
                f"{start.schedule.snr[-1]:.2g}. adaptation/t* is the validation loss divided by "
                "that of this model, converted. 1 = as good as it is."
            )

    def on_validation_start(self) -> None:
        self._trained_before = self._trains
        self._switch(False)

    def on_validation_end(self) -> None:
        self._switch(self._trained_before)

    def on_validation_epoch_start(self) -> None:
        self._validation = ValidationLosses(self._val_strata, self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._add_validation(batch)

    def _add_validation(self, batch: dict[str, Any], start: Start | None = None) -> None:
        batch = self.prepared(batch, training=False)
        noised = self._noised(batch)
        _, target, t = noised
        losses = [self._losses(batch, noised, ema=start is None, start=start)]
        if self.ema is not None and start is None:
            losses.append(self._losses(batch, noised, ema=False))
        zero = self.objective.losses(torch.zeros_like(target), target, t)
        self._validation.add(batch["position"], losses, zero)

    def on_validation_epoch_end(self) -> None:
        reshard(self)
        failure = getattr(self.trainer.datamodule, "failure", None)
        failed = torch.tensor(float(failure is not None), device=self.device)
        if self.trainer.strategy.reduce(failed, reduce_op="sum"):
            raise_on_all(failure)
        if self.validation_cut:
            return
        self._validation.reduce(self.trainer.strategy)
        same = self.trainer.state.fn == "fit" or self.validates_as_run
        start = self._start_losses if same else []
        metrics = self._validation.metrics(raw=self.ema is not None, start=start)
        for tag, value in metrics.items():
            self.log_agreed(tag, value, prog_bar=tag == "val/loss")
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._judge(metrics)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Give the verdict of a validation where there are no validation data."""
        batches, step = self.trainer.val_check_interval, self.trainer.global_step
        without = not sum(self.trainer.num_val_batches)
        if not without or not isinstance(batches, int) or step == self._judged:
            return
        if step % max(1, batches // self.trainer.accumulate_grad_batches) == 0:
            self.settle()
            self._judge({})

    def _judge(self, metrics: Mapping[str, Any]) -> None:
        """Say what the measures of the run mean; every rank calls it."""
        self._judged = self.trainer.global_step
        if self.watcher is None:
            return
        strategy = self.trainer.strategy
        interval = self.watcher.collect(
            lambda sums: strategy.reduce(sums, reduce_op="sum"), self._size(), self._judged
        )
        scalars = self._say(interval, metrics) if self.trainer.is_global_zero else {}
        for tag, value in strategy.broadcast(scalars).items():  # all ranks have the same metrics
            self.log_agreed(tag, value)

    def _say(self, interval: Mapping[str, float], metrics: Mapping[str, Any]) -> dict[str, float]:
        """Say the verdict, on rank 0, and return its scalars by tag."""
        assert self.watcher is not None
        last, low = self.schedule.num_timesteps - 1, int(self._val_strata.min())
        terminal, adapted = (
            None if value is None else float(value)
            for value in (
                metrics.get(f"val_by_timestep/{at_timestep(last)}"),
                metrics.get(f"adaptation/{at_timestep(low)}"),
            )
        )
        with side_file("The verdict of model.watch"):
            new, scalars = self.watcher.judge(
                self._judged,
                interval,
                learning_rate=self.trainer.optimizers[0].param_groups[0]["lr"],
                terminal=terminal,
                terminal_skill=self._validation.relative(last) if metrics else None,
                low_noise=(low, adapted),
            )
            (rank_zero_warn if new else rank_zero_info)(self.watcher.line)
            return scalars
        return {}

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def warn_of_cuts(self, prompts: Sequence[str]) -> None:
        """Warn once, on rank 0, of the prompts that are cut when the model samples them."""
        conditioner = self.model(ema=False).conditioner
        report_cuts(conditioner, prompts, self._cut_prompts, rank_zero_warn)

    def on_predict_start(self) -> None:
        requests: list[PromptRequest] = getattr(self.trainer.datamodule, "requests", [])
        self.warn_of_cuts([text for r in requests for text in (r.prompt, r.negative_prompt)])

    def predict_step(self, batch: list[PromptRequest], batch_idx: int) -> list[Any]:
        if not batch:
            return []
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

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights.

        Raises:
            ValueError: They have other shapes than this model's.
        """
        if self.post_hoc is None:  # only training uses these averages
            state_dict = {n: w for n, w in state_dict.items() if not n.startswith(PREFIX)}
        check_shapes(state_dict, self.state_dict())
        return super().load_state_dict(state_dict, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = describe_model(self.model())
        checkpoint["progress"] = self._progress.state()
        checkpoint["start_losses"] = self._start_losses
        checkpoint["settings"] = self.run_settings()
        if self.post_hoc_config is not None:
            lengths = list(self.post_hoc_config.sigma_rel)
            checkpoint[AVERAGES] = {"sigma_rel": lengths, "end": self.post_hoc_end}
        if self.watcher is not None:
            checkpoint["watch"] = self.watcher.state()
        if self.learned_weight is not None:
            checkpoint["learned_weight"] = self.learned_weight.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == "fit":
            check_can_resume(str(self.trainer.ckpt_path), checkpoint)
        self._progress = Progress(
            self.schedule.num_timesteps, self.terminal_window, **checkpoint.get("progress", {})
        )
        self._start_losses = checkpoint.get("start_losses", [])
        self.post_hoc_end = checkpoint.get(AVERAGES, {}).get("end", 0)
        if self.watcher is not None and "watch" in checkpoint:
            self.watcher.load_state(checkpoint["watch"])
        if self.learned_weight is not None and "learned_weight" in checkpoint:
            self.learned_weight.load_state(checkpoint["learned_weight"])
        saved, described = current_names(checkpoint[KEY]), describe_model(self.model())
        check_text_weights("The checkpoint", saved["conditioner"], described["conditioner"])
        decisive = ("schedule", "prediction_type", "network")
        check_resumed(saved, {name: described[name] for name in decisive})
        averaged = any(name.startswith("ema.") for name in checkpoint.get("state_dict", ()))
        if "state_dict" in checkpoint and averaged != (self.ema is not None):
            has, remedy = ("has", "set") if averaged else ("has no", "unset")
            raise ValueError(
                f"The checkpoint {has} averaged weights: {remedy} model.ema, as the run that wrote "
                "it did."
            )
        self.changed_settings = {}
        if self.trainer.state.fn == "fit":
            message: str | None = "The checkpoint is older and holds no settings to compare."
            if "settings" in checkpoint:
                self.changed_settings = changes(checkpoint["settings"], self.run_settings())
                message = check_changes(self.changed_settings)
            if message is not None:
                rank_zero_warn(message)
        for name in ("codec", "conditioner"):  # a moved folder is another name of the same weights
            if saved[name] != described[name]:
                rank_zero_warn(
                    f"The checkpoint's {name} was {saved[name]}, the config has "
                    f"{described[name]}: make sure that they are the same."
                )

    # The loss

    def preparation(self, training: bool) -> Preparation:
        """Return what the data module adds to a batch where it is loaded."""
        return Preparation(
            seed=self.seed,
            channels=self.codec.channels,
            factor=self.codec.factor,
            num_timesteps=self.schedule.num_timesteps,
            caption_dropout=self.caption_dropout if training else 0.0,
            timestep_law=self.objective.timestep_law,
            tokenizer=self.model(ema=False).conditioner.tokenizer,
            strata=None if training else self._val_strata,
        )

    def prepared(self, batch: dict[str, Any], training: bool) -> dict[str, Any]:
        """Return a batch with what another data module than this package's has not added.

        Raises:
            ValueError: It lacks what `DataModule` says of its batches.
        """
        if not isinstance(batch, dict):
            raise ValueError(
                f"The batch is a {type(batch).__name__}: wanted a dict, as of a dataset of dicts "
                "that zsnr.training.DataModule(train=...) loads."
            )
        if DRAWS in batch:
            return batch
        batch = self.preparation(training)(batch)
        return {**batch, DRAWS: batch[DRAWS].to(self.device)}

    def _noised(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_t (B, C, h, w) of a batch, the network's target, and t (B,), on the device."""
        draws: Draws = batch[DRAWS]
        with torch.no_grad():
            if "latents" in batch:
                x_0 = batch["latents"]
            else:
                given = "moments" in batch
                moments = batch["moments"] if given else self.codec.encode(batch["image"])
                x_0 = self.codec.latents(moments, draws.z)
        return self.objective.noised(x_0, draws)

    def _losses(
        self,
        batch: dict[str, Any],
        noised: tuple[Tensor, Tensor, Tensor],
        *,
        ema: bool,
        start: Start | None = None,
    ) -> Tensor:
        """Compute lambda_t ||v - v~||^2 for each sample, (B,); arguments as `_output`."""
        output = self._output(batch, noised, ema=ema, start=start)
        return self.objective.losses(output, *noised[1:])

    def _output(
        self,
        batch: dict[str, Any],
        noised: tuple[Tensor, Tensor, Tensor],
        *,
        ema: bool,
        start: Start | None = None,
    ) -> Tensor:
        """Return what the network predicts for a batch, (B, *).

        Args:
            batch: Images or moments, and captions or embeddings, of B samples, as `prepared`
                returns it.
            noised: Result of `_noised` for this batch.
            ema: Whether to use the averaged weights.
            start: Pretrained model that the network still is, whose prediction is converted. None =
                the network predicts as this run trains it.
        """
        model = self.model(ema=ema)
        x_t, _, t = noised
        # Text encoders may be kept in half precision.
        dtype = next(model.network.parameters()).dtype
        cond = self._conditioning(model.conditioner, batch).to(self.device, dtype)
        if takes_sizes(model.network):
            cond = replace(cond, sizes=batch.get("sizes"))
        if "concat" in batch:
            cond = replace(cond, concat=batch["concat"].to(self.device, dtype))
        if start is None:
            output: Tensor = model.network(x_t, self.schedule.time(t), cond)
            return output
        return start.output(model.network, x_t, t, cond, self.schedule, self.prediction_type)

    def _conditioning(self, conditioner: Conditioner, batch: dict[str, Any]) -> Conditioning:
        """Return the embeddings of captions, and of the empty prompt where a caption is dropped.

        The encoder is called once, however many are dropped: a sharded one waits for all ranks.
        """
        cond: Conditioning | None = batch.get("text_embedding")
        if cond is not None:
            keep = batch[DRAWS].keep
            drops = self.training and self.caption_dropout > 0
            return cond.where(keep, conditioner.null()) if drops else cond
        with self._frozen_precision() if "conditioner" in self._frozen else nullcontext():
            encoded: Conditioning = conditioner(
                batch[TOKENS] if TOKENS in batch else batch[PROMPTS]
            )
        return encoded

    def _frozen_precision(self) -> AbstractContextManager[Any]:
        """Compute what FSDP does not shard in the dtype that it lets the network compute in."""
        strategy = None if self._trainer is None else self._trainer.strategy
        if not isinstance(strategy, FullyShardedStrategy) or strategy.param_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, strategy.param_dtype))


def _new_network(
    network: UNetConfig | nn.Module | str,
    codec: LatentCodec,
    conditioner: Conditioner,
    lora: LoRA | None,
) -> nn.Module:
    wanted: Any = inputs_of(codec, conditioner)
    if isinstance(network, DiffusionNetwork):
        network.check_fits(**wanted)
    if isinstance(network, nn.Module):
        check_network(network)
        return network
    if lora is not None:
        assert isinstance(network, str)
        return AdaptedUNet(network, lora, **wanted)
    if isinstance(network, str):
        return read_network(network, **wanted)
    return UNet(network, **wanted)
