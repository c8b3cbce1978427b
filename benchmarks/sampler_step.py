"""Cost of one sampler step compared with diffusers' schedulers, on a (4, 4, 64, 64) CPU latent.

    python benchmarks/sampler_step.py [--write]

All contenders run in one process on one thread, interleaved, in float32; the table shows medians.
"step" is the update alone, with x_0 given; "loop" is all of `Sampler.sample` over 50 steps with a
constant denoiser, divided by 50; "from v" is the update and the denoiser's conversion of the
network's v to x_0. diffusers' step always converts: from v, or, for "from x_0", with
prediction_type="sample". The lower bound is the bare update of two operations, and a randn if a
step needs noise.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from zsnr import DDIM, DDPM, Denoiser, NoiseSchedule, Sampler, trailing
from zsnr.samplers.base import step, transition_coefficients

SHAPE, STEPS = (4, 4, 64, 64), 50


def contenders() -> dict[str, Callable[[], object]]:
    """Return functions by name; one call is one step."""
    schedule = NoiseSchedule()
    grid = trailing(STEPS)
    x_t, x_0 = torch.randn(2, *SHAPE)
    abc = transition_coefficients(schedule, grid, 0.0)[25]
    noisy = transition_coefficients(schedule, grid, 1.0)[25]
    denoiser = Denoiser(lambda x, t, c: x_0, schedule)
    t_row = grid[25].expand(SHAPE[0])

    def loop_of(sampler: Sampler) -> Callable[[], object]:
        return lambda: sampler.sample(lambda x, t: x_0, schedule, x_t, grid)

    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    ddim = DDIMScheduler(rescale_betas_zero_snr=True, clip_sample=False, **settings)
    plain = DDIMScheduler(
        rescale_betas_zero_snr=True, clip_sample=False, **{**settings, "prediction_type": "sample"}
    )
    ddpm = DDPMScheduler(rescale_betas_zero_snr=True, clip_sample=False, **settings)
    euler = EulerDiscreteScheduler(**settings)
    for scheduler in (ddim, plain, ddpm, euler):
        scheduler.set_timesteps(STEPS)
    euler.is_scale_input_called = True

    def euler_step() -> object:
        euler._step_index = 25
        return euler.step(x_0, euler.timesteps[25], x_t)

    return {
        "bare update": lambda: torch.mul(x_0, abc[0]).add_(x_t, alpha=abc[1]),
        "zsnr step": lambda: step(x_0, x_t, abc),
        "zsnr ddim loop": loop_of(DDIM()),
        "zsnr step from v": lambda: step(denoiser(x_t, t_row), x_t, abc),
        "diffusers DDIM from x_0": lambda: plain.step(x_0, plain.timesteps[25], x_t),
        "diffusers DDIM": lambda: ddim.step(x_0, ddim.timesteps[25], x_t),
        "diffusers Euler": euler_step,
        "bare update + randn": lambda: (
            torch.mul(x_0, noisy[0]).add_(x_t, alpha=noisy[1]),
            torch.randn_like(x_t),
        ),
        "zsnr stochastic step": lambda: step(x_0, x_t, noisy, torch.randn_like(x_t)),
        "zsnr ddpm loop": loop_of(DDPM()),
        "diffusers DDPM": lambda: ddpm.step(x_0, ddpm.timesteps[25], x_t),
    }


def measure(rounds: int = 40, calls: int = 40) -> dict[str, float]:
    """Return the median microseconds per step, over interleaved rounds."""
    runs = contenders()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 3):
        for name, call in runs.items():
            steps = STEPS if name.endswith("loop") else 1
            repeats = max(1, calls // steps)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            if round_number >= 3:  # the first rounds warm up
                times[name].append((time.perf_counter() - start) / (repeats * steps) * 1e6)
    return {name: statistics.median(samples) for name, samples in times.items()}


def table(medians: dict[str, float]) -> str:
    """Format the medians with their ratios to the lower bounds and to diffusers' schedulers."""
    lines = [
        "| step | us | / lower bound | diffusers DDIM / it | diffusers Euler / it |",
        "|---|---|---|---|---|",
    ]
    for name, us in medians.items():
        stochastic = any(word in name for word in ("randn", "stochastic", "ddpm", "DDPM"))
        floor = medians["bare update + randn" if stochastic else "bare update"]
        ddim, euler = (medians[f"diffusers {name}"] / us for name in ("DDIM", "Euler"))
        lines.append(f"| {name} | {us:.1f} | {us / floor:.2f} | {ddim:.1f} | {euler:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        text = table(measure())
    print(text)
    if arguments.write:
        out = Path(__file__).parent / "results" / "sampler_step.md"
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
        out.write_text(
            f"# Cost of one sampler step\n\n{date.today()}, {versions}, Python "
            f"{platform.python_version()}, {platform.machine()}, 1 thread, float32 {SHAPE}; "
            "medians of 40 interleaved rounds.\n"
            "Made by `python benchmarks/sampler_step.py --write`.\n\n"
            f"{text}\n"
        )


if __name__ == "__main__":
    main()
