r"""Large-scale jitter: 100 epochs on windows of 1024 x 1024 of images at 0.1 to 2 times that size.

What to type, on 32 devices of four machines (docs/launching.md has other ways):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        -m casc.recipes.coco_lsj --data SHARDS

An image is resized to fit a square of 1024 times a factor from 0.1 to 2; of what is larger than
1024, a window is seen, and what is smaller is padded (Ghiasi et al., 2021). Boxes of cut objects
shrink to what shows of them, and objects of which nothing shows are dropped. Evaluation sees
whole images at 800/1333. All images are trained on one canvas, so there is less to compile.
Learning rate 0.1 for 64 images, weight decay 4e-5 and drops after epochs 88 and 96 are those of
MMDetection's lsj_100e; with fewer devices the rate is scaled down.

What it costs: 1,832 steps of 64 images an epoch, 183,200 in all.

What to expect: no published counterpart (MMDetection and Detectron2 publish Mask R-CNN with it).
Not yet measured with casc.
"""

from dataclasses import replace

from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_1x import coco_1x


def coco_lsj() -> Recipe:
    """coco_1x, with jitter and the long schedule that pays with it."""
    recipe = coco_1x()
    return replace(
        recipe,
        name="coco_lsj",
        epochs=100,
        evaluate_every=4,
        optim=replace(recipe.optim, lr=0.1, reference_batch=64, weight_decay=4e-5),
        schedule=replace(recipe.schedule, drops=(88, 96), warmup_ratio=0.067),
        image=replace(recipe.image, jitter=(0.1, 2.0), jitter_size=1024),
    )


if __name__ == "__main__":
    launch(coco_lsj(), __doc__)
