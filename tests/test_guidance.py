import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr import (
    Guidance,
    NoiseSchedule,
    adaptive_projected_guidance,
    classifier_free_guidance,
    dynamic_threshold,
    rescale_guidance,
    reverse_transition,
    zero_star_guidance,
)

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


# --- where and how strongly ---------------------------------------------------------------------


def test_a_curve_is_linear_between_its_knots_and_constant_beyond():
    schedule = NoiseSchedule()
    guidance = Guidance(curve=[[-6, 1.0], [0, 7.5], [3, 2.0]])
    assert guidance.curve == ((-6, 1.0), (0, 7.5), (3, 2.0))
    t = torch.arange(-1, 1000)
    wanted = np.interp(schedule.log_snr.numpy(), [-6, 0, 3], [1.0, 7.5, 2.0])
    wanted = torch.tensor([2.0, *wanted], dtype=torch.float64)  # clean data has infinite SNR
    torch.testing.assert_close(guidance.scales_at(*schedule(t)), wanted, rtol=0, atol=1e-12)
    alone = torch.tensor([guidance.scale_at(*schedule(int(i))) for i in t], dtype=torch.float64)
    torch.testing.assert_close(alone, wanted, rtol=0, atol=1e-12)
    assert guidance.scale_at(*schedule(999)) == 1  # SNR 0 takes the first knot's, exactly
    half = 0.5**0.5
    assert guidance.scale_at(half, half) == 7.5
    assert Guidance(curve=((0.0, 3.0),)).scale_at(*schedule(500)) == 3.0
    hash(guidance)


def test_at_one_noise_level_a_curve_is_a_scale():
    guidance = Guidance(rescale=0.7, curve=((-1.0, 3.0), (2.0, 3.0)))
    assert torch.equal(guidance(POS, NEG, guidance.scale_at(0.6, 0.8)), Guidance(3.0)(POS, NEG))
    with pytest.raises(ValueError, match="a curve needs a noise level"):
        guidance(POS, NEG)


def test_rows_have_their_own_scale():
    for method in ("cfg", "apg", "cfg_zero_star"):
        guidance = Guidance(rescale=0.7, method=method)
        scales = torch.tensor([1.0, 3.0, 7.5], dtype=torch.float64)
        got = guidance(POS, NEG, scales)
        assert got.dtype == torch.float32
        assert torch.equal(got[0], POS[0])
        for i, w in enumerate((3.0, 7.5), start=1):
            torch.testing.assert_close(got[i], guidance(POS, NEG, w)[i])


def test_the_timestep_of_snr_0_may_be_left_alone():
    schedule = NoiseSchedule()
    guidance = Guidance(at_zero_snr=False)
    assert guidance.scale_at(*schedule(999)) == 1
    assert guidance.scale_at(*schedule(998)) == 7.5
    rows = guidance.scales_at(*schedule(torch.tensor([999, 998, 0])))
    assert rows.tolist() == [1, 7.5, 7.5]
    both = Guidance(interval=(0.3, math.inf), at_zero_snr=False, curve=((0.0, 2.0),))
    assert [both.scale_at(*schedule(t)) for t in (999, 998, 0)] == [1, 2, 1]
    assert both.scales_at(*schedule(torch.tensor([999, 998, 0]))).tolist() == [1, 2, 1]
    original = NoiseSchedule(zero_terminal_snr=False)  # which has none
    assert guidance.scale_at(*original(999)) == 7.5
    assert Guidance().scales_at(*schedule(torch.tensor([999, 0]))) == 7.5


def test_whether_anything_is_guided():
    assert Guidance().guides
    assert not Guidance(1.0).guides
    assert not Guidance(1).guides
    assert not Guidance(curve=((0.0, 1.0), (1.0, 1.0))).guides
    assert Guidance(1.0, curve=((0.0, 1.0), (1.0, 2.0))).guides
    assert Guidance(1.0, 0.0, method="cfg_pp").guides


