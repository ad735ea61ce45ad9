"""Data parallel: the engine is torch.distributed, started by torchrun.

Every rank holds the whole model. It is made from the same seed and file everywhere, and
all ranks apply the same averaged gradients, so nothing is ever sent but gradients.
"""

import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from casc.devices import traits
from casc.errors import UserError

# Ranks wait here for rank 0 to compute AP, which takes minutes on a full COCO.
_TIMEOUT = datetime.timedelta(hours=2)


class Ranks(NamedTuple):
    """This process's place among all."""

    world: int = 1
    rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes, prints and decides."""
        return self.rank == 0


ALONE = Ranks()


def ranks_from_environment() -> Ranks:
    """What torchrun's variables say; one process without them.

    Raises:
        UserError: some of the variables are set, but not all.
    """
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in names if name not in os.environ]
    if world > 1 and missing:
        raise UserError(f"WORLD_SIZE is {world}, but {missing[0]} isn't set: start with torchrun")
    return Ranks(world, int(os.environ["RANK"])) if world > 1 else ALONE


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[torch.device]:
    """Join the other ranks; gives this rank's own device."""
    if ranks.world == 1:
        yield device
        return
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group(traits(device).backend, timeout=_TIMEOUT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def average_gradients(params: Iterable[Tensor], ranks: Ranks) -> None:
    """Replace each gradient by its mean over the ranks: one all-reduce of all of them."""
    if ranks.world == 1:
        return
    gradients = [p.grad for p in params if p.grad is not None]
    # Laid out as in memory, whichever the format, so that flattening is a plain copy.
    flat = torch.cat([_in_memory_order(g) for g in gradients])
    dist.all_reduce(flat)
    flat /= ranks.world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        _in_memory_order(gradient).copy_(part)


def smallest(value: Tensor, ranks: Ranks) -> Tensor:
    """The minimum of a scalar over the ranks."""
    if ranks.world > 1:
        dist.all_reduce(value, dist.ReduceOp.MIN)
    return value


def mean(values: Tensor, ranks: Ranks) -> Tensor:
    """The mean over the ranks."""
    if ranks.world > 1:
        dist.all_reduce(values)
        values = values / ranks.world
    return values


def from_main(value: Any, ranks: Ranks) -> Any:
    """Rank 0's value, on every rank."""
    if ranks.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any, ranks: Ranks) -> list[Any]:
    """Every rank's value on rank 0; elsewhere an empty list."""
    if ranks.world == 1:
        return [value]
    boxes = [None] * ranks.world if ranks.main else None
    dist.gather_object(value, boxes)
    return boxes or []


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A flat view of a dense tensor."""
    order = sorted(range(tensor.dim()), key=lambda d: tensor.stride(d), reverse=True)
    return tensor.permute(order).view(-1)
