"""Memory and time of a training run, estimated without running it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.denoiser import Conditioning
from zsnr.networks import blocks_of, enable_gradient_checkpointing, takes_sizes
from zsnr.planning.memory import (
    LiveBytes,
    fake_tensors,
    kept_for_backward,
    norms_in_float32,
    size_of,
    tensors_of,
    with_fake_tensors,
)
from zsnr.training.optimizer import TwoModes

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Sharding:
    """How weights, gradients, optimizer state and averaged weights are divided among the ranks.

    Args:
        kind: One device, a full copy on each rank (DDP), or shards (FSDP).
        ranks: Number of processes.
        ranks_per_node: Number of processes per node.
        shards: Number of ranks that share one copy.
        param_dtype: Dtype of the weights that FSDP gathers. None = that of the parameters.
        reduce_dtype: Dtype of the gradients that FSDP reduces. None = param_dtype.
        reduce_every_micro_batch: Whether FSDP reduces gradients in every micro-batch.
        reshard_after_forward: Whether gathered weights are freed after a block's forward pass.
        bucket_view: Whether DDP's buckets are the gradients, and not a copy of them.
    """

    kind: Literal["one device", "DDP", "FSDP"] = "one device"
    ranks: int = 1
    ranks_per_node: int = 1
    shards: int = 1
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    reduce_every_micro_batch: bool = False
    reshard_after_forward: bool = True
    bucket_view: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.ranks_per_node < 1 or self.ranks % self.ranks_per_node:
            raise ValueError(
                f"{self.ranks} ranks, {self.ranks_per_node} per node: wanted whole nodes."
            )
        if self.shards < 1 or self.ranks % self.shards:
            raise ValueError(
                f"shard_ranks={self.shards} does not divide the {self.ranks} ranks: wanted as many "
                "shards in each copy."
            )


@dataclass(frozen=True)
class Layout:
    """A sharding, and how the global batch is divided.

    Args:
        sharding: How the weights are divided.
        micro_batch: Images per forward pass and rank.
        accumulation: Forward passes per step.
        checkpointing: Whether activations of the network are recomputed in the backward pass.
    """

    sharding: Sharding
    micro_batch: int
    accumulation: int
    checkpointing: bool


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a run, on the meta device, where tensors need no memory.

    Args:
        network: Trained.
        conditioner: Trained or frozen.
        codec: Frozen.
        image_size: Height and width in pixels.
        autocast: The dtype of the trainer's mixed precision. None = no mixed precision.
        on_gpu: Whether autocast is that of a GPU.
        codec_stays: Whether the codec is in memory while training.
        encodes_images: Whether each batch passes through the codec.
        encodes_text: Whether each batch passes through the conditioner.
        optimizer_state: Bytes of the optimizer's state for each byte of a parameter.
        averages: Number of averages of the weights.
    """

    network: nn.Module
    conditioner: Conditioner
    codec: LatentCodec
    image_size: int
    autocast: torch.dtype | None
    on_gpu: bool
    codec_stays: bool
    encodes_images: bool
    encodes_text: bool
    optimizer_state: float
    averages: int

    def trained(self) -> nn.ModuleDict:
        """Return the modules that are trained."""
        parts: dict[str, nn.Module] = {"unet": self.network}
        if self.conditioner.trainable:
            parts["conditioner"] = self.conditioner
        return nn.ModuleDict(parts)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute with fake tensors, in the trainer's precision.

        Raises:
            ValueError: The control flow of a part depends on the values of tensors.
        """
        with fake_tensors(), torch.autocast("cpu", self.autocast, self.autocast is not None):
            yield


@dataclass(frozen=True)
class Need:
    """Bytes on one rank, the one that needs most.

    The total is an upper bound: with FSDP, gathered weights and stored activations do not peak at
    the same time.

    Args:
        parameters: Trained weights, and the frozen ones of a UNet with adapters.
        gradients: Gradients of the trained weights.
        optimizer: State of the optimizer.
        average: Averaged weights, float32.
        buckets: DDP's copy of the gradients.
        accumulated: Full gradients that FSDP keeps from one micro-batch to the next.
        gathered: Peak of what FSDP gathers: the root, the largest pair of neighboring blocks (one
            computes while the next is gathered), and the full gradients of one block.
        codec: Weights of the codec.
        text_encoder: Weights of a frozen text encoder.
        activations: Activations that a micro-batch stores for the backward pass.
        working: Peak of temporary memory: recomputed activations, intermediate results, or what
            encoding needs beyond all of these.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    accumulated: int
    gathered: int
    codec: int
    text_encoder: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """Total bytes."""
        return sum(asdict(self).values())


