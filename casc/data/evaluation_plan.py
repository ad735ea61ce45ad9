"""Which samples every rank and worker reads when a split is evaluated."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from casc.data.index import Split
from casc.data.sample_order import Segment, columns, order_of
from casc.errors import UserError


class EvaluationStep(NamedTuple):
    """One batch of an evaluation; shorter than the batch size at the end of a bucket."""

    bucket: int
    segments: list[Segment]


def plan_evaluation(
    split: Split, *, batch: int, world: int = 1, rank: int = 0, workers: int = 0, worker: int = 0
) -> Iterator[EvaluationStep]:
    """Batches that a worker reads so that every sample of the split is seen exactly once.

    Samples that training leaves out are evaluated too. Ranks take consecutive parts, so
    that each meets few canvases; they need not have the same number of batches. Each is planned
    as it is asked for: an index may claim any number of samples.
    """
    if batch < 1:
        raise UserError(f"batch must be at least 1, not {batch}")
    bucket_of, samples, _ = columns(split)
    orders = [
        order_of(np.flatnonzero(bucket_of == bucket), samples)
        for bucket in range(len(split.buckets))
    ]
    ends = list(accumulate(-(-order.length // batch) for order in orders))
    mine = range(ends[-1] if ends else 0)
    for index, parts in ((rank, world), (worker, max(workers, 1))):
        mine = mine[len(mine) * index // parts : len(mine) * (index + 1) // parts]

    def step(number: int) -> EvaluationStep:
        bucket = bisect_right(ends, number)
        order = orders[bucket]
        at = (number - (ends[bucket - 1] if bucket else 0)) * batch
        return EvaluationStep(bucket, order.segments(at, min(at + batch, order.length)))

    return map(step, mine)
