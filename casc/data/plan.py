"""Which samples every rank and worker reads at every step, as a pure function.

An epoch of a bucket is one order of its samples: its shards, shuffled, end to end. Each
(rank, worker) owns one contiguous stretch of it, so it reads a few shards from front to
back and nobody else reads the same part. Along its stretch a worker
takes windows of some hundred samples into memory and draws them in a shuffled order.
Nothing is negotiated: every process computes the same plan from the same arguments.

Long epochs are cut into blocks of some ten thousand steps, each with its share of every
bucket. A worker's stretch is then one per block, and what a step holds follows from its
block alone: a plan takes the memory of its shards and one block, however many steps it has.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from casc.data.hashing import hash64, shuffled
from casc.data.index import Split
from casc.data.sample_order import SampleOrder, Segment, columns, order_of
from casc.errors import UserError

# What a hash is for; distinct purposes must not share their numbers.
_SHARDS, _STEPS, _WINDOW, _NOISE, _SHARE = 1, 2, 3, 4, 5
# Another number is another order, so a run could not go on in the middle of a long epoch.
BLOCK = 65_536


class Window(NamedTuple):
    """What a worker holds in memory at once, and the order in which it draws from it."""

    segments: list[Segment]
    order: np.ndarray
    """[n] int64, positions in the segments' samples laid end to end; less than all of
    them when a run resumes in the middle of the window."""


class Phase(NamedTuple):
    """A part of an epoch that was trained with these processes and workers."""

    stop: int
    """Step of the epoch at which it ended."""
    world: int
    batch: int
    workers: int
    window: int


class EpochHistory(NamedTuple):
    """How an epoch was begun, where a run went on within it with others than before."""

    epoch: int
    phases: tuple[Phase, ...]
    """One after the other, without the present one."""


NO_HISTORY = EpochHistory(0, ())


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch of training for all ranks and workers."""

    seed: int
    epoch: int
    world: int
    batch: int
    workers: int
    window: int
    counts: tuple[int, ...]
    """Steps of each bucket, from `first` on."""
    orders: tuple[SampleOrder, ...]
    """One per bucket of the split."""
    first: int = 0
    """The step at which this plan takes over from another one of the same epoch."""
    resume_count: int = 0
    """How many plans of this epoch were before it."""
    blocks: int = 1
    """How many parts the steps are cut into."""
    remainders: tuple[int, ...] = ()
    """In [0, blocks), per bucket: decide which blocks get what its steps leave over when
    they are divided by the blocks."""

    @property
    def steps(self) -> int:
        """Steps of the epoch, the same on every rank."""
        return self.first + sum(self.counts)

    @property
    def wrapped(self) -> list[int]:
        """Per bucket, how many samples are seen a second time to fill its last batches."""
        return [
            steps * self.world * self.batch - order.length
            for steps, order in zip(self.counts, self.orders, strict=True)
        ]

    def before(self, block: int) -> list[int]:
        """Steps of each bucket in the blocks before one."""
        return [
            (steps * block + remainder) // self.blocks
            for steps, remainder in zip(self.counts, self.remainders, strict=True)
        ]

    def start(self, block: int) -> int:
        """The step at which a block starts."""
        return self.first + sum(self.before(block))

    def block_of(self, step: int) -> int:
        """The block of a step; at the epoch's end the last one."""
        return max(bisect_right(range(self.blocks), step, key=self.start) - 1, 0)

    def buckets(self, block: int) -> np.ndarray:
        """[steps of the block] bucket of each of its steps, the same on every rank."""
        counts = np.subtract(self.before(block + 1), self.before(block))
        labels = np.repeat(np.arange(len(counts), dtype=np.min_scalar_type(len(counts))), counts)
        more = (
            (self.resume_count, block)
            if block
            else (self.resume_count,)
            if self.resume_count
            else ()
        )
        return labels[shuffled(len(labels), hash64(self.seed, self.epoch, _STEPS, *more))]


