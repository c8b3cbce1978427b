import copy
import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from zsnr import (
    DDIM,
    Denoiser,
    Guidance,
    Heun,
    NoiseSchedule,
    RectifiedFlow,
    SampleNoise,
    UniPC,
    available_samplers,
    get_sampler,
    get_timesteps,
    recommend_sampling,
    trailing,
)
from zsnr.checkpoints import Model
from zsnr.checkpoints.checkpoint_file import KEY, describe_model
from zsnr.codecs import PixelCodec
from zsnr.conditioning import NullConditioner
from zsnr.editing import Edit
from zsnr.networks import UNet
from zsnr.pipeline import Sampling, TextToImage, describe_guidance, save_png, to_image
from zsnr.samplers import Changed

FAST = {"num_steps": 3, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return TextToImage(tiny.model())


def arrays(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_a_seed_is_a_picture_whatever_stands_beside_it(pipe):
    prompts, seeds = ["a cat", "a dog", "a cat", ""], [0, 0, 1, 2**32 - 1]
    together = arrays(pipe(prompts, seeds=seeds, **FAST))
    small = arrays(pipe(prompts, seeds=seeds, batch_size=3, **FAST))
    turned = arrays(pipe(prompts[::-1], seeds=seeds[::-1], **FAST))[::-1]
    for other in (small, turned):
        assert np.abs(together - other).max() <= 1  # one rounding of 255
    assert np.abs(together[0] - together[2]).max() > 5


LONG = "a cat that sits on a red sofa on a black background"  # 12 tokens; the model reads 6


def test_a_cut_prompt_is_warned_of_once(pipe):
    pipe.warned_of.clear()
    with pytest.warns(UserWarning, match="cut") as caught:
        pipe([LONG, "a dog", LONG, ""], negative_prompts=["", f"{LONG} {LONG}", "", ""], **FAST)
    pipe([LONG], batch_size=1, **FAST)  # another warning would be an error
    pipe.denoiser([LONG])
    assert [str(warning.message) for warning in caught] == [
        "2 of 3 prompts are cut: the text encoder reads 6 tokens, the longest has 24. Lost are the "
        "words 'red sofa on a black background a cat that sits on a red sofa on a black "
        f"background' of '{LONG} {LONG}'. Set max_tokens=24 to read all of it: --max-tokens 24 in "
        "`zsnr sample`, model.conditioner.init_args.max_tokens in a config."
    ]
    assert caught[0].filename == __file__
    pipe.warned_of.clear()
    with pytest.warns(UserWarning, match="^The prompt is cut: .* 6 tokens, it has 12. Lost are"):
        pipe.denoiser([LONG])


def test_long_prompts_are_read_to_their_end():
    pipe = TextToImage(tiny.model())
    pipe.warned_of.add(white := LONG.replace("black", "white"))
    pipe.warned_of.add(LONG)
    black = arrays(pipe([LONG], seeds=[1], **FAST))
    assert np.array_equal(black, arrays(pipe([white], seeds=[1], **FAST)))
    pipe.model.conditioner.configure(max_tokens=12)
    images = pipe([LONG, white, "a dog"], seeds=[1, 1, 1], **FAST)
    together = arrays(images)
    assert np.abs(together[0] - together[1]).max() > 1
    alone = [arrays(pipe([prompt], seeds=[1], **FAST))[0] for prompt in (LONG, white, "a dog")]
    assert np.abs(together - np.stack(alone)).max() <= 1  # one rounding of 255
    facts = json.loads(images[0].info["zsnr"])
    assert facts["max_tokens"] == 12
    assert "clip_skip" not in facts


def test_a_saved_model_is_read_with_other_settings(tmp_path):
    path = tmp_path / "model.ckpt"
    model = tiny.model()
    checkpoint = {
        KEY: describe_model(model),
        "state_dict": {
            **{f"trained.unet.{n}": w for n, w in model.network.state_dict().items()},
            **{f"trained.conditioner.{n}": w for n, w in model.conditioner.state_dict().items()},
        },
    }
    torch.save(checkpoint, path)
    options = {"max_tokens": 12, "clip_skip": 1, "device": "cpu"}
    pipe = TextToImage.from_pretrained(path, **options)
    assert pipe.model.conditioner([LONG]).context.shape == (1, 16, 16)
    with pytest.raises(ValueError, match="clip_skip=2: wanted 1 to 1"):
        TextToImage.from_pretrained(path, **{**options, "clip_skip": 2})


def test_it_is_the_paper_by_hand(pipe):
    model, guidance = pipe.model, Guidance(3.0, 0.7)
    settings = {"sampler": "ddim", "num_steps": 4, "guidance": guidance, "progress": False}
    got = arrays(pipe(["a cat"], seeds=[4], **settings))
    schedule, x = model.schedule, SampleNoise([4]).randn((12, 8, 8))
    cond, null = model.conditioner(["a cat"]), model.conditioner([""])
    grid = trailing(4).tolist()
    with torch.no_grad():
        for t, s in zip(grid, [*grid[1:], -1], strict=True):
            (alpha, sigma), (alpha_s, sigma_s) = schedule(t), schedule(s)
            t = torch.tensor([t])
            pos, neg = (model.network(x, t, c) for c in (cond, null))
            cfg = neg + 3.0 * (pos - neg)
            v = cfg * (0.7 * pos.std() / cfg.std() + 0.3)
            x_0, eps = alpha * x - sigma * v, sigma * x + alpha * v
            x = alpha_s * x_0 + sigma_s * eps
        wanted = to_image(model.codec.decode(x)[0])
    assert np.abs(got[0] - np.asarray(wanted)).max() <= 1


def test_negative_prompts(pipe):
    same = arrays(pipe(["a cat"] * 2, negative_prompts=["", "a dog"], seeds=[0, 0], **FAST))
    assert np.abs(same[0] - same[1]).max() > 1
    plain = arrays(pipe(["a cat"], seeds=[0], **FAST))
    assert np.abs(same[0] - plain[0]).max() <= 1
    # guiding away from the prompt itself is no guidance
    ddim = {"sampler": "ddim", "seeds": [0], **FAST}
    away = arrays(pipe(["a cat"], negative_prompts=["a cat"], guidance=Guidance(9.0, 0.0), **ddim))
    alone = arrays(pipe(["a cat"], guidance=Guidance(1.0, 0.0), **ddim))
    assert np.abs(away - alone).max() <= 1


@pytest.mark.parametrize(
    ("num_steps", "scale", "given", "sampler", "spacing"),
    [
        (50, 7.5, {}, "ddim", "trailing"),
        (60, 1.0, {}, "ddim", "trailing"),
        (8, 7.5, {}, "multiscale", "guided"),
        (8, 1.0, {}, "multiscale", "log_snr"),
        (4, 7.5, {}, "multiscale", "guided"),
        (8, 7.5, {"sampler": "euler"}, "euler", "trailing"),
        (8, 7.5, {"spacing": "log_snr"}, "ddim", "log_snr"),
        (8, 7.5, {"sampler": "auto", "spacing": "auto"}, "multiscale", "guided"),
    ],
)
def test_the_number_of_steps_is_enough(pipe, num_steps, scale, given, sampler, spacing):
    guidance = {} if scale == 7.5 else {"guidance": Guidance(scale)}
    settings = {"num_steps": num_steps, "seeds": [3], "progress": False, **guidance}
    found = pipe(["a cat"], **settings, **given)
    wanted = pipe(["a cat"], **settings, sampler=sampler, spacing=spacing)
    assert (arrays(found) == arrays(wanted)).all()
    assert found[0].info == wanted[0].info  # which names what was used
    facts = json.loads(found[0].info["zsnr"])
    assert (facts["sampler"], facts["spacing"]) == (sampler, spacing)
    sampling = Sampling(num_steps=num_steps, **guidance, **given)
    assert (sampling.sampler, sampling.spacing) == (get_sampler(sampler), spacing)
    assert dataclasses.replace(sampling, num_steps=7).sampler == sampling.sampler


def test_a_grid_file_brings_its_sampler(tmp_path):
    path = tmp_path / "grid.json"
    for named, wanted in (("", DDIM()), (', "sampler": "unipc"', UniPC())):
        path.write_text(f'{{"timesteps": [999, 300, 20]{named}}}')
        assert Sampling(num_steps=3, spacing=str(path)).sampler == wanted
        assert Sampling("heun", num_steps=3, spacing=str(path)).sampler == Heun()
    path.write_text('{"timesteps": [999], "sampler": 5}')
    with pytest.raises(ValueError, match="grid.json: sampler is 5: wanted a name"):
        Sampling(num_steps=1, spacing=str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "plms"}, "Sampler 'plms' is unknown. Known: 'ddim', 'ddpm'"),
        ({"sampler": None}, "sampler=None: wanted a sampler, the name of one, or 'auto'"),
        ({"num_steps": 0}, "num_steps=0: wanted an int of at least 1"),
    ],
)
def test_sampling_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("guidance", [None, Guidance(2.0, 0.0, interval=(0.5, 4.0)), Guidance(1.0)])
def test_a_loop_of_one_s_own(pipe, guidance):
    prompts, negatives, seeds = ["a cat", "a dog"], ["", "a cat"], [4, 5]
    states = []
    pipe(
        prompts,
        negative_prompts=negatives,
        seeds=seeds,
        num_steps=8,
        guidance=guidance,
        progress=False,
        callback=lambda i, t, x_0, x_s: states.append(x_s),
    )
    model = pipe.model
    sampler, spacing = recommend_sampling(8, guidance or Guidance())
    sampler = get_sampler(sampler)
    with torch.no_grad():
        denoiser = pipe.denoiser(prompts, negative_prompts=negatives, guidance=guidance)
        grid = get_timesteps(spacing, 8, schedule=model.schedule)
        plan = sampler.plan(model.schedule, grid, denoiser.guidance)
        noise = SampleNoise(seeds).randn(model.codec.latent_shape(16, 16), device=denoiser.device)
        state = sampler.begin(plan, noise)
        for call, wanted in zip(plan.calls, states, strict=True):
            x_0 = denoiser.at(call.t, call.s)(state.x_t, torch.full((2,), call.t))
            state = sampler.advance(plan, state, x_0)
            assert torch.equal(state.x_t, wanted)
    assert state.done
    with pytest.raises(ValueError, match="1 negative_prompts for 2 prompts"):
        pipe.denoiser(prompts, negative_prompts=["a"])
    with pytest.raises(ValueError, match="needs the raw weights"):
        pipe.denoiser(prompts, guidance=Guidance(against="raw"))


