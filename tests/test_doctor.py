"""zsnr doctor: verdicts, words, exit codes, --fix, and files that mean harm."""

import inspect
import json
import math
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from zsnr import DDIM, DPMpp2M, NoiseSchedule, RectifiedFlow, get_timesteps
from zsnr.checkpoints import run_facts
from zsnr.cli import main
from zsnr.doctor.examine import examine, fix
from zsnr.doctor.runs import DEFAULT_SAMPLING, model_settings
from zsnr.interop.declared import SCHEDULERS
from zsnr.metrics import kept_fraction
from zsnr.oracle import GaussianDenoiser

DATA = Path(__file__).parent / "data" / "schedulers"
SD = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
OURS = {  # as exports write it
    **SD,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "trained_betas": None,
    "thresholding": False,
}
UNCAPPED = [*torch.linspace(0.001, 0.1, 99, dtype=torch.float64).tolist(), 1.0]
VERDICTS = ("fixed", "flawed", "inconsistent", "unreadable", "unknown")
RUN = {
    "format": 1,
    "zsnr_version": "0.1",
    "schedule": NoiseSchedule().settings(),
    "prediction_type": "v_prediction",
    "loss": {"name": "uniform", "gamma": 5.0, "allow_zero_terminal_weight": False},
    "sampling": DEFAULT_SAMPLING,
    "image_size": 512,
    "global_step": 7,
}


def write(folder, config, name="scheduler_config.json"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(config))
    return path


def judge(folder, **config):
    return examine(write(folder, {**OURS, **config}))


def diffusers_folder(folder, config, named=None):
    write(folder, {"scheduler": ["diffusers", named or config["_class_name"]]}, "model_index.json")
    write(folder / "unet", {"cross_attention_dim": 1024, "sample_size": 64}, "config.json")
    write(folder / "scheduler", config)
    return folder


@pytest.mark.parametrize(
    ("name", "verdict", "prediction_type"),
    [
        ("sd15", "flawed", "epsilon"),
        ("sd21_base", "flawed", "epsilon"),
        ("sd21_v", "flawed", "v_prediction"),
        ("sdxl", "flawed", "epsilon"),
        ("sd21_base_zsnr_laionaes5", "fixed", "v_prediction"),
    ],
)
def test_well_known_models(name, verdict, prediction_type):
    found = examine(DATA / f"{name}.json")
    assert (found.verdict, found.facts["prediction_type"]) == (verdict, prediction_type)
    assert found.exit_code == VERDICTS.index(verdict)
    if verdict == "flawed":
        assert found.facts["snr_T"] == pytest.approx(0.004682, abs=1e-6)
        assert found.facts["sqrt_abar_T"] == pytest.approx(0.068265, abs=1e-6)
        assert found.facts["first_timestep"][50] == 981
        assert found.facts["kept_brightness"]["fraction"] == pytest.approx(0.416, abs=5e-4)
        assert any("t = 981 for S = 50" in text for text in found.warnings)
        assert any("zsnr fit" in text for text in found.changes)
    else:
        assert set(found.facts["first_timestep"].values()) == {999}
        assert not found.changes


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({}, "fixed", "sampling starts at T"),
        ({"prediction_type": "sample"}, "fixed", "sample, and"),
        ({"timestep_spacing": "linspace"}, "fixed", "sampling starts at T"),
        ({"timestep_spacing": "leading"}, "inconsistent", "does not start at T: t = 901"),
        ({"prediction_type": "epsilon"}, "inconsistent", "epsilon"),
        ({"_class_name": "PNDMScheduler"}, "inconsistent", "PNDMScheduler drops"),
        ({"_class_name": "LMSDiscreteScheduler"}, "inconsistent", "LMSDiscreteScheduler drops"),
        ({"_class_name": "HeunDiscreteScheduler"}, "inconsistent", "HeunDiscreteScheduler drops"),
        ({"_class_name": "EulerDiscreteScheduler"}, "fixed", "SNR_T = 0"),
        ({"_class_name": "LCMScheduler"}, "fixed", "SNR_T = 0"),
        (
            {"_class_name": "LCMScheduler", "original_inference_steps": 30},
            "inconsistent",
            "t = 989",
        ),
        ({"rescale_betas_zero_snr": False}, "flawed", "keeps signal"),
        ({"rescale_betas_zero_snr": False, "prediction_type": "epsilon"}, "flawed", "keeps signal"),
        (
            {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": False},
            "flawed",
            "keeps signal",
        ),
        (
            {
                "trained_betas": UNCAPPED,
                "num_train_timesteps": 100,
                "rescale_betas_zero_snr": False,
            },
            "fixed",
            "SNR_T = 0",
        ),
        (
            {"trained_betas": UNCAPPED, "num_train_timesteps": 100, "_class_name": "PNDMScheduler"},
            "fixed",
            "SNR_T = 0",
        ),
        ({"trained_betas": UNCAPPED}, "inconsistent", "has 100 entries, num_train_timesteps is"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "fixed", "SNR_T = 0"),
        ({"prediction_type": "v"}, "unreadable", "Known: 'epsilon'"),
        ({"_class_name": ["DDIMScheduler"]}, "unreadable", "a list is unknown"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
            "inconsistent",
            "t = 901",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True},
            "fixed",
            "SNR_T = 0",
        ),
    ],
)
def test_verdicts_of_configs(tmp_path, change, verdict, words):
    found = judge(tmp_path, **change)
    assert found.verdict == verdict
    assert words in found.reason
    assert bool(found.changes) == (verdict in ("flawed", "inconsistent"))