def plan_epoch(
    split: Split,
    *,
    seed: int,
    epoch: int,
    world: int,
    batch: int,
    workers: int,
    window: int = 128,
    past: EpochHistory = NO_HISTORY,
    block: int = BLOCK,
) -> EpochPlan:
    """Plan one epoch: every training sample once, each bucket's tail filled by wrapping.

    What of the epoch was trained with another number of processes, say, is left out: the plan
    is of the samples that are left. As long as world x batch stays what it was, the epoch
    keeps its number of steps.

    Args:
        split: the split of a shard index; only its training shards are used.
        seed: the run's seed.
        epoch: counted from 0; each epoch has another order.
        world: number of ranks.
        batch: images per rank and step.
        workers: reading processes per rank; 0 means that the rank reads by itself.
        window: samples that a worker holds, per bucket, to draw from.
        past: how the epoch was begun; of other epochs it says nothing.
        block: about how many steps are put into an order together.

    Raises:
        UserError: the split has no training samples, or a number is out of range.
    """
    for name, value, least in (
        ("world", world, 1), ("batch", batch, 1), ("workers", workers, 0), ("window", window, 1),
        ("block", block, 1),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
    bucket_of, samples, train = columns(split)
    orders = []
    for bucket in range(len(split.buckets)):
        mine = np.flatnonzero((bucket_of == bucket) & train)
        mine = mine[shuffled(len(mine), hash64(seed, epoch, _SHARDS, bucket))]
        orders.append(order_of(mine, samples))
    if not any(order.length for order in orders):
        raise UserError("the split has no training samples")
    first = resume_count = 0
    for phase in past.phases if past.epoch == epoch else ():
        before = (phase.world, phase.batch, phase.workers, phase.window)
        orders = _remaining(
            _plan(orders, seed, epoch, *before, first, resume_count, block), phase.stop
        )
        first, resume_count = phase.stop, resume_count + 1
    return _plan(orders, seed, epoch, world, batch, workers, window, first, resume_count, block)


def _plan(
    orders: list[SampleOrder], seed: int, epoch: int, world: int, batch: int, workers: int,
    window: int, first: int, resume_count: int, block: int,
) -> EpochPlan:  # fmt: skip
    counts = tuple(-(-order.length // (world * batch)) for order in orders)
    blocks = max(1, -(-sum(counts) // block))
    remainders = tuple(
        hash64(seed, epoch, _SHARE, resume_count, b) % blocks for b in range(len(orders))
    )
    return EpochPlan(
        seed, epoch, world, batch, max(workers, 1), window, counts, tuple(orders), first,
        resume_count, blocks, remainders,
    )  # fmt: skip


def steps_per_epoch(split: Split, *, world: int, batch: int) -> int:
    """How many steps `plan_epoch` will have: each bucket's batches, the last one filled up."""
    bucket_of, samples, train = columns(split)
    counts = np.bincount(bucket_of, samples * train, minlength=len(split.buckets))
    return int(np.ceil(counts / (world * batch)).sum())


def worker_steps(plan: EpochPlan, worker: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """The worker's (step, bucket) from step `start` on: every `workers`-th step."""
    start = max(start, plan.first)
    for block in range(plan.block_of(start), plan.blocks):
        begin, buckets = plan.start(block), plan.buckets(block)
        at = max(start, begin)
        at += (worker - at) % plan.workers
        for step in range(at, begin + len(buckets), plan.workers):
            yield step, int(buckets[step - begin])


def worker_windows(
    plan: EpochPlan, bucket: int, rank: int, worker: int, start: int = 0
) -> Iterator[Window]:
    """What a worker reads of a bucket, from step `start` of the epoch on.

    Drawing `plan.batch` samples from these windows, in order, at each of the worker's
    steps of the bucket gives the plan; `start` drops what earlier steps have drawn.
    """
    for block in range(plan.block_of(start), plan.blocks):
        offset, count, done = _stretch(plan, block, bucket, worker, start)
        begin = rank * plan.counts[bucket] * plan.batch + offset
        end = begin + count
        while begin + done < end:
            first = begin + done - done % plan.window
            last = min(first + plan.window, end)
            order = _window_order(plan, bucket, first, last)[done % plan.window :]
            yield Window(plan.orders[bucket].segments(first, last), order)
            done = last - begin


def noise_seed(seed: int, epoch: int, image_id: int) -> int:
    """The seed in [0, 2**31) of all of an image's noise in an epoch.

    It depends on nothing else, so neither the rank nor the world size, neither the step
    nor a resume changes what an image sees.
    """
    return hash64(seed, epoch, _NOISE, image_id) >> 33


def _stretch(
    plan: EpochPlan, block: int, bucket: int, worker: int, start: int
) -> tuple[int, int, int]:
    """A worker's stretch of a bucket's order in a block, in samples.

    Returns:
        Where it begins within its rank's part of the order, how long it is, and how much of it
        is drawn before step `start`.
    """
    mine = plan.start(block) + np.flatnonzero(plan.buckets(block) == bucket)
    lane = mine % plan.workers
    steps = mine[lane == worker]
    before = plan.before(block)[bucket] + np.count_nonzero(lane < worker)
    done = np.searchsorted(steps, start)
    offset, count, drawn = (int(n) * plan.batch for n in (before, len(steps), done))
    return offset, count, drawn


def _window_order(plan: EpochPlan, bucket: int, first: int, last: int) -> np.ndarray:
    resume_count = [plan.resume_count] if plan.resume_count else []
    return shuffled(
        last - first, hash64(plan.seed, plan.epoch, _WINDOW, bucket, first, *resume_count)
    )


def _remaining(plan: EpochPlan, stop: int) -> list[SampleOrder]:
    """What the plan's steps before `stop` leave of each bucket."""
    return [order.without(_seen(plan, bucket, stop)) for bucket, order in enumerate(plan.orders)]


def _seen(plan: EpochPlan, bucket: int, stop: int) -> list[tuple[int, int]]:
    """The [start, stop) of a bucket's order that the plan's steps before `stop` have drawn."""
    block = plan.block_of(stop)
    per_rank = plan.counts[bucket] * plan.batch
    whole_blocks = plan.before(block)[bucket] * plan.batch
    seen = []
    for rank in range(plan.world):
        begin = rank * per_rank
        seen.append((begin, begin + whole_blocks))
        for worker in range(plan.workers):
            offset, count, done = _stretch(plan, block, bucket, worker, stop)
            seen += _drawn(plan, bucket, begin + offset, count, done)
    return seen


def _drawn(
    plan: EpochPlan, bucket: int, begin: int, count: int, done: int
) -> list[tuple[int, int]]:
    """The first `done` samples that a worker draws of its stretch [begin, begin + count)."""
    part = done % plan.window
    first = begin + done - part
    whole_windows = [(begin, first)]
    if not part:
        return whole_windows
    order = _window_order(plan, bucket, first, min(first + plan.window, begin + count))
    return whole_windows + [(first + at, first + at + 1) for at in order[:part].tolist()]
