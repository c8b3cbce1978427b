"""The base class of samplers: a plan of network calls, and the loop that executes it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zsnr.denoiser import TimestepDenoiser
from zsnr.guidance import Guidance
from zsnr.guidance_methods import inner
from zsnr.schedule import Schedule
from zsnr.timesteps import check_timesteps, timestep_pairs
from zsnr.transition import reverse_transition

DenoiserFunction = Callable[[Tensor, Tensor], Tensor]
RandnLike = Callable[[Tensor], Tensor]
Coefficients = tuple[float, float, float]
ASSUMED_GUIDANCE = Guidance(3.0)


class Changed(NamedTuple):
    """What a callback of sampling changes.

    Args:
        x_0: The prediction, (B, *): the step is repeated with it. None = unchanged.
        x_s: The state that the step led to, (B, *): sampling continues from it. None = unchanged.
    """

    x_0: Tensor | None = None
    x_s: Tensor | None = None


Callback = Callable[[int, int, Tensor, Tensor], Changed | None]


class MultistepCoefficients(NamedTuple):
    """Weights of x_s = sum_i a_i x_0^(i) + b x_t + sum_i e_i eps^(i) + c z.

    x_0^(i) and eps^(i) are the predictions of the i-th last network call, newest first.
    eps = (x_t - alpha_t x_0) / sigma_t.
    """

    a: tuple[float, ...]
    b: float
    c: float = 0.0
    e: tuple[float, ...] = ()


class Call(NamedTuple):
    """One network call, and the step that uses its prediction.

    Args:
        t: The timestep at which the network is evaluated.
        s: The timestep that the step leads to; -1 is clean data.
        step: The step from x_t. None = the call only corrects, and the next one is at the same t.
        correct: Coefficients that repeat the previous step from its start, now that the prediction
            at its end is known too. None = x_t is not corrected.
        limited: Whether the step falls back to first order for samples whose prediction reverses
            direction, see `agreement`.
    """

    t: int
    s: int
    step: MultistepCoefficients | None
    correct: MultistepCoefficients | None = None
    limited: bool = False


@dataclass(frozen=True)
class Plan:
    """All steps of a sampler on one grid, computed before the first network call.

    Args:
        calls: The network calls, in order.
        scales: (alpha_t, sigma_t) of each call.

    Attributes:
        memory: Maximum numbers of predictions of x_0, and of eps, that a call uses.
    """

    calls: tuple[Call, ...]
    scales: tuple[tuple[float, float], ...]
    memory: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        used = [c for call in self.calls for c in (call.step, call.correct) if c is not None]
        memory = max(len(c.a) for c in used), max(len(c.e) for c in used)
        if any(call.limited for call in self.calls):
            memory = max(3, memory[0]), memory[1]
        object.__setattr__(self, "memory", memory)

    @property
    def timesteps(self) -> list[int]:
        """The timestep of every network call."""
        return [call.t for call in self.calls]


class State(NamedTuple):
    """The state of sampling between two network calls of a plan.

    Args:
        x_t: Input of the next call, (B, *), at least float32; at the end, the sample.
        t: Timestep of the next call; -1 at the end.
        num_calls: Number of calls so far.
        before: The state from which the last step started. None = x_t was changed since, so that
            the last step is not corrected.
        x_0: Predictions of the calls so far that are still needed, newest first.
        eps: Predictions of the noise that are still needed, newest first.
    """

    x_t: Tensor
    t: int
    num_calls: int
    before: Tensor | None
    x_0: tuple[Tensor, ...] = ()
    eps: tuple[Tensor, ...] = ()

    @property
    def done(self) -> bool:
        """Whether no call is left."""
        return self.t < 0


class Sampler:
    """A method that turns noise into data. Samplers are frozen values without mutable state.

    A subclass implements `calls`, or overrides `sample` if its loop cannot be planned.

    Attributes:
        keeps_history: Whether a step depends on more than x_t and x_0 of its own timestep, or
            calls the denoiser more than once. Used by code that drives a sampler step by step.
    """

    keeps_history: ClassVar[bool] = True

    def calls(
        self, schedule: Schedule, grid: tuple[int, ...], guidance: Guidance | None
    ) -> Sequence[Call]:
        """Compute the network calls and the coefficients of every step.

        Args:
            schedule: The noise schedule.
            grid: Validated timesteps, descending.
            guidance: Guidance of the denoiser. None = no guidance.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither `calls` nor `sample`.")

    def plan(
        self,
        schedule: Schedule,
        timesteps: Tensor | Sequence[int],
        guidance: Guidance | None = None,
    ) -> Plan:
        """Plan the network calls of a grid, with coefficients in float64.

        Args:
            schedule: The schedule the denoiser was made for.
            timesteps: The grid, 1-D, descending, such as `trailing(25)`.
            guidance: Guidance of the denoiser, for samplers whose steps depend on it. None = no
                guidance.

        Raises:
            ValueError: The grid is not a descending list of the schedule's timesteps, or the
                guidance method is "cfg_pp" and a step is not first order and deterministic.
        """
        grid = tuple(check_timesteps(timesteps, schedule.num_timesteps))
        calls = tuple(self.calls(schedule, grid, guidance))
        if not calls:
            raise ValueError(f"{type(self).__name__} planned no network call: wanted one per step.")
        if guidance is not None and guidance.method == "cfg_pp" and not all(map(_is_ddim, calls)):
            raise ValueError(
                f"Guidance method 'cfg_pp' requires deterministic first-order steps, unlike those "
                f"of {type(self).__name__}. Use the sampler 'ddim' or 'euler'."
            )
        return Plan(calls, tuple(schedule(call.t) for call in calls))

    def begin(self, plan: Plan, x_T: Tensor) -> State:
        """Return the state before the first call; x_T (B, *) is noise, and is not changed."""
        x_t = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
        return State(x_t, plan.calls[0].t, 0, x_t)

    def advance(
        self, plan: Plan, state: State, x_0: Tensor, randn_like: RandnLike = torch.randn_like
    ) -> State:
        """Advance by one network call.

        Args:
            plan: Result of `plan`.
            state: Result of `begin` or `advance`; it is not changed.
            x_0: The denoiser's prediction at (state.x_t, state.t), (B, *). The state holds a copy.
            randn_like: Source of noise, called if the step needs noise.
        """
        call = plan.calls[state.num_calls]
        num_x_0, num_eps = plan.memory
        x_0s = (x_0.to(state.x_t.dtype, copy=True), *state.x_0)  # x_0 may be overwritten
        before, x_t, epses = state.before, state.x_t, state.eps
        if call.correct is not None and before is not None:
            x_t = multistep(x_0s, before, call.correct, epses)
        if call.step is not None:
            if num_eps:
                alpha_t, sigma_t = plan.scales[state.num_calls]
                epses = (x_t.sub(x_0s[0], alpha=alpha_t).div_(sigma_t), *epses)
            z = randn_like(x_t) if call.step.c > 0 else None
            trust = agreement(x_0s) if call.limited and len(x_0s) > 2 else None
            before, x_t = x_t, multistep(x_0s, x_t, call.step, epses, z, trust)
        num_calls = state.num_calls + 1
        t = plan.calls[num_calls].t if num_calls < len(plan.calls) else -1
        return State(x_t, t, num_calls, before, x_0s[:num_x_0], epses[:num_eps])

    def change(self, plan: Plan, state: State, x_t: Tensor) -> State:
        """Continue from another x_t (B, *) at the same timestep, with the history of predictions.

        Between the two calls of a step, as of Heun's method, the result of the step does not depend
        on x_t itself, but only on the prediction there.
        """
        within = not state.done and plan.calls[state.num_calls].step is None
        return state._replace(x_t=x_t.to(state.x_t), before=state.before if within else None)

    def sample(
        self,
        denoiser: DenoiserFunction,
        schedule: Schedule,
        x_T: Tensor,
        timesteps: Tensor | Sequence[int],
        *,
        randn_like: RandnLike = torch.randn_like,
        callback: Callback | None = None,
        with_grad: bool = False,
    ) -> Tensor:
        """Sample x_0 from x_T.

        Args:
            denoiser: (x_t, t) -> x_0 with x_t (B, *) and t int64 (B,).
            schedule: The schedule the denoiser was made for.
            x_T: Noise of the first timestep, (B, *). Not changed.
            timesteps: The grid, 1-D, descending, such as `trailing(25)`.
            randn_like: Source of noise, called once for every step that needs it.
            callback: Called after step i with (i, t, x_0, x_s): the step's timestep, the
                prediction, and the resulting state. It may return `Changed`; a bool, as a progress
                bar's update returns it, is ignored.
            with_grad: Record the path for a backward pass, which keeps the activations of every
                network call. False = torch.no_grad().

        Returns:
            x_0, (B, *), in x_T's dtype; the loop itself uses at least float32.

        Raises:
            ValueError: The grid is not a descending list of the schedule's timesteps, the denoiser
                declares another schedule, a network takes the denoiser's place, or the callback
                returns something else, or a tensor of another shape.
        """
        check_denoiser(denoiser, schedule)
        plan = self.plan(schedule, timesteps, guidance_of(denoiser))
        with torch.set_grad_enabled(with_grad and torch.is_grad_enabled()):
            return self._run(plan, denoiser, x_T, randn_like, callback)

    def _run(
        self,
        plan: Plan,
        denoiser: DenoiserFunction,
        x_T: Tensor,
        randn_like: RandnLike,
        callback: Callback | None,
    ) -> Tensor:
        state = self.begin(plan, x_T)
        t_rows = torch.tensor(plan.timesteps, device=x_T.device)
        t_rows = t_rows.view(-1, 1).repeat(1, len(x_T))
        z: list[Tensor] = []  # the noise of the last step

        def draw(like: Tensor) -> Tensor:
            z[:] = [randn_like(like)]
            return z[0]

        i, age, begun = 0, 0, (state.t, state.x_t)  # the step's timestep and first prediction
        for call, t_row in zip(plan.calls, t_rows.unbind(), strict=True):
            before = state
            x_0 = predict(denoiser, state.x_t, call, t_row)
            state = self.advance(plan, before, x_0, draw)
            age += 1
            if call.step is not None:
                age, begun = 0, (call.t, state.x_0[0])
            if state.done or plan.calls[state.num_calls].step is not None:  # the step is complete
                changed = None if callback is None else callback(i, *begun, state.x_t)
                if changed is not None and not isinstance(changed, bool):
                    _check_changed(changed, state.x_t)
                    if changed.x_0 is not None:
                        predictions = [x_0, *before.x_0]
                        predictions[age] = changed.x_0
                        before = before._replace(x_0=tuple(predictions[1:]))
                        state = self.advance(plan, before, predictions[0], lambda _: z[0])
                    if changed.x_s is not None:
                        state = self.change(plan, state, changed.x_s)
                i += 1
        return state.x_t.to(x_T.dtype)


