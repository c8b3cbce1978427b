"""The floors, and the cost of `import zsnr`."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms from the lowest to the highest: a file imports only rooms that stand before its own, and
# floors 0 and 1 import torch only.
FLOORS = (
    (
        *("beta_distribution", "schedule", "prediction", "timestep_law", "loss", "timesteps"),
        *("learned_weight", "guidance_methods", "guidance", "transition", "noise"),
    ),
    (
        *("denoiser", "conversion", "draws", "objective", "oracle"),
        *("samplers", "inpainting", "sampling"),
    ),
    (
        "pickled",
        "untrusted",
        "render",
        "public",
        "remote",
        "locks",
        "agreement",
        "stops",
        "elastic",
        "files",
        "failures",
        "progress",
        "assets",
        "weights",
        "described",
        "codecs",
        "conditioning",
        "networks",
        "lora",
        "power_average",
        "checkpoints",
        "interop",
        "metrics",
        "doctor",
        "data",
        "editing",
        "pipeline",
        "reports",
    ),
    ("training", "planning", "commands", "cli"),
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


def imported_files(path, files):
    """The files of the package that one imports, anywhere in it and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in files else node.module


def test_no_files_import_each_other():
    """In a circle of files, none can be read, or changed, without all the others."""
    files = dict(modules())
    graph = {name: {*imported_files(path, files)} & files.keys() for name, path in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


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
