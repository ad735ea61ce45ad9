"""Which samples every rank and worker reads at every step, as a pure function.

An epoch of a bucket is one line of sample positions: its shards in a shuffled order, end
to end. Each (rank, worker) owns one contiguous stretch of the line, so it reads a few
shards from front to back and nobody else reads the same part. Along its stretch a worker
takes windows of some hundred samples into memory and draws them in a shuffled order.
Nothing is negotiated: every process computes the same plan from the same arguments.

All shuffles are ranks of an integer hash, not of a library's generator, so the plan is
the same with every version of numpy, and any part of it can be had without the rest.

Legend: b bucket, r rank, w worker, t step of the epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from casc.data.index import Split
from casc.errors import UserError

# What a hash is for; distinct purposes must not share their numbers.
_SHARDS, _STEPS, _WINDOW, _NOISE = 1, 2, 3, 4


class Segment(NamedTuple):
    """A run of consecutive samples of one shard: the unit of reading."""

    shard: int
    """Position in `Split.shards`."""
    start: int
    stop: int


class Window(NamedTuple):
    """What a worker holds in memory at once, and the order in which it draws from it."""

    segments: list[Segment]
    order: np.ndarray
    """[n] int64, positions in the segments' samples laid end to end; less than all of
    them when a run resumes in the middle of the window."""


@dataclass(frozen=True, eq=False)
class Line:
    """A bucket's samples of one epoch: shards end to end in the epoch's order."""

    shards: np.ndarray
    """[n] positions in `Split.shards`."""
    begins: np.ndarray
    """[n] position on the line at which each shard starts."""
    length: int

    def segments(self, start: int, stop: int) -> list[Segment]:
        """The parts of shards under [start, stop); the line repeats past its end."""
        found = []
        while start < stop:
            lap, at = divmod(start, self.length)
            i = int(np.searchsorted(self.begins, at, side="right")) - 1
            begin = int(self.begins[i])
            end = int(self.begins[i + 1]) if i + 1 < len(self.begins) else self.length
            upto = min(stop, lap * self.length + end)
            found.append(Segment(int(self.shards[i]), at - begin, upto - lap * self.length - begin))
            start = upto
        return found


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch of training for all ranks and workers."""

    seed: int
    epoch: int
    world: int
    batch: int
    workers: int
    window: int
    buckets: np.ndarray
    """[steps] bucket of each step, the same on every rank."""
    lines: tuple[Line, ...]
    """One per bucket of the split."""

    @property
    def steps(self) -> int:
        """Steps of the epoch, the same on every rank."""
        return len(self.buckets)

    @property
    def wrapped(self) -> list[int]:
        """Per bucket, how many samples are seen a second time to fill its last batches."""
        steps = np.bincount(self.buckets, minlength=len(self.lines))
        return [
            int(n) * self.world * self.batch - line.length
            for n, line in zip(steps, self.lines, strict=True)
        ]


