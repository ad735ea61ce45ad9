"""The gradient of one step from several smaller batches, one after the other."""

import torch
from torch import Tensor

from casc.checkpoints.state import State
from casc.data.batch import Batch
from casc.distributed import Exchange, Ranks, mean
from casc.model.normalise import Shared, counts_in
from casc.model.steps import LossStep
from casc.train.guard import scaled_loss


def backward(
    loss_step: LossStep,
    state: State,
    batch: Batch,
    exchange: Exchange,
    ranks: Ranks,
    parts: int,
    *,
    together: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Leave the gradients of a step's mean loss in the parameters; ranks talk at the end only.

    Args:
        loss_step: made for batches of B / parts images.
        state: parameters, and the loss scale if there is one.
        batch: [B, ...] on the device.
        exchange: of the state's parameters that train.
        ranks: this process's place.
        parts: how many batches to make of this one.
        together: divide losses by the samples of all parts and ranks, which takes a forward
            pass more for each part: the gradient is then the whole batch's.

    Returns:
        The mean loss over parts and ranks, and this rank's measures, means over parts.
    """
    losses, measures = [], []
    batches = split_batch(batch, parts)
    shared = _count(loss_step, state, batches, ranks) if together and parts > 1 else None
    kwargs = {} if shared is None else {"shared": shared}
    for i, part in enumerate(batches):
        loss, found = loss_step(state.params, state.buffers, part, **kwargs)
        exchange.backward(scaled_loss(state.guard, loss, parts), last=i == parts - 1)
        losses.append(loss.detach())
        measures.append(found)
    if parts == 1:
        return mean(losses[0], ranks), measures[0]
    means = {name: sum(m[name] for m in measures) / parts for name in measures[0]}
    return mean(sum(losses) / parts, ranks), means  # type: ignore[arg-type,return-value]


def _count(loss_step: LossStep, state: State, batches: list[Batch], ranks: Ranks) -> Shared:
    """Count the samples of all batches and ranks.

    With gradients on, although none is wanted: the passes are then those that are compiled
    anyway, and have the memory of one part.
    """
    unscaled = Shared(torch.ones((), device=batches[0].image.device), 1)
    counts = []
    for part in batches:
        _, found = loss_step(state.params, state.buffers, part, shared=unscaled)
        counts.append(counts_in(found, part.image.shape[0]))
    return Shared(mean(torch.stack(counts).mean(0), ranks), len(batches) * ranks.world)


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
