"""Reading of byte ranges from local files and remote objects, with retries."""

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
from zsnr.remote import filesystem

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from urllib3 import BaseHTTPResponse, PoolManager

LONGEST_WAIT = 60.0  # seconds between two attempts, unless a server asks for more
SLOWEST = 16 * 1024  # bytes per second below which a server counts as stalled
_SECRET = r"auth|cookie|token|key|secret|password|credential"  # in names of secret headers
_VARIABLE = r"\$\{(\w+)\}"
_CHUNK = 8 << 20  # bytes of one request when a whole shard is downloaded
_LASTING = (  # errors of files that do not pass by waiting
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.EROFS),
)
_LOG = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Retries:
    """Retry policy for transient errors of local disks, servers and object storage.

    Args:
        attempts: Number of attempts of one read in quick succession.
        backoff: Seconds before the second attempt; each later wait is twice as long, up to 60. A
            time that the server requests (Retry-After) is respected, within `outage`.
        timeout: Seconds without a byte, or to connect, after which a server counts as stalled.
            One attempt for n bytes takes at most `timeout` + n / 16384 seconds.
        outage: Seconds for which a failed read is retried, after the quick attempts, before the run
            stops. 0 = the run stops after the quick attempts.

    Raises:
        ValueError: A number is out of range.
    """

    attempts: int = 5
    backoff: float = 0.5
    timeout: float = 30.0
    outage: float = 600.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff < 0 or self.timeout <= 0 or self.outage < 0:
            raise ValueError(
                f"{self}: wanted attempts >= 1, backoff >= 0, timeout > 0 and outage >= 0."
            )


class StorageError(OSError):
    """Storage failed permanently. The data may be intact, so the sample must not be replaced."""


class NoRangesError(StorageError):
    """A source can only be read sequentially, and has no local cache."""


NOT_A_FILE = "not a file, but a folder, a pipe, a device or a link to itself"


class NotAFileError(StorageError):
    """The path exists, but is not a file."""


class _PassingError(Exception):
    """A transient error; the next attempt may succeed."""

    def __init__(self, reason: str, detail: str = "", wait: float = 0.0) -> None:
        super().__init__(reason, detail, wait)
        self.reason, self.wait = reason, wait  # short and stable; seconds that a server asks for
        self.text = " ".join(f"{reason}: {detail}".split()) if detail else reason


def is_remote(url: str) -> bool:
    """Whether an address has a scheme (http, s3, memory, pipe, ...); "file:" and paths do not."""
    return not url.startswith("file:") and ("://" in url or url.startswith("pipe:"))


def local_path(url: str) -> Path:
    """Return the path of a local url, with "~" and "file:" resolved."""
    if url.startswith("file:"):
        return Path(unquote(url.removeprefix("file:").removeprefix("//")))
    return Path(os.path.expanduser(url))  # pathlib's expanduser fails if no user is named x in ~x


