"""Exact denoisers without training: callables (x_t, t) -> x_0, usable like any Denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from zsnr.denoiser import Conditioning, Denoiser
from zsnr.guidance import Guidance
from zsnr.prediction import to_v
from zsnr.schedule import Schedule, per_sample, timesteps_at


class GaussianDenoiser:
    """The optimal denoiser of x_0 ~ N(m, s^2), elementwise.

    E[x_0 | x_t] = m + alpha_t s^2 / (alpha_t^2 s^2 + sigma_t^2) (x_t - alpha_t m)

    Args:
        schedule: The noise schedule.
        mean: m, a number or a tensor that broadcasts with x_t.
        std: s, a number or a tensor that broadcasts with x_t; not negative.
    """

    guidance: ClassVar[None] = None

    def __init__(self, schedule: Schedule, mean: Tensor | float, std: Tensor | float) -> None:
        self.schedule, self.mean, self.std = schedule, mean, std

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        alpha_t, sigma_t = (per_sample(scale, x_t.to(dtype)) for scale in self.schedule(t))
        m, s = (
            p.to(x_t.device, dtype) if isinstance(p, Tensor) else p for p in (self.mean, self.std)
        )
        variance = s**2
        gain = alpha_t * variance / (alpha_t**2 * variance + sigma_t**2)
        return m + gain * (x_t - alpha_t * m)


@dataclass(frozen=True, eq=False)
class _Members:
    """A dataset and its spreads on one device, in float64: rows (N, D), (N,), () or (N,)."""

    images: Tensor
    half_norms: Tensor
    variance: Tensor

    def to(self, device: torch.device) -> _Members:
        return _Members(*(part.to(device) for part in vars(self).values()))

    def noisy_variance(self, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """Compute v_i of the Gaussian around each member, (B, 1 or N)."""
        return alpha_t**2 * self.variance + sigma_t**2


class EmpiricalDenoiser:
    """The optimal denoiser of a finite dataset: a softmax average of its members.

    E[x_0 | x_t] = sum_i w_i (x^i + alpha_t s_i^2 / v_i (x_t - alpha_t x^i))
    w = softmax_i(-|x_t - alpha_t x^i|^2 / (2 v_i) - D/2 log v_i)
    v_i = alpha_t^2 s_i^2 + sigma_t^2

    with D numbers per sample. s = 0 is the dataset itself, else a mixture of Gaussians around its
    members. At alpha_t = 0 it is the mean of the data whatever x_t is (section 5.2). The logits are
    float64: near t = 0 they reach 1e6.

    With classes, it is exact for a class as well as for all, so guidance can be judged without a
    network: see `guided` and `posterior`.

    Args:
        schedule: The noise schedule.
        images: The dataset, (N, *).
        classes: The class of each member, (N,) integers from 0 on. None = no classes.
        std: s of the Gaussian around each member: a number, or one per member, (N,).
        batch_invariant: Make each sample's x_0 bitwise independent of the rest of the batch. False
            = one matrix product for the batch, which is faster.

    Raises:
        ValueError: The dataset is empty, or the shape of classes or std is wrong.
    """

    guidance: ClassVar[None] = None

    def __init__(
        self,
        schedule: Schedule,
        images: Tensor,
        *,
        classes: Tensor | None = None,
        std: Tensor | float = 0.0,
        batch_invariant: bool = True,
    ) -> None:
        if len(images) == 0:
            raise ValueError("EmpiricalDenoiser got no images: wanted at least one.")
        self.schedule = schedule
        self._shape = images.shape[1:]
        rows = images.flatten(1).to(torch.float64)
        self._product = _rows_matmul if batch_invariant else torch.matmul
        self.classes = None if classes is None else _check_classes(classes, len(images))
        variance = torch.as_tensor(std, dtype=torch.float64, device=images.device).square()
        if variance.ndim and variance.shape != (len(images),):
            raise ValueError(
                f"std has shape {tuple(variance.shape)}: wanted a number, or ({len(images)},)."
            )
        self._spreads, self._covers = bool(variance.any()), bool(variance.all())
        self._members = {images.device: _Members(rows, rows.square().sum(1) / 2, variance)}

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 = no classes."""
        return 0 if self.classes is None else int(self.classes.max()) + 1

    def __call__(self, x_t: Tensor, t: Tensor, of: Tensor | None = None) -> Tensor:
        """Predict clean data.

        Args:
            x_t: Noisy data, (B, *).
            t: int64 timesteps, (B,).
            of: The class of each sample, (B,); -1 = any. None = any class for all samples.

        Returns:
            x_0, (B, *), in x_t's dtype, at least float32.

        Raises:
            ValueError: The shapes do not match, or a class does not exist.
        """
        x, members = self._rows(x_t), self._members_on(x_t.device)
        alpha_t, sigma_t = (scale.to(torch.float64).view(-1, 1) for scale in self.schedule(t))
        weights = self._logits(x, alpha_t, sigma_t, of).softmax(1)
        weights[weights < torch.finfo(torch.float64).tiny] = 0  # subnormals are negligible but slow
        if self._spreads:
            gain = alpha_t * members.variance / members.noisy_variance(alpha_t, sigma_t)
            x_0 = self._product(weights * (1 - alpha_t * gain), members.images)
            x_0 = x_0 + (weights * gain).sum(1, keepdim=True) * x
        else:
            x_0 = self._product(weights, members.images)
        return x_0.view(x_t.shape).to(torch.promote_types(x_t.dtype, torch.float32))

    def posterior(self, x_0: Tensor, t: int) -> Tensor:
        """Compute the class probabilities of clean data: p(class | x_0), (B, classes), float64.

        The dataset is smoothed by the noise of a timestep, sigma_t / alpha_t, because generated
        samples are not members of it.

        Args:
            x_0: Clean data, (B, *).
            t: The timestep of the smoothing noise; -1 = none, for a mixture of Gaussians.

        Raises:
            ValueError: There are no classes, t has SNR 0, or a finite dataset is not smoothed.
        """
        if self.classes is None:
            raise ValueError("EmpiricalDenoiser has no classes: pass classes=.")
        alpha_t, sigma_t = self.schedule(t)
        if alpha_t == 0 or (sigma_t == 0 and not self._covers):
            raise ValueError(f"t={t}: wanted a timestep with signal and noise, such as 100.")
        rows = self._rows(x_0)
        alpha, sigma = (rows.new_full((1, 1), scale) for scale in (alpha_t, sigma_t))
        weights = self._logits(alpha_t * rows, alpha, sigma, None).softmax(1)
        classes = torch.nn.functional.one_hot(self.classes.to(rows.device), self.num_classes)
        return weights @ classes.to(weights)

    def network(self, x_t: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor:
        """Predict v, as a `Network`; the conditioning's labels are the classes.

        t is what a network is told, `schedule.time`.
        """
        t = timesteps_at(self.schedule, t)
        of = None if conditioning is None else conditioning.labels
        x_0 = self(x_t, t, of)
        return to_v(x_0, x_t.to(x_0.dtype), *self.schedule(t), "sample")

    def guided(self, of: Tensor, guidance: Guidance | None) -> Denoiser:
        """Return the exact denoiser of one class per sample, (B,), guided away from the dataset."""
        cond, uncond = (Conditioning(labels=classes) for classes in (of, torch.full_like(of, -1)))
        return Denoiser(self.network, self.schedule, "v_prediction", cond, uncond, guidance)

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self._shape:
            raise ValueError(
                f"x_t has samples of shape {tuple(x.shape[1:])}, but the dataset has "
                f"{tuple(self._shape)}: wanted equal shapes."
            )
        return x.flatten(1).to(torch.float64)

    def _members_on(self, device: torch.device) -> _Members:
        """Return the dataset on a device; it is copied there once."""
        members = self._members.get(device)
        if members is None:
            members = next(iter(self._members.values())).to(device)
            if type(members.images) is Tensor:  # a fake tensor must not outlive its mode
                self._members[device] = members
        return members

    def _has(self, of: Tensor) -> bool:
        return bool(((of >= -1) & (of < self.num_classes)).all())

    def _logits(self, x: Tensor, alpha_t: Tensor, sigma_t: Tensor, of: Tensor | None) -> Tensor:
        """Compute log w_i up to a constant, (B, N)."""
        members = self._members_on(x.device)
        v = members.noisy_variance(alpha_t, sigma_t)
        products = self._product(x, members.images.T)
        logits = (alpha_t * products - alpha_t**2 * members.half_norms) / v
        if members.variance.ndim:
            logits = logits - x.square().sum(1, keepdim=True) / (2 * v) - x.shape[1] / 2 * v.log()
        if of is None:
            return logits
        if self.classes is None or len(of) != len(x) or not self._has(of):
            raise ValueError(
                f"Classes {of[:8].tolist()} of {len(x)} samples: wanted one per sample, -1 to "
                f"{self.num_classes - 1}."
            )
        classes = self.classes.to(of.device)
        other_class = (of.view(-1, 1) >= 0) & (of.view(-1, 1) != classes)
        return logits.masked_fill(other_class, -torch.inf)


def span(images: Tensor) -> tuple[Tensor, Tensor]:
    """Express images in an orthonormal basis of their span, where the oracle is cheaper.

    Predictions lie in the span, and logits depend only on x_t's projection. So sampling noise z by
    EmpiricalDenoiser(schedule, images) gives x_0, and sampling basis @ z by
    EmpiricalDenoiser(schedule, coordinates) gives basis @ x_0, for any sampler whose steps are
    linear in x_t, x_0 and noise.

    Args:
        images: (N, *), D numbers each.

    Returns:
        coordinates (N, r) and basis (r, D), float64, with images = coordinates @ basis and r the
        rank.
    """
    rows = images.flatten(1).to(torch.float64)
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    nonzero = s > s[0] * 1e-12
    return u[:, nonzero] * s[nonzero], vh[nonzero]


def _rows_matmul(x: Tensor, matrix: Tensor, block: int = 16) -> Tensor:
    """Compute x @ matrix so that the rounding of a row does not depend on the other rows.

    The rounding of a matrix product depends on its shape, so every product here has the same shape:
    one row if the matrix is small, otherwise a block of rows padded with zeros.
    """
    if matrix.numel() <= 2**16:
        return torch.stack([row @ matrix for row in x])
    blocks = pad(x, (0, 0, 0, -len(x) % block)).split(block)  # type: ignore[no-untyped-call]
    return torch.cat([rows @ matrix for rows in blocks])[: len(x)]


def _check_classes(classes: Tensor, count: int) -> Tensor:
    """Return classes as int64, after checking them."""
    if classes.shape != (count,) or classes.is_floating_point():
        raise ValueError(
            f"classes is {classes.dtype} of shape {tuple(classes.shape)}: wanted integers, "
            f"({count},)."
        )
    classes = classes.to(torch.int64)
    present = sorted(set(classes.tolist()))
    if present != list(range(len(present))):
        raise ValueError(f"classes are {present[:8]}: wanted 0, 1, 2, ... with a member of each.")
    return classes
