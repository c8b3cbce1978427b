"""The index, what is selected of it, and what is broken."""

import io
import json
import os
import tarfile

import numpy as np
import PIL.Image
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from zsnr.cli import main
from zsnr.data.buckets import AspectBuckets, assign
from zsnr.data.faults import (
    BudgetError,
    Fault,
    Ledger,
    PackedFaults,
    check_budget,
    read_ledger,
    summarize,
)
from zsnr.data.filters import Filter
from zsnr.data.index import index_path, load_index
from zsnr.data.index_file import read_rows
from zsnr.data.samples import select
from zsnr.data.scan import make_index
from zsnr.data.sources import Shard, Source, find_shards, source_names
from zsnr.data.storage import Storage


def index(source, **options):
    return load_index(str(source), Storage(), progress=False, **options)


def keys(index):
    return index.table.column("key").to_pylist()


def reasons(index):
    return {fault.key: fault.reason for fault in index.faults}


def test_shards_by_folder_pattern_and_list(tmp_path):
    tiny.write_shards(tmp_path, [3, 1, 2])
    names = [f"train-00000{i}.tar" for i in range(3)]
    for source in (
        str(tmp_path),
        f"{tmp_path}/train-{{000000..000002}}.tar",
        f"{tmp_path}/train-*.tar",
        f"file://{tmp_path}/train-*.tar",
        [f"{tmp_path}/{name}" for name in names],
        [Source([f"{tmp_path}/{name}" for name in names])],
    ):
        assert [shard.name for shard in find_shards(source)] == names
    assert keys(index(tmp_path)) == [f"{i:05d}" for i in range(6)]
    weighted = [Source(f"{tmp_path}/train-000000.tar", 2), f"{tmp_path}/train-000001.tar"]
    assert [shard.weight for shard in find_shards(weighted)] == [2, 1]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/photos", "data/art"], ["photos", "art"]),
        (["a/train-*.tar", "b/train-*.tar"], ["a", "b"]),
        (["photos", "laion/{00000..00999}.tar"], ["photos", "laion_00000..00999_.tar"]),
        (["https://me:secret@x.org/a/0.tar?key=1", "https://x.org/b/0.tar"], ["a", "b"]),
        (["data", "data/art"], ["source-1", "art"]),
        (["x/a b/y", "x/a_b/y"], ["a_b", "a_b-2"]),
        ([["a/1.tar", "a/2.tar"], "a/3.tar"], ["1.tar", "3.tar"]),
    ],
)
def test_sources_are_named_by_what_tells_their_paths_apart(paths, names):
    assert source_names([Source(path) for path in paths]) == names
    given = [Source(paths[0], name="mine"), Source(paths[1])]
    assert source_names(given)[0] == "mine"
    for bad in ("", "a/b", "a b", "x" * 65, 3):
        with pytest.raises(ValueError, match="wanted letters, digits"):
            Source("a", name=bad)


def test_ratios_are_for_all_sources_and_part_of_the_digest(tmp_path):
    a, b = (str(tiny.write_shards(tmp_path / name, [2, 1])) for name in "ab")
    shards = find_shards([Source(a, ratio=2), Source(b, ratio=1)])
    assert [(s.source, s.ratio) for s in shards] == [(0, 2.0), (0, 2.0), (1, 1.0), (1, 1.0)]
    for other in (b, Source(b), Source(b, 2, ratio=1)):
        with pytest.raises(ValueError, match="wanted a ratio for every source, and no weights"):
            find_shards([Source(a, ratio=2), other])
    for ratio in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"ratio={ratio:g}: wanted a number"):
            Source(a, ratio=ratio)
    found = [
        select(load_index([Source(a, ratio=x), Source(b, ratio=y)], Storage()), 8)
        for x, y in ((2, 1), (2.0, 1.0), (1, 2))
    ]
    assert found[0].digest == found[1].digest != found[2].digest
    assert found[0].digest != select(load_index([a, b], Storage()), 8).digest


def test_addresses_are_spelled_out():
    assert [s.url for s in find_shards("https://host/{00..02}.tar?a=b")] == [
        f"https://host/0{i}.tar?a=b" for i in range(3)
    ]
    assert [s.url for s in find_shards("pipe:cat {a,b}.tar")] == ["pipe:cat {a,b}.tar"]
    with pytest.raises(FileNotFoundError, match="a web server cannot list files"):
        find_shards("https://host/*.tar")


