"""Every recipe at small size: ten compiled steps, stopped and gone on with, and used afterwards."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.export import ExportedProgram

from casc.checkpoints.model import Trained, load_trained
from casc.cli import main as cli
from casc.data.stream import TrainLoaderConfig
from casc.export import files
from casc.export.program import infer
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

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("[a-z]*.py"))
SIDE, STEPS, STOP = 64, 10, 5
PICTURE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def module_of(name: str) -> Any:
    return importlib.import_module(f"casc.recipes.{name}")


def recipe_of(name: str) -> Recipe:
    return getattr(module_of(name), name)()


def small(recipe: Recipe) -> Recipe:
    """The recipe with few pixels, channels, layers and RoIs, and two short epochs.

    All else is its own: optimizer, schedule, augmentation, losses, norms, averages, what is
    frozen, what is added up.
    """
    model, image = recipe.model, recipe.image
    accumulate = min(recipe.accumulate, 2)
    least = None
    if image.train_short is not None:
        least = tuple(SIDE * short // image.short for short in image.train_short)
    square = image.jitter_size if image.jitter is None else SIDE
    return replace(
        recipe,
        epochs=2 * accumulate,
        accumulate=accumulate,
        batch=2,
        device="cpu",
        schedule=replace(recipe.schedule, drops=(accumulate,)),
        image=replace(image, short=SIDE, long=SIDE, train_short=least, jitter_size=square),
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
def steps() -> dict[str, LossStep]:
    """Steps that are compiled already: many recipes differ in nothing that is compiled."""
    return {}


@pytest.fixture
def captured(steps, monkeypatch) -> None:
    """Compile by capture alone, the whole step as one graph; making kernels takes minutes."""

    def compute_of(*args, **settings):
        compute, notes = choose_compute(*args, **{**settings, "compile": False})
        return compute._replace(compile=True, backend="eager"), notes

    def step_of(*settings):
        return steps.setdefault(repr(settings), make_loss_step(*settings))

    monkeypatch.setattr(opening, "choose_compute", compute_of)
    monkeypatch.setattr(step, "make_loss_step", step_of)


@pytest.fixture(scope="module")
def programs() -> dict[str, ExportedProgram]:
    """What is exported already: many recipes differ in nothing that inference sees."""
    return {}


@pytest.mark.usefixtures("captured")
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_goes_on_and_is_used(name, write_shards, tmp_path, programs, monkeypatch):
    data = tmp_path / "shards"
    write_shards(data, {"train2017": [(0, 12, True)], "val2017": [(0, 3, True)]})
    recipe = run_of(name, data, tmp_path / "whole")
    if name == "finetune":
        before = run_of("coco_1x", data, tmp_path / "before")
        train(replace(before, max_steps=1))
        recipe = module_of(name).fitted(replace(recipe, init=str(before.folder)))
    whole = train(recipe).state
    assert whole.step == STEPS

    # As a run that was killed before its last checkpoint.
    stopped = replace(recipe, out=tmp_path / "stopped")
    last = f"step-{STEPS:08}"
    shutil.copytree(recipe.folder, stopped.folder, ignore=shutil.ignore_patterns(last))
    with torch.compiler.set_stance("fail_on_recompile"):
        state = train(stopped).state
    for ours, theirs in zip(state[1:], whole[1:], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value.equal(theirs[key]), key
            assert value.isfinite().all(), key

    use("eval", stopped.folder, data, "--device", "cpu", "--loading.workers", 0)
    trained = load_trained(str(stopped.folder))
    # What only training looks at.
    image = replace(trained.image, train_short=None, jitter=None, copy_paste=0.0)
    key = repr((trained.model, image))
    if key in programs:
        assert_infers(programs[key], trained)
    else:
        programs[key] = export(stopped.folder, tmp_path, monkeypatch)


def export(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> ExportedProgram:
    """Have `casc export` write a run's program, and compare that with the run's own inference."""
    plain, made = files.plain, []

    def keep(captured):
        made.append(plain(captured))
        return made[0]

    monkeypatch.setattr(files, "plain", keep)
    Image.fromarray(PICTURE).save(out / "picture.png")
    use("export", folder, out / "run.pt2", "--format", "pt2", "--images", out / "picture.png")
    assert (out / "run.pt2").exists()
    return made[0]


def assert_infers(program: ExportedProgram, trained: Trained) -> None:
    """Another run's program of the same detector, given this run's weights, finds the same."""
    tensors = {**trained.params, **trained.buffers}
    for name, value in tensors.items():
        program.state_dict[name.replace(".", "__")].copy_(value)
    settings = trained.model, trained.image, (SIDE, SIDE)
    pixels, size = torch.from_numpy(PICTURE)[None], torch.tensor([[SIDE, SIDE]])
    with torch.no_grad():
        expected = infer(trained.params, trained.buffers, *settings, pixels, size)
        found = program.module()(pixels, size)
    for ours, theirs in zip(found, expected[:5], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def run_of(name: str, data: Path, out: Path) -> Recipe:
    """A recipe's small form from random weights, in a file where it would download others."""
    recipe = replace(
        small(recipe_of(name)), data=data, out=out, compile=True,
        max_steps=STEPS, save_every=0, save_steps=STOP, evaluate_every=0,
    )  # fmt: skip
    if recipe.init == RANDOM:
        return recipe
    params, buffers = detector.init(recipe.model, torch.Generator().manual_seed(7))
    weights = out.with_suffix(".safetensors")
    save_file(params | buffers, weights)
    return replace(recipe, init=str(weights))


def use(*command: object) -> None:
    """Run a command of casc, which has to succeed."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in command])
    assert not stop.value.code
