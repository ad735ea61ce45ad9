"""A bucket's samples of an epoch, end to end."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from casc.data.index import Split


class Segment(NamedTuple):
    """A run of consecutive samples of one shard: the unit of reading."""

    shard: int
    """Position in `Split.shards`."""
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class SampleOrder:
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


def order_of(shards: np.ndarray, samples: np.ndarray) -> SampleOrder:
    """The line of some shards; `samples` counts every shard of the split."""
    shards = shards[samples[shards] > 0]
    ends = np.cumsum(samples[shards])
    return SampleOrder(
        shards, ends - samples[shards], int(ends[-1]) if len(ends) else 0, np.zeros_like(shards)
    )


def columns(split: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every shard: its bucket, its number of samples, whether it is for training."""
    n = len(split.shards)
    return (
        np.fromiter((s.bucket for s in split.shards), np.int64, n),
        np.fromiter((s.samples for s in split.shards), np.int64, n),
        np.fromiter((s.train for s in split.shards), np.bool_, n),
    )


def without(line: SampleOrder, seen: list[tuple[int, int]]) -> SampleOrder:
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
        return SampleOrder(nothing, nothing, 0, nothing)
    # Between two neighbouring cuts a stretch is of one shard, and it is seen or not.
    cuts = np.unique(np.concatenate([line.begins, starts, stops]))
    left, right = cuts[:-1], cuts[1:]
    gap = np.searchsorted(starts, left, side="right") - 1
    keep = (gap >= 0) & (left < stops[gap])
    left, right = left[keep], right[keep]
    shard = np.searchsorted(line.begins, left, side="right") - 1
    length = right - left
    return SampleOrder(
        line.shards[shard],
        np.cumsum(length) - length,
        int(length.sum()),
        line.offsets[shard] + left - line.begins[shard],
    )