def test_patterns_and_folders_of_other_file_systems():
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("b.tar", "a.tar", "c.txt"):
        memory.pipe(f"/shards/{name}", b"")
    wanted = ["memory://shards/a.tar", "memory://shards/b.tar"]
    assert [s.url for s in find_shards("memory://shards/*.tar")] == wanted
    assert [s.url for s in find_shards("memory://shards/")] == wanted
    with pytest.raises(FileNotFoundError, match="No shards at memory://nothing/"):
        find_shards("memory://nothing/")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("nowhere", "does not exist"),
        ("nowhere-*.tar", "matches no file"),
        ("{0..3}.tar", "matches no file"),
        ("photoz", "does not exist: .* Did you mean PLACE/photos[?]"),
        ("photoz/train", "does not exist: .* Did you mean PLACE/photos[?]"),
        ("photoz/*.tar", "matches no file: .* Did you mean PLACE/photos[?]"),
    ],
)
def test_nothing_there(tmp_path, source, problem):
    (tmp_path / "photos").mkdir()
    with pytest.raises(FileNotFoundError, match=problem.replace("PLACE", str(tmp_path))):
        find_shards(str(tmp_path / source))
    with pytest.raises(FileNotFoundError, match="No shards at .*photos: .* It is empty"):
        find_shards(str(tmp_path / "photos"))
    with pytest.raises(FileNotFoundError, match="empty"):
        find_shards([])


def test_rows_say_where_the_parts_are(tmp_path):
    record = {"caption": "x" * 80, "aesthetic": 5.5, "width": 3, "nsfw": "no", "sub": {"a": 1}}
    members = {
        "./v1.0/00001.png": tiny.png("red", (20, 24)),
        "./v1.0/00001.txt": b"red",
        "./v1.0/00001.json": json.dumps(record).encode(),
    }
    path = tiny.write_shard(tmp_path / "x.tar", members)
    found = index(path, fields=["aesthetic", "nsfw", "caption", "absent"])
    row = found.table.to_pylist()[0]
    assert (row["key"], row["height"], row["width"]) == ("v1.0/00001", 24, 20)
    data = path.read_bytes()
    for part, name in (("image", "png"), ("text", "txt"), ("json", "json")):
        offset, size = row[f"{part}_offset"], row[f"{part}_size"]
        assert data[offset : offset + size] == members[f"./v1.0/00001.{name}"]
    assert (row["json.aesthetic"], row["json.nsfw"]) == (5.5, "no")
    assert "json.caption" not in row  # too long for a filter
    assert not found.faults


def test_exif_turns_the_size(tmp_path):
    from PIL import Image

    exif, data = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(data, "JPEG", exif=exif)
    path = tiny.write_shard(tmp_path / "x.tar", {"a.jpg": data.getvalue(), "a.txt": b""})
    row = index(path).table.to_pylist()[0]
    assert (row["height"], row["width"]) == (30, 10)


def test_what_is_broken_is_named_and_the_rest_is_there(tmp_path):
    good = tiny.png("red")
    members = {
        "a.png": good,
        "a.txt": b"fine",
        "b.png": b"",
        "b.txt": b"zero bytes",
        "c.png": good,
        "d.txt": b"no picture",
        "e.png": good,
        "e.txt": b"bad json",
        "e.json": b"{",
        "f.png": b"no picture at all",
        "f.txt": b"f",
        "g.png": good,
        "g.json": b'{"caption": "g"}',
    }
    found = index(tiny.write_shard(tmp_path / "x.tar", members))
    assert keys(found) == ["a", "g"]
    why = reasons(found)
    assert why.keys() == {"b", "c", "d", "e", "f"}
    for key, text in {
        "b": "0 bytes",
        "c": "no caption",
        "d": "no image",
        "e": "json is not readable JSON",
        "f": "not a readable image",
    }.items():
        assert text in why[key]