def micro_batches(share: int) -> list[int]:
    """List the sizes that divide a rank's share of the batch, largest first."""
    return [share // a for a in range(1, share + 1) if share % a == 0]


def shard_size(tensors: Iterable[Tensor], shards: int, dtype: torch.dtype | None = None) -> int:
    """Sum the bytes of one rank's shards: FSDP cuts dimension 0 into ceil(n / shards) rows.

    Args:
        tensors: The full tensors.
        shards: Number of ranks that share each.
        dtype: Dtype of the shards. None = that of the tensors.
    """
    total = 0
    for tensor in tensors:
        rows = math.ceil(tensor.shape[0] / shards) if tensor.ndim else 1
        each = tensor.element_size() if dtype is None else dtype.itemsize
        total += rows * tensor[0].numel() * each if tensor.ndim else each
    return total


def gathered_size(trained: nn.ModuleDict, sharding: Sharding) -> int:
    """Sum the peak of what FSDP gathers; see `Need`."""
    if sharding.kind != "FSDP":
        return 0
    network = trained["unet"]
    blocks = blocks_of(network) or [nn.Identity()]

    def whole(module: nn.Module, dtype: torch.dtype | None = sharding.param_dtype) -> int:
        return shard_size(module.parameters(), 1, dtype)

    sizes = [whole(block) for block in blocks]
    near = 2 if sharding.reshard_after_forward else len(sizes)
    weights = max(sum(sizes[i : i + near]) for i in range(len(sizes)))
    gradients = max(
        whole(block) + whole(block, sharding.reduce_dtype or sharding.param_dtype)
        for block in blocks
    )
    others = sum(whole(part) for name, part in trained.items() if name != "unet")
    if sharding.reshard_after_forward:
        return whole(network) - sum(sizes) + max(weights + gradients, others)
    return whole(network) - sum(sizes) + weights + gradients + others


def accumulated_size(trained: nn.ModuleDict, layout: Layout) -> int:
    """Sum the full gradients that FSDP keeps while it accumulates; see `Need`."""
    sharding = layout.sharding
    if sharding.kind != "FSDP" or layout.accumulation == 1 or sharding.reduce_every_micro_batch:
        return 0
    return shard_size(trainable(trained), 1, sharding.reduce_dtype or sharding.param_dtype)


def state_per_byte(make_optimizer: Callable[[Iterable[nn.Parameter]], Any]) -> float:
    """Measure the bytes of optimizer state per byte of a parameter, by taking one step."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer([parameter])
    if isinstance(optimizer, TwoModes):
        optimizer.train()
    optimizer.step()
    state = [x for x in optimizer.state[parameter].values() if isinstance(x, Tensor) and x.ndim]
    return size_of(state) / size_of([parameter])


def need(parts: Parts, layout: Layout) -> Need:
    """Estimate the memory of one rank."""
    sharding = layout.sharding
    trained = parts.trained()
    gradients = shard_size(trainable(trained), sharding.shards)
    average = shard_size(trainable(trained), sharding.shards, torch.float32)
    kept, peak = training_pass(
        parts, layout.micro_batch, layout.checkpointing, sharding.param_dtype
    )
    frozen = None if parts.conditioner.trainable or not parts.encodes_text else parts.conditioner
    return Need(
        parameters=shard_size(trained.parameters(), sharding.shards),
        gradients=gradients,
        optimizer=round(gradients * parts.optimizer_state),
        average=average * parts.averages,
        buckets=gradients if sharding.kind == "DDP" and not sharding.bucket_view else 0,
        accumulated=accumulated_size(trained, layout),
        gathered=gathered_size(trained, sharding),
        codec=size_of(tensors_of(*modules_of(parts.codec))) if parts.codec_stays else 0,
        text_encoder=0 if frozen is None else size_of(tensors_of(frozen)),
        activations=kept,
        working=max(peak, encoding_pass(parts, layout.micro_batch)) - kept,
    )


@lru_cache(maxsize=256)
def training_pass(
    parts: Parts, micro_batch: int, checkpointing: bool, dtype: torch.dtype | None
) -> tuple[int, int]:
    """Run a forward and a backward pass with fake tensors.

    Args:
        parts: The parts of the run.
        micro_batch: Number of images.
        checkpointing: Whether activations of the network are recomputed.
        dtype: Dtype that the network computes in. None = that of its parameters.

    Returns:
        Bytes that the forward pass stores for the backward pass, and the peak of live bytes; both
        without weights and gradients.
    """
    with parts.computing():
        whole = parts.trained()
        trained = with_fake_tensors(whole, [whole], dtype).train()
        network = trained["unet"]
        conditioner: Any = dict(trained.items()).get("conditioner")
        if checkpointing:
            enable_gradient_checkpointing(network)
        if parts.on_gpu and parts.autocast is not None:
            norms_in_float32(trained)
        weights = next(network.parameters())
        shape = parts.codec.latent_shape(parts.image_size, parts.image_size)
        x_t = torch.empty(micro_batch, *shape, dtype=weights.dtype)
        t = torch.zeros(micro_batch, dtype=torch.int64)
        target = torch.empty(micro_batch, *shape)
        frozen: Conditioning | None = None
        if conditioner is None:
            frozen = _encoded(
                with_fake_tensors(parts.conditioner, [parts.conditioner]), micro_batch
            )
        for parameter in trainable(trained):
            parameter.grad = torch.zeros_like(parameter)
        known = tensors_of(trained)
        live = LiveBytes([*known, *(p.grad for p in trained.parameters() if p.grad is not None)])
        with live:
            with kept_for_backward(known) as kept:
                cond = _encoded(conditioner, micro_batch) if frozen is None else frozen
                cond = cond.to(x_t.device, weights.dtype)
                if takes_sizes(network):
                    cond = replace(cond, sizes=torch.ones(micro_batch, 6, dtype=torch.int64))
                output = network(x_t, t, cond)
                loss = (output.float() - target).square().mean()
            loss.backward()
        return sum(kept.values()), max(live.peak, sum(kept.values()))


@lru_cache(maxsize=256)
def encoding_pass(parts: Parts, micro_batch: int) -> int:
    """Encode images and prompts with fake tensors; return the peak of live bytes."""
    with parts.computing(), torch.no_grad():
        size = parts.image_size
        codec = with_fake_tensors(parts.codec, modules_of(parts.codec))
        conditioner = with_fake_tensors(parts.conditioner, [parts.conditioner])
        live = LiveBytes(tensors_of(conditioner, *modules_of(codec)))
        with live:
            if parts.encodes_images:
                codec.encode(torch.empty(micro_batch, 3, size, size))
            if parts.encodes_text and not conditioner.trainable:
                _encoded(conditioner, micro_batch)
        return live.peak


def _encoded(conditioner: Conditioner, micro_batch: int) -> Conditioning:
    encoded: Conditioning = conditioner([""] * micro_batch)
    return encoded


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """List the parameters that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def modules_of(codec: LatentCodec) -> list[nn.Module]:
    """List the modules that a codec holds."""
    return [part for part in vars(codec).values() if isinstance(part, nn.Module)]


@dataclass(frozen=True)
class Plan:
    """The estimate for a run.

    Args:
        layout: How the run is divided among ranks.
        need: Memory of one rank.
        counts: Number of parameters of each part.
        batch_size: Global batch size.
        image_size: Height and width, in pixels.
        precision: The precision, as the trainer names it.
        on_gpu: Whether the run is on GPUs.
        max_steps: Optimizer steps. None = unlimited.
        images_per_second: Summed over all ranks. None = unknown.
        memory: Bytes that one rank may use. None = unknown.
        way_out: What to change if the run does not fit.
    """

    layout: Layout
    need: Need
    counts: dict[str, int]
    batch_size: int
    image_size: int
    precision: str
    on_gpu: bool
    max_steps: int | None
    images_per_second: float | None
    memory: int | None
    way_out: str | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices. None = the memory is unknown."""
        return None if self.memory is None else self.need.total <= self.memory

    @property
    def images(self) -> int | None:
        """Images of the full run. None = its length is unlimited."""
        return None if self.max_steps is None else self.max_steps * self.batch_size

    @property
    def hours(self) -> float | None:
        """Hours of the full run. None = its length or rate is unknown."""
        if self.images is None or self.images_per_second is None:
            return None
        return self.images / self.images_per_second / 3600

    def facts(self) -> dict[str, Any]:
        """Return the estimate as plain values; sizes in bytes."""
        layout = self.layout
        sharding = {
            name: _name(value) if isinstance(value, torch.dtype) else value
            for name, value in asdict(layout.sharding).items()
        }
        return {
            "strategy": sharding,
            "precision": self.precision,
            "batch_size": self.batch_size,
            "image_size": self.image_size,
            "micro_batch": layout.micro_batch,
            "accumulation": layout.accumulation,
            "gradient_checkpointing": layout.checkpointing,
            "parameters": self.counts,
            "bytes_per_rank": {**asdict(self.need), "total": self.need.total},
            "steps": self.max_steps,
            "images": self.images,
            "images_per_second": self.images_per_second,
            "hours": self.hours,
            "memory": self.memory,
            "fits": self.fits,
            "way_out": self.way_out,
        }

    def table(self) -> str:
        """Return the estimate as text, in lines of at most 100 characters."""
        rows = [(name, size, note) for name, size, note in self._rows() if size or note]
        rows.append(("total", self.need.total, ""))
        width = max(len(name) for name, _, _ in rows)
        lines = [*self._head(), "", "on each rank"]
        lines += [
            f"  {name:{width}}  {show_bytes(size):>10}  {note}".rstrip()
            for name, size, note in rows
        ]
        lines += verdict(self.need.total, self.memory, self.way_out, on_gpu=self.on_gpu)
        return "\n".join(lines)

    def _head(self) -> list[str]:
        layout, sharding = self.layout, self.layout.sharding
        parts = [f"{name} {_millions(count)}" for name, count in self.counts.items()]
        where = _ranks(sharding)
        nodes = sharding.ranks // sharding.ranks_per_node
        where += f" on {nodes} nodes" if nodes > 1 else ""
        how: str = sharding.kind
        if sharding.kind == "FSDP":
            how = f"FSDP, {sharding.ranks // sharding.shards} x {sharding.shards} shards"
            if sharding.param_dtype is not None:
                how += f" computing in {_name(sharding.param_dtype)}"
        checkpointing = ", gradient checkpointing" if layout.checkpointing else ""
        passes = f" x {layout.accumulation} accumulated" if layout.accumulation > 1 else ""
        lines = [
            f"parameters: {', '.join(parts)}",
            f"{where}, {how}, precision {self.precision}{checkpointing}",
            f"{show_images(self.batch_size)} of {self.image_size}x{self.image_size} per step = "
            f"{_ranks(sharding)} x {show_images(layout.micro_batch)}"
            f"{passes}",
        ]
        if self.images is None:
            lines.append("steps: trainer.max_steps is not set")
        else:
            rate = self.images_per_second
            time = "" if rate is None else f", {_time(self.hours)} at {rate:.4g} images/s"
            lines.append(f"{self.max_steps:,} steps, {self.images:,} images{time}")
        return lines

    def _rows(self) -> list[tuple[str, int, str]]:
        need, sharding = self.need, self.layout.sharding
        share = f"1/{sharding.shards} of them" if sharding.shards > 1 else ""
        whole = "whole, until the last micro-batch" if need.accumulated else ""
        return [
            ("parameters", need.parameters, share),
            ("gradients", need.gradients, ""),
            ("optimizer state", need.optimizer, ""),
            ("averaged weights", need.average, ""),
            ("DDP's buckets", need.buckets, ""),
            ("gradients accumulated", need.accumulated, whole),
            ("gathered by FSDP", need.gathered, "peak" if need.gathered else ""),
            ("codec", need.codec, ""),
            ("text encoder", need.text_encoder, ""),
            ("activations", need.activations, f"stored for {show_images(self.layout.micro_batch)}"),
            ("working memory", need.working, "peak"),
        ]


def find_way_out(parts: Parts, layout: Layout, batch_size: int, memory: int) -> str:
    """Describe in one line what to change so that the run fits.

    Tried in this order, each with all smaller micro-batches: the layout as it is, gradient
    checkpointing, FSDP, FSDP that gathers bfloat16, and FSDP that reduces in every micro-batch.
    """
    first = layout.sharding
    shardings = [first]
    adapters = len(trainable(parts.network)) < len(list(parts.network.parameters()))
    if first.kind != "FSDP" and first.ranks > 1 and not adapters:  # those are never sharded
        shardings.append(replace(first, kind="FSDP", shards=first.ranks))
    elif first.kind == "FSDP" and first.shards < first.ranks:
        shardings.append(replace(first, shards=first.ranks))
    if shardings[-1].kind == "FSDP" and first.param_dtype is None:
        shardings.append(
            replace(
                shardings[-1],
                shards=first.ranks,
                param_dtype=torch.bfloat16,
                reduce_dtype=torch.float32,
            )
        )
    if shardings[-1].kind == "FSDP" and not first.reduce_every_micro_batch:
        shardings.append(replace(shardings[-1], reduce_every_micro_batch=True))
    sizes = [m for m in micro_batches(batch_size // first.ranks) if m <= layout.micro_batch]
    least: int | None = None
    for sharding in shardings:
        for checkpointing in sorted({layout.checkpointing, True}):
            lo, hi = 0, len(sizes) - 1  # sizes fall, and with them the need

            def tried(
                i: int, sharding: Sharding = sharding, checkpointing: bool = checkpointing
            ) -> tuple[Layout, int]:
                passes = batch_size // first.ranks // sizes[i]
                other = Layout(sharding, sizes[i], passes, checkpointing)
                return other, need(parts, other).total

            other, total = tried(hi)
            least = total if least is None else min(least, total)
            if total > memory:
                continue
            while lo < hi:
                middle = (lo + hi) // 2
                if tried(middle)[1] <= memory:
                    hi = middle
                else:
                    lo = middle + 1
            other, total = tried(lo)
            return f"way out: {_changes(layout, other)}: {show_bytes(total)}"
    assert least is not None
    return f"no way out on {_ranks(first)}: {show_bytes(least)} at least"


def _changes(layout: Layout, other: Layout) -> str:
    changes = []
    if other.sharding.kind != layout.sharding.kind:
        changes.append("FullyShardedStrategy")
    elif other.sharding.shards != layout.sharding.shards:
        changes.append("shard_ranks=all")
    if other.sharding.param_dtype != layout.sharding.param_dtype:
        changes.append("param_dtype=bfloat16")
    if other.sharding.reduce_every_micro_batch != layout.sharding.reduce_every_micro_batch:
        changes.append("reduce_every_micro_batch=true")
    if other.checkpointing and not layout.checkpointing:
        changes.append("model.gradient_checkpointing=true")
    if other.micro_batch != layout.micro_batch:
        changes.append(f"data.max_batch_size_per_device={other.micro_batch}")
    return ", ".join(changes)


def show_bytes(size: float) -> str:
    """Write a size in GiB or MiB."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"


def verdict(total: int, memory: int | None, way_out: str | None, *, on_gpu: bool) -> list[str]:
    """Return the lines under a table: what it leaves out, and whether its total fits."""
    lines = []
    if on_gpu:
        lines.append("not included: the CUDA context and memory fragmentation, 1 to 2 GiB on a GPU")
    if memory is not None:
        left = memory - total
        lines.append(
            f"fits in {show_bytes(memory)}, {show_bytes(left)} to spare"
            if left >= 0
            else f"does not fit in {show_bytes(memory)}: {show_bytes(-left)} too much"
        )
    return lines if way_out is None else [*lines, way_out]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ranks(sharding: Sharding) -> str:
    return f"{sharding.ranks} rank{'s' * (sharding.ranks > 1)}"


def show_images(count: int) -> str:
    """Write a number of images."""
    return f"{count} image{'s' * (count > 1)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _time(hours: float | None) -> str:
    assert hours is not None
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
