"""The floors, the cost of `import zsnr`, and the README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms from the lowest to the highest: a file imports only rooms that stand before its own, and
# floors 0 and 1 import torch only.
FLOORS = (
    (
        *("schedule", "prediction", "loss", "timesteps"),
        *("guidance_methods", "guidance", "transition", "noise"),
    ),
    ("denoiser", "oracle", "samplers", "sampling"),
    (
        "pickled",
        "untrusted",
        "public",
        "locks",
        "agreement",
        "stops",
        "elastic",
        "files",
        "failures",
        "progress",
        "assets",
        "ldm_file",
        "pretrained",
        "described",
        "codecs",
        "conditioning",
        "networks",
        "lora",
        "checkpoints",
        "pipeline",
        "metrics",
        "data",
        "reports",
    ),
    ("training", "commands", "cli"),
)
ROOMS = [name for floor in FLOORS for name in floor]


def modules():
    for path in sorted((ROOT / "zsnr").rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def room(module):
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize(("module", "path"), list(modules()))
def test_floors(module, path):
    own = room(module)
    if not own:  # zsnr itself shows floors 0 and 1
        allowed = set(FLOORS[0] + FLOORS[1])
        assert {room(name) for name in imports(path) if name.startswith("zsnr")} <= allowed
        return
    assert own in ROOMS, f"{own} stands on no floor"
    for name in imports(path):
        if name.startswith("zsnr."):
            assert room(name) == own or room(name) in ROOMS[: ROOMS.index(own)], f"upward: {name}"
        elif own in FLOORS[0] + FLOORS[1]:
            assert name.split(".")[0] in {"torch", "__future__", *sys.stdlib_module_names, "zsnr"}
        elif own not in FLOORS[3]:
            assert name.split(".")[0] not in {"lightning", "jsonargparse"}, f"{own} imports {name}"


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import zsnr; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(*(new - sys.stdlib_module_names))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["zsnr"]


def test_the_pipeline_needs_no_lightning():
    code = (
        "import sys, zsnr.pipeline; heavy = {'lightning', 'jsonargparse', 'diffusers'}; "
        "sys.exit(bool(heavy & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_blocks_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_readme_yaml_is_a_config(tmp_path):
    from zsnr.training.caching import build
    from zsnr.training.data import DataModule
    from zsnr.training.lightning_cli import parse_fit

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for i, block in enumerate(blocks):
        (tmp_path / f"{i}.yaml").write_text(block)
        config = parse_fit(["-c", str(ROOT / "configs/tiny.yaml"), "-c", f"{tmp_path}/{i}.yaml"])
        data = build("data", DataModule, config.data)
        assert data.train[1].weight == 20
        assert data.filters[2].one_of == ("en",)
        assert data.captions.fields == {"txt": 0.7, "blip_caption": 0.3}
        assert len(data.aspect.shapes(data.image_size)) == 5
