"""`zsnr compare`: arms, numbers, and the page."""

import base64
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from pages import HOSTILE, Page
from PIL import Image

from zsnr import Guidance, NoiseSchedule
from zsnr.assets import resolve_asset
from zsnr.checkpoints import Model
from zsnr.checkpoints.checkpoint_file import describe_model
from zsnr.cli import main
from zsnr.codecs import PixelCodec
from zsnr.conditioning import NullConditioner
from zsnr.data.prompts import PromptRequest, brightness_suite, read_prompts
from zsnr.metrics import kept_fraction, mean_mode
from zsnr.networks import UNet
from zsnr.pipeline import TextToImage
from zsnr.reports.arms import Arm, guidance_text, make_arms, parse_setting
from zsnr.reports.compare import compare_models, comparison_text
from zsnr.reports.compare_page import comparison_page
from zsnr.reports.outcomes import ModelImages, Outcome, measure, measure_arms
from zsnr.untrusted import printable

FIXED = NoiseSchedule()
ORIGINAL = NoiseSchedule(zero_terminal_snr=False)


def checkpoint(path, schedule=FIXED, seed=0, **options):
    """Write a checkpoint of an untrained, unconditional model."""
    torch.manual_seed(seed)
    codec = PixelCodec(2)
    unet = UNet(tiny.UNET, channels=codec.channels, context_dim=8)
    settings = {"prediction_type": "v_prediction", "image_size": 16, **options}
    model = Model(codec, NullConditioner(8), unet, schedule, **settings)
    weights = {f"trained.unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    torch.save({"zsnr": describe_model(model), "state_dict": weights}, path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    checkpoint(folder / "a.ckpt", ORIGINAL)
    checkpoint(folder / "b.ckpt", FIXED)
    checkpoint(folder / "c.ckpt", ORIGINAL, seed=1)
    tiny.write_shards(folder / "shards", [9])
    return folder


def compare(folder, *arguments):
    paths = [str(folder / a) if a.endswith(".ckpt") and "=" not in a else a for a in arguments]
    if "--oracle" in paths:
        paths.remove("--oracle")
        return main(["compare", "oracle", "--num-steps", "2", "--count", "1", *paths])
    return main(["compare", "models", "--num-steps", "2", "--count", "1", *paths])


# --- arms ---------------------------------------------------------------------------------------


def test_models_are_arms():
    arms = make_arms(["runs/a/last.ckpt", "runs/b/last.ckpt,runs/c/last.ckpt"])
    assert [arm.name for arm in arms] == ["a", "b, c"]
    assert arms[1].models == ("runs/b/last.ckpt", "runs/c/last.ckpt")
    assert (arms[0].spacing, arms[0].num_steps, arms[0].guidance_rescale) == ("trailing", 50, 0.7)


def test_arms_of_their_own_settings():
    texts = [
        "name='as before' model=a.ckpt spacing=leading guidance-rescale=0",
        "name=fixed model=b.ckpt schedule=rescaled num_steps=10 sampler=euler guidance_scale=3",
    ]
    before, fixed = make_arms([], texts, defaults=Arm(num_steps=25))
    assert before == Arm("as before", None, "leading", "ddim", 25, 7.5, 0.0, ("a.ckpt",))
    assert fixed == Arm("fixed", "rescaled", "trailing", "euler", 10, 3.0, 0.7, ("b.ckpt",))


def test_a_sweep_is_a_product():
    defaults = Arm(sampler="ddim")
    arms = make_arms(["a.ckpt"], [], ["guidance_rescale=0,0.5", "num-steps=5,25"], defaults)
    assert [(arm.guidance_rescale, arm.num_steps) for arm in arms] == [
        (0, 5),
        (0, 25),
        (0.5, 5),
        (0.5, 25),
    ]
    assert [arm.name for arm in arms][1] == "S = 25, phi = 0"
    both = make_arms(["x/a.ckpt", "x/b.ckpt"], ["name=one spacing=leading", "spacing=linspace"])
    assert [arm.name for arm in both] == [
        "one, a.ckpt",
        "one, b.ckpt",
        "a.ckpt, linspace",
        "b.ckpt, linspace",
    ]


def test_auto_is_what_it_stands_for():
    arms = make_arms(["a.ckpt"], [], ["num_steps=8,50"])
    assert [arm.name for arm in arms] == ["guided, multiscale, S = 8", "trailing, ddim, S = 50"]
    assert [(arm.sampler, arm.spacing) for arm in arms] == [
        ("multiscale", "guided"),
        ("ddim", "trailing"),
    ]
    [exact] = make_arms([], [], [], Arm(num_steps=8), exact=True)
    assert (exact.sampler, exact.spacing) == ("multiscale", "log_snr")  # it has no guidance
    arms = make_arms(["a"], ["sampler=euler", "spacing=leading"], [], Arm(num_steps=8))
    assert [(arm.sampler, arm.spacing) for arm in arms] == [
        ("euler", "trailing"),
        ("ddim", "leading"),
    ]


def test_guidance_is_a_setting_like_any_other():
    arms = make_arms(["a"], [], ["guidance_method=cfg,apg", "guidance-at-zero-snr=true,false"])
    assert [arm.name for arm in arms] == [
        "cfg, guided at SNR 0",
        "cfg, not guided at SNR 0",
        "apg, guided at SNR 0",
        "apg, not guided at SNR 0",
    ]
    assert arms[3].sampling().guidance == Guidance(method="apg", at_zero_snr=False)
    arms = make_arms(["a"], [], ["guidance_interval=none,0.3:5,0.3:inf"])
    assert [arm.guidance_interval for arm in arms] == [None, (0.3, 5.0), (0.3, math.inf)]
    assert arms[0].name == "all noise levels"
    assert arms[2].name == "sigma / alpha 0.3:inf"
    arms = make_arms(["a"], [], ["guidance_curve=none,-6:1/0:7.5,2:3"])
    curves = [arm.guidance_curve for arm in arms]
    assert curves == [None, ((-6.0, 1.0), (0.0, 7.5)), ((2.0, 3.0),)]
    assert [arm.name for arm in arms] == ["one w", "w by log SNR -6:1/0:7.5", "w by log SNR 2:3"]
    assert [parse_setting("guidance_curve", guidance_text(curve)) for curve in curves] == curves
    text = (
        "guidance_method=apg guidance_apg_parallel=0.5 guidance_apg_norm=2.5 guidance_against=raw"
    )
    [arm] = make_arms(["a"], [f"{text} guidance_threshold=0.995"])
    wanted = Guidance(method="apg", apg_parallel=0.5, apg_norm=2.5, against="raw", threshold=0.995)
    assert arm.sampling().guidance == wanted
    arms = make_arms(["a"], ["guidance_threshold=none", "guidance_against=raw"])
    assert [arm.name for arm in arms] == ["against negative", "against raw"]
    arms = make_arms(["a"], [text], ["guidance_apg_norm=none,2", "guidance_apg_parallel=0,1"])
    assert [arm.name for arm in arms][1:3] == ["eta = 1, no bound", "eta = 0, r = 2"]


@pytest.mark.parametrize(
    ("models", "texts", "variations", "exact", "message"),
    [
        (["a"], ["guidance_interval=0.3"], [], False, "wanted LOW:HIGH, such as 0.3:5"),
        (["a"], ["guidance_interval=0.3:5/1:2"], [], False, "wanted LOW:HIGH"),
        (["a"], [], ["guidance_curve=[-6]"], False, "wanted knots LOG_SNR:W with slashes"),
        (["a"], ["guidance_at_zero_snr=yes"], [], False, "wanted true or false"),
        (["a"], ["guidance_threshold=high"], [], False, "wanted a number or none"),
        ([], ["guidance_method=apg"], [], True, "no guidance"),
        ([], [], [], False, "There is nothing to compare"),
        ([], ["spacing=leading"], [], False, "has no model"),
        (["a"], ["steps=5"], [], False, "unknown setting 'steps'; did you mean num_steps?"),
        (["a"], ["spacing"], [], False, "wanted spacing=VALUE"),
        (["a"], ["num_steps=5 num_steps=6"], [], False, "num_steps is given twice"),
        (["a"], ["num_steps=five"], [], False, "num_steps='five': wanted an integer"),
        (["a"], ["name='x"], [], False, "No closing quotation"),
        (["a"], ["schedule=cosine"], [], False, "'cosine' is unknown. Known: original, rescaled"),
        (["a", "a"], [], [], False, "Two arms of a are the same"),
        ([], ["name=x spacing=leading"] * 2, [], True, "Two arms are the same: 'x'"),
        (["a,b,a"], [], [], False, "model='a,b,a': wanted each model once"),
        (["a,"], [], [], False, "wanted a path"),
        (["a"], [], ["model=a,b"], False, "--vary model=a,b: wanted SETTING"),
        (["a"], [], ["num_steps=5", "num_steps=6"], False, "wanted each setting once"),
        (["a"], [], [], True, "without a model"),
        ([], ["guidance_scale=3"], [], True, "no guidance"),
    ],
)
def test_wrong_arms_are_refused(models, texts, variations, exact, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_arms(models, texts, variations, exact=exact)


def test_a_path_that_exists_may_hold_commas(tmp_path, monkeypatch):
    (tmp_path / "a, b.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    [alone] = make_arms(["a, b.ckpt"])
    [named] = make_arms([], ["model='a, b.ckpt'"])
    assert alone.models == named.models == ("a, b.ckpt",)
    assert make_arms(["a, c.ckpt"])[0].models == ("a", " c.ckpt")


def test_the_schedule_of_an_arm():
    assert Arm().schedule_of(ORIGINAL) == ORIGINAL
    assert Arm(schedule="rescaled").schedule_of(ORIGINAL) == FIXED
    assert Arm(schedule="original").schedule_of(FIXED) == ORIGINAL
    table = NoiseSchedule.from_alphas_cumprod(FIXED.alphas_cumprod)
    with pytest.raises(ValueError, match="the table before the rescale is not known"):
        Arm(schedule="original").schedule_of(table)


# --- prompts ------------------------------------------------------------------------------------


def test_the_suite_is_for_the_claim():
    requests = read_prompts(brightness_suite())
    ranks = {request.group: request.brightness_rank for request in requests}
    wanted = "solid black", "night", "dark", "ordinary", "bright", "snow", "white background"
    assert set(ranks) == {*wanted, "solid white"}
    assert min(ranks, key=ranks.get) == "solid black"
    assert max(ranks, key=ranks.get) == "solid white"
    assert ranks["dark"] == ranks["night"] < ranks["ordinary"] < ranks["bright"] == ranks["snow"]
    assert all(sum(r.group == group for r in requests) >= 2 for group in ranks)
    assert resolve_asset("asset:prompts").endswith("prompts")
    # what a picture is compared with does not decide the picture
    assert repr(PromptRequest("a", group="x", brightness_rank=3)) == repr(PromptRequest("a"))


# --- numbers ------------------------------------------------------------------------------------


def flat(levels):
    """Measure flat pictures of so many grey levels in [-1, 1]."""
    return measure(torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 4, 4))


def outcome(name, *levels, **settings):
    images_of = [
        ModelImages(f"{name}{i}", [""] * len(row), flat(row)) for i, row in enumerate(levels)
    ]
    return Outcome(Arm(name, **settings).resolved(), FIXED, 1.0, images_of)


REQUESTS = [
    PromptRequest("black", group="dark", brightness_rank=0),
    PromptRequest("night", seed=1, group="dark", brightness_rank=0),
    PromptRequest("tree", group="ordinary"),
    PromptRequest("white", group="bright", brightness_rank=1),
]


def test_numbers_are_those_of_a_hand():
    arms = [
        outcome("a", [-0.75, -0.25, 0.0, 0.5]),
        outcome("b", [0.25, 0.25, 0.0, 0.0], spacing="leading"),
    ]
    facts = measure_arms(arms, REQUESTS, flat([-1.0, 0.0, 0.0, 1.0]))
    a, b = facts["arms"]
    assert facts["differs"] == ["spacing"]
    assert [group["name"] for group in facts["groups"]] == ["dark", "bright", "ordinary"]
    assert a["mean_luma"] == pytest.approx(-0.125)
    assert a["mean_luma_std"] == pytest.approx(np.std([-0.75, -0.25, 0.0, 0.5]))
    assert a["rms_contrast"] == pytest.approx(0, abs=1e-6)
    assert a["groups"]["dark"] == pytest.approx(
        {"mean_luma": -0.5, "rms_contrast": 0, "p1": -0.5, "p99": -0.5}, abs=1e-6
    )
    # sorted against sorted, as both have four: (.25 + .25 + 0 + .5) / 4
    assert a["w1"]["estimate"] == pytest.approx(0.25)
    assert b["w1"]["estimate"] == pytest.approx((1 + 0 + 0.25 + 0.75) / 4)
    assert a["w1_minus_first"] is None
    assert b["w1_minus_first"]["estimate"] == pytest.approx(0.25)
    assert b["w1_minus_first"]["low"] <= 0.25 <= b["w1_minus_first"]["high"]
    judged = {"pairs": 1, "equal_ranks": []}
    order = {"in_order": 1, "wrong": [], "range": pytest.approx(1.0)}
    assert a["order"] == {**judged, **order}
    order = {"in_order": 0, "wrong": [["dark", "bright"]], "range": pytest.approx(-0.25)}
    assert b["order"] == {**judged, **order}
    assert facts["data"]["mean_luma_by_image"] == pytest.approx([-1, 0, 0, 1])
    assert [p["mean_luma"] for p in b["images"]] == pytest.approx([0.25, 0.25, 0, 0])


def test_one_value_in_all_draws_has_an_interval_of_no_width():
    facts = measure_arms([outcome("a", [0.5] * 4)], REQUESTS, flat([0.0, 0.0]))
    assert facts["arms"][0]["w1"] == pytest.approx({"estimate": 0.5, "low": 0.5, "high": 0.5})
    assert facts["data"]["noise_floor"] == {"images": 4, "mean": 0.0, "p95": 0.0}


def test_models_are_drawn_before_their_pictures():
    """Two models, each of one brightness: all four draws are known, two of them mixed."""
    facts = measure_arms([outcome("a", [0.2] * 4, [0.6] * 4)], REQUESTS, flat([0.0, 0.0]))
    arm = facts["arms"][0]
    assert arm["w1"] == pytest.approx({"estimate": 0.4, "low": 0.2, "high": 0.6}, abs=1e-6)
    assert [model["w1"]["estimate"] for model in arm["by_model"]] == pytest.approx([0.2, 0.6])
    assert len(arm["images"]) == 8
    # drawn without regard to models, 8 pictures would nearly never be all alike
    assert facts["data"]["noise_floor"]["images"] == 8


def test_the_floor_is_what_draws_of_the_data_have():
    """Of n draws of a fair coin, W_1 to the coin is |share - 1/2|, here E = 0.5 C(4, 2) / 2^4."""
    facts = measure_arms([outcome("a", [0.0] * 4)], REQUESTS, flat([0.0, 1.0]))
    floor = facts["data"]["noise_floor"]
    assert floor["mean"] == pytest.approx(0.1875, abs=0.02)
    assert floor["p95"] == pytest.approx(0.5, abs=1e-6)


def test_groups_of_equal_rank_are_named_and_not_judged():
    requests = read_prompts(brightness_suite())
    groups = list(dict.fromkeys(request.group for request in requests))
    # in order from rank to rank, and a zigzag within ranks 1 and 3
    levels = dict(zip(groups, (-0.9, -0.2, -0.6, 0.0, 0.6, 0.3, 0.5, 0.9), strict=True))
    [arm] = measure_arms([outcome("a", [levels[r.group] for r in requests])], requests, None)[
        "arms"
    ]
    assert (arm["order"]["pairs"], arm["order"]["in_order"]) == (24, 24)
    assert arm["order"]["equal_ranks"] == [
        ["night", "dark"],
        ["bright", "snow", "white background"],
    ]


def test_at_the_floor_is_an_estimate_that_real_images_have():
    data = flat([-1.0, 0.0, 0.0, 1.0])
    near, far = measure_arms(
        [outcome("near", [-1.0, 0.0, 0.0, 1.0]), outcome("far", [0.9] * 4, spacing="leading")],
        REQUESTS,
        data,
    )["arms"]
    assert near["w1"]["estimate"] < near["noise_floor"]["mean"] == far["noise_floor"]["mean"]
    assert (near["at_noise_floor"], far["at_noise_floor"]) == (True, False)


def test_a_group_has_one_rank():
    wrong = [PromptRequest("a", group="x", brightness_rank=i) for i in range(2)]
    with pytest.raises(ValueError, match="brightness_rank 0 and 1: wanted the same"):
        measure_arms([outcome("a", [0.0, 0.0])], wrong, None)


# --- models -------------------------------------------------------------------------------------


def test_a_toy_that_does_as_it_is_told(folder, tmp_path, monkeypatch):
    """The page's numbers, from pictures whose grey the prompt names."""
    asked = []

    def paint(self, prompts, *, seeds, sampling, callback, **options):
        rescale = sampling.guidance.rescale
        asked.append((self.name, prompts, list(seeds), rescale, sampling.spacing))
        for step in range(sampling.num_steps):
            callback(step, 0, None, None)
        shift = 0 if "b.ckpt" in self.name else 40
        return [Image.new("RGB", (16, 16), (int(p) + shift,) * 3) for p in prompts]

    monkeypatch.setattr(TextToImage, "__call__", paint)
    prompts = tmp_path / "p.jsonl"
    lines = [("0", "dark", 0), ("60", "dark", 0), ("200", "bright", 1)]
    prompts.write_text(
        "\n".join(
            json.dumps({"prompt": p, "group": g, "brightness_rank": r, "count": 5, "seed": 3})
            for p, g, r in lines
        )
    )
    out = tmp_path / "page"
    command = ["--prompts", str(prompts), "--data", str(folder / "shards"), "--output", str(out)]
    arms = [f"name=pale model={folder}/a.ckpt,{folder}/c.ckpt spacing=leading"]
    arms += [f"name=right&wrong model={folder}/b.ckpt guidance_rescale=0.25"]
    assert compare(folder, "--arm", arms[0], "--arm", arms[1], *command) == 0
    # --count stands before the file's, and all arms have the same prompts and seeds
    assert {(tuple(prompts), tuple(seeds)) for _, prompts, seeds, *_ in asked} == {
        (("0", "60", "200"), (3, 3, 3))
    }
    assert [rest for *_, rest in asked] == ["leading", "leading", "trailing"]
    assert asked[2][3] == 0.25

    facts = json.loads((out / "compare.json").read_text())
    pale, right = facts["arms"]
    grey = np.arange(9) / 127.5 - 1  # the shards' pictures
    own = {
        "pale": np.array([40, 100, 240]) / 127.5 - 1,
        "right": np.array([0, 60, 200]) / 127.5 - 1,
    }
    for arm, levels in ((pale, own["pale"]), (right, own["right"])):
        quantiles = np.sort(np.repeat(levels, 3)) - np.sort(grey)
        assert arm["w1"]["estimate"] == pytest.approx(np.abs(quantiles).mean(), abs=1e-5)
        assert arm["mean_luma"] == pytest.approx(levels.mean(), abs=1e-5)
        assert arm["order"]["in_order"] == 1
    assert [model["model"][-6:] for model in pale["by_model"]] == ["a.ckpt", "c.ckpt"]
    images = torch.tensor(grey, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    codec = PixelCodec(2)
    mode = mean_mode(codec.latents(codec.encode(images)))
    assert right["kept_fraction"] == 1
    assert facts["arms"][0]["kept_fraction"] == pytest.approx(kept_fraction(ORIGINAL, mode))

    page = Page(out / "index.html")
    assert page.headings[0] == "Brightness comparison"
    assert len(page.svgs) == 2
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        for image in page.images
    ]
    assert [picture.getpixel((0, 0))[0] for picture in pictures] == [40, 100, 0, 60, 240, 200]
    assert all(int(image["width"]) == 128 for image in page.images)
    head, numbers = page.rows[0], page.row("pale")
    assert head[-3:] == [
        "W1 difference from the first model95 % interval",
        "pairs in order",
        "range",
    ]
    assert next(row for row in page.rows if "first timestep" in row)[-1] == "retained spread"
    text = comparison_text(facts, out / "index.html").splitlines()
    assert re.split("  +", text[0].strip()) == [
        *("mean luma", "contrast", "W1 to the data", "pairs in order")
    ]
    assert numbers[1] == f"{pale['mean_luma']:.3f}"
    assert numbers[6].startswith(f"{pale['w1']['estimate']:.3f}")
    assert f"{pale['w1']['low']:.3f} to {pale['w1']['high']:.3f}" in numbers[6]
    assert page.row("right&wrong")[8] == "1 of 1"
    assert "expected W1 of real data (sampling noise)" in page.row("data, 9 images")[6]
    assert "not in the expected order: pale: none. right&wrong: none." in page.text
    assert "These prompts ask for a brightness of their own" in page.text
    assert page.captions[2] == "1. seed 3, luma -0.69"
    saved = sorted(str(p.relative_to(out)) for p in out.rglob("*.png"))
    assert saved == sorted(p["file"] for arm in facts["arms"] for p in arm["images"])
    assert len(saved) == 9
    with Image.open(out / pale["images"][5]["file"]) as image:
        assert image.getpixel((3, 3)) == (240, 240, 240)


def test_a_model_s_settings_through_the_one_sampling_path(folder, tmp_path, capsys):
    out = tmp_path / "page"
    varied = ["--vary", "schedule=original,rescaled", "--prompts", "empty", "--output", str(out)]
    assert compare(folder, "b.ckpt", *varied, "--seed", "5", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads((out / "compare.json").read_text())
    assert [arm["name"] for arm in facts["arms"]] == ["original schedule", "rescaled schedule"]
    assert [arm["snr_T"] > 0 for arm in facts["arms"]] == [True, False]
    for arm, schedule in zip(facts["arms"], (ORIGINAL, FIXED), strict=True):
        pipe = TextToImage.from_pretrained(folder / "b.ckpt", schedule)
        wanted = pipe([""], seeds=[5], num_steps=2, progress=False)[0]
        with Image.open(out / arm["images"][0]["file"]) as image:
            assert np.abs(np.asarray(image, int) - np.asarray(wanted, int)).max() <= 1
            made = json.loads(image.info["zsnr"])
        assert NoiseSchedule(**made["schedule"]) == schedule
        assert made["model"].endswith("b.ckpt")
    assert facts["data"] is None
    assert facts["arms"][0]["w1"] is None
    # neither data nor ranked groups: columns that would be empty are left out
    assert facts["arms"][0]["order"] is None
    lines = comparison_text(facts, out / "index.html").splitlines()
    assert lines[0].split() == ["mean", "luma", "contrast"]
    assert [len(line.split()) for line in lines[1:]] == [4, 4, 1]
    page = Page(out / "index.html")
    numbers, settings = page.rows[0], next(row for row in page.rows if "first timestep" in row)
    assert numbers[-1] == "std of mean luma"
    assert settings[-1] == "first timestep"
    assert not any(cell in ("", "-") for row in page.rows[1:] for cell in row)
    assert "Retained spread" not in page.text


def test_the_page_shows_what_differs_in_guidance(folder, tmp_path):
    out = tmp_path / "page"
    varied = ["--vary", "guidance_method=cfg,apg", "--vary", "guidance_interval=none,0.3:inf"]
    options = ["--guidance-threshold", "0.995", "--prompts", "empty", "--output", str(out)]
    assert compare(folder, "b.ckpt", *varied, *options) == 0
    facts = json.loads((out / "compare.json").read_text())
    assert facts["differs"] == ["guidance_interval", "guidance_method"]
    last = facts["arms"][3]
    assert last["settings"]["guidance_interval"] == [0.3, None]
    assert last["settings"]["guidance_method"] == "apg"
    with Image.open(out / last["images"][0]["file"]) as image:
        made = json.loads(image.info["zsnr"])
    assert (made["guidance_method"], made["guidance_threshold"]) == ("apg", 0.995)
    page = Page(out / "index.html")
    [head] = [row for row in page.rows if "sampler" in row]
    assert head[6:-2] == ["guidance", "rescale", "interval", "method", "threshold"]
    row = next(row for row in page.rows if row and row[0] == last["name"] and "apg" in row)
    assert row[8:11] == ["0.3:inf", "apg", "0.995"]
    raw = ["--guidance-against", "raw", "--prompts", "empty", "--output", str(tmp_path / "raw")]
    assert compare(folder, "b.ckpt", *raw) == 2  # which has no averaged weights


def test_prompts_of_the_data_are_the_same_each_time(folder, tmp_path):
    drawn = []
    for name in ("one", "two"):
        out = tmp_path / name
        options = ["--data", str(folder / "shards"), "--prompts", "data", "--num-prompts", "4"]
        assert compare(folder, "b.ckpt", *options, "--output", str(out)) == 0
        facts = json.loads((out / "compare.json").read_text())
        drawn.append([(p["prompt"], p["seed"]) for p in facts["arms"][0]["images"]])
    assert drawn[0] == drawn[1]
    assert len({prompt for prompt, _ in drawn[0]}) == 4
    assert all(re.fullmatch("grey [0-8]", prompt) for prompt, _ in drawn[0])
    assert len({seed for _, seed in drawn[0]}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is nothing to compare"),
        (["nowhere.ckpt"], "does not exist: wanted a checkpoint"),
        (["x.safetensors"], "x.safetensors does not exist"),
        (["b.ckpt", "--spacing", "uniform"], "'uniform' is unknown. Known:"),
        (["b.ckpt", "--sampler", "plms"], "'plms' is unknown. Known:"),
        (["b.ckpt", "--vary", "num_steps=5,1001"], "num_steps=1001"),
        (["b.ckpt", "--vary", "guidance_rescale=0,2"], "rescale 2.0: wanted a number in [0, 1]"),
        (["b.ckpt", "--guidance-method", "apgg"], "method 'apgg' is unknown. Known: 'cfg'"),
        (["b.ckpt", "--guidance-interval", "5:0.3"], "wanted 0 or more, then a higher level"),
        (["b.ckpt", "--vary", "guidance_method=cfg,cfg_pp"], "wanted a number in [0, 1]"),
        (
            [
                *("b.ckpt", "--guidance-method", "cfg_pp", "--guidance-scale", "0.6"),
                *("--guidance-rescale", "0", "--sampler", "heun", "--num-steps", "5"),
            ],
            "Use the sampler 'ddim' or 'euler'",
        ),
        (["some/model", "--guidance-against", "raw"], "some/model holds one set of weights"),
        (["--oracle", "x", "--guidance-method", "apg"], "unknown option --guidance-method"),
        (["b.ckpt", "--prompts", "nowhere.txt"], "no such prompts file"),
        (["b.ckpt", "--prompts", "data"], "--prompts data takes captions of the data"),
        (["b.ckpt", "--data", "nowhere"], "nowhere does not exist"),
        (["b.ckpt", "--seed", "-1"], "seed=-1"),
        (["b.ckpt", "--count", "5000000000"], "seed=4999999999"),
        (["b.ckpt", "--samples", "1"], "--samples 1: wanted at least 2"),
        (
            ["b.ckpt", "--data", "{0}/shards", "{0}/a.ckpt"],
            "is a model, but images were wanted there",
        ),
        (["--oracle", "{0}/shards", "{0}/a.ckpt"], "is a model, but images were wanted there"),
        (["--oracle", "{0}/shards", "--codec-subfolder", "vae"], "needs --codec FOLDER"),
        (["b.ckpt", "--image-size", "8"], "unknown option --image-size"),
        (["--oracle", "x", "--guidance-scale", "3"], "unknown option --guidance-scale"),
        (["--oracle", "nowhere"], "nowhere does not exist"),
        (["--arm", "model={0}/b.ckpt,{0}/a.ckpt"], "its models have different schedules"),
        (["eps.ckpt", "--vary", "schedule=original,rescaled"], "no x_0 at t=999"),
    ],
)
def test_wrong_commands_end_before_anything_is_sampled(
    folder, tmp_path, capsys, monkeypatch, arguments, message
):
    checkpoint(folder / "eps.ckpt", ORIGINAL, prediction_type="epsilon")
    monkeypatch.setattr(TextToImage, "from_pretrained", None)
    arguments = [argument.replace("{0}", str(folder)) for argument in arguments]
    assert compare(folder, *arguments, "--output", str(tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_checked_before_anything_is_loaded(folder, tmp_path, capsys):
    assert compare(folder, "b.ckpt", "--device", "gpu", "--output", str(tmp_path / "out")) == 2
    assert "--device 'gpu' is not a device here" in capsys.readouterr().err


def test_text_of_others_stays_text(tmp_path):
    hostile = HOSTILE
    requests = [replace(request, prompt=hostile, group=hostile) for request in REQUESTS[:1]]
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    made = outcome(hostile, [0.5], models=(hostile,))
    made = replace(made, images=[replace(made.images[0], model=hostile, files=["a.png"])])
    facts = measure_arms([made], requests, flat([0.0, 1.0]))
    facts |= {"kind": "models", "prompts": hostile, "zsnr_version": "1"}
    (tmp_path / "index.html").write_text(comparison_page(facts, tmp_path), encoding="utf-8")
    page = Page(tmp_path / "index.html")  # which refuses scripts and handlers
    shown = printable(hostile)
    assert page.headings[0] == f"Brightness: {shown}"
    assert page.row("model")[0] == "model"
    assert sum(shown in cell for row in page.rows for cell in row) >= 3
    assert f"The prompts come from {shown}." in page.text
    assert shown in page.images[0]["alt"]
    assert shown in page.svgs[0]


def test_the_page_says_for_whom_the_suite_is(folder, tmp_path, capsys):
    assert compare(folder, "b.ckpt", "--num-steps", "1", "--output", str(tmp_path / "page")) == 0
    out = capsys.readouterr().out
    page = Page(tmp_path / "page" / "index.html")
    assert "written for general text-to-image models" in page.text
    assert "compare it with --prompts data" in page.text
    assert "use --prompts data" in out
    equal = "night = dark; bright = snow = white background"
    assert f"their order among themselves is not judged: {equal}." in page.text
    assert f"of equal rank is not judged: {equal}." in out
    assert "of 24" in page.row("b.ckpt")[-2]


def test_names_with_dollars_are_no_formulas(folder, tmp_path):
    name, group = r"costs $5, not $\frac{", r"$x_ $ and $^"
    line = json.dumps({"prompt": r"a $\bill{ of $", "group": group})
    (tmp_path / "p.jsonl").write_text(line + "\n" + json.dumps({"prompt": "a", "group": "b"}))
    options = ["--prompts", f"{tmp_path}/p.jsonl", "--output", f"{tmp_path}/out"]
    assert compare(folder, "--arm", f'model="{folder}/b.ckpt" name="{name}"', *options) == 0
    histograms, groups = Page(tmp_path / "out" / "index.html").svgs
    assert name in histograms
    assert name in groups
    assert group in groups


def test_a_folder_is_never_overwritten_nor_half_written(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    assert compare(folder, "b.ckpt", "--output", str(tmp_path / "out")) == 2
    assert "exists: choose another name" in capsys.readouterr().err

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("zsnr.reports.compare.comparison_page", fail)
    with pytest.raises(KeyboardInterrupt):
        compare_models(
            [Arm("b", num_steps=1, models=(str(folder / "b.ckpt"),))],
            tmp_path / "new",
            prompts="empty",
            count=1,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- without a model ----------------------------------------------------------------------------


def test_the_flaw_without_a_model(tmp_path, capsys):
    """Flat grey pictures: the original schedule keeps a part of their spread."""
    members = {}
    for i, level in enumerate(np.linspace(10, 245, 12).astype(int).tolist()):
        members[f"{i:02d}.png"] = tiny.png((level,) * 3, (32, 32))
        members[f"{i:02d}.txt"] = b""
    shards = str(tiny.write_shard(tmp_path / "x.tar", members))
    out = tmp_path / "page"
    command = ["compare", "oracle", shards, "--num-steps", "50", "--count", "192", "--json"]
    assert main([*command, "--vary", "schedule=original,rescaled", "--output", str(out)]) == 0
    facts = json.loads(capsys.readouterr().out)
    original, rescaled = facts["arms"]
    floor = facts["data"]["noise_floor"]["mean"]
    assert rescaled["w1"]["estimate"] < 2.5 * floor
    assert original["w1"]["estimate"] > 3 * rescaled["w1"]["estimate"]
    assert original["w1"]["low"] > 0.1
    assert rescaled["w1_minus_first"]["high"] < 0
    assert original["kept_fraction"] == pytest.approx(
        kept_fraction(ORIGINAL, facts["space"]["mode"])
    )
    spread = original["mean_luma_std"] / facts["data"]["mean_luma_std"]
    assert spread == pytest.approx(original["kept_fraction"], abs=0.12)
    assert facts["space"]["shape"] == [3, 32, 32]
    page = Page(out / "index.html")
    assert "No model was trained" in page.text
    assert page.rows[0][0] == "setting"
    assert len(page.images) == 2 * 16


def test_without_a_model_the_usual_arms_and_a_codec_s_latents(folder, tmp_path, capsys):
    command = ["compare", "oracle", str(folder / "shards"), "--num-steps", "2", "--count", "2"]
    options = ["--codec", "pixels", "--image-size", "8", "--betas", "cosine", "--json"]
    assert main([*command, *options, "--output", str(tmp_path / "page")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [arm["name"] for arm in facts["arms"]] == [
        "original schedule, leading",
        "original schedule, trailing",
        "rescaled schedule, leading",
        "rescaled schedule, trailing",
    ]
    assert facts["space"]["shape"] == [48, 2, 2]
    assert {arm["schedule"]["betas"] for arm in facts["arms"]} == {"cosine"}
