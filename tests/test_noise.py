import pytest
import torch

from zsnr import SampleNoise, derive_seed, offset_noise


def test_a_seed_belongs_to_a_sample():
    batch, alone = SampleNoise([3, 0, 7]), SampleNoise([0])
    for _ in range(3):
        assert torch.equal(batch.randn((4, 2))[1], alone.randn((4, 2))[0])
    x = torch.empty(3, 5, dtype=torch.float64)
    draw = batch.randn_like(x)
    assert draw.dtype == x.dtype
    assert draw.shape == x.shape
    assert not torch.equal(draw[0], batch.randn_like(x)[0])


def test_it_is_torchs_stream():
    torch.manual_seed(5)
    wanted = torch.randn(3, 4)
    assert torch.equal(SampleNoise([5]).randn((3, 4))[0], wanted)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_it_is_float32_on_the_cpu_whatever_the_defaults_are(default):
    wanted = SampleNoise([0, 1]).randn((3,))
    torch.set_default_dtype(default)
    try:
        assert torch.equal(SampleNoise([0, 1]).randn((3,)), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(SampleNoise([0, 1]).randn((3,)), wanted)
    x = torch.empty(2, 3, dtype=torch.float64)
    assert torch.equal(SampleNoise([0, 1]).randn_like(x), wanted.double())
    assert SampleNoise([0, 1]).randn_like(torch.empty(2)).shape == (2,)


@pytest.mark.parametrize("seeds", [[], [-1], [2**32], [True], [0.5]])
def test_wrong_seeds_are_refused(seeds):
    with pytest.raises((ValueError, TypeError)):
        SampleNoise(seeds)


def test_another_count_is_refused():
    with pytest.raises(ValueError, match="2 samples but 1 seeds"):
        SampleNoise([0]).randn_like(torch.empty(2, 3))


def test_derived_seeds_are_stable_and_apart():
    assert derive_seed(0, 1, 2) == derive_seed(0, 1, 2)
    keys = [(a, b, c) for a in range(12) for b in range(12) for c in range(12)]
    seeds = {derive_seed(*key) for key in keys} | {derive_seed(1, 11), derive_seed(11, 1)}
    assert len(seeds) == len(keys) + 2
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert derive_seed(torch.tensor(1), 2) == derive_seed(1, 2)
    with pytest.raises(TypeError):
        derive_seed(1.0)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 3, 1, 1)])
def test_offset_noise_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        offset_noise(torch.ones(2, 3, 4, 4), torch.ones(shape))


def test_offset_noise_moves_channels_together():
    z, d = torch.randn(20000, 2, 2, 2), torch.randn(20000, 2)
    eps = offset_noise(z, d)
    torch.testing.assert_close(eps - z, (0.1 * d)[:, :, None, None].expand_as(z), rtol=0, atol=1e-6)
    # variance 1 + 0.1^2, covariance inside a channel 0.1^2, between channels 0
    assert eps[:, 0, 0, 0].var().item() == pytest.approx(1.01, abs=0.03)
    assert (eps[:, 0, 0, 0] * eps[:, 0, 1, 1]).mean().item() == pytest.approx(0.01, abs=0.02)
    assert (eps[:, 0, 0, 0] * eps[:, 1, 1, 1]).mean().item() == pytest.approx(0.0, abs=0.02)
