r"""coco_lsj for 400 epochs with copy-paste: objects of one image on top of another.

What to type, on 32 devices of four machines (docs/launching.md has other ways):

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 \
        -m casc.recipes.coco_lsj_copypaste --data SHARDS

Each image gets a random part of the objects of its batch's next one, both as large-scale jitter
made them (Ghiasi et al., 2021). Masks and boxes of what lies under them lose what is hidden, to the
pixel, and objects of which nothing is left are dropped. All is done on the device, in the step.

What it costs: 732,800 steps of 64 images, 4 times coco_lsj, with room for twice as many objects.
At best 13 hours on eight H100, by arithmetic (docs/recipes.md); not yet timed.

What to expect: box AP 48.3, mask AP 42.4 on val2017, published by Ghiasi et al. for Mask R-CNN
R50-FPN, 400 epochs from scratch; batch size and optimiser are their own. Not yet measured with
casc.
"""

from dataclasses import replace

from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_lsj import coco_lsj


def coco_lsj_copypaste() -> Recipe:
    """coco_lsj, four times as long, with copy-paste."""
    recipe = coco_lsj()
    return replace(
        recipe,
        name="coco_lsj_copypaste",
        epochs=400,
        evaluate_every=16,
        schedule=replace(recipe.schedule, drops=(355, 385)),
        image=replace(recipe.image, copy_paste=1.0),
    )


if __name__ == "__main__":
    launch(coco_lsj_copypaste(), __doc__)
