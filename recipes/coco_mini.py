"""The full ResNet-50 model on a few images, small, on a CPU: a trial of the whole way.

What to type, for any data set in COCO's layout and with COCO's 80 classes:

    data_tools shard COCO --out shards
    python -m casc.recipes.coco_mini --data shards

Images are reduced to a shorter side of 256 pixels. The detector starts from random weights,
with group norm, so nothing has to be downloaded. Not compiled, because each of the six
canvases would take minutes to compile on a CPU; `--compile` pays on longer runs.

What it costs: about 9 CPU-seconds a step of 2 images (AVX-512, no AMX), so some 20 minutes on
two cores for 128 images.

What to expect: a falling loss and hardly any AP; 128 images don't make a detector.
"""

from dataclasses import replace

from casc.train.launch import launch
from casc.train.recipe import RANDOM, Recipe

from .coco_1x import coco_1x


def coco_mini() -> Recipe:
    """coco_1x from scratch: smaller images, group norm, few epochs."""
    recipe = coco_1x()
    model = recipe.model
    return replace(
        recipe,
        name="coco_mini",
        init=RANDOM,
        epochs=4,
        dtype="float32",
        compile=False,
        evaluate_every=4,
        log_every=8,
        optim=replace(recipe.optim, lr=0.08, clip_norm=10.0),
        schedule=replace(recipe.schedule, kind="cosine", warmup_steps=64, warmup_limit=0.25),
        image=replace(recipe.image, short=256, long=416),
        model=replace(
            model,
            backbone=replace(model.backbone, norm="gn", frozen_stages=-1),
            fpn=replace(model.fpn, norm="gn"),
            mask_head=replace(model.mask_head, norm="gn"),
        ),
    )


if __name__ == "__main__":
    launch(coco_mini(), __doc__)
