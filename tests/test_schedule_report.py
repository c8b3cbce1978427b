"""zsnr schedule: the paper's numbers, tables and figure."""

import json
import math

import pytest
import torch
from PIL import Image

from zsnr import NoiseSchedule, RectifiedFlow, available_spacings
from zsnr.cli import main
from zsnr.reports.schedule import schedule_facts

TABLE_1 = {  # kind: SNR(T), sqrt(abar_T)
    "linear": (4.035993e-05, 0.006353),
    "cosine": (2.428767e-09, 4.928252e-05),
    "scaled_linear": (0.004682, 0.068265),
}


def run(capsys, *arguments):
    code = main(["schedule", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("kind", TABLE_1)
def test_json_has_table_1_and_ends_at_zero(capsys, kind):
    code, out, _ = run(capsys, kind, "--json")
    facts = json.loads(out)
    assert code == 0
    snr, scale = TABLE_1[kind]
    assert facts["original"]["snr_T"] == pytest.approx(snr, rel=1e-4)
    assert facts["original"]["sqrt_abar_T"] == pytest.approx(scale, abs=1e-6)
    assert facts["rescaled"]["snr_T"] == facts["rescaled"]["sqrt_abar_T"] == 0
    assert facts["rescaled"]["log_snr"][-1] is None
    for name in ("original", "rescaled"):
        curve = facts[name]
        for log, scale in zip(curve["log_snr"][:-1], curve["sqrt_abar"], strict=False):
            assert math.exp(log) == pytest.approx(scale**2 / (1 - scale**2), rel=1e-9)
    if kind != "cosine":  # Algorithm 1 by hand
        before, after = (facts[name]["sqrt_abar"] for name in ("original", "rescaled"))
        stretch = before[0] / (before[0] - before[-1])
        assert after == pytest.approx([(s - before[-1]) * stretch for s in before], abs=1e-12)
    assert set(facts["timesteps"]) == set(available_spacings())
    spacings = ("leading", "linspace", "trailing")
    assert {name: facts["timesteps"][name] for name in spacings} == {  # Table 2, counted from 0
        "leading": [*range(900, -1, -100)],
        "linspace": [*range(999, -1, -111)],
        "trailing": [*range(999, -1, -100)],
    }


def test_text_says_both_and_which_spacing_misses_the_end(capsys):
    code, out, _ = run(capsys, "--num-steps", 50)
    assert code == 0
    assert "scaled_linear, beta 0.00085 to 0.012, 1000 timesteps, rescaled to zero" in out
    assert "0.00468192" in out
    assert "-inf" in out
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "980 960 940 920 900 880 ..." in lines["leading"]
    assert lines["leading"].endswith("(never sees t=999)")
    assert lines["trailing"].startswith("trailing   999 979")
    assert "never" not in lines["linspace"]


def test_a_checkpoint_is_opened_when_asked(capsys, tmp_path):
    path, schedule = tmp_path / "a.ckpt", NoiseSchedule("cosine", 50)
    parts = dict.fromkeys(("codec", "conditioner", "network", "image_size"))
    own = {**parts, "schedule": schedule.settings(), "prediction_type": "v_prediction"}
    torch.save({"zsnr": own, "state_dict": {}}, path)
    code, _, err = run(capsys, path)
    assert code == 2
    assert "Use --open to read" in err
    code, out, _ = run(capsys, path, "--open", "--json")
    assert code == 0
    assert NoiseSchedule(**json.loads(out)["schedule"]) == schedule


def test_targets_are_those_of_the_doctor(capsys, tmp_path):
    config = {"_class_name": "PNDMScheduler", "beta_start": 0.001, "beta_end": 0.01}
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(config))
    code, out, _ = run(capsys, path, "--json")
    assert code == 0
    wanted = NoiseSchedule("linear", beta_start=0.001, beta_end=0.01, zero_terminal_snr=False)
    assert NoiseSchedule(**json.loads(out)["schedule"]) == wanted
    table = [1 - (t + 1) / 100 for t in range(100)]
    path = tmp_path / "own.yaml"
    path.write_text(
        "model: {schedule: {num_timesteps: 100, zero_terminal_snr: false, "
        f"alphas_cumprod_table: {table}}}}}"
    )
    code, out, _ = run(capsys, path, "--num-steps", 3)
    assert code == 0
    assert "a custom table, 100 timesteps, rescaled to zero terminal SNR" in out
    code, out, _ = run(capsys, path, "--num-steps", 3, "--json")
    assert json.loads(out)["original"]["sqrt_abar"] == pytest.approx([x**0.5 for x in table])


def test_plot(capsys, tmp_path):
    picture = tmp_path / "figure.png"
    assert run(capsys, "--plot", picture)[0] == 0
    assert Image.open(picture).size[0] > 500
    code, _, err = run(capsys, "--plot", picture)
    assert code == 2
    assert "exists" in err
    code, _, err = run(capsys, "--plot", picture / "inside.png")
    assert code == 2
    assert err.startswith("zsnr: error: ")
    assert "cannot be written" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such file or folder. Known kinds: linear, cosine, scaled_linear"),
        (["--spacing", "even"], "'even' is unknown"),
        (["--num-steps", "0"], "0"),
        (["--num-steps", "1001"], "1001"),
        (["--plot", "x.pdf"], "ends in .png"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_facts_of_few_spacings():
    facts = schedule_facts(NoiseSchedule(), 4, ["trailing"])
    assert facts["timesteps"] == {"trailing": [999, 749, 499, 249]}


def test_flow_has_one_curve_with_its_own_scale(capsys, tmp_path):
    path = tmp_path / "flow.json"
    path.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}')
    code, out, _ = run(
        capsys, path, "--json", "--spacing", "trailing", "--plot", tmp_path / "a.png"
    )
    facts = json.loads(out)
    assert code == 0
    assert facts["schedule"] == RectifiedFlow(3.0).settings()
    alpha = RectifiedFlow(3.0)(torch.arange(1000))[0].tolist()
    assert facts["original"]["alpha"] == facts["rescaled"]["alpha"] == alpha
    assert (facts["original"]["alpha_T"], facts["original"]["snr_T"]) == (0, 0)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 500
    path.write_text('{"_class_name": "EDMEulerScheduler"}')
    code, _, err = run(capsys, path)
    assert code == 2
    assert "does not declare a schedule on timesteps: variance-exploding" in err


def test_a_shift_is_shown(capsys, tmp_path):
    path = tmp_path / "video.json"
    path.write_text('{"_class_name": "CogVideoXDDIMScheduler"}')
    code, out, _ = run(capsys, path, "--spacing", "trailing")
    assert code == 0
    assert "SNR divided by 3, 1000 timesteps, keeps signal" in out
    assert f"{0.00468192 / 3:14.6g}" in out
