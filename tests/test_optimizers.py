"""Optimizers by class_path: those with two modes, and those of other packages."""

import cells
import torch
from lightning.pytorch.callbacks import Callback

from zsnr.checkpoints.checkpoint_file import read_checkpoint
from zsnr.training import EMAConfig, LearningRate


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv:2405.15682) with the interface of schedulefree's.

    In train mode the parameters are y = (1 - beta) z + beta x, in eval mode x, the average of z.
    """

    def __init__(self, params, lr: float = 0.1, beta: float = 0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def _move(self, weight_of, trains):
        for group in self.param_groups:
            if group["train_mode"] != trains:
                group["train_mode"] = trains
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.data.lerp_(self.state[p]["z"], weight_of(group["beta"]))

    def train(self):
        self._move(lambda beta: 1 - beta, True)

    def eval(self):
        self._move(lambda beta: 1 - 1 / beta, False)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            assert group["train_mode"], "a step in eval mode"
            beta, share = group["beta"], 1 / (group["k"] + 1)
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, share)  # x moves towards z by its share
                p.add_(p.grad, alpha=group["lr"] * (beta * (1 - share) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1
        return loss


class Modes(Callback):
    """Notes the optimizer's mode at the hooks of a run."""

    def __init__(self):
        self.noted = []

    def note(self, trainer, module, *_):
        name = {False: "evaluates", True: "trains"}
        self.noted.append(name[trainer.optimizers[0].param_groups[0]["train_mode"]])

    on_train_batch_start = note
    on_validation_batch_start = note

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.note(trainer, module)
        self.noted.append("saved")


def fit(shards, root, *callbacks, **options):
    model = {"optimizer": ScheduleFreeSGD, "learning_rate": LearningRate(), "ema": None}
    model |= options.pop("model", {})
    return cells.fit(shards, root, model=model, callbacks=callbacks, **options)


def same_weights(one, other):
    assert all(
        torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items()
    )


class Averages(Callback):
    """Sums the states z of one weight, whose mean the optimizer evaluates."""

    def __init__(self):
        self.total = 0

    def on_train_batch_end(self, trainer, module, *_):
        weight = module.trained["unet"].unet.conv_in.weight
        self.total = self.total + trainer.optimizers[0].state[weight]["z"].double()


def test_an_optimizer_with_two_modes_trains_one_and_shows_the_other(shards, tmp_path):
    modes, averages = Modes(), Averages()
    run = fit(shards, tmp_path, averages, modes, every=2, steps=2)
    saved = ["evaluates", "saved"]
    assert modes.noted == ["trains", "trains", *saved, "evaluates"]  # validation is after step 2
    checkpoint = torch.load(cells.newest(tmp_path), weights_only=False)
    [optimizer] = checkpoint["optimizer_states"]
    assert optimizer["param_groups"][0]["train_mode"] is False
    shown = read_checkpoint(cells.newest(tmp_path)).network.state_dict()["unet.conv_in.weight"]
    torch.testing.assert_close(shown.double(), averages.total / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(shown, run["weights"]["unet.unet.conv_in.weight"])  # at the end it evaluates


def test_what_is_shown_in_between_changes_no_training(shards, tmp_path):
    shows = fit(shards, tmp_path / "shows", every=2, previews=True)
    quiet = {"val_check_interval": 99, "limit_val_batches": 0}
    same_weights(fit(shards, tmp_path / "quiet", every=2, trainer_options=quiet), shows)
    fit(shards, tmp_path / "stops", every=2, previews=True, stop_at=2)
    checkpoint = cells.newest(tmp_path / "stops")
    same_weights(fit(shards, tmp_path / "stops", previews=True, checkpoint=checkpoint), shows)


def test_the_average_is_of_the_weights_that_are_trained(ranks, shards, tmp_path):
    """On ranks that shard, too, whose every part is local."""
    options = {"every": 2, "previews": True, "model": {"ema": EMAConfig(0.9)}}
    run = fit(shards, tmp_path / "one", **options)
    for name, weight in run["ema"].items():
        torch.testing.assert_close(weight.double(), run["ema64"][name], rtol=1e-5, atol=1e-6)
    [other, _] = ranks[2](fit, shards, tmp_path / "two", kind="sharded", **options)
    for part in ("weights", "ema"):
        for name, weight in run[part].items():
            torch.testing.assert_close(other[part][name], weight, rtol=1e-3, atol=1e-5)
