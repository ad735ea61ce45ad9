"""Where a run begins: from weights, or from where an earlier run of the folder stopped."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import casc
from casc import detector
from casc.config import differences, from_json, to_json
from casc.data.index import Index
from casc.errors import UserError
from casc.recipe import FREE_FIELDS, IMAGENET, RANDOM, Facts, Recipe
from casc.resnet import PREFIX
from casc.train import checkpoint
from casc.train.distributed import Ranks, from_main
from casc.train.state import State, new_state
from casc.weights.read import check_classes, fit_weights, imagenet_weights, read_weights

RECIPE = "recipe.json"
CHECKPOINTS = "checkpoints"


def fresh_state(
    recipe: Recipe, index: Index, device: torch.device, memory_format: torch.memory_format
) -> tuple[State, list[str]]:
    """A state at step 0 with the recipe's starting weights, and what there is to say of them.

    Raises:
        UserError: the weights can't be had, or nothing of them fits the model.
    """
    params, buffers = detector.init(recipe.model, torch.Generator().manual_seed(recipe.seed))
    notes = []
    if recipe.init != RANDOM:
        if recipe.init == IMAGENET:
            weights = imagenet_weights(recipe.model.backbone.depth)
        else:
            weights = read_weights(recipe.init)
        params, buffers, fit = fit_weights(params, buffers, weights.tensors)
        if not fit.matched:
            raise UserError(
                f"--init {recipe.init}: none of its {len(weights.tensors)} tensors fits the model"
            )
        lost = [n for n in (*fit.missing, *(n for n, _, _ in fit.reshaped)) if n.startswith(PREFIX)]
        if recipe.init == IMAGENET and lost:
            raise UserError(
                f"--init imagenet: {weights.source} doesn't fit the backbone at {lost[0]}"
            )
        notes.append(f"weights from {weights.source}: {fit}")
        if not fit.reshaped:
            try:
                check_classes(weights, index.categories, str(recipe.data))
            except UserError as error:
                notes.append(f"warning: {error}; what it knew of classes doesn't carry over")
    scaled = recipe.dtype == "float16"
    state = new_state(recipe.model, params, buffers, device, memory_format, scaled=scaled)
    return state, notes


def resumed_state(
    recipe: Recipe,
    index: Index,
    derived: Facts,
    ranks: Ranks,
    device: torch.device,
    memory_format: torch.memory_format,
) -> tuple[State | None, list[str]]:
    """The state of the newest whole checkpoint in the run's folder, if there is one.

    Returns:
        The state or None, and what there is to say.

    Raises:
        UserError: the folder has a run that this recipe doesn't continue.
    """
    found, notes = from_main(_find(recipe) if ranks.main else None, ranks)
    if found is None:
        return None, notes
    loaded = checkpoint.load(found)
    _check_recipe(recipe, found)
    _check_position(recipe, index, derived, loaded.position)
    params, buffers = detector.init(recipe.model, torch.Generator().manual_seed(recipe.seed))
    scaled = recipe.dtype == "float16"
    state = new_state(recipe.model, params, buffers, device, memory_format, scaled=scaled)
    state = checkpoint.restore(state, loaded, found)
    return state, [*notes, f"continuing from {found} at step {state.step:,}"]


def data_position(recipe: Recipe, index: Index, derived: Facts, step: int) -> dict[str, Any]:
    """What resuming needs beside tensors: which samples the steps so far have seen."""
    return {
        "step": step,
        "images_per_step": derived.images_per_step,
        "world": derived.images_per_step // recipe.images_per_rank,
        "batch": recipe.images_per_rank,
        "workers": max(recipe.loading.workers, 1),
        "window": recipe.loading.window,
        "seed": recipe.seed,
        "data": fingerprint(index, recipe.train_split),
    }


def weights_metadata(recipe: Recipe, index: Index, step: int) -> dict[str, str]:
    """What a file of weights says about itself."""
    classes = [{"id": category.id, "name": category.name} for category in index.categories]
    return {
        "format": "casc-weights",
        "version": "1",
        "recipe": json.dumps(to_json(recipe)),
        "classes": json.dumps(classes),
        "step": str(step),
        "casc": casc.__version__,
        "torch": torch.__version__,
    }


def fingerprint(index: Index, split: str) -> str:
    """A hash that changes when the shards to train on do, or the classes."""
    shards = [
        (s.name, s.bucket, s.samples, s.sha256) for s in index.splits[split].shards if s.train
    ]
    classes = [(category.id, category.name) for category in index.categories]
    return hashlib.sha256(json.dumps([classes, shards]).encode()).hexdigest()[:16]


def _find(recipe: Recipe) -> tuple[Path | None, list[str]]:
    folder = recipe.folder
    if recipe.resume == "never" and (folder / RECIPE).exists():
        raise UserError(
            f"--resume never: {folder} already has a run; choose another --out, or delete it"
        )
    notes: list[str] = []
    found = checkpoint.newest(folder / CHECKPOINTS, lambda text: notes.append(f"warning: {text}"))
    if found is None and notes:
        raise UserError(
            f"{folder}: no checkpoint is whole, so the run can't go on ({notes[0]});"
            " choose another --out, or delete the folder to start anew"
        )
    if found is None and recipe.resume == "must":
        raise UserError(f"--resume must: {folder / CHECKPOINTS} has no checkpoint")
    return found, notes


def _check_recipe(recipe: Recipe, found: Path) -> None:
    """Refuse to continue with settings that change what is learnt."""
    before = from_json(Recipe, checkpoint.recipe_of(found), str(found))
    free = FREE_FIELDS | ({"epochs"} if recipe.schedule.kind == "step" else set())
    for name, (old, new) in differences(to_json(before), to_json(recipe)).items():
        if name not in free and not name.startswith("loading."):
            flag = name.replace("_", "-")
            raise UserError(
                f"--{flag}: the run in {recipe.folder} has {old}, now it is {new}; leave it as it"
                " was to continue that run, or choose another --out for a new one"
            )


def _check_position(recipe: Recipe, index: Index, derived: Facts, position: dict[str, Any]) -> None:
    """Refuse to continue where the steps so far would mean other samples."""
    now = data_position(recipe, index, derived, position["step"])
    within_epoch = position["step"] % derived.steps_per_epoch != 0
    for name, flag, always in (
        ("data", "--data", True),
        ("images_per_step", "--batch or the number of processes", True),
        ("world", "the number of processes", False),
        ("workers", "--loading.workers", False),
        ("window", "--loading.window", False),
    ):
        if (always or within_epoch) and now[name] != position[name]:
            raise UserError(
                f"{flag}: the run in {recipe.folder} stopped at step {position['step']} with"
                f" {name} {position[name]}, now it is {now[name]}; it must be the same"
                + ("" if always else " in the middle of an epoch")
                + ", or choose another --out for a new run"
            )
