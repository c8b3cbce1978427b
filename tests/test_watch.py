"""Early warnings: each judgment on hand-made measures, and what runs say."""

import copy
import math
import re

import pytest
import tiny
import torch
from lightning.pytorch.loggers import CSVLogger
from test_training import data, module, trainer

from zsnr import LossWeighting, NoiseSchedule, Objective, TimestepLaw
from zsnr.draws import Draws
from zsnr.metrics.luma import saturation
from zsnr.sampling import Sampling
from zsnr.training import Previews, TrainingBoard, Watch
from zsnr.training.board import prompt_weights
from zsnr.training.console import ProgressLines
from zsnr.training.tags import quarters
from zsnr.training.validation import ValidationLosses
from zsnr.training.watch import (
    DRIFT_STEP,
    FORGOTTEN,
    LABEL_FACTOR,
    LATENT_FACTOR,
    MEMORY,
    MIN_BATCHES,
    MIN_DRIFT,
    MIN_RISE,
    MIN_SAMPLES,
    RISE,
    SIGMAS,
    SPREAD_FALL,
    Finding,
    adaptation,
    divergence,
    drift,
    latent_scale,
    luma_spread,
    noise,
    prediction_type,
    raised,
    spacing,
    terminal_loss,
    terminal_weight,
    verdict,
)
from zsnr.training.watcher import Watcher, noise_leak, signed_square_cosine

ZERO, ORIGINAL = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=False)
ABOVE = 1 + 1e-6


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Settings


@pytest.mark.parametrize("name", ["min_snr", "soft_min_snr", "snr", "debiased", "p2"])
def test_a_weighting_without_the_last_timestep_is_a_cause(name):
    loss = LossWeighting(name, allow_zero_terminal_weight=True)
    found = terminal_weight(ZERO, "v_prediction", loss, TimestepLaw())
    assert found.name == "terminal_weight"
    assert name in found.text
    assert terminal_weight(ORIGINAL, "v_prediction", loss, TimestepLaw()) is None


def test_a_learned_weighting_without_a_bound_is_a_cause():
    loss = LossWeighting("learned", allow_zero_terminal_weight=True, min_terminal_share=0.0)
    found = terminal_weight(ZERO, "v_prediction", loss, TimestepLaw())
    assert "min_terminal_share to 1" in found.way_out
    assert terminal_weight(ORIGINAL, "v_prediction", loss, TimestepLaw()) is None


@pytest.mark.parametrize("name", ["uniform", "snr_plus_one", "truncated_snr", "learned"])
def test_a_weighting_with_the_last_timestep_is_none(name):
    loss = LossWeighting(name)
    assert terminal_weight(ZERO, "v_prediction", loss, TimestepLaw()) is None


def test_a_timestep_law_without_the_last_timestep_is_a_cause():
    law = TimestepLaw("logit_normal", allow_rare_terminal=True)
    assert "logit_normal" in terminal_weight(ZERO, "v_prediction", LossWeighting(), law).text
    law = TimestepLaw("shift", shift=3.0)
    assert terminal_weight(ZERO, "v_prediction", LossWeighting(), law) is None


def test_timesteps_that_miss_the_last_one_are_a_cause():
    assert "t=960" in spacing(ZERO, "leading", 25).text
    assert spacing(ORIGINAL, "leading", 25) is None
    for name in ("trailing", "linspace"):
        assert spacing(ZERO, name, 25) is None


def test_settings_of_the_watch_are_checked():
    assert Watch(ignore=["noise"]).ignore == ("noise",)
    with pytest.raises(ValueError, match=r"watch\.latent_std=0: wanted a positive number"):
        Watch(latent_std=0)
    for wrong in ({"latent_std": "1"}, {"latent_std": True}, {"ignore": None}, {"ignore": "noise"}):
        with pytest.raises(ValueError, match=r"watch\.(latent_std|ignore)=.*: wanted"):
            Watch(**wrong)
    with pytest.raises(
        ValueError, match=r"watch\.ignore='noises': no such warning\. Known: .*noise"
    ):
        Watch(ignore=("noises",))


# Measures


