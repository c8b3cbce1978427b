import math
from fractions import Fraction

import pytest
import torch

from zsnr import (
    NoiseSchedule,
    available_spacings,
    ays,
    get_timesteps,
    karras,
    kl_optimal,
    leading,
    linspace,
    log_snr,
    register_spacing,
    timestep_pairs,
    trailing,
)
from zsnr import timesteps as module
from zsnr.beta_distribution import symmetric_beta_quantile
from zsnr.timesteps import beta


@pytest.mark.parametrize(
    ("spacing", "row"),
    [
        (leading, [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]),
        (linspace, [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]),
        (trailing, [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]),
    ],
)
def test_table_2(spacing, row):
    assert (spacing(10).flip(0) + 1).tolist() == row


@pytest.mark.parametrize(
    ("spacing", "T"),
    [
        *((spacing, T) for spacing in (trailing, leading, linspace) for T in (10, 100, 999, 1000)),
        *((beta, T) for T in (2, 3, 10, 100, 1000)),
    ],
)
def test_every_step_count(spacing, T):
    stride = 7 if spacing is beta and T == 1000 else 1  # its quantiles take time
    for S in range(1, T + 1, stride):
        grid = spacing(S, T)
        assert grid.dtype == torch.int64
        assert grid.shape == (S,)
        assert (grid.diff() < 0).all()
        assert grid[-1] >= 0
        if spacing is leading:
            assert grid[-1] == 0
            assert grid[0] == (T // S) * (S - 1)
        else:
            assert grid[0] == T - 1


@pytest.mark.parametrize("T", [10, 999, 1000])
def test_values_are_the_rounded_fractions(T):
    for S in range(1, T + 1):  # Python rounds fractions half to even
        assert trailing(S, T).tolist() == [round(Fraction(T * (S - i), S)) - 1 for i in range(S)]
        if S > 1:
            wanted = [round(1 + Fraction((T - 1) * i, S - 1)) - 1 for i in range(S)]
            assert linspace(S, T).tolist() == wanted[::-1]


def test_linspace_rounds_the_papers_values():
    assert linspace(5).tolist() == [999, 749, 499, 250, 0]
    assert linspace(1).tolist() == [999]


@pytest.mark.parametrize("spacing", available_spacings())
@pytest.mark.parametrize(("S", "T"), [(0, 10), (-1, 10), (11, 10), (2.0, 10), (True, 10), (1, 0)])
def test_wrong_counts_are_refused(spacing, S, T):
    with pytest.raises(ValueError, match="num_steps"):
        get_timesteps(spacing, S, T)


SCHEDULES = {
    "fixed": NoiseSchedule(),
    "original": NoiseSchedule(zero_terminal_snr=False),
    "linear": NoiseSchedule("linear"),
    "cosine": NoiseSchedule("cosine", 100),
    "few": NoiseSchedule.from_alphas_cumprod([0.99, 0.6, 0.2], zero_terminal_snr=True),
    "two": NoiseSchedule.from_alphas_cumprod([0.9, 0.1]),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("spacing", [log_snr, karras, ays, kl_optimal])
def test_every_step_count_in_log_snr(spacing, schedule):
    T = schedule.num_timesteps
    for S in range(1, T + 1):
        grid = spacing(S, T, schedule=schedule)
        assert grid.dtype == torch.int64
        assert grid.shape == (S,)
        assert (grid.diff() < 0).all()
        assert grid[0] == T - 1
        assert grid[-1] >= 0
    assert torch.equal(grid, torch.arange(T - 1, -1, -1))


@pytest.mark.parametrize("S", [5, 10, 25])
@pytest.mark.parametrize(
    ("spacing", "coordinate"), [(log_snr, lambda h: h), (karras, lambda h: -((-h / 7).exp()))]
)
def test_log_snr_is_divided_evenly(spacing, coordinate, S):
    """By the schedule with most timesteps, where the nearest one is near."""
    schedule = NoiseSchedule("cosine", 100_000)
    half = schedule.log_snr / 2
    steps = spacing(S, 100_000, schedule=schedule)[1:]
    marks = coordinate(half[steps])
    even = torch.linspace(float(marks[0]), float(marks[-1]), S - 1, dtype=torch.float64)
    gaps = even.diff()[0]
    assert ((marks - even).abs() < 0.02 * gaps).all()
    assert float(half[steps[0]]) == pytest.approx(-2 - math.log(S), abs=0.05)
    assert float(half[steps[-1]]) == pytest.approx(
        min(2 * math.log(S) - 1, float(half[0])), abs=0.05
    )


def test_the_schedule_of_a_grid_in_log_snr():
    assert torch.equal(get_timesteps("log_snr", 10), log_snr(10, schedule=NoiseSchedule()))
    cosine = NoiseSchedule("cosine")
    assert not torch.equal(get_timesteps("log_snr", 10, schedule=cosine), log_snr(10))
    original = SCHEDULES["original"]  # all steps divide what is there: T-1 has no place of its own
    half = original.log_snr[log_snr(10, schedule=original)] / 2
    assert float(half.diff().std() / half.diff().mean()) < 0.02


def test_align_your_steps_is_the_published_grid_on_the_original_schedule():
    """Their timesteps and their noise levels differ by one at 0.399, between 124 and 125."""
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    original = SCHEDULES["original"]
    grid = ays(10, schedule=original).tolist()
    assert [t for t in grid if t not in published] == [125]
    half = original.log_snr / 2
    levels = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152]
    for t, k in zip(grid[1:], levels[1:], strict=True):
        assert t == int((half + math.log(k)).abs().argmin())
    doubled = ays(20, schedule=original).tolist()
    assert doubled[::2] == grid
    fine = NoiseSchedule("cosine", 100_000)  # with timesteps near every level
    k = (-fine.log_snr / 2).exp()[ays(20, 100_000, schedule=fine)].tolist()
    for i in range(1, 9):
        assert k[2 * i] == pytest.approx(levels[i], rel=1e-3)
        assert k[2 * i + 1] == pytest.approx(math.sqrt(levels[i] * levels[i + 1]), rel=1e-3)


def test_kl_optimal_divides_the_angle_evenly():
    schedule = NoiseSchedule("cosine", 100_000)
    for S in (2, 5, 10, 25):
        steps = kl_optimal(S, 100_000, schedule=schedule)
        alpha, sigma = schedule(steps)
        angles = torch.atan2(sigma.double(), alpha.double())
        even = torch.linspace(math.pi / 2, float(angles[-1]), S, dtype=torch.float64)
        torch.testing.assert_close(angles, even, rtol=0, atol=2e-5)
        assert steps[-1] == 0


def test_beta_quantiles():
    stats = pytest.importorskip("scipy.stats")
    for p in (*(i / 997 for i in range(998)), *(10.0**-n for n in range(1, 16))):
        assert symmetric_beta_quantile(p, 0.6) == pytest.approx(
            stats.beta.ppf(p, 0.6, 0.6), rel=1e-9, abs=1e-300
        )
    assert beta(10).tolist() == [999, 959, 876, 765, 637, 499, 362, 234, 123, 40]


def test_pairs_read_their_neighbour_from_the_grid():
    assert timestep_pairs(trailing(3, 10)) == [(9, 6), (6, 2), (2, -1)]
    assert timestep_pairs([7]) == [(7, -1)]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([], "empty"),
        ([1, 2], "descending"),
        ([5, 5], "descending"),
        ([3, -1], "wanted"),
        ([3.0], "integers"),
        (torch.tensor([3.0]), "wanted 1-D"),
        (torch.tensor([[3]]), "wanted 1-D"),
    ],
)
def test_wrong_grids_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        timestep_pairs(grid)


