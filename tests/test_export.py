"""Models written for diffusers, and what diffusers makes of them."""

import ast
import copy
import dataclasses
import json
import os
import re
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from zsnr import Guidance, NoiseSchedule, RectifiedFlow
from zsnr.checkpoints import Model
from zsnr.cli import main
from zsnr.codecs import AutoencoderKLCodec
from zsnr.conditioning import (
    NullConditioner,
    OpenClipConditioner,
    SDXLConditioner,
    TransformersConditioner,
)
from zsnr.doctor.examine import examine
from zsnr.interop import process_from_diffusers, schedule_from_diffusers, write_single_file
from zsnr.interop.card import DROPPING, EXACT, PATCHED, model_card
from zsnr.interop.export import export_diffusers, read_exportable
from zsnr.interop.scheduler_config import scheduler_config
from zsnr.networks import UNet, UNetConfig
from zsnr.pipeline import TextToImage
from zsnr.weights.ldm_file import PUBLIC

GUIDANCE = Guidance(4.0, 0.7)
OWN = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.999, 0.001, 500), True)
SCHEDULES = [
    NoiseSchedule(),
    NoiseSchedule(zero_terminal_snr=False),
    NoiseSchedule("linear"),
    NoiseSchedule("linear", zero_terminal_snr=False),
    NoiseSchedule("cosine"),
    NoiseSchedule("cosine", zero_terminal_snr=False),
    NoiseSchedule("scaled_linear", 200, beta_start=0.001, beta_end=0.03),
    NoiseSchedule.from_alphas_cumprod(torch.linspace(0.999, 0.01, 500)),
    NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 1e-12, 0.0]),
    OWN,
    NoiseSchedule(snr_shift=3.0),
    NoiseSchedule("cosine", zero_terminal_snr=False, snr_shift=3.0),
]


def name(value):
    """A short id of a parameter."""
    if not isinstance(value, NoiseSchedule):
        return str(value)
    kind = "table" if value.alphas_cumprod_table else value.betas
    return f"{kind}-{value.num_timesteps}-{'zero' if value.snr[-1] == 0 else 'original'}"


CODEC = {"class_path": "AutoencoderKLCodec", "init_args": {"pretrained": "asset:openmoji_vae"}}


def text_encoder(**options):
    """A CLIP whose embeddings are large enough to tell prompts apart."""
    torch.manual_seed(1)
    config = {**tiny.TEXT, "num_hidden_layers": 3}
    made = TransformersConditioner(
        **{"config": config, "tokenizer": "open_clip", "max_length": 16, "trainable": True}
        | options
    )
    return made.eval()


def frozen_text_encoder(folder, **options):
    """The same from a folder with a tokenizer beside it, as a Stable Diffusion folder has them."""
    from zsnr.interop.export import _text_encoder

    encoder, tokenizer = _text_encoder(text_encoder(max_length=20), torch.float32)
    encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return TransformersConditioner(
        str(folder), subfolder="text_encoder", tokenizer_subfolder="tokenizer", **options
    )


def model(schedule=None, conditioner=None, codec=None, prediction_type="v_prediction", **unet):
    conditioner = conditioner or text_encoder()
    torch.manual_seed(0)
    network = UNet(
        UNetConfig(**{**vars(tiny.UNET), **unet}), channels=4, context_dim=conditioner.context_dim
    )
    for parameter in network.parameters():  # outputs that depend on the prompt and are not small
        parameter.data.mul_(1.5)
    return Model(
        codec=codec or AutoencoderKLCodec("asset:openmoji_vae"),
        conditioner=conditioner,
        network=network.eval(),
        schedule=schedule or NoiseSchedule(),
        prediction_type=prediction_type,
        image_size=32,
    )


def load(folder, **options):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(model, pipe, num_steps, prompts=("a cat!", "two dogs"), guidance=GUIDANCE):
    """Latents and images (B, 3, H, W) in [0, 1] of TextToImage and of diffusers."""
    latents, decode = [], model.codec.decode
    model.codec.decode = lambda rows: latents.append(rows) or decode(rows)
    seeds = range(5, 5 + len(prompts))
    try:
        TextToImage(model)(
            list(prompts),
            seeds=seeds,
            sampler="ddim",
            num_steps=num_steps,
            guidance=guidance,
            progress=False,
        )
    finally:
        del model.codec.decode
    ours = torch.cat(latents)
    seen = [ours, decode(ours)]
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (1, *seen[0].shape[1:])
    settings = {
        "latents": torch.cat([torch.randn(shape, generator=g) for g in noise]),
        "num_inference_steps": num_steps,
        "guidance_scale": guidance.scale,
        "guidance_rescale": guidance.rescale,
    }
    theirs = []
    images = pipe(
        list(prompts),
        output_type="pt",
        callback_on_step_end=lambda _pipe, _i, _t, tensors: theirs.append(tensors["latents"]) or {},
        **settings,
    ).images
    return seen[0], theirs[-1], (seen[1] / 2 + 0.5).clamp(0, 1), images


