"""From random weights: group norm everywhere but in the box heads, 73 epochs.

What to type:

    torchrun --standalone --nproc-per-node 8 -m casc.recipes.coco_gn_scratch --data SHARDS

Nothing is pretrained and nothing frozen (He et al., 2019, Rethinking ImageNet Pre-training).
Backbone, FPN and mask heads have group norm. The box heads have two fully connected layers
without a norm, as in coco_1x, where that paper has four convolutions with one. Gradients are
clipped to a norm of 10, for the first steps' sake.

What it costs: 535,090 steps of 16 images, 6 times coco_1x, with a backward pass through all of
the backbone. At best 1.5 hours on eight H100, by arithmetic (docs/recipes.md); not yet timed.

What to expect: no published counterpart (MMDetection and Detectron2 publish Mask R-CNN so). Not
yet measured with casc.
"""

from dataclasses import replace

from casc.train.launch import launch
from casc.train.recipe import RANDOM, Recipe

from .coco_1x import coco_1x


def coco_gn_scratch() -> Recipe:
    """coco_1x without pretrained weights."""
    recipe = coco_1x()
    model = recipe.model
    return replace(
        recipe,
        name="coco_gn_scratch",
        init=RANDOM,
        epochs=73,
        evaluate_every=4,
        optim=replace(recipe.optim, clip_norm=10.0),
        schedule=replace(recipe.schedule, drops=(65, 71), warmup_ratio=0.1),
        model=replace(
            model,
            backbone=replace(model.backbone, norm="gn", frozen_stages=-1),
            fpn=replace(model.fpn, norm="gn"),
            mask_head=replace(model.mask_head, norm="gn"),
        ),
    )


if __name__ == "__main__":
    launch(coco_gn_scratch(), __doc__)
