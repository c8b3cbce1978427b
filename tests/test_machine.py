"""What a machine may lack: open files, shared memory, a temporary folder, a home, a locale."""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from zsnr.cli import main
from zsnr.data.workers import MachineError, Shared

COMMANDS = """
import os, resource, sys
from zsnr.cli import main
os.umask(0o077)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
data = sys.argv[1]
for command in (
    ["schedule"],
    ["data", "openmoji", data, "--glyphs", "demo", "--size", "8"],
    ["data", "index", f"{data}/train-*.tar"],
    ["doctor", f"{data}/train-000000.tar"],
):
    assert main(command) == (3 if command[0] == "doctor" else 0), command
"""


def test_commands_need_no_home_locale_or_many_files(tmp_path):
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("HOME", "LANG")},
        "LC_ALL": "C",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(tmp_path / "nowhere"),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", COMMANDS, str(tmp_path / "data")]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "command", [["fit"], ["predict"], ["data", "cache", "-c", "a.yaml", "--output", "b"]]
)
def test_a_machine_without_temporary_folders_is_one_line(command, monkeypatch, capsys):
    def nowhere():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    assert main(command) == 2
    assert "Set TMPDIR to a writable folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workers", "limits", "strategy", "refused"),
    [
        (8, (64, 64), "file_system", "at most 3."),
        (3, (64, 64), "file_system", None),
        (0, (64, 64), None, None),
        (8, (256, 4096), None, None),
        (8, (256, resource.RLIM_INFINITY), None, None),
    ],
)
def test_workers_need_files(monkeypatch, workers, limits, strategy, refused):
    chosen, raised = [], []
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda what, wanted: raised.append(wanted))
    monkeypatch.setattr(torch.multiprocessing, "set_sharing_strategy", chosen.append)
    if refused is None:
        Shared(list, workers)
    else:
        with pytest.raises(MachineError, match=refused):
            Shared(list, workers)
    assert chosen == ([] if strategy is None else [strategy])
    assert raised in ([], [(64, 64)], [(4096, 4096)])


def test_full_shared_memory_is_one_line_and_no_hang(monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    collate = Shared(lambda rows: {"image": torch.tensor(rows)}, 1)
    assert collate([1])["image"].tolist() == [1]  # in this process nothing is shared
    loader = DataLoader([1.0, 2.0], num_workers=1, collate_fn=collate)
    with pytest.raises(MachineError, match="--shm-size"):
        list(loader)


def test_workers_share_what_they_collate():
    batches = list(DataLoader([1.0, 2.0], num_workers=1, collate_fn=Shared(_batch, 1)))
    assert [batch["parts"][0].tolist() for batch in batches] == [[1.0], [2.0]]


def _batch(rows):
    return {"parts": [torch.tensor(rows)], "text": "a"}
