"""A network of one schedule, used on another."""

import warnings

import pytest
import torch

from zsnr import (
    DDIM,
    ConvertedNetwork,
    Denoiser,
    GaussianDenoiser,
    NoiseSchedule,
    RectifiedFlow,
    trailing,
)
from zsnr.prediction import converted

ZERO = NoiseSchedule()
PLAIN = NoiseSchedule(zero_terminal_snr=False)
FLOW = RectifiedFlow(shift=3.0)
MEAN, STD = -0.8, 0.5


class Exact(torch.nn.Module):
    """The optimal network of Gaussian data, between timesteps too, in the angle of its schedule."""

    def __init__(self, schedule, prediction_type):
        super().__init__()
        self.schedule, self.prediction_type, self.told = schedule, prediction_type, []

    def forward(self, x_t, time, conditioning):
        self.told.append(time)
        t = torch.arange(-1, self.schedule.num_timesteps)
        alpha, sigma = self.schedule(t)
        angles, sizes = torch.atan2(sigma, alpha), torch.hypot(alpha, sigma)
        times = self.schedule.time(t).double()
        i = torch.searchsorted(times, time.double()).clamp(1, len(t) - 1)
        share = (time.double() - times[i - 1]) / (times[i] - times[i - 1])
        angle, size = (torch.lerp(v[i - 1], v[i], share) for v in (angles, sizes))
        alpha, sigma = (size * angle.cos()).view(-1, 1), (size * angle.sin()).view(-1, 1)
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x_0 = MEAN + gain * (x_t - alpha * MEAN)
        return converted(x_0, x_t, alpha, sigma, "sample", self.prediction_type)


@pytest.mark.parametrize("own_type", ["v_prediction", "sample", "flow"])
@pytest.mark.parametrize("wanted_type", ["v_prediction", "sample", "flow"])
@pytest.mark.parametrize(
    ("own", "schedule"),
    [(ZERO, FLOW), (FLOW, ZERO), (ZERO, RectifiedFlow()), (NoiseSchedule("cosine"), FLOW)],
)
def test_x0_is_the_same_at_every_level(own, schedule, own_type, wanted_type):
    network = ConvertedNetwork(Exact(own, own_type), own, own_type, schedule, wanted_type)
    assert network.missing is None
    t = torch.arange(1000)
    x_0, eps = torch.randn(2, 1000, 1, generator=torch.Generator().manual_seed(0)).double()
    x_t = schedule.add_noise(x_0, eps, t)
    found = Denoiser(network, schedule, wanted_type, dtype=torch.float64)(x_t, t)
    wanted = GaussianDenoiser(schedule, MEAN, STD)(x_t, t)
    seen = schedule.snr <= own.snr[0]  # below its first level, the network is told that level
    torch.testing.assert_close(found[seen], wanted[seen], rtol=0, atol=1e-6)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.03)
    assert seen[-1]


def test_there_and_back_is_the_network_itself():
    there = ConvertedNetwork(Exact(ZERO, "v_prediction"), ZERO, "v_prediction", FLOW, "flow")
    back = ConvertedNetwork(there, FLOW, "flow", ZERO, "v_prediction")
    t = torch.tensor([999])  # a level that both have
    x = torch.randn(1, 4, dtype=torch.float64)
    torch.testing.assert_close(
        back(x, t, None), Exact(ZERO, "v_prediction")(x, t, None), rtol=0, atol=1e-9
    )


def test_on_its_own_schedule_it_is_asked_at_its_own_timesteps():
    exact = Exact(ZERO, "v_prediction")
    network = ConvertedNetwork(exact, ZERO, "v_prediction", ZERO, "v_prediction")
    t, x = torch.arange(1000), torch.randn(1000, 2, dtype=torch.float64)
    torch.testing.assert_close(network(x, t, None), exact(x, t, None), rtol=0, atol=1e-12)
    assert exact.told[0].equal(t.float())


def test_what_a_network_has_not_learned_is_said():
    with pytest.warns(UserWarning, match=r"trained down to SNR 0\.0047.*t=829 to 999.*medium"):
        network = ConvertedNetwork(Exact(PLAIN, "epsilon"), PLAIN, "epsilon", FLOW, "flow")
    assert network.missing is not None
    x_T = torch.zeros(1, 1, dtype=torch.float64)
    denoiser = Denoiser(network, FLOW, "flow", dtype=torch.float64)
    x_0 = DDIM().sample(denoiser, FLOW, x_T, trailing(50))
    wanted = GaussianDenoiser(PLAIN, MEAN, STD)(x_T, torch.tensor([999]))
    assert denoiser(x_T, torch.tensor([999])).item() == pytest.approx(wanted.item(), abs=1e-9)
    assert MEAN < x_0.item() < MEAN + 0.1


def test_a_time_that_does_not_increase_is_refused():
    class Backward(RectifiedFlow):
        def time(self, t):
            return 1000 - super().time(t)

    for own, schedule in ((Backward(), ZERO), (ZERO, Backward())):
        with pytest.raises(ValueError, match="its time does not increase from t=-1 to t=999"):
            ConvertedNetwork(Exact(ZERO, "sample"), own, "sample", schedule, "sample")


def test_its_parameters_are_the_networks_and_train():
    network = torch.nn.Linear(2, 2)
    whole = ConvertedNetwork(lambda x, t, c: network(x), ZERO, "v_prediction", FLOW, "flow")
    whole(torch.randn(3, 2), FLOW.time(torch.tensor([0, 500, 999])), None).sum().backward()
    assert network.weight.grad.abs().sum() > 0
    with warnings.catch_warnings(action="error"), pytest.raises(ValueError, match="no x_0"):
        ConvertedNetwork(network, ZERO, "epsilon", FLOW, "flow")
