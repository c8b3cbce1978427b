"""Files that mean harm: nothing in them is run, and the process stays as it was."""

import errno
import json
import os
import pathlib
import pickle
import shutil
import struct
import zipfile

import pytest
import torch

from zsnr import NoiseSchedule
from zsnr.checkpoints import read_checkpoint, sharded
from zsnr.checkpoints.checkpoint_file import KEY
from zsnr.checkpoints.run_facts import read_run_facts
from zsnr.checkpoints.shard_index import read_index
from zsnr.data.caption_files import read_captions
from zsnr.data.prompts import read_prompts
from zsnr.pickled import read_inert
from zsnr.timesteps import read_grid
from zsnr.untrusted import open_archive, read_json
from zsnr.weights.pretrained import read_config

META = "torch.distributed.checkpoint.metadata"


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module, name):
    """Return the opcodes that push a class."""
    return text(module) + text(name) + b"\x93"


def pickled(*codes):
    return b"\x80\x04" + b"".join(codes) + b"."


def index(tmp_path, data):
    (tmp_path / ".metadata").write_bytes(data)
    return tmp_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "a.ckpt"
    checkpoint = {
        "state_dict": {
            "trained.unet.a": torch.arange(12.0).view(3, 4),
            "trained.unet.b": torch.ones(2, dtype=torch.bfloat16),
            "trained.unet.c": torch.tensor(3),
        },
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
        "zsnr": {},
    }
    sharded.write_sharded(checkpoint, folder)
    return folder


@pytest.mark.parametrize("rest", [{}, {"optimizer_states": 5}, {"optimizer_states": [{}]}])
def test_what_does_not_fit_the_tensors_is_damaged(shards, tmp_path, rest):
    folder = shutil.copytree(shards, tmp_path / "a.ckpt")
    torch.save(rest, folder / "meta.pt")
    with pytest.raises(ValueError, match=r"is damaged: meta\.pt does not match the other files"):
        sharded.consolidate(folder)


def test_a_whole_index_gives_the_tensors_that_were_written(shards):
    full = sharded.consolidate(shards)
    assert full["state_dict"]["trained.unet.a"].equal(torch.arange(12.0).view(3, 4))
    assert full["state_dict"]["trained.unet.b"].dtype == torch.bfloat16
    assert full["state_dict"]["trained.unet.c"].dtype == torch.int64
    assert full["optimizer_states"][0]["state"][0]["step"] == 1


def state_of(cls):
    return {name: value for name, value in vars(cls).items() if not name.startswith("_abc")}


