import json
import math
import os
import random
import zipfile

import numpy as np
import pytest
import tiny
import torch

from zsnr import Guidance, NoiseSchedule, RectifiedFlow
from zsnr.checkpoints import read_checkpoint
from zsnr.failures import is_ours
from zsnr.interop import read_diffusers_folder, schedule_from_diffusers
from zsnr.interop.models import read_model
from zsnr.pipeline import TextToImage


def tiny_stable_diffusion(folder, **scheduler):
    """A Stable Diffusion of diffusers with random weights and a tokenizer of letters."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{a}</w>" for a in letters)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**{**tiny.SCHEDULER, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


@pytest.mark.peer
@pytest.mark.parametrize(("zero", "num_steps"), [(True, 10), (False, 20)])
def test_a_diffusers_folder_gives_diffusers_images(tmp_path, zero, num_steps):
    theirs = tiny_stable_diffusion(tmp_path, rescale_betas_zero_snr=zero)
    ours = TextToImage.from_pretrained(tmp_path, device="cpu")
    assert ours.model.schedule.zero_terminal_snr == zero
    prompts, guidance = ["a cat", "dog"], Guidance(4.0, 0.7)
    settings = {"sampler": "ddim", "num_steps": num_steps, "guidance": guidance}
    images = ours(prompts, seeds=[5, 6], **settings, progress=False)
    latents = torch.cat(
        [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    )
    wanted = theirs(
        prompts,
        latents=latents,
        num_inference_steps=num_steps,
        guidance_scale=4.0,
        guidance_rescale=0.7,
        height=16,
        width=16,
    ).images
    for mine, other in zip(images, wanted, strict=True):
        assert mine.size == other.size == (16, 16)
        difference = np.abs(np.asarray(mine).astype(int) - np.asarray(other).astype(int))
        assert difference.max() <= 1


def test_epsilon_models_are_read_as_they_are(tmp_path):
    tiny_stable_diffusion(tmp_path, prediction_type="epsilon", rescale_betas_zero_snr=False)
    model = read_diffusers_folder(str(tmp_path))
    assert model.prediction_type == "epsilon"
    TextToImage(model)(["a"], num_steps=2, progress=False)
    with pytest.raises(ValueError, match="no x_0 at t=999"):
        TextToImage.from_pretrained(tmp_path, NoiseSchedule())


def test_folders_of_rectified_flow_are_read(tmp_path):
    tiny_stable_diffusion(tmp_path)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config))
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    model = read_diffusers_folder(str(tmp_path))
    assert (model.schedule, model.prediction_type) == (RectifiedFlow(3.0), "flow")
    TextToImage(model)(["a"], num_steps=2, progress=False)
    path.write_text(json.dumps({**config, "use_dynamic_shifting": True}))
    with pytest.raises(ValueError, match=r"1.65 to 3.16.*schedule=.*prediction_type="):
        read_model(str(tmp_path))
    with pytest.raises(ValueError, match="use_dynamic_shifting"):
        read_model(str(tmp_path), RectifiedFlow(2.0))  # of what type, is not said
    model = read_model(str(tmp_path), RectifiedFlow(2.0), "flow")
    assert (model.schedule, model.prediction_type) == (RectifiedFlow(2.0), "flow")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_parts_are_named(tmp_path, part):
    import shutil

    tiny_stable_diffusion(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(ValueError, match=part):
        TextToImage.from_pretrained(tmp_path)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        TextToImage.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        TextToImage.from_pretrained(tmp_path / "nowhere")


@pytest.mark.peer
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 500},
        {"trained_betas": [0.01, 0.02, 0.5], "num_train_timesteps": 3},
    ],
)
def test_schedules_are_diffusers(settings):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(**settings)
    ours = schedule_from_diffusers(theirs.config)
    abar = theirs.alphas_cumprod.double()
    torch.testing.assert_close(ours.alphas_cumprod, abar, rtol=2e-4, atol=1e-6)
    assert schedule_from_diffusers(settings) == ours
    assert math.isclose(float(ours.alphas_cumprod[-1]), float(abar[-1]), abs_tol=1e-6)


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match=r"no timesteps: give its schedule and prediction type"):
        schedule_from_diffusers({"_class_name": "EDMEulerScheduler"})
    with pytest.raises(ValueError, match="Known: 'linear'"):
        schedule_from_diffusers({"beta_schedule": "sigmoid"})


# Folders and checkpoints that mean harm

CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
)
WRONG = [None, True, 0, -1, 1.5, 10**30, math.nan, -math.inf, "", "v", [], [1], {}, "\ud800", 7]
NO_OBJECTS = [b"", b"[]", b"null", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000]


def load(folder):
    model = read_diffusers_folder(str(folder))
    model.codec.load()
    model.conditioner.load()


def test_mutated_folders_are_read_or_refused(tmp_path):
    """Each refusal is an error of this package, on one short line."""
    draw, outcomes = random.Random(0), {True: 0, False: 0}
    odd = []
    tiny_stable_diffusion(tmp_path)
    contents = [(name, content) for name in CONFIGS for content in NO_OBJECTS]
    for _ in range(80):
        name = draw.choice(CONFIGS)
        config = json.loads((tmp_path / name).read_text())
        config[draw.choice(list(config))] = draw.choice(WRONG)
        contents.append((name, json.dumps(config).encode()))
    for name, content in contents:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        try:
            load(tmp_path)
        except ValueError as error:
            said = str(error)
            fine = is_ours(error) and len(said) < 1000 and "\n" not in said
            odd += [] if fine else [(name, content[:2000], said)]
            outcomes[False] += 1
        else:
            outcomes[True] += 1
        (tmp_path / name).write_bytes(whole)
    assert odd == []
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", {"layers_per_block": 10**30}),
        ("unet", {"layers_per_block": 100, "transformer_layers_per_block": [30, 1]}),
        ("unet", {"reverse_transformer_layers_per_block": [[1, 10**9], [1]]}),
        ("unet", {"down_block_types": ["DownBlock2D"] * 10**5}),
        ("vae", {"layers_per_block": 10**9}),
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("text_encoder", {"text_config": {"num_hidden_layers": 10**9}}),
    ],
)
def test_endless_networks_are_not_built(tmp_path, part, change):
    tiny_stable_diffusion(tmp_path)
    path = tmp_path / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="wanted 1000 at most"):
        load(tmp_path)


def test_folders_whose_weights_cannot_fill_the_config_are_refused(tmp_path):
    tiny_stable_diffusion(tmp_path)
    path = tmp_path / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 10**9}))
    with pytest.raises(ValueError, match="its config describes a text encoder of"):
        load(tmp_path)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_checkpoints_that_mean_harm_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    torch.save({"zsnr": Harm(), "state_dict": {}}, "harm.ckpt")
    torch.save([1], "list.ckpt")
    torch.save({"zsnr": {}}, "old.ckpt", _use_new_zipfile_serialization=False)
    for name, message in {
        "bomb": "compressed",
        "harm": r"holds more than tensors and plain values\.$",
        "list": "holds a list",
        "old": "not a readable checkpoint",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_checkpoint(f"{name}.ckpt")
    assert not os.path.exists("harm")


def test_mutated_checkpoints_are_read_or_refused(tmp_path):
    from zsnr.checkpoints.checkpoint_file import open_checkpoint

    path, draw = tmp_path / "a.ckpt", random.Random(0)
    refused = foreign = 0
    parts = ("codec", "conditioner", "network", "schedule", "prediction_type", "image_size")
    torch.save({"zsnr": dict.fromkeys(parts), "state_dict": {"a": torch.zeros(9)}}, path)
    whole = path.read_bytes()
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 2, 5))):
            i = draw.randrange(len(data))
            if draw.random() < 0.8:
                data[i] = draw.randrange(256)
            else:
                del data[i : i + draw.randrange(1, 20)]
        path.write_bytes(data)
        try:
            open_checkpoint(path)
        except ValueError as error:
            refused += is_ours(error)
            foreign += not is_ours(error)
    assert foreign == 0
    assert 100 < refused < 1000
