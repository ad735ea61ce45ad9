"""The learning rate as a pure function of the step."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over a run."""

    kind: Literal["step", "cosine"] = "step"
    """step: multiply by `factor` after each epoch in `drops`; cosine: fall to 0 over the run."""
    drops: tuple[int, ...] = (8, 11)
    """Epochs after which the rate drops (kind=step)."""
    factor: float = 0.1
    """What a drop multiplies the rate by."""
    warmup_steps: int = 500
    """Steps of linear warm-up, if the run is long enough for them."""
    warmup_limit: float = 0.1
    """The share of the run's steps that warm-up may take: a longer one is shortened to it, and the
    log says so. 1 keeps all of --schedule.warmup-steps."""
    warmup_ratio: float = 0.001
    """Fraction of the rate at the first step."""


def learning_rate(
    schedule: Schedule, peak: float, step: int, *, steps_per_epoch: int, epochs: int
) -> float:
    """The rate of one update, as MMDetection 2.13's step policy with linear warm-up has it.

    Args:
        schedule: the recipe's schedule.
        peak: the rate after warm-up and before any drop, already scaled to the batch.
        step: updates made so far, from 0.
        steps_per_epoch: updates of an epoch.
        epochs: length of the run, which the cosine needs, and a short run's warm-up.
    """
    if schedule.kind == "cosine":
        regular = peak * 0.5 * (1 + math.cos(math.pi * min(step / (epochs * steps_per_epoch), 1)))
    else:
        epoch = step // steps_per_epoch
        regular = peak * schedule.factor ** sum(epoch >= drop for drop in schedule.drops)
    warmup = warmup_length(schedule, epochs * steps_per_epoch)
    if step < warmup:
        left = 1 - step / warmup
        return regular * (1 - left * (1 - schedule.warmup_ratio))
    return regular


def warmup_length(schedule: Schedule, steps: int) -> int:
    """Steps of warm-up in a run of so many steps, all its epochs (not --max-steps, for trials)."""
    if schedule.warmup_limit == 1:
        return schedule.warmup_steps  # also where the run ends within it
    return min(schedule.warmup_steps, int(schedule.warmup_limit * steps))


def scaled_rate(rate: float, reference_batch: int, batch: int) -> float:
    """The linear scaling rule (Goyal et al. 2017): the rate grows with images per step."""
    return rate * batch / reference_batch


def rate_table(
    schedule: Schedule, peak: float, *, steps_per_epoch: int, epochs: int
) -> list[tuple[int, int, float, float]]:
    """The run's stretches as (first step, last step, rate at the first, rate at the last)."""
    total = steps_per_epoch * epochs
    cuts = {0, warmup_length(schedule, total), total}
    if schedule.kind == "step":
        cuts |= {drop * steps_per_epoch for drop in schedule.drops}
    edges = sorted(cut for cut in cuts if cut <= total)

    def rate(step: int) -> float:
        return learning_rate(schedule, peak, step, steps_per_epoch=steps_per_epoch, epochs=epochs)

    return [(a, b - 1, rate(a), rate(b - 1)) for a, b in itertools.pairwise(edges) if b > a]
