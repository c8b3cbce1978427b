import io
import json
from hashlib import blake2b

import pytest
import torch
from safetensors.torch import load_file, save_file

from zsnr.assets import resolve_asset
from zsnr.codecs import AutoencoderKLCodec, LatentCodec, PixelCodec, measure_scale
from zsnr.data.images import decode_image, to_unit_range
from zsnr.data.openmoji import BACKGROUNDS, list_glyphs, render
from zsnr.described import build, describe
from zsnr.weights.source import digest, find_weights


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def tiny_vae(folder, **settings):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        **{"latent_channels": 4, "scaling_factor": 0.5, **settings},
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_pixels_lose_nothing(patch_size):
    codec = PixelCodec(patch_size, scale=1.7, shift=-0.2)
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    latents = codec.latents(
        codec.encode(images), torch.randn(2, 3 * patch_size**2, 8 // patch_size, 12 // patch_size)
    )
    assert latents.shape[1:] == codec.latent_shape(8, 12)
    torch.testing.assert_close(codec.decode(latents), images)
    torch.testing.assert_close(latents.mean(), (images.mean() + 0.2) * 1.7)


@pytest.mark.parametrize("size", [0, -4, 10])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(ValueError, match=r"height=.*multiple of 4"):
        PixelCodec(4).latent_shape(size, 8)


def test_autoencoder_kl_is_diffusers(tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_vae(tmp_path, shift_factor=0.1))
    codec = AutoencoderKLCodec(str(tmp_path), slicing=True)
    assert (codec.channels, codec.factor, codec.scale, codec.shift) == (4, 2, 0.5, 0.1)
    images, z = torch.rand(3, 3, 8, 8) * 2 - 1, torch.randn(3, 4, 4, 4)
    posterior = vae.encode(images).latent_dist
    wanted = (posterior.mean + posterior.std * z - 0.1) * 0.5
    latents = codec.latents(codec.encode(images), z)
    torch.testing.assert_close(latents, wanted)
    torch.testing.assert_close(codec.decode(latents), vae.decode(latents / 0.5 + 0.1).sample)
    assert not latents.requires_grad


def test_statistics_of_channels_are_those_of_diffusers(tmp_path):
    """As StableDiffusionXLPipeline decodes them: latents * std / scaling_factor + mean."""
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 1.5]
    tiny_vae(tmp_path, latents_mean=mean, latents_std=std)
    codec = AutoencoderKLCodec(str(tmp_path))
    latents = torch.randn(2, 4, 3, 3)
    theirs = latents * torch.tensor(std).view(4, 1, 1) / codec.scale
    theirs = theirs + torch.tensor(mean).view(4, 1, 1)
    torch.testing.assert_close(codec.raw(latents), theirs)
    torch.testing.assert_close(codec.standardized(theirs), latents)
    torch.testing.assert_close(codec.decode(latents), codec.vae.decode(theirs).sample)
    moments = torch.cat([theirs, torch.ones_like(theirs)], 1)
    torch.testing.assert_close(codec.latents(moments), latents)
    for wrong in ([0.1], [0.1, 0.2, 0.3, 0.0], None):
        tiny_vae(tmp_path / "wrong", latents_mean=mean, latents_std=wrong)
        with pytest.raises(ValueError, match=r"latents_std=.*: wanted a number for each of the 4"):
            AutoencoderKLCodec(str(tmp_path / "wrong"))


def test_measured_scale_gives_unit_variance(tmp_path):
    images = torch.rand(8, 3, 8, 8) * 2 - 1
    scale, shift = measure_scale(AutoencoderKLCodec(tiny_vae(tmp_path)), images)
    codec = AutoencoderKLCodec(str(tmp_path), scale=scale, shift=shift)
    moments = codec.encode(images)
    drawn = torch.cat([codec.latents(moments, torch.randn(8, 4, 4, 4)) for _ in range(200)])
    assert drawn.mean().item() == pytest.approx(0, abs=0.02)
    assert drawn.std().item() == pytest.approx(1, abs=0.02)


