"""The order of training data: what every (samples, seed, k) must give."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zsnr.data.order import Split, StepBatches, TrainingOrder
from zsnr.data.samples import Samples
from zsnr.data.sources import Shard


def make(table, weights=None, digest="0" * 32, ratios=None):
    """Samples with so many of each bucket (columns) in each shard (rows), mixed within a shard."""
    weights = weights or [1.0] * len(table)
    rng = np.random.default_rng(0)
    shard, bucket = [], []
    for number, counts in enumerate(table):
        own = np.repeat(np.arange(len(counts)), counts)
        shard += [number] * len(own)
        bucket += rng.permutation(own).tolist()
    n = len(shard)
    return Samples(
        shards=[Shard(f"{i}.tar", w) for i, w in enumerate(weights)]
        if ratios is None
        else [Shard(f"{i}.tar", ratio=r, source=s) for i, (s, r) in enumerate(ratios)],
        sizes=[0] * len(table),
        shapes=[(8, 8 * (i + 1)) for i in range(len(table[0]))],
        rows=np.arange(n),
        shard=np.array(shard, np.int32),
        bucket=np.array(bucket, np.int16),
        size=np.zeros((n, 2)),
        spans=np.zeros((n, 3, 2)),
        keys=None,
        removed={},
        total=n,
        faults=[],
        digest=digest,
    )


def tables(max_shards=6, max_buckets=4):
    def of(shape):
        cells = st.lists(st.integers(0, 5), min_size=shape[1], max_size=shape[1])
        return st.lists(cells, min_size=shape[0], max_size=shape[0])

    shapes = st.tuples(st.integers(1, max_shards), st.integers(1, max_buckets))
    return shapes.flatmap(of).filter(lambda table: sum(map(sum, table)) > 0)


WEIGHTS = st.sampled_from([1.0, 2.0, 0.5, 1.5, 0.3])


@given(tables(), st.integers(1, 7), st.integers(0, 2**31), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_each_bucket_shows_every_sample_once_before_any_twice(table, size, seed, window):
    samples = make(table)
    order = TrainingOrder(samples, size, seed, window)
    seen = {bucket: [] for bucket in range(len(samples.shapes))}
    n = len(samples)
    for step in range(3 * n // size + 3):
        bucket, rows = order.batch(step)
        assert len(rows) == size
        assert set(samples.bucket[rows]) == {bucket}  # one shape
        seen[bucket] += rows
    for bucket, rows in seen.items():
        members = np.flatnonzero(samples.bucket == bucket).tolist()
        for i in range(0, len(rows) - len(members) + 1, max(1, len(members))):
            assert sorted(rows[i : i + len(members)]) == members
    # Buckets advance together: what is behind is less than one batch each, and one pass.
    counts = np.array([len(rows) for rows in seen.values()])
    sizes = np.bincount(samples.bucket, minlength=len(counts))
    passes = counts[sizes > 0] / sizes[sizes > 0]
    slack = 1 + size / sizes[sizes > 0].min()
    assert passes.max() - passes.min() <= slack


@given(tables(4, 3), st.integers(1, 5), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_any_step_is_found_without_those_before(table, size, seed, data):
    samples = make(table)
    walked = TrainingOrder(samples, size, seed, 2)
    walk = [walked.batch(step) for step in range(40)]
    step = data.draw(st.integers(0, 39))
    assert TrainingOrder(samples, size, seed, 2).batch(step) == walk[step]


@given(tables(5, 3), st.data(), st.integers(1, 5), st.integers(0, 99), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_a_weight_is_how_often_a_pass_shows_a_sample(table, data, size, seed, window):
    weights = [data.draw(WEIGHTS) for _ in table]
    samples = make(table, weights)
    order = TrainingOrder(samples, size, seed, window)
    passes = 20  # all weights come out even after 20
    wanted = Counter(
        {row: round(passes * weights[shard]) for row, shard in enumerate(samples.shard.tolist())}
    )
    for bucket in range(len(samples.shapes)):
        members = np.flatnonzero(samples.bucket == bucket)
        total = sum(wanted[row] for row in members.tolist())
        assert order._samples_before(passes)[bucket] == total
        stream = []
        while len(stream) < total:
            stream += order._take_from_window(bucket, len(stream), total - len(stream))
        assert Counter(stream) == Counter({r: wanted[r] for r in members.tolist()})
    for shard, weight in enumerate(weights):  # the closed form is the sum of its parts
        for bucket in range(len(samples.shapes)):
            for number in (0, 1, 7):
                times = order._times(number, shard, bucket)
                whole = Fraction(weight).limit_denominator(1000)
                assert set(times.tolist()) <= {int(whole), int(whole) + (whole.denominator > 1)}


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(0, 12), st.integers(1, 3), st.integers(1, 2)
)
@settings(max_examples=60, deadline=None)
def test_stops_and_other_numbers_of_ranks_change_no_batch(ranks, others, stop, accumulate, each):
    size = 180 * each
    whole = [[*range(k * size, (k + 1) * size)] for k in range(stop + 3)]
    before = run(size, ranks, accumulate, 0, stop)
    after = run(size, others, 1, stop, 3)
    assert before + after == whole


def run(size, ranks, accumulate, first, steps):
    """The global batches that so many ranks load together, in order."""
    parts = [StepBatches(size, r, ranks, accumulate, first) for r in range(ranks)]
    taken = [list(itertools.islice(p, steps * accumulate)) for p in parts]
    return [
        sorted(
            p
            for rank in taken
            for batch in rank[k * accumulate : (k + 1) * accumulate]
            for p in batch
        )
        for k in range(steps)
    ]


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="wanted a multiple of 6"):
        StepBatches(16, 0, 2, 3)


def test_the_data_and_the_seed_decide():
    table = [[40], [40]]
    first = TrainingOrder(make(table), 8, 0).batch(0)
    assert TrainingOrder(make(table), 8, 0).batch(0) == first
    assert TrainingOrder(make(table), 8, 1).batch(0) != first
    assert TrainingOrder(make(table, digest="f" * 32), 8, 0).batch(0) != first


def test_a_window_holds_few_shards():
    samples = make([[50]] * 40)
    order = TrainingOrder(samples, 10, 0, window=4)
    for window in range(10):
        rows = [r for step in range(window * 20, (window + 1) * 20) for r in order.batch(step)[1]]
        assert len(set(samples.shard[rows])) == 4  # 200 samples of 4 shards, each once
        assert len(set(rows)) == 200


def test_replacements_are_of_the_same_bucket_and_vary():
    samples = make([[3, 9], [5, 20]])
    order = TrainingOrder(samples, 4, 0)
    for position in range(60):
        bucket, _ = order.batch(position // 4)
        rows = [order.replacement(position, attempt) for attempt in range(1, 30)]
        assert set(samples.bucket[rows]) == {bucket}
        assert rows == [order.replacement(position, attempt) for attempt in range(1, 30)]
        assert len(set(rows)) > 3
    reached = {order.replacement(p, 1) for p in range(4000)}
    assert reached == set(range(37))


def test_far_positions_are_found_at_once():
    samples = make([[1000, 37], [990, 1]] * 20, [1.0, 0.5] * 20)
    order = TrainingOrder(samples, 64, 0)
    bucket, rows = order.batch(10**9)
    assert len(rows) == 64
    assert set(samples.bucket[rows]) == {bucket}


@pytest.mark.parametrize(("options", "message"), [((0, 0), "batch_size=0"), ((4, 0, 0), "window")])
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOrder(make([[3]]), *options)


RATIOS = st.sampled_from([1.0, 2.0, 3.0, 0.5, 0.1, 7.0, 0.333, 100.0])


@given(st.lists(RATIOS, min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 10**12))
@settings(max_examples=150, deadline=None)
def test_parts_are_as_near_to_their_shares_as_integers_are(ratios, total, far):
    whole = sum(map(Fraction, ratios))
    shares = [Fraction(ratio) / whole for ratio in ratios]
    split = Split(shares, total)
    so_far = split.sums_before(far)
    assert sum(so_far) == far * total
    for k in range(far, far + 60):
        assert split.sums_before(k) == so_far  # no step needs those before
        parts = split.parts_at(k)
        assert sum(parts) == total
        for i, share in enumerate(shares):
            assert abs(parts[i] - share * total) < 1
            so_far[i] += parts[i]
            if len(ratios) == 2:
                assert abs(so_far[i] - share * total * (k + 1)) < 1
            else:
                assert abs(so_far[i] - share * total * (k + 1)) < 12


@pytest.mark.parametrize("weights", [(1, 1, 1), (7, 2, 1), (50, 30, 15, 5), (33, 33, 34), (1, 999)])
@pytest.mark.parametrize("total", [1, 8, 100])
def test_a_period_holds_the_shares_exactly(weights, total):
    whole = sum(weights)
    split = Split([Fraction(weight, whole) for weight in weights], total)
    for k in range(0, 3 * whole, whole):
        assert split.sums_before(k) == [weight * total * k // whole for weight in weights]
    for k in range(whole):
        due = [Fraction(weight * total * k, whole) for weight in weights]
        assert max(abs(a - b) for a, b in zip(split.sums_before(k), due, strict=True)) < 2


@given(tables(5, 1), st.data(), st.integers(1, 12), st.integers(0, 99), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_each_batch_holds_the_ratios_and_each_source_its_own_epochs(
    table, data, size, seed, window
):
    table = [[count + 1 for count in row] for row in table]
    source = sorted(data.draw(st.integers(0, 2)) for _ in table)
    ratio = {s: data.draw(RATIOS) for s in source}
    samples = make(table, ratios=[(s, ratio[s]) for s in source])
    order = TrainingOrder(samples, size, seed, window)
    whole, seen = sum(map(Fraction, ratio.values())), {s: [] for s in source}
    for step in range(40):
        _, rows = order.batch(step)
        assert len(rows) == size
        counts = Counter(source[samples.shard[row]] for row in rows)
        for s, r in ratio.items():
            assert abs(counts[s] - size * Fraction(r) / whole) < 1
        # A batch is mixed: sort it by source to see each source's stream.
        for s in seen:
            seen[s].append([row for row in rows if source[samples.shard[row]] == s])
    for s, batches in seen.items():
        rows = [row for batch in batches for row in batch]
        members = [row for row in range(len(samples)) if source[samples.shard[row]] == s]
        counts = Counter(rows)
        spread = 1 + max(map(len, batches), default=0) // len(members) + 1
        assert max(counts.values(), default=0) - min(counts[row] for row in members) <= spread
    step = data.draw(st.integers(0, 39))
    assert TrainingOrder(samples, size, seed, window).batch(step) == order.batch(step)


@given(st.data(), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_with_buckets_the_ratios_hold_over_all_batches(data, size, seed):
    table = data.draw(tables(4, 3).filter(lambda table: len(table) > 1 and all(map(sum, table))))
    ratio = [data.draw(st.sampled_from([1.0, 2.0, 0.5])) for _ in table]
    samples = make(table, ratios=list(enumerate(ratio)))
    order = TrainingOrder(samples, size, seed, 2)
    steps = 200
    counts, shown = Counter(), Counter()
    for step in range(steps):
        bucket, rows = order.batch(step)
        assert set(samples.bucket[rows]) == {bucket}
        counts.update(samples.shard[rows].tolist())
        shown.update(rows)
    for s, r in enumerate(ratio):
        assert abs(counts[s] - steps * size * r / sum(ratio)) < 8 * size
        per_sample = counts[s] / sum(table[s])  # each sample of a source equally often
        for row in np.flatnonzero(samples.shard == s):
            assert abs(shown[row] - per_sample) < 8 * size


def test_replacements_are_of_the_same_source():
    samples = make([[9], [20], [5]], ratios=[(0, 1), (1, 3), (1, 3)])
    order = TrainingOrder(samples, 8, 0)
    for position in range(64):
        shard = samples.shard[order[position]]
        others = {int(samples.shard[order.replacement(position, n)]) for n in range(1, 30)}
        assert others == ({0} if shard == 0 else {1, 2})


def test_ratios_are_mixed_and_change_with_the_seed():
    samples = make([[50], [50]], ratios=[(0, 1), (1, 1)])
    batches = [TrainingOrder(samples, 16, seed).batch(0)[1] for seed in (0, 0, 1)]
    assert batches[0] == batches[1] != batches[2]
    first = [samples.shard[TrainingOrder(samples, 16, s).batch(0)[1][:4]] for s in range(9)]
    assert len({tuple(shards.tolist()) for shards in first}) > 3


def test_a_source_without_samples_has_no_ratio():
    with pytest.raises(ValueError, match="1.tar has ratio=2.0, but none of its samples is left"):
        TrainingOrder(make([[3], [0]], ratios=[(0, 1.0), (1, 2.0)]), 2, 0)
