import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from zsnr.metrics import (
    bootstrap_interval,
    luma,
    luma_percentile,
    mean_luma,
    rms_contrast,
    wasserstein_1,
)

numbers = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40)


def flat(*colour, size=(4, 5)):
    return torch.tensor(colour, dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, *size)


def test_luma_of_flat_colours_is_rec_709():
    assert mean_luma(flat(1, 1, 1)).item() == pytest.approx(1, abs=1e-15)
    assert mean_luma(flat(-1, -1, -1)).item() == pytest.approx(-1, abs=1e-15)
    # A pure primary on black is its weight, moved from [0, 1] to [-1, 1].
    for colour, weight in ((1, -1, -1), 0.2126), ((-1, 1, -1), 0.7152), ((-1, -1, 1), 0.0722):
        assert mean_luma(flat(*colour)).item() == pytest.approx(2 * weight - 1, abs=1e-15)
    assert luma(flat(0, 0, 0)).shape == (1, 4, 5)
    assert luma(flat(0, 0, 0).half()).dtype == torch.float32


def test_contrast_and_percentiles_of_known_pictures():
    assert rms_contrast(flat(0.3, -0.2, 0.9)).item() == pytest.approx(0, abs=1e-15)
    board = flat(1, 1, 1, size=(4, 4)).clone()
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = -1
    assert mean_luma(board).item() == pytest.approx(0, abs=1e-15)
    assert rms_contrast(board).item() == pytest.approx(1, abs=1e-15)
    # A ramp from -1 to 1: percentile q is -1 + 2 q / 100, the deviation that of a uniform grid.
    n = 101
    ramp = torch.linspace(-1, 1, n, dtype=torch.float64).expand(2, 3, 1, n)
    for q in (0, 1, 25, 99, 100):
        assert luma_percentile(ramp, q).tolist() == pytest.approx([-1 + q / 50] * 2, abs=1e-12)
    deviation = math.sqrt((n + 1) / (n - 1) / 3)
    assert rms_contrast(ramp).tolist() == pytest.approx([deviation] * 2, abs=1e-12)


def test_measures_agree_with_numpy():
    images = torch.rand(3, 3, 7, 9, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    y = np.einsum("c,bchw->bhw", [0.2126, 0.7152, 0.0722], images.numpy())
    np.testing.assert_allclose(luma(images), y, atol=1e-14)
    np.testing.assert_allclose(mean_luma(images), y.mean((1, 2)), atol=1e-14)
    np.testing.assert_allclose(rms_contrast(images), y.std((1, 2)), atol=1e-14)
    for q in (1, 37.5, 99):
        wanted = np.percentile(y.reshape(3, -1), q, axis=1)
        np.testing.assert_allclose(luma_percentile(images, q), wanted, atol=1e-14)


@given(numbers, numbers)
def test_wasserstein_agrees_with_scipy(a, b):
    own = wasserstein_1(torch.tensor(a), torch.tensor(b))
    assert own == pytest.approx(stats.wasserstein_distance(a, b), abs=1e-12)


@given(numbers, st.floats(-5, 5, width=32))
def test_wasserstein_of_a_shift_is_the_shift(a, shift):
    a = torch.tensor(a, dtype=torch.float64)
    assert wasserstein_1(a, a) == 0
    assert wasserstein_1(a, a + shift) == pytest.approx(abs(shift), abs=1e-12)
    assert wasserstein_1(a.repeat(3), a) == pytest.approx(0, abs=1e-12)


def test_wasserstein_of_different_sizes_by_hand():
    # Mass 1/2 from 0 to 1, and the rest stays.
    assert wasserstein_1(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([1.0])) == 0.5
    # By sixths of the mass: 0 0 0 3 3 3 against 0 0 1 1 2 2.
    a, b = torch.tensor([0.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])
    assert wasserstein_1(a, b) == pytest.approx((0 + 0 + 1 + 2 + 1 + 1) / 6, abs=1e-15)


def test_bootstrap_of_a_mean_is_the_normal_interval():
    a = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = bootstrap_interval(torch.mean, a, num_resamples=4000)
    half = 1.959964 * a.std(correction=0).item() / 20
    assert got.estimate == a.mean().item()
    assert got.low == pytest.approx(a.mean().item() - half, abs=0.07 * half)
    assert got.high == pytest.approx(a.mean().item() + half, abs=0.07 * half)
    assert got == bootstrap_interval(torch.mean, a, num_resamples=4000)
    assert got != bootstrap_interval(torch.mean, a, num_resamples=4000, seed=1)


def test_nested_bootstrap_has_the_spread_of_seeds_and_of_samples():
    generator = torch.Generator().manual_seed(2)
    offsets = torch.randn(8, generator=generator, dtype=torch.float64)
    parts = [o + 0.5 * torch.randn(50, generator=generator, dtype=torch.float64) for o in offsets]

    def mean(parts):
        return float(torch.stack([part.mean() for part in parts]).mean())

    low, high = bootstrap_interval(mean, parts, num_resamples=4000)[1:]
    # var = var(means of parts) / 8 + mean(var within) / (8 * 50), both of the population
    means = torch.stack([part.mean() for part in parts])
    within = torch.stack([part.var(correction=0) for part in parts]).mean()
    deviation = (means.var(correction=0) / 8 + within / 400).sqrt().item()
    assert (high - low) / 2 == pytest.approx(1.959964 * deviation, rel=0.07)
    pooled = bootstrap_interval(lambda a: float(a.mean()), torch.cat(parts))
    assert high - low > 2 * (pooled.high - pooled.low)


def test_paired_groups_are_drawn_together():
    a = torch.randn(60, generator=torch.Generator().manual_seed(3))

    def difference(a, b):
        return float(a.mean() - b.mean())

    together = bootstrap_interval(difference, a, a - 0.25, paired=2)
    assert together.low == pytest.approx(0.25, abs=1e-6)
    assert together.high == pytest.approx(0.25, abs=1e-6)
    apart = bootstrap_interval(difference, a, a - 0.25)
    assert apart.high - apart.low > 0.3
    # Only the first two of three.
    three = bootstrap_interval(lambda a, b, c: float(a.mean() - b.mean()), a, a, a[:7], paired=2)
    assert three == (0, 0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: luma(torch.zeros(0, 3, 4, 4)), "at least one image"),
        (lambda: luma(torch.zeros(2, 1, 4, 4)), r"\(B, 3, H, W\)"),
        (lambda: luma(torch.full((1, 3, 2, 2), math.nan)), "not finite"),
        (lambda: luma_percentile(torch.zeros(1, 3, 2, 2), 101), "q=101"),
        (lambda: wasserstein_1(torch.empty(0), torch.zeros(1)), "N >= 1"),
        (lambda: wasserstein_1(torch.zeros(2, 2), torch.zeros(1)), r"\(2, 2\)"),
        (lambda: wasserstein_1(torch.tensor([math.inf]), torch.zeros(1)), "not finite"),
        (lambda: bootstrap_interval(torch.mean), "no samples"),
        (lambda: bootstrap_interval(torch.mean, torch.empty(0)), "no samples"),
        (lambda: bootstrap_interval(torch.mean, []), "no samples"),
        (lambda: bootstrap_interval(torch.mean, torch.ones(2), level=1), "level=1"),
        (lambda: bootstrap_interval(torch.mean, torch.ones(2), num_resamples=0), "at least 1"),
        (
            lambda: bootstrap_interval(torch.dist, torch.ones(2), torch.ones(3), paired=2),
            "wanted equal sizes",
        ),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
