"""Rectified flow and shifted schedules: the curve, the predictions, the samplers, the oracles."""

import math

import pytest
import torch
from scipy import stats

from zsnr import (
    DDIM,
    Denoiser,
    EmpiricalDenoiser,
    GaussianDenoiser,
    Guidance,
    LossWeighting,
    NoiseSchedule,
    Objective,
    RectifiedFlow,
    available_samplers,
    get_sampler,
    get_timesteps,
    resolution_shift,
    trailing,
    training_draws,
)
from zsnr.metrics import kept_fraction
from zsnr.oracle import timesteps_at
from zsnr.prediction import converted
from zsnr.schedule import schedule_from_settings
from zsnr.timestep_law import TimestepLaw

FLOWS = [RectifiedFlow(), RectifiedFlow(shift=3.0), RectifiedFlow(shift=0.5, num_timesteps=50)]
DETERMINISTIC = [
    name
    for name in available_samplers()
    if all(
        c.step is None or c.step.c == 0 for c in get_sampler(name).plan(FLOWS[0], [999, 500]).calls
    )
]


def vp_twin(schedule):
    """The variance-preserving schedule with the same SNR at every timestep."""
    return NoiseSchedule.from_alphas_cumprod(schedule.snr / (1 + schedule.snr))


@pytest.mark.parametrize("flow", FLOWS)
def test_the_curve(flow):
    T = flow.num_timesteps
    t = torch.arange(-1, T)
    tau = (t.double() + 1) / T
    u = flow.shift * tau / (1 + (flow.shift - 1) * tau)
    alpha, sigma = flow(t)
    torch.testing.assert_close(sigma, u, rtol=1e-14, atol=0)
    torch.testing.assert_close(alpha, 1 - u, rtol=1e-12, atol=0)
    assert (float(alpha[-1]), float(sigma[-1])) == (0.0, 1.0) == flow(T - 1)
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0) == flow(-1)
    torch.testing.assert_close(flow.snr, (alpha / sigma)[1:] ** 2)
    assert flow.log_snr[-1] == -math.inf
    torch.testing.assert_close(flow.time(t), (1000 * u).float())
    assert timesteps_at(flow, flow.time(t[1:])).equal(t[1:])
    assert schedule_from_settings(flow.settings()) == flow


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 0}, "shift=0: wanted a positive number"),
        ({"shift": "3"}, "shift='3': wanted a positive number"),
        ({"shift": math.inf}, "wanted a positive number"),
        ({"shift": 1e300}, "moderate size"),
        ({"shift": 1e-20}, "moderate size"),
        ({"shift": 10**400}, "wanted a positive number"),
        ({"snr_shift": 10**400}, "wanted a positive number"),
        ({"shift": 1.0, "num_timesteps": 1}, "num_timesteps=1"),
        ({"shift": 1.0, "betas": "linear"}, "no 'betas'. Known: shift, num_timesteps"),
        ({"snr_shift": -1.0}, "snr_shift=-1.0: wanted a positive number"),
        ({"snr_shift": True}, "snr_shift=True: wanted a positive number"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_settings(settings)


def test_a_shifted_schedule_is_that_of_cogvideox():
    from diffusers import CogVideoXDDIMScheduler

    for shift, zero in ((3.0, True), (1.0, True), (3.0, False)):
        theirs = CogVideoXDDIMScheduler(snr_shift_scale=shift, rescale_betas_zero_snr=zero)
        ours = NoiseSchedule(snr_shift=shift, zero_terminal_snr=zero)
        torch.testing.assert_close(
            ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=0, atol=1e-7
        )
    plain = NoiseSchedule(zero_terminal_snr=False)
    shifted = NoiseSchedule(zero_terminal_snr=False, snr_shift=5.0)
    torch.testing.assert_close(shifted.snr * 5, plain.snr, rtol=1e-12, atol=0)
    assert NoiseSchedule(snr_shift=1.0) == NoiseSchedule()


def test_the_shift_of_a_size_keeps_the_brightness_that_a_schedule_leaves():
    assert resolution_shift(1024, 256) == 16
    assert resolution_shift((512, 1024), (256, 256)) == 8
    kept = [
        kept_fraction(
            NoiseSchedule(zero_terminal_snr=False, snr_shift=resolution_shift(size, 256)),
            mode=0.5 * size / 8,
        )
        for size in (256, 384, 512, 768, 1024)
    ]
    assert max(kept) / min(kept) < 1.01
    assert kept[0] < 0.8
    with pytest.raises(ValueError, match="size=0: wanted a positive number"):
        resolution_shift(0, 256)


def test_kept_fraction_is_a_matter_of_the_snr_alone():
    for flow in FLOWS:
        assert kept_fraction(flow, 50.0) == 1


# The same SNR is the same path, whatever the scales are.


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "log_snr", "guided", "karras"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_same_snr_grid_gives_the_same_path(name, spacing, shift):
    flow = RectifiedFlow(shift)
    twin = vp_twin(flow)
    x_T = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for S in (1, 2, 7, 30):
        grid = get_timesteps(spacing, S, schedule=flow)
        assert grid.equal(get_timesteps(spacing, S, schedule=twin))
        paths = []
        for schedule in (flow, twin):
            states = []
            get_sampler(name).sample(
                GaussianDenoiser(schedule, -0.8, 0.5),
                schedule,
                x_T,
                grid,
                callback=lambda i, t, x_0, x_s, states=states: states.append(x_0),
            )
            paths.append(torch.stack(states))
        # the twin's sigma_t = sqrt(1 - abar_t) is rounded where abar_t is near 1
        atol = 1e-11 if 0 in grid else 1e-12
        torch.testing.assert_close(*paths, rtol=0, atol=atol)


@pytest.mark.parametrize("name", available_samplers())
@pytest.mark.parametrize("flow", [RectifiedFlow(), RectifiedFlow(3.0), NoiseSchedule(snr_shift=4)])
def test_the_mean_is_exact_for_every_number_of_steps(name, flow):
    mean = -0.8
    denoiser = GaussianDenoiser(flow, mean, 0.5)
    x_T = torch.zeros(1, 1, dtype=torch.float64)
    for S in (*range(1, 21), 50, 333):
        x_0 = get_sampler(name).sample(
            denoiser, flow, x_T, trailing(S), randn_like=torch.zeros_like
        )
        assert float(x_0) == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize("name", available_samplers())
def test_the_spread_converges(name):
    flow, s = RectifiedFlow(), 0.5
    x_T = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.Generator().manual_seed(2)

    def randn_like(x):
        return torch.randn(x.shape, generator=noise, dtype=x.dtype)

    x_0 = get_sampler(name).sample(
        GaussianDenoiser(flow, 0.3, s), flow, x_T, trailing(200), randn_like=randn_like
    )
    assert float(x_0.std()) == pytest.approx(s, rel=0.04)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow"])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule(),
        NoiseSchedule(zero_terminal_snr=False),
        NoiseSchedule(snr_shift=3.0),
        RectifiedFlow(shift=2.0),
    ],
)
@pytest.mark.parametrize("name", available_samplers())
def test_every_prediction_on_every_schedule(name, schedule, prediction_type):
    """The path depends on what the network knows, not on the form in which it says it."""
    oracle = GaussianDenoiser(schedule, -0.8, 0.5)

    def network(x_t, time, conditioning):
        t = timesteps_at(schedule, time)
        return converted(oracle(x_t, t), x_t, *schedule(t), "sample", prediction_type)

    if prediction_type == "epsilon" and float(schedule.snr[-1]) == 0:
        with pytest.raises(ValueError, match="no x_0 at t=999"):
            Denoiser(network, schedule, prediction_type)
        return
    x_T = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for spacing in ("trailing", "log_snr"):
        grid = get_timesteps(spacing, 8, schedule=schedule)
        x_0, wanted = (
            get_sampler(name).sample(d, schedule, x_T, grid, randn_like=torch.zeros_like)
            for d in (Denoiser(network, schedule, prediction_type), _unguided(oracle))
        )
        torch.testing.assert_close(x_0, wanted, rtol=0, atol=1e-7)


