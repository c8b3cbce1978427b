import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr import NoiseSchedule, reverse_transition

pairs = st.tuples(st.integers(0, 998), st.integers(1, 999)).filter(lambda p: p[0] < p[1])


@given(pairs, st.booleans())
def test_eta_1_is_the_posterior_of_equations_20_and_9(pair, zero):
    (s, t), schedule = pair, NoiseSchedule(zero_terminal_snr=zero)
    abar_t, abar_s = schedule.alphas_cumprod[[t, s]].tolist()
    beta = 1 - abar_t / abar_s
    a, b, c = reverse_transition(*schedule(t), *schedule(s), 1.0)
    assert a == pytest.approx(math.sqrt(abar_s) * beta / (1 - abar_t), rel=1e-9, abs=1e-12)
    assert b == pytest.approx(
        math.sqrt(1 - beta) * (1 - abar_s) / (1 - abar_t), rel=1e-9, abs=1e-12
    )
    assert c**2 == pytest.approx(beta * (1 - abar_s) / (1 - abar_t), rel=1e-9, abs=1e-12)


@given(pairs, st.floats(0, 1), st.booleans())
def test_every_eta_is_equations_21_and_22(pair, eta, zero):
    (s, t), schedule = pair, NoiseSchedule(zero_terminal_snr=zero)
    abar_t, abar_s = schedule.alphas_cumprod[[t, s]].tolist()
    std = eta * math.sqrt((1 - abar_s) / (1 - abar_t)) * math.sqrt(1 - abar_t / abar_s)
    # x_s = sqrt(abar_s) x_0 + direction eps, eps = (x_t - sqrt(abar_t) x_0) / sigma_t
    direction = math.sqrt(max(0.0, 1 - abar_s - std**2))
    a, b, c = reverse_transition(*schedule(t), *schedule(s), eta)
    assert c == pytest.approx(std, rel=1e-9, abs=1e-12)
    assert b == pytest.approx(direction / math.sqrt(1 - abar_t), rel=1e-6, abs=1e-9)
    assert a == pytest.approx(
        math.sqrt(abar_s) - direction * math.sqrt(abar_t / (1 - abar_t)), rel=1e-6, abs=1e-9
    )


@given(pairs, st.floats(0, 1))
def test_marginal_is_kept(pair, eta):
    """From x_t = alpha_t x_0 + sigma_t eps the step gives alpha_s x_0 + sigma_s eps'."""
    (s, t), schedule = pair, NoiseSchedule()
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    a, b, c = reverse_transition(alpha_t, sigma_t, alpha_s, sigma_s, eta)
    assert a + b * alpha_t == pytest.approx(alpha_s, rel=1e-14)
    assert (b * sigma_t) ** 2 + c**2 == pytest.approx(sigma_s**2, rel=1e-12)


def test_ends():
    schedule = NoiseSchedule()
    alpha, sigma = schedule(400)
    assert reverse_transition(0.0, 1.0, alpha, sigma, 1.0) == (alpha, 0.0, sigma)
    assert reverse_transition(0.0, 1.0, alpha, sigma, 0.0) == (alpha, sigma, 0.0)
    for eta in (0.0, 0.3, 1.0):
        assert reverse_transition(*schedule(999), *schedule(-1), eta) == (1, 0, 0)
        assert reverse_transition(*schedule(0), *schedule(-1), eta) == (1, 0, 0)


def test_tensors_give_what_floats_give():
    schedule = NoiseSchedule()
    t, s = torch.arange(1, 1000), torch.arange(999)
    for eta in (0.0, 0.5, 1.0):
        got = reverse_transition(*schedule(t), *schedule(s), eta)
        each = [reverse_transition(*schedule(i), *schedule(i - 1), eta) for i in range(1, 1000)]
        wanted = torch.tensor(each, dtype=torch.float64).unbind(1)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-15)
            assert g.isfinite().all()


def test_wrong_input_is_refused():
    schedule = NoiseSchedule()
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="eta"):
            reverse_transition(*schedule(9), *schedule(8), eta)
    with pytest.raises(ValueError, match="less noise"):
        reverse_transition(*schedule(8), *schedule(9))
    with pytest.raises(ValueError, match="less noise"):
        reverse_transition(*schedule(-1), *schedule(-1))
