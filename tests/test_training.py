import copy
import dataclasses
import math

import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from zsnr import (
    EmpiricalDenoiser,
    Guidance,
    LossWeighting,
    NoiseSchedule,
    RectifiedFlow,
    TimestepLaw,
)
from zsnr.checkpoints import read_checkpoint
from zsnr.codecs import AutoencoderKLCodec, PixelCodec
from zsnr.conditioning import ClassLabels, NullConditioner
from zsnr.data.buckets import AspectBuckets
from zsnr.data.caption_tags import Tags
from zsnr.data.dataset import Pixels
from zsnr.data.mapped import MappedDataset
from zsnr.draws import training_draws, validation_draws
from zsnr.interop import write_single_file
from zsnr.interop.export import export_diffusers, read_exportable
from zsnr.networks import Transformer
from zsnr.pipeline import Sampling, TextToImage
from zsnr.training import (
    DataModule,
    EMAConfig,
    FullyShardedStrategy,
    LatentDiffusion,
    LearningRate,
    Previews,
)
from zsnr.training.ema import averaged_copy, update_average
from zsnr.training.from_checkpoint import checkpoint_config

SHAPE, T = (12, 8, 8), 1000


def module(**options):
    torch.manual_seed(0)
    settings = {
        "codec": PixelCodec(2),
        "conditioner": tiny.conditioner(trainable=True),
        "network": tiny.UNET,
        "image_size": 16,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=2e-3),
        "sampling": Sampling(num_steps=3),
        **options,
    }
    return LatentDiffusion(**settings)


def trainer(folder, steps, **options):
    settings = {
        "accelerator": "cpu",
        "max_steps": steps,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        **options,
    }
    return Trainer(**settings)


def data(folder, **options):
    if not folder.exists():
        tiny.write_shards(folder, [7, 4])
        tiny.write_shards(folder, [11], "val")
    settings = {"train": f"{folder}/train-*.tar", "image_size": 16, "batch_size": 4}
    return DataModule(**{**settings, "num_workers": 0, **options})


# Draws


def draws(positions, batch_size=8, seed=3, dropout=0.5):
    return training_draws(seed, positions, batch_size, SHAPE, T, dropout)


def test_draws_belong_to_the_sample():
    whole = draws(range(16, 24))
    for i, position in enumerate(range(16, 24)):
        alone = draws([position])
        for name in ("t", "keep", "z", "eps", "d"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[i])
    torch.manual_seed(123)
    assert torch.equal(draws(range(16, 24)).eps, whole.eps)
    assert not torch.equal(draws(range(16, 24), seed=4).eps, whole.eps)
    assert not torch.equal(draws(range(24, 32)).t, whole.t)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 32])
def test_timesteps_are_stratified_over_the_global_batch(batch_size):
    for step in range(20):
        t = draws(range(step * batch_size, (step + 1) * batch_size), batch_size).t
        strata = sorted((t.double() / T * batch_size).floor().int().tolist())
        # a timestep may straddle two strata where T / B is no integer
        assert max(abs(s - i) for i, s in enumerate(strata)) <= (T % batch_size > 0)


def test_every_timestep_is_as_likely_the_last_included():
    t = torch.cat([draws(range(k * 50, k * 50 + 50), 50).t for k in range(400)])
    counts = torch.bincount(t, minlength=T)  # 20 each, binomial within a stratum of 20
    assert counts.sum() == 20000
    assert (counts > 0).all()
    assert (counts.double() - 20).square().mean() / (20 * 0.95) == pytest.approx(1, abs=0.2)
    assert counts[T - 1] == pytest.approx(20, abs=4 * math.sqrt(20))


def test_dropout_and_noise_have_their_distributions():
    many = draws(range(2000), dropout=0.3)
    assert many.keep.float().mean().item() == pytest.approx(0.7, abs=0.05)
    for noise in (many.z, many.eps, many.d):
        assert noise.mean().item() == pytest.approx(0, abs=0.03)
        assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert not draws(range(50), dropout=1.0).keep.any()
    assert draws(range(50), dropout=0.0).keep.all()


