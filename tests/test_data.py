import errno
import io
import itertools
import json
import os
import re
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save

from zsnr.data import storage
from zsnr.data.buckets import AspectBuckets
from zsnr.data.cache import CacheDataset
from zsnr.data.caption_tags import Tags
from zsnr.data.captions import Captions
from zsnr.data.dataset import Pixels, ShardDataset, collate
from zsnr.data.faults import BudgetError
from zsnr.data.index import load_index
from zsnr.data.openmoji import BACKGROUNDS, list_glyphs, render, write_openmoji_shards
from zsnr.data.order import TrainingOrder
from zsnr.data.prompts import PromptRequest, parse_prompts, read_prompts
from zsnr.data.samples import select
from zsnr.data.sources import Source
from zsnr.data.storage import Retries, Storage, StorageError


def dataset(source, size=8, order=None, **options):
    index = load_index(str(source), Storage(), progress=False)
    return ShardDataset(select(index, size), order, **options)


def test_webdatasets_own_writer_and_reader_agree_with_the_index(tmp_path):
    import webdataset

    path = str(tmp_path / "a.tar")
    with webdataset.TarWriter(path) as tar:
        for i in range(5):
            tar.write({"__key__": f"dir/{i}", "png": tiny.png((i, 0, 0)), "txt": f"caption {i}"})
    own = dataset(path)
    theirs = webdataset.WebDataset(path, shardshuffle=False)
    for mine, other in zip((own[i] for i in range(5)), theirs, strict=True):
        assert (mine["key"], mine["caption"]) == (other["__key__"], other["txt"].decode())


def test_samples_and_batches(tmp_path):
    samples = {"a.json": json.dumps({"caption": "one"}).encode(), "b.txt": b" drei \n"}
    for name, kind in (("a.jpg", "JPEG"), ("b.webp", "WEBP")):
        data = io.BytesIO()
        Image.new("RGB", (30, 20), "white").save(data, kind)
        samples[name] = data.getvalue()
    own = dataset(tiny.write_shard(tmp_path / "x.tar", samples))
    batch = collate([own[i] for i in (0, 1)])
    assert batch["image"].shape == (2, 3, 8, 8)
    assert batch["image"].dtype == torch.uint8
    assert batch["caption"] == ["one", "drei"]
    assert batch["position"].tolist() == [0, 1]
    assert batch["faults"] == []


def test_a_folder_of_pictures(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(tiny.png("red"))
    (tmp_path / "a.txt").write_text("\ufeffein Bär")
    line = {"file_name": "b.png", "text": "from the table"}
    (tmp_path / "metadata.jsonl").write_text("\n" + json.dumps(line))
    own = dataset(tmp_path)
    assert [own[i]["caption"] for i in (0, 1)] == ["ein Bär", "from the table"]


RECORD = json.dumps(
    {"caption": "c", "text": "t", "long": ["x", "y", "z", 3], "empty": "", "none": None, "txt": "j"}
).encode()


@pytest.mark.parametrize(
    ("fields", "text", "record", "wanted"),
    [
        ({}, b" a\n", RECORD, {"a"}),
        ({}, None, RECORD, {"c"}),
        ({}, None, b'{"text": "t"}', {"t"}),
        ({}, b"", None, {""}),
        ({"text": 1}, b"a", RECORD, {"t"}),
        ({"txt": 1, "text": 1, "absent": 5, "none": 5}, b"a", RECORD, {"a", "t"}),
        ({"long": 1}, None, RECORD, {"x", "y", "z"}),
        ({"absent": 1, "txt": 1}, b"a", None, {"a"}),
        ({"empty": 1}, None, RECORD, {""}),
        ({"txt": 1}, "雪 ❄".encode(), b"{", {"雪 ❄"}),
    ],
)
def test_captions(fields, text, record, wanted):
    captions = Captions(fields)
    found = [captions.choose(text, record, seed) for seed in range(60)]
    assert set(found) == wanted
    assert found == [captions.choose(text, record, seed) for seed in range(60)]


def test_caption_probabilities():
    captions = Captions({"caption": 3.0, "text": 1.0})
    found = [captions.choose(None, RECORD, seed) for seed in range(4000)]
    assert found.count("c") / 4000 == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 4000) ** 0.5)