def test_cfg_pp_is_lambda_at_the_ends():
    schedule = NoiseSchedule()
    guidance = Guidance(0.6, 0.0, method="cfg_pp")
    assert guidance.scale_at(*schedule(999), *schedule(500)) == 0.6  # from SNR 0
    assert guidance.scale_at(*schedule(500), *schedule(-1)) == 0.6  # to clean data
    assert guidance.scale_at(*schedule(999), *schedule(-1)) == 0.6
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(500), schedule(480)
    a, _, _ = reverse_transition(alpha_t, sigma_t, alpha_s, sigma_s)
    assert guidance.scale_at(alpha_t, sigma_t, alpha_s, sigma_s) == pytest.approx(
        0.6 * alpha_s / a, rel=1e-12
    )
    curve = Guidance(rescale=0, method="cfg_pp", curve=((-6, 0.2), (6, 0.8)), at_zero_snr=False)
    assert curve.scale_at(*schedule(999), *schedule(500)) == 1.0
    assert curve.scale_at(*schedule(0), *schedule(-1)) == 0.8
    for at_s in ((), (alpha_t, sigma_t), schedule(700)):
        with pytest.raises(ValueError, match="'cfg_pp' (needs the next timestep|has no scale)"):
            guidance.scale_at(alpha_t, sigma_t, *at_s)
    for missing in (lambda: guidance(POS, NEG), lambda: guidance.scales_at(POS, NEG)):
        with pytest.raises(ValueError, match="needs the next timestep"):
            missing()


# --- methods ------------------------------------------------------------------------------------


@given(st.floats(-3, 20), st.floats(-1, 2), st.none() | st.floats(0.1, 30))
def test_apg_is_its_formula_a_sample_at_a_time(w, eta, r):
    got = adaptive_projected_guidance(POS.double(), NEG.double(), w, eta, r)
    for i in range(3):
        c, u = POS[i].double().flatten(), NEG[i].double().flatten()
        d = c - u
        if r is not None:
            d = d * min(1.0, r / float(d.norm()))
        parallel = (d @ c) / (c @ c) * c
        wanted = c + (w - 1) * (d - parallel + eta * parallel)
        torch.testing.assert_close(got[i].flatten(), wanted, rtol=1e-11, atol=1e-11)
        assert abs(float((d - parallel) @ c)) < 1e-9


def test_apg_with_all_of_the_parallel_part_is_plain_guidance():
    apg = Guidance(5.0, 0.7, method="apg", apg_parallel=1.0)
    torch.testing.assert_close(apg(POS, NEG), Guidance(5.0, 0.7)(POS, NEG))
    assert apg.guides_x0
    assert not Guidance().guides_x0


@pytest.mark.parametrize("r", [None, 2.5, 100.0])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_apg_of_diffusers_without_momentum(eta, r):
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    theirs = normalized_guidance(
        POS, NEG, 4.0 - 1, None, eta, r or 0.0, use_original_formulation=True
    )
    torch.testing.assert_close(adaptive_projected_guidance(POS, NEG, 4.0, eta, r), theirs)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_zero_star_of_diffusers(rescale):
    from diffusers.guiders import ClassifierFreeZeroStarGuidance

    theirs = ClassifierFreeZeroStarGuidance(4.0, zero_init_steps=0, guidance_rescale=rescale)
    theirs.set_state(step=3, num_inference_steps=10, timestep=torch.tensor(700))
    mine = Guidance(4.0, rescale, method="cfg_zero_star")
    torch.testing.assert_close(mine(POS, NEG), theirs.forward(POS, NEG).pred, rtol=1e-5, atol=1e-5)


