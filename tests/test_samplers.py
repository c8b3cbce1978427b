import inspect
import math
from dataclasses import FrozenInstanceError, dataclass
from decimal import Decimal, getcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zsnr import (
    DDIM,
    DDPM,
    ERSDE,
    Denoiser,
    DPMpp2MSDE,
    EmpiricalDenoiser,
    Euler,
    EulerAncestral,
    GaussianDenoiser,
    InpaintingDenoiser,
    Multiscale,
    NoiseSchedule,
    SampleNoise,
    Sampler,
    available_samplers,
    get_sampler,
    get_timesteps,
    linspace,
    register_sampler,
    trailing,
)
from zsnr.samplers import registry
from zsnr.samplers.base import step, transition_coefficients

STEP_COUNTS = (1, 2, 3, 5, 7, 10, 25, 28, 48, 50, 61, 96, 100, 121, 1000)
SPACINGS = ("trailing", "linspace")
SCHEDULE = NoiseSchedule()
getcontext().prec = 40
ORIGINAL = NoiseSchedule(zero_terminal_snr=False)
MEAN, STD = -0.8, 0.5
ONE_STEP = [DDIM(), DDPM(), Euler(), EulerAncestral(), DDIM(0.5), EulerAncestral(0.3)]
LATER = [get_sampler(name) for name in available_samplers() if get_sampler(name) not in ONE_STEP]
SAMPLERS = ONE_STEP + LATER
ETA = {"DDIM": None, "DDPM": 1.0, "Euler": 0.0, "EulerAncestral": None}


def eta_of(sampler):
    fixed = ETA[type(sampler).__name__]
    return sampler.eta if fixed is None else fixed


def zeros_like(x):
    return torch.zeros_like(x)


def run(sampler, x_T, grid, schedule=SCHEDULE, **options):
    oracle = GaussianDenoiser(schedule, MEAN, STD)
    return sampler.sample(oracle, schedule, x_T, grid, **options)


def linear_response(schedule, grid, eta):
    """Compute d x_0 / d x_T on the Gaussian oracle with z = 0, by equations (4), (21), (22) alone.

    In 40 digits: the equations as printed lose half the digits of a float to cancellation.
    """
    response, variance = Decimal(1), Decimal(STD) ** 2
    abar = [Decimal(a) for a in (*schedule.alphas_cumprod.tolist(), 1.0)]
    for t, s in zip(grid, [*grid[1:], -1], strict=True):
        alpha, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
        gain = alpha * variance / (abar[t] * variance + sigma**2)  # d E[x_0|x_t] / d x_t
        std_2 = Decimal(eta) ** 2 * (1 - abar[s]) / (1 - abar[t]) * (1 - abar[t] / abar[s])
        d_eps = (1 - alpha * gain) / sigma
        response *= abar[s].sqrt() * gain + max(Decimal(0), 1 - abar[s] - std_2).sqrt() * d_eps
    return float(response)


@pytest.mark.parametrize("S", STEP_COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ONE_STEP, ids=repr)
def test_gaussian_oracle_is_exact(sampler, spacing, S):
    grid = get_timesteps(spacing, S)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean_path, moved = run(sampler, ends, grid, randn_like=zeros_like).flatten().tolist()
    assert mean_path == pytest.approx(MEAN, abs=1e-12)
    wanted = linear_response(SCHEDULE, grid.tolist(), eta_of(sampler))
    assert moved - mean_path == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    noisy = run(sampler, torch.randn(2, 3), grid)
    assert noisy.isfinite().all()


@pytest.mark.parametrize("betas", ["linear", "cosine", "scaled_linear"])
def test_mean_path_is_exact_for_all_step_counts(betas):
    schedule = NoiseSchedule(betas)
    scales = [schedule(t) for t in range(schedule.num_timesteps)]
    gains = [alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) for alpha, sigma in scales]
    for S in range(1, 1001):
        for spacing in SPACINGS:
            grid = get_timesteps(spacing, S).tolist()
            for eta in (0.0, 1.0):
                x = 0.0  # the affine recursion of the oracle in floats: cheap for every S
                steps = transition_coefficients(schedule, grid, eta)
                for t, (a, b, c) in zip(grid, steps, strict=True):
                    x = a * (MEAN + gains[t] * (x - scales[t][0] * MEAN)) + b * x
                    assert math.isfinite(c)
                assert x == pytest.approx(MEAN, abs=1e-12)


