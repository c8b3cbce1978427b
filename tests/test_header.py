"""safetensors headers: what the format's library reads, and what is refused in one line."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from zsnr import NoiseSchedule
from zsnr.weights.header import MAX_TENSORS, read_header, read_schedule

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "i64": torch.tensor(-7),
    "flag": torch.tensor([True, False]),
    "v_pred": torch.tensor([]),
    "f8": torch.tensor([1.5, 2.0]).to(torch.float8_e4m3fn),
}


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "modelspec.title": "é"})
    return path


def test_names_shapes_and_metadata(file):
    header = read_header(file)
    assert header.metadata == {"format": "pt", "modelspec.title": "é"}
    assert header.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert header.dtypes["f8"] == "F8_E4M3"
    assert header.dtypes["b"] == "BF16"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"1234567", "not a readable .safetensors file"),
        (raw({}, length=2**64 - 1), "not a readable .safetensors file"),
        (raw(b"{}x"), "not a readable .safetensors file"),
        (raw(b'{"a": "\xff"}'), "not a readable .safetensors file"),
        (raw({"__metadata__": {"a": 1}}), "not a readable .safetensors file"),
        (
            raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
            "not a readable .safetensors file",
        ),
        (
            raw({f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(9)}),
            f"has 9 tensors: wanted at most {MAX_TENSORS}",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b"PK\x03\x04" + bytes(90), "a zip archive or a pickle of torch"),
        (b"\x80\x02}q\x00." + bytes(90), "a pickle"),
        (b"GGUF\x03" + bytes(90), "a GGUF file"),
        (b"\x1f\x8b\x08" + bytes(90), "compressed"),
        (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file"),
        (b'{"error": "Unauthorized"}', "a JSON text"),
        (b"Access denied: please log in to continue\n", "a text"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, monkeypatch, content, words):
    if "wanted at most" in words:
        monkeypatch.setattr("zsnr.weights.header.MAX_TENSORS", 8)
        words = "has 9 tensors: wanted at most 8"
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(ValueError, match=r"not a regular file|cannot be read"):
            read_header(path)


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        (NoiseSchedule().alphas_cumprod, True),
        (NoiseSchedule().alphas_cumprod.to(torch.bfloat16), False),  # repeats values
        (torch.ones(3, 3), False),
        (torch.arange(5), False),
        (torch.zeros(1), False),
    ],
)
def test_a_stored_schedule(tmp_path, table, wanted):
    path = tmp_path / "m.safetensors"
    save_file({"alphas_cumprod": table}, path)
    found = read_schedule(path, read_header(path))
    assert (found is not None) == wanted


def test_mutated_files_are_read_or_refused(file, tmp_path):
    draw = random.Random(0)
    whole, path = file.read_bytes(), tmp_path / "mutant.safetensors"
    end = 8 + int.from_bytes(whole[:8], "little")
    outcomes = {True: 0, False: 0}
    for _ in range(1000):
        data = bytearray(whole)
        data[draw.randrange(end)] = draw.randrange(256)
        path.write_bytes(data)
        try:
            read_header(path)
        except ValueError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
    assert min(outcomes.values()) > 20