@pytest.mark.parametrize("batch_size", [1, 3, 2048, 4096])
def test_the_largest_random_number_is_the_last_timestep(batch_size, monkeypatch):
    below_1 = math.nextafter(1, 0)  # what torch.rand may give
    strata = [*range(batch_size)], [below_1] * batch_size
    monkeypatch.setattr("zsnr.draws._strata", lambda *args: strata)
    assert draws([0, batch_size - 1], batch_size).t.tolist() == [(T - 1) // batch_size, T - 1]


def test_validation_draws_are_fixed_and_cover_the_strata():
    strata = torch.tensor([999, 500, 100])
    one = validation_draws(0, range(7), strata, SHAPE)
    assert one.t.tolist() == [999, 500, 100, 999, 500, 100, 999]
    assert one.keep.all()
    assert torch.equal(validation_draws(0, [5], strata, SHAPE).eps[0], one.eps[5])


# EMA and learning rate


@pytest.mark.parametrize("warmup", [True, False])
def test_average_equals_a_float64_reference(warmup):
    config = EMAConfig(0.9, warmup)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = averaged_copy(net)
    reference = {k: v.double().clone() for k, v in net.named_parameters()}
    for n in range(30):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        net(torch.randn(5, 3))
        decay = min(0.9, (1 + n) / (10 + n)) if warmup else 0.9
        assert config.decay_at(n) == decay
        update_average(average, net, config.decay_at(n))
        for k, v in net.named_parameters():
            reference[k] = decay * reference[k] + (1 - decay) * v.double()
    for k, v in average.named_parameters():
        torch.testing.assert_close(v.double(), reference[k], rtol=1e-5, atol=1e-6)
        assert not v.requires_grad
    assert torch.equal(average[1].running_mean, net[1].running_mean)


def test_average_of_half_precision_weights_is_float32():
    net = nn.Linear(3, 4).bfloat16()
    average = averaged_copy(net)
    update_average(average, net, 0.5)
    assert average.weight.dtype == torch.float32


class Watch(Callback):
    """Keeps the weights after every optimizer step, and follows the average in float64."""

    def __init__(self, config):
        self.config, self.average, self.updates = config, None, 0

    def on_train_start(self, trainer, module):
        self.average = {k: v.double() for k, v in module.trained.named_parameters()}

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step > self.updates:
            decay = self.config.decay_at(self.updates)
            for k, v in module.trained.named_parameters():
                self.average[k] = decay * self.average[k] + (1 - decay) * v.detach().double()
            self.updates += 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_average_in_training_equals_a_float64_reference(tmp_path, accumulate):
    watch = Watch(EMAConfig(0.7))
    model = module(ema=watch.config)
    loop = trainer(tmp_path, 5, callbacks=[watch])
    loop.fit(model, datamodule=data(tmp_path / "shards", max_batch_size_per_device=4 // accumulate))
    assert loop.accumulate_grad_batches == accumulate
    assert watch.updates == 5
    for name, weight in model.ema.named_parameters():
        wanted = watch.average[name]
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-7)


def test_learning_rates():
    rate = LearningRate(warmup_steps=4, decay="cosine", final=0.1)
    factors = [rate.factor(step, 14) for step in range(15)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[9] == pytest.approx(0.55)
    assert factors[14] == pytest.approx(0.1)
    assert LearningRate(decay="linear").factor(5, 10) == 0.5
    assert LearningRate().factor(10**6, 10) == 1


# The module


def test_the_loss_is_the_papers_by_hand(tmp_path):
    model = module(caption_dropout=0.0, loss=LossWeighting("truncated_snr"))
    loader = data(tmp_path / "shards")
    loader.setup("fit")
    loader.trainer = trainer(tmp_path, 1)
    batch = loader.on_after_batch_transfer(next(iter(loader.train_dataloader())), 0)
    schedule, codec = model.schedule, model.codec
    d = training_draws(0, batch["position"].tolist(), 4, model.codec.latent_shape(16, 16), T, 0.0)
    losses = tiny.losses(model, batch, d)
    for i in range(4):
        t = int(d.t[i])
        alpha, sigma = schedule(t)
        x_0 = codec.latents(codec.encode(batch["image"][i : i + 1]), d.z[i : i + 1])
        eps = d.eps[i : i + 1]
        x_t, v = alpha * x_0 + sigma * eps, alpha * eps - sigma * x_0
        cond = model.trained["conditioner"](batch["caption"][i : i + 1])
        output = model.trained["unet"](x_t, torch.tensor([t]), cond)
        snr = schedule.snr[t].item()
        wanted = max(snr, 1) / (snr + 1) * (v - output).square().mean()
        torch.testing.assert_close(losses[i], wanted, rtol=1e-4, atol=1e-6)


def test_dropped_captions_are_null(tmp_path):
    model = module(caption_dropout=1.0)
    batch = {
        "image": torch.rand(2, 3, 16, 16),
        "caption": ["a cat", "a dog"],
        "position": torch.arange(2),
    }
    d = training_draws(0, [0, 1], 2, model.codec.latent_shape(16, 16), T, 1.0)
    dropped = tiny.losses(model, batch, d)
    empty = tiny.losses(model, {**batch, "caption": ["", ""]}, d)
    torch.testing.assert_close(dropped, empty)


def test_offset_noise_is_used(tmp_path):
    batch = {"image": torch.rand(2, 3, 16, 16), "caption": ["", ""]}
    plain, offset = module(), module(offset_noise=0.5)
    d = training_draws(0, [0, 1], 2, plain.codec.latent_shape(16, 16), T, 0.0)
    assert not torch.allclose(tiny.losses(plain, batch, d), tiny.losses(offset, batch, d))


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_a_resumed_run_is_the_same_run(tmp_path):
    def fit(steps, checkpoint=None):
        model = module(learning_rate=LearningRate(2, "cosine"), ema=EMAConfig(0.9))
        # max_steps decides the cosine: the interrupted run knows the same end
        loop = trainer(tmp_path, 7)
        if steps < 7:
            loop.callbacks.append(StopAt(steps))
        loop.fit(model, datamodule=data(tmp_path / "shards"), ckpt_path=checkpoint)
        return model, loop

    whole, _ = fit(7)
    _, first = fit(3)
    first.save_checkpoint(tmp_path / "a.ckpt")
    second, loop = fit(7, tmp_path / "a.ckpt")
    assert loop.global_step == 7
    close(weights(whole), weights(second))
    assert not torch.equal(
        whole.ema["unet"].unet.conv_in.weight, whole.trained["unet"].unet.conv_in.weight
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_that_are_cut_are_warned_of_once_and_counted(tmp_path, workers):
    captions = [f"{'a very long caption with many words ' * (i % 4 == 1)}{i}" for i in range(8)]
    folder = tiny.write_captions(tmp_path / "shards", captions)

    def fit(steps, checkpoint=None, **options):
        model = module(caption_dropout=0.0, **options)
        loop = trainer(tmp_path, steps, log_every_n_steps=1)
        loader = data(folder, num_workers=workers, batch_size=8)
        loop.fit(model, datamodule=loader, ckpt_path=checkpoint)
        return loop

    with pytest.warns(UserWarning, match="cut") as caught:
        loop = fit(3)
    [told] = [str(w.message) for w in caught if "cut" in str(w.message)]
    assert told.startswith(
        "Step 0: 2 of 8 captions are cut: the text encoder reads 6 tokens, the longest has 8. Lost "
        "are the words 'words 1' of 'a very long caption with many words 1'. Set max_tokens=12 to"
    )
    assert loop.callback_metrics["train/cut_captions"] == 6
    loop.save_checkpoint(tmp_path / "a.ckpt")
    loop = fit(4, tmp_path / "a.ckpt")  # a warning would be an error
    assert loop.callback_metrics["train/cut_captions"] == 8
    conditioner = tiny.conditioner(trainable=True, max_tokens=12)
    loop = fit(1, conditioner=conditioner)
    assert "train/cut_captions" not in loop.callback_metrics
    assert loop.lightning_module.model().conditioner.context_length == 16


def test_previews_warn_once_of_prompts_that_are_cut(tmp_path):
    long = "a very long prompt with many words"
    previews = Previews([f"{long} {i}" for i in range(3)], every_n_steps=1)
    with pytest.warns(UserWarning, match="3 of 3 prompts are cut") as caught:
        trainer(tmp_path, 2, callbacks=[previews]).fit(
            module(), datamodule=data(tmp_path / "shards")
        )
    assert sum("cut" in str(warning.message) for warning in caught) == 1


def test_tags_of_a_resumed_run_are_those_of_the_whole_run(tmp_path):
    tiny.write_captions(tmp_path / "shards", [f"{i}, a, b" for i in range(6)])
    some = Tags(keep=1, dropout=0.2)

    def fit(steps, checkpoint=None, tags=some):
        model, loop = module(), trainer(tmp_path, steps)
        loader = data(tmp_path / "shards", tags=tags)
        loop.fit(model, datamodule=loader, ckpt_path=checkpoint)
        return model, loop

    whole, _ = fit(4)
    _, first = fit(2)
    first.save_checkpoint(tmp_path / "a.ckpt")
    second, _ = fit(4, tmp_path / "a.ckpt")
    close(weights(whole), weights(second))
    plain, _ = fit(4, tags=None)
    with pytest.raises(AssertionError):
        close(weights(whole), weights(plain))
    with pytest.raises(ValueError, match="tags.dropout was 0.2, is 0.1 now; tags.keep was 1, is 0"):
        fit(4, tmp_path / "a.ckpt", Tags(dropout=0.1))


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def test_training_without_validation_warns_of_nothing_that_is_meant(tmp_path, recwarn):
    loop = trainer(tmp_path, 1)
    loop.fit(module(), datamodule=data(tmp_path / "shards"))
    told = [str(warning.message) for warning in recwarn]
    meant = ("in eval mode", "across ranks is zero", "sync_dist=True")
    assert not [message for message in told if any(part in message for part in meant)]
    assert loop.limit_val_batches == 1.0  # as before, for another fit with validation data


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    results = []
    for most in (None, 2):
        model = module(optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
        loop = trainer(tmp_path, 3)
        loop.fit(model, datamodule=data(tmp_path / "shards", max_batch_size_per_device=most))
        assert loop.accumulate_grad_batches == 4 // (most or 4)
        assert loop.global_step == 3
        results.append(weights(model))
    close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"gradient_checkpointing": True}, {"ema": None}]
)
def test_options_of_training(tmp_path, options):
    precision = options.get("precision", "32-true")
    own = {k: v for k, v in options.items() if k != "precision"}
    plain, other = module(), module(**own)
    trainer(tmp_path, 2).fit(plain, datamodule=data(tmp_path / "shards"))
    trainer(tmp_path, 2, precision=precision).fit(other, datamodule=data(tmp_path / "shards"))
    tolerance = 2e-2 if precision == "bf16-mixed" else 1e-6
    mine, theirs = plain.trained.state_dict(), other.trained.state_dict()
    close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert all(w.dtype == torch.float32 for w in theirs.values())
    assert (other.ema is None) == (options.get("ema", 1) is None)


def test_training_learns_the_terminal_step(tmp_path):
    """Black and white pictures by prompt: only the prompt can say which at pure noise."""
    shards = tmp_path / "bw"
    shards.mkdir()
    members = {}
    for i in range(8):
        members[f"{i}.png"] = tiny.png("white" if i % 2 else "black")
        members[f"{i}.txt"] = b"white" if i % 2 else b"black"
    tiny.write_shard(shards / "train-000000.tar", members)
    model = module(
        network=tiny.SMALLER_UNET,
        ema=EMAConfig(0.9),
        optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3),
        sampling=Sampling(num_steps=5),
    )
    trainer(tmp_path, 150).fit(model, datamodule=data(shards, batch_size=16))
    with model.pipeline() as pipe:
        images = pipe(["black", "white"], seeds=[0, 0], num_steps=5, progress=False)
    dark, bright = (np.asarray(image).mean() / 127.5 - 1 for image in images)
    assert dark < -0.5
    assert bright > 0.5


def test_frozen_parts_are_nobodys(tmp_path):
    frozen = tiny.frozen_conditioner(tmp_path / "text")
    model = module(conditioner=frozen)
    before = copy.deepcopy(frozen.load().state_dict())
    trainer(tmp_path, 2).fit(model, datamodule=data(tmp_path / "shards"))
    assert all(name.startswith(("trained.unet.", "ema.unet.")) for name in model.state_dict())
    close(frozen.state_dict(), before)
    assert not frozen.training
    with pytest.raises(ValueError, match="random weights and is frozen"):
        module(conditioner=tiny.conditioner())


def test_a_checkpoint_goes_on_with_its_own_settings(tmp_path):
    loop = trainer(tmp_path, 1)
    loop.fit(module(), datamodule=data(tmp_path / "shards"))
    loop.save_checkpoint(tmp_path / "a.ckpt")
    unet = dataclasses.replace(tiny.UNET, block_out_channels=(16, 16))
    for options, message in (
        ({"schedule": NoiseSchedule("cosine")}, "schedule has {'betas': 'scaled_linear'}"),
        ({"prediction_type": "sample"}, "prediction_type has v_prediction"),
        ({"network": unet}, r"network has {'block_out_channels': \[16, 32\]"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, 2).fit(
                module(**options),
                datamodule=data(tmp_path / "shards"),
                ckpt_path=tmp_path / "a.ckpt",
            )


def test_a_run_of_rectified_flow_resumes_and_is_read(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("zsnr.training.module.rank_zero_info", said.append)

    def fit(steps, checkpoint=None, schedule=RectifiedFlow(2.0, 50)):  # noqa: B008
        law = TimestepLaw("shift", shift=2.0)
        model = module(schedule=schedule, prediction_type="flow", timestep_law=law)
        loop = trainer(tmp_path, steps)
        loop.fit(model, datamodule=data(tmp_path / "shards"), ckpt_path=checkpoint)
        return model, loop

    whole, _ = fit(3)
    assert len(said) == 1
    assert "last timestep" in said[0]
    assert "2 times as often as with uniform: about 0 exposures in this run" in said[0]
    _, first = fit(2)
    first.save_checkpoint(tmp_path / "a.ckpt")
    second, _ = fit(3, tmp_path / "a.ckpt")
    close(weights(whole), weights(second))
    with pytest.raises(ValueError, match=r"schedule.*'shift': 2.0.*'shift': 3.0"):
        fit(3, tmp_path / "a.ckpt", RectifiedFlow(3.0, 50))
    settings = checkpoint_config(tmp_path / "a.ckpt")["model"]
    assert settings["schedule"] == {
        "class_path": "zsnr.RectifiedFlow",
        "init_args": {"shift": 2.0, "num_timesteps": 50},
    }
    pipeline = TextToImage.from_pretrained(tmp_path / "a.ckpt", device="cpu")
    assert pipeline.model.schedule == RectifiedFlow(2.0, 50)
    for num_steps in (1, 50):
        assert len(pipeline(["a", "b"], seeds=[1, 2], num_steps=num_steps)) == 2


def test_a_checkpoint_that_calls_its_network_unet_is_read_and_resumed(tmp_path):
    loop = trainer(tmp_path, 1)
    loop.fit(module(), datamodule=data(tmp_path / "shards"))
    loop.save_checkpoint(tmp_path / "new.ckpt")
    content = torch.load(tmp_path / "new.ckpt", weights_only=True)
    content["zsnr"]["unet"] = content["zsnr"].pop("network")
    torch.save(content, tmp_path / "old.ckpt")
    resumed, read = [], []
    for path in (tmp_path / "new.ckpt", tmp_path / "old.ckpt"):
        model = module()
        trainer(tmp_path, 2).fit(model, datamodule=data(tmp_path / "shards"), ckpt_path=path)
        resumed.append(model.state_dict())
        read.append(TextToImage.from_pretrained(path, device="cpu").model.network.state_dict())
        assert checkpoint_config(path)["model"]["network"]["class_path"].endswith("UNet")
    for one, other in (resumed, read):
        assert all(torch.equal(one[name], other[name]) for name in one)


def own_module(**options):
    torch.manual_seed(0)
    return module(conditioner=NullConditioner(), network=tiny.Own(), **options)


def test_any_module_trains_as_the_network(tmp_path):
    """Its average, checkpointed and compiled blocks, a resumed run, and its checkpoint."""
    (tmp_path / "shards").mkdir()
    tiny.write_shards(tmp_path / "shards", [7, 4])
    torch._dynamo.reset()
    runs = {}
    for name, options in {
        "plain": {},
        "recomputed": {"gradient_checkpointing": True},
        "compiled": {"compile": "eager"},
    }.items():
        net, loop = own_module(**options), trainer(tmp_path, 3)
        loop.fit(net, datamodule=data(tmp_path / "shards"))
        runs[name] = net.state_dict()
        loop.save_checkpoint(tmp_path / f"{name}.ckpt")
    torch._dynamo.reset()
    assert {name.split(".")[0] for name in runs["plain"]} == {"trained", "ema"}
    for name in ("recomputed", "compiled"):
        close(runs[name], runs["plain"])
    half, loop = own_module(), trainer(tmp_path, 1)
    loop.fit(half, datamodule=data(tmp_path / "shards"))
    loop.save_checkpoint(tmp_path / "half.ckpt")
    resumed = own_module()
    trainer(tmp_path, 3).fit(
        resumed, datamodule=data(tmp_path / "shards"), ckpt_path=tmp_path / "half.ckpt"
    )
    close(resumed.state_dict(), runs["plain"])
    with resumed.pipeline() as pipe:
        [image] = pipe(["a"], num_steps=2, progress=False)
    again = TextToImage.from_pretrained(tmp_path / "plain.ckpt", device="cpu", network=tiny.Own())
    [other] = again(["a"], num_steps=2, progress=False)
    assert np.abs(np.asarray(image, float) - np.asarray(other, float)).max() <= 1


def test_no_checkpoint_chooses_a_network_of_another_package(tmp_path):
    net, loop = own_module(), trainer(tmp_path, 1)
    loop.fit(net, datamodule=data(tmp_path / "shards"))
    loop.save_checkpoint(tmp_path / "a.ckpt")
    for read in (read_checkpoint, checkpoint_config):
        with pytest.raises(
            ValueError, match=r"'tiny.Own', and no checkpoint chooses code to run\. N"
        ):
            read(tmp_path / "a.ckpt")
    with pytest.raises(
        ValueError, match=r"does not record the arguments .*: give .* network=Own\("
    ):
        read_checkpoint(tmp_path / "a.ckpt", network=tiny.Own)
    net.record_arguments({"depth": 2})
    loop.save_checkpoint(tmp_path / "b.ckpt")
    assert torch.load(tmp_path / "b.ckpt", weights_only=True)["zsnr"]["network"] == {
        "class_path": "tiny.Own",
        "init_args": {"depth": 2},
    }
    for network in (tiny.Own, tiny.Own()):
        model = read_checkpoint(tmp_path / "b.ckpt", network=network)
        assert model.network is not network
        close(model.network.state_dict(), net.ema["unet"].state_dict())
    assert "network" not in checkpoint_config(tmp_path / "b.ckpt", ["network"])["model"]
    with pytest.raises(ValueError, match="does not fit its own description: .*layers.1.weight"):
        read_checkpoint(tmp_path / "b.ckpt", network=tiny.Own(depth=1))
    with pytest.raises(ValueError, match="network is a Own, the config's a UNet: a checkpoint res"):
        trainer(tmp_path, 2).fit(
            module(conditioner=NullConditioner()),
            datamodule=data(tmp_path / "shards"),
            ckpt_path=tmp_path / "b.ckpt",
        )
    with pytest.raises(ValueError, match="needs a UNet of diffusers, and the model's .* is a Own:"):
        write_single_file(model, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="The network is a Own, but a Stable Diffusion pipeline"):
        export_diffusers(model, tmp_path / "folder")
    with pytest.raises(ValueError, match="The network is a Own, but a Stable Diffusion pipeline"):
        read_exportable(str(tmp_path / "b.ckpt"))


def test_a_transformer_trains_and_is_read_again(tmp_path):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    sizes |= {"in_channels": 12, "out_channels": 24, "num_layers": 2, "sample_size": 8}
    sizes |= {"caption_channels": 16, "use_additional_conditions": False}
    network = Transformer("PixArtTransformer2DModel", sizes)
    torch.nn.init.normal_(network.transformer.proj_out.weight, std=0.1)
    net = module(network=network, gradient_checkpointing=True)
    before = copy.deepcopy(network.state_dict())
    loop = trainer(tmp_path, 2)
    loop.fit(net, datamodule=data(tmp_path / "shards"))
    after = network.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("transformer_blocks.0.attn2.to_k" in name for name in moved)
    loop.save_checkpoint(tmp_path / "a.ckpt")
    again = TextToImage.from_pretrained(tmp_path / "a.ckpt", device="cpu")
    with net.pipeline() as own:
        images = [p(["a cat"], num_steps=3, progress=False)[0] for p in (own, again)]
    assert np.array_equal(*(np.asarray(image) for image in images))
    with pytest.raises(ValueError, match="in_channels=12 but the codec's latents have 3 channels"):
        module(network=network, codec=PixelCodec(1))


def test_class_labels_are_dropped_and_guided(tmp_path):
    labels = ClassLabels(3)
    net = module(conditioner=labels, network=tiny.UNET)
    assert net.trained["unet"].unet.config["num_class_embeds"] == 4
    batch = {
        "image": torch.rand(3, 3, 16, 16),
        "caption": ["0", "2", "1"],
        "position": torch.arange(3),
        "global_batch_size": 3,
    }
    seen = []
    net.trained["unet"].unet.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["class_labels"].tolist()), with_kwargs=True
    )
    net.caption_dropout = 0.0
    net._losses(*(lambda b: (b, net._noised(b)))(net.prepared(batch, True)), ema=False)
    net.caption_dropout = 1.0
    net._losses(*(lambda b: (b, net._noised(b)))(net.prepared(batch, True)), ema=False)
    assert seen == [[0, 2, 1], [3, 3, 3]]
    seen.clear()
    net.ema = None
    with net.pipeline() as pipe:
        pipe(["2"], num_steps=1, guidance=Guidance(3.0), progress=False)
        with pytest.raises(ValueError, match="'a cat' is no class"):
            pipe(["a cat"], num_steps=1, progress=False)
    assert seen == [[3, 2]]
    with pytest.raises(ValueError, match="num_class_embeds=4 but the conditioner has 6 labels"):
        module(conditioner=ClassLabels(5), network=net.trained["unet"])


def test_validation_is_fixed_and_by_stratum(tmp_path):
    model, loop = module(), trainer(tmp_path, 2)
    loader = data(tmp_path / "shards", val=f"{tmp_path}/shards/val-*.tar")
    first = loop.validate(model, datamodule=loader, verbose=False)[0]
    again = trainer(tmp_path, 2).validate(
        model,
        datamodule=data(tmp_path / "shards", val=f"{tmp_path}/shards/val-*.tar", batch_size=3),
        verbose=False,
    )[0]
    strata = range(99, 1000, 100)
    names = {f"val_by_timestep{raw}/t{t:04d}" for t in strata for raw in ("", "_raw")}
    assert first.keys() == again.keys() == {"val/loss", "val/loss_raw", *names}
    for name in first:
        assert first[name] == pytest.approx(again[name], rel=1e-5)


def test_validation_measures_averaged_and_raw_weights(tmp_path):
    def validate(model):
        loader = data(tmp_path / "shards", val=f"{tmp_path}/shards/val-*.tar")
        return trainer(tmp_path, 2).validate(model, datamodule=loader, verbose=False)[0]

    both, raw, averaged = module(), module(ema=None), module(ema=None)
    for p in both.ema.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    averaged.trained.load_state_dict(both.ema.state_dict())
    found, of_raw, of_averaged = map(validate, (both, raw, averaged))
    assert not [name for name in of_raw if "raw" in name]
    for name in of_raw:
        group, _, rest = name.partition("/")
        name_of_raw = "val/loss_raw" if name == "val/loss" else f"{group}_raw/{rest}"
        assert found[name_of_raw] == pytest.approx(of_raw[name], rel=1e-6)
        assert found[name] == pytest.approx(of_averaged[name], rel=1e-6)
    assert found["val/loss"] != pytest.approx(found["val/loss_raw"], rel=1e-3)


def test_a_checkpoint_is_a_pipeline(tmp_path):
    model = module(ema=EMAConfig(0.5), schedule=NoiseSchedule("cosine"))
    loop = trainer(tmp_path, 3)
    loop.fit(model, datamodule=data(tmp_path / "shards"))
    loop.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    pipe = TextToImage.from_pretrained(tmp_path / "a.ckpt", device="cpu")
    assert pipe.model.schedule == NoiseSchedule("cosine")
    with model.pipeline() as own:
        images = [p(["a cat"], num_steps=3, progress=False)[0] for p in (own, pipe)]
    assert np.array_equal(*(np.asarray(image) for image in images))
    assert own.network is model.ema["unet"]


def test_previews_are_guided_away_from_the_weights_in_training(tmp_path):
    guidance = Guidance(3.0, 0.0, against="raw")
    model = module(ema=EMAConfig(0.5), sampling=Sampling(num_steps=3, guidance=guidance))
    loop = trainer(tmp_path, 3)
    loop.fit(model, datamodule=data(tmp_path / "shards"))
    loop.save_checkpoint(tmp_path / "a.ckpt")
    pipe = TextToImage.from_pretrained(tmp_path / "a.ckpt", device="cpu", raw_beside=True)
    model.train()
    settings = {"num_steps": 3, "guidance": guidance, "progress": False}
    with model.pipeline() as own:
        assert own.model.raw_network is model.trained["unet"]
        assert not own.model.raw_network.training
        images = [p(["a cat"], **settings)[0] for p in (own, pipe)]
        alone = own(["a cat"], num_steps=3, guidance=Guidance(1.0), progress=False)[0]
    assert model.trained["unet"].training
    assert np.array_equal(*(np.asarray(image) for image in images))
    assert not np.array_equal(np.asarray(images[0]), np.asarray(alone))
    assert model.facts()["sampling"]["guidance_against"] == "raw"
    with pytest.raises(ValueError, match=r"but model\.ema is null"):
        module(ema=None, sampling=Sampling(guidance=guidance))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b"garbage"), "not a readable checkpoint"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: torch.save({"state_dict": {}}, path), "was not written by zsnr"),
        (lambda path: torch.save([Exploit()], path), "more than tensors and plain values"),
        (lambda path: torch.save({"zsnr": {}, "state_dict": {}}, path), "damaged: it lacks codec"),
        *(
            (lambda path, w=w: torch.save({"zsnr": {}, "state_dict": w}, path), "it lacks weights")
            for w in (5, [1], {1: torch.zeros(1)}, {"ema.unet.a": 2})
        ),
    ],
)
def test_wrong_checkpoints_are_refused(tmp_path, write, message):
    write(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        TextToImage.from_pretrained(tmp_path / "a.ckpt")


class Exploit:
    def __reduce__(self):
        return print, ("a stranger's code ran",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "epsilon"}, "no x_0 at t=999"),
        ({"loss": LossWeighting("min_snr")}, "allow_zero_terminal_weight"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"image_size": 15}, "multiple of 2"),
        ({"sampling": Sampling(spacing="uniform")}, "Known"),
        ({"sampling": Sampling(num_steps=1001)}, "num_steps=1001"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_the_flaw_on_real_pictures():
    """Exact denoiser, flat grey pictures: the original schedule narrows brightness, the fix not."""
    from zsnr.reports.flaw import ARMS, oracle_brightness

    levels = torch.linspace(-0.9, 0.9, 10)
    images = levels.view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    found = oracle_brightness(images, num_samples=64, num_steps=100)
    spread = [found[arm.name].std().item() for arm in ARMS]
    assert spread[3] > 0.85 * levels.std()
    assert max(spread[0], spread[1]) < 0.5 * levels.std()
    assert EmpiricalDenoiser(NoiseSchedule(), images).schedule == NoiseSchedule()


def test_shipped_vae_is_usable_in_training(tmp_path):
    model = module(codec=AutoencoderKLCodec("asset:openmoji_vae"))
    assert model.codec.latent_shape(16, 16) == (4, 4, 4)
    trainer(tmp_path, 1).fit(model, datamodule=data(tmp_path / "shards"))
    assert not any("vae" in name for name in model.state_dict())


def test_positions_stay_on_the_host(tmp_path):
    move = data(tmp_path / "shards").transfer_batch_to_device
    batch = {"position": torch.arange(2), "moments": torch.zeros(2, 8, 4, 4), "key": ["a", "b"]}
    moved = move(batch, torch.device("meta"), 0)
    assert moved["position"].device.type == "cpu"  # reading them waits for no device
    assert moved["moments"].device.type == "meta"
    assert moved["key"] == ["a", "b"]
    assert move([1], torch.device("meta"), 0) == [1]


def test_what_is_trained_is_float32():
    half = tiny.conditioner(trainable=True).half()
    net = module(conditioner=half, ema=EMAConfig())
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in net.ema.parameters()} == {torch.float32}