def test_sizes_and_samplers(pipe):
    image = pipe(["a"], height=24, width=8, sampler="euler", spacing="linspace", **FAST)[0]
    assert image.size == (8, 24)
    facts = json.loads(image.info["zsnr"])
    assert (facts["sampler"], facts["spacing"], facts["height"]) == ("euler", "linspace", 24)


def test_a_png_says_how_to_make_it_again(pipe, tmp_path):
    path = tmp_path / "deep" / "a.png"
    first = pipe(["Bär\n日本"], seeds=[7], sampler=DDIM(eta=0.5), guidance=Guidance(2.0), **FAST)[0]
    save_png(first, path)
    with Image.open(path) as image:
        facts = json.loads(image.info["zsnr"])
    assert facts["prompt"] == "Bär\n日本"
    again = pipe(
        [facts["prompt"]],
        negative_prompts=[facts["negative_prompt"]],
        seeds=[facts["seed"]],
        height=facts["height"],
        width=facts["width"],
        sampler=DDIM(**facts["sampler_options"]),
        num_steps=facts["num_steps"],
        spacing=facts["spacing"],
        guidance=Guidance(facts["guidance_scale"], facts["guidance_rescale"]),
        progress=False,
    )
    assert np.abs(arrays(again) - arrays([first])).max() <= 1
    assert NoiseSchedule(**facts["schedule"]) == pipe.model.schedule
    assert list(path.parent.iterdir()) == [path]