def test_registry(monkeypatch):
    monkeypatch.setattr(module, "_SPACINGS", dict(module._SPACINGS))

    @register_spacing("ends")
    def ends(num_steps, num_timesteps=1000):
        return torch.tensor([num_timesteps - 1, *reversed(range(num_steps - 1))])

    seen = []

    @register_spacing("by_snr")
    def by_snr(num_steps, num_timesteps=1000, *, schedule):
        seen.append(schedule)
        return trailing(num_steps, num_timesteps)

    @register_spacing("upward")
    def upward(num_steps, num_timesteps=1000):
        return list(range(num_steps))

    @register_spacing("listed")
    def listed(num_steps, num_timesteps=1000):
        return trailing(num_steps, num_timesteps).int().tolist()

    @register_spacing("broken")
    def broken(num_steps, num_timesteps=1000):
        return trailing(num_steps + 1, num_timesteps)

    own = {"broken", "by_snr", "ends", "listed", "upward"}
    assert set(available_spacings()) == own | {
        "ays",
        "beta",
        "guided",
        "karras",
        "kl_optimal",
        "leading",
        "linspace",
        "log_snr",
        "trailing",
    }
    assert register_spacing("ends")(ends) is ends  # a reload
    assert torch.equal(get_timesteps("listed", 7), trailing(7))
    with pytest.raises(ValueError, match="descending"):
        get_timesteps("upward", 3)
    assert get_timesteps("ends", 3).tolist() == [999, 1, 0]
    schedule = NoiseSchedule("linear", 50)
    get_timesteps("by_snr", 3, 50)
    get_timesteps("by_snr", 3, 50, schedule=schedule)
    assert seen == [NoiseSchedule(num_timesteps=50), schedule]
    with pytest.raises(ValueError, match="pass num_timesteps=50"):
        get_timesteps("by_snr", 3, schedule=schedule)
    with pytest.raises(ValueError, match="returned 4 timesteps: wanted 3"):
        get_timesteps("broken", 3)
    with pytest.raises(ValueError, match="already registered"):
        register_spacing("ends")(broken)
    with pytest.raises(ValueError, match="Known: 'ays', 'beta', 'broken'"):
        get_timesteps("bosh", 3)