def _check_changed(changed: object, x_s: Tensor) -> None:
    """Refuse what a callback must not return."""
    if not isinstance(changed, Changed):
        raise ValueError(
            f"The callback returned a {type(changed).__name__}: wanted None, or a "
            "zsnr.samplers.Changed of x_0 or x_s."
        )
    for name, tensor in changed._asdict().items():
        if tensor is not None and tensor.shape != x_s.shape:
            raise ValueError(
                f"The callback changed {name} to the shape {tuple(tensor.shape)}: wanted "
                f"{tuple(x_s.shape)}."
            )


def step_calls(grid: Sequence[int], steps: Sequence[MultistepCoefficients]) -> list[Call]:
    """Plan one network call per step."""
    pairs = timestep_pairs(grid)
    return [Call(t, s, step) for (t, s), step in zip(pairs, steps, strict=True)]


def transition_steps(
    schedule: Schedule, grid: Sequence[int], eta: float
) -> list[MultistepCoefficients]:
    """Compute first-order steps, `reverse_transition` with this eta."""
    return [
        MultistepCoefficients((a,), b, c)
        for a, b, c in transition_coefficients(schedule, grid, eta)
    ]


def transition_coefficients(
    schedule: Schedule, timesteps: Tensor | Sequence[int], eta: float
) -> list[Coefficients]:
    """Compute (a, b, c) of `reverse_transition` for every step of a grid, in float64."""
    scales = [schedule(t) for t in (*check_timesteps(timesteps, schedule.num_timesteps), -1)]
    return [reverse_transition(*at_t, *at_s, eta) for at_t, at_s in pairwise(scales)]


