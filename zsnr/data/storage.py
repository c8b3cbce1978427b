"""Bytes of shards, wherever they are: a range of a file or of a server's object, with retries."""

from __future__ import annotations

import io
import os
import re
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import IncompleteRead, RemoteDisconnected
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import unquote

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from urllib3 import BaseHTTPResponse, PoolManager

LONGEST_WAIT = 60.0  # seconds between two tries
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
T = TypeVar("T")


@dataclass(frozen=True)
class Retries:
    """How long to bear with a server's passing faults.

    Args:
        attempts: Tries of one read in all.
        backoff: Seconds before the second try; each later wait is twice as long, up to 60.
        timeout: Seconds without a byte, or to connect, after which a server counts as stalled.
            One try of n bytes takes at most so long and n / 16384 seconds.

    Raises:
        ValueError: A number makes no sense.
    """

    attempts: int = 5
    backoff: float = 0.5
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff < 0 or self.timeout <= 0:
            raise ValueError(
                f"{self}: wanted attempts of 1 or more, a backoff of 0 or more and a timeout "
                "above 0."
            )


class NoRangesError(OSError):
    """A source gives its bytes only from the beginning on: `Storage.stream` reads it."""


class StorageError(OSError):
    """A source failed for good."""


class _PassingError(Exception):
    """What may go well the next time: a short and stable reason, and perhaps the detail."""


def is_remote(url: str) -> bool:
    """Tell whether it has a scheme (http, s3, memory, pipe, ...); "file:" and paths are local."""
    return not url.startswith("file:") and ("://" in url or url.startswith("pipe:"))


def local_path(url: str) -> Path:
    """Return the path that a local url means: "~" and "file:" resolved."""
    if url.startswith("file:"):
        return Path(unquote(url.removeprefix("file:").removeprefix("//")))
    return Path(url).expanduser()


