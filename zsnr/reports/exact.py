"""The exact denoiser of a dataset in the place of a network, with groups of it as prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zsnr.checkpoints import Model
from zsnr.codecs import LatentCodec
from zsnr.conditioning import Conditioner
from zsnr.denoiser import Conditioning
from zsnr.metrics import mean_luma
from zsnr.oracle import EmpiricalDenoiser
from zsnr.pipeline import TextToImage
from zsnr.prediction import to_v
from zsnr.schedule import Schedule

EXTREMES = ("the darkest quarter", "the brightest quarter")
"""Groups that every dataset has, by mean luma."""


class GroupConditioner(Conditioner):
    """A group's number as its label; the empty prompt is the whole dataset, number 0.

    Args:
        names: Names of the groups.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.context_dim = 0

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        """Look up groups.

        Raises:
            ValueError: A prompt is not the name of a group.
        """
        known = ("", *self.names)
        for prompt in prompts:
            if prompt not in known:
                raise ValueError(f"{prompt!r} is not a group. Known: {', '.join(self.names)}.")
        numbers = [known.index(prompt) for prompt in prompts]
        return Conditioning(labels=torch.tensor(numbers, dtype=torch.int64))

    def settings(self) -> dict[str, Any]:
        return {"names": list(self.names)}


class GroupNetwork:
    """The optimal v of a dataset, or of the group that the conditioning names.

    v = (alpha_t x_t - E[x_0 | x_t, group]) / sigma_t

    Args:
        schedule: The noise schedule.
        latents: The dataset, (N, C, h, w).
        groups: The rows of each group.
    """

    def __init__(
        self, schedule: Schedule, latents: Tensor, groups: Sequence[Sequence[int]]
    ) -> None:
        self.schedule = schedule
        members = [latents, *(latents[list(rows)] for rows in groups)]
        self._denoisers = [EmpiricalDenoiser(schedule, group) for group in members]

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning | None) -> Tensor:
        x_0 = torch.empty_like(x_t)
        labels = None if conditioning is None else conditioning.labels
        numbers = torch.zeros(len(x_t), dtype=torch.int64) if labels is None else labels
        for number in sorted(set(numbers.tolist())):
            rows = numbers == number
            x_0[rows] = self._denoisers[number](x_t[rows], t[rows])
        return to_v(x_0, x_t, *self.schedule(t), "sample")


def exact_pipeline(
    latents: Tensor,
    groups: Mapping[str, Sequence[int]],
    codec: LatentCodec,
    schedule: Schedule,
    image_size: int,
) -> TextToImage:
    """Make a pipeline whose prompts are the names of groups, and "" the whole dataset.

    Guidance between a group and the whole acts on v, as it does with a network.

    Args:
        latents: The latents of the dataset, (N, C, h, w).
        groups: The rows of each group, by name.
        codec: Decodes the samples.
        schedule: The schedule to sample on.
        image_size: Height and width of the images, in pixels.
    """
    model = Model(
        codec=codec,
        conditioner=GroupConditioner(list(groups)),
        network=nn.Identity(),
        schedule=schedule,
        prediction_type="v_prediction",
        image_size=image_size,
    )
    network = GroupNetwork(schedule, latents, list(groups.values()))
    return TextToImage(model, network, f"exact denoiser of {len(latents)} images")


def find_groups(
    images: Tensor, captions: Sequence[str], names: Sequence[str]
) -> dict[str, list[int]]:
    """Find the rows of groups: of `EXTREMES`, or those whose caption contains the name.

    Raises:
        ValueError: A group is empty.
    """
    order = mean_luma(images).argsort().tolist()
    quarter = max(1, len(order) // 4)
    extremes = dict(zip(EXTREMES, (order[:quarter], order[-quarter:]), strict=True))
    groups: dict[str, list[int]] = {}
    for name in names:
        captioned = [i for i, text in enumerate(captions) if name.lower() in text.lower()]
        groups[name] = extremes.get(name, captioned)
        if not groups[name]:
            raise ValueError(
                f"No caption of {len(captions)} images contains {name!r}: choose words that one "
                "does contain."
            )
    return groups
