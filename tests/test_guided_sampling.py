"""Few steps under guidance: weights, limits, the recommended sampling, and the loop in pieces."""

import itertools
import math

import numpy as np
import pytest
import torch

from zsnr import (
    DDIM,
    Denoiser,
    EmpiricalDenoiser,
    GaussianDenoiser,
    Guidance,
    Multiscale,
    NoiseSchedule,
    SampleNoise,
    Sampler,
    available_samplers,
    get_sampler,
    get_timesteps,
    guided,
    recommend_sampling,
    register_sampler,
    register_spacing,
    to_v,
    trailing,
)
from zsnr.guidance_methods import inner
from zsnr.samplers.base import MultistepCoefficients, agreement, multistep, transition_coefficients
from zsnr.samplers.multiscale import _exact_path, multiscale_coefficients
from zsnr.samplers.recommend import resolve_sampling

SCHEDULE, ORIGINAL = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=False)
DEFAULT = Guidance()


class GuidedGaussian:
    """Guidance between x_0 ~ N(m, s_c^2) and N(m, s_u^2), one number each; linear in x_t."""

    def __init__(self, schedule, s_c, s_u, w, mean=0.0):
        self.schedule, self.guidance = schedule, Guidance(w, 0.0)
        self.parts = (GaussianDenoiser(schedule, mean, s_c), GaussianDenoiser(schedule, mean, s_u))

    def __call__(self, x_t, t):
        cond, uncond = (part(x_t, t) for part in self.parts)
        return uncond + self.guidance.scale * (cond - uncond)


def exact_response(s_c, s_u, w, levels):
    """Integrate d log(x / alpha) / d log k = 1 - K from k = 1e6 down, by Simpson's rule."""
    found = []
    for alpha, sigma in levels:
        k = sigma / alpha if sigma else 1e-9
        nodes = np.linspace(math.log(1e6), math.log(k), 20_001)
        k_c, k_u = (s**2 / (s**2 + np.exp(2 * nodes)) for s in (s_c, s_u))
        f = 1 - k_u - w * (k_c - k_u)
        h = nodes[1] - nodes[0]
        integral = h / 3 * (f[0] + 4 * f[1:-1:2].sum() + 2 * f[2:-1:2].sum() + f[-1])
        found.append(alpha * 1e6 * math.exp(integral))
    return found


@pytest.mark.parametrize("w", [1.0, 2.5, 7.5])
@pytest.mark.parametrize(("s_c", "s_u"), [(0.3, 0.3), (0.5, 1.5), (2.0, 9.0)])
def test_the_exact_guided_path_is_the_integral_of_its_ode(s_c, s_u, w):
    at = [SCHEDULE(t) for t in (900, 500, 100, -1)]
    size_c, size_u = ([[math.hypot(a * s, b)] for a, b in [(0.0, 1.0), *at]] for s in (s_c, s_u))
    path = _exact_path(size_c, size_u, [w] * 4)
    wanted = exact_response(s_c, s_u, w, at)
    assert [e for (e,) in path[1:]] == pytest.approx(wanted, rel=1e-5)


def test_each_step_may_have_its_own_scale():
    """Two steps at w = 3, then two at 1: the second half is the unguided path's growth."""
    at = [SCHEDULE(t) for t in (999, 800, 600, 300, -1)]
    size_c, size_u = ([[math.hypot(a * s, b)] for a, b in at] for s in (0.5, 1.5))
    path = [e for (e,) in _exact_path(size_c, size_u, [3.0, 3.0, 1.0, 1.0])]
    assert path[2] == pytest.approx(exact_response(0.5, 1.5, 3.0, at[2:3])[0], rel=1e-5)
    assert path[4] / path[2] == pytest.approx(size_c[4][0] / size_c[2][0])


