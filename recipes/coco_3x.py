"""coco_1x for 36 epochs with multi-scale training.

What to type:

    torchrun --standalone --nproc-per-node 8 -m casc.recipes.coco_3x --data SHARDS

Each image's shorter side is any of 640 to 800 pixels, drawn afresh every epoch, and the longer
one 1333 at most; drops of the learning rate come after epochs 27 and 33. So does MMDetection's
mstrain_3x. Canvases are those of coco_1x, so nothing more is compiled, and a small image costs
as much as a large one.

What it costs: 263,880 steps of 16 images, 3 times coco_1x. At best 0.7 hours on eight H100, by
arithmetic (docs/recipes.md); not yet timed.

What to expect: box AP 44.3, mask AP 38.5 on val2017, published by Detectron2's model zoo for its
Cascade R-CNN R50-FPN 3x: 270,000 steps of 16 images, sides of 640 to 800 in steps of 32, and
conventions of its own. Not yet measured with casc.
"""

from dataclasses import replace

from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_1x import coco_1x


def coco_3x() -> Recipe:
    """coco_1x, longer and at several scales."""
    recipe = coco_1x()
    return replace(
        recipe,
        name="coco_3x",
        epochs=36,
        schedule=replace(recipe.schedule, drops=(27, 33)),
        image=replace(recipe.image, train_short=(640, 800)),
    )


if __name__ == "__main__":
    launch(coco_3x(), __doc__)
