"""Small models and data that tests make for themselves."""

import io
import tarfile

import torch
from PIL import Image

from zsnr import NoiseSchedule
from zsnr.checkpoints import Model
from zsnr.codecs import PixelCodec
from zsnr.conditioning import TransformersConditioner
from zsnr.networks import UNet, UNetConfig

TEXT = {
    "model_type": "clip_text_model",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
UNET = UNetConfig(
    block_out_channels=(16, 32),
    attention=(False, True),
    layers_per_block=1,
    attention_head_dim=16,
    norm_groups=8,
)

MODEL = {  # as a YAML says it
    "codec": {"class_path": "PixelCodec", "init_args": {"patch_size": 2}},
    "conditioner": {
        "class_path": "TransformersConditioner",
        "init_args": {
            "tokenizer": "open_clip",
            "max_length": 8,
            "trainable": True,
            "config": TEXT,
        },
    },
    "unet": {
        "block_out_channels": [16, 32],
        "attention": [False, True],
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "norm_groups": 8,
    },
}


def conditioner(**options):
    return TransformersConditioner(config=TEXT, tokenizer="open_clip", max_length=8, **options)


def frozen_conditioner(folder):
    """A conditioner whose weights are on disk, as a frozen one must have."""
    torch.manual_seed(1)
    conditioner().encoder.save_pretrained(folder)
    return TransformersConditioner(str(folder), tokenizer="open_clip", max_length=8)


def model(schedule=None, **options):
    torch.manual_seed(0)
    codec = PixelCodec(2)
    text = conditioner()
    return Model(
        codec=codec,
        conditioner=text,
        unet=UNet(UNET, channels=codec.channels, context_dim=text.context_dim).eval(),
        schedule=schedule or NoiseSchedule(),
        **{"prediction_type": "v_prediction", "image_size": 16, **options},
    )


def png(colour, size=(20, 24), mode="RGB"):
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, "PNG")
    return data.getvalue()


def write_shard(path, samples):
    """Write {name: bytes} members, in order."""
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder, counts, split="train"):
    """Write shards of so many pictures each; picture i is grey level i."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        members = {}
        for _ in range(count):
            members[f"{number:05d}.png"] = png((number, number, number))
            members[f"{number:05d}.txt"] = f"grey {number}".encode()
            number += 1
        write_shard(folder / f"{split}-{shard:06d}.tar", members)
    return folder