def log_snr_steps(schedule: Schedule, grid: Sequence[int]) -> list[float]:
    """Compute h = l_s - l_t of every step, l = log(alpha / sigma), half the log SNR.

    Infinite for the step from SNR 0 and for the step to clean data.
    """
    levels = [
        -math.inf if alpha == 0 else math.inf if sigma == 0 else math.log(alpha / sigma)
        for alpha, sigma in (schedule(t) for t in (*grid, -1))
    ]
    return [l_s - l_t for l_t, l_s in pairwise(levels)]


def step(x_0: Tensor, x_t: Tensor, coefficients: Coefficients, z: Tensor | None = None) -> Tensor:
    """Apply one step: x_s = a x_0 + b x_t + c z; two fused operations, three with noise.

    The coefficients are floats, so a compiler that specializes on floats compiles it once per step:
    compile the network instead.
    """
    a, b, c = coefficients
    return multistep((x_0,), x_t, MultistepCoefficients((a,), b, c), z=z)


def multistep(
    x_0: Sequence[Tensor],
    x_t: Tensor,
    coefficients: MultistepCoefficients,
    eps: Sequence[Tensor] = (),
    z: Tensor | None = None,
    trust: Tensor | None = None,
) -> Tensor:
    """Apply one step: x_s = sum_i a_i x_0^(i) + b x_t + sum_i e_i eps^(i) + c z.

    Args:
        x_0: Predictions, newest first; those without a coefficient are not used.
        x_t: The state.
        coefficients: Coefficients of this step.
        eps: Predictions of the noise, newest first.
        z: Noise. None = no noise.
        trust: Factor for each sample, (B, 1, ...), on the correction beyond the first-order step
            from x_0. None = 1.
    """
    a, *older = coefficients.a
    used = x_0[: 1 + len(older)]
    if trust is not None:
        a += sum(older)
        used = (x_0[0], *((x - x_0[0]).mul_(trust) for x in used[1:]))
    x_s = torch.mul(x_0[0], a).add_(x_t, alpha=coefficients.b)
    for prediction, weight in (
        *zip(used[1:], older, strict=False),
        *zip(eps, coefficients.e, strict=False),
    ):
        x_s.add_(prediction, alpha=weight)
    return x_s if z is None else x_s.add_(z, alpha=coefficients.c)