def test_the_prediction_type_is_the_one_that_leaves_least_unexplained():
    declared = 0.2
    needed = 1 - (1 - declared) / LABEL_FACTOR
    for gain, warns in ((1e-6, True), (-1e-6, False)):
        explained = {"v_prediction": declared, "epsilon": needed + gain}
        found = prediction_type("v_prediction", explained)
        assert (found is not None) == warns
    way_out = prediction_type("v_prediction", {"v_prediction": -0.1, "epsilon": 0.9}).way_out
    assert "declare epsilon in the files of the pretrained model" in way_out
    assert prediction_type("epsilon", {"v_prediction": -0.1, "epsilon": 0.9}) is None
    assert prediction_type("epsilon", {}) is None


def test_noise_counts_in_standard_errors():
    n = 100
    edge = SIGMAS / math.sqrt(n)
    assert noise(n, edge / ABOVE, 1.0) is None
    for mean in (edge * ABOVE, -edge * ABOVE):
        assert noise(n, mean, 1.0).name == "noise"
        assert noise(n, mean, 1.01) is None  # as of offset noise
    assert noise(n, edge / ABOVE, 0.1) is None
    assert noise(MIN_BATCHES - 1, 100.0, 1.0) is None
    assert noise(MIN_BATCHES, 100.0, 1.0) is not None


def test_the_latents_scale_has_a_factor_on_both_sides():
    for wanted in (1.0, 3.0):
        for edge in (wanted * LATENT_FACTOR, wanted / LATENT_FACTOR):
            inside = edge + 1e-6 * (wanted - edge)
            assert latent_scale(inside, wanted, 0.2) is None
            found = latent_scale(2 * edge - inside, wanted, 0.2)
            assert f"scale to {0.2 * wanted / edge:.4g}" in found.way_out
    assert latent_scale(9.0, None, 0.2) is None
    assert latent_scale(0.0, 1.0, 0.2) is None


def test_a_loss_diverges_by_its_rise_or_its_size():
    steady = 1.0, 1000, 1e-3
    assert divergence(0, RISE * 0.3, 0.3, *steady) is None
    assert divergence(0, RISE * 0.3 * ABOVE, 0.3, *steady).name == "divergence"
    assert divergence(0, 9.0, None, *steady) is None
    assert divergence(0, None, 0.3, *steady) is None
    assert "now 0.001, to a tenth" in divergence(1, None, None, *steady).way_out


@pytest.mark.parametrize(("steps", "edge"), [(MEMORY, 2), (4 * MEMORY, 5), (10_000, FORGOTTEN)])
def test_weights_that_grow_too_fast_diverge(steps, edge):
    assert divergence(0, None, None, edge, steps, 1e-3) is None
    found = divergence(0, None, None, edge * ABOVE, steps, 1e-3)
    assert f"grew {edge**0.5:.2g} times in {steps} steps" in found.text


def test_a_terminal_loss_counts_where_it_does_not_fall():
    assert terminal_loss(MIN_RISE, 0.9) is None
    assert terminal_loss(MIN_RISE * ABOVE, 0.9).name == "terminal_loss"
    assert terminal_loss(2.0, 2.1) is None
    assert terminal_loss(2.0, 2.0) is not None
    assert terminal_loss(2.0, None) is None
    assert terminal_loss(None, 2.0) is None


def test_adaptation_counts_where_it_rises_above_the_start():
    assert adaptation(99, MIN_RISE, 0.5) is None
    assert adaptation(99, MIN_RISE * ABOVE, 0.5).name == "adaptation"
    assert adaptation(99, MIN_RISE * ABOVE, 1.0).name == "adaptation"
    assert adaptation(99, 3.0, 1.0 * ABOVE) is None  # it was never as good as the start
    assert adaptation(99, None, 3.0) is None
    assert adaptation(99, 3.0, None) is None


def test_previews_drift_where_they_leave_the_data():
    data = 0.1, 0.2
    for side in (-1, 1):
        edge = data[0] + side * MIN_DRIFT * data[1]
        assert drift("luma", edge - side * 1e-6, data, 0.0) is None
        assert drift("luma", edge + side * 1e-6, data, 0.0).name == "luma"
        assert drift("luma", edge + side * 1e-6, data, MIN_DRIFT + 0.1 - DRIFT_STEP) is None
        assert drift("luma", edge + side * 1e-6, data, None) is None
    assert drift("contrast", 1.0, (0.5, 0.0), 0.0) is None  # data of one kind


