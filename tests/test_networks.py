import copy
import dataclasses

import pytest
import tiny
import torch
from torch import nn

from zsnr import Conditioning, Denoiser, NoiseSchedule
from zsnr.described import build, describe
from zsnr.networks import (
    DiffusionNetwork,
    Transformer,
    UNet,
    UNetConfig,
    blocks_of,
    check_network,
    compile_blocks,
    describe_network,
    enable_gradient_checkpointing,
    record_arguments,
    takes_sizes,
)


def new(config=tiny.UNET, **options):
    torch.manual_seed(0)
    return UNet(config, channels=12, context_dim=16, **options).eval()


@pytest.mark.parametrize(
    "config", [tiny.UNET, UNetConfig((16, 32), 1, (True, True), 8, 2, 8, True, True)]
)
def test_it_is_a_network_and_is_built_again(config):
    unet = new(config)
    cond = Conditioning(torch.randn(2, 8, 16), torch.ones(2, 8, dtype=torch.bool))
    x, t = torch.randn(2, 12, 8, 8), torch.tensor([999, 3])
    x_0 = Denoiser(unet, NoiseSchedule(), cond=cond)(x, t)
    assert x_0.shape == x.shape
    again = build(describe(unet), UNet)
    again.load_state_dict(unet.state_dict())
    torch.testing.assert_close(again.eval()(x, t, cond), unet(x, t, cond))
    heads = config.block_out_channels[-1] // config.attention_head_dim
    attention = unet.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.heads == heads


def test_masked_tokens_do_not_count():
    unet, x, t = new(), torch.randn(1, 12, 8, 8), torch.tensor([500])
    context = torch.randn(1, 8, 16)
    mask = torch.arange(8).view(1, -1) < 3
    other = context.clone()
    other[:, 3:] = torch.randn(1, 5, 16)
    same = [unet(x, t, Conditioning(c, mask)) for c in (context, other)]
    torch.testing.assert_close(*same)
    assert not torch.allclose(unet(x, t, Conditioning(other)), same[0], atol=1e-5)


def test_pretrained_folder(tmp_path):
    unet = new()
    unet.unet.save_pretrained(tmp_path / "unet")
    again = UNet(pretrained=str(tmp_path), channels=12, context_dim=16).eval()
    for name, weight in unet.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    with pytest.raises(ValueError, match="in_channels=12 but the codec's latents have 4"):
        UNet(pretrained=str(tmp_path), channels=4, context_dim=16)
    with pytest.raises(ValueError, match="has width 16 but the conditioner has 8"):
        UNet(pretrained=str(tmp_path), channels=12, context_dim=8)
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        UNet(pretrained=str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": (True,)}, "wanted one for each resolution"),
        ({"norm_groups": 7}, "not a multiple of norm_groups=7"),
        ({"attention_head_dim": 48}, "not a multiple of attention_head_dim=48"),
        ({"attention_head_dim": 0}, "attention_head_dim=0: wanted 1 to 65536"),
        ({"norm_groups": 0}, "norm_groups=0: wanted 1 to 65536"),
        ({"layers_per_block": -1}, "layers_per_block=-1: wanted 1 to 65536"),
        ({"block_out_channels": (2**30, 2**30)}, "wanted 1 to 65536"),
        ({"block_out_channels": (-16, 32)}, "wanted 1 to 65536"),
    ],
)
def test_wrong_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**settings)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="either"):
        UNet()
    with pytest.raises(ValueError, match="needs `channels`"):
        UNet(tiny.UNET)
    with pytest.raises(ValueError, match="needs conditioning"):
        new()(torch.randn(1, 12, 8, 8), torch.tensor([5]), None)


def test_what_a_library_says_of_a_config_is_one_line():
    config = {"block_out_channels": [8], "down_block_types": ["a\nb"], "up_block_types": ["a"]}
    with pytest.raises(ValueError, match=r"zsnr\.networks\.UNet: a b does not exist") as error:
        build({"class_path": "zsnr.networks.UNet", "init_args": {"config": config}}, UNet)
    assert "\n" not in str(error.value)


