"""README and docs: every block of code runs or is parsed, every link and tag exists.

`python` blocks run, page by page, in a folder that holds a small run and small data under the
names that the pages use. Every `zsnr` line of a `bash` block is parsed by the command itself,
`yaml` blocks are read as configs over configs/tiny.yaml, and `text` blocks are output. A block
below a line that begins with `*Not run by the tests` is counted instead.
"""

import html
import importlib.util
import io
import re
import shlex
import shutil
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
import torch
import yaml
from PIL import Image

import zsnr
from zsnr import __version__
from zsnr.cli import main
from zsnr.training.data import DataModule
from zsnr.training.help import describe_settings
from zsnr.training.lightning_cli import build, parse_fit
from zsnr.training.settings import GROUPS
from zsnr.training.tags import description

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = "*Not run by the tests"
COUNT_NOT_RUN = 0
PROBE = "--option-that-no-command-has"
TRAINING = {"fit", "validate", "test", "predict"}
OTHER_PROGRAMS = {"bash", "cd", "docker", "export", "git", "tensorboard"}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    runs: bool

    @property
    def place(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages):
    """List the fenced blocks of all pages; those of the languages that are asked for."""
    listed = []
    for page in PAGES:
        lines = page.read_text().splitlines()
        fences = [i for i, line in enumerate(lines) if line.startswith("```")]
        assert len(fences) % 2 == 0, f"{page}: a block has no end"
        for begin, end in zip(fences[::2], fences[1::2], strict=True):
            before = next((line for line in reversed(lines[:begin]) if line), "")
            language = lines[begin].removeprefix("```")
            code = "\n".join(lines[begin + 1 : end]) + "\n"
            listed.append(Block(page, begin + 1, language, code, NOT_RUN not in before))
    return [block for block in listed if not languages or block.language in languages]


def test_every_block_has_a_kind_and_few_are_not_run():
    assert {block.language for block in blocks()} == {"bash", "python", "text", "yaml"}
    assert sum(not block.runs for block in blocks()) == COUNT_NOT_RUN
    for block in blocks("text"):
        shown = [line for line in block.code.splitlines() if re.match(r"\$|zsnr [a-z]|>>>", line)]
        assert not shown, f"{block.place}: commands belong into a bash block"


def saved_files():
    """Return the python blocks that a page says to save, by the names of the files."""
    files = {}
    for block in blocks("python"):
        before = " ".join(block.page.read_text().splitlines()[: block.line - 1]).rstrip()
        named = re.search(r"Save this as `(\w+\.py)`:$", before)
        if named:
            files[named[1]] = block.code
    return files


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of a tiny run with all that a board shows, photos, and a Stable Diffusion."""
    root = tmp_path_factory.mktemp("docs")
    tiny.write_shards(root / "data", [4])
    tiny.write_shards(root / "data", [4], "val")
    (root / "photos").mkdir()
    for number in range(8):
        Image.new("RGB", (32, 24), (30 * number,) * 3).save(root / f"photos/{number}.jpg")
        (root / f"photos/{number}.txt").write_text(f"a photo of {number}")
    (root / "captions.jsonl").write_text('{"caption": "snow", "group": "white"}\n' * 2)
    shutil.copytree(ROOT / "configs", root / "configs")
    tiny.sdxl_folder(root / "my-diffusers-model")
    overlay = {
        "trainer": {
            "default_root_dir": str(root / "runs/quickstart"),
            "max_steps": 2,
            "val_check_interval": 2,
            "enable_progress_bar": False,
            "callbacks": [
                {
                    "class_path": "zsnr.training.Previews",
                    "init_args": {"prompts": ["", "snow"], "every_n_steps": 1},
                }
            ],
        },
        "data": {"train": str(root / "data/train-*.tar"), "val": str(root / "data/val-*.tar")},
        "metrics": {"captions": str(root / "captions.jsonl"), "num_images": 2},
    }
    (root / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    for name, code in saved_files().items():
        (root / name).write_text(code)
    arguments = ["fit", "-c", str(ROOT / "configs/tiny.yaml"), "-c", str(root / "overlay.yaml")]
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()):
        patch.chdir(root)
        patch.setattr("sys.argv", ["zsnr", *arguments])
        assert main(arguments) == 0
        patch.syspath_prepend(root)  # as PYTHONPATH=. does
        yield root
    sys.modules.pop("mine", None)  # other tests name a module that there is not


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, run, monkeypatch):
    monkeypatch.chdir(run)
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    for block in blocks("python"):
        if block.page == page and block.runs:
            code = compile("\n" * block.line + block.code, str(page), "exec")
            with redirect_stdout(io.StringIO()):
                exec(code, names)


def shell_lines():
    """List (place, words) of every line of the bash blocks."""
    listed = []
    for block in blocks("bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                listed.append((block.place, words))
    return listed


def zsnr_lines():
    """List (place, words) of every `zsnr` command, also of those that torchrun starts."""
    listed = []
    for place, words in shell_lines():
        if words[0] == "torchrun":
            words = ["zsnr", *words[words.index("zsnr.cli") + 1 :]]
        if words[0] == "zsnr":
            listed.append((place, words[1:]))
    return listed


def refusal(words):
    """Return what a command answers to its line and one option that no command has."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(io.StringIO()):
        try:
            code = main([*words, PROBE])
        except SystemExit as stop:
            code = stop.code
    return code, " ".join(said.getvalue().split())


