"""Conditioning on known data, by exact conditional distributions; callbacks that change a step."""

import pytest
import torch

from zsnr import (
    Denoiser,
    EmpiricalDenoiser,
    GaussianDenoiser,
    Guidance,
    InpaintingDenoiser,
    NoiseSchedule,
    RectifiedFlow,
    SampleNoise,
    available_samplers,
    get_sampler,
    get_timesteps,
    trailing,
)
from zsnr.samplers import Changed

SCHEDULE = NoiseSchedule()
UNKNOWN = torch.tensor([False] * 3 + [True] * 3)
N = 4000


class CorrelatedGaussian:
    """The exact denoiser of N(m, C): m + alpha C (alpha^2 C + sigma^2)^-1 (x_t - alpha m)."""

    guidance = None

    def __init__(self, schedule, mean, covariance):
        self.schedule, self.mean, self.covariance = schedule, mean, covariance

    def __call__(self, x_t, t):
        alpha, sigma = self.schedule(int(t[0]))
        noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean))
        gain = alpha * torch.linalg.solve(noisy, self.covariance)
        return self.mean + (x_t - alpha * self.mean) @ gain

    def conditional(self, known):
        """Mean and covariance of the unknown numbers."""
        C, u, k = self.covariance, UNKNOWN, ~UNKNOWN
        gain = torch.linalg.solve(C[k][:, k], C[k][:, u]).T
        return self.mean[u] + gain @ (known - self.mean[k]), C[u][:, u] - gain @ C[k][:, u]


@pytest.fixture(scope="module")
def gaussian():
    """Neighbors are alike, and all six numbers share a brightness."""
    i = torch.arange(6)
    covariance = 0.3 * torch.exp(-(i[:, None] - i).abs() / 2) + 0.5
    known = torch.tensor([0.9, 0.4, 0.7])
    return torch.full((6,), -0.2), covariance, known


def inpaint(denoiser, schedule, known, corrections, name="ddim", grid=None):
    data = torch.zeros(N, 6)
    data[:, ~UNKNOWN] = known
    eps = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
    grid = trailing(50) if grid is None else grid
    x_T = schedule.add_noise(data, eps, grid[:1].expand(N))
    torch.manual_seed(1)
    conditioned = InpaintingDenoiser(denoiser, schedule, data, UNKNOWN, corrections)
    x_0 = get_sampler(name).sample(conditioned, schedule, x_T, grid)
    torch.testing.assert_close(x_0[:, ~UNKNOWN], data[:, ~UNKNOWN])
    return x_0[:, UNKNOWN]


def w1(samples, mean, covariance):
    """Mean W1 of the numbers to their normal distributions, in standard deviations."""
    levels = torch.special.ndtri((torch.arange(len(samples)) + 0.5) / len(samples))
    z = (samples - mean) / covariance.diagonal().sqrt()
    return float((z.sort(0).values - levels[:, None]).abs().mean())


@pytest.mark.parametrize("schedule", [SCHEDULE, RectifiedFlow()], ids=["vp", "flow"])
@pytest.mark.parametrize("name", available_samplers())
def test_the_conditional_distribution_of_a_gaussian(name, schedule, gaussian):
    """As near as samples of the exact conditional denoiser, whose error is that of 50 steps."""
    mean, covariance, known = gaussian
    denoiser = CorrelatedGaussian(schedule, mean, covariance)
    wanted = denoiser.conditional(known)
    exact = CorrelatedGaussian(schedule, *wanted)
    torch.manual_seed(1)
    x_T = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
    reached = w1(get_sampler(name).sample(exact, schedule, x_T, trailing(50)), *wanted)
    found = inpaint(denoiser, schedule, known, 3, name)
    assert w1(found, *wanted) < reached + 0.03
    assert reached < 0.1


def test_plain_replacement_is_biased_and_corrections_are_not(gaussian):
    mean, covariance, known = gaussian
    denoiser = CorrelatedGaussian(SCHEDULE, mean, covariance)
    wanted = denoiser.conditional(known)
    errors = [w1(inpaint(denoiser, SCHEDULE, known, n), *wanted) for n in range(4)]
    assert errors[0] > 0.4
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[0] / 4
    assert errors[3] < 0.05


