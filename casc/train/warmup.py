"""Compile for every canvas of a run before its first step, so that none stops to compile."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist

from casc.checkpoints.state import State
from casc.data.batch import Batch
from casc.data.collate import collate
from casc.data.index import Split
from casc.data.plan import plan_epoch, steps_per_epoch
from casc.data.stream import ahead, to_device
from casc.data.workers import BatchStream
from casc.device.devices import is_accelerator, synchronize, traits
from casc.distributed import Ranks
from casc.model.losses import mean_losses
from casc.train.derived import trained_split
from casc.train.log import RunLog
from casc.train.recipe import Recipe, reads_bitmaps
from casc.train.run import Run
from casc.train.step import TrainStep
from casc.train.stopping import Stopping
from casc.train.watching import Activity


def compiled_ahead(
    run: Run,
    state: State,
    step: TrainStep,
    batches: BatchStream,
    activity: Activity,
    stopping: Stopping,
) -> Iterator[tuple[int, Batch, Batch]]:
    """Batches beside their copies on the device, once every canvas is compiled for."""
    stream: Iterator[tuple[int, Batch]] = batches
    if run.recipe.compile and run.recipe.warm_up and state.step < run.facts.steps:
        # Workers read ahead meanwhile, and data that can't be read says so before.
        activity.set("waiting for data")
        stream = chain([next(batches)], batches)
        with stopping.compiling():
            warm_up(run, state, step, activity)
    return ahead(stream, run.device, copy_stream=traits(run.device).copy_stream)


def warm_up(run: Run, state: State, step: TrainStep, activity: Activity) -> None:
    """Run the step of every bucket to come once, forward and backward, on a batch without images.

    It has the shapes of real ones, so it compiles, or loads, what training will run. Nothing
    of it stays: neither gradients nor randomness, since a step's noise is its batch's.

    Args:
        run: the run.
        state: whose tensors the steps get; it isn't changed.
        step: the one that training will call.
        activity: is told of each.
    """
    recipe, log = run.recipe, run.log
    split = trained_split(recipe, run.index)
    steps = range(state.step, run.facts.steps)
    buckets = buckets_ahead(recipe, split, run.ranks.world, steps)
    trained = [state.params[name] for name in state.momentum]
    began = time.perf_counter()
    with _one_rank_first(run.ranks, run.device, log):
        for done, bucket in enumerate(buckets):
            activity.set(f"compiling bucket {split.buckets[bucket].name}")
            height, width = run.facts.canvases[recipe.train_split][bucket]
            log.say(
                f"compiling {done + 1} of {len(buckets)} canvases: {height} x {width}, bucket"
                f" {split.buckets[bucket].name} ({time.perf_counter() - began:.0f} s so far)"
            )
            batch = collate(
                [],
                split.buckets[bucket],
                batch=recipe.batch,
                bitmaps=reads_bitmaps(recipe),
                regions=recipe.model.ignore == "crowds",
            )
            found = step.loss_step(bucket)(
                state.params, state.buffers, to_device(batch, run.device)
            )
            torch.autograd.grad(mean_losses(found)[0], trained, allow_unused=True)
            synchronize(run.device)
    seconds = time.perf_counter() - began
    log.say(f"compiled in {seconds:.0f} s", "compiled", seconds=round(seconds, 1))


def buckets_ahead(recipe: Recipe, split: Split, world: int, steps: range) -> list[int]:
    """The buckets that these steps will meet, in the order in which they meet them."""
    found: dict[int, None] = {}
    per_epoch = steps_per_epoch(split, world=world, batch=recipe.images_per_rank)
    at, wanted = steps.start, len({shard.bucket for shard in split.shards if shard.train})
    while at < steps.stop and len(found) < wanted:
        plan = plan_epoch(
            split,
            seed=recipe.seed,
            epoch=at // per_epoch,
            world=world,
            batch=recipe.images_per_rank,
            workers=recipe.loading.workers,
            window=recipe.loading.window,
        )
        block = plan.block_of(at % per_epoch)
        within = at % per_epoch - plan.start(block)
        ahead = plan.buckets(block)[within : within + steps.stop - at].tolist()
        found |= dict.fromkeys(ahead)
        at += len(ahead)
    return list(found)


@contextmanager
def _one_rank_first(ranks: Ranks, device: torch.device, log: RunLog) -> Iterator[None]:
    """On each machine one rank compiles, then the others load what it has made.

    Compiled code knows the number of its device. Where ranks see all accelerators each has
    another, so none has a use for another's code, and all compile at once.
    """
    if ranks.world == 1 or (is_accelerator(device) and torch.accelerator.device_count() > 1):
        yield
        return
    first = int(os.environ["LOCAL_RANK"]) == 0
    log.say("one process of each machine compiles, the others wait and then load what it made")
    if first:
        yield
    dist.barrier()
    if not first:
        yield