def guidance_of(facts):
    """Rebuild guidance from what a picture says."""
    names = [f.name for f in dataclasses.fields(Guidance) if f"guidance_{f.name}" in facts]
    return Guidance(**{name: facts[f"guidance_{name}"] for name in names})


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(3.0, 0.0, method="apg", apg_parallel=0.2, apg_norm=4.0),
        Guidance(3.0, 0.7, method="cfg_zero_star", threshold=0.99),
        Guidance(0.6, 0.0, method="cfg_pp"),
        Guidance(curve=((-6.0, 1.0), (0.0, 7.5)), at_zero_snr=False),
        Guidance(1.0, threshold=0.99),
    ],
)
def test_a_png_tells_its_guidance(pipe, guidance):
    [image] = pipe(["a cat"], seeds=[7], guidance=guidance, **FAST)
    facts = json.loads(image.info["zsnr"])
    assert guidance_of(facts) == guidance
    defaults = {name for name in facts if name.startswith("guidance_")}
    assert len(defaults) == 3 + sum(
        getattr(guidance, f.name) != f.default
        for f in dataclasses.fields(Guidance)
        if f.name not in ("scale", "rescale", "interval")
    )
    again = pipe(["a cat"], seeds=[7], guidance=guidance_of(facts), **FAST)
    assert np.array_equal(arrays(again), arrays([image]))
    plain = pipe(["a cat"], seeds=[7], **FAST)
    assert np.abs(arrays(plain) - arrays([image])).max() > 1
    assert describe_guidance(Guidance()) == {
        "guidance_scale": 7.5,
        "guidance_rescale": 0.7,
        "guidance_interval": None,
    }


