"""The readers of benchmarks/fuzz.py: how valid inputs of each are made, and how they are read."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from fuzz_inputs import (
    IMAGE_KINDS,
    Draw,
    damaged,
    damaged_bytes,
    damaged_pickle,
    damaged_place,
    damaged_zip,
    image_bytes,
    json_bytes,
    json_lines,
    safetensors_bytes,
    shard,
    write,
    yaml_bytes,
)

from zsnr import NoiseSchedule
from zsnr.checkpoints import read_checkpoint
from zsnr.checkpoints.checkpoint_file import KEY, describe_model
from zsnr.checkpoints.model import Model
from zsnr.checkpoints.run_facts import published, read_run_facts
from zsnr.checkpoints.run_folder import find_last
from zsnr.checkpoints.sharded import check, write_sharded
from zsnr.cli import main
from zsnr.codecs import PixelCodec
from zsnr.conditioning import NullConditioner
from zsnr.data.cache import (
    Cache,
    CacheDataset,
    find_cache,
    image_facts,
    select_cached,
    shard_files,
    write_cache,
)
from zsnr.data.caption_files import read_captions
from zsnr.data.captions import Captions
from zsnr.data.dataset import Pixels, ShardDataset
from zsnr.data.faults import Fault, Ledger, read_ledger, summarize
from zsnr.data.formats import image_size
from zsnr.data.images import decode_image
from zsnr.data.index import load_index
from zsnr.data.prompts import parse_prompts, read_prompts
from zsnr.data.samples import select
from zsnr.data.storage import Retries, Storage
from zsnr.doctor.examine import fix
from zsnr.interop import read_diffusers_folder, read_single_file
from zsnr.interop.card import model_card
from zsnr.interop.declarations import read_declaration
from zsnr.interop.single_file import write_single_file
from zsnr.loss import LossWeighting
from zsnr.metrics.fidelity import RealStatistics
from zsnr.networks import UNet, UNetConfig
from zsnr.pipeline import Sampling, describe_sampling
from zsnr.reports.schedule import find_schedule
from zsnr.timesteps import get_timesteps, read_grid
from zsnr.training.lightning_cli import parse_fit
from zsnr.training.loggers import continue_loggers
from zsnr.training.watchdog import Watchdog
from zsnr.untrusted import printable
from zsnr.weights.ldm_file import PUBLIC

SIDE = 16  # pixels of what samples are decoded to
RETRIES = Retries(attempts=1)


class RefusedError(ValueError):
    """A command refused its input; the text is the message that it printed."""


@dataclass(frozen=True)
class Reader:
    """One way of reading untrusted files.

    Args:
        make: Writes input files to an empty folder; the last argument says whether they must be
            valid.
        read: Reads them.
        share: Relative number of inputs.
        prepare: Prepares the data that `make` starts from, once, before processes are forked.
    """

    make: Callable[[Draw, Path, bool], None]
    read: Callable[[Path], object]
    share: float = 1.0
    prepare: Callable[[], object] = field(default=lambda: None)


def as_printed(text: str) -> str:
    """Return the text of an error or a report as it is printed to a terminal."""
    return printable(text, one_line=True)


def command(*arguments: str) -> None:
    """Run a command of the package; a refusal becomes an error with the line that it printed.

    Raises:
        RefusedError: The exit code is that of a wrong input.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    print(out.getvalue())
    print(err.getvalue())
    if code >= (3 if arguments[0] == "doctor" else 2):
        _, mark, line = err.getvalue().rpartition("zsnr: error: ")
        if not mark:
            line = out.getvalue().partition("\n")[0]
        raise RefusedError(line.removesuffix("\n"))


def doctor(folder: Path) -> None:
    """Run the doctor on the first of a folder's files, in both forms, and print its schedule."""
    target = str(min(folder.iterdir()))
    command("doctor", target, "--open")
    command("doctor", target, "--open", "--json", "--num-steps", "7")
    find_schedule(target, open_pickle=True)


# Files that declare a model's schedule

_CLASSES = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)


def scheduler(draw: Draw) -> dict[str, Any]:
    """Draw a scheduler_config.json that diffusers would write."""
    table = [0.001 * (i + 1) for i in range(9)]
    return {
        "_class_name": draw.choice((*_CLASSES, "UniPCMultistepScheduler", "LCMScheduler")),
        "_diffusers_version": "0.35.0",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": draw.choice(("linear", "scaled_linear", "squaredcos_cap_v2")),
        "num_train_timesteps": draw.choice((100, 1000)),
        "prediction_type": draw.choice(("epsilon", "v_prediction", "sample")),
        "rescale_betas_zero_snr": draw.chance(0.5),
        "timestep_spacing": draw.choice(("leading", "linspace", "trailing")),
        "steps_offset": draw.choice((0, 1)),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "trained_betas": table if draw.chance(0.1) else None,
    }


