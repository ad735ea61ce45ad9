"""coco_20e with a ResNet-101.

What to type:

    torchrun --standalone --nproc-per-node 8 -m casc.recipes.coco_r101_20e --data SHARDS

What it costs: as many steps as coco_20e, of a larger network. At best 0.46 hours on eight H100,
by arithmetic (docs/recipes.md); not yet timed.

What to expect: box AP 43.4, mask AP 37.8 on val2017, published by MMDetection's model zoo
(Cascade Mask R-CNN, R-101-FPN, pytorch, 20e). Not yet measured with casc.
"""

from dataclasses import replace

from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_20e import coco_20e
from .coco_r101_1x import coco_r101_1x


def coco_r101_20e() -> Recipe:
    """coco_20e, deeper."""
    return replace(coco_20e(), name="coco_r101_20e", model=coco_r101_1x().model)


if __name__ == "__main__":
    launch(coco_r101_20e(), __doc__)
