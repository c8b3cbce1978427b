"""FSDP2 for Lightning: weights, gradients, optimizer and averaged weights in shards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from zsnr.checkpoints import sharded
from zsnr.checkpoints.run_folder import resolve_model
from zsnr.checkpoints.snapshots import PREFIX
from zsnr.schedule import widest
from zsnr.training.checkpoint_files import CheckpointFiles
from zsnr.training.deferred import deferred_weights

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HalfOrFull = Literal["bfloat16", "float16", "float32"]


class FullyShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2) over all ranks, or within each node.

    Training is sharded; validate and predict hold whole weights on each device, so that ranks may
    have unequal work.

    Args:
        shard_ranks: Number of ranks over which one copy of the weights is divided: "all", "node"
            (hybrid sharding: divided within a node, one copy for each node), or a number that
            divides the number of ranks.
        param_dtype: Dtype that the network computes in during training, "bfloat16" or "float32";
            its weights stay float32. None = float32, or the dtype of trainer.precision, as in
            validate and predict.
        reduce_dtype: Dtype in which gradients are averaged over the ranks. None = the dtype that
            they are computed in.
        reduce_every_micro_batch: Whether gradients are averaged over the ranks in every micro-batch
            of an accumulation, and not once in each step. It takes more communication and less
            memory: whole gradients are not kept. Copies of the weights on several nodes are
            averaged once in each step in any case.
        reshard_after_forward: Whether gathered weights are freed between forward and backward pass,
            which takes less memory and more communication.
        save_distributed_checkpoint: Whether each rank writes its shard into a folder. false = rank
            0 writes a single file, for which it needs memory for the whole checkpoint.
        timeout: Time that a rank waits for another one before it gives up.

    Raises:
        ValueError: shard_ranks is less than 1, or param_dtype is float16.
    """

    def __init__(
        self,
        shard_ranks: Literal["all", "node"] | int = "all",
        param_dtype: Literal["bfloat16", "float32"] | None = None,
        reduce_dtype: HalfOrFull | None = "float32",
        reduce_every_micro_batch: bool = False,
        reshard_after_forward: bool = True,
        save_distributed_checkpoint: bool = True,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        if isinstance(shard_ranks, int) and shard_ranks < 1:
            raise ValueError(f"shard_ranks={shard_ranks}: wanted 'all', 'node' or at least 1.")
        if param_dtype not in (None, "bfloat16", "float32"):
            raise ValueError(
                f"param_dtype={param_dtype!r}: wanted 'bfloat16' or 'float32'. Small gradients "
                "become 0 in float16, and no loss scaler works with sharded weights."
            )
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            timeout=timeout,
        )
        self.shard_ranks, self.reshard_after_forward = shard_ranks, reshard_after_forward
        self.param_dtype, self.reduce_dtype = param_dtype, reduce_dtype
        self.reduce_every_micro_batch = reduce_every_micro_batch

    # Lightning's hooks

    def setup_environment(self) -> None:
        # the data-parallel size is known now: nodes may be more or fewer than the last time
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate gradients without communication, but for that within a copy if it is set."""
        assert self.model is not None
        parts = fsdp_parts(self.model)
        try:
            self._reduce(parts, False)
            yield
        finally:
            self._reduce(parts, True)

    def _reduce(self, parts: Iterable[Any], wanted: bool) -> None:
        """Set whether the next backward pass averages gradients."""
        for part in parts:
            if self.reduce_every_micro_batch:
                part.set_requires_all_reduce(wanted, recurse=False)
            else:
                part.set_requires_gradient_sync(wanted, recurse=False)

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Defer the weights of a LatentDiffusion that is built in `with trainer.init_module()`."""
        with deferred_weights(), self.precision_plugin.tensor_init_context():
            yield

    def setup(self, trainer: Trainer) -> None:
        trainer.fit_loop.epoch_loop.val_loop.inference_mode = False  # FSDP gathers in no_grad only
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(str(filepath)))
        if self._save_distributed_checkpoint:
            files = self.checkpoint_io
            files = files if isinstance(files, CheckpointFiles) else CheckpointFiles()
            files.save_shards(checkpoint, path)
            return
        checkpoint = sharded.gather(checkpoint, keep=self.is_global_zero)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        assert self.lightning_module is not None
        path = Path(resolve_model(self.broadcast(str(checkpoint_path))))
        unused = PREFIX if getattr(self.lightning_module, "post_hoc", None) is None else None
        return sharded.restore(path, self.lightning_module, self.optimizers, unused)

    # Called by configure_model

    def shard(self, parts: Iterable[nn.Module], blocks: Iterable[nn.Module], ema: bool) -> None:
        """Shard modules, with `blocks` as the units that are gathered and freed at a time.

        Outside of training this does nothing.

        Args:
            parts: Modules to shard.
            blocks: Submodules of them, in the order of the forward pass.
            ema: Whether the modules hold averaged weights, which have no backward pass.

        Raises:
            ValueError: shard_ranks does not divide the number of ranks.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return
        policy = MixedPrecisionPolicy(
            param_dtype=self.param_dtype and _DTYPES[self.param_dtype],
            reduce_dtype=self.reduce_dtype and _DTYPES[self.reduce_dtype],
        )
        to_float = replace(policy, output_dtype=torch.float32 if self.param_dtype else None)
        # A validation step has no backward pass that would free what its forward pass gathered, and
        # weights that stay gathered are not the ones that the optimizer changes.
        options = {
            "mesh": self._shard_mesh(),
            "reshard_after_forward": ema or self.reshard_after_forward,
        }
        for block in blocks:
            fully_shard(block, mp_policy=policy, **options)
        for part in parts:
            fully_shard(part, mp_policy=to_float, **options)

    def shard_size(self) -> int:
        """Return the number of ranks over which one copy of the weights is divided.

        Raises:
            ValueError: It does not divide the number of ranks.
        """
        world, size = self.num_nodes * self.num_processes, self.shard_ranks
        if not isinstance(size, int):
            size = world if size == "all" else self.num_processes
        if world % size:
            raise ValueError(f"shard_ranks={size} does not divide the {world} ranks.")
        return size

    def _shard_mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        world, size = self.world_size, self.shard_size()
        device = self.root_device.type
        if size == world:
            return init_device_mesh(device, (world,), mesh_dim_names=("shard",))
        return init_device_mesh(
            device, (world // size, size), mesh_dim_names=("replicate", "shard")
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse to train with a strategy that this package does not support.

    Raises:
        ValueError: Averaged weights, gradient norms or checkpoints would be wrong with it.
    """
    known = (SingleDeviceStrategy, DDPStrategy, FullyShardedStrategy)
    if not isinstance(strategy, known):
        raise ValueError(
            f"trainer.strategy={type(strategy).__name__} does not shard weights and averages as "
            "training needs it: use auto, ddp or zsnr.training.FullyShardedStrategy."
        )


