import copy
import dataclasses

import pytest
import tiny
import torch

from zsnr import Conditioning, Denoiser, NoiseSchedule
from zsnr.described import build, describe
from zsnr.networks import UNet, UNetConfig


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
    unet.compile_blocks("eager", several_shapes=True)
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