def test_force_upcast_keeps_float32(tmp_path):
    images = torch.rand(1, 3, 8, 8)
    for force, wanted in ((True, torch.float32), (False, torch.float16)):
        codec = AutoencoderKLCodec(
            tiny_vae(tmp_path / str(force), force_upcast=force), dtype="float16"
        )
        assert next(codec.vae.parameters()).dtype == wanted
        if force:
            assert codec.decode(codec.latents(codec.encode(images))).dtype == torch.float32


def test_a_codec_needs_no_weights_until_it_is_used(tmp_path):
    codec = AutoencoderKLCodec(tiny_vae(tmp_path))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert (codec.channels, codec.factor, codec.scale, codec.shift) == (4, 2, 0.5, 0.0)
    assert codec.latent_shape(8, 12) == (4, 4, 6)
    assert codec.fingerprint()["weights"] is None
    assert codec.to("cpu").release() is codec
    latents = codec.latents(torch.ones(1, 8, 4, 4))
    for use in (codec.load, lambda: codec.encode(torch.zeros(1, 3, 8, 8))):
        with pytest.raises(ValueError, match="holds no complete weights of an AutoencoderKL"):
            use()
    with pytest.raises(ValueError, match="Cannot load|no complete weights of an AutoencoderKL"):
        codec.decode(latents)


