"""Shards to batches: workers walk through the plan.

Workers read, decode and pad, nothing else, and hold no more than the windows that they
draw from. One pass of a loader is the whole run: its workers walk from epoch to epoch by
themselves, so no epoch begins with an empty queue.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice

import torch

from casc.data.batch import Batch
from casc.data.collate import collate
from casc.data.evaluation_plan import plan_evaluation
from casc.data.index import Split
from casc.data.plan import (
    NO_HISTORY,
    EpochHistory,
    EpochPlan,
    Window,
    noise_seed,
    plan_epoch,
    steps_per_epoch,
    worker_steps,
    worker_windows,
)
from casc.data.reader import ShardReader
from casc.data.sample import Sample, read_sample
from casc.data.status import DECODING
from casc.data.workers import (
    DEFAULT_LOADING,
    BatchStream,
    EvalLoaderConfig,
    TrainLoaderConfig,
    Worker,
)
from casc.errors import UserError


def training_batches(
    root: str | os.PathLike[str],
    split: Split,
    *,
    seed: int,
    steps: range,
    batch: int,
    world: int = 1,
    rank: int = 0,
    loading: TrainLoaderConfig = DEFAULT_LOADING,
    past: EpochHistory = NO_HISTORY,
    pin_memory: bool = False,
    bitmaps: bool = False,
    masks: bool = True,
    regions: bool = False,
    warn: Callable[[str], object] | None = None,
) -> BatchStream:
    """Yield (bucket, batch) of the steps of a run, counted over its epochs.

    Args:
        root: folder or URL of the shards.
        split: the training split of its index.
        seed: the run's seed.
        steps: the first is where to start or resume, the end is where the run ends.
        batch: images of this rank and step.
        world: number of ranks.
        rank: this process's.
        loading: workers and memory.
        past: see `plan_epoch`.
        pin_memory: hand out batches in pinned memory.
        bitmaps: see `collate`.
        masks: see `read_sample`; without, the split is what `training_split` makes of it.
        regions: see `collate`.
        warn: is told of downloads that had to be taken up again; by default stderr is.

    Raises:
        UserError: a shard is missing, damaged, not what the index says, or can't be fetched.
    """
    walk = partial(
        _walk_training, root, split,
        seed=seed, steps=steps, batch=batch, world=world, rank=rank,
        loading=loading, past=past, bitmaps=bitmaps, masks=masks, regions=regions,
    )  # fmt: skip
    return BatchStream(walk, split, batch, loading, pin_memory, bitmaps, warn, regions)


def evaluation_batches(
    root: str | os.PathLike[str],
    split: Split,
    *,
    batch: int,
    world: int = 1,
    rank: int = 0,
    loading: EvalLoaderConfig = DEFAULT_LOADING,
    pin_memory: bool = False,
    warn: Callable[[str], object] | None = None,
    seed: int | None = None,
    bitmaps: bool = False,
    masks: bool = True,
    regions: bool = False,
) -> BatchStream:
    """Yield (bucket, batch) until this rank has seen its part of the split, each image once.

    The rows that fill up a batch have image id -1. With a seed, images have noise that follows
    from it and from their ids; else they have none. Otherwise as `training_batches`.
    """
    walk = partial(
        _walk_evaluation, root, split,
        batch=batch, world=world, rank=rank, loading=loading, seed=seed, bitmaps=bitmaps,
        masks=masks, regions=regions,
    )  # fmt: skip
    return BatchStream(walk, split, batch, loading, pin_memory, bitmaps, warn, regions)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch; from pinned memory the copy doesn't wait."""
    columns = {
        k: v.to(device, non_blocking=True) for k, v in batch._asdict().items() if v is not None
    }
    return Batch(**columns)


def ahead(
    batches: Iterator[tuple[int, Batch]], device: torch.device, *, copy_stream: bool = False
) -> Iterator[tuple[int, Batch, Batch]]:
    """Yield (bucket, batch, batch on the device), each copied while the last step still runs.

    The host is ahead of an accelerator and asks for a batch while the step before it runs;
    nothing here makes the host wait. On the CPU both batches are the same.

    Args:
        batches: as `training_batches` yields them, in pinned memory where copies are to be
            asynchronous.
        device: where to.
        copy_stream: copy in a stream of its own, which passes the step that is running;
            what the caller then launches on the current stream waits for the copy only.
            Otherwise the copy is done between the two steps.
    """
    copies = torch.Stream(device) if copy_stream else None
    for bucket, batch in batches:
        if copies is None:
            yield bucket, batch, to_device(batch, device)
            continue
        with copies:
            moved = to_device(batch, device)
        steps = torch.accelerator.current_stream(device)
        steps.wait_stream(copies)
        for column in moved:
            if column is not None:
                # The memory belongs to the other stream, which mustn't use it again before
                # the step is through with it.
                column.record_stream(steps)
        yield bucket, batch, moved


