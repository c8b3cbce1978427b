"""Index files that somebody else wrote, and files of samples: judged before they are used."""

import errno
import json
import pickle
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from zsnr.cli import main
from zsnr.data import samples as samples_module
from zsnr.data.buckets import AspectBuckets
from zsnr.data.cache import find_cache, shard_files
from zsnr.data.columns import SHAPES
from zsnr.data.filters import Filter
from zsnr.data.index import load_index
from zsnr.data.index_file import read_footer, read_rows
from zsnr.data.order import TrainingOrder
from zsnr.data.samples import select
from zsnr.data.sources import Shard, Source, find_shards
from zsnr.data.storage import Storage, StorageError
from zsnr.data.thrift import read_struct


def load(source, **options):
    return load_index(source, Storage(), progress=False, **options)


@pytest.fixture
def shard(tmp_path):
    """A shard of four samples with its index."""
    members = {}
    for i in range(4):
        members[f"{i}.png"] = tiny.png((i, 0, 0))
        members[f"{i}.txt"] = b"x"
        members[f"{i}.json"] = json.dumps({"score": i, "lang": "en"}).encode()
    path = tiny.write_shard(tmp_path / "s.tar", members)
    load(str(path))
    return path


def rewrite(shard, change=lambda table: table, about=lambda facts: facts, **options):
    """Write the shard's index anew with other rows or another description."""
    file = shard.with_name(shard.name + ".index")
    table = pq.read_table(file)
    facts = json.loads(table.schema.metadata[b"zsnr"])
    text = about(facts)
    text = text if isinstance(text, str) else json.dumps(text)
    table = change(table).replace_schema_metadata({"zsnr": text})
    pq.write_table(table, file, **options)
    return file


def put(name, values, kind=None):
    """Replace a column."""

    def change(table):
        column = pa.array(values, kind or table.schema.field(name).type)
        return table.set_column(table.schema.get_field_index(name), name, column)

    return change


def tiled(times, change=lambda table: table):
    return lambda table: change(pa.concat_tables([table] * times))


ROWS = {
    "negative size": put("image_size", [-5, 1, 1, 1]),
    "negative offset": put("image_offset", [-2, 1, 1, 1]),
    "no image": put("image_offset", [-1, 1, 1, 1]),
    "beyond the end": put("image_offset", [2**40, 1, 1, 1]),
    "overflow": put("text_size", [2**63 - 1, 1, 1, 1]),
    "half a part": put("json_size", [-1, 1, 1, 1]),
    "no height": put("height", [0, 1, 1, 1]),
    "negative width": put("width", [-1, 1, 1, 1]),
    "null": put("image_offset", [None, 1, 1, 1]),
    "not UTF-8": put("key", pa.array([b"\xff"] * 4, pa.binary()).view(pa.string())),
    "wrong type": put("height", [1.0] * 4, pa.float64()),
    "text for numbers": put("image_offset", ["0"] * 4, pa.string()),
    "nested field": put("json.lang", [[1]] * 4, pa.list_(pa.int64())),
    "bytes": put("json.lang", [b"a"] * 4, pa.binary()),
    "missing column": lambda table: table.drop_columns(["text_offset"]),
    "foreign column": lambda table: table.append_column("other", pa.array([1] * 4)),
    "no lists of texts": put("texts", ["[]"] * 4),
    "texts of numbers": put("texts", ["[[1], []]"] * 4),
    "nested texts": put("texts", ["[" * 10**5] * 4),
    "too many rows": tiled(100_000),
    "long texts": put("key", ["x" * 10**7] * 4),
}

ABOUT = {
    "version": lambda facts: {**facts, "version": "1"},
    "true": lambda facts: {**facts, "version": True},
    "list for a version": lambda facts: {**facts, "version": [1]},
    "no version": lambda facts: {k: v for k, v in facts.items() if k != "version"},
    "size": lambda facts: {**facts, "size": -1},
    "text for a size": lambda facts: {**facts, "size": "10"},
    "huge": lambda facts: {**facts, "changed": 10**400},
    "digest": lambda facts: {**facts, "digest": 3},
    "faults": lambda facts: {**facts, "faults": {"a": 1}},
    "fault": lambda facts: {**facts, "faults": [{"kind": "sample"}]},
    "kind": lambda facts: {**facts, "faults": [fault(kind="x")]},
    "reason": lambda facts: {**facts, "faults": [fault(reason=["x"])]},
    "more of a fault": lambda facts: {**facts, "faults": [fault(other=1)]},
    "nested": lambda facts: "[" * 100_000,
    "nested fault": lambda facts: (
        json.dumps(facts)[:-1] + ', "x": ' + "[" * 9000 + "]" * 9000 + "}"
    ),
    "list": lambda facts: "[]",
    "text": lambda facts: "what?",
}