def assert_same(model, pipe, num_steps, **options):
    mine, theirs, my_images, their_images = both(model, pipe, num_steps, **options)
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-4)
    torch.testing.assert_close(their_images, my_images, rtol=0, atol=1e-4)
    assert my_images.std() > 0.05


# The schedule


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_diffusers_has_the_schedule(schedule):
    from diffusers import DDIMScheduler

    config = json.loads(json.dumps(scheduler_config(schedule, "v_prediction")))
    theirs = DDIMScheduler.from_config(config)
    abar = theirs.alphas_cumprod.double()
    torch.testing.assert_close(abar, schedule.alphas_cumprod, rtol=0, atol=1e-6)
    zero = float(schedule.alphas_cumprod[-1]) == 0
    assert (float(abar[-1]) == 0) == zero
    assert float(theirs.final_alpha_cumprod) == 1
    theirs.set_timesteps(10 if schedule.num_timesteps >= 10 else 2)
    assert theirs.timesteps[0] == schedule.num_timesteps - 1
    again = schedule_from_diffusers(config)
    torch.testing.assert_close(again.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-6, atol=6e-8)
    if config["trained_betas"] is not None:
        assert not config["rescale_betas_zero_snr"]
        assert (config["trained_betas"][-1] == 1) == zero
        torch.testing.assert_close(abar, schedule.alphas_cumprod, rtol=2e-7, atol=6e-8)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_has_rectified_flow(tmp_path, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = RectifiedFlow(shift)
    config = json.loads(json.dumps(scheduler_config(schedule, "flow")))
    assert config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert process_from_diffusers(config) == (schedule, "flow")
    theirs = FlowMatchEulerDiscreteScheduler.from_config(config)
    theirs.set_timesteps(sigmas=[1 - i / 20 for i in range(20)])
    t = torch.arange(999, -1, -50)
    torch.testing.assert_close(theirs.sigmas[:-1], schedule(t)[1].float())
    torch.testing.assert_close(theirs.timesteps, schedule.time(t))
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    found = examine(tmp_path / "scheduler_config.json")
    assert (found.verdict, found.facts["schedule"]) == ("fixed", schedule.settings())


@pytest.mark.parametrize(
    ("schedule", "prediction_type", "words"),
    [
        (RectifiedFlow(), "v_prediction", "'v_prediction' on a RectifiedFlow.*train with 'flow'"),
        (RectifiedFlow(), "sample", "'sample' on a RectifiedFlow"),
        (RectifiedFlow(), "epsilon", "'epsilon' on a RectifiedFlow"),
        (NoiseSchedule(), "flow", "'flow' on a NoiseSchedule.*train with 'v_prediction'"),
        (RectifiedFlow(num_timesteps=50), "flow", "tell the network 50 u.*num_timesteps: 1000"),
    ],
)
def test_what_diffusers_does_not_convert_is_refused(tmp_path, schedule, prediction_type, words):
    with pytest.raises(ValueError, match=words):
        scheduler_config(schedule, prediction_type)
    made = model(schedule=schedule, prediction_type=prediction_type)
    with pytest.raises(ValueError, match=words):
        export_diffusers(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="single file"):
        write_single_file(made, tmp_path / "out.safetensors")


def test_the_config_says_what_others_look_for():
    config = scheduler_config(NoiseSchedule(), "v_prediction")
    assert config == {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
    }
    with pytest.raises(ValueError, match="no x_0 at t=999"):
        scheduler_config(NoiseSchedule(), "epsilon")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_the_doctor_agrees(tmp_path, schedule):
    (tmp_path / "scheduler_config.json").write_text(
        json.dumps(scheduler_config(schedule, "v_prediction"))
    )
    zero = float(schedule.alphas_cumprod[-1]) == 0
    verdict = examine(str(tmp_path / "scheduler_config.json")).verdict
    assert verdict == ("fixed" if zero else "flawed")


# Round trips


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The quickstart's kind of model: pooled context, scale and shift, a CLIP trained along."""
    folder = tmp_path_factory.mktemp("export") / "model"
    made = model(pooled_context=True, scale_shift=True)
    export_diffusers(made, folder)
    return made, folder


@pytest.fixture(scope="module")
def pipe(exported):
    return load(exported[1])


@pytest.mark.peer
@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 10, 25, 50])
def test_diffusers_makes_the_same_images(exported, pipe, num_steps):
    assert_same(exported[0], pipe, num_steps)


