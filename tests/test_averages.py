"""Power-function averages: snapshots of a run, and averages of other lengths made of them."""

import json
import math
import re
import shutil
from collections import Counter

import cells
import fsspec
import pytest
import tiny
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from zsnr.checkpoints import read_checkpoint, sharded
from zsnr.checkpoints.opening import open_checkpoint
from zsnr.checkpoints.snapshots import find_snapshots
from zsnr.cli import main
from zsnr.conditioning import NullConditioner
from zsnr.interop.card import model_card
from zsnr.interop.export import read_exportable
from zsnr.power_average import Average, combine, decay_between, exponent
from zsnr.training import PostHocEMA

STEPS, EVERY = 24, 2
OTHERS = (0.07, 0.15)  # lengths that no run keeps


def fit(shards, root, kind="one", **options):
    model = {
        "conditioner": NullConditioner(16),
        "ema": None,
        "post_hoc_ema": PostHocEMA(every_n_steps=1),
        **options.pop("model", {}),
    }
    settings = {"steps": STEPS, "every": EVERY, "keep": 1, **options}
    trainer = {"limit_val_batches": 0}
    return cells.fit(shards, root, kind, model=model, trainer_options=trainer, **settings)


def average(run, *options):
    return main(["checkpoint", "average", str(run), *map(str, options)])


def made(folder, sigma_rel, step=STEPS):
    return folder / f"sigma-rel-{sigma_rel}-step-{step:08d}.ckpt"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def norm(weights):
    return math.sqrt(sum(float(w.double().square().sum()) for w in weights.values()))


def less(a, b):
    return {name: weight.double() - b[name].double() for name, weight in a.items()}


class Direct(Callback):
    """Follows averages in float64, step by step, as the paper's algorithm does."""

    def __init__(self, *lengths):
        self.averages = {length: {} for length in lengths}

    def on_train_batch_end(self, trainer, module, *_):
        t = trainer.global_step
        self.weights = {k: p.detach().double() for k, p in module.trained.named_parameters()}
        for length, average in self.averages.items():
            beta = (1 - 1 / t) ** (exponent(length) + 1)
            for name, weight in self.weights.items():
                average[name] = beta * average.get(name, 0) + (1 - beta) * weight


# The formulas


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)])
def test_the_exponent_has_the_width(sigma_rel, gamma):
    assert exponent(sigma_rel) == pytest.approx(gamma, abs=0.01)
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    p = tau ** exponent(sigma_rel)
    p = p / p.sum()
    mean = (p * tau).sum()
    assert (p * (tau - mean).square()).sum().sqrt().item() == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 1e-300, 12**-0.5, 1.0, math.nan, math.inf])
def test_lengths_that_no_average_has_are_refused(sigma_rel):
    with pytest.raises(ValueError, match="wanted at least 1e-06 and below 0.2887"):
        exponent(sigma_rel)
    with pytest.raises(ValueError, match=r"model\.post_hoc_ema\.sigma_rel"):
        PostHocEMA((0.1, sigma_rel))


@pytest.mark.parametrize("sigma_rel", [(), (0.1, 0.1), 0.1, ["0.1"], [True], "0.1", None])
def test_lengths_are_different_numbers(sigma_rel):
    with pytest.raises(ValueError, match="wanted a list of one or more different lengths"):
        PostHocEMA(sigma_rel)


@pytest.mark.parametrize("every", [0, 2.5, "2", True])
def test_updates_are_whole_steps_apart(every):
    with pytest.raises(ValueError, match="wanted a whole number, at least 1"):
        PostHocEMA(every_n_steps=every)


def test_decays_of_several_steps_are_their_product():
    factors = [decay_between(0.1, t - 1, t) for t in range(8, 13)]
    assert decay_between(0.1, 7, 12) == pytest.approx(math.prod(factors), rel=1e-12)
    assert decay_between(0.1, 0, 1) == 0  # the weights before the first step do not count


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_the_weights_in_the_middle_stand_for_all(every):
    config = PostHocEMA(every_n_steps=every)
    ends = {t: config.end_after(t) for t in range(1, 31)}
    assert [end for end in ends.values() if end] == list(range(every, 31, every))
    for t, end in ends.items():
        assert end is None or abs(t - (end - (every - 1) / 2)) <= 0.5