def test_float16_is_refused_without_a_loss_scaler():
    with pytest.raises(ValueError, match="param_dtype='float16': wanted 'bfloat16' or 'float32'"):
        FullyShardedStrategy(param_dtype="float16")


def test_previews_compute_as_training_does(tmp_path):
    class Precision(Callback):
        def on_train_start(self, trainer, net):
            unet = net.ema["unet"]
            unet.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))

    seen = []
    previews = Previews(["a"], every_n_steps=1)
    options = {"precision": "bf16-mixed", "limit_val_batches": 0}
    loop = trainer(tmp_path, 1, callbacks=[Precision(), previews], **options)
    loop.fit(module(), data(tmp_path / "shards"))
    assert len(seen) >= 3
    assert all(seen)


def test_weights_of_another_shape_are_refused_in_one_line():
    mine, other = module(), module(codec=PixelCodec(4))
    with pytest.raises(
        ValueError, match=r"conv_in.weight is \(.*\), the config's model has"
    ) as error:
        other.load_state_dict(mine.state_dict())
    assert "\n" not in str(error.value)


# A dataset of the user's own


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_of_dicts_trains_as_shards_do(tmp_path, workers):
    """The same draws at the same positions, whatever the workers; every item once in an epoch."""
    source = DataModule(tiny.Numbers(), image_size=16, batch_size=4, num_workers=workers)
    net, seen = own_module(), []
    net.register_buffer("unused", torch.zeros(1))
    loop = trainer(tmp_path, 6, callbacks=[seen_batches(seen)])
    loop.fit(net, datamodule=source)
    loop.save_checkpoint(tmp_path / "a.ckpt")
    assert sorted(int(key) for batch in seen[:3] for key in batch["key"]) == [*range(12)]
    assert [p for batch in seen for p in batch["position"].tolist()] == [*range(24)]
    for batch in seen:
        numbers = [int(key) for key in batch["key"]]
        assert batch["caption"] == [str(number % 3) for number in numbers]
        levels = batch["image"][:, 0, 0, 0]
        torch.testing.assert_close(levels, torch.tensor(numbers) * 10 / 127.5 - 1)
        wanted = training_draws(0, batch["position"].tolist(), 4, SHAPE, T, 0.1)
        assert torch.equal(batch["draws"].eps, wanted.eps)
    half, again = own_module(), []
    stopped = trainer(tmp_path, 2)
    stopped.fit(half, datamodule=DataModule(tiny.Numbers(), image_size=16, batch_size=4))
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    resumed = own_module()
    trainer(tmp_path, 6, callbacks=[seen_batches(again)]).fit(
        resumed,
        datamodule=DataModule(tiny.Numbers(), image_size=16, batch_size=4, num_workers=0),
        ckpt_path=tmp_path / "half.ckpt",
    )
    assert [batch["key"] for batch in again] == [batch["key"] for batch in seen[2:]]
    close(resumed.trained.state_dict(), net.trained.state_dict())
    with pytest.raises(ValueError, match="began with other training data: samples changed"):
        trainer(tmp_path, 6).fit(
            own_module(),
            datamodule=DataModule(tiny.Numbers(11), image_size=16, batch_size=4),
            ckpt_path=tmp_path / "half.ckpt",
        )