@pytest.mark.peer
def test_prompts_become_the_same_embeddings(exported, pipe):
    made, _ = exported
    prompts = ["", "!", "what?! it's a cat!!", "  Ärger  & naïve ÿ", "日本 🙂", "many words " * 20]
    cond, null = pipe.encode_prompt(prompts, "cpu", 1, True)
    torch.testing.assert_close(cond, made.conditioner(prompts).context, rtol=0, atol=1e-6)
    wanted = made.conditioner.null().context.expand_as(null)
    torch.testing.assert_close(null, wanted, rtol=0, atol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [
        (NoiseSchedule("cosine"), "v_prediction"),
        (OWN, "v_prediction"),
        (NoiseSchedule("linear"), "sample"),
        (NoiseSchedule(zero_terminal_snr=False), "epsilon"),
    ],
    ids=name,
)
def test_other_schedules_go_through_the_pipeline(tmp_path, schedule, prediction_type):
    made = model(schedule, prediction_type=prediction_type)
    export_diffusers(made, tmp_path / "out")
    assert_same(made, load(tmp_path / "out"), 10)


@pytest.mark.peer
@pytest.mark.parametrize("options", [{}, {"layer": -2, "max_length": 9}], ids=str)
def test_frozen_encoders_and_their_tokenizers(tmp_path, options):
    made = model(conditioner=frozen_text_encoder(tmp_path, **options))
    export_diffusers(made, tmp_path / "out")
    pipe = load(tmp_path / "out")
    assert pipe.tokenizer.model_max_length == options.get("max_length", 20)
    assert_same(made, pipe, 5)


@pytest.mark.peer
def test_shifted_latents_and_an_early_hidden_state(tmp_path):
    codec = AutoencoderKLCodec("asset:openmoji_vae", scale=0.8, shift=0.4)
    made = model(codec=codec, conditioner=text_encoder(layer=-3))
    export_diffusers(made, tmp_path / "out")
    pipe = load(tmp_path / "out")
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (0.8, None)
    assert pipe.text_encoder.config.num_hidden_layers == 1
    assert_same(made, pipe, 4)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = codec.latents(codec.encode(pixels))  # as image to image has it
    got = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("layer", ["penultimate", "last"])
def test_open_clips_towers_are_converted(tmp_path, layer):
    import open_clip

    tower = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
    vision = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 8}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": tower}
    if layer == "last":
        config["quick_gelu"] = True
    (tmp_path / "tiny-tower.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-tower.json")
    torch.manual_seed(3)
    encoder = OpenClipConditioner("tiny-tower", None, layer, trainable=True).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    made = model(conditioner=encoder)
    export_diffusers(made, tmp_path / "out")
    pipe = load(tmp_path / "out")
    prompts = ["", "a cat!", "!!! two dogs"]
    wanted = encoder(prompts).context
    torch.testing.assert_close(
        pipe.encode_prompt(prompts, "cpu", 1, False)[0], wanted, rtol=0, atol=1e-5
    )
    assert_same(made, pipe, 5)


@pytest.mark.peer
@pytest.mark.parametrize("force_zeros", [True, False])
def test_sdxl_round_trip(tmp_path, force_zeros):
    from diffusers import StableDiffusionXLPipeline

    tiny.sdxl_folder(tmp_path / "in", force_zeros=force_zeros)
    made, facts = read_exportable(str(tmp_path / "in"))
    with torch.no_grad():
        for parameter in made.network.parameters():
            parameter.mul_(1.2)
    export_diffusers(made, tmp_path / "out", facts=facts)
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.force_zeros_for_empty_prompt == force_zeros
    for num_steps in (1, 4, 10):
        assert_same(made, pipe, num_steps, prompts=("a cat", "dog"))
    assert "StableDiffusionXLPipeline.from_pretrained" in (tmp_path / "out/README.md").read_text()


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")  # of its odd size
@pytest.mark.parametrize("tokenizer", ["open_clip", "clip"])
def test_from_folder_to_single_file_and_back(tmp_path, tokenizer, monkeypatch):
    from diffusers import AutoencoderKL

    settings = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    AutoencoderKL(latent_channels=4, **settings).save_pretrained(tmp_path / "vae")
    made = model(
        codec=AutoencoderKLCodec(str(tmp_path / "vae")),
        conditioner=text_encoder(tokenizer=tokenizer, max_length=77),
    )
    export_diffusers(made, tmp_path / "first")
    family = {"clip": "v1", "open_clip": "v2"}[tokenizer]
    monkeypatch.setitem(PUBLIC, family, tiny.sizes_of(tmp_path / "first", family))
    steps = ["first", "single.safetensors", "second"]
    for source, target in pairwise(steps):
        assert main(["export", str(tmp_path / source), "--output", str(tmp_path / target)]) == 0
    assert_same(made, load(tmp_path / "second"), 5)