def meet(place: str, timeout: timedelta | None = None) -> None:
    """Wait for all ranks, and name those that do not arrive.

    Only with gloo: the watchdog names a rank that waits on a GPU.

    Args:
        place: Place in the run, for the message.
        timeout: Time to wait. None = the timeout of the process group.

    Raises:
        TimeoutError: A rank has not arrived, or has ended.
    """
    if not dist.is_initialized() or dist.get_backend() != "gloo":
        return
    try:
        dist.monitored_barrier(timeout=timeout, wait_all_ranks=True)
    except RuntimeError as error:
        raise TimeoutError(f"Not all ranks have come to {place}: {error}") from error


def reshard(module: nn.Module) -> None:
    """Free the gathered weights of FSDP modules after a forward pass without a backward pass."""
    for part in fsdp_parts(module):
        part.reshard()


def fsdp_parts(module: nn.Module) -> list[Any]:
    """List the modules whose weights FSDP gathers and frees."""
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor that this rank holds, or a tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def without_gradient(conditioner: nn.Module) -> list[str]:
    """Return the names of parameters that no embedding depends on, such as those of later layers.

    DDP waits for the gradient of every parameter that it is not told to ignore.

    Args:
        conditioner: Text encoder that is trained.
    """
    named = [(name, p) for name, p in conditioner.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        null = conditioner([""])
        outputs = [part.sum() for part in null.parts().values() if part.requires_grad]
        gradients = torch.autograd.grad(outputs, [p for _, p in named], allow_unused=True)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is None]


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return this rank's share of the sum of squares; the shares of all ranks add up to the sum.

    Args:
        tensors: Gradients after they have been averaged: equal on all ranks, or DTensors.
    """
    from torch.distributed.tensor import DTensor

    world = dist.get_world_size() if dist.is_initialized() else 1
    by_copies: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        copies = world
        if isinstance(tensor, DTensor):
            sharded_by = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
            shards = [size for size, placement in sharded_by if placement.is_shard()]
            copies = world // math.prod(shards)
        by_copies.setdefault(copies, []).append(local(tensor))
    shares = []
    for copies, group in by_copies.items():
        norms = torch.stack(torch._foreach_norm(group))
        shares.append(norms.to(widest(norms.device)).square().sum() / copies)
    return torch.stack(shares).sum() if shares else torch.zeros(())