# Quantiles of chi-squared at 0.1 %: tables give 0.0243 (3 degrees of freedom), 0.598 (7).
@pytest.mark.parametrize(("count", "quantile"), [(4, 0.0243), (8, 0.598)])
def test_previews_of_one_brightness_are_those_that_chance_does_not_give(count, quantile):
    edge = math.sqrt(quantile / (count - 1))
    assert luma_spread(1.01 * edge, count, 1.0) is None
    found = luma_spread(0.99 * edge, count, 1.0)
    assert found.name == "luma_spread"
    assert "spread 1 times as far" in found.text
    assert luma_spread(0.99 * edge, count, None) is None
    assert luma_spread(0.9 * edge, count, 0.9 * edge * SPREAD_FALL) is None  # it had never been far


def test_saturation_of_gray_and_of_a_pure_color():
    gray = torch.full((1, 3, 2, 2), 0.3)
    red = torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert saturation(torch.cat([gray, red, (gray + red) / 2])).tolist() == [0, 1, 0.5]


def test_a_symptom_counts_where_no_cause_is_known():
    cause, symptom = Finding("spacing", "a", "b"), Finding("luma", "c", "d")
    assert raised([cause], [symptom], ()) == [cause]
    assert raised([], [symptom], ()) == [symptom]
    assert raised([cause], [symptom], ("spacing",)) == [symptom]
    assert raised([], [symptom], ("luma",)) == []


def test_a_verdict_is_one_line_that_explains_a_warning_once():
    finding = Finding("spacing", "leading.", "trailing.")
    assert verdict(5, [], {}, []) == "watch, step 5: no warning."
    assert verdict(5, [finding], {}, ["a 1"]) == (
        "watch, step 5: spacing: leading. Way out: trailing. Measured: a 1."
    )
    assert verdict(9, [finding], {"spacing": 5}, []) == (
        "watch, step 9: still spacing, see step 5."
    )


# Noise that depends on the data


def leaks(choose, batches=64, batch_size=8, seed=0):
    """Leaks of batches of images with a common mean."""
    images = 0.5 * normal(1, 3, 6, 6, seed=99) + normal(batches, batch_size, 3, 6, 6, seed=seed)
    drawn = normal(batches, 4, batch_size, 3, 6, 6, seed=seed + 1)
    return torch.stack(
        [noise_leak(x, choose(x, eps)) for x, eps in zip(images, drawn, strict=True)]
    )


def independent(x, eps):
    return eps[0]


def nearest(x, eps):
    """The nearest of four noises to each image."""
    best = (eps * x).flatten(2).sum(2).argmax(0)
    return eps[best, torch.arange(len(x))]


def paired(x, eps):
    """Noises of the batch, paired with images by the assignment that brings them nearest."""
    from scipy.optimize import linear_sum_assignment

    cost = -torch.einsum("ic,jc->ij", x.flatten(1), eps[0].flatten(1))
    return eps[0][linear_sum_assignment(cost)[1]]


@pytest.mark.parametrize(
    ("choose", "warns"), [(independent, False), (nearest, True), (paired, False)]
)
def test_noise_that_is_chosen_by_the_images_leaks(choose, warns):
    leak = leaks(choose)
    assert (noise(len(leak), float(leak.mean()), float(leak.std())) is not None) == warns


def test_the_leak_of_independent_noise_is_standard_normal():
    leak = leaks(independent, batches=2000)
    assert abs(float(leak.mean())) < 4 / 2000**0.5
    assert float(leak.std()) == pytest.approx(1, abs=4 / 4000**0.5)


def test_the_leak_of_orthogonal_images_is_the_mean_along_each():
    x_0 = torch.eye(4)[:, :, None, None] * 3
    assert float(noise_leak(x_0, 0.7 * x_0 / 3)) == pytest.approx(0.7)
    assert float(noise_leak(torch.zeros_like(x_0), x_0)) == 0


def test_a_cosine_keeps_its_sign():
    x = normal(2, 3, 4, 4)
    assert signed_square_cosine(x, torch.stack([2 * x[0], -x[1]])).tolist() == pytest.approx(
        [1, -1]
    )


