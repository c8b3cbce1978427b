"""What a failing command says: one line for users' files and machines, a traceback for bugs."""

import errno
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.seed import seed_everything

from zsnr import failures
from zsnr.cli import main
from zsnr.failures import told
from zsnr.files import replacing
from zsnr.training.lightning_cli import check_environment
from zsnr.untrusted import clipped, disguise, printable, read_json, shown

ROOT = Path(__file__).parents[1]
STEERING = "\x1b[31m\x1b]0;title\x07\r\x9b\u202e\u2066\u200b\ufeff\u2028"


def fail(monkeypatch, error):
    """Let a command raise an error."""

    def run() -> None:
        raise error

    monkeypatch.setattr("zsnr.commands.schedule.schedule", run)


def raised_by(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


WORLD = {
    "full disk": (
        OSError(errno.ENOSPC, "No space left on device", "/a/b.png"),
        "b.png: No space",
    ),
    "no folder": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), "/a/b: Not a dir"),
    "renamed": (OSError(errno.EXDEV, "Cross-device link", "/a", None, "/b"), "/a -> /b: Cross"),
    "memory": (MemoryError(), "`zsnr schedule` ran out of memory"),
    "device memory": (
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        "of memory: CUDA",
    ),
    "host memory": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"),
        "ran out of mem",
    ),
    "recursion": (RecursionError("maximum"), "nested too deeply"),
    "encoding": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start"),
}


@pytest.mark.parametrize("kind", WORLD)
def test_failures_of_files_and_machines_are_one_line(monkeypatch, capsys, kind):
    error, message = WORLD[kind]
    fail(monkeypatch, error)
    assert main(["schedule"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("zsnr: error: ")
    assert said.count("\n") == 1
    assert message in said


@pytest.mark.parametrize("error", [KeyError(1), TypeError(1), RuntimeError(1), ValueError(1)])
def test_bugs_keep_their_traceback(monkeypatch, error):
    fail(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["schedule"])


def test_libraries_that_fail_on_files_are_one_line(tmp_path):
    import tarfile

    from PIL import Image

    (tmp_path / "a").write_bytes(b"nothing" * 100)
    for call in (Image.open, tarfile.open):
        assert told(raised_by(call, tmp_path / "a"), "fit") is not None
    assert told(raised_by(int, "a"), "fit") is None


def test_settings_that_libraries_refuse_are_one_line():
    weights = [torch.nn.Parameter(torch.zeros(1))]
    for error in (
        raised_by(lambda: torch.optim.AdamW(weights, lr=-1.0)),
        raised_by(seed_everything, 2**64),
    ):
        assert told(error, "fit") == str(error)


def test_interrupts_and_closed_pipes_end_quietly(monkeypatch, capsys):
    fail(monkeypatch, KeyboardInterrupt())
    assert main(["schedule"]) == 130
    assert capsys.readouterr().err == "zsnr: interrupted\n"
    code = "import sys\nfrom zsnr.cli import main\nsys.exit(main(['configs', 'show', 'tiny']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False, cwd=ROOT
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_is_named_by_the_file_that_was_written(tmp_path):
    with pytest.raises(OSError, match="No space left") as error, replacing(tmp_path / "a.png"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path / "a.png") in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"SLURM_NTASKS": "2"},
        {"SLURM_NTASKS": "many"},
        {"WORLD_SIZE": "two"},
        {"RANK": "-1"},
        {"LOCAL_RANK": "1.5"},
        {"NODE_RANK": "9" * 5000},
        {"MASTER_PORT": "99999"},
        {"SLURM_RESTART_COUNT": "once"},
        {"TORCHELASTIC_MAX_RESTARTS": "-1"},
    ],
)
def test_nonsense_of_the_environment_is_named(monkeypatch, wrong):
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=next(iter(wrong))) as error:
        check_environment()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("more", [{"SLURM_STEP_ID": "0"}, {"SLURM_JOB_NAME": "interactive"}])
def test_tasks_of_slurm_are_no_nonsense(monkeypatch, more):
    for name, value in {"SLURM_NTASKS": "2", **more}.items():
        monkeypatch.setenv(name, value)
    check_environment()


# Text of strangers


def test_printable_escapes_what_steers_and_keeps_what_people_write():
    assert printable(STEERING).isascii()
    assert printable("a\x1b\u202eb") == r"a\x1b\u202eb"
    for text in ("é 中文　全角 👩‍👩‍👧 ❤️ नमस्ते", "می‌خواهم", "a\nb\tc"):
        assert printable(text) == text
    assert printable("a\nb", one_line=True) == r"a\nb"
    assert printable(r"a\x1b") == r"a\x1b"
    assert printable("a\u200db") == r"a\u200db"
    assert printable("\udc80") == r"\udc80"


def test_strangers_text_leaves_escaped_once(tmp_path, capsys):
    path = tmp_path / f"a{STEERING[:4]}\n.yaml"
    path.write_text("model: {schedule: {" + json.dumps("\x1b[31m\u202e") + ": 1}}")
    assert main(["doctor", str(path)]) == 3
    assert main(["doctor", str(path), "--json"]) == 3
    assert main(["schedule", str(path)]) == 2
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert not set(text) & set("\x1b\u202e")
    assert r"\\x1b" not in said.err + said.out.split("{")[0]
    assert json.loads(said.out[said.out.index("{") :])["target"] == str(path)


def test_warnings_and_logs_are_escaped(monkeypatch):
    main(["schedule"])
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    handler = logging.StreamHandler(said)
    logging.getLogger("a.stranger").addHandler(handler)
    logging.getLogger("a.stranger").warning("%s", STEERING)
    warnings.showwarning(UserWarning(STEERING), UserWarning, "a.py", 1)
    assert said.getvalue().isascii()


def test_a_warning_of_this_package_is_a_sentence_on_one_line():
    main(["schedule"])
    ours, other = (
        warnings.formatwarning(f"A profile\n{STEERING}", UserWarning, path, 7)
        for path in (failures.__file__, "/a/stranger.py")
    )
    assert ours.isascii()
    assert other.isascii()
    assert ours.startswith("zsnr: warning: A profile ")
    assert ours.count("\n") == 1
    assert other.startswith("/a/stranger.py:7: UserWarning: A profile")


def test_a_terminal_without_unicode_shows_escapes(tmp_path):
    code = "import sys\nfrom zsnr.cli import main\nsys.exit(main(['doctor', sys.argv[1]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "/中文"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 3
    assert rb"/\u4e2d\u6587" in done.stdout
    assert done.stderr == b""


def test_values_are_cut_before_they_are_formatted():
    nested = [1]
    for _ in range(60):
        nested = [nested, nested]
    for value in (nested, "a" * 10**8, 10**5000, {"a": nested}):
        assert len(shown(value)) < 130
    assert clipped(" a\n b") == "a b"
    assert len(clipped("a" * 10**8)) < 130


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b"<html lang='en'>", "an HTML page"),
        (
            b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
            "a storage server",
        ),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.json", "a.yaml", "run.json"])
def test_another_file_under_a_models_name_is_named(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert main(["doctor", str(tmp_path / name), "--open"]) == 3
    assert message in " ".join(capsys.readouterr().out.split())


def test_texts_and_weights_are_not_taken_for_another_file(tmp_path):
    assert disguise(b"a cat\nversion https://git-lfs.github.com") is None
    (tmp_path / "a.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": 1}
