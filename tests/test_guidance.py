import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr import Guidance, NoiseSchedule, classifier_free_guidance, rescale_guidance

POS, NEG = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))


@given(st.floats(-3, 20), st.floats(0, 1))
def test_against_equations_13_to_16_a_sample_at_a_time(w, phi):
    got = Guidance(w, phi)(POS.double(), NEG.double())
    for i in range(3):
        pos, neg = POS[i].double(), NEG[i].double()
        cfg = neg + w * (pos - neg)
        rescaled = cfg * pos.std() / cfg.std()
        wanted = phi * rescaled + (1 - phi) * cfg
        torch.testing.assert_close(got[i], wanted, rtol=1e-11, atol=1e-11)


def test_ends_of_the_scale():
    torch.testing.assert_close(classifier_free_guidance(POS, NEG, 1.0), POS)
    assert torch.equal(classifier_free_guidance(POS, NEG, 0.0), NEG)
    assert torch.equal(rescale_guidance(NEG, POS, 0.0), NEG)


def test_full_rescale_has_the_conditional_spread():
    full = Guidance(7.5, 1.0)(POS, NEG)
    torch.testing.assert_close(full.flatten(1).std(1), POS.flatten(1).std(1))


def test_defaults_are_the_papers():
    assert Guidance() == Guidance(scale=7.5, rescale=0.7)


@pytest.mark.parametrize("value", [0.5, 0.1, 0.3, -0.8])  # the last three are not exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", ["guided", "cond", "both"])
def test_zero_std_is_finite_with_finite_gradients(constant, dtype, value):
    flat = torch.full((2, 4, 64, 64), value, dtype=dtype)
    noisy = torch.randn(2, 4, 64, 64, dtype=dtype)
    guided = (flat if constant in ("guided", "both") else noisy).clone().requires_grad_()
    cond = (flat if constant in ("cond", "both") else noisy).clone().requires_grad_()
    out = rescale_guidance(guided, cond, 0.7)
    if constant != "cond":
        assert torch.equal(out, guided)
    else:
        torch.testing.assert_close(out, 0.3 * guided)
    out.square().sum().backward()
    assert guided.grad.isfinite().all()
    assert cond.grad.isfinite().all()


def test_one_constant_sample_leaves_its_neighbours_alone():
    guided = POS.clone()
    guided[1] = 2.0
    out = rescale_guidance(guided, NEG, 0.7)
    assert torch.equal(out[1], guided[1])
    alone = rescale_guidance(guided[:1], NEG[:1], 0.7)
    torch.testing.assert_close(out[:1], alone, rtol=0, atol=0)


def test_gradients():
    pos, neg = (
        x.double().clone().requires_grad_() for x in (POS[:, :1, :2, :2], NEG[:, :1, :2, :2])
    )
    assert torch.autograd.gradcheck(Guidance(7.5, 0.7), (pos, neg))


def test_half_precision_does_not_overflow():
    big = (POS * 300).half()
    out = rescale_guidance(big, big / 2, 1.0)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, big / 2, rtol=2e-3, atol=0)


def test_flat_outputs_are_guided_without_rescale():
    cond, uncond = (torch.full((1, 4, 64, 64), value) for value in (0.3, 0.1))
    torch.testing.assert_close(Guidance()(cond, uncond), torch.full((1, 4, 64, 64), 1.6))


def test_the_interval_is_of_noise_levels():
    schedule = NoiseSchedule()
    t = torch.arange(1000)
    alpha, sigma = schedule(t)
    level = sigma / alpha
    assert Guidance().acts(alpha, sigma) is True
    for low, high in ((0.3, 5.0), (0.0, 1.0), (2.0, math.inf)):
        guidance = Guidance(interval=(low, high))
        wanted = (level > low) & (level <= high)
        assert torch.equal(guidance.acts(alpha, sigma), wanted)
        assert [guidance.acts(*schedule(int(i))) for i in t] == wanted.tolist()
    assert not Guidance(interval=(0.3, 5.0)).acts(*schedule(999))  # SNR 0 is an infinite level
    assert Guidance(interval=(0.3, math.inf)).acts(*schedule(999))
    assert Guidance(interval=[0.3, 5]) == Guidance(interval=(0.3, 5.0))


@pytest.mark.parametrize(
    "interval",
    [
        (5.0, 0.3),
        (1.0, 1.0),
        (-1.0, 2.0),
        (math.nan, 1.0),
        (1.0,),
        ("a", "b"),
        3,
        "ab",
        (True, 2.0),
        (0.3, None),
    ],
)
def test_wrong_intervals_are_refused(interval):
    with pytest.raises(ValueError, match="Guidance interval"):
        Guidance(interval=interval)


@pytest.mark.parametrize(
    ("scale", "rescale"), [(math.nan, 0.7), (math.inf, 0.7), (7.5, -0.1), (7.5, 1.1)]
)
def test_wrong_settings_are_refused(scale, rescale):
    with pytest.raises(ValueError, match="wanted a"):
        Guidance(scale, rescale)
