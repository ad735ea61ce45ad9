"""Go on from a trained detector with data of your own, of any classes.

What to type, for a data set in COCO's format:

    data_tools shard DATA --out shards
    python -m casc.recipes.finetune --init CHECKPOINT --data shards

CHECKPOINT is a run of casc, a file that `casc convert` made, or a checkpoint of the reference. The
detector and its image sizes are those that the weights were trained with, the classes are the
shards'; flags change both. Classes that the weights know by name keep what they know, others
begin afresh, and the run begins with a report of it. Other weights than a detector's have
nothing to fine-tune: use coco_1x.

What differs from coco_1x: 8 epochs with a drop after 7 and half the learning rate, 0.01 for 16
images a step, as small data sets want. Much depends on the data. Flags to try first:

    --model.backbone.frozen-stages 4      nothing of the backbone learns, for very little data
    --optim.backbone-lr 0.1               or it learns slowly
    --epochs, --schedule.drops, --optim.lr

What to expect: no published counterpart. docs/finetuning.md has an example with figures.
"""

from dataclasses import replace
from pathlib import Path

from casc.checkpoints.model import load_trained
from casc.data.index import read_index
from casc.errors import UserError
from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_1x import coco_1x


def finetune() -> Recipe:
    """coco_1x from the weights of its own run, shorter and slower."""
    recipe = coco_1x()
    return replace(
        recipe,
        name="finetune",
        init="runs/coco_1x",
        epochs=8,
        optim=replace(recipe.optim, lr=0.01),
        schedule=replace(recipe.schedule, drops=(7,), warmup_steps=100),
    )


def fitted(recipe: Recipe) -> Recipe:
    """The recipe with the detector of its weights and the number of classes of its data."""
    if recipe.init == finetune().init and not Path(recipe.init).exists():
        raise UserError(
            f"--init {recipe.init}: isn't there; give --init a run, a checkpoint or a published"
            " one, such as mmdet:cascade_mask_rcnn_r50_fpn_1x_coco (`casc weights` lists them)"
        )
    trained = load_trained(recipe.init)
    classes = len(read_index(recipe.data, recipe.loading).categories)
    return replace(recipe, model=replace(trained.model, classes=classes), image=trained.image)


def main(args: list[str] | None = None) -> None:
    """Fine-tune."""
    launch(finetune(), __doc__, args, fitted=fitted)


if __name__ == "__main__":
    main()
