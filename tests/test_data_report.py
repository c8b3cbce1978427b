"""`zsnr data report` and the numbers in it."""

import json

import pytest
import tiny
import torch
from pages import HOSTILE, Page

from zsnr import GaussianDenoiser, NoiseSchedule, get_sampler, trailing
from zsnr.cli import main
from zsnr.data.filters import Filter, parse_filter
from zsnr.data.sources import Source
from zsnr.metrics import kept_fraction, mean_mode, moved_mean, principal_mean
from zsnr.reports.arms import Arm
from zsnr.reports.data import gaussian_samples, measure_space, public_paths
from zsnr.untrusted import printable

ORIGINAL = NoiseSchedule(zero_terminal_snr=False)


@pytest.mark.parametrize("mode", [0.5, 8.0, 32.0])
def test_kept_fraction_and_moved_mean_are_what_sampling_from_noise_gives(mode):
    """DDIM is linear here: x_T = 0 gives the mean, x_T = 1 less that the spread."""
    mean = 1.3
    denoiser = GaussianDenoiser(ORIGINAL, mean, mode)
    x_T = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    ends = get_sampler("ddim").sample(denoiser, ORIGINAL, x_T, trailing(1000)).double()
    spread = float(ends[1] - ends[0])
    assert spread / mode == pytest.approx(kept_fraction(ORIGINAL, mode), rel=0.01)
    assert float(ends[0]) == pytest.approx(moved_mean(ORIGINAL, mode, mean), rel=0.01)
    assert moved_mean(NoiseSchedule(), mode, mean) == mean


def test_the_paper_s_brightness_mode():
    """Flat 64x64 pictures of grey N(-0.8, 0.5^2), 25 steps: S = 32."""
    assert kept_fraction(ORIGINAL, 32) == pytest.approx(0.416, abs=5e-4)
    assert moved_mean(ORIGINAL, 32, -0.8) == pytest.approx(-0.0723, abs=5e-5)
    ends = {
        (kind, spacing): gaussian_samples(Arm("", kind, spacing, num_steps=25), -0.8, 0.5, 64 * 64)[
            0
        ]
        for kind in ("original", "rescaled")
        for spacing in ("leading", "trailing")
    }
    assert {arm: round(mean, 2) for arm, mean in ends.items()} == {
        ("original", "leading"): -0.05,
        ("original", "trailing"): -0.08,
        ("rescaled", "leading"): -0.43,
        ("rescaled", "trailing"): -0.8,
    }
    mean, spread = gaussian_samples(Arm("", "original", num_steps=1000), -0.8, 0.5, 64 * 64)
    assert spread / 0.5 == pytest.approx(kept_fraction(ORIGINAL, 32), rel=1e-3)
    assert mean == pytest.approx(moved_mean(ORIGINAL, 32, -0.8), rel=0.01)
    assert gaussian_samples(Arm("", "rescaled"), 0.3, 0.0, 16) == pytest.approx((0.3, 0.0))


def test_the_direction_is_where_means_differ():
    u = torch.tensor([2.0, -1.0, 2.0], dtype=torch.float64) / 3
    y = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = torch.tensor([0.6, 0.0, 0.3]) + 0.5 * y[:, None] * u
    latents = means[:, :, None, None].expand(-1, -1, 16, 8) + 0.01 * torch.randn(4000, 3, 16, 8)
    mode, mean, direction = principal_mean(latents)
    assert mode == mean_mode(latents) == pytest.approx((16 * 8) ** 0.5 * 0.5, rel=0.03)
    torch.testing.assert_close(direction, u, rtol=0, atol=1e-2)
    assert mean == pytest.approx(0.6, abs=0.03)  # u . (0.6, 0, 0.3)


def test_the_oracle_agrees_with_the_prediction_on_gaussian_colours():
    """Flat pictures whose grey is evenly spread Gaussian quantiles."""
    quantiles = (torch.arange(200) + 0.5) / 200
    grey = -0.3 + 0.4 * torch.erfinv(2 * quantiles - 1) * 2**0.5
    space = measure_space("flat", grey.view(-1, 1, 1, 1).expand(-1, 3, 32, 32))
    assert space.std == pytest.approx(0.4 * 3**0.5, rel=0.02)
    flawed, fixed = space.shown.values()
    for shown, expected in zip(space.shown.values(), space.expected.values(), strict=True):
        assert shown == pytest.approx(expected, abs=0.05)
    assert flawed[1] / space.std == pytest.approx(space.kept, abs=0.05)
    assert flawed[0] == pytest.approx(space.moved, abs=0.05)
    assert fixed[1] > 1.5 * flawed[1]


