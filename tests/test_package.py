"""The floors, the cost of `import zsnr`, and the README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("lightning", "diffusers", "transformers", "open_clip", "torchvision", "webdataset")
FLOOR_0 = ("schedule", "prediction", "loss", "timesteps", "guidance", "transition", "noise")
FLOOR_1 = ("denoiser", "oracle", "samplers")
# Rooms by floor; within floors 0 and 1 a file imports only what stands before it.
ORDER = {name: i for i, name in enumerate((*FLOOR_0, *FLOOR_1))}


def modules():
    for path in sorted((ROOT / "zsnr").rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
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
    if own not in ORDER:
        return
    for name in imports(path):
        if name.startswith("zsnr"):
            other = room(name)
            assert other in ORDER, f"{module} imports upward: {name}"
            assert other == own or ORDER[other] < ORDER[own], f"{module} imports {name}"
        else:
            assert name.split(".")[0] in {"torch", "__future__", *sys.stdlib_module_names}


def test_import_is_light():
    code = (
        "import sys, time, torch; start = time.perf_counter(); import zsnr; "
        "print(time.perf_counter() - start); "
        f"print(*(m for m in {HEAVY} if m in sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert runs[0].stdout.splitlines()[1] == ""
    assert min(float(run.stdout.splitlines()[0]) for run in runs) < 0.2


def test_readme_blocks_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
