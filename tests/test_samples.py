"""What is a sample: which files and members are read, what is named, and what stops nothing."""

import errno
import gzip
import io
import json
import os
import struct
import tarfile
import zlib

import pytest
import tiny
from PIL import Image, PngImagePlugin

from zsnr.cli import main
from zsnr.data.captions import Captions, text_fields
from zsnr.data.dataset import ShardDataset
from zsnr.data.index import load_index
from zsnr.data.samples import select
from zsnr.data.scan import make_index
from zsnr.data.sources import Shard, find_shards
from zsnr.data.storage import Retries, Storage, StorageError

RED = tiny.png("red")


def image(kind="JPEG", mode="RGB", **options):
    data = io.BytesIO()
    Image.new(mode, (40, 32), (200, 40, 40)).save(data, kind, **options)
    return data.getvalue()


def write(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    return tiny.write_shard(path, files)


def loaded(source, captions=Captions(), index=None):
    """Captions by key, as training reads them."""
    index = index or load_index(str(source), Storage(), progress=False)
    data = ShardDataset(select(index, 16, captions=captions), captions=captions)
    items = [data.load(row) for row in range(len(data))]
    assert all(item["image"].shape == (3, 16, 16) for item in items)
    keys = [data.samples[row].key for row in range(len(data))]
    return dict(zip(keys, (item["caption"] for item in items), strict=True))


def faults(source):
    index = load_index(str(source), Storage(), progress=False)
    return {fault.key: fault.reason for fault in index.faults}


def command(*arguments):
    return main(["data", "index", *map(str, arguments)])


def failed(capsys, *arguments):
    """The one line of a command that fails."""
    assert command(*arguments) == 2
    line = capsys.readouterr().err.strip().rpartition("zsnr: error: ")[2]
    assert line
    assert "\n" not in line
    return line


def header(name="a.txt", size=0, **facts):
    """One block of a tar file; a size may be negative or huge."""
    member = tarfile.TarInfo(name)
    for key, value in facts.items():
        setattr(member, key, value)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT)[-512:])
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else base256(size)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base256(number):
    return (b"\x80" if number >= 0 else b"\xff") + number.to_bytes(11, "big", signed=True)


def members(files):
    blocks = b""
    for name, data in files.items():
        blocks += header(name, len(data)) + data + bytes(-len(data) % 512)
    return blocks


END = bytes(1024)
PAIR = members({"good.png": RED, "good.txt": b"good"})


# Files


def test_photos_of_every_ending(tmp_path, capsys):
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "bmp": "BMP", "tif": "TIFF", "TIFF": "TIFF"}
    kinds |= {"PNG": "PNG", "webp": "WEBP", "avif": "AVIF", "JP2": "JPEG2000", "ppm": "PPM"}
    for ending, kind in kinds.items():
        (tmp_path / f"{ending}_image.{ending}").write_bytes(image(kind))
        (tmp_path / f"{ending}_image.txt").write_text(ending)
    (tmp_path / "UPPER.JPG").write_bytes(image())
    (tmp_path / "UPPER.TXT").write_text("upper")
    (tmp_path / "without").write_bytes(image())
    (tmp_path / "without.txt").write_text("without")
    (tmp_path / "large.jpg_large").write_bytes(image())
    (tmp_path / "large.txt").write_text("large")
    for name in ("photo.heic", "other.heic", "drawing.svg", "photo.txt", "alone.json"):
        (tmp_path / name).write_bytes(b"nothing that Pillow reads")
    found = loaded(tmp_path)
    assert len(found) == len(kinds) + 3
    assert found["UPPER.JPG"] == "upper"
    assert found["jfif_image.jfif"] == "jfif"
    assert command(tmp_path) == 0
    told = capsys.readouterr().out
    assert f"{len(found)} samples in 1 folder" in told
    assert "2 .heic (such as other.heic)" in told
    assert "1 .svg (such as drawing.svg)" in told
    assert "1 .json (such as alone.json)" in told
    assert "broken" not in told
    shard = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shard.pop("without")  # a tar member without an ending has no key's suffix, but its content
    write(tmp_path / "in" / "x.tar", shard | {"bare": image(), "bare.txt": b"bare"})
    inside = loaded(tmp_path / "in" / "x.tar")
    assert inside.keys() == {key.partition(".")[0] for key in found} - {"without"} | {"bare"}
    (tmp_path / "in" / "x.tar.index").unlink()
    assert command(tmp_path / "in") == 0
    told = capsys.readouterr().out
    assert "it has no image, only 'heic', 'txt'" in told
    assert "1 .svg (such as drawing.svg)" in told


