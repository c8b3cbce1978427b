"""The loader and the doctor read what a single file declares in one way."""

import itertools
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import tiny_stable_diffusion

from zsnr import NoiseSchedule, RectifiedFlow
from zsnr.doctor.examine import examine
from zsnr.interop import read_diffusers_folder
from zsnr.interop.declarations import declares, read_declaration, settle

PLAIN, ZERO = NoiseSchedule(zero_terminal_snr=False), NoiseSchedule()
TO_K = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
MODELS = {
    "SDXL": {TO_K: (4, 2048), "conditioner.embedders.1.model.token_embedding.weight": (4, 4)},
    "SD 1": {TO_K: (4, 768), "cond_stage_model.transformer.text_model.x": (4, 4)},
    "SD 2": {TO_K: (4, 1024), "cond_stage_model.model.token_embedding.weight": (4, 4)},
}
OWN = json.dumps(ZERO.settings())
SAID = {  # by spelling: marks, metadata, prediction type, zero terminal SNR
    "nothing": ((), {}, None, None),
    "v_pred": (("v_pred",), {}, "v_prediction", False),
    "both marks": (("v_pred", "ztsnr"), {}, "v_prediction", True),
    "ztsnr": (("ztsnr",), {}, "epsilon", True),
    **{
        word: ((), {"modelspec.prediction_type": word}, "v_prediction", None)
        for word in ("v", "V", "v_prediction", "v-prediction", "vpred", "v_pred", "V Prediction")
    },
    **{
        word: ((), {"modelspec.prediction_type": word}, "epsilon", False)
        for word in ("epsilon", "eps", "Epsilon")
    },
    "ComfyUI's epsilon": ((), {"modelspec.predict_key": "epsilon"}, "epsilon", False),
    "another word": ((), {"modelspec.prediction_type": "flow"}, None, None),
    "sample": ((), {"modelspec.prediction_type": "sample"}, "sample", None),
    **{
        f"ss {yes}": (
            (),
            {"ss_v_parameterization": yes, "ss_zero_terminal_snr": yes},
            "v_prediction",
            True,
        )
        for yes in ("True", "true", "1")
    },
    "ss no": (
        (),
        {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"},
        "epsilon",
        False,
    ),
    "ss v": ((), {"ss_v_parameterization": "True"}, "v_prediction", None),
    "v and ss zero": (
        (),
        {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"},
        "v_prediction",
        True,
    ),
    "v_pred and ss zero": (("v_pred",), {"ss_zero_terminal_snr": "1"}, "v_prediction", True),
    "architecture": (
        (),
        {"modelspec.architecture": "stable-diffusion-v2-768-v"},
        "v_prediction",
        None,
    ),
    "own": ((), {"modelspec.prediction_type": "v", "zsnr.schedule": OWN}, "v_prediction", True),
    "damaged own": ((), {"zsnr.schedule": "{", "zsnr": "[]"}, None, None),
}


def write(path, shapes, marks=(), metadata=None):
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors | {mark: torch.tensor([]) for mark in marks}, path, metadata or None)
    return path


@pytest.mark.parametrize(("family", "said"), [*itertools.product(MODELS, SAID)])
def test_the_loader_and_the_doctor_agree(tmp_path, family, said):
    marks, metadata, prediction_type, zero = SAID[said]
    path = write(tmp_path / "m.safetensors", MODELS[family], marks, metadata)
    _, declared = read_declaration(path)
    assert (declared.prediction_type, declared.zero_terminal_snr) == (prediction_type, zero)
    found = examine(path)
    assert found.facts["model"] == family
    assert found.facts["prediction_type"] == prediction_type
    assert found.facts.get("snr_T") == (None if zero is None else pytest.approx(
        0 if zero else float(PLAIN.snr[-1])
    ))  # fmt: skip
    known = prediction_type is not None and zero is not None
    verdicts = {(True, "epsilon"): "inconsistent", (False, "epsilon"): "flawed"}
    wanted = verdicts.get((zero, prediction_type), "fixed" if zero else "flawed")
    assert found.verdict == (wanted if known else "unknown")
    if prediction_type is None and family == "SD 2":
        with pytest.raises(ValueError, match="set prediction_type to 'v_prediction' or 'epsilon'"):
            settle(path, declared)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule, taken = settle(path, declared)
    assert taken == (prediction_type or "epsilon")
    assert schedule == (ZERO if zero else PLAIN)
    assert bool(caught) == (not known)  # a guess is said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settle(path, declared, ZERO, "v_prediction") == (ZERO, "v_prediction")


def test_contradictions_are_said_and_the_first_is_followed(tmp_path):
    metadata = {"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "False"}
    path = write(tmp_path / "m.safetensors", MODELS["SDXL"], ("v_pred", "ztsnr"), metadata)
    with pytest.warns(UserWarning, match=r"declares .*; the first is followed") as caught:
        assert settle(path, read_declaration(path)[1]) == (ZERO, "v_prediction")
    assert len(caught) == 2
    found = examine(path)
    assert found.verdict == "fixed"
    assert sum("the first is followed" in text for text in found.warnings) == 2


def test_a_prediction_type_that_is_given_undoes_what_epsilon_implied(tmp_path):
    path = write(
        tmp_path / "m.safetensors", MODELS["SDXL"], (), {"modelspec.prediction_type": "epsilon"}
    )
    with pytest.warns(UserWarning, match="does not declare its noise schedule"):
        assert settle(path, read_declaration(path)[1], None, "v_prediction")[0] == PLAIN


KOHYA = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
DIFFUSERS = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("tensors", "kind"),
    [
        ({f"{KOHYA}.lora_down.weight": (4, 2048), f"{KOHYA}.alpha": ()}, "SDXL LoRA"),
        ({f"{KOHYA}.lora_down.weight": (4, 768), f"{KOHYA}.dora_scale": (1, 768)}, "SD 1 DoRA"),
        ({f"{DIFFUSERS}.to_k.lora_A.weight": (4, 1024)}, "SD 2 LoRA"),
        ({f"{DIFFUSERS}.to_k.lora.down.weight": (4, 768)}, "SD 1 LoRA"),
        ({f"{DIFFUSERS}.processor.to_k_lora.down.weight": (4, 768)}, "SD 1 LoRA"),
        ({f"{KOHYA}.hada_w1_a": (640, 4), f"{KOHYA}.hada_w1_b": (4, 2048)}, "SDXL LoHa"),
        ({f"{KOHYA}.lokr_w1": (8, 32), f"{KOHYA}.lokr_w2": (80, 64)}, "SDXL LoKr"),
        (
            {
                f"{KOHYA}.lokr_w1": (8, 32),
                f"{KOHYA}.lokr_w2_a": (80, 4),
                f"{KOHYA}.lokr_w2_b": (4, 64),
            },
            "SDXL LoKr",
        ),
        ({f"{KOHYA}.oft_blocks": (4, 8, 8)}, "unknown OFT"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)}, "SDXL LoRA"),
    ],
)
def test_adapters_have_no_schedule_of_their_own(tmp_path, tensors, kind):
    path = write(tmp_path / "a.safetensors", tensors)
    found = examine(path)
    assert (found.verdict, found.exit_code, found.facts["model"]) == ("unknown", 3, kind)
    assert not found.changes
    assert "marks" not in found.facts
    said = {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}
    found = examine(write(path, tensors, (), said))
    assert (found.verdict, found.facts["prediction_type"]) == ("fixed", "v_prediction")
    assert "mark" not in " ".join((*found.warnings, *found.changes))
    said = {"ss_v_parameterization": "False", "ss_base_model_version": "sdxl_base_v1-0"}
    found = examine(write(path, tensors, (), said))
    assert found.verdict == "flawed"
    assert found.facts["model"] == kind.replace("unknown", "SDXL")


