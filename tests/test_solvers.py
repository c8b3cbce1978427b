"""Published solvers: their own coordinates, diffusers, and the order of convergence."""

import math

import numpy as np
import pytest
import torch

from zsnr import (
    DEIS,
    ERSDE,
    IPNDM,
    Denoiser,
    DPMpp2M,
    DPMpp3M,
    GaussianDenoiser,
    NoiseSchedule,
    UniPC,
    get_sampler,
    get_timesteps,
    log_snr,
    trailing,
)
from zsnr.samplers.base import State, multistep

SCHEDULE, ORIGINAL = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=False)
SETTINGS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def network(x_t, t, conditioning):
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=x_t.dtype) * 0.5
    return (x_t @ weight).sin() + t.view(-1, 1) / 1000


def ours(sampler, grid, noise=None):
    draws = iter(() if noise is None else noise)
    return sampler.sample(
        Denoiser(network, ORIGINAL), ORIGINAL, start(), grid, randn_like=lambda x: next(draws)
    )


def start():
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def level(t):
    """Return sigma / alpha."""
    alpha, sigma = ORIGINAL(t)
    return sigma / alpha


def x_0_at(y, t):
    """The prediction at y = x / alpha."""
    return Denoiser(network, ORIGINAL)(y * ORIGINAL(t)[0], torch.full((4,), t))


