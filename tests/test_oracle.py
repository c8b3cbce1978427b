import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsnr import (
    DDIM,
    EmpiricalDenoiser,
    GaussianDenoiser,
    Guidance,
    NoiseSchedule,
    get_timesteps,
    to_v,
    to_x0,
)
from zsnr.oracle import _rows_matmul

SCHEDULE = NoiseSchedule()


@pytest.mark.parametrize("t", [0, 300, 700, 998, 999])
def test_gaussian_is_the_posterior_mean_by_quadrature(t):
    m, s = -0.8, 0.5
    alpha, sigma = SCHEDULE(t)
    x = torch.linspace(m - 8 * s, m + 8 * s, 200_001, dtype=torch.float64)
    for x_t in (-1.0, 0.3, 2.0):
        log_w = -((x - m) ** 2) / (2 * s**2) - (x_t - alpha * x) ** 2 / (2 * sigma**2)
        wanted = (log_w.softmax(0) * x).sum()
        got = GaussianDenoiser(SCHEDULE, m, s)(torch.tensor([[x_t]]).double(), torch.tensor([t]))
        torch.testing.assert_close(got[0, 0], wanted, rtol=1e-6, atol=1e-6)


def test_gaussian_takes_tensors_and_keeps_the_dtype():
    mean, std = torch.randn(3, 1, 1, dtype=torch.float64), torch.rand(3, 1, 1).double()
    x = torch.randn(2, 3, 4, 4)
    x_0 = GaussianDenoiser(SCHEDULE, mean, std)(x, torch.tensor([999, 5]))
    assert x_0.dtype == torch.float32
    torch.testing.assert_close(x_0[0], mean.float().expand(3, 4, 4))


@pytest.mark.parametrize("t", [0, 100, 600, 900, 999])
def test_empirical_is_the_softmax_by_distance(t):
    images = torch.randn(7, 2, 3, dtype=torch.float64)
    x_t = torch.randn(4, 2, 3, dtype=torch.float64)
    alpha, sigma = SCHEDULE(t)
    distance = (x_t[:, None] - alpha * images[None]).square().sum((2, 3))
    weights = (-distance / (2 * sigma**2)).softmax(1)
    wanted = torch.einsum("bn,nij->bij", weights, images)
    got = EmpiricalDenoiser(SCHEDULE, images)(x_t, torch.full((4,), t))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_empirical_says_the_mean_at_the_last_step():
    images = torch.rand(9, 3, 4, 4)
    x_0 = EmpiricalDenoiser(SCHEDULE, images)(torch.randn(5, 3, 4, 4), torch.full((5,), 999))
    torch.testing.assert_close(x_0, images.mean(0).expand(5, 3, 4, 4))


def test_empirical_ends_on_members_of_the_data_set():
    images = torch.rand(20, 3, 8, 8) * 2 - 1
    denoiser = EmpiricalDenoiser(SCHEDULE, images)
    grid = get_timesteps("trailing", 50)
    x_0 = DDIM().sample(denoiser, SCHEDULE, torch.randn(6, 3, 8, 8), grid)
    nearest = (x_0[:, None] - images[None]).flatten(2).norm(dim=2).min(1).values
    assert nearest.max() < 1e-3


@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from([1, 3, 48, 192, 3072]), st.data())
@settings(max_examples=40)
def test_rows_do_not_depend_on_their_neighbours(rows, N, D, data):
    generator = torch.Generator().manual_seed(rows * N + D)
    matrix = torch.randn(N, D, generator=generator, dtype=torch.float64)
    for m in (matrix, matrix.T):
        x = torch.randn(rows, len(m), generator=generator, dtype=torch.float64)
        together = _rows_matmul(x, m)
        torch.testing.assert_close(together, x @ m)
        order = torch.tensor(data.draw(st.permutations(range(rows))))
        assert torch.equal(_rows_matmul(x[order], m), together[order])
        assert torch.equal(_rows_matmul(x[-1:], m), together[-1:])


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="no images"):
        EmpiricalDenoiser(SCHEDULE, torch.empty(0, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\(3, 4, 4\).*\(3, 8, 8\)"):
        EmpiricalDenoiser(SCHEDULE, torch.ones(2, 3, 8, 8))(
            torch.ones(1, 3, 4, 4), torch.tensor([5])
        )


@pytest.mark.parametrize("t", [0, 100, 600, 998, 999])
@pytest.mark.parametrize("std", [0.3, (0.1, 0.2, 0.4, 0.8, 1.6)])
def test_a_mixture_of_gaussians_is_the_posterior_mean_by_quadrature(t, std):
    """One number a sample: the integral over x_0 of the mixture's density."""
    members = torch.tensor([-1.0, -0.4, 0.1, 0.9, 1.0], dtype=torch.float64)
    s = torch.as_tensor(std, dtype=torch.float64).expand(5)
    alpha, sigma = SCHEDULE(t)
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = (-((x - members[:, None]) ** 2) / (2 * s[:, None] ** 2)).exp() / s[:, None]
    oracle = EmpiricalDenoiser(SCHEDULE, members[:, None], std=torch.as_tensor(std))
    for x_t in (-1.0, 0.3, 2.0):
        weights = density.sum(0) * (-((x_t - alpha * x) ** 2) / (2 * sigma**2)).exp()
        got = oracle(torch.tensor([[x_t]]).double(), torch.tensor([t]))
        wanted = (weights * x).sum() / weights.sum()
        torch.testing.assert_close(got[0, 0], wanted, rtol=1e-6, atol=1e-6)


def test_one_member_with_a_spread_is_the_gaussian():
    x_t, t = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 10, 300, 700, 998, 999])
    member = torch.full((1, 4), -0.8, dtype=torch.float64)
    got = EmpiricalDenoiser(SCHEDULE, member, std=0.5)(x_t, t)
    torch.testing.assert_close(got, GaussianDenoiser(SCHEDULE, -0.8, 0.5)(x_t, t))


