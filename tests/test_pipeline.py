import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from zsnr import DDIM, Guidance, NoiseSchedule, SampleNoise, trailing
from zsnr.pipeline import TextToImage, save_png, to_image

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


def test_it_is_the_paper_by_hand(pipe):
    model, guidance = pipe.model, Guidance(3.0, 0.7)
    got = arrays(pipe(["a cat"], seeds=[4], num_steps=4, guidance=guidance, progress=False))
    schedule, x = model.schedule, SampleNoise([4]).randn((12, 8, 8))
    cond, null = model.conditioner(["a cat"]), model.conditioner([""])
    grid = trailing(4).tolist()
    with torch.no_grad():
        for t, s in zip(grid, [*grid[1:], -1], strict=True):
            (alpha, sigma), (alpha_s, sigma_s) = schedule(t), schedule(s)
            t = torch.tensor([t])
            pos, neg = (model.unet(x, t, c) for c in (cond, null))
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
    away = arrays(
        pipe(["a cat"], negative_prompts=["a cat"], seeds=[0], guidance=Guidance(9.0, 0.0), **FAST)
    )
    alone = arrays(pipe(["a cat"], seeds=[0], guidance=Guidance(1.0, 0.0), **FAST))
    assert np.abs(away - alone).max() <= 1


def test_sizes_and_samplers(pipe):
    image = pipe(["a"], height=24, width=8, sampler="euler", spacing="linspace", **FAST)[0]
    assert image.size == (8, 24)
    facts = json.loads(image.info["zsnr"])
    assert (facts["sampler"], facts["spacing"], facts["height"]) == ("euler", "linspace", 24)


def test_a_png_says_how_to_make_it_again(pipe, tmp_path):
    path = tmp_path / "deep" / "a.png"
    first = pipe(
        ["ein Bär\n日本"], seeds=[7], sampler=DDIM(eta=0.5), guidance=Guidance(2.0), **FAST
    )[0]
    save_png(first, path)
    with Image.open(path) as image:
        facts = json.loads(image.info["zsnr"])
    assert facts["prompt"] == "ein Bär\n日本"
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
