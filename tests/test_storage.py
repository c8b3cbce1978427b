import errno
import json
import multiprocessing
import os
import pickle
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import pytest
import tiny
import torch
from faulty_server import Fault, FaultyServer, Request
from fsspec.implementations.memory import MemoryFileSystem

from zsnr.data import storage as storage_module
from zsnr.data.storage import (
    NoRangesError,
    Retries,
    Storage,
    StorageError,
    is_remote,
    local_path,
    public_url,
)
from zsnr.files import replacing

QUICK = Retries(attempts=3, backoff=0.001, outage=0.0)
IMPATIENT = replace(QUICK, timeout=0.3)
DATA = bytes(range(256)) * 40  # 10240 bytes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    (tmp_path / "b.bin").write_bytes(DATA[::-1])
    return tmp_path


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/a.bin", DATA)
    yield "memory://bucket/a.bin"
    files.rm("/bucket", recursive=True)


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were to be slept; the clock stands in between."""
    waits = []
    clock = SimpleNamespace(sleep=waits.append, monotonic=lambda: 1 + sum(waits))
    monkeypatch.setattr(storage_module, "time", clock)
    return waits


@contextmanager
def answering(answer):
    """Give the address of a server that answers everybody alike; None = not at all."""
    kept = []

    def serve(listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            kept.append(connection)
            if answer is not None:
                connection.recv(1 << 16)
                connection.sendall(answer)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.bin"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in kept:
                connection.close()


def answer(status, *headers, body=b""):
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def noting(retries=QUICK):
    faults = []
    return Storage(retries, lambda url, reason: faults.append(reason)), faults


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("http://h/a.tar", True),
        ("https://h/a.tar", True),
        ("s3://bucket/a.tar", True),
        ("memory://a", True),
        ("pipe:cat a.tar", True),
        ("/data/a.tar", False),
        ("~/a.tar", False),
        ("a:b.tar", False),
        ("file:///data/a.tar", False),
        ("file:a.tar", False),
    ],
)
def test_is_remote(url, remote):
    assert is_remote(url) is remote


def test_local_paths():
    assert local_path("~/a.tar") == Path.home() / "a.tar"
    assert local_path("file:///data/my%20set/a.tar") == Path("/data/my set/a.tar")
    assert local_path("file:data/a.tar") == Path("data/a.tar")
    assert local_path("data/100%.tar") == Path("data/100%.tar")


@pytest.mark.parametrize(
    "options", [{"attempts": 0}, {"backoff": -0.1}, {"timeout": 0}, {"outage": -1}]
)
def test_retries_that_make_no_sense(options):
    with pytest.raises(ValueError, match="wanted attempts >= 1"):
        Retries(**options)


def test_every_kind_of_place_reads_alike(folder, memory):
    with FaultyServer(folder) as server:
        file = str(folder / "a.bin")
        for url in (
            file,
            f"file://{file}",
            memory,
            server.url("a.bin"),
            server.url("redirect/a.bin"),
        ):
            storage, faults = noting()
            assert storage.size(url) == len(DATA)
            for offset, size in ((0, 1), (0, 10240), (10239, 1), (300, 5000), (77, 0)):
                assert storage.read(url, offset, size, 10240) == DATA[offset : offset + size]
            for offset, size in ((0, 10241), (10239, 2), (10240, 1), (99999, 5)):
                with pytest.raises(EOFError, match="has 10240 bytes"):
                    storage.read(url, offset, size)
            for opened in (storage.open(url, block=100), storage.open(url)):
                with opened:
                    assert opened.read() == DATA
                    assert opened.read() == b""
            with storage.open(url, block=64) as opened:
                assert opened.seek(-10, os.SEEK_END) == 10230
                assert opened.read(20) == DATA[-10:]
                assert opened.seek(1000) == 1000
                assert opened.read(10) == DATA[1000:1010]
                assert opened.seek(-5, os.SEEK_CUR) == opened.tell() == 1005
                assert opened.read(1000) == DATA[1005:2005]
                assert opened.seek(20000) == 20000
                assert opened.read(1) == b""
                with pytest.raises((ValueError, OSError)):
                    opened.seek(-1)
            assert faults == []


def test_missing(folder, memory):
    with FaultyServer(folder, [Fault("b.bin", "missing")]) as server:
        storage, faults = noting()
        for url in (
            str(folder / "no.bin"),
            server.url("no.bin"),
            server.url("b.bin"),
            memory + "x",
        ):
            with pytest.raises(FileNotFoundError):
                storage.size(url)
            with pytest.raises(FileNotFoundError):
                storage.read(url, 0, 1)
            with pytest.raises(FileNotFoundError):
                storage.open(url)
        assert faults == []
        assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("400", StorageError),
        ("401", PermissionError),
        ("403", PermissionError),
        ("410", FileNotFoundError),
        ("451", StorageError),
    ],
)
def test_lasting_answers_are_not_asked_for_again(folder, status, error):
    with FaultyServer(folder, [Fault("a.bin", status)]) as server:
        storage, faults = noting()
        with pytest.raises(error, match=f"a.bin .*HTTP {status}") as caught:
            storage.read(server.url("a.bin"), 0, 9)
        assert type(caught.value) is error
        assert (len(server.requests), faults) == (1, [])


REASONS = {
    "500": "HTTP 500",
    "503": "HTTP 503",
    "429": "HTTP 429",
    "408": "HTTP 408",
    "reset": "connection reset",
    "cut": "body cut short",
    "stall": "stalled for 0.3 s",
    "trickle": "slower than 16 KiB/s",
}


def retries_for(kind):
    return IMPATIENT if kind in ("stall", "trickle") else QUICK


@pytest.mark.parametrize("kind", REASONS)
def test_passing_faults(folder, kind):
    with FaultyServer(folder, [Fault("a.bin", kind, times=2, offset=150)]) as server:
        storage, faults = noting(retries_for(kind))
        url = server.url("a.bin")
        assert storage.read(url, 0, 100) == DATA[:100]
        assert storage.read(url, 100, 100) == DATA[100:200]
        assert faults == [REASONS[kind]] * 2
        assert server.log == [Request("a.bin", kind, (100, 199))] * 2
        assert storage.read(url, 100, 100) == DATA[100:200]
        assert len(server.requests) == 5


@pytest.mark.parametrize("kind", REASONS)
def test_faults_that_do_not_pass(folder, kind):
    with FaultyServer(folder, [Fault("a.bin", kind, times=9)]) as server:
        storage, faults = noting(retries_for(kind))
        url = server.url("a.bin")
        with pytest.raises(StorageError) as error:
            storage.read(url, 0, 4096)
        assert str(error.value).startswith(
            f"{url} failed 3 times, the last time with {REASONS[kind]}: "
        )
        assert faults == [REASONS[kind]] * 2
        assert len(server.requests) == 3
        assert storage.read(server.url("b.bin"), 0, 3) == DATA[:-4:-1]


def test_size_is_retried(folder):
    kinds = ("503", "reset", "stall", "cut")
    with FaultyServer(folder, [Fault("a.bin", kind) for kind in kinds]) as server:
        storage, faults = noting(replace(IMPATIENT, attempts=5))
        assert storage.size(server.url("a.bin")) == 10240
        assert faults == [REASONS[kind] for kind in kinds]


def test_waits_double_up_to_a_minute(folder, waits):
    with FaultyServer(folder, [Fault("a.bin", "503", times=99)]) as server:
        with pytest.raises(StorageError, match="failed 10 times"):
            Storage(Retries(attempts=10, outage=0.0)).read(server.url("a.bin"), 0, 1)
        assert waits == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]


def test_an_outage_is_waited_for_with_one_warning(folder, waits, caplog):
    with FaultyServer(folder, [Fault("a.bin", "503", times=7)]) as server:
        storage, faults = noting(Retries(attempts=3, backoff=0.5))
        url = server.url("a.bin")
        assert storage.read(url, 0, 9) == DATA[:9]
        assert waits == [0.5, 1, 2, 4, 8, 16, 32]
        assert faults == ["HTTP 503"] * 7
        [warning] = caplog.messages
        place = f"{url} failed 3 times, the last time with HTTP 503: trying for another"
        assert warning == f"zsnr: warning: {place} 598 s."
        server._left = [[Fault("b.bin", "503"), 99]]
        with pytest.raises(StorageError, match=r"/b.bin failed 17 times.*data.retries.outage"):
            storage.read(server.url("b.bin"), 0, 9)
        assert sum(waits[7:]) == pytest.approx(600)
        assert len(caplog.messages) == 2


def test_one_attempt_waits_for_nothing(folder, waits):
    with FaultyServer(folder, [Fault("a.bin", "503")]) as server:
        storage, faults = noting(Retries(attempts=1, outage=0.0))
        with pytest.raises(StorageError, match="failed 1 times"):
            storage.read(server.url("a.bin"), 0, 1)
        assert (waits, faults) == ([], [])


def test_a_server_that_is_gone_and_one_that_never_was(folder):
    with FaultyServer(folder) as server:
        url = server.url("a.bin")
        storage, faults = noting()
        assert storage.read(url, 0, 9) == DATA[:9]
    with pytest.raises(StorageError, match="failed 3 times, the last time with connection refused"):
        storage.read(url, 0, 9)
    assert faults[-1] == "connection refused"
    storage, faults = noting()
    with pytest.raises(StorageError, match="with unknown host: "):
        storage.size("http://no-such-host.invalid/a.bin")
    assert faults == ["unknown host"] * 2
    with FaultyServer(folder, port=server.port):
        assert storage.read(url, 0, 9) == DATA[:9]


def test_a_server_that_hangs_up_without_an_answer():
    with answering(b"") as url:
        storage, faults = noting()
        with pytest.raises(StorageError, match="with connection closed: "):
            storage.read(url, 0, 9)
        assert faults == ["connection closed"] * 2


def test_a_server_that_never_answers(folder):
    with answering(None) as url:
        storage, faults = noting(Retries(attempts=2, backoff=0, timeout=0.05, outage=0.0))
        with pytest.raises(StorageError, match="with stalled for 0.05 s: "):
            storage.read(url, 0, 9)
        assert faults == ["stalled for 0.05 s"]


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (["206 Partial Content", "Content-Range: bytes 5-8/100"], "HTTP 206 with bytes from 5 on"),
        (["206 Partial Content"], "HTTP 206 with bytes from None on"),
        (["304 Not Modified"], "HTTP 304: wanted 206"),
    ],
)
def test_servers_that_answer_something_else(sent, message):
    with answering(answer(*sent, body=b"abcd")) as url:
        storage, faults = noting()
        with pytest.raises(StorageError, match=message):
            storage.read(url, 4, 4)
        assert faults == []


def test_a_size_that_is_not_told():
    sent = answer("206 Partial Content", "Content-Range: bytes 4-7/*", body=b"abcd")
    with answering(sent) as url:
        storage, _ = noting()
        assert storage.read(url, 4, 4) == b"abcd"
        with pytest.raises(NoRangesError, match="reports no size. Set data.local_cache"):
            storage.size(url)


def test_fewer_bytes_than_asked_for(folder):
    sent = answer("206 Partial Content", "Content-Range: bytes 4-5/100", body=b"ab")
    with answering(sent) as url:
        storage, faults = noting()
        with pytest.raises(StorageError, match="with body cut short: "):
            storage.read(url, 4, 4)
        assert faults == ["body cut short"] * 2


def test_an_empty_object(folder):
    (folder / "empty").write_bytes(b"")
    with FaultyServer(folder) as server:
        for url in (str(folder / "empty"), server.url("empty")):
            storage, _ = noting()
            assert storage.size(url) == 0
            assert storage.read(url, 0, 0) == b""
            assert storage.open(url).read() == b""
            with pytest.raises(EOFError, match="has 0 bytes: wanted 1 from 0 on"):
                storage.read(url, 0, 1)


def test_an_endless_redirect_ends():
    storage = Storage(QUICK)
    with (
        answering(answer("302 Found", "Location: /a.bin")) as url,
        pytest.raises(StorageError, match="HTTP 302: wanted 206"),
    ):
        storage.size(url)


def test_a_certificate_that_nobody_signed(folder, monkeypatch):
    from urllib3.exceptions import MaxRetryError, SSLError

    def refuse(*_, **__):
        unsigned = ssl.SSLCertVerificationError(1, "certificate verify failed")
        raise MaxRetryError(None, "/", SSLError(unsigned))

    monkeypatch.setattr("urllib3.PoolManager.request", refuse)
    storage, faults = noting()
    with pytest.raises(StorageError, match="certificate verify failed"):
        storage.size("https://h/a.bin")
    assert faults == []


@pytest.mark.parametrize("url", ["http://", "http://h:port/a", "http://[::/a"])
def test_addresses_that_are_none(url):
    with pytest.raises(ValueError, match="http"):
        Storage(QUICK).size(url)


@pytest.mark.parametrize("place", ["local", "http"])
def test_an_object_that_changes(folder, place):
    with FaultyServer(folder) as server:
        url = server.url("a.bin") if place == "http" else str(folder / "a.bin")
        storage, faults = noting()
        message = "a.bin changed size from 7 to 10240 since it was indexed"
        with pytest.raises(StorageError, match=message):
            storage.read(url, 0, 5, expected_size=7)
        with pytest.raises(StorageError, match=message):
            storage.read(url, 20000, 5, expected_size=7)
        assert storage.read(url, 0, 5, expected_size=10240) == DATA[:5]
        opened = storage.open(url, block=16)
        (folder / "a.bin").write_bytes(DATA[:1000])
        message = "a.bin changed size from 10240 to 1000 since it was indexed"
        for offset in (0, 5000):
            with pytest.raises(StorageError, match=message):
                storage.read(url, offset, 5)
        with pytest.raises(StorageError, match=message):
            storage.size(url)
        if place == "http":
            with pytest.raises(StorageError, match=message):
                opened.read(1)
        assert faults == []
        assert Storage(QUICK).read(url, 0, 5, expected_size=1000) == DATA[:5]


def test_a_server_without_ranges(folder):
    (folder / "large.bin").write_bytes(bytes(64 << 20))
    with FaultyServer(folder, ranges=False) as server:
        storage, faults = noting()
        for path in ("large.bin", "a.bin"):
            for read in (storage.size, storage.open, lambda url: storage.read(url, 0, 5)):
                with pytest.raises(
                    NoRangesError, match="not support byte ranges. Set data.local_cache to"
                ):
                    read(server.url(path))
        assert faults == []


def test_a_tar_file_behind_a_failing_server(folder):
    tiny.write_shards(folder, [20])
    shard = folder / "train-000000.tar"
    with FaultyServer(folder, rate={"reset": 3, "503": 4, "cut": 5}) as server:
        storage, faults = noting(replace(QUICK, attempts=5))
        with tarfile.open(fileobj=storage.open(server.url(shard.name), block=4096)) as tar:
            there = {member.name: tar.extractfile(member).read() for member in tar}
        assert [REASONS[request.kind] for request in server.log] == faults
        assert {request.kind for request in server.log} == {"reset", "503", "cut"}
    with tarfile.open(shard) as tar:
        assert there == {member.name: tar.extractfile(member).read() for member in tar}
    assert len(there) == 40


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ("7", [7]),
        ("0", [0.5]),
        ("99999", [600]),
        ("Sun, 06 Nov 1994 08:49:37 GMT", [0.5]),
        ("Thu, 01 Jan 2099 00:00:00 GMT", [600]),
        ("soon", [0.5]),
    ],
)
def test_a_server_that_says_when_to_come_back(folder, waits, told, wanted):
    with FaultyServer(folder, [Fault("a.bin", "429")], retry_after=told) as server:
        assert Storage(Retries()).read(server.url("a.bin"), 0, 9) == DATA[:9]
    assert waits == wanted


def test_headers_come_from_the_environment_and_stay_with_their_host(folder, monkeypatch):
    monkeypatch.setenv("ZSNR_TOKEN", "s3cret\n")  # as `$(cat file)` may leave it
    monkeypatch.setenv("ZSNR_LINES", "literal-secret\nX: y")
    sent = {"Authorization": "Bearer ${ZSNR_TOKEN}", "X-Key": "a-${ZSNR_TOKEN}-b"}
    with FaultyServer(folder) as theirs, FaultyServer(folder) as server:
        storage = Storage(QUICK, headers=sent)
        for reader in (storage, pickle.loads(pickle.dumps(storage)), storage.reporting(None)):
            for path in ("a.bin", "redirect/a.bin", f"away/{theirs.port}/a.bin"):
                assert reader.read(server.url(path), 0, 9) == DATA[:9]
        for headers in server.headers:
            assert headers["Authorization"] == "Bearer s3cret"
            assert headers["X-Key"] == "a-s3cret-b"
        assert len(theirs.headers) == 3
        for headers in theirs.headers:
            assert not {"Authorization", "X-Key"} & headers.keys()
    for headers, message in (
        ({"Authorization": "Bearer ${ZSNR_NONE}"}, "the environment has no ZSNR_NONE"),
        ({"Authorization": "Bearer literal-secret"}, "put it into an environment variable"),
        ({"X-Api-Key": "literal-secret"}, "put it into an environment variable"),
        ({"Authorization": "${ZSNR_LINES}"}, "wanted printable ASCII characters only"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            Storage(QUICK, headers=headers)
        assert "literal-secret" not in str(error.value)


def test_passwords_of_addresses_are_used_and_never_shown(folder):
    with FaultyServer(folder, [Fault("a.bin", "503", times=2)]) as server:
        url = server.url("a.bin").replace("://", "://me:s3cr%65t@") + "?signature=s3cret"
        shown = server.url("a.bin")
        storage, _ = noting(replace(QUICK, attempts=2))
        with pytest.raises(StorageError) as error:
            storage.read(url, 0, 9)
        assert str(error.value).startswith(f"{shown} failed 2 times")
        assert "s3cr" not in str(error.value)
        with pytest.raises(FileNotFoundError, match="no.bin does not exist") as error:
            storage.size(url.replace("a.bin", "no.bin"))
        assert "s3cr" not in str(error.value)
        assert server.headers[0]["Authorization"] == "Basic bWU6czNjcmV0"  # me:s3cret


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@h:8/a.tar?sign=secret", "https://h:8/a.tar"),
        ("https://h/a@b.tar", "https://h/a@b.tar"),
        ("s3://bucket/a.tar", "s3://bucket/a.tar"),
        ("http://[::/a", "..."),
        ("/data/what?/me:pw@h/a.tar", "/data/what?/me:pw@h/a.tar"),
        ("pipe:curl -H 'Auth: secret' https://u:secret@h/0.tar?s=1", "pipe:... https://h/0.tar"),
        ("pipe:aws s3 cp s3://b/0.tar - --token secret", "pipe:... s3://b/0.tar"),
        ("pipe:zstdcat x.zst", "pipe:.../04e7c470"),
    ],
)
def test_what_is_shown_of_an_address(url, shown):
    assert public_url(url) == shown
    assert public_url(shown) == shown


def test_connections_are_kept(folder):
    with FaultyServer(folder) as server:
        storage = Storage(QUICK)
        storage.size(server.url("a.bin"))
        for offset in range(20):
            storage.read(server.url("a.bin"), offset, 100)
        storage.read(server.url("redirect/b.bin"), 0, 5)
        assert server.num_connections == 1


def test_threads(folder):
    with (
        FaultyServer(folder, rate={"503": 7, "reset": 11}) as server,
        ThreadPoolExecutor(8) as pool,
    ):
        storage, faults = noting(replace(QUICK, attempts=20))
        spans = [(i % 2, 37 * i % 9000, 1 + 31 * i % 1200) for i in range(400)]
        found = pool.map(lambda s: storage.read(server.url("ab"[s[0]] + ".bin"), *s[1:]), spans)
        for (file, offset, size), data in zip(spans, found, strict=True):
            assert data == (DATA, DATA[::-1])[file][offset : offset + size]
        assert sorted(faults) == sorted(REASONS[request.kind] for request in server.log)
        assert server.num_connections <= 8 + len(server.log)


def test_pickles(folder):
    with FaultyServer(folder) as server:
        storage = Storage(QUICK)
        url = server.url("a.bin")
        storage.read(url, 0, 5)
        again = pickle.loads(pickle.dumps(storage))
        assert again.retries == QUICK
        assert again.read(url, 5, 5) == storage.read(url, 5, 5) == DATA[5:10]
        assert server.num_connections == 2
        (folder / "a.bin").write_bytes(DATA[:100])
        with pytest.raises(StorageError, match="changed size from 10240 to 100"):
            again.read(url, 0, 5)


def _send_reads(storage, url, pipe):
    pipe.send([storage.read(url, offset, 50) for offset in range(100)])


def test_a_fork_has_its_own_connections(folder):
    with FaultyServer(folder) as server:
        storage, url = Storage(QUICK), server.url("a.bin")
        context = multiprocessing.get_context("fork")
        wanted = [DATA[offset : offset + 50] for offset in range(100)]
        for children in (0, 1, 2):
            assert [storage.read(url, offset, 50) for offset in range(100)] == wanted
            assert server.num_connections == 1 + children
            mine, theirs = context.Pipe()
            child = context.Process(target=_send_reads, args=(storage, url, theirs))
            child.start()
            assert mine.recv() == wanted
            child.join()
            assert child.exitcode == 0


class Bytes(torch.utils.data.Dataset):
    def __init__(self, storage, url):
        self.storage, self.url = storage, url

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return torch.tensor(list(self.storage.read(self.url, i, 16)))


@pytest.mark.parametrize("scheme", ["http", "memory"])
def test_workers_of_a_loader(folder, memory, scheme):
    with FaultyServer(folder, rate={"503": 10}) as server:
        dataset = Bytes(Storage(QUICK), server.url("a.bin") if scheme == "http" else memory)
        dataset[0]
        loader = torch.utils.data.DataLoader(
            dataset, 8, num_workers=2, multiprocessing_context="fork"
        )
        wanted = torch.tensor([[i + j for j in range(16)] for i in range(64)])
        assert torch.equal(torch.cat(list(loader)), wanted)


def test_a_command_needs_a_local_cache(folder):
    storage = Storage(QUICK)
    for read in (storage.size, storage.open, lambda url: storage.read(url, 0, 5)):
        with pytest.raises(
            NoRangesError, match="can only be read as a whole. Set data.local_cache to"
        ):
            read(f"pipe:cat {folder}/a.bin")


class ClientError(Exception):
    """As the exceptions of botocore and aiohttp, that are no OSError."""


class FlakyFileSystem(MemoryFileSystem):
    protocol = "flaky"
    errors: ClassVar[list[Exception]] = []  # raised one by one
    longest = None  # more bytes of a file are cut off

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _raise(self):
        if self.errors:
            raise self.errors.pop(0)

    def info(self, path, **options):
        self._raise()
        return super().info(path, **options)

    def glob(self, path, **options):
        self._raise()
        return super().glob(path, **options)

    def cat_file(self, path, **options):
        self._raise()
        return super().cat_file(path, **options)[: self.longest]


LOCAL = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENODEV)


@pytest.fixture
def failing(monkeypatch):
    """Errors that the next openings of files raise, one by one; None = it opens."""
    errors = []

    def opening(*args, **kwargs):
        if errors and (error := errors.pop(0)):
            raise error
        return open(*args, **kwargs)

    monkeypatch.setattr(storage_module, "open", opening, raising=False)
    return errors


@pytest.mark.parametrize("number", LOCAL)
def test_local_errors_are_tried_again_as_remote_ones(folder, failing, number):
    url, error = str(folder / "a.bin"), OSError(number, os.strerror(number))
    storage, faults = noting()
    failing += [error, error]
    assert storage.read(url, 5, 5) == DATA[5:10]
    with storage.open(url) as file:
        failing.append(error)
        assert file.read() == DATA
    assert faults == [os.strerror(number)] * 3
    failing += [error] * 3
    with pytest.raises(StorageError) as caught:
        storage.read(url, 0, 5)
    message = f"{url} failed 3 times, the last time with {os.strerror(number)}: "
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_when_an_open_file_is_asked_is_asked_again(folder, monkeypatch, number):
    url, asked, ask = str(folder / "a.bin"), [], os.fstat

    def failing_at_first(descriptor):
        asked.append(descriptor)
        if len(asked) in (1, 4):
            raise OSError(number, os.strerror(number))
        return ask(descriptor)

    monkeypatch.setattr(os, "fstat", failing_at_first)
    storage, faults = noting()
    assert storage.size(url) == len(DATA)
    assert storage.read(url, 5, 5) == DATA[5:10]
    assert faults == [os.strerror(number)] * 2


@pytest.mark.parametrize("kind", [PermissionError, IsADirectoryError, FileNotFoundError])
def test_local_errors_that_no_waiting_mends(folder, failing, kind):
    storage, faults = noting()
    number = {PermissionError: errno.EACCES, IsADirectoryError: errno.EISDIR}.get(kind, 2)
    failing.append(OSError(number, os.strerror(number)))
    with pytest.raises(kind):
        storage.read(str(folder / "a.bin"), 0, 5)
    assert faults == []


def test_a_disk_that_is_away_for_a_while(tmp_path, waits):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.bin").write_bytes(DATA)
    url, away = str(tmp_path / "disk" / "a.bin"), tmp_path / "away"
    (tmp_path / "disk").rename(away)

    def back(url, reason):
        reasons.append(reason)
        if len(reasons) == 7:
            away.rename(tmp_path / "disk")

    reasons = []
    assert Storage(Retries(attempts=2), back).read(url, 0, 5) == DATA[:5]
    assert reasons == ["its folder is empty or missing"] * 7
    assert sum(waits) == 63.5


def test_faults_of_a_file_system(memory, monkeypatch):
    from fsspec.exceptions import FSTimeoutError

    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    url = memory.replace("memory", "flaky")
    errors = [OSError("busy"), FSTimeoutError()]
    monkeypatch.setattr(FlakyFileSystem, "errors", errors)
    storage, faults = noting()
    assert storage.size(url) == 10240
    errors += [ClientError("no route"), ConnectionResetError("gone")]
    assert storage.read(url, 5, 5) == DATA[5:10]
    assert faults == ["OSError", "FSTimeoutError", "ClientError", "ConnectionResetError"]
    errors += [ClientError("no route")] * 3
    with pytest.raises(StorageError, match="failed 3 times.* with ClientError: no route: "):
        storage.read(url, 0, 5)
    for lasting in (PermissionError("yours"), FileNotFoundError("what"), TypeError("wrong")):
        errors.append(lasting)
        with pytest.raises(type(lasting), match=str(lasting)):
            storage.read(url, 0, 5)
        assert errors == []
    with pytest.raises(StorageError, match="changed size from 7 to 10240 since"):
        Storage(QUICK).read(url, 0, 5, expected_size=7)
    errors += [ClientError("no route")] * 2
    assert storage.glob(url.replace("a.bin", "*.bin")) == [url]
    monkeypatch.setattr(FlakyFileSystem, "longest", 4)
    with pytest.raises(StorageError, match="with body cut short: "):
        storage.read(url, 0, 5)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/a.tar", "s3://bucket/a.tar: .*`pip install s3fs`"),
        ("gs://bucket/a.tar", "gs://bucket/a.tar: .*`pip install gcsfs`"),
        ("nope://a.tar", "Protocol not known: nope. Wanted a path, .*s3://, "),
    ],
)
def test_protocols_that_are_not_installed(url, message, monkeypatch):
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=message):
        Storage(QUICK).read(url, 0, 5)


def test_the_server_as_a_process(folder):
    faults = [{"path": "a.bin", "kind": "503", "times": 2, "offset": 3}]
    command = [sys.executable, str(Path(__file__).with_name("faulty_server.py")), str(folder)]
    command += ["--faults", json.dumps(faults), "--log", str(folder / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        storage, noted = noting()
        url = f"http://127.0.0.1:{int(process.stdout.readline())}/a.bin"
        assert storage.read(url, 4, 5) == DATA[4:9]
        assert storage.read(url, 0, 5) == DATA[:5]
        process.terminate()
    assert noted == ["HTTP 503"] * 2
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert [(line["kind"], line["span"]) for line in lines] == [
        (None, [4, 8]),
        ("503", [0, 4]),
        ("503", [0, 4]),
        (None, [0, 4]),
    ]


def test_an_error_of_another_file_keeps_its_message(tmp_path):
    with pytest.raises(StorageError, match="^x failed 3 times$"), replacing(tmp_path / "a"):
        raise StorageError("x failed 3 times")
