"""Training data end to end: resume, ranks, workers, faults, the local cache, the cache."""

import csv
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recorder
import tiny
import torch
import yaml
from faulty_server import Fault, FaultyServer
from lightning.pytorch import Trainer
from PIL import Image
from ranks import Command

from zsnr.cli import main
from zsnr.codecs import AutoencoderKLCodec, PixelCodec
from zsnr.conditioning import ClassLabels, TransformersConditioner
from zsnr.data.buckets import AspectBuckets
from zsnr.data.caption_tags import Tags
from zsnr.data.captions import Captions
from zsnr.data.dataset import Pixels
from zsnr.data.faults import BudgetError, read_ledger
from zsnr.data.filters import Filter
from zsnr.data.local_cache import LocalCache
from zsnr.data.openmoji import write_openmoji_shards
from zsnr.data.sources import Source
from zsnr.data.storage import Retries, StorageError
from zsnr.training import DataModule, LatentDiffusion

QUICK = Retries(attempts=4, backoff=0.01, timeout=0.5, outage=0.0)


def photographs(folder, counts, broken=(), kind="JPEG"):
    """Shards of differing pieces of photographs, in three shapes; those named are cut short."""
    from skimage import data

    sources = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        members = {}
        for _ in range(count):
            h, w = [(48, 48), (80, 32), (32, 80)][number % 3]
            source = sources[number % len(sources)]
            top, left = (rng.integers(0, side - 100) for side in source.shape[:2])
            stream = io.BytesIO()
            Image.fromarray(source[top : top + h, left : left + w]).save(stream, kind, quality=95)
            key, picture = f"{number:05d}", stream.getvalue()
            members[f"{key}.jpg"] = picture[:-200] if key in broken else picture
            members[f"{key}.txt"] = f"picture {number}".encode()
            members[f"{key}.json"] = json.dumps({"score": number, "alt": f"alt {number}"}).encode()
            number += 1
        tiny.write_shard(folder / f"{shard:05d}.tar", members)
    return folder


def module(source, val=None, **options):
    settings = {"image_size": 16, "batch_size": 6, "num_workers": 0, "retries": QUICK}
    return DataModule(source, val, **{**settings, **options})


def take(data, steps, rank=0, ranks=1, first=0, folder=None, accumulate=1):
    """The batches that one rank loads for some steps, through the module's own hooks."""
    if folder is None:  # nobody looks at what is written there
        with tempfile.TemporaryDirectory() as folder:
            return take(data, steps, rank, ranks, first, folder, accumulate)
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=ranks,
        accumulate_grad_batches=accumulate,
        global_step=first,
        default_root_dir=folder,
        training=True,
        state=SimpleNamespace(fn="fit"),
    )
    data.prepare_data()
    data.setup("fit")
    batches, found = iter(data.train_dataloader()), []
    for _ in range(steps * accumulate):
        batch = data.on_before_batch_transfer(next(batches), 0)
        found.append(data.on_after_batch_transfer(batch, 0))
    return found


def rows(batches):
    """{position: (key, caption, pixels)} of batches."""
    return {
        position: (key, caption, image.numpy().tobytes())
        for batch in batches
        for position, key, caption, image in zip(
            batch["position"].tolist(), batch["key"], batch["caption"], batch["image"], strict=True
        )
    }


BUCKETS = {
    "aspect": AspectBuckets(step=8, max_ratio=4),
    "pixels": Pixels(crop="random", flip=True),
    "captions": Captions({"txt": 1.0, "alt": 1.0}),
    "window_shards": 2,
}


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_stops_change_nothing(tmp_path, workers):
    photographs(tmp_path / "a", [7, 5, 9])
    photographs(tmp_path / "b", [4])
    source = [str(tmp_path / "a"), Source(str(tmp_path / "b"), 0.5)]
    whole = rows(take(module(source, **BUCKETS), 14))
    assert sorted(whole) == list(range(14 * 6))
    for ranks in (1, 2, 3):  # four shards, up to six loading processes
        parts = {}
        for first, steps in ((0, 5), (5, 9)):
            for rank in range(ranks):
                data = module(source, num_workers=workers, **BUCKETS)
                parts |= rows(take(data, steps, rank, ranks, first))
        assert parts == whole
    shapes = {batch["image"].shape[-2:] for batch in take(module(source, **BUCKETS), 14)}
    assert len(shapes) == 3
    accumulated = rows(take(module(source, **BUCKETS), 14, accumulate=3))
    assert accumulated == whole


