"""This package's samplers as schedulers of diffusers."""

import inspect
import json
import pickle
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
    RectifiedFlow,
    SampleNoise,
    Sampler,
    available_samplers,
    get_sampler,
    get_timesteps,
    reverse_transition,
    to_v,
)
from zsnr.interop import DiffusersScheduler, schedule_from_diffusers
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


CONFIGURED = [
    DiffusersScheduler(),
    DiffusersScheduler("unipc", spacing="log_snr"),
    DiffusersScheduler(get_sampler("multiscale", guidance=7.5), spacing="guided"),
    DiffusersScheduler(get_sampler("ddim", eta=0.5), NoiseSchedule("cosine")),
    DiffusersScheduler("heun", NoiseSchedule("linear", zero_terminal_snr=False), "epsilon"),
    DiffusersScheduler(
        "dpmpp_2m", NoiseSchedule.from_alphas_cumprod([0.9, 0.6, 0.3, 0.0]), "sample", "linspace"
    ),
    DiffusersScheduler("euler", NoiseSchedule(snr_shift=3.0)),
    DiffusersScheduler("dpmpp_2m", RectifiedFlow(3.0)),
]


def settings_of(scheduler):
    return (
        *(scheduler.sampler, scheduler.schedule, scheduler.prediction_type, scheduler.spacing),
        scheduler.schedule.settings(),
    )


@pytest.mark.parametrize("scheduler", CONFIGURED, ids=lambda s: s.config.sampler)
def test_a_config_is_saved_and_loaded(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    loaded = DiffusersScheduler.from_pretrained(tmp_path)
    assert type(loaded) is DiffusersScheduler
    assert settings_of(loaded) == settings_of(scheduler)
    config = dict(scheduler.config)
    assert config.pop("_use_default_values") == []
    assert config == dict(loaded.config)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "DiffusersScheduler"
    assert settings_of(DiffusersScheduler.from_config(saved)) == settings_of(scheduler)
    x, output = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    ends = []
    for each in (scheduler, loaded, pickle.loads(pickle.dumps(scheduler))):
        each.set_timesteps(3)
        x_s = each.step(output, each.timesteps[0], x, generator=seeded(0)).prev_sample
        again = pickle.loads(pickle.dumps(each))  # also between two steps
        ends.append(again.step(output, each.timesteps[1], x_s, generator=seeded(1)).prev_sample)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("scheduler", CONFIGURED[:7], ids=lambda s: s.config.sampler)
def test_it_is_switched_for_another_class_and_back(scheduler):
    from diffusers import DDIMScheduler, SchedulerMixin, UniPCMultistepScheduler
    from diffusers.configuration_utils import ConfigMixin

    assert isinstance(scheduler, SchedulerMixin)
    assert isinstance(scheduler, ConfigMixin)
    assert DDIMScheduler in scheduler.compatibles
    for other in (DDIMScheduler, UniPCMultistepScheduler):
        theirs = other.from_config(scheduler.config)
        assert theirs.config.prediction_type == scheduler.prediction_type
        if other is DDIMScheduler:
            wanted = scheduler.schedule.alphas_cumprod.float()
            torch.testing.assert_close(theirs.alphas_cumprod, wanted, rtol=0, atol=5e-6)
        back = DiffusersScheduler.from_config(theirs.config)
        assert settings_of(back) == settings_of(scheduler)
        named = DiffusersScheduler.from_config(theirs.config, "euler", spacing="leading")
        assert (named.sampler, named.spacing) == (get_sampler("euler"), "leading")
    plain = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="sample")
    changed = DiffusersScheduler.from_config(
        plain.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    assert changed.prediction_type == "v_prediction"
    assert changed.schedule.zero_terminal_snr
    assert changed.config.clip_sample is plain.config.clip_sample is True  # for the way back
    with pytest.raises(TypeError, match="no option 'samplr'"):
        DiffusersScheduler.from_config(plain.config, samplr="ddim")
    _, unused = DiffusersScheduler.from_config(
        {**plain.config, "own": 1}, return_unused_kwargs=True
    )
    assert unused["own"] == 1


def test_a_changed_config_is_not_overruled_by_the_exact_schedule():
    config = {**DiffusersScheduler().config, "beta_end": 0.02}
    assert DiffusersScheduler.from_config(config).schedule == NoiseSchedule(
        beta_start=0.00085, beta_end=0.02
    )


def test_settings_of_diffusers_instead_of_a_schedule(tmp_path):
    linear = DiffusersScheduler(
        num_train_timesteps=500, beta_schedule="linear", beta_start=0.001, beta_end=0.03
    )
    assert linear.schedule == NoiseSchedule("linear", 500, 0.001, 0.03)
    custom = DiffusersScheduler("unipc", trained_betas=np.array([0.1, 0.3]))
    assert custom.betas.tolist() == pytest.approx([0.1, 0.3])
    assert len(custom) == 2
    custom.save_pretrained(tmp_path)
    assert torch.equal(DiffusersScheduler.from_pretrained(tmp_path).betas, custom.betas)
    with pytest.raises(ValueError, match="schedule and beta_end are given: wanted one of the two"):
        DiffusersScheduler(schedule=NoiseSchedule(), beta_end=0.02)
    assert "kwargs" not in inspect.signature(DiffusersScheduler.__init__).parameters


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 4, 4), (2, 3, 2, 4, 4)])
@pytest.mark.parametrize("schedule", [NoiseSchedule(), RectifiedFlow(3.0)], ids=["vp", "flow"])
def test_states_of_any_rank(schedule, shape):
    scheduler = DiffusersScheduler("unipc", schedule)
    x, noise = torch.randn(shape), torch.randn(shape)
    ends = []
    for _ in range(2):  # the same each time
        scheduler.set_timesteps(4)
        assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is x
        sample = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            step = scheduler.step(noise, t, sample)
            assert step.prev_sample.shape == step.pred_original_sample.shape == shape
            assert torch.equal(step[0], step.prev_sample)
            sample = step.prev_sample
        ends.append(sample)
    assert torch.equal(*ends)
    noised = scheduler.add_noise(x, noise, scheduler.timesteps[1:2])
    t = get_timesteps("trailing", 4)[1:2].expand(2)
    torch.testing.assert_close(noised, schedule.add_noise(x, noise, t))
    assert torch.equal(scheduler.scale_noise(x, scheduler.timesteps[1:2], noise), noised)
    assert (
        scheduler.add_noise(x.half(), noise.half(), scheduler.timesteps[:2]).dtype == x.half().dtype
    )