@pytest.mark.parametrize("w", [1.5, 3.0, 7.5, 20.0])
@pytest.mark.parametrize("schedule", [SCHEDULE, ORIGINAL], ids=["zero", "original"])
def test_weights_keep_a_constant_at_every_scale(schedule, w):
    for S in (*range(1, 31), 61, 103, 250, 1000):
        grid = tuple(guided(S, schedule=schedule).tolist())
        steps = multiscale_coefficients(schedule, grid, guidance=(w,) * S)
        for (a, b, _), step in zip(
            transition_coefficients(schedule, grid, 0.0), steps, strict=True
        ):
            assert math.fsum(step.a) == pytest.approx(a, rel=1e-12)
            assert step.b == b
            assert all(math.isfinite(weight) for weight in step.a)


def test_the_mean_path_is_exact_under_guidance():
    std = torch.tensor([0.1, 0.5, 20.0], dtype=torch.float64)
    for S in (*range(1, 21), 50, 103, 1000):
        oracle = GuidedGaussian(SCHEDULE, std, 3 * std, 7.5, mean=-0.8)
        x_T = torch.zeros(1, 3, dtype=torch.float64)
        x_0 = Multiscale().sample(oracle, SCHEDULE, x_T, guided(S))
        torch.testing.assert_close(x_0, torch.full_like(x_0, -0.8), rtol=0, atol=1e-10)


def test_the_guided_weights_converge_in_second_order():
    schedule = NoiseSchedule("cosine", 50_000)
    half = schedule.log_snr / 2
    std = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    oracle, errors, counts = GuidedGaussian(schedule, std, 2 * std, 3.0), [], (160, 320, 640)
    for S in counts:
        levels = torch.linspace(-3, 2, S + 1, dtype=torch.float64)
        grid = [int((half - level).abs().argmin()) for level in levels]
        first, last = schedule(grid[0]), schedule(grid[-1])

        def size(scales, factor, std=std):
            return (scales[0] ** 2 * (factor * std) ** 2 + scales[1] ** 2).sqrt()

        x_t = size(first, 1) ** 3 / size(first, 2) ** 2
        states = []
        Multiscale().sample(
            oracle, schedule, x_t[None], grid, callback=lambda *step, to=states: to.append(step[3])
        )
        exact = size(last, 1) ** 3 / size(last, 2) ** 2
        errors.append(float((states[-2] - exact).abs().max()))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-2, abs=0.2), errors


@pytest.mark.parametrize("S", [8, 10, 15, 20, 30])
@pytest.mark.parametrize("w", [2.0, 3.0, 5.0])
def test_guided_gaussians_are_nearer_than_by_ddim(S, w):
    """Root mean square of (y - e) / s_c over scales and ratios that no weight was fitted at."""
    pairs = [(s, r * s) for s in (0.4, 1.3, 4.0, 11.0) for r in (1.0, 1.3, 2.2)]
    s_c, s_u = torch.tensor(pairs, dtype=torch.float64).T
    oracle = GuidedGaussian(SCHEDULE, s_c, s_u, w)
    exact = s_c * (s_c / s_u) ** (w - 1)
    x_T = torch.ones(1, len(pairs), dtype=torch.float64)

    def error(sampler, spacing):
        x_0 = sampler.sample(oracle, SCHEDULE, x_T, get_timesteps(spacing, S))
        return float(((x_0 - exact) / s_c).square().mean().sqrt())

    ddim = min(error(DDIM(), spacing) for spacing in ("trailing", "log_snr", "guided"))
    assert error(Multiscale(), "guided") < ddim


def two_classes(size=8):
    """Dark and bright gradients, (16, 1, 8, 8) in [-1, 1], and which they are."""
    ramp = torch.linspace(-0.2, 0.2, size, dtype=torch.float64)
    images = [
        torch.full((1, size, size), level, dtype=torch.float64) + ramp * (-1) ** i
        for i, level in enumerate([-0.8, -0.75, -0.7, -0.65] * 2 + [0.8, 0.75, 0.7, 0.65] * 2)
    ]
    return torch.stack(images).clamp(-1, 1), torch.arange(2).repeat_interleave(8)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("w", [3.0, 5.0, 7.5])
