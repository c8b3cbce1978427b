"""A disk that is full while a run saves, and a lock that outlives its run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import assert_same_run, environment

from zsnr.locks import LOCK, SILENCE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS, SAVE_EVERY = 60, 10


@pytest.fixture(scope="session")
def whole(make_run):
    return make_run("whole", STEPS, SAVE_EVERY).train()


@pytest.fixture
def start():
    """Start runs that end with the test; what they say is in log.txt."""
    processes = []

    def start_one(run, *before):
        with open(run.folder / "log.txt", "ab") as out:
            command = [*before, sys.executable, *run.command("--ckpt_path=last")]
            processes.append(
                subprocess.Popen(
                    command, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out
                )
            )
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()
        process.wait(20)


def log(run):
    return (run.folder / "log.txt").read_text(errors="replace")[-4000:]


def wait_for_step(run, process, step):
    end = time.monotonic() + 300
    while run.recorded() < step:
        assert process.poll() is None, log(run)
        assert time.monotonic() < end, log(run)
        time.sleep(0.01)


@pytest.fixture
def small_disk():
    """Give a function that mounts a disk of 96 MiB, of some checkpoints, at a folder."""
    mounted = []

    def mount(folder):
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=96m", "none", str(folder)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode != 0:
            pytest.skip(f"no mounts: {made.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_at_a_save(start, small_disk, whole, make_run, moments, report):
    run = make_run("full", STEPS, SAVE_EVERY)
    folder = run.folder / "checkpoints"
    small_disk(folder)
    process = start(run)
    full_at = moments.randrange(SAVE_EVERY + 2, STEPS - SAVE_EVERY - 2)
    wait_for_step(run, process, full_at)
    filler = folder / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4096"], capture_output=True)
    assert process.wait(300) == 2, log(run)
    told = log(run).strip().splitlines()[-1]
    assert "No space left on device" in told or "could not be written" in told, log(run)
    left = (folder / "last.ckpt").resolve().name
    assert not [name for name in run.unfinished() if name != "filler"]
    filler.unlink()
    assert start(run).wait(300) == 0, log(run)
    found = assert_same_run(run, whole, kills=1)
    report(
        1,
        f"full at step {full_at} of {STEPS}: the save failed in one line, resumed from {left}; "
        f"losses differ by {found['losses']:.1e}, weights by {found['weights']:.1e}",
    )


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_lock_is_taken_over_from_a_killed_run(where, start, whole, make_run, moments, report):
    run = make_run(f"lock-{where}", STEPS, SAVE_EVERY)
    lock = run.folder / "checkpoints" / LOCK
    # In another pid namespace, as in another container, nobody can look up its pid.
    before = ["unshare", "--pid", "--fork", "--kill-child"] if where == "elsewhere" else []
    if before and (os.geteuid() != 0 or shutil.which("unshare") is None):
        pytest.skip("pid namespaces need root and unshare")
    process = start(run, *before)
    kill_at = moments.randrange(SAVE_EVERY + 2, STEPS - 10)
    wait_for_step(run, process, SAVE_EVERY // 2)
    pid = process.pid
    if before:
        [pid] = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    os.kill(pid, signal.SIGSTOP)  # it lives, and takes no steps while the second one starts
    assert start(run).wait(200) == 2
    assert "checkpoints is in use by another process" in log(run).strip().splitlines()[-1]
    os.kill(pid, signal.SIGCONT)
    wait_for_step(run, process, kill_at)
    process.kill()
    process.wait(20)
    assert lock.exists()
    if before:
        assert start(run).wait(200) == 2  # it may live
        then = time.time() - SILENCE - 5
        os.utime(lock, (then, then))
    assert start(run).wait(300) == 0, log(run)
    assert not lock.exists()
    found = assert_same_run(run, whole, kills=1)
    report(
        1,
        f"a second run refused, the first killed at step {kill_at} of {STEPS}, its lock taken "
        f"{'after 3 minutes of silence' if before else 'at once'}; losses differ by "
        f"{found['losses']:.1e}, weights by {found['weights']:.1e}",
    )