@pytest.mark.parametrize("workers", [1, 2])
def test_tags_belong_to_the_position(tmp_path, workers):
    captions = [f"trigger {i}, a, b, c, d, e" for i in range(8)]
    source = str(tiny.write_captions(tmp_path / "shards", captions))
    tags = Tags(keep=1, dropout=0.2)
    whole = rows(take(module(source, tags=tags, batch_size=4), 6))
    parts = {}
    for first, steps in ((0, 2), (2, 4)):
        for rank in range(2):
            data = module(source, tags=tags, batch_size=4, num_workers=workers)
            parts |= rows(take(data, steps, rank, 2, first))
    assert parts == whole
    plain = rows(take(module(source, batch_size=4), 6))
    texts = {}
    for position, (key, caption, image) in plain.items():
        assert whole[position][::2] == (key, image)
        first, *others = whole[position][1].split(", ")
        assert first == caption.split(", ")[0]
        assert {*others} <= {*"abcde"}
        texts.setdefault(key, set()).add(tuple(others))
    assert min(map(len, texts.values())) > 1  # another order in another epoch
    data = module(source, source, tags=tags, batch_size=4)
    take(data, 0)
    data.trainer.lightning_module = None
    assert {row[1] for row in rows(data.val_dataloader()).values()} == {*captions}


def test_moved_shards_are_the_same_data(tmp_path):
    photographs(tmp_path / "photographs", [7, 5])
    write_openmoji_shards(
        tmp_path / "glyphs", glyphs="demo", size=24, samples_per_shard=40, progress=False
    )
    for name, pattern in (("photographs", "{00000..00001}"), ("glyphs", "train-{000000..000002}")):
        here = tmp_path / name
        with FaultyServer(here) as server:
            url = f"http://127.0.0.1:{server.port}/{pattern}.tar"
            assert rows(take(module(url), 5)) == rows(take(module(f"{here}/{pattern}.tar"), 5))


def test_a_run_behind_http_sees_each_sample_exactly_once_a_pass(tmp_path):
    write_openmoji_shards(
        tmp_path / "glyphs", glyphs="demo", size=24, samples_per_shard=30, progress=False
    )
    names = sorted(path.name for path in (tmp_path / "glyphs").glob("train-*.tar"))
    with FaultyServer(tmp_path / "glyphs", rate={"503": 5, "cut": 7, "reset": 11}) as server:
        patient = Retries(attempts=12, backoff=0.0, timeout=0.5)
        data = module([server.url(name) for name in names], retries=patient)
        batches = take(data, 36, folder=str(tmp_path))  # 216 = two passes over 108
        met = sum(request.kind is not None for request in server.log)
    keys = [key for batch in batches for key in batch["key"]]
    assert len(set(keys[:108])) == len(set(keys[108:])) == 108
    assert set(keys[:108]) == set(keys[108:])
    assert keys[:108] != keys[108:]
    ledger = read_ledger(tmp_path / "faults" / "rank-00000.jsonl")
    assert len(ledger) == met > 30
    assert {fault.kind for fault in ledger} == {"passing"}


def test_other_data_or_settings_do_not_resume_silently(tmp_path):
    source = str(photographs(tmp_path, [7, 5]))
    data = module(source)
    take(data, 1)
    state = data.state_dict()
    for options, changed in (
        ({}, None),
        ({"num_workers": 2, "val_samples": 3}, None),
        ({"batch_size": 4}, "batch_size"),
        ({"seed": 1}, "seed"),
        ({"pixels": Pixels(flip=True)}, "pixels"),
        ({"captions": Captions({"alt": 1.0})}, "captions"),
        ({"tags": Tags()}, "tags"),
        ({"filters": [Filter("score", max=8)]}, "samples"),
        ({"aspect": AspectBuckets(8, 4)}, "samples"),
        ({"batch_size": 4, "accept_changed_data": True}, None),
    ):
        other = module(source, **options)
        take(other, 0)
        if "accept_changed_data" in options:
            with pytest.warns(UserWarning, match="resumes with other training data: batch_size"):
                other.load_state_dict(state)
        elif changed is None:
            other.load_state_dict(state)
        else:
            with pytest.raises(ValueError, match=f"began with other.*{changed} changed.*accept"):
                other.load_state_dict(state)


def test_filters_say_what_they_removed(tmp_path, capsys, caplog):
    import logging

    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    data = module(str(photographs(tmp_path, [12])), filters=[Filter("score", min=3)])
    assert {int(key) for batch in take(data, 6) for key in batch["key"]} == {*range(3, 12)}
    assert "removed by score >= 3: 3" in caplog.text


