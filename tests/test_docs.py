"""The commands that README and docs show exist, with their options."""

import re
import shlex
from pathlib import Path

import pytest

from zsnr.cli import main
from zsnr.training.short_options import SHORT_OPTIONS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIGHTNING = ("fit", "validate", "test", "predict")
GROUPS = ("data", "configs", "checkpoint", "timesteps")


def commands():
    """Every `zsnr ...` in a block of code or between backticks, without the first word."""
    found = set()
    for page in PAGES:
        parts = re.split(r"^```", page.read_text().replace("\\\n", " "), flags=re.MULTILINE)
        lines = [line.partition(" #")[0] for block in parts[1::2] for line in block.splitlines()]
        lines += [code for prose in parts[::2] for code in re.findall(r"`([^`]+)`", prose)]
        for line in lines:
            command = re.match(r"(?:[A-Z_]+=\S+ )?zsnr ([a-z].*)", " ".join(line.split()))
            if command:
                found.add(command[1])
    return sorted(found)


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help", *(["all"] if command[0] in LIGHTNING else [])])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_commands_and_options_exist(capsys):
    shown = commands()
    assert len(shown) > 40
    helps = {}
    for line in shown:
        words = shlex.split(line)
        command = tuple(words[: 2 if words[0] in GROUPS and len(words) > 1 else 1])
        if command not in helps:
            helps[command] = help_of(capsys, *command)
        for word in words:
            name = word.partition("=")[0]
            if not name.startswith("--"):
                continue
            if "." in name and command[0] not in LIGHTNING:  # a setting, as fit takes it
                continue
            short = command[0] in LIGHTNING and name in {*SHORT_OPTIONS, "--sampler", "--seed"}
            assert short or re.search(rf"{re.escape(name)}\b", helps[command]), line


def test_configs_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"configs/[\w/]+\.\w+", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_links_lead_to_files():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
