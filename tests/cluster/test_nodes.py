"""Two nodes under torchrun: the same losses as one process, and recovery from a killed worker."""

import json
import os
import signal
import time

import pytest
from nodes import Nodes, why_not
from runs import ON_CPU, ON_CPU_SHARDED, SAME, TRAINER, as_settings, assert_same_run, difference

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS, SAVE_EVERY = 60, 10
DDP = ["-c", str(TRAINER / "ddp.yaml"), *ON_CPU]
SHARDED = ["-c", str(TRAINER / "fsdp.yaml"), *ON_CPU_SHARDED]
HYBRID = [*SHARDED, "--trainer.strategy.init_args.shard_ranks=node"]
HOW = {"ddp": (DDP, 1), "fsdp": (SHARDED, 1), "hybrid": (HYBRID, 2)}


@pytest.fixture(scope="session")
def nodes():
    if reason := why_not():
        pytest.skip(reason)
    with Nodes() as both:
        yield both


def start(nodes, run, how, restarts=0, options=()):
    settings, processes = HOW[how]
    places = as_settings(trainer__num_nodes=2, trainer__devices=processes)
    command = run.command(*settings, *places, *options)
    nodes.torchrun(command, run.folder / "node", processes, restarts)


def logs(run):
    return "\n".join(p.read_text()[-3000:] for p in sorted(run.folder.glob("node.*")))


@pytest.fixture(scope="session")
def undisturbed(nodes, make_run):
    """Undisturbed runs on two nodes, made when they are first asked for."""
    done = {}

    def get(how):
        if how not in done:
            done[how] = make_run(f"two-nodes-{how}", STEPS, SAVE_EVERY)
            start(nodes, done[how], how)
            assert nodes.wait(500) == [0, 0], logs(done[how])
        return done[how]

    return get


@pytest.fixture(scope="session")
def one_process(make_run):
    return make_run("one-process", STEPS, SAVE_EVERY).train()


@pytest.mark.parametrize("how", HOW)
def test_two_nodes_give_the_losses_of_one_process(how, undisturbed, one_process, report):
    run = undisturbed(how)
    assert run.batches() == one_process.batches()
    losses = difference(run.losses(), one_process.losses())
    weights = difference(run.weights(), one_process.weights())
    report(1, f"{STEPS} steps; losses differ by {losses:.1e}, weights by {weights:.1e}")
    assert len(run.losses()) == STEPS
    assert losses <= SAME


def test_storage_that_fails_for_a_minute_on_one_node(
    nodes, undisturbed, make_run, data, moments, report
):
    whole = undisturbed("ddp")
    run = make_run("outage", STEPS, SAVE_EVERY)
    node = moments.randrange(2)
    shards = sorted(path.name for path in data.glob("train-*.tar"))
    fault = {
        **{"path": shards[moments.randrange(len(shards))], "kind": "503", "seconds": 60},
        **{"client": f"10.77.0.{node + 1}"},
    }
    log = run.folder / "requests.jsonl"
    with nodes.serve(data, [fault], log) as url:
        start(nodes, run, "ddp", options=as_settings(data__train=[f"{url}/{s}" for s in shards]))
        assert nodes.wait(600) == [0, 0], logs(run)
    failed = sum(json.loads(line)["kind"] == "503" for line in log.read_text().splitlines())
    found = assert_same_run(run, whole)
    report(
        1,
        f"a shard answers 503 to node {node} for 60 s, {failed} requests failed; losses differ by "
        f"{found['losses']:.1e}, weights by {found['weights']:.1e}",
    )
    assert failed > 1


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_killed_worker_is_started_again(how, nodes, undisturbed, make_run, moments, report):
    whole = undisturbed(how)
    run = make_run(f"killed-{how}", STEPS, SAVE_EVERY)
    kill_at, node = moments.randrange(SAVE_EVERY + 2, STEPS - 5), moments.randrange(2)
    start(nodes, run, how, restarts=3)
    end = time.monotonic() + 240
    while run.recorded(node) < kill_at:
        assert time.monotonic() < end, logs(run)
        time.sleep(0.005)
    for worker in nodes.workers(node):
        os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    assert nodes.wait(600) == [0, 0], logs(run)
    assert run.recorded(0) > STEPS - kill_at
    found = assert_same_run(run, whole, kills=1)
    report(
        1,
        f"node {node} killed at step {kill_at} of {STEPS}, done {time.monotonic() - killed:.0f} s "
        f"later, {run.recorded(0) - STEPS} steps again; "
        f"losses differ by {found['losses']:.1e}, weights by {found['weights']:.1e}",
    )
