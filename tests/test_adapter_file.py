"""Adapter files of other programs: each layout, its formula, and what is refused."""

import copy
import itertools
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_single_file import stable_diffusion
from torch import nn

from zsnr import NoiseSchedule
from zsnr.cli import main
from zsnr.conditioning import OpenClipConditioner
from zsnr.conditioning.remembered import Remembered
from zsnr.interop import read_diffusers_folder
from zsnr.interop.adapter_file import open_adapter, parse_lora
from zsnr.interop.adapter_merge import merge_adapter
from zsnr.interop.lora import merge, write_lora
from zsnr.lora import AdaptedUNet, LoRA
from zsnr.pipeline import TextToImage
from zsnr.reports.arms import make_arms
from zsnr.weights.ldm_file import PUBLIC
from zsnr.weights.ldm_layout import ldm_layers

FAMILIES = ("v1", "xl")
DOWN = "down_blocks.1.attentions.0"
BLOCK = f"{DOWN}.transformer_blocks.0"
LAYERS = (  # linear layers, a 1x1 and a 3x3 convolution
    *(f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_out.0"),
    *(f"{BLOCK}.ff.net.0.proj", f"{DOWN}.proj_in", "down_blocks.1.resnets.0.conv1"),
)
TEXT = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1")
ORIGINAL = {  # names of SDXL's original code
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "add_embedding.linear_2": "label_emb_0_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv1": "input_blocks_4_0_in_layers_2",
    "down_blocks.1.resnets.0.time_emb_proj": "input_blocks_4_0_emb_layers_1",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
    "down_blocks.2.attentions.1.transformer_blocks.2.attn2.to_k": (
        "input_blocks_8_1_transformer_blocks_2_attn2_to_k"
    ),
    "mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj": (
        "middle_block_1_transformer_blocks_1_ff_net_0_proj"
    ),
    "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.attentions.2.proj_out": "output_blocks_5_1_proj_out",
    "up_blocks.2.resnets.0.conv1": "output_blocks_6_0_in_layers_2",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in made.items():
        stable_diffusion(folder, family)
    return made


@pytest.fixture(scope="module")
def models(folders):
    made = {family: read_diffusers_folder(str(folder)) for family, folder in folders.items()}
    for model in made.values():
        model.conditioner.load()
    return made


@pytest.fixture(scope="module")
def load(models):
    """Return a function that returns a new copy of a model."""
    return lambda family="v1": copy.deepcopy(models[family])


def layers_of(model):
    """The layers by the names that diffusers' files give them."""
    parts = {"unet": model.network.unet, "text_encoder": model.conditioner.encoder}
    if "encoder_2" in model.conditioner.parts:
        parts["text_encoder_2"] = model.conditioner.encoder_2
    return {
        f"{part}.{name.removeprefix('text_model.')}": module
        for part, root in parts.items()
        for name, module in root.named_modules()
        if getattr(module, "weight", None) is not None
    }


def weights_of(model):
    return {name: layer.weight.detach().clone() for name, layer in layers_of(model).items()}


def targets(model):
    """The layers that the tests adapt."""
    parts = {name.split(".")[0] for name in layers_of(model)} - {"unet"}
    return [
        *(f"unet.{name}" for name in LAYERS),
        *(f"{part}.{name}" for part in sorted(parts) for name in TEXT),
    ]


def kohya_name(name, family="v1"):
    """The name of a layer in files of kohya's scripts, with diffusers' names."""
    part, _, rest = name.partition(".")
    prefix = {
        "unet": "lora_unet_",
        "text_encoder": "lora_te_" if family == "v1" else "lora_te1_",
        "text_encoder_2": "lora_te2_",
    }[part]
    inner = rest if part == "unet" or rest == "text_projection" else f"text_model.{rest}"
    return prefix + inner.replace(".", "_")


SEEDS = itertools.count()


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(next(SEEDS))) * 0.3


def factors(weight, rank=3):
    """Return down and up of a LoRA for a weight."""
    kernel = [1] * (weight.ndim - 2)
    return randn(rank, *weight.shape[1:]), randn(len(weight), rank, *kernel)


def saved(tmp_path, tensors, metadata=None, name="a.safetensors"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def product_of(down, up):
    return up.double().flatten(1) @ down.double().flatten(1)


def check(model, before, changes, layers=None):
    """Compare a model with the weights before plus changes, in float64."""
    layers = layers or layers_of(model)
    for name, layer in layers.items():
        wanted = before[name].double()
        if name in changes:
            wanted = wanted + changes[name].reshape(wanted.shape)
            assert (layer.weight - before[name]).abs().max() > 1e-3
        torch.testing.assert_close(layer.weight.double(), wanted, rtol=0, atol=1e-6)


# The formula of each layout


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_kohya(load, tmp_path, family, alpha):
    model = load(family)
    before, layers = weights_of(model), layers_of(model)
    tensors, changes = {}, {}
    for name in targets(model):
        down, up = factors(layers[name].weight)
        key = kohya_name(name, family)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        changes[name] = 0.7 * (1 if alpha is None else alpha / 3) * product_of(down, up)
    merged = merge_adapter(model, saved(tmp_path, tensors), 0.7)
    assert merged.facts() == {"name": "a.safetensors", "scale": 0.7}
    check(model, before, changes)


def test_names_of_sdxls_original_code(load, tmp_path):
    model = load("xl")
    before, layers = weights_of(model), layers_of(model)
    tensors, changes = {}, {}
    for name, original in {**ORIGINAL, "text_projection": None}.items():
        full = f"unet.{name}" if original else "text_encoder_2.text_projection"
        key = f"lora_unet_{original}" if original else "lora_te2_text_projection"
        down, up = factors(layers[full].weight)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(1.5, dtype=torch.bfloat16)
        changes[full] = 0.5 * product_of(down, up)
    merge_adapter(model, saved(tmp_path, tensors))
    check(model, before, changes)


LAYOUTS = {
    "diffusers": ("lora_A.weight", "lora_B.weight"),
    "diffusers of 2023": ("lora.down.weight", "lora.up.weight"),
    "text encoders of 2023": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "named adapter": ("lora_A.default.weight", "lora_B.default.weight"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "base_model.model.", "text_model."])
def test_dotted_names(load, tmp_path, layout, prefix):
    model = load("xl")
    before, layers = weights_of(model), layers_of(model)
    tensors, changes = {}, {}
    for name in targets(model):
        down, up = factors(layers[name].weight)
        part, _, rest = name.partition(".")
        inside = "" if prefix == "text_model." and part == "unet" else prefix
        for end, factor in zip(LAYOUTS[layout], (down, up), strict=True):
            tensors[f"{part}.{inside}{rest}.{end}"] = factor
        tensors[f"{part}.{inside}{rest}.alpha"] = torch.tensor(6.0)
        changes[name] = 6 / 3 * product_of(down, up)
    merge_adapter(model, saved(tmp_path, tensors))
    check(model, before, changes)


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_processors_of_diffusers_of_2023(load, tmp_path, prefix):
    model = load()
    before, layers = weights_of(model), layers_of(model)
    tensors, changes = {}, {}
    for layer, old in {
        "to_q": "to_q",
        "to_k": "to_k",
        "to_v": "to_v",
        "to_out.0": "to_out",
    }.items():
        name = f"unet.{BLOCK}.attn1.{layer}"
        down, up = factors(layers[name].weight)
        key = f"{prefix}{BLOCK}.attn1.processor.{old}_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        changes[name] = product_of(down, up)
    down, up = factors(layers[f"text_encoder.{TEXT[0]}"].weight)
    key = "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"
    tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    changes[f"text_encoder.{TEXT[0]}"] = product_of(down, up)
    merge_adapter(model, saved(tmp_path, tensors))
    check(model, before, changes)


def test_names_of_comfyui(load, tmp_path):
    model = load("xl")
    before, layers = weights_of(model), layers_of(model)
    names = {
        "unet.down_blocks.1.attentions.0.proj_in": "diffusion_model.input_blocks.4.1.proj_in",
        f"text_encoder.{TEXT[0]}": f"text_encoders.clip_l.transformer.text_model.{TEXT[0]}",
        f"text_encoder_2.{TEXT[0]}": f"text_encoders.clip_g.transformer.text_model.{TEXT[0]}",
    }
    tensors, changes = {}, {}
    for name, key in names.items():
        down, up = factors(layers[name].weight)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        changes[name] = product_of(down, up)
    merge_adapter(model, saved(tmp_path, tensors))
    check(model, before, changes)


def test_convolutions_with_a_core(load, tmp_path):
    """LoCon of LyCORIS: up after core after down, three convolutions in a row."""
    model = load()
    name = "unet.down_blocks.1.resnets.0.conv1"
    layer = layers_of(model)[name]
    before, key = weights_of(model), kohya_name(name)
    out, channels, *kernel = layer.weight.shape
    down, core, up = randn(3, channels, 1, 1), randn(3, 3, *kernel), randn(out, 3, 1, 1)
    x = randn(1, channels, 5, 5).double()
    y = nn.functional.conv2d(x, down.double())
    y = nn.functional.conv2d(y, core.double(), padding=1)
    wanted = nn.functional.conv2d(y, up.double())
    parts = {"lora_down.weight": down, "lora_mid.weight": core, "lora_up.weight": up}
    tensors = {f"{key}.{part}": tensor for part, tensor in parts.items()}
    tensors[f"{key}.alpha"] = torch.tensor(6.0)
    merge_adapter(model, saved(tmp_path, tensors), 0.5)
    change = layer.weight.double() - before[name].double()
    found = nn.functional.conv2d(x, change, padding=1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def hada(weight, core):
    """LoHa of LyCORIS, and its change in float64."""
    out, rest = len(weight), weight[0].numel()
    if core:
        channels, kernel = weight.shape[1], weight.shape[2:]
        parts = {f"hada_t{i}": randn(3, 3, *kernel) for i in (1, 2)}
        parts |= {f"hada_w{i}_a": randn(3, out) for i in (1, 2)}
        parts |= {f"hada_w{i}_b": randn(3, channels) for i in (1, 2)}
        halves = [
            sum(
                parts[f"hada_w{i}_a"][p].double()[:, None, None, None]
                * parts[f"hada_w{i}_b"][q].double()[None, :, None, None]
                * parts[f"hada_t{i}"][p, q].double()
                for p in range(3)
                for q in range(3)
            )
            for i in (1, 2)
        ]
    else:
        parts = {f"hada_w{i}_a": randn(out, 3) for i in (1, 2)}
        parts |= {f"hada_w{i}_b": randn(3, rest) for i in (1, 2)}
        halves = [parts[f"hada_w{i}_a"].double() @ parts[f"hada_w{i}_b"].double() for i in (1, 2)]
    return parts, halves[0] * halves[1]


@pytest.mark.parametrize("core", [False, True])
def test_loha(load, tmp_path, core):
    model = load()
    before, layers = weights_of(model), layers_of(model)
    tensors, changes = {}, {}
    for name in targets(model):
        weight = layers[name].weight
        parts, change = hada(weight, core and weight.ndim == 4 and weight.shape[-1] > 1)
        key = kohya_name(name)
        tensors |= {f"{key}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{key}.alpha"] = torch.tensor(1.5)
        changes[name] = 2.0 * 1.5 / 3 * change
    path = saved(tmp_path, tensors)
    assert open_adapter(path).kind == "LoHa"
    merge_adapter(model, path, 2.0)
    check(model, before, changes)


@pytest.mark.parametrize("whole", [(True, True), (True, False), (False, True), (False, False)])
def test_lokr(load, tmp_path, whole):
    """kron(C_1, C_2), whole or of low rank; alpha / rank counts if one is of low rank."""
    model = load()
    before, layers = weights_of(model), layers_of(model)
    tensors, changes = {}, {}
    for name in targets(model):
        weight, key = layers[name].weight.double(), kohya_name(name)
        out, channels = weight.shape[:2]
        kernel = weight[0, 0].numel()
        shapes = (4, 2), (out // 4, channels // 2 * kernel)
        both = []
        for i, (is_whole, (rows, columns)) in enumerate(zip(whole, shapes, strict=True), start=1):
            if is_whole:
                both.append(randn(rows, columns))
                shape = (rows, channels // 2, *weight.shape[2:]) if i == 2 else (rows, columns)
                tensors[f"{key}.lokr_w{i}"] = both[-1].reshape(shape)
            else:
                a, b = randn(rows, 3), randn(3, columns)
                tensors |= {f"{key}.lokr_w{i}_a": a, f"{key}.lokr_w{i}_b": b}
                both.append(a.double() @ b.double())
        tensors[f"{key}.alpha"] = torch.tensor(1e10 if all(whole) else 1.5)
        one, two = both[0].double(), both[1].double().reshape(out // 4, channels // 2, kernel)
        change = torch.stack([torch.kron(one, two[..., k]) for k in range(kernel)], -1)
        changes[name] = (1 if all(whole) else 1.5 / 3) * 0.5 * change
    path = saved(tmp_path, tensors)
    assert open_adapter(path).kind == "LoKr"
    merge_adapter(model, path, 0.5)
    check(model, before, changes)


@pytest.mark.parametrize("scale", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("on_output", [True, False])
def test_dora_of_lycoris(load, tmp_path, on_output, scale):
    """V = W + D gets the stored norms m; the scale goes from W to m V / |V|."""
    model = load()
    before, layers = weights_of(model), layers_of(model)
    tensors, changes = {}, {}
    for name in targets(model):
        weight, key = layers[name].weight.double(), kohya_name(name)
        down, up = factors(weight)
        V = weight + product_of(down, up).reshape(weight.shape)
        flat = V.flatten(1) if on_output else V.transpose(0, 1).flatten(1)
        m = 1 + randn(len(flat)).abs()
        shape = [1] * V.ndim
        shape[0 if on_output else 1] = -1
        merged = V * (m.double() / flat.norm(dim=1)).reshape(shape)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.dora_scale"] = m.reshape(shape)
        changes[name] = scale * (merged - weight)
    path = saved(tmp_path, tensors)
    assert open_adapter(path).kind == "DoRA"
    merge_adapter(model, path, scale)
    if scale:
        check(model, before, changes)
    else:
        check(model, before, {})


def test_full_differences(load, tmp_path):
    model = load()
    before, layers = weights_of(model), layers_of(model)
    bias = layers["unet.conv_out"].bias.detach().clone()
    norm = f"unet.{BLOCK}.norm1"
    changes = {"unet.conv_out": randn(*before["unet.conv_out"].shape), norm: randn(32)}
    added = randn(len(bias))
    tensors = {"lora_unet_conv_out.diff": changes["unet.conv_out"]}
    tensors |= {"lora_unet_conv_out.diff_b": added, f"{kohya_name(norm)}.w_norm": changes[norm]}
    merge_adapter(model, saved(tmp_path, tensors), 0.5)
    check(model, before, {name: 0.5 * change.double() for name, change in changes.items()})
    torch.testing.assert_close(layers["unet.conv_out"].bias, bias + 0.5 * added)


def one_layer(layers, name=f"unet.{LAYERS[0]}", key=None, rank=3):
    """A LoRA of one layer in kohya's layout."""
    down, up = factors(layers[name].weight, rank)
    key = key or kohya_name(name)
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}


def test_several_add_up_and_dtypes_stay(load, tmp_path):
    model, exact = load(), load()
    model.network.to(torch.bfloat16)
    exact.network.to(torch.bfloat16).to(torch.float64)
    paths = [
        saved(tmp_path, one_layer(layers_of(model)), name=f"{i}.safetensors") for i in range(2)
    ]
    for path, scale in zip(paths, (0.5, -0.3), strict=True):
        merge_adapter(model, path, scale)
        merge_adapter(exact, path, scale)
    name = f"unet.{LAYERS[0]}"
    weight = layers_of(model)[name].weight
    assert weight.dtype == torch.bfloat16
    wanted = layers_of(exact)[name].weight
    assert wanted.dtype == torch.float64
    torch.testing.assert_close(weight.double(), wanted, rtol=2**-8, atol=2**-9)


def test_float16_files(load, tmp_path):
    model = load()
    before = weights_of(model)
    tensors = {k: t.half() for k, t in one_layer(layers_of(model)).items()}
    merge_adapter(model, saved(tmp_path, tensors))
    check(model, before, {f"unet.{LAYERS[0]}": product_of(*tensors.values())})


def test_averaged_and_raw_weights_get_it(load, tmp_path):
    model, other = load(), load()
    model = replace(model, raw_network=other.network)
    before = weights_of(other)
    tensors = one_layer(layers_of(model))
    merge_adapter(model, saved(tmp_path, tensors))
    check(other, before, {f"unet.{LAYERS[0]}": product_of(*tensors.values())})


# The libraries as oracles


def inputs(family):
    width = 40 if family == "xl" else 16
    added = {"text_embeds": randn(2, 20), "time_ids": torch.full((2, 6), 16.0)}
    options = {"added_cond_kwargs": added} if family == "xl" else {}
    x = randn(2, 4, 8, 8)
    return {
        "sample": x,
        "timestep": torch.tensor([999, 3]),
        "encoder_hidden_states": randn(2, 7, width),
        **options,
    }


@torch.no_grad()
def outputs(unet, encoders, given):
    """Outputs of the UNet and the text encoders."""
    ids = torch.arange(14).reshape(2, 7)
    return [unet(**given).sample, *(encoder(ids).last_hidden_state for encoder in encoders)]


def ours(model, given):
    conditioner = model.conditioner
    encoders = [getattr(conditioner, name) for name in conditioner.parts]
    return outputs(model.network.unet.eval(), encoders, given)


@pytest.fixture(scope="module")
def pipelines(folders):
    from diffusers import DiffusionPipeline

    return {family: DiffusionPipeline.from_pretrained(folders[family]) for family in FAMILIES}


def theirs(pipe, given):
    encoders = [pipe.text_encoder]
    if getattr(pipe, "text_encoder_2", None) is not None:
        encoders.append(pipe.text_encoder_2)
    return outputs(pipe.unet, encoders, given)


def read_by_diffusers(family, layout, layers):
    """Make a file of a layout that diffusers reads, and its metadata."""
    tensors, metadata = {}, None
    names = [name for name in layers if name.partition(".")[2] in (*LAYERS, *TEXT)]
    if layout == "DoRA":  # diffusers reads it for the UNet alone
        names = [name for name in names if name.startswith("unet.")]
    if layout in ("kohya", "original"):  # diffusers drops the attention of text encoders
        names = [name for name in names if "self_attn" not in name]
    if layout == "original":
        names = [name for name in names if "resnets" not in name]
    for name in names:
        down, up = factors(layers[name].weight)
        part, _, rest = name.partition(".")
        full = name if part == "unet" else f"{part}.text_model.{rest}"
        if layout in ("kohya", "original"):
            key = kohya_name(name, family)
            if layout == "original" and part == "unet":
                blocks = {"layers_per_block": 2, "up_block_types": ["CrossAttnUpBlock2D"] * 3}
                key = f"lora_unet_{ldm_layers([rest], blocks)[rest]}".replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(6.0)
        elif layout == "diffusers of 2023":
            stem = "lora" if part == "unet" else "lora_linear_layer"
            tensors |= {f"{full}.{stem}.down.weight": down, f"{full}.{stem}.up.weight": up}
        else:
            tensors |= {f"{full}.lora_A.weight": down, f"{full}.lora_B.weight": up}
        if layout == "DoRA":
            shape = (1, -1, 1, 1) if up.ndim == 4 else (-1,)
            tensors[f"{full}.lora_magnitude_vector"] = 1 + randn(len(up)).abs().reshape(shape)
    if layout == "config":
        config = {}
        for part in {name.split(".")[0] for name in names}:
            of_part = [n.partition(".")[2] for n in names if n.startswith(f"{part}.")]
            config |= {f"{part}.r": 3, f"{part}.lora_alpha": 6, f"{part}.use_rslora": True}
            config[f"{part}.target_modules"] = of_part
            config[f"{part}.alpha_pattern"] = {of_part[0]: 2}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    return tensors, metadata


@pytest.mark.peer
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *[(f, n) for f in FAMILIES for n in ("kohya", "diffusers", "diffusers of 2023", "config")],
        ("xl", "original"),
        ("v1", "DoRA"),
    ],
)
def test_diffusers_gives_the_same(load, pipelines, tmp_path, family, layout):
    model, given, pipe = load(family), inputs(family), pipelines[family]
    plain = theirs(pipe, given)
    tensors, metadata = read_by_diffusers(family, layout, layers_of(model))
    path = saved(tmp_path, tensors, metadata)
    pipe.load_lora_weights(str(path), adapter_name="a")
    try:
        pipe.set_adapters(["a"], [0.7])
        wanted = theirs(pipe, given)
    finally:
        pipe.unload_lora_weights()
    merge_adapter(model, path, 0.7)
    changed = 1 if layout == "DoRA" else len(plain)
    for i, (a, b, c) in enumerate(zip(ours(model, given), wanted, plain, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert i >= changed or (b - c).abs().max() > 1e-3


def peft_config(kind):
    import peft

    modules = [name.removeprefix("down_blocks.1.") for name in LAYERS]
    if kind == "LoHa":
        return peft.LoHaConfig(
            r=3, alpha=5, target_modules=modules, init_weights=False, use_effective_conv2d=True
        )
    if kind in ("LoKr", "whole LoKr"):
        low = kind == "LoKr"
        return peft.LoKrConfig(
            r=2 if low else 64,
            alpha=5,
            target_modules=modules,
            init_weights=False,
            decompose_both=low,
            decompose_factor=4,
            use_effective_conv2d=low,
        )
    return peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=modules,
        init_lora_weights=False,
        use_dora=kind == "DoRA",
        use_rslora=kind == "rsLoRA",
        lora_bias=kind == "bias",
        alpha_pattern={"attn1.to_q": 2} if kind == "patterns" else {},
        rank_pattern={"attn1.to_q": 5} if kind == "patterns" else {},
    )


@pytest.mark.peer
@pytest.mark.parametrize(
    "kind", ["LoRA", "rsLoRA", "patterns", "bias", "DoRA", "LoHa", "LoKr", "whole LoKr"]
)
def test_a_folder_of_peft_gives_the_same(load, tmp_path, kind):
    import peft

    model, other, given = load(), load(), inputs("v1")
    if kind == "bias":  # peft adds a bias only where there is one
        names = ("ff.net.0.proj", "proj_in", "resnets.0.conv1", "to_out.0")
    torch.manual_seed(0)
    config = peft_config(kind)
    if kind == "bias":
        config.target_modules = set(names)
    adapted = peft.get_peft_model(other.network.unet, config).eval()
    if kind == "DoRA":
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1.5
    adapted.save_pretrained(tmp_path / "style")
    plain = ours(model, given)
    merged = merge_adapter(model, tmp_path / "style")
    assert merged.name == "style"
    with torch.no_grad():
        wanted = adapted(**given).sample
    torch.testing.assert_close(ours(model, given)[0], wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain[0]).abs().max() > 1e-4
    again = load()
    merge_adapter(again, tmp_path / "style" / "adapter_model.safetensors")
    torch.testing.assert_close(ours(again, given)[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_encoder_of_peft(load, tmp_path, family):
    import peft

    model, other = load(family), load(family)
    name = "encoder_2" if family == "xl" else "encoder"
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    adapted = peft.get_peft_model(getattr(other.conditioner, name).requires_grad_(True), config)
    adapted.save_pretrained(tmp_path)
    merge_adapter(model, tmp_path)
    ids = torch.arange(14).reshape(2, 7)
    with torch.no_grad():
        wanted = adapted(ids).last_hidden_state
        found = getattr(model.conditioner, name)(ids).last_hidden_state
        plain = getattr(load(family).conditioner, name)(ids).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 1e-3


# This package's own files


def trained(folder, model):
    """A model with adapters on its UNet, as training leaves them."""
    unet = AdaptedUNet(str(folder), LoRA(rank=4, alpha=6.0)).eval()
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = randn(*parameter.shape)
    return replace(model, network=unet)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_our_own_adapters_come_back(load, folders, tmp_path, family, layout):
    adapted, given = trained(folders[family], load(family)), inputs(family)
    path = write_lora(adapted, tmp_path / "a.safetensors", layout=layout)
    model = load(family)
    plain = ours(model, given)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_adapter(model, path)
    wanted = ours(merge(adapted), given)[0]
    torch.testing.assert_close(ours(model, given)[0], wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - plain).abs().max() > 1e-3


def test_a_model_with_its_own_adapters_takes_others(load, folders, tmp_path):
    adapted, given = trained(folders["v1"], load()), inputs("v1")
    whole = merge(adapted)
    path = saved(tmp_path, one_layer(layers_of(whole)))
    merge_adapter(adapted, path)
    merge_adapter(whole, path)
    for other in (adapted, merge(adapted)):
        found = ours(other, given)[0]
        torch.testing.assert_close(found, ours(whole, given)[0], rtol=1e-5, atol=1e-5)


# What is refused


def refused(model, path, message, scale=1.0):
    """Check that a file is refused in one line, and that nothing changes."""
    before = weights_of(model)
    with pytest.raises(ValueError, match=message) as error:
        merge_adapter(model, path, scale)
    assert "\n" not in str(error.value)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name])


KEY = kohya_name(f"unet.{LAYERS[0]}")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{KEY}.lora_up.weight": None}, r"lora_down.weight has no partner \(up\)"),
        ({f"{KEY}.lora_down.weight": None}, r"lora_up.weight has no partner \(down\)"),
        ({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "conv_in.alpha has no partner"),
        ({f"{KEY}.hada_w1_a": torch.ones(32, 3)}, "partners are of different adapters"),
        ({"lora_unet_nowhere.diff": torch.ones(3)}, "nowhere.diff adapts a layer that the model"),
        ({f"{KEY}.lora_down.weight": torch.ones(3, 31)}, r"lora_down.weight does not fit: .*31"),
        ({f"{KEY}.lora_up.weight": torch.ones(33, 3)}, r"does not fit: .*attn1.to_q has shape"),
        ({f"{KEY}.lora_up.weight": torch.ones(32, 4)}, r"does not fit: .*up \(32, 4\)"),
        ({f"{KEY}.lora_up.weight": torch.ones(32)}, "does not fit"),
        ({f"{KEY}.lora_down.weight": torch.ones(0, 32)}, "is empty"),
        ({f"{KEY}.lora_down.weight": torch.ones(3, 32).int()}, "values of type I32: wanted one of"),
        ({f"{KEY}.alpha": torch.ones(2)}, r"alpha has shape \(2,\): wanted one number"),
        ({f"{KEY}.alpha": torch.tensor(math.nan)}, "alpha has values that are not finite"),
        (
            {f"{KEY}.lora_up.weight": torch.full((32, 3), math.inf)},
            "lora_up.weight has values that",
        ),
        ({f"{KEY}.dora_scale": torch.ones(5)}, "does not fit: .*dora_scale"),
        ({f"{KEY}.diff_b": torch.ones(32)}, "attn1.to_q has no bias"),
        ({f"{KEY}.magic": torch.ones(32)}, "magic is not a known part of an adapter"),
        ({"lora_unet_conv_in.oft_blocks": torch.ones(2, 2)}, "OFT adapters, as .* not supported"),
        ({"lora_unet_conv_in.a1.weight": torch.ones(2, 2)}, "GLoRA adapters, as .* not supported"),
        ({"lora_unet_conv_in.on_input": torch.tensor(True)}, "IA3 adapters, as .* not supported"),
        (
            {f"unet.{LAYERS[0]}.lora_A.weight": torch.ones(3, 32)}
            | {f"unet.{LAYERS[0]}.lora_B.weight": torch.ones(32, 3)},
            "both adapt down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        (
            {"lora_unet_double_blocks_0_img_mod_lin.diff": torch.ones(3)},
            "of a transformer, such as Flux",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(load, tmp_path, tensors, message):
    model = load()
    held = {**one_layer(layers_of(model)), **tensors}
    path = saved(tmp_path, {name: t for name, t in held.items() if t is not None})
    refused(model, path, message)


def test_a_lora_of_another_family_is_refused(load, tmp_path):
    v1, xl = load("v1"), load("xl")
    name = "unet.down_blocks.2.attentions.1.transformer_blocks.2.attn2.to_k"
    tensors = one_layer(layers_of(xl), name, f"lora_unet_{ORIGINAL[name[5:]]}")
    tensors |= one_layer(layers_of(xl), f"text_encoder_2.{TEXT[0]}", "lora_te2_text_model_x")
    refused(
        v1,
        saved(tmp_path, tensors),
        "it is an SDXL LoRA, to be merged into a model that is not SDXL: lora_",
    )
    tensors = one_layer(layers_of(v1), key="lora_te_text_model_encoder_layers_0_self_attn_q_proj")
    metadata = {"ss_base_model_version": "sd_v1"}
    path = saved(tmp_path, tensors, metadata)
    refused(xl, path, "it is a Stable Diffusion 1 LoRA, to be merged into an SDXL model")


def test_a_model_or_a_damaged_file_is_refused(load, folders, tmp_path):
    model = load()
    refused(
        model,
        folders["v1"] / "unet" / "diffusion_pytorch_model.safetensors",
        "is not an adapter: .* is not a part of one",
    )
    refused(model, tmp_path / "none.safetensors", "cannot be read: No such file")
    refused(model, tmp_path, "is a folder without adapter_model.safetensors")
    refused(model, "a.bin", "is a pickle")
    path = saved(tmp_path, one_layer(layers_of(model)))
    whole = path.read_bytes()
    for length in (4, 100, len(whole) - 10):
        path.write_bytes(whole[:length])
        refused(model, path, "not a readable .safetensors file|is empty|is a ")
    refused(model, saved(tmp_path, {"v_pred": torch.zeros(0)}), "holds no adapter")
    for scale in (math.nan, math.inf, "1", True):
        refused(model, path, "wanted a finite number", scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "OFT"}, "peft_type='OFT': wanted LORA, LOHA or LOKR"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights as well"),
        ({"lora_alpha": "8"}, "alpha='8': wanted a finite number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "wanted names of layers"),
        ({"r": 0}, "r=0"),
    ],
)
def test_a_config_is_not_believed(load, tmp_path, change, message):
    model = load()
    name = f"base_model.model.{LAYERS[0]}"
    down, up = factors(layers_of(model)[f"unet.{LAYERS[0]}"].weight)
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    saved(tmp_path, tensors, name="adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 8, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused(model, tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda unet: unet.to(torch.float8_e4m3fn), "quantized .*load the adapter before"),
        (lambda unet: unet.to("meta"), "not loaded, or kept elsewhere"),
    ],
)
def test_weights_that_cannot_be_changed_are_named(load, tmp_path, change, message):
    model = load()
    path = saved(tmp_path, one_layer(layers_of(model)))
    change(model.network)
    with pytest.raises(ValueError, match=message):
        merge_adapter(model, path)


def test_sharded_weights_are_refused(load, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = load()
    path = saved(tmp_path, one_layer(layers_of(model)))
    if dist.is_initialized():  # by another test, in a run of one process
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model.network)
        with pytest.raises(ValueError, match="are sharded over devices: load the adapter before"):
            merge_adapter(model, path)
    finally:
        dist.destroy_process_group()


def test_a_value_that_float16_cannot_hold_changes_nothing(load, tmp_path):
    model = load()
    model.network.to(torch.float16)
    first = one_layer(layers_of(model))
    second = one_layer(layers_of(model), f"unet.{LAYERS[1]}")
    second = {name: t * 1e4 for name, t in second.items()}
    refused(
        model, saved(tmp_path, first | second), "attn2.to_k gets values that float16 cannot hold"
    )


def test_encoded_prompts_and_other_networks_are_refused(load, tmp_path):
    model = load()
    path = saved(tmp_path, one_layer(layers_of(model), f"text_encoder.{TEXT[0]}"))
    remembered = replace(model, conditioner=Remembered(model.conditioner))
    with pytest.raises(ValueError, match="this model keeps only encoded prompts"):
        merge_adapter(remembered, path)
    pipe = TextToImage(model, network=lambda x, t, c: x)
    with pytest.raises(ValueError, match="samples with another network"):
        pipe.load_lora(path)


def test_an_encoder_of_open_clip(load, tmp_path):
    """Kohya's scripts name the layers of Stable Diffusion 2's encoder as transformers does."""
    import open_clip

    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "zsnr-adapted.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "zsnr-adapted.json")
    torch.manual_seed(0)
    model = replace(load(), conditioner=OpenClipConditioner("zsnr-adapted"))
    block = model.conditioner.transformer.resblocks[1]
    before = {name: weight.detach().clone() for name, weight in block.state_dict().items()}
    wanted = {name: weight.double() for name, weight in before.items()}
    tensors = {}
    for name, place, rows in (
        ("self_attn_q_proj", "attn.in_proj_weight", slice(0, 16)),
        ("self_attn_v_proj", "attn.in_proj_weight", slice(32, 48)),
        ("self_attn_out_proj", "attn.out_proj.weight", slice(None)),
        ("mlp_fc2", "mlp.c_proj.weight", slice(None)),
    ):
        down, up = factors(before[place][rows])
        key = f"lora_te_text_model_encoder_layers_1_{name}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(6.0)
        wanted[place][rows] += 0.5 * 6 / 3 * product_of(down, up)
    merge_adapter(model, saved(tmp_path, tensors), 0.5)
    for name, weight in block.state_dict().items():
        torch.testing.assert_close(weight.double(), wanted[name], rtol=0, atol=1e-6)
    untouched = slice(16, 32)  # the keys
    assert torch.equal(
        block.attn.in_proj_weight[untouched], before["attn.in_proj_weight"][untouched]
    )
    assert not model.conditioner.reloadable


def test_merged_text_encoders_are_not_released(load, tmp_path):
    model = load()
    name = f"text_encoder.{TEXT[0]}"
    merge_adapter(model, saved(tmp_path, one_layer(layers_of(model), name)))
    merged = layers_of(model)[name].weight.clone()
    model.conditioner.release()
    assert torch.equal(layers_of(model)[name].weight, merged)


# What is warned of


@pytest.mark.parametrize(
    ("metadata", "model_is", "message"),
    [
        ({"ss_v_parameterization": "True"}, "epsilon", "prediction type v_prediction, but"),
        ({"ss_zero_terminal_snr": "True"}, "epsilon", "declares zero terminal SNR, but the model"),
        ({"modelspec.prediction_type": "epsilon"}, "v", "declares prediction type epsilon and a"),
        ({"modelspec.prediction_type": "v"}, "v", None),
        ({"ss_zero_terminal_snr": "False"}, "epsilon", None),
        ({}, "v", None),
    ],
)
def test_an_adapter_of_another_prediction_type_is_warned_of(
    load, tmp_path, metadata, model_is, message
):
    zero = model_is == "v"
    model = replace(
        load(),
        schedule=NoiseSchedule(zero_terminal_snr=zero),
        prediction_type="v_prediction" if zero else "epsilon",
    )
    path = saved(tmp_path, one_layer(layers_of(model)), metadata)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        merge_adapter(model, path)
    texts = [str(warning.message) for warning in given]
    assert len(texts) == (message is not None)
    assert message is None or message in texts[0]


def test_an_adapter_of_peft_without_its_config_is_warned_of(load, tmp_path):
    name = f"base_model.model.{LAYERS[0]}"
    tensors = {f"{name}.lora_A.weight": randn(3, 32), f"{name}.lora_B.weight": randn(32, 3)}
    with pytest.warns(UserWarning, match="which says alpha: alpha = rank is taken"):
        merge_adapter(load(), saved(tmp_path, tensors))


def test_marks_are_declarations_and_embeddings_are_idle(load, tmp_path):
    model = load()
    tensors = one_layer(layers_of(model))
    tensors |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    tensors["bundle_emb.moody.string_to_param.*"] = torch.ones(2, 16)
    with pytest.warns(UserWarning, match=r"embeddings \(moody\), which are not loaded"):
        merge_adapter(model, saved(tmp_path, tensors))


# Names with scales


def test_a_scale_follows_the_last_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b:0.5", "c:d.safetensors"):
        (tmp_path / name).touch()
    assert parse_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert parse_lora("a.safetensors:0.8") == ("a.safetensors", 0.8)
    assert parse_lora("a.safetensors:-1") == ("a.safetensors", -1.0)
    assert parse_lora("b:0.5") == ("b:0.5", 1.0)
    assert parse_lora("b:0.5:0.25") == ("b:0.5", 0.25)
    assert parse_lora("c:d.safetensors") == ("c:d.safetensors", 1.0)
    assert parse_lora(r"C:\loras\a.safetensors") == (r"C:\loras\a.safetensors", 1.0)
    assert parse_lora(r"C:\loras\a.safetensors:0.5") == (r"C:\loras\a.safetensors", 0.5)
    with pytest.raises(ValueError, match="'strong' is not a number: wanted FILE or FILE:SCALE"):
        parse_lora("a.safetensors:strong")
    with pytest.raises(ValueError, match="the scale is nan: wanted a finite number"):
        parse_lora("a.safetensors:nan")


# The commands


@pytest.fixture
def style(load, tmp_path):
    tensors = one_layer(layers_of(load()), "unet.conv_out")
    return saved(tmp_path, {name: 3 * t for name, t in tensors.items()}, name="style.safetensors")


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_sample(folders, style, tmp_path, capsys):
    common = ["sample", str(folders["v1"]), "a cat", "--num-steps", "2", "--device", "cpu"]
    for name, options in {
        "none": [],
        "half": ["--lora", f"{style}:0.5"],
        "twice": ["--lora", f"{style}:0.25", "--lora", f"{style}:0.25"],
    }.items():
        assert main([*common, "-o", str(tmp_path / name), *options]) == 0
    [none], [half], [twice] = (
        [*(tmp_path / name).glob("*.png")] for name in ("none", "half", "twice")
    )
    assert abs(pixels(half) - pixels(twice)).max() <= 1
    assert abs(pixels(half) - pixels(none)).max() > 1
    said = json.loads(Image.open(half).text["zsnr"])
    assert said["loras"] == [{"name": "style.safetensors", "scale": 0.5}]
    assert "loras" not in json.loads(Image.open(none).text["zsnr"])
    capsys.readouterr()
    assert main([*common, "--lora", f"{style}:x"]) == 2
    assert main([*common, "--lora", str(tmp_path / "none.safetensors")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "wanted FILE or FILE:SCALE" in line]) == 1
    assert len([line for line in lines if "No such file" in line]) == 1


def test_compare(folders, style, tmp_path):
    page = tmp_path / "page"
    vary = f"lora=none,{style}:0.5,{style}"
    options = ["--num-steps", "2", "--prompts", "empty", "--count", "2", "--device", "cpu"]
    model = str(folders["v1"])
    assert main(["compare", "models", model, "--vary", vary, "-o", str(page), *options]) == 0
    arms = json.loads((page / "compare.json").read_text())["arms"]
    assert [arm["name"] for arm in arms] == ["no LoRA", "style:0.5", "style"]
    assert arms[1]["settings"]["lora"] == [[str(style), 0.5]]
    first = [page / arm["images"][0]["file"] for arm in arms]
    assert abs(pixels(first[0]) - pixels(first[1])).max() > 1
    assert abs(pixels(first[1]) - pixels(first[2])).max() > 1
    said = json.loads(Image.open(first[1]).text["zsnr"])
    assert said["loras"] == [{"name": "style.safetensors", "scale": 0.5}]
    main(["sample", model, "", "--num-steps", "2", "--device", "cpu", "-o", str(tmp_path / "s")])
    [plain] = (tmp_path / "s").glob("*.png")
    assert abs(pixels(first[0]) - pixels(plain)).max() == 0
    assert "style:0.5" in (page / "index.html").read_text()


def test_compare_arms_with_several(folders, style, tmp_path):
    other = tmp_path / "c+d.safetensors"
    other.write_bytes(style.read_bytes())
    page, model = tmp_path / "page", str(folders["v1"])
    arms = [f"name=two lora={style}:0.25+{other}:0.25", f"name=one lora={other}:0.5"]
    options = ["--num-steps", "2", "--prompts", "empty", "--count", "1", "--device", "cpu"]
    said = [word for arm in arms for word in ("--arm", arm)]
    assert main(["compare", "models", model, *said, "-o", str(page), *options]) == 0
    facts = json.loads((page / "compare.json").read_text())["arms"]
    two, one = (page / arm["images"][0]["file"] for arm in facts)
    assert abs(pixels(two) - pixels(one)).max() <= 1


def test_compare_arms_that_read_prompts_to_another_length(folders, tmp_path):
    page, prompts = tmp_path / "page", tmp_path / "prompts.txt"
    prompts.write_text("a cat " * 50 + "at night\n")
    options = ["--num-steps", "2", "--prompts", str(prompts), "--count", "1", "--device", "cpu"]
    vary = ["--vary", "max_tokens=75,150", *options]
    with pytest.warns(UserWarning, match="reads 75 tokens"):
        assert main(["compare", "models", str(folders["v1"]), *vary, "-o", str(page)]) == 0
    arms = json.loads((page / "compare.json").read_text())["arms"]
    assert [arm["name"] for arm in arms] == ["75 tokens", "150 tokens"]
    assert [arm["settings"]["max_tokens"] for arm in arms] == [75, 150]
    one, two = (page / arm["images"][0]["file"] for arm in arms)
    assert abs(pixels(one) - pixels(two)).max() > 0
    with pytest.raises(ValueError, match="reads no prompts: leave max_tokens out"):
        make_arms((), ["max_tokens=150"], exact=True)


def test_compare_refuses_before_it_samples(folders, tmp_path, capsys):
    model = str(folders["v1"])
    vary = f"lora=none,{tmp_path / 'a.safetensors'}"
    assert main(["compare", "models", model, "--vary", vary, "-o", str(tmp_path / "p")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_arms_with_loras(style):
    name = str(style)
    [arm] = make_arms(["m"], [f"lora={name}:0.5+{name}"])
    assert arm.lora == ((name, 0.5), (name, 1.0))
    with pytest.raises(ValueError, match="wanted FILE or FILE:SCALE, several with"):
        make_arms(["m"], [f"lora={name}:x"])
    with pytest.raises(ValueError, match="An exact denoiser has no weights to merge a LoRA into"):
        make_arms((), [f"lora={name}"], exact=True)


@pytest.mark.parametrize("output", ["folder", "file.safetensors"])
def test_export(load, folders, style, tmp_path, output, monkeypatch):
    monkeypatch.setitem(PUBLIC, "v1", tiny.sizes_of(folders["v1"], "v1"))
    path = tmp_path / output
    command = ["export", str(folders["v1"]), "-o", str(path), "--lora", f"{style}:0.5"]
    assert main(command) == 0
    pipe = TextToImage.from_pretrained(path, device="cpu")
    model = load()
    merge_adapter(model, style, 0.5)
    given = inputs("v1")
    found, wanted = ours(pipe.model, given), ours(model, given)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    if output == "folder":
        card = (path / "README.md").read_text()
        assert "style.safetensors" in card
        assert "0.5" in card
    else:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["zsnr.run"])
        assert said["loras"] == [{"name": "style.safetensors", "scale": 0.5}]


def test_export_of_adapters_alone_takes_no_others(folders, style, tmp_path, capsys):
    options = ["-o", str(tmp_path / "b.safetensors"), "--format", "lora", "--lora", str(style)]
    assert main(["export", str(folders["v1"]), *options]) == 2
    assert "--lora is merged into a whole model" in capsys.readouterr().err


def test_export_merges_into_text_encoders(load, folders, tmp_path):
    layers = layers_of(load("xl"))
    tensors = {}
    for part, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_")):
        key = f"{prefix}text_model_{TEXT[0].replace('.', '_')}"
        tensors |= one_layer(layers, f"{part}.{TEXT[0]}", key)
    style, out = saved(tmp_path, tensors), tmp_path / "out"
    assert main(["export", str(folders["xl"]), "-o", str(out), "--lora", str(style)]) == 0
    model = load("xl")
    merge_adapter(model, style)
    again = read_diffusers_folder(str(out))
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weights_of(again)[name], weight, rtol=0, atol=0)
    assert load_file(style)