def seen_batches(seen):
    class Seen(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append(batch)

    return Seen()


def test_latents_and_concatenated_channels_reach_the_network(tmp_path):
    x_0, beside = torch.randn(12, 12, 8, 8), torch.randn(12, 2, 8, 8)
    items = tiny.Items([{"latents": x, "concat": c} for x, c in zip(x_0, beside, strict=True)])
    seen = []

    class Concat(tiny.Own):
        def forward(self, x_t, t, conditioning):
            seen.append((x_t, conditioning.concat))
            return super().forward(x_t, t, conditioning) + conditioning.concat.mean()

    source = DataModule(items, val=items, image_size=16, batch_size=12, num_workers=0)
    net = module(conditioner=NullConditioner(), network=Concat())
    loop = trainer(tmp_path, 1)
    loop.fit(net, datamodule=source)
    assert torch.isfinite(loop.validate(net, source, verbose=False)[0]["val/loss"] * torch.ones(1))
    batch = next(iter(source.val_dataloader()))
    noised = net._noised(batch)
    torch.testing.assert_close(
        noised[0], net.schedule.add_noise(batch["latents"], batch["draws"].eps, batch["draws"].t)
    )
    assert {tuple(c.shape[1:]) for _, c in seen} == {(2, 8, 8)}
    wrong = DataModule(tiny.Items([{"latents": torch.randn(4, 8, 8)}]), image_size=16, batch_size=1)
    with pytest.raises(ValueError, match="latents have 4 channels: wanted 12"):
        trainer(tmp_path, 1).fit(own_module(), datamodule=wrong)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.zeros(3, 16, 16), "a"), "item 0: a tuple, wanted a dict with image, latents"),
        ({"img": 3}, "unknown key 'img'. Known: image, latents"),
        ({"caption": "a"}, "wanted either image or latents"),
        ({"image": torch.zeros(3, 8, 8)}, r"\(3, 8, 8\) from 0 to 0, wanted \(3, 16, 16\) as data"),
        ({"image": torch.full((3, 16, 16), 255.0)}, "from 255 to 255, wanted uint8, or float from"),
        ({"image": [1]}, "image is a list, wanted a tensor"),
        ({"image": torch.zeros(3, 16, 16), "label": 1.0}, "label is 1.0, wanted a whole number"),
        ({"image": torch.zeros(3, 16, 16), "caption": 3}, "caption is 3, wanted text"),
        (
            {"image": torch.zeros(3, 16, 16), "caption": "", "label": 3},
            "caption or label, not both",
        ),
        ({"latents": torch.zeros(8, 8)}, r"latents is float32 \(8, 8\) .*, wanted a float tensor"),
    ],
)
def test_items_that_no_model_is_trained_on_are_refused(tmp_path, item, message):
    source = DataModule(tiny.Items([item]), image_size=16, batch_size=1, num_workers=0)
    with pytest.raises(ValueError, match=message) as error:
        trainer(tmp_path, 1).fit(own_module(), datamodule=source)
    assert "tiny.Items, item 0: " in str(error.value)
    assert "\n" not in str(error.value)