def test_a_mixture_is_near_its_conditional_distribution():
    """Not affine, so that the corrections are not exact; the weights of the members are."""
    members = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    known = members[3, ~UNKNOWN] + 0.05
    denoiser = EmpiricalDenoiser(SCHEDULE, members, std=0.1, batch_invariant=False)
    distance = (members[:, ~UNKNOWN] - known).square().sum(1)
    weights = (-distance / (2 * 0.1**2)).softmax(0)
    assert weights[3] > 0.99

    def right(corrections):
        found = inpaint(denoiser, SCHEDULE, known, corrections)
        nearest = torch.cdist(found, members[:, UNKNOWN]).argmin(1)
        return float((nearest == 3).float().mean())

    assert right(0) < 0.6
    assert right(2) > 0.9


def test_with_every_spacing_guidance_and_row_limit():
    """The known part is kept, and a sample does not depend on its batch."""
    guidance = Guidance(3.0, 0.7, interval=(0.1, 9.0))
    oracle = EmpiricalDenoiser(
        SCHEDULE, torch.randn(6, 2, 3), classes=torch.tensor([0, 1, 0, 1, 0, 1]), std=0.2
    )
    data, unknown = torch.randn(3, 2, 3), torch.tensor([[True, False, True]])

    def sample(rows, spacing, name):
        denoiser = oracle.guided(torch.tensor([0, 1, 1])[rows], guidance)
        noise = SampleNoise(range(3)[rows])
        conditioned = InpaintingDenoiser(denoiser, SCHEDULE, data[rows], unknown)
        return get_sampler(name).sample(
            *(conditioned, SCHEDULE, noise.randn((2, 3))),
            get_timesteps(spacing, 5, schedule=SCHEDULE),
            randn_like=noise.randn_like,
        )

    for spacing in ("trailing", "leading", "log_snr", "guided"):
        for name in ("ddpm", "heun", "unipc", "multiscale"):
            x_0 = sample(slice(3), spacing, name)
            assert torch.equal(sample(slice(1, 2), spacing, name)[0], x_0[1])
            torch.testing.assert_close(x_0[:, :, 1], data[:, :, 1])


def test_calls_of_the_network():
    """One more for each correction, and none at SNR 0, where nothing can be corrected."""
    times = []

    def network(x_t, t, conditioning):
        times.append(int(t[0]))
        return x_t.sin()

    data, unknown = torch.ones(2, 4), torch.tensor([True, False, True, False])
    conditioned = InpaintingDenoiser(Denoiser(network, SCHEDULE), SCHEDULE, data, unknown, 3)
    get_sampler("ddim").sample(conditioned, SCHEDULE, torch.randn(2, 4), [999, 500, 100])
    assert times == [999, *[500] * 4, *[100] * 4]
    assert conditioned.guidance is None
    x_0 = conditioned(torch.randn(2, 4), torch.tensor([500, 100]))
    assert torch.equal(x_0[:, ~unknown], data[:, ~unknown])


def test_a_constant_network_is_not_corrected():
    conditioned = InpaintingDenoiser(
        lambda x_t, t: torch.full_like(x_t, 0.5), SCHEDULE, torch.ones(1, 2), torch.arange(2) > 0
    )
    assert conditioned(torch.zeros(1, 2), torch.tensor([400])).tolist() == [[1.0, 0.5]]


def test_wrong_parts_are_refused():
    denoiser, data = GaussianDenoiser(SCHEDULE, 0.0, 1.0), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"unknown is torch\.float32: wanted bool"):
        InpaintingDenoiser(denoiser, SCHEDULE, data, torch.ones(2))
    with pytest.raises(ValueError, match="corrections=-1: wanted 0 or more"):
        InpaintingDenoiser(denoiser, SCHEDULE, data, UNKNOWN, -1)
    with pytest.raises(ValueError, match="wanted the same schedule"):
        InpaintingDenoiser(denoiser, NoiseSchedule("cosine"), data, UNKNOWN)