def test_exporting_changes_nothing(exported):
    made, _ = exported
    again = model(pooled_context=True, scale_shift=True)
    for part in ("network", "conditioner"):
        mine, theirs = (getattr(m, part).state_dict() for m in (made, again))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert made.network.settings() == again.network.settings()


def test_the_folder_tells_its_size_and_no_paths(exported, tmp_path_factory):
    _, folder = exported
    assert json.loads((folder / "unet/config.json").read_text())["sample_size"] == 8
    base = str(tmp_path_factory.getbasetemp())
    texts = [p.read_text() for p in folder.rglob("*.*") if p.suffix in (".json", ".md")]
    assert len(texts) >= 6
    assert not [text for text in texts if base in text]
    weights = [p for p in folder.rglob("*") if p.is_file() and p.suffix in (".bin", ".pt", ".ckpt")]
    assert not weights


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(tmp_path, exported, dtype):
    made, _ = exported
    export_diffusers(made, tmp_path / "out", dtype=dtype)
    half = getattr(torch, dtype)
    unet = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in unet.values()} == {half}
    for name, tensor in made.network.unet.state_dict().items():
        assert torch.equal(unet[name], tensor.to(half))
    vae = load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in vae.values()} == {torch.float32 if dtype == "float16" else half}
    mine, theirs, *_ = both(made, load(tmp_path / "out"), 2)  # in float32, as nothing was said
    assert (mine - theirs).abs().max() < (0.1 if dtype == "float16" else 0.8)
    pipe = load(tmp_path / "out", torch_dtype=half)
    image = pipe("a", num_inference_steps=2, output_type="pt").images
    assert image.isfinite().all()
    assert image.dtype == half


# The card


def run_snippet(folder, tmp_path, monkeypatch):
    card = (folder / "README.md").read_text()
    block, *_ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    wanted = f"path/to/{folder.name}"
    assert wanted in block
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block.replace(wanted, str(folder)), "README.md", "exec"), names)
    return names


def test_a_folder_may_have_any_name(tmp_path, exported):
    folder = tmp_path / "\u732b \U0001f431 \"a'b"
    export_diffusers(exported[0], folder)
    block, *_ = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    texts = [node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]
    assert f"path/to/{folder.name}" in texts


@pytest.mark.peer
def test_the_cards_snippet_is_right(exported, tmp_path, monkeypatch):
    made, folder = exported
    names = run_snippet(folder, tmp_path, monkeypatch)
    assert (tmp_path / "image.png").is_file()
    [mine] = TextToImage(made)(["a black cat at night"], seeds=[0], num_steps=50, progress=False)
    difference = torch.tensor(list(names["image"].tobytes())) - torch.tensor(list(mine.tobytes()))
    assert difference.abs().max() <= 1


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "model"
    made = model(schedule=RectifiedFlow(3.0), prediction_type="flow")
    export_diffusers(made, folder)
    return made, folder


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:The prompt is cut")  # by both
@pytest.mark.parametrize("xl", [False, True])
def test_the_snippet_of_a_flow_card_is_right(flow, tmp_path, monkeypatch, xl):
    made, folder = flow
    if xl:
        tiny.sdxl_folder(tmp_path / "in")
        options = {"schedule": RectifiedFlow(3.0), "prediction_type": "flow"}
        made, _ = read_exportable(str(tmp_path / "in"), **options)
        folder = tmp_path / "out"
        export_diffusers(made, folder)
    again, _ = read_exportable(str(folder))
    assert (again.schedule, again.prediction_type) == (RectifiedFlow(3.0), "flow")
    names = run_snippet(folder, tmp_path, monkeypatch)
    options = {"sampler": "ddim", "num_steps": 50, "spacing": "trailing", "progress": False}
    [mine] = TextToImage(made)(["a black cat at night"], seeds=[0], **options)
    difference = torch.tensor(list(names["image"].tobytes())) - torch.tensor(list(mine.tobytes()))
    assert difference.abs().max() <= 1


