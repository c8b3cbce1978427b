"""What `zsnr plan` foretells, against models that are really there."""

import contextlib
import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from torch import nn

from zsnr import Guidance
from zsnr.checkpoints.checkpoint_file import describe_model
from zsnr.cli import main
from zsnr.codecs import PixelCodec
from zsnr.networks import UNet, UNetConfig
from zsnr.pipeline import TextToImage
from zsnr.planning.estimate import (
    GIB,
    Parts,
    Sharding,
    gathered_size,
    modules_of,
    shard_size,
    training_pass,
)
from zsnr.planning.memory import (
    LiveBytes,
    kept_for_backward,
    norms_in_float32,
    size_of,
    tensors_of,
)
from zsnr.planning.plan import make_plan
from zsnr.planning.sampling import Request, plan_sampling, read_weightless, sampling_need
from zsnr.training import LatentDiffusion
from zsnr.training.lightning_cli import parse_fit
from zsnr.weights.ldm_file import PUBLIC

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.yaml")
HALF = ["-c", str(ROOT / "configs" / "trainer" / "fsdp.yaml"), "--trainer.accelerator", "cpu"]
SHARDED = [*HALF, "--trainer.strategy.init_args.param_dtype", "null"]
SHARD_RANKS = "--trainer.strategy.init_args.shard_ranks"
# A few attention layers more than tiny.UNET has, so that a block is no small part of it.
LARGER = UNetConfig((16, 32, 64), 2, (True, True, False), 16, 1, 8)


@pytest.fixture
def plan(capsys):
    """Run `zsnr plan ... --json` and return its figures and exit code."""

    def run(*arguments):
        capsys.readouterr()
        code = main(["plan", *arguments, "--json"])
        return json.loads(capsys.readouterr().out), code

    return run


def parsed(settings):
    return parse_fit(["-c", TINY, *settings])


def module(**options):
    torch.manual_seed(0)
    settings = {
        "codec": PixelCodec(2),
        "conditioner": tiny.conditioner(trainable=True),
        "network": tiny.UNET,
        "image_size": 16,
        **options,
    }
    return LatentDiffusion(**settings)