def fault(**changed):
    return {"kind": "sample", "shard": "s", "key": "k", "reason": "r", "position": None} | changed


@pytest.mark.parametrize("name", [*ROWS, *ABOUT])
def test_a_strange_index_is_made_again_with_one_line(shard, name, recwarn):
    wanted = load(str(shard), fields=None).table
    file = rewrite(shard, ROWS.get(name, lambda t: t), ABOUT.get(name, lambda facts: facts))
    index = load(str(shard), fields=None)
    assert index.table.equals(wanted)
    (warning,) = [w for w in recwarn if issubclass(w.category, UserWarning)]
    text = str(warning.message)
    assert text.startswith(f"{file} is not used as an index: ")
    assert "\n" not in text
    assert len(text) < 400
    assert load(str(shard), fields=None).table.equals(wanted)  # from the file again
    assert len(recwarn) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"compression": "gzip"},
        {"use_dictionary": False, "column_encoding": {"key": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": False, "column_encoding": {"image_size": "DELTA_BINARY_PACKED"}},
    ],
)
def test_ways_of_packing_that_hide_any_amount_are_refused(shard, options):
    file = rewrite(shard, **options)
    with pytest.raises(ValueError, match="it uses an encoding that no index uses"):
        read_rows(file)


def test_rows_are_counted_before_they_are_read(shard, monkeypatch):
    """Constant columns of any length are a few bytes in Parquet."""
    file = rewrite(shard, tiled(100_000), row_group_size=10**7)
    assert file.stat().st_size < 300_000
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    with pytest.raises(ValueError, match="400000 rows in"):
        read_rows(file)


def test_texts_are_not_written_out_before_they_are_judged(shard):
    """A dictionary holds a long text once, and any number of rows may be it."""
    size = 10**8
    with shard.open("r+b") as tar:
        tar.truncate(size)
    change = tiled(2000, put("key", ["x" * 20_000] * 8000))
    file = rewrite(shard, change, lambda facts: {**facts, "size": size})
    read_footer(file)
    with pytest.raises(ValueError, match="its texts would expand to 160000000 bytes"):
        read_rows(file)


def test_a_damaged_footer_does_not_end_the_process(tmp_path):
    """Asked for a damaged column's codec, pyarrow calls std::terminate."""
    shard = tiny.write_shard(tmp_path / "s.tar", {"a.png": tiny.png("red"), "a.txt": b"x"})
    load(str(shard))
    file = tmp_path / "s.tar.index"
    content = file.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    read = 0
    for place in range(len(content) - 8 - length, len(content) - 8, 5):
        for value in (0x7F, 0xFF):
            file.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            with suppress(ValueError):
                read += read_rows(file).num_rows
    assert read < length // 5


def test_thrift_is_read_as_pyarrow_reads_it(shard):
    file = shard.with_name("s.tar.index")
    content = file.read_bytes()
    metadata = pq.read_metadata(file)
    found = read_struct(content[-8 - int.from_bytes(content[-8:-4], "little") : -8])
    (group,) = found[4]
    assert (found[3], group[3]) == (metadata.num_rows, metadata.row_group(0).num_rows)
    for i, chunk in enumerate(column[3] for column in group[1]):
        theirs = metadata.row_group(0).column(i)
        assert b".".join(chunk[3]).decode() == theirs.path_in_schema
        assert (chunk[5], chunk[6]) == (theirs.num_values, theirs.total_uncompressed_size)
        assert (chunk[4] == 1) == (theirs.compression == "SNAPPY")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x1c" * 50, b"\x18\x7f", b"\x16" + b"\xff" * 20, b"\x19\xf8" + b"\xff" * 4 + b"\x0f"],
)
def test_thrift_that_is_damaged_is_refused(data):
    with pytest.raises(ValueError, match="its footer"):
        read_struct(data)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_are_an_index_or_an_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("x")
    shard = tiny.write_shard(folder / "s.tar", {"a.png": tiny.png("red"), "a.txt": b"x"})
    load(str(shard))
    file = folder / "s.tar.index"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    file.write_bytes(content)
    try:
        rows = read_rows(file)
    except ValueError:
        return
    assert rows.num_rows <= 1


