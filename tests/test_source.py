"""Where a model's files are found: variants, revisions, the hub's cache; and what is in them."""

import json
import shutil
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import tiny_stable_diffusion

from zsnr.cli import main
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import TransformersConditioner
from zsnr.interop.models import choose_dtype, with_vae
from zsnr.networks import UNet
from zsnr.pipeline import TextToImage
from zsnr.weights import source as sources
from zsnr.weights.pretrained import as_dtype, load_whole, stored_dtype
from zsnr.weights.source import at_revision, find_variant, find_weights, local_path, prefer_variant

SHA = "0" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "model"
    tiny_stable_diffusion(folder)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def weights_of(folder):
    return list(folder.rglob("*.safetensors"))


def as_variant(folder, variant, dtype=None):
    """Give all weights of a folder the name of a variant."""
    for path in weights_of(folder):
        tensors = load_file(path)
        if dtype is not None:
            tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(tensors, path.with_name(f"{path.stem}.{variant}.safetensors"), {"format": "pt"})
        path.unlink()


def in_shards(folder, variant=""):
    """Split the UNet's weights into two files with an index."""
    path = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    halves = [names[::2], names[1::2]]
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    weight_map = {}
    for i, half in enumerate(halves, start=1):
        name = f"{stem}-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in half}, folder / "unet" / name, {"format": "pt"})
        weight_map |= dict.fromkeys(half, name)
    middle = f".{variant}" if variant else ""
    index = folder / "unet" / f"diffusion_pytorch_model.safetensors.index{middle}.json"
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def images(source, **options):
    pipe = TextToImage.from_pretrained(source, device="cpu", **options)
    return [np.asarray(image).tolist() for image in pipe(["a cat"], num_steps=2, progress=False)]


@pytest.mark.parametrize(
    "layout", ["variant", "dash", "shards", "variant in shards", "dash in shards"]
)
def test_folders_with_a_variant_or_shards_alone(folder, copy, layout):
    variant = "fp16-v2" if "dash" in layout else "fp16" if "variant" in layout else None
    if variant is not None:
        as_variant(copy, variant)
    if "shards" in layout:
        in_shards(copy, variant or "")
    assert find_variant(str(copy), "unet") == variant
    assert len(find_weights(str(copy), "unet", "diffusion_pytorch_model")) == (
        2 if "shards" in layout else 1
    )
    assert images(str(copy)) == images(str(folder))


def test_a_variant_is_preferred_if_it_is_named(copy):
    for path in weights_of(copy):
        tensors = {name: torch.zeros_like(t).half() for name, t in load_file(path).items()}
        save_file(tensors, path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})
    plain = TextToImage.from_pretrained(str(copy), device="cpu")
    assert plain.model.network.unet.conv_in.weight.any()
    zeros = TextToImage.from_pretrained(str(copy), device="cpu", variant="fp16")
    assert not any(p.any() for p in zeros.model.network.parameters())
    assert not any(p.any() for p in zeros.model.conditioner.encoder.parameters())
    with prefer_variant("fp16"):
        assert stored_dtype(str(copy), "unet") == torch.float16
    assert stored_dtype(str(copy), "unet") == torch.float32


def test_a_variant_that_is_not_there_is_refused(folder):
    with pytest.raises(ValueError, match="no weights of the variant 'int8'"):
        TextToImage.from_pretrained(folder, variant="int8", device="cpu")
    with pytest.raises(ValueError, match="device='nope' is not a device"):
        TextToImage.from_pretrained(folder, device="nope")


def in_cache(monkeypatch, tmp_path, folder, repo="somebody/model"):
    """Put a folder into a cache of the hub, under a commit that "main" names."""
    home = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(SHA)
    shutil.copytree(folder, home / "snapshots" / SHA)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return home / "snapshots" / SHA


