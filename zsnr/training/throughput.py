"""What a training step costs, and what a GPU could do: floating-point operations and peaks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zsnr.denoiser import Conditioning

# Dense peak of bfloat16 products, FLOP/s, by a part of the device's name: the makers' data sheets.
_PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the FLOP/s that a device reaches at most in bfloat16; None if it is not known."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)


def network_flops(network: nn.Module, shape: Sequence[int], cond: Conditioning) -> float:
    """Count the floating-point operations of a forward and a backward pass of one sample.

    They are counted on the meta device, without a computation or a copy of the weights. What
    gradient checkpointing recomputes does not count.

    Args:
        network: (x_t, t, conditioning) -> prediction, before it is sharded or compiled.
        shape: Shape of x_t without the batch, (C, h, w).
        cond: Conditioning of one sample, of which only the shapes count.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)

    tensors = {name: empty(p) for name, p in network.named_parameters()}
    tensors |= {name: empty(b) for name, b in network.named_buffers()}
    cond = cond.map(empty)
    x_t = torch.empty(1, *shape, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        torch.func.functional_call(network, tensors, (x_t, t, cond)).sum().backward()
    return float(counter.get_total_flops())
