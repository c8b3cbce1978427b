"""Samplers of higher order: published solvers, exactness at zero SNR, convergence."""

import math

import numpy as np
import pytest
import torch

from zsnr import (
    DDIM,
    DEIS,
    ERSDE,
    IPNDM,
    Denoiser,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp3M,
    EmpiricalDenoiser,
    GaussianDenoiser,
    Heun,
    Multiscale,
    NoiseSchedule,
    UniPC,
    get_timesteps,
    log_snr,
    trailing,
)
from zsnr.samplers.base import transition_coefficients
from zsnr.samplers.deis import deis_coefficients
from zsnr.samplers.dpmpp import dpmpp_2m_coefficients, dpmpp_3m_coefficients
from zsnr.samplers.er_sde import er_sde_coefficients
from zsnr.samplers.ipndm import ipndm_coefficients
from zsnr.samplers.multiscale import multiscale_coefficients
from zsnr.samplers.unipc import unic_coefficients, unip_coefficients

SCHEDULE, ORIGINAL = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=False)
SAMPLERS = [
    *(DPMpp2M(), DPMpp2MSDE(), DPMpp3M(), DPMpp3M(refined=True), Heun(), Multiscale()),
    *(IPNDM(2), IPNDM(3), IPNDM(4), DEIS(2), DEIS(3), UniPC(), UniPC(3)),
    *(ERSDE(1), ERSDE(2), ERSDE(3)),
]
SETTINGS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
SMALL = torch.tensor([0.1, 0.2, 0.35, 0.5, 0.7, 1.0], dtype=torch.float64)
LARGE = torch.tensor([2.0, 4.0, 8.0, 16.0, 32.0], dtype=torch.float64)


def zeros_like(x):
    return torch.zeros_like(x)


def drawn_from(generator):
    return lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)


def responses(sampler, grid, std, schedule=SCHEDULE, mean=-0.8):
    """The mean path, and the relative error of the standard deviation, for each std."""
    oracle = GaussianDenoiser(schedule, mean, std)
    ends = torch.stack([torch.zeros_like(std), torch.ones_like(std)])
    at_mean, moved = sampler.sample(oracle, schedule, ends, grid, randn_like=zeros_like)
    return at_mean, (moved - at_mean) / std - 1


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("spacing", ["trailing", "log_snr", "karras"])
def test_the_mean_path_is_exact_and_all_is_finite(sampler, spacing):
    std = torch.tensor([0.1, 0.5, 20.0], dtype=torch.float64)
    for S in (*range(1, 31), 48, 61, 103, 250, 500, 999, 1000):
        at_mean, error = responses(sampler, get_timesteps(spacing, S), std)
        torch.testing.assert_close(at_mean, torch.full_like(std, -0.8), rtol=0, atol=1e-10)
        assert error.isfinite().all()


@pytest.mark.parametrize("betas", ["scaled_linear", "cosine"])
def test_weights_keep_a_constant_for_every_step_count(betas):
    """The sum alpha_s - b alpha_t makes the mean path exact; here without sampling."""
    schedule = NoiseSchedule(betas)
    for S in (*range(1, 65), 100, 103, 250, 333, 500, 999, 1000):
        grid = log_snr(S, schedule=schedule).tolist()
        wanted = transition_coefficients(schedule, grid, 0.0)
        for steps in (
            dpmpp_2m_coefficients(schedule, grid),
            dpmpp_3m_coefficients(schedule, grid),
            dpmpp_3m_coefficients(schedule, grid, refined=True),
            multiscale_coefficients(schedule, tuple(grid)),
            ipndm_coefficients(schedule, grid),
            deis_coefficients(schedule, grid),
            unip_coefficients(schedule, grid, 3),
            unic_coefficients(schedule, grid, 3),
        ):
            for (a, b, _), step in zip(wanted, steps, strict=True):
                if step is None:  # nothing to correct
                    continue
                assert math.fsum(step.a) == pytest.approx(a, rel=1e-12)
                assert step.b == b
                assert all(math.isfinite(w) for w in (*step.a, *step.e))
                largest = max(map(abs, step.e), default=0.0)
                assert math.fsum(step.e) == pytest.approx(0, abs=1e-14 * max(1.0, largest))
        scales = [schedule(t) for t in (*grid, -1)]
        for step, (alpha_t, _), (alpha_s, sigma_s) in zip(
            er_sde_coefficients(schedule, grid), scales, scales[1:], strict=False
        ):
            assert math.fsum(step.a) + step.b * alpha_t == pytest.approx(alpha_s, rel=1e-12)
            assert 0 <= step.c <= sigma_s
            assert all(math.isfinite(w) for w in step.a)


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (DDIM(), 1),
        (DPMpp2M(), 2),
        (Heun(), 2),
        (Multiscale(), 2),
        (Multiscale(order=2), 2),
        (UniPC(), 3),  # a corrector gains one
    ],
    ids=repr,
)
def test_order_of_convergence(sampler, order):
    """The error before the last step, between two fixed noise levels, falls as S^-order."""
    schedule = NoiseSchedule("cosine", 50_000)
    half = schedule.log_snr / 2
    std = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
    oracle, errors, counts = GaussianDenoiser(schedule, 0.4, std), [], (80, 160, 320)
    for S in counts:
        levels = torch.linspace(-3, 2, S + 1, dtype=torch.float64)
        grid = [int((half - level).abs().argmin()) for level in levels]
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(grid[0]), schedule(grid[-1])
        states = []
        x_t = 0.4 * alpha_t + (alpha_t**2 * std**2 + sigma_t**2).sqrt()
        sampler.sample(
            oracle, schedule, x_t[None], grid, callback=lambda *step, to=states: to.append(step[3])
        )
        exact = 0.4 * alpha_s + (alpha_s**2 * std**2 + sigma_s**2).sqrt()
        errors.append(float((states[-2] - exact).abs().max()))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.2), errors


