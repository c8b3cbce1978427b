"""Diffusion schedules, losses, timesteps, guidance and samplers that are correct at zero SNR.

Based on arXiv:2305.08891, "Common Diffusion Noise Schedules and Sample Steps are Flawed". This
namespace needs only torch; networks, training and the command line are in submodules.
"""

from zsnr.conversion import ConvertedNetwork
from zsnr.denoiser import Conditioning, Denoiser
from zsnr.draws import Draws, training_draws
from zsnr.guidance import Guidance
from zsnr.guidance_methods import (
    adaptive_projected_guidance,
    classifier_free_guidance,
    dynamic_threshold,
    rescale_guidance,
    zero_star_guidance,
)
from zsnr.inpainting import InpaintingDenoiser
from zsnr.learned_weight import LearnedWeight
from zsnr.loss import LossWeighting, diffusion_loss
from zsnr.noise import SampleNoise, derive_seed, offset_noise
from zsnr.objective import Objective
from zsnr.oracle import EmpiricalDenoiser, GaussianDenoiser
from zsnr.prediction import PredictionType, prediction_target, to_eps, to_flow, to_v, to_x0
from zsnr.samplers import (
    DDIM,
    DDPM,
    DEIS,
    ERSDE,
    IPNDM,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp3M,
    Euler,
    EulerAncestral,
    Heun,
    Multiscale,
    Sampler,
    UniPC,
    available_samplers,
    get_sampler,
    recommend_sampling,
    register_sampler,
)
from zsnr.schedule import (
    NoiseSchedule,
    RectifiedFlow,
    Schedule,
    rescale_zero_terminal_snr,
    resolution_shift,
)
from zsnr.timestep_law import TimestepLaw
from zsnr.timesteps import (
    TimestepSpacing,
    available_spacings,
    ays,
    get_timesteps,
    guided,
    karras,
    kl_optimal,
    leading,
    linspace,
    log_snr,
    register_spacing,
    timestep_pairs,
    trailing,
)
from zsnr.transition import reverse_transition

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "ERSDE",
    "IPNDM",
    "Conditioning",
    "ConvertedNetwork",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp3M",
    "Denoiser",
    "Draws",
    "EmpiricalDenoiser",
    "Euler",
    "EulerAncestral",
    "GaussianDenoiser",
    "Guidance",
    "Heun",
    "InpaintingDenoiser",
    "LearnedWeight",
    "LossWeighting",
    "Multiscale",
    "NoiseSchedule",
    "Objective",
    "PredictionType",
    "RectifiedFlow",
    "SampleNoise",
    "Sampler",
    "Schedule",
    "TimestepLaw",
    "TimestepSpacing",
    "UniPC",
    "adaptive_projected_guidance",
    "available_samplers",
    "available_spacings",
    "ays",
    "classifier_free_guidance",
    "derive_seed",
    "diffusion_loss",
    "dynamic_threshold",
    "get_sampler",
    "get_timesteps",
    "guided",
    "karras",
    "kl_optimal",
    "leading",
    "linspace",
    "log_snr",
    "offset_noise",
    "prediction_target",
    "recommend_sampling",
    "register_sampler",
    "register_spacing",
    "rescale_guidance",
    "rescale_zero_terminal_snr",
    "resolution_shift",
    "reverse_transition",
    "timestep_pairs",
    "to_eps",
    "to_flow",
    "to_v",
    "to_x0",
    "trailing",
    "training_draws",
    "zero_star_guidance",
]
