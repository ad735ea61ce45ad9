r"""Large-scale jitter from scratch: Detectron2's new baselines with a cascade, 100 epochs.

What to type, on 32 devices of four machines (docs/launching.md has other ways):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        -m casc.recipes.coco_lsj --data SHARDS

An image is resized to fit a square of 1024 times a factor from 0.1 to 2, and cropped or padded to
1024 x 1024 (Ghiasi et al., 2021). Nothing is pretrained: there is a norm in backbone, FPN, box and
mask heads, four convolutions in a box head, two in the RPN. Learning rate 0.1 for 64 images, weight
decay 4e-5, and none on norms; with fewer devices the rate is scaled down. docs/recipes.md has
these settings beside Detectron2's, line by line, with what differs: above all group norm for
synchronised batch norm, and three cascade stages for one. Evaluation sees whole images at 800/1333.

What it costs: 1,832 steps of 64 images an epoch, 183,200 in all, on one canvas. More epochs pay:
--epochs 400 --schedule.drops 355 385. At best 3.2 hours on eight H100, by arithmetic
(docs/recipes.md); not yet timed.

What to expect: box AP 44.6, mask AP 40.3 on val2017, published by Detectron2 for Mask R-CNN R50-FPN
with these settings (47.4 and 42.5 after 400 epochs). Not yet measured with casc.
"""

from dataclasses import replace

from casc.train.launch import launch
from casc.train.recipe import RANDOM, Recipe

from .coco_1x import coco_1x


def coco_lsj() -> Recipe:
    """coco_1x with jitter, the norms that training from scratch needs, and the long schedule."""
    recipe = coco_1x()
    model = recipe.model
    return replace(
        recipe,
        name="coco_lsj",
        init=RANDOM,
        epochs=100,
        evaluate_every=4,
        optim=replace(
            recipe.optim, lr=0.1, reference_batch=64, weight_decay=4e-5, decay_vectors=False
        ),
        schedule=replace(recipe.schedule, drops=(88, 96), warmup_ratio=0.067),
        image=replace(
            recipe.image, jitter=(0.1, 2.0), jitter_size=1024, antialias=True, std=(1.0, 1.0, 1.0)
        ),
        model=replace(
            model,
            backbone=replace(model.backbone, norm="gn", frozen_stages=-1, stride_in_1x1=True),
            fpn=replace(model.fpn, norm="gn"),
            rpn=replace(model.rpn, convs=2, train_proposals=1000, beta=1e-3),
            box_head=replace(model.box_head, convs=4, fcs=1, norm="gn", beta=1e-3),
            mask_head=replace(model.mask_head, norm="gn"),
        ),
    )


if __name__ == "__main__":
    launch(coco_lsj(), __doc__)
