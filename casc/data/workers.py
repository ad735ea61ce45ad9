"""Worker processes: torch's DataLoader, with memory that is used again.

Workers write batches into a few blocks of shared memory. Fresh shared memory for every
batch took a third of their time (the system clears it page by page), and sending it on took
the training process longer than copying it does.
"""

import gc
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, repeat
from typing import Any, NamedTuple

import numpy as np
import torch

# Before any worker is forked: one that is while another thread of its parent is importing this
# would wait for that import for good.
import webdataset.tariterators  # noqa: F401
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from casc.data.batch import Batch
from casc.data.collate import block_size, unpack
from casc.data.index import Split
from casc.data.loader_config import DEFAULT_LOADING, EvalLoaderConfig, TrainLoaderConfig
from casc.data.status import DECODING, ENDED, IDLE, Status, describe, shared_rows, warn_on_stderr
from casc.device.signals import leave_to_parent
from casc.errors import TransientError, UserError

__all__ = ["DEFAULT_LOADING", "BatchStream", "EvalLoaderConfig", "TrainLoaderConfig", "Worker"]

Blocks = Iterator[Tensor | None]
"""Memory for one batch after the other; None leaves it to `collate`."""


class Worker(NamedTuple):
    """What a walk knows of the process that it is in."""

    number: int
    """From 0."""
    workers: int
    """How many there are, at least 1."""
    blocks: Blocks
    status: Status
    compared: np.ndarray
    """`[shards]` uint8, shared by the workers: see `ShardReader`."""


Walk = Callable[[Worker], Iterator[tuple[int, Batch]]]
"""The (bucket, batch) that a worker reads."""


@dataclass(frozen=True)
class _Shared:
    """What the workers and the training process have in common."""

    blocks: Tensor
    """`[workers, blocks, size]` uint8."""
    free: list[Any]
    """Per worker, a semaphore that counts the blocks it may write to."""
    rows: Tensor
    """See `Status`."""
    compared: Tensor


class _Stream(IterableDataset[Any]):
    """What the loader wants of a data set: to be told the worker, then to be walked through."""

    def __init__(self, walk: Walk, shared: _Shared):
        self.walk, self.shared = walk, shared

    def __iter__(self) -> Iterator[Any]:
        info, shared = get_worker_info(), self.shared
        number = info.id if info else 0
        status = Status(shared.rows[number].numpy())
        compared = shared.compared.numpy()
        try:
            if info is None:
                walk = self.walk(Worker(0, 1, repeat(None), status, compared))
                for bucket, batch in walk:
                    yield 0, batch, bucket, status.taken_notes()
            else:
                blocks = shared.blocks[number]
                memory = _in_turn(blocks, shared.free[number], status)
                walk = self.walk(Worker(number, info.num_workers, memory, status, compared))
                for slot, (bucket, _) in zip(cycle(range(len(blocks))), walk, strict=False):
                    status.set(IDLE)
                    yield number, slot, bucket, status.taken_notes()
            status.set(ENDED)
        except UserError as error:
            # As a value: the loader would hand on an exception with the worker's stack in
            # its message, and users are to read one line.
            yield error