@pytest.mark.parametrize(
    ("options", "text", "record", "message"),
    [
        ({"fields": {"nope": 1.0}}, b"a", RECORD, "no text in nope"),
        ({}, None, b"{}", "no text in txt, caption, text"),
        ({}, None, b"[]", "wanted a JSON object"),
        ({}, None, b"{", "not readable JSON"),
        ({}, b"\xff\xfe", None, "not UTF-8"),
        ({"empty": "drop"}, b"  ", None, "caption is empty"),
    ],
)
def test_captions_that_cannot_be(options, text, record, message):
    with pytest.raises(ValueError, match=message):
        Captions(**options).choose(text, record, 0)


def test_bad_caption_settings():
    with pytest.raises(ValueError, match="wanted positive"):
        Captions({"txt": 0.0})
    with pytest.raises(ValueError, match="wanted 'keep' or 'drop'"):
        Captions(empty="no")


def test_tags_are_shuffled_and_left_out():
    caption = "trigger, 1girl,solo , , long hair,"
    assert Tags()("", 3) == Tags(dropout=0.5, keep=2)("", 3) == ""
    shuffled = {Tags(keep=1)(caption, seed) for seed in range(100)}
    assert len(shuffled) == 6
    for each in shuffled:
        assert each.startswith("trigger, ")
        assert sorted(each.split(", ")) == ["1girl", "long hair", "solo", "trigger"]
    assert len({Tags()(caption, seed) for seed in range(400)}) == 24
    drop = Tags(shuffle=False, keep=1, dropout=0.3)
    several = [drop(caption, seed).split(", ") for seed in range(4000)]
    for tag, share in (("trigger", 1), ("1girl", 0.7), ("solo", 0.7), ("long hair", 0.7)):
        assert np.mean([tag in each for each in several]) == pytest.approx(share, abs=0.03)
    order = ["trigger", "1girl", "solo", "long hair"]
    assert all(each == [tag for tag in order if tag in each] for each in several)
    together = np.mean(["1girl" in each and "solo" in each for each in several])
    assert together == pytest.approx(0.49, abs=0.03)  # each is drawn by itself
    assert Tags(keep=9)(caption, 5) == "trigger, 1girl, solo, long hair"
    assert Tags(keep=2, separator=";")("a, b;c;d", 0) == "a, b; c; d"
    assert Tags(shuffle=False, dropout=0.01, separator=" ")("a  b", 0) == "a b"
    assert Tags()(caption, 1) == Tags()(caption, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": -1}, "tags.keep=-1: wanted 0 or more"),
        ({"dropout": 1.0}, r"tags.dropout=1: wanted a number in \[0, 1\)"),
        ({"separator": ""}, "tags.separator is empty"),
        ({"shuffle": False, "keep": 2}, "data.tags changes nothing"),
    ],
)
def test_bad_settings_of_tags_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Tags(**options)


def test_crops_and_flips_belong_to_the_position():
    pixels = Pixels(crop="random", flip=True)
    draws = [pixels.draw(0, p) for p in range(2000)]
    assert draws == [pixels.draw(0, p) for p in range(2000)]
    places = np.array([place for place, _ in draws])
    assert np.abs(places.mean(0) - 0.5).max() < 4 / (12 * 2000) ** 0.5
    assert abs(np.mean([flip for _, flip in draws]) - 0.5) < 4 * 0.5 / 2000**0.5
    assert {Pixels().draw(0, p) for p in range(9)} == {((0.5, 0.5), False)}
    with pytest.raises(ValueError, match="'center' or 'random'"):
        Pixels(crop="left")


def test_a_broken_picture_is_replaced_by_another_of_its_bucket(tmp_path):
    broken = ("03", "04")
    members = {}
    for i in range(12):
        data = tiny.png((10 * i, 0, 0), (60, 20) if i % 2 else (20, 60))
        members[f"{i:02d}.png"] = data[:60] if f"{i:02d}" in broken else data  # a whole header
        members[f"{i:02d}.txt"] = f"{i:02d}".encode()
    path = tiny.write_shard(tmp_path / "x.tar", members)
    index = load_index(str(path), Storage(), progress=False)
    samples = select(index, 16, aspect=AspectBuckets(step=8, max_ratio=4))
    order = TrainingOrder(samples, 2, 0)
    items = [ShardDataset(samples, order)[p] for p in range(48)]
    again = ShardDataset(samples, TrainingOrder(samples, 2, 0)).__getitems__(range(48))
    for position, (item, other) in enumerate(zip(items, again, strict=True)):
        assert torch.equal(item["image"], other["image"])
        assert item["faults"] == other["faults"]
        meant = samples[order[position]].key
        assert item["image"].shape == ((3, 8, 32) if int(meant) % 2 else (3, 32, 8))
        assert int(item["key"]) % 2 == int(meant) % 2
        assert item["caption"] == item["key"]
        if meant in broken:
            assert item["key"] not in broken
            assert {(f.key, f.position) for f in item["faults"]} == {(meant, position)}
            assert "not a readable image" in item["faults"][0].reason
        else:
            assert (item["key"], item["faults"]) == (meant, [])
    assert any(item["faults"] for item in items)