def test_guidance_away_from_raw_weights(pipe):
    guidance = Guidance(3.0, 0.0, against="raw")
    raw = copy.deepcopy(pipe.model.network)
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.mul_(0.9)
    both = TextToImage(dataclasses.replace(pipe.model, raw_network=raw)).to("cpu")
    got = arrays(both(["a cat"], seeds=[4], sampler="ddim", guidance=guidance, **FAST))
    cond = pipe.model.conditioner(["a cat"])
    denoiser = Denoiser(
        lambda x, t, c: 3 * pipe.model.network(x, t, c) - 2 * raw(x, t, c),
        pipe.model.schedule,
        cond=cond,
    )
    x_T = SampleNoise([4]).randn((12, 8, 8))
    with torch.no_grad():
        x_0 = DDIM().sample(denoiser, pipe.model.schedule, x_T, trailing(3))
    wanted = np.asarray(to_image(pipe.model.codec.decode(x_0)[0])).astype(int)
    assert np.abs(got[0] - wanted).max() <= 1
    with pytest.raises(ValueError, match="needs the raw weights beside the averaged ones"):
        pipe(["a cat"], guidance=guidance, **FAST)
    with pytest.raises(ValueError, match="not from negative prompts"):
        both(["a cat"], negative_prompts=["a dog"], guidance=guidance, **FAST)
    with pytest.raises(ValueError, match="holds one set of weights"):
        TextToImage.from_pretrained("some/model", raw_beside=True)


