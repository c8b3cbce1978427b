"""Groups of training samples whose losses are logged apart: sources, and aspect-ratio buckets."""

from __future__ import annotations

import torch
from torch import Tensor

from zsnr.data.samples import Samples


class SampleGroups:
    """The source and the bucket of each sample, where there are several.

    Args:
        samples: Samples of the run; groups that hold none of them are left out.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        by_shard, by_bucket = (samples.table.sum(axis).tolist() for axis in (1, 0))
        sources = dict.fromkeys(
            shard.source_name
            for shard, count in zip(samples.shards, by_shard, strict=True)
            if count
        )
        sizes = [
            f"{width}x{height}"
            for (height, width), count in zip(samples.shapes, by_bucket, strict=True)
            if count
        ]
        kinds = {"source": list(sources), "bucket": sizes}
        self._several = [kind for kind, names in kinds.items() if len(names) > 1]
        self.names = [f"{kind}/{name}" for kind in self._several for name in kinds[kind]]
        """Names of the groups: source/NAME and bucket/WIDTHxHEIGHT."""
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def __call__(self, row: int) -> Tensor:
        """Return the numbers of a sample's groups in `names`: int64, (G,), G kinds of groups."""
        samples = self._samples
        height, width = samples.shapes[samples.bucket[row]]
        own = {
            "source": samples.shards[samples.shard[row]].source_name,
            "bucket": f"{width}x{height}",
        }
        return torch.tensor([self._numbers[f"{kind}/{own[kind]}"] for kind in self._several])