def test_a_name_twice(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.txt", "a.txt", "a.png", "b.png", "b.txt"):
            member = tarfile.TarInfo(name)
            data = tiny.png("red") if name.endswith("png") else b"x"
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = index(tmp_path / "x.tar")
    assert keys(found) == ["b"]
    assert "two files of this name" in reasons(found)["a"]


def test_every_truncation_is_noticed(tmp_path):
    whole = (tiny.write_shards(tmp_path / "w", [4]) / "train-000000.tar").read_bytes()
    with tarfile.open(tmp_path / "w" / "train-000000.tar") as tar:
        ends = [(m.name, m.offset_data + m.size) for m in tar]
    content = max(end for _, end in ends)
    path = tmp_path / "cut.tar"
    for size in range(100, content + 512, 100):  # beyond that, the end's zeros begin
        path.write_bytes(whole[:size])
        found = index(path)
        assert [f.kind for f in found.faults if f.key is None] == ["shard"], size
        complete = [name for name, end in ends if end <= size]
        pairs = [key for key in ("00000", "00001", "00002", "00003") if f"{key}.txt" in complete]
        assert keys(found) == pairs, size


@pytest.mark.parametrize("place", ["{folder}/", "http://127.0.0.1:9/"])
def test_patterns_that_name_endless_shards_are_refused(tmp_path, place):
    pattern = place.format(folder=tmp_path) + "{000000000..999999999}.tar"
    with pytest.raises(ValueError, match=r"lists 1e\+09 shards: wanted at most"):
        find_shards(pattern)


def test_garbage_and_missing_shards_are_faults(tmp_path):
    tiny.write_shards(tmp_path, [2])
    (tmp_path / "train-000001.tar").write_bytes(b"garbage" * 1000)
    (tmp_path / "train-000002.tar").write_bytes(b"")
    found = index(f"{tmp_path}/train-{{000000..000003}}.tar")
    assert len(keys(found)) == 2
    assert [f.kind for f in found.faults] == ["shard"] * 3
    text = [f.reason for f in found.faults]
    assert "not a readable tar" in text[0]
    assert text[2] == "missing"
    garbled = bytearray((tmp_path / "train-000000.tar").read_bytes())
    garbled[2048:2560] = os.urandom(512)  # a header in the middle
    (tmp_path / "train-000000.tar").write_bytes(garbled)
    found = make_index(Shard(f"{tmp_path}/train-000000.tar"), Storage())
    assert "no end" in found.faults[0].reason


def test_an_index_is_kept_and_made_again_when_the_shard_changes(tmp_path):
    path = tiny.write_shards(tmp_path, [3]) / "train-000000.tar"
    first = index(path)
    kept = index_path(Shard(str(path)), None)
    assert kept.is_file()
    assert index(path).digest == first.digest
    kept.write_bytes(b"no parquet")
    with pytest.warns(UserWarning, match=f"{kept} is not used as an index: .* It is made again"):
        assert index(path).digest == first.digest
    assert len(read_rows(kept)) > 0  # mended
    tiny.write_shard(path, {"z.png": tiny.png("red"), "z.txt": b"z"})
    assert keys(index(path)) == ["z"]
    other = tmp_path / "elsewhere"
    index(path, folder=other)
    assert len(list(other.glob("*.index"))) == 1


def test_the_digest_is_of_the_content(tmp_path):
    for name, counts in (("a", [2, 3]), ("b", [2, 3]), ("c", [3, 2])):
        tiny.write_shards(tmp_path / name, counts)
    digests = [index(tmp_path / name).digest for name in "abc"]
    assert digests[0] == digests[1] != digests[2]


def test_a_folder_of_pictures(tmp_path):
    for name in ("a.png", "sub/b.png", "c.png", "d.PNG"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tiny.png("red"))
    (tmp_path / "a.txt").write_text("a cat")
    lines = [{"file_name": "sub/b.png", "text": "bär", "score": 3}, {"file_name": "gone.png"}]
    lines += [{"file_name": "../away.png", "text": "x"}, {"file_name": os.devnull, "text": "x"}]
    lines = "\n".join(map(json.dumps, lines)) + "\n\n{\n"
    (tmp_path / "metadata.jsonl").write_text(lines + json.dumps({"file_name": "d.PNG"}))
    found = index(tmp_path, fields=["score"])
    assert keys(found) == ["a.png", "d.PNG", "sub/b.png"]
    assert found.table.column("json.score").to_pylist() == [None, None, 3.0]
    why = reasons(found)
    outside = {"../away.png", os.devnull}
    assert why.keys() == {"c.png", "gone.png", "metadata.jsonl, line 6", *outside}
    assert all("outside of the folder" in why[name] for name in outside)
    assert "no caption" in why["c.png"]
    samples = select(found, 8)
    assert list(samples.faults)[-1].key == "d.PNG"  # its line has no text
    sample = samples[1]
    assert Storage().read(sample.json.url, sample.json.offset, sample.json.size).startswith(b"{")
    assert not list(tmp_path.rglob("*.index"))


def shard_with(tmp_path, records, sizes=None):
    members = {}
    for i, record in enumerate(records):
        size = (20, 24) if sizes is None else sizes[i]
        members |= {
            f"{i}.png": tiny.png("red", size),
            f"{i}.txt": b"x",
            f"{i}.json": json.dumps(record).encode(),
        }
    return tiny.write_shard(tmp_path / "x.tar", members)


def kept_by(tmp_path, *filters, records):
    found = index(shard_with(tmp_path, records), fields=[f.field for f in filters])
    samples = select(found, 8, filters=filters)
    return [int(key.as_py()) for key in samples.keys], samples.removed


def test_filters(tmp_path):
    records = [
        {"aesthetic": 4.0, "lang": "en", "unsafe": False},
        {"aesthetic": 6, "lang": "de", "unsafe": True},
        {"aesthetic": 7.5, "lang": "en", "unsafe": True},
        {"lang": None, "unsafe": False},
        {"aesthetic": float("nan"), "lang": "fr", "unsafe": False},
    ]
    kept, removed = kept_by(
        tmp_path,
        Filter("aesthetic", min=5, missing="keep"),
        Filter("lang", one_of=("en", "fr"), missing="drop"),
        records=records,
    )
    assert kept == [2, 4]
    assert list(removed.values()) == [1, 2]
    assert kept_by(tmp_path, Filter("aesthetic", max=6, missing="drop"), records=records)[0] == [
        0,
        1,
    ]
    assert kept_by(tmp_path, Filter("lang", none_of=("de",), missing="keep"), records=records)[
        0
    ] == [
        0,
        2,
        3,
        4,
    ]
    assert kept_by(tmp_path, Filter("image_height", min=24), records=records)[0] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="No samples are left of 5.*image_width >= 21 removed 5"):
        kept_by(tmp_path, Filter("image_width", min=21), records=records)
    with pytest.raises(ValueError, match="2 of 5 samples have no 'aesthetic'.*keep or drop"):
        kept_by(tmp_path, Filter("aesthetic", min=5), records=records)
    with pytest.raises(ValueError, match="5 of 5 samples have no 'typo'"):
        kept_by(tmp_path, Filter("typo", min=5), records=records)
    with pytest.raises(ValueError, match="does not match the field, which holds string"):
        kept_by(tmp_path, Filter("lang", min=5, missing="keep"), records=records)
    with pytest.raises(ValueError, match="does not match"):
        kept_by(tmp_path, Filter("lang", one_of=(1.0,), missing="keep"), records=records)
    with pytest.raises(ValueError, match="does not match"):
        kept_by(tmp_path, Filter("aesthetic", one_of=("a",), missing="keep"), records=records)


