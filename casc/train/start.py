"""Where a run begins: from weights, or from where an earlier run of the folder stopped."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import casc
from casc.checkpoints import format as checkpoint
from casc.checkpoints.read import Weights, fit_weights, imagenet_weights, read_weights
from casc.checkpoints.shapes import image_channels
from casc.checkpoints.state import State
from casc.checkpoints.timm_weights import SOURCE, timm_weights
from casc.config import differences, from_json, to_json
from casc.data.index import Category, Index, Split
from casc.data.plan import NO_HISTORY, EpochHistory, Phase
from casc.device.devices import choose_dtype
from casc.distributed import Ranks, from_main
from casc.errors import UserError
from casc.model import detector
from casc.model.resnet import PREFIX, ResNetConfig
from casc.train.derived import Facts, trained_split
from casc.train.optim import moments_of
from casc.train.recipe import IMAGENET, IMAGENET_V2, RANDOM, RESUMABLE_CHANGES, Recipe
from casc.train.run_lock import check_free
from casc.train.schedule import warmup_length
from casc.train.state import new_state
from casc.train.transfer import check_conventions, transfer

RECIPE = "recipe.json"
CHECKPOINTS = "checkpoints"


def fresh_state(
    recipe: Recipe, index: Index, device: torch.device, memory_format: torch.memory_format
) -> tuple[State, list[str]]:
    """A state at step 0 with the recipe's starting weights, and what there is to say of them.

    Raises:
        UserError: the weights can't be had, or nothing of them fits the model.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    params, buffers = detector.init(recipe.model, generator, recipe.image.channels)
    notes: list[str] = []
    weights = pretrained = _pretrained_backbone(recipe)
    if pretrained is not None:
        notes = check_conventions(recipe, pretrained)
        params, buffers, fit = fit_weights(params, buffers, pretrained.tensors)
        lost = [n for n in (*fit.missing, *(n for n, _, _ in fit.reshaped)) if n.startswith(PREFIX)]
        # ViTDet adds these to whatever it was pretrained with.
        lost = [name for name in lost if ".rel_pos_" not in name] + fit.unused
        if lost:
            raise UserError(
                f"--init {recipe.init}: {pretrained.source} doesn't fit the backbone at {lost[0]};"
                " use weights of the network that --model.backbone describes"
            )
        notes.append(f"weights from {pretrained.source}: {fit}")
    elif recipe.init != RANDOM:
        weights = read_weights(recipe.init)
        params, buffers, notes = transfer(recipe, weights, params, buffers, index.categories)
    channels = recipe.image.channels
    if weights is not None and channels != image_channels(weights.tensors) == 3:
        notes.append(f"first convolution: RGB's, made to fit {channels} channels")
    scaled = choose_dtype(recipe.dtype, device) == torch.float16
    averaged = recipe.ema.decay is not None
    state = new_state(
        recipe.model, params, buffers, device, memory_format,
        moments=moments_of(recipe.optim), scaled=scaled, averaged=averaged,
    )  # fmt: skip
    return state, notes


def _pretrained_backbone(recipe: Recipe) -> Weights | None:
    """The weights of a backbone alone that `--init` names by a word, if it does."""
    backbone = recipe.model.backbone
    if recipe.init.startswith(SOURCE):
        return timm_weights(recipe.init, backbone)
    if recipe.init in (IMAGENET, IMAGENET_V2):
        assert isinstance(backbone, ResNetConfig)  # `recipe_checks.check` has seen to it
        return imagenet_weights(backbone.depth, 2 if recipe.init == IMAGENET_V2 else 1)
    return None


def resumed_state(
    recipe: Recipe,
    index: Index,
    derived: Facts,
    ranks: Ranks,
    device: torch.device,
    memory_format: torch.memory_format,
) -> tuple[State | None, EpochHistory, list[str]]:
    """The state of the newest whole checkpoint in the run's folder, if there is one.

    Returns:
        The state or None, how its epoch began if that was otherwise, and what there is to say.

    Raises:
        UserError: the folder has a run that this recipe doesn't continue.
    """
    found, notes = from_main(_find(recipe) if ranks.main else None, ranks)
    if found is None:
        return None, NO_HISTORY, notes
    loaded = checkpoint.load(found)
    past, changed = _continued(recipe, index, derived, found, loaded.position)
    generator = torch.Generator().manual_seed(recipe.seed)
    params, buffers = detector.init(recipe.model, generator, recipe.image.channels)
    scaled = choose_dtype(recipe.dtype, device) == torch.float16
    averaged = recipe.ema.decay is not None
    state = new_state(
        recipe.model, params, buffers, device, memory_format,
        moments=moments_of(recipe.optim), scaled=scaled, averaged=averaged,
    )  # fmt: skip
    state = checkpoint.restore(state, loaded, found)
    notes += [f"continuing from {found} at step {state.step:,}", *changed]
    if recipe.resume_from == state.step and ranks.main:
        aside = checkpoint.set_aside(recipe.folder / CHECKPOINTS, state.step)
        if aside is not None:
            notes.append(f"--resume-from {state.step}: later checkpoints are in {aside}")
    return state, past, notes