def test_what_the_loader_refuses_is_said(tmp_path):
    first = {"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}
    found = examine(write(tmp_path / "i.safetensors", {**MODELS["SDXL"], **first}, ("v_pred",)))
    assert any("zsnr does not load it: " in w and "inpainting" in w for w in found.warnings)


def test_a_stored_table_is_the_schedule():
    cosine = NoiseSchedule("cosine", 50)
    declared = declares({"alphas_cumprod": (50,), "v_pred": (0,)}, {}, table=cosine)
    assert declared.schedule == cosine
    assert declared.said_by["schedule"] == "the stored alphas_cumprod"


# Folders of diffusers

CLASSES = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder") / "model"
    tiny_stable_diffusion(path)
    return path


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", None])
@pytest.mark.parametrize("rescale", [True, False, None])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("where", ["index", "config"])
def test_folders_mean_the_same_to_both(folder, name, where, rescale, prediction_type):
    """Of the class in model_index.json, or else in the config; with the class's defaults."""
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name] if where == "index" else None
    (folder / "model_index.json").write_text(json.dumps(index))
    config = {
        "_class_name": "LMSDiscreteScheduler" if where == "index" else name,
        **({} if rescale is None else {"rescale_betas_zero_snr": rescale}),
        **({} if prediction_type is None else {"prediction_type": prediction_type}),
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    found = examine(folder)
    model = read_diffusers_folder(str(folder))
    assert found.facts["prediction_type"] == model.prediction_type
    assert model.prediction_type == (prediction_type or "epsilon")
    assert found.facts["scheduler"] == name
    dropped = "drops rescale_betas_zero_snr" in found.reason
    zero = float(model.schedule.snr[-1]) == 0
    assert zero == bool(rescale)
    assert zero == (found.facts["snr_T"] == 0 or dropped)
    betas = (found.facts["schedule"]["beta_start"], found.facts["schedule"]["beta_end"])
    assert (model.schedule.beta_start, model.schedule.beta_end) == betas


def test_an_adapter_of_flow_declares_flow():
    own = {"prediction_type": "flow", "schedule": RectifiedFlow(3.0).settings()}
    metadata = {
        "modelspec.prediction_type": "flow",
        "ss_zero_terminal_snr": "True",
        "zsnr": json.dumps(own),
    }
    declared = declares({"lora_unet_x.lora_down.weight": (4, 4)}, metadata)
    assert (declared.schedule, declared.prediction_type) == (RectifiedFlow(3.0), "flow")
    assert not declared.contradictions