def make_scheduler(draw: Draw, folder: Path, valid: bool) -> None:
    write(folder, {"scheduler_config.json": json_bytes(draw, scheduler(draw), valid)})
    if not valid and draw.chance(0.03):
        damaged_place(draw, folder / "scheduler_config.json")


def read_scheduler(folder: Path) -> None:
    doctor(folder)
    with contextlib.suppress(ValueError):  # often there is nothing to fix
        fix(folder / "scheduler_config.json")


def make_diffusers(draw: Draw, folder: Path, valid: bool) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", draw.choice(_CLASSES)],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    unet = {"cross_attention_dim": 768, "sample_size": 64, "_class_name": "UNet2DConditionModel"}
    hurt = -1 if valid else draw.randrange(3)
    files = {
        "model/model_index.json": json_bytes(draw, index, hurt != 0),
        "model/unet/config.json": json_bytes(draw, unet, hurt != 1),
        "model/scheduler/scheduler_config.json": json_bytes(draw, scheduler(draw), hurt != 2),
    }
    write(folder, files)
    if not valid and draw.chance(0.05):
        damaged_place(draw, folder / draw.choice(list(files)))


_NAMES = {
    "v1": (
        "model.diffusion_model.input_blocks.0.0.weight",
        "cond_stage_model.transformer.x.weight",
    ),
    "v2": ("model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.model.x.weight"),
    "xl": ("model.diffusion_model.out.2.weight", "conditioner.embedders.1.model.x.weight"),
    "lora": ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",),
    "diffusers lora": ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight",),
}


def make_safetensors(draw: Draw, folder: Path, valid: bool) -> None:
    names = _NAMES[draw.choice(list(_NAMES))]
    tensors: dict[str, tuple[str, Sequence[int], bytes]] = {}
    for name in names:
        shape = draw.choice(((4, 4, 3, 3), (8, 2), (768,)))
        kind, wide = draw.choice((("F32", 4), ("F16", 2), ("BF16", 2), ("F64", 8)))
        tensors[name] = kind, shape, bytes(wide * torch.Size(shape).numel())
    for mark in ("v_pred", "ztsnr"):
        if draw.chance(0.5) or valid:
            tensors[mark] = "F32", [0], b""
    if draw.chance(0.5):
        table = NoiseSchedule(zero_terminal_snr=draw.chance(0.5)).alphas_cumprod.double()
        tensors["alphas_cumprod"] = "F64", [len(table)], table.numpy().tobytes()
    metadata = {
        "modelspec.title": "A model",
        "modelspec.prediction_type": draw.choice(("v", "epsilon")),
        "modelspec.architecture": "stable-diffusion-v1",
        "ss_v_parameterization": draw.choice(("True", "False")),
        "ss_zero_terminal_snr": draw.choice(("True", "False", "")),
        "zsnr": json.dumps(
            {"prediction_type": "v_prediction", "schedule": NoiseSchedule().settings()}
        ),
    }
    if not valid and draw.chance(0.3):
        metadata["zsnr"] = json_bytes(draw, json.loads(metadata["zsnr"]), False).decode(
            "utf-8", "replace"
        )
    if not valid and draw.chance(0.02):
        metadata["modelspec.title"] = "t" * 90_000_000
    path = folder / "model.safetensors"
    path.write_bytes(safetensors_bytes(draw, tensors, metadata, valid))
    if not valid and draw.chance(0.05):
        damaged_place(draw, path)
    if draw.chance(0.3):
        yaml = {
            "model": {
                "params": {"parameterization": "v", "linear_start": 0.00085, "timesteps": 1000}
            }
        }
        (folder / "model.yaml").write_bytes(yaml_bytes(draw, yaml, valid))


def run_facts(draw: Draw) -> dict[str, Any]:
    """Draw a run.json as training writes it."""
    return {
        "format": 1,
        "zsnr_version": "0.1.0",
        "versions": {"torch": "2.6"},
        "global_step": 10,
        "schedule": NoiseSchedule().settings(),
        "prediction_type": draw.choice(("v_prediction", "sample")),
        "loss": asdict(LossWeighting()),
        "sampling": describe_sampling(Sampling()),
        "image_size": 16,
        "offset_noise": 0.0,
        "caption_dropout": 0.1,
        "ema": {"decay": 0.99},
        "start": None,
        "lora": None,
        "batch_size": 4,
        "learning_rate": 1e-4,
        "data": ["/data/train"],
        "metrics": {"val/loss": 0.5},
    }