def test_the_report(tmp_path, capsys):
    records = [{"score": i} for i in range(12)]
    members = {}
    for i, record in enumerate(records):
        data = tiny.png((20 * i,) * 3, (20 + i, 24))
        members[f"{i:02d}.png"] = data[:60] if i == 5 else data
        members[f"{i:02d}.txt"] = b"word " * i
        members[f"{i:02d}.json"] = json.dumps(record).encode()
    source = str(tiny.write_shard(tmp_path / "x.tar", members))
    out = tmp_path / "out"
    command = ["data", "report", source, "--output", str(out), "--image-size", "64"]
    options = ["--filter", "score<=10", "--codec", "asset:openmoji_vae", "--aspect", "--json"]
    assert main([*command, *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["kept"], facts["looked_at"], facts["faults"]) == (12, 11, 10, 1)
    assert facts["removed"] == {"score <= 10": 1}
    assert facts["width"] == [20, 21, 25, 29, 30]
    assert facts["empty_captions"] == 0.1
    assert facts["caption_words"][4] == 10
    assert facts["caption_characters"][4] == 49  # ten words and nine spaces
    assert facts["megapixels"][0] == pytest.approx(20 * 24 / 1e6)
    assert facts["smaller_than_image_size"] == 1
    assert facts["brightness_mean"] == pytest.approx(100 / 127.5 - 1, abs=0.01)
    assert [space["name"].split()[0] for space in facts["spaces"]] == ["64x64", "4x16x16"]
    page = Page(out / "index.html")
    assert "1 x sample: not a readable image" in page.text
    assert "12 samples in 1 shard, of which 11 are used after filtering." in page.text
    assert page.row("score <= 10") == ["score <= 10", "1"]
    assert page.row("width")[1:] == ["20", "21", "25", "29", "30"]
    assert page.row("64x64 pixels, 10 images")[5] == f"{facts['spaces'][0]['moved']:.3f}"
    assert page.headings[:5] == ["Data report", "Sizes", "Captions", "Brightness", "Darkest images"]
    assert len(page.svgs) == 4
    assert len(page.images) == 3 * 8
    charts = [caption for caption in page.captions if caption.startswith("Number of ")]
    assert len(charts) == 4
    darkest = page.captions[page.captions.index(charts[-1]) + 1]
    assert darkest == "empty caption, brightness -1.00"
    assert [path.name for path in out.iterdir()] == ["index.html"]
    assert main(command) == 2
    assert "is not empty and stays as it is" in capsys.readouterr().err


def test_the_main_findings_are_printed(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    captions = ["red", "", "word " * 75, "word " * 76, None, None]
    for i, caption in enumerate(captions):
        (photos / f"{i}.png").write_bytes(tiny.png((40 * i,) * 3, (20, 24)))
        if caption is not None:
            (photos / f"{i}.txt").write_text(caption)
    command = ["data", "report", str(photos), "-o"]
    assert main([*command, str(tmp_path / "a")]) == 0
    told = capsys.readouterr().out
    wanted = (
        "samples without one, which are left out: 2; empty: 25.0 %; "
        "longer than the 75 tokens that CLIP reads: 25.0 %"
    )
    assert wanted in told
    assert "512 pixels (the default of --image-size)" in told
    assert "100.0 % of the images have a side below it" in told
    assert "2 x sample: it has no caption: no .txt file of its name" in told
    assert told.splitlines()[-1].split() == ["page", str(tmp_path / "a" / "index.html")]
    page = Page(tmp_path / "a" / "index.html").text
    assert "512 pixels, which is the default of --image-size" in page
    assert "in training" not in page
    assert main([*command, str(tmp_path / "b"), "--image-size", "20"]) == 0
    assert "20 pixels (as --image-size says)" in capsys.readouterr().out
    page = Page(tmp_path / "b" / "index.html").text
    assert "0.0 % of the images have a side below 20 pixels, which is the size given as" in page


def test_captions_that_are_cut_are_counted(tmp_path, capsys):
    for i, words in enumerate((10, 74, 75, 76, 200)):
        (tmp_path / f"{i}.png").write_bytes(tiny.png((40 * i,) * 3))
        (tmp_path / f"{i}.txt").write_text("cat " * words)
    command = ["data", "report", str(tmp_path), "--image-size", "16", "--json"]
    assert main([*command, "--output", str(tmp_path / "a")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["caption_tokens"][::2] == [10, 75, 200]
    assert (facts["cut_captions"], facts["token_limit"]) == (0.4, 75)
    text = Page(tmp_path / "a" / "index.html").text
    assert "40.0 % have more than 75 tokens of CLIP" in text
    assert "With max_tokens: 225, a setting of CLIP conditioners, it reads all of them." in text
    tiny.letters_tokenizer().save_pretrained(tmp_path / "letters")
    options = ["--tokenizer", str(tmp_path / "letters"), "--max-tokens", "225"]
    assert main([*command, "--output", str(tmp_path / "b"), *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["caption_tokens"][4] == 600
    assert (facts["cut_captions"], facts["token_limit"]) == (0.2, 230)
    assert main([*command, "--output", str(tmp_path / "c"), "--max-tokens", "0"]) == 2
    assert "max_tokens=0: wanted 1 to 7500" in capsys.readouterr().err


def test_text_of_others_stays_text(tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    for i in range(2):
        tiny_image = folder / f"{i}.png"
        folder.mkdir(exist_ok=True)
        tiny_image.write_bytes(tiny.png((90 * i,) * 3))
        tiny_image.with_suffix(".txt").write_text(HOSTILE)
    index = ["--index", str(tmp_path / "index")]
    command = ["data", "report", str(folder), "--output", str(tmp_path / "out"), *index]
    assert main([*command, "--image-size", "16"]) == 0
    page = Page(tmp_path / "out" / "index.html")  # which refuses scripts and handlers
    assert printable(HOSTILE.replace("/", "")) in page.text
    assert any("<script>alert(1)</script>" in caption for caption in page.captions)
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text
    assert "{{ 7 * 7 }}" in page.captions[-1]


def test_a_page_names_sources_without_secrets():
    signed = "https://me:pw@host/{000..009}.tar?token=abc"
    assert public_paths([signed, Source(["/data/a.tar", "pipe:get --key abc b.tar"])]) == [
        "https://host/{000..009}.tar",
        "/data/a.tar",
        "pipe:... b.tar",
    ]


def test_broken_pictures_have_no_replacement(tmp_path, capsys):
    """More in a row are broken than training bears, and the latents are of the others alone."""
    members = {}
    for i in range(40):
        data = tiny.png((5 * i,) * 3, (16, 16))
        members[f"{i:02d}.png"] = data[:45] if i < 36 else data
        members[f"{i:02d}.txt"] = b""
    source = str(tiny.write_shard(tmp_path / "x.tar", members))
    command = ["data", "report", source, "--output", str(tmp_path / "out"), "--codec", "pixels"]
    assert main([*command, "--image-size", "16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["looked_at"], facts["faults"]) == (40, 4, 36)
    pixels, latents = facts["spaces"]
    assert latents["name"] == "48x4x4 latents, 4 images"
    assert latents["mode"] == pytest.approx(pixels["mode"], rel=1e-6)
    greys = torch.tensor([5.0 * i / 127.5 - 1 for i in range(36, 40)])
    assert pixels["mode"] == pytest.approx(16 * 3**0.5 * float(greys.std()), rel=1e-5)
    assert pixels["kept"] == kept_fraction(ORIGINAL, pixels["mode"])


def test_buckets_and_latents_too_large_for_the_exact_denoiser(tmp_path, capsys):
    source = str(tiny.write_shards(tmp_path / "grey", [4]))
    command = ["data", "report", source, "--output", str(tmp_path / "out"), "--json"]
    assert main([*command, "--codec", "pixels", "--image-size", "256", "--aspect"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["buckets"] == {"192 x 320": 0, "256 x 256": 4, "320 x 192": 0}
    pixels, small, latents = facts["spaces"]
    assert latents["mode"] == pytest.approx(pixels["mode"], rel=1e-6)
    assert pixels["mode"] == pytest.approx(4 * small["mode"], rel=1e-6)
    assert [bool(space["shown"]) for space in (pixels, small, latents)] == [False, True, False]


def test_data_that_cannot_be_reported(tmp_path, capsys):
    one = tiny.write_shard(tmp_path / "x.tar", {"a.png": tiny.png("red"), "a.txt": b""})
    assert main(["data", "report", str(one), "--output", str(tmp_path / "out")]) == 2
    assert "1 readable images: wanted at least 2" in capsys.readouterr().err
    tiny.write_shards(tmp_path / "grey", [3])
    same = ["data", "report", str(tmp_path / "grey"), "--output", str(tmp_path / "flat")]
    assert main([*same, "--filter", "image_width>=99"]) == 2
    assert "No samples are left of 3" in capsys.readouterr().err
    assert main([*same, "--filter", "score>5"]) == 2
    assert "wanted a filter such as 'aesthetic>=5'" in capsys.readouterr().err
    assert main([*same, "--image-size", "0"]) == 2
    assert "--image-size 0: wanted at least 1" in capsys.readouterr().err
    (tmp_path / "cache").mkdir()
    shards = {"shards": [{"file": "000000.tar", "weight": 1.0}]}
    (tmp_path / "cache" / "cache.json").write_text(json.dumps(shards))
    assert main(["data", "report", str(tmp_path / "cache"), *same[3:]]) == 2
    assert "holds no images: give the shards it was cached from" in capsys.readouterr().err
    assert main([*same, "--codec", str(tmp_path)]) == 2
    assert main([*same, "--codec", "pixels", "--image-size", "66"]) == 2
    assert not (tmp_path / "flat").exists()
    for i in range(2):
        members = {f"{k}.png": tiny.png("red") for k in "abc"} | {f"{k}.txt": b"" for k in "abc"}
        tiny.write_shard(tmp_path / "grey" / f"train-00000{i}.tar", members)
    assert main(same) == 0  # pictures of one colour


def test_filters_as_texts():
    assert parse_filter("aesthetic>=5") == Filter("aesthetic", min=5)
    assert parse_filter(" p_unsafe <= 0.5 ", "keep") == Filter("p_unsafe", max=0.5, missing="keep")
    assert parse_filter("LANGUAGE in en, de") == Filter("LANGUAGE", one_of=("en", "de"))
    assert parse_filter("n not in 1,2") == Filter("n", none_of=(1.0, 2.0))
    for text in ("", "a", "a>=x", "a in", "a=5", ">=5"):
        with pytest.raises(ValueError, match="wanted a filter such as"):
            parse_filter(text)