GRIDS = [
    get_timesteps(s, S, schedule=ORIGINAL) for s in ("trailing", "log_snr") for S in (2, 5, 25)
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{len(grid)}")
@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_in_its_published_coordinates(grid, order):
    """Adams and Bashforth's weights as integrals of Lagrange's polynomials over equal steps."""
    from scipy.interpolate import lagrange

    steps, y, slopes = grid.tolist(), start() / ORIGINAL(int(grid[0]))[0], []
    for t, s in zip(steps, [*steps[1:], -1], strict=True):
        x_0 = x_0_at(y, t)
        slopes.insert(0, (y - x_0) / level(t))
        if s < 0:
            y = x_0
            continue
        used = slopes[:order]
        nodes = [-float(i) for i in range(len(used))]
        for i, slope in enumerate(used):
            antiderivative = lagrange(nodes, [float(i == j) for j in range(len(used))]).integ()
            weight = antiderivative(1.0) - antiderivative(0.0)
            y = y + (level(s) - level(t)) * weight * slope
    torch.testing.assert_close(ours(IPNDM(order), grid), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{len(grid)}")
@pytest.mark.parametrize("order", [2, 3])
def test_deis_in_its_published_coordinates(grid, order):
    """Lagrange's polynomials in t, by many midpoints between any two timesteps of the schedule."""
    steps, y, slopes = grid.tolist(), start() / ORIGINAL(int(grid[0]))[0], []
    for i, (t, s) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
        x_0 = x_0_at(y, t)
        slopes.insert(0, (y - x_0) / level(t))
        if s < 0:
            y = x_0
            continue
        nodes = steps[max(0, i - order) : i + 1][::-1]
        inner = (np.arange(4000) + 0.5) / 4000
        for j, slope in enumerate(slopes[: len(nodes)]):
            weight = 0.0
            for n in range(t, s, -1):
                tau, others = n - inner, [node for node in nodes if node != nodes[j]]
                basis = np.prod([(tau - o) / (nodes[j] - o) for o in others], axis=0)
                weight += (level(n - 1) - level(n)) * float(np.mean(basis))
            y = y + weight * slope
    torch.testing.assert_close(ours(DEIS(order), grid), y, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{len(grid)}")
@pytest.mark.parametrize("refined", [False, True])
def test_dpmpp_3m_in_its_published_coordinates(grid, refined):
    """In y and l = -log k; refined = the integral of the parabola, by quadrature."""
    from scipy.integrate import quad

    steps, y, history = grid.tolist(), start() / ORIGINAL(int(grid[0]))[0], []
    for i, (t, s) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
        history.insert(0, x_0_at(y, t))
        if s < 0:
            y = history[0]
            continue
        at = [-math.log(level(u)) for u in steps[max(0, i - 2) : i + 1][::-1]]
        l_s = -math.log(level(s))
        h, x = l_s - at[0], history[: len(at)]
        if refined:
            y = math.exp(-h) * y
            for j, x_0 in enumerate(x):
                others = [l_i for k, l_i in enumerate(at) if k != j]

                def integrand(l_i, j=j, others=others, at=at, l_s=l_s):
                    basis = math.prod((l_i - o) / (at[j] - o) for o in others)
                    return math.exp(l_i - l_s) * basis

                y = y + quad(integrand, at[0], l_s, epsabs=1e-13, epsrel=1e-13)[0] * x_0
            continue
        y = math.exp(-h) * y - math.expm1(-h) * x[0]
        phi_2 = math.expm1(-h) / h + 1
        if len(at) == 2:
            y = y + phi_2 * (x[0] - x[1]) / ((at[0] - at[1]) / h)
        if len(at) == 3:
            r_0, r_1 = (at[0] - at[1]) / h, (at[1] - at[2]) / h
            d_0, d_1 = (x[0] - x[1]) / r_0, (x[1] - x[2]) / r_1
            y = y + phi_2 * (d_0 + (d_0 - d_1) * r_0 / (r_0 + r_1))
            y = y - (phi_2 / h - 0.5) * (d_0 - d_1) / (r_0 + r_1)
    torch.testing.assert_close(ours(DPMpp3M(refined=refined), grid), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{len(grid)}")
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_in_its_published_coordinates(grid, order):
    """In y and l = -log k, its systems of equations solved by numpy."""
    steps = grid.tolist()
    S, y = len(steps), start() / ORIGINAL(steps[0])[0]
    levels = [-math.log(level(t)) for t in steps]
    history = [x_0_at(y, steps[0])]
    for i in range(S - 1):
        p, h = min(order, i + 1, S - i), levels[i + 1] - levels[i]
        r = [(levels[i - j] - levels[i]) / h for j in range(1, p)]
        slopes = [(history[j] - history[0]) / r[j - 1] for j in range(1, p)]
        e, b, phi = math.expm1(-h), [], math.expm1(-h)
        for n in range(1, p + 1):
            phi = phi / -h - 1 / math.factorial(n)
            b.append(phi * math.factorial(n) / e)
        R = np.vander([*r, 1.0], increasing=True).T
        rho_p = [0.5] if p == 2 else np.linalg.solve(R[:-1, :-1], b[:-1]) if p > 2 else []
        rho_c = [0.5] if p == 1 else np.linalg.solve(R, b)
        first = math.exp(-h) * y - e * history[0]
        predicted = first - e * sum(w * d for w, d in zip(rho_p, slopes, strict=True))
        x_s = x_0_at(predicted, steps[i + 1])
        y = first - e * (
            sum(w * d for w, d in zip(rho_c[:-1], slopes, strict=True))
            + rho_c[-1] * (x_s - history[0])
        )
        history.insert(0, x_s)
    torch.testing.assert_close(ours(UniPC(order), grid), history[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{len(grid)}")
@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde_in_its_published_coordinates(grid, order):
    """In y and k, the integrals of its third order by quadrature."""
    from scipy.integrate import quad

    def scale(k):
        return k * (math.exp(k**0.3) + 10)

    steps, y = grid.tolist(), start() / ORIGINAL(int(grid[0]))[0]
    noise = torch.randn(25, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    history, slope, options = [], None, {"epsabs": 1e-13, "epsrel": 1e-13}
    for i, (t, s) in enumerate(zip(steps, [*steps[1:], -1], strict=True)):
        history.insert(0, x_0_at(y, t))
        if s < 0:
            y = history[0]
            continue
        k_t, k_s = level(t), level(s)
        r, step = scale(k_s) / scale(k_t), k_s - k_t
        y = r * y + (1 - r) * history[0]
        if i > 0 and order > 1:
            area = quad(lambda k: 1 / scale(k), k_s, k_t, **options)[0]
            older, slope = slope, (history[0] - history[1]) / (k_t - level(steps[i - 1]))
            y = y + (step + scale(k_s) * area) * slope
            if i > 1 and order > 2:
                moment = quad(lambda k, k_t=k_t: (k - k_t) / scale(k), k_s, k_t, **options)[0]
                bend = (slope - older) / ((k_t - level(steps[i - 2])) / 2)
                y = y + (step**2 / 2 + scale(k_s) * moment) * bend
        y = y + math.sqrt(k_s**2 - (k_t * r) ** 2) * noise[i]
    torch.testing.assert_close(ours(ERSDE(order), grid, noise), y, rtol=1e-9, atol=1e-9)


def test_er_sde_at_snr_0_draws_all_noise_anew():
    for order in (1, 2, 3):
        first, second, third, *_ = ERSDE(order).plan(SCHEDULE, log_snr(10)).calls
        alpha_s, sigma_s = SCHEDULE(first.s)
        assert (first.step.a, first.step.b, first.step.c) == ((alpha_s,), 0.0, sigma_s)
        assert sum(w != 0 for w in second.step.a) == 1
        assert sum(w != 0 for w in third.step.a) == min(order, 2)


@pytest.mark.parametrize(
    ("sampler", "by", "order"),
    [
        (IPNDM(2), "k", 2),
        (IPNDM(3), "k", 3),
        (IPNDM(4), "k", 4),
        (IPNDM(2), "l", 2),
        (IPNDM(4), "l", 2),  # its weights are those of equal steps in k
        (DEIS(2), "l", 3),
        (DEIS(3), "l", 4),
        (DPMpp2M(), "l", 2),
        (DPMpp3M(), "l", 2),  # as published, see dpmpp_3m_coefficients
        (DPMpp3M(refined=True), "l", 3),
        (UniPC(2), "l", 3),  # a corrector gains one
        (UniPC(3), "l", 4),
        (ERSDE(1), "k", 1),
        (ERSDE(2), "k", 2),
        (ERSDE(3), "k", 2),  # its slope is a difference to the step before, for any order
    ],
    ids=repr,
)
def test_order_of_convergence_from_exact_history(sampler, by, order):
    """The error between two noise levels falls as S^-order, once the first steps are exact.

    On grids that divide k = sigma / alpha or l = -log k evenly. Without noise, so that of ER-SDE it
    is the order of its deterministic part.
    """
    from scipy.integrate import quad

    T, m = 38400, 0.4
    std = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
    first, last = (3.0, 0.15) if by == "k" else (-2.0, 2.0)
    marks = torch.linspace(first, last, T + 1, dtype=torch.float64)
    half = -marks.log() if by == "k" else marks
    schedule = NoiseSchedule.from_alphas_cumprod(torch.sigmoid(2 * half).flip(0))
    oracle = GaussianDenoiser(schedule, m, std)
    k_T = math.exp(-float(half[0]))

    def rate(k, s):  # of y - m, in the ODE of ER-SDE's deterministic part
        u = k**0.3
        return (1 / k + 0.3 * u / k * math.exp(u) / (math.exp(u) + 10)) * k**2 / (s**2 + k**2)

    def exact(t):
        alpha, sigma = schedule(t)
        if not isinstance(sampler, ERSDE):
            return (m * alpha + (alpha**2 * std**2 + sigma**2).sqrt())[None]
        options = {"epsabs": 1e-12, "epsrel": 1e-12}
        logs = [quad(rate, sigma / alpha, k_T, args=(s,), **options)[0] for s in std.tolist()]
        return (alpha * (m + 3 * torch.tensor(logs, dtype=torch.float64).neg().exp()))[None]

    def predictions(t):
        (alpha, sigma), x_t = schedule(t), exact(t)
        x_0 = oracle(x_t, torch.tensor([t]))
        return x_0, (x_t - alpha * x_0) / sigma

    errors, counts, end = [], (60, 120, 240), T // 10  # not 0: the last steps are of lower order
    for S in counts:
        grid = list(range(T, -1, -T // S))
        made = S // 12
        plan = sampler.plan(schedule, grid)
        x_0s, epses = zip(*map(predictions, grid[made - 1 :: -1]), strict=True)
        kept, kept_eps = plan.memory
        state = State(
            exact(grid[made]),
            grid[made],
            made,
            exact(grid[made - 1]),
            x_0s[:kept],
            epses[:kept_eps],
        )
        while state.t > end:
            x_0 = oracle(state.x_t, torch.tensor([state.t]))
            state = sampler.advance(plan, state, x_0, torch.zeros_like)
        errors.append(float((state.x_t - exact(end)).abs().max()))
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.3), errors


@pytest.mark.parametrize(
    ("name", "orders"),
    [("ipndm", (2, 3, 4)), ("deis", (2, 3)), ("unipc", (2, 3)), ("er_sde", (1, 2, 3))],
)
def test_options(name, orders):
    for order in orders:
        assert get_sampler(name, order=order).order == order
    for wrong in (0, orders[-1] + 1, orders[0] - 1, True, 2.0, "3", None):
        with pytest.raises(ValueError, match=rf"order={wrong!r}: wanted {orders[0]}.* or "):
            get_sampler(name, order=wrong)
    defaults = {"ipndm": 4, "deis": 3, "unipc": 2, "er_sde": 3}
    assert get_sampler(name).order == defaults[name]


def test_the_option_of_dpmpp_3m():
    assert get_sampler("dpmpp_3m", refined=True) != get_sampler("dpmpp_3m") == DPMpp3M(False)
    with pytest.raises(ValueError, match="refined=1: wanted true or false"):
        get_sampler("dpmpp_3m", refined=1)


@pytest.mark.peer
@pytest.mark.parametrize("S", [5, 10, 25])
def test_steps_of_dpmpp_3m_are_diffusers(S):
    """Each step of third order; its first steps are 2M's there."""
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(solver_order=3, **SETTINGS)
    theirs.set_timesteps(S)
    plan = DPMpp3M().plan(ORIGINAL, trailing(S))
    assert theirs.timesteps.tolist() == plan.timesteps
    x, *history = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for i, call in enumerate(plan.calls[2:-1], 2):
        theirs._step_index = i
        wanted = theirs.multistep_dpm_solver_third_order_update(history[::-1], sample=x)
        torch.testing.assert_close(multistep(history, x, call.step), wanted, rtol=0, atol=2e-5)


@pytest.mark.peer
@pytest.mark.parametrize("S", [2, 5, 10, 25])
def test_unipc_of_third_order_is_diffusers(S):
    from diffusers import UniPCMultistepScheduler

    theirs = UniPCMultistepScheduler(
        solver_order=3, lower_order_final=True, final_sigmas_type="zero", **SETTINGS
    )
    theirs.set_timesteps(S)
    x = start()
    for t in theirs.timesteps:
        x = theirs.step(network(x, t.expand(4), None), t, x).prev_sample
    torch.testing.assert_close(ours(UniPC(3), theirs.timesteps), x, rtol=0, atol=2e-5)


@pytest.mark.peer
@pytest.mark.parametrize("S", [3, 5, 10, 25])
def test_ipndm_is_diffusers_on_its_own_schedule(S):
    """From its second timestep, as its first has SNR 0, where it loses x_0, to its last but one."""
    from diffusers import IPNDMScheduler

    theirs = IPNDMScheduler()
    theirs.set_timesteps(S)
    theirs.set_begin_index(1)
    schedule = NoiseSchedule.from_alphas_cumprod(theirs.alphas[1:-1].double().square().flip(0))
    states, x = [], start()
    denoiser = Denoiser(lambda x_t, t, conditioning: x_t.cos(), schedule)
    grid = list(range(S - 2, -1, -1))
    IPNDM().sample(denoiser, schedule, x, grid, callback=lambda *step: states.append(step[3]))
    for t, state in zip(theirs.timesteps[1:-1], states, strict=False):
        x = theirs.step(x.cos(), t, x).prev_sample
        torch.testing.assert_close(state, x, rtol=0, atol=2e-5)
