"""coco_1x with a moving average of its weights, which is what is evaluated and used afterwards.

What to type:

    torchrun --standalone --nproc-per-node 8 -m casc.recipes.coco_ema --data SHARDS

After each update the average keeps 0.9998 of itself (less in the first steps), so it spans some
5,000 steps. Training doesn't see it. Checkpoints hold both, and the average is their weights.

What it costs: coco_1x, and one more copy of the weights. At best 0.23 hours on eight H100, by
arithmetic (docs/recipes.md); not yet timed.

What to expect: no published counterpart. Not yet measured with casc.
"""

from dataclasses import replace

from casc.train.ema import Ema
from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_1x import coco_1x


def coco_ema() -> Recipe:
    """coco_1x, averaged."""
    return replace(coco_1x(), name="coco_ema", ema=Ema(decay=0.9998))


if __name__ == "__main__":
    launch(coco_ema(), __doc__)