class BatchStream(Iterator[tuple[int, Batch]]):
    """The (bucket, batch) of a walk, read by workers, in memory of the batch's own.

    Raises:
        UserError: as the walk does, when there is too little shared memory, or when a
            worker has died.
    """

    def __init__(
        self,
        walk: Walk,
        split: Split,
        batch: int,
        loading: EvalLoaderConfig,
        pin_memory: bool,
        bitmaps: bool = False,
        warn: Callable[[str], object] | None = None,
        regions: bool = False,
    ) -> None:
        """Read a walk.

        Args:
            walk: what to read.
            split: whose buckets' capacities make the batches' shapes.
            batch: images per batch.
            loading: workers and memory.
            pin_memory: hand out batches in pinned memory.
            bitmaps: whether batches hold any.
            warn: is told what workers have to say; by default it goes to stderr.
            regions: whether batches hold any to ignore.
        """
        self._places = [shard.name for shard in split.shards]
        holding = [name for name in ("workers", "prefetch", "window") if hasattr(loading, name)]
        self._knobs = " or ".join(f"--loading.{name}" for name in holding)
        self._warn = warn or warn_on_stderr
        self.pids: list[int] = []
        """Process ids of the workers, once the first batch has been asked for."""
        held = {"bitmaps": bitmaps, "regions": regions}
        sizes = [block_size(bucket, batch, **held) for bucket in split.buckets]
        shared = _share(loading, max(sizes, default=0), len(split.shards))
        self._rows = shared.rows
        items = _items(_Stream(walk, shared), loading, self.pids, self._warn)

        def unpacked(block: Tensor, bucket: int) -> Batch:
            own = _own(block[: sizes[bucket]], pin_memory)
            return unpack(own, split.buckets[bucket], batch, **held)

        self._batches = _batches(items, shared, unpacked, pin_memory)

    def __next__(self) -> tuple[int, Batch]:
        """The next batch."""
        with self.explained():
            return next(self._batches)

    def close(self) -> None:
        """End the workers: left to the garbage collector, they are waited for for seconds."""
        self._batches.close()

    def stuck_report(self) -> str:
        """What each worker is doing and for how long; for any thread, at any time."""
        rows = self._rows.numpy()
        return "; ".join(
            f"worker {i}"
            + (f" (process {self.pids[i]})" if self.pids else "")
            + f": {describe(row, self._places)}"
            for i, row in enumerate(rows)
        )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Name the worker and its shard where torch raises that a worker has died.

        torch raises it wherever the training process happens to be.
        """
        try:
            yield
        except RuntimeError as error:
            said = f"{error} {error.__cause__}"
            found = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)", said)
            if found is None:
                raise
            pid = int(found[1])
            killed = re.search(r"killed by signal: ([^.]*)", said)
            how = f"was killed ({killed[1].strip()})" if killed else "ended unexpectedly"
            number = self.pids.index(pid) if pid in self.pids else None
            row = None if number is None else self._rows[number].numpy()
            raise TransientError(
                f"loader: {'a worker' if number is None else f'worker {number}'}"
                f" (process {pid}) {how}"
                + (f" while it was {describe(row, self._places)}" if row is not None else "")
                + f"; the system does so when memory runs out: then lower {self._knobs}"
            ) from None


def _items(
    stream: _Stream, loading: EvalLoaderConfig, pids: list[int], warn: Callable[[str], object]
) -> Iterator[Any]:
    """What the workers yield; puts their process ids into `pids`."""
    loader = DataLoader(
        stream,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=loading.workers,
        prefetch_factor=loading.prefetch if loading.workers else None,
        worker_init_fn=_start_worker,
    )
    items = iter(loader)
    pids += [int(process.pid) for process in getattr(items, "_workers", [])]
    try:
        for item in items:
            if isinstance(item, UserError):
                raise item
            for note in item[3]:
                warn(note)
            yield item
    finally:
        # A worker that waits for a block would not hear of the end.
        for semaphore in stream.shared.free:
            for _ in range(stream.shared.blocks.shape[1]):
                semaphore.release()


def _batches(
    items: Iterator[Any],
    shared: _Shared,
    unpacked: Callable[[Tensor, int], Batch],
    pin_memory: bool,
) -> Generator[tuple[int, Batch]]:
    for worker, made, bucket, _ in items:
        if shared.free:
            made = unpacked(shared.blocks[worker, made], bucket)
            shared.free[worker].release()
        elif pin_memory:
            made = Batch(*[_own(v, True) for v in made if v is not None])
        # Ids and sizes are kept for longer than images; they mustn't hold on to those.
        yield (
            bucket,
            made._replace(
                image_id=_own(made.image_id, pin_memory), size=_own(made.size, pin_memory)
            ),
        )


def _in_turn(blocks: Tensor, free: Any, status: Status) -> Iterator[Tensor]:
    for block in cycle(blocks):
        status.set(IDLE)
        free.acquire()
        status.set(DECODING)
        yield block


def _own(memory: Tensor, pin_memory: bool) -> Tensor:
    return memory.pin_memory() if pin_memory else memory.clone()


def _share(loading: EvalLoaderConfig, size: int, shards: int) -> _Shared:
    """Memory that the workers share; blocks are `size` bytes.

    A worker is mostly asked for a batch once the one `prefetch` before it has been taken
    out of the queue: so many blocks, and two more, let it work without waiting for one.
    """
    count = loading.prefetch + 2
    context = multiprocessing.get_context()
    try:
        return _Shared(
            blocks=torch.empty(loading.workers, count, size, dtype=torch.uint8).share_memory_(),
            free=[context.Semaphore(count) for _ in range(loading.workers)],
            rows=shared_rows(loading.workers),
            compared=torch.zeros(shards, dtype=torch.uint8).share_memory_(),
        )
    except RuntimeError as error:
        raise UserError(
            f"loader: no {loading.workers * count * size / 2**20:.0f} MiB of"
            " shared memory (/dev/shm) for the workers' batches; enlarge it (docker run"
            f" --shm-size) or lower --loading.workers or --loading.prefetch ({error})"
        ) from None


def _as_it_is(item: Any) -> Any:
    return item


def _start_worker(_: int) -> None:
    # Collecting would write to every object that is shared with the parent, which copies
    # their pages; what is frozen is left alone. The parent may have turned collection off.
    gc.freeze()
    gc.enable()
    torch.set_num_threads(1)
    leave_to_parent()