def make_run(draw: Draw, folder: Path, valid: bool) -> None:
    write(folder, {"checkpoints/run.json": json_bytes(draw, run_facts(draw), valid)})
    if not valid and draw.chance(0.03):
        damaged_place(draw, folder / "checkpoints/run.json")


def read_run(folder: Path) -> None:
    doctor(folder)
    facts = read_run_facts(folder / "checkpoints")
    schedule = {"schedule": find_schedule(str(folder / "checkpoints")).settings()}
    known = {"prediction_type": "v_prediction", "image_size": 16, "dtype": "float32"}
    model_card(
        "name",
        {**published(facts or {}), **schedule, **known, "pipeline": "StableDiffusionPipeline"},
    )


# Configs

_CONFIG = {
    "trainer": {"max_steps": 10, "accelerator": "cpu", "devices": 1, "precision": "32-true"},
    "model": {
        "codec": {"class_path": "PixelCodec", "init_args": {"patch_size": 2}},
        "conditioner": {"class_path": "NullConditioner", "init_args": {"context_dim": 8}},
        "network": {"block_out_channels": [16, 32], "attention": [False, True], "norm_groups": 8},
        "schedule": {"betas": "scaled_linear", "num_timesteps": 1000, "zero_terminal_snr": True},
        "prediction_type": "v_prediction",
        "loss": {"name": "uniform", "gamma": 5.0},
        "caption_dropout": 0.1,
        "learning_rate": {"warmup_steps": 10, "decay": "cosine"},
        "ema": {"decay": 0.99},
        "sampling": {
            "num_steps": 10,
            "spacing": "trailing",
            "sampler": "ddim",
            "guidance": {"scale": 5.0, "rescale": 0.7, "interval": [0.1, 5.0]},
        },
    },
    "data": {
        "train": "shards/train-{000..003}.tar",
        "batch_size": 4,
        "image_size": 16,
        "filters": [{"field": "score", "min": 0.5}],
        "captions": {"fields": {"txt": 1.0, "caption": 0.5}},
        "pixels": {"crop": "random", "flip": True},
        "error_budget": 0.01,
    },
    "checkpoint": {"every_n_train_steps": 10},
    "watchdog": {"minutes": 1.0},
}


def make_config(draw: Draw, folder: Path, valid: bool, *, fit: bool = True) -> None:
    config = json.loads(json.dumps(_CONFIG))
    if fit:
        config["model"]["sampling"]["sampler"] = {"class_path": "zsnr.samplers.DDIM"}
    (folder / "config.yaml").write_bytes(yaml_bytes(draw, config, valid))
    if not valid and draw.chance(0.03):
        damaged_place(draw, folder / "config.yaml")


# Checkpoints of this package

_HARMLESS = (
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "FloatStorage"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")
    ),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
)


@cache
def _bases() -> Path:
    """Return a folder for the originals of valid inputs; it is removed at the end."""
    directory = tempfile.TemporaryDirectory(prefix="fuzz-bases-")
    _DIRECTORIES.append(directory)
    return Path(directory.name)


_DIRECTORIES: list[Any] = []


@cache
def checkpoint() -> dict[str, Any]:
    """Make a small checkpoint as training writes it."""
    torch.manual_seed(0)
    codec, text = PixelCodec(2), NullConditioner(8)
    config = UNetConfig(
        (16,), attention=(True,), layers_per_block=1, attention_head_dim=8, norm_groups=8
    )
    unet = UNet(config, channels=codec.channels, context_dim=8)
    model = Model(codec, text, unet, NoiseSchedule(), "v_prediction", 16)
    return {
        KEY: json.loads(json.dumps(describe_model(model))),
        "state_dict": {f"trained.unet.{name}": x for name, x in unet.state_dict().items()},
        "run": run_facts(Draw("0")),
        "global_step": 10,
        "hyper_parameters": {"lr": 1e-4, "betas": [0.9, 0.99]},
        "optimizer_states": [],
        "progress": {},
    }


@cache
def checkpoint_bytes() -> bytes:
    data = io.BytesIO()
    torch.save(checkpoint(), data)
    return data.getvalue()


def make_checkpoint(draw: Draw, folder: Path, valid: bool, *, name: str = "last.ckpt") -> None:
    path = folder / name
    data = checkpoint_bytes()
    kind = 9 if valid else draw.randrange(7)
    if kind < 3:
        content = dict(checkpoint())
        part = draw.choice((KEY, KEY, KEY, "run", "state_dict", "hyper_parameters"))
        if part != "state_dict":
            content[part] = damaged(draw, content[part])
        elif draw.chance(0.5):
            content[part] = draw.odd()
        else:
            names = list(content[part])
            odd = draw.choice((torch.zeros(1), torch.full((16,), float("nan")), 1, None))
            content[part] = {**content[part], draw.choice(names): odd}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getvalue()
    elif kind < 6:
        data = damaged_zip(draw, data, _HARMLESS)
    elif kind == 6:
        data = damaged_bytes(draw, data)
    path.write_bytes(data)
    if not valid and draw.chance(0.03):
        damaged_place(draw, path)


