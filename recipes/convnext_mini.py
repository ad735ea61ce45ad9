"""A small ConvNeXt on a few images, for a CPU: how a backbone of timm is used.

What to type, for any data set in COCO's layout and with COCO's 80 classes:

    data_tools shard COCO --out shards
    python -m casc.recipes.convnext_mini --data shards

coco_mini with timm's convnext_atto (`pip install 'casc[timm]'`) in place of its ResNet-50, with
drop path, AdamW and rates that fall from layer to layer. It starts from random weights, so nothing
is downloaded; `--init timm:convnext_atto.d2_in1k` starts from ImageNet's, and
`--model.backbone.name NAME` takes any other network, such as convnextv2_atto or resnet18.

What it costs: has not been timed; less than coco_mini, whose backbone is six times as large.

What to expect: a falling loss and hardly any AP, as with coco_mini. Not yet measured with casc.
"""

from dataclasses import replace

from casc.model.timm_backbone import TimmConfig
from casc.train.launch import launch
from casc.train.recipe import Recipe

from .coco_mini import coco_mini


def convnext_mini() -> Recipe:
    """coco_mini with a backbone of timm, and the optimizer that suits it."""
    recipe = coco_mini()
    return replace(
        recipe,
        name="convnext_mini",
        optim=replace(
            recipe.optim,
            kind="adamw",
            lr=1e-3,
            weight_decay=0.05,
            decay_vectors=False,
            layer_decay=0.9,
        ),
        model=replace(recipe.model, backbone=TimmConfig("convnext_atto", drop_path=0.1)),
    )


if __name__ == "__main__":
    launch(convnext_mini(), __doc__)
