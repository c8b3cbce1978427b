import copy
import dataclasses
import json
import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr import NoiseSchedule, rescale_zero_terminal_snr, trailing

KINDS = ("linear", "scaled_linear", "cosine")


@pytest.mark.parametrize(
    ("betas", "snr", "root"),
    [
        ("linear", "4.035993e-05", "0.006353"),
        ("scaled_linear", "0.004682", "0.068265"),
        ("cosine", "2.428767e-09", "4.928252e-05"),
    ],
)
def test_original_schedules_end_at_the_papers_table_1(betas, snr, root):
    schedule = NoiseSchedule(betas, zero_terminal_snr=False)
    digits = "e" if "e" in snr else "f"
    assert f"{schedule.snr[-1]:.6{digits}}" == snr
    digits = "e" if "e" in root else "f"
    assert f"{schedule.alphas_cumprod[-1].sqrt():.6{digits}}" == root


@pytest.mark.peer
def test_cosine_in_float32_is_the_papers_row():
    from diffusers import DDPMScheduler

    abar = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert f"{abar[-1] / (1 - abar[-1]):.6e}" == "2.428735e-09"  # as printed in Table 1
    exact = NoiseSchedule("cosine", zero_terminal_snr=False).alphas_cumprod
    torch.testing.assert_close(abar.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("T", [2, 10, 999, 1000])
@pytest.mark.parametrize("betas", KINDS)
def test_zero_terminal_snr(betas, T):
    schedule, original = (NoiseSchedule(betas, T, zero_terminal_snr=z) for z in (True, False))
    abar = schedule.alphas_cumprod
    assert abar.dtype == torch.float64
    assert abar.shape == (T,)
    assert abar[-1] == 0
    assert abar[0] == original.alphas_cumprod[0]
    assert (abar.diff() < 0).all()
    assert schedule.snr[-1] == 0
    assert schedule.log_snr[-1] == -math.inf
    assert schedule.beta_table[-1] == 1
    assert original.alphas_cumprod[-1] > 0


@pytest.mark.parametrize("betas", ["linear", "scaled_linear"])
def test_rescale_keeps_the_curve_in_sqrt_space(betas):
    original = NoiseSchedule(betas, zero_terminal_snr=False).alphas_cumprod
    s, scaled = original.sqrt(), NoiseSchedule(betas).alphas_cumprod.sqrt()
    expected = (s - s[-1]) * s[0] / (s[0] - s[-1])
    torch.testing.assert_close(scaled, expected, rtol=1e-13, atol=1e-16)


def test_cosine_drops_its_cap_instead_of_a_rescale():
    free, capped = (NoiseSchedule("cosine", zero_terminal_snr=z) for z in (True, False))
    torch.testing.assert_close(
        free.alphas_cumprod[:-1], capped.alphas_cumprod[:-1], rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("betas", KINDS)
def test_betas_to_cumprod_round_trip(betas, zero):
    schedule = NoiseSchedule(betas, zero_terminal_snr=zero)
    again = (1 - schedule.beta_table).cumprod(0)
    torch.testing.assert_close(again, schedule.alphas_cumprod, rtol=1e-10, atol=0)


def test_linear_betas_are_the_definition():
    schedule = NoiseSchedule("linear", zero_terminal_snr=False)
    expected = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.beta_table, expected, rtol=1e-10, atol=0)


def tables(min_size=2):
    return (
        st.lists(st.floats(1e-6, 1 - 1e-6), min_size=min_size, max_size=50, unique=True)
        .map(lambda xs: sorted(xs, reverse=True))
        .filter(lambda xs: all(a - b > 1e-9 for a, b in pairwise(xs)))
    )


@given(tables())
def test_rescale_of_any_table(table):
    abar = torch.tensor(table, dtype=torch.float64)
    kept = abar.clone()
    once = rescale_zero_terminal_snr(abar)
    assert torch.equal(abar, kept)
    assert once[0] == abar[0]
    assert once[-1] == 0
    assert (once.diff() < 0).all()
    assert torch.equal(rescale_zero_terminal_snr(once), once)
    slope = once.sqrt().diff() / abar.sqrt().diff()
    torch.testing.assert_close(slope, slope[:1].expand_as(slope), rtol=1e-4, atol=0)


@given(tables(), st.booleans())
def test_own_table(table, zero):
    schedule = NoiseSchedule.from_alphas_cumprod(torch.tensor(table, dtype=torch.float64), zero)
    expected = torch.tensor(table, dtype=torch.float64)
    if zero:
        expected = rescale_zero_terminal_snr(expected)
    assert torch.equal(schedule.alphas_cumprod, expected)
    again = NoiseSchedule(**json.loads(json.dumps(schedule.settings())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)


def test_default_is_the_papers():
    assert NoiseSchedule().settings() == {
        "betas": "scaled_linear",
        "num_timesteps": 1000,
        "beta_start": None,
        "beta_end": None,
        "zero_terminal_snr": True,
        "alphas_cumprod_table": None,
    }


def test_settings_go_through_a_weights_only_checkpoint(tmp_path):
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1])
    torch.save(schedule.settings(), tmp_path / "schedule.pt")
    again = NoiseSchedule(**torch.load(tmp_path / "schedule.pt", weights_only=True))
    assert again == schedule


def test_tables_are_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        schedule = NoiseSchedule()
        rescaled = rescale_zero_terminal_snr(NoiseSchedule(zero_terminal_snr=False).alphas_cumprod)
        grid = trailing(5)
    assert schedule.alphas_cumprod.device.type == rescaled.device.type == grid.device.type == "cpu"