def resumption(recipe: Recipe, index: Index, derived: Facts) -> list[str]:
    """What the run in the recipe's folder would go on from; nothing if none is there.

    Nothing is written or locked, and tensors aren't loaded.

    Raises:
        UserError: as `resumed_state`, or a run is going on in the folder.
    """
    check_free(recipe.folder)
    found, notes = _find(recipe)
    if found is None:
        return notes
    position = checkpoint.position_of(found)
    _, changed = _continued(recipe, index, derived, found, position)
    return [*notes, f"goes on from {found} at step {position['step']:,}", *changed]


def _continued(
    recipe: Recipe, index: Index, derived: Facts, found: Path, position: dict[str, Any]
) -> tuple[EpochHistory, list[str]]:
    """How the epoch to go on with began, and what there is to say of changes.

    Raises:
        UserError: the recipe doesn't continue this checkpoint.
    """
    if "phases" not in position:
        raise UserError(
            f"{found}: saved by an earlier version of casc, which didn't record what a run needs"
            " to go on in an epoch; start a new one from its weights: --init"
            f" {found / checkpoint.WEIGHTS} and another --out"
        )
    for name, kind in (("data", str), ("images_per_step", int), ("phases", list)):
        if not isinstance(position.get(name), kind):
            raise UserError(
                f"{found / checkpoint.STATE}: position: {name} isn't what casc writes there; choose"
                " another --out"
            )
    if fault := _phases_fault(position):
        raise UserError(
            f"{found / checkpoint.STATE}: position: phases{fault}; choose another --out"
        )
    changed = _check_recipe(recipe, derived, found)
    past, more = _past(recipe, index, derived, position)
    return past, [*more, *changed]


def data_position(
    recipe: Recipe, derived: Facts, past: EpochHistory, data: str, step: int
) -> dict[str, Any]:
    """What resuming needs beside tensors: which samples the steps so far have seen.

    Args:
        recipe: of the run.
        derived: from it.
        past: how the epoch in which the run was continued began.
        data: `fingerprint` of what it trains on.
        step: updates made.
    """
    epoch, within = divmod(step, derived.steps_per_epoch)
    phases = past.phases if past.epoch == epoch else ()
    return {
        "step": step,
        "images_per_step": derived.images_per_step,
        "seed": recipe.seed,
        "data": data,
        # Of the epoch so far: what was trained with which processes.
        "phases": [phase._asdict() for phase in (*phases, _phase(recipe, derived, within))],
    }


def weights_metadata(recipe: Recipe, index: Index, step: int) -> dict[str, str]:
    """What a file of weights says about itself."""
    classes = [{"id": category.id, "name": category.name} for category in index.categories]
    return {
        "format": checkpoint.WEIGHTS_FORMAT,
        "version": str(checkpoint.VERSION),
        "recipe": json.dumps(to_json(recipe)),
        "classes": json.dumps(classes),
        "step": str(step),
        "casc": casc.__version__,
        "torch": torch.__version__,
    }


def fingerprint(split: Split, categories: Sequence[Category]) -> str:
    """A hash that changes when the shards to train on do, or the classes."""
    shards = [(s.name, s.bucket, s.samples, s.sha256) for s in split.shards if s.train]
    classes = [(category.id, category.name) for category in categories]
    return hashlib.sha256(json.dumps([classes, shards]).encode()).hexdigest()[:16]


def _find(recipe: Recipe) -> tuple[Path | None, list[str]]:
    folder = recipe.folder
    if recipe.resume == "never" and (folder / RECIPE).exists():
        raise UserError(
            f"--resume never: {folder} already has a run; choose another --out, or delete it"
        )
    notes: list[str] = []
    found = checkpoint.newest(folder / CHECKPOINTS, lambda text: notes.append(f"warning: {text}"))
    if recipe.resume_from is not None and not _is_continued(recipe, found):
        found = checkpoint.path_of(folder / CHECKPOINTS, recipe.resume_from)
        if not found.is_dir():
            there = checkpoint.list_checkpoints(folder / CHECKPOINTS)
            steps = ", ".join(path.name.rpartition("-")[2].lstrip("0") for path in there)
            raise UserError(
                f"--resume-from {recipe.resume_from}: {folder / CHECKPOINTS} has no checkpoint of"
                f" that step; it has {steps or 'none'}"
            )
        checkpoint.verify(found)
        return found, notes
    if found is None and notes:
        raise UserError(
            f"{folder}: no checkpoint is whole, so the run can't go on ({notes[0]});"
            " choose another --out, or delete the folder to start anew"
        )
    if found is None and recipe.resume == "must":
        raise UserError(f"--resume must: {folder / CHECKPOINTS} has no checkpoint")
    return found, notes


def _is_continued(recipe: Recipe, newest: Path | None) -> bool:
    """Whether the newest checkpoint is of this very command, started once more."""
    if newest is None:
        return False
    before, now = checkpoint.recipe_of(newest), to_json(recipe)
    return isinstance(before, dict) and all(
        before.get(name) == now[name] for name in ("resume_from", "allow", "optim")
    )