def test_spread_tends_to_the_datas():
    stds = [linear_response(SCHEDULE, trailing(S).tolist(), 0.0) for S in (10, 50, 100, 1000)]
    assert stds == sorted(stds)
    assert stds[0] == pytest.approx(0.379, abs=1e-3)
    assert stds[-1] == pytest.approx(STD, abs=5e-3)


@pytest.mark.parametrize("S", STEP_COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_equal_samplers_are_equal(spacing, S):
    x_T, grid = torch.randn(3, 5), get_timesteps(spacing, S)
    by = {
        sampler: run(sampler, x_T, grid, randn_like=SampleNoise([0, 1, 2]).randn_like)
        for sampler in (
            DDIM(0.0),
            DDIM(1.0),
            DDPM(),
            Euler(),
            EulerAncestral(),
            EulerAncestral(0.0),
        )
    }
    assert torch.equal(by[DDIM(1.0)], by[DDPM()])
    assert torch.equal(by[EulerAncestral()], by[DDPM()])
    assert torch.equal(by[Euler()], by[DDIM(0.0)])
    assert torch.equal(by[EulerAncestral(0.0)], by[DDIM(0.0)])


@pytest.mark.parametrize("S", [2, 10, 28, 50])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_euler_in_its_published_coordinates(S, eta):
    """Euler on y = x / alpha against k = sigma / alpha, on the original schedule: both exist."""
    grid = trailing(S).tolist()
    oracle = GaussianDenoiser(ORIGINAL, MEAN, STD)
    x_T = torch.randn(4, 3, dtype=torch.float64)
    noise, draws = torch.randn(S, 4, 3, dtype=torch.float64), iter(range(S))
    got = EulerAncestral(eta).sample(
        oracle, ORIGINAL, x_T, grid, randn_like=lambda x: noise[next(draws)]
    )
    y = x_T / ORIGINAL(grid[0])[0]
    for i, (t, s) in enumerate(zip(grid, [*grid[1:], -1], strict=True)):
        k_t, k_s = (ORIGINAL(u)[1] / ORIGINAL(u)[0] for u in (t, s))
        x_0 = oracle(y * ORIGINAL(t)[0], torch.full((4,), t))
        k_up = min(k_s, eta * math.sqrt(k_s**2 * (k_t**2 - k_s**2) / k_t**2))
        k_down = math.sqrt(k_s**2 - k_up**2)
        y = y + (y - x_0) / k_t * (k_down - k_t) + k_up * noise[i]
    torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("S", STEP_COUNTS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_float32_is_close_to_float64(sampler, S):
    x_T = torch.randn(
        16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).float()
    grid = trailing(S)
    noise = torch.randn(S, 16, 8, generator=torch.Generator().manual_seed(2))
    results = []
    for dtype in (torch.float32, torch.float64):
        draws = iter(noise.to(dtype))
        results.append(
            run(sampler, x_T.to(dtype), grid, randn_like=lambda x, draws=draws: next(draws))
        )
    assert results[0].dtype == torch.float32
    torch.testing.assert_close(results[0].double(), results[1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
@pytest.mark.parametrize("oracle", ["gaussian", "empirical"])
def test_batch_and_order_do_not_change_a_sample(sampler, oracle):
    images = torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    denoiser = (
        GaussianDenoiser(SCHEDULE, MEAN, STD)
        if oracle == "gaussian"
        else EmpiricalDenoiser(SCHEDULE, images)
    )

    def sample(seeds):
        noise = SampleNoise(seeds)
        x_T = noise.randn((3, 4, 4))
        return sampler.sample(denoiser, SCHEDULE, x_T, trailing(10), randn_like=noise.randn_like)

    seeds = [5, 0, 9, 2, 7]
    together = sample(seeds)
    assert torch.equal(sample(seeds[::-1]), together.flip(0))
    for i, seed in enumerate(seeds):
        assert torch.equal(sample([seed])[0], together[i])


@pytest.mark.parametrize(
    ("zero", "spacing", "wanted"),
    [
        (False, "leading", -0.05),
        (False, "trailing", -0.08),
        (True, "leading", -0.43),
        (True, "trailing", -0.80),
        (True, "linspace", -0.80),
    ],
)
def test_brightness_mode_needs_both_fixes(zero, spacing, wanted):
    """Flat 64x64 images, colour ~ N(-0.8, 0.5^2): the mean as one mode, scaled by sqrt(D)."""
    schedule, root = NoiseSchedule(zero_terminal_snr=zero), 64.0
    oracle = GaussianDenoiser(schedule, MEAN * root, STD * root)
    x_T = torch.zeros(1, 1, dtype=torch.float64)
    x_0 = DDIM().sample(oracle, schedule, x_T, get_timesteps(spacing, 25)) / root
    assert round(x_0.item(), 2) == wanted


@pytest.mark.peer
@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("S", [1, 10, 25, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_is_diffusers_where_steps_divide_the_timesteps(S, spacing, zero, eta):
    from diffusers import DDIMScheduler

    schedule = NoiseSchedule(zero_terminal_snr=zero)
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing=spacing,
        rescale_betas_zero_snr=zero,
        set_alpha_to_one=True,
        clip_sample=False,
    )
    theirs.set_timesteps(S)
    grid = get_timesteps(spacing, S)
    assert theirs.timesteps.tolist() == grid.tolist()
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) * 0.5

    def network(x_t, t, conditioning):
        return x_t @ weight + t.view(-1, 1) / 1000

    x_T = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(S, 4, 3, generator=torch.Generator().manual_seed(2))
    draws = iter(noise)
    ours = DDIM(eta).sample(
        Denoiser(network, schedule), schedule, x_T, grid, randn_like=lambda x: next(draws)
    )
    x = x_T
    for i, t in enumerate(theirs.timesteps):
        v = network(x, t.expand(4), None)
        z = noise[i] if eta else None
        x = theirs.step(v, t, x, eta=eta, variance_noise=z).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("S", [1, 10, 28, 50])
def test_euler_is_diffusers_on_the_original_schedule(S):
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(S)
    grid = trailing(S)
    assert theirs.timesteps.long().tolist() == grid.tolist()
    x_T = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    ours = Euler().sample(Denoiser(lambda x_t, t, c: x_t.sin(), ORIGINAL), ORIGINAL, x_T, grid)
    x = x_T / ORIGINAL(999)[0]
    for t in theirs.timesteps:
        x = theirs.step(theirs.scale_model_input(x, t).sin(), t, x).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-5)


@pytest.mark.peer
def test_ddpm_is_diffusers_on_the_leading_grid():
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="leading",
        clip_sample=False,
    )
    theirs.set_timesteps(20)
    x = torch.randn(4, 3)
    ours = DDPM().sample(
        Denoiser(lambda x_t, t, c: 0.3 * x_t.sin(), ORIGINAL),
        ORIGINAL,
        x,
        get_timesteps("leading", 20),
        randn_like=SampleGenerator(3),
    )
    generator = torch.Generator().manual_seed(3)
    for t in theirs.timesteps:
        x = theirs.step(0.3 * x.sin(), t, x, generator=generator).prev_sample
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-5)


class SampleGenerator:
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, x):
        return torch.randn(x.shape, generator=self.generator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_noise_runs_in_float32_and_is_cast_once(dtype):
    seen = []
    x_T = torch.randn(2, 3).to(dtype)
    x_0 = run(
        DDIM(),
        x_T,
        trailing(10),
        callback=lambda i, t, x_0, x_s: seen.append((x_0.dtype, x_s.dtype)),
    )
    assert set(seen) == {(torch.float32, torch.float32)}
    assert torch.equal(x_0, run(DDIM(), x_T.float(), trailing(10)).to(dtype))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_callback_sees_every_step_and_x_T_is_kept(sampler):
    calls, x_T = [], torch.randn(2, 3)
    kept, grid = x_T.clone(), linspace(7)
    x_0 = run(sampler, x_T, grid, callback=lambda *step: calls.append(step))
    assert torch.equal(x_T, kept)
    assert [c[0] for c in calls] == list(range(7))
    assert [c[1] for c in calls] == grid.tolist()
    if not isinstance(sampler, Multiscale):  # which goes on from its last predictions
        assert torch.equal(calls[-1][2], calls[-1][3])
    assert torch.equal(calls[-1][3], x_0)
    again = run(sampler, x_T, grid.tolist(), randn_like=zeros_like)
    assert again.shape == x_0.shape


def test_the_loop_never_reads_a_tensor():
    """Under FakeTensorMode tensors have no values: a host sync would raise."""
    grid = trailing(10)
    SCHEDULE(torch.tensor([0]))  # the cached table is a real tensor
    with FakeTensorMode():
        for sampler in SAMPLERS:
            x_T = torch.empty(2, 4, 8, 8)
            for denoiser in (
                GaussianDenoiser(SCHEDULE, MEAN, STD),
                Denoiser(lambda x, t, c: x * t.view(-1, 1, 1, 1), SCHEDULE),
            ):
                x_0 = sampler.sample(denoiser, SCHEDULE, x_T, grid)
                assert x_0.shape == x_T.shape
    alpha, _ = SCHEDULE(torch.tensor([999]))  # and no fake table is left behind
    assert alpha.item() == 0


def test_a_step_compiles_whole():
    denoiser = Denoiser(lambda x, t, c: 0.5 * x, SCHEDULE)

    def whole(x_t, t, coefficients):
        return step(denoiser(x_t, t), x_t, coefficients)

    compiled = torch.compile(whole, fullgraph=True, backend="eager")
    x, grid = torch.randn(2, 4), trailing(50)
    for t, abc in zip(grid, transition_coefficients(SCHEDULE, grid, 0.0), strict=True):
        torch.testing.assert_close(compiled(x, t.repeat(2), abc), whole(x, t.repeat(2), abc))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_noise_is_drawn_once_for_every_step_that_needs_it(sampler):
    drawn = []

    def randn_like(x):
        drawn.append(x.shape)
        return torch.randn_like(x)

    run(sampler, torch.randn(2, 3), trailing(10), randn_like=randn_like)
    noisy = isinstance(sampler, DPMpp2MSDE | ERSDE) or (sampler in ONE_STEP and eta_of(sampler) > 0)
    assert len(drawn) == (9 if noisy else 0)  # the last step lands on x_0


def test_a_denoiser_that_answers_in_half_precision():
    x_T = torch.randn(2, 3)
    x_0 = DDIM().sample(lambda x, t: x.half(), SCHEDULE, x_T, trailing(5))
    assert x_0.dtype == torch.float32


def test_another_schedule_than_the_denoisers_is_refused():
    for denoiser in (
        GaussianDenoiser(NoiseSchedule("cosine"), MEAN, STD),
        Denoiser(lambda x, t, c: x, ORIGINAL),
    ):
        for sampler in SAMPLERS:
            with pytest.raises(ValueError, match="wanted the same schedule"):
                sampler.sample(denoiser, SCHEDULE, torch.randn(1, 2), trailing(5))


class PredictsV(torch.nn.Module):
    def forward(self, x_t, t, conditioning=None):
        return x_t


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (PredictsV(), r"PredictsV is a network, but samplers take a denoiser .*Denoiser\(network"),
        (torch.compile(PredictsV()), "is a network"),
        (lambda x_t, t, conditioning: x_t, r"cannot be called with \(x_t, t\): wanted a denoiser"),
        (EmpiricalDenoiser(SCHEDULE, torch.ones(1, 2)).network, "network cannot be called with"),
        (torch.ones(1), "Tensor cannot be called"),
    ],
    ids=["module", "compiled", "function", "method", "tensor"],
)
def test_a_network_is_no_denoiser(network, words):
    for sampler in SAMPLERS:
        with pytest.raises(ValueError, match=words):
            sampler.sample(network, SCHEDULE, torch.ones(1, 2), trailing(2))
    with pytest.raises(ValueError, match=words):
        InpaintingDenoiser(network, SCHEDULE, torch.ones(1, 2), torch.tensor([True, False]))


