"""SIGKILL at random moments, also while a checkpoint is written: every restart goes on."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from runs import ON_CPU, ON_CPU_SHARDED, TRAINER, as_settings, assert_same_run, environment

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

SHARDED = ["-c", str(TRAINER / "fsdp.yaml"), *ON_CPU_SHARDED]
DDP = ["-c", str(TRAINER / "ddp.yaml"), *ON_CPU]
# name: (settings, processes, kills, steps)
HOW = {
    "fsdp-2": (SHARDED, 2, 10, 120),
    "ddp-2": (DDP, 2, 5, 80),
    "one": ([], 1, 5, 80),
}


class Group:
    """The processes of one start, in one process group."""

    def __init__(self, run, settings, processes):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = run.command(*settings, *as_settings(trainer__devices=processes))
        self.log = run.folder / "log.txt"
        self.ranks, group = [], 0
        with open(self.log, "wb") as out:
            for rank in range(processes):
                places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
                if processes > 1:
                    places["LOCAL_RANK"] = str(rank)
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        env=environment(**places),
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                        process_group=group,
                    )
                )
                group = self.ranks[0].pid

    def kill(self):
        """Kill all at once, and wait until they are gone."""
        try:
            os.killpg(self.ranks[0].pid, signal.SIGKILL)
        except ProcessLookupError:  # all have ended
            return
        finally:
            for rank in self.ranks:
                rank.wait(20)

    def ended(self):
        return any(rank.poll() is not None for rank in self.ranks)

    def wait(self, timeout):
        end = time.monotonic() + timeout
        return [rank.wait(max(0.1, end - time.monotonic())) for rank in self.ranks]

    def text(self):
        return self.log.read_text(errors="replace")[-4000:]


@pytest.fixture
def start():
    groups = []

    def start_one(*arguments):
        groups.append(Group(*arguments))
        return groups[-1]

    yield start_one
    for group in groups:
        group.kill()


@pytest.mark.parametrize("how", HOW)
def test_a_run_survives_kills(how, start, make_run, moments, report):
    settings, processes, kills, steps = HOW[how]
    whole = make_run(f"whole-{how}", steps, 10**6)
    group = start(whole, settings, processes)
    assert group.wait(400) == [0] * processes, group.text()

    run = make_run(f"kills-{how}", steps, 1)
    settings = [*settings, "--ckpt_path=last"]
    in_saves = 0
    for number in range(kills):
        group, before = start(run, settings, processes), run.recorded()
        # It goes on: what was there could be loaded. A chain may not use up its steps.
        wanted = before + moments.randrange(2, steps // kills)
        end = time.monotonic() + 240
        while run.recorded() < wanted:
            assert not group.ended(), group.text()
            assert time.monotonic() < end, group.text()
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        if number % 2:  # every other kill is aimed at a save
            end = time.monotonic() + 5
            while not run.unfinished() and time.monotonic() < end:
                pass
            time.sleep(moments.uniform(0, 0.01))
        assert not group.ended(), "the run was over before the last kill:\n" + group.text()
        group.kill()
        in_saves += bool(run.unfinished())
    group = start(run, settings, processes)
    assert group.wait(400) == [0] * processes, group.text()
    found = assert_same_run(run, whole, kills)
    report(
        kills,
        f"{in_saves} kills hit a save; {kills} restarts went on, {run.recorded() - steps} of "
        f"{steps} steps again; "
        f"losses differ by {found['losses']:.1e}, weights by {found['weights']:.1e}",
    )
    assert in_saves
    assert not run.unfinished()
