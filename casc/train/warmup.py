"""Compile for every canvas of a run before its first step, so that none stops to compile."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from casc.checkpoints.state import State
from casc.data.collate import collate
from casc.data.index import Split
from casc.data.plan import plan_epoch, steps_per_epoch
from casc.data.stream import to_device
from casc.device.devices import synchronize
from casc.distributed import Ranks
from casc.model.steps import LossStep
from casc.train.log import RunLog
from casc.train.recipe import Recipe
from casc.train.run import Run


def warm_up(
    run: Run, state: State, loss_step: Callable[[int], LossStep], buckets: list[int]
) -> None:
    """Run every bucket's step once, forward and backward, on a batch without images.

    It has the shapes of real ones, so it compiles, or loads, what training will run. Nothing
    of it stays: neither gradients nor randomness, since a step's noise is its batch's.

    Args:
        run: the run.
        state: whose tensors the steps get; it isn't changed.
        loss_step: gives a bucket's step, the one that training will call.
        buckets: in the order in which to do it, from `buckets_ahead`.
    """
    recipe, log = run.recipe, run.log
    split = run.index.splits[recipe.train_split]
    trained = [state.params[name] for name in state.momentum]
    began = time.perf_counter()
    with _one_rank_first(run.ranks, run.device, log, together=recipe.normalise != "rank"):
        for done, bucket in enumerate(buckets):
            height, width = run.facts.canvases[recipe.train_split][bucket]
            log.say(
                f"compiling {done + 1} of {len(buckets)} canvases: {height} x {width}, bucket"
                f" {split.buckets[bucket].name} ({time.perf_counter() - began:.0f} s so far)"
            )
            batch = collate(
                [],
                split.buckets[bucket],
                batch=recipe.batch,
                bitmaps=recipe.model.mask_head.target == "bitmap",
            )
            total, _ = loss_step(bucket)(state.params, state.buffers, to_device(batch, run.device))
            torch.autograd.grad(total, trained, allow_unused=True)
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
def _one_rank_first(
    ranks: Ranks, device: torch.device, log: RunLog, *, together: bool
) -> Iterator[None]:
    """On each machine one rank compiles, then the others load what it has made.

    Accelerators are left out: compiled code knows the number of its device, so no rank has
    a use for another's, and all compile at once. So they do where a step needs all ranks
    (`together`).
    """
    if ranks.world == 1 or device.index is not None or together:
        yield
        return
    first = int(os.environ["LOCAL_RANK"]) == 0
    log.say("one process of each machine compiles, the others wait and then load what it made")
    if first:
        yield
    dist.barrier()
    if not first:
        yield