def test_missing_keys_have_the_defaults_of_the_class(tmp_path):
    v = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert examine(write(tmp_path / "a", v)).verdict == "inconsistent"  # leading
    euler = {**v, "_class_name": "EulerDiscreteScheduler"}
    assert examine(write(tmp_path / "b", euler)).verdict == "fixed"  # linspace
    found = examine(write(tmp_path / "c", {**v, "_class_name": "TCDScheduler"}))
    assert "timestep_spacing" in found.facts["defaults_taken"]
    assert found.facts["timestep_spacing"] == "its own"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "10 of 30 steps"),
        ({}, "62 values of S (61, 103, 121, ...)"),
        ({}, "eta = 1 may be NaN"),
        ({"_class_name": "EulerDiscreteScheduler"}, "2^-24"),
        ({"clip_sample": True}, '"clip_sample": false'),
        ({"thresholding": True}, '"thresholding": false'),
        ({"steps_offset": 999, "timestep_spacing": "leading"}, "outside of the schedule"),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "trained_betas": UNCAPPED,
                "num_train_timesteps": 100,
                "rescale_betas_zero_snr": False,
            },
            "infinite or NaN",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True},
            "spaces noise levels",
        ),
    ],
)
def test_warnings_leave_the_verdict(tmp_path, change, words):
    assert any(words in text for text in judge(tmp_path, **change).warnings)


def test_asked_step_counts_are_looked_at(tmp_path):
    found = examine(write(tmp_path, {**OURS, "timestep_spacing": "linspace"}), num_steps=[1, 7])
    assert found.facts["first_timestep"][7] == 999
    assert "t = 0 for S = 1" in found.reason  # linspace of one step is the first of all
    assert examine(write(tmp_path, OURS), num_steps=[0]).verdict == "unreadable"


def test_infinity_as_diffusers_writes_it_is_read(tmp_path):
    path = write(tmp_path, {**OURS, "_class_name": "DPMSolverMultistepScheduler"})
    path.write_text(path.read_text()[:-1] + ', "lambda_min_clipped": -Infinity}')
    assert examine(path).verdict == "fixed"


@pytest.mark.peer
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "DPMSolverSDEScheduler"])
def test_configs_that_diffusers_saves_are_read(tmp_path, name):
    import diffusers

    scheduler = getattr(diffusers, name).from_config(OURS)
    scheduler.save_pretrained(tmp_path)
    found = examine(tmp_path)
    assert found.verdict == ("fixed" if SCHEDULERS[name].rescales else "inconsistent")


def test_diffusers_folders(tmp_path):
    found = examine(diffusers_folder(tmp_path / "a", OURS))
    assert (found.kind, found.verdict) == ("diffusers folder", "fixed")
    assert found.facts["model"] == "SD 2, context of 1024, latents of 64x64"
    found = examine(diffusers_folder(tmp_path / "b", OURS, "PNDMScheduler"))
    assert (found.verdict, found.facts["scheduler"]) == ("inconsistent", "PNDMScheduler")
    assert any("diffusers uses the first" in text for text in found.warnings)
    assert found.changes == ('model_index.json: "scheduler": ["diffusers", "DDIMScheduler"]',)
    (tmp_path / "a" / "scheduler" / "scheduler_config.json").unlink()
    assert "cannot be read" in examine(tmp_path / "a").reason


def test_links_out_of_a_folder_are_refused(tmp_path):
    secret = write(tmp_path / "elsewhere", OURS)
    folder = diffusers_folder(tmp_path / "a", OURS)
    config = folder / "scheduler" / "scheduler_config.json"
    config.unlink()
    config.symlink_to(secret)
    found = examine(folder)
    assert found.verdict == "unreadable"
    assert "is a link out of" in found.reason
    with pytest.raises(ValueError, match="is a link out of"):
        fix(folder, in_place=True)
    assert json.loads(secret.read_text()) == OURS


@pytest.mark.parametrize("name", ["scheduler_config.json", "run.json", "checkpoints"])
def test_links_out_of_plain_folders_and_runs_are_refused(tmp_path, name):
    secret = write(tmp_path / "elsewhere", OURS).parent
    run_facts.write_run_facts(secret, RUN)
    (tmp_path / "a").mkdir()
    link, checkpoint = tmp_path / "a" / name, tmp_path / "a" / "a.ckpt"
    link.symlink_to(secret if name == "checkpoints" else secret / name)
    checkpoint.touch()
    targets = [tmp_path / "a", *([checkpoint] if name == "run.json" else [])]
    for target in targets:
        found = examine(target)
        assert found.verdict == "unreadable"
        assert "is a link out of" in found.reason
    if name == "scheduler_config.json":
        link.unlink()
        link.symlink_to(write(secret, {**OURS, "timestep_spacing": "leading"}))
        with pytest.raises(ValueError, match="is a link out of"):
            fix(tmp_path / "a", in_place=True)


def test_a_link_to_a_checkpoint_is_that_checkpoint(tmp_path):
    run_facts.write_run_facts(tmp_path / "run", RUN)
    (tmp_path / "run" / "step-7.ckpt").touch()
    (tmp_path / "best.ckpt").symlink_to(tmp_path / "run" / "step-7.ckpt")
    assert examine(tmp_path / "best.ckpt").verdict == "fixed"


def test_the_hubs_cache_links_into_its_own_store(tmp_path):
    blob = write(tmp_path / "models--a--b" / "blobs", OURS, "0123")
    folder = diffusers_folder(tmp_path / "models--a--b" / "snapshots" / "77c7", OURS)
    config = folder / "scheduler" / "scheduler_config.json"
    config.unlink()
    config.symlink_to(blob)
    assert examine(folder).verdict == "fixed"
    assert examine(folder / "scheduler").verdict == "fixed"


# Single files