class Failing(tiny.Items):
    """Items of which the second cannot be made."""

    def __init__(self, error):
        image = torch.zeros(3, 16, 16)
        super().__init__([{"image": image, "label": 1}, {"image": image}])
        self.error = error

    def __getitem__(self, row):
        if row and self.error is not None:
            raise self.error
        return super().__getitem__(row)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (None, ValueError, "item 1: it has no caption or label, and item 0 label: wanted the"),
        (KeyError("age"), ValueError, "item 1: its __getitem__ raised KeyError: 'age'"),
        (OSError(28, "No space left"), OSError, "No space left"),
    ],
)
def test_an_item_unlike_the_first_and_a_failing_one_are_named(error, kind, message):
    source = DataModule(Failing(error), image_size=16, batch_size=2, num_workers=0)
    source.setup("fit")
    items = MappedDataset(source.train, source._train)
    assert items[0]["caption"] == "1"
    with pytest.raises(kind, match=message):
        items[1]


def test_settings_that_a_dataset_of_ones_own_does_not_have_are_refused():
    for options in (
        {"tags": Tags()},
        {"pixels": Pixels(flip=True)},
        {"aspect": AspectBuckets(step=16)},
    ):
        with pytest.raises(
            ValueError, match=r"has no effect on data\.train, a dataset of your own"
        ):
            DataModule(tiny.Items([{}]), image_size=16, **options)
    endless = type("Endless", (torch.utils.data.IterableDataset,), {"__iter__": iter})
    for wrong in (tiny.Items([]), endless()):
        source = DataModule(wrong, image_size=16)
        with pytest.raises(ValueError, match="has no items|has no length: wanted a map-style"):
            source.setup("fit")


def test_a_dataloader_of_ones_own_is_told_the_way(tmp_path):
    images = [{"image": torch.zeros(3, 16, 16), "caption": "a"}] * 2
    with pytest.raises(
        ValueError, match=r"no position .*DataModule\(train=\.\.\.\), and that as dat"
    ):
        trainer(tmp_path, 1).fit(own_module(), torch.utils.data.DataLoader(images, batch_size=2))
    pairs = torch.utils.data.TensorDataset(torch.zeros(2, 3, 16, 16), torch.zeros(2))
    with pytest.raises(
        ValueError, match="batch is a list: wanted a dict, as of a dataset of dicts"
    ):
        trainer(tmp_path, 1).fit(own_module(), torch.utils.data.DataLoader(pairs, batch_size=2))
