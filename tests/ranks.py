"""Forked processes that have imported everything: ranks of a process group, and commands.

Importing Lightning and PyTorch takes a new interpreter 7 s of processor time. One server for each
worker of the tests imports them once, has no threads, and forks whatever else is needed.
"""

import faulthandler
import io
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

TIMEOUT = 300  # seconds for one call


@cache
def _context():
    """Start the server; its processes have the tests' modules and all that those import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    # Python 3.11 does not hand sys.path to the server, and says nothing of a failed import.
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
    return context


def _be_a_new_process():
    """Start further processes, such as workers that load data, as a new interpreter would.

    A process that a server forked starts its own with another server, and that one imports all
    anew, for each loader.
    """
    assert "preloaded" in sys.modules, "the server that forks has imported nothing"
    multiprocessing.set_start_method(None, force=True)


def _serve(rank, ranks, port, pipe):
    _be_a_new_process()
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

    def __init__(self, size):
        context = _context()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.size = size
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
        results, problems = self._answers(function, *args, **kwargs)
        if problems:
            self.close()  # others may wait for the one that failed
            raise AssertionError("\n".join(problems))
        return results

    def errors(self, function, *args, **kwargs):
        """Run a function that fails on all ranks, none of which is left to wait for another.

        Returns:
            What each rank says, from its number to its traceback.
        """
        results, problems = self._answers(function, *args, **kwargs)
        if results or not self.alive:
            self.close()
            raise AssertionError("\n".join(["some ranks did not fail", *problems]))
        return problems

    def _answers(self, function, *args, **kwargs):
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
        return results, problems

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
        self._groups = {}

    def __getitem__(self, size):
        if size not in self._groups or not self._groups[size].alive:
            self._groups[size] = Ranks(size)
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


def _command(arguments, environment, folder, output, errors):
    """Be the command line in a process of its own."""
    _be_a_new_process()
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for path, descriptor in ((output, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, "w", closefd=False), line_buffering=True)
        for number in (1, 2)
    )
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["zsnr", *arguments]
    os.chdir(folder)
    from zsnr.cli import main

    sys.exit(main())


class Command:
    """A process that runs `zsnr ARGUMENTS`, as a shell would start it.

    Args:
        arguments: Of the command line.
        environment: Replaces that of this process.
        folder: The working directory.
    """

    def __init__(self, arguments, environment=None, folder="."):
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        arguments = [str(argument) for argument in arguments]
        environment = dict(os.environ if environment is None else environment)
        process = (arguments, environment, str(Path(folder).resolve()), *map(str, self._files))
        self._process = _context().Process(target=_command, args=process)
        self._process.start()

    @property
    def pid(self):
        return self._process.pid

    @property
    def stdout(self):
        return self._files[0].read_text()

    @property
    def stderr(self):
        return self._files[1].read_text()

    def poll(self):
        """Return the exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout=TIMEOUT):
        """Return the exit code; a signal's number is negative."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it runs on after {timeout} s"
        return self._process.exitcode

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.join()
        self._folder.cleanup()
