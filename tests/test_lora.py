"""Adapters: training, checkpoints, merging, and the files that others read."""

import dataclasses
import json
import shutil
import sys

import cells
import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoints import tiny_stable_diffusion

from zsnr import DDIM, Conditioning, Denoiser, Guidance, NoiseSchedule, trailing
from zsnr.checkpoints import Model, read_checkpoint
from zsnr.cli import main
from zsnr.codecs import AutoencoderKLCodec, PixelCodec
from zsnr.conditioning import OpenClipConditioner, SDXLConditioner
from zsnr.described import build, describe
from zsnr.interop import read_diffusers_folder
from zsnr.interop.adapter_merge import merge_adapter
from zsnr.interop.export import export_diffusers
from zsnr.interop.lora import merge, write_lora
from zsnr.lora import (
    AdaptedUNet,
    LoRA,
    add_text_adapters,
    is_adapter,
    lora_state_dict,
    merge_lora,
)
from zsnr.networks import UNet
from zsnr.pipeline import TextToImage
from zsnr.planning.estimate import Parts, training_pass
from zsnr.planning.memory import LiveBytes, kept_for_backward, size_of, tensors_of
from zsnr.training import EMAConfig, PostHocEMA
from zsnr.weights.ldm_layout import ldm_layers
from zsnr.weights.pretrained import without_weights