@given(st.integers(1, 4), st.floats(0.5, 0.999), st.floats(1e-4, 0.4))
def test_a_rescale_never_returns_a_table_that_does_not_decrease(ulps, first, last):
    second = first
    for _ in range(ulps):
        second = math.nextafter(second, 0)
    try:
        rescaled = rescale_zero_terminal_snr(torch.tensor([first, second, last]).double())
    except ValueError as error:
        assert "decrease" in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert (rescaled.diff() < 0).all()


def test_value_semantics():
    schedule = NoiseSchedule("linear")
    assert schedule == NoiseSchedule("linear") != NoiseSchedule("cosine")
    assert dataclasses.replace(schedule, betas="cosine") == NoiseSchedule("cosine")
    for again in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert again == schedule
        assert torch.equal(again.alphas_cumprod, schedule.alphas_cumprod)
    assert "tensor" not in repr(schedule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.betas = "cosine"


@pytest.mark.parametrize("betas", KINDS)
def test_scales(betas):
    schedule = NoiseSchedule(betas)
    t = torch.tensor([[0, 1, 500], [998, 999, -1]])
    alpha, sigma = schedule(t)
    assert alpha.shape == sigma.shape == t.shape
    assert alpha.dtype == sigma.dtype == torch.float64
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(2, 3).double(), rtol=1e-15, atol=0)
    assert (alpha[1, 1], sigma[1, 1]) == (0, 1)
    assert (alpha[1, 2], sigma[1, 2]) == (1, 0)
    for index in t.flatten().tolist():
        scales = (float(a[t == index]) for a in (alpha, sigma))
        assert schedule(index) == tuple(scales)
    assert torch.equal(alpha[0] ** 2, schedule.alphas_cumprod.sqrt()[t[0]] ** 2)


@pytest.mark.parametrize("t", [-2, 1000])
def test_timesteps_out_of_range_are_refused(t):
    for wrong in (t, torch.tensor([0, t])):
        with pytest.raises(IndexError, match=r"wanted -1 \(clean data\) to 999"):
            NoiseSchedule()(wrong)


@pytest.mark.parametrize(
    "t", [0.5, True, torch.tensor([0.5]), "0", torch.tensor([5], dtype=torch.uint8)]
)
def test_timesteps_are_integers(t):
    with pytest.raises(TypeError, match="wanted"):
        NoiseSchedule()(t)


def test_add_noise():
    schedule = NoiseSchedule()
    x_0, eps = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    x_t = schedule.add_noise(x_0, eps, torch.tensor([0, 500, 999]))
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t[2], eps[2])
    alpha, sigma = schedule(500)
    torch.testing.assert_close(x_t[1], alpha * x_0[1] + sigma * eps[1])


def test_add_noise_refuses_what_would_broadcast():
    x_0 = torch.ones(4, 3, 4, 4)
    with pytest.raises(ValueError, match="equal shapes"):
        NoiseSchedule().add_noise(x_0, x_0[:1], torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="one number per sample"):
        NoiseSchedule().add_noise(x_0, x_0, torch.zeros(4, 1, dtype=torch.int64))


def test_half_precision_data_keeps_its_noise_at_the_first_step():
    x_t = NoiseSchedule().add_noise(
        torch.zeros(1, 8, dtype=torch.bfloat16),
        torch.ones(1, 8, dtype=torch.bfloat16),
        torch.tensor([0]),
    )
    torch.testing.assert_close(x_t, torch.full((1, 8), math.sqrt(0.00085)), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_timesteps": 1}, "wanted an int, 2 to 100000"),
        ({"num_timesteps": 10.0}, "wanted an int"),
        ({"num_timesteps": True}, "wanted an int"),
        ({"zero_terminal_snr": "false"}, "wanted True or False"),
        ({"beta_start": "0.1"}, "beta_start='0.1'"),
        ({"betas": ["linear"]}, "is unknown"),
        ({"betas": "sigmoid"}, "Known: 'linear', 'cosine', 'scaled_linear'"),
        ({"beta_start": 0.0}, "beta_start=0.0"),
        ({"beta_end": 1.0}, "beta_end=1.0"),
        ({"beta_end": math.nan}, "beta_end=nan"),
        ({"beta_start": -0.1}, "beta_start=-0.1"),
        ({"betas": "cosine", "beta_start": 0.1}, "leave both None"),
        ({"betas": "linear", "beta_end": 0.999}, "does not decrease"),
        ({"alphas_cumprod_table": (0.9, 0.5)}, "set num_timesteps=2"),
        ({"alphas_cumprod_table": (0.9, 0.5), "num_timesteps": 2, "betas": "linear"}, "replaces"),
        ({"alphas_cumprod_table": (0.9, 0.5), "num_timesteps": 2, "beta_end": 0.1}, "replaces"),
        ({"alphas_cumprod_table": (0.5, 0.5), "num_timesteps": 2}, "does not decrease at t=1"),
        ({"alphas_cumprod_table": (1.0, 0.5), "num_timesteps": 2}, "below 1"),
        ({"alphas_cumprod_table": (0.5, -0.1), "num_timesteps": 2}, "none negative"),
        ({"alphas_cumprod_table": (0.5, math.nan), "num_timesteps": 2}, "not finite"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        NoiseSchedule(**settings)


@pytest.mark.parametrize("table", [torch.ones(2, 2), torch.tensor([0.5]), torch.tensor([0.1, 0.5])])
def test_wrong_tables_are_refused(table):
    with pytest.raises(ValueError, match="wanted"):
        NoiseSchedule.from_alphas_cumprod(table)
    with pytest.raises(ValueError, match="wanted"):
        rescale_zero_terminal_snr(table)