def test_zero_star_is_its_formula_a_sample_at_a_time():
    got = zero_star_guidance(POS.double(), NEG.double(), 3.0)
    for i in range(3):
        c, u = POS[i].double(), NEG[i].double()
        s = (c * u).sum() / (u * u).sum()
        torch.testing.assert_close(got[i], s * u + 3 * (c - s * u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["apg", "cfg_zero_star"])
@pytest.mark.parametrize("cond", [0.0, 0.5])
@pytest.mark.parametrize("uncond", [0.0, 0.5])
def test_outputs_without_a_norm_are_finite(method, cond, uncond):
    options = {"apg_norm": 2.0} if method == "apg" else {}
    guidance = Guidance(3.0, 0.7, method=method, **options)
    c, u = (torch.full((2, 1, 4, 4), v).requires_grad_() for v in (cond, uncond))
    out = guidance(c, u)
    out.sum().backward()
    for x in (out, c.grad, u.grad):
        assert x.isfinite().all()
    if cond == uncond:
        torch.testing.assert_close(out, c)
    if uncond == 0 and method == "cfg_zero_star":
        torch.testing.assert_close(out, 3 * c)


@pytest.mark.parametrize("method", ["apg", "cfg_zero_star"])
def test_methods_of_half_precision_compute_in_float32(method):
    guidance = Guidance(3.0, 0.0, method=method)
    cond, uncond = (x.half() * 200 for x in (POS, NEG))  # whose squares overflow
    got = guidance(cond, uncond)
    assert got.dtype == torch.float16
    wanted = guidance(cond.float(), uncond.float())
    torch.testing.assert_close(got.float(), wanted, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("method", ["apg", "cfg_zero_star"])
def test_gradients_of_methods(method):
    options = {"apg_norm": 1.0, "apg_parallel": 0.3} if method == "apg" else {}
    pos, neg = (
        x.double().clone().requires_grad_() for x in (POS[:, :1, :2, :2], NEG[:, :1, :2, :2])
    )
    assert torch.autograd.gradcheck(Guidance(3.0, 0.7, method=method, **options), (pos, neg))


def test_a_threshold_by_hand():
    x_0 = torch.tensor([[-4.0, 0.0, 1.0, 2.0, 3.0], [0.5, -0.5, 0.1, 0.9, 1.0]])
    wanted = torch.tensor([[-1.0, 0.0, 1 / 3, 2 / 3, 1.0], [0.5, -0.5, 0.1, 0.9, 1.0]])
    torch.testing.assert_close(dynamic_threshold(x_0, 0.75), wanted)  # of 0 1 2 3 4: 3
    halfway = torch.tensor([-3.5, 0.0, 1.0, 2.0, 3.0]) / 3.5
    torch.testing.assert_close(dynamic_threshold(x_0, 0.875)[0], halfway)
    torch.testing.assert_close(dynamic_threshold(x_0, 1.0)[0], x_0[0] / 4)
    assert torch.equal(dynamic_threshold(torch.tensor([[3.0]]), 0.5), torch.tensor([[1.0]]))


@given(st.floats(1e-3, 1.0))
def test_the_percentile_is_torchs(percentile):
    x_0 = POS.double() * 3
    got = dynamic_threshold(x_0, percentile)
    s = torch.quantile(x_0.abs().flatten(1), percentile, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(got, x_0.clamp(-s, s) / s, rtol=1e-12, atol=1e-12)
    assert got.abs().max() <= 1
    assert dynamic_threshold(x_0.half(), percentile).dtype == torch.float16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "apgg"}, "method 'apgg' is unknown. Known: 'cfg', 'apg', 'cfg_zero_star'"),
        ({"against": None}, "against None is unknown. Known: 'negative', 'raw'"),
        ({"at_zero_snr": 1}, "at_zero_snr 1: wanted True or False"),
        ({"threshold": 0.0}, "threshold 0.0: wanted a percentile"),
        ({"threshold": 99.5}, "threshold 99.5: wanted a percentile"),
        ({"threshold": True}, "threshold True: wanted a percentile"),
        ({"apg_norm": 2.5}, "apg_norm 2.5 with method 'cfg': it is a setting of method 'apg'"),
        ({"apg_parallel": 1.0, "method": "cfg_zero_star"}, "is a setting of method 'apg'"),
        ({"apg_norm": 0.0, "method": "apg"}, "apg_norm 0.0: wanted a positive number"),
        ({"apg_parallel": math.nan, "method": "apg"}, "apg_parallel nan: wanted a number"),
        ({"method": "cfg_pp"}, "scale 7.5 with method 'cfg_pp': wanted a number in [0, 1]"),
        ({"method": "cfg_pp", "scale": 0.6}, "Set rescale to 0"),
        ({"method": "cfg_pp", "scale": 1, "rescale": 0, "threshold": 1}, "Set threshold to None"),
        ({"method": "cfg_pp", "rescale": 0, "curve": [[0, 7.5]]}, "scale 7.5 with method"),
        ({"curve": ()}, "wanted knots"),
        ({"curve": 3}, "wanted knots"),
        ({"curve": "ab"}, "wanted knots"),
        ({"curve": [[0, 1, 2]]}, "wanted knots"),
        ({"curve": [[0, "w"]]}, "wanted knots"),
        ({"curve": [[-math.inf, 1.0], [0, 2.0]]}, "of finite numbers"),
        ({"curve": [[0, 1.0], [0, 2.0]]}, "wanted knots that ascend in log SNR"),
    ],
)
def test_wrong_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Guidance(**settings)