def test_faults_of_a_server_are_written_down_exactly(tmp_path):
    """Passing faults change nothing; lasting ones replace one sample; each stands in the ledger."""
    folder = photographs(tmp_path / "shards", [8, 8, 8], broken=("00003", "00011"))
    clean = rows(take(module(str(folder)), 12))
    names = [f"{i:05d}.tar" for i in range(3)]
    index = ["--output", str(tmp_path / "index")]
    with FaultyServer(folder) as server:  # indexed while all is well
        urls = [server.url(name) for name in names]
        assert main(["data", "index", *urls, *index, "--ledger", str(tmp_path / "none")]) == 0
        assert not (tmp_path / "none").exists()
        injected = [
            Fault(names[0], "500", 2),
            Fault(names[1], "reset"),
            Fault(names[1], "stall"),
            Fault(names[2], "cut"),
            Fault(names[2], "503"),
        ]
        server._left = [[fault, fault.times] for fault in injected]
        data = module(urls, index=str(tmp_path / "index"))
        found = rows(take(data, 12, folder=str(tmp_path)))
        met = [(request.kind, request.path) for request in server.log]
    assert found == clean
    ledger = read_ledger(tmp_path / "faults" / "rank-00000.jsonl")
    words = {
        "500": "HTTP 500",
        "503": "HTTP 503",
        "reset": "connection reset",
        "stall": "stalled for 0.5 s",
        "cut": "body cut short",
    }
    passing = [(f.reason, f.shard.rpartition("/")[2]) for f in ledger if f.kind == "passing"]
    assert len(met) == 6
    assert sorted(passing) == sorted((words[kind], path) for kind, path in met)
    assert {f.key for f in ledger if f.kind == "sample"} == {"00003", "00011"}
    assert len(ledger) == 8
    # 22 good samples, each once in a pass of 24, and two that stand in
    counts = np.unique([row[0] for p, row in found.items() if p < 24], return_counts=True)
    assert len(counts[0]) == 22
    assert sum(counts[1]) == 24


