"""Which sample stands where: the global batch of step k is a function of (samples, seed, k) only.

One epoch shuffles the shards, cuts their row into windows of several, and shuffles the
samples of each window. So reads stay near each other and memory stays small, whatever the size of
the data. Every bucket is an endless stream of its own that epochs and windows only cut into pieces:
what does not fill a batch waits for the next window, or the next epoch.
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


class _Pass(NamedTuple):
    """One epoch."""

    shards: np.ndarray  # in their order, (S,)
    counts: np.ndarray  # samples that each bucket has had before each window, (W + 1, K), of all
    batches: np.ndarray  # batches that were filled before each window, (W + 1,), of all


class TrainingOrder:
    """The endless order of a run's batches; each batch is of one bucket.

    Where sources have ratios, each is an order of its own, with its own epochs, and every batch
    takes from each. A batch of a bucket holds the sources in the shares that they have in the
    bucket when each gives its ratio of all samples and shows its own equally often; so the ratios
    hold in each batch without buckets, and over the batches of all buckets together with them.

    Args:
        samples: What there is.
        batch_size: Of the global batch.
        seed: Of the order.
        window: Shards whose samples are shuffled together.
        shards: Numbers of the shards that it is of, whatever their ratios. None = all.

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
        # Shards of one weight form a group; of each group and bucket, how many samples there are.
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

    @lru_cache(maxsize=4)  # noqa: B019 - an order lives as long as its run
    def batch(self, step: int) -> tuple[int, list[int]]:
        """Return the bucket of step k's global batch, and the rows of its samples."""
        if self._mixture is not None:
            return self._mixture.batch(step)
        number = self._pass_of(step)
        this = self._pass(number)
        window = int(this.batches.searchsorted(step, side="right")) - 1
        bucket, m = self._mixed(number, window)[step - int(this.batches[window])]
        return bucket, self.take(bucket, m * self.batch_size, self.batch_size)

    def take(self, bucket: int, first: int, number: int) -> list[int]:
        """Return so many rows from a position of a bucket's stream on."""
        rows: list[int] = []
        while len(rows) < number:
            rows += self._from(bucket, first + len(rows), number - len(rows))
        return rows

    def replacement(self, position: int, attempt: int) -> int:
        """Return the row of another sample of the bucket, to stand in for a broken one.

        Where sources have ratios it is of the same source.
        """
        step, slot = divmod(position, self.batch_size)
        bucket, rows = self.batch(step)
        shards = self._shards
        if self._mixture is not None:
            shards = self._mixture.shards_of(rows[slot])
        n = derive_seed(self._seed, _REPLACEMENT, position, attempt)
        return self._samples.member(bucket, n, shards)

    def prepare(self) -> None:
        """Write what all processes then map, so that each need not make it."""
        if self._samples.mapped is not None:
            self._pass(0)

    # Counting

    def _seen(self, number: int) -> np.ndarray:
        """Count the samples of each bucket in all epochs before one, (K,).

        A weight f shows sample i of a group of n floor((e + 1) f + u_i) - floor(e f + u_i) times in
        epoch e, with u_i = (i + 1/2) / n. So before epoch e, that is the sum of floor(e f + u_i).
        """
        import numpy as np

        total = np.zeros(self._table.shape[1], np.int64)
        for weight, n in self._sizes.items():
            whole, part = divmod(number * weight, 1)
            total += n * int(whole)
            if part:  # those with u_i >= 1 - part, one more
                p, q = part.numerator, part.denominator
                total += n - np.maximum(0, -((q - 2 * n * (q - p)) // (2 * q)))
        return total

    def _filled(self, number: int) -> int:
        """Count the batches filled before an epoch."""
        return int((self._seen(number) // self.batch_size).sum())

    def _pass_of(self, step: int) -> int:
        """Find the epoch in which the batch of a step is filled."""
        high = 1
        while self._filled(high) <= step:
            high *= 2
        low = high // 2 if high > 1 else 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._filled(middle) <= step else (low, middle)
        return low

    @lru_cache(maxsize=4)  # noqa: B019
    def _pass(self, number: int) -> _Pass:
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
        counts = self._seen(number) + np.concatenate([np.zeros_like(sums[:1]), sums.cumsum(0)])
        return _Pass(shards, counts, (counts // self.batch_size).sum(1))

    def _times(self, number: int, shard: int, bucket: int) -> np.ndarray:
        """How often an epoch shows each sample of one shard and bucket."""
        import numpy as np

        weight, count = self._weights[shard], int(self._table[shard, bucket])
        if weight.denominator == 1:
            return np.full(count, int(weight))
        ranks = self._ranks(weight, bucket)
        before = int(self._before[weight][shard, bucket])
        i, n = ranks[before : before + count], len(ranks)
        seen = []
        for e in (number, number + 1):
            whole, part = divmod(e * weight, 1)  # floor(e f + u_i), in integers
            p, q = part.numerator, part.denominator
            seen.append(int(whole) + (2 * n * p + (2 * i + 1) * q) // (2 * n * q))
        times: np.ndarray = seen[1] - seen[0]
        return times

    @lru_cache(maxsize=64)  # noqa: B019
    def _ranks(self, weight: Fraction, bucket: int) -> np.ndarray:
        """The place i of each sample in its group, by chance, so that epochs take turns fairly."""
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
        """List the batches that a window fills, (bucket, number in its stream), buckets mixed."""
        before, after = self._pass(number).counts[window : window + 2] // self.batch_size
        due = []
        for bucket in range(len(before)):
            count = int(after[bucket] - before[bucket])
            shift = derive_seed(self._seed, _MIX, number, window, bucket) / 2**32
            due += [((i + shift) / count, bucket, int(before[bucket]) + i) for i in range(count)]
        return [(bucket, m) for _, bucket, m in sorted(due)]

    def _from(self, bucket: int, q: int, most: int) -> list[int]:
        """Take rows from position q of a bucket's stream on, up to the end of a window."""
        low, high = 0, 1
        while self._seen(high)[bucket] <= q:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._seen(middle)[bucket] <= q else (low, middle)
        counts = self._pass(low).counts[:, bucket]
        window = int(counts.searchsorted(q, side="right")) - 1
        start = q - int(counts[window])
        rows: list[int] = self._window_rows(low, window, bucket)[start : start + most].tolist()
        return rows

    @lru_cache(maxsize=8)  # noqa: B019
    def _window_rows(self, number: int, window: int, bucket: int) -> np.ndarray:
        """The rows of one bucket in a window, shuffled."""
        import numpy as np

        first = window * self._window
        parts = []
        for shard in self._pass(number).shards[first : first + self._window].tolist():
            rows = self._samples.members(int(self._shards[shard]), bucket)
            parts.append(np.repeat(rows, self._times(number, shard, bucket)))
        rows = np.concatenate(parts)
        shuffle = _permutation(len(rows), self._seed, _WINDOW, number, window, bucket)
        shuffled: np.ndarray = rows[shuffle]
        return shuffled


class _Mixture:
    """Batches that take from several sources by their ratios."""

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
                    f"The source of {first.url} has ratio={first.ratio}, but no sample of it is "
                    "left: take it away, or mend its filters."
                )
            self._orders.append(
                TrainingOrder(samples, 1, derive_seed(seed, _SOURCE, number), window, shards)
            )
            ratio = Fraction(first.ratio or 0.0).limit_denominator(1000)
            pulls.append([ratio * count / sum(counts) for count in counts])
        whole = sum(map(sum, pulls))
        of_bucket = [sum(pull[b] for pull in pulls) for b in range(len(samples.shapes))]
        self._buckets = Split([part / whole for part in of_bucket], 1)
        self._splits = [
            Split([pull[b] / part for pull in pulls], batch_size) if part else None
            for b, part in enumerate(of_bucket)
        ]

    def batch(self, step: int) -> tuple[int, list[int]]:
        """Return the bucket of a step's global batch, and the rows of its samples, mixed."""
        bucket = self._buckets.at(step).index(1)
        m = self._buckets.before(step)[bucket]
        split = self._splits[bucket]
        assert split is not None
        rows: list[int] = []
        for order, first, number in zip(self._orders, split.before(m), split.at(m), strict=True):
            rows += order.take(bucket, first, number)
        mixed = _permutation(len(rows), self._seed, _BATCH, step).tolist()
        return bucket, [rows[i] for i in mixed]

    def shards_of(self, row: int) -> np.ndarray:
        """The numbers of the shards of a row's source."""
        shard = self._samples.shard[row]
        return next(shards for shards in self._sources if shard in shards)


class Split:
    """Division of a whole number into parts by shares, step after step.

    At each step the parts add up to the number, and each is total s_i rounded down or up. What is
    left of total s_i is the length e_i of an interval; these lie one behind the other, and the
    parts whose interval holds one of the points u_k + 0, 1, 2 .. are rounded up. With u_k = a k / D
    mod 1, where D is the e_i's common denominator and a has no factor in common with it, each part
    is rounded up in exactly e_i D of any D steps in a row. In between, what a part had so far stays
    close to its share: within one of it for two parts, about two for more.

    Args:
        shares: s_i, which add up to one.
        total: The number.
    """

    def __init__(self, shares: Sequence[Fraction], total: int) -> None:
        exact = [share * total for share in shares]
        self._whole = [int(part // 1) for part in exact]
        rests = [part % 1 for part in exact]
        D = self._D = lcm(*(rest.denominator for rest in rests))
        lengths = [int(rest * D) for rest in rests]
        self._ends = [0, *accumulate(lengths)]
        golden = (isqrt(5 * D * D) - D) // 2
        two = [length for length in lengths if length]
        tried = [*two[: len(two) == 2], golden, *lengths, *(D * i // 33 for i in range(1, 33))]
        steps = [next(a for a in count(first) if gcd(a, D) == 1) for first in tried]
        self._step = steps[0] if D > _LONGEST_PERIOD else min(steps, key=self._deviation)

    def _deviation(self, a: int) -> float:
        """How far from its share a part ever is, with this a."""
        import numpy as np

        u = a * np.arange(self._D) % self._D
        points = [-((u - end) // self._D) for end in self._ends]
        lengths = np.diff(self._ends)[:, None]
        due = lengths * np.arange(1, self._D + 1) / self._D
        return float(np.abs(np.diff(points, axis=0).cumsum(1) - due).max())

    def at(self, k: int) -> list[int]:
        """Return the parts of step k."""
        u = self._step * k % self._D
        return self._parts(1, [-((u - end) // self._D) for end in self._ends])

    def before(self, k: int) -> list[int]:
        """Return the sums of the parts of all steps before step k."""
        return self._parts(k, [-_floor_sum(k, self._D, self._step, -end) for end in self._ends])

    def _parts(self, steps: int, points: list[int]) -> list[int]:
        """The parts, from the number of points in front of each interval's end."""
        return [
            steps * whole + after - before
            for whole, before, after in zip(self._whole, points, points[1:], strict=False)
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
    """The positions that one rank loads, batch after batch, from a given step on, endlessly.

    The global batch of step k holds the positions k batch_size .. (k + 1) batch_size - 1; ranks
    and accumulation only divide it.

    Args:
        batch_size: Of the global batch.
        rank: This process.
        num_ranks: All processes.
        accumulate: Micro-batches of a step.
        first_step: Where to start; a resumed run starts where it stopped.

    Raises:
        ValueError: The numbers do not divide.
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
        each, k = self._size // self._parts, self._first
        while True:
            for micro in range(self._accumulate):
                start = k * self._size + (micro * self._ranks + self._rank) * each
                yield list(range(start, start + each))
            k += 1


def accumulation(batch_size: int, num_ranks: int, most: int | None = None) -> int:
    """Return into how many micro-batches a rank divides its share of the global batch.

    Args:
        batch_size: Of the global batch.
        num_ranks: All processes.
        most: Samples that a device holds at a time. None = any number.

    Raises:
        ValueError: The batch does not divide by the ranks.
    """
    if batch_size % num_ranks:
        raise ValueError(
            f"data.batch_size={batch_size}, the global batch, does not divide into {num_ranks} "
            f"ranks: wanted a multiple of {num_ranks}."
        )
    share = batch_size // num_ranks
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= (most or share))


def _permutation(n: int, *keys: int) -> np.ndarray:
    permutation: np.ndarray = torch.randperm(
        n, generator=sample_generator(derive_seed(*keys))
    ).numpy()
    return permutation


def _mapped_permutation(file: Path, n: int, *keys: int) -> np.ndarray:
    """Map a permutation from a file, which the first process that needs it writes."""
    import numpy as np

    try:
        if not file.is_file() or file.stat().st_size != 8 * n:
            with replacing(file) as beside:
                with beside.open("wb") as room:  # a full disk is an error here, later a signal
                    os.posix_fallocate(room.fileno(), 0, 8 * n)
                made = torch.from_numpy(np.memmap(beside, np.int64, "r+"))
                torch.randperm(n, generator=sample_generator(derive_seed(*keys)), out=made)
        return np.memmap(file, np.int64, "r")
    except OSError as error:
        warnings.warn(f"{file} cannot be used: {error}. It stays in memory.", stacklevel=2)
        return _permutation(n, *keys)
