"""Which samples every rank and worker reads when a split is evaluated."""

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
) -> list[EvaluationStep]:
    """Batches that a worker reads so that every sample of the split is seen exactly once.

    Samples that training leaves out are evaluated too. Ranks take consecutive parts, so
    that each meets few canvases; they need not have the same number of batches.
    """
    if batch < 1:
        raise UserError(f"batch must be at least 1, not {batch}")
    bucket_of, samples, _ = columns(split)
    steps = []
    for bucket in range(len(split.buckets)):
        order = order_of(np.flatnonzero(bucket_of == bucket), samples)
        steps += [
            EvaluationStep(bucket, order.segments(at, min(at + batch, order.length)))
            for at in range(0, order.length, batch)
        ]
    for index, parts in ((rank, world), (worker, max(workers, 1))):
        steps = steps[len(steps) * index // parts : len(steps) * (index + 1) // parts]
    return steps