def test_blocks_are_compiled_once_for_all_shapes():
    """Four shapes of aspect-ratio buckets: the second epoch compiles nothing."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    small = dataclasses.replace(tiny.UNET, block_out_channels=(16,), attention=(True,))
    unet = UNet(small, channels=4, context_dim=8)
    plain = copy.deepcopy(unet)
    compile_blocks(unet, "eager", several_shapes=True)
    graphs = []
    for _ in range(2):
        for height, width in ((8, 8), (16, 4), (4, 16), (8, 12)):
            x = torch.randn(2, 4, height, width)
            t, cond = torch.tensor([1, 2]), Conditioning(torch.randn(2, 7, 8))
            torch.testing.assert_close(unet(x, t, cond), plain(x, t, cond))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert counters["frames"]["total"] == counters["frames"]["ok"]
    torch._dynamo.reset()


class Listed(DiffusionNetwork):
    """A network that says itself what its blocks are."""

    def __init__(self, width=3):
        super().__init__()
        self.width, self.only = width, nn.Linear(width, width)

    def forward(self, x_t, t, conditioning):
        return self.only(x_t)

    def settings(self):
        return {"width": self.width}

    def blocks(self):
        return [self.only]


def lists(**modules):
    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


def test_any_module_has_blocks():
    own = tiny.Own(width=16)
    assert blocks_of(own) == [*own.layers]  # not those of the small time embedding
    layers = [nn.Linear(9, 9) for _ in range(4)]
    assert blocks_of(lists(a=nn.Linear(9, 9), b=nn.Sequential(*layers))) == layers
    halves = lists(down=nn.ModuleList(layers[:2]), middle=layers[0], up=nn.ModuleList(layers[2:]))
    assert blocks_of(halves) == layers
    assert blocks_of(nn.ModuleDict({"inside": halves})) == layers
    nested = nn.ModuleList([nn.ModuleList(layers[:2]), nn.ModuleList([*layers[2:], nn.SiLU()])])
    assert blocks_of(lists(levels=nested)) == layers
    assert blocks_of(nn.Linear(9, 9)) == []
    assert blocks_of(listed := Listed()) == [listed.only]
    unet = new()
    assert blocks_of(unet) == [*unet.unet.down_blocks, unet.unet.mid_block, *unet.unet.up_blocks]


def test_what_is_no_network_is_refused():
    class Backwards(nn.Linear):
        def forward(self, x_t, t):
            return x_t

    check_network(tiny.Own())
    with pytest.raises(
        ValueError, match=r"Backwards: forward\(x_t, t\) cannot be .* forward\(x_t, t"
    ):
        check_network(Backwards(2, 2))
    with pytest.raises(ValueError, match=r"ListedNothing has no parameters to train"):
        check_network(type("ListedNothing", (DiffusionNetwork,), {"forward": lambda *_: None})())


def test_any_network_recomputes_its_activations():
    torch.manual_seed(0)
    own = tiny.Own()
    inputs = torch.randn(2, 12, 8, 8), torch.tensor([3.5, 999.0]), None
    own(*inputs).square().mean().backward()
    wanted = [parameter.grad.clone() for parameter in own.parameters()]
    counted = []
    own.layers[1].register_forward_hook(lambda *_: counted.append("whole"))
    own.zero_grad()
    enable_gradient_checkpointing(own)
    inner = own.layers[1]._conv_forward
    own.layers[1]._conv_forward = lambda *args: (counted.append("inner"), inner(*args))[1]
    copied = copy.deepcopy(own)
    own(*inputs).square().mean().backward()
    assert counted == ["inner", "whole", "inner"]
    for parameter, gradient in zip(own.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    copied.layers[0].weight.data.zero_()  # an average that is changed changes nothing else
    assert own.layers[0].weight.any()
    assert not torch.allclose(copied(*inputs), own(*inputs))
    with pytest.raises(ValueError, match=r"Linear has no nn\.ModuleList"):
        enable_gradient_checkpointing(nn.Linear(2, 2))


def test_any_network_is_compiled():
    torch._dynamo.reset()
    inputs = torch.randn(2, 12, 8, 8), torch.tensor([3, 999]), None
    for own in (tiny.Own(), lists(only=nn.Linear(3, 3))):
        plain = copy.deepcopy(own)
        compile_blocks(own, "eager")
        if isinstance(own, tiny.Own):
            torch.testing.assert_close(own(*inputs), plain(*inputs))
        assert own.state_dict().keys() == plain.state_dict().keys()
    torch._dynamo.reset()


def test_a_network_is_described_by_what_it_was_built_with():
    assert describe_network(tiny.Own()) == {"class_path": "tiny.Own"}
    own = tiny.Own(depth=3)
    record_arguments(own, {"channels": 12, "depth": 3})
    described = {"class_path": "tiny.Own", "init_args": {"channels": 12, "depth": 3}}
    assert describe_network(own) == describe_network(copy.deepcopy(own)) == described
    assert describe_network(Listed(4)) == {
        "class_path": f"{__name__}.Listed",
        "init_args": {"width": 4},
    }
    plain = DiffusionNetwork()
    assert describe_network(plain)["init_args"] == {}
    record_arguments(plain, {"width": 3})
    assert describe_network(plain)["init_args"] == {"width": 3}
    for arguments in ({"a": nn.SiLU()}, {"a": [{"class_path": "b.C"}]}):
        record_arguments(own, arguments)
        assert describe_network(own) == described


# Transformers of diffusers

PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "sample_size": 8,
    "caption_channels": 16,
    "use_additional_conditions": False,
}
SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
}
NAMES = {"PixArtTransformer2DModel": PIXART, "SD3Transformer2DModel": SD3}


def transformer(name, **settings):
    torch.manual_seed(0)
    return Transformer(name, {**NAMES[name], **settings}).eval()


def conditioning(**parts):
    torch.manual_seed(1)
    mask = torch.arange(5).view(1, -1) < torch.tensor([[5], [2]])
    context, pooled = torch.randn(2, 5, 16), torch.randn(2, 10)
    return Conditioning(**{"context": context, "mask": mask, "pooled": pooled, **parts})


@pytest.mark.parametrize("name", NAMES)
def test_a_transformer_of_diffusers_is_a_network(name, tmp_path):
    network, cond = transformer(name), conditioning()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999.0, 2.25])
    theirs = network.transformer
    if name.startswith("SD3"):
        given = {"pooled_projections": cond.pooled}
    else:
        none = {"resolution": None, "aspect_ratio": None}
        given = {"encoder_attention_mask": cond.mask, "added_cond_kwargs": none}
    output = theirs(x, encoder_hidden_states=cond.context, timestep=t, **given).sample
    assert torch.equal(network(x, t, cond), output[:, :4])  # without the learned variance
    assert output.shape[1] == NAMES[name]["out_channels"]
    assert not torch.equal(network(x, t + 0.5, cond), network(x, t, cond))
    assert blocks_of(network) == [*theirs.transformer_blocks]
    again = build(describe_network(network), Transformer).eval()
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x, t, cond), network(x, t, cond))
    theirs.save_pretrained(tmp_path / "transformer")
    read = Transformer(pretrained=str(tmp_path)).eval()
    assert read.name == name
    assert torch.equal(read(x, t, cond), network(x, t, cond))
    network.check_fits(4, 16, 10, 0)
    with pytest.raises(ValueError, match="in_channels=4 but the codec's latents have 16"):
        network.check_fits(16, 16, 10, 0)
    with pytest.raises(ValueError, match=r"=16 but the conditioner's width is 8"):
        network.check_fits(4, 8, 10, 0)
    with pytest.raises(ValueError, match="multiples of 2, the patch size"):
        network(x[..., :7], t, cond)
    with pytest.raises(ValueError, match="takes no labels, and the conditioning has some"):
        network(x, t, conditioning(labels=torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="needs Conditioning with context, and got none"):
        network(x, t, Conditioning(pooled=cond.pooled))


def test_a_large_pixart_is_told_the_size():
    wide = {"attention_head_dim": 12, "cross_attention_dim": 24}  # a multiple of 3
    network = transformer("PixArtTransformer2DModel", use_additional_conditions=True, **wide)
    assert takes_sizes(network)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 2])
    sizes = torch.tensor([[32, 32, 0, 0, 512, 1024]] * 2)
    added = {
        "resolution": torch.tensor([[512.0, 1024]] * 2),
        "aspect_ratio": torch.full((2, 1), 0.5),
    }
    cond = conditioning(sizes=sizes)
    output = network.transformer(
        x, cond.context, t, encoder_attention_mask=cond.mask, added_cond_kwargs=added
    ).sample
    assert torch.equal(network(x, t, cond), output[:, :4])
    with pytest.raises(ValueError, match="needs Conditioning with sizes"):
        network(x, t, conditioning())


def test_other_transformers_are_refused(tmp_path):
    for name in ("FluxTransformer2DModel", None, "UNet2DConditionModel"):
        with pytest.raises(
            ValueError, match="is not a transformer that this package knows. Known: P"
        ):
            Transformer(name, {})
    with pytest.raises(
        ValueError, match="PixArtTransformer2DModel has no 'layers'. Known: num_att"
    ):
        Transformer("PixArtTransformer2DModel", {"layers": 3})
    with pytest.raises(ValueError, match="either `config` or `pretrained`"):
        Transformer("PixArtTransformer2DModel")
    with pytest.raises(ValueError, match=r"holds no config\.json in transformer"):
        Transformer(pretrained=str(tmp_path))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ValueError, match="'FluxTransformer2DModel' is not a transformer that"):
        Transformer(pretrained=str(tmp_path))


# What else a UNet may take

FULL = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "mid_block_type": None,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "cross_attention_dim": 8,
}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"encoder_hid_dim": 8}, "encoder_hid_dim=8"),
        ({"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim=8"),
        ({"addition_embed_type": "image", "addition_time_embed_dim": 8}, "addition_embed_type="),
    ],
)
def test_inputs_of_a_unet_that_are_not_provided_are_refused(settings, name):
    with pytest.raises(ValueError, match=name):
        UNet({**FULL, **settings})


def test_a_unet_takes_class_labels_and_no_context():
    torch.manual_seed(0)
    unet = UNet({**FULL, "num_class_embeds": 4}, channels=4).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    one, other = (unet(x, t, Conditioning(labels=torch.tensor(n))) for n in ([0, 1], [0, 3]))
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1])
    with pytest.raises(ValueError, match="needs class labels .*, and the conditioning has none"):
        unet(x, t, Conditioning(context=torch.randn(2, 3, 8)))
    with pytest.raises(ValueError, match="has no class labels"):
        UNet(FULL)(x, t, Conditioning(labels=torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="attends to a context, and the conditioning has none"):
        new()(torch.randn(2, 12, 8, 8), t, Conditioning(pooled=torch.randn(2, 3)))


def test_a_unet_takes_channels_beside_those_of_x_t():
    torch.manual_seed(0)
    unet = UNet(tiny.UNET, channels=4, context_dim=16, concat_channels=5).eval()
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 3, 16)
    more = torch.randn(2, 5, 8, 8)
    output = unet(x, t, Conditioning(context, concat=more))
    assert torch.equal(output, unet.unet(torch.cat([x, more], 1), t, context).sample)
    again = build(describe_network(unet), UNet).eval()
    again.load_state_dict(unet.state_dict())
    assert torch.equal(again(x, t, Conditioning(context, concat=more)), output)
    with pytest.raises(ValueError, match="0 channels in concat: wanted 5"):
        unet(x, t, Conditioning(context))
    with pytest.raises(ValueError, match="9 input channels, .* or concat_channels=5 and Condition"):
        UNet(unet.settings()["config"])


def test_a_learned_variance_is_left_out():
    torch.manual_seed(0)
    unet = UNet({**FULL, "out_channels": 8, "mid_block_type": None}, channels=4).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    output = unet(x, t, Conditioning(pooled=torch.zeros(2, 1)))
    assert torch.equal(output, unet.unet(x, t, None).sample[:, :4])
