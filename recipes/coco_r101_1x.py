"""coco_1x with a ResNet-101.

What to type:

    torchrun --standalone --nproc-per-node 8 -m casc.recipes.coco_r101_1x --data SHARDS

The backbone starts from torchvision's ResNet-101 (IMAGENET1K_V1), which is downloaded once and
checked against the hash in its name.

What it costs: as many steps as coco_1x, of a larger network. At best 0.28 hours on eight H100, by
arithmetic (docs/recipes.md); not yet timed.

What to expect: box AP 42.9, mask AP 37.3 on val2017, published by MMDetection's model zoo
(Cascade Mask R-CNN, R-101-FPN, pytorch, 1x). Not yet measured with casc.
"""

from dataclasses import replace

from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_1x import coco_1x


def coco_r101_1x() -> Recipe:
    """coco_1x, deeper."""
    recipe = coco_1x()
    backbone = replace(recipe.model.backbone, depth=101)
    return replace(recipe, name="coco_r101_1x", model=replace(recipe.model, backbone=backbone))


if __name__ == "__main__":
    launch(coco_r101_1x(), __doc__)