def test_attributes_are_those_of_any_scheduler():
    scheduler = DiffusersScheduler()
    scheduler.own = 5
    scheduler.register_to_config(noted=6)
    assert (scheduler.own, scheduler.config.noted) == (5, 6)
    with pytest.warns(FutureWarning, match="noted"):
        assert scheduler.noted == 6
    with pytest.raises(AttributeError, match="'DiffusersScheduler' object has no attribute 'none'"):
        _ = scheduler.none
    assert scheduler.step_index is scheduler.begin_index is None
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    assert scheduler.begin_index == 4
    x = torch.zeros(1, 2)
    scheduler.step(x, scheduler.timesteps[4], x)
    assert scheduler.step_index == 5


def test_eta_is_that_of_the_sampler_unless_it_is_given():
    x, output = torch.randn(2, 4), torch.randn(2, 4)

    def run(sampler, eta):
        scheduler, sample = DiffusersScheduler(sampler), x
        scheduler.set_timesteps(5)
        generator = seeded(0)
        for t in scheduler.timesteps:
            sample = scheduler.step(output, t, sample, generator=generator, eta=eta).prev_sample
        return sample

    assert torch.equal(run("ddim", 0.5), run(get_sampler("ddim", eta=0.5), 0.0))
    assert torch.equal(run("ddim", 1.0), run("ddpm", 0.0))
    assert torch.equal(run("euler_ancestral", 0.0), run("ddpm", 0.0))
    assert not torch.equal(run("ddim", 0.0), run("ddim", 0.5))
    with pytest.raises(ValueError, match=r"eta=0\.5: the sampler 'unipc' has no such option"):
        run("unipc", 0.5)


@pytest.mark.parametrize("name", ["unipc", "dpmpp_2m", "heun", "multiscale", "ipndm"])
def test_a_sampler_goes_on_from_a_changed_state(name):
    """As with inpainting pipelines, which replace a part of the state after every call."""
    schedule = NoiseSchedule()
    _, network = gaussian(schedule)
    sampler, scheduler = get_sampler(name), DiffusersScheduler(name)
    scheduler.set_timesteps(6)
    sample = x = torch.randn(2, 4, dtype=torch.float64, generator=seeded(0))
    plan = sampler.plan(schedule, get_timesteps("trailing", 6), Guidance(3.0))
    state = sampler.begin(plan, x)
    for i, t in enumerate(scheduler.timesteps):
        output = network(sample, t)
        sample = scheduler.step(output, t, sample).prev_sample
        alpha, sigma = schedule(int(t))
        state = sampler.advance(plan, state, alpha * state.x_t - sigma * output)
        torch.testing.assert_close(sample, state.x_t, rtol=0, atol=1e-9)
        if i < len(scheduler.timesteps) - 1:
            sample = sample + 0.1
            state = sampler.change(plan, state, sample)