def make_foreign(draw: Draw, folder: Path, valid: bool) -> None:
    """Write a pickle of another program, or another file with such a name."""
    name = (
        "model.ckpt" if valid else draw.choice(("model.ckpt", "model.pt", "model.bin", "model.pth"))
    )
    if not valid and draw.chance(0.5):
        values = [{"state_dict": {}, "epoch": 1}, [1, 2], {"a": {"b": (1, 2.0, None)}}]
        data = pickle.dumps(draw.choice(values), draw.choice((0, 2, 4)))
        data = damaged_pickle(draw, data, _HARMLESS) if draw.chance(0.7) else data
        (folder / name).write_bytes(data)
        return
    make_checkpoint(draw, folder, valid, name=name)


def read_own(folder: Path) -> None:
    find_last(folder)
    read_checkpoint(folder / "last.ckpt")


@cache
def sharded() -> Path:
    """Write a sharded checkpoint."""
    folder = _bases() / "sharded.ckpt"
    write_sharded(dict(checkpoint()), folder)
    return folder


def make_sharded(draw: Draw, folder: Path, valid: bool) -> None:
    to = folder / "last.ckpt"
    shutil.copytree(sharded(), to)
    if valid:
        return
    names = [".metadata", "meta.pt", "__0_0.distcp"]
    for name in [".metadata"] if draw.chance(0.6) else draw.sample(names, draw.choice((1, 1, 2))):
        path = to / name
        data = path.read_bytes()
        match path.name if draw.chance(0.9) else "":
            case ".metadata":
                path.write_bytes(damaged_pickle(draw, data, _HARMLESS))
            case "meta.pt":
                if draw.chance(0.5):
                    rest = torch.load(io.BytesIO(data), weights_only=True)
                    part = draw.choice(list(rest))
                    torch.save({**rest, part: damaged(draw, rest[part])}, path)
                else:
                    path.write_bytes(damaged_zip(draw, data, _HARMLESS))
            case _:
                path.write_bytes(damaged_bytes(draw, data))
    if draw.chance(0.05):
        damaged_place(draw, to / draw.choice(names))


def read_sharded(folder: Path) -> None:
    path = folder / "last.ckpt"
    check(path)
    command("checkpoint", "consolidate", str(path), "--output", str(folder / "whole.ckpt"))
    read_checkpoint(path)
    doctor(folder)


# Models of other programs


@cache
def diffusers_model() -> Path:
    """Write a small Stable Diffusion 1 folder of diffusers, with random weights."""
    import open_clip
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    bpe = open_clip.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): i for token, i in bpe.encoder.items()}
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.__getitem__)
    text = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act="quick_gelu",
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    folder = _bases() / "diffusers"
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            steps_offset=1,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@cache
def single_file() -> Path:
    """Write the same model as a single file."""
    path = _bases() / "single.safetensors"
    with _small_public():
        write_single_file(read_diffusers_folder(str(diffusers_model())), path)
    return path


def _small_public() -> AbstractContextManager[Any]:
    """Let the small model have the size of a public one."""
    small = {}
    for part, public in PUBLIC["v1"].items():
        config = json.loads((diffusers_model() / part / "config.json").read_text())
        small[part] = {name: config.get(name, value) for name, value in public.items()}
    return patch.dict(PUBLIC, dict.fromkeys(("v1", "v2"), small))


def make_model(draw: Draw, folder: Path, valid: bool) -> None:
    to = folder / "model"
    shutil.copytree(diffusers_model(), to)
    if valid:
        return
    files = [
        "model_index.json",
        *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
    ]
    files += ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"]
    path = to / draw.choice(files)
    path.write_bytes(json_bytes(draw, json.loads(path.read_bytes()), False))
    if draw.chance(0.2):
        damaged_place(draw, draw.choice(sorted(p for p in to.rglob("*") if p.is_file())))