class Storage:
    """Reads files, http servers, what fsspec reads (s3://, gs://, memory://, ...) and `pipe:`.

    May be used by several threads, pickled and forked: connections belong to one process and are
    opened when they are needed. The first size of an object that is seen must stay its size.

    Args:
        retries: Of remote reads; local files are read once.
        on_fault: Called with (url, reason) for each passing fault that will be retried. Reasons
            are short and stable: "HTTP 503", "connection reset", "stalled for 30 s", ...
    """

    def __init__(
        self, retries: Retries = Retries(), on_fault: Callable[[str, str], None] | None = None
    ) -> None:
        self.retries, self.on_fault = retries, on_fault
        self._sizes: dict[str, int] = {}
        self._pools: dict[int, PoolManager] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": self._sizes.copy(), "_pools": {}}

    def size(self, url: str) -> int:
        """Return the bytes of the whole object.

        Raises:
            FileNotFoundError: There is no such object.
            PermissionError: It may not be read.
            NoRangesError: Only `stream` reads it.
            StorageError: It failed for good, or has another size than before.
        """
        if not is_remote(url):
            return self._same_size(url, local_path(url).stat().st_size)
        _refuse_pipe(url)
        return self._retrying(
            url, partial(self._ask_http if _is_http(url) else self._ask_other, url)
        )

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
        if is_remote(url):
            _refuse_pipe(url)
            read = self._read_http if _is_http(url) else self._read_other
            return self._retrying(url, partial(read, url, offset, size, expected_size))
        with open(local_path(url), "rb") as file:
            total = self._same_size(url, os.fstat(file.fileno()).st_size, expected_size)
            _refuse_end(url, offset, size, total)
            file.seek(offset)
            return file.read(size)

    def open(self, url: str, block: int = 1 << 20) -> BinaryIO:
        """Open for reading and seeking.

        Args:
            block: Bytes of one remote read at least.

        Raises:
            OSError: As `size` raises.
        """
        if is_remote(url):
            return io.BufferedReader(_Ranges(self, url, self.size(url)), block)
        return open(local_path(url), "rb")

    def stream(self, url: str) -> BinaryIO:
        """Open for reading from the beginning to the end.

        `pipe:COMMAND` is what the shell's command prints; its failure raises at the end. A server
        without ranges is asked once, and a fault on the way is final.

        Raises:
            OSError: As `size` raises, but for NoRangesError.
        """
        if url.startswith("pipe:"):
            return io.BufferedReader(_Command(url), 1 << 20)
        try:
            return self.open(url)
        except NoRangesError:
            response = self._retrying(url, partial(self._get, url))
            return io.BufferedReader(_Body(url, response, self.retries.timeout), 1 << 20)

    def has_ranges(self, url: str) -> bool:
        """Tell whether `read` and `open` work; a server is asked.

        Raises:
            OSError: As `size` raises, but for NoRangesError.
        """
        try:
            self.size(url)
        except NoRangesError:
            return False
        return True

    def _retrying(self, url: str, attempt: Callable[[], T]) -> T:
        wait, left = self.retries.backoff, self.retries.attempts
        while True:
            try:
                return attempt()
            except _PassingError as fault:
                left -= 1
                if not left:
                    raise StorageError(
                        f"{url} failed {self.retries.attempts} times, the last time with "
                        f"{': '.join(fault.args)}: wanted a server that answers. Raise "
                        "data.retries.attempts to wait longer for it."
                    ) from fault
                if self.on_fault is not None:
                    self.on_fault(url, fault.args[0])
            time.sleep(min(wait, LONGEST_WAIT))
            wait *= 2

    def _same_size(self, url: str, total: int, expected: int | None = None) -> int:
        first = self._sizes.setdefault(url, total)
        wanted = first if expected is None else expected
        if total != wanted:
            raise StorageError(
                f"{url} changed size from {wanted} to {total} since it was indexed: index it again."
            )
        return total

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

        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={span}"} if span else {})
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
                    ),
                    preload_content=False,
                    decode_content=False,
                )
        except LocationValueError as error:
            raise ValueError(f"{url}: {error} Wanted http://HOST/PATH.") from error
        status = response.status
        if status == 200 or (span and status in (206, 416)):
            return response
        _drop(response)
        if status in (404, 410):
            raise FileNotFoundError(f"{url} is not there (HTTP {status}).")
        if status in (401, 403):
            raise PermissionError(f"{url} may not be read (HTTP {status}).")
        if status in (408, 429) or status >= 500:
            raise _PassingError(f"HTTP {status}")
        raise StorageError(f"{url} answers HTTP {status}: wanted {'206' if span else '200'}.")

    def _ask_http(self, url: str) -> int:
        with self._span(url, "0-0") as (response, _, total):
            if total is None:
                raise NoRangesError(f"{url}: the server does not tell the size.")
            with _passing(url, self.retries.timeout):
                response.read1(1)
            return self._same_size(url, total)

    def _read_http(self, url: str, offset: int, size: int, expected_size: int | None) -> bytes:
        with self._span(url, f"{offset}-{offset + size - 1}") as (response, start, total):
            if total is not None:
                _refuse_end(url, offset, size, self._same_size(url, total, expected_size))
            if start != offset:
                raise StorageError(
                    f"{url} answers HTTP {response.status} with bytes from {start} on: wanted them "
                    f"from {offset} on."
                )
            parts, left, timeout = [], size, self.retries.timeout
            end = time.monotonic() + timeout + size / SLOWEST
            while left:
                if time.monotonic() > end:
                    raise _PassingError(f"slower than {SLOWEST // 1024} KiB/s")
                with _passing(url, timeout):
                    part = response.read1(min(left, 1 << 18))
                if not part:
                    raise _PassingError("body cut short")
                parts.append(part)
                left -= len(part)
            return b"".join(parts)

    @contextmanager
    def _span(
        self, url: str, span: str
    ) -> Iterator[tuple[BaseHTTPResponse, int | None, int | None]]:
        """Give the answer, its first byte's place and the object's size, where they are told."""
        response = self._get(url, span)
        try:
            if response.status == 200:
                raise NoRangesError(
                    f"{url}: the server gives no ranges, so it can only be read from the "
                    "beginning to the end."
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
            raise StorageError(f"{url} tells no size: wanted a file.")
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


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _refuse_pipe(url: str) -> None:
    if url.startswith("pipe:"):
        raise NoRangesError(f"{url} can only be read from the beginning to the end.")


def _refuse_end(url: str, offset: int, size: int, total: int) -> None:
    if offset + size > total:
        raise EOFError(f"{url} has {total} bytes: wanted {size} from {offset} on.")


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
            raise StorageError(f"{url}: {cause}.") from error
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
            f"{url}: {error}" + f": `pip install {package}`." * bool(package)
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{url}: {error}. Wanted a path, http(s)://, pipe:COMMAND or what fsspec knows, such "
            f"as {', '.join(f'{name}://' for name in PACKAGES)}."
        ) from error
    return filesystem


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
            raise ValueError(f"{self._url}: wanted a position of 0 or more, not {start + offset}.")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        count = max(min(len(view), self._size - self._position), 0)
        view[:count] = self._storage.read(self._url, self._position, count)
        self._position += count
        return count


class _Body(io.RawIOBase):
    """The body of one answer."""

    def __init__(self, url: str, response: BaseHTTPResponse, timeout: float) -> None:
        self._url, self._response, self._timeout, self._position = url, response, timeout, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        try:
            with _passing(self._url, self._timeout):
                data = self._response.read1(len(view))
        except _PassingError as fault:
            raise StorageError(
                f"{self._url}: {fault} after {self._position} bytes, and the server gives no "
                "ranges to go on with."
            ) from fault
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        _drop(self._response)
        super().close()


class _Command(io.RawIOBase):
    """What the command of a `pipe:` prints."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._process = subprocess.Popen(
            url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE, bufsize=0
        )

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        assert self._process.stdout is not None
        count = self._process.stdout.readinto(buffer)  # type: ignore[attr-defined]
        if not count and (status := self._process.wait()):
            raise StorageError(f"{self._url} ended with exit status {status}: wanted 0.")
        return int(count)

    def close(self) -> None:
        if not self.closed:
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process.kill()
            self._process.wait()
        super().close()