def test_sigmas_of_flow_pipelines():
    scheduler = DiffusersScheduler("euler", RectifiedFlow(3.0))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), device="cpu")
    told = scheduler.timesteps
    assert told.dtype == torch.float32
    scheduler.set_timesteps(8)
    assert torch.equal(told, scheduler.timesteps)
    scheduler.set_timesteps(timesteps=told.tolist())
    assert torch.equal(told, scheduler.timesteps)
    assert scheduler.sigmas.tolist() == pytest.approx([*(told / 1000).tolist(), 0.0])
    with pytest.raises(ValueError, match="Give either"):
        scheduler.set_timesteps(5, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="sigmas are for rectified flow"):
        DiffusersScheduler().set_timesteps(sigmas=[1.0, 0.5])
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=1.2)
    dynamic = DiffusersScheduler.from_config(theirs.config, "euler")
    assert dynamic.config.max_shift == 1.2
    with pytest.raises(ValueError, match="use_dynamic_shifting: wanted mu"):
        dynamic.set_timesteps(4)
    for each in (theirs, dynamic):
        each.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.7)
    torch.testing.assert_close(dynamic.timesteps, theirs.timesteps)
    with pytest.raises(ValueError, match="use_karras_sigmas=True of a flow scheduler"):
        DiffusersScheduler.from_config({**theirs.config, "use_karras_sigmas": True})


def test_flow_matching_is_that_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = DiffusersScheduler.from_config(theirs.config, "euler")
    assert ours.prediction_type == "flow"
    sigmas, ends = np.linspace(1.0, 1 / 10, 10), []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=sigmas)
        x = torch.randn(2, 3, 4, 4, generator=seeded(0))
        for t in scheduler.timesteps:
            x = scheduler.step((x + t / 1000).sin(), t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)
    back = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    assert back.config.shift == 3.0


def test_cogvideox_is_that_of_diffusers():
    from diffusers import CogVideoXDDIMScheduler

    theirs = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=3.0,
    )
    ours = DiffusersScheduler.from_config(theirs.config)
    assert ours.schedule.snr_shift == 3.0
    ends = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        x = torch.randn(1, 2, 3, 4, 4, generator=seeded(0))
        for t in scheduler.timesteps:
            x = scheduler.step((x + t / 1000).sin(), t, x, return_dict=False)[0]
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)
    back = CogVideoXDDIMScheduler.from_config(ours.config)
    torch.testing.assert_close(
        back.alphas_cumprod.double(), theirs.alphas_cumprod.double(), rtol=0, atol=2e-6
    )


def test_a_pipeline_is_saved_and_loaded(pipeline, tmp_path):
    from diffusers import StableDiffusionPipeline

    _, pipe = pipeline
    pipe.scheduler = DiffusersScheduler.from_config(
        pipe.scheduler.config, "unipc", spacing="log_snr"
    )
    pipe.save_pretrained(tmp_path / "sd")
    index = json.loads((tmp_path / "sd/model_index.json").read_text())
    assert index["scheduler"] == ["zsnr.interop", "DiffusersScheduler"]
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "sd", safety_checker=None)
    assert settings_of(loaded.scheduler) == settings_of(pipe.scheduler)
    loaded.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "np"}
    made = [each("a cat", generator=seeded(0), **options).images for each in (pipe, loaded)]
    np.testing.assert_array_equal(*made)
    read = TextToImage.from_pretrained(tmp_path / "sd").model
    assert (read.schedule, read.prediction_type) == settings_of(loaded.scheduler)[1:3]
    for scheduler in CONFIGURED:
        t = torch.arange(len(scheduler))
        found = schedule_from_diffusers({**scheduler.config, "_class_name": "DiffusersScheduler"})
        torch.testing.assert_close(found(t), scheduler.schedule(t), rtol=0, atol=2e-6)
    changed = StableDiffusionPipeline(**{**pipe.components, "scheduler": loaded.scheduler})
    assert changed.scheduler is loaded.scheduler


def test_diffusers_finds_the_class_where_a_saved_pipeline_says():
    import diffusers

    import zsnr.interop

    assert DiffusersScheduler.__module__ == "zsnr.interop"
    assert zsnr.interop.SchedulerMixin is diffusers.SchedulerMixin
    with pytest.raises(AttributeError, match="no attribute 'ModelMixin'"):
        _ = zsnr.interop.ModelMixin


