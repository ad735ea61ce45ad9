"""What a recipe may not say, and what it hardly means."""

import math

from casc.checkpoints.timm_weights import SOURCE
from casc.data.index import Index, Split, training_split
from casc.data.loader_config import check_loading
from casc.device.devices import TRAITS
from casc.errors import UserError
from casc.model.backbone import map_channels, stage_count
from casc.model.preprocess import ImageConfig
from casc.model.resnet import ResNetConfig
from casc.model.timm_backbone import TimmConfig, drop_rates
from casc.model.vit import PATCH, ViTConfig
from casc.train.model_checks import MOST, MOST_LAYERS, check_model
from casc.train.optim import Optim
from casc.train.recipe import IMAGENET, IMAGENET_V2, RANDOM, Recipe

LARGEST_SIDE = 2**16
"""Of an image in pixels; JPEG has none longer."""
MOST_PATCHES = LARGEST_SIDE // PATCH
"""On a side of an image."""


def check(recipe: Recipe, index: Index, world: int = 1) -> None:
    """Refuse a recipe that can't run, before any device is touched.

    Args:
        recipe: the recipe.
        index: of its shards.
        world: number of processes.

    Raises:
        UserError: naming the flag to change.
    """
    check_settings(recipe, world)
    _check_data(recipe, index)


def check_settings(recipe: Recipe, world: int = 1) -> None:
    """Refuse a recipe that can't run on any data.

    Raises:
        UserError: naming the flag to change.
    """
    _check_counts(recipe)
    _check_going_on(recipe)
    check_loading(recipe.loading)
    _check_image(recipe.image)
    if recipe.image.copy_paste and recipe.batch < 2:
        raise UserError(
            f"--image.copy-paste {recipe.image.copy_paste:g}: pastes from the next image of a"
            " batch; use --batch 2 or more"
        )
    if recipe.image.copy_paste and recipe.model.masks == "none":
        raise UserError(
            f"--image.copy-paste {recipe.image.copy_paste:g}: pastes by masks, which --model.masks"
            " none doesn't read; use 0, or masks heads"
        )
    _check_optim(recipe)
    check_model(recipe.model)
    _check_device(recipe.device, world)
    _check_compiling(recipe)
    _check_backbone(recipe)


def _check_counts(recipe: Recipe) -> None:
    if not 0 <= recipe.seed < 2**63:
        raise UserError(f"--seed {recipe.seed}: must be from 0 to 2^63 - 1")
    for flag, value, least in (
        ("epochs", recipe.epochs, 1),
        ("batch", recipe.batch, 1),
        ("accumulate", recipe.accumulate, 1),
        ("ddp-bucket-mb", recipe.ddp_bucket_mb, 1),
        ("max-steps", recipe.max_steps, 1),
        ("save-steps", recipe.save_steps, 1),
        ("resume-from", recipe.resume_from, 1),
        ("patience", recipe.patience, 1),
        ("log-every", recipe.log_every, 1),
        ("evaluate-every", recipe.evaluate_every, 0),
        ("save-every", recipe.save_every, 0),
        ("keep-last", recipe.keep_last, 0),
        ("watchdog-minutes", recipe.watchdog_minutes, 0),
        ("optim.reference-batch", recipe.optim.reference_batch, 1),
        ("optim.max-skips", recipe.optim.max_skips, 1),
        ("schedule.warmup-steps", recipe.schedule.warmup_steps, 0),
        ("image.short", recipe.image.short, 1),
        ("image.channels", recipe.image.channels, 1),
        ("image.long", recipe.image.long, recipe.image.short),
    ):
        if value is not None and not value >= least:  # NaN isn't
            raise UserError(f"--{flag} {value}: must be at least {least}")
        if value is not None and value > MOST:
            raise UserError(f"--{flag} {value}: must be at most {MOST}")


def _check_going_on(recipe: Recipe) -> None:
    """What goes by evaluations, and where a run goes on from."""
    for flag, given in (("patience", recipe.patience), ("validation-loss", recipe.validation_loss)):
        if given and not recipe.evaluate_every:
            raise UserError(f"--{flag}: there are no evaluations; use --evaluate-every 1 or more")
    if recipe.patience and recipe.keep_best == "none":
        raise UserError(
            "--patience: goes by the figure of --keep-best; set that to box_ap or mask_ap"
        )
    if recipe.allow and recipe.resume_from is None:
        raise UserError(
            f"--allow {' '.join(recipe.allow)}: goes with --resume-from STEP, where to go on from"
        )


