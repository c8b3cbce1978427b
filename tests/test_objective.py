"""The objective: its values by the formula, its optimum by a closed form, and its draws."""

import pytest
import torch

from zsnr import GaussianDenoiser, LossWeighting, NoiseSchedule, Objective, training_draws
from zsnr.noise import offset_noise
from zsnr.prediction import to_v

SCHEDULE = NoiseSchedule()


def batch(size=16, shape=(4, 8, 8)):
    x_0 = torch.randn(size, *shape, generator=torch.Generator().manual_seed(1))
    return x_0, training_draws(0, range(size), size, shape, SCHEDULE.num_timesteps)


@pytest.mark.parametrize("weighting", ["uniform", "snr_plus_one", "truncated_snr"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_losses_follow_the_formula(weighting, prediction_type, strength):
    x_0, draws = batch()
    seen = []

    def network(x_t, t, conditioning):
        seen.append((x_t, t, conditioning))
        return 0.5 * x_t

    objective = Objective(
        SCHEDULE, prediction_type, LossWeighting(weighting), offset_noise=strength
    )
    losses = objective(network, x_0, None, draws)
    [(x_t, t, conditioning)] = seen
    assert conditioning is None
    assert torch.equal(t, draws.t)
    eps = offset_noise(draws.eps, draws.d, strength).double()
    abar = SCHEDULE.alphas_cumprod[draws.t].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    torch.testing.assert_close(x_t.double(), noisy, rtol=0, atol=1e-6)
    target = x_0 if prediction_type == "sample" else abar.sqrt() * eps - (1 - abar).sqrt() * x_0
    snr = SCHEDULE.snr[draws.t]
    weight = {"uniform": 1, "snr_plus_one": snr + 1, "truncated_snr": snr.clamp(min=1)}[weighting]
    if weighting != "uniform" and prediction_type == "v_prediction":
        weight = weight / (snr + 1)
    expected = weight * (0.5 * noisy - target).square().mean((1, 2, 3))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("std", [0.1, 1.0])
def test_the_exact_network_has_the_least_loss(std):
    """For Gaussian data E||v - v*||^2 = s^2 / (alpha^2 s^2 + sigma^2) at every timestep."""
    shape, size = (1, 64, 64), 40
    exact = GaussianDenoiser(SCHEDULE, mean=-0.8, std=std)
    generator = torch.Generator().manual_seed(0)
    x_0 = -0.8 + std * torch.randn(size, *shape, generator=generator)
    draws = training_draws(3, range(size), size, shape, SCHEDULE.num_timesteps)

    def network(x_t, t, conditioning):
        return to_v(exact(x_t, t), x_t, *SCHEDULE(t), "sample")

    ours = Objective(SCHEDULE)(network, x_0, None, draws)
    abar = SCHEDULE.alphas_cumprod[draws.t]
    least = std**2 / (abar * std**2 + 1 - abar)
    torch.testing.assert_close(ours.double(), least, rtol=0.15, atol=0)
    assert abs((ours.double() / least).mean() - 1) < 0.02
    worse = Objective(SCHEDULE)(lambda *args: 0.9 * network(*args), x_0, None, draws)
    assert (worse > ours).float().mean() > 0.95


def test_a_batch_is_divided_without_a_trace():
    x_0, draws = batch()
    whole = Objective()(lambda x_t, t, c: x_t.tanh(), x_0, None, draws)
    halves = []
    for rows in (range(8), range(8, 16)):
        part = training_draws(0, rows, 16, x_0.shape[1:], SCHEDULE.num_timesteps)
        halves.append(Objective()(lambda x_t, t, c: x_t.tanh(), x_0[list(rows)], None, part))
    assert torch.equal(torch.cat(halves), whole)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (4, 3, 8, 8)])
def test_any_number_of_axes(shape):
    x_0, draws = batch(6, shape)
    assert Objective()(lambda x_t, t, c: x_t, x_0, None, draws).shape == (6,)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="epsilon"):
        Objective(SCHEDULE, "epsilon")
    with pytest.raises(ValueError, match="min_snr"):
        Objective(SCHEDULE, "v_prediction", LossWeighting("min_snr"))