def test_a_cached_model_needs_no_network(monkeypatch, tmp_path, folder):
    snapshot = in_cache(monkeypatch, tmp_path, folder)

    def unreachable(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", unreachable)
    assert local_path("somebody/model") == snapshot
    for name in ("somebody/model", "somebody/model@main", f"somebody/model@{SHA}"):
        assert images(name) == images(str(folder))
    assert images("somebody/model", revision="main") == images(str(folder))
    TransformersConditioner(
        "somebody/model", subfolder="text_encoder", tokenizer_subfolder="tokenizer"
    ).load()


def test_what_is_not_cached_is_downloaded_once(monkeypatch, tmp_path, folder):
    """Settings, and one set of the weights of the part that is read; nothing else."""
    sources._attempt.cache_clear()
    extra = ["README.md", "unet/diffusion_pytorch_model.bin", "evil.py", "unet/x.fp16.onnx"]
    files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    files += [f.replace(".safetensors", ".fp16.safetensors") for f in files if "tensors" in f]
    asked = []

    def model_info(self, repo_id, revision=None, files_metadata=False):
        asked.append((repo_id, revision))
        siblings = [SimpleNamespace(rfilename=name, size=9) for name in [*files, *extra]]
        return SimpleNamespace(sha=SHA, siblings=siblings)

    def download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError
        asked.append(sorted(allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    UNet(pretrained="me/model@v2", subfolder="unet")
    config = "unet/config.json"
    assert asked == [("me/model", "v2"), [config, "unet/diffusion_pytorch_model.safetensors"]]
    UNet(pretrained="me/model@v2", subfolder="unet")
    assert len(asked) == 2
    with prefer_variant("fp16"):
        local_path("me/model@v2", "unet")
    assert asked[-1] == [config, "unet/diffusion_pytorch_model.fp16.safetensors"]
    local_path("me/model")
    assert asked[-1] == ["model_index.json"]
    sources._attempt.cache_clear()


def test_without_network_the_error_is_one_line(monkeypatch, tmp_path):
    sources._attempt.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def model_info(*args, **kwargs):
        raise OSError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(ValueError, match="not in the local cache, and cannot be downloaded") as e:
        TextToImage.from_pretrained("somebody/nothing")
    assert "\n" not in str(e.value)
    sources._attempt.cache_clear()


def test_a_home_folder_is_expanded_everywhere(monkeypatch, folder, tmp_path):
    monkeypatch.setenv("HOME", str(folder.parent))
    name = f"~/{folder.name}"
    UNet(pretrained=name)
    AutoencoderKLCodec(name, subfolder="vae").load()
    TransformersConditioner(name, subfolder="text_encoder", tokenizer_subfolder="tokenizer").load()
    assert images(name) == images(str(folder))


def test_a_revision_of_a_path_is_refused(folder, capsys):
    with pytest.raises(ValueError, match="revision='main' belongs to a hub id"):
        TextToImage.from_pretrained(folder, revision="main")
    assert main(["sample", str(folder), "a cat", "--revision", "main"]) == 2
    assert "revision='main' belongs to a hub id" in capsys.readouterr().err
    assert at_revision("me/model@main", "fp16") == "me/model@fp16"


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_code_of_others_is_neither_run_nor_asked_for(copy, part, tmp_path):
    ran = tmp_path / "ran"
    (copy / part / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    name = "config.json" if part == "text_encoder" else "tokenizer_config.json"
    config = json.loads((copy / part / name).read_text())
    config |= {
        "auto_map": {
            "AutoConfig": "evil.Evil",
            "AutoModel": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        }
    }
    if part == "text_encoder":
        config["model_type"] = "evil"
    else:
        config["tokenizer_class"] = "EvilTokenizer"
    (copy / part / name).write_text(json.dumps(config))
    code = (
        "import sys; from zsnr.conditioning import TransformersConditioner\n"
        "try:\n    TransformersConditioner(sys.argv[1], subfolder='text_encoder', "
        "tokenizer_subfolder='tokenizer').load()\n"
        "except ValueError as error: print(str(error).splitlines()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(copy)], input="yes\n" * 9, capture_output=True, text=True
    )
    assert not ran.exists()
    assert done.returncode == 0, done.stderr
    if part == "text_encoder":
        assert "Cannot load" in done.stdout


def test_a_missing_tokenizer_is_named(copy):
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(ValueError, match="has no folder 'tokenizer': wanted a tokenizer there"):
        TextToImage.from_pretrained(copy)


def test_inpainting_models_are_named(copy):
    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    first = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = first.repeat(1, 3, 1, 1)[:, :9].contiguous()
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(ValueError, match="9 input channels, as in models for inpainting"):
        TextToImage.from_pretrained(copy)


# What is in the files


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_unknown_tensors_and_broken_weights_are_refused(copy, part):
    path = next((copy / part).glob("*.safetensors"))
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, "layer.scale_weight": torch.ones(1)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="would be left out"):
        TextToImage.from_pretrained(copy, device="cpu")
    broken = {**tensors, name: torch.full_like(tensors[name], float("nan"))}
    save_file(broken, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"are not finite: the file is broken"):
        TextToImage.from_pretrained(copy, device="cpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)),
        *((torch.float32, torch.float32), ("torch.float16", torch.float16)),
    ],
)
def test_names_of_data_types(name, dtype):
    assert as_dtype(name) == dtype
    for wrong in ("int8", "float64", "", torch.int64):
        with pytest.raises(ValueError, match="Known: float32, float16, bfloat16"):
            as_dtype(wrong)


def dtypes(model):
    return {
        "unet": model.network.unet.dtype,
        "vae": model.codec.vae.dtype,
        "text": next(model.conditioner.encoder.parameters()).dtype,
    }


def test_all_parts_have_one_data_type(folder, copy):
    as_variant(copy, "fp16", torch.float16)
    for source in (folder, copy):
        pipe = TextToImage.from_pretrained(source, device="cpu")
        assert set(dtypes(pipe.model).values()) == {torch.float32}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe = TextToImage.from_pretrained(source, device="cpu", dtype="bf16")
        assert set(dtypes(pipe.model).values()) == {torch.bfloat16}
        assert pipe(["a cat"], num_steps=2, progress=False)[0].size == (16, 16)
    pipe = TextToImage.from_pretrained(folder, device="cpu", dtype="bf16", vae_dtype="float32")
    assert dtypes(pipe.model)["vae"] == torch.float32
    cuda = torch.device("cuda")
    assert choose_dtype("auto", str(copy), cuda) == torch.float16
    assert choose_dtype("auto", str(folder), cuda) == torch.float32
    assert choose_dtype("auto", str(copy), torch.device("cpu")) == torch.float32


def test_half_precision_is_read_as_it_is(copy, monkeypatch):
    """Nothing is read in float32 first, which would take twice the memory."""
    as_variant(copy, "fp16", torch.float16)
    config = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    seen = []
    whole = load_whole

    def watching(*args, **kwargs):
        model = whole(*args, **kwargs)
        seen.append({p.dtype for p in model.parameters()})
        return model

    for module in ("networks.unet", "codecs.autoencoder_kl", "conditioning.transformers_text"):
        monkeypatch.setattr(f"zsnr.{module}.load_whole", watching)
    TextToImage.from_pretrained(copy, device="cpu", dtype="float16")
    assert seen == [{torch.float16}] * 3


@pytest.mark.parametrize(("said", "wanted"), [(None, "float16"), (False, "float16"), (True, None)])
def test_a_vae_in_float16(copy, said, wanted):
    path = copy / "vae" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "force_upcast"}
    path.write_text(json.dumps({**config, **({} if said is None else {"force_upcast": said})}))
    if wanted is None:
        codec = AutoencoderKLCodec(str(copy), subfolder="vae", dtype="float16")
        assert codec.load().vae.dtype == torch.float32
        pipe = TextToImage.from_pretrained(copy, device="cpu", dtype="float16")
        assert dtypes(pipe.model)["vae"] == torch.float32
    else:
        codec = AutoencoderKLCodec(str(copy), subfolder="vae", dtype="float16")
        assert codec.load().vae.dtype == torch.float16


def test_another_vae(folder, copy):
    pipe = TextToImage.from_pretrained(folder, device="cpu")
    for source in (str(copy), str(copy / "vae")):
        other = with_vae(pipe.model, source)
        assert other.codec.scale == pipe.model.codec.scale
        other.codec.load()
    assert images(str(folder), vae=str(copy)) == images(str(folder))
    with pytest.raises(ValueError, match="holds no config.json"):
        with_vae(pipe.model, str(copy / "tokenizer"))
    assert with_vae(pipe.model, None) is pipe.model
    tiled = TextToImage.from_pretrained(folder, device="cpu", vae_tiling=True).model.codec
    assert tiled.settings() == {**pipe.model.codec.settings(), "tiling": True}
    with pytest.raises(ValueError, match="vae_tiling=True: the model's codec is a PixelCodec"):
        with_vae(tiny.model(), None, tiling=True)


def test_offload_keeps_one_part_on_the_device(folder, monkeypatch):
    pipe = TextToImage.from_pretrained(folder, device="cpu", offload=True)
    moves = []
    for name in ("network", "codec", "conditioner"):
        part = getattr(pipe.model, name)

        def to(device, name=name):
            moves.append((name, str(device)))

        monkeypatch.setattr(part, "to", to)
    [image] = pipe(["a cat"], num_steps=2, progress=False)
    assert moves == [(n, "cpu") for n in ("conditioner", "network", "codec") for _ in range(2)]
    assert [np.asarray(image).tolist()] == images(str(folder))


def test_images_are_decoded_one_at_a_time(folder, monkeypatch):
    pipe = TextToImage.from_pretrained(folder, device="cpu")
    rows = []
    decode = pipe.model.codec.decode

    def watching(latents):
        rows.append(len(latents))
        return decode(latents)

    monkeypatch.setattr(pipe.model.codec, "decode", watching)
    pipe(["a"] * 3, num_steps=2, progress=False)
    assert rows == [1, 1, 1]


def downloads(monkeypatch, tmp_path, folder, repo="me/model"):
    """Let the hub have a folder, of which nothing is in the cache; returns the files it gave."""
    sources._attempt.cache_clear()
    cache, given = tmp_path / "hub", []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    home = cache / f"models--{repo.replace('/', '--')}"
    files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]

    def model_info(self, repo_id, revision=None, files_metadata=False):
        siblings = [SimpleNamespace(rfilename=name, size=9) for name in files]
        return SimpleNamespace(sha=SHA, siblings=siblings)

    def download(repo_id, revision=None, allow_patterns=None, local_files_only=False):
        snapshot = home / "snapshots" / SHA
        if local_files_only and not snapshot.exists():
            raise FileNotFoundError
        for name in allow_patterns or ():
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, snapshot / name)
            given.append(name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return given


def test_a_first_download_has_the_data_type_of_the_file(monkeypatch, tmp_path, copy):
    as_variant(copy, "fp16", torch.float16)
    downloads(monkeypatch, tmp_path, copy)
    assert choose_dtype("auto", "me/model", torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_another_vae_is_downloaded_from_either_place(monkeypatch, tmp_path, folder, subfolder):
    given = downloads(monkeypatch, tmp_path, folder if subfolder else folder / "vae")
    pipe = TextToImage.from_pretrained(folder, device="cpu", vae="me/model")
    assert pipe.model.codec.settings()["subfolder"] == (subfolder or None)
    weights = [name for name in given if name.endswith(".safetensors")]
    assert {name.rpartition("/")[0] for name in weights} == {subfolder}


@pytest.mark.parametrize("fault", ["none", "pickle", "shard"])
def test_missing_weights_are_named(copy, fault, capfd):
    path = next((copy / "unet").glob("*.safetensors"))
    if fault == "shard":
        in_shards(copy)
        next((copy / "unet").glob("*-00002-of*")).unlink()
    else:
        path.unlink()
        if fault == "pickle":
            path.with_suffix(".bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"\(subfolder unet\) holds no complete weights of a UNet"):
        TextToImage.from_pretrained(copy, device="cpu")
    assert "An error occurred" not in capfd.readouterr().err


def test_an_overflow_of_float16_is_not_called_a_broken_file(copy):
    path = next((copy / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["conv_in.bias"][0] = 1e6
    save_file(tensors, path, {"format": "pt"})
    TextToImage.from_pretrained(copy, device="cpu")
    with pytest.raises(ValueError, match=r"not finite in float16 \(conv_in.bias\): use bfloat16"):
        TextToImage.from_pretrained(copy, device="cpu", dtype="float16")


def test_a_cached_model_is_exported_without_network(monkeypatch, tmp_path, folder):
    from zsnr.interop.export import export_diffusers, read_exportable

    in_cache(monkeypatch, tmp_path, folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, _ = read_exportable("somebody/model@main")
    export_diffusers(model, tmp_path / "exported")
    assert images(str(tmp_path / "exported")) == images(str(folder))