def test_the_card_of_flow_says_so(flow):
    card = (flow[1] / "README.md").read_text()
    _, block = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {"pipe": load(flow[1])}
    exec(compile(block, "README.md", "exec"), names)
    assert_same(flow[0], names["pipe"], 7)
    assert "| schedule | rectified flow, shift 3, T = 1000 |" in card
    assert "| alpha_T | 0 |" in card
    assert "the network is told 1000 |" in card
    assert "flow_shift=3" in card
    assert "ModelSamplingSD3 does, with shift 3" in card
    assert "DDIM of diffusers" not in card
    assert {"rectified-flow", "zero-terminal-snr", "flow"} <= {
        *yaml.safe_load(card.split("---")[1])["tags"]
    }


def test_the_cards_repair_is_right(exported):
    made, folder = exported
    _, block = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names = {"pipe": load(folder)}
    exec(compile(block, "README.md", "exec"), names)
    assert_same(made, names["pipe"], 7)  # does not divide 1000


@pytest.mark.filterwarnings("ignore")  # of divisions by zero
@pytest.mark.parametrize("schedule", [NoiseSchedule(), NoiseSchedule("cosine")], ids=name)
def test_the_card_is_right_about_schedulers(schedule):
    import diffusers
    from diffusers.schedulers import KarrasDiffusionSchedulers

    config = scheduler_config(schedule, "v_prediction")
    full = diffusers.DDIMScheduler.from_config(config).config
    named = {*EXACT, *PATCHED, *DROPPING}
    # EDM's is no schedule of this kind
    assert {kind.name for kind in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"} <= named
    folder = Path(diffusers.__file__).parent / "schedulers"
    sde = "DPMSolverSDEScheduler"  # needs a package that may not be there
    assert "rescale_betas" not in (folder / "scheduling_dpmsolver_sde.py").read_text()
    for name in named - {sde}:
        scheduler = getattr(diffusers, name).from_config(full)
        last = float(scheduler.alphas_cumprod[-1])
        if config["trained_betas"] is not None or name in EXACT:
            assert last == 0
        else:
            assert (0 < last < 1e-7) == (name in PATCHED)
            assert (last > 4e-3) == (name in DROPPING)
        if config["trained_betas"] is not None:
            assert finite(scheduler) == (name in EXACT), name


def finite(scheduler):
    """Whether ten steps, with a network that says 0, come to an end in numbers."""
    x = torch.ones(1, 4, 4, 4)
    try:
        scheduler.set_timesteps(10)
        for t in scheduler.timesteps:
            x = scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
    except ValueError:
        return False
    return bool(x.isfinite().all())


FACTS = {
    "schedule": NoiseSchedule().settings(),
    "prediction_type": "v_prediction",
    "image_size": 512,
    "dtype": "float16",
    "pipeline": "StableDiffusionPipeline",
}


def test_a_card_without_facts_says_so():
    card = model_card("mine", FACTS)
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "diffusers"
    assert front["pipeline_tag"] == "text-to-image"
    assert (front["license"], front["license_name"]) == ("other", "unknown")
    assert {"zero-terminal-snr", "v-prediction"} <= {*front["tags"]}
    assert "| data | not recorded |" in card
    assert "| SNR_T | 0, exactly |" in card
    assert "| first timestep sampled | 999 of 0 .. 999 |" in card
    assert "guidance_scale=7.5" in card
    assert "guidance_rescale=0.7" in card
    assert all(f"`{name}`" in card for name in ("PNDMScheduler", "LMSDiscreteScheduler"))
    assert "lose the rescale" in card
    assert "`HeunDiscreteScheduler`" in card


def test_a_card_tells_of_the_run():
    run = {
        "sampling": {
            "sampler": "euler",
            "num_steps": 48,
            "spacing": "linspace",
            "guidance_scale": 3.0,
            "guidance_rescale": 0.5,
        },
        "data": ["/home/me/shards/a|b.tar", "https://host/c.tar"],
        "global_step": 1200,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "ema": {"decay": 0.99, "start": None},
        "metrics": {"val/loss": 0.125},
        "start": {"unet": "some/model", "schedule": {}},
        "versions": {"torch": "2.14.1"},
        "zsnr_version": "0.1.0",
    }
    card = model_card("mine", {**FACTS, **run})
    for line in (
        "num_inference_steps=50,",
        "guidance_scale=3.0,",
        "guidance_rescale=0.5,",
        "made with euler on linspace timesteps",
        "| data | shards/a\\|b.tar, https://host/c.tar |",
        "| steps | 1200 |",
        "| averaging of weights | decay: 0.99 |",
        "| val/loss | 0.125 |",
        "| started from | some/model |",
        "| torch | 2.14.1 |",
        "multiplier 0.5",
    ):
        assert line in card, line


def test_a_card_tells_of_guidance_that_diffusers_has_not():
    guided = {
        "guidance_scale": 0.6,
        "guidance_rescale": 0.0,
        "guidance_method": "cfg_pp",
        "guidance_curve": [[-6.0, 0.2], [0.0, 0.75]],
        "guidance_at_zero_snr": False,
    }
    card = model_card("mine", {**FACTS, "sampling": guided})
    assert "guidance_scale=7.5,\n    guidance_rescale=0.7," in card  # what a pipeline does with it
    assert "not tried out on this model" in card
    assert (
        "guided otherwise (scale 0.6, rescale 0, method cfg_pp, curve -6:0.2 / 0:0.75, "
        "at zero snr False)"
    ) in card
    plain = {"guidance_scale": 3.0, "guidance_rescale": 0.5}
    against = model_card("mine", {**FACTS, "sampling": {**plain, "guidance_against": "raw"}})
    assert "guidance_scale=3.0," in against
    assert "against raw" in against
    assert "guided otherwise" not in model_card("mine", {**FACTS, "sampling": plain})
    odd = model_card(
        "mine", {**FACTS, "sampling": {"guidance_method": ["<a>"], "guidance_curve": 3}}
    )
    assert "<a>" not in odd


def test_odd_facts_neither_break_a_card_nor_become_code():
    odd = {
        "sampling": {"guidance_scale": "0)\nimport os", "guidance_rescale": float("nan")},
        "loss": 3,
        "metrics": [],
        "versions": "x",
        "data": {"a": "<script>"},
        "start": None,
    }
    card = model_card('a"b', {**FACTS, **odd})
    assert "import os" not in card
    assert "<script>" not in card
    assert "guidance_scale=7.5," in card
    assert "| started from | random weights |" in card
    compile(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], "card", "exec")
    assert "guidance_rescale=0.7," in model_card("x", {**FACTS, "sampling": 3})


