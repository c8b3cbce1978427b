"""What the tests of several ranks run on each of them: one training run, and what it left."""

import errno
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import warnings
from contextlib import nullcontext
from pathlib import Path

import tiny
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch.distributed.tensor import DTensor, Shard

from zsnr.checkpoints.checkpoint_file import read_checkpoint
from zsnr.cli import main
from zsnr.codecs import AutoencoderKLCodec, PixelCodec
from zsnr.conditioning import SDXLConditioner
from zsnr.data import storage
from zsnr.data.storage import Retries
from zsnr.metrics import collected
from zsnr.pipeline import Sampling
from zsnr.training import (
    CheckpointFiles,
    Checkpoints,
    DataModule,
    EMAConfig,
    FullyShardedStrategy,
    ImageMetrics,
    LatentDiffusion,
    LearningRate,
    PredictionWriter,
    Previews,
)
from zsnr.training.deferred import deferred_weights

BATCH = 8
DECAY = 0.9


def module(**options):
    torch.manual_seed(0)
    settings = {
        "codec": PixelCodec(2),
        "conditioner": tiny.conditioner(trainable=True),
        "network": tiny.SMALLER_UNET,
        "image_size": 16,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=2e-3),
        "learning_rate": LearningRate(2, "cosine"),
        "sampling": Sampling(num_steps=3),
        "ema": EMAConfig(DECAY),
        **options,
    }
    return LatentDiffusion(**settings)


def data(folder, **options):
    settings = {
        "train": f"{folder}/train-*.tar",
        "val": f"{folder}/val-*.tar",
        "image_size": 16,
        "batch_size": BATCH,
        "num_workers": 0,
    }
    return DataModule(**{**settings, **options})


def strategy(name, **options):
    """Name a strategy: one, ddp, sharded (writes folders) or full (sharded, writes one file)."""
    if name in ("sharded", "full"):
        return FullyShardedStrategy(save_distributed_checkpoint=name == "sharded", **options)
    return {"one": "auto", "ddp": "ddp"}[name]


def scaled():
    """What 16-mixed is on a GPU, in the dtype that a CPU can compute in."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    plugin.precision = "bf16-mixed"
    return {"plugins": [plugin]}


class Watch(Callback):
    """Keeps what is logged, and follows the average in float64 from whole weights."""

    def __init__(self, config):
        self.config, self.average, self.logged = config, None, []
        self.stop_at = None

    def on_train_start(self, trainer, module):
        self.start = whole(module.trained)
        self.average = {k: v.double() for k, v in self.start.items()}
        self.done = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.done:
            return
        self.done = trainer.global_step
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.logged.append(metrics)
        decay = None if self.config is None else self.config.decay_after(self.done - 1)
        if decay is not None:
            for k, v in whole(module.trained).items():
                self.average[k] = decay * self.average[k] + (1 - decay) * v.double()
        if self.done == self.stop_at:
            trainer.limit_val_batches = 0
            trainer.should_stop = True


def whole(module):
    """Gather a module's parameters; every rank calls it."""
    local = {name: _local(p.detach()).clone() for name, p in module.named_parameters()}
    sharded = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
    if not sharded:
        return local
    shares = [None] * torch.distributed.get_world_size()
    own = {name: local[name].numpy() for name in sharded}  # a tensor takes longer to pickle
    torch.distributed.all_gather_object(shares, own)
    for name, p in sharded.items():  # the first ranks hold one copy, cut along dimension 0
        assert p.placements[-1] == Shard(0)
        parts = [torch.from_numpy(share[name]) for share in shares[: p.device_mesh.size(-1)]]
        local[name] = torch.cat(parts)
        assert local[name].shape == p.shape
    return local