HOSTILE = {
    # {"exists": ...} is set on the class itself where a class may be built upon
    "build on a class": pickled(
        *(named("pathlib", "PosixPath"), b"N}(", text("exists"), text("x"), b"u\x86b")
    ),
    "build on a class's dict": pickled(
        named("pathlib", "PosixPath"), b"}(", text("__fspath__"), text("x"), b"ub"
    ),
    "build on torch's class": pickled(
        named(META, "Metadata"), b"N}(", text("__init__"), text("x"), b"u\x86b"
    ),
    "build on a module": pickled(
        named("torch", "distributed"), b"N}(", text("is_initialized"), text("x"), b"u\x86b"
    ),
    "build twice": pickled(named(META, "Metadata"), b")\x81}b}b"),
    "setstate": pickled(
        named(META, "TensorProperties"), b")\x81", named("os", "system"), b"b0" + b"N"
    ),
    "reduce": pickle.dumps(type("Harm", (), {"__reduce__": lambda _: (os.mkdir, ("harm",))})()),
    "nested name": pickled(named("pathlib", "Path.home"), b")R"),
    "module by path": pickled(named("os.path", "os.system"), text("touch harm"), b"\x85R"),
    "memo trick": pickled(named("torch", "Size"), b"\x940h\x00}b"),
    "memo hole": pickled(b"Nr\xff\xff\xff\xff"),
    "memo that is not there": pickled(b"j\xff\xff\xff\xff"),
    "extension": pickled(b"\x82\x01"),
    "persistent id": b"\x80\x02P1\n.",
    "buffers": b"\x80\x05\x97.",
    "huge bytes": pickled(b"\x8e" + struct.pack("<Q", 2**62)),
    "huge byte array": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
    "huge long": pickled(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "deep key": pickled(b"}(", b")" + b"\x85" * 300_000, b"Nu"),
    "nested list": pickled(b"]" * 100_000 + b"a" * 99_999),
    "instance": b"\x80\x02(ios\nsystem\n.",
    "new object of text": pickled(text("a"), b")\x81"),
    "no stop": b"\x80\x04N",
    "empty": b"",
    "other object": pickled(b"K\x01"),
    "endless": pickled(b"N0" * 3_000_000),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_refused_index_changes_nothing_in_the_process(tmp_path, monkeypatch, kind):
    from torch.distributed.checkpoint import filesystem, metadata

    monkeypatch.chdir(tmp_path)
    classes = (pathlib.PosixPath, pathlib.Path, metadata.Metadata, metadata.TensorProperties)
    classes += (filesystem._StorageInfo, torch.Size)
    before = [state_of(cls) for cls in classes]
    started, home = torch.distributed.is_initialized, os.fspath(tmp_path)
    folder = index(tmp_path, HOSTILE[kind])
    with pytest.raises(ValueError, match="is not the index|is empty|has 6000003 bytes"):
        read_index(folder)
    assert [state_of(cls) for cls in classes] == before
    assert torch.distributed.is_initialized is started
    assert os.fspath(tmp_path) == home
    assert sorted(path.name for path in tmp_path.iterdir()) == [".metadata"]


def changed(shards, tmp_path, change):
    """Write an index whose torch objects were changed before it is pickled."""
    made = pickle.loads((shards / ".metadata").read_bytes())
    change(made)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(made))
    return tmp_path


def first(made):
    key = next(key for key in made.storage_data if key.fqn.endswith("unet.a"))
    return made.storage_data[key]


def tensor(made, name="state_dict/trained.unet.a"):
    return made.state_dict_metadata[name]


def set_first(**values):
    return lambda made: vars(first(made)).update(values)


CHANGES = {
    "outside": set_first(relative_path="../__0_0.distcp"),
    "absolute": set_first(relative_path="/etc/passwd"),
    "name in bytes": set_first(relative_path=b"__0_0.distcp"),
    "path object": set_first(relative_path=pathlib.PurePosixPath("__0_0.distcp")),
    "link": set_first(relative_path="meta.pt"),
    "negative offset": set_first(offset=-1),
    "float offset": set_first(offset=0.0),
    "truth as offset": set_first(offset=True),
    "too short": set_first(length=40),
    "overlapping files": set_first(offset=1),
    "huge offset": set_first(offset=2**70),
    "packed": set_first(transform_descriptors=["zstd"]),
    "huge tensor": lambda made: vars(tensor(made)).update(size=torch.Size([2**40, 2**22])),
    "negative size": lambda made: vars(tensor(made)).update(size=torch.Size([-3, 4])),
    "too many axes": lambda made: vars(tensor(made)).update(size=torch.Size([1] * 99)),
    "other axes": lambda made: vars(tensor(made)).update(size=torch.Size([12])),
    "no chunks": lambda made: tensor(made).chunks.clear(),
    "chunk twice": lambda made: tensor(made).chunks.append(tensor(made).chunks[0]),
    "part of it": lambda made: vars(tensor(made)).update(size=torch.Size([4, 4])),
    "bytes": lambda made: made.state_dict_metadata.update({"state_dict/trained.unet.a": b""}),
    "number as a name": lambda made: made.state_dict_metadata.update({1: tensor(made)}),
    "no place": lambda made: made.storage_data.clear(),
    "nothing": lambda made: vars(made).pop("storage_data"),
    "sparse": lambda made: vars(tensor(made).properties).update(layout=torch.sparse_coo),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_an_index_that_contradicts_itself_is_refused(shards, tmp_path, kind):
    with pytest.raises(ValueError, match="is not the index of a sharded checkpoint: "):
        read_index(changed(shards, tmp_path, CHANGES[kind]))


def test_tensors_that_their_files_cannot_hold_are_not_made(shards, tmp_path):
    def grow(made):
        vars(first(made)).update(offset=2**40, length=2**50)
        vars(tensor(made)).update(size=torch.Size([2**40, 4]))
        vars(tensor(made).chunks[0]).update(sizes=torch.Size([2**40, 4]))

    with pytest.raises(ValueError, match=r"is damaged: __0_0.distcp has 0 of"):
        sharded.read_tensors(changed(shards, tmp_path, grow))


def archive(tmp_path, pickled, compression=zipfile.ZIP_STORED):
    """Write what torch.save writes, with another pickle in it."""
    path = tmp_path / "a.ckpt"
    torch.save({"a": torch.ones(2)}, tmp_path / "whole.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "whole.ckpt") as whole,
        zipfile.ZipFile(path, "w", compression) as made,
    ):
        for name in whole.namelist():
            made.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
    return path


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        # The hash of such a key is recursive in C, and would end the process
        (b"}(" + b")" + b"\x85" * 10**6 + b"Nu", "keys that are neither text nor numbers"),
        (b")" + b"\x85" * 10**6, "nested too deeply"),
        (b"]\x94" + b"h\x00a", "contains itself"),
        (b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60)), "expand to too many"),
        (b"c__builtin__\nbytearray\nM\xff\xff\x85R", "allocates any size"),
        (b"ctorch\nTensor\nM\xff\xffM\xff\xff\x86R", "allocates any size"),
        (b"ctorch\nFloatStorage\nM\xff\xff\x85R", "allocates any size"),
        (b"ctorch\nTensor\nN}b\x86b", "not a readable checkpoint"),
    ],
)
def test_archives_that_would_harm_when_unpickled_are_refused(tmp_path, codes, message):
    with pytest.raises(ValueError, match=message):
        open_archive(archive(tmp_path, b"\x80\x02" + codes + b"."))


