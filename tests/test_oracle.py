import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsnr import DDIM, EmpiricalDenoiser, GaussianDenoiser, NoiseSchedule, get_timesteps
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
