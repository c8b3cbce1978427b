"""Damaged and hostile files: a short run over every reader, and planted faults that are counted."""

import io
import os
import pathlib
import pickle
import subprocess
import tarfile
from collections import Counter

import fuzz
import pytest
from fuzz_inputs import opcodes, pax, png_chunks, png_file, tar_member
from fuzz_readers import READERS, Reader

INPUTS = 260


@pytest.mark.filterwarnings("default")  # as in a user's process
def test_every_reader_accepts_what_is_valid_and_refuses_the_rest_in_one_line():
    outcomes = fuzz.run(READERS, fuzz.plan(READERS, INPUTS), seed=1)
    assert [fuzz.fault_text(group) for group in fuzz.distinct(outcomes)] == []
    assert {o.reader for o in outcomes if o.outcome == "accepted"} == set(READERS)


def endless(folder):
    while True:
        pass


def waiting(folder):
    os.mkfifo(folder / "pipe")
    (folder / "pipe").read_bytes()


def large(folder):
    return len(b"x" * (300 << 20))


def hidden(folder):
    try:
        bytearray(1 << 40)
    except MemoryError as error:
        raise ValueError("too large") from error


def key_error(folder):
    raise KeyError("no")


def long_line(folder):
    raise OSError("x" * 3000)


def colored(folder):
    print("\x1b[31mred")


def backwards(folder):
    print("\u202etxt.exe")


def crash(folder):
    os.abort()


def above(folder):
    (folder / "../../planted").write_text("x")


def by_link(folder):
    (folder / "link").symlink_to(folder.parents[1])
    (folder / "link" / "folder").mkdir()


def program(folder):
    subprocess.run(["true"])


def on_class(folder):
    pathlib.PosixPath.planted = 1


def on_class_that_is_needed(folder):
    pathlib.PosixPath.read_text = None


def environment(folder):
    os.environ["PLANTED"] = "1"


def elsewhere(folder):
    os.chdir("/")


def blind(folder):
    raise ValueError("refused, whatever it is")


def fine(folder):
    return (folder / "input").read_bytes()


def refusing(folder):
    if (folder / "input").read_text() != "valid":
        raise ValueError("damaged")


PLANTED = {
    "hang": [endless, waiting],
    "blow": [large, hidden],
    "traceback": [
        *(key_error, long_line, colored, backwards, crash),
    ],
    "outside": [above, by_link, program, on_class, on_class_that_is_needed, environment, elsewhere],
    "lost": [blind],
    "accepted": [fine],
    "refused": [refusing],
}


def make(draw, folder, valid):
    (folder / "input").write_text("valid" if valid else "damaged")


def test_planted_faults_are_counted():
    readers = {read.__name__: Reader(make, read) for kind in PLANTED.values() for read in kind}
    # refusing is to refuse the second input, which is damaged, and not the first
    tasks = [(name, int(name == "refusing")) for name in readers] + [("refusing", 0)]
    outcomes = fuzz.run(readers, tasks, seconds=1.0, memory=128 << 20)
    wanted = Counter((kind, read.__name__) for kind, some in PLANTED.items() for read in some)
    wanted["accepted", "refusing"] += 1
    assert Counter((o.outcome, o.reader) for o in outcomes) == wanted
    faults = [o for o in outcomes if o.outcome in fuzz.FAULTS]
    assert sum(map(len, fuzz.distinct(outcomes))) == len(faults)
    assert f"| all | {len(tasks)} |" in fuzz.table(outcomes)


def test_a_fault_ends_its_process_and_no_other():
    readers = {"above": Reader(make, on_class), "fine": Reader(make, fine)}
    outcomes = fuzz.run(readers, [("above", 0), ("fine", 0), ("above", 1), ("fine", 1)])
    assert Counter((o.outcome, o.reader) for o in outcomes) == {
        ("outside", "above"): 2,
        ("accepted", "fine"): 2,
    }


@pytest.mark.parametrize("name", READERS)
def test_an_input_is_a_function_of_seed_reader_and_number(name, tmp_path):
    READERS[name].prepare()
    made = []
    for i, (seed, number) in enumerate([(5, 8), (5, 9), (5, 9), (5, 10)]):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert fuzz.make_input(READERS[name], seed, name, number, folder) == (number % 8 == 0)
        made.append(
            {
                str(path.relative_to(folder)): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file() and path.stat().st_size < 1 << 30
            }
        )
    assert made[1] == made[2]
    assert not made[0] == made[1] == made[3]


def test_every_reader_gets_inputs_by_its_share():
    readers = {"a": Reader(make, fine, 3), "b": Reader(make, fine), "c": Reader(make, fine, 0.01)}
    tasks = fuzz.plan(readers, 40)
    assert Counter(name for name, _ in tasks) == {"a": 30, "b": 10, "c": 2}
    assert [number for name, number in tasks if name == "b"] == list(range(10))


def test_damage_keeps_checksums_and_opcodes():
    data = pax({"path": "a\u00e9" * 80}) + tar_member(b"x", b"content") + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        [member] = tar
        assert member.name == "a\u00e9" * 80
        assert tar.extractfile(member).read() == b"content"
    value = {"a": [1, 2.5, None, "text"], "b": (True, b"x")}
    assert b"".join(opcodes(pickle.dumps(value, 4))) == pickle.dumps(value, 4)
    chunks = [(b"IHDR", b"x" * 13), (b"IEND", b"")]
    assert png_chunks(png_file(chunks)) == chunks