def test_shards_that_are_packed_are_not_unpacked(shards, tmp_path):
    packed = archive(tmp_path, b"\x80\x02}.", zipfile.ZIP_DEFLATED).read_bytes()
    made = pickle.loads((shards / ".metadata").read_bytes())
    vars(first(made)).update(offset=10**6, length=len(packed))
    shutil.copytree(shards, tmp_path / "c")
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(made))
    with open(tmp_path / "c" / "__0_0.distcp", "r+b") as file:
        file.seek(10**6)
        file.write(packed)
    with pytest.raises(ValueError, match="compressed"):
        sharded.read_tensors(tmp_path / "c")


def test_what_is_read_inert_is_what_was_pickled():
    value = {"a": [1, -1, 2**40, 1.5, None, True, False, "é"], "b": (1, (2, 3, 4, 5)), 3: {}}
    for protocol in (2, 3, 4, 5):
        assert read_inert(pickle.dumps(value, protocol), 0) == value


def checkpoint_of(tmp_path, settings, weights=None, **changes):
    """Write a checkpoint of this package that describes a network."""
    described = {
        "codec": {"class_path": "zsnr.codecs.PixelCodec", "init_args": {}},
        "conditioner": {"class_path": "zsnr.conditioning.NullConditioner", "init_args": {}},
        "network": {"class_path": "zsnr.networks.UNet", "init_args": {"config": settings}},
        "schedule": NoiseSchedule().settings(),
        "prediction_type": "v_prediction",
        "image_size": 64,
        **changes,
    }
    weights = weights or {"trained.unet.unet.conv_in.weight": torch.ones(4)}
    torch.save({KEY: described, "state_dict": weights}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_out_channels": [2**15, 2**15, 2**15, 2**15]}, "describes a network of "),
        ({"cross_attention_dim": 2**30}, "describes a network of "),
        ({"layers_per_block": 10**9}, "wanted 1000 at most"),
        ({"transformer_layers_per_block": [10**9] * 4}, "wanted 1000 at most"),
        ({"a": {"b": {"layers": 10**9}}}, "wanted 1000 at most"),
    ],
)
def test_networks_that_a_checkpoint_cannot_fill_are_not_built(tmp_path, settings, message):
    path = checkpoint_of(tmp_path, settings)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 2**64}, "image_size=18446744073709551616: wanted 1 to 65536"),
        ({"image_size": "64"}, "image_size='64'"),
        ({"prediction_type": ["v"]}, "prediction_type=a list is unknown"),
        ({"schedule": {"num_timesteps": 10**9}}, "wanted an int, 2 to 100000"),
        ({"schedule": [1]}, "wanted settings by name"),
        ({"schedule": {"no": 1}}, "schedule has no 'no'"),
        ({"network": "x" * 10**6}, "described by"),
        ({"network": {"class_path": ["os.system"]}}, "class_path=a list"),
        ({"network": {"class_path": "zsnr.networks.UNet", "init_args": [1]}}, "wanted text"),
    ],
)
def test_wrong_descriptions_are_one_line(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(checkpoint_of(tmp_path, {}, **changes))
    assert len(str(error.value)) < 500


def test_tensors_that_are_larger_than_their_data_are_refused(tmp_path):
    wide = torch.ones(1).expand(2**40)
    path = checkpoint_of(tmp_path, {}, {"trained.unet.a": wide})
    with pytest.raises(ValueError, match="larger than its data"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_timesteps": 10**9},
        {"num_timesteps": "1000"},
        {"num_timesteps": True},
        {"num_timesteps": 1000.0},
        {"num_timesteps": None},
        {"betas": None},
        {"betas": ["linear"]},
        {"betas": {}},
        {"beta_start": "a"},
        {"beta_start": True},
        {"beta_end": float("nan")},
        {"beta_end": [0.1]},
        {"beta_end": 10**400},
        {"zero_terminal_snr": "false"},
        {"zero_terminal_snr": 1},
        {"zero_terminal_snr": None},
        {"alphas_cumprod_table": "0.9"},
        {"alphas_cumprod_table": 3},
        {"alphas_cumprod_table": {"a": 1}},
        {"alphas_cumprod_table": [0.9, None]},
        {"alphas_cumprod_table": [0.9, "0.1"]},
        {"alphas_cumprod_table": [0.9, True]},
        {"alphas_cumprod_table": [[0.9], [0.1]]},
        {"num_timesteps": 2, "alphas_cumprod_table": [0.9, float("nan")]},
        {"alphas_cumprod_table": [10**400, 0.1]},
        {"alphas_cumprod_table": [0.5] * 10**6},
        {"unknown": 1},
        {1: 1},
        [],
        None,
        "linear",
    ],
)
def test_a_schedule_of_wrong_types_is_one_line(settings):
    with pytest.raises(ValueError, match="wanted|Known|not of numbers|Check") as error:
        NoiseSchedule.from_settings(settings)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", ["[" * 10**5, "[1" + "0" * 5000, '{"a": 1, "a": 2}', "nul", ""])
def test_every_reader_of_json_says_what_is_wrong(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "p.jsonl").write_text(text + "\n")
    (tmp_path / "c.json").write_text(text)
    for read in (
        lambda: read_run_facts(tmp_path),
        lambda: read_grid(tmp_path / "c.json"),
        lambda: read_prompts(tmp_path / "p.jsonl"),
        lambda: read_captions(tmp_path / "p.jsonl", 1),
        lambda: read_captions(tmp_path / "c.json", 1),
        lambda: read_config(str(tmp_path), None) or read_json(tmp_path / "c.json"),
    ):
        with pytest.raises(ValueError, match="json"):
            read()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "count": 4294967296}, "count=4294967296: wanted at least 1, at most"),
        ({"prompt": "a", "height": 2**64}, "height=18446744073709551616: wanted at least 1, at"),
        ({"prompt": "a", "width": 0}, "width=0"),
        ({"prompt": "a", "seed": 10**4000}, "seed=a huge number"),
        ({"prompt": [["a"]] * 10**5}, "prompt=a list: wanted text"),
        ({"a" * 10**6: 1}, "is unknown"),
    ],
)
def test_a_prompts_file_asks_for_what_can_be_made(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(tmp_path / "p.jsonl")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["os.open", "zipfile.ZipFile", "torch.load"])
def test_storage_that_fails_says_nothing_of_a_file(tmp_path, monkeypatch, name):
    torch.save({}, tmp_path / "a.ckpt")

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(f"zsnr.untrusted.{name}", fail)
    with pytest.raises(OSError, match="Input/output error"):
        open_archive(tmp_path / "a.ckpt")


def test_files_of_a_tokenizer_that_are_too_large_are_not_read(tmp_path):
    from zsnr.conditioning.tokenizers import transformers_tokenizer

    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ValueError, match=r"tokenizer\.json has 3221225472 bytes: wanted at most"):
        transformers_tokenizer(str(tmp_path), None, None)
