"""Losses over the samples of all ranks and passes, instead of each one's own.

The reference divides each rank's losses by that rank's number of samples, so eight ranks of
two images are not quite one of sixteen. Divided by the ranks' mean number, their averaged
gradients are exactly those of the whole batch in one process. So are those of accumulated
passes, but their numbers have to be known before the first backward pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from casc.distributed import Ranks, mean


class Shared(NamedTuple):
    """What several batches divide their losses by."""

    counts: Tensor
    """As `counts_in`, the mean over the batches."""
    batches: int


def counts_in(losses: dict[str, Tensor], images: int) -> Tensor:
    """How many samples each loss of a batch was divided by, `[losses]`.

    Args:
        losses: with the counts as means per image: `rpn.samples`, `s0.samples` and, for
            masks, `s0.positives`.
        images: B, in the batch.
    """
    return torch.stack([losses[_count_of(name)] for name in _names(losses)]).detach() * images


def over_ranks(losses: dict[str, Tensor], images: int, ranks: Ranks) -> dict[str, Tensor]:
    """Divide each loss by the ranks' mean count in place of this rank's; see `over_shared`."""
    counts = counts_in(losses, images)
    return over_shared(losses, images, Shared(mean(counts, ranks), ranks.world))


def over_shared(losses: dict[str, Tensor], images: int, shared: Shared) -> dict[str, Tensor]:
    """Divide each loss by the mean count of several batches in place of its own.

    This is done to finished losses: whether a step is one graph or several, compiled or
    not, there is no communication in it.

    Args:
        losses: of one of the batches, as for `counts_in`.
        images: B, in the batch; all have as many.
        shared: what to divide by.

    Returns:
        The same entries.
    """
    # Where there is nothing to count, one process would divide by 1.
    least = 1 / shared.batches
    factors = counts_in(losses, images).clamp(min=1) / shared.counts.clamp(min=least)
    scaled = {name: losses[name] * factors[i] for i, name in enumerate(_names(losses))}
    return {**losses, **scaled}


def _names(losses: dict[str, Tensor]) -> list[str]:
    return [name for name in losses if "loss" in name]


def _count_of(loss: str) -> str:
    stage, _, kind = loss.rpartition(".")
    if not stage:
        return "rpn.samples"
    return f"{stage}.positives" if kind == "loss_mask" else f"{stage}.samples"
