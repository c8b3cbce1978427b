"""The local cache: whole shards on disk, bounded, shared by processes, filled by commands too."""

import errno
import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
import tiny
from faulty_server import Fault, FaultyServer

from zsnr.cli import main
from zsnr.data import local_cache
from zsnr.data.index import load_index
from zsnr.data.local_cache import LocalCache
from zsnr.data.storage import Retries, Storage, StorageError

QUICK = Retries(attempts=3, backoff=0.001, timeout=5.0, outage=0.0)
SIZE = 20480


def shard(path, level=0):
    """A tar file of SIZE bytes."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes([level + 1]) * (SIZE - 1024) + bytes(1024))
    return path


@pytest.fixture
def served(tmp_path):
    for i in range(4):
        shard(tmp_path / "served" / f"{i}.tar", i)
    return tmp_path / "served"


def cached(folder, shards=2.5, retries=QUICK):
    """Storage with room for some shards, and its faults."""
    faults = []
    cache = LocalCache(str(folder), shards * SIZE / 2**30)
    return Storage(retries, lambda url, why: faults.append(why), local_cache=cache), faults


def kept(folder):
    return sorted(path.name.rpartition("-")[2] for path in folder.iterdir() if path.name[0] != ".")


def used(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("ranges", [True, False])
def test_a_shard_is_downloaded_once(served, tmp_path, ranges):
    with FaultyServer(served, ranges=ranges) as server:
        reader, faults = cached(tmp_path / "cache")
        url = server.url("1.tar")
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda i: reader.read(url, i, 5, SIZE), range(200)))
        assert set(parts) == {bytes([2]) * 5}
        sizes = [r.span for r in server.requests if r.span is None or r.span[1] > 0]
        assert len(sizes) == (1 if ranges else 2)  # whether there are ranges must be asked
        asked = len(server.requests)
        again, _ = cached(tmp_path / "cache")
        assert again.read(url, SIZE - 3, 3, SIZE) == bytes(3)
        with pytest.raises(EOFError):
            again.read(url, SIZE, 1, SIZE)
        assert len(server.requests) == asked
        assert again.size(url) == SIZE
        with again.open(url) as file:
            assert file.read() == (served / "1.tar").read_bytes()
        assert kept(tmp_path / "cache") == ["1.tar"]
        assert faults == []


def test_the_shard_that_was_used_longest_ago_makes_room(served, tmp_path):
    reader, _ = cached(tmp_path / "cache")
    urls = [f"pipe:cat {served}/{i}.tar" for i in range(4)]
    for i in (0, 1):
        assert reader.read(urls[i], 0, 1) == bytes([i + 1])
        time.sleep(0.02)  # the clock of a file system is coarse
    with reader.local_cache.open(urls[0], "0.tar", None) as held:
        time.sleep(0.02)
        reader.read(urls[2], 0, 1)
        assert kept(tmp_path / "cache") == ["0.tar", "2.tar"]
        for i in (1, 3):
            time.sleep(0.02)
            reader.read(urls[i], 0, 1)
        assert kept(tmp_path / "cache") == ["1.tar", "3.tar"]
        assert used(tmp_path / "cache") <= 2.5 * SIZE
        assert held.read() == (served / "0.tar").read_bytes()  # one that is open stays readable


def test_files_of_others_stay(served, tmp_path):
    folder = tmp_path / "cache"
    (folder / "below").mkdir(parents=True)
    for name in ("notes.txt", "video.mp4.part"):
        (folder / name).write_bytes(bytes(SIZE))
        os.utime(folder / name, (1, 1))
    reader, _ = cached(folder, 1.5)
    for i in (0, 1):
        assert reader.read(f"pipe:cat {served}/{i}.tar", 0, 1) == bytes([i + 1])
    assert kept(folder) == ["1.tar", "below", "notes.txt", "video.mp4.part"]


def test_a_shard_that_is_larger_than_the_limit_is_refused(served, tmp_path):
    small, _ = cached(tmp_path / "cache", 0.5)
    with FaultyServer(served) as server:
        for url in (server.url("0.tar"), f"pipe:cat {served}/0.tar"):
            with pytest.raises(ValueError, match=r"is less than one shard of .*0.tar"):
                small.size(url)
    assert kept(tmp_path / "cache") == []
    with pytest.raises(ValueError, match="max_gib=0: wanted more than 0"):
        LocalCache("x", 0)


def test_copies_under_way_share_the_room(served, tmp_path):
    reader, _ = cached(tmp_path / "cache", 1.5)
    with FaultyServer(served) as server, ThreadPoolExecutor(4) as pool:
        sizes = pool.map(reader.size, [server.url(f"{i}.tar") for i in range(4)])
        most = 0
        for size in sizes:
            assert size == SIZE
            most = max(most, used(tmp_path / "cache"))
    assert most <= 1.5 * SIZE


def _read_all(folder, urls, pipe):
    reader, _ = cached(folder)
    for _ in range(30):
        for url in urls:
            assert reader.read(url, 0, 1, SIZE) == bytes([int(url[-5]) + 1])
    pipe.send(True)


def test_processes_share_the_folder(served, tmp_path):
    context = multiprocessing.get_context("fork")
    with FaultyServer(served) as server:
        urls = [server.url(f"{i}.tar") for i in range(4)]
        ends = []
        for first in range(3):
            mine, theirs = context.Pipe()
            order = urls[first:] + urls[:first]
            child = context.Process(target=_read_all, args=(tmp_path / "cache", order, theirs))
            child.start()
            ends.append((child, mine))
        for child, mine in ends:
            assert mine.poll(60)
            child.join()
            assert child.exitcode == 0
    assert used(tmp_path / "cache") <= 2.5 * SIZE


def _hang(folder, url):
    Storage(QUICK, local_cache=LocalCache(str(folder))).size(url)


def test_a_killed_download_leaves_nothing_that_counts(served, tmp_path):
    flag = tmp_path / "go"
    wait, tar = f"while [ ! -e {flag} ]; do sleep 0.02; done", f"{served}/0.tar"
    url = f"pipe:head -c 5000 {tar}; {wait}; tail -c +5001 {tar}"
    folder = tmp_path / "cache"
    child = multiprocessing.get_context("fork").Process(target=_hang, args=(folder, url))
    child.start()
    while not any(path.stat().st_size for path in folder.glob("*.part")):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    flag.touch()
    assert len(list(folder.glob("*.part"))) == 1
    reader, _ = cached(folder)
    assert reader.read(url, 0, SIZE) == (served / "0.tar").read_bytes()
    assert kept(folder) == ["0.tar"]
    left = folder / "0123456789abcdef-left.part"  # another's, of a process that is dead
    left.write_bytes(bytes(SIZE))
    reader.size(f"pipe:cat {served}/1.tar")
    assert kept(folder) == ["0.tar", "1.tar"]


def test_a_command_that_fails_is_tried_again_and_named(served, tmp_path):
    once = (
        f"if [ -e {tmp_path}/ran ]; then cat {served}/0.tar; else touch {tmp_path}/ran; exit 3; fi"
    )
    reader, faults = cached(tmp_path / "cache")
    assert reader.size(f"pipe:{once}") == SIZE
    assert faults == ["exit status 3"]
    with pytest.raises(StorageError, match="1.tar failed 3 times, .* exit status 4"):
        reader.size(f"pipe:cat {served}/1.tar; exit 4")
    with pytest.raises(StorageError, match="exit status 127: the shell cannot start it"):
        reader.size("pipe:no-such-command-anywhere")
    impatient, faults = cached(tmp_path / "cache", retries=Retries(2, 0.0, 0.2, 0.0))
    with pytest.raises(StorageError, match="failed 2 times, the last time with stalled for 0.2 s"):
        impatient.size("pipe:sleep 60")
    assert kept(tmp_path / "cache") == ["0.tar"]


def test_a_tar_file_without_an_end_is_read_twice_before_it_is_believed(served, tmp_path):
    part, whole = f"head -c 9000 {served}/0.tar", f"cat {served}/0.tar"
    once = f"if [ -e {tmp_path}/ran ]; then {whole}; else touch {tmp_path}/ran; {part}; fi"
    reader, faults = cached(tmp_path / "cache")
    assert reader.size(f"pipe:{once}") == SIZE
    assert reader.size(f"pipe:{part}") == 9000  # twice the same: what there is
    assert faults == ["cut short"] * 2


@pytest.mark.parametrize("kind", ["reset", "cut", "503"])
def test_a_server_without_ranges_is_asked_again(served, tmp_path, kind):
    with FaultyServer(served, ranges=False) as server:
        reader, faults = cached(tmp_path / "cache", retries=Retries(9, 0.0, 5.0, 0.0))
        server._left = [[Fault("0.tar", kind), 3]]
        with reader.open(server.url("0.tar")) as file:
            assert file.read() == (served / "0.tar").read_bytes()
    assert faults


def test_a_shard_that_changed_is_downloaded_again_or_refused(served, tmp_path):
    with FaultyServer(served) as server:
        url = server.url("0.tar")
        cached(tmp_path / "cache")[0].size(url)
        (served / "0.tar").write_bytes(b"new" * 5000)
        old, _ = cached(tmp_path / "cache")
        assert old.read(url, 0, 1, SIZE) == bytes([1])  # the copy is what was indexed
        new, _ = cached(tmp_path / "cache")
        assert new.size(url) == 15000
        assert new.read(url, 0, 3, 15000) == b"new"
        for size in (SIZE, 7):
            with pytest.raises(StorageError, match=f"changed size from {size} to 15000"):
                cached(tmp_path / "cache")[0].read(url, 0, 1, size)


def test_a_full_local_disk_is_named(served, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(local_cache.Copy, "write", full)
    reader, faults = cached(tmp_path / "cache")
    with (
        FaultyServer(served) as server,
        pytest.raises(StorageError, match="device: data.local_cache.folder=.*cache: "),
    ):
        reader.size(server.url("0.tar"))
    assert faults == ["No space left on device"] * 2
    assert kept(tmp_path / "cache") == []


def test_indexing_through_the_cache_downloads_each_shard_once(tmp_path):
    tiny.write_shards(tmp_path / "shards", [5, 5])
    names = [f"train-{i:06d}.tar" for i in range(2)]
    plain = load_index(str(tmp_path / "shards"), Storage(), progress=False)
    sizes = sum(plain.sizes)
    with FaultyServer(tmp_path / "shards") as server:
        reader, _ = cached(tmp_path / "cache", 100)
        urls = [server.url(name) for name in names]
        index = load_index(urls, reader, progress=False)
        again = load_index(urls, reader, progress=False)
        spans = [request.span for request in server.requests]
    assert sum(end - start + 1 for start, end in spans if end) == sizes
    pipes = [f"pipe:cat {tmp_path}/shards/{name}" for name in names]
    piped = load_index(pipes, cached(tmp_path / "pipes", 100)[0], progress=False)
    for other in (index, again, piped):
        assert other.table == plain.table
        assert other.digest == plain.digest


def test_indexing_commands_by_the_command_line(tmp_path, capsys):
    tiny.write_shards(tmp_path / "shards", [5])
    command = ["data", "index", f"pipe:cat {tmp_path}/shards/train-000000.tar"]
    command += ["--output", str(tmp_path / "index"), "--attempts", "1"]
    assert main(command) == 2
    assert "Set data.local_cache to a folder" in capsys.readouterr().err
    assert main([*command, "--local-cache", str(tmp_path / "cache"), "--max-gib", "1"]) == 0
    assert "5 samples in 1 shard," in capsys.readouterr().out
    assert [path.name[9:] for path in (tmp_path / "index").iterdir()] == ["train-000000.tar.index"]


def test_object_storage_goes_through_the_cache(tmp_path):
    files = fsspec.filesystem("memory")
    data = shard(tmp_path / "served" / "0.tar").read_bytes()
    files.pipe_file("/bucket/0.tar", data)
    reader, faults = cached(tmp_path / "cache")
    with reader.open("memory://bucket/0.tar") as file:
        assert file.read() == data
    files.rm("/bucket", recursive=True)
    assert reader.read("memory://bucket/0.tar", 5, 5, SIZE) == data[5:10]
    assert faults == []


def test_headers_of_the_command_line_reach_the_server(tmp_path, capsys, monkeypatch):
    tiny.write_shards(tmp_path / "shards", [2])
    monkeypatch.setenv("TOKEN", "s3cret")
    with FaultyServer(tmp_path / "shards") as server:
        command = ["data", "index", server.url("train-000000.tar"), "--output", str(tmp_path)]
        assert main([*command, "--header", "Authorization: Bearer ${TOKEN}"]) == 0
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret"}
        for text, message in (("Bearer s3cret", "NAME: VALUE"), ("Cookie: s3cret", "environment")):
            assert main([*command, "--header", text]) == 2
            error = capsys.readouterr().err
            assert message in error
            assert "s3cret" not in error
