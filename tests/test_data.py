import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from zsnr.data.dataset import ShardDataset, collate
from zsnr.data.images import decode_image
from zsnr.data.openmoji import BACKGROUNDS, list_glyphs, render, write_openmoji_shards
from zsnr.data.order import ShuffledOrder, StepBatches
from zsnr.data.prompts import PromptRequest, parse_prompts, read_prompts
from zsnr.data.shards import find_shards, index_shard, index_shards


def test_shards_by_folder_pattern_and_list(tmp_path):
    tiny.write_shards(tmp_path, [3, 1, 2])
    names = [f"train-00000{i}.tar" for i in range(3)]
    for source in (
        str(tmp_path),
        f"{tmp_path}/train-{{000000..000002}}.tar",
        f"{tmp_path}/train-*.tar",
        [f"{tmp_path}/{name}" for name in names],
    ):
        assert [shard.name for shard in find_shards(source)] == names
        assert [s.key for s in index_shards(source)] == [f"{i:05d}" for i in range(6)]


def test_webdatasets_own_writer_and_reader_agree_with_the_index(tmp_path):
    import webdataset

    path = str(tmp_path / "a.tar")
    with webdataset.TarWriter(path) as tar:
        for i in range(5):
            tar.write({"__key__": f"dir/{i}", "png": tiny.png((i, 0, 0)), "txt": f"caption {i}"})
    dataset = ShardDataset(index_shards(path), 8)
    theirs = webdataset.WebDataset(path, shardshuffle=False)
    for mine, other in zip((dataset[i] for i in range(5)), theirs, strict=True):
        assert (mine["key"], mine["caption"]) == (other["__key__"], other["txt"].decode())


def test_samples(tmp_path):
    samples = {
        "a.jpg": b"",
        "a.json": json.dumps({"caption": "one", "text": "zwei"}).encode(),
        "b.webp": b"",
        "b.txt": b" drei \n",
        "b.json": b"{}",
    }
    for name, kind in (("a.jpg", "JPEG"), ("b.webp", "WEBP")):
        data = io.BytesIO()
        Image.new("RGB", (30, 20), "white").save(data, kind)
        samples[name] = data.getvalue()
    index = index_shard(tiny.write_shard(tmp_path / "x.tar", samples))
    assert [ShardDataset(index, 8)[i]["caption"] for i in (0, 1)] == ["one", "drei"]
    assert ShardDataset(index, 8, caption_field="text")[0]["caption"] == "zwei"
    batch = collate([ShardDataset(index, 8)[i] for i in (0, 1)])
    assert batch["image"].shape == (2, 3, 8, 8)
    assert batch["position"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"x\.tar, sample 'a': its json has no text in .*'nope'"):
        ShardDataset(index, 8, caption_field="nope")[0]


def test_names_as_tar_writes_them(tmp_path):
    for name, key in (("./00001", "00001"), ("v1.0/00001", "v1.0/00001")):
        members = {f"{name}.png": tiny.png("red"), f"{name}.txt": b"x"}
        assert index_shard(tiny.write_shard(tmp_path / "x.tar", members))[0].key == key
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("a.txt")
            tar.addfile(member, io.BytesIO())
    with pytest.raises(ValueError, match=r"has a\.txt twice"):
        index_shard(tmp_path / "twice.tar")


def test_broken_shards_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No shards at .*nowhere"):
        find_shards(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="No shards"):
        find_shards(str(tmp_path))
    garbage = tmp_path / "garbage.tar"
    garbage.write_bytes(b"garbage" * 1000)
    with pytest.raises(ValueError, match="not a readable tar"):
        index_shard(garbage)
    lonely = tiny.write_shard(tmp_path / "lonely.tar", {"a.png": tiny.png("red")})
    with pytest.raises(ValueError, match="'a' has png: wanted a picture .* and a caption"):
        index_shard(lonely)
    whole = tiny.write_shards(tmp_path / "w", [3]) / "train-000000.tar"
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(ValueError, match="cut"):
        index_shard(cut)
    empty = tiny.write_shard(tmp_path / "empty.tar", {})
    with pytest.raises(ValueError, match="hold no samples"):
        index_shards(str(empty))
    bad = tiny.write_shard(tmp_path / "bad.tar", {"a.png": b"no picture", "a.txt": b"x"})
    with pytest.raises(ValueError, match=r"bad\.tar, sample 'a': not a readable picture"):
        ShardDataset(index_shard(bad), 8)[0]