@pytest.mark.filterwarnings("ignore:The index .* cannot be written")
def test_pipes_and_folders_are_no_index(shard):
    import os

    file = shard.with_name("s.tar.index")
    file.unlink()
    os.mkfifo(file)
    with pytest.warns(UserWarning, match="is not used as an index"):
        assert len(load(str(shard))) == 4
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="is not used as an index"):
        assert len(load(str(shard))) == 4


def cached(folder, index=b"", **changed):
    """A folder that says it is a cache of one shard."""
    facts = {
        "version": 1,
        "codec": {},
        "conditioner": None,
        "captions": None,
        "images": {"image_size": 16, "aspect": None},
        "filters": [],
        "samples": "0" * 32,
        "dtype": "float16",
        "shards": [{"file": "0.tar", "weight": 1.0}],
    } | changed
    (folder / "cache.json").write_text(json.dumps(facts))
    (folder / "0.tar").write_bytes(bytes(10240))
    (folder / "0.tar.index").write_bytes(index)
    return str(folder)


def test_a_cache_that_an_older_version_wrote_is_read(tmp_path):
    cached(tmp_path)
    facts = json.loads((tmp_path / "cache.json").read_text())
    facts["picture"] = facts.pop("images")
    (tmp_path / "cache.json").write_text(json.dumps(facts))
    assert find_cache(str(tmp_path)).images == {"image_size": 16, "aspect": None}


