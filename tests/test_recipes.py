"""Other trainers' settings: which flags go together, and what is left of the loss at T."""

import json

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import norm

from zsnr import NoiseSchedule
from zsnr.doctor.examine import examine
from zsnr.doctor.recipes import nearest_noise_leak, weight_shares
from zsnr.doctor.trainers import read_recipe

KOHYA = {"pretrained_model_name_or_path": "sdxl.safetensors", "network_module": "networks.lora"}
V0 = {**KOHYA, "v_parameterization": True, "zero_terminal_snr": True}
GUI = {**V0, "sdxl": True, "t5xxl": "", "flux1_checkbox": False, "noise_offset_type": "Original"}
ONE = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE"}
ONE0 = {**ONE, "rescale_noise_scheduler_to_zero_terminal_snr": True}
TUNER = {"model_family": "sdxl", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
SCRIPT = {"pretrained_model_name_or_path": "x", "dataset_name": "y"}

CASES = [  # settings, verdict, words in the reason or the warnings
    (KOHYA, "flawed", "keeps signal"),
    ({**KOHYA, "min_snr_gamma": 5}, "flawed", "keeps signal"),
    ({**KOHYA, "noise_offset": 0.0357}, "flawed", "hides the flaw"),
    ({**KOHYA, "multires_noise_iterations": 6}, "flawed", "multi-resolution noise hides"),
    ({**KOHYA, "v_parameterization": True}, "flawed", "keeps signal"),
    ({**KOHYA, "zero_terminal_snr": True}, "inconsistent", "epsilon"),
    ({**KOHYA, "zero_terminal_snr": True, "min_snr_gamma": 5}, "inconsistent", "epsilon"),
    (V0, "fixed", "SNR_T = 0"),
    ({**V0, "min_snr_gamma": 5}, "inconsistent", "min-SNR leaves 0.29 %"),
    ({**V0, "min_snr_gamma": "1"}, "inconsistent", "min-SNR leaves"),
    ({**V0, "min_snr_gamma": 0}, "fixed", "SNR_T = 0"),
    ({**V0, "scale_v_pred_loss_like_noise_pred": True}, "inconsistent", "leaves 0.23 %"),
    ({**V0, "debiased_estimation_loss": True}, "fixed", "SNR_T = 0"),
    ({**V0, "min_snr_gamma": 5, "debiased_estimation_loss": True}, "inconsistent", "min-SNR and"),
    ({**V0, "noise_offset": 0.05}, "fixed", "offset noise of 0.05 beside zero terminal SNR"),
    ({**V0, "noise_offset": "0.0"}, "fixed", ""),
    ({**V0, "multires_noise_iterations": 8}, "fixed", "multi-resolution noise beside"),
    ({**V0, "immiscible_noise": 128}, "fixed", "up to 2.59 along the image"),
    ({**V0, "immiscible_noise": 4}, "fixed", "sqrt(abar_T) = 0.008"),
    ({**V0, "max_timestep": 900}, "inconsistent", "timesteps above t = 899 are never trained"),
    ({**V0, "max_timestep": 1000}, "fixed", ""),
    ({**KOHYA, "max_timestep": 900}, "flawed", "above t = 899"),
    ({**KOHYA, "flow_model": True}, "unknown", "flow matching"),
    ({"sdxl_prediction_type": "v_prediction", "zero_terminal_snr": True}, "fixed", ""),
    (ONE, "flawed", "keeps signal"),
    ({**ONE, "force_v_prediction": True}, "flawed", "keeps signal"),
    (ONE0, "fixed", "v_prediction"),  # it switches to v by itself
    ({**ONE0, "loss_weight_fn": "CONSTANT"}, "fixed", ""),
    ({**ONE0, "loss_weight_fn": "MIN_SNR_GAMMA"}, "inconsistent", "0.032 %"),
    ({**ONE0, "loss_weight_fn": "DEBIASED_ESTIMATION"}, "fixed", ""),
    ({**ONE0, "loss_weight_fn": "P2", "loss_weight_strength": 1.0}, "fixed", ""),
    ({**ONE0, "offset_noise_weight": 0.1}, "fixed", "offset noise of 0.1 beside"),
    ({**ONE0, "max_noising_strength": 0.9}, "inconsistent", "above t = 899"),
    ({**ONE0, "max_noising_strength": 1.0}, "fixed", ""),
    (TUNER, "fixed", ""),
    ({**TUNER, "snr_gamma": 5}, "inconsistent", "min-SNR leaves 0.032 %"),
    ({**TUNER, "prediction_type": "epsilon"}, "inconsistent", "epsilon"),
    ({**TUNER, "rescale_betas_zero_snr": False}, "flawed", "keeps signal"),
    (
        {**TUNER, "inference_scheduler_timestep_spacing": "leading"},
        "fixed",
        "previews do not start at T",
    ),
    ({"model_family": "flux", "lora_type": "standard"}, "unknown", "flow matching"),
    ({f"--{name}": value for name, value in TUNER.items()}, "fixed", ""),
    (SCRIPT, "flawed", "examine the base model too"),
    ({**SCRIPT, "pretrained_model_name_or_path": "a/FLUX.1-dev"}, "unknown", "flow matching"),
    ({**KOHYA, "network_module": "networks.lora_flux", "t5xxl": "x"}, "unknown", "flow matching"),
    ({"LoRA_type": "Flux1", "flux1_checkbox": True, "network_dim": 4}, "unknown", "flow matching"),
    ({**GUI, "noise_offset": 0.1, "noise_offset_type": "Multires"}, "fixed", ""),
    ({**GUI, "multires_noise_iterations": 6}, "fixed", ""),
    ({**ONE, "model_type": "STABLE_DIFFUSION_35"}, "unknown", "flow matching"),
    ({**SCRIPT, "snr_gamma": 5.0, "noise_offset": 0.1}, "flawed", "hides the flaw"),
    ({**SCRIPT, "prediction_type": "v_prediction"}, "flawed", "keeps signal"),
]


@pytest.mark.parametrize(("settings", "verdict", "words"), CASES)
def test_verdicts(tmp_path, settings, verdict, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    found = examine(path)
    assert found.verdict == verdict, found.reason
    assert words in " ".join((found.reason, *found.warnings))
    assert found.kind.startswith("settings of ")
    text = found.to_text()
    assert found.reason in text
    assert ("loss at t >= 900" in text) == ("loss_weight_t900" in found.facts)
    if verdict in ("flawed", "inconsistent"):
        assert found.changes


def test_one_recipe_in_every_spelling(tmp_path):
    toml = tmp_path / "config.toml"
    toml.write_text(
        "[model]\nv_parameterization = true\n[noise]\nzero_terminal_snr = true\n"
        "[loss]\nmin_snr_gamma = 5.0\nnoise_offset = 0.05\n"
    )
    script = tmp_path / "train.sh"
    script.write_text(
        "#!/bin/bash\n# accelerate launch --v2 old.py\n"
        'accelerate launch sdxl_train.py --pretrained_model_name_or_path="a b.safetensors" \\\n'
        "  --v_parameterization --zero_terminal_snr \\\n  --min_snr_gamma=5 --noise_offset 0.05\n"
    )
    batch = tmp_path / "train.bat"
    batch.write_text(
        "python x.py ^\n --v_parameterization ^\n --zero_terminal_snr --min_snr_gamma 5 "
        "--noise_offset 0.05"
    )
    found = [examine(path) for path in (toml, script, batch)]
    assert {f.verdict for f in found} == {"inconsistent"}
    assert len({(f.reason, f.warnings) for f in found}) == 1


def test_a_config_file_alone_tells_that_its_command_line_is_not_seen(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("network_module = 'networks.lora'\nzero_terminal_snr = true\n")
    found = examine(path)
    assert found.verdict == "inconsistent"
    [told] = [text for text in found.warnings if "command line" in text]
    assert told.startswith("it does not set --v_parameterization, and flags")
    path.write_text(path.read_text() + "v_parameterization = false\n")
    assert not any("command line" in text for text in examine(path).warnings)


def test_a_command_line_and_its_config_file_are_one_recipe(tmp_path):
    (tmp_path / "a.toml").write_text("v_parameterization = true\nmin_snr_gamma = 5\n")
    script = tmp_path / "train.sh"
    line = "accelerate launch --config_file=a.yaml sdxl_train.py --config_file={} {}\npause\n"
    script.write_text(line.format("/workspace/a.toml", "--zero_terminal_snr"))
    assert "min-SNR leaves 0.29 %" in examine(script).reason
    script.write_text(line.format("a", "--min_snr_gamma=0 --zero_terminal_snr "))
    assert examine(script).verdict == "fixed"
    script.write_text(line.format("b.toml", "--zero_terminal_snr"))
    found = examine(script)
    assert found.verdict == "unreadable"
    assert "b.toml (config_file), which is not beside it" in found.reason


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "dataset.toml",
            '[general]\nenable_bucket = true\ncaption_extension = ".txt"',
            "supported",
        ),
        ("deep.toml", "a = " + "[" * 5000, "deep.toml is not readable TOML"),
        ("scheduler_config.json", '{"prediction_type": "epsilon"}', "keeps signal"),
    ],
)
def test_what_is_no_recipe(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    found = examine(path)
    assert not found.kind.startswith("settings of ")
    assert message in found.reason


def test_variables_of_a_script_are_not_read(tmp_path):
    script = tmp_path / "train.sh"
    script.write_text(
        'python train.py --v_parameterization --zero_terminal_snr --min_snr_gamma="$gamma" '
        "--network_dim ${dim}\n"
    )
    found = examine(script)
    assert found.verdict == "fixed"
    assert "variables of the script set them: min_snr_gamma, network_dim" in found.warnings[0]


def test_metadata_of_kohya(tmp_path):
    path = tmp_path / "a.safetensors"
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight"
    said = {
        "ss_v_parameterization": "True",
        "ss_zero_terminal_snr": "True",
        "ss_min_snr_gamma": "5.0",
        "ss_noise_offset": "0.05",
        "ss_multires_noise_iterations": "None",
    }
    save_file({name: torch.zeros(4, 2048)}, path, said)
    found = examine(path)
    assert found.verdict == "fixed"
    text = " ".join(found.warnings)
    assert "min-SNR leaves 0.29 %" in text
    assert "offset noise of 0.05 beside" in text
    assert "multi-resolution" not in text
    save_file({name: torch.zeros(4, 2048)}, path, {**said, "ss_noise_offset": "x"})
    assert examine(path).verdict == "fixed"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**V0, "min_snr_gamma": "five"}, "min_snr_gamma=five: wanted a number"),
        ({**V0, "noise_offset": float("inf")}, "wanted"),
        ({**V0, "v_parameterization": "maybe"}, "v_parameterization='maybe': wanted true or false"),
        ({**ONE0, "loss_weight_fn": "MYSTERY"}, "loss_weight_fn='MYSTERY' is unknown"),
        ({**TUNER, "prediction_type": "x"}, "prediction_type='x' is unknown"),
        ({**TUNER, "model_family": "pixart_sigma"}, "only Stable Diffusion's schedule is judged"),
        ({**ONE, "model_type": "FLUX_DEV_1"}, "only Stable Diffusion's schedule is judged"),
    ],
)
def test_wrong_values_are_named(tmp_path, settings, message):
    (tmp_path / "c.json").write_text(json.dumps(settings))
    found = examine(tmp_path / "c.json")
    assert found.verdict == "unreadable"
    assert message in found.reason