def test_lasting_faults_of_shards_are_found_by_indexing(tmp_path):
    folder = photographs(tmp_path / "shards", [4, 4, 4, 4])
    names = [f"{i:05d}.tar" for i in range(4)]
    cut = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(cut[: len(cut) // 2])
    (folder / names[2]).write_bytes(b"garbage" * 999)
    with FaultyServer(folder, [Fault(names[3], "missing")]) as server:
        urls = [server.url(name) for name in names]
        server._left.insert(0, [Fault(names[0], "503"), 1])
        with pytest.raises(BudgetError, match="3 of 4 shards"):
            take(module(urls), 1)
        server._left.insert(0, [Fault(names[0], "503"), 1])
        data = module(urls, error_budget=0.8)
        keys = {key for batch in take(data, 8, folder=str(tmp_path)) for key in batch["key"]}
    ledger = read_ledger(tmp_path / "faults" / "rank-00000.jsonl")
    shards = {f.shard.rpartition("/")[2]: f.reason for f in ledger if f.kind == "shard"}
    assert shards.keys() == set(names[1:])
    passing = [(f.shard.rpartition("/")[2], f.reason) for f in ledger if f.kind == "passing"]
    assert passing == [(names[0], "HTTP 503")]
    assert "cut short" in shards[names[1]]
    assert "not a readable tar" in shards[names[2]]
    assert shards[names[3]] == "missing"
    whole = {f"{i:05d}" for i in range(4)}
    assert whole < keys < {f"{i:05d}" for i in range(8)}


def test_a_server_that_stays_down_stops_the_run(tmp_path):
    folder = photographs(tmp_path / "shards", [30])
    with FaultyServer(folder) as server:
        url = server.url("00000.tar")
        main(["data", "index", url, "--output", str(tmp_path / "index")])
        server._left = [[Fault(None, "500", 10**6), 10**6]]
        data = module(url, index=str(tmp_path / "index"), retries=Retries(2, 0.0, 1.0, 0.0))
        with pytest.raises(StorageError, match=f"{url} failed 2 times, .* HTTP 500"):
            take(data, 3, folder=str(tmp_path))
        assert not (tmp_path / "faults").exists()  # nothing is broken
        server._left = [[Fault(None, "500", 9), 9]]  # an outage that ends
        longer = module(url, index=str(tmp_path / "index"), retries=Retries(2, 0.0, 1.0, 60.0))
        assert rows(take(longer, 3)) == rows(take(module(str(folder)), 3))


def test_an_outage_while_indexing_makes_no_shard_broken(tmp_path):
    folder = photographs(tmp_path / "shards", [6, 6])
    index = tmp_path / "index"
    with FaultyServer(folder) as server:
        urls = [server.url(f"{i:05d}.tar") for i in range(2)]
        whole = (folder / "00001.tar").read_bytes()
        server._left = [[Fault("00001.tar", kind), 10**6] for kind in ("500",)]
        for budget in (0.01, 1.0):
            with pytest.raises(StorageError, match="00001.tar failed 4 times, .* HTTP 500"):
                take(module(urls, index=str(index), error_budget=budget), 1)
        assert [path.name[-15:] for path in index.glob("*")] == ["00000.tar.index"]
        server._left = [[Fault("00001.tar", "500"), 2]]
        assert rows(take(module(urls, index=str(index)), 3)) == rows(take(module(str(folder)), 3))
    assert (folder / "00001.tar").read_bytes() == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_shard_stops_the_run_with_its_name(tmp_path, workers):
    folder = photographs(tmp_path / "shards", [6, 6, 6])
    data = module(str(folder), num_workers=workers)
    take(data, 1)
    (folder / "00001.tar").unlink()
    with pytest.raises(
        StorageError, match=r"00001.tar, sample '000\d\d', existed when the data was"
    ):
        [data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def test_the_error_budget_stops_a_run(tmp_path):
    broken = [f"{i:05d}" for i in range(0, 60, 2)]
    folder = photographs(tmp_path / "shards", [60], broken=broken)
    data = module(str(folder), error_budget=0.3)
    with pytest.raises(BudgetError, match=r"samples. \d\d x sample: not a readable image"):
        take(data, 20, folder=str(tmp_path))
    ledger = read_ledger(tmp_path / "faults" / "rank-00000.jsonl")
    assert len(ledger) > 10
    assert len({f.key for f in ledger}) == len(ledger)


def test_the_ledger_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path):
    broken = ["00001", "00004", "00010", "00017"]
    folder = photographs(tmp_path / "shards", [9, 9], broken=broken)
    take(module(str(folder)), 8, folder=str(tmp_path / "whole"))
    take(module(str(folder)), 5, folder=str(tmp_path / "cut"))  # killed after its checkpoint at 2
    take(module(str(folder)), 6, first=2, folder=str(tmp_path / "cut"))
    texts = [
        (tmp_path / name / "faults" / "rank-00000.jsonl").read_text() for name in ("whole", "cut")
    ]
    assert texts[0] == texts[1]
    assert texts[0].count("\n") == 4


def test_ledgers_of_ranks_that_are_gone_are_cut_back_too(tmp_path):
    broken = [f"{i:05d}" for i in range(0, 18, 2)]
    folder = photographs(tmp_path / "shards", [9, 9], broken=broken)
    for rank in range(3):
        take(module(str(folder)), 8, rank, 3, folder=str(tmp_path))
    take(module(str(folder)), 1, first=2, folder=str(tmp_path))
    for rank in (1, 2):
        ledger = read_ledger(tmp_path / "faults" / f"rank-0000{rank}.jsonl")
        assert ledger
        assert all(fault.position < 12 for fault in ledger)


# The local cache


def test_commands_and_servers_without_ranges_are_data_like_any_other(tmp_path):
    folder = photographs(tmp_path / "shards", [7, 5, 9], broken=("00003",))
    names = [f"{i:05d}.tar" for i in range(3)]
    options = {**BUCKETS, "filters": [Filter("score", max=18)]}
    weighted = [Source(str(folder / names[0]), 0.5), *(str(folder / name) for name in names[1:])]
    wanted = rows(take(module(weighted, **options), 12))
    cache = {"local_cache": LocalCache(str(tmp_path / "local")), "index": str(tmp_path / "index")}
    long = "true;" * 60  # no name of a file could be so long
    with FaultyServer(folder, ranges=False) as server:
        pipes = [f"pipe:{long}cat {folder}/{name}" for name in names]
        for urls in (pipes, [server.url(name) for name in names]):
            source = [Source(urls[0], 0.5), *urls[1:]]
            found = {}
            for first, steps in ((0, 5), (5, 7)):  # stopped and resumed
                for rank in range(2):
                    data = module(source, num_workers=rank, **options, **cache)
                    found |= rows(take(data, steps, rank, 2, first, folder=str(tmp_path)))
            assert found == wanted
            data = module(str(folder), val=urls, **cache)
            take(data, 0)
            assert {k for b in data.val_dataloader() for k in b["key"]} >= {"00000", "00020"}
            for faults in (tmp_path / "faults").iterdir():
                assert {f.key for f in read_ledger(faults) if f.kind == "sample"} <= {"00003"}


def test_sources_without_ranges_are_refused_without_a_local_cache(tmp_path):
    folder = photographs(tmp_path / "shards", [7])
    with FaultyServer(folder, ranges=False) as server:
        for url in (server.url("00000.tar"), f"pipe:cat {folder}/00000.tar"):
            with pytest.raises(StorageError, match="00000.tar.* Set data.local_cache to a folder"):
                take(module(url), 1)


def test_a_command_that_fails_stops_the_run(tmp_path):
    folder = photographs(tmp_path / "shards", [7])
    good, bad = f"pipe:cat {folder}/00000.tar", f"pipe:cat {folder}/00000.tar; exit 3"
    local = LocalCache(str(tmp_path / "local"))
    patient = replace(QUICK, timeout=30.0)  # a process may start late on a busy machine
    data = module([good, bad], local_cache=local, error_budget=1.0, retries=patient)
    with pytest.raises(StorageError, match="00000.tar failed 4 times, .* exit status 3"):
        take(data, 1)


def test_a_local_cache_that_is_smaller_than_the_data_changes_nothing(tmp_path):
    folder = photographs(tmp_path / "shards", [7, 5, 9, 6])
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    wanted = rows(take(module(str(folder), **BUCKETS), 12))
    with FaultyServer(folder, rate={"503": 9, "cut": 7}) as server:
        urls = [server.url(f"{i:05d}.tar") for i in range(4)]
        small = LocalCache(str(tmp_path / "local"), 1.5 * size / 2**30)
        data = module(urls, local_cache=small, index=str(tmp_path / "index"), **BUCKETS)
        with pytest.warns(UserWarning, match="downloaded several times in an epoch. Raise it"):
            assert rows(take(data, 12)) == wanted
    assert sum(path.stat().st_size for path in (tmp_path / "local").iterdir()) <= 1.5 * size


def test_many_shards_behind_an_address_want_an_index():
    with pytest.raises(ValueError, match="101 shards behind an address have no index.*data index"):
        take(module("http://127.0.0.1:9/{000..100}.tar"), 1)


# The cache


def config(folder, **data):
    """A small training config in which all is frozen but the UNet."""
    if not (folder / "text").exists():
        tiny.frozen_conditioner(folder / "text")
    settings = {"image_size": 16, "batch_size": 4, "num_workers": 0, "error_budget": 0.5}
    text = {"pretrained": str(folder / "text"), "tokenizer": "open_clip", "max_length": 8}
    values = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 5,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder / "run"),
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder / "log")}},
        },
        "checkpoint": {"every_n_train_steps": 2},
        "model": {
            "codec": {
                "class_path": "AutoencoderKLCodec",
                "init_args": {"pretrained": str(folder / "vae")},
            },
            "conditioner": {"class_path": "TransformersConditioner", "init_args": text},
            "network": {
                "block_out_channels": [16, 32],
                "attention": [False, True],
                "layers_per_block": 1,
                "attention_head_dim": 16,
                "norm_groups": 8,
            },
            "caption_dropout": 0.3,
        },
        "data": {**settings, **data},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