def _unguided(denoiser):
    denoiser.guidance = None
    return denoiser


def test_diffusers_euler_with_the_sigmas_of_its_pipelines_is_ddim_on_trailing():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift in (1.0, 3.0):
        flow, generator = RectifiedFlow(shift), torch.Generator().manual_seed(3)
        denoiser = GaussianDenoiser(flow, -0.8, 0.5)
        x_T = torch.randn(2, 3, 4, generator=generator)
        for S in (1, 2, 4, 5, 10, 25, 50):
            scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
            sigmas = torch.linspace(1, 1 / S, S).tolist()
            scheduler.set_timesteps(sigmas=sigmas)
            torch.testing.assert_close(scheduler.timesteps, flow.time(trailing(S)))
            x = x_T
            for time in scheduler.timesteps:
                t = timesteps_at(flow, time.view(1))
                output = converted(denoiser(x, t), x, *flow(t), "sample", "flow")
                x = scheduler.step(output, time, x).prev_sample
            ours = DDIM().sample(denoiser, flow, x_T, trailing(S))
            torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


def test_diffusers_cogvideox_is_ddim_on_its_schedule():
    from diffusers import CogVideoXDDIMScheduler

    schedule = NoiseSchedule(snr_shift=3.0)
    denoiser = GaussianDenoiser(schedule, -0.8, 0.5)
    x_T = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    for S in (1, 2, 5, 10, 50):
        scheduler = CogVideoXDDIMScheduler(
            snr_shift_scale=3.0,
            rescale_betas_zero_snr=True,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            set_alpha_to_one=True,
            clip_sample=False,
        )
        scheduler.set_timesteps(S)
        assert scheduler.timesteps.equal(trailing(S))
        x = x_T
        for t in scheduler.timesteps:
            output = converted(
                denoiser(x, t.view(1)), x, *schedule(t.view(1)), "sample", "v_prediction"
            )
            x = scheduler.step(output, t, x).prev_sample
        ours = DDIM().sample(denoiser, schedule, x_T, trailing(S))
        torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


