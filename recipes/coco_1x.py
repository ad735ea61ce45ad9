"""Cascade Mask R-CNN, ResNet-50 FPN, 12 epochs of COCO: the reference's configuration.

What to type, on a machine with eight devices or with one:

    torchrun --standalone --nproc-per-node 8 -m casc.recipes.coco_1x --data SHARDS
    python -m casc.recipes.coco_1x --data SHARDS

SHARDS is made by `data_tools shard COCO --out SHARDS`. The backbone starts from torchvision's
ResNet-50 (IMAGENET1K_V1), which is downloaded once.

What it costs: 7,330 steps of 16 images an epoch, 87,960 in all. At best 0.23 hours on eight H100,
by arithmetic (docs/recipes.md); not yet timed.

What to expect: box AP 41.2, mask AP 36.0 on val2017, measured with MMDetection 2.13 on eight
GPUs with this configuration. Not yet measured with casc.
"""

from casc.train.launch import launch
from casc.train.recipe import Recipe


def coco_1x() -> Recipe:
    """The reference's settings, which are the defaults of every room."""
    return Recipe(name="coco_1x")


if __name__ == "__main__":
    launch(coco_1x(), __doc__)