# What a watcher makes of batches


def watcher(
    prediction="v_prediction",
    schedule=ZERO,
    scale=None,
    start=None,
    loss=None,
    **options,
):
    objective = Objective(schedule, prediction, loss or LossWeighting(), TimestepLaw())
    return Watcher(Watch(**options), objective, Sampling(num_steps=25), start, scale)


def feed(watched, output, x_0=None, steps=2 * MIN_BATCHES, size=8, seed=0):
    """Give a watcher micro-batches whose outputs are output(x_0, eps, target)."""
    for step in range(steps):
        eps = normal(size, 4, 4, 4, seed=2 * step + seed)
        x = normal(size, 4, 4, 4, seed=2 * step + 1 + seed) if x_0 is None else x_0
        t = torch.linspace(50, 999, size).long()
        draw = Draws(t, torch.ones(size), eps, eps, eps.mean((2, 3)))
        noised = watched.objective.noised(x, draw)
        out = output(x, eps, noised[1])
        watched.add(noised, out, watched.objective.losses(out, *noised[1:]), step)
    return watched.collect(lambda sums: sums)


def zeros(watched):
    """A micro-batch whose output is zero, as a watcher takes it."""
    eps, t = normal(8, 4, 4, 4), torch.linspace(50, 999, 8).long()
    draw = Draws(t, torch.ones(8), eps, eps, eps.mean((2, 3)))
    noised = watched.objective.noised(normal(8, 4, 4, 4, seed=1), draw)
    return noised, 0 * eps, watched.objective.losses(0 * eps, *noised[1:])


def names(watched, interval, step=1, **measures):
    watched.judge(step, interval, learning_rate=0.1, **measures)
    return [*watched.told]


def test_measures_of_batches_have_their_closed_forms():
    watched = watcher()
    interval = feed(watched, lambda x, eps, v: torch.zeros_like(x))
    assert interval["samples"] == 2 * MIN_BATCHES * 8
    assert interval["loss"] == interval["zero_loss"]
    _, scalars = watched.judge(1, interval, learning_rate=0.1, terminal=0.6)
    assert scalars["watch/loss_ratio"] == 1
    assert scalars["watch/latent_std"] == pytest.approx(1, abs=0.02)
    assert scalars["watch/warnings"] == 0
    assert watched.collect(lambda sums: sums) == {}


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow"])
def test_the_leak_is_found_whatever_the_network_predicts(prediction):
    schedule = ORIGINAL if prediction == "epsilon" else ZERO
    x_0 = normal(8, 4, 4, 4, seed=7)
    good = watcher(prediction, schedule)
    assert names(good, feed(good, lambda x, eps, v: 0 * x)) == []
    bad = watcher(prediction, schedule)
    add = bad.add
    interval = {}
    for step in range(40):
        eps = normal(8, 4, 4, 4, seed=step) + 0.2 * x_0
        draw = Draws(torch.arange(100, 900, 100), torch.ones(8), eps, eps, eps.mean((2, 3)))
        noised = bad.objective.noised(x_0, draw)
        add(noised, 0 * x_0, bad.objective.losses(0 * x_0, *noised[1:]), step)
    interval = bad.collect(lambda sums: sums)
    assert names(bad, interval) == ["noise"]


def test_a_start_that_predicts_something_else_than_declared_is_found():
    for start, warned in (("v_prediction", ["prediction_type"]), ("epsilon", []), (None, [])):
        watched = watcher(start=start)
        assert names(watched, feed(watched, lambda x, eps, v: eps + 0.3 * x)) == warned
    watched = watcher(start="v_prediction")
    assert names(watched, feed(watched, lambda x, eps, v: 0.3 * eps - x)) == []


def test_latents_are_judged_where_they_are_no_pixels():
    x_0 = 5 * normal(8, 4, 4, 4, seed=3)
    for scale, expected, warned in ((1.0, 1.0, ["latent_scale"]), (1.0, 5.0, []), (None, 1.0, [])):
        watched = watcher(scale=scale, latent_std=expected)
        assert names(watched, feed(watched, lambda x, eps, v: 0 * x, x_0)) == warned


