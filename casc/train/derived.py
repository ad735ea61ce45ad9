"""What follows from a recipe, its data and the number of processes."""

import json
from typing import NamedTuple

import torch

from casc.config import to_json
from casc.data.index import Index, Split, canvas, training_split
from casc.data.plan import plan_epoch
from casc.device.devices import traits
from casc.model import detector
from casc.model.preprocess import ImageConfig, training_canvas
from casc.train.recipe import Recipe, resolved
from casc.train.recipe_checks import advice
from casc.train.schedule import rate_table, scaled_rate, warmup_length


class Facts(NamedTuple):
    """What follows from a recipe, its data and the number of processes."""

    steps_per_epoch: int
    steps: int
    """Of the whole run."""
    images_per_step: int
    """Over all devices, accumulated ones included."""
    rate: float
    """Peak learning rate, scaled."""
    canvases: dict[str, list[tuple[int, int]]]
    """(H, W) of each bucket, by split."""
    wrapped: dict[str, int]
    """Per bucket, samples seen twice an epoch to fill its last step."""


def facts(recipe: Recipe, index: Index, world: int = 1) -> Facts:
    """Derive what the recipe leaves to arithmetic."""
    split = trained_split(recipe, index)
    plan = plan_epoch(
        split, seed=recipe.seed, epoch=0, world=world,
        batch=recipe.images_per_rank, workers=recipe.loading.workers, window=recipe.loading.window,
    )  # fmt: skip
    images = world * recipe.images_per_rank
    optim = recipe.optim
    rate = scaled_rate(optim.lr, optim.reference_batch, images) if optim.scale_lr else optim.lr
    steps = recipe.epochs * plan.steps
    return Facts(
        steps_per_epoch=plan.steps,
        steps=steps if recipe.max_steps is None else min(steps, recipe.max_steps),
        images_per_step=images,
        rate=rate,
        canvases={
            name: split_canvases(
                index.splits[name], recipe.image, training=name == recipe.train_split
            )
            for name in dict.fromkeys((recipe.train_split, recipe.val_split))
            if name in index.splits
        },
        wrapped={b.name: n for b, n in zip(split.buckets, plan.wrapped, strict=True) if n},
    )


def trained_split(recipe: Recipe, index: Index) -> Split:
    """The training split with what the recipe trains on of it: see `training_split`."""
    return training_split(
        index.splits[recipe.train_split],
        masks=recipe.model.masks != "none",
        regions=recipe.model.ignore == "crowds",
    )


def split_canvases(
    split: Split, image: ImageConfig, *, training: bool = False
) -> list[tuple[int, int]]:
    """The network's canvas (H, W) of each bucket of a split."""
    if training:
        return [training_canvas(bucket, image) for bucket in split.buckets]
    return [canvas(bucket, image.short, image.long) for bucket in split.buckets]


def describe(recipe: Recipe, index: Index, device: torch.device, world: int = 1) -> str:
    """What `--dry-run` prints: the resolved recipe and what follows from it."""
    recipe = resolved(recipe)
    derived = facts(recipe, index, world)
    generator = torch.Generator().manual_seed(0)
    params, _ = detector.init(recipe.model, generator, recipe.image.channels)
    total = sum(p.numel() for p in params.values())
    trained = sum(p.numel() for p in detector.trainable(recipe.model, params).values())
    lines = [
        json.dumps(to_json(recipe), indent=1),
        "",
        f"output          {recipe.folder.absolute()}",
        f"device          {device}, {world} process{'es' if world > 1 else ''},"
        f" {recipe.dtype if recipe.dtype != 'auto' else traits(device).dtype}",
        f"parameters      {total:,}, of which {trained:,} train",
        f"images per step {derived.images_per_step} ({spread(recipe, world)})",
        f"steps           {derived.steps_per_epoch:,} an epoch, {derived.steps:,} in all",
    ]
    lines += ["learning rate   " + line if i == 0 else " " * 16 + line for i, line in enumerate(
        rate_lines(recipe, derived)
    )]  # fmt: skip
    for name, sizes in derived.canvases.items():
        trains = name == recipe.train_split
        split = trained_split(recipe, index) if trains else index.splits[name]
        lines.append(
            f"split           {name}: {split.samples:,} images, {split.train_samples:,} to train on"
        )
        for bucket, (height, width) in zip(split.buckets, sizes, strict=True):
            repeats = derived.wrapped.get(bucket.name, 0) if trains else 0
            lines.append(
                f"  {bucket.name:<13} canvas {height} x {width}, {bucket.samples:,} images,"
                f" room for {bucket.instances} objects, {bucket.edges} edges"
                + (f", {repeats} repeated an epoch" if repeats else "")
            )
    lines += [f"note: {text}" for text in (*shortened(recipe, derived), *advice(recipe))]
    return "\n".join(lines)


def spread(recipe: Recipe, world: int) -> str:
    """A step's images as devices x batch, x accumulated batches if there are more than one."""
    more = f" x {recipe.accumulate}" if recipe.accumulate > 1 else ""
    return f"{world} x {recipe.batch}{more}"


def rate_lines(recipe: Recipe, derived: Facts) -> list[str]:
    """The learning rate per range of steps, for people."""
    table = rate_table(
        recipe.schedule, derived.rate, steps_per_epoch=derived.steps_per_epoch, epochs=recipe.epochs
    )
    scaled = (
        f" ({recipe.optim.lr:g} x {derived.images_per_step} / {recipe.optim.reference_batch})"
        if recipe.optim.scale_lr
        else " (not scaled)"
    )
    return [f"peak {derived.rate:g}{scaled}"] + [
        f"steps {first:,} to {last:,}: {a:.6g}" + (f" to {b:.6g}" if b != a else "")
        for first, last, a, b in table
    ]


def shortened(recipe: Recipe, derived: Facts) -> list[str]:
    """A line that says so where warm-up is shorter than the recipe asks for; else none."""
    schedule, steps = recipe.schedule, recipe.epochs * derived.steps_per_epoch
    warmup = warmup_length(schedule, steps)
    if warmup == schedule.warmup_steps:
        return []
    return [
        f"warm-up is shortened from {schedule.warmup_steps:,} steps to {warmup:,},"
        f" {schedule.warmup_limit:.4g} of the {steps:,} steps of all epochs;"
        " --schedule.warmup-limit 1 keeps it whole"
    ]