UNET = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (4, 1024)}
VAE = {"encoder.conv_in.weight": (4, 3, 3, 3), "decoder.conv_in.weight": (4, 4, 3, 3)}
FLUX_LORA = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 8)}
LORA = {"lora_unet_down_blocks_0_attentions_0_attn2_to_k.lora_down.weight": (4, 768)}


def single(path, shapes=UNET, marks=(), metadata=None, table=None):
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors |= {mark: torch.tensor([]) for mark in marks}
    if table is not None:
        tensors["alphas_cumprod"] = table
    save_file(tensors, path, metadata)
    return examine(path)


THEIRS = {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (4, 768)}
ZERO, SIGNAL = NoiseSchedule().alphas_cumprod, NoiseSchedule(zero_terminal_snr=False).alphas_cumprod


@pytest.mark.parametrize(
    ("made", "verdict", "words"),
    [
        ({"marks": ("v_pred", "ztsnr")}, "fixed", "both marks"),
        ({"marks": ("v_pred", "ztsnr"), "table": SIGNAL}, "fixed", "both marks"),
        ({"marks": ("ztsnr",)}, "inconsistent", "epsilon"),
        ({"marks": ("v_pred",)}, "flawed", "v_prediction by the mark v_pred"),
        ({}, "unknown", "cannot be told"),
        ({"table": SIGNAL.float()}, "flawed", "0.0682649"),
        ({"table": ZERO}, "unknown", "ends at SNR 0, but not what it predicts"),
        ({"metadata": {"ss_zero_terminal_snr": "True"}}, "unknown", "not what it predicts"),
        ({"metadata": {"modelspec.prediction_type": "v"}}, "unknown", "predicts v_prediction by"),
        ({"metadata": {"modelspec.prediction_type": "epsilon"}}, "flawed", "epsilon by"),
        (
            {
                "shapes": LORA,
                "metadata": {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
            },
            "fixed",
            "its declarations: v_prediction",
        ),
        ({"shapes": LORA, "metadata": {"ss_zero_terminal_snr": "True"}}, "unknown", "not what it"),
        ({"shapes": LORA}, "unknown", "an adapter has no schedule of its own"),
        ({"shapes": {"x": (2,)}}, "unreadable", "no tensor's name starts with 'model."),
        ({"shapes": VAE}, "unreadable", "it holds only a VAE, which --vae takes"),
        ({"shapes": {"double_blocks.0.x": (2,)}}, "unknown", "trained by flow matching"),
        (
            {"shapes": FLUX_LORA, "metadata": {"modelspec.prediction_type": "epsilon"}},
            "unknown",
            "flow",
        ),
        ({"shapes": {**UNET, "edm_vpred.sigma_max": ()}}, "unknown", "EDM's noise levels"),
        ({"shapes": {"x": (2,)}, "marks": ("v_pred",)}, "flawed", "by the mark v_pred"),
        ({"shapes": THEIRS}, "unreadable", "the folder that holds model_index.json"),
        ({"shapes": THEIRS, "marks": ("v_pred", "ztsnr")}, "fixed", "both marks"),
    ],
)
def test_verdicts_of_single_files(tmp_path, made, verdict, words):
    found = single(tmp_path / "m.safetensors", **made)
    assert found.verdict == verdict
    assert words in found.reason
    assert found.exit_code == {"fixed": 0, "flawed": 1, "inconsistent": 2}.get(verdict, 3)
    if verdict in ("flawed", "inconsistent"):
        assert found.changes
    if verdict == "fixed" and made.get("shapes") is not LORA:
        assert any("start at T" in text for text in found.warnings)


def test_single_files_say_what_they_are_of(tmp_path):
    path = tmp_path / "m.safetensors"
    assert single(path).facts["model"] == "SD 2"
    assert single(path, LORA).facts["model"] == "SD 1 LoRA"
    xl = {"model.diffusion_model.label_emb.0.0.weight": (4, 4)}
    assert single(path, xl).facts["model"] == "SDXL"
    assert single(path, THEIRS, ("v_pred",)).facts["model"] == "SD 1 UNet of diffusers"
    assert single(path, {"x": (2,)}, ("v_pred",)).facts["model"] == "other"
    found = single(path, metadata={"modelspec.title": "A\x1b[31m\n" + "b" * 500})
    assert len(found.facts["metadata"]["modelspec.title"]) < 80
    assert "\x1b" not in found.to_text()
    wide = {"modelspec.prediction_type": "epsilon"}
    found = single(path, marks=("v_pred",), metadata=wide)
    assert any("v_pred declares v_prediction, but the metadata" in w for w in found.warnings)


# This package's checkpoints and YAML


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({}, "fixed", ""),
        ({"prediction_type": "epsilon"}, "inconsistent", "epsilon"),
        ({"schedule": NoiseSchedule(zero_terminal_snr=False).settings()}, "flawed", "keeps signal"),
        ({"sampling": {**DEFAULT_SAMPLING, "spacing": "leading"}}, "inconsistent", "t = 980"),
        ({"format": 2}, "unreadable", "format 1"),
        ({"schedule": None}, "unreadable", "record the run's schedule"),
        ({"schedule": []}, "unreadable", "wanted settings"),
        ({"schedule": {"num_timesteps": 10**9}}, "unreadable", "wanted an int, 2 to 100000"),
        ({"schedule": {"betas": ["linear"]}}, "unreadable", "betas is a list"),
        ({"schedule": {"beta": 1}}, "unreadable", "beta"),
        ({"schedule": {"alphas_cumprod_table": [None, 1]}}, "unreadable", "schedule"),
        ({"sampling": {**DEFAULT_SAMPLING, "num_steps": 10**9}}, "unreadable", "wanted 1 to 1000"),
        ({"sampling": {**DEFAULT_SAMPLING, "spacing": "x"}}, "unreadable", "'x' is unknown"),
        ({"sampling": {**DEFAULT_SAMPLING, "guidance_scale": math.nan}}, "unreadable", "nan"),
        ({"loss": {"name": "none"}}, "unreadable", "Known: 'uniform'"),
        ({"loss": {"name": "soft_min_snr", "gamma": 1e308}}, "unreadable", "not finite"),
    ],
)
def test_verdicts_of_runs(tmp_path, change, verdict, words):
    run_facts.write_run_facts(tmp_path, {**RUN, **change})
    (tmp_path / "last.ckpt").write_bytes(b"not opened")
    for target in (tmp_path, tmp_path / "last.ckpt", tmp_path / "run.json"):
        found = examine(target)
        assert found.verdict == verdict
        assert words in found.reason
    if verdict in ("flawed", "inconsistent"):
        assert found.changes


