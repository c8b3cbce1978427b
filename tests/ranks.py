"""Groups of processes that run a function on every rank, with gloo: imports are paid once."""

import faulthandler
import multiprocessing
import os
import socket
import traceback
from contextlib import contextmanager

TIMEOUT = 300  # seconds for one call


def _serve(rank, ranks, port, pipe):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="tests",  # Lightning then leaves the processes to us
        GLOO_SOCKET_IFNAME="lo",
    )
    faulthandler.enable()  # a crash shows where
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException as error:
            pipe.send((False, f"rank {rank}: {error!r}\n{traceback.format_exc()}"))


class Ranks:
    """Processes 0 .. size - 1 of one process group."""

    def __init__(self, context, size):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.size, self._context = size, context
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function, *args, **kwargs):
        """Run a function on all ranks and return their results, rank by rank."""
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results, problems = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT if not problems else 5):
                problems.append(f"rank {rank} did not answer in time")
                continue
            try:
                fine, result = pipe.recv()
            except EOFError:
                self._processes[rank].join(5)
                code = self._processes[rank].exitcode
                fine, result = False, f"rank {rank} died with exit code {code}"
            (results if fine else problems).append(result)
        if problems:
            self.close()  # others may wait for the one that failed
            raise AssertionError("\n".join(problems))
        return results

    @property
    def alive(self):
        return all(process.is_alive() for process in self._processes)

    def close(self):
        for process in self._processes:
            process.kill()
            process.join()


class Groups:
    """One group for each number of ranks, made when it is first wanted."""

    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["cells"])
        self._groups = {}

    def __getitem__(self, size):
        if size not in self._groups or not self._groups[size].alive:
            self._groups[size] = Ranks(self._context, size)
        return self._groups[size]

    def close(self):
        for group in self._groups.values():
            group.close()


@contextmanager
def groups():
    made = Groups()
    try:
        yield made
    finally:
        made.close()