def test_inpainting_keeps_its_history(pipeline):
    from diffusers import StableDiffusionInpaintPipeline

    _, pipe = pipeline
    for name in ("unipc", "heun", "ddim"):
        scheduler = DiffusersScheduler.from_config(pipe.scheduler.config, name)
        parts = {k: v for k, v in pipe.components.items() if k != "scheduler"}
        painting = StableDiffusionInpaintPipeline(scheduler=scheduler, **parts)
        painting.set_progress_bar_config(disable=True)
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., :8] = 1
        options = {"image": torch.zeros(1, 3, 16, 16), "mask_image": mask, "strength": 0.8}
        made = [
            painting(
                "a", num_inference_steps=6, generator=seeded(0), output_type="np", **options
            ).images
            for _ in range(2)
        ]
        np.testing.assert_array_equal(*made)
        assert np.isfinite(made[0]).all()


TEXT_PARTS = [f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]


def tiny_flow_pipeline(scheduler):
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        *(8, 2, 4),
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, latent_channels=4, shift_factor=0.1
    )
    return StableDiffusion3Pipeline(transformer, scheduler, vae, **dict.fromkeys(TEXT_PARTS))


def test_a_flow_pipeline_gives_the_images_of_its_own_scheduler(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = tiny_flow_pipeline(theirs)
    pipe.set_progress_bar_config(disable=True)

    def images(pipe, **options):
        return pipe(
            prompt_embeds=torch.ones(1, 3, 8),
            pooled_prompt_embeds=torch.ones(1, 8),
            guidance_scale=1.0,
            height=8,
            width=8,
            generator=seeded(0),
            output_type="np",
            **options,
        ).images

    sigmas = np.linspace(1.0, 1 / 5, 5).tolist()
    wanted = images(pipe, sigmas=sigmas)
    pipe.scheduler = DiffusersScheduler.from_config(theirs.config, "euler")
    np.testing.assert_allclose(images(pipe, sigmas=sigmas), wanted, rtol=0, atol=0.5 / 255)
    np.testing.assert_allclose(images(pipe, num_inference_steps=5), wanted, rtol=0, atol=0.5 / 255)
    pipe.save_pretrained(tmp_path)
    missing = dict.fromkeys([*TEXT_PARTS, "feature_extractor", "image_encoder"])
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, **missing)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler.schedule == RectifiedFlow(3.0)
    np.testing.assert_array_equal(images(loaded, sigmas=sigmas), images(pipe, sigmas=sigmas))


def test_a_video_pipeline_gives_the_latents_of_its_own_scheduler():
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=8,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=5,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=3,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    theirs = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=3.0,
    )
    made = []
    for scheduler in (theirs, DiffusersScheduler.from_config(theirs.config)):
        pipe = CogVideoXPipeline(None, None, vae, transformer, scheduler)
        pipe.set_progress_bar_config(disable=True)
        made.append(
            pipe(
                prompt_embeds=torch.ones(1, 3, 8),
                negative_prompt_embeds=torch.zeros(1, 3, 8),
                num_inference_steps=5,
                height=16,
                width=16,
                num_frames=5,
                generator=seeded(0),
                output_type="latent",
            ).frames
        )
    torch.testing.assert_close(*made, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_solver_of_flow_in_memory_is_flow(name):
    import diffusers

    theirs = getattr(diffusers, name)(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    )
    ours = DiffusersScheduler.from_config(theirs.config)
    assert ours.schedule == RectifiedFlow(3.0)
    assert ours.config.prediction_type == "flow"


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "IPNDMScheduler", "DDPMWuerstchenScheduler"])
def test_a_config_without_betas_is_refused(name):
    import diffusers

    with pytest.raises(ValueError, match="Give the schedule and the prediction type yourself"):
        DiffusersScheduler.from_config(getattr(diffusers, name)().config)
    continuous = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous",
        prediction_type="v_prediction",
        sigma_max=700.0,
        use_karras_sigmas=True,
    )
    with pytest.raises(ValueError, match=r"timestep_type='continuous'.*schedule="):
        DiffusersScheduler.from_config(continuous.config)


def test_flow_of_other_lengths_tells_networks_the_same_times():
    import diffusers

    ours = DiffusersScheduler("ddim", RectifiedFlow(3.0, 500))
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    ours.set_timesteps(4)
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(ours.timesteps.float(), theirs.timesteps.float())