def test_all_broken_stops(tmp_path):
    members = {"a.png": tiny.png("red")[:60], "a.txt": b""}
    own = dataset(tiny.write_shard(tmp_path / "x.tar", members))
    with pytest.raises(BudgetError, match=r"32 consecutive samples.*sample 'a'"):
        own[0]


def test_a_shard_that_changed_after_indexing_is_not_read_as_if_it_had_not(tmp_path):
    path = tiny.write_shards(tmp_path, [4]) / "train-000000.tar"
    own = dataset(path)
    path.write_bytes(path.read_bytes()[512:])
    with pytest.raises(StorageError, match="changed size"):
        own[0]


def failing_disk(monkeypatch):
    """Return a list of errors; each is raised once, where storage opens a file."""
    failures = []

    def opening(*args, **kwargs):
        if failures:
            raise failures.pop()
        return open(*args, **kwargs)

    monkeypatch.setattr(storage, "open", opening, raising=False)
    return failures


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_what_storage_does_never_changes_the_batch(tmp_path, monkeypatch, kind):
    source = tiny.write_shards(tmp_path / "shards", [6]) / "train-000000.tar"
    if kind == "folder":
        source = tmp_path / "pictures"
        with tarfile.open(tmp_path / "shards" / "train-000000.tar") as tar:
            tar.extractall(source, filter="data")
    quick = Retries(attempts=3, backoff=0.0, outage=0.0)
    own = dataset(source, retries=quick)
    wanted = [own[i]["key"] for i in range(6)]
    failures = failing_disk(monkeypatch)
    for number in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM):
        error = OSError(number, os.strerror(number))
        failures[:] = [error] * 2
        item = own[2]
        assert item["key"] == wanted[2]
        reasons = [(fault.kind, fault.reason) for fault in item["faults"]]
        assert reasons == [("passing", os.strerror(number))] * 2
        failures[:] = [error] * 3
        with pytest.raises(StorageError, match=os.strerror(number)):
            own[2]
    for lasting in (FileNotFoundError(errno.ENOENT, "x"), PermissionError(errno.EACCES, "x")):
        failures[:] = [lasting]
        name = f"{source}, sample '{wanted[2]}', existed when the data was indexed"
        with pytest.raises(StorageError, match=re.escape(name)):
            own[2]
        assert failures == []


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_a_disk_that_fails_while_indexing_makes_nothing_broken(tmp_path, monkeypatch, kind):
    source = tiny.write_shards(tmp_path / "shards", [6]) / "train-000000.tar"
    if kind == "folder":
        source = tmp_path / "pictures"
        with tarfile.open(tmp_path / "shards" / "train-000000.tar") as tar:
            tar.extractall(source, filter="data")
    failures = failing_disk(monkeypatch)
    quick = Storage(Retries(attempts=2, backoff=0.0, outage=0.0))
    failures[:] = [OSError(errno.EIO, "x")] * 2
    with pytest.raises(StorageError, match="failed 2 times.*Input/output error"):
        load_index(str(source), quick, progress=False)
    assert not list(tmp_path.rglob("*.index"))
    failures[:] = [OSError(errno.EIO, "x")]
    index = load_index(str(source), quick, progress=False)
    assert (index.table.num_rows, index.faults) == (6, [])


def test_broken_bytes_of_a_cache_are_a_broken_sample():
    item = SimpleNamespace(image=SimpleNamespace(size=9))
    cached = CacheDataset.__new__(CacheDataset)
    for data in (b"x" * 90, save({"other": torch.zeros(1)})):
        cached._read = lambda *_, data=data: [data, b"a", None]
        with pytest.raises(ValueError, match="its moments are unreadable"):
            cached._load(item, 0, 0, None)