def agreement(x_0: Sequence[Tensor]) -> Tensor:
    """Compute 1 + min(0, cos(x_0 - x_0', x_0' - x_0'')) of each sample, (B, 1, ...).

    It is 1 if the last two changes of the prediction have the same direction, and falls to 0 if the
    last one reverses the previous one, where extrapolation would oscillate.
    """
    d, d_before = (a.sub(b) for a, b in pairwise(x_0[:3]))
    sizes = (inner(d, d) * inner(d_before, d_before)).sqrt()
    cosine = inner(d, d_before) / torch.where(sizes == 0, 1.0, sizes)
    return (1 + cosine.clamp(-1, 0)).view(-1, *(1,) * (x_0[0].ndim - 1))


def _is_ddim(call: Call) -> bool:
    """Whether a call is one deterministic first-order step from its own prediction."""
    step = call.step
    if step is None or call.correct is not None:
        return False
    return len(step.a) == 1 and step.c == 0 and not step.e


def check_denoiser(denoiser: DenoiserFunction, schedule: Schedule) -> None:
    """Refuse a network in the place of a denoiser, and a denoiser of another schedule.

    Raises:
        ValueError: It is a module, whose output may be anything; it cannot be called with (x_t, t);
            or `denoiser.schedule` differs from `schedule`.
    """
    if not isinstance(denoiser, TimestepDenoiser):
        if isinstance(denoiser, nn.Module):
            raise ValueError(
                f"{type(denoiser).__name__} is a network, but samplers take a denoiser (x_t, t) -> "
                'x_0. Wrap it: Denoiser(network, schedule, "v_prediction"), or whatever it '
                "predicts; if its output is x_0, lambda x_t, t: network(x_t, t)."
            )
        if not _takes_two(denoiser):
            name = getattr(denoiser, "__name__", type(denoiser).__name__)
            raise ValueError(
                f"{name} cannot be called with (x_t, t): wanted a denoiser (x_t, t) -> x_0. If it "
                'is a network, wrap it: Denoiser(network, schedule, "v_prediction"), or whatever '
                "it predicts."
            )
    declared = getattr(denoiser, "schedule", schedule)
    if declared != schedule:
        raise ValueError(
            f"The denoiser was made for {declared}, but the sampler got {schedule}: wanted the "
            "same schedule."
        )


def _takes_two(function: object) -> bool:
    """Whether a function can be called with two arguments, as far as its signature says."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def guidance_of(denoiser: DenoiserFunction) -> Guidance | None:
    """Return the guidance that a denoiser declares as its attribute `guidance`; None = none.

    A function without the attribute may be guided or not. A scale of 3 is assumed: steps for that
    scale lose little at other scales, while steps for no guidance overshoot under guidance.
    """
    guidance = getattr(denoiser, "guidance", ASSUMED_GUIDANCE)
    return guidance if isinstance(guidance, Guidance) else None


def predict(denoiser: DenoiserFunction, x_t: Tensor, call: Call, t_row: Tensor) -> Tensor:
    """Evaluate a denoiser at the timestep of a call, (B, *).

    A `TimestepDenoiser` is evaluated by `at`, with the timestep as an int, so that it can skip the
    unconditional pass without waiting for the device.
    """
    evaluate = denoiser.at(call.t, call.s) if isinstance(denoiser, TimestepDenoiser) else denoiser
    return evaluate(x_t, t_row).to(x_t.dtype)