@pytest.mark.parametrize("name", sorted({*available_samplers()} - {"heun"}))
def test_a_callback_may_change_the_prediction(name, gaussian):
    """Replacing the known part of x_0 after each step is what the denoiser does before it."""
    mean, covariance, _ = gaussian
    denoiser = CorrelatedGaussian(SCHEDULE, mean, covariance)
    data, x_T = torch.ones(4, 6), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    x_T[:, ~UNKNOWN] = 0.3

    def replace(i, t, x_0, x_s):
        return Changed(x_0=torch.where(UNKNOWN, x_0, data))

    def sample(denoiser, callback=None):
        noise = SampleNoise(range(4))
        return get_sampler(name).sample(
            *(denoiser, SCHEDULE, x_T, trailing(6)), randn_like=noise.randn_like, callback=callback
        )

    replaced = InpaintingDenoiser(denoiser, SCHEDULE, data, UNKNOWN, 0)
    assert torch.equal(sample(denoiser, replace), sample(replaced))


def test_a_changed_prediction_of_two_calls():
    """Heun's step is the mean of two slopes, and the first one is the callback's."""
    denoiser = GaussianDenoiser(SCHEDULE, 0.3, 0.5)
    seen = []
    get_sampler("heun").sample(
        *(denoiser, SCHEDULE, torch.ones(1, 1), [700, 300]),
        callback=lambda i, t, x_0, x_s: seen.append(x_s) or Changed(x_0=x_0 + 1 - i),
    )
    plain, slope = torch.cat(seen).flatten().tolist(), []
    get_sampler("heun").sample(
        *(denoiser, SCHEDULE, torch.ones(1, 1), [700, 300]),
        callback=lambda i, t, x_0, x_s: slope.append(x_s),
    )
    first = get_sampler("heun").plan(SCHEDULE, [700, 300]).calls[1].correct
    last = denoiser(slope[0] + first.a[1], torch.tensor([300]))
    assert plain[0] == float(slope[0])
    assert plain[1] == pytest.approx(float(last), abs=1e-6)


@pytest.mark.parametrize("name", available_samplers())
def test_a_callback_may_change_the_state(name):
    """Sampling continues from the changed state, also where the next call corrects a step."""
    denoiser, last = GaussianDenoiser(SCHEDULE, 0.3, 0.5), []

    def jump(i, t, x_0, x_s):
        last.append(x_s)
        return Changed(x_s=torch.full_like(x_s, 7.0)) if i == 2 else None

    def watched(x_t, t):
        states.append(float(x_t[0]))
        return denoiser(x_t, t)

    states = []
    x_0 = get_sampler(name).sample(watched, SCHEDULE, torch.ones(1, 1), trailing(3), callback=jump)
    assert float(x_0) == 7.0
    states.clear()
    get_sampler(name).sample(watched, SCHEDULE, torch.ones(1, 1), trailing(9), callback=jump)
    assert states.count(7.0) == 1


def test_a_changed_state_is_not_corrected():
    sampler = get_sampler("unipc")
    plan = sampler.plan(SCHEDULE, trailing(4))
    assert plan.calls[2].correct is not None
    state = sampler.begin(plan, torch.ones(1, 2))
    for _ in range(2):
        state = sampler.advance(plan, state, 0.1 * state.x_t)
    changed = sampler.change(plan, state, torch.full((1, 2), 3.0))
    ends = [sampler.advance(plan, s, torch.ones(1, 2)).x_t for s in (state, changed)]
    step = plan.calls[2].step
    history = step.a[0] + sum(a * x for a, x in zip(step.a[1:], state.x_0, strict=False))
    torch.testing.assert_close(ends[1], step.b * 3.0 + history, rtol=1e-5, atol=1e-5)
    assert not torch.equal(*ends)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (torch.ones(1, 2), "returned a Tensor: wanted None, or a zsnr.samplers.Changed"),
        (Changed(x_s=torch.ones(3)), r"changed x_s to the shape \(3,\): wanted \(1, 2"),
    ],
)
def test_what_a_callback_must_not_return(returned, words):
    with pytest.raises(ValueError, match=words):
        get_sampler("ddim").sample(
            *(GaussianDenoiser(SCHEDULE, 0.0, 1.0), SCHEDULE, torch.ones(1, 2), trailing(3)),
            callback=lambda *_: returned,
        )
