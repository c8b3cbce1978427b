"""Templates, and the page of a run."""

import json
import re
from functools import partial

import pytest
import tiny
from jinja2 import UndefinedError
from pages import HOSTILE, Page
from PIL import Image
from test_compare import checkpoint

from zsnr.interop.card import model_card
from zsnr.render import escape_markdown, render
from zsnr.reports.flaw import oracle_brightness
from zsnr.reports.run import main, write_report
from zsnr.untrusted import printable


def test_every_value_is_escaped_for_its_language(tmp_path):
    for suffix in (".html", ".md"):
        (tmp_path / f"a{suffix}").write_text('<p title="{{ x }}">{{ x }}</p>')
    html = render(tmp_path / "a.html", {"x": HOSTILE})
    assert html.count("<") == 2
    assert html.count('"') == 2
    assert "\\x1b[31m" in html
    assert "\\u202egpj.exe" in html
    with pytest.raises(UndefinedError):
        render(tmp_path / "a.html", {})
    markdown = render(tmp_path / "a.md", {"x": HOSTILE})
    assert "<script" not in markdown
    assert "\x1b" not in markdown
    assert "\u202e" not in markdown


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b.ckpt", "a_b.ckpt"),
        ("_a_ *b* ~c~", r"\_a\_ \*b\* \~c\~"),
        ("[x](https://a.b)", r"\[x\](https://a.b)"),
        ("![x](y)", r"!\[x\](y)"),
        ("a | b\n# c", r"a \| b \# c"),
        ("`rm` $x$ \\", r"\`rm\` \$x\$ \\"),
        ("<img src=x> & \x1b", r"&lt;img src=x&gt; &amp; \\x1b"),
        ("猫 🐱 é", "猫 🐱 é"),
    ],
)
def test_markdown_of_others_is_text(text, escaped):
    assert escape_markdown(text) == escaped


def test_a_model_card_keeps_what_others_wrote_as_text():
    facts = {
        "schedule": {"betas": "scaled_linear"},
        "prediction_type": "v_prediction",
        "image_size": HOSTILE,
        "data": [HOSTILE, "```\n# x"],
        "start": {"unet": HOSTILE},
        "sampling": {"sampler": HOSTILE, "spacing": HOSTILE, "guidance_method": HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "metrics": {HOSTILE: "![x](https://tracker)"},
        "zsnr_version": HOSTILE,
    }
    card = model_card(HOSTILE + "\n# no title", facts)
    text = re.sub(r"```python\n.*?```", "", card.partition("\n---\n")[2], flags=re.DOTALL)
    assert "<script" not in text
    assert "\x1b" not in card
    assert "\u202e" not in card
    assert not re.search(r"(?<!\\)\[(x|31m)", text)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 6
    assert "```" not in text
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line[:1] == "|"}
    assert cells == {3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has trained nothing, with two prompts and three unconditional samples."""
    run = tmp_path_factory.mktemp("runs") / "run <b>"
    tiny.write_shards(run / "shards", [9])
    (run / "checkpoints").mkdir()
    checkpoint(run / "checkpoints" / "last.ckpt")
    (run / "samples").mkdir()
    lines = []
    for i, prompt in enumerate([HOSTILE, "a cat on a black background", "", "", ""]):
        Image.new("RGB", (16, 16), (40 * i,) * 3).save(run / "samples" / f"{i}.png")
        sampling = {"sampler": "ddim", "spacing": "trailing", "num_steps": 4}
        guidance = {"guidance_scale": 3.0, "guidance_rescale": 0.7, "guidance_method": "apg"}
        lines.append({"file": f"{i}.png", "prompt": prompt, "seed": 7 + i, **sampling, **guidance})
    (run / "samples" / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run / "metrics" / "version_0").mkdir(parents=True)
    rows = ["step,train/loss,val/loss", "9,0.9,", "19,0.5,", "19,,0.4"]
    (run / "metrics" / "version_0" / "metrics.csv").write_text("\n".join(rows))
    return run


def test_the_page_of_a_run(run, capsys, monkeypatch):
    quick = partial(oracle_brightness, num_samples=8, num_steps=2)
    monkeypatch.setattr("zsnr.reports.run.oracle_brightness", quick)
    assert main([str(run), "--data", str(run / "shards")]) == 0
    assert capsys.readouterr().out.strip() == str(run / "index.html")
    page = Page(run / "index.html")
    assert page.headings == [
        "Samples and data of the run run <b>",
        "Samples from text prompts",
        "Unconditional samples",
        "Brightness",
        "Loss",
        "The flaw, without training",
        "Retained spread",
    ]
    assert "2 prompted and 3 unconditional samples" in page.text
    assert "guidance scale 3 and guidance rescale 0.7, method apg." in page.text
    assert len(page.images) == 5
    assert page.captions[0].startswith("<script>alert(1)</script>")
    assert page.captions[0].endswith(", seed 7")
    assert page.captions[1:3] == ["a cat on a black background, seed 8", "seed 9"]
    assert page.row("validation loss") == ["validation loss, averaged weights", "0.4000", "19"]
    assert page.row("training loss")[1:] == ["0.5000", "19"]
    assert page.row("rescaled schedule, trailing")[0] == "rescaled schedule, trailing (fixed)"
    assert page.row("mean")[1] == f"{(80 + 120 + 160) / 3 / 127.5 - 1:.2f}"
    assert "\x1b" not in page.text
    assert printable("\u202e") in page.text
    (run / "index.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("zsnr.reports.run.render_page", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report(run, str(run / "shards"))
    assert not (run / "index.html").exists()


def test_a_run_that_cannot_be_reported(run, tmp_path, capsys):
    assert main([str(tmp_path), "--data", str(run / "shards")]) == 2
    assert "manifest.jsonl is missing: run `zsnr predict" in capsys.readouterr().err
    assert main([str(run), "--data", str(tmp_path / "nowhere")]) == 2
    err = capsys.readouterr().err
    assert "does not exist: wanted a folder of images" in err
    assert err.count("\n") == 1