def test_samplers_are_frozen_values():
    assert DDIM(0.5) == get_sampler("ddim", eta=0.5) != DDIM()
    assert hash(DDPM()) == hash(get_sampler("ddpm"))
    with pytest.raises(FrozenInstanceError):
        DDIM().eta = 1.0


def test_registry(monkeypatch):
    monkeypatch.setattr(registry, "_SAMPLERS", dict(registry._SAMPLERS))
    assert available_samplers() == [
        "ddim",
        "ddpm",
        "deis",
        "dpmpp_2m",
        "dpmpp_2m_sde",
        "dpmpp_3m",
        "er_sde",
        "euler",
        "euler_ancestral",
        "heun",
        "ipndm",
        "multiscale",
        "unipc",
    ]

    @register_sampler("one_shot")
    @dataclass(frozen=True)
    class OneShot(Sampler):
        gain: float = 1.0

        def sample(
            self, denoiser, schedule, x_T, timesteps, *, randn_like=torch.randn_like, callback=None
        ):
            return self.gain * denoiser(x_T, torch.full((len(x_T),), int(timesteps[0])))

    x_0 = run(get_sampler("one_shot", gain=2.0), torch.randn(2, 3), trailing(1))
    torch.testing.assert_close(x_0, torch.full((2, 3), 2 * MEAN))
    with pytest.raises(ValueError, match="already registered"):
        register_sampler("ddim")(OneShot)
    assert register_sampler("one_shot")(OneShot) is OneShot  # a reload
    with pytest.raises(TypeError, match="not a subclass"):
        register_sampler("wrong")(int)
    with pytest.raises(TypeError, match="must implement `calls` or `sample`"):
        register_sampler("wrong")(type("Wrong", (Sampler,), {}))
    with pytest.raises(ValueError, match="Known: 'ddim', 'ddpm', 'deis', 'dpmpp_2m'"):
        get_sampler("plms")
    with pytest.raises(ValueError, match="Its options: eta"):
        get_sampler("ddim", etta=1.0)
    with pytest.raises(ValueError, match="eta=2"):
        get_sampler("ddim", eta=2)


