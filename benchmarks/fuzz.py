"""Damaged and hostile files for every reader of untrusted files.

    python benchmarks/fuzz.py [--inputs N] [--seed S] [--reader NAME] [--input NUMBER] [--write]

Each input is a function of (seed, reader, number): `--reader NAME --input NUMBER` recreates it,
saves it, and shows the full traceback. Every eighth input is valid and must be accepted. Inputs
are read by forked processes, two at a time, and an outcome is one of:

- accepted: the reader returned;
- refused: it raised a ValueError or OSError of one line, or a command ended with such a message;
- traceback: another exception, a crash of the process, or a message that is not one line, is
  longer than 2,000 characters or contains control characters;
- hang: more than 10 s of computing or waiting;
- blow: more than 2 GiB of additional memory, or a failed allocation;
- outside: it wrote outside of its folder, started a program, opened a connection, or changed a
  class, the environment or the working directory;
- lost: a valid input was refused, so that refusing damaged ones would prove nothing.

The last five must be zero; the exit code is 1 if they are not.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import io
import json
import os
import pathlib
import platform
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from fuzz_inputs import Draw
from fuzz_readers import READERS, Reader, as_printed
from torch.distributed.checkpoint import filesystem, metadata

from zsnr.failures import tame_output

LONGEST = 2000  # characters of a message
SECONDS = 10.0
MEMORY = 2 << 30
EVERY = 8  # one of this many inputs is valid
OUTCOMES = ("accepted", "refused", "traceback", "hang", "blow", "outside", "lost")
FAULTS = OUTCOMES[2:]
_ADDRESSES = 2 << 30  # address space of stacks and memory maps, in addition to allocations
_BROKEN = 99  # exit code of a process whose classes are too broken to report an outcome
_RECYCLE = 1 << 30  # growth after which a process is replaced
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Python's audit events for writes, with the positions of paths among their arguments.
_EVENTS = {
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
    "shutil.rmtree": (0,),
}
_OF_LINKS = {"os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink"}
_NEVER = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "ctypes.dlopen"),
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one input.

    Args:
        reader: Name of the reader.
        number: Number of the input.
        outcome: One of `OUTCOMES`.
        seconds: Wall-clock time.
        mib: Peak of additional memory.
        error: Type of the exception, or another problem.
        message: The first characters of its text.
        where: The innermost line of the package, as file:line:function.
    """

    reader: str
    number: int
    outcome: str
    seconds: float
    mib: float = 0.0
    error: str = ""
    message: str = ""
    where: str = ""


def make_input(reader: Reader, seed: int, name: str, number: int, folder: Path) -> bool:
    """Write an input to an empty folder; return whether it is valid."""
    valid = number % EVERY == 0
    reader.make(Draw(f"{seed} {name} {number}"), folder, valid)
    return valid


def plan(readers: Mapping[str, Reader], inputs: int) -> list[tuple[str, int]]:
    """Divide inputs among readers by their shares, at least two each, evenly interleaved."""
    total = sum(reader.share for reader in readers.values())
    tasks = []
    for name, reader in readers.items():
        count = max(2, round(inputs * reader.share / total))
        tasks += [(number / count, name, number) for number in range(count)]
    return [(name, number) for _, name, number in sorted(tasks)]


