"""Bytes of shards, wherever they are: a range of a file or of a server's object, with retries."""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import selectors
import signal
import ssl
import stat
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import IncompleteRead, RemoteDisconnected
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import unquote

from zsnr.data.local_cache import Copy, LocalCache
from zsnr.public import public_url

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from urllib3 import BaseHTTPResponse, PoolManager

LONGEST_WAIT = 60.0  # seconds between two tries, unless a server asks for more
SLOWEST = 16 * 1024  # bytes per second below which a server counts as stalled
PACKAGES = {  # of fsspec's protocols
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}
_SECRET = r"auth|cookie|token|key|secret|password|credential"  # names of headers that hold one
_VARIABLE = r"\$\{(\w+)\}"
_CHUNK = 8 << 20  # bytes of one request of a whole shard
_LASTING = (  # errors of files that no waiting mends
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EROFS),
)
_LOG = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Retries:
    """Retry policy for transient errors of local disks, servers and object storage.

    Args:
        attempts: Tries of one read in quick succession.
        backoff: Seconds before the second try; each later wait is twice as long, up to 60. A
            server that names a time (Retry-After) is asked again then, within `outage`.
        timeout: Seconds without a byte, or to connect, after which a server counts as stalled.
            One try of n bytes takes at most so long and n / 16384 seconds.
        outage: Seconds for which a read that has failed is tried before the run stops, beyond its
            quick tries. 0 = the run stops after those.

    Raises:
        ValueError: A number makes no sense.
    """

    attempts: int = 5
    backoff: float = 0.5
    timeout: float = 30.0
    outage: float = 600.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff < 0 or self.timeout <= 0 or self.outage < 0:
            raise ValueError(
                f"{self}: wanted attempts of 1 or more, a backoff of 0 or more, a timeout above 0 "
                "and an outage of 0 or more."
            )


class StorageError(OSError):
    """Storage has failed for good. The data may be whole, so nothing may take their place."""


class NoRangesError(StorageError):
    """A source gives its bytes only from the beginning to the end, and has no local cache."""


NOT_A_FILE = "not a file, but a folder, a pipe, a device or a link to itself"


class NotAFileError(StorageError):
    """Something else has the name of a file."""


class _PassingError(Exception):
    """What may go well the next time."""

    def __init__(self, reason: str, detail: str = "", wait: float = 0.0) -> None:
        super().__init__(reason, detail, wait)
        self.reason, self.wait = reason, wait  # short and stable; seconds that a server asks for
        self.text = " ".join(f"{reason}: {detail}".split()) if detail else reason


def is_remote(url: str) -> bool:
    """Whether it has a scheme (http, s3, memory, pipe, ...); "file:" and paths are local."""
    return not url.startswith("file:") and ("://" in url or url.startswith("pipe:"))


def local_path(url: str) -> Path:
    """Return the path that a local url means: "~" and "file:" resolved."""
    if url.startswith("file:"):
        return Path(unquote(url.removeprefix("file:").removeprefix("//")))
    return Path(os.path.expanduser(url))  # pathlib's refuses ~x where no user has that name


