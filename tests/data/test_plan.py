import itertools
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casc.data.evaluation_plan import plan_evaluation
from casc.data.hashing import hash64
from casc.data.index import Bucket, Shard, Split
from casc.data.plan import (
    BLOCK,
    EpochHistory,
    EpochPlan,
    Phase,
    noise_seed,
    plan_epoch,
    worker_steps,
    worker_windows,
)
from casc.errors import UserError


def make_split(shards: list[tuple[int, int, bool]], buckets: int | None = None) -> Split:
    """A split from (bucket, samples, train) of each shard."""
    number = max(b for b, _, _ in shards) + 1 if buckets is None else buckets
    return Split(
        samples=sum(n for _, n, _ in shards),
        train_samples=sum(n for _, n, train in shards if train),
        buckets=tuple(Bucket(f"b{i}", 0, None, 8, 8, 1, 1, 0) for i in range(number)),
        shards=tuple(
            Shard(f"{i:06d}.tar", b, train, n, 1, "") for i, (b, n, train) in enumerate(shards)
        ),
    )


def trace(plan: EpochPlan, rank: int, start: int = 0) -> dict[int, tuple[int, list]]:
    """Per step, the bucket and the (shard, index) that the rank's workers draw for it."""
    steps = {}
    for worker in range(plan.workers):
        draws = {}
        for step, bucket in worker_steps(plan, worker, start):
            if bucket not in draws:
                draws[bucket] = drawn(plan, bucket, rank, worker, start)
            steps[step] = bucket, [next(draws[bucket]) for _ in range(plan.batch)]
        for rest in draws.values():
            assert next(rest, None) is None, "a worker reads what no step needs"
    return dict(sorted(steps.items()))


def buckets_of(plan: EpochPlan) -> list[int]:
    """Of each step, from the plan's first on."""
    return [bucket for b in range(plan.blocks) for bucket in plan.buckets(b).tolist()]


def drawn(plan: EpochPlan, bucket: int, rank: int, worker: int, start: int):
    for window in worker_windows(plan, bucket, rank, worker, start):
        held = [(s.shard, i) for s in window.segments for i in range(s.start, s.stop)]
        assert len(held) <= plan.window
        for at in window.order:
            yield held[at]


plans = st.fixed_dictionaries(
    {
        "shards": st.lists(
            st.tuples(st.integers(0, 4), st.integers(1, 40), st.booleans()), min_size=1, max_size=12
        ),
        "seed": st.integers(0, 2**63),
        "epoch": st.integers(0, 300),
        "world": st.integers(1, 6) | st.integers(1, 64),
        "batch": st.integers(1, 5),
        "workers": st.integers(0, 8),
        "window": st.integers(1, 50),
        "block": st.integers(1, 30) | st.just(BLOCK),
    }
)


@settings(max_examples=80, deadline=None)
@given(plans, st.data())
def test_epoch(case, data):
    split = make_split(case.pop("shards"), buckets=5)
    if not split.train_samples:
        with pytest.raises(UserError, match="no training samples"):
            plan_epoch(split, **case)
        return
    plan = plan_epoch(split, **case)
    ranks = [trace(plan, rank) for rank in range(case["world"])]
    # All ranks take the same steps in the same buckets.
    for steps in ranks:
        assert list(steps) == list(range(plan.steps))
        assert [bucket for bucket, _ in steps.values()] == buckets_of(plan)
    # Every training sample once; repeats fill less than one step of each bucket.
    seen = Counter(pick for steps in ranks for _, picks in steps.values() for pick in picks)
    extra = Counter()
    for i, shard in enumerate(split.shards):
        for at in range(shard.samples):
            assert (seen[i, at] >= 1) == shard.train
            extra[shard.bucket] += max(seen[i, at] - 1, 0)
    assert [extra[b] for b in range(5)] == plan.wrapped
    assert all(0 <= n < case["world"] * case["batch"] for n in plan.wrapped)
    # A sample is drawn at a step of its own bucket.
    for steps in ranks:
        for bucket, picks in steps.values():
            assert all(split.shards[shard].bucket == bucket for shard, _ in picks)
    # Resuming at any step gives the tail.
    start = data.draw(st.integers(0, plan.steps))
    rank = data.draw(st.integers(0, case["world"] - 1))
    tail = trace(plan_epoch(split, **case), rank, start)
    assert tail == {step: v for step, v in ranks[rank].items() if step >= start}