def test_runs_of_rectified_flow(tmp_path, capsys):
    run = {**RUN, "schedule": RectifiedFlow(3.0).settings(), "prediction_type": "flow"}
    found = examine(write(tmp_path, run, "run.json"))
    assert (found.verdict, found.facts["snr_T"]) == ("fixed", 0)
    assert "rectified flow, shift 3, T = 1000" in found.to_text()
    leading = {**run, "sampling": {**DEFAULT_SAMPLING, "spacing": "leading"}}
    assert examine(write(tmp_path / "a", leading, "run.json")).verdict == "inconsistent"
    (tmp_path / "last.ckpt").touch()
    assert main(["schedule", str(tmp_path / "last.ckpt"), "--spacing", "trailing"]) == 0
    printed = capsys.readouterr().out
    assert "rectified flow, shift 3, 1000 timesteps, ends at zero SNR" in printed
    assert "alpha_T             0.000000" in printed
    assert "rescaled" not in printed


def test_runs_tell_the_weight_of_the_last_step(tmp_path):
    run_facts.write_run_facts(tmp_path, {**RUN, "loss": {"name": "min_snr", "gamma": 5.0}})
    found = examine(tmp_path)
    assert found.facts["terminal_loss_weight"] == 0
    assert any("barely learns" in text for text in found.warnings)
    assert any("uniform" in text for text in found.changes)
    run_facts.write_run_facts(tmp_path, RUN)
    assert examine(tmp_path).facts["terminal_loss_weight"] == 1
    for share, fine in ((1.0, True), (0.0, False)):
        loss = {"name": "learned", "allow_zero_terminal_weight": True, "min_terminal_share": share}
        run_facts.write_run_facts(tmp_path, {**RUN, "loss": loss})
        found = examine(tmp_path)
        assert found.facts["terminal_loss_weight"] == share
        assert fine != any("last timestep" in warning for warning in found.warnings)
    guidance = {**DEFAULT_SAMPLING, "guidance_rescale": 0}
    run_facts.write_run_facts(tmp_path, {**RUN, "sampling": guidance})
    assert any("over-exposes" in text for text in examine(tmp_path).warnings)
    guidance |= {"guidance_method": "apg", "guidance_interval": [0.3, None]}
    run_facts.write_run_facts(tmp_path, {**RUN, "sampling": guidance})
    assert not any("over-exposes" in text for text in examine(tmp_path).warnings)
    assert examine(tmp_path).facts["guidance_method"] == "apg"
    guidance["guidance_curve"] = "steep"
    run_facts.write_run_facts(tmp_path, {**RUN, "sampling": guidance})
    assert "wanted knots (log SNR, w)" in examine(tmp_path).reason
    run_facts.write_run_facts(tmp_path, {**RUN, "sampling": None})
    assert any("assumed" in text for text in examine(tmp_path).warnings)


def test_checkpoints_are_opened_only_when_asked(tmp_path):
    from zsnr.checkpoints.checkpoint_file import KEY

    path = tmp_path / "a.ckpt"
    model = {key: RUN[key] for key in ("schedule", "prediction_type", "image_size")}
    model |= {"codec": {}, "conditioner": {}, "network": {}}
    torch.save({KEY: model, "state_dict": {}}, path)
    closed = examine(path)
    assert closed.verdict == "unreadable"
    assert "--open" in closed.reason
    assert examine(path, open_pickle=True).verdict == "fixed"
    torch.save({KEY: model, "state_dict": {}, "run": {**RUN, "prediction_type": "epsilon"}}, path)
    assert examine(path, open_pickle=True).verdict == "inconsistent"
    torch.save({"state_dict": {}}, path)
    assert "not written by zsnr" in examine(path, open_pickle=True).reason


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_nothing_in_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"zsnr": Harm(), "state_dict": {}}, "a.ckpt")
    assert examine("a.ckpt", open_pickle=True).verdict == "unreadable"
    assert not Path("harm").exists()


