"""A bucket's samples of an epoch, end to end."""

from collections.abc import Iterator
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
    """[n] position in the order at which each shard starts."""
    length: int
    offsets: np.ndarray
    """[n] the sample of the shard with which it starts there."""

    def segments(self, start: int, stop: int) -> list[Segment]:
        """The parts of shards under [start, stop); the order repeats past its end."""
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

    def without(self, seen: list[tuple[int, int]]) -> "SampleOrder":
        """What is left when some [start, stop) are taken out; they may repeat, as `segments`."""
        starts, stops = self._gaps(seen)
        # Between two neighbouring cuts all samples are of one shard, and all left or none.
        cuts = np.unique(np.concatenate([self.begins, starts, stops]))
        begin, end = cuts[:-1], cuts[1:]
        gap = np.searchsorted(starts, begin, side="right") - 1
        left = (gap >= 0) & (begin < np.append(stops, 0)[gap])
        begin, length = begin[left], (end - begin)[left]
        shard = np.searchsorted(self.begins, begin, side="right") - 1
        return SampleOrder(
            self.shards[shard],
            np.cumsum(length) - length,
            int(length.sum()),
            self.offsets[shard] + begin - self.begins[shard],
        )

    def _gaps(self, seen: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Starts and stops, ascending, of the parts of [0, length) that aren't in `seen`."""
        once = [part for start, stop in seen for part in self._unrolled(start, stop)]
        spans = np.array(sorted(once) or [(0, 0)], dtype=np.int64)
        starts = np.append(0, np.maximum.accumulate(spans[:, 1]))
        stops = np.append(spans[:, 0], self.length)
        return starts[starts < stops], stops[starts < stops]

    def _unrolled(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of [0, length) under [start, stop), which may reach past the end."""
        while start < stop:
            at = start % self.length
            upto = min(self.length, at + stop - start)
            yield at, upto
            start += upto - at


def order_of(shards: np.ndarray, samples: np.ndarray) -> SampleOrder:
    """The order of some shards, end to end; `samples` counts every shard of the split."""
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
