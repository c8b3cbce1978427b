"""Single files in the ldm layout, out and in."""

import json
import logging
import shutil
import struct
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from zsnr import Guidance, NoiseSchedule
from zsnr.checkpoints import read_checkpoint
from zsnr.checkpoints.checkpoint_file import describe_model, sampling_of
from zsnr.cli import main
from zsnr.codecs import AutoencoderKLCodec, PixelCodec
from zsnr.conditioning import NullConditioner, TransformersConditioner
from zsnr.conditioning.tokenizers import bpe_tokenizer
from zsnr.doctor.examine import examine
from zsnr.interop import read_diffusers_folder, read_single_file, write_single_file
from zsnr.interop.declarations import read_declaration, settle
from zsnr.interop.export import export_diffusers
from zsnr.interop.models import read_model
from zsnr.interop.single_file import check_single_file
from zsnr.networks import UNet
from zsnr.pipeline import TextToImage
from zsnr.sampling import Sampling, choose_sampling, describe_sampling
from zsnr.training.deferred import defer, deferred_weights
from zsnr.weights import ldm_file as layout
from zsnr.weights.ldm_layout import to_ldm

FAMILIES = ("v1", "v2", "xl")
PROMPTS = ["", "a black cat at night", "Caf\u00e9, 35mm photo; it's 8k!", "word " * 90]
RELEASED = json.loads(Path(layout.__file__).with_name("public_models.json").read_text())


def declared(path):
    return settle(path, read_declaration(path)[1])


def clip_tokenizer(**options):
    """Make transformers' CLIPTokenizer from the vocabulary that open_clip ships."""
    import open_clip
    from transformers import CLIPTokenizer

    bpe = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in bpe.encoder.items()}
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.__getitem__)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, **options)