@pytest.mark.parametrize("std", [0.0, 0.4])
def test_a_class_is_the_oracle_of_its_members(std):
    images = torch.randn(9, 2, 3, dtype=torch.float64)
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 0])
    x_t, t = torch.randn(4, 2, 3, dtype=torch.float64), torch.tensor([5, 300, 998, 999])
    oracle = EmpiricalDenoiser(SCHEDULE, images, classes=classes, std=std)
    assert oracle.num_classes == 3
    for k in range(3):
        alone = EmpiricalDenoiser(SCHEDULE, images[classes == k], std=std)
        torch.testing.assert_close(oracle(x_t, t, torch.full((4,), k)), alone(x_t, t))
    every = EmpiricalDenoiser(SCHEDULE, images, std=std)(x_t, t)
    assert torch.equal(oracle(x_t, t), every)
    assert torch.equal(oracle(x_t, t, torch.full((4,), -1)), every)


def test_all_classes_are_the_posterior_average_of_each():
    """D(x_t) = sum_c p(c | x_t) D_c(x_t), with x_t in the place of smoothed clean data."""
    images, classes = torch.randn(8, 5, dtype=torch.float64), torch.tensor([0, 1] * 4)
    oracle = EmpiricalDenoiser(SCHEDULE, images, classes=classes, std=0.2)
    t, (alpha, _) = 400, SCHEDULE(400)
    x_t = torch.randn(6, 5, dtype=torch.float64)
    p = oracle.posterior(x_t / alpha, t)
    torch.testing.assert_close(p.sum(1), torch.ones(6, dtype=torch.float64))
    rows = torch.full((6,), t)
    each = torch.stack([oracle(x_t, rows, torch.full((6,), k)) for k in (0, 1)], 1)
    torch.testing.assert_close((p[:, :, None] * each).sum(1), oracle(x_t, rows))


def test_the_posterior_of_clean_gaussians_is_bayes_rule():
    means = torch.tensor([[-1.0], [0.5]], dtype=torch.float64)
    oracle = EmpiricalDenoiser(SCHEDULE, means, classes=torch.tensor([0, 1]), std=0.5)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    likelihood = (-((x - means.T) ** 2) / (2 * 0.25)).exp()
    wanted = likelihood / likelihood.sum(1, keepdim=True)
    torch.testing.assert_close(oracle.posterior(x, -1), wanted)


def test_guided_is_guidance_on_the_exact_v():
    images, classes = torch.randn(8, 5, dtype=torch.float64), torch.tensor([0, 1] * 4)
    oracle = EmpiricalDenoiser(SCHEDULE, images, classes=classes)
    x_t, t, of = torch.randn(3, 5, dtype=torch.float64), torch.tensor([7, 500, 999]), classes[:3]
    scales = [scale.view(-1, 1) for scale in SCHEDULE(t)]
    cond, uncond = (to_v(oracle(x_t, t, c), x_t, *scales, "sample") for c in (of, None))
    for guidance in (Guidance(7.5, 0.7), Guidance(3.0, 0.0)):
        wanted = to_x0(guidance(cond, uncond), x_t, *scales, "v_prediction")
        torch.testing.assert_close(oracle.guided(of, guidance)(x_t, t), wanted)
    torch.testing.assert_close(oracle.guided(of, None)(x_t, t), oracle(x_t, t, of))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": torch.tensor([0.0, 1.0])}, "wanted integers"),
        ({"classes": torch.tensor([0])}, "wanted integers"),
        ({"classes": torch.tensor([0, 2])}, "a member of each"),
        ({"std": torch.tensor([0.1, 0.2, 0.3])}, "wanted a number"),
    ],
)
def test_classes_and_spreads_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        EmpiricalDenoiser(SCHEDULE, torch.randn(2, 3), **options)


def test_what_has_no_class_has_no_posterior():
    images, x = torch.randn(4, 3), torch.randn(2, 3)
    plain = EmpiricalDenoiser(SCHEDULE, images)
    classed = EmpiricalDenoiser(SCHEDULE, images, classes=torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="pass classes="):
        plain.posterior(x, 100)
    for t in (-1, 999):
        with pytest.raises(ValueError, match="signal and noise"):
            classed.posterior(x, t)
    with pytest.raises(ValueError, match="-1 to 1"):
        classed(x, torch.tensor([5, 5]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="-1 to -1"):
        plain(x, torch.tensor([5, 5]), torch.tensor([0, 0]))