class Storage:
    """Reads files, http servers, what fsspec reads (s3://, gs://, memory://, ...) and `pipe:`.

    May be used by several threads, pickled and forked: connections belong to one process and are
    opened when they are needed. The first size of an object that is seen must stay its size.

    Args:
        retries: Of all reads.
        on_fault: Called with (url, reason) for each passing fault that will be retried. Reasons
            are short and stable: "HTTP 503", "connection reset", "stalled for 30 s", ...
        headers: Of requests to http servers. "${NAME}" in a value is the environment's NAME. They
            are not sent on to another host.
        local_cache: Keeps whole remote objects on local disk. None = their parts are read where
            they are.

    Raises:
        ValueError: A header names no variable of the environment, or holds a secret.
    """

    def __init__(
        self,
        retries: Retries = Retries(),
        on_fault: Callable[[str, str], None] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        local_cache: LocalCache | None = None,
    ) -> None:
        self.retries, self.on_fault = retries, on_fault
        self.headers, self.local_cache = dict(headers or {}), local_cache
        self._sent = _expanded(self.headers)
        self._sizes: dict[str, int] = {}
        self._failing: set[str] = set()
        self._pools: dict[int, PoolManager] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": self._sizes.copy(), "_pools": {}, "_failing": set()}

    def reporting(self, on_fault: Callable[[str, str], None] | None) -> Storage:
        """Return one with the same settings that reports to another listener."""
        return Storage(self.retries, on_fault, headers=self.headers, local_cache=self.local_cache)

    def check_source(self, url: str) -> None:
        """Refuse a command where there is no local cache to keep what it prints.

        Raises:
            NoRangesError: It is one.
        """
        if self.local_cache is None:
            _refuse_pipe(url)

    def size(self, url: str) -> int:
        """Return the bytes of the whole object.

        Raises:
            FileNotFoundError: There is no such object.
            PermissionError: It may not be read.
            NoRangesError: Its bytes come only from the beginning to the end: set a local cache.
            StorageError: It failed for good, or has another size than before.
        """
        if not is_remote(url):
            return self._retrying(url, partial(self._ask_local, url))
        if self.local_cache is not None:
            return self._retrying(url, partial(self._copy_size, url, self._told_size(url)))
        return self._remote_size(url)

    def read(self, url: str, offset: int, size: int, expected_size: int | None = None) -> bytes:
        """Return exactly `size` bytes from `offset` on.

        Args:
            offset: First byte.
            size: Number of bytes.
            expected_size: Of the whole object. None = what it was at the first read.

        Raises:
            EOFError: The object ends before.
            OSError: As `size` raises.
        """
        if not size:
            return b""
        if is_remote(url) and self.local_cache is None:
            return self._remote_read(url, offset, size, expected_size)
        return self._retrying(url, partial(self._read_file, url, offset, size, expected_size))

    def glob(self, pattern: str) -> list[str]:
        """List the addresses of object storage that match a pattern, sorted.

        Raises:
            OSError: As `size` raises.
        """
        return self._retrying(pattern, partial(_matches, pattern))

    def open(self, url: str, block: int | None = None) -> BinaryIO:
        """Open for reading and seeking.

        Args:
            block: Bytes of one read at least. None = a mebibyte of what is remote, 16 KiB of files.

        Raises:
            OSError: As `size` raises.
        """
        remote = is_remote(url) and self.local_cache is None
        kind = _Ranges if remote else _File
        return io.BufferedReader(
            kind(self, url, self.size(url)), block or (1 << 20 if remote else 16 << 10)
        )

    def _retrying(self, url: str, attempt: Callable[[], T]) -> T:
        """Try quickly, and then with the longer patience for outages."""
        wait, tries, began = self.retries.backoff, 0, 0.0
        while True:
            try:
                result = attempt()
            except _PassingError as fault:
                tries += 1
                began = began or time.monotonic()
                left = began + self.retries.outage - time.monotonic()
                pause = min(wait, LONGEST_WAIT)
                pause = max(pause, min(fault.wait, max(LONGEST_WAIT, left)))
                if tries >= self.retries.attempts:
                    self._bear(url, tries, fault, left)
                    pause, wait = min(max(pause, 1.0), left), max(wait, 0.5)
                if self.on_fault is not None:
                    self.on_fault(url, fault.reason)
            else:
                if tries >= self.retries.attempts:
                    self._failing.discard(public_url(url).rpartition("/")[0])
                return result
            time.sleep(pause)
            wait *= 2

    def _bear(self, url: str, tries: int, fault: _PassingError, left: float) -> None:
        """Say once that storage does not answer, and give up when the patience is at its end."""
        name = public_url(url)
        failed = f"{name} failed {tries} times, the last time with {fault.text}".replace(url, name)
        if left <= 0:
            raise StorageError(
                f"{failed}: wanted storage that answers. Raise data.retries.outage (now "
                f"{self.retries.outage:g} s) to wait longer for it."
            ) from fault
        if (place := name.rpartition("/")[0]) not in self._failing:
            self._failing.add(place)
            _LOG.warning(f"zsnr: warning: {failed}: trying for another {left:.0f} s.")

    def _same_size(self, url: str, total: int, expected: int | None = None) -> int:
        first = self._sizes.setdefault(url, total)
        wanted = first if expected is None else expected
        if total != wanted:
            raise StorageError(
                f"{public_url(url)} changed size from {wanted} to {total} since it was indexed: "
                "index it again."
            )
        return total

    # Files

    def _ask_local(self, url: str) -> int:
        with _open_local(url) as file, _passing_local():
            return self._same_size(url, os.fstat(file.fileno()).st_size)

    def _read_file(self, url: str, offset: int, size: int, expected: int | None) -> bytes:
        with self._open_file(url, expected) as file:
            return self._read_open(file, url, offset, size, expected)

    def _open_file(self, url: str, expected: int | None) -> BinaryIO:
        return self._copy(url, expected) if is_remote(url) else _open_local(url)

    def _read_open(
        self, file: BinaryIO, url: str, offset: int, size: int, expected: int | None
    ) -> bytes:
        with _passing_local():
            total = self._same_size(url, os.fstat(file.fileno()).st_size, expected)
            _refuse_end(url, offset, size, total)
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise _PassingError("cut short")
        return data

    # The local cache

    def _copy(self, url: str, size: int | None) -> BinaryIO:
        """Open the local copy of an object; one of another size than `size` is made again."""
        assert self.local_cache is not None
        name = public_url(url).rpartition("/")[2]
        fill = partial(self._download, url, size)
        with _passing_local(f"data.local_cache.folder={self.local_cache.folder}"):
            file = self.local_cache.open(url, name, fill)
            if size is not None and os.fstat(file.fileno()).st_size != size:
                file.close()
                self.local_cache.forget(url, name)
                file = self.local_cache.open(url, name, fill)
        return file

    def _copy_size(self, url: str, size: int | None) -> int:
        with self._copy(url, size) as file:
            return self._same_size(url, os.fstat(file.fileno()).st_size)

    def _told_size(self, url: str) -> int | None:
        """Return an object's size, if it is told without reading all of it."""
        if not url.startswith("pipe:"):
            with suppress(NoRangesError):
                return self._remote_size(url)
        return None

    def _download(self, url: str, size: int | None, copy: Copy) -> None:
        """Write a whole object; `size` is what it should have."""
        if url.startswith("pipe:"):
            whole: Callable[[], Generator[bytes]] = partial(_output, url, self.retries.timeout)
        else:
            try:
                total = self._remote_size(url)
            except NoRangesError:
                whole = partial(self._body, url)
            else:
                copy.reserve(self._same_size(url, total, size))
                for offset in range(0, total, _CHUNK):
                    count = min(_CHUNK, total - offset)
                    copy.write(self._remote_read(url, offset, count, total))
                return
        lengths: list[int] = []
        if size is not None:
            copy.reserve(size)
        self._retrying(url, partial(_write_whole, copy, whole, size, lengths))

    # Servers

    def _remote_size(self, url: str) -> int:
        _refuse_pipe(url)
        ask = self._ask_http if _is_http(url) else self._ask_other
        return self._retrying(url, partial(ask, url))

    def _remote_read(self, url: str, offset: int, size: int, expected: int | None) -> bytes:
        _refuse_pipe(url)
        read = self._read_http if _is_http(url) else self._read_other
        return self._retrying(url, partial(read, url, offset, size, expected))

    def _pool(self) -> PoolManager:
        from urllib3 import PoolManager

        process = os.getpid()
        if process not in self._pools:
            self._pools.setdefault(process, PoolManager(num_pools=16, maxsize=64))
        return self._pools[process]

    def _get(self, url: str, span: str | None = None) -> BaseHTTPResponse:
        """Ask for the object, or for a span of it; the answer's status is 200, or 206 or 416."""
        from urllib3 import Retry, Timeout
        from urllib3.exceptions import LocationValueError

        headers = {"Accept-Encoding": "identity", **_basic(url), **self._sent}
        if span:
            headers["Range"] = f"bytes={span}"
        timeout = self.retries.timeout
        try:
            with _passing(url, timeout):
                response = self._pool().request(
                    "GET",
                    url,
                    headers=headers,
                    timeout=Timeout(connect=timeout, read=timeout),
                    retries=Retry(
                        None,
                        connect=False,
                        read=False,
                        other=0,
                        redirect=5,
                        raise_on_redirect=False,
                        remove_headers_on_redirect=headers.keys() - {"Accept-Encoding", "Range"},
                    ),
                    preload_content=False,
                    decode_content=False,
                )
        except LocationValueError as error:
            raise ValueError(f"{public_url(url)}: {error} Wanted http://HOST/PATH.") from error
        status = response.status
        if status == 200 or (span and status in (206, 416)):
            return response
        _drop(response)
        name = public_url(url)
        if status in (404, 410):
            raise FileNotFoundError(f"{name} is not there (HTTP {status}).")
        if status in (401, 403):
            raise PermissionError(
                f"{name} may not be read (HTTP {status}): data.headers may hold credentials."
            )
        if status in (408, 429) or status >= 500:
            raise _PassingError(f"HTTP {status}", wait=_asked_wait(response))
        raise StorageError(f"{name} answers HTTP {status}: wanted {'206' if span else '200'}.")

    def _ask_http(self, url: str) -> int:
        with self._span(url, "0-0") as (response, _, total):
            if total is None:
                raise NoRangesError(f"{public_url(url)}: the server tells no size. {_WAY_OUT}")
            with _passing(url, self.retries.timeout):
                response.read1(1)
            return self._same_size(url, total)

    def _read_http(self, url: str, offset: int, size: int, expected_size: int | None) -> bytes:
        with self._span(url, f"{offset}-{offset + size - 1}") as (response, start, total):
            if total is not None:
                _refuse_end(url, offset, size, self._same_size(url, total, expected_size))
            if start != offset:
                raise StorageError(
                    f"{public_url(url)} answers HTTP {response.status} with bytes from {start} on: "
                    f"wanted them from {offset} on."
                )
            data = b"".join(self._content(url, response, size))
            if len(data) < size:
                raise _PassingError("body cut short")
            return data

    def _body(self, url: str) -> Generator[bytes]:
        """Give the bytes of an object that comes only as a whole."""
        response = self._get(url)
        try:
            yield from self._content(url, response)
        finally:
            _drop(response)

    def _content(
        self, url: str, response: BaseHTTPResponse, size: int | None = None
    ) -> Iterator[bytes]:
        """Give what a server sends, up to a size, unless it is too slow."""
        timeout, count = self.retries.timeout, 0
        began = time.monotonic()
        while count != size:
            with _passing(url, timeout):
                part = response.read1(1 << 18 if size is None else min(size - count, 1 << 18))
            if not part:
                return
            count += len(part)
            if time.monotonic() - began > timeout + (size or count) / SLOWEST:
                raise _PassingError(f"slower than {SLOWEST // 1024} KiB/s")
            yield part

    @contextmanager
    def _span(
        self, url: str, span: str
    ) -> Iterator[tuple[BaseHTTPResponse, int | None, int | None]]:
        """Give the answer, its first byte's place and the object's size, where they are told."""
        response = self._get(url, span)
        try:
            if response.status == 200:
                raise NoRangesError(
                    f"{public_url(url)}: the server gives no byte ranges. {_WAY_OUT}"
                )
            told = response.headers.get("Content-Range", "")
            start, total = (
                int(found[1]) if (found := re.match(pattern, told)) else None
                for pattern in (r"bytes (\d+)-", r"bytes .*/(\d+)$")
            )
            yield response, start, total
        finally:
            _drop(response)

    def _ask_other(self, url: str) -> int:
        with _passing_other():
            files, path = _filesystem(url)
            total = files.info(path).get("size")
        if total is None:
            raise StorageError(f"{public_url(url)} tells no size: wanted a file.")
        return self._same_size(url, total)

    def _read_other(self, url: str, offset: int, size: int, expected_size: int | None) -> bytes:
        total = self._sizes.get(url)
        if total is None:
            total = self._ask_other(url)
        _refuse_end(url, offset, size, self._same_size(url, total, expected_size))
        with _passing_other():
            files, path = _filesystem(url)
            data: bytes = files.cat_file(path, start=offset, end=offset + size)
        if len(data) != size:
            raise _PassingError("body cut short")
        return data


