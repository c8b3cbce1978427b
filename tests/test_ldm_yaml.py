"""The YAML of the original code is read beside a single file of its name."""

import pytest
import torch
from safetensors.torch import save_file

from zsnr import NoiseSchedule
from zsnr.doctor.examine import examine
from zsnr.interop.declarations import read_declaration, settle

V = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params: {parameterization: v, linear_start: 0.00085, linear_end: 0.012, timesteps: 1000}
"""
PUBLISHED = NoiseSchedule(beta_start=0.00085, beta_end=0.012, zero_terminal_snr=False)
TENSORS = {
    "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (4, 1024),
    "cond_stage_model.model.token_embedding.weight": (4, 4),
}


def declared(path):
    return settle(path, read_declaration(path)[1])


def write(folder, yaml, **marks):
    tensors = {name: torch.zeros(shape) for name, shape in TENSORS.items()}
    save_file(tensors, folder / "v_model.safetensors", metadata=marks or None)
    (folder / "v_model.ckpt").write_bytes(b"\x80\x02}.")
    (folder / "v_model.yaml").write_text(yaml)


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_the_doctor_reads_the_yaml_beside_a_file(tmp_path, kind):
    write(tmp_path, V)
    found = examine(tmp_path / f"v_model.{kind}")
    assert found.verdict == "flawed"
    assert found.facts["prediction_type"] == "v_prediction"
    assert found.facts["schedule"] == PUBLISHED.settings()
    assert found.facts["schedule_from"] == "v_model.yaml"


def test_the_loader_says_the_same(tmp_path):
    write(tmp_path, V)
    assert declared(str(tmp_path / "v_model.safetensors")) == (PUBLISHED, "v_prediction")
    write(tmp_path, V.replace(": v,", ": eps,"))
    assert declared(str(tmp_path / "v_model.safetensors"))[1] == "epsilon"
    write(tmp_path, V.replace(": v,", ": eps,"), **{"modelspec.prediction_type": "v"})
    with pytest.warns(UserWarning, match="declares v_prediction, but v_model.yaml epsilon"):
        assert declared(str(tmp_path / "v_model.safetensors"))[1] == "v_prediction"


def test_alone_it_says_what_it_is(tmp_path):
    write(tmp_path, V)
    found = examine(tmp_path / "v_model.yaml")
    assert found.verdict == "unreadable"
    assert "original latent diffusion code (v_prediction, betas 'scaled_linear'" in found.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((": v,", ": w,"), "parameterization='w' is unknown. Known: 'eps', 'v', 'x0'"),
        ((": v,", ": [v],"), "parameterization=a list is unknown"),
        (("1000", "1000000000"), "wanted an int, 2 to 100000"),
        (("0.012", ".nan"), "beta_end=nan"),
        (("0.012", "yes"), "beta_end=True"),
        (("params: {", "params: [{"), "is not readable YAML"),
        (("\n  params", "\n  beta: {}\n  params: 3\n  x"), "model.params is 3"),
    ],
)
def test_one_that_cannot_be_read_is_named(tmp_path, change, message):
    write(tmp_path, V.replace(*change))
    for kind in ("safetensors", "ckpt", "yaml"):
        assert message in examine(tmp_path / f"v_model.{kind}").reason
    with pytest.raises(ValueError, match="v_model.yaml"):
        declared(str(tmp_path / "v_model.safetensors"))


def test_another_yaml_beside_a_file_is_none_of_it(tmp_path):
    write(tmp_path, "model: {prediction_type: v_prediction}")
    assert examine(tmp_path / "v_model.safetensors").facts["prediction_type"] is None
