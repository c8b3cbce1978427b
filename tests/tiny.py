"""Small models and data that tests make for themselves."""

import io
import json
import tarfile
from dataclasses import replace

import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from zsnr import NoiseSchedule
from zsnr.checkpoints import Model
from zsnr.codecs import PixelCodec
from zsnr.conditioning import TransformersConditioner
from zsnr.networks import UNet, UNetConfig
from zsnr.weights.ldm_file import PUBLIC

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
# The time of a sharded step and of its checkpoint depends on the number of tensors: here half.
SMALLER_UNET = replace(UNET, block_out_channels=(16,), attention=(False,), pooled_context=True)

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
    "network": {
        "block_out_channels": [16, 32],
        "attention": [False, True],
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "norm_groups": 8,
    },
}


class Own(nn.Module):
    """A network of somebody who does not know this package."""

    def __init__(self, channels=12, width=8, depth=2):
        super().__init__()
        self.into = nn.Conv2d(channels, width, 1)
        self.time = nn.Sequential(nn.Linear(1, 2), nn.SiLU(), nn.Linear(2, 1))
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.out = nn.Conv2d(width, channels, 1)

    def forward(self, x_t, t, conditioning):
        h = self.into(x_t) * self.time(t[:, None].to(x_t) / 1000)[:, :, None, None]
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.out(h)


class Items(Dataset):
    """A dataset of given items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


class Numbers(Dataset):
    """Item i is an image of the level 10 i, and of class i mod 3."""

    def __init__(self, count: int = 12):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        image = torch.full((3, 16, 16), 10 * row, dtype=torch.uint8)
        return {"image": image, "label": row % 3}


def conditioner(layers=1, **options):
    config = {**TEXT, "num_hidden_layers": layers}
    return TransformersConditioner(config=config, tokenizer="open_clip", max_length=8, **options)


def frozen_conditioner(folder):
    """A conditioner whose weights are on disk, as a frozen one must have."""
    torch.manual_seed(1)
    conditioner().encoder.save_pretrained(folder)
    return TransformersConditioner(str(folder), tokenizer="open_clip", max_length=8)


def model(schedule=None, **options):
    torch.manual_seed(0)
    codec = PixelCodec(2)
    text = conditioner()
    settings = {
        "codec": codec,
        "conditioner": text,
        "network": UNet(UNET, channels=codec.channels, context_dim=text.context_dim).eval(),
        "schedule": schedule or NoiseSchedule(),
        "prediction_type": "v_prediction",
        "image_size": 16,
    }
    return Model(**{**settings, **options})


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


def write_captions(folder, captions, split="train"):
    """Write a shard of a picture for each caption."""
    folder.mkdir(parents=True, exist_ok=True)
    members = {}
    for i, caption in enumerate(captions):
        members[f"{i:05d}.png"] = png((i, i, i))
        members[f"{i:05d}.txt"] = caption.encode()
    write_shard(folder / f"{split}-000000.tar", members)
    return folder


SCHEDULER = {  # what diffusers must be told of the paper's schedule and sampling
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "clip_sample": False,
}


def letters_tokenizer(**options):
    """A tokenizer of small letters."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{a}</w>" for a in letters), "!"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12, **options)


def sdxl_folder(folder, *, force_zeros=True, **scheduler):
    """Save a Stable Diffusion XL of diffusers with random weights; 16 x 16 pixels.

    Returns:
        The pipeline, which has moved nowhere since.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizers = letters_tokenizer(), letters_tokenizer(pad_token="!")
    text = {
        "vocab_size": len(tokenizers[0]),
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    one = CLIPTextConfig(hidden_size=16, intermediate_size=32, **text)
    two = CLIPTextConfig(hidden_size=24, intermediate_size=32, projection_dim=20, **text)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=40,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(one),
        text_encoder_2=CLIPTextModelWithProjection(two),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=DDIMScheduler(**{**SCHEDULER, **scheduler}),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def t5_tokenizer():
    """A tokenizer of small letters, as T5 has one."""
    from transformers import T5Tokenizer

    letters = [(chr(c), -3.0) for c in range(ord("a"), ord("z") + 1)]
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    return T5Tokenizer(vocab=[*special, ("\u2581", -2.0), *letters], extra_ids=0)


def t5_encoder(width):
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": width, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=30, **sizes)).eval()


def tiny_vae(channels, **options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **options,
    )


def pixart_folder(folder, **scheduler):
    """Save a PixArt of diffusers with random weights; 16 x 16 pixels."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    pipe = PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(16),
        vae=tiny_vae(4),
        transformer=transformer,
        scheduler=DDIMScheduler(**{**SCHEDULER, **scheduler}),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def sd3_folder(folder, *, t5=True, **scheduler):
    """Save a Stable Diffusion 3 of diffusers with random weights; 16 x 16 pixels."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizers = letters_tokenizer(), letters_tokenizer(pad_token="!")
    text = {
        "vocab_size": len(tokenizers[0]),
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "intermediate_size": 32,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    encoders = [
        CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=w, projection_dim=p, **text)).eval()
        for w, p in ((16, 10), (24, 14))
    ]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
    )
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=tiny_vae(4, scaling_factor=1.5, shift_factor=0.06),
        text_encoder=encoders[0],
        tokenizer=tokenizers[0],
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=t5_encoder(48) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    return pipe


def write_inception(path):
    """Write random weights of FID's Inception network, as torch-fidelity's file holds them.

    They are of a size that lets differences of pictures pass through all layers.
    """
    import torch_fidelity.feature_extractor_inceptionv3 as module

    class Network(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            """Keep the random weights."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    weights = Network("inception", ["2048"], nothing).state_dict()
    for name, weight in weights.items():
        if name.endswith("conv.weight"):
            weight.mul_(6**0.5)  # He's; the default is of a third of LeCun's variance
    weights["fc.weight"][8:] = 0  # few classes, or one of them always wins
    weights["fc.weight"].mul_(30)
    torch.save(weights, path)
    return path


def losses(module, batch, draws):
    """The losses of a batch for given random numbers."""
    keeps = zip(batch["caption"], draws.keep.tolist(), strict=True)
    prompts = [caption if kept else "" for caption, kept in keeps]
    batch = {**batch, "draws": draws, "prompts": prompts}
    return module._losses(batch, module._noised(batch), ema=False)


def sizes_of(folder, family):
    """Settings of a small diffusers folder, to patch into PUBLIC in place of a public model's."""
    small = {}
    for part, public in PUBLIC[family].items():
        config = json.loads((folder / part / "config.json").read_text())
        small[part] = {name: config.get(name, value) for name, value in public.items()}
    return small