def test_tiny_has_a_table(capsys):
    assert main(["plan", TINY, "--images-per-second", "0.01", "--memory", "1"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "parameters: UNet 0.3 M, text encoder 0.8 M",
        "1 rank, one device, precision 32-true",
        "4 images of 16x16 per step = 1 rank x 4 images",
        "4 steps, 16 images, 26.7 minutes at 0.01 images/s",
        "optimizer state",
        "stored for 4 images",
        "fits in 1.00 GiB",
    ):
        assert part in text
    assert "codec" not in text
    assert "not included" not in text


def test_states_are_those_of_a_real_model(plan):
    facts, code = plan(TINY)
    model = module()
    optimizer = model.make_optimizer(model.trained.parameters())
    for parameter in model.trained.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [x for part in optimizer.state.values() for x in part.values() if x.ndim]
    sizes = facts["bytes_per_rank"]
    assert code == 0
    assert sizes["parameters"] == sizes["gradients"] == size_of(model.trained.parameters())
    assert sizes["optimizer"] == size_of(state)
    assert sizes["average"] == size_of(model.ema.parameters())
    assert sizes["buckets"] == sizes["gathered"] == sizes["codec"] == sizes["text_encoder"] == 0
    assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total")


def test_averages_for_after_the_run_are_counted(plan):
    own = plan(TINY)[0]["bytes_per_rank"]["average"]
    lengths = ("--model.post_hoc_ema.sigma_rel", "[0.05, 0.1]")
    more = plan(TINY, *lengths)[0]["bytes_per_rank"]["average"]
    assert more == 3 * own


@pytest.mark.parametrize("config", [tiny.UNET, LARGER])
@pytest.mark.parametrize(
    ("autocast", "on_gpu"), [(None, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_pass(config, autocast, checkpointing, on_gpu):
    with torch.device("meta"):
        unet = UNet(config, channels=12, context_dim=16)
        text = tiny.conditioner(trainable=True)
    parts = Parts(unet, text, PixelCodec(2), 32, autocast, on_gpu, True, True, True, 2.0, True)
    kept, peak = training_pass(parts, 3, checkpointing, None)

    real = nn.ModuleDict({"unet": UNet(config, channels=12, context_dim=16)})
    real["text"] = tiny.conditioner(trainable=True)
    real.train()
    if checkpointing:
        real["unet"].enable_gradient_checkpointing()
    if on_gpu:
        norms_in_float32(real)
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = tensors_of(real)
    live = LiveBytes([*known, *(p.grad for p in real.parameters())])
    with live, torch.autocast("cpu", autocast, autocast is not None):
        with kept_for_backward(known) as found:
            cond = real["text"]([""] * 3)
            output = real["unet"](torch.randn(3, 12, 16, 16), torch.tensor([0, 5, 999]), cond)
            loss = output.float().square().mean()
        loss.backward()
    assert kept == pytest.approx(sum(found.values()), rel=0.1)
    assert peak == pytest.approx(live.peak, rel=0.1)
    assert peak >= kept


def test_checkpointing_keeps_less_and_names_what_is_recomputed(plan):
    large = [TINY, "--data.image_size", "64"]
    without, _ = plan(*large)
    facts, _ = plan(*large, "--model.gradient_checkpointing", "true")
    before, after = without["bytes_per_rank"], facts["bytes_per_rank"]
    assert after["activations"] < 0.7 * before["activations"]
    assert after["working"] > 0
    assert after["total"] < before["total"]


def test_norms_of_a_gpu_keep_float32():
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        plain = net[1](net[0](x))
        norms_in_float32(net)
        kept = net[1](net[0](x))
    assert (plain.dtype, kept.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(kept, plain.float(), atol=0.02, rtol=0.02)


def bytes_of_shards(shard_ranks):
    """Shard a UNet as FullyShardedStrategy does; return the bytes this rank holds."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    world = dist.get_world_size()
    shape, names = (world // shard_ranks, shard_ranks), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    unet = UNet(LARGER, channels=12, context_dim=16)
    for part in (*unet.blocks(), unet):
        fully_shard(part, mesh=mesh)
    return size_of(p.to_local() for p in unet.parameters())


@pytest.mark.parametrize("number", [1, 2, 4])
def test_shards_are_those_of_fsdp(ranks, number):
    with torch.device("meta"):
        unet = UNet(LARGER, channels=12, context_dim=16)
    assert shard_size(unet.parameters(), number) == max(ranks[4](bytes_of_shards, number))


def test_hybrid_shards_have_a_way_out(plan, capsys):
    multinode = str(Path(TINY).parent / "trainer" / "fsdp_multinode.yaml")
    memory = ["--ranks", "4", "--ranks-per-node", "2", "--trainer.accelerator", "cpu"]
    whole, _ = plan(TINY, multinode, *memory)
    less = whole["bytes_per_rank"]["total"] * 0.9 / GIB
    assert main(["plan", TINY, multinode, *memory, "--memory", str(less)]) == 1
    assert "way out: shard_ranks=all" in capsys.readouterr().out


def test_a_shard_has_whole_rows():
    tensors = [torch.empty(5, 3), torch.empty(2), torch.empty(())]
    assert shard_size(tensors, 4) == 4 * (2 * 3 + 1 + 1)
    assert shard_size(tensors, 4, torch.bfloat16) == 2 * (2 * 3 + 1 + 1)
    assert shard_size(tensors, 1) == size_of(tensors)


def test_fsdp_gathers_root_and_neighbouring_blocks():
    with torch.device("meta"):
        unet = UNet(LARGER, channels=12, context_dim=16)
    whole = size_of(unet.parameters())
    sizes = [size_of(block.parameters()) for block in unet.blocks()]
    root = whole - sum(sizes)
    pair = max(a + b for a, b in itertools.pairwise(sizes))
    parts = nn.ModuleDict({"unet": unet})
    gathered = gathered_size(parts, Sharding("FSDP", 4, 4, 4))
    assert gathered == root + pair + 2 * max(sizes)
    half = Sharding("FSDP", 4, 4, 4, torch.bfloat16, torch.float32)
    assert gathered_size(parts, half) == root / 2 + pair / 2 + 1.5 * max(sizes)
    kept = Sharding("FSDP", 4, 4, 4, reshard_after_forward=False)
    assert gathered_size(parts, kept) == whole + 2 * max(sizes)
    assert gathered_size(parts, Sharding("DDP", 4, 4)) == 0


def test_strategies(plan):
    alone, _ = plan(TINY)
    ddp, _ = plan(TINY, "--ranks", "4")
    view = ["--trainer.strategy", "lightning.pytorch.strategies.DDPStrategy"]
    view += ["--trainer.strategy.gradient_as_bucket_view", "true"]
    bucketed, _ = plan(TINY, "--ranks", "4", *view)
    fsdp, _ = plan(TINY, "--ranks", "4", *SHARDED)
    hybrid, _ = plan(TINY, "--ranks", "4", "--ranks-per-node", "2", *SHARDED, SHARD_RANKS, "node")
    assert [facts["strategy"]["kind"] for facts in (alone, ddp, fsdp, hybrid)] == [
        "one device",
        "DDP",
        "FSDP",
        "FSDP",
    ]
    whole = alone["bytes_per_rank"]["parameters"]
    assert ddp["bytes_per_rank"]["parameters"] == ddp["bytes_per_rank"]["buckets"] == whole
    assert bucketed["bytes_per_rank"]["buckets"] == 0
    for name in ("parameters", "gradients", "optimizer", "average"):
        whole = alone["bytes_per_rank"][name]
        assert whole / 4 <= fsdp["bytes_per_rank"][name] < 1.05 * whole / 4
        assert whole / 2 <= hybrid["bytes_per_rank"][name] < 1.05 * whole / 2
    assert hybrid["strategy"]["shards"] == 2
    assert fsdp["bytes_per_rank"]["gathered"] > 0


def test_half_precision_gathers_and_keeps_less(plan):
    full, _ = plan(TINY, "--ranks", "2", *SHARDED)
    half, _ = plan(TINY, "--ranks", "2", *HALF)
    before, after = full["bytes_per_rank"], half["bytes_per_rank"]
    assert half["strategy"]["param_dtype"] == "bfloat16"
    assert half["strategy"]["reduce_dtype"] == "float32"
    assert after["parameters"] == before["parameters"]
    assert after["gathered"] < before["gathered"]
    assert after["activations"] < 0.7 * before["activations"]


def test_the_batch_is_divided_and_time_is_told(plan):
    bounded = ["--data.batch_size", "48", "--data.max_batch_size_per_device", "9"]
    facts, _ = plan(
        TINY, *bounded, "--trainer.devices", "2", "--trainer.max_steps", "300",
        "--images-per-second", "2",
    )  # fmt: skip
    assert facts["strategy"]["ranks"] == 2
    assert (facts["micro_batch"], facts["accumulation"]) == (8, 3)
    assert (facts["steps"], facts["images"]) == (300, 14400)
    assert facts["hours"] == pytest.approx(2.0)
    unsaid, _ = plan(TINY, "--trainer.max_steps", "-1")
    assert unsaid["images"] is unsaid["hours"] is unsaid["fits"] is None


def test_later_files_lie_over_earlier_ones(plan, tmp_path):
    (tmp_path / "more.yaml").write_text("data: {batch_size: 6}\nmodel: {ema: null}\n")
    for arguments in ([TINY, f"{tmp_path}/more.yaml"], ["-c", TINY, "-c", f"{tmp_path}/more.yaml"]):
        facts, _ = plan(*arguments)
        assert facts["batch_size"] == 6
        assert facts["bytes_per_rank"]["average"] == 0


@pytest.mark.parametrize(
    ("settings", "ranks", "change"),
    [
        (["--data.batch_size", "32"], None, "data.max_batch_size_per_device="),
        (["--data.batch_size", "1", "--data.image_size", "64"], None, "gradient_checkpointing"),
        (["--data.batch_size", "4"], 4, "FullyShardedStrategy"),
    ],
)
def test_what_does_not_fit_has_a_way_out(settings, ranks, change):
    total = make_plan(parsed(settings), ranks=ranks).need.total
    limits = {"ranks": ranks, "memory": 0.88 * total / GIB}
    plan = make_plan(parsed(settings), **limits)
    assert plan.facts()["fits"] is False
    assert change in plan.way_out
    changed = []
    for setting in plan.way_out.removeprefix("way out: ").rpartition(":")[0].split(", "):
        changed += SHARDED if setting == "FullyShardedStrategy" else [f"--{setting}"]
    fitting = make_plan(parsed([*settings, *changed]), **limits)
    assert (fitting.fits, fitting.way_out) == (True, None)
    text = plan.table()
    assert "does not fit in" in text
    assert plan.way_out in text
    assert max(map(len, text.splitlines())) <= 100


def test_what_never_fits_has_none(plan):
    facts, code = plan(TINY, "--memory", "0.001")
    assert code == 1
    assert facts["way_out"].startswith("no way out on 1 rank: ")


def test_pretrained_parts_need_their_configs_only(plan, tmp_path):
    from diffusers import AutoencoderKL

    sizes = {}
    options = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2}
    vae = AutoencoderKL(**options, **blocks, up_block_types=["UpDecoderBlock2D"] * 2)
    text = tiny.frozen_conditioner(tmp_path / "text")
    unet = UNet(tiny.UNET, channels=4, context_dim=16).unet
    for name, part in (("vae", vae), ("text", text.load().encoder), ("unet", unet)):
        part.save_pretrained(tmp_path / name)
        sizes[name] = size_of(part.parameters())
        for weights in (tmp_path / name).glob("*.safetensors"):
            weights.unlink()
    codec = {"pretrained": str(tmp_path), "subfolder": "vae"}
    encoder = {"pretrained": f"{tmp_path}/text", "tokenizer": "open_clip", "max_length": 8}
    classes = {"codec": ("AutoencoderKLCodec", codec)}
    classes["conditioner"] = ("TransformersConditioner", encoder)
    model = {k: {"class_path": cls, "init_args": args} for k, (cls, args) in classes.items()}
    config = yaml.safe_load(Path(TINY).read_text())
    config["model"] = {**model, "network": str(tmp_path)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    facts, code = plan(f"{tmp_path}/config.yaml")
    found = facts["bytes_per_rank"]
    assert code == 0
    assert found["parameters"] == sizes["unet"]
    assert found["codec"] == sizes["vae"]
    assert found["text_encoder"] == pytest.approx(sizes["text"], rel=0.01)  # buffers too
    halved, _ = plan(f"{tmp_path}/config.yaml", "--model.codec.init_args.dtype", "bfloat16")
    assert halved["bytes_per_rank"]["codec"] == sizes["vae"] / 2


def test_a_cache_takes_the_place_of_frozen_parts(plan, tmp_path):
    config = yaml.safe_load(Path(TINY).read_text())
    tiny.write_shards(tmp_path / "shards", [3])
    tiny.frozen_conditioner(tmp_path / "text")
    config["data"]["train"] = f"{tmp_path}/shards/train-*.tar"
    encoder = {"pretrained": f"{tmp_path}/text", "tokenizer": "open_clip", "max_length": 8}
    config["model"]["codec"] = {
        "class_path": "AutoencoderKLCodec",
        "init_args": {"pretrained": "asset:openmoji_vae"},
    }
    config["model"]["conditioner"] = {"class_path": "TransformersConditioner", "init_args": encoder}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    own = f"{tmp_path}/config.yaml"
    pictures, _ = plan(own)
    assert main(["data", "cache", "-c", own, "--output", f"{tmp_path}/cache", "--text"]) == 0
    cached = [own, "--data.train", f"{tmp_path}/cache"]
    facts, _ = plan(*cached)
    assert pictures["bytes_per_rank"]["codec"] > 0
    assert pictures["bytes_per_rank"]["text_encoder"] > 0
    assert facts["bytes_per_rank"]["codec"] == facts["bytes_per_rank"]["text_encoder"] == 0
    assert facts["bytes_per_rank"]["working"] <= pictures["bytes_per_rank"]["working"]
    shown = {"class_path": "zsnr.training.Previews", "init_args": {"prompts": ["a"]}}
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [shown]}}))
    facts, _ = plan(*cached, "-c", f"{tmp_path}/shown.yaml")
    assert facts["bytes_per_rank"]["codec"] == pictures["bytes_per_rank"]["codec"]


@pytest.mark.parametrize("train", ["pictures", "cache"])
def test_the_rate_is_measured(plan, tmp_path, train):
    source = []
    if train == "cache":
        tiny.write_shards(tmp_path / "shards", [3])
        shards = f"{tmp_path}/shards/train-*.tar"
        made = ["data", "cache", "-c", TINY, "--data.train", shards]
        assert main([*made, "--output", f"{tmp_path}/cache"]) == 0
        source = ["--data.train", f"{tmp_path}/cache"]
    facts, code = plan(TINY, "--measure", "--ranks", "2", *source)
    assert code == 0
    assert 1 < facts["images_per_second"] < 10000
    assert facts["hours"] > 0


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A small model with the parts of SDXL."""
    folder = tmp_path_factory.mktemp("sdxl")
    tiny.sdxl_folder(folder)
    return folder


@pytest.fixture(scope="module")
def real_sdxl(sdxl, tmp_path_factory):
    """The folder of a model of SDXL's size, without weights."""
    folder = tmp_path_factory.mktemp("real") / "sdxl"
    shutil.copytree(sdxl, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, config in PUBLIC["xl"].items():
        (folder / part / "config.json").write_text(json.dumps(config))
    for path in folder.glob("tokenizer*/tokenizer_config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 77}))
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "batch_size": 3, "width": 32},
        {"dtype": "float32", "batch_size": 3, "max_rows": 2},
        {"dtype": "float32", "batch_size": 2, "guidance_scale": 1.0},
        {"dtype": "bfloat16", "batch_size": 2},
    ],
)
def test_sampling_needs_what_it_really_takes(sdxl, options):
    request = Request(height=64, **{"width": 64, **options})
    foretold = sampling_need(read_weightless(str(sdxl), request), request)
    pipe = TextToImage.from_pretrained(sdxl, dtype=request.dtype, device="cpu")
    model = pipe.model
    parts = {
        "text_encoder": tensors_of(model.conditioner),
        "network": tensors_of(model.network),
        "vae": tensors_of(*modules_of(model.codec)),
    }
    assert foretold.weights == {name: size_of(part) for name, part in parts.items()}
    peaks = []
    with LiveBytes(tensor for part in parts.values() for tensor in part) as live:
        pipe(
            ["a"] * request.batch_size,
            negative_prompts=["b"] * request.batch_size,
            height=64,
            width=request.width,
            num_steps=2,
            guidance=Guidance(request.guidance_scale or 5),
            batch_size=request.batch_size,
            max_rows=request.max_rows,
            progress=False,
            callback=lambda *_: peaks.append(live.restart()),
        )
    assert foretold.working["denoising"] == pytest.approx(peaks[0], rel=0.1)
    assert foretold.working["decoding"] == pytest.approx(live.peak, rel=0.1)
    assert 0 < foretold.working["encoding"] < foretold.working["denoising"]


def test_sdxl_fits_into_12_gib(real_sdxl):
    plans = {}
    for dtype in ("float16", "float32"):
        request = Request(dtype=dtype, offload=dtype == "float16")
        plans[dtype] = plan_sampling(partial(read_weightless, real_sdxl), request)
    half, full = plans["float16"], plans["float32"]
    weights, working = half.need.weights, half.need.working
    assert half.dtypes == {"text_encoder": "float16", "network": "float16", "vae": "float32"}
    assert (half.height, half.width, half.rows) == (1024, 1024, 2)
    assert weights["network"] == 2 * 2_567_463_684  # the parameters of the public model
    assert weights["vae"] == 4 * 83_653_863
    assert half.total == weights["network"] + working["denoising"]
    assert half.total / GIB == pytest.approx(5.09, abs=0.01)
    assert half.need.total(offload=False) == sum(weights.values()) + working["decoding"]
    assert half.need.peaks(offload=True)["decoding"] == weights["vae"] + working["decoding"]
    assert half.need.total(offload=False) < 12 * GIB < full.total
    assert max(map(len, full.table().splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "memory", "change"),
    [
        ({}, 0.85, "--dtype float16"),
        ({"dtype": "float16"}, 0.95, "--offload"),
        ({"dtype": "float16", "height": 128, "width": 128, "guidance_scale": 1.0}, 0.72, "--vae-t"),
        ({"batch_size": 4}, 0.42, "--batch-size 2"),
    ],
)
def test_sampling_that_does_not_fit_has_a_way_out(plan, sdxl, options, memory, change, capsys):
    request = Request(**options)
    total = sampling_need(read_weightless(str(sdxl), request), request).total(offload=False)
    given = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    limit = ["--memory", str(memory * total / GIB)]
    facts, code = plan(str(sdxl), "--predict", *given, *limit)
    assert code == 1
    assert change in facts["way_out"]
    way_out = facts["way_out"].removeprefix("way out: ").rpartition(":")[0].split()
    assert main(["plan", str(sdxl), "--predict", *given, *way_out, *limit]) == 0
    text = capsys.readouterr().out
    assert "to spare" in text
    assert max(map(len, text.splitlines())) <= 100


def test_checkpoints_and_configs_are_planned_for_sampling(plan, tmp_path):
    model, weights = tiny.model(), {}
    for prefix in ("ema", "trained"):
        for name, part in (("unet", model.network), ("conditioner", model.conditioner)):
            state = part.state_dict()
            weights |= {f"{prefix}.{name}.{key}": weight for key, weight in state.items()}
    torch.save({"zsnr": describe_model(model), "state_dict": weights}, tmp_path / "a.ckpt")
    sizes = {"text_encoder": size_of(tensors_of(model.conditioner)), "vae": 0}
    sizes["network"] = size_of(tensors_of(model.network))
    sampling = {"guidance_against": "raw", "guidance_scale": 2.0}
    declared = {"zsnr": describe_model(model), "state_dict": weights, "run": {"sampling": sampling}}
    torch.save(declared, tmp_path / "raw.ckpt")
    for name in ("a.ckpt", "raw.ckpt"):
        facts, code = plan(f"{tmp_path}/{name}", "--predict")
        raw = name == "raw.ckpt"
        assert code == 0
        assert facts["weights"] == {**sizes, "network": sizes["network"] * (1 + raw)}
        assert facts["rows"] == 2 - raw
    facts, _ = plan(f"{tmp_path}/a.ckpt", "--predict", "--dtype", "float16")
    assert facts["weights"]["network"] == sizes["network"] / 2
    trained = module()
    facts, _ = plan(TINY, "--predict", "--data.image_size", "32")
    assert facts["weights"]["network"] == size_of(tensors_of(trained.trained["unet"]))
    assert facts["weights"]["text_encoder"] == size_of(tensors_of(trained.trained["conditioner"]))
    assert (facts["height"], facts["rows"], facts["dtypes"]["network"]) == (32, 2, "float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan needs a config"),
        ([TINY, "--memory", "0"], "--memory 0: wanted more than 0"),
        ([TINY, "--ranks", "0"], "--ranks 0: wanted at least 1"),
        ([TINY, "--ranks", "3"], "does not divide into 3 ranks"),
        ([TINY, "--ranks", "4", "--ranks-per-node", "3"], "wanted whole nodes"),
        ([TINY, "--trainer.accelerator", "gpu", "--trainer.devices", "auto"], "give --ranks N"),
        ([TINY, "--trainer.strategy", "fsdp"], "trainer.strategy=fsdp is not one that plan knows"),
        ([TINY, "--trainer.precision", "64-true"], "not one that plan knows"),
        ([TINY, "--trainer.precision", "bf16-true"], "averaged weights in half precision"),
        ([TINY, "--data.batch_siez", "3"], "Did you mean --data.batch_size?"),
        ([TINY, "--model.conditioner.config", "null"], "needs either `pretrained` or `config`"),
        ([TINY, "--data.max_batch_size_per_device", "0"], "wanted at least 1"),
        ([TINY, *SHARDED, SHARD_RANKS, "2"], "does not divide the 1 ranks"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["runs/a.ckpt"], "not a config, but a model: add --predict"),
        ([str(ROOT)], "not a config, but a model: add --predict"),
        (["nowhere", "--predict"], "nowhere does not exist"),
        (["nowhere", "--predict", "--data.train", "x"], "a model, which has no settings: leave"),
        ([TINY, "--offload"], "--offload is of sampling, which --predict plans: leave it out"),
        ([TINY, "--predict", "--ranks", "2"], "--ranks is of training, and --predict plans"),
        ([TINY, "--predict", "--batch-size", "0"], "batch_size=0: wanted at least 1"),
        ([TINY, "--predict", "--height", "17"], "height=17: wanted a positive multiple of 2"),
        ([TINY, "--predict", "--vae-tiling"], "vae_tiling=True: the model's codec is a PixelCodec"),
    ],
)
def test_wrong_input_exits_with_2(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert error.startswith("zsnr: error: ")


def test_help_explains_every_option(capsys):
    with contextlib.suppress(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    for option in ("--ranks N", "--ranks-per-node N", "--memory X", "--images-per-second X"):
        assert option in text
    assert "--measure" in text
