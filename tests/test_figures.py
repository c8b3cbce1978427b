"""`zsnr figure`, and the exact denoiser behind the one sampling path."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_compare import checkpoint

from zsnr import DDIM, EmpiricalDenoiser, Guidance, NoiseSchedule, SampleNoise, trailing
from zsnr.cli import main
from zsnr.codecs import PixelCodec
from zsnr.pipeline import TextToImage, to_image
from zsnr.reports.arms import Arm
from zsnr.reports.exact import EXTREMES, exact_pipeline, find_groups
from zsnr.reports.figures import SPACINGS, make_panels
from zsnr.reports.images import panel_figure

FIXED, ORIGINAL = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=False)
GROUPS = {"dark": [0, 1, 2], "bright": [6, 7]}


def images():
    """Eight noisy pictures from dark to bright."""
    levels = torch.linspace(-0.8, 0.8, 8).view(-1, 1, 1, 1)
    noise = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (levels + 0.1 * noise).clamp(-1, 1)


def exact(schedule=FIXED):
    codec = PixelCodec(2)
    latents = codec.latents(codec.encode(images()))
    return exact_pipeline(latents, GROUPS, codec, schedule, 8), latents


def pixels(pictures):
    return np.stack([np.asarray(picture, int) for picture in pictures])


@pytest.mark.parametrize(("prompt", "rows"), [("", range(8)), ("dark", [0, 1, 2])])
def test_without_guidance_it_is_the_exact_denoiser(prompt, rows):
    pipe, latents = exact()
    settings = {"sampler": "ddim", "num_steps": 10, "guidance": Guidance(1.0, 0.0)}
    got = pipe([prompt] * 3, **settings, progress=False)
    denoiser = EmpiricalDenoiser(FIXED, latents[list(rows)])
    x_T = SampleNoise(range(3)).randn(latents.shape[1:])
    wanted = pipe.model.codec.decode(DDIM().sample(denoiser, FIXED, x_T, trailing(10)))
    assert np.abs(pixels(got) - pixels(map(to_image, wanted))).max() <= 1


def test_guidance_acts_on_v_as_it_does_with_a_network():
    """At SNR 0, v is minus the mean of the group, whatever the noise: the first step by hand."""
    pipe, latents = exact()
    first = []
    pipe(
        ["dark", "bright"],
        spacing="trailing",
        num_steps=4,
        guidance=Guidance(3.0, 0.5),
        progress=False,
        callback=lambda i, t, x_0, x_s: first.append((i, t, x_0)),
    )
    assert [(i, t) for i, t, _ in first] == [(0, 999), (1, 749), (2, 499), (3, 249)]
    for x_0, rows in zip(first[0][2], GROUPS.values(), strict=True):
        v_pos, v_neg = -latents[rows].mean(0), -latents.mean(0)
        v = v_neg + 3.0 * (v_pos - v_neg)
        v = v * (0.5 * v_pos.std() / v.std() + 0.5)
        torch.testing.assert_close(x_0, -v, rtol=1e-4, atol=1e-5)


def test_groups_are_words_of_captions_or_the_extremes():
    captions = [f"{i} on a {'Black' if i < 3 else 'white'} background" for i in range(8)]
    found = find_groups(images(), captions, ["black", *EXTREMES])
    assert found == {"black": [0, 1, 2], EXTREMES[0]: [0, 1], EXTREMES[1]: [6, 7]}
    with pytest.raises(ValueError, match="No caption of 8 images contains 'green'"):
        find_groups(images(), captions, ["green"])
    pipe, _ = exact()
    with pytest.raises(ValueError, match="'green' is not a group. Known: dark, bright"):
        pipe(["green"], progress=False)


def test_figure_4_has_a_panel_of_each_spacing_and_step_count():
    pipe, _ = exact()
    panels = make_panels(4, pipe, Arm(guidance_scale=1.0), ["dark", "bright"], [0, 1])
    assert panels.title == "Timestep spacings: ddim, no guidance"
    assert (panels.rows, panels.columns) == (["5 steps", "25 steps"], list(SPACINGS))
    assert panels.inner == (["dark", "bright"], ["seed 0", "seed 1"])
    figure = panel_figure(panels.images, panels.rows, panels.columns, panels.title, panels.inner)
    first = figure.axes[0]
    assert (first.get_ylabel(), first.get_title()) == ("5 steps", "leading")
    assert [label.get_text() for label in first.get_yticklabels()] == ["dark", "bright"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["seed 0", "seed 1"]
    for S, row in zip((5, 25), panels.images, strict=True):
        for spacing, panel in zip(SPACINGS, row, strict=True):
            guidance = {"guidance": Guidance(1.0, 0.7), "progress": False}
            prompts, seeds = ["dark", "dark", "bright", "bright"], [0, 1, 0, 1]
            alone = pipe(prompts, seeds=seeds, num_steps=S, spacing=spacing, **guidance)
            assert panel.size == (18, 18)  # two by two, with a gap
            corner = np.asarray(panel, int)[10:, 10:]
            assert np.abs(corner - np.asarray(alone[3], int)).max() <= 1


@pytest.mark.parametrize(("schedule", "same"), [(FIXED, True), (ORIGINAL, False)])
def test_figure_5_starts_at_one_picture_where_the_snr_is_zero(schedule, same):
    pipe, latents = exact(schedule)
    arm = Arm(spacing="trailing", num_steps=5, guidance_scale=1.0)
    panels = make_panels(5, pipe, arm, [""], [0, 1, 2])
    assert panels.columns == ["t = 999", "t = 799", "t = 599", "t = 399", "t = 199"]
    assert panels.rows == [f"empty prompt\nseed {seed}" for seed in range(3)]
    columns = [pixels(column) for column in zip(*panels.images, strict=True)]
    assert (np.ptp(columns[0], axis=0).max() <= 1) == same
    if same:
        assert np.ptp(columns[1], axis=0).max() > 1  # variation starts at the second step
        mean = pipe.model.codec.decode(latents.mean(0, keepdim=True))[0]
        assert np.abs(columns[0][0] - np.asarray(to_image(mean), int)).max() <= 1


def test_figure_6_sweeps_the_rescale():
    pipe, _ = exact()
    panels = make_panels(6, pipe, Arm(num_steps=8), ["dark", "bright"], [3])
    assert panels.title == (
        "Guidance rescale phi: multiscale, 8 steps, guided timesteps, guidance scale 7.5"
    )
    assert panels.columns == [f"phi = {phi}" for phi in ("0", "0.25", "0.5", "0.75", "1")]
    assert panels.rows == ["dark", "bright"]
    for prompt, row in zip(panels.rows, panels.images, strict=True):
        for phi, picture in zip((0, 0.25, 0.5, 0.75, 1), row, strict=True):
            guidance = Guidance(7.5, phi)
            alone = pipe([prompt], seeds=[3], num_steps=8, guidance=guidance, progress=False)
            assert np.abs(pixels([picture]) - pixels(alone)).max() <= 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    checkpoint(folder / "a.ckpt", ORIGINAL)
    tiny.write_shards(folder / "shards", [9])
    return folder


@pytest.mark.parametrize("number", [2, 4, 5, 6])
@pytest.mark.parametrize("source", ["model", "oracle"])
def test_each_figure_is_one_command(folder, tmp_path, capsys, number, source):
    out = tmp_path / "figure.png"
    command = ["figure", str(number), "--output", str(out)]
    if source == "model":
        command += ["--model", str(folder / "a.ckpt")]
    else:
        command += ["--oracle", str(folder / "shards"), "--image-size", "8"]
    if number in (5, 6):
        command += ["--num-steps", "2"]
    if number != 2:
        command += ["--count", "1"]
        command += ["--schedule", "rescaled"] if source == "model" else ["--samples", "9"]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as image:
        assert image.width > 400
        assert image.height > 100
        assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    before = out.read_bytes()
    assert main(command) == 2
    assert "exists: choose another name" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_prompt_with_dollars_is_no_formula(folder, tmp_path):
    out = tmp_path / "figure.png"
    options = ["--prompt", r"a $\frac{ $ b", "--num-steps", "1", "--count", "1"]
    model = ["--model", str(folder / "a.ckpt")]
    assert main(["figure", "5", *model, *options, "--output", str(out)]) == 0
    assert out.is_file()


@pytest.mark.parametrize(
    ("number", "arguments", "message"),
    [
        (4, [], "Figure 4 needs --model MODEL or --oracle SHARDS"),
        (4, ["--model", "{0}/a.ckpt", "--spacing", "leading"], "--spacing is not free in Figure 4"),
        (6, ["--model", "{0}/a.ckpt", "--guidance-rescale", "1"], "is not free in Figure 6"),
        (2, ["--prompt", "a"], "--prompt has no effect in Figure 2"),
        (2, ["--device", "cpu"], "--device has no effect in Figure 2"),
        (2, ["--oracle", "nowhere"], "nowhere does not exist"),
        (2, ["--model", "nowhere.ckpt"], "does not exist: wanted a checkpoint"),
        (5, ["--model", "{0}/a.ckpt", "--codec", "pixels"], "--codec belongs to --oracle"),
        (5, ["--model", "{0}/a.ckpt", "--num-steps", "1001"], "num_steps=1001"),
        (5, ["--model", "nowhere.ckpt"], "does not exist: wanted a checkpoint"),
        (5, ["--oracle", "nowhere"], "nowhere does not exist"),
        (5, ["--oracle", "{0}/shards", "--prompt", "green"], "contains 'green'"),
        (5, ["--oracle", "{0}/shards", "--sampler", "plms"], "'plms' is unknown"),
        (5, ["--oracle", "{0}/shards", "--count", "0"], "--count 0: wanted at least 1"),
        (5, ["--model", "{0}/a.ckpt", "--count", "5000000000"], "seed=4999999999"),
        (5, ["--oracle", "{0}/a.ckpt"], "is a model, but images were wanted there"),
    ],
)
def test_wrong_commands(folder, tmp_path, capsys, monkeypatch, number, arguments, message):
    monkeypatch.setattr(TextToImage, "from_pretrained", None)
    arguments = [argument.replace("{0}", str(folder)) for argument in arguments]
    assert main(["figure", str(number), *arguments, "--output", str(tmp_path / "f.png")]) == 2
    assert message in capsys.readouterr().err
    assert main(["figure", "2", "--output", str(tmp_path / "f.jpg")]) == 2
    assert "wanted a name that ends in .png" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
