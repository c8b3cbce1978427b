"""Samplers: one registry, one protocol, one x_0-safe step."""

from zsnr.samplers.base import Sampler
from zsnr.samplers.ddim import DDIM
from zsnr.samplers.ddpm import DDPM
from zsnr.samplers.euler import Euler, EulerAncestral
from zsnr.samplers.registry import available_samplers, get_sampler, register_sampler

__all__ = [
    "DDIM",
    "DDPM",
    "Euler",
    "EulerAncestral",
    "Sampler",
    "available_samplers",
    "get_sampler",
    "register_sampler",
]
