"""Samplers: one registry, one protocol, one x_0-safe step."""

from zsnr.samplers.base import Changed, Sampler
from zsnr.samplers.ddim import DDIM, DDPM, Euler, EulerAncestral
from zsnr.samplers.deis import DEIS
from zsnr.samplers.dpmpp import DPMpp2M, DPMpp2MSDE, DPMpp3M
from zsnr.samplers.er_sde import ERSDE
from zsnr.samplers.heun import Heun
from zsnr.samplers.ipndm import IPNDM
from zsnr.samplers.multiscale import Multiscale
from zsnr.samplers.recommend import recommend_sampling
from zsnr.samplers.registry import available_samplers, get_sampler, register_sampler
from zsnr.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "ERSDE",
    "IPNDM",
    "Changed",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp3M",
    "Euler",
    "EulerAncestral",
    "Heun",
    "Multiscale",
    "Sampler",
    "UniPC",
    "available_samplers",
    "get_sampler",
    "recommend_sampling",
    "register_sampler",
]