def fit(
    folder,
    root,
    kind="one",
    steps=4,
    stop_at=None,
    checkpoint=None,
    every=0,
    model=None,
    data_options=None,
    trainer_options=None,
    strategy_options=None,
    callbacks=(),
    previews=False,
    logger=False,
    saves=True,
    deferred=False,
    **checkpoints,
):
    """Train, and return what is to be compared; weights are whole.

    Ranks that shard take longer to save the last checkpoint than for all steps: `saves` = False
    where no test reads it.
    """
    quiet()
    with deferred_weights() if deferred else nullcontext():
        net = module(**(model or {}))
    assert next(net.trained["unet"].parameters()).is_meta == deferred
    net.resumes = deferred and checkpoint is not None  # otherwise that is not known
    watch = Watch(net.ema_config)
    watch.stop_at = stop_at
    callbacks = [watch, *callbacks]
    if saves:
        checkpoints = {"every_n_train_steps": every, **checkpoints}
        callbacks.insert(1, Checkpoints(f"{root}/checkpoints", **checkpoints))
    if previews:
        callbacks.append(Previews(["a", "b", "c"], every_n_steps=2))
    settings = {
        "accelerator": "cpu",
        "devices": int(os.environ.get("WORLD_SIZE", 1)),
        "strategy": strategy(kind, **(strategy_options or {})),
        "max_steps": steps,
        "max_epochs": -1,
        "logger": logger,
        "enable_checkpointing": saves,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "val_check_interval": 2,
        "default_root_dir": root,
        "callbacks": callbacks,
    }
    trainer = Trainer(**{**settings, **(trainer_options or {})})
    trainer.strategy.checkpoint_io = CheckpointFiles()
    trainer.fit(net, datamodule=data(folder, **(data_options or {})), ckpt_path=checkpoint)
    return {
        "logged": watch.logged,
        "weights": whole(net.trained),
        "ema": {} if net.ema is None else whole(net.ema),
        "ema64": watch.average,
        "start": watch.start,
        "local": {k: tuple(_local(p).shape) for k, p in net.trained.named_parameters()},
        "local_ema": {} if net.ema is None else _shapes(net.ema),
        "progress": net._progress.state(),
        "learned_weight": None if net.learned_weight is None else net.learned_weight.state(),
        "accumulate": trainer.accumulate_grad_batches,
    }