@pytest.mark.parametrize(
    "changed",
    [
        {"version": "1"},
        {"version": True},
        {"version": [1]},
        {"codec": None},
        {"conditioner": []},
        {"images": {}},
        {"images": {"image_size": "16", "aspect": None}},
        {"images": {"image_size": 2**70, "aspect": None}},
        {"images": {"image_size": 16, "aspect": {"step": 5, "max_ratio": 2}}},
        {"images": {"image_size": 16, "aspect": {"stride": 8}}},
        {"images": {"image_size": 16, "aspect": {"step": "8"}}},
        {"filters": {}},
        {"samples": 1},
        {"dtype": "int8"},
        {"more": 1},
        {"shards": {}},
        {"shards": ["0.tar"]},
        {"shards": [{"file": "0.tar"}]},
        {"shards": [{"file": "../0.tar", "weight": 1}]},
        {"shards": [{"file": "/etc/passwd", "weight": 1}]},
        {"shards": [{"file": "", "weight": 1}]},
        {"shards": [{"file": "..", "weight": 1}]},
        {"shards": [{"file": "0.tar", "weight": 1, "ratio": "1", "source": 0}]},
        {"shards": [{"file": "0.tar", "weight": 1, "ratio": 0, "source": 0}]},
        {"shards": [{"file": "0.tar", "weight": 1, "ratio": 1, "source": None}]},
        {"shards": [{"file": "0.tar", "weight": 1, "source_name": "a/b"}]},
        {"shards": [{"file": "0.tar", "weight": "1"}]},
        {"shards": [{"file": "0.tar", "weight": float("nan")}]},
        {"shards": [{"file": "0.tar", "weight": -1}]},
        {"shards": [{"file": "0.tar", "weight": 1e-9}]},
        {"shards": [{"file": "0.tar", "weight": 10**400}]},
        {"shards": [{"file": "0.tar", "weight": 1, "ratio": 1e-9, "source": 0}]},
    ],
)
def test_a_cache_of_another_form_is_refused_in_one_line(tmp_path, changed):
    assert find_cache(cached(tmp_path)).dtype == "float16"
    with pytest.raises(ValueError, match=r"ache the data again") as error:
        find_cache(cached(tmp_path, **changed))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_cache_keeps_the_ratios_of_its_sources(tmp_path):
    shards = [Shard("a.tar", ratio=2.0, source_name="a"), Shard("b/c.tar", 1, "tar", 0.5, 1, "c")]
    cached(tmp_path, shards=shard_files(shards))
    found = find_shards(str(tmp_path))
    assert [(s.name, s.ratio, s.source, s.weight, s.source_name) for s in found] == [
        ("000000-a.tar", 2.0, 0, 1.0, "a"),
        ("000001-c.tar", 0.5, 1, 1.0, "c"),
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 10**5, '{"a": ' * 10**5, "\ud800"])
def test_a_cache_that_is_no_json_is_refused(tmp_path, text):
    cached(tmp_path)
    (tmp_path / "cache.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (find_shards, find_cache):
        with pytest.raises(ValueError, match="cache.json"):
            read(str(tmp_path))


def test_a_cache_s_index_cannot_be_made_again(tmp_path, shard):
    with pytest.raises(ValueError, match=r"0.tar.index is not used .* run `zsnr data cache` again"):
        load(cached(tmp_path, b"x"))
    content = shard.with_name("s.tar.index").read_bytes()
    with pytest.raises(ValueError, match="does not match its index: cache the data again"):
        load(cached(tmp_path, content))  # of another shard


def test_a_disk_that_fails_does_not_damage_the_index_of_a_cache(tmp_path, monkeypatch, shard):
    def failing(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pyarrow.parquet.ParquetFile", failing)
    with pytest.raises(StorageError, match="0.tar.index cannot be read: Input/output error"):
        load(cached(tmp_path, shard.with_name("s.tar.index").read_bytes()))


@pytest.mark.parametrize(
    "content",
    [
        b"x" * 99,
        b"\x0c" + bytes(7) + b'{"a":{"b":1}}',
        save({"text.other": torch.zeros(2)}),
    ],
)
def test_damaged_embeddings_of_a_cache_are_refused_in_one_line(tmp_path, content):
    cache = find_cache(cached(tmp_path, conditioner={}))
    (tmp_path / "null.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"null.safetensors is damaged: .*Cache the data again"):
        cache.null()


def test_a_weight_that_a_cache_makes_too_small_is_refused(tmp_path):
    cached(tmp_path, shards=[{"file": "0.tar", "weight": 0.01}])
    assert find_shards([Source(str(tmp_path), 0.1)])[0].weight == 0.001
    with pytest.raises(ValueError, match="weight=0.01, so weight=0.001 results in 1e-05: wanted"):
        find_shards([Source(str(tmp_path), 0.001)])


def test_the_index_of_a_cache_and_shards_can_be_written(tmp_path, shard, capsys):
    index = pq.read_table(shard.with_name("s.tar.index")).drop_columns(["texts"])
    folder = tmp_path / "cache"
    folder.mkdir()
    cached(folder)
    (folder / "0.tar").write_bytes(shard.read_bytes())
    pq.write_table(index, folder / "0.tar.index")
    assert len(select(load([str(folder), str(shard)]), 8)) == 8
    assert main(["data", "index", str(folder)]) == 0
    assert main(["data", "index", str(folder), str(shard)]) == 0
    assert "8 samples in 2 shards" in capsys.readouterr().out


# Files of samples


CONFIGS = {
    "plain": {},
    "buckets": {"aspect": AspectBuckets(8, 3)},
    "filters": {"filters": [Filter("score", min=2)], "max_pixels": 500},
}


@pytest.fixture
def sources(tmp_path):
    number, sources = 0, []
    for s, weight in enumerate((1.0, 1.5, 0.3)):
        members = {}
        for _ in range(5 + s):
            size = (10 + 3 * (number % 5), 12 + number % 17)
            members[f"{number}.png"] = tiny.png((number, 0, 0), size)
            members[f"{number}.json"] = json.dumps({"caption": "x", "score": number % 7}).encode()
            number += 1
        members["broken.png"] = b"x"
        path = tiny.write_shard(tmp_path / f"{s}.tar", members)
        sources.append(Source(str(path), weight))
    return sources


def facts(samples):
    """All that decides batches."""
    order = TrainingOrder(samples, 4, 0, 2)
    columns = {name: getattr(samples, name).tolist() for name in SHAPES}
    rows = [order.batch(step) for step in range(30)]
    again = [order.replacement(p, 1) for p in range(9)]
    parts = [samples[i] for i in range(len(samples))]
    own = (samples.digest, samples.removed, samples.total, list(samples.faults), samples.shapes)
    return columns, samples.keys.to_pylist(), rows, again, parts, own


@pytest.mark.parametrize("name", CONFIGS)
def test_mapped_samples_are_those_in_memory(sources, tmp_path, monkeypatch, name):
    options = CONFIGS[name]
    index = load(sources, fields=["score"])
    wanted = facts(select(index, 24, **options))
    monkeypatch.setattr(samples_module, "_IN_MEMORY", 0)
    samples = select(index, 24, folder=tmp_path / "run", **options)
    (file,) = (tmp_path / "run").glob("*.arrow")
    assert facts(samples) == wanted
    assert not any(getattr(samples, name).flags.owndata for name in SHAPES)  # views of the file
    monkeypatch.setattr("zsnr.data.index.read_rows", None)  # a further rank reads no index
    again = select(load(sources, fields=["score"]), 24, folder=tmp_path / "run", **options)
    assert facts(again) == wanted
    assert again.mapped.path == file


def test_a_pickled_file_is_its_name(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "_IN_MEMORY", 0)
    samples = select(load(sources), 24, folder=tmp_path / "run", aspect=AspectBuckets(8, 3))
    packed = pickle.dumps((samples, TrainingOrder(samples, 4, 0)))
    for name in SHAPES:
        assert getattr(samples, name).tobytes() not in packed
    theirs, order = pickle.loads(packed)
    assert facts(theirs) == facts(samples)
    assert order.batch(7) == TrainingOrder(samples, 4, 0).batch(7)
    other = replace(samples, bucket=np.zeros_like(samples.bucket), counts=None)
    assert not pickle.loads(pickle.dumps(other)).bucket.any()
    inside = select(load(sources), 24)
    assert facts(pickle.loads(pickle.dumps(inside))) == facts(inside)


def test_a_file_of_samples_that_is_damaged_is_made_again(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "_IN_MEMORY", 0)
    folder = tmp_path / "run"
    wanted = facts(select(load(sources), 24, folder=folder))
    (file,) = folder.glob("*.arrow")
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[:-200], b"x" * len(whole)):
        file.unlink()
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="It is made again"):
            assert facts(select(load(sources), 24, folder=folder)) == wanted
    left = {path.name for path in folder.iterdir()}
    assert {name for name in left if name.startswith(file.stem)} == left  # nothing on the way


def test_a_folder_whose_name_is_not_utf8_holds_samples(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "_IN_MEMORY", 0)
    wanted = facts(select(load(sources), 24))
    samples = select(load(sources), 24, folder=tmp_path / "run\udce9")
    assert samples.mapped is not None
    assert facts(pickle.loads(pickle.dumps(samples))) == wanted


def test_a_changed_shard_gets_another_file(sources, tmp_path, monkeypatch):
    """The digest is of rows and sizes; where they stand in the shard decides, too."""
    monkeypatch.setattr(samples_module, "_IN_MEMORY", 0)
    before = select(load(sources), 24, folder=tmp_path / "run")
    path = tmp_path / "0.tar"
    path.write_bytes(
        tiny.write_shard(tmp_path / "x", {"": b""}).read_bytes()[:512] + path.read_bytes()
    )
    after = select(load(sources), 24, folder=tmp_path / "run")
    assert after.digest == before.digest
    assert (after.spans[:5, 0, 0] == before.spans[:5, 0, 0] + 512).all()


def test_without_a_place_samples_stay_in_memory(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "_IN_MEMORY", 0)
    (tmp_path / "file").touch()
    with pytest.warns(
        UserWarning, match="cannot be written or mapped: .* holds the index in memory"
    ):
        samples = select(load(sources), 24, folder=tmp_path / "file" / "run")
    assert facts(samples) == facts(select(load(sources), 24))


def test_a_permutation_that_cannot_be_written_stays_in_memory(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(samples_module, "_IN_MEMORY", 0)
    samples = select(load(sources), 24, folder=tmp_path / "run")
    wanted = facts(select(load(sources), 24))
    monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.warns(UserWarning, match="cannot be used: full"):
        assert facts(samples) == wanted