class Storage:
    """Reads files, http servers, fsspec's storage (s3://, gs://, memory://, ...) and `pipe:`.

    May be shared by threads, pickled and forked: connections belong to one process and are opened
    on demand. The size of an object must not change after it is first seen.

    Args:
        retries: Retry policy of all reads.
        on_fault: Called with (url, reason) for each passing fault that will be retried. Reasons
            are short and stable: "HTTP 503", "connection reset", "stalled for 30 s", ...
        headers: Headers of requests to http servers. "${NAME}" in a value is replaced by the
            environment variable NAME. Redirects to another host do not carry them.
        local_cache: Cache of whole remote objects on local disk. None = ranges are read remotely.

    Raises:
        ValueError: A header uses an undefined environment variable, or holds a secret.
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
        """Return a storage with the same settings that reports to another listener."""
        return Storage(self.retries, on_fault, headers=self.headers, local_cache=self.local_cache)

    def check_source(self, url: str) -> None:
        """Refuse a command if there is no local cache to store its output.

        Raises:
            NoRangesError: The url is a command, and there is no local cache.
        """
        if self.local_cache is None:
            _refuse_pipe(url)

    def size(self, url: str) -> int:
        """Return the size of the object in bytes.

        Raises:
            FileNotFoundError: There is no such object.
            PermissionError: The object may not be read.
            NoRangesError: The object can only be read sequentially, and there is no local cache.
            StorageError: Storage failed permanently, or the size has changed.
        """
        if not is_remote(url):
            return self._retrying(url, partial(self._ask_local, url))
        if self.local_cache is not None:
            return self._retrying(
                url, partial(self._copy_size, url, self._size_without_download(url))
            )
        return self._remote_size(url)

    def read(self, url: str, offset: int, size: int, expected_size: int | None = None) -> bytes:
        """Return exactly `size` bytes from `offset` on.

        Args:
            offset: First byte.
            size: Number of bytes.
            expected_size: Size of the whole object. None = its size at the first read.

        Raises:
            EOFError: The object ends before the range does.
            OSError: As in `size`.
        """
        if not size:
            return b""
        if is_remote(url) and self.local_cache is None:
            return self._remote_read(url, offset, size, expected_size)
        return self._retrying(url, partial(self._read_file, url, offset, size, expected_size))

    def glob(self, pattern: str) -> list[str]:
        """List the addresses of object storage that match a pattern, sorted.

        Raises:
            OSError: As in `size`.
        """
        return self._retrying(pattern, partial(_matches, pattern))

    def open(self, url: str, block: int | None = None) -> BinaryIO:
        """Open for reading and seeking.

        Args:
            block: Minimum size of one read. None = 1 MiB for remote objects, 16 KiB for files.

        Raises:
            OSError: As in `size`.
        """
        remote = is_remote(url) and self.local_cache is None
        kind = _Ranges if remote else _File
        return io.BufferedReader(
            kind(self, url, self.size(url)), block or (1 << 20 if remote else 16 << 10)
        )

    def _retrying(self, url: str, attempt: Callable[[], T]) -> T:
        """Make quick attempts first, then slower ones until `outage` has passed."""
        wait, tries, began = self.retries.backoff, 0, 0.0
        while True:
            try:
                result = attempt()
            except _PassingError as fault:
                tries += 1
                began = began or time.monotonic()
                time_left = began + self.retries.outage - time.monotonic()
                pause = min(wait, LONGEST_WAIT)
                pause = max(pause, min(fault.wait, max(LONGEST_WAIT, time_left)))
                if tries >= self.retries.attempts:
                    self._report_failure(url, tries, fault, time_left)
                    pause, wait = min(max(pause, 1.0), time_left), max(wait, 0.5)
                if self.on_fault is not None:
                    self.on_fault(url, fault.reason)
            else:
                if tries >= self.retries.attempts:
                    self._failing.discard(public_url(url).rpartition("/")[0])
                return result
            time.sleep(pause)
            wait *= 2

    def _report_failure(self, url: str, tries: int, fault: _PassingError, time_left: float) -> None:
        """Warn once that storage does not answer; raise an error when no time is left."""
        name = public_url(url)
        failed = f"{name} failed {tries} times, the last time with {fault.text}".replace(url, name)
        if time_left <= 0:
            raise StorageError(
                f"{failed}: the storage does not answer. Raise data.retries.outage (now "
                f"{self.retries.outage:g} s) to wait longer for it."
            ) from fault
        if (place := name.rpartition("/")[0]) not in self._failing:
            self._failing.add(place)
            _LOG.warning(f"zsnr: warning: {failed}: trying for another {time_left:.0f} s.")

    def _same_size(self, url: str, total: int, expected: int | None = None) -> int:
        first = self._sizes.setdefault(url, total)
        expected_size = first if expected is None else expected
        if total != expected_size:
            raise StorageError(
                f"{public_url(url)} changed size from {expected_size} to {total} since it was "
                "indexed: index it again."
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
        """Open the local copy of an object; a copy of another size than `size` is made again."""
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

    def _size_without_download(self, url: str) -> int | None:
        """Return an object's size, if it is known without reading the whole object."""
        if not url.startswith("pipe:"):
            with suppress(NoRangesError):
                return self._remote_size(url)
        return None

    def _download(self, url: str, size: int | None, copy: Copy) -> None:
        """Download a whole object; `size` is its expected size."""
        if url.startswith("pipe:"):
            stream: Callable[[], Generator[bytes]] = partial(_output, url, self.retries.timeout)
        else:
            try:
                total = self._remote_size(url)
            except NoRangesError:
                stream = partial(self._body, url)
            else:
                copy.reserve(self._same_size(url, total, size))
                for offset in range(0, total, _CHUNK):
                    count = min(_CHUNK, total - offset)
                    copy.write(self._remote_read(url, offset, count, total))
                return
        lengths: list[int] = []
        if size is not None:
            copy.reserve(size)
        self._retrying(url, partial(_write_whole, copy, stream, size, lengths))

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
        """Request the object (status 200), or a span of it (status 200, 206 or 416)."""
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
            raise FileNotFoundError(f"{name} does not exist (HTTP {status}).")
        if status in (401, 403):
            raise PermissionError(
                f"{name} may not be read (HTTP {status}): set credentials in data.headers."
            )
        if status in (408, 429) or status >= 500:
            raise _PassingError(f"HTTP {status}", wait=_asked_wait(response))
        raise StorageError(f"{name} answers HTTP {status}: wanted {'206' if span else '200'}.")

    def _ask_http(self, url: str) -> int:
        with self._span(url, "0-0") as (response, _, total):
            if total is None:
                raise NoRangesError(f"{public_url(url)}: the server reports no size. {_WAY_OUT}")
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
                    f"wanted bytes from {offset} on."
                )
            data = b"".join(self._content(url, response, size))
            if len(data) < size:
                raise _PassingError("body cut short")
            return data

    def _body(self, url: str) -> Generator[bytes]:
        """Yield the bytes of an object that can only be read as a whole."""
        response = self._get(url)
        try:
            yield from self._content(url, response)
        finally:
            _drop(response)

    def _content(
        self, url: str, response: BaseHTTPResponse, size: int | None = None
    ) -> Iterator[bytes]:
        """Yield a response's bytes, up to a size, unless the server is too slow."""
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
        """Yield the response, the offset of its first byte and the object's size, if reported."""
        response = self._get(url, span)
        try:
            if response.status == 200:
                raise NoRangesError(
                    f"{public_url(url)}: the server does not support byte ranges. {_WAY_OUT}"
                )
            content_range = response.headers.get("Content-Range", "")
            start, total = (
                int(match[1]) if (match := re.match(pattern, content_range)) else None
                for pattern in (r"bytes (\d+)-", r"bytes .*/(\d+)$")
            )
            yield response, start, total
        finally:
            _drop(response)

    def _ask_other(self, url: str) -> int:
        with _passing_other():
            files, path = filesystem(url)
            total = files.info(path).get("size")
        if total is None:
            raise StorageError(f"{public_url(url)} has no size: wanted a file.")
        return self._same_size(url, total)

    def _read_other(self, url: str, offset: int, size: int, expected_size: int | None) -> bytes:
        total = self._sizes.get(url)
        if total is None:
            total = self._ask_other(url)
        _refuse_end(url, offset, size, self._same_size(url, total, expected_size))
        with _passing_other():
            files, path = filesystem(url)
            data: bytes = files.cat_file(path, start=offset, end=offset + size)
        if len(data) != size:
            raise _PassingError("body cut short")
        return data