def wrong_in(words):
    """Return what is wrong with a command line. Parsing it must fail at the last word alone."""
    code, said = refusal(words)
    message = re.sub(r"`[^`]*`", "", said.partition("error:")[2]).partition(". ")[0]
    options = re.findall(r"(?<![\w-])--[a-z][\w.-]*", message)
    if code in (2, 3) and [option.rstrip(".") for option in options] == [PROBE]:
        return ""
    return said or f"exit code {code}"


def test_a_wrong_command_line_is_seen(run, monkeypatch):
    monkeypatch.chdir(run)
    assert wrong_in(["doctor", "model"]) == ""
    assert "--stepz" in wrong_in(["doctor", "model", "--stepz", "3"])
    assert "trainer" in wrong_in(["fit", "-c", "configs/tiny.yaml", "--trainer.max_stepz", "3"])
    assert wrong_in(["diagnose", "model"])


@pytest.mark.parametrize(
    "words", sorted({tuple(words) for _, words in zsnr_lines()}), ids=lambda w: " ".join(w)[:70]
)
def test_commands_are_parsed(words, run, monkeypatch):
    monkeypatch.chdir(run)
    for word in words:  # a file of the reader's own, such as mine.yaml
        if word.endswith(".yaml") and not Path(word).exists():
            shutil.copy("configs/tiny.yaml", word)
    places = {place for place, line in zsnr_lines() if tuple(line) == words}
    assert wrong_in(words) == "", f"{places}: zsnr {shlex.join(words)}"


def test_other_commands_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for place, words in shell_lines():
        line = f"{place}: {shlex.join(words)}"
        program, *rest = words
        match program:
            case "make":
                assert set(rest) <= set(targets), line
            case "pip":
                asked = re.findall(r"(?:\.|zsnr)\[([\w,]+)\]", line)
                assert {extra for group in asked for extra in group.split(",")} <= set(extras), line
            case "python" | "mkdocs" | "sbatch":
                files = [word for word in rest if word.endswith((".py", ".sbatch"))]
                assert all((ROOT / file).is_file() for file in files), line
                for option in (word for word in rest if word.startswith("--") and files):
                    known = option.partition("=")[0] in (ROOT / files[0]).read_text()
                    assert known or program == "sbatch", line
            case _:
                assert program in OTHER_PROGRAMS | {"zsnr", "torchrun"}, line