def run(
    readers: Mapping[str, Reader],
    tasks: Sequence[tuple[str, int]],
    seed: int = 0,
    *,
    processes: int = 2,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Read inputs in forked processes, which are replaced after a fault.

    Args:
        readers: Readers by name.
        tasks: Names of readers and numbers of inputs.
        seed: Seed of the inputs.
        processes: Number of processes.
        seconds: Time limit of one input.
        memory: Memory limit of one input, in bytes.
        on_outcome: Called with each outcome.
    """
    for name in dict.fromkeys(name for name, _ in tasks):
        readers[name].prepare()
    gc.collect()
    gc.freeze()
    queue, outcomes = list(reversed(tasks)), []
    memory_disk = Path("/dev/shm")  # on a busy disk, an fsync takes seconds
    roomy = memory_disk.is_dir() and shutil.disk_usage(memory_disk).free > memory
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir=memory_disk if roomy else None, ignore_cleanup_errors=True
    ) as root:
        places = [Path(root, str(i)) for i in range(processes)]
        workers: list[_Worker | None] = [None] * processes
        try:
            while queue or any(worker and worker.task for worker in workers):
                for i, worker in enumerate(workers):
                    if queue and (worker is None or not worker.task):
                        if worker is None:
                            worker = workers[i] = _Worker(readers, seed, places[i], memory)
                        worker.give(queue.pop())
                busy = [worker for worker in workers if worker is not None and worker.task]
                wait([worker.pipe for worker in busy], 0.2)
                for worker in busy:
                    outcome = worker.outcome(seconds)
                    if outcome is None:
                        continue
                    outcomes.append(outcome)
                    on_outcome(outcome)
                    if outcome.outcome in FAULTS or worker.ended:
                        worker.end()
                        workers[workers.index(worker)] = None
        finally:
            for worker in filter(None, workers):
                worker.end()
    return outcomes


class _Worker:
    """The parent's handle of a forked process that reads inputs."""

    def __init__(self, readers: Mapping[str, Reader], seed: int, place: Path, memory: int) -> None:
        self.pipe, child_pipe = Pipe()
        self.task: tuple[str, int] | None = None
        self.ended = False
        self._stack = place.with_name(f"{place.name}.stack")
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns about threads, which are idle here
            self.pid = os.fork()
        if not self.pid:
            self.pipe.close()
            code = _BROKEN
            try:
                _work(child_pipe, readers, seed, place, memory, self._stack)
                code = 0
            finally:
                os._exit(code)
        child_pipe.close()

    def give(self, task: tuple[str, int]) -> None:
        self.task, self._since, self._cpu = task, time.monotonic(), self._cpu_time()
        self._size = _memory("VmRSS", self.pid)
        with contextlib.suppress(BrokenPipeError):  # it has died, which `outcome` will report
            self.pipe.send(task)

    def outcome(self, seconds: float) -> Outcome | None:
        """Return the outcome of the task, once it is known."""
        assert self.task is not None
        name, number = self.task
        spent = time.monotonic() - self._since
        if self.pipe.poll():
            try:
                result, self.ended = self.pipe.recv()
            except EOFError:
                _, status = os.waitpid(self.pid, 0)
                self.pid, self.ended, self.task = 0, True, None
                code = os.waitstatus_to_exitcode(status)
                kind = {-signal.SIGKILL: "blow", _BROKEN: "outside"}.get(code, "traceback")
                where = _of_stack(self._stack.read_text())
                return Outcome(name, number, kind, spent, 0.0, f"ended with {code}", where=where)
            self.task = None
            return Outcome(name, number, **result)
        used = self._cpu_time() - self._cpu
        # On a busy machine, waiting for a processor or a disk is not a hang.
        waits = used < spent / 20 and self._stat()[0] == "S"
        hangs = used > seconds or (spent > seconds and waits) or spent > 30 * seconds
        if not hangs:
            return None
        os.kill(self.pid, signal.SIGUSR1)  # writes the stack
        time.sleep(0.3)
        self.task = None
        mib = (_memory("VmHWM", self.pid) - self._size) / 2**20
        return Outcome(
            name, number, "hang", spent, mib, "hang", where=_of_stack(self._stack.read_text())
        )

    def end(self) -> None:
        self.pipe.close()
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def _cpu_time(self) -> float:
        return sum(map(int, self._stat()[11:13])) / os.sysconf("SC_CLK_TCK")

    def _stat(self) -> list[str]:
        """Return the process's state and the following fields of /proc/PID/stat."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()


def _work(
    pipe: Connection,
    readers: Mapping[str, Reader],
    seed: int,
    place: Path,
    memory: int,
    stack: Path,
) -> None:
    """Read the inputs that the parent requests, until there is a fault or the pipe ends."""
    home, inputs = place / "home", place / "in"
    home.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HOME": str(home), "TMPDIR": str(home), "HF_HUB_OFFLINE": "1"}
    tempfile.tempdir = str(home)
    os.chdir(home)
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(stack, "w") as file, open(home / "printed", "a+b") as printed:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        for descriptor in (1, 2):
            os.dup2(printed.fileno(), descriptor)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(i, "w", closefd=False), "utf-8", "backslashreplace")
            for i in (1, 2)
        )
        tame_output()  # as the command does
        watch = _Watch(place)
        start = _memory("VmRSS")
        while True:
            try:
                name, number = pipe.recv()
            except (EOFError, OSError):
                return
            shutil.rmtree(inputs, ignore_errors=True)
            inputs.mkdir()
            try:
                valid = make_input(readers[name], seed, name, number, inputs)
            except Exception as error:
                result = {
                    "outcome": "traceback",
                    "seconds": 0.0,
                    "error": f"no input: {error!r:.200}",
                }
            else:
                result = _outcome(readers[name], inputs, valid, watch, memory, printed)
            gc.collect()
            pipe.send((result, _memory("VmRSS") - start > _RECYCLE))


def _outcome(
    reader: Reader, folder: Path, valid: bool, watch: _Watch, memory: int, printed: Any
) -> dict[str, Any]:
    printed.truncate(0)
    before = _memory("VmRSS")
    _reset_peak()
    resource.setrlimit(
        resource.RLIMIT_AS, (_memory("VmSize") + memory + _ADDRESSES, resource.RLIM_INFINITY)
    )
    # Ends an endless loop even if the parent was killed.
    cpu = round(time.process_time()) + 600
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.RLIM_INFINITY))
    error: BaseException | None = None
    start = time.monotonic()
    watch.begin()
    try:
        reader.read(folder)
    except BaseException as raised:
        error = raised
    seconds = time.monotonic() - start
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    wrong = watch.end()
    grown = max(0, _memory("VmHWM") - before)
    result = {"outcome": "accepted", "seconds": seconds, "mib": grown / 2**20}
    if error is not None:
        result |= {"error": type(error).__name__, "message": str(error)[:300]}
        result["where"] = _where(error)
        result["outcome"] = "refused" if isinstance(error, (ValueError, OSError)) else "traceback"
        if result["outcome"] == "refused" and (bad := _bad_message(as_printed(str(error)))):
            result |= {"outcome": "traceback", "error": f"{result['error']}: {bad}"}
        elif result["outcome"] == "refused" and valid:
            result["outcome"] = "lost"
    sys.stdout.flush()
    sys.stderr.flush()
    printed.seek(0)
    text = printed.read(1 << 20).decode("utf-8", "replace").replace("\n", "").replace("\r", "")
    if result["outcome"] in ("accepted", "refused") and (bad := _bad_message(text, longest=None)):
        result |= {"outcome": "traceback", "error": f"printed: {bad}", "message": text[:300]}
    if grown > memory or _is_of_memory(error):
        result["outcome"] = "blow"
    if wrong:
        result |= {"outcome": "outside", "error": "outside", "message": wrong}
    return result


def _bad_message(text: str, longest: int | None = LONGEST) -> str:
    """Return the problem of a message; "" = none."""
    if longest is not None and len(text) > longest:
        return f"{len(text)} characters"
    bad = next((c for c in text if not (c.isprintable() or c in "\t\ufffd")), None)
    return "" if bad is None else f"has {bad!a}"


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether an allocation failed, also if it is the cause of another error."""
    while error is not None:
        text = str(error) if isinstance(error, (RuntimeError, OSError)) else ""
        if isinstance(error, MemoryError) or "allocate memory" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def _where(error: BaseException) -> str:
    """Return the innermost line of the package in the traceback of an exception or its cause."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    frames = traceback.extract_tb(error.__traceback__) or traceback.extract_tb(inner.__traceback__)
    own_frames = [f for f in frames if "/zsnr/" in f.filename and "site-packages" not in f.filename]
    last = (own_frames or frames)[-1:]
    return "".join(f"{Path(f.filename).name}:{f.lineno}:{f.name}" for f in last)


def _of_stack(stack: str) -> str:
    """Return the innermost line of the package in faulthandler's stack of the main thread."""
    lines = [line.strip() for line in stack.splitlines() if "/zsnr/" in line]
    if not lines:
        return ""
    path, _, rest = lines[0].removeprefix('File "').partition('", line ')
    number, _, function = rest.partition(" in ")
    return f"{Path(path).name}:{number}:{function}"


def _memory(name: str, pid: int | str = "self") -> int:
    """Read a memory size of a process from /proc, in bytes; 0 = it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise OSError("The peak memory cannot be reset: this needs Linux.") from error


class _Watch:
    """Detects writes outside of a folder, and changes of the process."""

    def __init__(self, place: Path) -> None:
        self._place = f"{os.path.realpath(place)}/"
        self._active = False
        self._wrong: list[str] = []
        sys.addaudithook(self._hear)

    def begin(self) -> None:
        self._state = _state()
        self._wrong.clear()
        self._active = True

    def end(self) -> str:
        """Return the problems; "" = none."""
        self._active = False
        now = _state()
        for name, was in self._state.items():
            if now[name] != was:
                keys = [k for k in {**was, **now[name]} if was.get(k) != now[name].get(k)]
                self._wrong.append(f"{name} changed: {keys[0]}")
        return "; ".join(self._wrong[:3])[:300]

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        paths: Iterable[Any] = ()
        if event == "open":
            path, _, flags = arguments
            paths = [path] if isinstance(flags, int) and flags & _WRITES else []
        elif event in _EVENTS:
            paths = [arguments[i] for i in _EVENTS[event]]
        elif event in _NEVER:
            self._wrong.append(f"{event} {arguments!r:.200}")
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                real = _real(os.fsdecode(path), follows=event not in _OF_LINKS)
                if not real.startswith(self._place) and real != "/dev/null":
                    self._wrong.append(f"{event} {real:.200}")


def _real(path: str, follows: bool) -> str:
    """Resolve the links of a path, and of its last part only if the event follows it."""
    if follows:
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _state() -> dict[str, dict[Any, Any]]:
    """Describe the state that no input may change."""
    modules = (filesystem, metadata)
    classes = {
        *(pathlib.Path, pathlib.PosixPath, pathlib.PurePath, pathlib.PurePosixPath),
        *(torch.Size, torch.Tensor, torch.dtype, torch.nn.Parameter, dict, list, type(None)),
        *(
            value
            for module in modules
            for value in vars(module).values()
            if isinstance(value, type)
        ),
    }
    for cls in classes:
        getattr(cls, "__annotations__", None)  # Python stores them when they are first asked for
    state: dict[str, dict[Any, Any]] = {
        cls.__qualname__: {name: id(value) for name, value in vars(cls).items()} for cls in classes
    }
    return state | {
        # A config of fit may set a seed, which Lightning stores there.
        "os.environ": {k: v for k, v in os.environ.items() if not k.startswith("PL_")},
        "process": {
            "cwd": os.getcwd(),
            "sys.path": tuple(sys.path),
            "recursion limit": sys.getrecursionlimit(),
            "default dtype": torch.get_default_dtype(),
        },
    }


def table(outcomes: Sequence[Outcome]) -> str:
    """Count the outcomes of each reader, with the longest time and the most memory."""
    lines = [
        f"| reader | inputs | {' | '.join(OUTCOMES)} | longest, s | most, MiB |",
        "|---" * (len(OUTCOMES) + 4) + "|",
    ]
    names = sorted({outcome.reader for outcome in outcomes})
    for name in [*names, "all"]:
        selected = [o for o in outcomes if name in (o.reader, "all")]
        counts = Counter(o.outcome for o in selected)
        cells = [str(counts[kind]) for kind in OUTCOMES]
        longest, largest = max(o.seconds for o in selected), max(o.mib for o in selected)
        lines.append(
            f"| {name} | {len(selected)} | {' | '.join(cells)} | {longest:.1f} | {largest:.0f} |"
        )
    return "\n".join(lines)


def distinct(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """Group faults by kind, reader, error and place, the worst kinds first."""
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for o in outcomes:
        if o.outcome in FAULTS:
            groups.setdefault((o.outcome, o.reader, o.error.partition(":")[0], o.where), []).append(
                o
            )
    worst = ("outside", "hang", "blow", "traceback", "lost")
    return sorted(groups.values(), key=lambda group: (worst.index(group[0].outcome), -len(group)))


def fault_text(group: Sequence[Outcome]) -> str:
    """Describe a group of faults, with the numbers that recreate some of them."""
    o = group[0]
    numbers = ", ".join(str(outcome.number) for outcome in group[:4]) + ", ..." * (len(group) > 4)
    message = ascii(" ".join(o.message.split()))[1:-1]
    return (
        f"{o.outcome} {o.reader} [{numbers}] x{len(group)}: {ascii(o.error)[1:-1]} at {o.where}, "
        f"{o.seconds:.1f} s, {o.mib:.0f} MiB: {message:.200}"
    )


def show_one(readers: Mapping[str, Reader], name: str, number: int, seed: int) -> int:
    """Make and save one input, read it here without limits, and show the full traceback."""
    readers[name].prepare()
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name.replace(' ', '-')}-{number}-"))
    valid = make_input(readers[name], seed, name, number, folder)
    print(f"{folder}: {'valid' if valid else 'damaged'}", flush=True)
    for path in sorted(folder.rglob("*")):
        print(f"  {str(path.relative_to(folder))!a} {path.lstat().st_size}", flush=True)
    [outcome] = run(readers, [(name, number)], seed, processes=1)
    print(json.dumps(asdict(outcome), indent=1), flush=True)
    if outcome.outcome in ("traceback", "lost", "refused"):
        readers[name].read(folder)
    return int(outcome.outcome in FAULTS)


def main() -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--inputs", type=int, default=10_000, help="number of inputs (default 10000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default 0)")
    parser.add_argument("--reader", action="append", choices=sorted(READERS), help="only this one")
    parser.add_argument("--input", type=int, help="make and show only this input of --reader")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/")
    arguments = parser.parse_args()
    if arguments.input is not None:
        if len(arguments.reader or []) != 1:
            parser.error("--input needs one --reader")
        return show_one(READERS, arguments.reader[0], arguments.input, arguments.seed)
    readers = {name: READERS[name] for name in arguments.reader or READERS}
    tasks = plan(readers, arguments.inputs)
    start, done = time.monotonic(), 0

    def progress(outcome: Outcome) -> None:
        nonlocal done
        done += 1
        if outcome.outcome in FAULTS:
            print(fault_text([outcome]), file=sys.stderr, flush=True)
        if done % 500 == 0:
            print(f"{done} of {len(tasks)}, {time.monotonic() - start:.0f} s", file=sys.stderr)

    outcomes = run(readers, tasks, arguments.seed, on_outcome=progress)
    minutes = (time.monotonic() - start) / 60
    faults = [outcome for outcome in outcomes if outcome.outcome in FAULTS]
    text = table(outcomes)
    print(text, *map(fault_text, distinct(outcomes)), sep="\n")
    if arguments.write:
        _write(text, outcomes, faults, arguments.seed, minutes)
    return int(bool(faults))


def _write(
    text: str, outcomes: Sequence[Outcome], faults: Sequence[Outcome], seed: int, minutes: float
) -> None:
    results = Path(__file__).parent / "results"
    packages = ("torch", "pillow", "pyarrow", "safetensors")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    faults_text = "\n".join(f"- {ascii(fault_text(group))[1:-1]}" for group in distinct(faults))
    (results / "fuzz.md").write_text(
        f"# Damaged and hostile files\n\n{date.today()}, {versions}, Python "
        f"{platform.python_version()}, {platform.machine()}; {len(outcomes)} inputs of seed {seed} "
        f"in {minutes:.1f} minutes, two processes; limits of {SECONDS:g} s and "
        f"{MEMORY >> 30} GiB per input.\nMade by `python benchmarks/fuzz.py --write`, whose "
        f"docstring describes the columns.\n\n{text}\n"
        + (f"\n{faults_text}\n" if faults_text else "")
    )
    lines = results / "fuzz.jsonl"
    lines.unlink(missing_ok=True)
    if faults:
        lines.write_text("".join(json.dumps({"seed": seed, **asdict(o)}) + "\n" for o in faults))


if __name__ == "__main__":
    sys.exit(main())