def test_the_card_of_a_flawed_model_claims_no_fix():
    flawed = NoiseSchedule(zero_terminal_snr=False)
    card = model_card("old", {**FACTS, "schedule": flawed.settings(), "prediction_type": "epsilon"})
    assert "flawed" in card
    assert "0.068265 x_0 + 0.997667 eps" in card
    assert "exactly" not in card
    assert "zero-terminal-snr" not in card
    assert "guidance_rescale=0.0" in card
    assert "beta 0.00085 to 0.012 |" in card


def test_the_card_says_who_reads_the_marks():
    def elsewhere(**facts):
        return model_card("x", {**FACTS, **facts}).split("## ComfyUI and A1111")[1].split("## ")[0]

    xl = elsewhere(pipeline="StableDiffusionXLPipeline")
    assert "ComfyUI and Forge read the marks" in xl
    assert "parameterization" not in xl
    assert "ComfyUI reads the marks of SDXL alone. Set them" in elsewhere()
    assert 'parameterization: "v"' in elsewhere()
    assert "zsnr on" in elsewhere(prediction_type="sample")
    flawed = NoiseSchedule(zero_terminal_snr=False).settings()
    assert "zsnr off" in elsewhere(prediction_type="sample", schedule=flawed)
    assert "where that layout can hold the model." in elsewhere(schedule=flawed)
    linear = NoiseSchedule("linear", zero_terminal_snr=False).settings()
    assert "they cannot sample it right" in elsewhere(schedule=linear)


def test_the_card_of_an_own_table_says_how_it_is_stored():
    card = model_card("own", {**FACTS, "schedule": OWN.settings()})
    assert "trained_betas" in card
    assert "divides 500" in card
    assert "they cannot sample it right" in card


# What cannot be exported