def test_null_captions_are_named_before_a_run_depends_on_them(tmp_path, capsys):
    files = {}
    for i in range(9):
        caption = None if i % 3 == 0 else f"image {i}"
        record = {"caption": caption, "alt": "other", "status": "success"}
        files |= {f"{i:04}.jpg": image(), f"{i:04}.json": json.dumps(record).encode()}
        files |= {f"{i:04}.txt": caption.encode()} if caption else {}
    path = write(tmp_path / "00000.tar", files)
    assert command(tmp_path) == 0
    told = capsys.readouterr().out
    assert "6 samples in 1 shard" in told
    assert "3 x sample: it has no caption: no text in txt, caption, text" in told
    assert command(tmp_path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["broken_samples"]) == (6, 3)
    assert len(loaded(path)) == 6
    assert list(loaded(path, Captions({"alt": 1.0})).values()) == ["other"] * 9
    assert len(loaded(path, Captions({"caption": 1.0}))) == 6
    digests = {
        select(load_index(str(path), Storage()), 8, captions=Captions(fields)).digest
        for fields in ({}, {"alt": 1.0}, {"caption": 1.0})
    }
    assert len(digests) == 3


@pytest.mark.parametrize("empty", ["keep", "drop"])
@pytest.mark.parametrize("fields", [{}, {"txt": 1.0}, {"alt": 1.0}, {"caption": 1.0, "alt": 2.0}])
def test_the_index_and_training_call_the_same_samples_usable(tmp_path, fields, empty):
    texts = (None, b"", b" \n", b"text", b"\xff")
    values = ("absent", None, "", "text", ["a", 3], ["", " "], [], 7, "half \ud800", {"a": "b"})
    files, parts = {}, {}
    for i, text in enumerate(texts):
        for j, caption in enumerate(values):
            for k, alt in enumerate((None, "alt", " ")):
                key = f"{i}-{j}-{k}"
                record = {"caption": caption, "alt": alt} | {"n": i}
                if caption == "absent":
                    del record["caption"]
                parts[key] = (text, json.dumps(record).encode())
                files |= {f"{key}.png": RED, f"{key}.json": parts[key][1]}
                files |= {} if text is None else {f"{key}.txt": text}
    captions = Captions(fields, empty)
    usable = set()
    for key, (text, record) in parts.items():
        try:
            captions.choose(text, record, 0)
        except ValueError:
            continue
        usable.add(key)
    index = load_index(str(write(tmp_path / "x.tar", files)), Storage(), progress=False)
    samples = select(index, 8, captions=captions)
    assert set(samples.keys.to_pylist()) == usable
    named = {fault.key for fault in samples.faults}
    assert named == parts.keys() - usable


def test_what_names_texts_takes_few_bytes():
    assert text_fields(b"x", {"caption": "a", "url": "", "n": 3}) == '[["txt", "caption"], ["url"]]'
    assert len(text_fields(None, {f"{i}": "x" for i in range(3000)})) < 3000
    assert "a" * 65 not in text_fields(None, {"a" * 65: "x", "\ud800": "x"})


def test_dotted_keys_fall_together(tmp_path, capsys):
    files = {
        f"clip.v1.{i}.{end}": data
        for i in range(4)
        for end, data in (("jpg", image()), ("txt", b"red"))
    }
    write(tmp_path / "00000.tar", files)
    line = failed(capsys, tmp_path)
    assert "8 files have the same key, such as clip.v1.0.jpg and clip.v1.0.txt" in line
    assert "the first dot of a name ends the key" in line
    more = files | {"a.png": RED, "a.txt": b"a", "a.mask.png": RED}
    assert loaded(write(tmp_path / "b.tar", more)) == {"a": "a"}