def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def test_images_are_resized_and_cropped_to_the_centre():
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    image = decode_image(encoded(Image.fromarray(pixels)), 20)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, torch.ones(3, 20, 20))
    fine = np.indices((64, 64)).sum(0) % 2 * 255  # a checkerboard averages to grey
    small = decode_image(encoded(Image.fromarray(fine.astype(np.uint8))), 16)
    assert small.abs().max() < 0.1


@pytest.mark.parametrize(
    ("mode", "colour", "wanted"),
    [
        ("RGB", (255, 0, 0), (1, -1, -1)),
        ("L", 255, (1, 1, 1)),
        ("RGBA", (255, 0, 0, 255), (1, -1, -1)),
        ("RGBA", (255, 0, 0, 0), (1, 1, 1)),
        ("LA", (0, 0), (1, 1, 1)),
        ("P", 0, (-1, -1, -1)),
        ("1", 1, (1, 1, 1)),
        ("I;16", 65535, (1, 1, 1)),
        ("I;16", 0, (-1, -1, -1)),
        ("I;16", 128 * 257, (0.00392157,) * 3),
    ],
)
def test_modes(mode, colour, wanted):
    pixel = decode_image(tiny.png(colour, mode=mode), 4)[:, 0, 0]
    torch.testing.assert_close(pixel, torch.tensor(wanted, dtype=torch.float32))


def test_exif_orientation_is_obeyed():
    pixels = np.zeros((10, 20, 3), dtype=np.uint8)
    pixels[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    image = decode_image(encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=95), 10)
    assert image[:, 0].mean() > 0.8
    assert image[:, -1].mean() < -0.8


@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 3))
def test_every_pass_shows_every_sample_once(n, seed, number):
    order = ShuffledOrder(n, seed)
    seen = [order[p] for p in range(number * n, (number + 1) * n)]
    assert sorted(seen) == list(range(n))
    assert ShuffledOrder(n, seed)[number * n] == seen[0]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 7))
@settings(max_examples=60)
def test_ranks_and_accumulation_only_divide_the_global_batch(ranks, accumulate, each, first):
    size = ranks * accumulate * each
    loads = [StepBatches(size, r, ranks, accumulate, first) for r in range(ranks)]
    taken = [list(itertools.islice(load, 3 * accumulate)) for load in loads]
    for k in range(3):
        own = slice(k * accumulate, (k + 1) * accumulate)
        positions = [p for rank in taken for batch in rank[own] for p in batch]
        assert sorted(positions) == list(range((first + k) * size, (first + k + 1) * size))


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="wanted a multiple of 6"):
        StepBatches(16, 0, 2, 3)


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
        ('{"prompt": 3}', "line 2: prompt=3: wanted str"),
        ('{"prompt": null}', "line 2: prompt=None: wanted str"),
        ('{"prompt": "a", "sed": 1}', "line 2: 'sed' is unknown"),
        ('{"prompt": "a", "seed": 1.5}', "line 2: seed=1.5: wanted int"),
        ('{"prompt": "a", "seed": true}', "line 2: seed=True: wanted int"),
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
        split: {s.key for s in index_shards(f"{tmp_path}/a/{split}-*.tar")}
        for split in ("train", "val")
    }
    assert not splits["train"] & splits["val"]
    assert len(splits["train"] | splits["val"]) == len(list_glyphs("demo")) * len(BACKGROUNDS)
    item = ShardDataset(index_shards(str(tmp_path / "a")), 16)[0]
    ground = item["caption"].partition(" on a ")[2].removesuffix(" background")
    level = BACKGROUNDS[ground][0] / 127.5 - 1
    assert item["image"][0, 0, 0].item() == pytest.approx(level, abs=0.01)
    with pytest.raises(FileExistsError, match="not empty"):
        write_openmoji_shards(tmp_path / "a", glyphs="demo", progress=False)


def test_glyphs_show_on_every_background():
    for glyph in list_glyphs("demo"):
        for rgb in BACKGROUNDS.values():
            pixels = np.asarray(render(glyph, 32, rgb)).astype(int)
            assert pixels[0, 0].tolist() == list(rgb)
            assert np.abs(pixels - rgb).max() > 60
