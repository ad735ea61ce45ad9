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


class Phase(NamedTuple):
    """A part of an epoch that was trained with these processes and workers."""

    stop: int
    """Step of the epoch at which it ended."""
    world: int
    batch: int
    workers: int
    window: int


class Past(NamedTuple):
    """How an epoch was begun, where a run went on within it with others than before."""

    epoch: int
    phases: tuple[Phase, ...]
    """One after the other, without the present one."""


NOTHING_PAST = Past(0, ())


@dataclass(frozen=True, eq=False)
class Line:
    """A bucket's samples of one epoch: shards, or parts of them, end to end."""

    shards: np.ndarray
    """[n] positions in `Split.shards`."""
    begins: np.ndarray
    """[n] position on the line at which each shard starts."""
    length: int
    offsets: np.ndarray
    """[n] the sample of the shard with which it starts there."""

    def segments(self, start: int, stop: int) -> list[Segment]:
        """The parts of shards under [start, stop); the line repeats past its end."""
        found = []
        while start < stop:
            lap, at = divmod(start, self.length)
            i = int(np.searchsorted(self.begins, at, side="right")) - 1
            begin = int(self.begins[i])
            end = int(self.begins[i + 1]) if i + 1 < len(self.begins) else self.length
            upto = min(stop, lap * self.length + end)
            shift = int(self.offsets[i]) - begin
            found.append(Segment(int(self.shards[i]), at + shift, upto - lap * self.length + shift))
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
    """[steps] bucket of each step, the same on every rank; before `first`, none of them."""
    lines: tuple[Line, ...]
    """One per bucket of the split."""
    first: int = 0
    """The step at which this plan takes over from another one of the same epoch."""
    turn: int = 0
    """How many plans of this epoch were before it."""

    @property
    def steps(self) -> int:
        """Steps of the epoch, the same on every rank."""
        return len(self.buckets)

    @property
    def wrapped(self) -> list[int]:
        """Per bucket, how many samples are seen a second time to fill its last batches."""
        steps = np.bincount(self.buckets[self.first :], minlength=len(self.lines))
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
    past: Past = NOTHING_PAST,
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
    if not any(line.length for line in lines):
        raise UserError("the split has no training samples")
    first = turn = 0
    for phase in past.phases if past.epoch == epoch else ():
        before = (phase.world, phase.batch, phase.workers, phase.window)
        lines = _remaining(_plan(lines, seed, epoch, *before, first, turn), phase.stop)
        first, turn = phase.stop, turn + 1
    return _plan(lines, seed, epoch, world, batch, workers, window, first, turn)