_WAY_OUT = (
    "Set data.local_cache to a folder that keeps whole shards, such as "
    "{folder: /scratch/shards, max_gib: 200}."
)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def check_headers(headers: Mapping[str, str]) -> None:
    """Refuse headers that hold a secret which saved configs would show.

    Raises:
        ValueError: A header for credentials names no variable of the environment.
    """
    for name, value in headers.items():
        if re.search(_SECRET, name.lower()) and not re.search(_VARIABLE, value):
            raise ValueError(
                f"data.headers.{name} holds a secret that saved configs would show: put it into "
                f"the environment, and write {name}: ${{NAME}}."
            )


def _expanded(headers: Mapping[str, str]) -> dict[str, str]:
    """Put the environment's values into headers."""
    check_headers(headers)
    sent = {}
    for name, value in headers.items():
        for variable in re.findall(_VARIABLE, value):
            if variable not in os.environ:
                raise ValueError(f"data.headers.{name}: the environment has no {variable}: set it.")
            value = value.replace(f"${{{variable}}}", os.environ[variable].strip())
        if not (value.isascii() and value.isprintable()):
            raise ValueError(f"data.headers.{name}: wanted printable ASCII characters only.")
        sent[name] = value
    return sent


def _basic(url: str) -> dict[str, str]:
    """Return the header of an address with user and password."""
    from urllib3.util import make_headers

    user = re.match(r"\w+://([^/?#]*)@", url)
    if user is None:
        return {}
    return {"Authorization": make_headers(basic_auth=unquote(user[1]))["authorization"]}


