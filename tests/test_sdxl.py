"""Stable Diffusion XL: two text encoders, a pooled embedding and sizes."""

import csv
import io
import json
import shutil
from types import SimpleNamespace

import cells
import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image

from zsnr import Guidance
from zsnr.cli import main
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import Conditioner, NullConditioner, Remembered, SDXLConditioner
from zsnr.data.cache import CacheDataset, find_cache, select_cached
from zsnr.data.dataset import Pixels, ShardDataset, collate
from zsnr.data.filters import Filter
from zsnr.data.images import decode_image, size_facts
from zsnr.denoiser import Conditioning
from zsnr.described import build, describe
from zsnr.draws import Draws, training_draws
from zsnr.networks import UNet
from zsnr.pipeline import TextToImage
from zsnr.prediction import prediction_target
from zsnr.training import DataModule, LatentDiffusion

PROMPTS = ["a cat", "dog b"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, and diffusers' pipeline that it was made by."""
    folder = tmp_path_factory.mktemp("sdxl")
    return folder, tiny.sdxl_folder(folder)


@pytest.mark.peer
@pytest.mark.parametrize("zero_null", [None, False])
def test_embeddings_are_diffusers(made, zero_null):
    folder, theirs = made
    prompts = [*PROMPTS, "a very long prompt of more than twelve letters"]
    ours = SDXLConditioner(str(folder), zero_null=zero_null)
    assert list(ours.parameters()) == []
    context, null, pooled, null_pooled = theirs.encode_prompt(
        prompts, negative_prompt=None if zero_null is None else [""] * 3
    )
    cond, uncond = ours(prompts), ours.null().expand(3)
    assert (ours.context_dim, ours.pooled_dim) == (context.shape[-1], pooled.shape[-1]) == (40, 20)
    for mine, other in zip(
        (cond.context, uncond.context, cond.pooled, uncond.pooled),
        (context, null, pooled, null_pooled),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert context.std() > 0.1
    assert (null.abs().max() == 0) == (zero_null is None)


def test_long_prompts_are_encoded_in_chunks_by_both_encoders(made):
    folder, theirs = made
    conditioner = SDXLConditioner(str(folder), max_tokens=20)  # two chunks of ten
    prompts = ["abc d efg h abcdef gh", "b", "", "abcdefghijklmnopqrstuvwxyz"]
    cond = conditioner(prompts)
    contexts, pooled = [], []
    for prompt in prompts:
        chunks, firsts = [], []
        for i in range(2):
            hidden = []
            for tokenizer, encoder in (
                (theirs.tokenizer, theirs.text_encoder),
                (theirs.tokenizer_2, theirs.text_encoder_2),
            ):
                tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                ids = [0, *tokens[10 * i : 10 * i + 10], 1]
                ids += [tokenizer.pad_token_id] * (12 - len(ids))
                out = encoder(torch.tensor([ids]), output_hidden_states=True)
                hidden.append(out.hidden_states[-2][0])
            chunks.append(torch.cat(hidden, dim=-1))
            firsts.append(out.text_embeds[0])
        contexts.append(torch.cat(chunks) * (prompt != ""))
        pooled.append(firsts[0] * (prompt != ""))
    torch.testing.assert_close(cond.context, torch.stack(contexts), rtol=0, atol=1e-6)
    torch.testing.assert_close(cond.pooled, torch.stack(pooled), rtol=0, atol=1e-6)
    [cut] = conditioner.cuts(prompts)
    assert (cut.num_tokens, cut.limit, cut.lost, cut.max_tokens) == (26, 20, "uvwxyz", 30)
    assert conditioner.context_length == 24
    other = SDXLConditioner(str(folder))
    other.configure(max_tokens=20, clip_skip=2)
    assert describe(other) == describe(conditioner)
    assert build(describe(conditioner), Conditioner).context_length == 24
    assert other.fingerprint() == conditioner.fingerprint()
    other.configure(prompt_weights=True)
    got, plain = other(["abc (d:2) e", "b", ""]), conditioner(["abc d e", "b", ""])
    assert torch.equal(got.pooled, plain.pooled)
    assert torch.equal(got.context[1:], plain.context[1:])
    assert torch.equal(got.context[0, 12:], plain.context[0, 12:])
    for part in (slice(16), slice(16, 40)):  # the encoders' means are restored one by one
        z = plain.context[0, :12, part].clone()
        mean = z.mean()
        z[4] *= 2
        wanted = z * mean / z.mean()
        torch.testing.assert_close(got.context[0, :12, part], wanted, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="clip_skip=1: SDXL's UNet was trained with the penult"):
        other.configure(clip_skip=1)


@pytest.mark.peer
@pytest.mark.parametrize(("num_steps", "scale", "rescale"), [(10, 4.0, 0.7), (8, 7.5, 0.0)])
def test_images_are_diffusers(made, num_steps, scale, rescale):
    folder, theirs = made
    ours = TextToImage.from_pretrained(folder, device="cpu")
    codec, found = ours.model.codec, []
    decode = codec.decode
    codec.decode = lambda latents: found.append(latents) or decode(latents)
    settings = {"num_steps": num_steps, "guidance": Guidance(scale, rescale), "progress": False}
    size = {"height": 16, "width": 24}
    images = ours(PROMPTS, seeds=[5, 6], sampler="ddim", **size, **settings)
    assert [image.size for image in images] == [(24, 16)] * 2
    start = [torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    wanted = theirs(
        PROMPTS,
        latents=torch.cat(start),
        num_inference_steps=num_steps,
        guidance_scale=scale,
        guidance_rescale=rescale,
        height=16,
        width=24,
        output_type="latent",
    ).images
    torch.testing.assert_close(torch.cat(found), wanted, rtol=0, atol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1


def config(folder, root, **more):
    """A training config whose parts are all of the folder, on pictures in three shapes."""
    shapes = [(48, 48), (80, 32), (32, 80)]
    for split, count in (("train", 11), ("val", 4)):
        members = {}
        for i in range(count):
            members[f"{i:05d}.png"] = tiny.png((9 * i, 99, 200 - 9 * i), shapes[i % 3])
            members[f"{i:05d}.txt"] = b"abcdefghijk"[i : i + 1]
        root.mkdir(exist_ok=True)
        tiny.write_shard(root / f"{split}-{count}.tar", members)
    codec = {"pretrained": str(folder), "subfolder": "vae"}
    previews = {"prompts": ["a b", ""], "every_n_steps": 2}
    values = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 4,
            "log_every_n_steps": 1,
            "val_check_interval": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(root / "run"),
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(root / "log")}},
            "callbacks": [{"class_path": "zsnr.training.Previews", "init_args": previews}],
        },
        "checkpoint": {"every_n_train_steps": 2},
        "model": {
            "codec": {"class_path": "AutoencoderKLCodec", "init_args": codec},
            "conditioner": {
                "class_path": "SDXLConditioner",
                "init_args": {"pretrained": str(folder)},
            },
            "network": str(folder),
            "caption_dropout": 0.3,
            "gradient_checkpointing": True,
            "sampling": {"num_steps": 3},
        },
        "data": {
            "train": f"{root}/train-*.tar",
            "val": f"{root}/val-*.tar",
            "image_size": 16,
            "aspect": {"step": 8, "max_ratio": 4},
            "pixels": {"flip": True},
            "batch_size": 4,
            "num_workers": 0,
        },
        **more,
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def logged(root, version=0):
    file = root / "log" / "lightning_logs" / f"version_{version}" / "metrics.csv"
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [float(row["train/loss"]) for row in rows if row["train/loss"]], rows


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """A training run from the folder: its place and its config."""
    root = tmp_path_factory.mktemp("run")
    path = config(made[0], root)
    assert main(["fit", "-c", str(path)]) == 0
    return root, path


@pytest.mark.peer
def test_from_a_flawed_start_to_what_diffusers_samples_right(made, tmp_path, capsys):
    """The whole way by command line: doctor, fit, export, doctor, diffusers."""
    from diffusers import StableDiffusionXLPipeline

    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(made[0], start)
    scheduler = start / "scheduler" / "scheduler_config.json"
    flawed = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), **flawed}))
    assert main(["doctor", str(start)]) == 1
    assert main(["fit", "-c", str(config(start, tmp_path / "root"))]) == 0
    _, rows = logged(tmp_path / "root")
    ratios = [float(row["adaptation/t0899"]) for row in rows if row.get("adaptation/t0899")]
    assert len(ratios) == 2
    assert min(ratios) > 0
    checkpoint = tmp_path / "root" / "run" / "checkpoints" / "last.ckpt"
    assert main(["doctor", str(checkpoint)]) == 0
    assert main(["export", str(checkpoint), "--output", str(out)]) == 0
    assert main(["doctor", str(out)]) == 0
    capsys.readouterr()

    ours = TextToImage.from_pretrained(checkpoint, device="cpu")
    theirs = StableDiffusionXLPipeline.from_pretrained(out, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=seeded(s)) for s in (5, 6)])
    settings = {"height": 16, "width": 16}
    own = {"sampler": "ddim", "progress": False}
    images = ours(PROMPTS, seeds=[5, 6], num_steps=10, **own, **settings)
    arrays = theirs(
        PROMPTS,
        latents=noise,
        num_inference_steps=10,
        guidance_scale=7.5,
        guidance_rescale=0.7,
        output_type="np",
        **settings,
    ).images
    for image, array in zip(images, arrays, strict=True):
        np.testing.assert_allclose(np.asarray(image) / 255, array, rtol=0, atol=0.5 / 255 + 1e-4)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_run_that_stops_goes_on_as_it_would_have(run, tmp_path):
    root, path = run
    losses, rows = logged(root)
    assert len(losses) == 4
    assert all(0 < loss < 10 for loss in losses)
    assert sum(bool(row.get("val/loss")) for row in rows) == 2
    log = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "log")}}
    options = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger={json.dumps(log)}"]
    first = root / "run" / "checkpoints" / "step-00000002.ckpt"
    assert main(["fit", "-c", str(path), *options, "--ckpt_path", str(first)]) == 0
    assert logged(tmp_path)[0] == losses[2:]
    assert (tmp_path / "previews" / "step-00000004.png").read_bytes() == (
        root / "run" / "previews" / "step-00000004.png"
    ).read_bytes()