@given(st.lists(st.one_of(st.none(), st.floats(-5, 5)), min_size=1, max_size=30), st.floats(-5, 5))
@settings(max_examples=60, deadline=None)
def test_a_filter_decides_as_plain_python_does(values, limit):
    import pyarrow as pa

    column = pa.array(values, pa.float64())
    for missing in ("keep", "drop"):
        mine = Filter("f", min=limit, missing=missing).keeps(column, len(values))
        theirs = [missing == "keep" if v is None else v >= limit for v in values]
        assert mine.tolist() == theirs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no min, max"),
        ({"min": 2, "max": 1}, "keeps nothing"),
        ({"min": 1, "missing": "x"}, "x"),
    ],
)
def test_bad_filters(options, message):
    with pytest.raises(ValueError, match=message):
        Filter("f", **options)


def test_huge_pictures_are_faults(tmp_path):
    path = shard_with(tmp_path, [{}, {}], [(20, 24), (40, 10)])
    samples = select(index(path), 8, max_pixels=450)
    assert [key.as_py() for key in samples.keys] == ["1"]
    assert next(iter(samples.faults)).reason == "20 x 24 pixels: wanted at most 450"


def test_bucket_shapes():
    shapes = AspectBuckets(step=64, max_ratio=2).shapes(512)
    assert (512, 512) in shapes
    for h, w in shapes:
        assert h % 64 == w % 64 == 0
        assert h * w <= 512**2
        assert max(h, w) / min(h, w) <= 2
        assert (w, h) in shapes
        assert (h, w + 64) not in shapes  # no larger one has the same height
    with pytest.raises(ValueError, match="not a multiple of data.aspect.step"):
        AspectBuckets(step=64).shapes(500)