_WAY_OUT = (
    "Set data.local_cache to a folder for whole shards, such as "
    "{folder: /scratch/shards, max_gib: 200}."
)


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def check_headers(headers: Mapping[str, str]) -> None:
    """Refuse headers with a literal secret, which saved configs would expose.

    Raises:
        ValueError: The value of a header for credentials uses no environment variable.
    """
    for name, value in headers.items():
        if re.search(_SECRET, name.lower()) and not re.search(_VARIABLE, value):
            raise ValueError(
                f"data.headers.{name} holds a secret that saved configs would expose: put it into "
                f"an environment variable, and write {name}: ${{NAME}}."
            )


def _expanded(headers: Mapping[str, str]) -> dict[str, str]:
    """Replace environment variables in headers by their values."""
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
    """Return the authorization header for the user and password of an address."""
    from urllib3.util import make_headers

    user = re.match(r"\w+://([^/?#]*)@", url)
    if user is None:
        return {}
    return {"Authorization": make_headers(basic_auth=unquote(user[1]))["authorization"]}


def _asked_wait(response: BaseHTTPResponse) -> float:
    """Return the seconds of a server's Retry-After header; 0 = there is none."""
    from urllib3 import Retry
    from urllib3.exceptions import InvalidHeader

    try:
        return Retry().get_retry_after(response) or 0.0
    except (InvalidHeader, OverflowError, ValueError):
        return 0.0


