import math
from typing import get_args

import pytest
import torch

from zsnr import LossWeighting, NoiseSchedule, diffusion_loss, prediction_target
from zsnr.loss import WeightingName

NAMES = get_args(WeightingName)
SAFE = ("uniform", "snr_plus_one", "truncated_snr", "learned")
ORIGINAL = NoiseSchedule(zero_terminal_snr=False)


def test_default_is_the_papers():
    assert torch.equal(LossWeighting().table(NoiseSchedule()), torch.ones(1000).double())


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_weight_is_refused(name):
    weighting = LossWeighting(name)
    if name in SAFE:
        assert weighting.table(NoiseSchedule())[-1] == 1
        return
    with pytest.raises(ValueError, match=r"t=999, the weight 0.*allow_zero_terminal_weight=True"):
        weighting.table(NoiseSchedule())
    allowed = LossWeighting(name, allow_zero_terminal_weight=True).table(NoiseSchedule())
    assert allowed[-1] == 0
    assert (allowed[:-1] > 0).all()
    assert (weighting.table(ORIGINAL) > 0).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("uniform", "learned")])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_one_weighting_means_one_loss_whatever_is_predicted(name, prediction_type):
    schedule, t = ORIGINAL, torch.tensor([0, 1, 300, 700, 999])
    x_0, eps, error = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    scales = schedule(t)
    alpha, sigma = (s.view(-1, 1, 1, 1) for s in scales)
    wrong_x_0 = x_0 + error
    wrong_eps = eps - alpha / sigma * error  # the same x_t
    losses = {}
    for kind in ("sample", prediction_type):
        target = prediction_target(x_0, eps, *scales, kind)
        output = prediction_target(wrong_x_0, wrong_eps, *scales, kind)
        weight = LossWeighting(name).table(schedule, kind)[t]
        losses[kind] = diffusion_loss(output, target, weight, reduction="none")
    torch.testing.assert_close(losses[prediction_type], losses["sample"], rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("name", "on_eps"),
    [
        ("min_snr", lambda snr: min(snr, 5.0) / snr),
        ("soft_min_snr", lambda snr: 5.0 / (snr + 5.0)),
        ("snr", lambda snr: 1.0),
        ("snr_plus_one", lambda snr: (snr + 1) / snr),
        ("truncated_snr", lambda snr: max(snr, 1.0) / snr),
        ("debiased", lambda snr: 1 / math.sqrt(snr)),
        ("p2", lambda snr: 1 / (1 + snr)),
    ],
)
def test_published_weights_of_the_eps_loss(name, on_eps):
    table = LossWeighting(name).table(ORIGINAL, "epsilon")
    wanted = [on_eps(snr) for snr in ORIGINAL.snr.tolist()]
    torch.testing.assert_close(table, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_min_snr_under_v_prediction():
    snr = ORIGINAL.snr
    wanted = torch.minimum(snr, torch.tensor(3.0)) / (snr + 1)
    torch.testing.assert_close(LossWeighting("min_snr", gamma=3.0).table(ORIGINAL), wanted)


def test_loss_is_a_weighted_mean_in_float32():
    output, target = torch.randn(2, 4, 3, 5, 5).bfloat16()
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    each = [(output[i].float() - target[i].float()).square().mean() * weight[i] for i in range(4)]
    loss = diffusion_loss(output, target, weight)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.stack(each).mean().float())
    none = diffusion_loss(output, target, weight, reduction="none")
    assert none.shape == (4,)
    torch.testing.assert_close(none.mean(), loss)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        diffusion_loss(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="one weight per sample"):
        diffusion_loss(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(ValueError, match="one weight per sample"):
        diffusion_loss(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1000))
    with pytest.raises(ValueError, match="Known: 'mean', 'none'"):
        diffusion_loss(torch.ones(1, 2), torch.ones(1, 2), reduction="sum")
    with pytest.raises(ValueError, match="wanted True or False"):
        LossWeighting("min_snr", allow_zero_terminal_weight="false")
    with pytest.raises(ValueError, match="Known: 'uniform', 'min_snr'"):
        LossWeighting("max_snr")
    with pytest.raises(ValueError, match="gamma"):
        LossWeighting("min_snr", gamma=0.0)
    with pytest.raises(ValueError, match="no x_0"):
        LossWeighting().table(NoiseSchedule(), "epsilon")
