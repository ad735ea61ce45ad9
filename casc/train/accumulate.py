"""The gradient of one step from several smaller batches, one after the other.

The reference divides each rank's losses by that rank's number of samples, so eight ranks of
two images are not quite one of sixteen. Divided by the ranks' mean number, their averaged
gradients are exactly those of the whole batch in one process. So are those of accumulated
passes, but their numbers have to be known before the first backward pass.
"""

from typing import Literal

import torch
from torch import Tensor

from casc.checkpoints.state import State
from casc.data.batch import Batch
from casc.distributed import Exchange, Ranks, mean
from casc.model.losses import loss_counts, mean_losses
from casc.model.steps import LossStep
from casc.train.guard import scaled_loss

Normalise = Literal["rank", "world", "step"]
"""As `Recipe.normalise`."""


def backward(
    loss_step: LossStep,
    state: State,
    batch: Batch,
    exchange: Exchange,
    ranks: Ranks,
    parts: int,
    normalise: Normalise = "rank",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave the gradients of a step's mean loss in the parameters; ranks talk at the end only.

    Args:
        loss_step: made for batches of B / parts images.
        state: parameters, and the loss scale if there is one.
        batch: [B, ...] on the device.
        exchange: of the state's parameters that train.
        ranks: this process's place.
        parts: how many batches to make of this one.
        normalise: whose samples each part's losses are divided by. rank: its own. world: the
            ranks' mean. step: the mean over ranks and parts, which takes a forward pass more
            for each part where there are several: the gradient is then the whole batch's.

    Returns:
        The mean loss over parts and ranks, and this rank's measures, means over parts.
    """
    batches = split_batch(batch, parts)
    counts = None
    if normalise == "step" and parts > 1:
        # With gradients on, although none is wanted: the passes are then those that are
        # compiled anyway, and have the memory of one part.
        found = [loss_counts(loss_step(state.params, state.buffers, part)) for part in batches]
        counts = mean_counts(found, ranks)
    totals, measures = [], []
    for i, part in enumerate(batches):
        found = loss_step(state.params, state.buffers, part)
        shared = counts
        if shared is None and normalise != "rank":
            shared = mean_counts([loss_counts(found)], ranks)
        total, shown = mean_losses(found, shared)
        exchange.backward(scaled_loss(state.guard, total, parts), last=i == parts - 1)
        totals.append(total.detach())
        measures.append(shown)
    if parts == 1:
        return mean(totals[0], ranks), measures[0]
    means = {name: sum(m[name] for m in measures) / parts for name in measures[0]}
    return mean(sum(totals) / parts, ranks), means  # type: ignore[arg-type,return-value]


def mean_counts(counts: list[Tensor], ranks: Ranks) -> Tensor:
    """What to divide by so that several batches together are like one: `[losses]` float32.

    Args:
        counts: of this rank's batches, `[losses]` each.
        ranks: whose batches count as well, as many of each.

    Returns:
        The mean. Where there is nothing to count, one process would divide by 1.
    """
    batches = len(counts) * ranks.world
    return mean(torch.stack(counts).mean(dim=0), ranks).clamp(min=1 / batches)


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Consecutive parts of equal size, views of the batch."""
    if parts == 1:
        return [batch]
    size = batch.image.shape[0] // parts
    columns = {name: v for name, v in batch._asdict().items() if v is not None}
    return [
        Batch(**{name: v[at : at + size] for name, v in columns.items()})
        for at in range(0, parts * size, size)
    ]
