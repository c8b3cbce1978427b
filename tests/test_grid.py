"""`zsnr timesteps optimize`, and grids from files."""

import json

import pytest
import torch
from PIL import Image

from zsnr import GaussianDenoiser, Multiscale, NoiseSchedule, get_sampler, get_timesteps, log_snr
from zsnr.checkpoints.run_facts import published, write_run_facts
from zsnr.cli import main
from zsnr.doctor.examine import examine
from zsnr.interop import DiffusersScheduler
from zsnr.interop.card import model_card
from zsnr.oracle import EmpiricalDenoiser, span
from zsnr.pipeline import Sampling, describe_sampling
from zsnr.reports.grid import STARTS, GridLoss, grid_text

SCHEDULE = NoiseSchedule()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Flat pictures of 20 greys, each with a square in a corner."""
    folder = tmp_path_factory.mktemp("greys")
    for i in range(60):
        level = round(255 * (i % 20) / 19)
        image = Image.new("RGB", (8, 8), (level, level, level))
        image.paste((0, 0, 0) if i % 2 else (255, 255, 255), (0, 0, 2 + i % 3, 2 + i % 3))
        image.save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text("a square")
    return folder


def run(capsys, *arguments):
    code = main(["timesteps", "optimize", *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture(scope="module")
def optimized(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "grid.json"
    settings = ("--num-steps", "4", "--image-size", "8", "--samples", "64", "--sampler", "ddim")
    assert main(["timesteps", "optimize", str(folder), "--output", str(path), *settings]) == 0
    return path, json.loads(path.read_text())


def test_the_grid_is_better_than_what_it_began_with(optimized, folder):
    _, facts = optimized
    grid = facts["timesteps"]
    assert grid[0] == 999
    assert len(grid) == 4
    total = {name: v["brightness"] + v["spread"] for name, v in facts["held_out"].items()}
    assert total["this"] < 0.9 * min(total[name] for name in ("log_snr", "karras", "trailing"))
    assert facts["images"] == 60
    assert facts["schedule"] == SCHEDULE.settings()


def test_the_same_settings_give_the_same_file(optimized, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zsnr.progress.INTERVAL", 0.0)
    path, _ = optimized
    settings = ("--num-steps", "4", "--image-size", "8", "--samples", "64", "--sampler", "ddim")
    code, out, err = run(capsys, folder, "--output", tmp_path / "again.json", *settings, "--json")
    assert code == 0
    assert "12/12 rounds" in err  # three starts, four rounds each
    assert (tmp_path / "again.json").read_text() == path.read_text()
    assert json.loads(out) == json.loads(path.read_text())
    code, _, err = run(capsys, folder, "--output", path, *settings)
    assert code == 2
    assert "exists" in err


def test_every_row_and_column_is_explained(optimized, tmp_path):
    _, facts = optimized
    text = grid_text(facts, tmp_path / "grid.json")
    table = text.partition("W1 to data\n")[2].partition("\n\n")[0].splitlines()
    assert [line[:12].strip() for line in table] == [*STARTS, "this grid", "many steps"]
    assert all(len(line[46:].split()) > 1 for line in table)
    assert "images that the grid was not chosen on" in text
    assert all(f"\n{name}:" in text for name in ("brightness", "spread", "W1 to data"))
    assert "no better" not in text
    worse = {"brightness": 9.0, "spread": 9.0, "to_data": 9.0}
    facts = {**facts, "held_out": {**facts["held_out"], "this": worse}}
    assert "no better than" in grid_text(facts, tmp_path / "grid.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-steps", "1"], "num_steps=1: wanted 2 to 1000"),
        (["--samples", "2"], "--samples 2: wanted at least 8"),
        (["--sampler", "plms"], "Known: 'ddim'"),
        (["--schedule", "sigmoid"], "sigmoid"),
        (["--output", "grid.txt"], "ends in .json"),
    ],
)
def test_wrong_input(folder, tmp_path, capsys, options, message):
    code, _, err = run(capsys, folder, "--output", tmp_path / "new.json", *options)
    assert code == 2
    assert message in err
    assert not (tmp_path / "new.json").exists()


def test_a_file_is_a_spacing(optimized, tmp_path):
    path, facts = optimized
    assert get_timesteps(str(path), 4).tolist() == facts["timesteps"]
    assert get_timesteps(str(path), 4, schedule=SCHEDULE).tolist() == facts["timesteps"]
    with pytest.raises(ValueError, match=r"grid of 4 steps: wanted 10\. Set num_steps=4"):
        get_timesteps(str(path), 10)
    with pytest.raises(ValueError, match="optimize one for this schedule"):
        get_timesteps(str(path), 4, schedule=NoiseSchedule("cosine"))
    bare = tmp_path / "bare.json"
    bare.write_text('{"timesteps": [999, 300, 20]}')
    assert get_timesteps(str(bare), 3, schedule=NoiseSchedule("cosine")).tolist() == [999, 300, 20]
    for text, message in (
        ("[999, 300]", "holds no grid"),
        ("nothing", "not JSON"),
        ('{"timesteps": [300, 999]}', "descending"),
        ('{"timesteps": [1000, 2]}', "wanted 999 to 0"),
        ('{"timesteps": [9.5, 2]}', "bare.json: .* not all integers"),
        ("[" * 100_000, "not JSON"),
        ('{"timesteps": [999, 2], "schedule": [1]}', "wanted settings by name"),
        ('{"timesteps": [999, 2], "schedule": {"beta": 1}}', "bare.json: schedule"),
        ('{"timesteps": [999, 2], "schedule": {"beta_start": "a"}}', "bare.json: schedule"),
        ('{"timesteps": [999, 2], "schedule": {"num_timesteps": 1e99}}', "not 1000"),
    ):
        bare.write_text(text)
        with pytest.raises(ValueError, match=message):
            get_timesteps(str(bare), 2)
    with pytest.raises(OSError, match="none.json: no such file; the current folder is"):
        get_timesteps("none.json", 2)
    bare.write_text('{"timesteps": [999, 2], "schedule": {"num_timesteps": 2000}}')
    with pytest.raises(ValueError, match="2000 timesteps, not 1000"):
        get_timesteps(str(bare), 2)


def test_schedulers_and_the_doctor_take_a_file(optimized, tmp_path):
    path, facts = optimized
    scheduler = DiffusersScheduler("multiscale", spacing=str(path))
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == facts["timesteps"]
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{sampling: {{spacing: {path}, num_steps: 4}}}}")
    assert examine(str(config)).verdict == "fixed"


def test_what_was_sampled_is_known_without_the_file(tmp_path):
    path = tmp_path / "my grid.json"
    path.write_text('{"timesteps": [999, 300, 20]}')
    facts = describe_sampling(Sampling(num_steps=3, spacing=str(path)))
    assert facts["timesteps"] == [999, 300, 20]
    assert "timesteps" not in describe_sampling(Sampling())
    path.write_text('{"timesteps": [999, 200, 20]}')  # another way to sample, by the same name
    assert describe_sampling(Sampling(num_steps=3, spacing=str(path))) != facts
    path.unlink()

    run = {"format": 1, "schedule": SCHEDULE.settings(), "sampling": json.loads(json.dumps(facts))}
    (tmp_path / "last.ckpt").write_bytes(b"")
    for own, verdict in (
        ([999, 300, 20], "fixed"),
        ([900, 300, 20], "inconsistent"),
        ([999, 300], "unreadable"),
        ([999, 300, "20"], "unreadable"),
        ("999", "unreadable"),
    ):
        run["sampling"]["timesteps"] = own
        write_run_facts(tmp_path, run)
        assert examine(tmp_path / "last.ckpt").verdict == verdict, own
    with pytest.raises(OSError, match="my grid.json"):
        Sampling(num_steps=3, spacing=str(path))


def test_a_card_names_the_grid_and_not_the_place_of_its_file():
    sampling = {
        "sampler": "multiscale",
        "spacing": "/home/somebody/secret/runs/grid.json",
        "timesteps": [999, 300, 20],
        "guidance_interval": [0.3, None],
    }
    facts = {"schedule": SCHEDULE.settings(), "prediction_type": "v_prediction"}
    card = model_card("x", {**facts, "sampling": sampling})
    assert "made with multiscale on the timesteps 999, 300, 20" in card
    assert "somebody" not in card
    assert "sigma / alpha from 0.3 to inf" in card
    assert published({"sampling": sampling})["sampling"]["spacing"] == "runs/grid.json"
    del sampling["timesteps"]
    assert "somebody" not in model_card("x", {**facts, "sampling": sampling})
    assert "guided at some" not in model_card("x", facts)


def test_the_loss_falls_with_more_steps(folder):
    images = torch.stack(
        [torch.full((3, 4, 4), level) for level in torch.linspace(-1, 1, 12).tolist()]
    )
    loss = GridLoss(images, SCHEDULE, get_sampler("multiscale"), 64, 0)
    totals = [loss(log_snr(S)).total for S in (3, 5, 10, 40)]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < 0.01
    noisy = GridLoss(images, SCHEDULE, get_sampler("dpmpp_2m_sde"), 64, 0)
    assert noisy(log_snr(10)) == noisy(log_snr(10))


def test_directions_without_spread_do_not_count():
    """Four pictures lie in three directions about their mean, and a fourth is rounding alone."""
    pictures = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    loss = GridLoss(pictures, SCHEDULE, get_sampler("multiscale"), 64, 100)
    assert loss(log_snr(40)).spread < 1e-12  # each sample ends at the picture of the exact solution
    with pytest.raises(ValueError, match="all have the same brightness"):
        GridLoss(torch.zeros(4, 3, 8, 8), SCHEDULE, get_sampler("multiscale"), 64, 0)


def test_the_oracle_in_the_span_of_its_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    images[5] = images[0] - 2 * images[1]
    coordinates, basis = span(images)
    assert coordinates.shape == (6, 5)
    torch.testing.assert_close(coordinates @ basis, images.flatten(1).double())
    torch.testing.assert_close(basis @ basis.T, torch.eye(5, dtype=torch.float64))
    x_T = torch.randn(7, 3, 4, 4, generator=generator, dtype=torch.float64)
    for sampler in (Multiscale(), get_sampler("ddim"), get_sampler("unipc")):
        wanted = sampler.sample(EmpiricalDenoiser(SCHEDULE, images), SCHEDULE, x_T, log_snr(8))
        for invariant in (True, False):
            found = sampler.sample(
                EmpiricalDenoiser(SCHEDULE, coordinates, batch_invariant=invariant),
                SCHEDULE,
                x_T.flatten(1) @ basis.T,
                log_snr(8),
            )
            torch.testing.assert_close(found @ basis, wanted.flatten(1), rtol=0, atol=1e-9)


def test_gaussians_see_a_grid_of_a_file(tmp_path):
    path = tmp_path / "g.json"
    path.write_text(json.dumps({"timesteps": log_snr(10).tolist()}))
    x_T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    oracle = GaussianDenoiser(SCHEDULE, -0.8, 0.5)
    found, wanted = (
        Multiscale().sample(oracle, SCHEDULE, x_T, get_timesteps(spacing, 10))
        for spacing in (str(path), "log_snr")
    )
    assert torch.equal(found, wanted)