class FailingDisk(Callback):
    """Lets no file be read on rank 1 after a step."""

    def __init__(self, step):
        self.step, self.done = step, 0

    def on_train_batch_end(self, trainer, module, *_):
        self.done = trainer.global_step
        if self.done == self.step and trainer.global_rank == 1:
            storage.open = self.fail

    def fail(self, *_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def fit_until_storage_fails(folder, root, kind, step):
    """Train while the disk of one rank fails; return the error and the steps done."""
    disk = FailingDisk(step)
    options = {"retries": Retries(attempts=1, outage=0.0)}
    try:
        fit(folder, root, kind, 8, callbacks=[disk], data_options=options)
    except OSError as error:
        return str(error), disk.done
    finally:
        vars(storage).pop("open", None)


def fit_text(folder, root, kind, layer):
    """Train a text encoder along, of which an earlier layer is taken."""
    torch.manual_seed(0)
    text = tiny.conditioner(trainable=True, layers=3, layer=layer, final_norm=False)
    return fit(folder, root, kind, steps=3, model={"conditioner": text}, saves=False)


def fit_sdxl(folder, root, kind, source):
    """Train from a Stable Diffusion XL folder; the parts cannot be sent to a rank."""
    model = {
        "codec": AutoencoderKLCodec(source, subfolder="vae"),
        "conditioner": SDXLConditioner(source),
        "network": source,
    }
    return fit(folder, root, kind, model=model, previews=True, saves=False)


def _local(p):
    return p.to_local() if isinstance(p, DTensor) else p


def _shapes(module):
    return {k: tuple(_local(p).shape) for k, p in module.named_parameters()}


def evaluate(folder, root, kind, checkpoint, **data_options):
    """Validate a checkpoint, and return the metrics."""
    quiet()
    trainer = _plain(root, kind)
    net = module()
    source = data(folder, **data_options)
    [metrics] = trainer.validate(net, datamodule=source, ckpt_path=checkpoint, verbose=False)
    return metrics


def predict(folder, root, kind, checkpoint, output, prompts):
    """Predict into a folder."""
    quiet()
    trainer = _plain(root, kind, callbacks=[PredictionWriter(output)])
    source = data(folder, prompts=prompts, predict_batch_size=2)
    trainer.predict(module(), datamodule=source, ckpt_path=checkpoint, return_predictions=False)


class SmallFeatures(torch.nn.Module):
    """Features (B, 5) and logits (B, 4) of pictures of 8 x 8."""

    size = 8

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(9, 3 * 8 * 8, generator=generator) / 14
        self.register_buffer("weight", weight)

    def forward(self, levels):
        found = torch.tanh((levels.flatten(1) / 127.5 - 1) @ self.weight.T)
        return found[:, :5], found[:, 5:]


def collect(rank, size):
    """Collect brightness of this rank's share of seven pictures."""
    images = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mine = range(rank, 7, size)
    share = images[list(mine)]
    names = ["dark", "bright", "one"]
    metrics = {
        "luma": collected.MeanLuma(),
        "contrast": collected.RMSContrast(),
        "p01": collected.LumaPercentile(1),
        "spread": collected.LumaSpread(),
        "w1": collected.LumaWasserstein(torch.linspace(-1, 1, 5)),
        "latents": collected.LatentMean(3),
    }
    for metric in metrics.values():
        metric.update(share)
    rows = collected.InOrder()
    rows.update(share.flatten(1), mine)
    of_group = {i: names[2] if i == 6 else names[i % 2] for i in mine}
    found = {name: metric.compute() for name, metric in metrics.items()}
    for metric in (collected.MeanLuma(), collected.LumaSpread()):
        groups = collected.PromptGroups(metric, names)  # one rank has no picture of "one"
        groups.update(share, [of_group[i] for i in mine])
        found |= {f"{type(metric).__name__} {k}": v for k, v in groups.compute().items()}
    return {**found, "rows": rows.compute()}


def collect_on_rank():
    """Do so with the other ranks."""
    dist = torch.distributed
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo")
    try:
        return collect(dist.get_rank(), dist.get_world_size())
    finally:
        if mine:
            dist.destroy_process_group()


def measure(folder, captions, number, checkpoint, output, kind):
    """Validate a checkpoint with pictures measured."""
    quiet()
    metrics = ImageMetrics(
        captions,
        number,
        batch_size=3,
        real=f"{folder}/train-*.tar",
        features=SmallFeatures(),
        inception_splits=2,
        save_images=output,
        output=f"{output}/numbers.json",
    )
    net = module(network=tiny.UNET, sampling=Sampling(num_steps=2))  # as tiny.MODEL
    trainer = _plain(output, kind, callbacks=[metrics])
    trainer.validate(net, datamodule=data(folder), ckpt_path=checkpoint, verbose=False)


def follow(run):
    """Measure all checkpoints of a run that has ended; return the exit code."""
    options = ["--trainer.devices", os.environ["WORLD_SIZE"], "--metrics.captions", "null"]
    try:
        return main(["validate", run, "--follow", *options])
    except SystemExit as stop:
        return stop.code


def _plain(root, kind, **options):
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", 1)),
        strategy=strategy(kind),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=root,
        **options,
    )
    trainer.strategy.checkpoint_io = CheckpointFiles(with_optimizers=False)
    return trainer


def weights_of(checkpoint):
    """Read the averaged and the raw UNet of a checkpoint."""
    return [read_checkpoint(checkpoint, ema=ema).network.state_dict() for ema in (True, False)]


def quiet():
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)


def newest(root):
    return str(sorted(Path(root, "checkpoints").glob("step-*.ckpt"))[-1])
