import itertools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zsnr import (
    Conditioning,
    Denoiser,
    Guidance,
    NoiseSchedule,
    SampleNoise,
    available_samplers,
    dynamic_threshold,
    get_sampler,
    get_timesteps,
    prediction_target,
    rescale_guidance,
    to_x0,
    trailing,
)

SCHEDULE = NoiseSchedule()
X, T = torch.randn(2, 4, 3, 3), torch.tensor([999, 400])


class Linear(nn.Module):
    """v = w x_t + mean of the context."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))
        self.seen = []

    def forward(self, x_t, t, conditioning):
        self.seen.append((x_t, t, conditioning))
        if conditioning is None:
            return self.w * x_t
        return self.w * x_t + conditioning.context.mean((1, 2)).view(-1, 1, 1, 1)


def contexts(*values):
    return Conditioning(torch.tensor(values).view(-1, 1, 1).expand(-1, 3, 5).contiguous())


def test_unconditional():
    x_0 = Denoiser(Linear(), SCHEDULE)(X, T)
    alpha, sigma = (s.float().view(-1, 1, 1, 1) for s in SCHEDULE(T))
    torch.testing.assert_close(x_0, alpha * X - sigma * 0.5 * X)


def test_guidance_acts_on_the_raw_output():
    network = Linear()
    guidance = Guidance(3.0, 0.7)
    denoiser = Denoiser(
        network, SCHEDULE, "v_prediction", contexts(1.0, 2.0), contexts(-1.0), guidance
    )
    x_0 = denoiser(X, T)
    pos = 0.5 * X + torch.tensor([1.0, 2.0]).view(-1, 1, 1, 1)
    v = guidance(pos, 0.5 * X - 1)
    alpha, sigma = (s.float().view(-1, 1, 1, 1) for s in SCHEDULE(T))
    torch.testing.assert_close(x_0, alpha * X - sigma * v)
    assert len(network.seen) == 1  # one pass over the doubled batch
    assert len(network.seen[0][0]) == 4


@pytest.mark.parametrize("guidance", [None, Guidance(1.0, 0.7)])
def test_scale_1_skips_the_unconditional_pass(guidance):
    network = Linear()
    Denoiser(network, SCHEDULE, cond=contexts(1.0, 2.0), uncond=contexts(0.0), guidance=guidance)(
        X, T
    )
    assert len(network.seen[0][0]) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_networks_get_half_inputs_and_give_float32(dtype):
    network = Linear().to(dtype)
    denoiser = Denoiser(network, SCHEDULE, cond=contexts(1.0, 2.0))
    x_0 = denoiser(X, T)
    x_t, t, conditioning = network.seen[0]
    assert x_t.dtype == conditioning.context.dtype == dtype
    assert t.dtype == torch.int64
    assert x_0.dtype == torch.float32
    reference = Denoiser(Linear(), SCHEDULE, cond=contexts(1.0, 2.0))(X, T)
    torch.testing.assert_close(x_0, reference, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_guidance_of_half_networks_runs_in_float32(dtype):
    raw, guidance = torch.randn(4, 4, 3, 3).to(dtype), Guidance(7.5, 0.7)
    cond, uncond = contexts(1.0, 2.0), contexts(0.0)
    denoiser = Denoiser(lambda x, t, c: raw, SCHEDULE, "sample", cond, uncond, guidance)
    assert torch.equal(denoiser(X, T), guidance(raw[2:].float(), raw[:2].float()))


def test_each_row_has_its_own_negative():
    guidance, uncond = Guidance(3.0, 0.0), contexts(-1.0, 5.0)
    x_0 = Denoiser(Linear(), SCHEDULE, "sample", contexts(1.0, 2.0), uncond, guidance)(X, T)
    wanted = 0.5 * X + torch.tensor([-1 + 3 * 2.0, 5 + 3 * -3.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_0, wanted)


def test_dtype_of_the_networks_input_can_be_named():
    seen = []

    def network(x, t, c):
        seen.append((x.dtype, c.context.dtype))
        return x.float()

    Denoiser(network, SCHEDULE, cond=contexts(1.0, 2.0), dtype=torch.bfloat16)(X, T)
    assert seen == [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize(
    "wrong", [lambda x: x[:, :1], lambda x: x[:1], lambda x: x[0], lambda x: (x,)]
)
def test_outputs_of_another_shape_are_refused(wrong):
    with pytest.raises(
        ValueError, match=r"network returned .*: wanted a tensor of shape \(2, 4, 3, 3"
    ):
        Denoiser(lambda x, t, c: wrong(x), SCHEDULE)(X, T)


def test_outside_the_interval_the_unconditional_pass_is_left_out():
    guidance = Guidance(3.0, 0.7, interval=(0.5, 4.0))
    settings = (SCHEDULE, "v_prediction", contexts(1.0, 2.0))
    for t in (999, 700, 400, 100, 3):
        row = torch.full((2,), t)
        acts = 0.5 < SCHEDULE(t)[1] / max(SCHEDULE(t)[0], 1e-9) <= 4.0
        network, plain = Linear(), Denoiser(Linear(), *settings)
        always = Denoiser(Linear(), *settings, contexts(-1.0), Guidance(3.0, 0.7))
        some = Denoiser(network, *settings, contexts(-1.0), guidance)
        wanted = (always if acts else plain)(X, row)
        torch.testing.assert_close(some.at(t)(X, row), wanted)
        assert len(network.seen[-1][0]) == (4 if acts else 2)
        torch.testing.assert_close(some(X, row), wanted)
    mixed = some(X, torch.tensor([400, 999]))  # each row by its own level
    torch.testing.assert_close(mixed[0], always(X, torch.tensor([400, 999]))[0])
    torch.testing.assert_close(mixed[1], plain(X, torch.tensor([400, 999]))[1])


@pytest.mark.parametrize("name", ["ddim", "heun", "unipc", "multiscale", "dpmpp_2m_sde"])
def test_samplers_save_the_pass(name):
    network = Linear()
    guidance = Guidance(3.0, 0.7, interval=(0.5, 4.0))
    denoiser = Denoiser(
        network, SCHEDULE, "v_prediction", contexts(1.0, 2.0), contexts(-1.0), guidance
    )
    drawn = torch.Generator().manual_seed(0)

    def randn_like(x):
        return torch.randn(x.shape, generator=drawn)

    grid = get_timesteps("log_snr", 8)
    x_0 = get_sampler(name).sample(denoiser, SCHEDULE, X, grid, randn_like=randn_like)
    for x_t, t, _ in network.seen:
        acts = guidance.acts(*SCHEDULE(int(t[0])))
        assert len(x_t) == (4 if acts else 2)
    assert {len(x_t) for x_t, _, _ in network.seen} == {2, 4}
    drawn.manual_seed(0)  # and nothing else changes

    def plain(x_t, t):
        return denoiser(x_t, t)

    plain.guidance = guidance  # which multiscale fits its steps to
    wanted = get_sampler(name).sample(plain, SCHEDULE, X, grid, randn_like=randn_like)
    torch.testing.assert_close(x_0, wanted)


@pytest.mark.parametrize("interval", [None, (0.5, 4.0)])
def test_a_guided_network_compiles_whole(interval):
    """Guided and not, each is one graph: what branches is an int, never a tensor."""
    guidance = Guidance(3.0, 0.7, interval)

    def network(x_t, t, conditioning):
        return 0.5 * x_t + conditioning.context.mean((1, 2)).view(-1, 1, 1, 1)

    denoiser = Denoiser(
        network, SCHEDULE, "v_prediction", contexts(1.0, 2.0), contexts(-1.0), guidance
    )
    SCHEDULE(T)  # the table of this device is there before a graph is
    for t in (999, 400, 3):
        row = torch.full((2,), t)
        whole = torch.compile(denoiser.at(t), fullgraph=True, backend="eager")
        torch.testing.assert_close(whole(X, row), denoiser.at(t)(X, row))
    grid = get_timesteps("log_snr", 6).tolist()
    with FakeTensorMode():  # where reading a tensor would raise
        x_T, prompts = torch.empty(2, 4, 3, 3), Conditioning(torch.empty(2, 3, 5))
        fake = Denoiser(network, SCHEDULE, "v_prediction", prompts, prompts, guidance)
        for name in ("ddim", "heun", "multiscale", "unipc"):
            assert get_sampler(name).sample(fake, SCHEDULE, x_T, grid).shape == x_T.shape


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 100])
def test_rows_of_a_network_call_are_bounded(max_rows):
    for cond, uncond, guidance in (
        (contexts(1.0, 2.0), contexts(-1.0, 5.0), Guidance(3.0, 0.7)),
        (contexts(1.0, 2.0), None, None),
        (None, None, None),
    ):
        network = Linear()
        settings = (SCHEDULE, "v_prediction", cond, uncond, guidance)
        x_0 = Denoiser(network, *settings, max_rows=max_rows)(X, T)
        assert max(len(x_t) for x_t, _, _ in network.seen) <= max_rows
        torch.testing.assert_close(x_0, Denoiser(Linear(), *settings)(X, T))
    with pytest.raises(ValueError, match="max_rows=0"):
        Denoiser(Linear(), SCHEDULE, max_rows=0)
    with pytest.raises(ValueError, match="network returned tuple"):
        Denoiser(lambda x, t, c: (x,), SCHEDULE, max_rows=1)(X, T)


def test_true_target_gives_x0_back():
    x_0, eps = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    x_t = SCHEDULE.add_noise(x_0, eps, T)
    for kind in ("sample", "v_prediction"):
        target = prediction_target(x_0, eps, *SCHEDULE(T), kind)
        denoiser = Denoiser(lambda x, t, c, target=target: target, SCHEDULE, kind)
        torch.testing.assert_close(denoiser(x_t, T), x_0, rtol=1e-12, atol=1e-12)


def test_refusals():
    with pytest.raises(ValueError, match="no x_0 at t=999"):
        Denoiser(Linear(), SCHEDULE, "epsilon")
    with pytest.raises(ValueError, match="both cond and uncond"):
        Denoiser(Linear(), SCHEDULE, cond=contexts(1.0), guidance=Guidance())
    with pytest.raises(ValueError, match="2 samples but 3 rows"):
        Denoiser(Linear(), SCHEDULE, cond=contexts(1.0, 2.0, 3.0))(X, T)
    with pytest.raises(ValueError, match="2 rows of conditioning for a batch of 3"):
        Denoiser(
            Linear(),
            SCHEDULE,
            "v_prediction",
            contexts(1.0, 2.0, 3.0),
            contexts(1.0, 2.0),
            Guidance(),
        )


def full(rows, value):
    return Conditioning(
        torch.full((rows, 3, 5), value),
        torch.ones(rows, 3, dtype=torch.bool),
        torch.full((rows, 7), value),
        torch.full((rows, 6), value),
        torch.full((rows,), int(value)),
        torch.full((rows, 2, 4, 4), value),
    )


def test_conditioning_rows():
    joined = Conditioning.cat([full(2, 1.0), full(1, 2.0)])
    assert len(joined) == 3
    assert joined.pooled[:, 0].tolist() == [1, 1, 2]
    chosen = full(3, 1.0).where(torch.tensor([True, False, True]), full(1, 0.0))
    for name, part in chosen.parts().items():
        if name != "mask":
            assert part.view(3, -1)[:, 0].tolist() == [1, 0, 1]
    moved = full(1, 1.0).to("cpu", torch.bfloat16)
    assert moved.context.dtype == torch.bfloat16
    assert moved.concat.dtype == torch.bfloat16
    assert moved.mask.dtype == torch.bool
    assert moved.labels.dtype == torch.int64
    rows = Conditioning.cat([full(2, 1.0), full(1, 2.0)]).rows(1, 3)
    assert {len(part) for part in rows.parts().values()} == {2}
    assert {len(part) for part in full(1, 1.0).expand(4).parts().values()} == {4}
    unpooled = Conditioning(torch.ones(1, 3, 5), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="has pooled"):
        Conditioning.cat([full(1, 1.0), unpooled])
    sized = Conditioning(torch.ones(1, 1, 1), sizes=torch.tensor([[513.0, 769, 0, 0, 1001, 1023]]))
    assert sized.to("cpu", torch.bfloat16).sizes[0, 0] == 513
    with pytest.raises(ValueError, match="pooled has 2 rows, context 3"):
        Conditioning(torch.ones(3, 7, 5), pooled=torch.ones(2, 4))
    for other in (Conditioning(torch.ones(1, 1, 5)), Conditioning(torch.ones(1, 4, 5))):
        with pytest.raises(ValueError, match="wanted one shape"):
            contexts(1.0).where(torch.tensor([True]), other)
    with pytest.raises(ValueError, match=r"wanted bool, \(2,\)"):
        contexts(1.0, 2.0).where(torch.tensor([True]), contexts(0.0))
    with pytest.raises(ValueError, match=r"\(3, 5\) and \(4, 5\)"):
        Conditioning.cat([contexts(1.0), Conditioning(torch.ones(1, 4, 5))])


@pytest.mark.parametrize("name", ["context", "pooled", "sizes", "labels", "concat"])
def test_one_part_is_enough(name):
    part = getattr(full(2, 3.0), name)
    cond = Conditioning(**{name: part})
    assert (len(cond), cond.device) == (2, part.device)
    assert cond.parts().keys() == {name}
    with pytest.raises(ValueError, match="has no part: wanted one of context, mask, pooled"):
        Conditioning()


@pytest.mark.parametrize(
    "labels", [torch.tensor([1.0, 257.0]), torch.tensor([1, 2], dtype=torch.int32), torch.eye(2)]
)
def test_labels_are_whole_numbers(labels):
    with pytest.raises(ValueError, match=r"labels are (float32|int32) of shape .*: wanted int64"):
        Conditioning(labels=labels)


@pytest.mark.parametrize("max_rows", [None, 1, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_labels_and_channels_are_guided_exactly(max_rows, dtype):
    """Label 257, which is 256 in bfloat16; and channels that are those of both rows."""
    seen = []

    def network(x_t, t, conditioning):
        seen.append(conditioning)
        weight = (conditioning.labels == 257).view(-1, 1, 1, 1)
        return weight * 2 + conditioning.concat[:, :1].expand_as(x_t).to(x_t)

    concat = torch.tensor([0.5, -1.0]).view(2, 1, 1, 1).expand(2, 3, 3, 3)
    cond = Conditioning(labels=torch.tensor([257, 257]), concat=concat)
    uncond = Conditioning(labels=torch.tensor([1000, 1000]), concat=concat)
    settings = {"max_rows": max_rows, "dtype": dtype}
    x_0 = Denoiser(network, SCHEDULE, "sample", cond, uncond, Guidance(3.0, 0.0), **settings)(X, T)
    wanted = torch.tensor([6.5, 5.0]).view(2, 1, 1, 1).expand_as(X)
    torch.testing.assert_close(x_0, wanted)
    assert {c.labels.dtype for c in seen} == {torch.int64}
    assert max(len(c) for c in seen) == (max_rows or 4)


# --- methods of guidance ------------------------------------------------------------------------


def pieces(t, dtype=torch.float32, x=X):
    """x_0 of both prompts, by hand."""
    alpha, sigma = (s.to(dtype).view(-1, 1, 1, 1) for s in SCHEDULE(t))
    shifts = torch.tensor([1.0, 2.0], dtype=dtype).view(-1, 1, 1, 1), -1.0
    return [alpha * x.to(dtype) - sigma * (0.5 * x.to(dtype) + shift) for shift in shifts]


def guided(guidance, network=None, schedule=SCHEDULE, **options):
    cond, uncond = contexts(1.0, 2.0), contexts(-1.0)
    network = network or Linear()
    return Denoiser(network, schedule, "v_prediction", cond, uncond, guidance, **options)


def test_apg_acts_on_x0():
    guidance = Guidance(3.0, 0.7, method="apg", apg_norm=1.5, apg_parallel=0.2)
    torch.testing.assert_close(guided(guidance)(X, T), guidance(*pieces(T)))
    torch.testing.assert_close(
        guided(guidance).at(400)(X[1:].repeat(2, 1, 1, 1), T[[1, 1]])[1], guided(guidance)(X, T)[1]
    )


def test_the_threshold_comes_last_and_everywhere():
    guidance = Guidance(3.0, 0.7, interval=(0.0, 4.0), threshold=0.9)
    plain = guided(Guidance(3.0, 0.7, interval=(0.0, 4.0)))
    wanted = dynamic_threshold(plain(5 * X, T), 0.9)
    torch.testing.assert_close(guided(guidance)(5 * X, T), wanted)
    network = Linear()
    alone = guided(Guidance(1.0, threshold=0.9, interval=(0.3, 5.0)), network)
    wanted = dynamic_threshold(Denoiser(Linear(), SCHEDULE, cond=contexts(1.0, 2.0))(X, T), 0.9)
    for x_0 in (
        alone(X, T),
        Denoiser(
            Linear(), SCHEDULE, cond=contexts(1.0, 2.0), guidance=Guidance(1.0, threshold=0.9)
        )(X, T),
    ):
        torch.testing.assert_close(x_0, wanted)
    assert len(network.seen[0][0]) == 2


def test_a_curve_and_snr_0_of_each_row():
    guidance = Guidance(rescale=0.0, curve=((-4.0, 2.0), (2.0, 6.0)), at_zero_snr=False)
    cond, uncond = pieces(T)
    w = guidance.scale_at(*SCHEDULE(400))
    x_0 = guided(guidance)(X, T)
    torch.testing.assert_close(x_0[0], cond[0])  # SNR 0
    torch.testing.assert_close(x_0[1], (uncond + w * (cond - uncond))[1])


@pytest.mark.parametrize("method", ["cfg", "apg", "cfg_zero_star", "cfg_pp"])
def test_where_the_scale_is_1_the_unconditional_pass_is_left_out(method):
    network = Linear()
    last = 1.0 if method == "cfg_pp" else 4.0
    curve = ((-5.0, 1.0), (-1.0, 1.0), (2.0, last))
    guidance = Guidance(rescale=0.0, method=method, curve=curve)
    denoiser = guided(guidance, network)
    plain = Denoiser(Linear(), SCHEDULE, cond=contexts(1.0, 2.0))
    x_0 = denoiser.at(999, 400)(X, T[[0, 0]])
    assert len(network.seen[-1][0]) == 2
    assert torch.equal(x_0, plain(X, T[[0, 0]]))
    denoiser.at(100, 50)(X, torch.tensor([100, 100]))
    assert len(network.seen[-1][0]) == 4


@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule(zero_terminal_snr=False)])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_cfg_pp_adds_the_unconditional_noise_again(name, schedule, num_steps):
    x_T = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    grid = get_timesteps("trailing", num_steps)
    network = Linear().double()
    denoiser = guided(Guidance(0.6, 0.0, method="cfg_pp"), network, schedule)
    got = get_sampler(name).sample(denoiser, schedule, x_T, grid)
    x, shifts = x_T, (torch.tensor([1.0, 2.0]).double().view(-1, 1, 1, 1), -1.0)
    for t, s in itertools.pairwise([*grid.tolist(), -1]):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
        cond, uncond = (alpha_t * x - sigma_t * (0.5 * x + shift) for shift in shifts)
        eps = (x - alpha_t * uncond) / sigma_t
        x = alpha_s * (uncond + 0.6 * (cond - uncond)) + sigma_s * eps
    torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-10)


def test_cfg_pp_needs_the_next_timestep():
    denoiser = guided(Guidance(0.6, 0.0, method="cfg_pp"))
    for ask in (lambda: denoiser(X, T), lambda: denoiser.at(400)):
        with pytest.raises(ValueError, match="needs the next timestep"):
            ask()
    for name in ("heun", "unipc", "dpmpp_2m", "multiscale", "ddpm"):
        with pytest.raises(ValueError, match="Use the sampler 'ddim' or 'euler'"):
            get_sampler(name).sample(denoiser, SCHEDULE, X, get_timesteps("trailing", 4))
    assert denoiser.network.seen == []


class Weak(Linear):
    def forward(self, x_t, t, conditioning):
        return super().forward(x_t, t, conditioning) * 0.25


@pytest.mark.parametrize("max_rows", [None, 1])
@pytest.mark.parametrize("against", ["negative", "raw"])
def test_a_weak_network_takes_the_place_of_no_prompt(max_rows, against):
    network, weak = Linear(), Weak().half()
    guidance = Guidance(3.0, 0.7, against=against, interval=(0.0, 4.0))
    denoiser = Denoiser(
        network,
        SCHEDULE,
        "sample",
        contexts(1.0, 2.0),
        guidance=guidance,
        weak_network=weak,
        max_rows=max_rows,
    )
    wanted = guidance(Linear()(X, T, contexts(1.0, 2.0)), Weak()(X, T, contexts(1.0, 2.0)))
    x_0 = denoiser(X, torch.tensor([400, 400]))
    torch.testing.assert_close(x_0, wanted, rtol=1e-2, atol=1e-2)
    assert sum(len(x) for x, _, _ in network.seen) == 2
    assert sum(len(x) for x, _, _ in weak.seen) == 2
    assert weak.seen[0][0].dtype == weak.seen[0][2].context.dtype == torch.float16
    assert network.seen[0][0].dtype == torch.float32
    denoiser.at(999)(X, torch.tensor([999, 999]))
    assert sum(len(x) for x, _, _ in weak.seen) == 2  # outside of the interval
    unconditional = Denoiser(
        Linear(), SCHEDULE, "sample", guidance=Guidance(3.0, 0.0), weak_network=Weak()
    )
    torch.testing.assert_close(unconditional(X, T), (0.125 + 3 * 0.375) * X)


def test_raw_weights_need_a_weak_network():
    with pytest.raises(ValueError, match="pass it as weak_network"):
        guided(Guidance(3.0, against="raw"))


METHODS = [
    Guidance(3.0, 0.7, method="apg", apg_norm=2.0),
    Guidance(3.0, 0.7, method="cfg_zero_star"),
    Guidance(0.6, 0.0, method="cfg_pp"),
    Guidance(curve=((-4.0, 1.0), (0.0, 5.0)), at_zero_snr=False, interval=(0.1, 9.0)),
    Guidance(3.0, 0.7, threshold=0.995),
]


@pytest.mark.parametrize("guidance", METHODS)
def test_methods_compile_whole_and_read_no_tensor(guidance):
    def network(x_t, t, conditioning):
        return 0.5 * x_t + conditioning.context.mean((1, 2)).view(-1, 1, 1, 1)

    denoiser = guided(guidance, network)
    SCHEDULE(T)
    for t, s in ((999, 400), (400, 3), (3, -1)):
        row = torch.full((2,), t)
        whole = torch.compile(denoiser.at(t, s), fullgraph=True, backend="eager")
        torch.testing.assert_close(whole(X, row), denoiser.at(t, s)(X, row))
    grid = get_timesteps("log_snr", 6).tolist()
    with FakeTensorMode():
        x_T, prompts = torch.empty(2, 4, 3, 3), Conditioning(torch.empty(2, 3, 5))
        for weak in (None, network):
            fake = Denoiser(
                network, SCHEDULE, "v_prediction", prompts, prompts, guidance, weak_network=weak
            )
            for name in ("ddim",) if guidance.method == "cfg_pp" else ("ddim", "multiscale"):
                assert get_sampler(name).sample(fake, SCHEDULE, x_T, grid).shape == x_T.shape
            if guidance.method != "cfg_pp":
                assert fake(x_T, torch.tensor([999, 3])).shape == x_T.shape


@pytest.mark.parametrize("guidance", METHODS)
def test_methods_of_half_networks_run_in_float32(guidance):
    network = Linear().half()
    x_0 = guided(guidance, network).at(400, 3)(X, T[[1, 1]])
    assert x_0.dtype == torch.float32
    reference = guided(guidance).at(400, 3)(X, T[[1, 1]])
    torch.testing.assert_close(x_0, reference, rtol=5e-2, atol=5e-2)


def test_the_defaults_are_the_papers_to_the_bit():
    """Equations 13 to 16 as they were before there were methods."""
    x_0 = guided(Guidance())(X, T)
    cond = 0.5 * X + torch.tensor([1.0, 2.0]).view(-1, 1, 1, 1)
    uncond = 0.5 * X + torch.tensor(-1.0).view(-1, 1, 1, 1)
    cfg = uncond + 7.5 * (cond - uncond)
    alpha, sigma = SCHEDULE(T)
    assert torch.equal(
        x_0, to_x0(rescale_guidance(cfg, cond, 0.7), X, alpha, sigma, "v_prediction")
    )


class StaticBuffer:
    """Writes every output into one tensor, as a replayed CUDA graph and a TensorRT engine do."""

    def __init__(self, network):
        self.network, self.buffers = network, {}

    def __call__(self, x, *inputs):
        output = self.network(x, *inputs)
        buffer = self.buffers.setdefault(output.shape, torch.empty_like(output))
        return buffer.copy_(output)


GUIDANCES = {
    "none": None,
    "cfg": Guidance(3.0, 0.7),
    "interval": Guidance(3.0, 0.7, interval=(0.5, 4.0)),
    "apg": Guidance(3.0, 0.0, method="apg", apg_norm=2.0),
    "cfg_zero_star": Guidance(3.0, 0.0, method="cfg_zero_star"),
    "cfg_pp": Guidance(0.6, 0.0, method="cfg_pp"),
    "curve": Guidance(1.0, 0.0, curve=((-6.0, 1.0), (0.0, 4.0))),
    "threshold": Guidance(3.0, 0.0, threshold=0.9),
    "raw": Guidance(2.0, 0.0, against="raw"),
}


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("max_rows", [None, 1])
@pytest.mark.parametrize("method", GUIDANCES)
@pytest.mark.parametrize("name", available_samplers())
def test_a_network_may_write_into_one_buffer(name, method, max_rows, prediction_type):
    guidance = GUIDANCES[method]
    if method == "cfg_pp" and name not in ("ddim", "euler"):
        return
    x_T = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    def network(x, t, c):
        return (x.flip(1) + c.context.mean((1, 2)).view(-1, 1) + t.view(-1, 1) / 1000).sin()

    def trajectory(network, weak):
        denoiser = Denoiser(
            *(network, SCHEDULE, prediction_type, contexts(1.0, 2.0), contexts(-1.0), guidance),
            max_rows=max_rows,
            weak_network=weak if method == "raw" else None,
        )
        seen, noise = [], SampleNoise([0, 1])
        x_0 = get_sampler(name).sample(
            *(denoiser, SCHEDULE, x_T, trailing(5)),
            randn_like=noise.randn_like,
            callback=lambda i, t, x_0, x_s: seen.extend([x_0, x_s]),
        )
        return torch.stack([*seen, x_0])

    def weak(x, t, c):
        return network(0.5 * x, t, c)

    shared = StaticBuffer(network)
    raw = StaticBuffer(weak)
    raw.buffers = shared.buffers  # two networks of one pool of memory
    assert torch.equal(trajectory(shared, raw), trajectory(network, weak))


@pytest.mark.parametrize("name", available_samplers())
def test_a_function_may_write_into_one_buffer(name):
    def function(x_t, t):
        return (x_t.flip(1) + t.view(-1, 1) / 1000).sin()

    def trajectory(denoiser):
        torch.manual_seed(0)
        seen = []
        get_sampler(name).sample(
            *(denoiser, SCHEDULE, torch.ones(2, 3), trailing(5)),
            callback=lambda i, t, x_0, x_s: seen.extend([x_0, x_s]),
        )
        return torch.stack(seen)

    assert torch.equal(trajectory(StaticBuffer(function)), trajectory(function))
