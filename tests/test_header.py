"""safetensors headers: what the format's own library reads, and what breaks its rules."""

import json
import os
import random

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from zsnr.weights.header import MAX_HEADER, read_header, read_tensor

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "f16": torch.arange(5).half().reshape(5, 1),
    "i64": torch.tensor(-7),
    "u8": torch.arange(3, dtype=torch.uint8),
    "flag": torch.tensor([True, False]),
    "v_pred": torch.tensor([]),
    "empty": torch.zeros(3, 0, 2),
    "c": torch.tensor([1 + 2j], dtype=torch.complex64),
    "f8": torch.tensor([1.5, 2.0]).to(torch.float8_e4m3fn),
}


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "modelspec.title": "é"})
    return path


def test_reads_what_the_library_wrote(file):
    header = read_header(file)
    assert header.metadata == {"format": "pt", "modelspec.title": "é"}
    assert header.tensors.keys() == TENSORS.keys()
    with safe_open(file, "pt") as library:
        for name, wanted in TENSORS.items():
            assert header.tensors[name].shape == tuple(wanted.shape)
            assert header.tensors[name].dtype == library.get_slice(name).get_dtype()
            read = read_tensor(file, header, name)
            torch.testing.assert_close(read, wanted, rtol=0, atol=0)


def test_no_tensor_is_no_fault(tmp_path):
    path = tmp_path / "none.safetensors"
    path.write_bytes(raw({}))
    assert read_header(path).tensors == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"1234567", "not a safetensors"),
        (raw({}, length=MAX_HEADER + 1), "at most"),
        (raw({}, length=2**64 - 1), "at most"),
        (raw({}, length=100), "not a safetensors"),
        (raw(b"[]"), "start with a header"),
        (raw(b"{}x"), "readable JSON"),
        (raw(b'{"a'), "readable JSON"),
        (raw(b'{"a": "\xff"}'), "not UTF-8"),
        (raw(b'{"__metadata__":' + b"[" * 100_000), "nested too deeply"),
        (raw(b"{" + b"[" * 1_000_001), "lists and objects"),
        (raw(b'{"a":[0' + b",0" * 2_000_001 + b"]}"), "entries"),
        (raw(b'{"a":{},"a":{}}'), "twice"),
        (raw(b'{"a": NaN}'), "not a JSON number"),
        (raw(b'{"a": 1' + b"0" * 5000 + b"}"), "readable JSON"),
        (raw({"__metadata__": {"a": 1}}), "map of strings"),
        (raw({"__metadata__": []}), "map of strings"),
        (raw({"a": 1}), "not described"),
        (raw({"a": {"dtype": "F32"}}), "not described"),
        (raw({"a": tensor("F31")}, bytes(4)), "unknown dtype"),
        (raw({"a": {**tensor(), "dtype": ["F32"]}}, bytes(4)), "unknown dtype"),
        (raw({"a": tensor(shape=(-1,))}, bytes(4)), "shape"),
        (raw({"a": tensor(shape=(1.0,))}, bytes(4)), "shape"),
        (raw({"a": tensor(shape=(True,))}, bytes(4)), "shape"),
        (raw({"a": {**tensor(), "shape": "1"}}, bytes(4)), "shape"),
        (raw({"a": tensor(shape=(2**62, 4))}, bytes(4)), "takes"),
        (raw({"a": tensor(shape=(2,))}, bytes(4)), "takes 8"),
        (raw({"a": tensor(shape=(2**63 - 1,) * 60)}, bytes(4)), "takes far more"),
        (raw({"a": tensor(offsets=(4, 0))}, bytes(4)), "takes"),
        (raw({"a": tensor(offsets=(0, 4, 8))}, bytes(8)), "data_offsets"),
        (raw({"a": tensor(offsets=(-4, 0))}, bytes(4)), "data_offsets"),
        (raw({"a": tensor("F4", (1,), (0, 1))}, bytes(1)), "takes 0.5"),
        (raw({"a": tensor(), "b": tensor()}, bytes(4)), "overlaps"),
        (raw({"a": tensor(), "b": tensor(offsets=(2, 6))}, bytes(6)), "overlaps"),
        (raw({"a": tensor(), "b": tensor(shape=(0,), offsets=(2, 2))}, bytes(4)), "overlaps"),
        (raw({"a": tensor(), "b": tensor(offsets=(8, 12))}, bytes(12)), "gap"),
        (raw({"a": tensor(offsets=(1, 5))}, bytes(5)), "gap"),
        (raw({"a": tensor()}, bytes(3)), "extends beyond"),
        (raw({"a": tensor()}, bytes(5)), "followed by other bytes"),
    ],
)
def test_refuses_what_the_library_refuses(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_header(path)
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (raw(b"   {}"), "start with a header"),
        (raw({"a": tensor(shape=(1,) * 65)}, bytes(4)), "shape"),
        (
            raw(
                b'{"a":'
                + json.dumps(tensor()).encode()
                + b',"a":'
                + json.dumps(tensor(offsets=(0, 4))).encode()
                + b"}",
                bytes(4),
            ),
            "twice",
        ),
    ],
)
def test_refuses_what_the_format_forbids_or_torch_has_not(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_header(path)


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(ValueError, match=r"not a regular file|cannot be read"):
            read_header(path)


def test_read_tensor_says_what_is_wrong(file):
    header = read_header(file)
    with pytest.raises(ValueError, match="no tensor 'z'"):
        read_tensor(file, header, "z")
    file.write_bytes(file.read_bytes()[:-1])
    last = max(header.tensors, key=lambda name: header.tensors[name].end)
    with pytest.raises(ValueError, match="has changed"):
        read_tensor(file, header, last)


def test_mutated_files_are_read_or_refused(file, tmp_path):
    """What is read is what the library reads too."""
    draw = random.Random(0)
    whole, path = file.read_bytes(), tmp_path / "mutant.safetensors"
    end = 8 + int.from_bytes(whole[:8], "little")
    marks = b'{}[]",:0123456789-.eE\\u\x00\xff'
    outcomes = {True: 0, False: 0}
    for _ in range(4000):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            i = draw.randrange(draw.choice((8, end)))
            match draw.randrange(4):
                case 0:
                    data[i] = draw.randrange(256)
                case 1:
                    data[i] = draw.choice(marks)
                case 2:
                    del data[i : i + draw.randrange(1, 9)]
                case 3:
                    data[i:i] = bytes(draw.choice(marks) for _ in range(draw.randrange(1, 5)))
        path.write_bytes(data)
        try:
            header = read_header(path)
        except ValueError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        with safe_open(path, "pt") as library:
            assert {*library.keys()} == {*header.tensors}
            for name, facts in header.tensors.items():
                assert tuple(library.get_slice(name).get_shape()) == facts.shape
    assert min(outcomes.values()) > 20