def _check_recipe(recipe: Recipe, derived: Facts, found: Path) -> list[str]:
    """Refuse to continue with settings that change what is learnt, unless they are allowed to.

    Returns:
        What there is to say of those that are.
    """
    before = from_json(Recipe, checkpoint.recipe_of(found), str(found))
    # That batch and accumulate make the same step is seen to by `_past`.
    free = RESUMABLE_CHANGES | {"batch", "accumulate"}
    if recipe.schedule.kind == "step":
        free |= {"epochs"}
    steps = recipe.epochs * derived.steps_per_epoch
    if warmup_length(before.schedule, steps) == warmup_length(recipe.schedule, steps):
        free |= {"schedule.warmup_limit"}
    notes: list[str] = []
    for name, (old, new) in differences(to_json(before), to_json(recipe)).items():
        if name not in free and not name.startswith("loading."):
            flag, part = name.replace("_", "-"), name.partition(".")[0]
            if recipe.resume_from is not None and part in recipe.allow:
                notes.append(f"--allow {part}: --{flag} was {old}, from here on it is {new}")
                continue
            if part == "optim":
                raise UserError(
                    f"--{flag}: the run in {recipe.folder} has {old}, now it is {new}; leave it as"
                    " it was, go on from one of its checkpoints with --resume-from STEP --allow"
                    " optim, or choose another --out for a new run"
                )
            raise UserError(
                f"--{flag}: the run in {recipe.folder} has {old}, now it is {new}; leave it as it"
                " was to continue that run, or choose another --out for a new one"
            )
    return notes


def _phase(recipe: Recipe, derived: Facts, stop: int) -> Phase:
    return Phase(
        stop,
        world=derived.images_per_step // recipe.images_per_rank,
        batch=recipe.images_per_rank,
        workers=max(recipe.loading.workers, 1),
        window=recipe.loading.window,
    )


def _phases_fault(position: dict[str, Any]) -> str:
    """What is wrong with how an epoch is said to have begun; empty if nothing is."""
    phases, images = position["phases"], position["images_per_step"]
    if not phases:
        return ": is empty"
    for i, entry in enumerate(phases):
        names = list(Phase._fields)
        if not isinstance(entry, dict) or sorted(entry) != sorted(names):
            return f"[{i}]: expected {', '.join(names)}"
        for name in names:
            least, most = (0, 2**53) if name == "stop" else (1, _MOST_OF.get(name, 2**53))
            if type(entry[name]) is not int or not least <= entry[name] <= most:
                expected = f"a whole number from {least} to {most}"
                return f"[{i}].{name}: expected {expected}, got {entry[name]!r:.60}"
        if entry["world"] * entry["batch"] != images:
            return f"[{i}]: world x batch isn't images_per_step, {images}"
    return ""


_MOST_OF = {"workers": 2**10}
"""Each is gone through where a run goes on within an epoch."""


def _past(
    recipe: Recipe, index: Index, derived: Facts, position: dict[str, Any]
) -> tuple[EpochHistory, list[str]]:
    """How the epoch to go on with began, and what there is to say of it.

    Raises:
        UserError: the steps so far would mean other samples, or other learning rates.
    """
    step = position["step"]
    for name, now, flag, why in (
        (
            "data", fingerprint(trained_split(recipe, index), index.categories), "--data",
            "it must be the same",
        ),
        (
            "images_per_step", derived.images_per_step, "--batch, --accumulate or the number of"
            " processes", "steps, epochs and learning rates are counted in it; choose --batch and"
            " --accumulate so that processes x batch x accumulate stays the same",
        ),
    ):  # fmt: skip
        if now != position[name]:
            raise UserError(
                f"{flag}: the run in {recipe.folder} stopped at step {step} with"
                f" {name} {position[name]}, now it is {now}; {why}, or choose another --out for"
                " a new run"
            )
    epoch, within = divmod(step, derived.steps_per_epoch)
    *phases, last = (Phase(**entry) for entry in position["phases"])
    now = _phase(recipe, derived, within)
    if not within:
        phases = []
    elif last != now:
        phases.append(last)
    past = EpochHistory(epoch, tuple(phases))
    changed = [
        f"{name} {getattr(last, name)} -> {getattr(now, name)}"
        for name in ("world", "batch", "workers", "window")
        if getattr(last, name) != getattr(now, name)
    ]
    if not changed:
        return past, []
    notes = [
        f"changed: {', '.join(changed)}"
        + ("; the samples that the epoch's first steps left are dealt out anew" if within else "")
        + f"; a step is {derived.images_per_step} images as before, so steps, epochs and the"
        " learning rate go on as they were"
    ]
    if recipe.normalise == "rank" and last.batch != now.batch:
        notes.append(
            "warning: --normalise rank: losses are divided by the samples of each device's own"
            " batch, which has another size now; --normalise world wouldn't depend on it"
        )
    return past, notes