def test_guidance_on_a_finite_dataset():
    images = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-0.9, 1.0]])
    for schedule in (RectifiedFlow(), vp_twin(RectifiedFlow())):
        oracle = EmpiricalDenoiser(schedule, images, classes=torch.tensor([0, 1, 1]))
        x_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        denoiser = oracle.guided(torch.tensor([0, 1, 0, 1]), Guidance(2.0, rescale=0.0))
        x_0 = DDIM().sample(denoiser, schedule, x_T, trailing(20))
        assert x_0[0].tolist() == pytest.approx([-1, -1], abs=0.02)
        assert x_0[2].tolist() == pytest.approx([-1, -1], abs=0.02)
        assert float(x_0[1, 1]) == pytest.approx(1, abs=0.05)


# Training


@pytest.mark.parametrize("flow", [RectifiedFlow(), RectifiedFlow(3.0)])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow"])
def test_the_objective_on_rectified_flow(flow, prediction_type):
    objective = Objective(flow, prediction_type, LossWeighting("truncated_snr"))
    x_0 = torch.randn(6, 1, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    draws = objective.draws(0, range(6), 6, (1, 4))
    oracle, told = GaussianDenoiser(flow, 0.1, 0.7), []

    def network(x_t, time, conditioning):
        told.append(time)
        t = timesteps_at(flow, time)
        return converted(oracle(x_t, t), x_t, *flow(t), "sample", prediction_type)

    losses = objective(network, x_0, None, draws)
    assert told[0].equal(flow.time(draws.t))
    x_t = flow.add_noise(x_0, draws.eps, draws.t)
    wrong = (oracle(x_t, draws.t) - x_0).square().flatten(1).mean(1)
    weights = flow.snr.clamp(min=1)[draws.t]
    torch.testing.assert_close(losses, weights * wrong, rtol=1e-6, atol=1e-9)


LAWS = [
    TimestepLaw("logit_normal", mean=0.5, std=0.8, allow_rare_terminal=True),
    TimestepLaw("logit_normal", allow_rare_terminal=True),
    TimestepLaw("beta", a=2.0, b=0.6),
    TimestepLaw("beta", a=0.6, b=3.5, allow_rare_terminal=True),
    TimestepLaw("shift", shift=3.0),
]


@pytest.mark.parametrize("law", LAWS)
def test_a_law_is_its_distribution(law):
    oracle = {
        "logit_normal": lambda x: stats.norm.cdf(math.log(x / (1 - x)), law.mean, law.std),
        "beta": lambda x: stats.beta.cdf(x, law.a, law.b),
        "shift": lambda x: x / (law.shift - (law.shift - 1) * x),
    }[law.name]
    for x in (0.01, 0.2, 0.5, 0.77, 0.999):
        assert law.cdf(x) == pytest.approx(float(oracle(x)), rel=1e-9)
    B, T = 400, 100
    t = torch.cat(
        [training_draws(0, range(k * B, k * B + B), B, (1,), T, timestep_law=law).t for k in (0, 1)]
    )
    counts = torch.bincount(t, minlength=T).double() / len(t)
    wanted = torch.tensor([law.cdf((i + 1) / T) - law.cdf(i / T) for i in range(T)])
    assert (counts.cumsum(0) - wanted.cumsum(0)).abs().max() < 1 / B  # stratified, not random
    for r in (0.0, 0.3, 0.999999):
        t_r = law.timestep(r, T)
        assert law.cdf(t_r / T) <= r < law.cdf((t_r + 1) / T) + 1e-12


@pytest.mark.parametrize("law", LAWS)
def test_a_law_does_not_depend_on_the_division_of_a_batch(law):
    whole = training_draws(3, range(16, 32), 16, (2,), 1000, timestep_law=law).t
    halves = [
        training_draws(3, rows, 16, (2,), 1000, timestep_law=law).t
        for rows in (range(16, 32, 2), range(17, 32, 2))
    ]
    assert whole[::2].equal(halves[0])
    assert whole[1::2].equal(halves[1])


def test_a_law_that_starves_the_last_timestep_is_refused():
    starved = TimestepLaw("logit_normal")
    with pytest.raises(ValueError, match=r"last timestep, t=999, 2.*times.*allow_rare_terminal"):
        Objective(RectifiedFlow(), "flow", timestep_law=starved)
    Objective(timestep_law=TimestepLaw("logit_normal", allow_rare_terminal=True))
    assert TimestepLaw().terminal_share(1000) == pytest.approx(1)
    assert TimestepLaw("shift", shift=3.0).terminal_share(1000) == pytest.approx(3, rel=0.01)
    with pytest.raises(ValueError, match="last timestep"):
        TimestepLaw("shift", shift=0.05).check(1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosmap"}, "'cosmap' is unknown. Known: 'uniform'"),
        ({"name": "beta", "a": 0.0}, "a=0.0: wanted a positive number"),
        ({"name": "beta", "b": 50.0}, "b=50.0: wanted a number from 0.05 to 20"),
        ({"name": "shift", "mean": 1.0}, "mean=1.0 with the timestep law 'shift'"),
        ({"shift": 3.0}, "shift=3.0 with the timestep law 'uniform'"),
        ({"name": "logit_normal", "mean": math.nan}, "mean=nan: wanted a finite number"),
    ],
)
def test_wrong_laws_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TimestepLaw(**settings)
