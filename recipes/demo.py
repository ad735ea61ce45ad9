"""The whole way on a small machine: generate, shard, train, evaluate, draw.

What to type:

    python -m casc.recipes.demo

It generates 1,200 images of overlapping shapes in 5 classes and 100 others to evaluate on,
shards them, trains a ResNet-18 detector with group norm from scratch, evaluates it, and
draws what it finds on images that it has not been trained on. Everything lies in runs/demo.

What it costs: 8 to 9 minutes on two CPU cores.

What to expect: box AP50 0.84, mask AP50 0.84 on the 100 images, measured with casc with the seed as
it is on two CPU cores, torch 2.14.1.
"""

from pathlib import Path

from casc.cli.predict import PredictCommand
from casc.data.index import INDEX_NAME
from casc.data.stream import TrainLoaderConfig
from casc.model.anchors import AnchorConfig
from casc.model.box_head import BoxHeadConfig
from casc.model.detector_config import DetectorConfig, InferenceConfig
from casc.model.fpn import FPNConfig
from casc.model.mask_head import MaskHeadConfig
from casc.model.preprocess import ImageConfig
from casc.model.resnet import ResNetConfig
from casc.model.rpn import RPNConfig
from casc.printing import say
from casc.train.launch import errors_in_one_line, launch
from casc.train.loop import PICTURE
from casc.train.optim import Optim
from casc.train.recipe import RANDOM, Recipe
from casc.train.schedule import Schedule
from data_tools.cli import ShardCommand, SynthCommand

TRAIN, VAL, SIDE = 1200, 100, 224
# Two buckets, tall and wide: canvases without much padding.
ASPECTS = (1.0,)
PICTURES = 12


def demo() -> Recipe:
    """A narrow detector, in float32 and not compiled: compiling would take longer than it saves."""
    return Recipe(
        name="demo",
        data=Path("runs/demo/shards"),
        init=RANDOM,
        epochs=4,
        batch=4,
        dtype="float32",
        compile=False,
        evaluate_every=2,
        save_every=1,
        log_every=20,
        optim=Optim(lr=0.04, reference_batch=4, clip_norm=10.0),
        schedule=Schedule(kind="cosine", warmup_steps=100),
        image=ImageConfig(short=192, long=SIDE),
        loading=TrainLoaderConfig(workers=1),
        model=DetectorConfig(
            classes=5,
            backbone=ResNetConfig(depth=18, norm="gn", frozen_stages=-1, width=32),
            fpn=FPNConfig(channels=64, norm="gn"),
            anchors=AnchorConfig(scale=6.0),
            rpn=RPNConfig(
                channels=64,
                samples=128,
                train_pre_nms=500,
                train_proposals=200,
                test_pre_nms=300,
                test_proposals=100,
            ),
            box_head=BoxHeadConfig(samples=64, channels=256),
            mask_head=MaskHeadConfig(convs=2, channels=64, norm="gn"),
            inference=InferenceConfig(detections=30),
        ),
    )


def make_data(recipe: Recipe) -> None:
    """Generate the images and shard them, unless there are shards already, or others were meant."""
    splits = recipe.train_split, recipe.val_split
    if (recipe.data / INDEX_NAME).exists() or splits != (demo().train_split, demo().val_split):
        return
    images = images_of(recipe)
    # What comes last: a folder that an interrupted run began is made anew.
    if not (images / "annotations").exists():
        SynthCommand(images, train=TRAIN, val=VAL, size=SIDE, classes=recipe.model.classes).run()
    ShardCommand(images, out=recipe.data, aspects=ASPECTS).run()


def draw(recipe: Recipe) -> None:
    """Predict on some of the images that were evaluated on, and say where the pictures are."""
    found = sorted((images_of(recipe) / recipe.val_split).glob("*.jpg"))
    chosen = found[:: max(1, len(found) // PICTURES)][:PICTURES]
    pictures = recipe.folder / "pictures"
    if chosen:
        PredictCommand(str(recipe.folder), tuple(map(str, chosen)), out=pictures).run()
        say(f"look at {pictures.absolute()} and {(recipe.folder / PICTURE).absolute()}")


def images_of(recipe: Recipe) -> Path:
    """Where the generated images are: beside the shards."""
    return recipe.data.absolute().with_name("images")


def main(args: list[str] | None = None) -> None:
    """Run the demo."""
    summary = launch(demo(), __doc__, args, prepare=make_data)
    if summary:
        with errors_in_one_line():
            draw(summary.recipe)


if __name__ == "__main__":
    main()