ways = st.tuples(
    st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]),
    st.integers(0, 4),
    st.integers(1, 30),
)


@settings(max_examples=150, deadline=None)
@given(plans, st.lists(ways, min_size=2, max_size=4), st.data())
def test_going_on_with_other_processes_leaves_nothing_out(case, turns, data):
    """World, batch, workers and window change within an epoch; world x batch stays 12."""
    split = make_split(case["shards"], buckets=5)
    if not split.train_samples:
        return
    common = {"seed": case["seed"], "epoch": case["epoch"], "block": case["block"]}
    seen = Counter()
    phases: list[Phase] = []
    wrapped = steps = None
    way: dict[str, int] = {}
    for turn, ((world, batch), workers, window) in enumerate(turns):
        way = {"world": world, "batch": batch, "workers": workers, "window": window}
        plan = plan_epoch(split, **common, **way, past=EpochHistory(case["epoch"], tuple(phases)))
        first = phases[-1].stop if phases else 0
        if turn == 0:
            wrapped, steps = plan.wrapped, plan.steps
        assert plan.steps == steps, "steps of the epoch, and so the learning rate's, stay"
        assert all(0 <= n < 12 for n in plan.wrapped)
        last = turn == len(turns) - 1
        stop = plan.steps if last else data.draw(st.integers(first, plan.steps))
        for rank in range(world):
            for step, (bucket, picks) in trace(plan, rank, first).items():
                assert first <= step
                if step < stop:
                    assert all(split.shards[shard].bucket == bucket for shard, _ in picks)
                    seen.update(picks)
        phases.append(Phase(stop, world, batch, workers, window))
    trained = {(i, k) for i, (_, n, train) in enumerate(case["shards"]) if train for k in range(n)}
    assert seen.keys() == trained
    extra = Counter()
    for (shard, _), count in seen.items():
        extra[split.shards[shard].bucket] += count - 1
    assert [extra[b] for b in range(5)] == wrapped, "no more repeats than without a change"
    later = {**common, "epoch": case["epoch"] + 1, **way}
    other = plan_epoch(split, **later, past=EpochHistory(0, ()))
    same = plan_epoch(split, **later, past=EpochHistory(case["epoch"], tuple(phases)))
    assert trace(other, 0) == trace(same, 0)