def _plan(
    lines: list[Line], seed: int, epoch: int, world: int, batch: int, workers: int, window: int,
    first: int, turn: int,
) -> EpochPlan:  # fmt: skip
    steps = [-(-line.length // (world * batch)) for line in lines]
    kind = np.min_scalar_type(len(lines))
    buckets = np.repeat(np.arange(len(lines), dtype=kind), steps)
    key = hash64(seed, epoch, _STEPS, *([turn] if turn else []))
    _shuffle(buckets, key)
    buckets = np.concatenate([np.full(first, len(lines), dtype=kind), buckets])
    return EpochPlan(
        seed, epoch, world, batch, max(workers, 1), window, buckets, tuple(lines), first, turn
    )


def steps_per_epoch(split: Split, *, world: int, batch: int) -> int:
    """How many steps `plan_epoch` will have: each bucket's batches, the last one filled up."""
    bucket_of, samples, train = _columns(split)
    counts = np.bincount(bucket_of, samples * train, minlength=len(split.buckets))
    return int(np.ceil(counts / (world * batch)).sum())


def worker_steps(plan: EpochPlan, worker: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """The worker's (step, bucket) from step `start` on: every `workers`-th step."""
    start = max(start, plan.first)
    for step in range(start + (worker - start) % plan.workers, plan.steps, plan.workers):
        yield step, int(plan.buckets[step])


def worker_windows(
    plan: EpochPlan, bucket: int, rank: int, worker: int, start: int = 0
) -> Iterator[Window]:
    """What a worker reads of a bucket, from step `start` of the epoch on.

    Drawing `plan.batch` samples from these windows, in order, at each of the worker's
    steps of the bucket gives the plan; `start` drops what earlier steps have drawn.
    """
    offset, count, done, stride = _stretch(plan, bucket, worker, start)
    begin = rank * stride + offset
    end = begin + count
    while begin + done < end:
        first = begin + done - done % plan.window
        last = min(first + plan.window, end)
        order = _window_order(plan, bucket, first, last)[done % plan.window :]
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


def _stretch(plan: EpochPlan, bucket: int, worker: int, start: int) -> tuple[int, int, int, int]:
    """A worker's stretch of a bucket's line, in samples.

    Returns:
        Where it begins within its rank's, how long it is, how much of it is drawn before step
        `start`, and the length of a rank's.
    """
    mine = np.flatnonzero(plan.buckets == bucket)
    lane = mine % plan.workers
    steps = mine[lane == worker]
    before, done = np.count_nonzero(lane < worker), np.searchsorted(steps, start)
    offset, count, drawn, stride = (
        int(n) * plan.batch for n in (before, len(steps), done, len(mine))
    )
    return offset, count, drawn, stride


def _window_order(plan: EpochPlan, bucket: int, first: int, last: int) -> np.ndarray:
    turn = [plan.turn] if plan.turn else []
    return _shuffled(last - first, hash64(plan.seed, plan.epoch, _WINDOW, bucket, first, *turn))


def _remaining(plan: EpochPlan, stop: int) -> list[Line]:
    """What the plan's steps before `stop` leave of its lines."""
    lines = []
    for bucket, line in enumerate(plan.lines):
        seen = [(0, 0)]
        for worker in range(plan.workers):
            offset, count, done, stride = _stretch(plan, bucket, worker, stop)
            for begin in range(offset, offset + plan.world * stride, max(stride, 1)):
                part = done % plan.window
                first = begin + done - part
                seen.append((begin, first))
                if part:
                    last = min(first + plan.window, begin + count)
                    order = _window_order(plan, bucket, first, last)[:part]
                    seen += [(first + at, first + at + 1) for at in order.tolist()]
        lines.append(_without(line, seen))
    return lines


def _without(line: Line, seen: list[tuple[int, int]]) -> Line:
    """A line without the given parts of it, which may reach past its end and so repeat it."""
    folded = []
    for start, stop in seen:
        while stop > line.length and start < stop:
            at = start % line.length
            upto = min(stop, start - at + line.length)
            folded.append((at, at + upto - start))
            start = upto
        if start < stop:
            folded.append((start, stop))
    spans = np.array(sorted(folded) or [(0, 0)], dtype=np.int64)
    ends = np.maximum.accumulate(spans[:, 1])
    gaps = np.append(0, ends), np.append(spans[:, 0], line.length)
    keep = gaps[0] < gaps[1]
    starts, stops = gaps[0][keep], gaps[1][keep]
    if not len(starts):
        nothing = np.zeros(0, np.int64)
        return Line(nothing, nothing, 0, nothing)
    # Between two neighbouring cuts a stretch is of one shard, and it is seen or not.
    cuts = np.unique(np.concatenate([line.begins, starts, stops]))
    left, right = cuts[:-1], cuts[1:]
    gap = np.searchsorted(starts, left, side="right") - 1
    keep = (gap >= 0) & (left < stops[gap])
    left, right = left[keep], right[keep]
    shard = np.searchsorted(line.begins, left, side="right") - 1
    length = right - left
    return Line(
        line.shards[shard],
        np.cumsum(length) - length,
        int(length.sum()),
        line.offsets[shard] + left - line.begins[shard],
    )


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shuffled(count: int, key: int) -> np.ndarray:
    """A permutation of range(count): the order of a bijective hash, so without ties."""
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) + np.uint64(key)))


def _shuffle(labels: np.ndarray, key: int) -> None:
    """Shuffle small numbers in place: sorted with hashes above them, in one array.

    The order is `_shuffled`'s. For an epoch of 50 million steps its two arrays of 400 MB and
    the sort of one by the other took 10 s; this takes one such array and 2 s.
    """
    bits = np.uint64(8 * labels.itemsize)
    packed = np.empty(len(labels), dtype=np.uint64)
    parts = [slice(at, at + 2**20) for at in range(0, len(labels), 2**20)]
    for part in parts:
        there = range(part.start, min(part.stop, len(labels)))
        hashes = _mix(np.arange(there.start, there.stop, dtype=np.uint64) + np.uint64(key))
        packed[part] = (hashes >> bits << bits) | labels[part]
    packed.sort()
    for part in parts:
        labels[part] = packed[part].astype(labels.dtype)


def _line(shards: np.ndarray, samples: np.ndarray) -> Line:
    """The line of some shards; `samples` counts every shard of the split."""
    shards = shards[samples[shards] > 0]
    ends = np.cumsum(samples[shards])
    return Line(
        shards, ends - samples[shards], int(ends[-1]) if len(ends) else 0, np.zeros_like(shards)
    )


def _columns(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every shard: its bucket, its number of samples, whether it is for training."""
    n = len(split.shards)
    return (
        np.fromiter((s.bucket for s in split.shards), np.int64, n),
        np.fromiter((s.samples for s in split.shards), np.int64, n),
        np.fromiter((s.train for s in split.shards), np.bool_, n),
    )
