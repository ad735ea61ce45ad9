"""ConvNeXt-T for 36 epochs: AdamW with layer-wise rates, drop path, GIoU, four-convolution heads.

What to type:

    torchrun --standalone --nproc-per-node 8 -m casc.recipes.coco_convnext_t_3x --data SHARDS

The backbone is timm's convnext_tiny (`pip install 'casc[timm]'`), which starts from ImageNet-1k
weights that timm downloads once: timm:convnext_tiny.fb_in1k. AdamW at 2e-4 for 16 images, weight
decay 0.05 on all but norms and biases, 0.7 of the rate from layer to layer, drop path 0.4, 1,000
steps of warm-up, drops after epochs 27 and 33. Box heads have four convolutions with a group norm
and one fully connected layer, regress a box for each class, and their boxes' loss is GIoU times 10.

Four things differ from the source: its box heads normalise over the batches of all devices where
ours do so over groups of channels, its maps have a layer norm each before the FPN, half of its
images are also cropped at random, and shorter sides are one of 480, 512, ... 800 pixels where here
they are any from 480 to 800.

What it costs: 263,880 steps of 16 images, 3 times as many as coco_1x. At best 1.4 hours on eight
H100, by arithmetic (docs/recipes.md); not yet timed.

What to expect: box AP 50.3, mask AP 43.6 on val2017, published by MMDetection (configs/convnext,
Cascade Mask R-CNN ConvNeXt-T) for what this follows. Not yet measured with casc.
"""

from dataclasses import replace

from casc.model.timm_backbone import TimmConfig
from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_3x import coco_3x


def coco_convnext_t_3x() -> Recipe:
    """coco_3x with another backbone, its optimizer, and heavier box heads."""
    recipe = coco_3x()
    model = recipe.model
    return replace(
        recipe,
        name="coco_convnext_t_3x",
        init="timm:convnext_tiny.fb_in1k",
        optim=replace(
            recipe.optim,
            kind="adamw",
            lr=2e-4,
            weight_decay=0.05,
            decay_vectors=False,
            layer_decay=0.7,
        ),
        schedule=replace(recipe.schedule, warmup_steps=1000),
        image=replace(recipe.image, train_short=(480, 800)),
        model=replace(
            model,
            backbone=TimmConfig("convnext_tiny", drop_path=0.4),
            box_head=replace(
                model.box_head,
                convs=4,
                fcs=1,
                norm="gn",
                class_specific=True,
                loss="giou",
                box_weight=10.0,
            ),
        ),
    )


if __name__ == "__main__":
    launch(coco_convnext_t_3x(), __doc__)
