"""Two nodes on this machine: network namespaces with a cable between them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runs import environment


def why_not() -> str | None:
    """Say why there can be no network namespaces here; None = there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "not installed: iproute2"
    probe = f"zsnr{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Nodes:
    """Two namespaces, 10.77.0.1 and 10.77.0.2; a context manager that leaves no process behind."""

    def __enter__(self) -> Nodes:
        self.names = [f"zsnr{os.getpid()}n{i}" for i in range(2)]
        self.devices = [f"zv{os.getpid()}n{i}" for i in range(2)]
        self.agents: list[subprocess.Popen[bytes]] = []
        try:
            for name in self.names:
                _ip("netns", "add", name)
            _ip(
                *f"link add {self.devices[0]} netns {self.names[0]} type veth".split(),
                *f"peer name {self.devices[1]} netns {self.names[1]}".split(),
            )
            for i, (name, device) in enumerate(zip(self.names, self.devices, strict=True)):
                _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", device)
                _ip("-n", name, "link", "set", device, "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in found.stdout.split():
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for agent in self.agents:
            agent.wait(20)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def torchrun(self, command: list[str], log: Path, processes: int, restarts: int = 0) -> None:
        """Start torchrun on both nodes with so many processes each; logs go to log.0 and log.1."""
        for i, (name, device) in enumerate(zip(self.names, self.devices, strict=True)):
            run = [
                *f"ip netns exec {name} {sys.executable} -m torch.distributed.run".split(),
                "--nnodes=2",
                f"--nproc-per-node={processes}",
                "--rdzv-id=zsnr",
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=10.77.0.1:29500",
                # Without is_host both would ask for a store that neither has.
                f"--rdzv-conf=is_host={1 - i},join_timeout=120",
                f"--local-addr=10.77.0.{i + 1}",
                f"--max-restarts={restarts}",
                *command,
            ]
            with open(f"{log}.{i}", "wb") as out:
                self.agents.append(
                    subprocess.Popen(
                        run,
                        # A store that outlives its workers hands a restart the addresses of
                        # the workers before it: github.com/pytorch/pytorch/issues/135712.
                        env=environment(
                            GLOO_SOCKET_IFNAME=device, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"
                        ),
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=out,
                        start_new_session=True,
                    )
                )

    @contextmanager
    def serve(self, folder: Path, faults: list[dict[str, object]], log: Path) -> Iterator[str]:
        """Serve a folder to both nodes with faults; give its address."""
        program = Path(__file__).parents[1] / "faulty_server.py"
        command = [
            *f"ip netns exec {self.names[0]} {sys.executable} {program} {folder}".split(),
            *["--host", "10.77.0.1", "--log", str(log), "--faults", json.dumps(faults)],
        ]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as server:
            try:
                assert server.stdout is not None
                yield f"http://10.77.0.1:{int(server.stdout.readline())}"
            finally:
                server.kill()

    def wait(self, timeout: float) -> list[int]:
        """Wait for both nodes' torchrun; return their exit codes."""
        end = time.monotonic() + timeout
        codes = [agent.wait(max(0.1, end - time.monotonic())) for agent in self.agents]
        self.agents.clear()
        return codes

    def workers(self, node: int) -> list[int]:
        """Return the ids of the training processes of a node."""
        agent = self.agents[node].pid
        return [int(p) for p in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