def null_model():
    return model(conditioner=NullConditioner(16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.model(), "PixelCodec.*AutoencoderKLCodec"),
        (null_model, "NullConditioner.*CLIP text model"),
        (lambda: model(conditioner=text_encoder(use_mask=True)), "use_mask: false"),
        (lambda: model(conditioner=text_encoder(layer=-2, final_norm=False)), "final_norm: true"),
        (
            lambda: model(
                conditioner=text_encoder(
                    config={"model_type": "t5", "d_model": 16, "num_layers": 1, "num_heads": 2}
                )
            ),
            "'t5'.*clip_text_model",
        ),
    ],
)
def test_what_a_pipeline_cannot_hold_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        export_diffusers(make(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.peer
def test_adapters_are_merged_first(tmp_path, exported):
    pytest.importorskip("peft")
    from zsnr.interop.lora import merge
    from zsnr.lora import AdaptedUNet, LoRA

    made, folder = exported
    torch.manual_seed(4)
    adapted = AdaptedUNet(str(folder), LoRA(rank=2)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned = dataclasses.replace(made, network=adapted)
    with pytest.raises(ValueError, match=r"has LoRA adapters: merge them"):
        export_diffusers(tuned, tmp_path / "out")
    export_diffusers(merge(tuned), tmp_path / "out")
    assert_same(tuned, load(tmp_path / "out"), 5)


def test_a_folder_is_never_written_over(tmp_path, exported):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists: choose another name"):
        export_diffusers(exported[0], tmp_path / "out")
    with pytest.raises(ValueError, match="dtype='float8'.*bfloat16"):
        export_diffusers(exported[0], tmp_path / "other", dtype="float8")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["export", "nothing.ckpt", "--output", str(tmp_path / "file" / "x" / "y")]) == 2
    assert f"{tmp_path / 'file'} is not a writable folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [(1e6, "float16", "float16 cannot hold"), (float("nan"), "float32", "are not finite")],
)
def test_weights_that_would_be_broken_are_refused(tmp_path, exported, value, dtype, message):
    broken = copy.deepcopy(exported[0].network)
    broken.unet.conv_in.weight.data[0, 0, 0, 0] = value
    made = dataclasses.replace(exported[0], network=broken)
    with pytest.raises(ValueError, match=f"conv_in.weight has values that {message}"):
        export_diffusers(made, tmp_path / "out", dtype=dtype)
    assert not [*tmp_path.iterdir()]


def test_sdxl_needs_a_unet_that_is_told_sizes(tmp_path):
    tiny.sdxl_folder(tmp_path / "xl")
    made = model(conditioner=SDXLConditioner(str(tmp_path / "xl")))
    with pytest.raises(ValueError, match="addition_embed_type=.*, but StableDiffusionXLPip"):
        export_diffusers(made, tmp_path / "out")


def test_pickles_of_others_are_named(tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes(b"x")
    arguments = ["export", str(tmp_path / "model.pt"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "is a pickle: convert it to .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "image_size"), [([8, 8], 32), ([4, 8], None), ("4", None)])
def test_latents_are_square(tmp_path, exported, size, image_size):
    shutil.copytree(exported[1], tmp_path / "folder")
    path = tmp_path / "folder" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": size}))
    if image_size is None:
        with pytest.raises(ValueError, match="wanted one whole number"):
            read_exportable(str(tmp_path / "folder"))
    else:
        assert read_exportable(str(tmp_path / "folder"))[0].image_size == image_size


def test_a_kill_leaves_no_folder(tmp_path, exported, monkeypatch):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr("zsnr.interop.export.model_card", die)
        export_diffusers(exported[0], tmp_path / "out")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    [left] = tmp_path.glob(".out.*.part")
    assert (left / "model_index.json").is_file()  # it was nearly done


def test_a_failure_leaves_nothing(tmp_path, exported, monkeypatch):
    monkeypatch.setattr("zsnr.interop.export.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_diffusers(exported[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished training run, by YAML."""
    folder = tmp_path_factory.mktemp("run")
    tiny.write_shards(folder / "shards", [6])
    tiny.write_shards(folder / "shards", [4], "val")
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "val_check_interval": 2,
            "logger": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
        },
        "model": {
            **tiny.MODEL,
            "codec": CODEC,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "sampling": {"num_steps": 4, "guidance": {"scale": 2.5, "rescale": 0.6}},
        },
        "data": {
            "train": f"{folder}/shards/train-*.tar",
            "val": f"{folder}/shards/val-*.tar",
            "image_size": 16,
            "batch_size": 4,
            "num_workers": 0,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "-c", str(folder / "config.yaml")]) == 0
    return folder


@pytest.mark.peer
def test_from_yaml_to_diffusers(run, capsys, monkeypatch, tmp_path):
    checkpoint = run / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    assert main(["export", str(checkpoint), "--output", str(run / "out")]) == 0
    assert capsys.readouterr().out == f"{run / 'out'}\n"
    made, facts = read_exportable(str(checkpoint))
    assert_same(made, load(run / "out"), 10, guidance=Guidance(2.5, 0.6))
    names = run_snippet(run / "out", tmp_path, monkeypatch)
    assert names["image"].size == (16, 16)
    card = (run / "out" / "README.md").read_text()
    for line in (
        "num_inference_steps=4,",
        "guidance_scale=2.5,",
        "guidance_rescale=0.6,",
        "| steps | 2 |",
        "| batch | 4 |",
        "| learning rate | 0.01 |",
        "| weights here | averaged |",
        f"| val/loss | {facts['metrics']['val/loss']:g} |",
    ):
        assert line in card, line


def test_raw_weights_and_facts_as_json(run, capsys):
    checkpoint = str(run / "checkpoints" / "last.ckpt")
    options = ["--raw", "--json", "--dtype", "bfloat16"]
    assert main(["export", str(run), "--output", str(run / "raw"), *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["weights"], facts["dtype"], facts["terminal_snr"]) == ("raw", "bfloat16", 0.0)
    assert facts["global_step"] == 2
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    unet = load_file(run / "raw" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, tensor in unet.items():
        assert torch.equal(tensor, weights[f"trained.unet.unet.{name}"].bfloat16())
    assert any(
        not torch.equal(weights[f"trained.unet.unet.{n}"], weights[f"ema.unet.unet.{n}"])
        for n in unet
    )


@pytest.mark.peer
def test_a_folder_is_exported_again(exported, tmp_path):
    made, folder = exported
    assert main(["export", str(folder), "--output", str(tmp_path / "again")]) == 0
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        first, second = (load_file(f / f"{name}.safetensors") for f in (folder, tmp_path / "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert_same(made, load(tmp_path / "again"), 5)
    assert "| started from | model |" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{run}/checkpoints/last.ckpt", "--output", "{run}"], "exists: choose another name"),
        (["{run}/checkpoints/last.ckpt", "--output", "{run}/config.yaml/x"], "cannot be written"),
        (["{run}/nothing.ckpt", "--output", "{run}/x"], "does not exist: wanted a checkpoint"),
        (["{run}/shards", "--output", "{run}/x"], "holds no model_index.json"),
        (["{run}/shards", "--output", "{run}/x", "--raw"], "omit --raw"),
        (
            ["{run}/checkpoints/last.ckpt", "--output", "{run}/x", "--format", "single-file"],
            "ends in .safetensors",
        ),
        (
            [
                "{run}/checkpoints/last.ckpt",
                "--output",
                "{run}/x.safetensors",
                "--format=diffusers",
            ],
            "Use --format single-file",
        ),
    ],
)
def test_wrong_commands_end_with_one_line(run, capsys, options, message):
    capsys.readouterr()
    assert main(["export", *(option.format(run=run) for option in options)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert err.count("zsnr: error:") == 1


def test_a_checkpoint_that_cannot_go_is_refused_before_its_weights(tmp_path, monkeypatch, capsys):
    from zsnr.checkpoints.checkpoint_file import describe_model

    checkpoint = {"state_dict": {}, "zsnr": describe_model(tiny.model())}
    torch.save(checkpoint, tmp_path / "pixels.ckpt")
    monkeypatch.setattr("zsnr.interop.export.read_checkpoint", lambda *_, **__: 1 / 0)
    command = ["export", str(tmp_path / "pixels.ckpt"), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "PixelCodec" in capsys.readouterr().err


def test_an_export_is_uploaded(run, capsys, monkeypatch):
    done = []

    class Hub:
        def create_repo(self, repo, **options):
            done.append((repo, options))
            return f"https://hub/{repo}"

        def upload_folder(self, *, repo_id, folder_path):
            done.append(sorted(path.name for path in folder_path.iterdir()))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    command = ["export", str(run), "--output", str(run / "pushed"), "--push", "me/model"]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{run / 'pushed'}\nhttps://hub/me/model\n"
    assert done[0] == ("me/model", {"private": True, "exist_ok": True})
    assert {"README.md", "model_index.json", "unet"} <= {*done[1]}

    monkeypatch.setattr(Hub, "upload_folder", lambda *_, **__: 1 / 0)
    command[3] = str(run / "kept")
    assert main(command) == 2
    assert f"{run / 'kept'} is complete, but was not uploaded" in capsys.readouterr().err
    assert (run / "kept" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [("model", "x", "wanted OWNER/NAME"), ("me/model", None, "nobody is logged in to the hub")],
)
def test_an_upload_that_cannot_be_is_refused_first(run, capsys, monkeypatch, repo, token, message):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    command = ["export", str(run), "--output", str(run / "never"), "--push", repo]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (run / "never").exists()