def test_every_sampler_keeps_the_signature():
    wanted = inspect.signature(Sampler.sample)
    for name in available_samplers():
        assert inspect.signature(type(get_sampler(name)).sample) == wanted


@pytest.mark.parametrize("grid", [[], [10, 20], [1000, 5], [5, -1]])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_wrong_grids_are_refused(sampler, grid):
    with pytest.raises(ValueError, match=r"wanted|descending"):
        run(sampler, torch.randn(1, 2), grid)


def test_sampling_records_no_path_unless_asked():
    weight = torch.tensor(0.5, requires_grad=True)

    def denoiser(x_t, t):
        return weight * x_t

    x_T = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert not DDIM().sample(denoiser, NoiseSchedule(), x_T, trailing(3)).requires_grad
    DDIM().sample(denoiser, NoiseSchedule(), x_T, trailing(3), with_grad=True).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        x_0 = DDIM().sample(denoiser, NoiseSchedule(), x_T, trailing(3), with_grad=True)
    assert not x_0.requires_grad


def test_a_callback_may_return_what_a_progress_bar_does():
    x_T = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    denoiser = GaussianDenoiser(NoiseSchedule(), 0.1, 0.5)
    made = [
        DDIM().sample(
            denoiser, NoiseSchedule(), x_T, trailing(3), callback=lambda *_, said=said: said
        )
        for said in (None, True, False)
    ]
    assert made[0].equal(made[1])
    assert made[0].equal(made[2])