def make_single_file(draw: Draw, folder: Path, valid: bool) -> None:
    data = single_file().read_bytes()
    if not valid and draw.chance(0.9):
        (length,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        if draw.chance(0.3):
            schedule = json.loads(header["__metadata__"]["zsnr.schedule"])
            text = json_bytes(draw, schedule, False).decode("utf-8", "replace")
            header["__metadata__"]["zsnr.schedule"] = text
            head = json.dumps(header).encode()
        else:
            head = json_bytes(draw, header, False)
        data = struct.pack("<Q", len(head)) + head + body
    elif not valid:
        data = damaged_bytes(draw, data)
    (folder / "model.safetensors").write_bytes(data)


def read_one_file(folder: Path) -> None:
    read_declaration(folder / "model.safetensors")
    with _small_public():
        read_single_file(str(folder / "model.safetensors"))


def make_statistics(draw: Draw, folder: Path, valid: bool) -> None:
    metadata = {
        "image_size": "16",
        "source": "x",
        "extractor": "",
        "count": "4",
        "format": "zsnr real statistics 1",
    }
    luma = struct.pack("<4f", 0.1, 0.2, 0.3, 0.4)
    if not valid and draw.chance(0.5):
        hurt = damaged(draw, metadata)
        metadata = {k: str(v) for k, v in hurt.items()} if isinstance(hurt, dict) else {}
    data = safetensors_bytes(draw, {"luma": ("F32", [4], luma)}, metadata, valid)
    (folder / "real.safetensors").write_bytes(data)


# Data


def _items(
    index: Any, dataset_of: Callable[[Any], Any] = ShardDataset, samples: Any = None
) -> None:
    """Read the first samples as training does; faults of indexing count as a refusal."""
    samples = select(index, SIDE) if samples is None else samples
    dataset = dataset_of(samples)
    faults = [*index.faults]
    for position in range(min(len(dataset), 6)):
        faults += dataset[position]["faults"]
    if faults:
        raise RefusedError(summarize(faults))


def _dataset(samples: Any) -> ShardDataset:
    return ShardDataset(samples, retries=RETRIES)


def _storage() -> Storage:
    return Storage(RETRIES)


def make_shards(draw: Draw, folder: Path, valid: bool) -> None:
    name = "train-000.tar"
    if not valid and draw.chance(0.05):
        name = draw.choice(
            ("[0].tar", "{0..9}.tar", "a\nb.tar", "\x1b[31m.tar", "caf\udce9.tar", " .tar")
        )
    (folder / name).write_bytes(shard(draw, valid))
    if draw.chance(0.3):
        (folder / "train-001.tar").write_bytes(shard(draw, True))
    if not valid and draw.chance(0.05):
        damaged_place(draw, folder / name)


def read_shards(folder: Path) -> None:
    command("data", "index", str(folder), "--json", "--attempts", "1")
    _items(load_index(str(folder), _storage(), fields=None, progress=False), _dataset)


_ODD_NAMES = (
    *("UPPER.PNG", "caf\udce9.png", "a\x1b[31mb.png", "a\nb.png", "sub/a.png", ".x.png", "[a].png"),
    *("a.b.png", " .png", "\u202egnp.png", "a" * 250 + ".png"),
)


def make_images(draw: Draw, folder: Path, valid: bool) -> None:
    hurt = -1 if valid else draw.randrange(6)
    suffixes = [draw.choice(tuple(IMAGE_KINDS)) for _ in range(3)]
    names = [f"{i:03d}.{suffix}" for i, suffix in enumerate(suffixes)]
    if not valid and draw.chance(0.3):
        suffixes[0], names[0] = "png", draw.choice(_ODD_NAMES)
    files = {name: image_bytes(draw, suffixes[i], hurt != i) for i, name in enumerate(names)}
    lines = [{"file_name": name, "text": "a cat", "score": i / 2} for i, name in enumerate(names)]
    if valid or draw.chance(0.7):
        text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        files["metadata.jsonl"] = text if hurt != 3 else json_lines(draw, lines, False)
    if not valid and draw.chance(0.5):
        text = b"a cat" if hurt != 4 else damaged_bytes(draw, b"caf\xc3\xa9")
        files |= {f"{name.rpartition('.')[0]}.txt": text for name in names}
    write(folder / "images", files)
    if hurt == 5:
        damaged_place(draw, folder / "images" / draw.choice(list(files)))


def read_images(folder: Path) -> None:
    _items(load_index(str(folder / "images"), _storage(), fields=None, progress=False), _dataset)


def make_image(draw: Draw, folder: Path, valid: bool) -> None:
    suffix = draw.choice(tuple(IMAGE_KINDS))
    (folder / "image").write_bytes(image_bytes(draw, suffix, valid))


def read_image(folder: Path) -> None:
    data = (folder / "image").read_bytes()
    image_size(data)
    decode_image(data, SIDE, SIDE)
    decode_image(data, 8, 24, flip=True, scaled_decoding=False, crop=(0.0, 1.0))


def make_captions(draw: Draw, folder: Path, valid: bool) -> None:
    record = {"caption": "a cat", "alt": ["a", "b"], "text": None, "score": 0.5}
    hurt = -1 if valid else draw.randrange(2)
    write(
        folder,
        {
            "text": b"a c\xc3\xa4t" if hurt else damaged_bytes(draw, b"a c\xc3\xa4t\x1b[31m"),
            "json": json_bytes(draw, record, hurt != 1),
        },
    )


def read_parts(folder: Path) -> None:
    text, record = ((folder / name).read_bytes() for name in ("text", "json"))
    for captions in (
        Captions(),
        Captions({"alt": 1.0, "txt": 2.0}),
        Captions({"caption": 1.0}, "drop"),
    ):
        captions.is_certain(text, record)
        captions.choose(text, record, 1)
    captions = Captions()
    captions.choose(None, record, 1)


def make_index_file(draw: Draw, folder: Path, valid: bool) -> None:
    tar = folder / "train-000.tar"
    tar.write_bytes(shard(draw, True))
    os.utime(tar, (1, 1))  # an index stores its shard's modification time
    load_index(str(folder), _storage(), fields=None, progress=False)
    if not valid:
        damage_index(draw, folder / "train-000.tar.index")


def damage_index(draw: Draw, path: Path) -> None:
    """Change the table of an index, its description, or its bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"zsnr"])
    options: dict[str, Any] = {}
    name = draw.choice(table.column_names)
    at = table.column_names.index(name)
    numbers = (-1, -(2**40), 0, 10**6, 2**31 - 1, 2**40, 2**62)
    text = draw.text().replace("\ud800", "?")
    match draw.randrange(11):
        case 0 | 1:
            changed = [draw.choice((*numbers, None)) for _ in range(len(table))]
            table = table.set_column(at, name, pa.array(changed, pa.int64()))
        case 2:
            kinds = [
                pa.string(),
                pa.float64(),
                pa.bool_(),
                pa.list_(pa.int8()),
                pa.null(),
                pa.binary(),
            ]
            table = table.set_column(at, name, pa.nulls(len(table), draw.choice(kinds)))
        case 3:
            table = table.drop_columns([name])
        case 4:
            table = table.append_column(
                draw.choice((name, "shard", "json.key", text)), table.column(at)
            )
        case 5:
            about = damaged(draw, about)
        case 6:
            table = table.slice(0, draw.randrange(len(table)))
        case 7 if draw.chance(0.4):  # small here, gigabytes when read
            row = pa.repeat(pa.scalar(0, pa.int32()), 30_000)
            keys = pa.DictionaryArray.from_arrays(row, pa.array(["k" * 100_000]))
            table = pa.concat_tables([table.slice(0, 1)] * 30_000).set_column(0, "key", keys)
            options["store_schema"] = False
        case 8:
            table = pa.concat_tables([table] * draw.choice((2, 5000)))
        case 9:
            table = table.set_column(0, "key", pa.array([text] * len(table)))
        case _:
            path.write_bytes(damaged_bytes(draw, path.read_bytes()))
            return
    with contextlib.suppress(pa.ArrowException):  # Parquet cannot store some tables
        pq.write_table(table.replace_schema_metadata({"zsnr": json.dumps(about)}), path, **options)
    if draw.chance(0.05):
        damaged_place(draw, path)


def read_index_file(folder: Path) -> None:
    _items(load_index(str(folder), _storage(), fields=None, progress=False), _dataset)


@cache
def cached() -> Path:
    """Write a cache of a small shard."""
    source, folder = _bases() / "source", _bases() / "cache"
    source.mkdir()
    (source / "a.tar").write_bytes(shard(Draw("1"), True, 4))
    codec, text = PixelCodec(2), NullConditioner(8)
    index = load_index(str(source), _storage(), fields=None, progress=False)
    samples = select(index, SIDE)
    facts = Cache(
        folder=folder,
        codec=codec.fingerprint(),
        conditioner=text.fingerprint(),
        captions=asdict(Captions()),
        images=image_facts(SIDE, None, Pixels()),
        filters=[],
        samples=samples.digest,
        dtype="float16",
        shards=shard_files(samples.shards),
    )
    write_cache(
        folder,
        samples,
        codec,
        text,
        index,
        cache=facts,
        pixels=Pixels(),
        captions=Captions(),
        retries=RETRIES,
        progress=False,
    )
    return folder


def make_cache(draw: Draw, folder: Path, valid: bool) -> None:
    to = folder / "cache"
    shutil.copytree(cached(), to)
    if valid:
        return
    name = draw.choice(("cache.json", "cache.json", *sorted(path.name for path in to.iterdir())))
    path = to / name
    data = path.read_bytes()
    if name == "cache.json":
        path.write_bytes(json_bytes(draw, json.loads(data), False))
    elif name.endswith(".index"):
        damage_index(draw, path)
    else:
        path.write_bytes(damaged_bytes(draw, data))
    if draw.chance(0.05):
        damaged_place(draw, path)


def read_cache(folder: Path) -> None:
    loaded = find_cache(str(folder / "cache"))
    if loaded is None:
        raise RefusedError("no cache")
    loaded.null()
    index = load_index(str(folder / "cache"), _storage(), fields=None, progress=False)
    samples = select_cached(loaded, index, ())
    _items(index, lambda chosen: CacheDataset(chosen, retries=RETRIES), samples)


def make_ledger(draw: Draw, folder: Path, valid: bool) -> None:
    faults = [asdict(Fault("sample", "a.tar", f"{i}", "broken", i)) for i in range(4)]
    faults.append(asdict(Fault("passing", "a.tar", None, "stalled", 9)))
    (folder / "faults.jsonl").write_bytes(json_lines(draw, faults, valid))
    if not valid and draw.chance(0.05):
        damaged_place(draw, folder / "faults.jsonl")


def read_faults(folder: Path) -> None:
    path = folder / "faults.jsonl"
    print(as_printed(summarize(read_ledger(path))))
    Ledger(path, 5).write([Fault("sample", "a.tar", "x", "broken", 7)])


# Texts of a few lines


def make_prompts(draw: Draw, folder: Path, valid: bool) -> None:
    record = {"prompt": "a cat", "negative_prompt": "", "seed": 1, "count": 2, "height": 16}
    records = [record, {"prompt": "a dog", "group": "dark", "brightness_rank": 1}]
    if draw.chance(0.2):
        text = b"a cat\n\nred fox\n"
        (folder / "prompts.txt").write_bytes(text if valid else damaged_bytes(draw, text * 3))
    else:
        (folder / "prompts.jsonl").write_bytes(json_lines(draw, records, valid))
    if not valid and draw.chance(0.05):
        damaged_place(draw, next(folder.iterdir()))


def read_prompt_file(folder: Path) -> None:
    repr(read_prompts(next(folder.iterdir())))


def make_prompt_list(draw: Draw, folder: Path, valid: bool) -> None:
    records = [{"prompt": "a cat", "seed": 1, "count": 2}, {"prompt": "", "width": 64}]
    (folder / "prompts.json").write_bytes(json_bytes(draw, records, valid))


def read_prompt_list(folder: Path) -> None:
    data = (folder / "prompts.json").read_bytes()
    try:
        records = json.loads(data)
    except (ValueError, RecursionError) as error:  # the YAML reader would have refused it
        raise RefusedError("no JSON") from error
    parse_prompts(records if isinstance(records, list) else [records])


def make_caption_file(draw: Draw, folder: Path, valid: bool) -> None:
    lines = [{"caption": "a cat", "group": "dark"}, {"prompt": "a dog"}]
    coco = {"annotations": [{"image_id": i, "id": i, "caption": f"a cat {i}"} for i in range(3)]}
    match draw.randrange(3):
        case 0:
            (folder / "captions.json").write_bytes(json_bytes(draw, coco, valid))
        case 1:
            (folder / "captions.jsonl").write_bytes(json_lines(draw, lines, valid))
        case _:
            text = b"a cat\nred fox\n"
            (folder / "captions.txt").write_bytes(text if valid else damaged_bytes(draw, text))
    if not valid and draw.chance(0.05):
        damaged_place(draw, next(folder.iterdir()))


def read_caption_file(folder: Path) -> None:
    read_captions(next(folder.iterdir()), 2)


def make_grid(draw: Draw, folder: Path, valid: bool) -> None:
    facts = {
        "timesteps": [999, 700, 400, 100],
        "schedule": NoiseSchedule().settings(),
        "sampler": "ddim",
        "loss": {"brightness": 0.1},
    }
    (folder / "grid.json").write_bytes(json_bytes(draw, facts, valid))
    if not valid and draw.chance(0.05):
        damaged_place(draw, folder / "grid.json")


def read_grid_file(folder: Path) -> None:
    read_grid(folder / "grid.json")
    get_timesteps(str(folder / "grid.json"), 4, 1000, schedule=NoiseSchedule())


# Files that a run writes


def make_metrics(draw: Draw, folder: Path, valid: bool) -> None:
    path = folder / "metrics" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    rows = [["step", "train/loss", "val/loss"], [0, 1.0, ""], [9, 0.5, ""], [10, "", 0.4]]
    if not valid:
        rows = damaged(draw, rows)
    text = io.StringIO()
    for row in rows if isinstance(rows, list) else [rows]:
        csv.writer(text).writerow(row if isinstance(row, list) else [row])
    data = text.getvalue().encode("utf-8", "surrogatepass")
    if not valid and draw.chance(0.3):
        data = damaged_bytes(
            draw, data + b'"' * draw.choice((0, 1)) + b"x" * draw.choice((0, 200_000))
        )
    path.write_bytes(data)
    if not valid and draw.chance(0.1):
        (folder / "metrics" / draw.choice(("version_9", "version_" + "9" * 30))).touch()
    if not valid and draw.chance(0.05):
        damaged_place(draw, path)


def read_metrics(folder: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    from zsnr.reports.run import read_losses

    read_losses(folder / "metrics")
    continue_loggers([CSVLogger(folder, name="metrics")], 10)


def make_samples(draw: Draw, folder: Path, valid: bool) -> None:
    entry = {
        "sampler": "ddim",
        "num_steps": 10,
        "spacing": "trailing",
        "guidance_scale": 5.0,
        "guidance_rescale": 0.7,
    }
    entries = [{"file": f"{i}.png", "prompt": "a cat", "seed": i, **entry} for i in range(3)]
    hurt = 9 if valid else draw.randrange(5)
    files = {f"samples/{i}.png": image_bytes(draw, "png", hurt != i) for i in range(3)}
    files["samples/manifest.jsonl"] = json_lines(draw, entries, hurt < 3 or valid)
    write(folder, files)
    if not valid and draw.chance(0.05):
        damaged_place(draw, folder / draw.choice(list(files)))


def read_manifest(folder: Path) -> None:
    from zsnr.reports.run import read_samples

    read_samples(folder / "samples")


def make_heartbeats(draw: Draw, folder: Path, valid: bool) -> None:
    state = {
        "rank": 1,
        "host": "node",
        "pid": 7,
        "step": 3,
        "doing": "trains",
        "since": 1e9,
        "written": 1e9,
    }
    write(
        folder,
        {
            f"heartbeats/rank-{i:05d}.json": json_bytes(draw, {**state, "rank": i}, valid)
            for i in range(3)
        },
    )
    if not valid and draw.chance(0.1):
        (
            folder / "heartbeats" / draw.choice(("rank-x.json", "rank-.json", "rank-00009.json"))
        ).touch()
    if not valid and draw.chance(0.05):
        damaged_place(draw, folder / "heartbeats/rank-00001.json")


def read_heartbeats(folder: Path) -> None:
    dog = Watchdog(1000.0)
    trainer: Any = SimpleNamespace(
        default_root_dir=folder, global_rank=0, world_size=3, global_step=4
    )
    dog.setup(trainer, None, "fit")
    dog.teardown(trainer, None, "fit")
    state = {"rank": 0, "host": "node", "pid": 7, "step": 3, "doing": "trains", "waited": 1.0}
    for line in dog.report(state, [None] * 3).splitlines():
        print(as_printed(line))


READERS: Mapping[str, Reader] = {
    "doctor scheduler": Reader(make_scheduler, read_scheduler, 6),
    "doctor diffusers": Reader(make_diffusers, doctor, 5),
    "doctor safetensors": Reader(make_safetensors, doctor, 6),
    "doctor run": Reader(make_run, read_run, 5),
    "doctor yaml": Reader(partial(make_config, fit=False), doctor, 5),
    "doctor checkpoint": Reader(make_foreign, doctor, 5, checkpoint_bytes),
    "checkpoint": Reader(make_checkpoint, read_own, 5, checkpoint_bytes),
    "sharded checkpoint": Reader(make_sharded, read_sharded, 5, sharded),
    "diffusers model": Reader(
        make_model, lambda f: read_diffusers_folder(str(f / "model")), 0.7, diffusers_model
    ),
    "single file": Reader(make_single_file, read_one_file, 1, single_file),
    "statistics": Reader(make_statistics, lambda f: RealStatistics.read(f / "real.safetensors"), 1),
    "tar shard": Reader(make_shards, read_shards, 9),
    "image folder": Reader(make_images, read_images, 5),
    "image": Reader(make_image, read_image, 12),
    "caption parts": Reader(make_captions, read_parts, 3),
    "index file": Reader(make_index_file, read_index_file, 4),
    "cache": Reader(make_cache, read_cache, 4, cached),
    "ledger": Reader(make_ledger, read_faults, 2),
    "prompts file": Reader(make_prompts, read_prompt_file, 3),
    "prompts list": Reader(make_prompt_list, read_prompt_list, 2),
    "captions file": Reader(make_caption_file, read_caption_file, 3),
    "grid file": Reader(make_grid, read_grid_file, 3),
    "fit config": Reader(make_config, lambda f: parse_fit(["-c", str(f / "config.yaml")]), 1),
    "metrics": Reader(make_metrics, read_metrics, 2),
    "samples": Reader(make_samples, read_manifest, 2),
    "heartbeats": Reader(make_heartbeats, read_heartbeats, 2),
}