def test_divergence_is_found_from_the_start_and_later():
    watched = watcher()
    assert names(watched, feed(watched, lambda x, eps, v: 9 * x)) == ["divergence"]
    watched = watcher()
    good = feed(watched, lambda x, eps, v: 0.5 * v)
    assert names(watched, good) == []
    assert names(watched, feed(watched, lambda x, eps, v: 0 * x, seed=500)) == ["divergence"]


def test_weights_that_grew_are_compared_with_steady_ones():
    watched = watcher()
    watched.weigh(torch.tensor(1.0), 0)
    grown = []
    for step, size in ((32, 2.0), (64, 10.0), (96, 11.0), (128, 9.0)):
        watched.add(*zeros(watched), step)
        interval = watched.collect(lambda sums: sums, torch.tensor(size), step)
        watched.judge(step, interval, learning_rate=0.1)
        grown.append((interval["growth"], interval["steps"], "divergence" in watched.line))
    assert grown == [(2.0, 32, False), (5.0, 32, True), (5.5, 64, True), (4.5, 96, False)]


def test_values_that_are_not_finite_are_left_out():
    watched = watcher()
    feed(watched, lambda x, eps, v: x * math.nan)
    assert watched._total["batches"] == 0
    assert names(watched, feed(watched, lambda x, eps, v: 0 * x)) == []


def test_few_samples_have_no_ratio():
    watched = watcher()
    interval = feed(watched, lambda x, eps, v: 0 * x, steps=1)
    assert interval["samples"] < MIN_SAMPLES
    _, scalars = watched.judge(1, interval, learning_rate=0.1)
    assert "watch/loss_ratio" not in scalars


def test_previews_are_compared_with_the_data_they_had_been_near_to():
    watched = watcher()
    watched.data = {"luma": (0.0, 0.1)}
    watched.see(torch.full((2, 3, 4, 4), 0.1))
    assert names(watched, {}) == []
    watched.see(torch.full((2, 3, 4, 4), -1.0))
    assert names(watched, {}) == ["luma"]
    assert "luma of previews -1.00, of data 0.00" in watched.line


def test_previews_that_became_equally_bright_are_found():
    watched = watcher()
    watched.data = {"luma": (0.0, 0.4)}
    watched.see(torch.linspace(-0.4, 0.4, 6).view(6, 1, 1, 1).expand(6, 3, 4, 4))
    assert names(watched, {}) == []
    watched.see(torch.linspace(-0.01, 0.01, 6).view(6, 1, 1, 1).expand(6, 3, 4, 4))
    _, scalars = watched.judge(2, {}, learning_rate=0.1)
    assert [*watched.told] == ["luma_spread"]
    std = 0.02 / 5 * math.sqrt(6 * 7 / 12)  # of six equally spaced numbers
    assert scalars["watch/luma_spread"] == pytest.approx(std / 0.4, rel=1e-4)


@pytest.mark.parametrize("learned", [None, torch.linspace(0.3, 3, 8)])
def test_gradients_by_quarter_are_those_of_autograd(learned):
    watched = watcher(schedule=ORIGINAL, loss=LossWeighting("min_snr"))
    x_0, eps, t = normal(8, 4, 4, 4), normal(8, 4, 4, 4, seed=1), torch.arange(30, 1000, 125)
    draw = Draws(t, torch.ones(8), eps, eps, eps.mean((2, 3)))
    noised = watched.objective.noised(x_0, draw)
    output = normal(8, 4, 4, 4, seed=2).requires_grad_()
    losses = watched.objective.losses(output, *noised[1:])
    loss = losses if learned is None else learned * losses
    [gradient] = torch.autograd.grad(loss.sum(), output)
    watched.add(noised, output.detach(), losses.detach(), 0, learned)
    _, scalars = watched.judge(1, watched.collect(lambda sums: sums), learning_rate=0.1)
    squares = gradient.square().sum((1, 2, 3)).view(4, 2).mean(1)
    for end, square in zip(quarters(1000), squares.tolist(), strict=True):
        tag = f"output_gradient_by_timestep/{end}"
        assert scalars[tag] == pytest.approx(math.sqrt(square), rel=1e-5)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([], None),
        (["a"], [0, 1 / 2, 1 / 2, 0]),
        (["a", "b"], [1 / 2, 1 / 4, 1 / 4, 0]),
        (["", "b"], [1 / 8 + 1 / 2, 1 / 8, 1 / 8, 1 / 8]),
        (["a", "d"], None),
    ],
)
def test_previews_are_compared_with_data_of_the_same_captions(prompts, expected):
    weights = prompt_weights(["b", "a", "a", "c"], prompts)
    assert (None if weights is None else weights.tolist()) == expected


