import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zsnr import (
    Conditioning,
    Denoiser,
    Guidance,
    NoiseSchedule,
    get_sampler,
    get_timesteps,
    prediction_target,
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
    with pytest.raises(ValueError, match=r"network gave .*: wanted a tensor of shape \(2, 4, 3, 3"):
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
    wanted = get_sampler(name).sample(
        lambda x, t: denoiser(x, t), SCHEDULE, X, grid, randn_like=randn_like
    )
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
    with pytest.raises(ValueError, match="network gave tuple"):
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
    )


def test_conditioning_rows():
    joined = Conditioning.cat([full(2, 1.0), full(1, 2.0)])
    assert len(joined) == 3
    assert joined.pooled[:, 0].tolist() == [1, 1, 2]
    chosen = full(3, 1.0).where(torch.tensor([True, False, True]), full(1, 0.0))
    for part in (chosen.context, chosen.pooled, chosen.sizes):
        assert part.flatten(1)[:, 0].tolist() == [1, 0, 1]
    moved = full(1, 1.0).to("cpu", torch.bfloat16)
    assert moved.context.dtype == torch.bfloat16
    assert moved.mask.dtype == torch.bool
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