def test_packed_checkpoints_are_not_unpacked(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    found = examine(path, open_pickle=True)
    assert found.verdict == "unreadable"
    assert "compressed" in found.reason
    path.write_bytes(b"PK\x03\x04" + os.urandom(1000))
    assert examine(path, open_pickle=True).verdict == "unreadable"


def yaml_file(folder, model):
    path = folder / "a.yaml"
    path.write_text(yaml.safe_dump({"model": model}))
    return examine(path)


@pytest.mark.parametrize(
    ("model", "verdict", "words"),
    [
        ({}, "fixed", "SNR_T = 0"),
        ({"schedule": {"betas": "cosine"}}, "fixed", "SNR_T = 0"),
        ({"schedule": {"zero_terminal_snr": False}}, "flawed", "keeps signal"),
        ({"prediction_type": "epsilon"}, "inconsistent", "epsilon"),
        ({"sampling": {"spacing": "leading", "num_steps": 25}}, "inconsistent", "t = 960"),
        (
            {"schedule": {"class_path": "zsnr.NoiseSchedule", "init_args": {"num_timesteps": 20}}},
            "fixed",
            "SNR_T",
        ),
        ({"sampling": {"num_steps": "50"}}, "unreadable", "num_steps='50'"),
        ({"sampling": [1]}, "unreadable", "wanted settings"),
        ({"predictiontype": "epsilon"}, "unreadable", "has no 'predictiontype'. Known: codec"),
        ({"unet": {}}, "unreadable", "model.unet is now model.network."),
        ({"sampling": {"spacings": "leading"}}, "unreadable", "model.sampling has no 'spacings'"),
        ({"sampling": {"guidance": {"phi": 0}}}, "unreadable", "Known: scale, rescale, interval"),
        ({"sampling": {"guidance": {"method": "apg", "apg_norm": 2.5}}}, "fixed", "SNR_T"),
        ({"sampling": {"guidance": {"curve": [[-6, 1], [0, 7.5]]}}}, "fixed", "SNR_T"),
        ({"sampling": {"guidance": {"interval": [0.3, math.inf]}}}, "fixed", "SNR_T"),
        ({"sampling": {"guidance": {"method": "apgg"}}}, "unreadable", "Known: 'cfg', 'apg'"),
        ({"sampling": {"guidance": {"method": "cfg_pp"}}}, "unreadable", "in [0, 1]"),
        ({"class_path": "my.Model", "init_args": {"own": 1}}, "fixed", "SNR_T"),
    ],
)
def test_verdicts_of_yaml(tmp_path, model, verdict, words):
    sampling = {"num_steps": 20} if "class_path" in model.get("schedule", {}) else None
    found = yaml_file(tmp_path, {**({"sampling": sampling} if sampling else {}), **model})
    assert found.verdict == verdict
    assert words in found.reason


@pytest.mark.parametrize(
    "name", ["RectifiedFlow", "zsnr.RectifiedFlow", "zsnr.schedule.NoiseSchedule"]
)
def test_yaml_names_the_class_of_its_schedule(tmp_path, name):
    options = {"shift": 3.0} if name.endswith("Flow") else {"snr_shift": 3.0}
    schedule = {"class_path": name, "init_args": options}
    rare = {"name": "logit_normal", "allow_rare_terminal": True}
    found = yaml_file(tmp_path, {"schedule": schedule, "timestep_law": rare})
    assert found.verdict == "fixed"
    assert "shift 3" in found.to_text() or "SNR divided by 3" in found.to_text()
    assert "timestep law 'logit_normal' visits the last timestep 2.5e-09 times" in found.warnings[0]
    assert found.changes == ("a.yaml: timestep_law.name: uniform",)
    other = {"class_path": "mine.Cosine", "init_args": {}}
    found = yaml_file(tmp_path, {"schedule": other})
    assert "a 'mine.Cosine', whose SNR cannot be told" in found.reason


def test_yaml_of_the_training_command(tmp_path):
    root = Path(__file__).parents[1] / "configs"
    for name in ("quickstart", "tiny", "sd15_zsnr", "sd21_zsnr", "sdxl_zsnr"):
        assert examine(root / f"{name}.yaml").verdict == "fixed"
    path = tmp_path / "a.yaml"
    path.write_text("model: {schedule: {beta_start: 1e-4}}")
    assert examine(path).facts["schedule"]["beta_start"] == 1e-4
    path.write_text("trainer: {}")
    assert "no `model:` block" in examine(path).reason


@pytest.mark.parametrize(
    ("spacing", "words"),
    [
        ("ays", "'ays' was made for schedules that end at SNR > 0: 2 to 8 times"),
        ("kl_optimal", "'kl_optimal' was made for schedules that end at SNR > 0: 2 to 8 times"),
        ("beta", "'beta' was not made for zero SNR: 1.3 to 7 times"),
        ("log_snr", None),
        ("karras", None),
    ],
)
@pytest.mark.parametrize(("num_steps", "better"), [(8, "guided"), (50, "trailing")])
def test_spacings_of_other_schedules_are_warned_of_at_zero_snr(
    tmp_path, spacing, words, num_steps, better
):
    sampling = {"spacing": spacing, "num_steps": num_steps}
    run = {**RUN, "sampling": {**DEFAULT_SAMPLING, **sampling}}
    original = NoiseSchedule(zero_terminal_snr=False).settings()
    found = examine(write(tmp_path, run, "run.json"))
    for diagnosis, where in (
        (found, "run.json"),
        (yaml_file(tmp_path, {"sampling": sampling}), "a.yaml"),
    ):
        assert diagnosis.verdict == "fixed"
        assert any(words in text for text in diagnosis.warnings if words) == (words is not None)
        change = f"{where}: sampling.spacing: {better}"
        assert (change in diagnosis.changes) == (words is not None), diagnosis.changes
    flawed = examine(write(tmp_path, {**run, "schedule": original}, "run.json"))
    assert not any("timestep spacing" in text for text in flawed.warnings)


@pytest.mark.parametrize("zero", [True, False])
def test_beta_sigmas_are_warned_of_at_zero_snr(tmp_path, zero):
    config = {"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}
    found = judge(tmp_path, **config, rescale_betas_zero_snr=zero)
    assert any("divides sigma, which is unbounded" in text for text in found.warnings) == zero


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        ({}, ("ddim", "trailing")),
        ({"num_steps": 8}, ("multiscale", "guided")),
        ({"num_steps": 8, "sampler": "auto", "spacing": "auto"}, ("multiscale", "guided")),
        ({"num_steps": 8, "guidance": {"scale": 1}}, ("multiscale", "log_snr")),
        ({"num_steps": 8, "spacing": "linspace"}, ("ddim", "linspace")),
        ({"num_steps": 8, "sampler": {"class_path": "zsnr.UniPC"}}, ("zsnr.UniPC", "trailing")),
    ],
)
def test_auto_is_judged_by_what_it_stands_for(tmp_path, sampling, wanted):
    found = yaml_file(tmp_path, {"sampling": sampling})
    assert found.verdict == "fixed"
    assert (found.facts["sampler"], found.facts["timestep_spacing"]) == wanted
    assert set(found.facts["first_timestep"].values()) == {999}