def test_released_codecs_load_again(tmp_path):
    codec, images = AutoencoderKLCodec(tiny_vae(tmp_path)), torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.inference_mode():
        first = codec.encode(images)
    vae = codec.vae
    assert codec.load().vae is vae
    assert not any(p.is_inference() or p.requires_grad for p in vae.parameters())
    assert codec.release()._loaded is None
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = codec.encode(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert codec.vae is not vae
    assert torch.equal(again, first)
    assert next(codec.release().to("meta").vae.parameters()).device.type == "meta"
    pixels = PixelCodec(2)
    assert torch.equal(pixels.load().release().encode(images), pixels.encode(images))


def test_fingerprints_of_codecs(tmp_path):
    tiny_vae(tmp_path / "a")
    weights = tmp_path / "a" / "diffusion_pytorch_model.safetensors"

    def fingerprint(name="a", **options):
        return AutoencoderKLCodec(str(tmp_path / name), **options).fingerprint()

    first = fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert first["class"] == "zsnr.codecs.autoencoder_kl.AutoencoderKLCodec"
    assert first["weights"] == blake2b(weights.read_bytes(), digest_size=16).hexdigest()
    assert fingerprint(scale=3.0, shift=0.1, slicing=True) == first
    assert fingerprint(dtype="bfloat16") == {**first, "dtype": "bfloat16"}
    assert fingerprint(dtype="float16") == first  # force_upcast
    tiny_vae(tmp_path / "b", scaling_factor=2.0)
    assert fingerprint("b") == first
    tiny_vae(tmp_path / "b", act_fn="relu")
    assert fingerprint("b") == {**first, "config": {**first["config"], "act_fn": "relu"}}

    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint()["weights"] == blake2b(data, digest_size=16).hexdigest()
    assert {**fingerprint(), "weights": first["weights"]} == first

    assert PixelCodec(2, 1.5, 0.1).fingerprint() == PixelCodec(2).fingerprint()
    assert PixelCodec(2).fingerprint() != PixelCodec(4).fingerprint()
    shipped = AutoencoderKLCodec("asset:openmoji_vae").fingerprint()
    assert len(shipped["weights"]) == 32


def test_weights_are_found_in_shards_and_in_the_hubs_cache(tmp_path, monkeypatch):
    repository = tmp_path / "models--somebody--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40) / "vae"
    tiny_vae(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stem = "diffusion_pytorch_model"
    cached = find_weights("somebody/model", "vae", stem)
    assert cached == find_weights(str(folder), None, stem) == [folder / f"{stem}.safetensors"]
    assert find_weights("somebody/else", "vae", stem) == find_weights("./no", None, stem) == []
    shards = [folder / f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    cached[0].rename(shards[0])
    shards[1].write_bytes(b"second")
    index = {"weight_map": {"b": shards[1].name, "a": shards[0].name, "c": shards[0].name}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    assert find_weights("somebody/model", "vae", stem) == shards
    both = shards[0].read_bytes() + b"second"
    assert digest(shards) == blake2b(both, digest_size=16).hexdigest()
    shards[1].unlink()
    assert find_weights("somebody/model", "vae", stem) == []
    assert digest([]) is None


def test_shipped_vae_reconstructs_the_demonstration():
    codec = AutoencoderKLCodec("asset:openmoji_vae")
    pictures = [
        decode_image(png(render(glyph, 64, rgb)), 64, 64)
        for glyph in list_glyphs("demo")[::4]
        for rgb in BACKGROUNDS.values()
    ]
    images = to_unit_range(torch.stack(pictures))
    latents = codec.latents(codec.encode(images))
    again = codec.decode(latents)
    assert (again - images).abs().mean() < 0.08
    assert (again.mean((1, 2, 3)) - images.mean((1, 2, 3))).abs().max() < 0.06
    assert latents.std().item() == pytest.approx(1, abs=0.15)
    assert latents.mean().item() == pytest.approx(0, abs=0.15)
    with pytest.raises(ValueError, match="Known: openmoji_vae"):
        resolve_asset("asset:nothing")


def test_described_codecs_are_built_again(tmp_path):
    for codec in (PixelCodec(2, 1.5, 0.1), AutoencoderKLCodec(tiny_vae(tmp_path), scale=2.0)):
        again = build(describe(codec), LatentCodec)
        assert (type(again), again.settings()) == (type(codec), codec.settings())


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"class_path": "os.system", "init_args": {}}, "is not a LatentCodec"),
        ({"class_path": "zsnr.codecs.Nothing"}, "cannot be imported"),
        ({"class_path": "no.such.module.C"}, "cannot be imported"),
        ({}, "cannot be imported"),
        ({"class_path": "zsnr.codecs.PixelCodec", "init_args": {"patch": 1}}, "patch"),
        ({"class_path": "zsnr.codecs.PixelCodec", "init_args": None}, "PixelCodec"),
        (None, "described by None"),
    ],
)
def test_wrong_descriptions_are_refused(description, message):
    with pytest.raises(ValueError, match=message):
        build(description, LatentCodec)


def test_a_description_runs_no_module(tmp_path, monkeypatch):
    (tmp_path / "harmful.py").write_text("import os; os.mkdir('harm')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="import harmful first"):
        build({"class_path": "harmful.Codec"}, LatentCodec)
    assert not (tmp_path / "harm").exists()


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json: wanted a folder with an Auto"):
        AutoencoderKLCodec(str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        AutoencoderKLCodec("./nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="Cannot load|no complete weights of an AutoencoderKL"):
        AutoencoderKLCodec(str(tmp_path))
    tiny_vae(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    codec = AutoencoderKLCodec(str(tmp_path))
    del whole["encoder.conv_in.weight"]
    save_file(whole, weights)
    with pytest.raises(
        ValueError, match=r"lack 1 of the tensors, such as encoder\.conv_in\.weight"
    ):
        codec.load()
    weights.write_bytes(b"garbage")
    with pytest.raises(ValueError, match="is not a readable .safetensors file"):
        codec.load()
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match="wanted diffusion_pytorch_model.safetensors"):
        codec.load()
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"AutoencoderKL"', '"VQModel"'))
    with pytest.raises(ValueError, match="its config is of VQModel"):
        AutoencoderKLCodec(str(tmp_path))