def test_the_first_order_member_is_ddim():
    x_T = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    oracle = GaussianDenoiser(SCHEDULE, -0.8, 0.5)
    for S in (1, 2, 3, 10, 50):
        for grid in (trailing(S), log_snr(S)):
            wanted = DDIM().sample(oracle, SCHEDULE, x_T, grid)
            assert torch.equal(Multiscale(order=1).sample(oracle, SCHEDULE, x_T, grid), wanted)
            if S <= 2:  # the steps from SNR 0 and to clean data are of first order
                for sampler in (DPMpp2M(), DPMpp3M(), Heun(), IPNDM(), DEIS(), UniPC(3)):
                    assert torch.equal(sampler.sample(oracle, SCHEDULE, x_T, grid), wanted)


def test_zero_snr_is_the_limit_of_little_snr():
    """Published solvers divide by alpha_T: with less and less of it they come to ours."""
    table = SCHEDULE.alphas_cumprod.tolist()
    x_T = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = log_snr(8)
    fast = (IPNDM(), DEIS(), ERSDE())  # as a power of alpha_T
    for sampler in (DPMpp2M(), DPMpp3M(), DPMpp3M(refined=True), UniPC(), UniPC(3), *fast):
        found = []
        for last in (1e-40, 1e-280):
            almost = NoiseSchedule.from_alphas_cumprod([*table[:-1], last])
            oracle = GaussianDenoiser(almost, -0.8, 0.5)
            noise = torch.Generator().manual_seed(1)
            found.append(sampler.sample(oracle, almost, x_T, grid, randn_like=drawn_from(noise)))
        exact = sampler.sample(
            GaussianDenoiser(SCHEDULE, -0.8, 0.5),
            SCHEDULE,
            x_T,
            grid,
            randn_like=drawn_from(torch.Generator().manual_seed(1)),
        )
        distances = [float((x - exact).abs().max()) for x in found]
        if isinstance(sampler, DPMpp2M | DPMpp3M):
            assert distances[1] < distances[0] / 5  # as 1 / log SNR
        assert distances[1] < (1e-12 if sampler in fast else 0.02), sampler


@pytest.mark.parametrize(
    ("S", "small", "large"),
    [(5, 0.16, 0.12), (8, 0.05, 0.07), (10, 0.03, 0.04), (25, 0.007, 0.005)],
)
@pytest.mark.parametrize("betas", ["scaled_linear", "linear", "cosine"])
def test_one_sampler_and_grid_is_right_at_every_scale(betas, S, small, large):
    schedule = NoiseSchedule(betas)
    grid = log_snr(S, schedule=schedule)
    for std, bound in ((SMALL, small), (LARGE, large)):
        _, error = responses(Multiscale(), grid, std, schedule)
        assert float(error.abs().max()) < bound
        _, first_order = responses(DDIM(), trailing(S), std, schedule)
        assert float(first_order.abs().max()) > 3 * bound


def test_every_step_count_is_right_at_every_scale():
    """The recommended sampler and grid: better than DDIM trailing for every S from 3 on."""
    std = torch.cat([SMALL, LARGE])
    for S in [*range(3, 40), 50, 61, 75, 100, 103, 200, 333, 500, 999, 1000]:
        _, error = responses(Multiscale(), log_snr(S), std)
        _, first_order = responses(DDIM(), trailing(S), std)
        assert error.abs().max() < first_order.abs().max()
        if S >= 12:
            assert float(error.abs().max()) < 0.02


@pytest.mark.parametrize("S", [10, 25, 50])
@pytest.mark.parametrize("std", [0.3, 1.0, 10.0])
def test_a_networks_errors_grow_no_more_than_in_dpmpp(S, std):
    """Independent errors of v at each call, as a root mean square over what they do to x_0."""
    grid, gains = log_snr(S).tolist(), {}
    oracle = GaussianDenoiser(SCHEDULE, 0.0, std)
    unguided = Multiscale(guidance=1.0)
    for sampler in (DPMpp2M(), unguided):
        wrong = iter(range(S))

        def denoiser(x_t, t, wrong=wrong):
            x_0 = oracle(x_t, t)
            x_0[next(wrong)] += SCHEDULE(int(t[0]))[1]  # row i errs in call i
            return x_0

        rows = torch.zeros(S, 1, dtype=torch.float64)
        x_0 = sampler.sample(denoiser, SCHEDULE, rows, grid)
        gains[sampler] = float(x_0.square().sum().sqrt())
    assert gains[unguided] < 1.1 * gains[DPMpp2M()]


