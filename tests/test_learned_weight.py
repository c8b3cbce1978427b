"""The learned weight of the loss: its optimum in closed form, its bound, and a run with it."""

import math

import cells
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from zsnr import LearnedWeight, LossWeighting, NoiseSchedule, Objective, RectifiedFlow, TimestepLaw
from zsnr.checkpoints.checkpoint_file import read_checkpoint
from zsnr.training.guard import MicroBatch, StepReport

SCHEDULE = NoiseSchedule()
EVERY, ONES = torch.arange(1000), torch.ones(1000).double()
LEARNED = {"loss": LossWeighting("learned")}


def mean_losses(schedule=SCHEDULE, end=1.0):
    """Losses like those of v: high without noise, low between, the variance of data at the end."""
    alpha, sigma = schedule(EVERY)
    size = alpha**2 + sigma**2
    return 0.09 / (0.09 * alpha**2 + sigma**2) * size + (end - 0.09) * (sigma**2 / size) ** 4


def learned(weight, losses, steps=1500):
    for _ in range(steps):
        weight.update(losses, EVERY)
    return weight.table()


@pytest.mark.parametrize("schedule", [SCHEDULE, RectifiedFlow(shift=3.0)])
def test_at_the_optimum_every_timestep_has_the_loss_1(schedule):
    losses = mean_losses(schedule)
    torch.testing.assert_close(LearnedWeight(schedule).table(), ONES)  # the start
    weights = learned(LearnedWeight(schedule, min_terminal_share=0.0), losses)
    torch.testing.assert_close(weights * losses, ONES, rtol=0, atol=0.01)
    bounded = learned(LearnedWeight(schedule), losses)
    assert torch.equal(bounded[:-1], weights[:-1])
    assert float(bounded[-1] / bounded[:-1].mean()) == pytest.approx(1)
    assert weights[-1] < 0.6 * bounded[-1]


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("law", [TimestepLaw(), TimestepLaw("beta", a=0.5, b=0.9)])
@pytest.mark.parametrize("end", [0.2, 20.0])
def test_the_last_timestep_keeps_its_share_of_the_weights_that_training_draws(share, law, end):
    losses = mean_losses(end=end)
    free = learned(LearnedWeight(SCHEDULE, law, 0.0), losses, 300)
    weights = learned(LearnedWeight(SCHEDULE, law, share), losses, 300)
    p = torch.tensor(law.probabilities(1000), dtype=torch.float64)
    assert float(p.sum()) == pytest.approx(1)
    mean = float((p * weights)[:-1].sum() / p[:-1].sum())
    assert torch.equal(weights[:-1], free[:-1])
    assert float(weights[-1]) == pytest.approx(max(float(free[-1]), share * mean))
    if share == 1:  # its share of the drawn weights is at least its share of the draws
        assert float(p[-1] * weights[-1] / (p * weights).sum()) >= float(p[-1]) * (1 - 1e-12)


def test_it_descends_the_objective_of_the_paper():
    weight, generator = LearnedWeight(SCHEDULE), torch.Generator().manual_seed(0)
    c = 0.1 * torch.randn(16, generator=generator, dtype=torch.float64)
    weight.load_state({"coefficients": c.tolist()})
    t = torch.randint(0, 999, (32,), generator=generator)
    losses = torch.rand(32, generator=generator, dtype=torch.float64)
    alpha, sigma = SCHEDULE(t)
    angle = torch.atan2(sigma, alpha)[:, None] * 2 * torch.arange(16)
    features = torch.where(torch.arange(16) == 0, 1.0, math.sqrt(2) * torch.cos(angle))
    u = features @ c.requires_grad_()
    (losses / u.exp() + u).sum().backward()
    torch.testing.assert_close(weight(t), (-u.detach()).exp())
    torch.testing.assert_close(weight.sums(losses, t), -c.grad)
    halves = [weight.sums(losses[part], t[part]) for part in (slice(0, 5), slice(5, 32))]
    torch.testing.assert_close(sum(halves), -c.grad)


def test_a_batch_that_is_not_finite_or_huge_takes_no_timestep_its_weight():
    weight = LearnedWeight(SCHEDULE)
    weight.update(torch.tensor([math.nan, 1.0]), torch.tensor([3, 4]))
    torch.testing.assert_close(weight.table(), ONES)
    weight.update(torch.tensor([1e30, math.inf]), torch.tensor([3, 999]))
    assert weight.table().min() > 1e-3


