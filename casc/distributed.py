"""Data parallel: the engine is torch.distributed, started by torchrun.

Every rank holds the whole model. It is made from the same seed and file everywhere, and
all ranks apply the same averaged gradients, so nothing is ever sent but gradients.

DistributedDataParallel averages them, in buckets, while the backward pass goes on. It sees
the parameters and the loss and nothing between: the step is no module, and its compiled
graphs are the same with one rank and with many. Within one compiled graph all gradients
appear together, so what overlaps is one graph's exchange with the backward of the next
(mask heads with the rest), and copying one bucket with sending another.
docs/scaling.md has the ways that were compared.
"""

import datetime
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from casc.device.devices import is_accelerator, traits
from casc.device.versions import set_timeout
from casc.errors import TransientError, UserError

# Ranks wait for one of their machine to compile every canvas, which may take long on a CPU.
_TIMEOUT = datetime.timedelta(hours=2)
# Joining needs no such patience: torchrun starts all ranks at once.
_JOINING = datetime.timedelta(minutes=10)


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
    """Join the other ranks; gives this rank's own device.

    Raises:
        TransientError: they can't be reached, or one is lost inside.
    """
    if ranks.world == 1:
        yield device
        return
    if is_accelerator(device):
        # Number 0 where `choose_device` left this rank its own device only.
        alone = torch.accelerator.device_count() == 1
        device = torch.device(device.type, 0 if alone else int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    backend = traits(device).backend
    # gloo connects all ranks here and now, the others when they first exchange something.
    joining = _JOINING if backend == "gloo" else _TIMEOUT
    try:
        store, rank, world = next(rendezvous("env://", timeout=joining))
        # After a restart the store still has the addresses of the ranks before, and whoever
        # is early would read those: both sides then wait to be connected to.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"attempt {attempt}", store),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world,
            timeout=joining,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TransientError(
            f"rank {ranks.rank} of {ranks.world}: can't join the other ranks ({reason}); see to it"
            " that torchrun has started all of them, and that they can reach each other"
        ) from error
    if joining != _TIMEOUT:
        set_timeout(_TIMEOUT)
    try:
        yield device
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise TransientError(
            f"rank {ranks.rank} of {ranks.world}: lost touch with another rank"
            f" ({str(error).splitlines()[0]}); what it printed says why it ended"
        ) from error
    finally:
        dist.destroy_process_group()


# How torch.distributed's backends word that another process is no longer there.
_LOST = ("connection closed by peer", "connection reset", "broken pipe", "timed out waiting",
         "connection refused", "timeout(ms)", "watchdog", "remote process exited")  # fmt: skip


def is_lost(error: Exception) -> bool:
    """Whether an error means that another rank is no longer there."""
    text = str(error).lower()
    if isinstance(error, dist.DistNetworkError):  # of the store: its rank is gone
        return True
    return isinstance(error, RuntimeError) and any(words in text for words in _LOST)


class Exchange:
    """Backward passes whose gradients are the mean over the ranks."""

    def __init__(self, params: Iterable[Tensor], ranks: Ranks, ddp_bucket_mb: int = 25):
        """Prepare.

        Args:
            params: what trains; each must get a gradient from every loss.
            ranks: this process's place.
            ddp_bucket_mb: how much is sent at a time, in MiB.
        """
        self.parallel = None
        params = list(params)
        # On accelerators gradients are exchanged all together, as `mean_` does: a compiled step
        # gives them all at once, and hooks can't be replayed.
        if ranks.world > 1 and not is_accelerator(params[0].device):
            self.parallel = DistributedDataParallel(
                _Holder(params),
                # Gradients then lie in the buckets that are sent: no copy, no second memory.
                gradient_as_bucket_view=True,
                bucket_cap_mb=ddp_bucket_mb,
            )

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the loss's gradients to those that are there.

        Args:
            loss: scalar.
            last: send what has come together; False sends nothing.
        """
        if self.parallel is None:
            loss.backward()
        elif last:
            self.parallel(loss).backward()
        else:
            with self.parallel.no_sync():
                self.parallel(loss).backward()


class _Holder(torch.nn.Module):
    """Shows the parameters to DistributedDataParallel; hands on the loss."""

    def __init__(self, params: Iterable[Tensor]):
        super().__init__()
        for i, param in enumerate(params):
            # Without nn.Parameter, which would be another leaf than the state's tensor.
            self._parameters[str(i)] = param  # type: ignore[assignment]

    def forward(self, loss: Tensor) -> Tensor:
        return loss


def meeting_point() -> Any:
    """The store in which the ranks found each other: texts by key, which all of them see."""
    return dist.distributed_c10d._get_default_store()


def mean(values: Tensor, ranks: Ranks) -> Tensor:
    """The mean over the ranks, the same bits on each: not finite if any rank's isn't."""
    if ranks.world == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values / ranks.world


def mean_(values: Tensor, ranks: Ranks) -> None:
    """Put the mean over the ranks in a tensor's place."""
    if ranks.world > 1:
        dist.all_reduce(values)
        values /= ranks.world


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
