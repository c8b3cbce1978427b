"""Fixtures of the cluster tests, and the table of what they saw."""

import random
import time
from pathlib import Path

import pytest
import runs

ROWS = []


def pytest_addoption(parser):
    parser.addoption("--write-results", metavar="FILE", help="write a table of the cluster tests")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def make_run(tmp_path_factory, data):
    """Make a run in a folder of its own; name=None for one that is not shared."""
    root = tmp_path_factory.mktemp("runs")

    def make(name, steps, save_every):
        return runs.Run(root / name, data, steps, save_every)

    return make


@pytest.fixture
def moments(request):
    """Random numbers that are others at every call of pytest, and printed for a failed test."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed of the random moments: {seed}")
    return random.Random(seed)


@pytest.fixture
def report(request):
    """Give a function that notes how many tries there were and what was seen."""
    began = time.monotonic()

    def note(tries, seen):
        ROWS.append((request.node, tries, seen, time.monotonic() - began))

    return note


def pytest_runtest_logreport(report):
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        OUTCOMES[report.nodeid] = (report.outcome, report.duration, report.longrepr)


OUTCOMES = {}


def pytest_sessionfinish(session):
    path = session.config.getoption("--write-results", None)
    if path is None or not OUTCOMES:
        return
    import datetime
    import platform
    import shutil
    import subprocess

    import lightning
    import torch

    slurm = "no SLURM"
    if shutil.which("slurmctld"):
        slurm = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.strip()
    notes = {node.nodeid: (tries, seen) for node, tries, seen, _ in ROWS}
    lines = [
        "# Two nodes, SLURM and kills, on one machine",
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, lightning {lightning.__version__}, "
        f"{slurm}, Python {platform.python_version()}, gloo, 1 thread a process.",
        "Made by `make test-cluster`: nodes are network namespaces, or the nodes of a real SLURM.",
        "",
        "| test | tries | what was seen | seconds |",
        "|---|---|---|---|",
    ]
    for nodeid, (outcome, seconds, why) in OUTCOMES.items():
        tries, seen = notes.get(nodeid, ("-", ""))
        if outcome == "skipped":
            seen = f"skipped: {str(why[2]).removeprefix('Skipped: ')}"
        elif outcome == "failed":
            seen = "FAILED. " + seen
        name = nodeid.partition("::")[2].removeprefix("test_").replace("_", " ")
        lines.append(f"| {name} | {tries} | {seen} | {seconds:.0f} |")
    Path(path).write_text("\n".join(lines) + "\n")
