"""Order of the samples: the global batch of step k is a function of (samples, seed, k) only.

Each epoch shuffles the shards, groups them into windows of several, and shuffles the samples of
each window. So reads stay local and memory stays small, whatever the size of the dataset. Every
bucket is a separate endless stream, divided by epochs and windows: samples that do not fill a batch
are left for the next window, or the next epoch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, count
from math import gcd, isqrt, lcm
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.data import Sampler

from zsnr.files import replacing
from zsnr.noise import derive_seed, sample_generator

if TYPE_CHECKING:
    import numpy as np

    from zsnr.data.samples import Samples

# Independent streams of one seed.
_SHARDS, _WINDOW, _RANKS, _REPLACEMENT, _MIX, _SOURCE, _BATCH = range(7)

_LONGEST_PERIOD = 1 << 14


class _Epoch(NamedTuple):
    """One epoch."""

    shards: np.ndarray  # shuffled, (S,)
    counts: np.ndarray  # total samples of each bucket before each window, (W + 1, K)
    batches: np.ndarray  # total batches before each window, (W + 1,)


class TrainingOrder:
    """The endless order of a run's batches; each batch is of one bucket.

    If the sources have ratios, each source has an order and epochs of its own, and every batch
    mixes all sources. Without buckets, each batch has the given ratios. With buckets, a batch mixes
    the sources in the shares that they have in its bucket, if each source contributes its ratio of
    all samples and repeats its samples equally often; so the ratios hold over all batches together.

    Args:
        samples: The samples.
        batch_size: Size of the global batch.
        seed: Seed of the order.
        window: Number of shards whose samples are shuffled together.
        shards: Numbers of the shards to use, whatever their ratios. None = all shards.

    Raises:
        ValueError: An argument is out of range, or a source with a ratio has no samples.
    """

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        seed: int,
        window: int = 10,
        shards: np.ndarray | None = None,
    ) -> None:
        import numpy as np

        if window < 1:
            raise ValueError(f"data.window_shards={window}: wanted at least 1.")
        if batch_size < 1:
            raise ValueError(f"data.batch_size={batch_size}: wanted at least 1.")
        self.batch_size, self._window = batch_size, window
        self._seed = derive_seed(seed, int(samples.digest[:8], 16))
        self._samples, self._mixture = samples, None
        if shards is None:
            shards = np.arange(len(samples.shards))
            if samples.shards[0].ratio is not None:
                self._mixture = _Mixture(samples, batch_size, self._seed, window)
        self._shards = shards
        table = self._table = samples.table[shards]
        weights = [
            Fraction(shard.weight).limit_denominator(1000)
            for shard in (samples.shards[n] for n in shards)
        ]
        self._weights = weights
        # Shards of one weight form a group, with a number of samples in each bucket.
        self._groups = {
            weight: np.array([w == weight for w in weights]) for weight in dict.fromkeys(weights)
        }
        self._sizes = {w: table[members].sum(0) for w, members in self._groups.items()}
        self._before = {  # samples of the group in the shards before one
            w: (table * members[:, None]).cumsum(0) - table * members[:, None]
            for w, members in self._groups.items()
            if w.denominator != 1
        }

    def __getitem__(self, position: int) -> int:
        """Return the row of the sample at position p = k batch_size + j of the run."""
        step, slot = divmod(position, self.batch_size)
        return self.batch(step)[1][slot]

    @lru_cache(maxsize=4)  # noqa: B019 - an order exists as long as its run
    def batch(self, step: int) -> tuple[int, list[int]]:
        """Return the bucket of step k's global batch, and the rows of its samples."""
        if self._mixture is not None:
            return self._mixture.batch(step)
        number = self._epoch_of(step)
        epoch = self._epoch(number)
        window = int(epoch.batches.searchsorted(step, side="right")) - 1
        bucket, m = self._mixed(number, window)[step - int(epoch.batches[window])]
        return bucket, self.take(bucket, m * self.batch_size, self.batch_size)

    def take(self, bucket: int, first: int, number: int) -> list[int]:
        """Return `number` rows of a bucket's stream, starting at position `first`."""
        rows: list[int] = []
        while len(rows) < number:
            rows += self._take_from_window(bucket, first + len(rows), number - len(rows))
        return rows

    def replacement(self, position: int, attempt: int) -> int:
        """Return the row of another sample of the bucket, to replace a broken one.

        If the sources have ratios, the sample is from the same source.
        """
        step, slot = divmod(position, self.batch_size)
        bucket, rows = self.batch(step)
        shards = self._shards
        if self._mixture is not None:
            shards = self._mixture.shards_of(rows[slot])
        n = derive_seed(self._seed, _REPLACEMENT, position, attempt)
        return self._samples.member(bucket, n, shards)

    def prepare(self) -> None:
        """Write the files that all processes then map, so that only one process computes them."""
        if self._samples.mapped is not None:
            self._epoch(0)

    # Counting

    def _samples_before(self, number: int) -> np.ndarray:
        """Count the samples of each bucket in all epochs before one, (K,).

        With weight f, sample i of a group of n occurs floor((e + 1) f + u_i) - floor(e f + u_i)
        times in epoch e, with u_i = (i + 1/2) / n. So the count before epoch e is the sum of
        floor(e f + u_i).
        """
        import numpy as np

        total = np.zeros(self._table.shape[1], np.int64)
        for weight, n in self._sizes.items():
            times, part = divmod(number * weight, 1)
            total += n * int(times)
            if part:  # samples with u_i >= 1 - part occur once more
                p, q = part.numerator, part.denominator
                total += n - np.maximum(0, -((q - 2 * n * (q - p)) // (2 * q)))
        return total

    def _batches_before(self, number: int) -> int:
        """Count the batches before an epoch."""
        return int((self._samples_before(number) // self.batch_size).sum())

    def _epoch_of(self, step: int) -> int:
        """Find the epoch that completes the batch of a step."""
        high = 1
        while self._batches_before(high) <= step:
            high *= 2
        low = high // 2 if high > 1 else 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._batches_before(middle) <= step else (low, middle)
        return low

    @lru_cache(maxsize=4)  # noqa: B019
    def _epoch(self, number: int) -> _Epoch:
        import numpy as np

        shards = _permutation(len(self._table), self._seed, _SHARDS, number)
        table = np.zeros(self._table.shape, np.int64)
        for weight, members in self._groups.items():
            if weight.denominator == 1:
                table[members] = self._table[members] * int(weight)
            else:
                for shard in np.flatnonzero(members).tolist():
                    for bucket in np.flatnonzero(self._table[shard]).tolist():
                        table[shard, bucket] = self._times(number, shard, bucket).sum()
        windows = table[shards]
        starts = range(0, len(shards), self._window)
        sums = np.stack([windows[i : i + self._window].sum(0) for i in starts])
        counts = self._samples_before(number) + np.pad(sums.cumsum(0), ((1, 0), (0, 0)))
        return _Epoch(shards, counts, (counts // self.batch_size).sum(1))

    def _times(self, number: int, shard: int, bucket: int) -> np.ndarray:
        """Count how often each sample of one shard and bucket occurs in an epoch."""
        import numpy as np

        weight, count = self._weights[shard], int(self._table[shard, bucket])
        if weight.denominator == 1:
            return np.full(count, int(weight))
        ranks = self._ranks(weight, bucket)
        before = int(self._before[weight][shard, bucket])
        i, n = ranks[before : before + count], len(ranks)
        cumulative = []
        for e in (number, number + 1):
            times_before, part = divmod(e * weight, 1)  # floor(e f + u_i), in integers
            p, q = part.numerator, part.denominator
            cumulative.append(int(times_before) + (2 * n * p + (2 * i + 1) * q) // (2 * n * q))
        times: np.ndarray = cumulative[1] - cumulative[0]
        return times

    @lru_cache(maxsize=64)  # noqa: B019
    def _ranks(self, weight: Fraction, bucket: int) -> np.ndarray:
        """Return the random rank i of each sample in its group, for an even spread over epochs."""
        n = int(self._sizes[weight][bucket])
        keys = self._seed, _RANKS, weight.numerator, weight.denominator, bucket
        mapped = self._samples.mapped
        if mapped is None or not n:
            return _permutation(n, *keys)
        file = mapped.path.with_suffix("." + "-".join(map(str, keys)))
        return _mapped_permutation(file, n, *keys)

    # Windows

    @lru_cache(maxsize=4)  # noqa: B019
    def _mixed(self, number: int, window: int) -> list[tuple[int, int]]:
        """List the batches that a window completes, (bucket, number in its stream), interleaved."""
        before, after = self._epoch(number).counts[window : window + 2] // self.batch_size
        due = []
        for bucket in range(len(before)):
            count = int(after[bucket] - before[bucket])
            shift = derive_seed(self._seed, _MIX, number, window, bucket) / 2**32
            due += [((i + shift) / count, bucket, int(before[bucket]) + i) for i in range(count)]
        return [(bucket, m) for _, bucket, m in sorted(due)]

    def _take_from_window(self, bucket: int, q: int, limit: int) -> list[int]:
        """Return rows of a bucket's stream from position q on, at most to the window's end."""
        low, high = 0, 1
        while self._samples_before(high)[bucket] <= q:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            count = self._samples_before(middle)[bucket]
            low, high = (middle, high) if count <= q else (low, middle)
        counts = self._epoch(low).counts[:, bucket]
        window = int(counts.searchsorted(q, side="right")) - 1
        start = q - int(counts[window])
        rows: list[int] = self._window_rows(low, window, bucket)[start : start + limit].tolist()
        return rows

    @lru_cache(maxsize=8)  # noqa: B019
    def _window_rows(self, number: int, window: int, bucket: int) -> np.ndarray:
        """Return the rows of one bucket in a window, shuffled."""
        import numpy as np

        first = window * self._window
        parts = []
        for shard in self._epoch(number).shards[first : first + self._window].tolist():
            rows = self._samples.members(int(self._shards[shard]), bucket)
            parts.append(np.repeat(rows, self._times(number, shard, bucket)))
        rows = np.concatenate(parts)
        shuffle = _permutation(len(rows), self._seed, _WINDOW, number, window, bucket)
        shuffled: np.ndarray = rows[shuffle]
        return shuffled


class _Mixture:
    """Batches that mix several sources by their ratios."""

    def __init__(self, samples: Samples, batch_size: int, seed: int, window: int) -> None:
        import numpy as np

        self._samples, self._seed = samples, seed
        sources = np.array([shard.source for shard in samples.shards])
        self._sources = [np.flatnonzero(sources == number) for number in np.unique(sources)]
        self._orders, pulls = [], []
        for number, shards in enumerate(self._sources):
            first = samples.shards[shards[0]]
            counts = samples.table[shards].sum(0).tolist()
            if not sum(counts):
                raise ValueError(
                    f"The source of {first.url} has ratio={first.ratio}, but none of its samples "
                    "is left: remove the source, or correct its filters."
                )
            self._orders.append(
                TrainingOrder(samples, 1, derive_seed(seed, _SOURCE, number), window, shards)
            )
            ratio = Fraction(first.ratio or 0.0).limit_denominator(1000)
            pulls.append([ratio * count / sum(counts) for count in counts])
        pull_sum = sum(map(sum, pulls))
        of_bucket = [sum(pull[b] for pull in pulls) for b in range(len(samples.shapes))]
        self._buckets = Split([part / pull_sum for part in of_bucket], 1)
        self._splits = [
            Split([pull[b] / part for pull in pulls], batch_size) if part else None
            for b, part in enumerate(of_bucket)
        ]

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Return the bucket of a step's global batch, and the rows of its samples, mixed."""
        bucket = self._buckets.parts_at(step).index(1)
        m = self._buckets.sums_before(step)[bucket]
        split = self._splits[bucket]
        assert split is not None
        rows: list[int] = []
        for order, first, n in zip(
            self._orders, split.sums_before(m), split.parts_at(m), strict=True
        ):
            rows += order.take(bucket, first, n)
        mixed = _permutation(len(rows), self._seed, _BATCH, step).tolist()
        return bucket, [rows[i] for i in mixed]

    def shards_of(self, row: int) -> np.ndarray:
        """Return the numbers of the shards of a row's source."""
        shard = self._samples.shard[row]
        return next(shards for shards in self._sources if shard in shards)


class Split:
    """Division of an integer into integer parts by shares, step after step.

    At each step the parts add up to the total, and each is total s_i rounded down or up. The
    fractional part of total s_i is the length e_i of an interval; the intervals are adjacent, and
    the parts whose interval holds one of the points u_k + 0, 1, 2 .. are rounded up. With
    u_k = a k / D mod 1, where D is the common denominator of the e_i and a is coprime to D, each
    part is rounded up in exactly e_i D of any D consecutive steps. In between, the running sum of a
    part stays close to its share: within one for two parts, and about two for more.

    Args:
        shares: s_i, which add up to one.
        total: The integer to divide.
    """

    def __init__(self, shares: Sequence[Fraction], total: int) -> None:
        exact = [share * total for share in shares]
        self._floors = [int(part // 1) for part in exact]
        fractions = [part % 1 for part in exact]
        D = self._D = lcm(*(fraction.denominator for fraction in fractions))
        lengths = [int(fraction * D) for fraction in fractions]
        self._ends = [0, *accumulate(lengths)]
        golden = (isqrt(5 * D * D) - D) // 2
        used = [length for length in lengths if length]
        tried = [*used[: len(used) == 2], golden, *lengths, *(D * i // 33 for i in range(1, 33))]
        steps = [next(a for a in count(first) if gcd(a, D) == 1) for first in tried]
        self._step = steps[0] if D > _LONGEST_PERIOD else min(steps, key=self._deviation)

    def _deviation(self, a: int) -> float:
        """Return the maximum deviation of a running sum from its share, with this a."""
        import numpy as np

        u = a * np.arange(self._D) % self._D
        points = [-((u - end) // self._D) for end in self._ends]
        lengths = np.diff(self._ends)[:, None]
        due = lengths * np.arange(1, self._D + 1) / self._D
        return float(np.abs(np.diff(points, axis=0).cumsum(1) - due).max())

    def parts_at(self, k: int) -> list[int]:
        """Return the parts of step k."""
        u = self._step * k % self._D
        return self._parts(1, [-((u - end) // self._D) for end in self._ends])

    def sums_before(self, k: int) -> list[int]:
        """Return the sums of the parts of all steps before step k."""
        return self._parts(k, [-_floor_sum(k, self._D, self._step, -end) for end in self._ends])

    def _parts(self, steps: int, points: list[int]) -> list[int]:
        """Return the parts, from the number of points before each interval's end."""
        return [
            steps * base + after - before
            for base, before, after in zip(self._floors, points, points[1:], strict=False)
        ]


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Return the sum of floor((a i + b) / m) over i in 0 .. n - 1, as Euclid's algorithm does."""
    total = 0
    while True:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        y = a * n + b
        if y < m:
            return total
        n, b = divmod(y, m)
        m, a = a, m


class StepBatches(Sampler[list[int]]):
    """An endless stream of one rank's micro-batches of positions, from a given step on.

    The global batch of step k holds the positions k batch_size .. (k + 1) batch_size - 1; ranks
    and gradient accumulation only divide it.

    Args:
        batch_size: Size of the global batch.
        rank: Rank of this process.
        num_ranks: Number of processes.
        accumulate: Micro-batches per step.
        first_step: First step; a resumed run starts at the step where it stopped.

    Raises:
        ValueError: The batch is not divisible by ranks times micro-batches.
    """

    def __init__(
        self,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        accumulate: int = 1,
        first_step: int = 0,
    ) -> None:
        parts = num_ranks * accumulate
        if batch_size < 1 or batch_size % parts:
            raise ValueError(
                f"The global batch of {batch_size} does not divide into {num_ranks} ranks times "
                f"{accumulate} accumulated batches: wanted a multiple of {parts}."
            )
        self._size, self._parts = batch_size, parts
        self._rank, self._ranks, self._accumulate = rank, num_ranks, accumulate
        self._first = first_step

    def __iter__(self) -> Iterator[list[int]]:
        share, k = self._size // self._parts, self._first
        while True:
            for micro in range(self._accumulate):
                start = k * self._size + (micro * self._ranks + self._rank) * share
                yield list(range(start, start + share))
            k += 1


def accumulation(batch_size: int, num_ranks: int, max_per_device: int | None = None) -> int:
    """Return the number of micro-batches into which a rank divides its part of the global batch.

    Args:
        batch_size: Size of the global batch.
        num_ranks: Number of processes.
        max_per_device: Maximum number of samples per device at a time. None = no limit.

    Raises:
        ValueError: The batch is not divisible by the number of ranks.
    """
    if batch_size % num_ranks:
        raise ValueError(
            f"data.batch_size={batch_size}, the global batch, does not divide into {num_ranks} "
            f"ranks: wanted a multiple of {num_ranks}."
        )
    share = batch_size // num_ranks
    limit = max_per_device or share
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= limit)


def _permutation(n: int, *keys: int) -> np.ndarray:
    permutation: np.ndarray = torch.randperm(
        n, generator=sample_generator(derive_seed(*keys))
    ).numpy()
    return permutation


def _mapped_permutation(file: Path, n: int, *keys: int) -> np.ndarray:
    """Memory-map a permutation from a file, which the first process that needs it writes."""
    import numpy as np

    try:
        if not file.is_file() or file.stat().st_size != 8 * n:
            with replacing(file) as beside:
                with beside.open("wb") as room:  # a full disk raises here, but kills below
                    os.posix_fallocate(room.fileno(), 0, 8 * n)
                permutation = torch.from_numpy(np.memmap(beside, np.int64, "r+"))
                torch.randperm(n, generator=sample_generator(derive_seed(*keys)), out=permutation)
        return np.memmap(file, np.int64, "r")
    except OSError as error:
        warnings.warn(f"{file} cannot be used: {error}. The order is in memory.", stacklevel=2)
        return _permutation(n, *keys)
