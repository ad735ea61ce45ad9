"""Losses over the samples of all ranks, instead of each rank's own.

The reference divides each rank's losses by that rank's number of samples, so eight ranks of
two images are not quite one of sixteen. Divided by the ranks' mean number, their averaged
gradients are exactly those of the whole batch in one process.
"""

import torch
from torch import Tensor

from casc.train.distributed import Ranks, mean


def over_ranks(losses: dict[str, Tensor], images: int, ranks: Ranks) -> dict[str, Tensor]:
    """Divide each loss by the ranks' mean count in place of this rank's.

    This is done to finished losses: whether a step is one graph or several, compiled or
    not, there is no communication in it.

    Args:
        losses: of this rank's batch, with the counts that they were divided by, as means
            per image: `rpn.samples`, `s0.samples` and, for masks, `s0.positives`.
        images: B, in the batch.
        ranks: this process's place.

    Returns:
        The same entries.
    """
    names = [name for name in losses if "loss" in name]
    counts = torch.stack([losses[_count_of(name)] for name in names]).detach() * images
    # Where there is nothing to count, one process would divide by 1.
    factors = counts.clamp(min=1) / mean(counts, ranks).clamp(min=1 / ranks.world)
    scaled = {name: losses[name] * factors[i] for i, name in enumerate(names)}
    return {**losses, **scaled}


def _count_of(loss: str) -> str:
    stage, _, kind = loss.rpartition(".")
    if not stage:
        return "rpn.samples"
    return f"{stage}.positives" if kind == "loss_mask" else f"{stage}.samples"
