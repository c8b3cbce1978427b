"""The shipped batch scripts on a real SLURM: preempted, requeued, the same run."""

import time

import pytest
from runs import ON_CPU, ON_CPU_SHARDED, REPOSITORY, TRAINER, assert_same_run, environment
from slurm import Cluster, why_not

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS, SAVE_EVERY = 150, 100000  # only preemption saves
OPTIONS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
HOW = {"ddp": ON_CPU, "fsdp": ON_CPU_SHARDED}
TRAINERS = {"ddp": "ddp.yaml", "fsdp": "fsdp_multinode.yaml"}


@pytest.fixture(scope="session")
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    with Cluster() as both:
        yield both


def submit(cluster, run, how, *options):
    env = environment(ZSNR_CONFIG=str(run.config), ZSNR_TRAINER=str(TRAINER / TRAINERS[how]))
    script = REPOSITORY / "configs" / "slurm" / "train.sbatch"
    command = [*OPTIONS, *options, f"--output={run.folder}/job.log", str(script), *HOW[how]]
    return cluster.submit(*command, env=env, cwd=run.folder)


def log(run):
    path = run.folder / "job.log"
    return path.read_text(errors="replace")[-6000:] if path.exists() else "no log"


def finish(cluster, run, job):
    facts = cluster.wait(job, {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}, 500)
    assert facts["JobState"] == "COMPLETED", log(run)
    return facts


def wait_for_step(cluster, run, job, step):
    end = time.monotonic() + 300
    while run.recorded() < step:
        assert time.monotonic() < end, log(run)
        assert cluster.facts(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), log(run)
        time.sleep(0.05)


@pytest.fixture(scope="session")
def undisturbed(cluster, make_run):
    done = {}

    def get(how):
        if how not in done:
            done[how] = make_run(f"slurm-{how}", STEPS, SAVE_EVERY)
            finish(cluster, done[how], submit(cluster, done[how], how))
        return done[how]

    return get


@pytest.mark.parametrize(
    ("how", "attempt"), [("ddp", 1), ("ddp", 2), *(("fsdp", i) for i in range(1, 6))]
)
def test_a_signalled_job_is_requeued(how, attempt, cluster, undisturbed, make_run, moments, report):
    whole = undisturbed(how)
    run = make_run(f"signalled-{how}-{attempt}", STEPS, SAVE_EVERY)
    job = submit(cluster, run, how)
    wait_for_step(cluster, run, job, moments.randrange(1, STEPS * 2 // 3))
    time.sleep(moments.random() / 10)
    at = run.recorded()
    cluster.run("scancel", "--signal=USR1", job)
    facts = finish(cluster, run, job)
    assert facts["Restarts"] == "1"
    found = assert_same_run(run, whole)
    report(
        1,
        f"USR1 at step {at} of {STEPS}, {run.recorded() - STEPS} steps again; "
        f"losses differ by {found['losses']:.1e}, weights by {found['weights']:.1e}",
    )


def test_a_job_that_a_better_one_displaces_goes_on_after_it(
    cluster, undisturbed, make_run, moments, report
):
    whole = undisturbed("fsdp")
    run = make_run("displaced", STEPS, SAVE_EVERY)
    job = submit(cluster, run, "fsdp")
    wait_for_step(cluster, run, job, moments.randrange(1, STEPS * 2 // 3))
    at = run.recorded()
    better = cluster.submit(
        *["--partition=high", "--nodes=2", "--ntasks-per-node=4", "--output=/dev/null", "--wrap"],
        "srun sleep 1",
        env={},
        cwd=run.folder,
    )
    facts = finish(cluster, run, job)
    cluster.wait(better, {"COMPLETED"}, 10)
    assert facts["Restarts"] == "1"
    found = assert_same_run(run, whole)
    report(
        1,
        f"preempted by a job of a better partition at step {at}, {run.recorded() - STEPS} steps "
        f"again; losses differ by {found['losses']:.1e}, weights by {found['weights']:.1e}",
    )


def test_a_signal_before_training_does_not_end_the_job(cluster, undisturbed, make_run, report):
    whole = undisturbed("ddp")
    run = make_run("early", STEPS, SAVE_EVERY)
    job = submit(cluster, run, "ddp")
    cluster.wait(job, {"RUNNING"}, 60)
    time.sleep(3)  # it imports
    assert run.recorded() == 0
    cluster.run("scancel", "--signal=USR1", job)
    finish(cluster, run, job)
    assert_same_run(run, whole)
    report(1, f"USR1 3 s after the start; {run.recorded() - STEPS} steps again")
