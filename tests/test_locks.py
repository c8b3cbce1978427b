"""Locks, and what dead processes leave behind."""

import json
import os
import subprocess
import sys
import time

import pytest

from zsnr import locks
from zsnr.files import new_file, new_folder, replacing
from zsnr.locks import LOCK, Lock, LockedError, remove_leftovers, unfinished

DEAD = 2**22 - 1  # no pid is so large


def foreign(path, **changes):
    """Write a lock of another process."""
    owner = {**vars(Lock(path, path)._owner), "token": "other", **changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(owner))
    return path


def idle(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_lock_names_its_owner_and_goes_with_it(tmp_path):
    path = tmp_path / "run" / LOCK
    with Lock(path, path.parent):
        with pytest.raises(LockedError) as refused:
            Lock(path, path.parent).take()
        for part in (str(path.parent), f"pid {os.getpid()}", "since 20", "zsnr", str(path)):
            assert part in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not list(path.parent.iterdir())
    with Lock(path, path.parent):
        assert path.exists()


@pytest.mark.parametrize(
    ("changes", "seconds", "free"),
    [
        ({"pid": DEAD}, 0, True),
        ({"start": 1}, 0, True),  # the pid is used again
        ({}, 10**6, False),  # it lives, but is stopped
        ({"place": "elsewhere", "host": "node7"}, 10, False),
        ({"place": "elsewhere", "host": "node7"}, locks.SILENCE + 5, True),
        ({"pid": "1"}, 10, False),
        ({"pid": "1"}, locks.SILENCE + 5, True),
    ],
)
def test_only_a_dead_owners_lock_is_taken(tmp_path, changes, seconds, free):
    path = foreign(tmp_path / LOCK, **changes)
    idle(path, seconds)
    if free:
        with Lock(path, tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        return
    before = path.read_text()
    with pytest.raises(LockedError, match="in use"):
        Lock(path, tmp_path).take()
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "[1]", "{}", "\x00", "[" * 5000])
def test_a_lock_that_cannot_be_read_goes_when_it_is_old(tmp_path, content):
    path = tmp_path / LOCK
    path.write_text(content)
    with pytest.raises(LockedError, match="an unknown process"):
        Lock(path, tmp_path).take()
    idle(path, locks.SILENCE + 5)
    with Lock(path, tmp_path):
        pass


def test_a_killed_process_holds_no_lock(tmp_path):
    path = tmp_path / LOCK
    code = "import sys, time; from pathlib import Path; from zsnr.locks import Lock; "
    code += "Lock(Path(sys.argv[1]), Path('x')).take(); print('taken', flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"taken\n"
        with pytest.raises(LockedError, match=f"pid {other.pid}"):
            Lock(path, tmp_path).take()
        other.kill()  # not yet waited for, so its pid is still there
        with Lock(path, tmp_path, patience=20):
            pass


def test_file_systems_without_links_or_locks_have_locks_too(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", unsupported)
    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    path = foreign(tmp_path / LOCK, pid=DEAD)
    with Lock(path, tmp_path), pytest.raises(LockedError):
        Lock(path, tmp_path).take()


def test_an_owner_renews_its_lock_and_stops_if_it_has_lost_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "RENEWAL", 0.01)
    left = []
    monkeypatch.setattr(locks.os, "_exit", lambda code: left.append(code))
    path = tmp_path / LOCK
    with Lock(path, tmp_path):
        idle(path, 100)
        while time.time() - path.stat().st_mtime > 50:
            time.sleep(0.01)
        foreign(path, host="node7\x1b[2J")
        while not left:
            time.sleep(0.01)
    assert left[0] == locks.EXIT_CODE
    assert "was taken over by node7\\x1b[2J, pid" in capsys.readouterr().err
    assert path.exists()  # the other's


def test_a_lock_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run cannot be written: \w"):
        Lock(tmp_path / "file" / "run" / LOCK, tmp_path / "file" / "run").take()


def test_unfinished_names_belong_to_a_process_of_a_place(tmp_path, monkeypatch):
    mine = unfinished(tmp_path / "a.json")
    assert unfinished(tmp_path / "a.json") != mine
    assert f"-{os.getpid()}-" in mine.name
    monkeypatch.setattr(locks, "_place", lambda: "0" * 8)
    theirs = unfinished(tmp_path / "a.json")
    assert theirs.name.split(".")[3][:8] != mine.name.split(".")[3][:8]
    assert len(unfinished(tmp_path / ("n" * 255)).name) < 255


def test_only_what_the_dead_left_is_removed(tmp_path):
    living, marks = unfinished(tmp_path / "a.json"), {}
    for name in ("dead", "reused", "recent", "old", "folder", "nameless"):
        mark = living.name.replace("a.json", name)
        marks[name] = tmp_path / mark
    pid = f"-{os.getpid()}-"
    dead = marks["dead"].with_name(marks["dead"].name.replace(pid, f"-{DEAD}-"))
    folder = marks["folder"].with_name(marks["folder"].name.replace(pid, f"-{DEAD}-"))
    place = living.name.split(".")[3][:8]
    recent, old = (
        marks[name].with_name(marks[name].name.replace(place, "0" * 8))
        for name in ("recent", "old")
    )
    nameless, other = tmp_path / ".a.json.123.part", tmp_path / ".b"
    (folder / "inside").mkdir(parents=True)
    for path in (living, dead, recent, old, nameless, other):
        path.write_text("")
    idle(old, 10**6)
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living, recent, nameless, other])
    idle(nameless, 10**6)
    remove_leftovers(tmp_path, "b.json")
    assert nameless.exists()
    remove_leftovers(tmp_path, "a.json")
    assert not nameless.exists()
    remove_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_two_cannot_write_one_new_thing(tmp_path, new):
    path = tmp_path / "thing"
    with new(path) as beside:
        beside.touch()
        with pytest.raises(LockedError, match="thing is in use"), new(path):
            pass
    assert path.exists()
    assert not list(tmp_path.glob(".*"))


def test_replacing_leaves_nothing_when_it_fails(tmp_path):
    def fail():
        with replacing(tmp_path / "a") as beside:
            beside.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not list(tmp_path.iterdir())
