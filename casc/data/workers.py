"""Worker processes: torch's DataLoader, with memory that is used again.

Workers write batches into a few blocks of shared memory. Fresh shared memory for every
batch took a third of their time (the system clears it page by page), and sending it on took
the training process longer than copying it does.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, repeat
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from casc.data.batch import Batch
from casc.data.collate import block_size, unpack
from casc.data.index import Split
from casc.errors import UserError

Blocks = Iterator[Tensor | None]
"""Memory for one batch after the other; None leaves it to `collate`."""
Walk = Callable[[int, int, Blocks], Iterator[tuple[int, Batch]]]
"""(worker, workers, memory) to the (bucket, batch) that this worker reads."""


@dataclass(frozen=True)
class Loading:
    """How batches are read; none of it changes what an image sees."""

    workers: int = 2
    """Reading processes per rank; 0 reads in the training process itself."""
    prefetch: int = 4
    """Batches that each worker keeps ready."""
    window: int = 128
    """Encoded images per bucket that a worker holds in memory to draw from in random order."""


DEFAULT_LOADING = Loading()


class _Stream(IterableDataset[Any]):
    """What the loader wants of a data set: to be told the worker, then to be walked through."""

    def __init__(self, walk: Walk, shared: Tensor, free: list[Any]):
        self.walk, self.shared, self.free = walk, shared, free

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        try:
            if info is None:
                yield from self.walk(0, 1, repeat(None))
            else:
                blocks = self.shared[info.id]
                slots = cycle(range(len(blocks)))
                walk = self.walk(info.id, info.num_workers, _in_turn(blocks, self.free[info.id]))
                for slot, (bucket, _) in zip(slots, walk, strict=False):
                    yield info.id, slot, bucket
        except UserError as error:
            # As a value: the loader would hand on an exception with the worker's stack in
            # its message, and users are to read one line.
            yield error


def load(
    walk: Walk,
    split: Split,
    batch: int,
    loading: Loading,
    pin_memory: bool,
    bitmaps: bool = False,
) -> Iterator[tuple[int, Batch]]:
    """Yield the (bucket, batch) of a walk, read by workers, in memory of the batch's own.

    Args:
        walk: what to read.
        split: whose buckets' capacities make the batches' shapes.
        batch: images per batch.
        loading: workers and memory.
        pin_memory: hand out batches in pinned memory.
        bitmaps: whether batches hold any.

    Raises:
        UserError: as the walk does, or when there is too little shared memory.
    """
    sizes = [block_size(bucket, batch, bitmaps=bitmaps) for bucket in split.buckets]
    shared = _shared_blocks(loading, max(sizes, default=0))
    context = multiprocessing.get_context()
    free = [context.Semaphore(shared.shape[1]) for _ in range(loading.workers)]
    loader = DataLoader(
        _Stream(walk, shared, free),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=loading.workers,
        prefetch_factor=loading.prefetch if loading.workers else None,
        worker_init_fn=_start_worker,
    )
    try:
        for item in loader:
            if isinstance(item, UserError):
                raise item
            if loading.workers:
                worker, slot, bucket = item
                block = _own(shared[worker, slot, : sizes[bucket]], pin_memory)
                free[worker].release()
                made = unpack(block, split.buckets[bucket], batch, bitmaps=bitmaps)
            else:
                bucket, made = item
                if pin_memory:
                    made = Batch(*[_own(v, True) for v in made if v is not None])
            # Ids and sizes are kept for longer than images; they mustn't hold on to those.
            yield (
                bucket,
                made._replace(
                    image_id=_own(made.image_id, pin_memory), size=_own(made.size, pin_memory)
                ),
            )
    finally:
        for semaphore in free:  # a worker that waits for a block would not hear of the end
            for _ in range(shared.shape[1]):
                semaphore.release()


def _in_turn(blocks: Tensor, free: Any) -> Iterator[Tensor]:
    for block in cycle(blocks):
        free.acquire()
        yield block


def _own(memory: Tensor, pin_memory: bool) -> Tensor:
    return memory.pin_memory() if pin_memory else memory.clone()


def _shared_blocks(loading: Loading, size: int) -> Tensor:
    """Memory that the workers write batches into, `[workers, blocks, size]` uint8.

    A worker is mostly asked for a batch once the one `prefetch` before it has been taken
    out of the queue: so many blocks, and two more, let it work without waiting for one.
    """
    try:
        blocks = torch.empty(loading.workers, loading.prefetch + 2, size, dtype=torch.uint8)
        return blocks.share_memory_()
    except RuntimeError as error:
        raise UserError(
            f"loader: no {loading.workers * (loading.prefetch + 2) * size / 2**20:.0f} MiB of"
            " shared memory (/dev/shm) for the workers' batches; enlarge it (docker run"
            f" --shm-size) or lower --loading.workers or --loading.prefetch ({error})"
        ) from None


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the training process ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