@pytest.fixture
def cached(tmp_path):
    """Photographs in three shapes, two of them broken, and a config with buckets and flips."""
    from zsnr.assets import resolve_asset

    folder = photographs(tmp_path / "shards", [9, 6, 8], broken=("00002", "00013"))
    (tmp_path / "vae").symlink_to(resolve_asset("asset:openmoji_vae"))
    path = config(
        tmp_path,
        train=str(folder),
        aspect={"step": 8, "max_ratio": 4},
        pixels={"flip": True},
        filters=[{"field": "score", "max": 21}],
    )
    return tmp_path, path


def losses(folder):
    with open(folder / "metrics.csv", newline="") as lines:
        return [float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]]


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def fit(path, out, *options):
    return main(["fit", "-c", str(path), f"--trainer.default_root_dir={out}", *options])


def test_a_config_may_weight_its_sources(cached):
    folder, path = cached
    config = yaml.safe_load(path.read_text())
    config["data"]["train"] = [config["data"]["train"], {"path": config["data"]["train"]}]
    config["data"]["train"][1]["weight"] = 0.5
    (folder / "weighted.yaml").write_text(yaml.safe_dump(config))
    assert fit(folder / "weighted.yaml", folder / "run", "--trainer.max_steps=1") == 0
    assert (folder / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_training_from_the_cache_is_training_from_the_pictures(cached, dtype):
    folder, path = cached
    make = ["data", "cache", "-c", str(path), "--text", "--dtype", dtype]
    assert main([*make, "--output", str(folder / "cache")]) == 0
    assert fit(path, folder / "plain") == 0
    (folder / "vae").unlink()  # neither is needed any more
    (folder / "text" / "model.safetensors").unlink()
    (folder / "shards").rename(folder / "away")
    config_only = folder / "vae"
    config_only.mkdir()
    from zsnr.assets import resolve_asset

    source = Path(resolve_asset("asset:openmoji_vae"))
    (config_only / "config.json").write_text((source / "config.json").read_text())
    assert fit(path, folder / "fast", f"--data.train={folder}/cache") == 0
    theirs, mine = (losses(folder / "log" / "lightning_logs" / f"version_{i}") for i in (0, 1))
    assert len(mine) == 5
    assert mine == pytest.approx(theirs, rel=1e-5 if dtype == "float32" else 1e-3)
    ledgers = [
        read_ledger(folder / run / "faults" / "rank-00000.jsonl") for run in ("plain", "fast")
    ]
    broken = [{f.key for f in ledger if f.kind == "sample"} for ledger in ledgers]
    assert broken[1] <= {"00002", "00013"}
    assert broken[0] == broken[1] & {f.key for f in ledgers[0]}


def test_a_cache_holds_the_chunks_of_long_captions(tmp_path, capsys):
    from zsnr.assets import resolve_asset

    (tmp_path / "vae").symlink_to(resolve_asset("asset:openmoji_vae"))
    words = "a photo of a black cat"
    captions = [f"{words} {i}" if i % 4 == 0 else f"cat {i}" for i in range(8)]
    path = config(tmp_path, train=str(tiny.write_captions(tmp_path / "shards", captions)))
    make = ["data", "cache", "-c", str(path), "--text", "--dtype", "float32", "--output"]
    long = "--model.conditioner.init_args.max_tokens=12"
    with pytest.warns(UserWarning, match="^2 of 8 captions are cut: .* 6 tokens, .* has 7. Lost"):
        assert main([*make, str(tmp_path / "cut")]) == 0
    assert main([*make, str(tmp_path / "cache"), long]) == 0
    for out, train in (("plain", "shards"), ("fast", "cache")):
        options = [long, f"--data.train={tmp_path / train}", "--trainer.max_steps=2"]
        assert fit(path, tmp_path / out, *options) == 0
    theirs, mine = (losses(tmp_path / "log" / "lightning_logs" / f"version_{i}") for i in (0, 1))
    assert mine == pytest.approx(theirs, rel=1e-5)
    capsys.readouterr()
    assert fit(path, tmp_path / "no", f"--data.train={tmp_path / 'cache'}") == 2
    assert "made with conditioner {'num_chunks': 2}" in capsys.readouterr().err
    tags = "--data.tags.keep=1"
    assert fit(path, tmp_path / "no", long, f"--data.train={tmp_path / 'cache'}", tags) == 2
    assert "so data.tags would have no effect. Cache without --text" in capsys.readouterr().err
    assert main([*make, str(tmp_path / "no"), tags]) == 2
    assert "--text: cached text embeddings are those of" in capsys.readouterr().err
    del make[-3:-1]  # --dtype
    make.remove("--text")
    assert main([*make, str(tmp_path / "images"), tags]) == 0
    images = f"--data.train={tmp_path / 'images'}"
    assert fit(path, tmp_path / "yes", long, images, tags, "--trainer.max_steps=1") == 0


def test_a_cache_is_resumed_and_shared(cached, capsys):
    folder, path = cached
    make = ["data", "cache", "-c", str(path), "--dtype", "float32"]
    whole, parts = folder / "whole", folder / "parts"
    assert main([*make, "--output", str(whole)]) == 0
    for rank in ("1", "0"):
        assert main([*make, "--output", str(parts), "--rank", rank, "--ranks", "2"]) == 0
        if rank == "1":
            assert fit(path, folder / "run", f"--data.train={parts}") == 2
            assert "is not finished: 2 of 3 shards" in capsys.readouterr().err
    files = sorted(p.name for p in whole.glob("*.tar"))
    assert files == ["000000-00000.tar", "000001-00001.tar", "000002-00002.tar"]
    for name in files:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    stamps = {name: (whole / name).stat().st_mtime_ns for name in files}
    (whole / f"{files[1]}.index").unlink()  # as a kill between shard and index leaves it
    assert main([*make, "--output", str(whole)]) == 0
    changed = [name for name in files if (whole / name).stat().st_mtime_ns != stamps[name]]
    assert changed == [files[1]]
    assert not list(whole.glob(".*"))


@pytest.mark.filterwarnings("ignore:.*the run continues without it")  # said once a process
@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_fails_for_good_stops_fit_with_one_line(cached, capfd, workers):
    folder, path = cached
    with FaultyServer(folder / "shards") as server:
        url = server.url("00000.tar").replace("://", "://me:secret@")
        assert main(["data", "index", url, "--output", str(folder / "index")]) == 0
        server._left = [[Fault(None, "500", 10**6), 10**6]]
        options = [f"--data.train={url}", f"--data.index={folder}/index"]
        options += ["--data.retries={attempts: 2, backoff: 0.0, outage: 0.0}"]
        assert fit(path, folder / "run", *options, f"--data.num_workers={workers}") == 2
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    assert "secret" not in printed
    failed = f"zsnr: error: {server.url('00000.tar')} failed 2 times, the last time with HTTP 500: "
    assert next(line for line in printed.splitlines() if "error" in line).startswith(failed)


def test_class_labels_are_cached_exactly(tmp_path):
    captions = tiny.write_captions(tmp_path / "shards", ["257", "", "3"])
    config = {
        "model": {
            "codec": {"class_path": "PixelCodec", "init_args": {"patch_size": 2}},
            "conditioner": {"class_path": "ClassLabels", "init_args": {"num_classes": 1000}},
            "network": {"class_path": "tiny.Own"},
        },
        "data": {"train": str(captions), "image_size": 16, "batch_size": 3, "num_workers": 0},
    }
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(config))
    cache = ["data", "cache", "-c", str(tmp_path / "labels.yaml"), "--text", "--dtype", "bfloat16"]
    assert main([*cache, "--output", str(tmp_path / "cache")]) == 0
    source = DataModule(str(tmp_path / "cache"), image_size=16, batch_size=3, num_workers=0)
    net = LatentDiffusion(PixelCodec(2), ClassLabels(1000), tiny.Own(), image_size=16)
    seen = []
    net.trained["unet"].register_forward_hook(lambda _, given, out: seen.append(given[2].labels))
    Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    ).fit(net, datamodule=source)
    assert set(seen[0].tolist()) <= {257, 1000, 3}
    assert 257 in seen[0].tolist()