def test_the_dockerfile_calls_targets_of_the_makefile():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    file = (ROOT / "Dockerfile").read_text()
    called = re.findall(r"^RUN make (\S+)", file, re.MULTILINE)
    called += re.findall(r'^CMD \["make", "(\S+)"\]', file, re.MULTILINE)
    assert len(called) == 2
    assert set(called) <= set(targets)


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def generate():
    """The module that generates the site's reference."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_named_in_the_text_exist(generate):
    """`zsnr ...` between backticks: the command and its options, though not all that it needs."""
    names = generate.command_names()
    groups = {name.split()[0] for name in names}
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`zsnr ([a-z][^`]*)`", " ".join(prose.split())):
            words = code.split()
            name = next((n for n in (" ".join(words[:2]), words[0]) if n in names), "")
            assert name or words[0] in groups, f"{page.name}: zsnr {code}"
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            if options and name not in TRAINING:  # whose --help does not show every option
                shown = generate.command_help(*name.split())
                assert all(option in shown for option in options), f"{page.name}: zsnr {code}"


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.place)
def test_yaml_blocks_are_configs(block, run, monkeypatch):
    monkeypatch.chdir(run)
    monkeypatch.setenv("TOKEN", "secret")
    Path("block.yaml").write_text(block.code)
    parse_fit(["-c", "configs/tiny.yaml", "-c", "block.yaml"])


def test_the_example_of_data_means_what_it_says(run, monkeypatch):
    monkeypatch.chdir(run)
    monkeypatch.setenv("TOKEN", "secret")
    example = next(block for block in blocks("yaml") if block.page.name == "data.md")
    Path("block.yaml").write_text(example.code)
    config = parse_fit(["-c", "configs/tiny.yaml", "-c", "block.yaml"])
    data = build("data", DataModule, config.data)
    assert data.train[1].weight == 20
    assert data.filters[2].one_of == ("en",)
    assert data.captions.fields == {"txt": 0.7, "blip_caption": 0.3}
    assert len(data.aspect.shapes(data.image_size)) == 5


def test_the_network_of_the_tutorial_trains_from_its_yaml(run, monkeypatch):
    monkeypatch.chdir(run)
    example = next(block for block in blocks("yaml") if block.page.name == "own-network.md")
    Path("mine.yaml").write_text(example.code)
    few = ["--max-steps=3", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main(["fit", "-c", "mine.yaml", *few]) == 0
        words = next(line for _, line in zsnr_lines() if line[:2] == ["sample", "runs/mine"])
        assert main([*words, "-o", "mine-samples"]) == 0
    assert len([*Path("mine-samples").glob("*.png")]) == 2


def test_a_wrong_yaml_block_is_seen(run, monkeypatch):
    monkeypatch.chdir(run)
    Path("block.yaml").write_text("model: {schedule: {zero_snr: true}}")
    with pytest.raises(ValueError, match="zero_snr"):
        parse_fit(["-c", "configs/tiny.yaml", "-c", "block.yaml"])


def test_configs_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"configs/[\w/]+\.\w+", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_links_lead_to_files():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}


def test_every_tag_of_a_run_is_described(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = {path.parent for path in run.rglob("events.out.tfevents.*")}
    board = EventAccumulator(str(folder)).Reload().Tags()
    for dashboard in ("Scalars", "Images", "Histograms"):
        assert board[dashboard.lower()]
        for tag in board[dashboard.lower()]:
            assert description(dashboard, tag), tag


def test_generated_pages_hold_every_command_setting_and_result(generate):
    """What the site's reference is made from, without building the site."""
    names = generate.command_names()
    assert {"fit", "doctor", "data cache", "configs list", "timesteps optimize"} <= set(names)
    settings = generate.configuration()
    for name in ("data.batch_size", "model.schedule.zero_terminal_snr", "trainer.max_steps"):
        assert f"\n`{name}` · " in settings
    for group in GROUPS:  # the same texts as in --help
        for setting in describe_settings(group):
            assert html.escape(setting.text, quote=False) in settings
    assert ":class:" not in settings
    results = generate.benchmarks()
    for path in (ROOT / "benchmarks/results").glob("*.md"):
        assert path.name in results
    for page in PAGES:
        for marker in re.findall(r"<!-- generated: (\w+) -->", page.read_text()):
            assert marker in generate.GENERATORS, f"{page.name}: {marker}"


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs/reference/python.md").read_text()
    described = set(re.findall(r"^::: zsnr\.(\w+)$", page, re.MULTILINE))
    types = {"PredictionType", "TimestepSpacing"}  # of strings and of functions
    assert described & set(zsnr.__all__) == set(zsnr.__all__) - types
