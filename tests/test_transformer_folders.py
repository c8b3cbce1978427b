"""Folders of diffusers whose network is a transformer give the images of diffusers."""

import json

import numpy as np
import pytest
import tiny
import torch

from zsnr import Guidance, RectifiedFlow
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import SD3Conditioner, TransformersConditioner
from zsnr.networks import Transformer
from zsnr.pipeline import TextToImage

PROMPTS, SEEDS = ["A cat ", "dog"], (5, 6)


def latents(channels=4):
    noise = [
        torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(s)) for s in SEEDS
    ]
    return torch.cat(noise)


def compare(images, wanted):
    for mine, other in zip(images, wanted, strict=True):
        assert mine.size == other.size == (16, 16)
        pixels = np.asarray(mine).astype(int), np.asarray(other).astype(int)
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
        assert pixels[0].std() > 3


@pytest.mark.peer
def test_a_pixart_folder_gives_diffusers_images(tmp_path):
    theirs = tiny.pixart_folder(tmp_path)
    ours = TextToImage.from_pretrained(tmp_path, device="cpu")
    assert isinstance(ours.model.network, Transformer)
    assert isinstance(ours.model.conditioner, TransformersConditioner)
    assert ours.model.conditioner.max_length == 120
    assert ours.model.prediction_type == "v_prediction"
    settings = {"sampler": "ddim", "num_steps": 5, "spacing": "trailing", "progress": False}
    settings["guidance"] = Guidance(4.0, 0.0)
    images = ours(PROMPTS, seeds=SEEDS, **settings)
    wanted = theirs(
        PROMPTS,
        latents=latents(),
        num_inference_steps=5,
        guidance_scale=4.0,
        height=16,
        width=16,
        clean_caption=False,
        use_resolution_binning=False,
    ).images
    compare(images, wanted)
    other = ours(["a cat", "dog"], seeds=SEEDS, **settings)
    assert np.array_equal(np.asarray(other[0]), np.asarray(images[0]))  # it reads lower case


@pytest.mark.peer
@pytest.mark.parametrize("t5", [True, False])
def test_a_stable_diffusion_3_folder_gives_diffusers_images(tmp_path, t5):
    theirs = tiny.sd3_folder(tmp_path, t5=t5)
    ours = TextToImage.from_pretrained(tmp_path, device="cpu")
    assert isinstance(ours.model.conditioner, SD3Conditioner)
    assert ours.model.schedule == RectifiedFlow(3.0)
    assert ours.model.prediction_type == "flow"
    steps = 5
    images = ours(
        PROMPTS,
        seeds=SEEDS,
        sampler="euler",
        num_steps=steps,
        spacing="trailing",
        guidance=Guidance(4.0, 0.0),
        progress=False,
    )
    wanted = theirs(
        PROMPTS,
        latents=latents(),
        num_inference_steps=steps,
        sigmas=np.linspace(1, 1 / steps, steps).tolist(),
        guidance_scale=4.0,
        height=16,
        width=16,
    ).images
    compare(images, wanted)


def test_folders_of_other_architectures_say_which_part(tmp_path):
    tiny.sd3_folder(tmp_path, t5=False)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for change, message in (
        (
            {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
            "is a FluxPipeline, whose transformer is a FluxTransformer2DModel: wanted PixArtAlpha",
        ),
        ({"transformer": [None, None]}, "without a unet"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=message):
            TextToImage.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for part, change, message in (
        ("vae", {"_class_name": "AutoencoderTiny"}, "its config is of AutoencoderTiny"),
        (
            "transformer",
            {"_class_name": "FluxTransformer2DModel"},
            "'FluxTransformer2DModel' is not",
        ),
        (
            "scheduler",
            {"use_dynamic_shifting": True},
            "use_dynamic_shifting=true: the shift depends",
        ),
        ("scheduler", {"shift": "x"}, "shift"),
    ):
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        path = tmp_path / part / name
        was = path.read_text()
        path.write_text(json.dumps({**json.loads(was), **change}))
        with pytest.raises(ValueError, match=message):
            TextToImage.from_pretrained(tmp_path, device="cpu")
        path.write_text(was)


def test_a_folder_of_all_parts_needs_no_subfolder(tmp_path):
    """As codec and as conditioner, in a config."""
    tiny.pixart_folder(tmp_path)
    source = str(tmp_path)
    codecs = [AutoencoderKLCodec(source, subfolder=name) for name in (None, "vae")]
    assert codecs[0].fingerprint() == codecs[1].fingerprint()
    named = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    conditioners = [TransformersConditioner(source, **each) for each in ({}, named)]
    assert conditioners[0].fingerprint() == conditioners[1].fingerprint()
    assert conditioners[0].settings() == conditioners[1].settings()
    encoded = [conditioner(["a cat"]) for conditioner in conditioners]
    assert torch.equal(encoded[0].context, encoded[1].context)