def profile(average, count=200_000):
    """The weight profile on the steps up to 100, at the middles of cells."""
    tau = (torch.arange(count, dtype=torch.float64) + 0.5) * 100 / count
    gamma = exponent(average.sigma_rel)
    p = (gamma + 1) * tau**gamma / average.end ** (gamma + 1)
    return torch.where(tau <= average.end, p, 0.0)


def test_a_combination_is_the_nearest():
    kept = [Average(s, end) for end in (20, 40, 60, 80, 100) for s in (0.05, 0.1)]
    wanted = Average(0.2, 100)
    found = combine(kept, wanted)
    profiles = [profile(each) for each in kept]
    target = profile(wanted)

    def residual(coefficients):
        made = sum(c * p for c, p in zip(coefficients, profiles, strict=True))
        return math.sqrt((made - target).square().sum() / target.square().sum())

    assert sum(found.coefficients) == pytest.approx(1, abs=1e-12)
    assert residual(found.coefficients) == pytest.approx(found.residual, rel=1e-4)
    for move in range(1, len(kept)):  # those near it, whose sum is 1 too, are farther
        for size in (-0.01, 0.01):
            near = list(found.coefficients)
            near[0], near[move] = near[0] - size, near[move] + size
            assert residual(near) > found.residual


def test_what_was_kept_is_found_as_it_is():
    kept = [Average(s, end) for end in (20, 40) for s in (0.05, 0.1)]
    found = combine(kept, kept[2])
    assert found.coefficients == [0, 0, 1, 0]
    assert found.residual == 0


def test_a_known_trajectory_is_averaged_after_the_fact():
    steps, lengths = 400, (0.05, 0.1)
    generator = torch.Generator().manual_seed(0)
    start, direction = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    jitter = torch.zeros(500, dtype=torch.float64)
    averages = {length: torch.zeros_like(start) for length in (*lengths, *OTHERS)}
    kept, values = [], []
    for t in range(1, steps + 1):
        noise = torch.randn(500, generator=generator, dtype=torch.float64)
        jitter = 0.9 * jitter + 0.01 * noise
        weights = start - math.exp(-4 * t / steps) * direction + jitter
        for length, average in averages.items():
            beta = (1 - 1 / t) ** (exponent(length) + 1)
            average.mul_(beta).add_(weights, alpha=1 - beta)
        if t % 10 == 0:
            kept += [Average(length, t) for length in lengths]
            values += [averages[length].clone() for length in lengths]
    for length in OTHERS:
        found = combine(kept, Average(length, steps))
        result = sum(c * v for c, v in zip(found.coefficients, values, strict=True))
        error, direct = (result - averages[length]).norm(), averages[length]
        assert error / direct.norm() < 1e-4
        assert error / (weights - direct).norm() < 5e-3