def _check_optim(recipe: Recipe) -> None:
    """Rates, their schedule, and the average of the weights."""
    if not 0 <= recipe.schedule.warmup_limit <= 1:
        raise UserError(
            f"--schedule.warmup-limit {recipe.schedule.warmup_limit}: must be from 0 to 1"
        )
    for flag, share in (
        ("factor", recipe.schedule.factor),
        ("warmup-ratio", recipe.schedule.warmup_ratio),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"--schedule.{flag} {share}: must be from 0 to 1")
    if any(drop < 1 for drop in recipe.schedule.drops):
        given = " ".join(map(str, recipe.schedule.drops))
        raise UserError(f"--schedule.drops {given}: each must be at least 1")
    if not 0 < recipe.optim.lr < math.inf:
        raise UserError(f"--optim.lr {recipe.optim.lr}: must be more than 0 and finite")
    _check_moments(recipe.optim)
    if not 0 < recipe.optim.layer_decay <= 1:
        raise UserError(
            f"--optim.layer-decay {recipe.optim.layer_decay}: must be more than 0 and at most 1"
        )
    most = stage_count(recipe.model.backbone)
    for part in ("backbone", "neck", "heads"):
        factor = getattr(recipe.optim, f"{part}_lr")
        if not 0 < factor < math.inf:
            raise UserError(
                f"--optim.{part}-lr {factor}: must be more than 0"
                + (
                    f", to freeze it use --model.backbone.frozen-stages {most}"
                    if part == "backbone"
                    else ""
                )
            )
    decay = recipe.ema.decay
    if decay is not None and not 0 < decay < 1:
        raise UserError(f"--ema.decay {decay}: must be between 0 and 1")
    if decay is None and not recipe.ema.evaluate:
        raise UserError("--ema.no-evaluate: there is no average; give --ema.decay, such as 0.9998")
    if recipe.optim.clip_norm is not None and not recipe.optim.clip_norm > 0:
        raise UserError(f"--optim.clip-norm {recipe.optim.clip_norm}: must be more than 0")


def _check_device(device: str, world: int) -> None:
    kind = device.partition(":")[0]
    if kind not in ("auto", *TRAITS):
        raise UserError(f"--device {device}: expected auto or one of {', '.join(TRAITS)}")
    if world > 1 and ":" in device:
        raise UserError(f"--device {device}: torchrun gives each process its own; drop the number")


def _check_compiling(recipe: Recipe) -> None:
    # A cache is no contradiction: scripts name a folder once, for runs of both kinds.
    if recipe.compile_backend != "auto" and not recipe.compile:
        raise UserError(
            f"--compile-backend {recipe.compile_backend}: nothing is compiled, by --no-compile or"
            " the recipe; give --compile too, or leave it out"
        )


def _check_backbone(recipe: Recipe) -> None:
    backbone, init = recipe.model.backbone, recipe.init
    map_channels(backbone)  # timm has it
    most = stage_count(backbone)
    if not -1 <= backbone.frozen_stages <= most:
        raise UserError(
            f"--model.backbone.frozen-stages {backbone.frozen_stages}: must be from -1 (none) to"
            f" {most} (all)"
        )
    if recipe.image.channels != 3 and not isinstance(backbone, ResNetConfig):
        raise UserError(
            f"--image.channels {recipe.image.channels}: only ResNets take other images than RGB's;"
            " use a recipe with a ResNet, such as coco_1x"
        )
    if isinstance(backbone, ResNetConfig):
        _check_resnet(backbone, init)
    elif init in (IMAGENET, IMAGENET_V2):
        raise UserError(
            f"--init {init}: there are such weights for ResNets only; use --init timm:NAME, such as"
            " timm:convnext_tiny.fb_in22k for --model.backbone.name convnext_tiny"
        )
    elif not 0 <= backbone.drop_path < 1:
        raise UserError(
            f"--model.backbone.drop-path {backbone.drop_path}: must be from 0 to less than 1"
        )
    if isinstance(backbone, ViTConfig):
        _check_vit(backbone)
    if isinstance(backbone, TimmConfig):
        drop_rates(backbone)  # it can drop paths, if it is to
    if init == RANDOM and backbone.frozen_stages >= 0:
        raise UserError(
            "--init random: frozen stages would keep their random weights;"
            " use --model.backbone.frozen-stages -1, or start from pretrained weights"
        )


