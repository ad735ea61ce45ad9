r"""ViTDet: a plain ViT-B with windows and a simple pyramid, 100 epochs of large-scale jitter.

What to type, on 32 devices of four machines (docs/launching.md has other ways):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        -m casc.recipes.coco_vitdet_b --data SHARDS

Li et al., 2022, with a cascade. The backbone starts from MAE's weights, which timm downloads once
(`pip install 'casc[timm]'`): timm:vit_base_patch16_224.mae. Blocks attend within windows of 14 x 14
patches, every third to the whole image, with relative positions that begin at 0. The FPN's place is
taken by transposed convolutions of the last block's output. FPN and heads have layer norm, the RPN
two convolutions, the box heads four and one fully connected layer; one mask head serves all stages.
AdamW at 1e-4 for 64 images, weight decay 0.1, 0.7 of the rate from block to block, drop path 0.1,
250 steps of warm-up, drops after epochs 89 and 96 (of Detectron2's steps, after 88.9 and 96.3 %).

What differs from Detectron2's: it lets biases decay, where here they are spared as norms are. It
mirrors an image before padding it with the mean colour, which isn't a part of the image; here
padding is grey, mirrored too, and a part of it, as with coco_lsj. In its cascade all stages' losses
count alike, a third of their gradient reaches the features, and later stages train on the first
one's sample, moved; here they count 1, 0.5 and 0.25, and each draws its own. And of what
docs/recipes.md says of coco_lsj, all that isn't about norms, padding and the cascade.

What it costs: 1,832 steps of 64 images an epoch, 183,200 in all. `--model.backbone.recompute`
makes room for larger batches. At best 9.9 hours on eight H100, by arithmetic (docs/recipes.md);
not yet timed.

What to expect: box AP 54.0, mask AP 46.7 on val2017, published by Detectron2 (projects/ViTDet,
Cascade Mask R-CNN ViT-B) for what this follows. Not yet measured with casc.
"""

from dataclasses import replace

from casc.model.vit import ViTConfig
from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_1x import coco_1x


def coco_vitdet_b() -> Recipe:
    """coco_1x with ViTDet's backbone, heads, optimizer, schedule and jitter."""
    recipe = coco_1x()
    model = recipe.model
    return replace(
        recipe,
        name="coco_vitdet_b",
        init="timm:vit_base_patch16_224.mae",
        epochs=100,
        evaluate_every=4,
        optim=replace(
            recipe.optim,
            kind="adamw",
            lr=1e-4,
            reference_batch=64,
            weight_decay=0.1,
            decay_vectors=False,
            layer_decay=0.7,
        ),
        schedule=replace(recipe.schedule, drops=(89, 96), warmup_steps=250),
        image=replace(
            recipe.image, short=1024, long=1024, jitter=(0.1, 2.0), jitter_size=1024, antialias=True
        ),
        model=replace(
            model,
            backbone=ViTConfig(),
            fpn=replace(model.fpn, norm="ln"),
            rpn=replace(model.rpn, convs=2, train_proposals=1000, beta=1e-3),
            box_head=replace(model.box_head, convs=4, fcs=1, norm="ln", beta=1e-3),
            inference=replace(model.inference, average="probabilities"),
            mask_head=replace(model.mask_head, norm="ln", stages="first"),
        ),
    )


if __name__ == "__main__":
    launch(coco_vitdet_b(), __doc__)
