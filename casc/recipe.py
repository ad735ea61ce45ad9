"""The recipe: everything that decides a training run, in one frozen dataclass.

Each room's settings lie beside the function that they configure; here they come together.
"""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro

from casc import detector
from casc.command_line import parse_arguments
from casc.config import to_json
from casc.data.augment import ImageConfig, training_canvas
from casc.data.index import Index, Split, canvas
from casc.data.loading import Loading, check_loading
from casc.data.plan import plan_epoch
from casc.detector import DetectorConfig
from casc.devices import TRAITS, CompileBackend, traits
from casc.errors import UserError
from casc.train.ema import Ema
from casc.train.optim import Optim
from casc.train.schedule import Schedule, rate_table, scaled_rate

IMAGENET, RANDOM = "imagenet", "random"


@dataclass(frozen=True)
class Recipe:
    """A training run. What isn't said on the command line is as the recipe has it."""

    name: str
    """The run's name: of its output folder and of its row in the results table."""
    data: Path = Path("shards")
    """Folder of shards made by `data_tools shard`, or its URL: http(s), or what fsspec opens."""
    out: Path | None = None
    """Output folder; by default runs/NAME under the current directory."""
    init: str = IMAGENET
    """Starting weights. imagenet: torchvision's for the backbone. random: none. Else a file,
    a run's folder or a URL: of casc, the reference, or a torchvision ResNet."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue the run in the output folder if there is one, else start. never: refuse
    to touch a folder that has a run. must: refuse to start anew."""

    epochs: int = 12
    """Passes over the training split."""
    batch: int = 2
    """Images per device and forward pass."""
    accumulate: int = 1
    """Forward and backward passes per update; ranks exchange gradients after the last. A step is
    batch x accumulate x devices images."""
    bucket_mb: int = 25
    """MiB of gradients that ranks send at a time, as the backward pass makes them. Larger ones
    where each message costs much: many devices, a slow network."""
    normalise: Literal["rank", "world", "step"] = "rank"
    """What losses are divided by. rank: the number of samples in the device's own batch, as the
    reference does. world: the mean number over all devices, so that the update doesn't depend on
    how a step's images are spread over them. step: over accumulated passes too, which costs
    another forward pass for each where there are several."""
    seed: int = 0
    """Decides initial weights, order, flips and sampling."""
    max_steps: int | None = None
    """End after this many steps, for trials and for measuring speed."""
    train_split: str = "train2017"
    """Split of the shards to train on."""
    val_split: str = "val2017"
    """Split of the shards to evaluate on."""

    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, cuda:1, ..."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of convolutions and matrix products; auto takes what suits the device. float16 scales the
    loss, as little gradients would vanish otherwise."""
    exactness: Literal["default", "reference"] = "default"
    """default: faster equivalents of some of the reference's operations. reference: its own way
    in all of them (adaptive RoIAlign, mask targets from bitmaps)."""
    compile: bool = True
    """Compile the step with torch.compile; off, the same numbers come slower."""
    compile_backend: CompileBackend = "auto"
    """inductor makes kernels. aot_eager only captures the graph and runs it operator by operator,
    for devices without Triton. auto: inductor where it is usable."""
    compile_cache: Path | None = None
    """Folder to keep compiled code in, for later runs and shared by all processes; by default
    $CASC_CACHE/compile, or casc/compile in ~/.cache. It may be deleted at any time."""
    deterministic: bool = False
    """The same bits every time on the same device; an operator that can't do so raises."""
    warm_up: bool = True
    """Compile for all canvases before the first step; off, each when it first comes up."""

    evaluate_every: int = 1
    """Epochs between evaluations, and one at the end; 0 never evaluates."""
    save_every: int = 1
    """Epochs between checkpoints, and one at the end; 0 never saves."""
    save_steps: int | None = None
    """Steps between further checkpoints, for long epochs."""
    keep_last: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_best: Literal["box_ap", "mask_ap", "none"] = "mask_ap"
    """Also keep the checkpoint with the best of this figure."""
    log_every: int = 50
    """Steps between lines of the log; between them nothing is read from the device."""
    watchdog_minutes: float = 30.0
    """Report which rank is stuck with what, with stack traces, when nothing has got on for so
    long; 0 never does. It ends nothing."""
    tensorboard: bool = False
    """Also write TensorBoard's format (needs the extra casc[tensorboard])."""
    profile: Path | None = None
    """Write a trace of three steps, after three others, to this file (.json.gz): for Perfetto."""

    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    ema: Ema = field(default_factory=Ema)
    image: ImageConfig = field(default_factory=ImageConfig)
    loading: Loading = field(default_factory=Loading)
    model: DetectorConfig = field(default_factory=DetectorConfig)

    @property
    def folder(self) -> Path:
        """Where output goes."""
        return Path("runs") / self.name if self.out is None else self.out

    @property
    def images_per_rank(self) -> int:
        """Images per device and update."""
        return self.batch * self.accumulate