def test_weights_by_closed_form():
    """The weights that the programs' sources define, by numbers of this test's own."""
    abar = NoiseSchedule(zero_terminal_snr=False).alphas_cumprod
    snr = abar / (1 - abar)
    weight = snr.clamp(max=5) / (snr + 1)
    share, last = weight_shares(read_recipe({**V0, "min_snr_gamma": 5}))
    assert share == pytest.approx(float(weight[900:].sum() / weight.sum()), rel=1e-12)
    assert last == pytest.approx(float(weight[-1] / weight.mean()), rel=1e-12)
    assert weight_shares(read_recipe(V0)) == (pytest.approx(0.1), 1)
    share, last = weight_shares(read_recipe({**ONE0, "loss_weight_fn": "MIN_SNR_GAMMA"}))
    assert share == pytest.approx(0.00032, abs=1e-5)
    assert last == 0


@pytest.mark.parametrize("count", [1, 2, 4, 16, 128])
def test_the_nearest_noise_shifts_the_mean(count):
    """By scipy's quadrature of the density of the maximum."""
    wanted = norm.expect(lambda x: x * count * norm.cdf(x) ** (count - 1))
    mean, leak = nearest_noise_leak(count)
    assert mean == pytest.approx(wanted, abs=1e-6)
    assert leak == pytest.approx(wanted / 128, abs=1e-8)


def test_it_is_the_shift_of_real_draws():
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(2000, 1, 64, generator=generator)
    noise = torch.randn(2000, 4, 64, generator=generator)
    along = (noise * x_0).sum(-1) / x_0.norm(dim=-1)
    wanted = nearest_noise_leak(4)[0]
    assert along.max(1).values.mean().item() == pytest.approx(wanted, abs=0.06)
    nearest = (noise - x_0).square().sum(-1).argmin(1)
    chosen = along[torch.arange(2000), nearest]
    assert chosen.mean().item() == pytest.approx(wanted * (2 / 3) ** 0.5, abs=0.06)
    assert along[:, 0].mean().item() == pytest.approx(0, abs=0.06)  # one noise for each sample