def _check_resnet(backbone: ResNetConfig, init: str) -> None:
    pretrained = init in (IMAGENET, IMAGENET_V2) or init.startswith(SOURCE)
    if pretrained and (backbone.norm != "frozen_bn" or backbone.width != 64):
        raise UserError(
            f"--init {init}: there are such weights for --model.backbone.norm frozen_bn and"
            " --model.backbone.width 64 only; use --init random or a file"
        )
    if init == IMAGENET_V2 and backbone.depth < 50:
        raise UserError(
            f"--init {init}: torchvision has no second weights of a ResNet-{backbone.depth}; use"
            " --init imagenet"
        )
    if backbone.stride_in_1x1 and (backbone.depth < 50 or pretrained):
        raise UserError(
            f"--model.backbone.stride-in-1x1: neither torchvision's weights (--init {init}) nor"
            " networks of fewer than 50 layers are built so"
        )


def _check_vit(backbone: ViTConfig) -> None:
    for flag, value, least, most in (
        ("channels", backbone.channels, 4, MOST),
        ("depth", backbone.depth, 1, MOST_LAYERS),
        ("heads", backbone.heads, 1, MOST),
        ("grid", backbone.grid, 1, MOST_PATCHES),
        ("window", backbone.window, 0, MOST_PATCHES),
        ("relative-grid", backbone.relative_grid, 1, MOST_PATCHES),
    ):
        if not least <= value <= most:
            raise UserError(f"--model.backbone.{flag} {value}: must be {least} to {most}")
    if backbone.channels % backbone.heads or backbone.channels % 4:
        raise UserError(
            f"--model.backbone.channels {backbone.channels}: must be a multiple of 4 and of"
            f" --model.backbone.heads {backbone.heads}"
        )
    grid, usual = backbone.relative_grid, ViTConfig().relative_grid
    if not backbone.relative and grid != usual:
        raise UserError(
            f"--model.backbone.relative-grid {grid}: there are no relative positions; use"
            f" --model.backbone.relative, or leave it at {usual}"
        )
    unknown = [block for block in backbone.global_blocks if not 0 <= block < backbone.depth]
    if unknown:
        raise UserError(
            f"--model.backbone.global-blocks {unknown[0]}: there are blocks 0 to"
            f" {backbone.depth - 1}"
        )


def advice(recipe: Recipe) -> list[str]:
    """What is allowed but seldom meant."""
    found = []
    backbone = recipe.model.backbone
    if recipe.init == RANDOM and isinstance(backbone, ResNetConfig) and backbone.norm != "gn":
        found.append(
            "training from random weights without normalisation seldom converges;"
            " see --model.backbone.norm gn"
        )
    stem = isinstance(backbone, ResNetConfig) and backbone.frozen_stages >= 0
    if recipe.image.channels > 3 and stem:
        found.append(
            "the first convolution is frozen, so channels beyond RGB stay as it begins with them;"
            " --model.backbone.frozen-stages -1 lets it learn"
        )
    late = [drop for drop in recipe.schedule.drops if drop >= recipe.epochs]
    if recipe.schedule.kind == "step" and late:
        found.append(f"the learning rate's drops after epochs {late} come after the run's end")
    return found


def _check_moments(optim: Optim) -> None:
    if not 0 <= optim.momentum < 1:
        raise UserError(f"--optim.momentum {optim.momentum}: must be from 0 to less than 1")
    if not all(0 < beta < 1 for beta in optim.betas):
        first, second = optim.betas
        raise UserError(f"--optim.betas {first} {second}: each must be between 0 and 1")
    if not 0 < optim.eps < math.inf:
        raise UserError(f"--optim.eps {optim.eps}: must be more than 0")
    if not 0 <= optim.weight_decay < math.inf:
        raise UserError(f"--optim.weight-decay {optim.weight_decay}: must not be negative")
    usual = Optim()
    for name, kind in (("momentum", "sgd"), ("betas", "adamw"), ("eps", "adamw")):
        given, default = getattr(optim, name), getattr(usual, name)
        if kind != optim.kind and given != default:
            raise UserError(
                f"--optim.{name} {_words(given)}: is --optim.kind {kind}'s, {optim.kind} has none;"
                f" use that kind, or leave it at {_words(default)}"
            )