def test_the_state_keeps_what_later_verdicts_compare_with():
    watched = watcher(start="v_prediction")
    interval = feed(watched, lambda x, eps, v: 0.5 * v, steps=12)
    watched.judge(1, interval, learning_rate=0.1, terminal_skill=2.0, low_noise=(99, 0.5))
    other = watcher(start="v_prediction")
    other.load_state(copy.deepcopy(watched.state()))
    measures = {"terminal_skill": 2.5, "low_noise": (99, 1.3)}
    for each in (watched, other):
        feed(each, lambda x, eps, v: 0.5 * v, steps=4)
        assert names(each, {}, 2, **measures) == ["terminal_loss", "adaptation"]
    assert other.line == watched.line
    assert other.state() == watched.state()


def test_validation_compares_with_predicting_zero():
    losses = ValidationLosses(torch.tensor([999, 99]), torch.device("cpu"))
    losses.add(torch.tensor([0, 1, 2, -2]), [torch.tensor([1.0, 9, 2, 7])], torch.full((4,), 3.0))
    assert losses.relative(999) == pytest.approx(0.5)
    assert losses.relative(99) == pytest.approx(3)


# Runs


def run(folder, steps=4, checkpoint=None, **options):
    net = module(**options)
    settings = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    settings |= {"num_sanity_val_steps": 0, "logger": CSVLogger(folder)}
    previews = Previews(["grey 3", ""], every_n_steps=2)
    made = trainer(folder / "run", steps, callbacks=[previews, TrainingBoard()], **settings)
    shards = folder / "data"
    made.fit(net, datamodule=data(shards, val=f"{shards}/val-*.tar"), ckpt_path=checkpoint)
    made.save_checkpoint(folder / "last.ckpt")
    return net, made


def test_a_good_run_is_told_so_and_its_weights_do_not_depend_on_it(tmp_path):
    watched, made = run(tmp_path)
    assert watched.watcher.line.startswith("watch, step 4: no warning. Measured: terminal loss ")
    assert "; luma of previews " in watched.watcher.line
    assert ", of data at the same prompts " in watched.watcher.line
    assert float(made.callback_metrics["watch/warnings"]) == 0
    off, made = run(tmp_path, watch=None)
    assert off.watcher is None
    assert not any(name.startswith("watch") for name in made.callback_metrics)
    for name, weight in watched.state_dict().items():
        assert torch.equal(weight, off.state_dict()[name]), name


def test_a_bad_run_is_warned_of_before_it_trains_and_once(tmp_path):
    options = {"sampling": Sampling(num_steps=3, spacing="leading", sampler="ddim")}
    with pytest.warns(UserWarning, match="watch, step 0: spacing: .* Way out: ") as caught:
        net, _ = run(tmp_path, **options)
    assert sum("watch, " in str(each.message) for each in caught) == 1
    assert net.watcher.line.startswith("watch, step 4: still spacing, see step 0.")
    net, _ = run(tmp_path, 6, tmp_path / "last.ckpt", **options)
    assert net.watcher.line.startswith("watch, step 6: still spacing, see step 0.")


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_run_without_validation_data_or_previews_has_verdicts(tmp_path, micro_batch):
    net = module()
    tiny.write_shards(tmp_path / "data", [7, 4])
    lines = ProgressLines(printing=False)
    made = trainer(
        tmp_path, 4, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[lines]
    )
    made.fit(net, datamodule=data(tmp_path / "data", max_batch_size_per_device=micro_batch))
    assert net.watcher.line == "watch, step 4: no warning."
    log = (tmp_path / "fit.log").read_text()
    assert re.findall(r"watch, step (\d+): no warning", log) == ["2", "4"]