def test_a_checkpoint_holds_raw_weights_beside_averaged_ones(tmp_path):
    torch.manual_seed(0)
    codec, conditioner = PixelCodec(2), NullConditioner(8)
    unets = {
        name: UNet(tiny.UNET, channels=codec.channels, context_dim=8) for name in ("ema", "trained")
    }
    model = Model(codec, conditioner, unets["ema"], NoiseSchedule(), "v_prediction", 16)
    for names in (("ema", "trained"), ("trained",)):
        weights = {
            f"{name}.unet.{key}": value
            for name in names
            for key, value in unets[name].state_dict().items()
        }
        torch.save({"zsnr": describe_model(model), "state_dict": weights}, tmp_path / "a.ckpt")
        if names == ("trained",):
            with pytest.raises(ValueError, match="no averaged weights"):
                TextToImage.from_pretrained(tmp_path / "a.ckpt", raw_beside=True)
            return
        pipe = TextToImage.from_pretrained(
            tmp_path / "a.ckpt", raw_beside=True, device="cpu", dtype=torch.bfloat16
        )
        for unet, name in ((pipe.model.network, "ema"), (pipe.model.raw_network, "trained")):
            for parameter, wanted in zip(unet.parameters(), unets[name].parameters(), strict=True):
                assert torch.equal(parameter, wanted.bfloat16())
                assert not parameter.requires_grad
        pipe([""], guidance=Guidance(2.0, against="raw"), **FAST)
        assert TextToImage.from_pretrained(tmp_path / "a.ckpt").model.raw_network is None


