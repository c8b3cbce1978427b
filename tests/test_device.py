"""Code on an accelerator: no mixed devices and no wait for it, shown with fake tensors."""

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

import cells
import pytest
import tiny
import torch
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
from zsnr.checkpoints import DiffusersScheduler
from zsnr.codecs import AutoencoderKLCodec
from zsnr.data.images import to_unit_range
from zsnr.metrics.collected import (
    LatentMean,
    LumaPercentile,
    LumaSpread,
    LumaWasserstein,
    MeanLuma,
    PromptGroups,
    RMSContrast,
)
from zsnr.networks import UNet
from zsnr.pipeline import Sampling, TextToImage
from zsnr.training import Previews
from zsnr.training.ema import update_average
from zsnr.training.guard import StepReport

CUDA = torch.device("cuda", 0)
SCHEDULE = NoiseSchedule()


class NoFloat64(TorchDispatchMode):
    """Refuses float64 off the CPU, as MPS does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, results)):
            if isinstance(each, torch.Tensor) and each.device.type != "cpu":
                assert each.dtype != torch.float64, f"{function} has float64 on {each.device}"
        return results


@contextlib.contextmanager
def accelerator(float64=True):
    """Tensors of device cuda without one; reading a value of theirs is an error.

    Args:
        float64: Whether the device has it. MPS has not; a PyTorch for Linux knows no MPS.
    """
    lacks = set() if float64 else {"cuda"}
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        stack.enter_context(patch("zsnr.schedule.WITHOUT_FLOAT64", lacks))
        if not float64:
            stack.enter_context(NoFloat64())
        yield


@pytest.mark.parametrize("kind", [{"dtype": torch.float64}, {}])
def test_float64_is_refused_where_a_device_has_none(kind):
    with accelerator(float64=False), pytest.raises(AssertionError, match="float64 on cuda"):
        torch.zeros(2, **kind).double().to(CUDA)


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
    objective = Objective(
        SCHEDULE, prediction_type, LossWeighting("snr_plus_one"), offset_noise=strength
    )
    draws = training_draws(0, range(4), 4, (4, 8, 8), SCHEDULE.num_timesteps)
    with accelerator():
        x_0 = torch.zeros(4, 4, 8, 8, device=CUDA)
        conditioning = Conditioning(torch.zeros(4, 2, 3, device=CUDA))
        assert objective(network, x_0, conditioning, draws).device == CUDA
    again = objective(network, torch.zeros(4, 4, 8, 8), Conditioning(torch.zeros(4, 2, 3)), draws)
    assert type(again) is torch.Tensor  # no fake table is left behind
    assert bool(again.isfinite().all())


@pytest.mark.parametrize("name", available_samplers())
@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("method", ["cfg", "apg", "cfg_zero_star"])
def test_samplers_under_guidance(name, method, float64):
    timesteps = get_timesteps("trailing", 5, schedule=SCHEDULE)
    with accelerator(float64):
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
    learned = LossWeighting("learned")
    text = tiny.conditioner(trainable=True)
    module = cells.module(conditioner=text, offset_noise=0.1, loss=learned)
    batch = {
        "image": torch.zeros(4, 3, 16, 16),
        "caption": ["a", "b", "c", "d"],
        "key": ["a", "b", "c", "d"],
        "position": torch.arange(4),
        "global_batch_size": 4,
        "groups": torch.tensor([[0, 2], [1, 2], [0, 2], [1, 2]]),
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
        report = StepReport(0, module._micro_batches, grads, (False,) * 4, 1000, ["a", "b", "c"])
        assert (report.skips.device, report.clip_factor(1.0).device) == (CUDA, CUDA)
        module.learned_weight.step(*report.learned)
        assert module.learned_weight.table().device == CUDA
        with pytest.raises(DataDependentOutputException):
            bool(report.skips)
        update_average(module.ema, module.trained, 0.9)
        module.on_validation_epoch_start()
        module.validation_step(batches[1], 0)
        assert module._validation._sums.device == CUDA


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("against", ["negative", "raw"])
def test_images_from_prompts(monkeypatch, against, float64):
    """Text encoder, UNet, sampler and decoder, up to the pixels that Pillow gets."""
    made = []
    blank = SimpleNamespace(info={})
    monkeypatch.setattr("zsnr.pipeline.to_image", lambda pixels: made.append(pixels) or blank)
    codec, text = AutoencoderKLCodec("asset:openmoji_vae"), tiny.conditioner()
    codec.load()
    unets = [UNet(tiny.UNET, codec.channels, text.context_dim).eval() for _ in range(2)]
    model = tiny.model(codec=codec, conditioner=text, network=unets[0], raw_network=unets[1])
    negatives = {"negative_prompts": ["", "red"]} if against == "negative" else {}
    grid = get_timesteps("trailing", 3, schedule=SCHEDULE)  # a value that is read, on the CPU
    monkeypatch.setattr(Sampling, "timesteps", lambda *_: grid)
    with accelerator(float64), torch.no_grad():
        for part in (*unets, text, codec._loaded):
            placed(part)
        codec._device = CUDA
        guidance = Guidance(7.5, 0.7, against=against)
        TextToImage(model)(["a", "b"], num_steps=3, guidance=guidance, progress=False, **negatives)
    assert [(pixels.device, pixels.shape) for pixels in made] == [(CUDA, (3, 16, 16))] * 2


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_the_adapter_for_diffusers(name, float64):
    scheduler = DiffusersScheduler(name, SCHEDULE, "v_prediction")
    scheduler.set_timesteps(4)
    with accelerator(float64):
        x_t = torch.zeros(2, 4, 8, 8, device=CUDA, dtype=torch.float16)
        for t in scheduler.timesteps.tolist():
            x_t = scheduler.step(x_t * 0.5, t, x_t).prev_sample
    assert (x_t.device, x_t.dtype) == (CUDA, torch.float16)


def test_previews_are_sampled_where_the_network_is(monkeypatch):
    written = []
    blank = Image.new("RGB", (16, 16))
    monkeypatch.setattr("zsnr.pipeline.to_image", lambda pixels: blank)
    monkeypatch.setattr(
        Previews, "_write", lambda self, trainer, module, pixels, step: written.append(pixels)
    )
    module = cells.module()
    grid = get_timesteps("trailing", 3, schedule=SCHEDULE)
    monkeypatch.setattr(Sampling, "timesteps", lambda *_: grid)
    trainer = SimpleNamespace(
        global_rank=0,
        world_size=1,
        is_global_zero=True,
        strategy=SimpleNamespace(root_device=CUDA, all_gather=lambda tensor: tensor),
        precision_plugin=SimpleNamespace(predict_step_context=contextlib.nullcontext),
    )
    with accelerator():
        placed(module)
        Previews(["a", "b", ""])._show(trainer, module, 1)
    assert [pixels.shape for pixels in written] == [(3, 16, 16, 3)]


def test_metrics_add_up_where_the_images_are(monkeypatch):
    """That pixels are finite is read once for each metric and batch, outside of training."""
    metrics = [MeanLuma(), LumaSpread(), RMSContrast(), LumaPercentile(99)]
    grouped, latent_mean = PromptGroups(MeanLuma(), ["day"]), LatentMean(4)
    distance = LumaWasserstein(torch.rand(5, dtype=torch.float64))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: True)
    with accelerator(), torch.no_grad():
        pixels = to_unit_range(torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device=CUDA))
        for metric in metrics:
            metric.to(CUDA).update(pixels)
            assert metric.compute().device == CUDA
        grouped.to(CUDA).update(pixels, ["day", "day"])
        assert grouped.compute()["day"].device == CUDA
        distance.to(CUDA).update(pixels)
        with pytest.raises(DataDependentOutputException):  # it ends as a number
            distance.compute()
        latent_mean.to(CUDA).update(torch.zeros(2, 4, 2, 2, device=CUDA))
        assert latent_mean.compute().device == CUDA
