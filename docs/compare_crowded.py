"""Time a training step where one image of a batch is crowded, on one thread of the CPU.

    python docs/compare_crowded.py --batch 16 --objects 1500

The demo's detector, not compiled; the steps take turns, and what counts is processor time.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

from casc.bench.batch import Load, made_up_batch
from casc.data.batch import Batch
from casc.device.compute import Compute
from casc.model.detector import init, trainable
from casc.model.losses import mean_losses
from casc.model.steps import make_loss_step
from casc.recipes.demo import demo

CANVAS = 192, 256


def main() -> None:
    """Compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--objects", type=int, default=1500, help="on the crowded image")
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    recipe = demo()
    image = replace(recipe.image, short=CANVAS[0], long=CANVAS[1])
    step = make_loss_step(recipe.model, image, CANVAS, Compute(compile=False))
    params, buffers = init(recipe.model, torch.Generator().manual_seed(0))
    for value in trainable(recipe.model, params).values():
        value.requires_grad_()

    def made(objects: int, capacity: int) -> Batch:
        load = Load(canvas=CANVAS, batch=settings.batch, objects=objects, capacity=capacity)
        return made_up_batch(load, recipe.model.classes)

    few, full = made(8, settings.objects), made(settings.objects, settings.objects)
    crowd, others = full._asdict(), few._asdict()
    mixed = {k: torch.cat([crowd[k][:1], v[1:]]) for k, v in others.items() if v is not None}
    one = few._replace(**mixed)
    batches = {"8 objects each": made(8, 8), "the same, more room": few, "one crowded": one}
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for _ in range(settings.rounds + 1):
        for name, batch in batches.items():
            start = time.process_time()
            mean_losses(step(params, buffers, batch))[0].backward()
            seconds[name].append(time.process_time() - start)
            for value in params.values():
                value.grad = None
    usual = seconds["8 objects each"][1:]
    for name, times in seconds.items():
        times = times[1:]  # the first warms up
        # Of each round by itself: what else runs on the machine slows a round as a whole.
        ratios = [own / others for own, others in zip(times, usual, strict=True)]
        mib = sum(column.nbytes for column in batches[name] if column is not None) / 2**20
        print(
            f"{name}: {statistics.median(times):.2f} s, {statistics.median(ratios):.2f} times"
            f" ({min(ratios):.2f} to {max(ratios):.2f}), batch of {mib:.1f} MiB"
        )


if __name__ == "__main__":
    main()
