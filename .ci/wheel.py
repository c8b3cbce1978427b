"""Build the wheel and try it where nothing but the wheel and what it depends on can be imported.

The dependencies are those of the environment that runs this file; its editable install and the
source tree are out of sight.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WANTED = (  # one of each kind of file that is no module
    "zsnr/py.typed",
    "zsnr/configs/tiny.yaml",
    "zsnr/configs/trainer/lora.yaml",
    "zsnr/assets/openmoji_vae/config.json",
)
NAMES = """
import zsnr, zsnr.pipeline, zsnr.training
print(zsnr.__file__, *(getattr(zsnr, name).__name__ for name in zsnr.__all__ if name[0].isupper()))
"""


def main() -> None:
    """Build, install and try the wheel; raises SystemExit where something is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)])
        [wheel] = folder.glob("zsnr-*.whl")
        _check_files(wheel)
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")])
        python = folder / "venv" / "bin" / "python"
        target = folder / "venv" / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        _run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)])
        # Dependencies come after the wheel; a line of a .pth is a folder, whose own are not read.
        (target / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        _try(python.with_name("zsnr"), python, folder)


def _check_files(wheel: Path) -> None:
    """Compare what the wheel holds with the package's folder and the configs."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    tracked = _run(["git", "ls-files", "zsnr", "configs"], cwd=ROOT).splitlines()
    wanted = {f"zsnr/{path}" if path.startswith("configs/") else path for path in tracked}
    missing = sorted((wanted | set(WANTED)) - held)
    if missing:
        raise SystemExit(f"{wheel.name} lacks {', '.join(missing)}")


def _try(zsnr: Path, python: Path, folder: Path) -> None:
    """Run commands and imports of the installed wheel, away from the source tree."""
    print(_run([str(zsnr), "--version"], cwd=folder).strip())
    if "quickstart" not in _run([str(zsnr), "configs", "list"], cwd=folder):
        raise SystemExit("`zsnr configs list` does not list quickstart.yaml")
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}
    scheduler |= {"beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    told = _run([str(zsnr), "doctor", "scheduler_config.json", "--json"], cwd=folder, code=1)
    if json.loads(told)["verdict"] != "flawed":
        raise SystemExit(f"The doctor does not find the flaw: {told}")
    place = _run([str(python), "-c", NAMES], cwd=folder).split()[0]
    if not Path(place).is_relative_to(folder):
        raise SystemExit(f"{place} was imported, and not the wheel")


def _run(command: list[str], cwd: Path | None = None, code: int = 0) -> str:
    """Return what a command prints; raises SystemExit where its exit code is another."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode != code:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
