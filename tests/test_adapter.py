"""This package's samplers as schedulers of diffusers."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_checkpoints import tiny_stable_diffusion
from tiny import SCHEDULER

from zsnr import (
    GaussianDenoiser,
    Guidance,
    NoiseSchedule,
    SampleNoise,
    Sampler,
    available_samplers,
    get_sampler,
    get_timesteps,
    reverse_transition,
    to_v,
)
from zsnr.interop import DiffusersScheduler
from zsnr.pipeline import TextToImage

SCHEDULES = [NoiseSchedule(), NoiseSchedule(zero_terminal_snr=False), NoiseSchedule("cosine")]


class TwoStep(Sampler):
    """Steps with x_0 extrapolated from the last two predictions."""

    def sample(self, denoiser, schedule, x_T, timesteps, *, randn_like=torch.randn_like, **_):
        grid, x_t, before = [*map(int, timesteps), -1], x_T, None
        for t, s in pairwise(grid):
            x_0 = denoiser(x_t, torch.full((len(x_t),), t))
            best = x_0 if before is None else 1.5 * x_0 - 0.5 * before
            a, b, c = reverse_transition(*schedule(t), *schedule(s), 0.5)
            x_t = a * best + b * x_t + c * randn_like(x_t)
            before = x_0
        return x_t


class TwoStage(Sampler):
    """Asks again halfway through each step, at a timestep that is not of the grid."""

    def sample(self, denoiser, schedule, x_T, timesteps, *, randn_like=torch.randn_like, **_):
        grid, x_t = [*map(int, timesteps), -1], x_T
        for t, s in pairwise(grid):
            middle = (t + s + 1) // 2
            x_0 = denoiser(x_t, torch.full((len(x_t),), t))
            if s < middle < t:
                a, b, _ = reverse_transition(*schedule(t), *schedule(middle))
                x_0 = denoiser(a * x_0 + b * x_t, torch.full((len(x_t),), middle))
            a, b, _ = reverse_transition(*schedule(t), *schedule(s))
            x_t = a * x_0 + b * x_t
        return x_t


def drive(scheduler, network, x, generator=None):
    """Do as a pipeline of diffusers does."""
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    return x


def gaussian(schedule):
    """The exact denoiser, and a network that predicts v for it."""
    denoiser = GaussianDenoiser(schedule, -0.8, 0.5)

    def network(x_t, t):
        t = torch.full((len(x_t),), int(t))
        alpha, sigma = (scale.view(-1, 1) for scale in schedule(t))
        return to_v(denoiser(x_t, t), x_t, alpha, sigma, "sample")

    return lambda x_t, t: denoiser(x_t, t), network  # as in a pipeline, guidance is not told


@pytest.mark.parametrize("schedule", SCHEDULES, ids=["fixed", "original", "cosine"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize(
    "sampler", [*map(get_sampler, available_samplers()), TwoStep(), TwoStage()]
)
def test_stepping_is_sampling(sampler, spacing, schedule):
    denoiser, network = gaussian(schedule)
    x_T = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler = DiffusersScheduler(sampler, schedule, spacing=spacing)
    for num_steps in (1, 2, 7, 25):
        grid = get_timesteps(spacing, num_steps)
        torch.manual_seed(1)
        wanted = sampler.sample(denoiser, schedule, x_T, grid)
        scheduler.set_timesteps(num_steps)
        assert len(scheduler.timesteps) >= num_steps
        torch.manual_seed(1)
        for _ in range(2):  # a second run starts anew
            torch.manual_seed(1)
            found = drive(scheduler, network, x_T)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_a_step_goes_on_from_what_it_is_given():
    """Changed states, repeated and skipped steps: what counts is (x_t, t)."""
    _, network = gaussian(NoiseSchedule())
    scheduler = DiffusersScheduler(TwoStep())
    scheduler.set_timesteps(10)
    torch.manual_seed(0)
    x = drive(scheduler, network, torch.randn(1, 4))
    t = scheduler.timesteps[4]
    for _ in range(2):
        torch.manual_seed(3)
        x_s = scheduler.step(network(x, t), t, x).prev_sample
        a, b, c = reverse_transition(*NoiseSchedule()(499 + 100), *NoiseSchedule()(499), 0.5)
        x_0 = NoiseSchedule()(599)[0] * x - NoiseSchedule()(599)[1] * network(x, t)
        torch.manual_seed(3)
        torch.testing.assert_close(x_s, a * x_0 + b * x + c * torch.randn(1, 4))


@pytest.mark.parametrize("name", ["heun", "multiscale", "unipc", "dpmpp_2m"])
def test_samplers_with_history_begin_anywhere(name):
    """As image-to-image does: from the middle of the list of calls, wherever that is."""
    schedule = NoiseSchedule()
    denoiser, network = gaussian(schedule)
    sampler, x = get_sampler(name), torch.randn(2, 4, dtype=torch.float64)
    scheduler = DiffusersScheduler(sampler, schedule, spacing="log_snr")
    scheduler.set_timesteps(6)
    for first in range(len(scheduler.timesteps)):
        t, sample = scheduler.timesteps[first], x
        scheduler.set_begin_index(first)
        for call in scheduler.timesteps[first:]:
            sample = scheduler.step(network(sample, call), call, sample).prev_sample
        grid = get_timesteps("log_snr", 6, schedule=schedule).tolist()
        wanted = sampler.sample(denoiser, schedule, x, grid[grid.index(int(t)) :])
        torch.testing.assert_close(sample, wanted, rtol=0, atol=1e-9)


def test_the_state_keeps_its_dtype_and_the_arithmetic_is_float32():
    _, network = gaussian(NoiseSchedule())
    x_T = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    scheduler = DiffusersScheduler()
    scheduler.set_timesteps(10)
    wanted = drive(scheduler, network, x_T.half().float())
    found = drive(scheduler, network, x_T.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=5e-3)


def test_choosing_steps_draws_nothing():
    torch.manual_seed(4)
    before = torch.get_rng_state()
    DiffusersScheduler("ddpm").set_timesteps(10)
    assert torch.equal(torch.get_rng_state(), before)


def test_own_timesteps():
    scheduler = DiffusersScheduler()
    scheduler.set_timesteps(timesteps=[999, 500, 3])
    assert scheduler.timesteps.tolist() == [999, 500, 3]
    for wrong in ([3, 500], [1000], [5, 5], []):
        with pytest.raises(ValueError):  # noqa: PT011
            scheduler.set_timesteps(timesteps=wrong)


def test_errors():
    with pytest.raises(ValueError, match="prediction_type='epsilon' has no x_0"):
        DiffusersScheduler(prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"'dimm' is unknown\. Known: 'ddim'"):
        DiffusersScheduler("dimm")
    with pytest.raises(ValueError, match="'trail' is unknown"):
        DiffusersScheduler(spacing="trail")
    for auto in ({"sampler": "auto"}, {"spacing": "auto"}):
        with pytest.raises(ValueError, match="'auto' depends on the number of steps and the guid"):
            DiffusersScheduler.from_config({"prediction_type": "v_prediction"}, **auto)
    scheduler = DiffusersScheduler()
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="Give either"):
        scheduler.set_timesteps()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep=998 is not in the grid"):
        scheduler.step(x, 998, x)
    scheduler = DiffusersScheduler(TwoStage())
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="lies inside a step"):
        scheduler.step(x, scheduler.timesteps[1], x)


def test_from_config_keeps_what_the_pipeline_declares():
    found = DiffusersScheduler.from_config(SCHEDULER)
    assert found.schedule == NoiseSchedule(beta_start=0.00085, beta_end=0.012)
    assert found.prediction_type == "v_prediction"
    lost = {k: v for k, v in SCHEDULER.items() if k != "rescale_betas_zero_snr"}
    assert float(DiffusersScheduler.from_config(lost).schedule.snr[-1]) > 0
    found = DiffusersScheduler.from_config(lost, "ddpm", zero_terminal_snr=True)
    assert found.schedule == NoiseSchedule(beta_start=0.00085, beta_end=0.012)
    assert found.config["sampler"] == found.config.sampler == "ddpm"
    with pytest.raises(AttributeError):
        found.config.nothing  # noqa: B018


def test_a_lost_rescale_of_cosine_is_diffusers_own():
    """Algorithm 1 on the capped table, not the paper's uncapped one."""
    from diffusers import DDIMScheduler

    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    theirs = DDIMScheduler(**config, rescale_betas_zero_snr=True).alphas_cumprod.double()
    dropped = {**config, "_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True}
    for found in (
        DiffusersScheduler.from_config(config, zero_terminal_snr=True),
        DiffusersScheduler.from_config(dropped),
    ):
        torch.testing.assert_close(found.schedule.alphas_cumprod, theirs, rtol=0, atol=2e-6)
    kept = {**config, "rescale_betas_zero_snr": True}
    found = DiffusersScheduler.from_config(kept, zero_terminal_snr=False)
    plain = NoiseSchedule("cosine", zero_terminal_snr=False).alphas_cumprod
    assert torch.equal(found.schedule.alphas_cumprod, plain)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    from diffusers import StableDiffusionPipeline

    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    tiny_stable_diffusion(folder, timestep_spacing="leading")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return folder, pipe


@pytest.mark.parametrize("num_steps", [1, 10, 48])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_one_line_repairs_a_pipeline(pipeline, sampler, num_steps):
    """Also where the steps do not divide 1000, where diffusers' own DDIM leaves its grid."""
    folder, pipe = pipeline
    pipe.scheduler = DiffusersScheduler.from_config(pipe.scheduler.config, sampler)
    ours = TextToImage.from_pretrained(folder)
    wanted = ours(
        ["a cat", "dogs"],
        sampler=sampler,
        num_steps=num_steps,
        guidance=Guidance(5.0, 0.6),
        progress=False,
    )
    noise = SampleNoise([0, 1]).randn((4, 8, 8))
    made = pipe(
        ["a cat", "dogs"],
        latents=noise,
        num_inference_steps=num_steps,
        guidance_scale=5.0,
        guidance_rescale=0.6,
        output_type="np",
    ).images
    for image, array in zip(wanted, made, strict=True):
        np.testing.assert_allclose(np.asarray(image) / 255, array, rtol=0, atol=0.5 / 255 + 1e-4)


def test_multiscale_is_told_the_guidance_scale(pipeline):
    folder, pipe = pipeline
    sampler = get_sampler("multiscale", guidance=5.0)
    pipe.scheduler = DiffusersScheduler.from_config(
        pipe.scheduler.config, sampler, spacing="guided"
    )
    guidance = Guidance(5.0, 0.6)
    [wanted] = TextToImage.from_pretrained(folder)(
        ["a cat"], num_steps=8, guidance=guidance, progress=False
    )
    [made] = pipe(
        ["a cat"],
        latents=SampleNoise([0]).randn((4, 8, 8)),
        num_inference_steps=8,
        guidance_scale=5.0,
        guidance_rescale=0.6,
        output_type="np",
    ).images
    np.testing.assert_allclose(np.asarray(wanted) / 255, made, rtol=0, atol=0.5 / 255 + 1e-4)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_pipeline_hands_on_its_generators(pipeline):
    _, pipe = pipeline
    pipe.scheduler = DiffusersScheduler.from_config(pipe.scheduler.config, "ddpm")
    options = {"num_inference_steps": 4, "output_type": "np"}
    both = pipe(["a", "b"], generator=[seeded(0), seeded(1)], **options).images
    alone = pipe(["b"], generator=[seeded(1)], **options).images
    np.testing.assert_allclose(both[1], alone[0], rtol=0, atol=1e-4)
    other = pipe(["b"], generator=[seeded(2)], **options).images
    assert np.abs(other - alone).max() > 0.01


def test_image_to_image_begins_inside_the_grid(pipeline):
    from diffusers import StableDiffusionImg2ImgPipeline

    _, pipe = pipeline
    scheduler = DiffusersScheduler.from_config(pipe.scheduler.config, TwoStep())
    parts = {k: v for k, v in pipe.components.items() if k != "scheduler"}
    changing = StableDiffusionImg2ImgPipeline(scheduler=scheduler, **parts)
    changing.set_progress_bar_config(disable=True)
    image = torch.zeros(1, 3, 16, 16)
    made = [
        changing("a", image, 0.5, 10, generator=seeded(0), output_type="np").images
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*made)
    assert np.isfinite(made[0]).all()
