"""Recipes at small size: ten compiled steps, stopped and gone on with, and used afterwards."""

import importlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from casc.cli import main as cli
from casc.data.stream import TrainLoaderConfig
from casc.model import detector
from casc.model.backbone import Backbone
from casc.model.choose_compute import choose_compute
from casc.model.resnet import ResNetConfig
from casc.model.steps import LossStep, make_loss_step
from casc.model.timm_backbone import TimmConfig
from casc.model.vit import ViTConfig
from casc.train import opening, step
from casc.train.loop import train
from casc.train.recipe import RANDOM, Recipe

# Of those that share a graph one compiles it; other recipes haven't been tried here yet.
NAMES = ("coco_1x", "coco_20e", "coco_ema", "convnext_mini")
EXPORTED = ("coco_1x", "convnext_mini")
"""A ResNet, and a network of timm."""
SIDE, STEPS = 64, 10


def recipe_of(name: str) -> Recipe:
    return getattr(importlib.import_module(f"casc.recipes.{name}"), name)()


def small(recipe: Recipe) -> Recipe:
    """The recipe with few pixels, channels, layers and RoIs, and two short epochs.

    All else is its own: optimizer, schedule, augmentation, losses, norms, averages, what is
    frozen, what is added up.
    """
    model, image = recipe.model, recipe.image
    least = None
    if image.train_short is not None:
        least = tuple(SIDE * short // image.short for short in image.train_short)
    return replace(
        recipe,
        epochs=2,
        accumulate=min(recipe.accumulate, 2),
        batch=2,
        device="cpu",
        schedule=replace(recipe.schedule, drops=(1,)),
        image=replace(image, short=SIDE, long=SIDE, train_short=least, jitter_size=SIDE),
        loading=TrainLoaderConfig(workers=0, window=4),
        model=replace(
            model,
            classes=2,
            backbone=small_backbone(model.backbone),
            fpn=replace(model.fpn, channels=32),
            rpn=replace(
                model.rpn, channels=32, samples=32, train_pre_nms=50, train_proposals=40,
                test_pre_nms=50, test_proposals=20,
            ),
            box_head=replace(model.box_head, samples=16, channels=32),
            mask_head=replace(model.mask_head, convs=1, channels=32),
            inference=replace(model.inference, detections=10),
        ),
    )  # fmt: skip


def small_backbone(backbone: Backbone) -> Backbone:
    match backbone:
        case ResNetConfig():
            # A first convolution of stride 2 is a bottleneck's choice.
            depth = 50 if backbone.stride_in_1x1 else 18
            return replace(backbone, depth=depth, width=32)
        case TimmConfig():
            return replace(backbone, name="test_convnext")
        case ViTConfig():
            return replace(
                backbone, channels=32, depth=2, heads=2, grid=3, window=3, global_blocks=(1,),
                relative_grid=4,
            )  # fmt: skip


@pytest.fixture(scope="module")
def made() -> dict[str, LossStep]:
    """Steps that are compiled already: many recipes differ in nothing that is compiled."""
    return {}


@pytest.fixture
def captured(made, monkeypatch) -> None:
    """Compile by capture alone, the whole step as one graph; making kernels takes minutes."""

    def compute_of(*args, **settings):
        compute, notes = choose_compute(*args, **settings)
        return compute._replace(backend="eager", programs=None), notes

    def step_of(*settings):
        return made.setdefault(repr(settings), make_loss_step(*settings))

    monkeypatch.setattr(opening, "choose_compute", compute_of)
    monkeypatch.setattr(step, "make_loss_step", step_of)


@pytest.mark.usefixtures("captured")
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_goes_on_and_is_used(name, write_shards, tmp_path):
    data = tmp_path / "shards"
    write_shards(data, {"train2017": [(0, 20, True)], "val2017": [(0, 3, True)]})
    recipe = replace(
        small(recipe_of(name)), data=data, out=tmp_path / "whole", compile=True,
        compile_backend="aot_eager", max_steps=STEPS, evaluate_every=0,
    )  # fmt: skip
    if recipe.init != RANDOM:  # what it would download
        params, buffers = detector.init(recipe.model, torch.Generator().manual_seed(7))
        save_file(params | buffers, tmp_path / "weights.safetensors")
        recipe = replace(recipe, init=str(tmp_path / "weights.safetensors"))
    whole = train(recipe).state
    assert whole.step == STEPS

    broken = replace(recipe, out=tmp_path / "broken", max_steps=STEPS // 2)
    train(broken)
    state = train(replace(broken, max_steps=STEPS)).state
    for ours, theirs in zip(state[1:], whole[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value.equal(theirs[key]), key
            assert value.isfinite().all(), key

    use("eval", broken.folder, data, "--device", "cpu")
    if name in EXPORTED:
        use("export", broken.folder, tmp_path / "detector.pt2", "--format", "pt2")


def use(*command: object) -> None:
    """Run a command of casc, which has to succeed."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in command])
    assert not stop.value.code
