"""What a run from an epsilon model logs of where it started, and what run.json holds."""

import json

import cells
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from test_training import data, module, trainer

from zsnr import NoiseSchedule, RectifiedFlow, diffusion_loss
from zsnr.checkpoints.checkpoint_file import open_checkpoint
from zsnr.checkpoints.run_facts import read_run_facts
from zsnr.draws import validation_draws
from zsnr.networks import UNet
from zsnr.training import Checkpoints, LatentDiffusion
from zsnr.training.adaptation import Start, read_start
from zsnr.training.facts import public_sources
from zsnr.training.watchdog import Watchdog

EPSILON = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """An epsilon model's folder: UNet and scheduler."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(5)
    UNet(tiny.UNET, 12, 16).unet.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(EPSILON))
    return folder


def test_the_start_is_read_from_its_scheduler(start, tmp_path):
    found = read_start(str(start))
    assert found.schedule == NoiseSchedule(
        beta_start=0.00085, beta_end=0.012, zero_terminal_snr=False
    )
    assert found.prediction_type == "epsilon"
    assert read_start(str(tmp_path)) is None
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"scheduler_config\.json is not readable JSON"):
        read_start(str(tmp_path))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is a list: wanted a JSON object"):
        read_start(str(tmp_path))


def test_a_start_of_rectified_flow_is_read(tmp_path):
    (tmp_path / "scheduler").mkdir()
    config = json.dumps({**EPSILON, "_class_name": "EulerDiscreteScheduler", "shift": 3.0})
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(config)
    index = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert read_start(str(tmp_path)) == Start(str(tmp_path), RectifiedFlow(3.0), "flow")


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "MyScheduler"])
def test_a_start_on_an_unknown_schedule_is_warned_of(tmp_path, name):
    (tmp_path / "scheduler").mkdir()
    config = json.dumps({**EPSILON, "_class_name": name})
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(config)
    with pytest.warns(UserWarning, match=f"is not logged: .*{name}"):
        assert read_start(str(tmp_path)) is None


def test_an_exact_epsilon_model_is_exact_after_its_conversion():
    """On Gaussian data E[eps | x_t] in closed form becomes E[v | x_t] of the other schedule."""
    mean, std = -0.3, 0.4
    original, fixed = NoiseSchedule(zero_terminal_snr=False), NoiseSchedule()

    def exact(schedule, x_t, t):
        alpha, sigma = (scale.view(-1, 1) for scale in schedule(t))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x_0 = mean + gain * (x_t - alpha * mean)
        return x_0, (x_t - alpha * x_0) / sigma

    def network(x_t, t, conditioning):
        return exact(original, x_t.double(), t)[1].float()

    t = torch.tensor([0, 99, 499, 799, 999])
    x_t = torch.randn(len(t), 64, generator=torch.Generator().manual_seed(0))
    x_0, eps = exact(fixed, x_t.double(), t)
    alpha, sigma = (scale.view(-1, 1) for scale in fixed(t))
    wanted = alpha * eps - sigma * x_0
    found = Start("x", original, "epsilon").output(network, x_t, t, None, fixed, "v_prediction")
    # the nearest of 1000 timesteps is not quite the same noise level
    torch.testing.assert_close(found[:-1].double(), wanted[:-1], rtol=0, atol=0.02)
    assert not found[-1].isfinite().any()


def test_a_start_on_the_same_schedule_is_asked_at_the_same_timestep():
    seen = []

    def network(x_t, t, conditioning):
        seen.append(t)
        return x_t

    t = torch.arange(1000)
    for schedule in (NoiseSchedule(), NoiseSchedule(zero_terminal_snr=False)):
        start = Start("x", schedule, "v_prediction")
        out = start.output(network, torch.ones(1000, 1), t, None, schedule, "v_prediction")
        assert torch.equal(seen[-1], t)
        assert torch.equal(out, torch.ones(1000, 1))


def fit(root, start, steps, checkpoint=None, limit=1.0, **options):
    net = module(
        network=str(start), optimizer=lambda p: torch.optim.SGD(p, lr=options.pop("lr", 0.1))
    )
    checkpoints = Checkpoints(f"{root}/checkpoints")
    run = trainer(
        root,
        steps,
        enable_checkpointing=True,
        callbacks=[checkpoints],
        val_check_interval=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        limit_val_batches=limit,
    )
    loaded = data(root.parent / "data", val=f"{root.parent}/data/val-*.tar")
    run.fit(net, datamodule=loaded, ckpt_path=checkpoint)
    return net, {k: float(v) for k, v in run.callback_metrics.items()}


def test_validation_tells_how_far_the_start_is(start, tmp_path):
    """With weights that stand still, error over error of the start, computed anew."""
    net, metrics = fit(tmp_path / "run", start, 1, lr=0.0)
    shown = {name: value for name, value in metrics.items() if name.startswith("adaptation/")}
    assert set(shown) == {f"adaptation/t{t:04d}" for t in range(99, 999, 100)}  # none at t = 999
    network = UNet(pretrained=str(start)).eval()
    found = read_start(str(start))
    batches = data(tmp_path / "data", val=f"{tmp_path}/data/val-*.tar")
    batches.trainer = trainer(tmp_path / "x", 1)
    batches.setup("validate")
    own, theirs = torch.zeros(10), torch.zeros(10)
    for batch in batches.val_dataloader():
        draw = validation_draws(0, batch["position"].tolist(), net._val_strata, (12, 8, 8))
        image = batch["image"].float() / 127.5 - 1
        x_0 = net.codec.latents(net.codec.encode(image), draw.z)
        x_t = net.schedule.add_noise(x_0, draw.eps, draw.t)
        alpha, sigma = (scale.float().view(-1, 1, 1, 1) for scale in net.schedule(draw.t))
        target = alpha * draw.eps - sigma * x_0
        with torch.no_grad():
            cond = net.model().conditioner(batch["caption"])
            output = network(x_t, draw.t, cond)
            snr = net.schedule.log_snr[draw.t]
            t = (found.schedule.log_snr[None] - snr[:, None].clamp(min=-50)).abs().argmin(1)
            eps = network(x_t, t, cond)
        v = (eps - sigma * x_t) / alpha
        for sums, guess in ((own, output), (theirs, v)):
            losses = diffusion_loss(guess, target, torch.ones(len(x_t)), reduction="none")
            sums.index_add_(0, batch["position"] % 10, losses)
    for i, t in enumerate(net._val_strata.tolist()[1:], start=1):
        assert shown[f"adaptation/t{t:04d}"] == pytest.approx(float(own[i] / theirs[i]), rel=1e-4)
    assert shown["adaptation/t0899"] > 0


def test_the_start_is_measured_on_what_is_validated(start, tmp_path, monkeypatch):
    """With no more batches than the validation, and none of them as trained on."""
    measured, own = [], LatentDiffusion._add_validation

    def count(self, batch, start=None):
        assert not self.trainer.training
        measured.append(start is not None)
        own(self, batch, start)

    monkeypatch.setattr(LatentDiffusion, "_add_validation", count)
    for limit, batches in ((1, 1), (0, 0)):
        measured.clear()
        net, metrics = fit(tmp_path / f"run{limit}", start, 1, limit=limit)
        assert measured == [True] * batches + [False] * batches
        assert bool(net._start_losses) == any("adaptation" in name for name in metrics)


def test_measuring_the_start_is_progress(start, tmp_path, monkeypatch):
    """However long it takes, a watchdog lets it."""
    noted = []
    monkeypatch.setattr(Watchdog, "note", lambda self, run, doing: noted.append(doing))
    run = trainer(tmp_path, 1, callbacks=[Watchdog()])
    monkeypatch.setattr(Watchdog, "setup", lambda *args, **kwargs: None)
    source = data(tmp_path / "data", val=f"{tmp_path}/data/val-*.tar")
    run.fit(module(network=str(start)), datamodule=source)
    assert noted.count("measures the start") == len(source.val_dataloader()) > 1


def test_a_resumed_run_keeps_what_it_started_from(start, tmp_path):
    net, _ = fit(tmp_path / "run", start, 1)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    on, metrics = fit(tmp_path / "run", start, 2, str(last))
    torch.testing.assert_close(on._start_losses, net._start_losses, rtol=0, atol=0, equal_nan=True)
    assert "adaptation/t0499" in metrics


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_ranks_measure_the_start_together(ranks, shards, start, tmp_path, kind):
    model = {"network": str(start)}
    alone = cells.fit(shards, tmp_path / "alone", model=model, steps=3)
    runs = ranks[2](cells.fit, shards, tmp_path, kind, model=model, steps=3, saves=False)
    names = {name for name in alone["logged"][-1] if name.startswith("adaptation/")}
    assert len(names) >= 4
    for run in runs:
        assert run["logged"][-1] == pytest.approx(alone["logged"][-1], rel=1e-3)


def test_run_json_stands_beside_the_checkpoints(start, tmp_path):
    net, metrics = fit(tmp_path / "run", start, 2)
    folder = tmp_path / "run" / "checkpoints"
    facts = read_run_facts(folder)
    assert facts["global_step"] == 2
    assert NoiseSchedule(**facts["schedule"]) == net.schedule
    assert facts["prediction_type"] == "v_prediction"
    assert facts["loss"]["name"] == "uniform"
    assert facts["sampling"] == {
        "sampler": "multiscale",
        "sampler_options": {"order": 3, "smallest": 0.05, "largest": 60.0, "guidance": None},
        "num_steps": 3,
        "spacing": "guided",
        "guidance_scale": 7.5,
        "guidance_rescale": 0.7,
        "guidance_interval": None,
    }
    assert facts["start"]["prediction_type"] == "epsilon"
    assert facts["start"]["unet"] == str(start)
    assert facts["metrics"] == {"val/loss": pytest.approx(metrics["val/loss"])}
    assert facts["data"] == [f"{tmp_path}/data/train-*.tar"]
    assert facts["batch_size"] == 4
    assert facts["learning_rate"] == 0.1
    assert open_checkpoint(folder / "last.ckpt")["run"] == facts


def test_run_json_has_the_validation_of_its_own_step(start, tmp_path):
    """The checkpoint of a step is written before that step is validated."""
    net = module(network=str(start), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, run, *args):
            if run.global_step == 2:
                seen.append(read_run_facts(tmp_path / "checkpoints")["metrics"]["val/loss"])

    run = trainer(
        tmp_path,
        2,
        enable_checkpointing=True,
        callbacks=[Checkpoints(f"{tmp_path}/checkpoints", every_n_train_steps=1), Watch()],
        val_check_interval=1,
        check_val_every_n_epoch=None,
    )
    run.fit(net, datamodule=data(tmp_path / "data", val=f"{tmp_path}/data/val-*.tar"))
    found = read_run_facts(tmp_path / "checkpoints")["metrics"]["val/loss"]
    assert found == float(run.callback_metrics["val/loss"])
    checkpoint = open_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["run"]["metrics"]["val/loss"] in seen
    assert found not in seen


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "readable JSON"), ("[]", "wanted a JSON object"), ('{"format": 2}', "of format 1")],
)
def test_a_broken_run_json_is_refused(tmp_path, content, message):
    assert read_run_facts(tmp_path) is None
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run_facts(tmp_path)


def test_facts_tell_no_secrets():
    sources = [
        "/data/{00..99}.tar",
        "https://user:secret@host/x.tar?Signature=secret",
        "pipe:curl -H 'Authorization: secret' https://host/x.tar",
        "s3://bucket/x.tar",
    ]
    assert public_sources(sources) == [
        "/data/{00..99}.tar",
        "https://host/x.tar",
        "pipe:...",
        "s3://bucket/x.tar",
    ]