def test_the_doctors_factors_of_compared_spacings():
    """The spread of the brightness of 64x64 images, relative to the data's, beside log_snr's."""
    ratios = {}
    root, schedule = 64.0, NoiseSchedule()
    oracle = GaussianDenoiser(schedule, -0.8 * root, 0.5 * root)
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for spacing, counts in (
        ("ays", (5, 8, 10)),
        ("kl_optimal", (5, 8, 10)),
        ("beta", (5, 8, 10, 15, 25)),
    ):
        for sampler in (DDIM(), DPMpp2M()):
            for S in counts:
                errors = []
                for grid in (get_timesteps(spacing, S), get_timesteps("log_snr", S)):
                    at_mean, moved = sampler.sample(oracle, schedule, ends, grid)
                    errors.append(abs(float((moved - at_mean) / (0.5 * root)) - 1))
                ratios.setdefault(spacing, []).append(errors[0] / errors[1])
    for spacing in ("ays", "kl_optimal"):
        assert 2 <= min(ratios[spacing]) < 3
        assert 7 < max(ratios[spacing]) < 9
    assert 1.2 < min(ratios["beta"]) < 1.4
    assert 6 < max(ratios["beta"]) < 7


def test_defaults_are_those_of_training():
    from zsnr.training import LatentDiffusion

    parameters = inspect.signature(LatentDiffusion).parameters
    assert tuple(parameters) == model_settings()
    assert parameters["schedule"].default == NoiseSchedule()
    assert parameters["prediction_type"].default == "v_prediction"
    assert parameters["loss"].default.name == "uniform"


def test_kept_brightness_is_what_a_sampler_keeps():
    """The exact denoiser of flat images, sampled from pure noise in 1000 steps."""
    from zsnr import get_sampler, get_timesteps

    for scale in (4.0, 32.0):
        schedule = NoiseSchedule(zero_terminal_snr=False)
        denoiser = GaussianDenoiser(schedule, mean=0.0, std=scale)
        x_T = torch.ones(1, 1, dtype=torch.float64)
        made = get_sampler("ddim").sample(denoiser, schedule, x_T, get_timesteps("trailing", 1000))
        kept = kept_fraction(schedule, scale)
        assert float(made) / scale == pytest.approx(kept, rel=0.02)


# --fix


@pytest.mark.parametrize(
    "change",
    [
        {"timestep_spacing": "leading"},
        {"_class_name": "PNDMScheduler"},
        {"_class_name": "DPMSolverSinglestepScheduler"},
        {"rescale_betas_zero_snr": False},
        {"trained_betas": UNCAPPED},
        {
            "trained_betas": UNCAPPED,
            "num_train_timesteps": 100,
            "timestep_spacing": "leading",
            "_class_name": "EulerDiscreteScheduler",
        },
        {"_class_name": "LCMScheduler", "original_inference_steps": 30},
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    ],
)
def test_fix_writes_beside(tmp_path, change):
    path = write(tmp_path, {**OURS, "extra": 1, **change})
    before = path.read_text()
    abar = examine(path).facts["schedule"]
    done = fix(path)
    assert path.read_text() == before
    fixed = tmp_path / "scheduler_config.fixed.json"
    assert str(fixed) in done[0]
    found = examine(fixed)
    assert found.verdict == "fixed"
    assert not any("infinite" in text for text in found.warnings)
    tables = [facts["alphas_cumprod_table"] is None for facts in (abar, found.facts["schedule"])]
    assert tables[0] == tables[1]
    assert json.loads(fixed.read_text())["extra"] == 1
    assert json.loads(fixed.read_text())["prediction_type"] == "v_prediction"
    assert any("only if" in text for text in done) == (change == {"rescale_betas_zero_snr": False})
    with pytest.raises(ValueError, match="exists"):
        fix(path)


def test_what_is_to_be_changed_is_enough(tmp_path):
    """Of a model that predicts v: by --fix, and by the named lines alone."""
    choices = {
        "_class_name": sorted(SCHEDULERS),
        "timestep_spacing": ["leading", "linspace", "trailing"],
        "rescale_betas_zero_snr": [True, False, None],
        "beta_schedule": ["linear", "squaredcos_cap_v2"],
        "num_train_timesteps": [1000, 100, 50],
        "steps_offset": [0, 1, 5],
        "trained_betas": [None, UNCAPPED[:99], UNCAPPED],
        "lambda_min_clipped": [-5.1, -math.inf, 5.0],
        "original_inference_steps": [50, 30, 7],
        "skip_prk_steps": [True, False],
        "use_karras_sigmas": [True, False],
    }
    draw, seen = random.Random(0), set()
    for _ in range(400):
        config = {key: draw.choice(known) for key, known in choices.items() if draw.random() < 0.6}
        path = write(tmp_path, {"prediction_type": "v_prediction", **config})
        found = examine(path)
        if found.verdict in ("fixed", "unreadable"):
            continue
        seen.add(found.verdict)
        fix(path)
        (fixed,) = tmp_path.glob("*.fixed.json")
        assert examine(fixed).verdict == "fixed", config
        fixed.unlink()
        for line in found.changes:
            if line.startswith("if not, "):
                continue
            entry = line.partition(": ")[2].removesuffix(", if the model was trained this way")
            config.update(json.loads(f"{{{entry}}}"))
        path = write(tmp_path, {"prediction_type": "v_prediction", **config})
        assert examine(path).verdict == "fixed", found.changes
    assert seen == {"flawed", "inconsistent"}


