"""A SLURM cluster of two nodes on this machine, with its real daemons."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

# cred_expire is also how long a requeued job waits; the GPUs are counted, not looked for.
CONF = """\
ClusterName=zsnr
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=10
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 Gres=gpu:8 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=90 State=UP
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""  # noqa: E501


def why_not() -> str | None:
    """Say what is missing for a cluster here; None = nothing."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


class Cluster:
    """munged, slurmctld and two slurmd, all in one temporary folder; a context manager."""

    def __enter__(self) -> Cluster:
        # munged wants a folder that all may enter, so not pytest's.
        self.folder = Path(tempfile.mkdtemp(prefix="zsnr-slurm-"))
        self.folder.chmod(0o755)
        self.daemons: list[subprocess.Popen[bytes]] = []
        conf = self.folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        conf.write_text(CONF.format(host=host, folder=self.folder, ports=_free_ports()))
        for gpu in range(8):
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.env = {**os.environ, "SLURM_CONF": str(conf)}
        try:
            files = ("key-file", "socket", "pid-file", "log-file", "seed-file")
            names = ("key", "socket", "pid", "log", "seed")
            places = [
                f"--{file}={self.folder}/munge.{name}"
                for file, name in zip(files, names, strict=True)
            ]
            self._start("munged", "--foreground", "--force", *places)
            _wait(lambda: (self.folder / "munge.socket").exists(), 20, "munged")
            self._start("slurmctld", "-D", "-c", "-f", str(conf))
            for node in ("n1", "n2"):
                (self.folder / f"spool.{node}").mkdir()
                self._start("slurmd", "-D", "-c", "-N", node, "-f", str(conf))
            _wait(self._ready, 60, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self.daemons) > 1:  # the controller runs
            for job in self.run("squeue", "-h", "-o", "%i", check=False).split():
                self.run("scancel", job, check=False)
            end = time.monotonic() + 30
            while self.run("squeue", "-h", check=False).strip() and time.monotonic() < end:
                time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait(10)
        self._kill_steps()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str, check: bool = True, **options: object) -> str:
        """Run one of SLURM's commands and return what it says."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=60, **options
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}{self.logs()}")
        return done.stdout

    def submit(self, *command: str, env: dict[str, str], cwd: Path) -> str:
        """Submit a batch script; return the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *command],
            env={**self.env, **env},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode != 0:
            raise RuntimeError(f"sbatch: {done.stderr}")
        return done.stdout.strip().partition(";")[0]

    def facts(self, job: str) -> dict[str, str]:
        """Return what scontrol says of a job."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(word.partition("=")[::2] for word in text.split())

    def wait(self, job: str, states: set[str], timeout: float) -> dict[str, str]:
        """Wait for a job to be in one of some states.

        Raises:
            TimeoutError: It is not.
        """
        end = time.monotonic() + timeout
        while (facts := self.facts(job))["JobState"] not in states:
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is {facts['JobState']}, wanted {states}: {facts}")
            time.sleep(0.5)
        return facts

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        parts = []
        for path in sorted(self.folder.glob("*.log")):
            parts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)

    def _start(self, program: str, *arguments: str) -> None:
        out = open(self.folder / f"{program}.{len(self.daemons)}.out", "wb")  # noqa: SIM115
        with out:
            self.daemons.append(
                subprocess.Popen(
                    [program, *arguments],
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    def _ready(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split()
        return states == ["idle", "idle"]

    def _kill_steps(self) -> None:
        """Kill what is left of jobs: processes whose environment names this cluster."""
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                ours = mark in environ.read_bytes().split(b"\0")
            except OSError:
                continue
            if ours and int(environ.parent.name) != os.getpid():
                os.kill(int(environ.parent.name), signal.SIGKILL)


def _free_ports() -> list[int]:
    """Find three ports in a row that are free."""
    for first in range(17000, 18000, 10):
        try:
            for port in range(first, first + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return [first, first + 1, first + 2]
    raise RuntimeError("no free ports between 17000 and 18000")


def _wait(ready, timeout: float, what: str) -> None:
    end = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not start in {timeout:.0f} s")
        time.sleep(0.2)