@pytest.mark.parametrize(
    "name", ["shard [v2].tar", "a{1,2}.tar", "{x.tar", "a*b?.tar", "SHARD.TAR", "plain.tar"]
)
def test_an_existing_file_is_that_file(tmp_path, name):
    folder = tmp_path / "data [old] {a,b}"
    write(folder / name, {"a.jpg": image(), "a.txt": b"red"})
    assert loaded(folder / name) == {"a": "red"}
    assert [shard.name for shard in find_shards(str(folder))] == [name]
    assert [shard.name for shard in find_shards(str(folder / "*[rR]"))] == [name]


def test_patterns_name_folders_too(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name / "x.tar", {"a.jpg": image(), "a.txt": b"red"})
    for pattern in ("*/x.tar", "{a,b}/x.tar", "{a,b}/*.tar", "[ab]/{x,y*}.tar"):
        assert len(find_shards(str(tmp_path / pattern))) == 2, pattern


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("0.tgz", gzip.compress(PAIR + END), "compressed by gzip: unpack it"),
        ("0.tar.gz", gzip.compress(PAIR + END), "compressed by gzip"),
        ("0.tar", gzip.compress(PAIR + END), "compressed by gzip"),
        ("0.tar", b"\x28\xb5\x2f\xfd" + bytes(600), "compressed by zstd"),
        ("0.tar", b"\n<!DOCTYPE html><html>" + bytes(600), "an HTML page"),
        ("0.tar", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("0.tar", bytes(20480), "not a readable tar file"),
        ("0.tar", b"", "not a readable tar file"),
    ],
)
def test_what_is_no_tar_is_said_by_name(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in failed(capsys, tmp_path / name)
    line = failed(capsys, tmp_path)
    assert (words if name.endswith(".tar") else f"{name} is compressed: unpack it") in line


def test_compressed_shards_beside_others_are_said(tmp_path):
    write(tmp_path / "a.tar", {"a.jpg": image(), "a.txt": b"red"})
    (tmp_path / "b.tar.gz").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 compressed shards, such as b\.tar\.gz"):
        assert len(find_shards(str(tmp_path))) == 1


def test_a_folder_without_data_says_what_it_holds(tmp_path, capsys):
    assert "It is empty" in failed(capsys, tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"")
    assert "It holds 1 x .parquet" in failed(capsys, tmp_path)
    write(tmp_path / "train" / "a.tar", {})
    assert f"There are some in {tmp_path / 'train'}." in failed(capsys, tmp_path)


@pytest.mark.filterwarnings("ignore:The embedded color profile")
def test_large_metadata_of_a_png_is_no_fault(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", '{"node": 1}, ' * 120000, zip=True)
    profile = b"large\0\0" + zlib.compress(bytes(range(256)) * 8000)
    chunk = b"iCCP" + profile
    chunk = struct.pack(">I", len(profile)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    plain = image("PNG")
    files = {
        "text.png": image("PNG", pnginfo=text),
        "profile.png": plain[:33] + chunk + plain[33:],
        "plain.png": plain,
    }
    files |= {f"{name[:-4]}.txt": b"red" for name in files}
    assert len(loaded(write(tmp_path / "0.tar", files))) == 3


def test_folders_as_the_hub_has_them(tmp_path, capsys):
    for name in ("train", "test/deep"):
        (tmp_path / name).mkdir(parents=True)
        for i in (1, 2):
            (tmp_path / name / f"{i}.jpg").write_bytes(image())
        lines = [{"file_name": f"{i}.jpg", "text": f"{name} {i}", "n": i} for i in (1, 2)]
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "own.png").write_bytes(RED)
    (tmp_path / "own.txt").write_text("own")
    assert [shard.url for shard in find_shards(str(tmp_path))] == [
        str(tmp_path / name) for name in (".", "test/deep", "train")
    ]
    index = load_index(str(tmp_path), Storage(), progress=False)
    samples = select(index, 16)
    data = ShardDataset(samples)
    wanted = ["own", "test/deep 1", "test/deep 2", "train 1", "train 2"]
    assert [data.load(row)["caption"] for row in range(5)] == wanted
    (tmp_path / "own.png").unlink()
    assert len(find_shards(str(tmp_path))) == 2
    assert command(tmp_path) == 0
    assert "4 samples in 2 folders" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metadata.csv", "train/metadata.csv", "metadata.parquet"])
def test_metadata_of_other_kinds_is_said_by_name(tmp_path, capsys, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("file_name,text\n1.jpg,red\n")
    (path.parent / "1.jpg").write_bytes(image())
    line = failed(capsys, tmp_path)
    assert f"{name} is not read: write it as metadata.jsonl" in line


# Places


@pytest.mark.parametrize("source", ["tar", "folder"])
def test_no_usable_sample_is_an_error(tmp_path, capsys, source):
    if source == "tar":
        write(tmp_path / "x.tar", {"a.jpg": image(), "a.json": b'{"caption": null}'})
    else:
        (tmp_path / "a.jpg").write_bytes(image())
    assert "No usable sample in 1" in failed(capsys, tmp_path)
    assert "No usable sample in 1" in failed(capsys, tmp_path, "--json")


def test_an_index_that_cannot_be_written_is_an_error(tmp_path, capsys):
    write(tmp_path / "a" / "x.tar", {"a.jpg": image(), "a.txt": b"red"})
    (tmp_path / "file").write_text("")
    assert "cannot be written" in failed(
        capsys, tmp_path / "a", "--output", tmp_path / "file" / "under"
    )
    assert "cannot be written" in failed(capsys, tmp_path / "a", "--output", tmp_path / "file")
    for place in (tmp_path / "file" / "under", tmp_path):
        line = failed(capsys, tmp_path / "a", "--ledger", place)
        assert f"The ledger {place} cannot be written" in line


def test_a_full_disk_is_an_error_for_the_command_and_a_word_for_training(
    tmp_path, capsys, monkeypatch
):
    for i in range(3):
        write(tmp_path / f"{i}.tar", {"a.jpg": image(), "a.txt": b"red"})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zsnr.data.index.write_index", full)
    line = failed(capsys, tmp_path)
    assert "0.tar.index cannot be written: No space left on device. Set --output" in line
    with pytest.warns(UserWarning, match="3 of 3 shards are indexed again each time") as warned:
        assert len(load_index(str(tmp_path), Storage(), progress=False).shards) == 3
    assert len(warned) == 1


def test_a_shard_that_a_disk_did_not_give_is_indexed_again(tmp_path, monkeypatch):
    path = write(tmp_path / "0.tar", {"a.jpg": image(), "a.txt": b"red"})
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "open", lambda *_: (_ for _ in ()).throw(OSError(5, "EIO")))
        with pytest.raises(OSError, match="EIO"):
            load_index(str(path), Storage(), progress=False)
    assert not (tmp_path / "0.tar.index").exists()
    assert loaded(path) == {"a": "red"}


def test_a_disk_that_is_not_there_makes_no_shard_missing(tmp_path):
    write(tmp_path / "a" / "0.tar", {"a.jpg": image(), "a.txt": b"red"})
    (tmp_path / "b").mkdir()
    source = [str(tmp_path / "a" / "0.tar"), str(tmp_path / "{a,b}" / "0.tar")]
    storage = Storage(Retries(attempts=2, backoff=0.0, outage=0.0))
    with pytest.raises(StorageError, match="its folder is empty or missing"):
        load_index(source, storage, progress=False)
    (tmp_path / "b" / "1.tar").touch()
    index = load_index(source, storage, progress=False)
    assert [fault.reason for fault in index.faults] == ["missing"]


def test_metadata_that_a_disk_does_not_give_is_read_again(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(RED)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}\n')
    failures = [None, OSError(errno.EIO, "x")]

    def opening(path, *args, **kwargs):
        if str(path).endswith("metadata.jsonl") and failures and (error := failures.pop()):
            raise error
        return open(path, *args, **kwargs)

    for module in ("storage", "scan"):
        monkeypatch.setattr(f"zsnr.data.{module}.open", opening, raising=False)
    storage = Storage(Retries(attempts=2, backoff=0.0, outage=0.0))
    index = load_index(str(tmp_path), storage, progress=False)
    assert (index.table.num_rows, index.faults, failures) == (1, [], [])


def test_a_caption_that_a_disk_does_not_find_is_not_missing(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(RED)
    (tmp_path / "a.txt").write_text("red")
    stat = os.stat

    def failing(path, *args, **kwargs):
        if str(path).endswith("a.txt"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        load_index(str(tmp_path), Storage(), progress=False)


def test_names_that_look_like_homes_are_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~nobody.png", "~$.png"):
        (tmp_path / name).write_bytes(RED)
        (tmp_path / name).with_suffix(".txt").write_text("red")
    assert loaded(".") == {"~nobody.png": "red", "~$.png": "red"}
    with pytest.raises(FileNotFoundError, match="~nobody/x does not exist"):
        find_shards("~nobody/x")


def test_a_file_that_became_a_pipe_is_not_waited_for(tmp_path):
    path = write(tmp_path / "0.tar", {"a.jpg": image(), "a.txt": b"red"})
    index = load_index(str(path), Storage(), progress=False)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="0.tar is not a file, but a folder, a pipe"):
        ShardDataset(select(index, 16)).load(0)


def test_fields_that_could_be_captions_are_named(tmp_path, capsys):
    files = {"a.jpg": image(), "a.json": b'{"prompt": "red", "caption": null, "width": 9}'}
    path = write(tmp_path / "0.tar", files)
    line = failed(capsys, path)
    assert "Fields with text there: prompt; data.captions.fields can use them." in line
    write(path, {**files, "b.jpg": image(), "b.txt": b"red"})
    assert command(path) == 0
    assert "Fields with text there: prompt;" in capsys.readouterr().out


# Strange ones


def test_names_that_are_no_utf8(tmp_path, capsys):
    path = tmp_path / "0.tar"
    files = {"caf\udce9.png": RED, "caf\udce9.txt": b"latin", "a.png": RED, "a.txt": b"a"}
    path.write_bytes(members(files) + END)
    assert loaded(path) == {"caf\\udce9": "latin", "a": "a"}
    path.rename(tmp_path / "shard\udce9.tar")
    assert loaded(tmp_path) == {"caf\\udce9": "latin", "a": "a"}
    other = tmp_path / "other"
    assert command(tmp_path, "--output", other, "--ledger", tmp_path / "faults") == 0
    (tmp_path / "shard\udcff.tar").write_bytes(b"x")
    assert command(tmp_path, "--output", other, "--ledger", tmp_path / "faults") == 0
    assert "shard\\udcff.tar" in capsys.readouterr().out
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in (b"caf\xe9", b"fine"):
        with open(os.path.join(os.fsencode(folder), name + b".jpg"), "wb") as file:
            file.write(image())
        with open(os.path.join(os.fsencode(folder), name + b".txt"), "wb") as file:
            file.write(b"red")
    assert loaded(folder) == {"fine.jpg": "red"}
    assert command(folder, "--ledger", tmp_path / "faults") == 0
    assert "its name is not UTF-8: rename it" in capsys.readouterr().out
    assert "udce9" in (tmp_path / "faults").read_text()


RECORDS = {
    "huge": b'{"n": 1' + b"0" * 400 + b"}",
    "endless": b'{"n": 1' + b"0" * 5000 + b"}",
    "infinite": b'{"n": Infinity, "m": NaN, "k": -1e999}',
    "half": b'{"n": "\\ud800", "\\ud800": 1, "caption": "\\udfff"}',
    "deep": b'{"n": ' + b"[" * 100_000 + b"}",
    "nested": b'{"n": ' + b'{"n":' * 100_000 + b"}",
    "nul": b'{"\\u0000": "\\u0000"}',
    "latin": '{"caption": "caf\xe9"}'.encode("latin-1"),
    "wide": json.dumps({"x" * 10**6: "y" * 10**6}).encode(),
    "many": json.dumps({str(i): i for i in range(3000)}).encode(),
    "list": b"[]",
    "twice": b'{"n": 1, "n": 2}',
    "empty": b"",
}


def test_strange_json_stops_nothing(tmp_path, capsys):
    files = {}
    for key, record in RECORDS.items():
        files |= {f"{key}.png": RED, f"{key}.txt": key.encode(), f"{key}.json": record}
    files |= {"good.png": RED, "good.txt": b"good", "good.json": b'{"n": 5}'}
    path = write(tmp_path / "0.tar", files)
    broken = {"endless", "deep", "nested", "latin", "list", "empty"}
    assert loaded(path).keys() == {*RECORDS, "good"} - broken
    index = load_index(str(path), Storage(), fields=None, progress=False)
    assert {fault.key for fault in index.faults if fault.kind == "sample"} == broken
    values = dict(
        zip(index.table["key"].to_pylist(), index.table["json.n"].to_pylist(), strict=True)
    )
    assert [values[key] for key in ("good", "huge", "half", "twice")] == [5, None, None, 2]
    folder = tmp_path / "folder"
    folder.mkdir()
    for key in ("a", "b"):
        (folder / f"{key}.png").write_bytes(RED)
        (folder / f"{key}.txt").write_text(key)
    lines = [b'{"file_name": "a.png", ' + record[1:] for record in RECORDS.values()]
    lines += [b'{"file_name": "\\ud800.png"}', b'{"file_name": "' + b"b" * 9_000_000, b"\0", b"{}"]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b'\n{"file_name": "b.png"}')
    assert loaded(folder).keys() == {"a.png", "b.png"}


def test_columns_are_bounded(tmp_path):
    common = {"aesthetic": 5, "caption": "x"}
    records = [common | {str(i): i for i in range(n, n + 3000)} for n in range(0, 90_000, 3000)]
    records += [common | {f"own{i}": i} for i in range(1000)]
    files = {}
    for i, record in enumerate(records):
        files |= {f"{i}.png": RED, f"{i}.json": json.dumps(record).encode()}
    path = write(tmp_path / "0.tar", files)
    index = load_index(str(path), Storage(), fields=None, progress=False)
    names = [name for name in index.table.column_names if name.startswith("json.")]
    assert len(names) == 256
    column = index.table["json.aesthetic"]
    assert column.null_count == 30  # those with thousands of fields; all others have it
    (note,) = index.faults
    assert note.kind == "note"
    assert "over 256 fields of json" in note.reason
    assert "filters cannot use them" in note.reason


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize("what", ["fifo", "dangling", "loop", "folder", "device"])
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, capsys, what, fifo):
    folder = tmp_path / "photos"
    folder.mkdir()

    def place(path):
        if what == "folder":
            path.mkdir()
        else:
            targets = {"fifo": fifo, "dangling": tmp_path / "gone", "device": "/dev/zero"}
            path.symlink_to(targets.get(what, path))

    (folder / "good.png").write_bytes(RED)
    (folder / "good.txt").write_text("good")
    for name in ("a.png", "b.txt", "metadata.jsonl", "other", "other.heic"):
        place(folder / name)
    (folder / "b.png").write_bytes(RED)
    assert loaded(folder) == {"good.png": "good"}
    why = faults(folder)
    assert "b.png" in why
    if what != "folder":
        assert "a.png" in why
    shards = tmp_path / "shards"
    write(shards / "0.tar", {"a.png": RED, "a.txt": b"a"})
    place(shards / "1.tar")
    assert loaded(shards) == {"a": "a"}
    assert command(shards) == 0
    told = capsys.readouterr().out
    assert "1 x shard: " in told
    assert ("not a file, but a folder, a pipe, a device" in told) == (
        what not in ("dangling", "folder")
    )
    wanted = "does not exist" if what in ("dangling", "loop") else "No"
    assert wanted in failed(capsys, shards / "1.tar")


def test_linked_folders_are_named(tmp_path):
    (tmp_path / "far").mkdir()
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(RED)
    (folder / "a.txt").write_text("a")
    (folder / "link").symlink_to(tmp_path / "far")
    (folder / "round").symlink_to(folder)
    assert "2 without an ending (such as link)" in faults(folder)[None]
    assert loaded(folder) == {"a.png": "a"}


PAX = tarfile.XHDTYPE
STRANGE = {
    "negative": header(size=-512) + bytes(512),
    "very negative": header(size=-(2**80)),
    "huge": header(size=2**80),
    "beyond": header(size=10**9),
    "pax bomb": header(size=10**9, type=PAX),
    "long name": header(size=10**9, type=tarfile.GNUTYPE_LONGNAME) + b"x" * 512,
    "negative pax": header(size=20, type=PAX) + b"13 size=-100\n".ljust(512, b"\0") + header(),
    "endless pax": (header(size=20, type=PAX) + b"13 size=1000\n".ljust(512, b"\0")) * 5000,
    "strange pax": header(size=512, type=PAX) + b"99999999 path=x\n5 =\n-3 a=b\n".ljust(512),
    "small pax": header(size=10**6, type=PAX) + b"5 a=b\n" * 10**5,
    "negative link": header(size=-1, type=tarfile.GNUTYPE_LONGLINK),
    "sparse": header(size=512, type=tarfile.GNUTYPE_SPARSE) + bytes(512),
    "checksum": b"x" * 512,
    "unknown": header(size=512, type=b"Z") + bytes(512),
    "label": header(type=b"V"),
    "fifo": header(type=tarfile.FIFOTYPE),
    "link": header(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_headers_end_and_take_no_memory(tmp_path, kind):
    import tracemalloc

    path = tmp_path / "0.tar"
    path.write_bytes(PAIR + STRANGE[kind] + members({"last.png": RED, "last.txt": b"l"}) + END)
    tracemalloc.start()
    found = make_index(Shard(str(path)), Storage())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30 << 20
    assert found.table["key"].to_pylist()[0] == "good"
    assert found.faults or kind == "label"
    assert all("\n" not in fault.reason for fault in found.faults)
    skipped = ("sparse", "unknown", "label", "fifo", "link")
    assert (found.table.num_rows == 2) == (kind in skipped), found.faults


def test_long_names_of_pax_and_gnu(tmp_path):
    name = "very/" * 60 + "long"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "0.tar", "w", format=form) as archive:
            for end, data in ((".png", RED), (".txt", b"red")):
                member = tarfile.TarInfo(name + end)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        assert loaded(tmp_path / "0.tar") == {name: "red"}
        (tmp_path / "0.tar.index").unlink()


def test_a_tar_that_goes_on_behind_its_end_is_said(tmp_path):
    path = tmp_path / "0.tar"
    one = (PAIR + END).ljust(10240, b"\0")
    path.write_bytes(one + one + one)
    assert "join tar files with tar -A" in faults(path)[None]
    path.write_bytes(one + bytes(100_000))
    os.utime(path, (1, 1))
    assert not faults(path)


def test_hidden_members_are_no_samples(tmp_path):
    files = {"a.png": RED, "a.txt": b"a", "._a.png": b"mac", "sub/.DS_Store": b"", "README": b"me"}
    path = write(tmp_path / "0.tar", files)
    assert loaded(path) == {"a": "a"}
    assert list(faults(path)) == [None]


def test_parts_have_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr("zsnr.data.scan._LARGEST", {"image": 1000, "text": 10, "json": 50})
    files = {"a.png": RED, "a.txt": b"a", "b.png": RED, "b.txt": b"b" * 11}
    files |= {"c.png": RED + bytes(1000), "c.txt": b"c", "d.png": RED, "d.json": b" " * 60}
    why = faults(write(tmp_path / "0.tar", files))
    assert why.keys() == {"b", "c", "d"}
    assert why["b"] == "its text has 11 bytes: wanted at most 10"