def _asked_wait(response: BaseHTTPResponse) -> float:
    """Return the seconds that a server asks to wait, by Retry-After; 0 = it does not say."""
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    try:
        return Retry().get_retry_after(response) or 0.0
    except (InvalidHeader, OverflowError, ValueError):
        return 0.0


def _write_whole(
    copy: Copy, whole: Callable[[], Generator[bytes]], size: int | None, lengths: list[int]
) -> None:
    """Write an object from its beginning to its end, and look whether that was all.

    Twice the same number of bytes is what there is, also if a tar file should go on.
    """
    copy.restart()
    with closing(whole()) as parts:
        for part in parts:
            copy.write(part)
    complete = copy.tail == bytes(512) if size is None else copy.size == size
    if not complete and copy.size not in lengths:
        lengths.append(copy.size)
        raise _PassingError("cut short", f"{copy.size} bytes without the end of a tar file")


def _output(url: str, timeout: float) -> Generator[bytes]:
    """Give what the command of a `pipe:` prints.

    Raises:
        StorageError: There is no such command.
    """
    process = subprocess.Popen(
        url.removeprefix("pipe:"),
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not ready.select(timeout):
                    raise _PassingError(f"stalled for {timeout:g} s")
                part = process.stdout.read(1 << 20)
                if not part:
                    break
                yield part
        status = process.wait()
        if status in (126, 127):
            raise StorageError(
                f"{public_url(url)} ended with exit status {status}: the shell cannot start it."
            )
        if status:
            raise _PassingError(f"exit status {status}")
    finally:
        process.stdout.close()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it has started
        process.wait()


@contextmanager
def _passing_local(place: str = "") -> Iterator[None]:
    """Name the faults of a disk, and where it is unless the address says it."""
    try:
        yield
    except (StorageError, FileNotFoundError, PermissionError):
        raise
    except OSError as error:
        if error.errno in _LASTING:
            raise
        reason = type(error).__name__ if error.errno is None else os.strerror(error.errno)
        raise _PassingError(reason, place) from error


def _open_local(url: str) -> BinaryIO:
    path = local_path(url)
    try:
        with _passing_local():
            file = open(path, "rb", opener=_not_waiting)  # noqa: SIM115 - the caller closes it
            with ExitStack() as closing_it:
                closing_it.push(file)
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    closing_it.pop_all()
                    return file
    except FileNotFoundError as error:
        if _holds_files(path.parent):
            raise
        raise _PassingError("its folder is empty or missing") from error  # a disk that is not there
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
    raise NotAFileError(f"{path} is {NOT_A_FILE}.")


def _not_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a pipe waits for somebody who writes to it


def _holds_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _refuse_pipe(url: str) -> None:
    if url.startswith("pipe:"):
        raise NoRangesError(f"{public_url(url)} comes only as a whole. {_WAY_OUT}")


def _refuse_end(url: str, offset: int, size: int, total: int) -> None:
    if offset + size > total:
        raise EOFError(f"{public_url(url)} has {total} bytes: wanted {size} from {offset} on.")


def _drop(response: BaseHTTPResponse) -> None:
    """Give the connection back, closed if there are bytes left that nobody wants to wait for."""
    response.close()
    response.release_conn()


@contextmanager
def _passing(url: str, timeout: float) -> Iterator[None]:
    """Name the faults of a connection."""
    from urllib3 import exceptions

    try:
        yield
    except exceptions.LocationValueError:
        raise
    except (exceptions.HTTPError, OSError) as error:
        fault = (isinstance(error, exceptions.MaxRetryError) and error.reason) or error
        if isinstance(fault, exceptions.NameResolutionError):
            raise _PassingError("unknown host") from error
        if isinstance(fault, exceptions.TimeoutError) and not isinstance(
            fault, exceptions.NewConnectionError
        ):
            raise _PassingError(f"stalled for {timeout:g} s") from error
        inner = (e for e in (*fault.args, fault.__cause__) if isinstance(e, Exception))
        cause = next(inner, fault)
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise StorageError(f"{public_url(url)}: {cause}.") from error
        reasons = {
            ConnectionRefusedError: "connection refused",
            RemoteDisconnected: "connection closed",
            ConnectionError: "connection reset",
            IncompleteRead: "body cut short",
        }
        known = (reason for kind, reason in reasons.items() if isinstance(cause, kind))
        raise _PassingError(next(known, type(cause).__name__)) from error


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        filesystem: tuple[Any, str] = url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(url.partition("://")[0])
        raise ValueError(
            f"{public_url(url)}: {error}" + f": `pip install {package}`." * bool(package)
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{public_url(url)}: {error}. Wanted a path, http(s)://, pipe:COMMAND or what fsspec "
            f"knows, such as {', '.join(f'{name}://' for name in PACKAGES)}."
        ) from error
    return filesystem


def _matches(pattern: str) -> list[str]:
    with _passing_other():
        files, path = _filesystem(pattern)
        files.invalidate_cache()  # an empty answer may have been an outage's
        found = sorted(files.glob(path))
    scheme = pattern.partition("://")[0]
    return [f"{scheme}://{name.lstrip('/')}" for name in found]


@contextmanager
def _passing_other() -> Iterator[None]:
    """Name the faults of a file system; its client has exceptions of its own."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
        raise
    except Exception as error:
        if type(error).__module__ == "builtins" and not isinstance(error, OSError):
            raise
        raise _PassingError(type(error).__name__, str(error)) from error


class _Ranges(io.RawIOBase):
    """An object read by ranges."""

    def __init__(self, storage: Storage, url: str, size: int) -> None:
        self._storage, self._url, self._size, self._position = storage, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(
                f"{public_url(self._url)}: wanted a position of 0 or more, not {start + offset}."
            )
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        count = max(min(len(view), self._size - self._position), 0)
        if count:
            view[:count] = self._read(count)
        self._position += count
        return count

    def _read(self, count: int) -> bytes:
        return self._storage.read(self._url, self._position, count, self._size)


class _File(_Ranges):
    """A file, or the local copy of an object, that stays open until a read fails."""

    _file: BinaryIO | None = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def _read(self, count: int) -> bytes:
        return self._storage._retrying(self._url, partial(self._attempt, count))

    def _attempt(self, count: int) -> bytes:
        storage, url, size = self._storage, self._url, self._size
        if self._file is None:
            self._file = storage._open_file(url, size)
        try:
            return storage._read_open(self._file, url, self._position, count, size)
        except _PassingError:
            self._file.close()
            self._file = None
            raise