@pytest.mark.parametrize("S", [5, 8, 10, 15, 20])
def test_recommended_sampling_stays_in_the_range_of_many_steps(S, w, rescale):
    images, classes = two_classes()
    oracle = EmpiricalDenoiser(SCHEDULE, images, classes=classes, batch_invariant=False)
    denoiser = oracle.guided(torch.tensor([0, 1] * 8), Guidance(w, rescale))
    x_T = SampleNoise(range(16)).randn((1, 8, 8), dtype=torch.float64)

    def sample(S):
        sampler, spacing = recommend_sampling(S, denoiser.guidance)
        grid = get_timesteps(spacing, S)
        return get_sampler(sampler).sample(denoiser, SCHEDULE, x_T, grid)

    assert sample(S).abs().max() < 1.2 * max(sample(1000).abs().max(), images.abs().max())


def network(x_t, t, conditioning):
    shift = 0.0 if conditioning is None else conditioning.context.view(-1, 1).to(x_t)
    return (x_t + shift).sin() + t.view(-1, 1) / 1000


def guided_network(guidance):
    images = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    oracle = EmpiricalDenoiser(SCHEDULE, images, classes=torch.tensor([0, 1] * 3), std=0.3)
    return oracle.guided(torch.tensor([0, 1, 0, 1]), guidance)


NOISE = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_scale_comes_from_the_denoiser_or_is_told():
    grid = guided(8)
    told = Multiscale().sample(guided_network(DEFAULT), SCHEDULE, NOISE, grid)

    denoiser = guided_network(DEFAULT)

    def untold(x_t, t):
        return denoiser(x_t, t)

    assert torch.equal(Multiscale(guidance=7.5).sample(untold, SCHEDULE, NOISE, grid), told)
    assert not torch.equal(Multiscale().sample(untold, SCHEDULE, NOISE, grid), told)
    plan = Multiscale().plan(SCHEDULE, grid, DEFAULT)
    assert (
        plan == Multiscale(guidance=7.5).plan(SCHEDULE, grid) != Multiscale().plan(SCHEDULE, grid)
    )


@pytest.mark.parametrize("scale", [1.0, 0.0, -1.0])
def test_without_guidance_weights_are_those_of_no_guidance(scale):
    grid = get_timesteps("log_snr", 10)
    plain = Multiscale(guidance=1.0).plan(SCHEDULE, grid)
    assert Multiscale().plan(SCHEDULE, grid, Guidance(scale)) == plain
    assert not any(call.limited for call in plain.calls)


def test_where_guidance_is_not_known_the_weights_are_safe():
    """A function that does not tell: within 1.5 times DDIM's error at the default guidance."""
    images, classes = two_classes()
    oracle = EmpiricalDenoiser(SCHEDULE, images, classes=classes, std=0.2, batch_invariant=False)
    denoiser = oracle.guided(torch.tensor([0, 1] * 8), DEFAULT)
    x_T = SampleNoise(range(16)).randn((1, 8, 8), dtype=torch.float64)

    def untold(x_t, t):
        return denoiser(x_t, t)

    assert torch.equal(
        Multiscale().sample(untold, SCHEDULE, x_T, guided(8)),
        Multiscale(guidance=3.0).sample(denoiser, SCHEDULE, x_T, guided(8)),
    )
    exact = DDIM().sample(denoiser, SCHEDULE, x_T, trailing(1000))
    for S in (5, 8, 10, 20):
        first, second = (
            float((sampler.sample(untold, SCHEDULE, x_T, guided(S)) - exact).square().mean().sqrt())
            for sampler in (DDIM(), Multiscale())
        )
        assert second < 1.5 * first


def test_what_declares_no_guidance_gets_the_weights_of_none():
    grid, oracle = get_timesteps("log_snr", 8), GaussianDenoiser(SCHEDULE, -0.8, 0.5)
    wanted = Multiscale(guidance=1.0).sample(lambda x, t: oracle(x, t), SCHEDULE, NOISE, grid)
    for denoiser in (oracle, guided_gaussian_of(oracle)):
        assert torch.equal(Multiscale().sample(denoiser, SCHEDULE, NOISE, grid), wanted)


def guided_gaussian_of(oracle):
    def predicts_v(x_t, t, conditioning):
        return to_v(oracle(x_t, t), x_t, *SCHEDULE(t), "sample")

    class Exact(Denoiser):
        def __call__(self, x_t, t):
            return oracle(x_t, t)

        def at(self, t, s=None):
            return self

    return Exact(predicts_v, SCHEDULE)