def test_brightness_of_a_finite_data_set():
    """Two flat pictures, black and white, in equal parts: half of the samples are of each."""
    pictures = torch.stack([torch.full((3, 8, 8), -1.0), torch.full((3, 8, 8), 1.0)])
    oracle = EmpiricalDenoiser(SCHEDULE, pictures)
    x_T = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ends = Multiscale().sample(oracle, SCHEDULE, x_T, log_snr(10)).mean((1, 2, 3))
    torch.testing.assert_close(ends, x_T.mean((1, 2, 3)).sign(), rtol=0, atol=1e-4)


def test_history_belongs_to_one_call():
    x_T = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    oracle = GaussianDenoiser(SCHEDULE, -0.8, 0.5)
    for sampler in SAMPLERS:
        wanted = sampler.sample(oracle, SCHEDULE, x_T, trailing(7), randn_like=zeros_like)
        sampler.sample(oracle, SCHEDULE, 2 * x_T, trailing(9))
        again = sampler.sample(oracle, SCHEDULE, x_T, trailing(7), randn_like=zeros_like)
        assert torch.equal(again, wanted)


def test_network_calls():
    for S in (1, 2, 3, 10):
        for sampler in SAMPLERS:
            calls = []

            def denoiser(x, t, calls=calls):
                calls.append(int(t[0]))
                return x

            grid = log_snr(S).tolist()
            sampler.sample(denoiser, SCHEDULE, torch.zeros(1, 2), grid)
            if isinstance(sampler, Heun):
                assert len(calls) == max(S, 2 * S - 2)
                assert set(calls) == set(grid)
            else:
                assert calls == grid


@pytest.mark.parametrize(
    "options",
    [
        {"order": 4},
        {"order": True},
        {"order": 2.0},
        {"smallest": 0.0},
        {"smallest": 2.0, "largest": 1.0},
    ],
)
def test_wrong_options(options):
    with pytest.raises(ValueError, match="wanted"):
        Multiscale(**options)


def network(x_t, t, conditioning):
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=x_t.dtype) * 0.5
    return x_t @ weight + t.view(-1, 1) / 1000


def theirs_and_ours(theirs, sampler, S, noise=None):
    """Sample the original schedule by a scheduler of diffusers and by a sampler of ours."""
    theirs.set_timesteps(S)
    grid = theirs.timesteps.long().unique().flip(0).tolist()
    assert grid == trailing(S).tolist()
    x_T = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = iter(() if noise is None else noise)
    ours = sampler.sample(
        Denoiser(network, ORIGINAL), ORIGINAL, x_T, grid, randn_like=lambda x: next(draws)
    )
    x = x_T / ORIGINAL(grid[0])[0] if isinstance(sampler, Heun) else x_T
    for i, t in enumerate(theirs.timesteps):
        v = network(theirs.scale_model_input(x, t), t.expand(4), None)
        options = {} if noise is None else {"variance_noise": noise[i]}
        x = theirs.step(v, t, x, **options).prev_sample
    return x, ours


@pytest.mark.peer
@pytest.mark.parametrize("S", [2, 5, 10, 25])
@pytest.mark.parametrize(
    ("sampler", "algorithm"), [(DPMpp2M(), "dpmsolver++"), (DPMpp2MSDE(), "sde-dpmsolver++")]
)
def test_dpmpp_is_diffusers_on_the_original_schedule(sampler, algorithm, S):
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(algorithm_type=algorithm, euler_at_final=True, **SETTINGS)
    noise = None
    if isinstance(sampler, DPMpp2MSDE):
        noise = torch.randn(S, 4, 3, generator=torch.Generator().manual_seed(2)).double()
    x, ours = theirs_and_ours(theirs, sampler, S, noise)
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-5)


@pytest.mark.peer
@pytest.mark.parametrize("S", [2, 5, 10, 25])
def test_unipc_is_diffusers_on_the_original_schedule(S):
    from diffusers import UniPCMultistepScheduler

    theirs = UniPCMultistepScheduler(final_sigmas_type="zero", **SETTINGS)
    if (
        S >= 15
    ):  # diffusers takes its last step to sigma = 0 in second order there, and divides by 0
        theirs.config.lower_order_final = True
    x, ours = theirs_and_ours(theirs, UniPC(), S)
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-5)


@pytest.mark.peer
@pytest.mark.parametrize("S", [2, 5, 10, 25])
def test_heun_is_diffusers_on_the_original_schedule(S):
    from diffusers import HeunDiscreteScheduler

    x, ours = theirs_and_ours(HeunDiscreteScheduler(**SETTINGS), Heun(), S)
    torch.testing.assert_close(ours, x, rtol=0, atol=5e-5)
