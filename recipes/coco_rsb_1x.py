"""coco_1x from ResNet-50 weights of today's training, with AdamW.

What to type:

    torchrun --standalone --nproc-per-node 8 -m casc.recipes.coco_rsb_1x --data SHARDS

The network is coco_1x's. It starts from the weights of "ResNet strikes back" (Wightman et al.,
2021, procedure A1), which timm downloads once (`pip install 'casc[timm]'`): timm:resnet50.a1_in1k.
They are trained on with AdamW at 2e-4 for 16 images and weight decay 0.05, which norms and biases
are spared (MMDetection's spares norms alone). Stem and first stage are frozen, and batch norms keep
their statistics, as in coco_1x.

What it costs: 7,330 steps of 16 images an epoch, 87,960 in all, as coco_1x does; AdamW keeps
twice as much for each parameter as SGD. At best 0.23 hours on eight H100, by arithmetic
(docs/recipes.md); not yet timed.

What to expect: box AP 44.8, mask AP 39.9 on val2017, published by MMDetection
(configs/resnet_strikes_back, Cascade Mask R-CNN R50, 1x). Not yet measured with casc.
"""

from dataclasses import replace

from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_1x import coco_1x


def coco_rsb_1x() -> Recipe:
    """coco_1x with other weights to start from, and the optimizer that suits them."""
    recipe = coco_1x()
    return replace(
        recipe,
        name="coco_rsb_1x",
        init="timm:resnet50.a1_in1k",
        optim=replace(recipe.optim, kind="adamw", lr=2e-4, weight_decay=0.05, decay_vectors=False),
    )


if __name__ == "__main__":
    launch(coco_rsb_1x(), __doc__)