def test_a_sample_is_bit_for_bit_the_same_in_any_batch():
    """Large enough that torch divides a single sum over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        x_0 = [torch.randn(3, 4, 128, 128, generator=generator(i)) for i in range(3)]
        together, products = agreement(x_0), inner(x_0[0], x_0[1])
        for row in range(3):
            alone = [x[row : row + 1].clone() for x in x_0]
            assert torch.equal(agreement(alone)[0], together[row])
            assert torch.equal(inner(alone[0], alone[1])[0], products[row])
    finally:
        torch.set_num_threads(threads)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", available_samplers())
def test_cfg_pp_is_for_deterministic_steps_of_first_order(name):
    guidance = Guidance(0.6, 0.0, method="cfg_pp")
    for S in (5, 10):
        if name in ("ddim", "euler"):
            get_sampler(name).plan(SCHEDULE, guided(S), guidance)
        else:
            with pytest.raises(ValueError, match="Use the sampler 'ddim' or 'euler'"):
                get_sampler(name).plan(SCHEDULE, guided(S), guidance)


def test_a_strong_scale_overflows_nowhere():
    for scale in (1e3, 1e6, 1e300):
        plan = Multiscale().plan(SCHEDULE, guided(10), Guidance(scale))
        assert all(math.isfinite(a) for call in plan.calls for a in call.step.a)


def test_a_sampler_that_plans_nothing_is_refused():
    class Nothing(Sampler):
        def calls(self, schedule, grid, guidance):
            return []

    with pytest.raises(ValueError, match="planned no network call"):
        Nothing().plan(SCHEDULE, guided(5))


def test_an_interval_changes_the_weights_where_it_ends():
    grid = guided(10)
    everywhere = Multiscale().plan(SCHEDULE, grid, Guidance(7.5)).calls
    inside = Multiscale().plan(SCHEDULE, grid, Guidance(7.5, interval=(0.5, math.inf))).calls
    acts = [sigma > 0.5 * alpha for alpha, sigma in (SCHEDULE(t) for t in grid.tolist())]
    assert acts == sorted(acts, reverse=True)  # first guided, then not
    for i, (a, b) in enumerate(zip(everywhere, inside, strict=True)):
        assert (a.step == b.step) == acts[i] or i == 0
    curve = Guidance(curve=((-6.0, 1.0), (0.0, 7.5)))
    assert all(
        math.isfinite(weight)
        for call in Multiscale().plan(SCHEDULE, grid, curve).calls
        for weight in call.step.a
    )


def test_agreement_of_the_last_two_changes():
    base = torch.zeros(4, 1, 2)
    d_before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]).view(4, 1, 2)
    d = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [-1.0, 1.0], [1.0, 0.0]]).view(4, 1, 2)
    got = agreement((base + d_before + d, base + d_before, base))
    assert got.shape == (4, 1, 1)
    torch.testing.assert_close(got.flatten(), torch.tensor([1, 0, 1 - 0.5**0.5, 1]))


def test_a_prediction_that_turns_back_falls_to_first_order():
    coefficients = MultistepCoefficients((0.9, -0.5, 0.2), 0.4)
    x_0 = [torch.randn(2, 3) for _ in range(3)]
    x_t, trust = torch.randn(2, 3), torch.tensor([[0.0], [1.0]])
    limited = multistep(x_0, x_t, coefficients, trust=trust)
    torch.testing.assert_close(limited[0], 0.6 * x_0[0][0] + 0.4 * x_t[0])
    torch.testing.assert_close(limited[1], multistep(x_0, x_t, coefficients)[1])


def test_a_sample_is_limited_on_its_own():
    """One sample swings and one does not; each is what it is alone."""
    answers = {False: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], True: [1.0, -1.0, 1.0, -1.0, 1.0, -1.0]}

    def sample(rows):
        calls = iter(range(6))

        def denoiser(x_t, t):
            i = next(calls)
            return torch.stack([torch.full((3,), answers[row][i]) for row in rows]).double()

        x_T = torch.ones(len(rows), 3, dtype=torch.float64)
        return Multiscale(guidance=7.5).sample(denoiser, SCHEDULE, x_T, guided(6))

    together = sample([False, True])
    torch.testing.assert_close(together[0], sample([False])[0])
    torch.testing.assert_close(together[1], sample([True])[0])
    torch.testing.assert_close(together[1], torch.full((3,), -1.0).double())  # first order: x_0


@pytest.mark.parametrize("name", available_samplers())
@pytest.mark.parametrize("guidance", [None, DEFAULT])
def test_the_loop_in_pieces_is_the_loop(name, guidance):
    sampler, denoiser = get_sampler(name), guided_network(guidance)
    plan = sampler.plan(SCHEDULE, guided(7), denoiser.guidance)
    noise, state = SampleNoise(range(4)), sampler.begin(plan, NOISE)
    for i in itertools.count():
        if state.done:
            break
        assert state.t == plan.timesteps[i]
        x_0 = denoiser.at(state.t)(state.x_t, torch.full((4,), state.t))
        kept = state.x_t.clone()
        following = sampler.advance(plan, state, x_0, noise.randn_like)
        assert torch.equal(state.x_t, kept)  # a state is a value
        state = following
    wanted = sampler.sample(
        denoiser, SCHEDULE, NOISE, guided(7), randn_like=SampleNoise(range(4)).randn_like
    )
    assert torch.equal(state.x_t, wanted)


def test_a_state_may_be_advanced_twice():
    sampler, denoiser = Multiscale(), guided_network(DEFAULT)
    plan = sampler.plan(SCHEDULE, guided(6), DEFAULT)
    state = sampler.begin(plan, NOISE)
    for _ in range(4):
        x_0 = denoiser.at(state.t)(state.x_t, torch.full((4,), state.t))
        once, twice = (sampler.advance(plan, state, x_0) for _ in range(2))
        assert torch.equal(once.x_t, twice.x_t)
        state = once


@pytest.mark.parametrize(
    ("num_steps", "guidance", "wanted"),
    [
        (5, None, ("multiscale", "log_snr")),
        (5, 1.0, ("multiscale", "log_snr")),
        (20, Guidance(1.0), ("multiscale", "log_snr")),
        (5, 3.0, ("multiscale", "guided")),
        (5, 7.5, ("multiscale", "guided")),
        (1, DEFAULT, ("multiscale", "guided")),
        (7, DEFAULT, ("multiscale", "guided")),
        (5, Guidance(7.5, 0.0), ("ddim", "trailing")),
        (6, Guidance(7.5, 0.0), ("ddim", "guided")),
        (9, Guidance(7.5, 0.0), ("ddim", "guided")),
        (10, Guidance(7.5, 0.0), ("multiscale", "guided")),
        (5, Guidance(3.0, 0.0), ("multiscale", "guided")),
        (8, DEFAULT, ("multiscale", "guided")),
        (49, 7.5, ("multiscale", "guided")),
        (50, DEFAULT, ("ddim", "trailing")),
        (1000, None, ("ddim", "trailing")),
        (5, Guidance(curve=((-6.0, 1.0), (0.0, 7.5))), ("multiscale", "guided")),
        (10, Guidance(0.6, 0.0, method="cfg_pp"), ("ddim", "guided")),
    ],
)
def test_recommended_sampling(num_steps, guidance, wanted):
    sampler, spacing = recommend_sampling(num_steps, guidance)
    assert (sampler, spacing) == wanted
    get_sampler(sampler)
    assert len(get_timesteps(spacing, num_steps)) == num_steps


@pytest.mark.parametrize("guidance", [math.nan, math.inf, "7.5", True])
def test_a_guidance_that_is_none_is_refused(guidance):
    with pytest.raises(ValueError, match="its scale as a finite number"):
        recommend_sampling(8, guidance)


def test_multiscale_alone_takes_its_own_spacing():
    for sampler in ("multiscale", Multiscale(), "zsnr.samplers.multiscale.Multiscale"):
        for S in (5, 8, 100):
            assert resolve_sampling(sampler, "auto", S, DEFAULT) == (sampler, "guided")
            assert resolve_sampling(sampler, "auto", S) == (sampler, "log_snr")
    assert resolve_sampling("ddim", "auto", 8, DEFAULT) == ("ddim", "trailing")


def test_auto_is_no_name_to_register():
    with pytest.raises(ValueError, match="selects the recommended"):
        register_sampler("auto")(DDIM)
    with pytest.raises(ValueError, match="selects the recommended"):
        register_spacing("auto")(trailing)


@pytest.mark.parametrize("num_steps", [0, -1, True, 2.0, "8"])
def test_a_number_of_steps_that_is_none_is_refused(num_steps):
    with pytest.raises(ValueError, match="wanted an int of at least 1"):
        recommend_sampling(num_steps)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "7.5"])
def test_a_guidance_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match="wanted a finite number"):
        Multiscale(guidance=scale)


@pytest.mark.parametrize("T", [2, 3, 10, 50, 1000])
@pytest.mark.parametrize("zero", [True, False])
def test_the_guided_grid_has_every_number_of_steps(T, zero):
    schedule = NoiseSchedule(num_timesteps=T, zero_terminal_snr=zero)
    for S in range(1, T + 1):
        grid = guided(S, T, schedule=schedule).tolist()
        assert len(grid) == S
        assert grid[0] == T - 1
        assert grid[-1] >= 0
        assert grid == sorted(set(grid), reverse=True)


def test_the_guided_grid_is_densest_in_the_middle_of_its_range():
    half = SCHEDULE.log_snr / 2
    levels = half[guided(12)][1:]
    steps = levels.diff()
    assert float(levels[0]) == pytest.approx(-0.7 - math.log(12), abs=0.02)
    assert float(levels[-1]) == pytest.approx(-2.2 + 2 * math.log(12), abs=0.05)
    middle = len(steps) // 2
    assert steps[middle] < 0.8 * steps[0]
    assert steps[middle] < 0.8 * steps[-1]


def test_few_guided_steps_beat_ddim_on_a_held_out_mixture():
    """The whole chain by an oracle: path error to 500 steps, default guidance."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(24, 20, generator=generator, dtype=torch.float64) / 2
    classes = torch.arange(3).repeat(8)
    images += (classes.view(-1, 1) - 1) / 2
    oracle = EmpiricalDenoiser(SCHEDULE, images, classes=classes, std=0.2, batch_invariant=False)
    denoiser = oracle.guided(torch.arange(30) % 3, DEFAULT)
    x_T = SampleNoise(range(30)).randn((20,), dtype=torch.float64)

    def sample(sampler, spacing, S):
        return get_sampler(sampler).sample(denoiser, SCHEDULE, x_T, get_timesteps(spacing, S))

    exact = sample("dpmpp_2m", "log_snr", 500)
    for S in (8, 10, 15, 20):
        error = {
            names: float((sample(*names, S) - exact).square().mean().sqrt())
            for names in (
                recommend_sampling(S, DEFAULT),
                ("ddim", "trailing"),
                ("ddim", "log_snr"),
                ("dpmpp_2m", "log_snr"),
            )
        }
        assert min(error, key=error.get) == ("multiscale", "guided"), (S, error)


def test_trailing_at_fifty_steps_is_what_it_was():
    x_T = torch.randn(2, 3, generator=torch.Generator().manual_seed(2))
    denoiser = Denoiser(network, SCHEDULE)
    sampler, spacing = recommend_sampling(50, DEFAULT)
    got = get_sampler(sampler).sample(denoiser, SCHEDULE, x_T, get_timesteps(spacing, 50))
    x, grid = x_T, trailing(50).tolist()
    for t, s in zip(grid, [*grid[1:], -1], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = SCHEDULE(t), SCHEDULE(s)
        v = network(x, torch.full((2,), t), None)
        x_0, eps = alpha_t * x - sigma_t * v, sigma_t * x + alpha_t * v
        assert torch.allclose(to_v(x_0, x, alpha_t, sigma_t, "sample"), v, atol=1e-4)
        x = alpha_s * x_0 + sigma_s * eps
    torch.testing.assert_close(got, x, rtol=0, atol=1e-5)