def test_a_threshold_is_for_pixels(pipe):
    scaled = dataclasses.replace(pipe.model, codec=PixelCodec(2, scale=0.5))
    with pytest.raises(ValueError, match="is for models of pixels"):
        TextToImage(scaled)(["a"], guidance=Guidance(threshold=0.995), **FAST)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.png"
    save_png(to_image(torch.zeros(3, 4, 4)), path)
    before = path.read_bytes()
    broken = to_image(torch.ones(3, 4, 4))
    broken.info["zsnr"] = object()
    with pytest.raises(Exception, match=r".*"):
        save_png(broken, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_pixels_are_rounded_and_clamped():
    levels = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 5).expand(3, 1, 5)
    assert np.asarray(to_image(levels))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"negative_prompts": []}, "0 negative_prompts for 1 prompts"),
        ({"seeds": [-1]}, "seed=-1"),
        ({"num_steps": 1001}, "num_steps=1001"),
        ({"spacing": "bosh"}, "Known:"),
        ({"sampler": "plms"}, "Known: 'ddim'"),
        ({"height": 15}, "height=15"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_calls_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(["a"], **options)


def test_a_bare_string_is_no_list_of_prompts(pipe):
    with pytest.raises(ValueError, match="wanted a list of strings"):
        pipe("a cat")


def test_epsilon_at_zero_snr_is_refused():
    with pytest.raises(ValueError, match="no x_0 at t=999"):
        TextToImage(tiny.model(prediction_type="epsilon"))


def test_no_prompts_no_pictures(pipe):
    assert pipe([], **FAST) == []


def test_save_png_wants_an_image():
    with pytest.raises(TypeError, match="wanted an image of PIL, as zsnr.pipeline.to_image makes"):
        save_png(torch.zeros(3, 4, 4), "x.png")


@pytest.fixture(scope="module")
def photo():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1


LEFT = torch.zeros(16, 16)
LEFT[:, :7] = 1  # the fourth column of latents is repainted too


def test_strength_1_is_text_to_image(pipe, photo):
    plain = pipe(["a cat", "dogs"], **FAST)
    from_image = pipe(["a cat", "dogs"], image=photo, strength=1.0, **FAST)
    assert np.array_equal(arrays(plain), arrays(from_image))


@pytest.mark.parametrize(
    ("name", "spacing"),
    [(name, "trailing") for name in available_samplers()]
    + [("unipc", "leading"), ("heun", "log_snr"), ("multiscale", "guided")],
)
def test_image_to_image_starts_inside_the_grid(pipe, photo, name, spacing):
    """At alpha_t x_0 + sigma_t eps with the noise of the seed, where that share is left."""
    schedule, codec = pipe.model.schedule, pipe.model.codec
    options = {"sampler": name, "spacing": spacing, "num_steps": 5, "progress": False}
    steps = []
    [made] = pipe(
        *(["a cat"],),
        **options,
        seeds=[3],
        image=photo,
        strength=0.6,
        guidance=Guidance(2.0, 0.0),
        callback=lambda i, t, x_0, x_s: steps.append(t),
    )
    grid = get_timesteps(spacing, 5, schedule=schedule)[2:]
    assert steps == grid.tolist()
    noise = SampleNoise([3])
    x_0 = codec.latents(codec.encode(photo))
    x_t = schedule.add_noise(x_0, noise.randn(x_0.shape[1:]), grid[:1])
    denoiser = pipe.denoiser(["a cat"], guidance=Guidance(2.0, 0.0))
    with torch.no_grad():
        latents = get_sampler(name).sample(
            denoiser, schedule, x_t, grid, randn_like=noise.randn_like
        )
    assert np.array_equal(made, to_image(codec.decode(latents)[0]))


@pytest.mark.parametrize("name", available_samplers())
def test_the_kept_part_is_kept_and_a_seed_is_an_image(pipe, photo, name):
    start = to_image(photo[0])
    options = {"sampler": name, "image": start, "mask": LEFT, **FAST}
    both = arrays(pipe(["a cat", "a cat"], seeds=[1, 2], **options))
    assert np.array_equal(both[:, :, 7:], arrays([start] * 2)[:, :, 7:])
    assert np.abs(both[0] - both[1])[:, :7].mean() > 5
    assert np.array_equal(arrays(pipe(["a cat"], seeds=[2], **options))[0], both[1])


def test_one_image_and_mask_for_each_prompt(pipe, photo):
    images = [to_image(photo[0]), to_image(-photo[0]), to_image(photo[0].flip(1))]
    masks = torch.stack([LEFT, LEFT.flip(0), 1 - LEFT])
    prompts = ["a cat", "a dog", "a cat"]
    for size in (1, 2, 3):
        made = arrays(
            pipe(prompts, image=images, mask=masks, strength=0.7, batch_size=size, **FAST)
        )
        for i in range(3):
            [alone] = arrays(
                pipe([prompts[i]], seeds=[i], image=images[i], mask=masks[i], strength=0.7, **FAST)
            )
            assert np.array_equal(made[i], alone)


def test_a_mask_of_ones_and_full_strength_is_text_to_image(pipe, photo):
    plain = arrays(pipe(["a cat"], **FAST))
    whole = arrays(pipe(["a cat"], image=photo, mask=torch.ones(16, 16), **FAST))
    assert np.array_equal(plain, whole)
    none = pipe(["a cat"], image=photo, mask=torch.zeros(16, 16, dtype=torch.bool), **FAST)
    assert np.array_equal(none[0], to_image(photo[0]))


def test_images_of_pil_are_read_as_they_are_shown(pipe):
    shades = np.arange(16 * 8, dtype=np.uint8).reshape(16, 8)
    turned = Image.fromarray(shades)
    turned.getexif()[0x0112] = 6
    keep = torch.zeros(8, 16)
    [made] = pipe(["a"], image=turned, mask=keep, **FAST)
    assert np.array_equal(np.asarray(made)[..., 0], np.rot90(shades, -1))
    clear = Image.new("RGBA", (16, 8), (255, 255, 255, 0))  # a mask that shows nothing
    assert np.array_equal(pipe(["a"], image=turned, mask=clear, **FAST)[0], made)
    deep = Image.fromarray((shades.astype(np.uint16)) * 257)
    assert pipe(["a"], image=deep, mask=torch.zeros(16, 8), **FAST)[0].size == (8, 16)


def test_a_callback_of_the_pipeline_changes_latents(pipe):
    white = pipe(
        *(["a cat"],),
        **FAST,
        callback=lambda i, t, x_0, x_s: Changed(x_s=torch.ones_like(x_s)) if i == 2 else None,
    )
    assert np.asarray(white[0]).min() == 255


def test_an_edited_image_tells_how(pipe, photo):
    [made] = pipe(["a cat"], image=photo, strength=0.7, mask=LEFT, mask_corrections=1, **FAST)
    facts = json.loads(made.info["zsnr"])
    assert (facts["strength"], facts["mask_corrections"]) == (0.7, 1)
    assert len(facts["image_sha256"]) == len(facts["mask_sha256"]) == 64
    [made] = pipe(["a cat"], image=photo, **FAST)
    assert json.loads(made.info["zsnr"])["strength"] == 0.6
    assert "mask_sha256" not in json.loads(made.info["zsnr"])


GRAY = Image.new("RGB", (16, 16), "gray")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": LEFT}, "mask without image: wanted an image to start from"),
        ({"strength": 0.5}, "strength without image"),
        ({"image": GRAY, "strength": 0.0}, r"strength=0\.0: wanted a number above 0, up to 1"),
        ({"image": GRAY, "strength": 1.5}, r"strength=1\.5"),
        ({"image": GRAY, "strength": float("nan")}, "strength=nan"),
        ({"image": GRAY, "strength": 0.3}, r"strength=0\.3 of 3 steps .* at least 4 steps"),
        ({"image": GRAY, "height": 32}, r"height=32, but the image is 16 x 16 .* Resize"),
        (
            {"image": GRAY, "mask": LEFT[:8]},
            r"mask is 8 x 16 .* the image is 16 x 16: wanted equal",
        ),
        ({"image": GRAY.resize((17, 16))}, "width=17: wanted a positive multiple of 2"),
        ({"image": [GRAY, GRAY]}, "2 images for 1 prompts"),
        ({"image": [GRAY, GRAY.resize((8, 8))]}, "wanted one size for all"),
        ({"image": GRAY, "mask": torch.zeros(2, 1, 16, 16)}, "2 masks for 1 prompts"),
        ({"image": GRAY, "mask": LEFT * 2}, r"mask has values outside of \[0, 1\]"),
        ({"image": GRAY, "mask": torch.zeros(1, 3, 16, 16)}, "mask has the shape"),
        ({"image": GRAY, "mask": "mask.png"}, "mask is a str: wanted a tensor"),
        ({"image": "photo.png"}, r"image is a str: wanted a tensor \(B, 3, H, W\)"),
        ({"image": torch.zeros(3, 16, 16)}, r"image has the shape \(3, 16, 16\)"),
        ({"image": torch.full((1, 3, 16, 16), 255)}, "image is torch.int64 from 255 to 255"),
        ({"image": torch.full((1, 3, 16, 16), float("nan"))}, "from nan to nan"),
        ({"image": GRAY, "mask": LEFT, "mask_corrections": -1}, "mask_corrections=-1"),
    ],
)
def test_edits_that_cannot_be_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(["a"], **options, **FAST)


def test_rectified_flow_starts_from_an_image(photo):
    flow = TextToImage(tiny.model(RectifiedFlow(3.0), prediction_type="flow"))
    start = to_image(photo[0])
    for name in ("euler", "dpmpp_2m"):
        options = {"sampler": name, "image": start, **FAST}
        made = flow(["a cat"], mask=LEFT, strength=0.7, **options)
        assert np.array_equal(arrays(made)[:, :, 7:], arrays([start])[:, :, 7:])
        plain, whole = flow(["a cat"], sampler=name, **FAST), flow(["a cat"], strength=1, **options)
        assert np.array_equal(arrays(plain), arrays(whole))
        assert not np.array_equal(arrays(plain), arrays(flow(["a cat"], **options)))


@pytest.mark.parametrize(
    ("strength", "num_steps", "left"), [(0.29, 100, 29), (0.6, 5, 3), (0.6, 8, 4), (1, 7, 7)]
)
def test_strength_is_the_share_of_steps_rounded_down(strength, num_steps, left):
    assert num_steps - Edit(torch.zeros(1, 3, 2, 2), strength).first_step(num_steps) == left