def test_previews_from_a_cache_encode_their_prompts_once(cached, monkeypatch):
    folder, path = cached
    cache = str(folder / "cache")
    assert main(["data", "cache", "-c", str(path), "--output", cache, "--text"]) == 0
    loads, released = [], []
    for cls, name in ((TransformersConditioner, "text"), (AutoencoderKLCodec, "vae")):
        read, release = cls._read, cls.release
        monkeypatch.setattr(cls, "_read", lambda s, r=read, n=name: (loads.append(n), r(s))[1])
        monkeypatch.setattr(cls, "release", lambda s, r=release: (released.append(s), r(s))[1])
    previews = [{"class_path": "zsnr.training.Previews", "init_args": {}}]
    previews[0]["init_args"] = {"prompts": ["picture 3", ""], "every_n_steps": 2}
    options = [f"--data.train={cache}", f"--trainer.callbacks={json.dumps(previews)}"]
    assert fit(path, folder / "run", *options) == 0
    assert sorted(loads) == ["text", "vae"]  # two previews, each part loaded once
    assert len(released) == 1
    assert not released[0]._loaded
    pictures = sorted(p.name for p in (folder / "run" / "previews").iterdir())
    assert pictures == ["step-00000002.png", "step-00000004.png"]


def test_image_metrics_from_a_cache_change_nothing_in_training(cached):
    folder, path = cached
    cache = str(folder / "cache")
    assert main(["data", "cache", "-c", str(path), "--output", cache, "--text"]) == 0
    photographs(folder / "val", [3])
    (folder / "captions.txt").write_text("picture 3\na cat\n\nsnow\n")
    options = [
        f"--data.train={cache}",
        f"--data.val={folder}/val",
        "--trainer.val_check_interval=2",
    ]
    measured = [f"--metrics.captions={folder}/captions.txt", "--metrics.num_images=3"]
    measured += [f"--metrics.real={folder}/val", "--model.sampling.num_steps=2"]
    assert fit(path, folder / "a", *options) == 0
    assert fit(path, folder / "b", *options, *measured, f"--metrics.output={folder}/n.json") == 0
    assert [p.name for p in sorted(folder.glob("n-*"))] == [
        "n-step-00000002.json",
        "n-step-00000004.json",
    ]
    numbers = json.loads((folder / "n-step-00000004.json").read_text())["metrics"]
    assert numbers["metrics/luma_w1"] > 0
    a, b = weights(folder / "a"), weights(folder / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_stale_caches_are_refused(cached, capsys):
    folder, path = cached
    cache = folder / "cache"
    make = ["data", "cache", "-c", str(path), "--output", str(cache)]
    assert main([*make, "--text"]) == 0
    train = f"--data.train={cache}"
    for options, message in (
        (["--data.image_size=24"], "stale: it was made with images {'image_size': 16}"),
        (["--data.captions.fields={alt: 1.0}"], "stale: it was made with captions"),
        (["--data.pixels.flip=false"], "stale: .*'flip': True.*'flip': False"),
        (["--data.aspect=null"], "stale: .*aspect"),
        (["--model.codec.init_args.dtype=bfloat16"], "stale: it was made with codec"),
        (["--model.conditioner.init_args.max_length=9"], "stale: it was made with conditioner"),
    ):
        assert fit(path, folder / "run", train, *options) == 2
        import re

        assert re.search(message, capsys.readouterr().err)
    assert main([*make, "--text", "--dtype", "float32"]) == 2
    assert "made with a different dtype" in capsys.readouterr().err
    assert main([*make[:-1], str(folder / "shards")]) == 2
    assert "holds no cache" in capsys.readouterr().err
    vae = folder / "own"
    vae.mkdir()
    for file in (folder / "vae").resolve().iterdir():
        data = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            data[-1] ^= 1
        (vae / file.name).write_bytes(data)
    assert fit(path, folder / "run", train, f"--model.codec.init_args.pretrained={vae}") == 2
    assert "made with codec {'weights'" in capsys.readouterr().err
    scaled = ["--model.codec.init_args.scale=0.5", "--trainer.max_steps=1"]
    assert fit(path, folder / "run", train, *scaled) == 0  # moments are raw: the scale is free


def test_a_cache_of_weighted_sources_and_folders_keeps_their_order(cached):
    folder, path = cached
    plain = folder / "plain"
    plain.mkdir()
    for i in range(3):
        (plain / f"photo é.{i}.png").write_bytes(tiny.png((80 * i, 0, 0)))
        (plain / f"photo é.{i}.txt").write_text(f"own {i}")
    sources = [Source(str(folder / "shards"), 0.5), Source(str(plain), 3)]
    values = yaml.safe_load(path.read_text())
    values["data"] |= {"train": [vars(source) for source in sources], "filters": []}
    path.write_text(yaml.safe_dump(values))
    cache = str(folder / "cache")
    assert main(["data", "cache", "-c", str(path), "--output", cache]) == 0
    facts = {"image_size": 16, "aspect": AspectBuckets(8, 4), "pixels": Pixels(flip=True)}
    mine, theirs = take(module(cache, **facts), 15), take(module(sources, **facts), 15)
    for name in ("key", "caption"):
        assert [b[name] for b in mine] == [b[name] for b in theirs]
    assert [b["groups"].tolist() for b in mine] == [b["groups"].tolist() for b in theirs]
    assert sum("photo" in key for batch in mine for key in batch["key"]) > 30
    file = folder / "cache" / "cache.json"
    text = file.read_text()
    names = [shard.pop("source_name") for shard in json.loads(text)["shards"]]
    assert {*names} == {"shards", "plain"}
    older = json.loads(text)
    for shard in older["shards"]:
        del shard["source_name"]
    file.write_text(json.dumps(older))
    assert main(["data", "cache", "-c", str(path), "--output", cache]) == 0  # nothing is left to do
    file.write_text(text)
    moved = folder / "moved"
    (folder / "cache").rename(moved)
    assert [b["key"] for b in take(module(str(moved), **facts), 15)] == [b["key"] for b in mine]


def test_a_server_that_is_down_leaves_no_holes_in_a_cache(cached, capsys):
    folder, path = cached
    with FaultyServer(folder / "shards") as server:
        url = server.url("00000.tar")
        main(["data", "index", url, "--output", str(folder / "index")])
        server._left = [[Fault(None, "500", 10**6), 10**6]]
        options = [f"--data.train={url}", f"--data.index={folder}/index"]
        options += ["--data.retries={attempts: 2, backoff: 0.0, timeout: 1.0, outage: 0.0}"]
        command = ["data", "cache", "-c", str(path), "--output", str(folder / "cache"), *options]
        assert main(command) == 2
        assert "zsnr: error: " in capsys.readouterr().err
        assert not list((folder / "cache").glob("*.tar*"))
        server._left = []
        assert main(command) == 0
    assert list((folder / "cache").glob("*.tar"))


def test_more_filters_on_a_cache(cached):
    folder, path = cached
    cache = str(folder / "cache")
    assert main(["data", "cache", "-c", str(path), "--output", cache]) == 0
    facts = {"image_size": 16, "aspect": AspectBuckets(8, 4), "pixels": Pixels(flip=True)}
    same = module(cache, filters=[Filter("score", max=21)], **facts)
    plain = module(str(folder / "shards"), filters=[Filter("score", max=21)], **facts)
    mine, theirs = take(same, 9), take(plain, 9)
    assert [b["key"] for b in mine] == [b["key"] for b in theirs]
    assert same.state_dict() == plain.state_dict()
    fewer = module(cache, filters=[Filter("score", max=7)], **facts)
    assert {int(key) for batch in take(fewer, 9) for key in batch["key"]} <= {*range(8)} - {2}
    assert fewer.state_dict() != same.state_dict()
    batch = mine[0]
    assert batch["moments"].shape[1] == 8
    assert batch["text_embedding"] is None


# The whole way


def launch(path, *options, kill=None, record=None):
    callback = {"class_path": "recorder.Recorder", "init_args": {"path": str(record)}}
    if kill is not None:
        callback["init_args"]["kill_after_step"] = kill
    options = [f"--trainer.callbacks={json.dumps([callback])}", *options]
    with Command(["fit", "-c", path, *options]) as command:
        return command.wait(400), command.stderr


def test_a_killed_run_on_a_faulty_server_trains_on_the_same_batches(tmp_path):
    folder = photographs(tmp_path / "shards", [9, 6, 8], broken=("00002", "00013"))
    names = [f"{i:05d}.tar" for i in range(3)]
    faults = [Fault(name, kind) for name in names for kind in ("503", "reset", "cut")]
    options = {
        "index": str(tmp_path / "index"),
        "num_workers": 2,
        "retries": {"attempts": 6, "backoff": 0.01, "timeout": 0.5},
        "aspect": {"step": 8, "max_ratio": 4},
        "pixels": {"flip": True},
    }
    from zsnr.assets import resolve_asset

    (tmp_path / "vae").symlink_to(resolve_asset("asset:openmoji_vae"))
    path = config(tmp_path, train=str(folder), **options)
    runs = [f"--trainer.default_root_dir={tmp_path}/{name}" for name in ("whole", "killed")]
    code, errors = launch(path, runs[0], record=tmp_path / "whole.jsonl")
    assert code == 0, errors
    with FaultyServer(folder, faults, rate={"503": 7}) as server:
        path = config(tmp_path, train=[server.url(name) for name in names], **options)
        code, _ = launch(path, runs[1], record=tmp_path / "killed.jsonl", kill=3)
        assert code == -9
        code, errors = launch(
            path,
            runs[1],
            "--ckpt_path=last",
            "--data.num_workers=0",
            record=tmp_path / "killed.jsonl",
        )
        assert code == 0, errors
        met = {request.kind for request in server.log}
    assert met == {"503", "reset", "cut"}
    assert recorder.read(tmp_path / "killed.jsonl") == recorder.read(tmp_path / "whole.jsonl")
    mine, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