@pytest.mark.parametrize("norm", [1.0, math.nan])
def test_a_skipped_step_teaches_nothing(norm):
    weight, losses, t = LearnedWeight(SCHEDULE), torch.tensor([0.5, 2.0]), torch.tensor([3, 999])
    batch = MicroBatch(["a", "b"], losses, t, learned=weight.sums(losses, t))
    report = StepReport(0, [batch, batch], [torch.tensor([norm])], (False,) * 4, 1000)
    weight.step(*report.learned)
    other = LearnedWeight(SCHEDULE)
    if norm == 1:
        other.update(losses, t)
    torch.testing.assert_close(weight.table(), other.table())


def test_settings_are_checked():
    for name in ("uniform", "min_snr"):
        with pytest.raises(ValueError, match="setting of 'learned'"):
            LossWeighting(name, min_terminal_share=0.5)
    for share in (-1, math.nan, "1", True):
        with pytest.raises(ValueError, match="wanted a number, 0 or more"):
            LossWeighting("learned", min_terminal_share=share)
    free = LossWeighting("learned", min_terminal_share=0.0)
    with pytest.raises(ValueError, match=r"t=999.*at least 0.1, or set allow_zero_terminal_weight"):
        Objective(loss=free)
    assert Objective(NoiseSchedule(zero_terminal_snr=False), loss=free).learned_weight() is not None
    allowed = LossWeighting("learned", allow_zero_terminal_weight=True, min_terminal_share=0.0)
    assert Objective(loss=allowed).learned_weight() is not None
    assert Objective().learned_weight() is None
    with pytest.raises(ValueError, match="3 coefficients: wanted 16"):
        LearnedWeight(SCHEDULE).load_state({"coefficients": [0.0] * 3})


class Replayed(Callback):
    """Learns the same weight from the losses of each step, and weighs them with it."""

    def __init__(self):
        self.weight, self.wanted, self.got = LearnedWeight(SCHEDULE), [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        [batch] = module._micro_batches
        self.wanted.append(float((self.weight(batch.t) * batch.losses).mean()))
        self.weight.update(batch.losses, batch.t)
        self.names = [*module.state_dict()]
        self.groups = [len(group["params"]) for group in optimizer.param_groups]
        self.trained = len([*module.trained.parameters()])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.got.append(float(outputs["loss"]))


def logged_in_training(run):
    """What each step logs anew."""
    groups = ("train/", "loss_weight/")
    return [{n: v for n, v in row.items() if n.startswith(groups)} for row in run["logged"]]


def test_a_run_weighs_its_losses_and_resumes_exactly(shards, tmp_path):
    seen = Replayed()
    run = cells.fit(shards, tmp_path, model=LEARNED, every=2, callbacks=[seen])
    assert seen.got == pytest.approx(seen.wanted, rel=1e-6)
    assert run["learned_weight"] == seen.weight.state()
    assert seen.weight.table()[999] != 1
    assert not [name for name in seen.names if "learned" in name]
    assert seen.groups == [seen.trained]
    plain = cells.fit(shards, tmp_path, saves=False)
    assert run["logged"][0]["train/loss"] == plain["logged"][0]["train/loss"]  # without it
    tags = [tag for tag in run["logged"][-1] if tag.startswith("loss_weight/")]
    assert sorted(tags) == [f"loss_weight/t0{i}99" for i in range(10)]
    last = run["logged"][-1]["loss_weight/t0999"]
    assert last == pytest.approx(float(seen.weight.table()[999]))
    assert not [tag for tag in plain["logged"][-1] if tag.startswith("loss_weight/")]
    checkpoint = str(tmp_path / "checkpoints" / "step-00000002.ckpt")
    again = cells.fit(shards, tmp_path / "again", model=LEARNED, checkpoint=checkpoint)
    assert logged_in_training(again) == logged_in_training(run)[2:]
    assert again["learned_weight"] == run["learned_weight"]
    for name, weight in run["weights"].items():
        assert torch.equal(weight, again["weights"][name])
    read_checkpoint(checkpoint, ema=True)  # the model, in which it has no part
