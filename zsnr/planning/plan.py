"""`zsnr plan`: a training config as what zsnr.planning.estimate computes with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.utils.data import Dataset

from zsnr.checkpoints import Model
from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.data.cache import Cache, find_cache
from zsnr.data.order import accumulation
from zsnr.interop.models import load_parts
from zsnr.lora import AdaptedUNet, LoRA, add_text_adapters
from zsnr.networks import UNet, UNetConfig, inputs_of, read_network
from zsnr.planning.estimate import (
    GIB,
    Layout,
    Parts,
    Plan,
    Sharding,
    find_way_out,
    modules_of,
    need,
    state_per_byte,
    trainable,
)
from zsnr.planning.sampling import Request
from zsnr.schedule import NoiseSchedule
from zsnr.training.checks import check_unsharded
from zsnr.training.data import DataModule
from zsnr.training.ema import update_average
from zsnr.training.lightning_cli import build, check_model, is_sharded
from zsnr.training.module import LatentDiffusion
from zsnr.training.optimizer import TwoModes
from zsnr.weights.pretrained import as_dtype, loading_in, without_weights

# Lightning's names of precision: of the weights, and of autocast.
_PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    **dict.fromkeys(("32-true", "32"), (torch.float32, None)),
    **dict.fromkeys(("bf16-mixed", "bf16"), (torch.float32, torch.bfloat16)),
    **dict.fromkeys(("16-mixed", "16"), (torch.float32, torch.float16)),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
}


def make_plan(
    config: Any,
    *,
    ranks: int | None = None,
    ranks_per_node: int | None = None,
    memory: float | None = None,
    images_per_second: float | None = None,
    measure: bool = False,
) -> Plan:
    """Plan a training config.

    Args:
        config: What parse_fit returned.
        ranks: Number of processes. None = as the config's trainer says.
        ranks_per_node: Number of processes on one node. None = as the config's trainer says.
        memory: GiB that one rank may use. None = unlimited.
        images_per_second: Throughput summed over all ranks.
        measure: Measure the throughput with a few steps on this machine.

    Raises:
        ValueError: The config is wrong, or is one that cannot be planned.
    """
    trainer = config.trainer
    check_model(config.model)
    if is_sharded(trainer):
        check_unsharded(config.model.lora is not None)
    data: Any = build("data", DataModule, config.data)
    sharding = read_sharding(trainer, ranks, ranks_per_node)
    passes = accumulation(data.batch_size, sharding.ranks, data.max_batch_size_per_device)
    layout = Layout(
        sharding=sharding,
        micro_batch=data.batch_size // sharding.ranks // passes,
        accumulation=passes,
        checkpointing=config.model.gradient_checkpointing,
    )
    parts = read_parts(config, data)
    limit = None if memory is None else round(memory * GIB)
    needed = need(parts, layout)
    if measure:
        images_per_second = data.batch_size / seconds_per_step(config, data, layout)
    too_much = limit is not None and needed.total > limit
    counts = {_label(parts.network): _count(parts.network.parameters())}
    if isinstance(parts.network, AdaptedUNet):
        counts["of which trained"] = _count(trainable(parts.network))
    text = _count(parts.conditioner.parameters())
    if text:
        counts["text encoder"] = text
    vae = sum(_count(module.parameters()) for module in modules_of(parts.codec))
    if vae:
        counts["codec"] = vae
    return Plan(
        layout=layout,
        need=needed,
        counts=counts,
        batch_size=data.batch_size,
        image_size=data.image_size,
        precision=str(trainer.precision or "32-true"),
        on_gpu=_on_gpu(trainer),
        max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
        images_per_second=images_per_second,
        memory=limit,
        way_out=find_way_out(parts, layout, data.batch_size, limit)
        if limit is not None and too_much
        else None,
    )


def read_for_sampling(config: Any, request: Request) -> Model:
    """Build the model of a training config on the meta device, in the data types of sampling.

    Args:
        config: What parse_fit returned.
        request: What is sampled.

    Raises:
        ValueError: The config is wrong.
    """
    check_model(config.model)
    chosen = None if request.dtype == "auto" else as_dtype(request.dtype)
    with loading_in(chosen):
        parts = read_parts(config, build("data", DataModule, config.data))
    model = Model(
        codec=parts.codec,
        conditioner=parts.conditioner,
        network=parts.network,
        schedule=NoiseSchedule(),
        prediction_type="v_prediction",
        image_size=parts.image_size,
    )
    with torch.device("meta"), without_weights():
        return load_parts(model, chosen, vae=request.vae, vae_tiling=request.vae_tiling)


def read_sharding(trainer: Any, ranks: int | None, ranks_per_node: int | None) -> Sharding:
    """Read how a config's trainer distributes training.

    Args:
        trainer: The parsed settings.
        ranks: See make_plan.
        ranks_per_node: See make_plan.

    Raises:
        ValueError: The number of ranks is not known, or the strategy is unknown.
    """
    for name, value in (("ranks", ranks), ("ranks-per-node", ranks_per_node)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: wanted at least 1.")
    nodes = trainer.num_nodes
    if ranks is None:
        each = ranks_per_node or _devices(trainer)
        if each is None:
            raise ValueError(
                f"trainer.devices={trainer.devices} is known only on the machine that trains: give "
                "--ranks N."
            )
        ranks = each * nodes
    else:
        devices = _devices(trainer) or 1
        each = ranks_per_node or min(ranks, devices if devices > 1 else max(1, ranks // nodes))
    strategy = trainer.strategy
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    settings: dict[str, Any] = {}
    if not isinstance(strategy, str):
        own = strategy.init_args.as_dict() if "init_args" in strategy else {}
        settings = {**own, **(strategy.get("dict_kwargs") or {})}
    world: dict[str, Any] = {"ranks": ranks, "ranks_per_node": each}
    if name == "FullyShardedStrategy":
        wanted = settings.get("shard_ranks", "all")
        return Sharding(
            kind="FSDP",
            **world,
            shards={"all": ranks, "node": each}.get(wanted, wanted),
            param_dtype=_dtype(settings.get("param_dtype")),
            reduce_dtype=_dtype(settings.get("reduce_dtype")),
            reduce_every_micro_batch=settings.get("reduce_every_micro_batch", False),
            reshard_after_forward=settings.get("reshard_after_forward", True),
        )
    if name == "SingleDeviceStrategy" and ranks > 1:
        raise ValueError(f"trainer.strategy=SingleDeviceStrategy has one rank, not {ranks}.")
    if ranks == 1 and name in ("auto", "SingleDeviceStrategy"):
        return Sharding()
    if name == "auto" or name.startswith("ddp") or name == "DDPStrategy":
        return Sharding("DDP", **world, bucket_view=settings.get("gradient_as_bucket_view", False))
    raise ValueError(
        f"trainer.strategy={name} is not one that plan knows: auto, ddp, DDPStrategy, "
        "FullyShardedStrategy."
    )


def read_parts(config: Any, data: DataModule) -> Parts:
    """Build the parts of a parsed config without their weights and without memory.

    Args:
        config: What parse_fit returned.
        data: Its data module.

    Raises:
        ValueError: They do not fit each other.
    """
    model, trainer = config.model, config.trainer
    precision = str(trainer.precision or "32-true")
    if precision not in _PRECISIONS:
        raise ValueError(
            f"trainer.precision={precision} is not one that plan knows: {', '.join(_PRECISIONS)}."
        )
    dtype, autocast = _PRECISIONS[precision]
    kept = 0 if model.post_hoc_ema is None else len(model.post_hoc_ema.sigma_rel)
    if dtype != torch.float32 and (kept or model.ema is not None):
        raise ValueError(
            f"trainer.precision={precision} would keep averaged weights in half precision: use "
            "bf16-mixed, FullyShardedStrategy's param_dtype, or model.ema and model.post_hoc_ema "
            "null."
        )
    sources = [each for each in (data.train, data.val) if each is not None]
    caches = [None if isinstance(each, Dataset) else find_cache(each) for each in sources]
    train: Cache | None = caches[0] if data.train is not None else None
    images = not caches or any(cache is None for cache in caches)
    text = not caches or any(cache is None or cache.conditioner is None for cache in caches)
    previews = any(
        callback.class_path.rpartition(".")[2] == "Previews" for callback in _listed(trainer)
    )
    make_optimizer = _instantiated_optimizer(model.optimizer)
    with torch.device("meta"), without_weights():
        codec: Any = build("codec", LatentCodec, model.codec)
        conditioner: Any = build("conditioner", Conditioner, model.conditioner)
        codec.latent_shape(data.image_size, data.image_size)
        wanted: Any = inputs_of(codec, conditioner)
        if model.lora is not None:
            lora = LoRA(**model.lora.as_dict())
            network: nn.Module = AdaptedUNet(model.network, lora, **wanted)
            add_text_adapters(conditioner, lora)
        elif isinstance(model.network, str):
            network = read_network(model.network, **wanted)
        elif "class_path" in model.network:
            network = build("network", nn.Module, model.network)
        else:
            network = UNet(UNetConfig(**model.network.as_dict()), **wanted)
        if dtype != torch.float32:  # else an adapted one keeps its base's
            network.to(dtype)
        if conditioner.trainable and (dtype != torch.float32 or conditioner.adapted is None):
            conditioner.to(dtype)
        codec.load()
        conditioner.load()
    return Parts(
        network=network,
        conditioner=conditioner,
        codec=codec,
        image_size=data.image_size,
        autocast=autocast,
        on_gpu=_on_gpu(trainer),
        codec_stays=images or previews,
        encodes_images=train is None,
        encodes_text=text,
        optimizer_state=state_per_byte(make_optimizer),
        averages=kept + (model.ema is not None),
    )


def seconds_per_step(config: Any, data: DataModule, layout: Layout, times: int = 3) -> float:
    """Measure the time of one rank's step on this machine, without loading and communication.

    The model is built with random weights. The first pass warms up and does not count.

    Args:
        config: What parse_fit returned.
        data: Its data module.
        layout: How the batch is divided.
        times: Number of passes and of optimizer steps; the shortest of each counts.
    """
    dtype, autocast = _PRECISIONS[str(config.trainer.precision or "32-true")]
    if dtype != torch.float32:
        raise ValueError(f"--measure knows no trainer.precision={config.trainer.precision}.")
    autocast = autocast or layout.sharding.param_dtype
    device = torch.device("cuda" if _on_gpu(config.trainer) else "cpu")
    with without_weights():
        module = _module(config.model).to(device).train()
        for part in module._frozen.values():
            part.load().to(device)
    optimizer = module.make_optimizer(p for p in module.trained.parameters() if p.requires_grad)
    if isinstance(optimizer, TwoModes):
        optimizer.train()
    batch = _made_up_batch(data, module, layout.micro_batch, device)
    batch = module.prepared(batch, training=True)

    def forward_and_back() -> None:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = module.training_step(batch, 0)
        loss.backward()
        module._micro_batches.clear()

    def step() -> None:
        optimizer.step()
        if module.ema is not None:
            update_average(module.ema, module.trained, 0.9999)

    forward_and_back()
    step()
    return layout.accumulation * min(
        _seconds(forward_and_back, device) for _ in range(times)
    ) + min(_seconds(step, device) for _ in range(times))


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _module(values: Any) -> LatentDiffusion:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LatentDiffusion, "model")
    values = parser.parse_object({"model": values.as_dict()})
    module: LatentDiffusion = parser.instantiate_classes(values).model
    return module


def _made_up_batch(
    data: DataModule, module: LatentDiffusion, micro_batch: int, device: torch.device
) -> dict[str, Any]:
    """Make a batch of noise, of what the training data would give."""
    size = data.image_size
    sizes = torch.tensor([[size, size, 0, 0, size, size]] * micro_batch, device=device)
    batch: dict[str, Any] = {
        "caption": [""] * micro_batch,
        "key": [""] * micro_batch,
        "sizes": sizes,
        "position": torch.arange(micro_batch),
        "global_batch_size": micro_batch,
    }
    train = data.train
    cache = None if train is None or isinstance(train, Dataset) else find_cache(train)
    if cache is None:
        batch["image"] = torch.rand(micro_batch, 3, size, size, device=device)
        return batch
    channels, h, w = module.codec.latent_shape(size, size)
    batch["moments"] = torch.rand(micro_batch, 2 * channels, h, w, device=device)
    null = cache.null()
    if null is not None:
        batch["text_embedding"] = null.expand(micro_batch).to(device)
    return batch


def _listed(trainer: Any) -> list[Any]:
    callbacks = trainer.callbacks or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _instantiated_optimizer(values: Any) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerCallable)
    values = values.as_dict() if hasattr(values, "as_dict") else values
    return parser.instantiate_classes(parser.parse_object({"optimizer": values})).optimizer


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _devices(trainer: Any) -> int | None:
    """Return how many devices of a node the trainer uses. None = that is not known here."""
    devices = trainer.devices
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1, "-1"):
        return (torch.cuda.device_count() or None) if _on_gpu(trainer) else 1
    if isinstance(devices, str):
        devices = [part for part in devices.split(",") if part.strip()]
    return len(devices) if isinstance(devices, list) else int(devices)


def _on_gpu(trainer: Any) -> bool:
    return bool(trainer.accelerator != "cpu")


def _label(network: nn.Module) -> str:
    return "UNet" if isinstance(network, UNet) else type(network).__name__


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