def plan_epoch(
    split: Split,
    *,
    seed: int,
    epoch: int,
    world: int,
    batch: int,
    workers: int,
    window: int = 128,
) -> EpochPlan:
    """Plan one epoch: every training sample once, each bucket's tail filled by wrapping.

    Args:
        split: the split of a shard index; only its training shards are used.
        seed: the run's seed.
        epoch: counted from 0; each epoch has another order.
        world: number of ranks.
        batch: images per rank and step.
        workers: reading processes per rank; 0 means that the rank reads by itself.
        window: samples that a worker holds, per bucket, to draw from.

    Raises:
        UserError: the split has no training samples, or a number is out of range.
    """
    for name, value, least in (
        ("world", world, 1), ("batch", batch, 1), ("workers", workers, 0), ("window", window, 1)
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
    bucket_of, samples, train = _columns(split)
    lines = []
    for bucket in range(len(split.buckets)):
        mine = np.flatnonzero((bucket_of == bucket) & train)
        mine = mine[_shuffled(len(mine), hash64(seed, epoch, _SHARDS, bucket))]
        lines.append(_line(mine, samples))
    steps = [-(-line.length // (world * batch)) for line in lines]
    if not sum(steps):
        raise UserError("the split has no training samples")
    kind = np.min_scalar_type(len(lines) - 1)
    buckets = np.repeat(np.arange(len(lines), dtype=kind), steps)
    buckets = buckets[_shuffled(len(buckets), hash64(seed, epoch, _STEPS))]
    return EpochPlan(seed, epoch, world, batch, max(workers, 1), window, buckets, tuple(lines))


def steps_per_epoch(split: Split, *, world: int, batch: int) -> int:
    """How many steps `plan_epoch` will have: each bucket's batches, the last one filled up."""
    bucket_of, samples, train = _columns(split)
    counts = np.bincount(bucket_of, samples * train, minlength=len(split.buckets))
    return int(np.ceil(counts / (world * batch)).sum())


def worker_steps(plan: EpochPlan, worker: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """The worker's (step, bucket) from step `start` on: every `workers`-th step."""
    for step in range(start + (worker - start) % plan.workers, plan.steps, plan.workers):
        yield step, int(plan.buckets[step])


def worker_windows(
    plan: EpochPlan, bucket: int, rank: int, worker: int, start: int = 0
) -> Iterator[Window]:
    """What a worker reads of a bucket, from step `start` of the epoch on.

    Drawing `plan.batch` samples from these windows, in order, at each of the worker's
    steps of the bucket gives the plan; `start` drops what earlier steps have drawn.
    """
    mine = np.flatnonzero(plan.buckets == bucket)
    lane = mine % plan.workers
    before = int(np.count_nonzero(lane < worker))
    steps = mine[lane == worker]
    done = int(np.searchsorted(steps, start)) * plan.batch
    begin = (rank * len(mine) + before) * plan.batch
    end = begin + len(steps) * plan.batch
    while begin + done < end:
        first = begin + done - done % plan.window
        last = min(first + plan.window, end)
        key = hash64(plan.seed, plan.epoch, _WINDOW, bucket, first)
        order = _shuffled(last - first, key)[done % plan.window :]
        yield Window(plan.lines[bucket].segments(first, last), order)
        done = last - begin


class EvaluationStep(NamedTuple):
    """One batch of an evaluation; shorter than the batch size at the end of a bucket."""

    bucket: int
    segments: list[Segment]


def plan_evaluation(
    split: Split, *, batch: int, world: int = 1, rank: int = 0, workers: int = 0, worker: int = 0
) -> list[EvaluationStep]:
    """Batches that a worker reads so that every sample of the split is seen exactly once.

    Samples that training leaves out are evaluated too. Ranks take consecutive parts, so
    that each meets few canvases; they need not have the same number of batches.
    """
    if batch < 1:
        raise UserError(f"batch must be at least 1, not {batch}")
    bucket_of, samples, _ = _columns(split)
    steps = []
    for bucket in range(len(split.buckets)):
        line = _line(np.flatnonzero(bucket_of == bucket), samples)
        steps += [
            EvaluationStep(bucket, line.segments(at, min(at + batch, line.length)))
            for at in range(0, line.length, batch)
        ]
    for index, parts in ((rank, world), (worker, max(workers, 1))):
        steps = steps[len(steps) * index // parts : len(steps) * (index + 1) // parts]
    return steps


def noise_seed(seed: int, epoch: int, image_id: int) -> int:
    """The seed in [0, 2**31) of all of an image's noise in an epoch.

    It depends on nothing else, so neither the rank nor the world size, neither the step
    nor a resume changes what an image sees.
    """
    return hash64(seed, epoch, _NOISE, image_id) >> 33


def hash64(*values: int) -> int:
    """A 64-bit hash of integers: each is added to the state, which splitmix64 then mixes."""
    state = np.zeros(1, dtype=np.uint64)
    for value in values:
        state = _mix(state + np.uint64(value & 0xFFFFFFFFFFFFFFFF))
    return int(state[0])


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(count: int, key: int) -> np.ndarray:
    """A permutation of range(count): the order of a bijective hash, so without ties."""
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) + np.uint64(key)))


def _line(shards: np.ndarray, samples: np.ndarray) -> Line:
    """The line of some shards; `samples` counts every shard of the split."""
    shards = shards[samples[shards] > 0]
    ends = np.cumsum(samples[shards])
    return Line(shards, ends - samples[shards], int(ends[-1]) if len(ends) else 0)


def _columns(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every shard: its bucket, its number of samples, whether it is for training."""
    n = len(split.shards)
    return (
        np.fromiter((s.bucket for s in split.shards), np.int64, n),
        np.fromiter((s.samples for s in split.shards), np.int64, n),
        np.fromiter((s.train for s in split.shards), np.bool_, n),
    )