def test_orders_differ_between_epochs_and_seeds():
    split = make_split([(b, 50, True) for b in (0, 0, 1, 1, 1)])
    runs = {
        (seed, epoch): trace(
            plan_epoch(split, seed=seed, epoch=epoch, world=2, batch=2, workers=2, window=16), 0
        )
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len({str(run) for run in runs.values()}) == 6
    assert len({str([b for b, _ in run.values()]) for run in runs.values()}) == 6


def test_reading_is_sequential_in_large_blocks():
    """A worker's segments continue one another or start a shard, apart from its first."""
    split = make_split([(0, 64, True)] * 40)
    plan = plan_epoch(split, seed=3, epoch=0, world=4, batch=2, workers=2, window=100)
    for rank in range(4):
        for worker in range(2):
            windows = list(worker_windows(plan, 0, rank, worker))
            segments = [s for window in windows for s in window.segments]
            for before, after in itertools.pairwise(segments):
                joined = (after.shard, after.start) == (before.shard, before.stop)
                assert joined or (before.stop == 64 and after.start == 0)
            assert len({s.shard for s in segments}) <= 40 / 8 + 2


def test_draws_are_shuffled_evenly():
    """Over many epochs, a sample comes at every time of an epoch equally often."""
    split = make_split([(0, 16, True)] * 8)
    times = np.array(
        [
            step
            for epoch in range(200)
            for step, (_, picks) in trace(
                plan_epoch(
                    split, seed=0, epoch=epoch, world=1, batch=4, workers=0, window=32
                ), 0
            ).items()
            if (0, 0) in picks
        ]
    )  # fmt: skip
    counts = np.bincount(times // 8, minlength=4)
    assert counts.sum() == 200
    assert counts.min() > 25  # expected 50 each, 4 standard deviations below


def test_arguments_out_of_range():
    split = make_split([(0, 3, True)])
    with pytest.raises(UserError, match="batch must be at least 1"):
        plan_epoch(split, seed=0, epoch=0, world=1, batch=0, workers=0)
    with pytest.raises(UserError, match="batch must be at least 1"):
        plan_evaluation(split, batch=0)


@settings(max_examples=60, deadline=None)
@given(
    plans.map(lambda case: case["shards"]),
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(0, 5),
)
def test_evaluation_sees_every_sample_once(shards, world, batch, workers):
    split = make_split(shards)
    seen = Counter()
    for rank in range(world):
        for worker in range(max(workers, 1)):
            for bucket, segments in plan_evaluation(
                split, batch=batch, world=world, rank=rank, workers=workers, worker=worker
            ):
                assert 1 <= sum(s.stop - s.start for s in segments) <= batch
                for segment in segments:
                    assert split.shards[segment.shard].bucket == bucket
                    seen.update((segment.shard, i) for i in range(segment.start, segment.stop))
    assert seen == Counter((i, k) for i, (_, n, _) in enumerate(shards) for k in range(n))


def test_hash_is_splitmix64():
    """The generator's published first outputs for seed 1234567 (Vigna's splitmix64.c)."""
    golden = 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [hash64(1234567 + i * golden) for i in range(3)] == expected


def test_noise_seed():
    seeds = [noise_seed(s, e, i) for s in range(4) for e in range(20) for i in range(200)]
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert len(set(seeds)) > 0.999 * len(seeds)
    bits = (np.array(seeds)[:, None] >> np.arange(31)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02
    assert noise_seed(-1, 0, -5) == noise_seed(-1, 0, -5)


@settings(max_examples=25, deadline=None)
@given(plans)
def test_every_epoch_has_an_order_of_its_own(case):
    """And the same samples, whatever the numbers of ranks, workers, shards and buckets."""
    # With 12 shards more in a bucket, no two orders are alike by chance.
    split, epoch = make_split([*case.pop("shards"), *[(0, 5, True)] * 12], 5), case.pop("epoch")
    orders, samples = [], []
    for e in range(epoch, epoch + 3):
        plan = plan_epoch(split, epoch=e, **case)
        everyone = [trace(plan, rank) for rank in range(case["world"])]
        orders.append(str(everyone))
        samples.append({p for steps in everyone for _, picks in steps.values() for p in picks})
    assert len(set(orders)) == 3
    assert samples[0] == samples[1] == samples[2]


def test_blocks_have_their_share_of_every_bucket():
    """And where a bucket has fewer steps than there are blocks, any block may get them."""
    split = make_split([(0, 1000, True), (1, 300, True), (2, 3, True)])
    common: dict[str, Any] = {"seed": 7, "world": 1, "batch": 1, "workers": 2}
    rare = set()
    for epoch in range(40):
        plan = plan_epoch(split, epoch=epoch, block=100, **common)
        assert plan.blocks == 14
        for block in range(plan.blocks):
            counts = np.bincount(plan.buckets(block), minlength=3)
            assert (np.abs(counts - np.array([1000, 300, 3]) / 14) < 1).all()
        rare |= {plan.block_of(step) for step, b in enumerate(buckets_of(plan)) if b == 2}
    assert rare == set(range(14))


LARGE = """
import resource, sys, time
from casc.data.index import Bucket, Shard, Split
from casc.data.plan import plan_epoch, worker_steps, worker_windows

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

world, shards = int(sys.argv[1]), int(sys.argv[2])
split = Split(
    samples=250 * shards,
    train_samples=250 * shards,
    buckets=tuple(Bucket(f"b{i}", 0, None, 8, 8, 1, 1, 0) for i in range(6)),
    shards=tuple(Shard(f"{i:06d}.tar", i % 6, True, 250, 1, "") for i in range(shards)),
)
memory, began = peak(), time.process_time()
plan = plan_epoch(split, seed=0, epoch=3, world=world, batch=2, workers=8)
middle = plan.steps // 2
step, bucket = next(worker_steps(plan, 7, middle))
next(worker_windows(plan, bucket, world - 1, 7, middle))
seconds = time.process_time() - began
print(plan.steps, seconds, (peak() - memory) / 1024)
"""


@pytest.mark.parametrize("world", [1, 64])
def test_a_plan_of_100_million_samples_is_small(world):
    """400,000 shards, in a process of its own: MiB beyond the index, also for one rank.

    It takes 17; one rank's 50 million steps would take 48 even at a byte each.
    """
    command = [sys.executable, "-c", LARGE, str(world), "400000"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    steps, _, memory = map(float, told.split())
    assert steps >= 100_000_000 / (2 * world)
    assert memory < 40