@given(st.integers(1, 4000), st.integers(1, 4000))
@settings(max_examples=60, deadline=None)
def test_the_bucket_is_the_nearest_in_ratio(h, w):
    shapes = AspectBuckets(step=64, max_ratio=3).shapes(512)
    mine = assign(np.array([h]), np.array([w]), shapes)[0]
    off = [abs(np.log(h / w) - np.log(a / b)) for a, b in shapes]
    assert off[mine] == pytest.approx(min(off))


def fault(i, kind="sample", position=None):
    return Fault(kind, "s.tar", str(i), "broken", position)


def test_the_budget():
    check_budget([fault(i) for i in range(10)], 10, 1, 0.0)  # ten are free
    with pytest.raises(BudgetError, match=r"0 of 1 shards, 11 of 100 samples. 11 x sample: broken"):
        check_budget([fault(i) for i in range(11)], 100, 1, 0.1)
    check_budget([fault(i) for i in range(11)], 110, 1, 0.1)
    check_budget([fault(0)] * 50 + [fault(i, "passing") for i in range(90)], 1, 1, 0.0)
    shard = Fault("shard", "a.tar", None, "missing")
    check_budget([shard], 0, 2, 0.5)
    with pytest.raises(BudgetError, match="1 of 3 shards"):
        check_budget([shard], 0, 3, 0.3)


def test_the_ledger(tmp_path):
    path = tmp_path / "faults" / "rank-0.jsonl"
    ledger = Ledger(path)
    ledger.write([fault(1, position=3), fault(1, position=9), fault(2, "passing", 5)])
    ledger.write([fault(2, "passing", 12), fault(3, position=20)])
    wanted = [fault(1, position=3), fault(2, "passing", 5), fault(2, "passing", 12)]
    assert read_ledger(path) == [*wanted, fault(3, position=20)]
    with open(path, "a") as file:
        file.write('{"kind": "samp')  # a crash
    ledger = Ledger(path, position=13)
    assert read_ledger(path) == wanted
    assert (ledger.met.samples, ledger.met.summary()) == (1, summarize(wanted))
    ledger.write([fault(1, position=30), fault(3, position=20)])
    assert read_ledger(path) == [*wanted, fault(3, position=20)]
    assert ledger.met.samples == 2
    assert "3 x" not in summarize(wanted)
    assert summarize([]) == ""


def test_a_folder_of_images_takes_no_folder_for_its_index(tmp_path, capsys):
    source, output = tmp_path / "photos", tmp_path / "index"
    source.mkdir()
    (source / "a.png").write_bytes(tiny.png((9, 9, 9)))
    (source / "a.txt").write_text("a")
    assert main(["data", "index", str(source), "--output", str(output)]) == 2
    assert "a folder of images, which has no index file" in capsys.readouterr().err
    assert not output.exists()
    assert main(["data", "index", str(source)]) == 0
    assert "have no index file: they are listed each time" in capsys.readouterr().out


def test_one_cause_is_one_line_with_two_examples(tmp_path):
    for name in ("IMG", "DSC_7", "a", "my photo 3", "c.v1.2"):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.jpg")
    told = summarize(index(tmp_path).faults)
    assert told == (
        "5 x sample: it has no caption: no .txt file of its name, no line in metadata.jsonl "
        f"(such as 'DSC_7.jpg' and 'IMG.jpg' in {tmp_path})"
    )
    keys = ("clip", "a", "a.b")
    faults = [
        Fault("sample", "0.tar", key, f"2 files, such as {key}.v1.jpg and {key}.txt: no")
        for key in keys
    ]
    assert summarize(faults).startswith("3 x sample: 2 files, such as clip.v1.jpg and clip.txt: no")
    apart = [Fault("sample", "0.tar", "a", "broken"), Fault("sample", "1.tar", "b", "broken")]
    assert summarize(apart) == "2 x sample: broken ('a' in 0.tar and 'b' in 1.tar)"
    lost = Fault("shard", "0.tar", None, "it is gone")
    assert summarize([lost]) == "1 x shard: it is gone (in 0.tar)"