def test_fix_in_place_names_the_class_in_both_files(tmp_path):
    folder = diffusers_folder(tmp_path / "a", {**OURS, "_class_name": "PNDMScheduler"})
    assert any("model_index.json must say" in text for text in fix(folder))
    done = fix(folder, in_place=True)
    assert len(done) == 2
    assert examine(folder).verdict == "fixed"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert not list(folder.rglob(".*"))
    assert fix(folder) == ["Nothing to fix."]


@pytest.mark.parametrize("zero", [True, False])
def test_fix_makes_no_v_model_of_an_epsilon_model(tmp_path, zero):
    path = write(tmp_path, {**OURS, "prediction_type": "epsilon", "rescale_betas_zero_snr": zero})
    with pytest.raises(ValueError, match=r"epsilon.*zsnr fit"):
        fix(path, in_place=True)
    assert [p.name for p in tmp_path.iterdir()] == ["scheduler_config.json"]
    assert json.loads(path.read_text())["prediction_type"] == "epsilon"


def test_fix_of_other_targets_says_what_to_do(tmp_path):
    single(tmp_path / "m.safetensors", marks=("ztsnr",))
    with pytest.raises(ValueError, match="train|v prediction"):
        fix(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="no such file"):
        fix(tmp_path / "none.json")


# The command


