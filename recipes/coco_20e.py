"""coco_1x for 20 epochs, with drops of the learning rate after epochs 16 and 19.

What to type:

    torchrun --standalone --nproc-per-node 8 -m casc.recipes.coco_20e --data SHARDS

What it costs: 146,600 steps of 16 images, 5/3 of coco_1x. At best 0.39 hours on eight H100, by
arithmetic (docs/recipes.md); not yet timed.

What to expect: box AP 41.9, mask AP 36.5 on val2017, published by MMDetection's model zoo for
this schedule. Not yet measured with casc.
"""

from dataclasses import replace

from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_1x import coco_1x


def coco_20e() -> Recipe:
    """coco_1x with a longer schedule."""
    recipe = coco_1x()
    return replace(
        recipe, name="coco_20e", epochs=20, schedule=replace(recipe.schedule, drops=(16, 19))
    )


if __name__ == "__main__":
    launch(coco_20e(), __doc__)
