import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zsnr import (
    NoiseSchedule,
    RectifiedFlow,
    prediction_target,
    to_eps,
    to_flow,
    to_v,
    to_x0,
)
from zsnr.prediction import check_prediction_type

TYPES = ("epsilon", "sample", "v_prediction", "flow")


def draw(t, schedule, dtype=torch.float64):
    generator = torch.Generator().manual_seed(t)
    x_0, eps = (torch.randn(2, 3, 4, generator=generator, dtype=dtype) for _ in range(2))
    t = torch.full((2,), t)
    return x_0, eps, schedule.add_noise(x_0, eps, t), schedule(t)


SCHEDULES = (
    NoiseSchedule(),
    NoiseSchedule(zero_terminal_snr=False),
    NoiseSchedule(snr_shift=4.0),
    RectifiedFlow(),
    RectifiedFlow(shift=3.0),
)


@given(st.integers(0, 999), st.sampled_from(TYPES), st.sampled_from(SCHEDULES))
def test_every_output_gives_every_other_back(t, prediction_type, schedule):
    x_0, eps, x_t, scales = draw(t, schedule)
    output = prediction_target(x_0, eps, *scales, prediction_type)
    v = prediction_target(x_0, eps, *scales, "v_prediction")
    if prediction_type == "epsilon" and scales[0][0] < 1e-3:
        return  # x_0 is lost there: refused when objects are built
    for convert, wanted in ((to_x0, x_0), (to_eps, eps), (to_v, v), (to_flow, eps - x_0)):
        got = convert(output, x_t, *scales, prediction_type)
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow"])
@pytest.mark.parametrize("schedule", [NoiseSchedule(), RectifiedFlow(shift=3.0)])
def test_terminal_step_is_exact(prediction_type, schedule):
    x_0, eps, x_t, scales = draw(999, schedule)
    assert torch.equal(x_t, eps)
    output = prediction_target(x_0, eps, *scales, prediction_type)
    if prediction_type == "flow":  # (eps - x_0) - eps is rounded
        torch.testing.assert_close(to_x0(output, x_t, *scales, prediction_type), x_0)
        return
    assert torch.equal(to_x0(output, x_t, *scales, prediction_type), x_0)
    assert torch.equal(to_eps(output, x_t, *scales, prediction_type), eps)
    assert torch.equal(to_v(output, x_t, *scales, prediction_type), -x_0)


def test_v_at_the_last_step_is_minus_x0():
    x_0, eps = torch.randn(1, 5), torch.randn(1, 5)
    assert torch.equal(prediction_target(x_0, eps, 0.0, 1.0, "v_prediction"), -x_0)


def test_one_scale_a_sample_meets_the_batch_axis():
    x_t, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    alpha, sigma = NoiseSchedule()(torch.tensor([10, 700]))
    flat = to_x0(v, x_t, alpha, sigma, "v_prediction")
    wide = to_x0(v, x_t, alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1), "v_prediction")
    assert torch.equal(flat, wide)
    square = torch.randn(4, 3, 4, 4)  # B = W: must not meet the last axis
    alpha, sigma = NoiseSchedule()(torch.tensor([0, 300, 600, 999]))
    x_0 = to_x0(square, square, alpha, sigma, "v_prediction")
    assert torch.equal(x_0[3], -square[3])


@pytest.mark.parametrize("convert", [to_x0, to_eps, to_v, to_flow, prediction_target])
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("scales", [(0.6, 0.8), NoiseSchedule()(torch.tensor([10]))])
def test_the_result_has_the_datas_dtype_at_least_float32(convert, prediction_type, scales):
    for a, b, wanted in (
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
    ):
        x, y = torch.ones(1, 4, dtype=a), torch.ones(1, 4, dtype=b)
        assert convert(x, y, *scales, prediction_type).dtype == wanted


@pytest.mark.parametrize("convert", [to_x0, to_eps, to_v, to_flow, prediction_target])
def test_shapes_that_would_broadcast_are_refused(convert):
    x = torch.ones(4, 3, 4, 4)
    with pytest.raises(ValueError, match="wanted equal shapes"):
        convert(x, x[:1], 0.6, 0.8, "v_prediction")
    for scale in (torch.ones(4, 1), torch.ones(3), torch.ones(3, 4, 4)):
        with pytest.raises(ValueError, match="one number per sample"):
            convert(x, x, scale, scale, "v_prediction")


def test_epsilon_is_refused_at_zero_snr():
    with pytest.raises(ValueError, match=r"no x_0 at t=999.*zero_terminal_snr=False"):
        check_prediction_type("epsilon", NoiseSchedule())
    with pytest.raises(ValueError, match="no x_0 at t=999"):
        check_prediction_type("epsilon", RectifiedFlow())
    check_prediction_type("epsilon", NoiseSchedule(zero_terminal_snr=False))
    for schedule in SCHEDULES:
        for prediction_type in ("v_prediction", "flow", "sample"):
            check_prediction_type(prediction_type, schedule)


@pytest.mark.parametrize("convert", [to_x0, to_eps, to_v, to_flow, prediction_target])
def test_unknown_type_lists_the_known(convert):
    with pytest.raises(ValueError, match="Known: 'epsilon', 'sample', 'v_prediction'"):
        convert(torch.ones(1), torch.ones(1), 0.5, 0.5, "velocity")