def _walk_training(
    root: str | os.PathLike[str], split: Split, worker: Worker, *,
    seed: int, steps: range, batch: int, world: int, rank: int, loading: TrainLoaderConfig,
    past: EpochHistory,
    bitmaps: bool, masks: bool, regions: bool,
) -> Iterator[tuple[int, Batch]]:  # fmt: skip
    per_epoch = steps_per_epoch(split, world=world, batch=batch)
    workers, window = worker.workers, loading.window
    # The loader asks worker 0 for its first batch, whichever step that is.
    at = steps.start + worker.number
    while at < steps.stop:
        epoch, first = divmod(at, per_epoch)
        plan = plan_epoch(
            split, seed=seed, epoch=epoch, world=world, batch=batch, workers=workers,
            window=window, past=past,
        )  # fmt: skip
        reader = partial(ShardReader, root, split, loading, worker.status, worker.compared)
        read = partial(decode, masks=masks, regions=regions, channels=split.channels)
        for bucket, samples in epoch_samples(reader, plan, rank, first % workers, first, read):
            if at >= steps.stop:
                return
            seeds = [noise_seed(seed, epoch, sample.image_id) for sample in samples]
            yield (
                bucket,
                collate(
                    samples,
                    split.buckets[bucket],
                    seeds=seeds,
                    bitmaps=bitmaps,
                    regions=regions,
                    block=next(worker.blocks),
                ),
            )
            at += workers


def _walk_evaluation(
    root: str | os.PathLike[str],
    split: Split,
    worker: Worker,
    *,
    batch: int,
    world: int,
    rank: int,
    loading: EvalLoaderConfig,
    seed: int | None,
    bitmaps: bool,
    masks: bool,
    regions: bool,
) -> Iterator[tuple[int, Batch]]:
    plan = plan_evaluation(
        split, batch=batch, world=world, rank=rank, workers=worker.workers, worker=worker.number
    )
    with ShardReader(root, split, loading, worker.status, worker.compared) as reader:
        for bucket, segments in plan:
            members = [member for part in segments for member in reader.read(part)]
            worker.status.set(DECODING)
            samples = [
                decode(*member, masks=masks, regions=regions, channels=split.channels)
                for member in members
            ]
            seeds = None if seed is None else [noise_seed(seed, 0, s.image_id) for s in samples]
            yield (
                bucket,
                collate(
                    samples,
                    split.buckets[bucket],
                    batch=batch,
                    seeds=seeds,
                    bitmaps=bitmaps,
                    regions=regions,
                    block=next(worker.blocks),
                ),
            )


def decode(
    name: str,
    image: bytes,
    record: bytes,
    *,
    masks: bool = True,
    regions: bool = False,
    channels: int = 3,
) -> Sample:
    """`read_sample` with errors that say where the sample is."""
    try:
        return read_sample(image, record, masks=masks, regions=regions, channels=channels)
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: {error}; run `data_tools check`") from error


def epoch_samples(
    reader: Callable[[], ShardReader],
    plan: EpochPlan,
    rank: int,
    worker: int,
    start: int,
    read: Callable[[str, bytes, bytes], Sample] = decode,
) -> Iterator[tuple[int, list[Sample]]]:
    """What one worker reads of an epoch from step `start` on, one step after the other."""
    draws: dict[int, Iterator[Sample]] = {}
    with ExitStack() as readers:
        for _, bucket in worker_steps(plan, worker, start):
            if bucket not in draws:
                windows = worker_windows(plan, bucket, rank, worker, start)
                draws[bucket] = _draw(readers.enter_context(reader()), windows, read)
            yield bucket, list(islice(draws[bucket], plan.batch))


def _draw(
    reader: ShardReader,
    windows: Iterator[Window],
    read: Callable[[str, bytes, bytes], Sample],
) -> Iterator[Sample]:
    for segments, order in windows:
        held = dict(enumerate(member for part in segments for member in reader.read(part)))
        reader.status.set(DECODING)
        for at in order.tolist():
            yield read(*held.pop(at))