def _write_whole(
    copy: Copy, stream: Callable[[], Generator[bytes]], size: int | None, lengths: list[int]
) -> None:
    """Download an object sequentially, and check whether it is complete.

    If two attempts give the same number of bytes, the object is complete, even if the tar file is
    not.
    """
    copy.restart()
    with closing(stream()) as parts:
        for part in parts:
            copy.write(part)
    complete = copy.tail == bytes(512) if size is None else copy.size == size
    if not complete and copy.size not in lengths:
        lengths.append(copy.size)
        raise _PassingError("cut short", f"{copy.size} bytes without the end of a tar file")


def _output(url: str, timeout: float) -> Generator[bytes]:
    """Yield the output of a `pipe:` command.

    Raises:
        StorageError: The command cannot be started.
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
            os.killpg(process.pid, signal.SIGKILL)  # the shell and its children
        process.wait()


@contextmanager
def _passing_local(place: str = "") -> Iterator[None]:
    """Convert transient errors of a disk; `place` is added to the message."""
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
        raise _PassingError("its folder is empty or missing") from error  # a disk is not mounted
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
    raise NotAFileError(f"{path} is {NOT_A_FILE}.")


def _not_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a named pipe waits for a writer


def _holds_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _refuse_pipe(url: str) -> None:
    if url.startswith("pipe:"):
        raise NoRangesError(f"{public_url(url)} can only be read as a whole. {_WAY_OUT}")


def _refuse_end(url: str, offset: int, size: int, total: int) -> None:
    if offset + size > total:
        raise EOFError(f"{public_url(url)} has {total} bytes: wanted {size} from {offset} on.")


def _drop(response: BaseHTTPResponse) -> None:
    """Release the connection, and close it if unread bytes are left."""
    response.close()
    response.release_conn()


@contextmanager
def _passing(url: str, timeout: float) -> Iterator[None]:
    """Convert the errors of a connection."""
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
        reasons_by_type = (reason for kind, reason in reasons.items() if isinstance(cause, kind))
        raise _PassingError(next(reasons_by_type, type(cause).__name__)) from error


def _matches(pattern: str) -> list[str]:
    with _passing_other():
        files, path = filesystem(pattern)
        files.invalidate_cache()  # an empty listing may have been caused by an outage
        names = sorted(files.glob(path))
    scheme = pattern.partition("://")[0]
    return [f"{scheme}://{name.lstrip('/')}" for name in names]


@contextmanager
def _passing_other() -> Iterator[None]:
    """Convert the errors of an fsspec file system, whose client may have its own exceptions."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
        raise
    except Exception as error:
        if type(error).__module__ == "builtins" and not isinstance(error, OSError):
            raise
        raise _PassingError(type(error).__name__, str(error)) from error


class _Ranges(io.RawIOBase):
    """An object that is read by ranges."""

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
    """A file, or the local copy of an object, that is held open until a read fails."""

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