def stable_diffusion(folder, family):
    """A small Stable Diffusion of diffusers, with random weights and CLIP's tokenizer."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    xl = family == "xl"
    blocks = [not xl, True, xl]
    sizes = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
        "transformer_layers_per_block": (1, 2, 3),
    }
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in blocks],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(blocks)],
        cross_attention_dim=40 if xl else 16,
        attention_head_dim=2 if family == "v1" else (2, 4, 4),
        use_linear_projection=family != "v1",
        norm_num_groups=8,
        **(sizes if xl else {}),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.13025 if xl else 0.18215,
    )
    text = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    act = "gelu" if family == "v2" else "quick_gelu"
    parts = {
        "unet": unet,
        "vae": vae,
        "text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=16, hidden_act=act, **text)),
    }
    zeros = {"pad_token": "!"}
    tokenizers = {
        "tokenizer": clip_tokenizer(model_max_length=77, **(zeros if family == "v2" else {}))
    }
    if xl:
        config = CLIPTextConfig(hidden_size=24, projection_dim=20, hidden_act="gelu", **text)
        parts["text_encoder_2"] = CLIPTextModelWithProjection(config)
        tokenizers["tokenizer_2"] = clip_tokenizer(model_max_length=77, **zeros)
    for module in parts.values():
        for parameter in module.parameters():  # zeros and ones would hide a mistaken name
            torch.nn.init.normal_(parameter, std=0.1)
    others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    cls = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    pipe = cls(
        **parts,
        **tokenizers,
        scheduler=DDIMScheduler(**tiny.SCHEDULER),
        **({"add_watermarker": False} if xl else others),
    )
    pipe.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in made.items():
        stable_diffusion(folder, family)
    return made


@pytest.fixture(scope="module", autouse=True)
def small_public(folders):
    """Let the public models be the small ones."""
    with pytest.MonkeyPatch.context() as patch:
        for family, folder in folders.items():
            patch.setitem(layout.PUBLIC, family, tiny.sizes_of(folder, family))
        yield


@pytest.fixture(scope="module")
def models(folders):
    return {family: read_diffusers_folder(str(folder)) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    made = {}
    for family, model in models.items():
        made[family] = tmp_path_factory.mktemp("files") / f"{family}.safetensors"
        write_single_file(model, made[family])
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_needs_what_its_folder_needs(folders, files, family, capsys):
    needs = []
    for source in (folders[family], files[family]):
        assert main(["plan", str(source), "--predict", "--height", "32", "--json"]) == 0
        needs.append(json.loads(capsys.readouterr().out))
    names = ("weights", "working", "rows", "dtypes")
    assert [needs[0][name] for name in names] == [needs[1][name] for name in names]


def test_a_plan_of_sampling_takes_another_vae(folders, files, tmp_path, capsys):
    from diffusers import AutoencoderKL

    small = AutoencoderKL.from_pretrained(folders["v1"], subfolder="vae")
    wide = AutoencoderKL.from_config({**small.config, "block_out_channels": (16, 32)})
    wide.save_pretrained(tmp_path / "wide")
    needs = []
    for vae in ([], ["--vae", str(tmp_path / "wide")]):
        assert main(["plan", str(files["v1"]), "--predict", *vae, "--json"]) == 0
        needs.append(json.loads(capsys.readouterr().out)["weights"])
    numbers = [sum(p.numel() for p in vae.parameters()) for vae in (small, wide)]
    assert needs[1]["vae"] - needs[0]["vae"] == 4 * (numbers[1] - numbers[0])


def test_a_plan_of_sampling_may_be_told_what_a_file_does_not_declare(files, tmp_path, capsys):
    def without_marks(tensors):
        return {name: tensor for name, tensor in tensors.items() if tensor.numel()}

    path = rewrite(files["v2"], tmp_path / "v2.safetensors", {}, without_marks)
    assert main(["plan", path, "--predict"]) == 2
    assert "with --prediction-type on the command line" in capsys.readouterr().err
    told = ["--prediction-type", "v_prediction", "--json"]
    assert main(["plan", path, "--predict", *told]) == 0
    assert json.loads(capsys.readouterr().out)["height"] == 768


def state(model):
    """All weights of a model."""
    parts = {"unet": model.network.unet, "vae": model.codec.vae, "text": model.conditioner.encoder}
    if "encoder_2" in model.conditioner.parts:
        parts["text_2"] = model.conditioner.encoder_2
    return {f"{k}.{n}": w for k, part in parts.items() for n, w in part.state_dict().items()}


def load_all(source):
    model = read_single_file(source)
    model.codec.load()
    model.conditioner.load()


def images(source, **options):
    pipe = TextToImage(source) if not isinstance(source, str) else None
    pipe = pipe or TextToImage.from_pretrained(source, device="cpu", **options)
    made = pipe(
        ["a black cat", "dog"],
        seeds=[5, 6],
        num_steps=4,
        guidance=Guidance(4.0, 0.7),
        progress=False,
    )
    return [np.asarray(image) for image in made]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_read_once_they_are_sharded_are_the_same(
    folders, files, tmp_path, family, dtype
):
    path = tmp_path / "half.safetensors"
    half = {name: weight.to(dtype) for name, weight in load_file(files[family]).items()}
    rewrite(files[family], path, change=lambda _: half)
    for source in (str(folders[family]), str(path)):
        make = partial(UNet, pretrained=source)
        with deferred_weights():
            deferred = defer(make, source)
        assert all(weight.is_meta for weight in deferred.unet.parameters())
        unet = deferred.unet.to_empty(device="cpu")
        deferred.fill(unet)
        wanted = make().state_dict()
        for name, weight in unet.state_dict().items():
            assert torch.equal(weight, wanted[name].float())


def rewrite(source, target, metadata=None, change=None):
    """Write a file again with other metadata (None = its own) and tensors."""
    with safe_open(source, "pt") as file:
        own = file.metadata()
    tensors = load_file(source)
    if change is not None:
        tensors = change(tensors)
    save_file(tensors, target, own if metadata is None else metadata)
    return str(target)


@pytest.mark.peer
@pytest.mark.parametrize(("name", "options"), [("clip", {}), ("open_clip", {"pad_token": "!"})])
def test_tokenizers_are_those_of_transformers(name, options):
    theirs = clip_tokenizer(**options)
    # Where "!" is the name of padding, transformers takes every one in a prompt for it.
    prompts = [prompt.replace("!", "") if options else prompt for prompt in PROMPTS]
    for length in (77, 8):
        wanted = theirs(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        ids, mask = bpe_tokenizer(name, length)[0](prompts)
        assert ids.equal(wanted.input_ids)
        assert mask.equal(wanted.attention_mask.bool())
        assert ids[-1, -1] == 49407  # cut, with its end token
        assert mask[-1].all()


@pytest.mark.peer
@pytest.mark.parametrize("family", RELEASED)
def test_public_models_have_their_well_known_names(family, monkeypatch):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as theirs
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    public, prefixes = RELEASED[family], layout.PREFIXES[family]
    monkeypatch.setitem(layout.PUBLIC, family, public)
    file = {}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(public["unet"])
        vae = AutoencoderKL.from_config(public["vae"])
        texts = {"text_encoder": CLIPTextModel(CLIPTextConfig(**public["text_encoder"]))}
        if family == "xl":
            config = CLIPTextConfig(**public["text_encoder_2"])
            texts["text_encoder_2"] = CLIPTextModelWithProjection(config)
    for part, model in {"unet": unet, "vae": vae, **texts}.items():
        state = model.state_dict()
        file |= to_ldm(state, layout.part_names(family, part, state))

    def shapes(weights):
        return {k.removeprefix("text_model."): tuple(w.shape) for k, w in weights.items()}

    back = theirs.convert_ldm_unet_checkpoint(dict(file), dict(unet.config))
    assert shapes(back) == shapes(unet.state_dict())
    back = theirs.convert_ldm_vae_checkpoint(dict(file), dict(vae.config))
    assert shapes(back) == shapes(vae.state_dict())
    for part, text in texts.items():
        if prefixes[part].endswith(".transformer."):
            back = theirs.convert_ldm_clip_checkpoint(file)
        else:
            back = theirs.convert_open_clip_checkpoint(text, file, prefixes[part])
        assert shapes(back) == shapes(text.state_dict())
    kind = theirs.infer_diffusers_model_type(file)
    assert kind == {"v1": "v1", "v2": "v2", "xl": "xl_base"}[family]

    known = {  # as the releases have them
        "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "model.diffusion_model.time_embed.2.weight": (1280, 1280),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
    }
    if family == "xl":
        known |= {
            "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
            "model.diffusion_model.input_blocks.6.0.op.weight": (640, 640, 3, 3),
            "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
            "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (
                3840,
                1280,
            ),
            "conditioner.embedders.1.model.text_projection": (1280, 1280),
        }
    else:
        square = () if family == "v2" else (1, 1)
        known |= {
            "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
            "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
            "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, *square),
        }
    for name, shape in known.items():
        assert tuple(file[name].shape) == shape, name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_out_comes_back(models, files, family):
    before, after = models[family], read_single_file(str(files[family]))
    ours, theirs = state(before), state(after)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert after.schedule.alphas_cumprod.equal(before.schedule.alphas_cumprod)
    assert after.prediction_type == before.prediction_type == "v_prediction"
    assert after.image_size == before.image_size == 16
    assert after.codec.scale == before.codec.scale
    for mine, other in zip(images(before), images(str(files[family])), strict=True):
        assert np.array_equal(mine, other)


@pytest.mark.peer
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_it(folders, files, family):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    cls = StableDiffusionXLPipeline if family == "xl" else StableDiffusionPipeline
    none = {"add_watermarker": False} if family == "xl" else {"safety_checker": None}
    options = {"config": str(folders[family]), "local_files_only": True, **none}
    theirs = cls.from_single_file(str(files[family]), **options)
    assert theirs.text_encoder.config.hidden_act == ("gelu" if family == "v2" else "quick_gelu")
    theirs.scheduler = DDIMScheduler(**tiny.SCHEDULER)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.cat(
        [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 6)]
    )
    wanted = theirs(
        ["a black cat", "dog"],
        latents=latents,
        num_inference_steps=4,
        guidance_scale=4.0,
        guidance_rescale=0.7,
        height=16,
        width=16,
        output_type="np",
    ).images
    for mine, other in zip(images(str(files[family])), wanted, strict=True):
        assert np.abs(mine / 255 - other).max() <= 1 / 255


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_precisions(models, tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    write_single_file(models["v1"], path, dtype=dtype)
    stored = load_file(path)
    assert {t.dtype for name, t in stored.items() if t.numel()} == {getattr(torch, dtype)}
    before, after = state(models["v1"]), state(read_single_file(str(path)))
    for name, weight in before.items():
        assert after[name].dtype == torch.float32
        assert after[name].equal(weight.to(getattr(torch, dtype)).float())


def test_what_a_precision_cannot_hold_is_refused(models, tmp_path):
    model = replace(models["v1"], network=UNet(models["v1"].network.settings()["config"]))
    with torch.no_grad():
        model.network.unet.conv_in.weight[0, 0, 0, 0] = 1e5
    with pytest.raises(ValueError, match=r"input_blocks\.0\.0\.weight .* use bfloat16"):
        write_single_file(model, tmp_path / "x.safetensors", dtype="float16")
    with torch.no_grad():
        model.network.unet.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        write_single_file(model, tmp_path / "x.safetensors")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("zero", "prediction_type", "marks"),
    [
        (True, "v_prediction", {"v_pred", "ztsnr"}),
        (False, "v_prediction", {"v_pred"}),
        (False, "epsilon", set()),
    ],
)
def test_marks_and_metadata(models, tmp_path, zero, prediction_type, marks):
    path = tmp_path / "night.safetensors"
    schedule = NoiseSchedule(zero_terminal_snr=zero)
    model = replace(models["v2"], schedule=schedule, prediction_type=prediction_type)
    said = {"modelspec.author": "me", "modelspec.prediction_type": "wrong"}
    write_single_file(model, path, metadata=said)
    with safe_open(path, "pt") as file:
        empty = {name for name in file.keys() if file.get_tensor(name).numel() == 0}  # noqa: SIM118
        metadata = file.metadata()
    assert empty == marks
    v = prediction_type == "v_prediction"
    wanted = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "night",
        "modelspec.author": "me",
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.architecture": f"stable-diffusion-v2-{'768-v' if v else '512'}",
    }
    assert wanted.items() <= metadata.items()
    assert ("modelspec.usage_hint" in metadata) == zero
    back = read_single_file(str(path))
    assert (back.schedule, back.prediction_type) == (schedule, prediction_type)
    assert json.loads(metadata["zsnr.schedule"]) == schedule.settings()


def test_the_hidden_state_before_the_last_is_that_of_stable_diffusion_2(
    folders, tmp_path, monkeypatch
):
    text = {**layout.PUBLIC["v2"]["text_encoder"], "num_hidden_layers": 1}
    monkeypatch.setitem(layout.PUBLIC["v2"], "text_encoder", text)
    source = str(folders["v2"])
    options = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    whole = read_diffusers_folder(source)
    model = replace(whole, conditioner=TransformersConditioner(source, layer=-2, **options))
    write_single_file(model, tmp_path / "x.safetensors")
    names = load_file(tmp_path / "x.safetensors")
    assert any(".resblocks.1." in name for name in names)  # there, if not used
    back = read_single_file(str(tmp_path / "x.safetensors")).conditioner
    prompts = [prompt.replace("!", "") for prompt in PROMPTS]
    assert back(prompts).context.equal(model.conditioner(prompts).context)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_others(models, files, tmp_path, family):
    def as_released(tensors):
        unmarked = {name: t.clone() for name, t in tensors.items() if t.numel()}
        prefix = layout.PREFIXES[family]["text_encoder"]
        if family == "xl":
            unmarked["conditioner.embedders.1.model.logit_scale"] = torch.tensor(1.0)
        elif family == "v2":
            unmarked[f"{prefix}text_projection"] = torch.ones(16, 16)
            unmarked[f"{prefix}logit_scale"] = torch.tensor(1.0)
        else:
            unmarked[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
        unmarked["model_ema.decay"] = torch.tensor(0.9999)
        return unmarked

    path = rewrite(files[family], tmp_path / "x.safetensors", {}, as_released)
    if family == "v2":
        with pytest.raises(ValueError, match="half of SD 2's models predict v: set"):
            read_single_file(path)
        found = read_single_file(path, prediction_type="epsilon")
    else:
        with pytest.warns(UserWarning, match="does not declare what its network predicts"):
            found = read_single_file(path)
    assert found.prediction_type == "epsilon"
    assert found.schedule == NoiseSchedule(zero_terminal_snr=False)
    assert found.image_size == (1024 if family == "xl" else 512)
    wanted = state(models[family])
    assert all(weight.equal(wanted[name]) for name, weight in state(found).items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked = read_single_file(path, NoiseSchedule(), "v_prediction")
    assert asked.prediction_type == "v_prediction"
    assert asked.schedule.zero_terminal_snr
    with pytest.raises(ValueError, match="no x_0 at t=999"):
        TextToImage.from_pretrained(path, NoiseSchedule(), prediction_type="epsilon", device="cpu")


@pytest.mark.parametrize(
    ("metadata", "prediction_type", "size"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction", 768),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", 768),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon", 512),
        ({"ss_v_parameterization": "True", "modelspec.resolution": "640x640"}, "v_prediction", 640),
    ],
)
def test_metadata_of_others(files, tmp_path, metadata, prediction_type, size):
    def unmarked(tensors):
        return {name: t for name, t in tensors.items() if t.numel()}

    path = rewrite(files["v2"], tmp_path / "x.safetensors", metadata, unmarked)
    model = read_single_file(path, NoiseSchedule(zero_terminal_snr=False))
    assert (model.prediction_type, model.image_size) == (prediction_type, size)


@pytest.mark.parametrize(
    ("stored", "marks", "wanted"),
    [
        (NoiseSchedule(zero_terminal_snr=False), (), NoiseSchedule(zero_terminal_snr=False)),
        (NoiseSchedule(), (), NoiseSchedule()),
        (NoiseSchedule(zero_terminal_snr=False), ("ztsnr",), NoiseSchedule()),
        (NoiseSchedule("cosine", 50), (), None),
    ],
)
def test_a_stored_schedule_is_taken(files, tmp_path, stored, marks, wanted):
    table = stored.alphas_cumprod.float()

    def with_table(tensors):
        kept = {name: t for name, t in tensors.items() if t.numel() or name in marks}
        return {**kept, "alphas_cumprod": table}

    metadata = {"modelspec.prediction_type": "v"}
    path = rewrite(files["v1"], tmp_path / "x.safetensors", metadata, with_table)
    found, _ = declared(path)
    assert found == (wanted or NoiseSchedule.from_alphas_cumprod(table.double()))
    assert examine(path).facts["snr_T"] == pytest.approx(float(found.snr[-1]), rel=1e-5)


def test_parts_alone(files, models):
    source = str(files["v1"])
    codec, text = AutoencoderKLCodec(source), TransformersConditioner(source)
    pictures = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert codec.encode(pictures).equal(models["v1"].codec.encode(pictures))
    wanted = models["v1"].conditioner(PROMPTS).context
    assert text(PROMPTS).context.equal(wanted)
    assert codec.fingerprint()["weights"] == text.fingerprint()["weights"] is not None
    assert text.fingerprint()["tokenizer"] == "clip"
    assert text.release()(PROMPTS).context.equal(wanted)
    along = TransformersConditioner(source, trainable=True)
    assert all(p.requires_grad for p in along.parameters())
    unet = UNet(pretrained=source, channels=4, context_dim=16)
    assert all(p.requires_grad for p in unet.parameters())
    with pytest.raises(ValueError, match="holds no text_encoder_2"):
        TransformersConditioner(source, subfolder="text_encoder_2")


REFUSALS = {
    "codec": (lambda m: {"codec": PixelCodec(2)}, "other than AutoencoderKL, PixelCodec"),
    "null": (
        lambda m: {"conditioner": NullConditioner(16)},
        "no CLIP text encoder but NullConditioner",
    ),
    "t5": (
        lambda m: {
            "conditioner": TransformersConditioner(
                config={"model_type": "t5", "d_model": 16, "num_layers": 1, "d_kv": 8, "d_ff": 16},
                tokenizer="open_clip",
            )
        },
        "'t5'",
    ),
    "mask": (
        lambda m: {
            "conditioner": TransformersConditioner(
                config=tiny.TEXT, tokenizer="open_clip", use_mask=True
            )
        },
        "use_mask",
    ),
    "norm": (
        lambda m: {
            "conditioner": TransformersConditioner(
                config=tiny.TEXT, tokenizer="open_clip", layer=-2, final_norm=False
            )
        },
        "final_norm",
    ),
    "pooled": (
        lambda m: {"network": UNet(replace(tiny.UNET, pooled_context=True), 4, 16)},
        "a vector pooled from the prompt too .* Stable Diffusion 1 is conditioned on the tokens",
    ),
    "scale_shift": (
        lambda m: {"network": UNet(replace(tiny.UNET, scale_shift=True), 4, 16)},
        "where Stable Diffusion 1, whose settings every program assumes, has",
    ),
    "cosine": (lambda m: {"schedule": NoiseSchedule("cosine")}, "another noise schedule than"),
    "linear": (lambda m: {"schedule": NoiseSchedule("linear")}, "another noise schedule than"),
    "short": (
        lambda m: {"schedule": NoiseSchedule(num_timesteps=500)},
        "another noise schedule than",
    ),
    "sample": (lambda m: {"prediction_type": "sample"}, "prediction_type='sample'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_layout_cannot_hold_is_refused(models, tmp_path, case):
    change, message = REFUSALS[case]
    model = replace(models["v1"], **change(models["v1"]))
    with pytest.raises(ValueError, match=message) as refused:
        write_single_file(model, tmp_path / "x.safetensors")
    in_folder = case not in ("codec", "null", "t5", "mask", "norm")
    way_out = "Write a diffusers folder instead" if in_folder else "Use the checkpoint itself"
    assert (
        "cannot be a single file, which other programs read as Stable Diffusion 1, 2 or XL"
        in str(refused.value)
    )
    assert way_out in str(refused.value)
    with pytest.raises(ValueError, match=message):
        check_single_file(model)
    assert [*tmp_path.iterdir()] == []


def test_other_tokenizers_are_refused(models, folders, tmp_path):
    import shutil

    from transformers import CLIPTokenizer

    shutil.copytree(folders["v1"], tmp_path / "sd")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{a}</w>" for a in letters)]
    other = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77
    )
    shutil.rmtree(tmp_path / "sd/tokenizer")
    other.save_pretrained(tmp_path / "sd/tokenizer")
    with pytest.raises(ValueError, match="a tokenizer other than CLIP's"):
        check_single_file(read_diffusers_folder(str(tmp_path / "sd")))


def test_adapters_are_refused(models, files):
    pytest.importorskip("peft")
    from zsnr.lora import AdaptedUNet, LoRA

    adapted = AdaptedUNet(pretrained=str(files["v1"]), lora=LoRA(rank=2))
    with pytest.raises(ValueError, match="which --merge merges"):
        check_single_file(replace(models["v1"], network=adapted))


def test_folders_are_made_of_files_and_files_of_folders(models, files, tmp_path):
    for name in ("folder", "again.safetensors"):
        source = files["v2"] if name == "folder" else tmp_path / "folder"
        assert main(["export", str(source), "--output", str(tmp_path / name)]) == 0
    wanted, found = load_file(files["v2"]), load_file(tmp_path / "again.safetensors")
    table = "cond_stage_model.model.token_embedding.weight"
    differs = (wanted.pop(table) != found.pop(table)).any(dim=1)
    assert differs.sum() <= 1  # a token that no prompt has is the folder's padding
    assert wanted.keys() == found.keys()
    assert all(wanted[name].equal(found[name]) for name in wanted)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("unet", "attention_head_dim", 4),
        ("text_encoder", "hidden_act", "gelu"),
        ("vae", "scaling_factor", 0.13025),
        ("tokenizer", "max_length", 64),
    ],
)
def test_what_readers_would_take_for_the_public_model_is_refused(
    models, files, tmp_path, monkeypatch, part, name, value
):
    if part == "tokenizer":
        options = {"tokenizer_subfolder": "tokenizer", "max_length": value}
        own = models["v1"].conditioner.settings() | options
        changed = replace(models["v1"], conditioner=TransformersConditioner(**own))
        with pytest.raises(ValueError, match=r"prompts of 64 tokens, where other programs use 77"):
            check_single_file(changed)
    else:
        public = {**layout.PUBLIC["v1"][part], name: value}
        monkeypatch.setitem(layout.PUBLIC["v1"], part, public)
        with pytest.raises(ValueError, match=rf"with {name}=.*Stable Diffusion 1.* has '?{value}"):
            check_single_file(models["v1"])


def test_models_of_other_sizes_are_refused(models, files, tmp_path, monkeypatch):
    """In writing before anything is written, in reading before weights are read."""
    monkeypatch.setitem(layout.PUBLIC, "v1", RELEASED["v1"])
    with pytest.raises(ValueError, match=r"hidden_size=16, where Stable Diffusion 1.* has 768"):
        write_single_file(models["v1"], tmp_path / "x.safetensors")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="hold models of that size only: use the diffusers folder"):
        load_all(str(files["v1"]))


def with_tensor(name, value):
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conditioner.embedders.2.weight", "is no part of Stable Diffusion XL and would be left"),
        ("conditioner.embedders.1.model.scale_weight", "scaled 8-bit weights"),
        ("model.diffusion_model.input_blocks.0.0.scale_weight", "scaled 8-bit weights"),
        ("scaled_fp8", "scaled 8-bit weights"),
        ("model.diffusion_model.guidance_in.weight", "does not have and which would be left out"),
        ("conditioner.embedders.0.transformer.text_model.extra", "does not have and which would"),
        ("first_stage_model.decoder.extra", "does not have and which would be left out"),
    ],
)
def test_every_tensor_is_used_or_refused(files, tmp_path, name, message):
    change = with_tensor(name, torch.ones(1))
    path = rewrite(files["xl"], tmp_path / "x.safetensors", None, change)
    with pytest.raises(ValueError, match=message) as error:
        load_all(path)
    assert name in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        *("model_ema.decay", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "denoiser.sigmas"),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    ],
)
def test_tensors_without_effect_are_known(files, tmp_path, name):
    change = with_tensor(name, torch.ones(1))
    load_all(rewrite(files["xl"], tmp_path / "x.safetensors", None, change))


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.conv_in.bias",
        "conditioner.embedders.1.model.ln_final.bias",
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(files, tmp_path, name, value):
    def broken(tensors):
        tensors[name][0] = value
        return tensors

    path = rewrite(files["xl"], tmp_path / "x.safetensors", None, broken)
    with pytest.raises(ValueError, match="are not finite: the file is broken"):
        TextToImage.from_pretrained(path, device="cpu")


def test_wrong_calls_are_refused(models, files, tmp_path):
    with pytest.raises(ValueError, match="exists"):
        write_single_file(models["v1"], files["v1"])
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        write_single_file(models["v1"], tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="Known: float32, float16, bfloat16"):
        write_single_file(models["v1"], tmp_path / "x.safetensors", dtype="int8")
    with pytest.raises(ValueError, match="wanted texts only"):
        write_single_file(models["v1"], tmp_path / "x.safetensors", metadata={"steps": 3})
    assert [*tmp_path.iterdir()] == []


def header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_others_kinds_of_files_are_named(tmp_path):
    weight = torch.zeros(4, 4)
    cases = {
        "a LoRA": {"lora_unet_down.lora_down.weight": weight},
        "only one part": {"down_blocks.0.resnets.0.conv1.weight": weight},
        "only a text encoder": {"text_model.final_layer_norm.weight": weight},
        "a transformer": {"model.diffusion_model.joint_blocks.0.weight": weight},
        "inpainting": {
            "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3),
        },
        "a refiner": {
            "conditioner.embedders.0.model.ln_final.weight": weight,
            "model.diffusion_model.out.0.weight": weight.clone(),
        },
        r"no tensor's name starts with 'model\.diffusion_model\.'": {"weight": weight},
        "holds no text_encoder|width": {"model.diffusion_model.out.0.weight": weight},
    }
    for message, tensors in cases.items():
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=message):
            read_single_file(str(tmp_path / "x.safetensors"))
    with pytest.raises(ValueError, match="No such file"):
        TextToImage.from_pretrained(tmp_path / "nowhere.safetensors")
    torch.save({"state_dict": {"model.diffusion_model.out.0.weight": weight}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"convert it to \.safetensors"):
        read_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"convert it to \.safetensors"):
        UNet(pretrained=str(tmp_path / "x.ckpt"))


def test_damaged_files_are_refused(files, tmp_path):
    """Mutations of the bytes: a ValueError, or weights that differ; nothing else."""
    facts, data = header(files["v1"])
    whole = files["v1"].read_bytes()
    start = len(whole) - len(data)
    random = np.random.default_rng(0)
    path = tmp_path / "x.safetensors"
    cuts = [0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(whole) - 1]
    contents = [whole[:cut] for cut in cuts] + [whole + b"x"]
    contents += [struct.pack("<Q", n) + whole[8:] for n in (0, start, 1 << 40, (1 << 64) - 1)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            layout.open_ldm_file(path)
    refused = 0
    for _ in range(400):
        content = bytearray(whole[: start + 64])
        for position in random.integers(0, start, random.integers(1, 8)):
            content[position] = random.integers(0, 256)
        path.write_bytes(bytes(content) + whole[start + 64 :] if refused < 20 else bytes(content))
        try:
            layout.part_config(layout.open_ldm_file(path), "unet")
        except ValueError:
            refused += 1
    assert refused > 300
    names = [name for name in facts if name != "__metadata__"]
    for name in random.choice(names, 6, replace=False):
        if name in ("v_pred", "ztsnr"):
            continue

        def without(tensors, name=name):
            return {key: tensor for key, tensor in tensors.items() if key != name}

        changed = rewrite(files["v1"], tmp_path / "y.safetensors", None, without)
        with pytest.raises(
            ValueError, match="does not match|not named as|another model|lacks tensors"
        ):
            load_all(changed)


@pytest.mark.parametrize("family", ["v1", "xl"])
def test_a_run_starts_from_a_file(files, shards, tmp_path, family):
    source = str(files[family])
    text = {"class_path": "TransformersConditioner", "init_args": {"pretrained": source}}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
        },
        "model": {
            "network": source,
            "codec": {"class_path": "AutoencoderKLCodec", "init_args": {"pretrained": source}},
            "conditioner": {**text, "class_path": "SDXLConditioner"} if family == "xl" else text,
        },
        "data": {
            "train": f"{shards}/train-*.tar",
            "image_size": 16,
            "batch_size": 4,
            "num_workers": 0,
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", str(tmp_path / "config.yaml")]) == 0
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    made = read_checkpoint(checkpoint, ema=False)
    start = read_single_file(source)
    assert not made.network.unet.conv_in.weight.equal(start.network.unet.conv_in.weight)
    assert made.network.unet.conv_in.weight.allclose(start.network.unet.conv_in.weight, atol=1e-3)
    write_single_file(made, tmp_path / "out.safetensors")
    for mine, other in zip(images(made), images(str(tmp_path / "out.safetensors")), strict=True):
        assert np.array_equal(mine, other)


def test_nothing_is_read_of_what_does_not_fit(files, tmp_path, monkeypatch):
    def grown(tensors):
        name = "model.diffusion_model.out.2.bias"
        return {**tensors, name: torch.zeros(5)}

    path = rewrite(files["v1"], tmp_path / "x.safetensors", None, grown)
    opened = layout.open_safetensors

    def without_tensors(path):
        with opened(path) as file:
            yield SimpleNamespace(keys=file.keys, get_slice=file.get_slice, metadata=file.metadata)

    from contextlib import contextmanager

    monkeypatch.setattr(layout, "open_safetensors", contextmanager(without_tensors))
    with pytest.raises(ValueError, match=r"out\.2\.bias has shape \(5,\), \(4,\) wanted"):
        UNet(pretrained=path)


# Sampling settings that go with a model


@pytest.fixture
def declaring(files, tmp_path):
    """Return the run of a model that declares how it is sampled, and what it declares."""

    def make(family, **options):
        sampling = Sampling(**{"num_steps": 3, "guidance": Guidance(2.5, 0.6), **options})
        declared = describe_sampling(sampling)
        model = read_single_file(str(files[family]))
        weights = {f"trained.unet.{n}": w for n, w in model.network.state_dict().items()}
        run = {"format": 1, "sampling": declared}
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        torch.save(
            {"zsnr": describe_model(model), "state_dict": weights, "run": run, "global_step": 1},
            tmp_path / "run" / "checkpoints" / "step-1.ckpt",
        )
        return tmp_path / "run", declared

    return make


@pytest.mark.parametrize("family", ["v1", "xl"])
def test_an_export_samples_by_default_as_its_checkpoint(declaring, tmp_path, family):
    run, declared = declaring(family)
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    assert main(["export", str(run), "-o", str(folder)]) == 0
    assert main(["export", str(run), "-o", str(file)]) == 0
    assert main(["export", str(file), "-o", str(tmp_path / "again")]) == 0
    made = []
    for source in (run, folder, file, tmp_path / "again"):
        assert sampling_of(str(source)) == declared
        pipe = TextToImage.from_pretrained(source, device="cpu")
        made += pipe(["a black cat"], seeds=[3], progress=False)
        assert declared.items() <= json.loads(made[-1].info["zsnr"]).items()
    for image in made[1:]:
        assert np.array_equal(made[0], image)


def test_diffusers_does_not_notice_the_declared_sampling(declaring, tmp_path):
    from diffusers import DiffusionPipeline

    run, _ = declaring("v1")
    assert main(["export", str(run), "-o", str(tmp_path / "folder")]) == 0
    told = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            pipe = DiffusionPipeline.from_pretrained(tmp_path / "folder")
            pipe.save_pretrained(tmp_path / "saved")
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not any("zsnr" in text for text in [*told, *(str(each.message) for each in warned)])
    assert sampling_of(str(tmp_path / "saved")) == {}  # diffusers does not carry it on


def test_an_export_declares_no_paths_and_no_weights_that_it_lacks(declaring, tmp_path):
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps({"timesteps": [999, 600, 300]}))
    run, declared = declaring("v1", spacing=str(grid), guidance=Guidance(2.0, against="raw"))
    assert declared["timesteps"] == [999, 600, 300]
    with pytest.warns(UserWarning, match="the export declares no guidance"):
        assert main(["export", str(run), "-o", str(tmp_path / "x.safetensors")]) == 0
    exported = sampling_of(str(tmp_path / "x.safetensors"))
    assert not any(name.startswith("guidance") for name in exported)
    assert exported["spacing"] == f"{tmp_path.name}/grid.json"
    grid.unlink()
    sampling = choose_sampling(exported)
    assert sampling.timesteps(NoiseSchedule()).tolist() == [999, 600, 300]
    assert sampling.guidance == Guidance()


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ([], "sampling is .*: wanted settings by name"),
        ({"num_steps": "many"}, "unreadable"),
        ({"num_steps": 2, "timesteps": [999]}, "1 timesteps for 2 steps"),
        ({"spacing": "/etc/grid.json"}, "there are no timesteps of it"),
        ({"guidance_scale": "7"}, "unreadable"),
        ({"sampler_options": {"eta": 1}, "sampler": ["ddim"]}, "are not named"),
    ],
)
def test_a_declaration_that_cannot_be_sampled_is_refused(files, tmp_path, sampling, message):
    (tmp_path / "zsnr.json").write_text(json.dumps({"format": 1, "sampling": sampling}))
    path = tmp_path / "x.safetensors"
    rewrite(files["v1"], path, {"zsnr.sampling": json.dumps(sampling or 3)})
    for source in (tmp_path, path):
        with pytest.raises(ValueError, match=f"(?s){tmp_path}.*({message}|wanted a JSON object)"):
            sampling_of(str(source))


@pytest.mark.parametrize(
    ("family", "clip_skip"), [("v1", None), ("v1", 2), ("v2", None), ("xl", None)]
)
def test_an_export_reads_prompts_as_its_model(folders, tmp_path, family, clip_skip):
    model = read_diffusers_folder(str(folders[family]))
    model.conditioner.load()
    model.conditioner.configure(max_tokens=150, prompt_weights=True, clip_skip=clip_skip)
    prompts = ["a (black:1.3) cat " * 30 + end for end in ("by day", "at night")] + [""]
    wanted = model.conditioner(prompts)
    export_diffusers(model, tmp_path / "folder")
    sources = [str(tmp_path / "folder")]
    if clip_skip is None:  # other programs would take another layer of a single file
        write_single_file(model, tmp_path / "file.safetensors")
        sources.append(str(tmp_path / "file.safetensors"))
    for source in sources:
        conditioner = read_model(source).conditioner
        conditioner.load()
        actual = conditioner(prompts)
        assert actual.context.shape == wanted.context.shape == (3, 154, wanted.context.shape[-1])
        assert torch.equal(actual.context, wanted.context)
        assert not torch.equal(actual.context[0], actual.context[1])
        assert wanted.pooled is None or torch.equal(actual.pooled, wanted.pooled)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["max_tokens"], "wanted settings by name|wanted a JSON object"),
        ({"max_tokens": "many"}, "max_tokens='many': wanted 1 to"),
        ({"prompt_weights": 1}, "prompt_weights=1: wanted true or false"),
    ],
)
def test_a_declaration_of_prompts_that_cannot_be_read_is_refused(
    folders, files, tmp_path, prompts, message
):
    folder = shutil.copytree(folders["v1"], tmp_path / "folder")
    (folder / "zsnr.json").write_text(json.dumps({"format": 1, "prompts": prompts}))
    file = rewrite(files["v1"], tmp_path / "x", {"zsnr.prompts": json.dumps(prompts)})
    for source in (str(folder), str(Path(file).rename(f"{file}.safetensors"))):
        with pytest.raises(ValueError, match=message):
            read_model(source)


def test_what_is_no_setting_of_sampling_is_not_read(tmp_path):
    declared = {"num_steps": 4, "model": "x", "guidance_scale": 2.0, "class_path": "os.system"}
    (tmp_path / "zsnr.json").write_text(json.dumps({"format": 1, "sampling": declared}))
    assert sampling_of(str(tmp_path)) == {"num_steps": 4, "guidance_scale": 2.0}
    (tmp_path / "zsnr.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match="not of format 1"):
        sampling_of(str(tmp_path))


def test_a_model_on_the_hub_declares_its_sampling(tmp_path, monkeypatch):
    (tmp_path / "zsnr.json").write_text(json.dumps({"format": 1, "sampling": {"num_steps": 4}}))
    asked = []

    def download(source, subfolder, variant):
        asked.append((source, subfolder))
        if source == "me/other":
            raise ValueError("there is none")
        return tmp_path

    monkeypatch.setattr("zsnr.weights.source._download", download)
    monkeypatch.setattr("zsnr.weights.source._cached", lambda source: None)
    assert sampling_of("me/model") == {"num_steps": 4}
    assert sampling_of("me/other") == {}
    assert asked == [("me/model", None), ("me/other", None)]