@pytest.mark.parametrize(
    "foreign",
    [
        b"\xff\xfe\n",
        b"[" * 10**5 + b"\n",
        b"{}\n",
        b'{"kind": "sample", "shard": 1, "key": "k", "reason": "r"}\n',
        b'{"kind": "sample", "shard": "s", "key": "k", "reason": "r", "position": "3"}\n',
        b'{"kind": "other", "shard": "s", "key": "k", "reason": "r", "position": 3}\n',
        b'{"kind": "sample", "shard": "s", "key": "k", "reason": "r", "position": 1e999}\n',
        b"x" * 3_000_000 + b"\n",
        b"\0" * 5000 + b"\n",
    ],
)
def test_a_damaged_ledger_ends_no_run(tmp_path, foreign):
    path = tmp_path / "rank-0.jsonl"
    Ledger(path).write([fault(1, position=3)])
    first = path.read_bytes()
    path.write_bytes(first + foreign + first.replace(b'"1"', b'"2"'))
    with pytest.warns(UserWarning, match="1 lines are not faults"):
        ledger = Ledger(path, position=9)
    assert read_ledger(path) == [fault(1, position=3), fault(2, position=3)]
    assert ledger.met.samples == 2


def test_names_of_any_kind_stand_in_a_ledger(tmp_path):
    path = tmp_path / "rank-0.jsonl"
    faults = [
        Fault("sample", "s\udcff.tar", key, "r\u2028\x85", 3)
        for key in ("a\udcff", "\n", "雪", None)
    ]
    Ledger(path).write(faults)
    assert read_ledger(path) == faults
    assert "雪" in path.read_text(encoding="utf-8")
    assert Ledger(path, 9).met.samples == 4


def test_a_ledger_keeps_counts_and_no_faults():
    ledger = Ledger(None)
    for i in range(3000):  # each reason is of its own
        ledger.write([Fault("sample", "s", f"{i}", "odd " + "x" * (i + 1), i)] * 2)
    assert len(ledger.met._groups) <= 1001
    assert ledger.met.samples == 3000
    assert ledger.met.summary().endswith("and 996 other reasons")
    with pytest.raises(BudgetError, match="0 of 1 shards, 3000 of 9000 samples. 2000 x sample"):
        check_budget(ledger.met, 9000, 1, 0.1)
    check_budget(ledger.met, 9000, 1, 0.5)


def test_packed_faults_are_the_same_faults():
    faults = [fault(i, kind, i or None) for i, kind in enumerate(["sample", "shard", "passing"])]
    packed = PackedFaults(faults[2:], [PackedFaults(faults[:1]), faults[1:2], []])
    assert list(packed) == faults
    assert len(packed) == 3
    assert faults[2] in packed
    assert not PackedFaults()


def test_processes_find_what_threads_find(tmp_path, capsys):
    tiny.write_shards(tmp_path / "a", [3, 2])
    (tmp_path / "a" / "train-000002.tar").write_bytes(b"garbage" * 99)
    found = []
    for processes in ("0", "2"):
        for file in (tmp_path / "a").glob("*.index"):
            file.unlink()
        options = ["--json", "--processes", processes, "--ledger", str(tmp_path / processes)]
        assert main(["data", "index", str(tmp_path / "a"), *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert len(list((tmp_path / "a").glob("*.index"))) == 3
    assert found[0] == found[1]
    assert (found[0]["samples"], found[0]["broken_shards"]) == (5, 1)
    assert (tmp_path / "0").read_text() == (tmp_path / "2").read_text()


def test_an_index_needs_a_place(capsys):
    assert main(["data", "index", "http://127.0.0.1:9/a.tar"]) == 2
    assert "is remote: set --output" in capsys.readouterr().err