EXACT = {"rtol": 0, "atol": 0}
ATTENTIONS = ("to_q", "to_k", "to_v", "to_out.0")
SETTINGS = LoRA(rank=4, alpha=6.0, target_modules=ATTENTIONS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pretrained UNet for pixels, and a frozen text encoder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    UNet(tiny.UNET, channels=12, context_dim=16).unet.save_pretrained(folder / "unet")
    tiny.frozen_conditioner(folder / "text")
    return folder


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """A Stable Diffusion of diffusers, as a folder."""
    folder = tmp_path_factory.mktemp("stable")
    tiny_stable_diffusion(folder)
    return folder


def text(base):
    return tiny.TransformersConditioner(f"{base}/text", tokenizer="open_clip", max_length=8)


def parts(base, **options):
    """Arguments of cells.fit's model."""
    return {"network": str(base), "conditioner": text(base), "lora": SETTINGS, **options}


def fit(base, shards, root, kind="one", **options):
    model = parts(base, **options.pop("model", {}))
    return cells.fit(shards, root, kind, model=model, **options)


def stirred(unet, seed=1):
    """Give adapters weights as training may leave them: B is 0 at first."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if is_adapter(name):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return unet


def inputs(batch=2, channels=12):
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(batch, channels, 8, 8, generator=generator)
    context = torch.randn(batch, 8, 16, generator=generator)
    return x_t, torch.tensor([999, 3])[:batch], Conditioning(context)


# The network


def test_new_adapters_change_nothing_and_are_all_that_is_trained(base):
    plain = UNet(pretrained=str(base)).eval()
    adapted = AdaptedUNet(str(base), SETTINGS).eval()
    torch.testing.assert_close(adapted(*inputs()), plain(*inputs()), **EXACT)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained == [name for name, _ in adapted.named_parameters() if is_adapter(name)]
    assert set(adapted.state_dict()) == set(trained)
    attentions = 4  # two blocks down, middle and up: one transformer of two attentions each
    assert len(trained) == 2 * 4 * 2 * attentions


def test_the_output_is_that_of_the_formula(base):
    plain, adapted = UNet(pretrained=str(base)).eval(), AdaptedUNet(str(base), SETTINGS).eval()
    stirred(adapted)
    for name, module in plain.unet.named_modules():
        if f"{name}.lora_A.weight" in lora_state_dict(adapted):
            A, B = (lora_state_dict(adapted)[f"{name}.lora_{x}.weight"].double() for x in "AB")
            module.weight.data = (module.weight.double() + 6 / 4 * B @ A).float()
    torch.testing.assert_close(adapted(*inputs()), plain(*inputs()), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(
        adapted(*inputs()), UNet(pretrained=str(base)).eval()(*inputs()), atol=1e-2
    )


@pytest.mark.parametrize("targets", [None, ("to_q", "conv1", "proj_in"), "all"])
def test_merged_is_injected(base, targets):
    lora = SETTINGS if targets is None else dataclasses.replace(SETTINGS, target_modules=targets)
    adapted = stirred(AdaptedUNet(str(base), lora).eval())
    merged = merge_lora(adapted)
    assert type(merged) is UNet
    atol = 1e-5 if targets == "all" else 1e-6  # as every layer rounds
    torch.testing.assert_close(merged(*inputs()), adapted(*inputs()), rtol=1e-5, atol=atol)
    again = build(describe(merged), UNet)
    again.load_state_dict(merged.state_dict())
    if targets != "all":
        assert merged.unet.conv_in.weight.data_ptr() == adapted.unet.conv_in.weight.data_ptr()


def test_all_layers_are_those_of_more_than_one_dimension(base):
    plain = UNet(pretrained=str(base))
    wanted = {name for name, weight in plain.unet.named_parameters() if weight.ndim > 1}
    found = lora_state_dict(AdaptedUNet(str(base), LoRA(target_modules="all")))
    assert {name.replace(".lora_A", "") for name in found if "lora_A" in name} == wanted


def test_its_state_dict_is_strict(base):
    adapted = stirred(AdaptedUNet(str(base), SETTINGS))
    again = build(describe(adapted), UNet).eval()
    again.load_state_dict(adapted.state_dict())
    torch.testing.assert_close(again(*inputs()), adapted.eval()(*inputs()), **EXACT)
    few = dict(adapted.state_dict())
    few.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        again.load_state_dict(few)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        again.load_state_dict({**adapted.state_dict(), "more": torch.ones(1)})


def test_nobody_writes_it_as_a_whole_unet(base, tmp_path):
    adapted = stirred(AdaptedUNet(str(base), SETTINGS))
    with pytest.raises(ValueError, match="has adapters .* first merge them"):
        adapted.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has adapters"):
        adapted.unet.state_dict()
    merge_lora(adapted).unet.save_pretrained(tmp_path)
    again = UNet(pretrained=str(tmp_path), subfolder=None).eval()
    torch.testing.assert_close(again(*inputs()), adapted.eval()(*inputs()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_half_precision_has_float32_adapters(base, dtype):
    adapted = stirred(AdaptedUNet(str(base), dataclasses.replace(SETTINGS, base_dtype=dtype)))
    wanted = stirred(AdaptedUNet(str(base), SETTINGS))
    dtypes = {(is_adapter(name), p.dtype) for name, p in adapted.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, getattr(torch, dtype))}
    output = adapted(*inputs())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, wanted(*inputs()), rtol=0.05, atol=0.05)
    output.square().mean().backward()
    assert all((p.grad is not None) == is_adapter(name) for name, p in adapted.named_parameters())
    assert {p.dtype for p in merge_lora(adapted).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0: wanted a whole number, 1 to 10000"),
        ({"rank": 2.5}, "rank=2.5: wanted a whole number"),
        ({"alpha": 0.0}, "alpha=0.0: wanted a finite number above 0"),
        ({"alpha": float("inf")}, "alpha=inf: wanted a finite number"),
        ({"target_modules": ()}, "target_modules=()"),
        ({"target_modules": ("to_q", "")}, "wanted a list"),
        ({"target_modules": "to_q"}, "target_modules='to_q': wanted a list such as"),
        ({"base_dtype": "int8"}, "base_dtype='int8' is unknown"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


def test_wrong_targets_and_bases_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="has no module 'to_z'"):
        AdaptedUNet(str(base), LoRA(target_modules=("to_q", "to_z")))
    with pytest.raises(ValueError, match="'norm1' is of type"):
        AdaptedUNet(str(base), LoRA(target_modules=("norm1",)))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        AdaptedUNet(str(tmp_path), SETTINGS)
    settings = AdaptedUNet(str(base), SETTINGS).settings()
    with pytest.raises(ValueError, match="which cannot be loaded: .* holds no config"):
        AdaptedUNet(**{**settings, "pretrained": str(tmp_path)})
    torch.manual_seed(9)
    UNet(tiny.UNET, channels=12, context_dim=16).unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="has other weights .* than the adapters were trained on"):
        AdaptedUNet(**{**settings, "pretrained": str(tmp_path)})


def test_without_peft_there_is_a_way_out(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'zsnr\[lora\]'"):
        AdaptedUNet(str(base), SETTINGS)


# Variants


VARIANTS = ("lora", "rslora", "dora", "loha", "lokr")
WITH_CONVOLUTIONS = ("to_q", "to_out.0", "conv1", "proj_in")
CLIP = ("q_proj", "out_proj", "fc1")


def change(variant, parts):
    """The change of a linear layer in float64, and the norms of DoRA, from the papers' formulas."""
    p = {name: tensor.double() for name, tensor in parts.items()}
    if variant == "loha":
        return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"]) * 6 / 4
    if variant == "lokr":
        second = p["lokr_w2"] if "lokr_w2" in p else p["lokr_w2_a"] @ p["lokr_w2_b"]
        return torch.kron(p["lokr_w1"], second) * 6 / 4
    return p["lora_B.weight"] @ p["lora_A.weight"] * 6 / (2 if variant == "rslora" else 4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_that_of_its_formula(base, variant):
    settings = dataclasses.replace(SETTINGS, variant=variant)
    plain = UNet(pretrained=str(base)).eval()
    new = AdaptedUNet(str(base), settings)
    torch.testing.assert_close(new(*inputs()), plain(*inputs()), **EXACT)
    adapted = stirred(new)
    state = lora_state_dict(adapted)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    parts = {n.removeprefix(f"{name}."): t for n, t in state.items() if n.startswith(f"{name}.")}
    weight = dict(plain.unet.named_parameters())[f"{name}.weight"].detach().double()
    wanted = weight + change(variant, parts)
    if variant == "dora":
        norms = parts["lora_magnitude_vector.weight"].double()
        wanted = norms[:, None] * wanted / wanted.norm(dim=1, keepdim=True)
    merged = dict(merge_lora(adapted).unet.named_parameters())[f"{name}.weight"]
    torch.testing.assert_close(merged.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_variant_is_the_injected_one(base, variant, dtype):
    settings = LoRA(3, 2.0, WITH_CONVOLUTIONS, dtype, variant)
    adapted = stirred(AdaptedUNet(str(base), settings)).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_rng_state()
        injected = adapted(*inputs())
        assert torch.equal(torch.get_rng_state(), before)  # training draws no global numbers
    tolerance = 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(
        merge_lora(adapted)(*inputs()), injected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_a_variant_resumes_as_the_same_run(stable, shards, tmp_path, variant):
    text_modules = CLIP if variant in ("dora", "lokr") else ()
    lora = dataclasses.replace(SETTINGS, variant=variant, text_encoder_modules=text_modules)

    def go(root, **options):
        model = {
            "codec": AutoencoderKLCodec(str(stable), subfolder="vae"),
            "conditioner": tiny.TransformersConditioner(str(stable)),
            "network": str(stable),
            "lora": lora,
        }
        return cells.fit(shards, root, model=model, steps=3, **options)

    whole = go(tmp_path / "whole")
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, whole["start"][name]) != is_adapter(name), name
    trained = {name.split(".")[0] for name in whole["weights"] if is_adapter(name)}
    assert trained == ({"unet", "conditioner"} if text_modules else {"unet"})
    go(tmp_path, stop_at=2)
    again = go(tmp_path, checkpoint=tmp_path / "checkpoints/step-00000002.ckpt")
    for part in ("weights", "ema"):
        for name, weight in whole[part].items():
            assert torch.equal(weight, again[part][name])
    checkpoint = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert all(is_adapter(name) for name in checkpoint["state_dict"])
    model = read_checkpoint(tmp_path / "checkpoints/last.ckpt", ema=False)
    prompts = ["a cat", "a dog"]
    encoded = model.conditioner(prompts).context
    torch.testing.assert_close(merge(model).conditioner(prompts).context, encoded)
    plain = tiny.TransformersConditioner(str(stable))(prompts).context
    assert torch.equal(encoded, plain) == (not text_modules)


def test_an_older_checkpoint_of_adapters_resumes(run, base, shards, tmp_path):
    checkpoint = torch.load(run["checkpoint"], weights_only=True)
    lora = checkpoint["zsnr"]["network"]["init_args"]["lora"]
    for name in ("variant", "text_encoder_modules", "decompose_factor"):
        del lora[name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    again = fit(base, shards, tmp_path, steps=5, checkpoint=tmp_path / "old.ckpt")
    for name, weight in run["weights"].items():
        assert torch.equal(weight, again["start"][name])


@pytest.mark.parametrize(
    ("text", "lora", "message"),
    [
        ("class", {}, "OpenClip.* has no adapters: wanted a TransformersConditioner"),
        ("new", {}, "wanted a pretrained text encoder"),
        ("stable", {"text_encoder_modules": ("to_q",)}, "the text encoder has no module 'to_q'"),
        ("stable", {"text_encoder_modules": ("mlp",)}, "'mlp' is of type CLIPMLP: wanted linear"),
    ],
)
def test_text_encoders_that_have_no_adapters_are_refused(stable, text, lora, message):
    settings = LoRA(**{"text_encoder_modules": CLIP, **lora})
    conditioners = {
        "class": lambda: OpenClipConditioner("ViT-B-32-quickgelu", "x.safetensors"),
        "new": tiny.conditioner,
        "stable": lambda: tiny.TransformersConditioner(str(stable)),
    }
    with pytest.raises(ValueError, match=message):
        add_text_adapters(conditioners[text](), settings)


def test_a_text_encoder_with_other_weights_is_refused(stable, shards, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(stable, source)
    model = {
        "codec": AutoencoderKLCodec(str(source), subfolder="vae"),
        "conditioner": tiny.TransformersConditioner(str(source)),
        "network": str(source),
        "lora": LoRA(2, text_encoder_modules=CLIP),
    }
    cells.fit(shards, tmp_path, model=model, steps=1)
    path = next((source / "text_encoder").glob("*.safetensors"))
    weights = load_file(path)
    save_file({name: weight + 1 for name, weight in weights.items()}, path, {"format": "pt"})
    message = "has adapters of a text encoder with other weights .* restore the original"
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "checkpoints/last.ckpt")
    again = {**model, "conditioner": tiny.TransformersConditioner(str(source))}
    last = tmp_path / "checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=f"The checkpoint {message}"):
        cells.fit(shards, tmp_path / "again", model=again, steps=2, checkpoint=last)


def test_a_factor_that_has_no_effect_is_refused():
    with pytest.raises(ValueError, match="decompose_factor=4 is for the variant lokr, and this is"):
        LoRA(variant="dora", decompose_factor=4)


# Training


@pytest.fixture(scope="module")
def run(base, shards, tmp_path_factory):
    """Four steps of training, and their checkpoint."""
    root = tmp_path_factory.mktemp("run")
    found = fit(base, shards, root, previews=True)
    return {**found, "checkpoint": root / "checkpoints" / "step-00000004.ckpt"}


def test_training_changes_adapters_alone(run, base):
    for name, weight in run["weights"].items():
        changed = not torch.equal(weight, run["start"][name])
        assert changed == is_adapter(name), name
    plain = dict(UNet(pretrained=str(base)).named_parameters())
    for name, weight in run["weights"].items():
        if not is_adapter(name):
            own = name.removeprefix("unet.").replace(".base_layer.", ".")
            assert torch.equal(weight, plain[own])


def test_the_average_is_exact_and_shares_the_base(run, base):
    for name, weight in run["ema"].items():
        torch.testing.assert_close(weight.double(), run["ema64"][name], rtol=1e-5, atol=1e-6)
    module = cells.module(**parts(base, ema=EMAConfig(0.9)))
    own, averaged = (dict(m.named_parameters()) for m in (module.trained, module.ema))
    for name, parameter in own.items():
        assert (parameter is averaged[name]) == (not is_adapter(name))
    before = size_of(module.parameters())
    module.to(torch.device("cpu"), torch.float64)
    assert size_of(module.parameters()) == 2 * before  # .to() keeps them shared


def test_averages_after_the_fact_are_of_adapters_alone(base, shards, tmp_path):
    config = PostHocEMA(every_n_steps=1)
    fit(base, shards, tmp_path, steps=2, every=1, model={"post_hoc_ema": config, "ema": None})
    name = "step-00000002.ckpt"
    kept = torch.load(tmp_path / "checkpoints" / "snapshots" / name, weights_only=True)
    assert all(is_adapter(weight) for weight in kept["state_dict"])
    assert main(["checkpoint", "average", str(tmp_path), "--sigma-rel", "0.1"]) == 0
    unet = read_checkpoint(tmp_path / "averages" / f"sigma-rel-0.1-{name}").network
    for weight, value in unet.state_dict().items():
        assert torch.equal(value, kept["state_dict"][f"post_hoc.1.unet.{weight}"])


def test_a_checkpoint_holds_adapters_alone(run, base):
    checkpoint = torch.load(run["checkpoint"], weights_only=True)
    assert all(is_adapter(name) for name in checkpoint["state_dict"])
    prefixes = {name.split(".")[0] for name in checkpoint["state_dict"]}
    assert prefixes == {"trained", "ema"}
    adapters = AdaptedUNet(str(base), SETTINGS).state_dict()
    assert len(checkpoint["state_dict"]) == 2 * len(adapters)
    [states] = [state["state"] for state in checkpoint["optimizer_states"]]
    assert len(states) == len(adapters)
    settings = checkpoint["zsnr"]["network"]["init_args"]
    assert settings["pretrained"] == str(base)
    assert settings["lora"]["alpha"] == 6.0


@pytest.mark.parametrize("ema", [True, False])
def test_a_checkpoint_is_a_model_again(run, ema):
    model = read_checkpoint(run["checkpoint"], ema=ema)
    weights = run["ema" if ema else "weights"]
    for name, weight in model.network.named_parameters():
        assert torch.equal(weight, weights[f"unet.{name}"])
    merged = merge(model)
    guided = {"num_steps": 2, "seeds": [0], "progress": False}
    images = [TextToImage(m)(["a cat"], **guided)[0] for m in (model, merged)]
    difference = max(
        abs(a - b) for a, b in zip(*(image.tobytes() for image in images), strict=True)
    )
    assert difference <= 1
    with pytest.raises(ValueError, match="has no adapters"):
        merge(merged)


def test_a_run_with_a_moved_base_goes_on(base, shards, run, tmp_path):
    shutil.copytree(base / "unet", tmp_path / "unet")
    moved = {"network": str(tmp_path)}
    again = fit(base, shards, tmp_path, steps=5, checkpoint=run["checkpoint"], model=moved)
    for name, weight in run["weights"].items():
        assert torch.equal(weight, again["start"][name])


def test_a_moved_base_is_found_and_another_refused(run, base, tmp_path):
    shutil.copytree(base / "unet", tmp_path / "unet")
    model = read_checkpoint(run["checkpoint"], base=str(tmp_path))
    assert model.network.settings()["pretrained"] == str(tmp_path)
    with pytest.raises(ValueError, match="set its new path"):
        read_checkpoint(run["checkpoint"], base=str(tmp_path / "elsewhere"))


def test_a_resumed_run_is_the_same_run(base, shards, run, tmp_path):
    fit(base, shards, tmp_path, stop_at=2)
    again = fit(base, shards, tmp_path, checkpoint=tmp_path / "checkpoints/step-00000002.ckpt")
    for part in ("weights", "ema"):
        for name, weight in run[part].items():
            assert torch.equal(weight, again[part][name])


def test_runs_of_other_kinds_are_not_resumed(base, shards, run, tmp_path):
    torch.manual_seed(9)
    UNet(tiny.UNET, channels=12, context_dim=16).unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(
        ValueError, match="trained on a UNet with other weights .* than model.network"
    ):
        fit(base, shards, tmp_path, checkpoint=run["checkpoint"], model={"network": str(tmp_path)})
    other = dataclasses.replace(SETTINGS, alpha=1.0)
    with pytest.raises(ValueError, match=r"network has \{'lora': .*'alpha': 6.0.* the config has"):
        fit(base, shards, tmp_path / "a", checkpoint=run["checkpoint"], model={"lora": other})
    with pytest.raises(ValueError, match="holds adapters: set model.lora, as the run"):
        fit(base, shards, tmp_path / "b", checkpoint=run["checkpoint"], model={"lora": None})
    whole = {"lora": None}
    fit(base, shards, tmp_path / "whole", steps=1, model=whole)
    with pytest.raises(ValueError, match="holds a whole UNet: unset model.lora, as the run"):
        fit(base, shards, tmp_path, checkpoint=tmp_path / "whole/checkpoints/last.ckpt")
    with pytest.raises(ValueError, match="FullyShardedStrategy: adapters"):
        fit(base, shards, tmp_path / "c", "sharded")


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"gradient_checkpointing": True}},
        {"data_options": {"max_batch_size_per_device": 4}},
    ],
)
def test_options_change_nothing_but_rounding(base, shards, run, tmp_path, options):
    other = fit(base, shards, tmp_path, **options)
    for a, b in zip(run["logged"], other["logged"], strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-4)
    for name, weight in run["weights"].items():
        torch.testing.assert_close(weight, other["weights"][name], rtol=1e-3, atol=5e-4)