# A run


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run with its snapshots, and the averages that were followed beside it."""
    root = tmp_path_factory.mktemp("run")
    direct = Direct(0.05, *OTHERS)
    fit(shards, root, callbacks=[direct])
    return root, direct


def test_averages_of_other_lengths_are_made_after_the_run(run, tmp_path, capsys):
    root, direct = run
    lengths = ",".join(map(str, (0.05, *OTHERS)))
    assert average(root, "--sigma-rel", lengths, "--output", tmp_path, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["snapshots"]) == (STEPS, STEPS // EVERY)
    for facts in told["averages"]:
        wanted = direct.averages[facts["sigma_rel"]]
        network = read_checkpoint(facts["path"]).network
        found = {f"unet.{name}": weight for name, weight in network.named_parameters()}
        error = norm(less(found, wanted))
        assert error / norm(wanted) < 1e-4
        assert error / norm(less(direct.weights, wanted)) < 0.03  # of what averaging changes
        assert facts["residual"] < 0.02
    assert told["averages"][0]["residual"] == 0  # it was kept


def test_snapshots_hold_the_averages_alone_and_stay(run):
    root, _ = run
    folder = root / "checkpoints"
    assert [name for name in names(folder) if name.startswith("step-")] == [
        f"step-{STEPS:08d}.ckpt"
    ]
    steps = range(EVERY, STEPS + 1, EVERY)
    assert names(folder / "snapshots") == [f"step-{step:08d}.ckpt" for step in steps]
    whole, snapshot = (
        open_checkpoint(place / f"step-{STEPS:08d}.ckpt")
        for place in (folder, folder / "snapshots")
    )
    assert "optimizer_states" not in snapshot
    prefixes = {name.partition(".unet.")[0] for name in snapshot["state_dict"]}
    assert prefixes == {"post_hoc.0", "post_hoc.1"}
    for name, weight in snapshot["state_dict"].items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, whole["state_dict"][name])


def test_an_earlier_end_is_chosen_by_its_step(run, tmp_path, capsys):
    root, _ = run
    assert average(root, "--sigma-rel", "0.1", "--step", 20, "--output", tmp_path) == 0
    snapshot = open_checkpoint(root / "checkpoints/snapshots/step-00000020.ckpt")["state_dict"]
    for name, weight in open_checkpoint(made(tmp_path, 0.1, 20))["state_dict"].items():
        assert torch.equal(weight, snapshot[f"post_hoc.1.{name.removeprefix('trained.')}"])
    capsys.readouterr()
    assert average(root, "--sigma-rel", "0.1", "--step", 7, "--output", tmp_path) == 2
    assert "no snapshot of that step. The nearest are of 6 and 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["0.1,x"], "wanted numbers, such as 0.05,0.10,0.15"),
        (["0.5"], "--sigma-rel=0.5: wanted at least 1e-06 and below 0.2887"),
        (["0.1,0.10"], "wanted each length once"),
        (["0.005"], "shorter than the kept 0.05, and the last two snapshots are 2 steps apart"),
        (["0.288"], "the first of 12 snapshots is of step 2 of 24"),
    ],
)
def test_what_the_snapshots_cannot_tell_is_refused(run, tmp_path, capsys, options, message):
    assert average(run[0], "--sigma-rel", *options, "--output", tmp_path / "made") == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "made").exists()


def test_nothing_is_overwritten(run, tmp_path, capsys):
    made(tmp_path, 0.15).write_text("mine")
    assert average(run[0], "--sigma-rel", "0.1,0.15", "--output", tmp_path) == 2
    assert "exists: choose another name" in capsys.readouterr().err
    assert names(tmp_path) == [made(tmp_path, 0.15).name]


def test_a_run_without_snapshots_is_told(tmp_path, capsys):
    assert average(tmp_path, "--sigma-rel", "0.1") == 2
    assert "has no snapshots: they are written beside" in capsys.readouterr().err
    assert average(tmp_path / "none", "--sigma-rel", "0.1") == 2
    assert "is not a folder: wanted that of a run" in capsys.readouterr().err


def test_a_damaged_snapshot_is_left_out_with_a_warning(run, tmp_path):
    root, _ = run
    shutil.copytree(root / "checkpoints/snapshots", tmp_path / "snapshots")
    (tmp_path / "snapshots" / "step-00000012.ckpt").write_bytes(b"PK")
    with pytest.warns(UserWarning, match=r"step-00000012.*The averages are made without it"):
        assert average(tmp_path, "--sigma-rel", "0.15") == 0
    facts = open_checkpoint(made(tmp_path / "averages", 0.15))["run"]["averaged"]
    assert facts["snapshots"] == STEPS // EVERY - 1
    snapshots = find_snapshots(root)
    assert (
        facts["residual"]
        > combine(
            [each for snapshot in snapshots for each in snapshot.averages], Average(0.15, STEPS)
        ).residual
    )


def test_lengths_that_are_near_to_each_other_have_files_of_their_own(run, tmp_path):
    root, _ = run
    assert average(root, "--sigma-rel", "0.1100001,0.1100002", "-o", tmp_path) == 0
    for length in (0.1100001, 0.1100002):
        assert open_checkpoint(made(tmp_path, length))["run"]["averaged"]["sigma_rel"] == length


def test_a_run_is_named_by_any_of_its_folders(run, tmp_path, capsys):
    source, root = run[0] / "checkpoints" / "snapshots", tmp_path / "run"
    shutil.copytree(source, root / "checkpoints" / "snapshots")
    for length, place in ((0.05, "."), (0.1, "checkpoints"), (0.15, "checkpoints/snapshots")):
        assert average(root / place, "--sigma-rel", length) == 0
        assert made(root / "averages", length).exists()
    capsys.readouterr()
    file = root / "checkpoints" / "snapshots" / f"step-{STEPS:08d}.ckpt"
    assert average(file, "--sigma-rel", "0.1") == 2
    assert f"wanted the folder of the run, such as {root}." in capsys.readouterr().err


# Stopped, resumed, failing


def short(shards, root, kind="one", **options):
    config = PostHocEMA((0.05, 0.1, 0.2), every_n_steps=1)
    return fit(shards, root, kind, **{"model": {"post_hoc_ema": config}, "steps": 4, **options})


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory):
    """A run of four steps, with checkpoints and snapshots of all."""
    root = tmp_path_factory.mktemp("straight")
    short(shards, root, every=1, keep=9)
    return root


def snapshot(root, step=4):
    path = root / "checkpoints" / "snapshots" / f"step-{step:08d}.ckpt"
    return sharded.consolidate(path) if path.is_dir() else open_checkpoint(path)


def same_weights(a, b, **tolerance):
    torch.testing.assert_close(a["state_dict"], b["state_dict"], **(tolerance or EXACT))


EXACT = {"rtol": 0.0, "atol": 0.0}


def test_a_killed_run_has_the_same_snapshots(straight, shards, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True, symlinks=True)
    folder = tmp_path / "checkpoints"
    for step in (3, 4):
        (folder / f"step-{step:08d}.ckpt").unlink()
    (folder / "snapshots" / "step-00000002.ckpt").unlink()  # killed before it was written
    checkpoint = str(folder / "step-00000002.ckpt")
    short(shards, tmp_path, every=3, keep=9, checkpoint=checkpoint)
    later = [f"step-{step:08d}.ckpt.abandoned" for step in (3, 4)]
    new = [f"step-{step:08d}.ckpt" for step in (1, 2, 3, 4)]
    assert names(folder / "snapshots") == sorted([*new, *later])
    for step in (2, 3, 4):
        same_weights(snapshot(tmp_path, step), snapshot(straight, step))


def test_a_run_resumes_with_its_lengths_alone(straight, shards, tmp_path):
    checkpoint = str(straight / "checkpoints" / "step-00000002.ckpt")
    with pytest.raises(ValueError, match=r"post_hoc_ema\.sigma_rel was \[0\.05, 0\.1, 0\.2\], is"):
        fit(shards, tmp_path, steps=4, checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"post_hoc_ema\.sigma_rel was .*, is not set now"):
        fit(shards, tmp_path, steps=4, checkpoint=checkpoint, model={"post_hoc_ema": None})


def test_no_run_resumes_from_weights_alone(straight, shards, tmp_path):
    path = straight / "checkpoints" / "snapshots" / "step-00000002.ckpt"
    with pytest.raises(ValueError, match=f"{path} holds weights alone, so that no run resumes"):
        short(shards, tmp_path, checkpoint=str(path))


def test_fewer_snapshots_are_written_and_always_the_last(shards, tmp_path):
    short(shards, tmp_path, every=1, snapshot_every_n_steps=3)
    assert names(tmp_path / "checkpoints" / "snapshots") == [
        "step-00000003.ckpt",
        "step-00000004.ckpt",
    ]


def test_the_first_snapshot_is_of_the_first_average(shards, tmp_path, capsys):
    config = PostHocEMA(every_n_steps=3)  # the weights after step 2 stand for three steps
    fit(shards, tmp_path, steps=3, every=1, model={"post_hoc_ema": config})
    assert [each.averages[0] for each in find_snapshots(tmp_path)] == [Average(0.05, 3)] * 2
    assert average(tmp_path, "--sigma-rel", "0.05", "--step", 2, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    facts = open_checkpoint(told["averages"][0]["path"])["run"]["averaged"]
    assert (told["step"], told["end"]) == (facts["step"], facts["end"]) == (2, 3)


def test_a_run_that_is_too_short_for_its_averages_is_warned_of(
    shards, tmp_path, recwarn, monkeypatch
):
    monkeypatch.setattr(cells, "quiet", lambda: None)
    config = PostHocEMA(every_n_steps=4)
    fit(shards, tmp_path, steps=2, model={"post_hoc_ema": config})
    [told] = [str(each.message) for each in recwarn if "its averages" in str(each.message)]
    assert "run of 2 steps ends before the first update" in told
    with pytest.raises(ValueError, match="00000002.ckpt is of a step before the first update"):
        find_snapshots(tmp_path)


def test_a_snapshot_that_cannot_be_written_ends_no_run(shards, tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(cells, "quiet", lambda: None)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "snapshots").write_text("in the way")
    short(shards, tmp_path, steps=2, every=1, keep=9)
    told = [str(each.message) for each in recwarn if "snapshots" in str(each.message)]
    assert len(told) == 2
    assert "cannot be written, and the run continues" in told[0]
    assert len(list((tmp_path / "checkpoints").glob("step-*.ckpt"))) == 2


def test_snapshots_are_copied_to_object_storage(straight, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    address = "memory://averages/run"
    try:
        short(shards, tmp_path / "run", every=2, keep=9, mirror=address, asynchronous=False)
        assert memory.exists("/averages/run/snapshots/step-00000004.ckpt")
        assert average(address, "--sigma-rel", "0.2", "--output", tmp_path / "made") == 0
        weights = open_checkpoint(made(tmp_path / "made", 0.2, 4))["state_dict"]
        for name, weight in weights.items():
            kept = snapshot(straight)["state_dict"][f"post_hoc.2.{name.removeprefix('trained.')}"]
            assert torch.equal(weight, kept)
        lost = "snapshots/step-00000002.ckpt"  # as of a run that was killed before it was written
        checkpoints = tmp_path / "run" / "checkpoints"
        (checkpoints / lost).unlink()
        memory.rm(f"/averages/run/{lost}")
        at = checkpoints / "step-00000002.ckpt"
        short(shards, tmp_path / "run", every=2, keep=9, mirror=address, checkpoint=str(at))
        assert memory.cat(f"/averages/run/{lost}") == (checkpoints / lost).read_bytes()
    finally:
        memory.rm("/averages", recursive=True)


# What is made of them


@pytest.fixture
def config(shards, straight, tmp_path):
    """Settings of fit for another folder of the same run."""
    values = {
        "trainer": {"accelerator": "cpu", "max_steps": 5, "default_root_dir": str(tmp_path)},
        "model": {
            "codec": {"class_path": "PixelCodec", "init_args": {"patch_size": 2}},
            "conditioner": {"class_path": "NullConditioner", "init_args": {"context_dim": 16}},
            "network": tiny.MODEL["network"],
        },
        "data": {"train": f"{shards}/train-*.tar", "image_size": 16, "batch_size": 8},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "config.yaml")


def test_an_average_is_a_model_as_any_other(
    straight, shards, config, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # validate writes its logs there
    assert average(straight, "--sigma-rel", 0.2, "-o", tmp_path) == 0
    path, data = str(made(tmp_path, 0.2, 4)), ["--data.val", f"{shards}/val-*.tar"]
    data += ["--trainer.default_root_dir", str(tmp_path)]
    losses = []
    whole = str(straight / "checkpoints" / "step-00000004.ckpt")  # its own averages are not used
    for checkpoint in (path, whole):
        assert main(["validate", "--ckpt_path", checkpoint, *data, "--data.num_workers", "0"]) == 0
        losses.append(re.findall(r"val/loss\W+([\d.]+)", capsys.readouterr().out)[0])
    assert losses[0] != losses[1]
    for target in (path, str(tmp_path)):  # by the run.json beside it
        assert main(["doctor", target]) == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text('{"format": 1, "prediction_type": "epsilon"}')
    assert average(straight, "--sigma-rel", 0.2, "-o", other) == 2
    assert names(other) == ["run.json"]
    part = str(straight / "checkpoints" / "snapshots" / "step-00000004.ckpt")
    assert main(["doctor", part, "--open"]) == 3
    assert "is a snapshot of averages and no model" in capsys.readouterr().out
    _, facts = read_exportable(path, form="single-file")
    assert facts["weights"] == "averaged"
    assert facts["averaged"]["sigma_rel"] == 0.2
    assert facts["metrics"] == {}  # training measured other weights
    assert "sigma_rel" in model_card("mine", facts)
    with pytest.raises(ValueError, match="averaged weights alone: omit --raw"):
        read_exportable(path, ema=False, form="single-file")
    assert main(["fit", "-c", config, "--ckpt_path", path]) == 2
    assert "holds weights alone, so that no run resumes from it" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"is a snapshot of averages.*checkpoint average RUN"):
        read_checkpoint(straight / "checkpoints" / "snapshots" / "step-00000004.ckpt")


# Several ranks


def collectives_of_a_step(shards, root, kind, averaged):
    """Count the collectives of one step, and the bytes of the averages that this rank holds."""
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    sizes = []

    class Step(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 2:
                profile.start()
            elif trainer.global_step == 3:
                module.settle()
                profile.stop()
                sizes.extend(
                    sum(cells._local(p).numel() for p in part.parameters())
                    for part in (module.trained, *(module.post_hoc or ()))
                )

    config = PostHocEMA(every_n_steps=1) if averaged else None
    options = {"model": {"post_hoc_ema": config}, "steps": 4, "callbacks": [Step()]}
    fit(shards, root, kind, **options, saves=False)
    called = [event.name for event in profile.events() if event.name.startswith("c10d::")]
    return Counter(called), sizes


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_averages_are_local_and_need_no_communication(ranks, shards, tmp_path, kind):
    counts = []
    for averaged in (False, True):
        told = ranks[2](collectives_of_a_step, shards, tmp_path, kind, averaged)
        counts.append([called for called, _ in told])
        assert all(len({*sizes}) == 1 for _, sizes in told)  # as large as this rank's weights
    assert counts[0] == counts[1]
    assert counts[0][0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_shards_of_snapshots_are_combined(
    ranks, straight, shards, tmp_path, asynchronous, monkeypatch
):
    options = {"every": 2, "keep": 1, "asynchronous": asynchronous}
    ranks[2](short, shards, tmp_path, "sharded", **options)
    same_weights(snapshot(tmp_path), snapshot(straight), rtol=1e-3, atol=5e-4)
    lengths = (0.12, 0.2)
    assert average(tmp_path, "--sigma-rel", ",".join(map(str, lengths))) == 0
    for length in lengths:
        read_checkpoint(made(tmp_path / "averages", length, 4))
    kept = snapshot(tmp_path)["state_dict"]
    for name, weight in open_checkpoint(made(tmp_path / "averages", 0.2, 4))["state_dict"].items():
        assert torch.equal(weight, kept[f"post_hoc.2.{name.removeprefix('trained.')}"])
    if asynchronous:  # resumed, on shards, and validated without these averages
        checkpoint = str(tmp_path / "checkpoints" / "step-00000004.ckpt")
        ranks[2](short, shards, tmp_path, "sharded", steps=5, checkpoint=checkpoint)
        assert [each.step for each in find_snapshots(tmp_path)] == [2, 4, 5]