def test_predict_is_the_checkpoint_in_the_pipeline(run, tmp_path):
    root, path = run
    checkpoint = str(root / "run" / "checkpoints" / "last.ckpt")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    options = ["--prompts", f"{tmp_path}/prompts.txt", "--output", f"{tmp_path}/out"]
    assert main(["predict", "-c", str(path), "--ckpt_path", checkpoint, *options]) == 0
    assert main(["validate", "-c", str(path), "--ckpt_path", checkpoint]) == 0
    pipe = TextToImage.from_pretrained(checkpoint, device="cpu")
    assert type(pipe.model.conditioner) is SDXLConditioner
    [image] = pipe(["a cat"], num_steps=3, progress=False)
    [written] = (tmp_path / "out").glob("*.png")
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(written)))


def test_training_from_a_cache_is_training_from_the_pictures(run, tmp_path):
    root, path = run
    make = ["data", "cache", "-c", str(path), "--text", "--dtype", "float32"]
    assert main([*make, "--output", f"{tmp_path}/train"]) == 0
    assert main([*make, "--output", f"{tmp_path}/val", "--source", "val"]) == 0
    log = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "log")}}
    options = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger={json.dumps(log)}"]
    options += [f"--data.train={tmp_path}/train", f"--data.val={tmp_path}/val"]
    assert main(["fit", "-c", str(path), *options]) == 0
    assert logged(tmp_path)[0] == pytest.approx(logged(root)[0], rel=1e-5)
    name = "val/loss"
    found = [[float(r[name]) for r in logged(x)[1] if r.get(name)] for x in (tmp_path, root)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_plan_is_of_the_weights(run, made, capsys):
    assert main(["plan", str(run[1]), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    theirs = made[1]
    text = sum(
        p.numel() for e in (theirs.text_encoder, theirs.text_encoder_2) for p in e.parameters()
    )
    assert facts["parameters"]["UNet"] == sum(p.numel() for p in theirs.unet.parameters())
    assert facts["parameters"]["text encoder"] == text
    assert facts["bytes_per_rank"]["activations"] > 0
    assert main(["plan", str(run[1]), "--json", "--measure"]) == 0
    assert json.loads(capsys.readouterr().out)["images_per_second"] > 1


# What the network is told


@pytest.mark.parametrize("size", [(60, 45), (45, 60), (33, 90), (16, 16), (10, 7)])
@pytest.mark.parametrize("crop", [(0.0, 0.0), (0.5, 0.5), (0.3, 0.9), (1.0, 1.0)])
def test_offsets_are_where_the_crop_lies_in_the_scaled_picture(size, crop):
    h, w = size
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    levels = np.stack([rows, columns, 0 * rows], -1).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "PNG")
    pixels = decode_image(stream.getvalue(), 16, 24, crop=crop)
    facts = size_facts(size, 16, 24, crop).tolist()
    assert facts[:2] == [h, w]
    assert facts[4:] == [16, 24]
    scale = max(16 / h, 24 / w)
    # Pixel i of the scaled picture shows (i + 1/2) / scale - 1/2 of the stored one.
    middle = pixels[:2, 8, 12].double()
    shown = ((middle + 0.5) * scale - 0.5 - torch.tensor([8.0, 12.0])).tolist()
    # within the rounding to whole pixels, of the offset, of the crop and of the level shown
    assert facts[2:4] == pytest.approx(shown, abs=0.5 + scale)
    if crop == (0, 0):
        assert facts[2:4] == [0, 0]


def test_sizes_come_with_every_kind_of_data(tmp_path):
    members, shapes = {}, [(30, 20), (20, 30), (25, 25), (40, 20)]
    for i, (width, height) in enumerate(shapes):
        members[f"{i}.png"] = tiny.png((i, i, i), (width, height))
        members[f"{i}.txt"] = str(i).encode()
        members[f"{i}.json"] = json.dumps({"score": i}).encode()
    shard = tiny.write_shard(tmp_path / "a.tar", members)
    data = DataModule(str(shard), image_size=16)
    dataset = ShardDataset(data.select(str(shard))[1])
    found = [dataset[i]["sizes"].tolist() for i in range(4)]
    # scaled until the short side has 16 pixels, and cut in the middle
    assert found == [
        [20, 30, 0, 4, 16, 16],
        [30, 20, 4, 0, 16, 16],
        [25, 25, 0, 0, 16, 16],
        [20, 40, 0, 8, 16, 16],
    ]
    batch = collate([dataset[i] for i in (2, 0)])
    assert batch["sizes"].tolist() == [found[2], found[0]]
    mirrored = ShardDataset(dataset.samples, pixels=Pixels(flip=True))
    assert [mirrored[i]["sizes"].tolist() for i in range(4)] == found


def test_a_cache_knows_its_random_crops(made, tmp_path):
    members = {}
    for i, side in enumerate((30, 36, 42, 48)):
        picture = np.zeros((16, side, 3), np.uint8)
        picture[:] = 4 * np.arange(side)[None, :, None]  # a level tells a column
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "PNG")
        members[f"{i}.png"], members[f"{i}.txt"] = stream.getvalue(), b"a"
        members[f"{i}.json"] = json.dumps({"score": i}).encode()
    tiny.write_shard(tmp_path / "a.tar", members)
    data = {"train": f"{tmp_path}/a.tar", "image_size": 16, "pixels": {"crop": "random"}}
    values = {"model": {**tiny.MODEL, "codec": {"class_path": "PixelCodec"}}, "data": data}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    make = ["data", "cache", "-c", f"{tmp_path}/config.yaml", "--dtype", "float32"]
    assert main([*make, "--output", f"{tmp_path}/cache"]) == 0
    cache = find_cache(f"{tmp_path}/cache")
    keep = [Filter("score", min=1)]
    module = DataModule(f"{tmp_path}/cache", image_size=16, filters=keep)
    index = module._load_index(f"{tmp_path}/cache")
    samples = select_cached(cache, index, keep)
    dataset = CacheDataset(samples, pixels=Pixels(crop="random"), seed=5)
    assert len(dataset) == 3
    lefts = []
    for i in range(3):
        item = dataset[i]
        level = (item["moments"][0, 0, 0].item() + 1) * 127.5
        lefts.append(round(level / 4))
        assert item["sizes"].tolist() == [16, (36, 42, 48)[i], 0, lefts[-1], 16, 16]
    assert len({*lefts}) > 1
    whole = DataModule(
        val=f"{tmp_path}/cache", image_size=16, pixels=Pixels(crop="random"), num_workers=0
    )
    whole.trainer = SimpleNamespace(
        default_root_dir=tmp_path, global_rank=0, world_size=1, state=SimpleNamespace(fn="validate")
    )
    whole.prepare_data()
    whole.setup("validate")
    [batch] = whole.val_dataloader()
    assert batch["sizes"][1:, 3].tolist() == lefts


def test_training_tells_the_unet_prompt_and_sizes(made):
    folder, theirs = made
    module = small_module(folder)
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sizes = torch.tensor([[48, 72, 0, 3, 16, 24], [100, 90, 7, 0, 16, 24]])
    batch = {"image": image, "caption": ["a cat", "dog"], "sizes": sizes}
    draws = training_draws(0, [0, 1], 2, (4, 8, 12), 1000, 0.0)
    draws = Draws(draws.t, torch.tensor([True, False]), draws.z, draws.eps, draws.d)
    with torch.no_grad():
        mine = tiny.losses(module, batch, draws)
        context, _, pooled, _ = theirs.encode_prompt(
            ["a cat", "dog"], do_classifier_free_guidance=False
        )
        told = torch.tensor([1.0, 0.0])  # the second caption is dropped
        x_0 = module.codec.latents(module.codec.encode(image), draws.z)
        x_t = module.schedule.add_noise(x_0, draws.eps, draws.t)
        output = theirs.unet(
            x_t,
            draws.t,
            encoder_hidden_states=context * told[:, None, None],
            added_cond_kwargs={"text_embeds": pooled * told[:, None], "time_ids": sizes},
        ).sample
        target = prediction_target(x_0, draws.eps, *module.schedule(draws.t), "v_prediction")
        torch.testing.assert_close(mine, (output - target).square().mean((1, 2, 3)))
        other = tiny.losses(module, {**batch, "sizes": sizes.flip(0)}, draws)
        assert not torch.allclose(mine, other, rtol=1e-5)
        with pytest.raises(ValueError, match="got no sizes"):
            tiny.losses(module, {k: v for k, v in batch.items() if k != "sizes"}, draws)


def test_half_precision_encoders_teach_a_float32_network(tmp_path):
    theirs = tiny.sdxl_folder(tmp_path)
    for name in ("text_encoder", "text_encoder_2"):
        getattr(theirs, name).half().save_pretrained(tmp_path / name)
    module = small_module(tmp_path)
    batch = {
        "image": torch.zeros(1, 3, 16, 16),
        "caption": ["a"],
        "sizes": torch.tensor([[16, 16, 0, 0, 16, 16]]),
    }
    draws = training_draws(0, [0], 1, (4, 8, 8), 1000, 0.0)
    assert tiny.losses(module, batch, draws).isfinite().all()
    assert module.model().conditioner(["a"]).context.dtype == torch.float16


def small_module(folder, **options):
    return LatentDiffusion(
        codec=AutoencoderKLCodec(str(folder), subfolder="vae"),
        conditioner=SDXLConditioner(str(folder)),
        network=str(folder),
        image_size=16,
        **options,
    )


# The conditioner


def test_empty_prompts_are_zeros_among_others(made):
    conditioner = SDXLConditioner(str(made[0]))
    cond, alone = conditioner(["a", "", "b"]), conditioner(["a", "b"])
    for name in ("context", "pooled"):
        rows = getattr(cond, name)
        assert rows[1].abs().max() == 0
        torch.testing.assert_close(rows[[0, 2]], getattr(alone, name))
    encoded = SDXLConditioner(str(made[0]), zero_null=False)
    assert encoded.null().context.abs().max() > 0
    assert encoded.fingerprint() != conditioner.fingerprint()


def test_the_folder_says_whether_null_is_zeros(tmp_path):
    tiny.sdxl_folder(tmp_path, force_zeros=False)
    encoded = SDXLConditioner(str(tmp_path))
    assert encoded.null().pooled.abs().max() > 0
    assert SDXLConditioner(str(tmp_path), zero_null=True).null().pooled.abs().max() == 0
    (tmp_path / "model_index.json").unlink()
    assert SDXLConditioner(str(tmp_path), zero_null=True).null().pooled.abs().max() == 0
    with pytest.raises(ValueError, match=r"holds no model_index\.json"):
        SDXLConditioner(str(tmp_path))
    again = build(describe(encoded), Conditioner)  # knows what the folder said
    assert torch.equal(again.null().pooled, encoded.null().pooled)


def test_it_is_released_described_and_remembered(made, tmp_path):
    conditioner = SDXLConditioner(str(made[0]), max_length=7)
    rows = conditioner(PROMPTS)
    assert rows.context.shape == (2, 7, 40)
    assert len(list(conditioner.parameters())) > 50
    assert list(conditioner.release().parameters()) == []
    again = build(describe(conditioner), Conditioner)
    assert torch.equal(again(PROMPTS).pooled, rows.pooled)
    remembered = Remembered(conditioner)
    assert remembered.pooled_dim == 20
    got = remembered(PROMPTS[::-1])
    assert torch.equal(got.context, rows.context.flip(0))
    assert torch.equal(got.pooled, rows.pooled.flip(0))
    with pytest.raises(ValueError, match="pooled embedding of width 0 for 'a': wanted 20"):
        remembered.add("a", Conditioning(rows.context[:1]))


def test_fingerprints_are_of_all_parts(tmp_path):
    tiny.sdxl_folder(tmp_path / "a")
    first = SDXLConditioner(str(tmp_path / "a")).fingerprint()
    assert json.loads(json.dumps(first)) == first
    (tmp_path / "a").rename(tmp_path / "b")
    folder = tmp_path / "b"
    assert SDXLConditioner(str(folder)).fingerprint() == first
    assert SDXLConditioner(str(folder), max_length=5).fingerprint() == {**first, "max_length": 5}
    for name in ("text_encoder", "text_encoder_2"):
        weights = folder / name / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        changed = SDXLConditioner(str(folder)).fingerprint()
        assert [key for key in first if changed[key] != first[key]] == ["weights"]
        weights.unlink()
        assert SDXLConditioner(str(folder)).fingerprint()["weights"] is None
        weights.write_bytes(whole)
    tiny.letters_tokenizer(pad_token="a").save_pretrained(folder / "tokenizer_2")
    changed = SDXLConditioner(str(folder)).fingerprint()
    assert [key for key in first if changed[key] != first[key]] == ["tokenizers"]


# What is refused


def test_parts_that_do_not_fit_are_refused_before_training(made, tmp_path):
    folder = str(made[0])
    text = tiny.frozen_conditioner(tmp_path)
    codec = AutoencoderKLCodec(folder, subfolder="vae")
    with pytest.raises(ValueError, match="has width 40 but the conditioner has 16"):
        LatentDiffusion(codec, text, folder, image_size=16)
    with pytest.raises(ValueError, match="conditioner returns none: use SDXL's UNet with"):
        LatentDiffusion(codec, NullConditioner(40), folder, image_size=16)
    with pytest.raises(ValueError, match="68 = 20 [+] 6 x 8, but .* returns one of width 21"):
        UNet(pretrained=folder, channels=4, context_dim=40, pooled_dim=21)
    unet = UNet(pretrained=folder)
    assert unet.takes_sizes
    assert not UNet(tiny.UNET, channels=4, context_dim=16).takes_sizes
    x_t, t = torch.zeros(1, 4, 8, 8), torch.tensor([5])
    context, pooled = torch.zeros(1, 3, 40), torch.zeros(1, 20)
    with pytest.raises(ValueError, match="got no pooled"):
        unet(x_t, t, Conditioning(context, sizes=torch.zeros(1, 6)))
    with pytest.raises(ValueError, match="got no sizes"):
        unet(x_t, t, Conditioning(context, pooled=pooled))
    settings = dict(unet.unet.config, addition_embed_type="text_image")
    with pytest.raises(ValueError, match="addition_embed_type='text_image'"):
        UNet(settings)


@pytest.mark.parametrize(
    "part",
    ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"],
)
def test_missing_parts_are_named(tmp_path, part):
    tiny.sdxl_folder(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(ValueError, match=part):
        TextToImage.from_pretrained(tmp_path)


def test_other_folders_are_refused(tmp_path):
    tiny.sdxl_folder(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    for change, message in (
        ({"requires_aesthetics_score": True}, "is a refiner"),
        ({"unet": None, "_class_name": "FluxPipeline"}, "is a FluxPipeline without a unet"),
    ):
        kept = {k: v for k, v in {**index, **change}.items() if v is not None}
        file.write_text(json.dumps(kept))
        with pytest.raises(ValueError, match=message):
            TextToImage.from_pretrained(tmp_path)
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"Cannot read model_index\.json"):
            TextToImage.from_pretrained(tmp_path)


def test_text_encoders_that_do_not_fit_are_refused(tmp_path):
    tiny.sdxl_folder(tmp_path)
    for length in (1, 13):
        with pytest.raises(ValueError, match=f"max_length={length}: .* support 2 to 12 tokens"):
            SDXLConditioner(str(tmp_path), max_length=length)
    file = tmp_path / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 9}))
    with pytest.raises(ValueError, match="produce 12 and 9 tokens: set max_length"):
        SDXLConditioner(str(tmp_path))
    assert SDXLConditioner(str(tmp_path), max_length=9)(["a"]).context.shape == (1, 9, 40)
    (tmp_path / "text_encoder" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="is a 't5': wanted a CLIP"):
        SDXLConditioner(str(tmp_path), max_length=9)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"addition_time_embed_dim": None}, "68 = 68 [+] 6 x 0"),
        ("unet", {"norm_num_groups": 0}, "Cannot load a UNet2DConditionModel"),
        ("vae", {"scaling_factor": None}, "does not tell the scale of its latents"),
        ("vae", {"scaling_factor": 0}, "scaling_factor=0 .*wanted another"),
        ("vae", {"shift_factor": "x"}, "shift_factor='x' .*wanted a number"),
        ("text_encoder", {"num_hidden_layers": 0}, "has no layers"),
    ],
)
def test_configs_that_make_no_model_are_refused(tmp_path, part, change, message):
    tiny.sdxl_folder(tmp_path)
    file = tmp_path / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        TextToImage.from_pretrained(tmp_path)


# Several ranks


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_ranks_train_as_one(ranks, made, tmp_path, kind):
    data, folder = tmp_path / "data", str(made[0])
    tiny.write_shards(data, [9])
    tiny.write_shards(data, [4], "val")
    alone = cells.fit_sdxl(data, tmp_path / "one", "one", folder)
    for run in ranks[2](cells.fit_sdxl, data, tmp_path / "two", kind, folder):
        assert len(run["logged"]) == 4
        for mine, theirs in zip(run["logged"], alone["logged"], strict=True):
            assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        for name, weight in alone["ema"].items():
            torch.testing.assert_close(run["ema"][name], weight, rtol=0, atol=1e-5)