def fit_on_ranks(base, shards, root):
    return fit(base, shards, root, "ddp", previews=True)


def test_two_ranks_train_the_same(base, shards, run, ranks, tmp_path):
    for other in ranks[2](fit_on_ranks, base, shards, tmp_path):
        for a, b in zip(run["logged"], other["logged"], strict=True):
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        for name, weight in run["weights"].items():
            torch.testing.assert_close(weight, other["weights"][name], rtol=1e-3, atol=5e-4)
        for name, weight in other["ema"].items():
            wanted = other["ema64"][name]
            torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-6)


# The command line


@pytest.fixture(scope="module")
def config(stable, shards, tmp_path_factory):
    """A YAML of fit, in a folder to write to."""
    folder = tmp_path_factory.mktemp("cli")
    encoder = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    classes = {
        "codec": ("AutoencoderKLCodec", {"subfolder": "vae"}),
        "conditioner": ("TransformersConditioner", encoder),
    }
    values = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder / "run"),
        },
        "model": {
            **{
                name: {"class_path": cls, "init_args": {"pretrained": str(stable), **arguments}}
                for name, (cls, arguments) in classes.items()
            },
            "network": str(stable),
            "lora": {"rank": 4, "alpha": 6, "target_modules": ["to_q", "to_v"]},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
            "ema": {"decay": 0.5},
            "sampling": {"num_steps": 2},
        },
        "data": {
            "train": f"{shards}/train-*.tar",
            "val": f"{shards}/val-*.tar",
            "image_size": 16,
            "batch_size": 4,
            "num_workers": 0,
            "prompts": [{"prompt": "grey"}],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


@pytest.mark.peer
def test_from_yaml_to_diffusers(config, stable, capsys):
    yaml_file = str(config / "config.yaml")
    assert main(["fit", "-c", yaml_file]) == 0
    more = ["--ckpt_path", "last", "--trainer.max_steps", "4"]
    assert main(["fit", "-c", yaml_file, *more]) == 0
    checkpoint = str(config / "run" / "checkpoints" / "last.ckpt")
    assert main(["validate", "-c", yaml_file, "--ckpt_path", checkpoint]) == 0
    arguments = ["-c", yaml_file, "--ckpt_path", checkpoint, "--output", str(config / "out")]
    assert main(["predict", *arguments]) == 0
    assert len(list((config / "out").glob("*.png"))) == 1
    capsys.readouterr()

    model = read_checkpoint(checkpoint)
    assert model.network.lora == LoRA(4, 6.0, ("to_q", "to_v"))
    path = write_lora(model, config / "own.safetensors")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    wanted = our_images(model, latents, 5)
    found = their_images(stable, latents, 5, str(path))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (their_images(stable, latents, 5) - wanted).abs().max() > 1e-3

    capsys.readouterr()
    moved = config / "moved"
    shutil.copytree(stable, moved)
    names = {"lora": "a.safetensors", "lora-kohya": "k.safetensors", "diffusers": "whole"}
    for kind, name in names.items():
        more = ["--merge", "--base", str(moved)] if kind == "diffusers" else []
        output = str(config / name)
        assert main(["export", checkpoint, "--output", output, "--format", kind, *more]) == 0
        assert capsys.readouterr().out.strip() == output
    for kind in ("lora", "lora-kohya"):
        found = their_images(stable, latents, 5, str(config / names[kind]))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    whole = their_images(config / "whole", latents, 5)
    torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-4)
    with safe_open(path, "pt") as own, safe_open(config / "a.safetensors", "pt") as exported:
        assert {*own.keys()} == {*exported.keys()}
        facts = json.loads(exported.metadata()["zsnr.run"])
    assert facts["global_step"] == 4
    assert facts["start"]["unet"] == "/".join(str(stable).split("/")[-2:])  # no place on a disk

    capsys.readouterr()
    wrong = {
        "has LoRA adapters: merge them": [checkpoint, "--output", "b"],
        "merge them (`zsnr export --merge`": [checkpoint, "--output", "b.safetensors"],
        "--merge writes a whole model": [
            *(checkpoint, "--output", "b.safetensors", "--format", "lora", "--merge")
        ],
        "has no adapters to write": [str(stable), "--output", "b", "--format", "lora"],
        "omit --merge": [str(stable), "--output", "b", "--merge"],
        "ends in .safetensors": [checkpoint, "--output", "b", "--format", "lora-kohya"],
    }
    for message, arguments in wrong.items():
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.network", "{block_out_channels: [16, 32]}"], "adapts a pretrained UNet"),
        (
            ["--model.conditioner.init_args.trainable", "true"],
            "the conditioner's trainable is true: set",
        ),
        (["--model.lora.rank", "0"], "lora.rank=0"),
        (["--model.lora.rang", "4"], "rang"),
        (
            ["--model.lora.base_dtype", "float16", "--trainer.precision", "bf16-mixed"],
            "set it to bfloat16 or float32",
        ),
        (["--trainer.strategy", "zsnr.training.FullyShardedStrategy"], "auto or ddp"),
        (["--model.lora.target_modules", "[to_z]"], "no module 'to_z'"),
    ],
)
def test_wrong_input(config, capsys, arguments, message):
    root = ["--trainer.default_root_dir", str(config / "wrong")]
    assert main(["fit", "-c", str(config / "config.yaml"), *root, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plan_counts_adapters_alone(config, stable, capsys, dtype):
    capsys.readouterr()
    options = ["--model.lora.base_dtype", dtype, "--json"]
    assert main(["plan", str(config / "config.yaml"), *options]) == 0
    sizes = json.loads(capsys.readouterr().out)["bytes_per_rank"]
    unet = AdaptedUNet(str(stable), LoRA(4, 6.0, ("to_q", "to_v"), dtype))
    adapters = size_of(p for p in unet.parameters() if p.requires_grad)
    assert sizes["parameters"] == size_of(unet.parameters())
    assert sizes["gradients"] == sizes["average"] == adapters
    assert sizes["optimizer"] == 2 * adapters


@pytest.mark.parametrize("checkpointing", [False, True])
def test_planned_activations_are_those_of_a_real_pass(base, checkpointing):
    with torch.device("meta"), without_weights():
        planned = AdaptedUNet(str(base), SETTINGS)
    frozen = text(base).load()
    plan = Parts(planned, frozen, PixelCodec(2), 32, None, False, True, True, True, 2.0, True)
    kept, peak = training_pass(plan, 3, checkpointing, None)
    unet = AdaptedUNet(str(base), SETTINGS).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    for parameter in unet.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    cond, x_t = frozen([""] * 3), torch.randn(3, 12, 16, 16)
    known = tensors_of(unet)
    live = LiveBytes([*known, *(p.grad for p in unet.parameters() if p.grad is not None)])
    with live:
        with kept_for_backward(known) as found:
            loss = unet(x_t, torch.tensor([0, 5, 999]), cond).square().mean()
        loss.backward()
    assert kept == pytest.approx(sum(found.values()), rel=0.1)
    assert peak == pytest.approx(live.peak, rel=0.1)


def test_plan_sees_no_way_out_in_shards(config, capsys):
    capsys.readouterr()
    arguments = ["--ranks", "4", "--memory", "0.0001", "--json"]
    assert main(["plan", str(config / "config.yaml"), *arguments]) == 1
    assert "no way out on 4 ranks" in json.loads(capsys.readouterr().out)["way_out"]
    sharded = ["--trainer.strategy", "zsnr.training.FullyShardedStrategy"]
    assert main(["plan", str(config / "config.yaml"), *sharded]) == 2
    assert "auto or ddp" in capsys.readouterr().err


# Files that others read


def adapted(stable, **options):
    """The Stable Diffusion with stirred adapters."""
    model = read_diffusers_folder(str(stable))
    unet = AdaptedUNet(str(stable), dataclasses.replace(SETTINGS, **options))
    return dataclasses.replace(model, network=stirred(unet.eval()))


def our_images(model, latents, num_steps):
    """DDIM, trailing, on the model's schedule; pixels in [0, 1]."""
    cond = model.conditioner(["a cat", "dog"])
    uncond = model.conditioner.null().expand(2)
    denoiser = Denoiser(
        model.network, model.schedule, model.prediction_type, cond, uncond, Guidance(4.0, 0.7)
    )
    with torch.no_grad():
        x_0 = DDIM().sample(denoiser, model.schedule, latents, trailing(num_steps))
        return (model.codec.decode(x_0) / 2 + 0.5).clamp(0, 1)


def their_images(folder, latents, num_steps, lora=None):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    images = pipe(
        ["a cat", "dog"],
        latents=latents,
        num_inference_steps=num_steps,
        guidance_scale=4.0,
        guidance_rescale=0.7,
        height=16,
        width=16,
        output_type="np",
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.peer
@pytest.mark.parametrize("num_steps", [4, 10])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_gives_our_images(stable, tmp_path, layout, num_steps):
    model = adapted(stable)
    assert model.schedule.zero_terminal_snr
    path = write_lora(model, tmp_path / "own.safetensors", layout=layout)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    wanted = our_images(model, latents, num_steps)
    found = their_images(stable, latents, num_steps, str(path))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    without = their_images(stable, latents, num_steps)
    assert (without - wanted).abs().max() > 1e-2
    merged = our_images(merge(model), latents, num_steps)
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5)


def with_text(stable, **options):
    """The Stable Diffusion with stirred adapters of UNet and text encoder."""
    settings = dataclasses.replace(SETTINGS, text_encoder_modules=CLIP, **options)
    model = adapted(stable, **dataclasses.asdict(settings))
    add_text_adapters(model.conditioner, settings)
    stirred(model.conditioner, 2)
    return model


@pytest.mark.peer
@pytest.mark.parametrize(
    ("variant", "layout"),  # diffusers leaves the dora_scale of kohya's layout out
    [("lora", "diffusers"), ("rslora", "diffusers"), ("dora", "diffusers"), ("rslora", "kohya")],
)
def test_diffusers_reads_a_variant_and_its_text_encoder(stable, tmp_path, variant, layout):
    model = with_text(stable, variant=variant, target_modules="all")
    path = write_lora(model, tmp_path / "own.safetensors", layout=layout)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    wanted = our_images(model, latents, 4)
    found = their_images(stable, latents, 4, str(path))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    without = our_images(dataclasses.replace(merge(model), conditioner=plain(stable)), latents, 4)
    assert (without - wanted).abs().max() > 1e-3  # the text encoder's adapters matter


def plain(stable):
    return read_diffusers_folder(str(stable)).conditioner


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_written_variant_is_merged_as_it_was_trained(stable, tmp_path, variant, layout):
    model = with_text(stable, variant=variant, target_modules="all")
    if layout == "diffusers" and variant in ("loha", "lokr"):
        with pytest.raises(ValueError, match="has no layout for adapters of the variant lo"):
            write_lora(model, tmp_path / "own.safetensors", layout=layout)
        return
    path = write_lora(model, tmp_path / "own.safetensors", layout=layout)
    read = read_diffusers_folder(str(stable))
    merge_adapter(read, path)
    wanted = merge(model)
    pairs = [(read.network, wanted.network), (read.conditioner, wanted.conditioner)]
    for found, other in pairs:
        weights = dict(other.named_parameters())
        for name, weight in found.named_parameters():
            torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-6)
    with safe_open(path, "pt") as file:
        module = file.metadata().get("ss_network_module")
    lycoris = variant in ("dora", "loha", "lokr")
    named = "lycoris.kohya" if lycoris else "networks.lora"
    assert module == (named if layout == "kohya" else None)


@pytest.mark.peer
def test_a_folder_is_read_by_diffusers(stable, tmp_path):
    path = write_lora(adapted(stable), tmp_path / "lora", dtype="float16")
    assert path == tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    found = their_images(stable, latents, 4, str(path.parent))
    wanted = our_images(adapted(stable), latents, 4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2)


@pytest.mark.peer
def test_merged_is_exported_like_any_other(stable, tmp_path):
    model = with_text(stable, variant="lokr")
    export_diffusers(merge(model), tmp_path / "out", dtype="float32", facts={})
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    found = their_images(tmp_path / "out", latents, 4)
    torch.testing.assert_close(found, our_images(model, latents, 4), rtol=0, atol=1e-4)


def test_the_diffusers_layout(stable, tmp_path):
    model = adapted(stable)
    tensors = load_file(write_lora(model, tmp_path / "a.safetensors"))
    own = lora_state_dict(model.network)
    assert set(tensors) == {f"unet.{name}" for name in own}
    for name, tensor in own.items():
        factor = 6 / 4 if "lora_B" in name else 1
        torch.testing.assert_close(tensors[f"unet.{name}"], factor * tensor, **EXACT)


def test_the_kohya_layout(stable, tmp_path):
    model = adapted(stable)
    path = write_lora(
        model,
        tmp_path / "a.safetensors",
        layout="kohya",
        dtype="bfloat16",
        metadata={"modelspec.author": "somebody", "modelspec.title": "A cat"},
    )
    tensors = load_file(path)
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    own = lora_state_dict(model.network)
    for part, ours in (("lora_down", "lora_A"), ("lora_up", "lora_B")):
        wanted = own[f"{module}.{ours}.weight"].bfloat16()
        assert torch.equal(tensors[f"{name}.{part}.weight"], wanted)
    assert tensors[f"{name}.alpha"].item() == 6.0
    assert len(tensors) == len(own) / 2 * 3
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert facts["ss_network_module"] == "networks.lora"
    assert (facts["ss_network_dim"], facts["ss_network_alpha"]) == ("4", "6")
    assert facts["ss_v_parameterization"] == facts["ss_zero_terminal_snr"] == "True"
    assert facts["modelspec.prediction_type"] == "v"
    assert facts["modelspec.title"] == "A cat"
    assert facts["modelspec.author"] == "somebody"
    assert NoiseSchedule(**json.loads(facts["zsnr"])["schedule"]) == model.schedule


@pytest.mark.parametrize(
    ("width", "prediction_type", "version", "architecture"),
    [
        (768, "v_prediction", ("sd_v1", "False"), "stable-diffusion-v1/lora"),
        (1024, "v_prediction", ("sd_v2", "True"), "stable-diffusion-v2-768-v/lora"),
        (1024, "sample", ("sd_v2", "True"), "stable-diffusion-v2-512/lora"),
        (768, "flow", ("sd_v1", "False"), "stable-diffusion-v1/lora"),
    ],
)
def test_versions_are_named(tmp_path, width, prediction_type, version, architecture):
    UNet(tiny.UNET, channels=4, context_dim=width).unet.save_pretrained(tmp_path / "unet")
    unet = AdaptedUNet(str(tmp_path), SETTINGS)
    model = Model(PixelCodec(2), tiny.conditioner(), unet, NoiseSchedule(), prediction_type, 512)
    path = write_lora(model, tmp_path / "a.safetensors", layout="kohya")
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    assert (facts["ss_base_model_version"], facts["ss_v2"]) == version
    assert facts["modelspec.architecture"] == architecture
    assert facts["modelspec.resolution"] == "512x512"
    assert ("ss_v_parameterization" in facts) == (prediction_type != "flow")


XL = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


@pytest.mark.peer
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_diffusers_reads_adapters_of_sdxl(tmp_path, layout):
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(**XL).save_pretrained(tmp_path / "unet")
    lora = LoRA(4, 6.0, "all")
    unet = stirred(AdaptedUNet(str(tmp_path), lora).eval())
    model = Model(PixelCodec(2), tiny.conditioner(), unet, NoiseSchedule(), "v_prediction", 1024)
    path = write_lora(model, tmp_path / "xl.safetensors", layout=layout)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    tensors, alphas = StableDiffusionXLPipeline.lora_state_dict(
        str(path), unet_config=theirs.config
    )
    StableDiffusionXLPipeline.load_lora_into_unet(tensors, alphas, theirs)
    x_t, t, cond = inputs(channels=4)
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    for network, close in ((theirs, True), (UNet(pretrained=str(tmp_path)).eval().unet, False)):
        with torch.no_grad():
            mine, other = (
                net(x_t, t, cond.context, added_cond_kwargs=added).sample
                for net in (unet.unet, network)
            )
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-5) == close
    if layout == "kohya":
        with safe_open(path, "pt") as file:
            names, facts = set(file.keys()), file.metadata()
        # as kohya's scripts and ComfyUI name the first attention of SDXL
        assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in names
        assert "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k.alpha" in names
        assert "lora_unet_output_blocks_0_1_proj_in.lora_down.weight" in names
        assert facts["ss_base_model_version"] == "sdxl_base_v1-0"
        assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_marks_of_whole_models_would_be_refused(stable, tmp_path):
    """Why LoRA files carry no empty v_pred and ztsnr."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    for layout in ("diffusers", "kohya"):
        path = write_lora(adapted(stable), tmp_path / f"{layout}.safetensors", layout=layout)
        tensors = load_file(path)
        assert not {"v_pred", "ztsnr"} & set(tensors)
        save_file({**tensors, "v_pred": torch.tensor([])}, tmp_path / f"{layout}-v.safetensors")
        pipe = StableDiffusionPipeline.from_pretrained(stable, safety_checker=None)
        with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
            pipe.load_lora_weights(str(tmp_path / f"{layout}-v.safetensors"))


def test_wrong_exports_are_refused(stable, tmp_path):
    model = adapted(stable)
    taken = write_lora(model, tmp_path / "a.safetensors")
    before = taken.read_bytes()
    for options, message in (
        ({}, "exists: choose another name"),
        ({"layout": "civitai"}, "wanted 'diffusers' or 'kohya'"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"metadata": {"steps": 3}}, "metadata 'steps' is a int: wanted a text"),
    ):
        path = taken if not options else tmp_path / "b.safetensors"
        with pytest.raises(ValueError, match=message):
            write_lora(model, path, **options)
    with pytest.raises(ValueError, match="wanted a file NAME.safetensors"):
        write_lora(model, tmp_path / "folder", layout="kohya")
    with pytest.raises(ValueError, match="has no adapters"):
        write_lora(read_diffusers_folder(str(stable)), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="no name for the weight down_blocks.0.motion.weight"):
        ldm_layers(["down_blocks.0.motion"], model.network.unet.config)
    assert taken.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_a_precision_cannot_hold_is_refused(stable, tmp_path):
    model = adapted(stable)
    next(iter(lora_state_dict(model.network).values())).view(-1)[0] = 1e6
    with pytest.raises(ValueError, match="float16 cannot hold"):
        write_lora(model, tmp_path / "a.safetensors", dtype="float16")
    assert not [*tmp_path.iterdir()]


def test_a_kill_leaves_no_half_of_a_file(stable, tmp_path, monkeypatch):
    import safetensors.torch

    def dies(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        write_lora(adapted(stable), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.peer
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_adapters_of_sdxl_are_trained_and_read_by_diffusers(tmp_path, layout):
    from diffusers import StableDiffusionXLPipeline

    source = str(tmp_path / "xl")
    tiny.sdxl_folder(source)
    tiny.write_shards(tmp_path / "shards", [7, 6])
    tiny.write_shards(tmp_path / "shards", [5], "val")
    options = {
        "codec": AutoencoderKLCodec(source, subfolder="vae"),
        "conditioner": SDXLConditioner(source),
        "network": source,
        "lora": dataclasses.replace(SETTINGS, text_encoder_modules=CLIP),
        "optimizer": lambda p: torch.optim.AdamW(p, lr=0.05),
    }
    cells.fit(tmp_path / "shards", tmp_path, model=options)
    model = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    adapted = {name.split(".")[0] for name in lora_state_dict(model.conditioner)}
    assert adapted == {"encoder", "encoder_2"}
    prompts, settings = ["a cat", "dog"], {"num_steps": 10, "guidance": Guidance(4.0, 0.7)}
    images = TextToImage(model)(prompts, seeds=[5, 6], sampler="ddim", **settings, progress=False)
    start = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    largest = []
    for lora in (write_lora(model, tmp_path / "own.safetensors", layout=layout), None):
        pipe = StableDiffusionXLPipeline.from_pretrained(source, add_watermarker=False)
        if lora is not None:
            pipe.load_lora_weights(str(lora))
        wanted = pipe(
            prompts,
            latents=torch.cat(start),
            num_inference_steps=10,
            guidance_scale=4.0,
            guidance_rescale=0.7,
            height=16,
            width=16,
        ).images
        pairs = [
            zip(a.tobytes(), b.tobytes(), strict=True) for a, b in zip(images, wanted, strict=True)
        ]
        largest.append(max(abs(a - b) for pair in pairs for a, b in pair))
    assert largest[0] <= 1
    assert largest[1] > 1


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_the_doctor_finds_the_fix_in_it(stable, tmp_path, capsys, layout):
    path = write_lora(adapted(stable), tmp_path / "a.safetensors", layout=layout)
    capsys.readouterr()
    assert main(["doctor", str(path), "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    assert diagnosis["verdict"] == "fixed"
    assert "LoRA" in diagnosis["facts"]["model"]


def test_the_doctor_reads_a_checkpoint_of_adapters(run, capsys):
    capsys.readouterr()
    assert main(["doctor", str(run["checkpoint"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "fixed"
