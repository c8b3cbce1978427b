"""Code on an accelerator: no mixed devices and no wait for it, shown with fake tensors."""

import contextlib
from types import SimpleNamespace

import cells
import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from zsnr import (
    Conditioning,
    Denoiser,
    EmpiricalDenoiser,
    Guidance,
    LossWeighting,
    NoiseSchedule,
    Objective,
    available_samplers,
    get_sampler,
    get_timesteps,
    training_draws,
)
from zsnr.training.ema import update_average
from zsnr.training.guard import StepReport

CUDA = torch.device("cuda", 0)
SCHEDULE = NoiseSchedule()


@contextlib.contextmanager
def accelerator():
    """Tensors of device cuda without one; reading a value of theirs is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def network(x_t, t, conditioning):
    context = conditioning.context.mean((1, 2)).view(-1, *(1,) * (x_t.ndim - 1))
    return x_t * 0.5 + context * t.view(-1, *(1,) * (x_t.ndim - 1))


def test_values_of_fake_tensors_cannot_be_read():
    with accelerator(), pytest.raises(DataDependentOutputException):
        torch.ones(2, device=CUDA).sum().item()


def test_tables_are_looked_up_where_the_timesteps_are():
    with accelerator():
        t = torch.zeros(3, dtype=torch.int64, device=CUDA)
        for scale in SCHEDULE(t):
            assert scale.device == CUDA


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_the_objective(prediction_type, strength):
    objective = Objective(SCHEDULE, prediction_type, LossWeighting("snr_plus_one"), strength)
    draws = training_draws(0, range(4), 4, (4, 8, 8), SCHEDULE.num_timesteps)
    with accelerator():
        x_0 = torch.zeros(4, 4, 8, 8, device=CUDA)
        conditioning = Conditioning(torch.zeros(4, 2, 3, device=CUDA))
        assert objective(network, x_0, conditioning, draws).device == CUDA
    again = objective(network, torch.zeros(4, 4, 8, 8), Conditioning(torch.zeros(4, 2, 3)), draws)
    assert type(again) is torch.Tensor  # no fake table is left behind
    assert bool(again.isfinite().all())


@pytest.mark.parametrize("name", available_samplers())
@pytest.mark.parametrize("method", ["cfg", "apg", "cfg_zero_star"])
def test_samplers_under_guidance(name, method):
    timesteps = get_timesteps("trailing", 5, schedule=SCHEDULE)
    with accelerator():
        x_T = torch.zeros(2, 4, 8, 8, device=CUDA)
        cond, uncond = (Conditioning(torch.zeros(2, 2, 3, device=CUDA)) for _ in range(2))
        guidance = Guidance(7.5, 0.7, method=method)
        denoiser = Denoiser(network, SCHEDULE, "v_prediction", cond, uncond, guidance)
        x_0 = get_sampler(name).sample(
            denoiser, SCHEDULE, x_T, timesteps, randn_like=torch.zeros_like
        )
        assert x_0.device == CUDA
        assert x_0.dtype == torch.float32


def test_the_oracle_follows_the_data_to_their_device():
    oracle = EmpiricalDenoiser(SCHEDULE, torch.randn(5, 3, 4, 4), std=0.1)
    with accelerator():
        t = torch.full((2,), 500, device=CUDA)
        assert oracle(torch.zeros(2, 3, 4, 4, device=CUDA), t).device == CUDA
    assert type(oracle(torch.zeros(2, 3, 4, 4), torch.tensor([500, 999]))) is torch.Tensor


def placed(module):
    """Move a module's tensors to the accelerator, as fake ones."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty_like(tensor, device=CUDA)
                    trained = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = (
                        torch.nn.Parameter(fake, tensor.requires_grad) if trained else fake
                    )
    module._device = CUDA


def test_a_training_step_with_guard_average_and_validation(monkeypatch):
    """All but the backward pass, which a PyTorch without CUDA cannot do even with fake tensors."""
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None))
    module = cells.module(conditioner=tiny.conditioner(trainable=True), offset_noise=0.1)
    batch = {
        "image": torch.zeros(4, 3, 16, 16),
        "caption": ["a", "b", "c", "d"],
        "key": ["a", "b", "c", "d"],
        "position": torch.arange(4),
        "global_batch_size": 4,
    }
    batches = [module.preparation(training)(dict(batch)) for training in (True, False)]
    with accelerator(), torch.no_grad():
        placed(module)
        batches = [
            {name: x.to(CUDA) if hasattr(x, "to") and name != "position" else x for name, x in b}
            for b in (each.items() for each in batches)
        ]
        assert module.training_step(batches[0], 0).device == CUDA
        grads = [torch.zeros_like(p) for p in module.trained.parameters()]
        report = StepReport(0, module._micro_batches, grads, (False,) * 4, 1000)
        assert (report.skips.device, report.clip_factor(1.0).device) == (CUDA, CUDA)
        with pytest.raises(DataDependentOutputException):
            bool(report.skips)
        update_average(module.ema, module.trained, 0.9)
        module.on_validation_epoch_start()
        module.validation_step(batches[1], 0)
        assert module._validation._sums.device == CUDA