def test_prompts_files(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\ufeffa cat\n\n  ein Bär \n", encoding="utf-8")
    assert read_prompts(path) == [
        PromptRequest("a cat", line=1),
        PromptRequest("ein Bär", line=3),
    ]
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a", "seed": 3, "count": 2, "negative_prompt": "b"}\n'
        '{"prompt": "", "height": 8, "width": null}\n'
    )
    requests = read_prompts(path)
    assert requests == [
        PromptRequest("a", "b", 3, line=1),
        PromptRequest("a", "b", 4, line=1),
        PromptRequest("", height=8, line=2),
    ]
    assert len({r.filename for r in requests}) == 3
    assert parse_prompts([{"prompt": "a", "count": 2}])[1].seed == 1
    both = parse_prompts([{"prompt": "a"}, {"prompt": "b", "seed": 0}], seed=7)
    assert [request.seed for request in both] == [7, 0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: "),
        ("[]", "line 2: wanted an object"),
        ('{"seed": 1}', "line 2: there is no prompt"),
        ('{"prompt": 3}', "line 2: prompt=3: wanted text"),
        ('{"prompt": null}', "line 2: prompt=None: wanted text"),
        ('{"prompt": "a", "sed": 1}', "line 2: 'sed' is unknown"),
        ('{"prompt": "a", "seed": 1.5}', "line 2: seed=1.5: wanted a whole number"),
        ('{"prompt": "a", "seed": true}', "line 2: seed=True: wanted a whole number"),
        ('{"prompt": "a", "seed": -1}', "line 2: seed=-1"),
        ('{"prompt": "a", "seed": 4294967295, "count": 2}', "line 2: seed=4294967295"),
        ('{"prompt": "a", "count": 0}', "line 2: count=0"),
        ('{"prompt": "a", "height": 0}', "line 2: height=0"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_bad_prompts_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.txt or \.jsonl"):
        read_prompts(tmp_path / "p.csv")
    with pytest.raises(ValueError, match="no such prompts file"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(ValueError, match="entry 1: there is no prompt"):
        parse_prompts([{}])


def test_openmoji_shards(tmp_path):
    for name in ("a", "b"):
        write_openmoji_shards(tmp_path / name, glyphs="demo", size=16, progress=False)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["ATTRIBUTION", "LICENSE", "train-000000.tar", "val-000000.tar"]
    for name in files:  # equal arguments, equal bytes
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    splits = {
        split: set(dataset(f"{tmp_path}/a/{split}-*.tar").samples.keys.to_pylist())
        for split in ("train", "val")
    }
    assert not splits["train"] & splits["val"]
    assert len(splits["train"] | splits["val"]) == len(list_glyphs("demo")) * len(BACKGROUNDS)
    item = dataset(tmp_path / "a", 16)[0]
    ground = item["caption"].partition(" on a ")[2].removesuffix(" background")
    assert item["image"][:, 0, 0].tolist() == list(BACKGROUNDS[ground])
    with pytest.raises(FileExistsError, match="not empty"):
        write_openmoji_shards(tmp_path / "a", glyphs="demo", progress=False)


def test_glyphs_show_on_every_background():
    for glyph in list_glyphs("demo"):
        for rgb in BACKGROUNDS.values():
            pixels = np.asarray(render(glyph, 32, rgb)).astype(int)
            assert pixels[0, 0].tolist() == list(rgb)
            assert np.abs(pixels - rgb).max() > 60


def test_loading_processes_share_one_file_of_samples(tmp_path, monkeypatch):
    """One process of a node reads the index; every other process maps what that one wrote."""
    from types import SimpleNamespace

    from zsnr.training.data import DataModule

    sources = [
        Source(str(tiny.write_shards(tmp_path / name, counts)), weight)
        for name, counts, weight in (("a", [5, 3], 1.5), ("b", [6], 1.0))
    ]

    def batches(root, prepare):
        data = DataModule(sources, image_size=8, batch_size=4, num_workers=1, seed=3)
        data.trainer = SimpleNamespace(
            default_root_dir=str(root),
            state=SimpleNamespace(fn="fit"),
            global_step=2,
            global_rank=0,
            world_size=1,
            accumulate_grad_batches=1,
        )
        if prepare:
            data.prepare_data()
        data.setup("fit")
        found = itertools.islice(data.train_dataloader(), 12)
        return [(batch["key"], batch["position"].tolist()) for batch in found]

    wanted = batches(tmp_path / "run", prepare=True)
    assert not list(tmp_path.glob("run/index/*"))  # so few stay in memory
    monkeypatch.setattr("zsnr.data.samples._IN_MEMORY", 0)
    assert batches(tmp_path / "run", prepare=True) == wanted
    files = sorted(tmp_path.glob("run/index/*"))
    assert len(files) == 2  # the samples, and who is shown twice by the weight 1.5
    monkeypatch.setattr("zsnr.data.index.read_rows", None)
    assert batches(tmp_path / "run", prepare=False) == wanted
    assert sorted(tmp_path.glob("run/index/*")) == files