def _words(value: float | tuple[float, ...]) -> str:
    """As it is typed."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_image(image: ImageConfig) -> None:
    for flag, numbers in (("mean", image.mean), ("std", image.std)):
        if len(numbers) not in (3, image.channels):
            raise UserError(
                f"--image.{flag}: gives {len(numbers)} numbers; --image.channels {image.channels}"
                f" needs {image.channels}, one for each channel"
            )
    if not all(0 < number < math.inf for number in image.std):
        raise UserError(f"--image.std {image.std}: each must be more than 0")
    if not all(map(math.isfinite, image.mean)):
        raise UserError(f"--image.mean {image.mean}: each must be finite")
    if image.long > LARGEST_SIDE:
        raise UserError(f"--image.long {image.long}: must be at most {LARGEST_SIDE}")
    if image.channels != 3 and any(image.colour):
        raise UserError(
            f"--image.colour: changes RGB, but --image.channels is {image.channels}; leave it out"
        )
    for flag, share in (
        ("flip", image.flip),
        ("copy-paste", image.copy_paste),
        ("erase", image.erase),
    ):
        if not 0 <= share <= 1:
            raise UserError(f"--image.{flag} {share}: must be from 0 to 1")
    if not all(0 <= strength < math.inf for strength in image.colour) or image.colour[3] > 0.5:
        raise UserError(
            f"--image.colour {' '.join(f'{strength:g}' for strength in image.colour)}: must not be"
            " negative, and the last, the hue's, 0.5 at most"
        )
    if image.copy_paste and image.jitter is None:
        raise UserError(
            f"--image.copy-paste {image.copy_paste:g}: pastes between canvases of"
            " --image.jitter; give that, such as 0.1 2"
        )
    if image.train_short is not None:
        least, most = image.train_short
        if not 1 <= least <= most <= image.long:
            raise UserError(
                f"--image.train-short {least} {most}: must be from 1 to --image.long {image.long},"
                " the smaller one first"
            )
    if image.jitter is None:
        if image.jitter_size != ImageConfig.jitter_size:
            raise UserError(
                f"--image.jitter-size {image.jitter_size}: goes with --image.jitter; give that,"
                f" such as 0.1 2, or leave it at {ImageConfig.jitter_size}"
            )
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
            others = [other for other in index.splits if other not in dict(flags).values()]
            raise UserError(
                f"--{flag} {name}: {recipe.data} has no such split (it has {known})"
                + (f"; use --{flag} {others[0]}" if others else "")
                + (
                    "; hold images out with `data_tools shard --val-share 0.1`, or use"
                    " --evaluate-every 0"
                    if flag == "val-split"
                    else ""
                )
            )
        _check_channels(recipe.image, index.splits[name], f"{recipe.data}: {name}")
    _check_objects(recipe, index.splits[recipe.train_split])
    if recipe.validation_loss:
        validation_split(recipe, index)
    if recipe.model.classes != len(index.categories):
        raise UserError(
            f"--model.classes {recipe.model.classes}: {recipe.data} has {len(index.categories)}"
            f" categories; use --model.classes {len(index.categories)}"
        )


def validation_split(recipe: Recipe, index: Index) -> Split:
    """The split to evaluate on, with room for what losses are computed of.

    Raises:
        UserError: its shards don't know enough.
    """
    return training_split(
        index.splits[recipe.val_split],
        masks=recipe.model.masks != "none",
        regions=recipe.model.ignore == "crowds",
    )


def _check_channels(image: ImageConfig, split: Split, where: str) -> None:
    if split.channels != image.channels:
        raise UserError(
            f"--image.channels {image.channels}: {where} has images of {split.channels}; use"
            f" --image.channels {split.channels}, or shards made with `data_tools shard --channels"
            f" {image.channels}`"
        )


def _check_objects(recipe: Recipe, split: Split) -> None:
    """Refuse a split without any object to learn from, or of shards that don't know enough."""
    masks = recipe.model.masks != "none"
    regions = recipe.model.ignore == "crowds"
    samples = training_split(split, masks=masks, regions=regions).train_samples
    counts = split.report.get("annotations", {})
    with_masks = counts.get("trained")
    boxes = counts.get("trained_without_masks", with_masks)
    if samples and (with_masks if masks else boxes) != 0:
        return
    mend = "mend the annotation file and make the shards again"
    if masks and boxes:
        mend = f"--model.masks none trains on {boxes:,} boxes without masks; or {mend}"
    raise UserError(
        f"--train-split {recipe.train_split}: it has nothing to train on{_reasons(split)}; {mend}"
    )


def _reasons(split: Split) -> str:
    """Why annotations aren't trained on, with counts, as sharding found it."""
    listed = split.report.get("annotations", {}).get("listed")
    kinds = [
        f"{found['count']} {kind}"
        for kind, found in split.report.get("findings", {}).items()
        if (found["subject"], found["outcome"]) == ("annotation", "evaluation only")
    ]
    if not listed:
        return ""
    why = ", ".join(kinds) or "their images are not"
    return f": of {listed} annotations none is usable ({why})"