# What may differ when a run is continued: nothing that is learnt depends on it. (Another
# device, or compiling or not, may round differently.)
FREE_FIELDS = frozenset(
    (
        "name", "data", "out", "init", "resume", "max_steps", "val_split", "device", "compile",
        "compile_cache", "compile_backend", "deterministic", "model.roi_kernel",
        "model.rpn.nms_kernel", "model.inference.nms_kernel", "warm_up", "bucket_mb",
        "evaluate_every", "save_every", "save_steps", "keep_last", "keep_best",
        "log_every", "watchdog_minutes", "tensorboard", "profile", "optim.max_skips",
    )
)  # fmt: skip


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


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with its model as `exactness` wants it."""
    if recipe.exactness == "reference":
        return dataclasses.replace(recipe, model=detector.reference_settings(recipe.model))
    return recipe


def check(recipe: Recipe, index: Index, world: int = 1) -> None:
    """Refuse a recipe that can't run, before any device is touched.

    Args:
        recipe: the recipe.
        index: of its shards.
        world: number of processes.

    Raises:
        UserError: naming the flag to change.
    """
    for flag, value, least in (
        ("epochs", recipe.epochs, 1),
        ("batch", recipe.batch, 1),
        ("accumulate", recipe.accumulate, 1),
        ("bucket-mb", recipe.bucket_mb, 1),
        ("max-steps", recipe.max_steps, 1),
        ("save-steps", recipe.save_steps, 1),
        ("log-every", recipe.log_every, 1),
        ("evaluate-every", recipe.evaluate_every, 0),
        ("save-every", recipe.save_every, 0),
        ("keep-last", recipe.keep_last, 0),
        ("watchdog-minutes", recipe.watchdog_minutes, 0),
        ("optim.reference-batch", recipe.optim.reference_batch, 1),
        ("optim.max-skips", recipe.optim.max_skips, 1),
        ("schedule.warmup-steps", recipe.schedule.warmup_steps, 0),
        ("image.short", recipe.image.short, 1),
        ("image.long", recipe.image.long, recipe.image.short),
    ):
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    check_loading(recipe.loading)
    _check_image(recipe.image)
    if not recipe.optim.lr > 0:
        raise UserError(f"--optim.lr {recipe.optim.lr}: must be more than 0")
    for part in ("backbone", "neck", "heads"):
        factor = getattr(recipe.optim, f"{part}_lr")
        if not 0 < factor < math.inf:
            raise UserError(
                f"--optim.{part}-lr {factor}: must be more than 0"
                + (
                    ", to freeze it use --model.backbone.frozen-stages 4"
                    if part == "backbone"
                    else ""
                )
            )
    decay = recipe.ema.decay
    if decay is not None and not 0 < decay < 1:
        raise UserError(f"--ema.decay {decay}: must be between 0 and 1")
    if decay is None and not recipe.ema.evaluate:
        raise UserError("--ema.no-evaluate: there is no average; give --ema.decay, such as 0.9998")
    if not -1 <= recipe.model.backbone.frozen_stages <= 4:
        raise UserError(
            f"--model.backbone.frozen-stages {recipe.model.backbone.frozen_stages}: must be from -1"
            " (none) to 4 (all)"
        )
    if recipe.optim.clip_norm is not None and not recipe.optim.clip_norm > 0:
        raise UserError(f"--optim.clip-norm {recipe.optim.clip_norm}: must be more than 0")
    kind = recipe.device.partition(":")[0]
    if kind not in ("auto", *TRAITS):
        raise UserError(f"--device {recipe.device}: expected auto or one of {', '.join(TRAITS)}")
    if world > 1 and ":" in recipe.device:
        raise UserError(
            f"--device {recipe.device}: torchrun gives each process its own; drop the number"
        )
    _check_data(recipe, index)
    backbone = recipe.model.backbone
    if recipe.init == IMAGENET and (backbone.norm != "frozen_bn" or backbone.width != 64):
        raise UserError(
            "--init imagenet: there are such weights for --model.backbone.norm frozen_bn and"
            " --model.backbone.width 64 only; use --init random or a file"
        )
    if backbone.stride_in_1x1 and (backbone.depth < 50 or recipe.init == IMAGENET):
        raise UserError(
            "--model.backbone.stride-in-1x1: neither torchvision's weights (--init imagenet) nor"
            " networks of fewer than 50 layers are built so"
        )
    if recipe.init == RANDOM and backbone.frozen_stages >= 0:
        raise UserError(
            "--init random: frozen stages would keep their random weights;"
            " use --model.backbone.frozen-stages -1, or start from pretrained weights"
        )


def advice(recipe: Recipe) -> list[str]:
    """What is allowed but seldom meant."""
    found = []
    if recipe.init == RANDOM and recipe.model.backbone.norm == "frozen_bn":
        found.append(
            "training from random weights without normalisation seldom converges;"
            " see --model.backbone.norm gn"
        )
    late = [drop for drop in recipe.schedule.drops if drop >= recipe.epochs]
    if recipe.schedule.kind == "step" and late:
        found.append(f"the learning rate's drops after epochs {late} come after the run's end")
    return found


def facts(recipe: Recipe, index: Index, world: int = 1) -> Facts:
    """Derive what the recipe leaves to arithmetic."""
    plan = plan_epoch(
        index.splits[recipe.train_split], seed=recipe.seed, epoch=0, world=world,
        batch=recipe.images_per_rank, workers=recipe.loading.workers, window=recipe.loading.window,
    )  # fmt: skip
    images = world * recipe.images_per_rank
    optim = recipe.optim
    rate = scaled_rate(optim.lr, optim.reference_batch, images) if optim.scale_lr else optim.lr
    steps = recipe.epochs * plan.steps
    buckets = index.splits[recipe.train_split].buckets
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
        wrapped={b.name: n for b, n in zip(buckets, plan.wrapped, strict=True) if n},
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
    params, _ = detector.init(recipe.model, torch.Generator().manual_seed(0))
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
        split = index.splits[name]
        lines.append(
            f"split           {name}: {split.samples:,} images, {split.train_samples:,} to train on"
        )
        for bucket, (height, width) in zip(split.buckets, sizes, strict=True):
            repeats = derived.wrapped.get(bucket.name, 0) if name == recipe.train_split else 0
            lines.append(
                f"  {bucket.name:<13} canvas {height} x {width}, {bucket.samples:,} images,"
                f" at most {bucket.instances} objects of {bucket.edges} edges"
                + (f", {repeats} repeated an epoch" if repeats else "")
            )
    lines += [f"note: {text}" for text in advice(recipe)]
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


def _check_image(image: ImageConfig) -> None:
    if not 0 <= image.flip <= 1:
        raise UserError(f"--image.flip {image.flip}: must be from 0 to 1")
    if image.train_short is not None:
        least, most = image.train_short
        if not 1 <= least <= most <= image.long:
            raise UserError(
                f"--image.train-short {least} {most}: must be from 1 to --image.long {image.long},"
                " the smaller one first"
            )
    if image.jitter is None:
        return
    if image.train_short is not None:
        raise UserError(
            "--image.jitter: takes the place of --image.train-short; use one of them and None for"
            " the other"
        )
    least, most = image.jitter
    if image.jitter_size < 32 or image.jitter_size % 32:
        raise UserError(f"--image.jitter-size {image.jitter_size}: must be a multiple of 32")
    if not 1 <= least * image.jitter_size <= most * image.jitter_size < 2**15:
        raise UserError(
            f"--image.jitter {least:g} {most:g}: must make images of --image.jitter-size"
            f" {image.jitter_size} at least one pixel and less than 32,768 large, the smaller"
            " factor first"
        )


def _check_data(recipe: Recipe, index: Index) -> None:
    flags = [("train-split", recipe.train_split)]
    if recipe.evaluate_every:
        flags.append(("val-split", recipe.val_split))
    for flag, name in flags:
        if name not in index.splits:
            known = ", ".join(index.splits) or "none"
            raise UserError(
                f"--{flag} {name}: {recipe.data} has no such split (it has {known})"
                + ("; or use --evaluate-every 0" if flag == "val-split" else "")
            )
    if not index.splits[recipe.train_split].train_samples:
        raise UserError(f"--train-split {recipe.train_split}: it has no images to train on")
    if recipe.model.classes != len(index.categories):
        raise UserError(
            f"--model.classes {recipe.model.classes}: {recipe.data} has {len(index.categories)}"
            f" categories; use --model.classes {len(index.categories)}"
        )


@dataclass(frozen=True)
class _Command:
    """What a recipe's command line accepts."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the resolved recipe and what follows from it, and stop."""


def parse(
    recipe: Recipe, description: str | None, args: list[str] | None = None
) -> tuple[Recipe, bool]:
    """The recipe as changed by the command line, and whether it is only to be shown."""
    command = parse_arguments(
        _Command,
        sys.argv[1:] if args is None else args,
        default=_Command(recipe),
        description=description,
    )
    return command.recipe, command.dry_run