def test_exit_codes_and_json(tmp_path, capsys):
    targets = {
        0: write(tmp_path / "0", OURS),
        1: DATA / "sd15.json",
        2: write(tmp_path / "2", {**OURS, "timestep_spacing": "leading"}),
        3: tmp_path / "none.json",
    }
    for code, target in targets.items():
        assert main(["doctor", str(target), "--json"]) == code
        found = json.loads(capsys.readouterr().out)
        assert found.keys() == {
            "target", "kind", "verdict", "reason", "facts", "warnings", "changes",
        }  # fmt: skip
        assert found["verdict"] == VERDICTS[code]
        assert main(["doctor", str(target)]) == code
        text = capsys.readouterr().out
        assert text.startswith(VERDICTS[code])
        assert ("what to change" in text) == (code in (1, 2))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--jsn"],
        ["--num-steps", "x"],
        ["--num-steps", "0"],
        ["--num-steps", "0", "--fix"],
        ["more"],
        ["--in-place"],
    ],
)
def test_a_wrong_command_has_no_verdicts_exit_code(tmp_path, capsys, arguments):
    path = write(tmp_path, {**OURS, "timestep_spacing": "leading"})
    try:
        code = main(["doctor", *([str(path)] if arguments else []), *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 3
    assert not any(verdict in capsys.readouterr().out for verdict in VERDICTS[:3])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_fix_on_the_command_line(tmp_path, capsys):
    path = write(tmp_path, {**OURS, "timestep_spacing": "leading"})
    assert main(["doctor", str(path), "--fix"]) == 2
    assert "Wrote" in capsys.readouterr().err
    assert main(["doctor", str(path), "--fix"]) == 3
    assert "exists" in capsys.readouterr().err
    assert main(["doctor", str(path), "--in-place"]) == 3
    assert main(["doctor", str(path), "--fix", "--in-place"]) == 2
    assert main(["doctor", str(path)]) == 0
    assert main(["doctor", "--num-steps", "7", "--num-steps", "9", str(path)]) == 0
    assert "for S = 7, 9, 10" in capsys.readouterr().out


def test_needs_torch_only(tmp_path):
    path = write(tmp_path, OURS)
    code = (
        "import sys; from zsnr.cli import main; main(['doctor', sys.argv[1], '--json']); "
        "heavy = {'lightning', 'diffusers', 'transformers', 'matplotlib', 'open_clip', 'PIL'}; "
        "sys.exit(len(heavy & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)


# Files that mean harm


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"{",
        b"\xff\xfe{}",
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"beta_start": 1, "beta_start": 2}',
        b'{"trained_betas": [' + b"0.5," * 999_999 + b"0.5]}",
        b'{"num_train_timesteps": 1' + b"0" * 400 + b', "prediction_type": "epsilon"}',
        b'{"num_train_timesteps": 1' + b"0" * 5000 + b', "prediction_type": "epsilon"}',
        b'{"prediction_type": NaN}',
        b'{"beta_start": Infinity}',
        b'{"beta_start": 1e999}',
        b'{"_class_name": "\\u001b[31m' + b"x" * 10_000 + b'"}',
        b" " * 9_000_000,
    ],
)
@pytest.mark.parametrize("name", ["scheduler_config.json", "run.json", "model_index.json"])
def test_harmful_json(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = examine(tmp_path / name)
    assert found.verdict == ("unknown" if b"_class" in content and "sch" in name else "unreadable")
    assert len(found.to_text()) < 2000
    assert "\x1b" not in found.to_text()
    found.to_text().encode()
    json.loads(found.to_json())


@pytest.mark.parametrize(
    "content",
    [
        "model: !!python/object/apply:os.mkdir [harm]",
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n"
            for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
        )
        + "model: {prediction_type: *k}",
        "a: &a {x: 1}\n"
        + "".join(
            f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 10)}]}}\n"
            for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
        )
        + "model: *k",
        "model: &a {b: *a}",
        "model: [" * 20_000,
        "model: {? [a, b] : c, schedule: {[1]: 2}}",
        "model: {1: 2, schedule: {1: 2}}",
        "model: {schedule: {beta_start: .nan}}",
        "model: {schedule: {num_timesteps: 1_000_000_000_000}}",
        "model: {schedule: {num_timesteps: 2024-01-01}}",
        "model: 2024-99-99",
        "a: b: c",
        "%",
        "--- a\n--- b",
        "\x00",
        "#" * 300_000,
    ],
)
def test_harmful_yaml(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(content)
    assert examine("a.yaml").verdict == "unreadable"
    assert not Path("harm").exists()
    Path("b.yaml").write_bytes(b"model: \xff")
    assert examine("b.yaml").verdict == "unreadable"


def test_pipes_and_folders_in_place_of_files(tmp_path):
    for name in ("a.json", "a.yaml", "a.safetensors", "a.ckpt", "run.json", "model_index.json"):
        (tmp_path / name).mkdir()
        assert examine(tmp_path / name, open_pickle=True).verdict == "unreadable"
        (tmp_path / name).rmdir()
        os.mkfifo(tmp_path / name)
        assert examine(tmp_path / name, open_pickle=True).verdict == "unreadable"
        (tmp_path / name).unlink()
    for target in ("a\0b", "~nobody_of_this_name/a", "x" * 5000, "", "hub/model"):
        assert examine(target).verdict in VERDICTS


WRONG = [
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    math.nan,
    -math.inf,
    "",
    "v",
    [],
    [1],
    {},
    {"a": 1},
    "\ud800",
]


def test_mutated_configs_have_a_verdict(tmp_path):
    """As values: each key replaced by what does not belong there, or by another class's habits."""
    draw, path, seen = random.Random(0), tmp_path / "scheduler_config.json", set()
    good = {
        "prediction_type": ["epsilon", "v_prediction", "sample"],
        "timestep_spacing": ["leading", "trailing", "linspace"],
        "rescale_betas_zero_snr": [True, False],
        "_class_name": list(SCHEDULERS),
        "num_train_timesteps": [2, 10, 999, 1000],
        "steps_offset": [0, 1, 50],
        "trained_betas": [None, [0.1, 0.5, 1.0], [0.1, 0.2]],
        "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
        "beta_start": [1e-300, 0.5, 0.012],
        "original_inference_steps": [1, 7, 50],
        "lambda_min_clipped": [-5.1, 5.0],
        "use_karras_sigmas": [True],
    }
    for i in range(1500):
        config = dict(OURS)
        for key in draw.sample(list(good), draw.randrange(1, 5)):
            config[key] = draw.choice(good[key])
            if draw.random() < 0.15:
                config[key] = draw.choice(WRONG)
            if draw.random() < 0.1:
                del config[key]
        path.write_text(json.dumps(config))
        found = examine(path, num_steps=[draw.randrange(1, 60)])
        assert found.verdict in VERDICTS
        json.loads(found.to_json())
        found.to_text().encode()
        seen.add(found.verdict)
        if i % 10 == 0 and found.verdict in ("flawed", "inconsistent"):
            (tmp_path / "scheduler_config.fixed.json").unlink(missing_ok=True)
            try:
                fix(path)
            except ValueError:
                assert config.get("prediction_type", "epsilon") == "epsilon"
            else:
                assert examine(tmp_path / "scheduler_config.fixed.json").verdict == "fixed"
    assert seen == set(VERDICTS)


@pytest.mark.parametrize("name", ["scheduler_config.json", "run.json", "a.yaml", "a.safetensors"])
def test_mutated_bytes_have_a_verdict(tmp_path, name):
    path, draw = tmp_path / name, random.Random(1)
    if name == "a.yaml":
        path.write_text(yaml.safe_dump({"model": {k: RUN[k] for k in ("schedule", "loss")}}))
    elif name == "a.safetensors":
        single(path, marks=("v_pred", "ztsnr"), table=ZERO[:20].clone(), metadata={"format": "pt"})
    else:
        path.write_text(json.dumps(RUN if name == "run.json" else OURS))
    whole, seen = path.read_bytes(), set()
    for _ in range(400 if name == "a.yaml" else 1000):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 4))):
            i = draw.randrange(min(len(data), 1000))
            match draw.randrange(4):
                case 0:
                    data[i] = draw.randrange(256)
                case 1:
                    data[i] = draw.choice(b'{}[]",:0123456789-.eENn&*!\x00')
                case 2:
                    del data[i : i + draw.randrange(1, 20)]
                case 3:
                    data[i:i] = data[draw.randrange(len(data)) :][: draw.randrange(1, 30)]
        path.write_bytes(data)
        found = examine(path)
        assert found.verdict in VERDICTS
        json.loads(found.to_json())
        seen.add(found.verdict)
    assert {"fixed", "unreadable"} <= seen


@pytest.mark.parametrize(
    ("guidance", "warned"),
    [
        ({"scale": 7.5, "rescale": 0}, True),
        ({"scale": 1, "rescale": 0, "curve": [[-6, 7.5]]}, True),
        ({"scale": 7.5, "rescale": 0, "curve": [[-6, 1]]}, False),
        ({"scale": 7.5, "rescale": 0.7}, False),
        ({"scale": 7.5, "rescale": 0, "method": "apg"}, False),
    ],
)
def test_guidance_that_over_exposes_is_judged_by_its_largest_scale(tmp_path, guidance, warned):
    found = yaml_file(tmp_path, {"sampling": {"guidance": guidance}})
    assert any("over-exposes" in text for text in found.warnings) == warned
    if "curve" in guidance:
        assert found.facts["guidance_curve"] == guidance["curve"]


@pytest.mark.parametrize("sampler", ["nope", ["ddim"], 3])
def test_a_sampler_that_is_none_is_refused(tmp_path, sampler):
    found = yaml_file(tmp_path, {"sampling": {"sampler": sampler}})
    assert found.verdict == "unreadable"
    assert "ampler" in found.reason
