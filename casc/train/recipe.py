"""The recipe: everything that decides a training run, in one frozen dataclass.

Each room's settings lie beside the function that they configure; here they come together.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from casc.arguments import parse_arguments
from casc.checkpoints.format import upgrade_recipe
from casc.config import from_json
from casc.data.loader_config import TrainLoaderConfig
from casc.device.devices import CompileBackend
from casc.errors import UserError
from casc.json_files import read_json
from casc.model.detector_config import DetectorConfig, mask_stages, reference_settings
from casc.model.preprocess import ImageConfig
from casc.train.ema import Ema
from casc.train.optim import Optim
from casc.train.schedule import Schedule

IMAGENET, IMAGENET_V2, RANDOM = "imagenet", "imagenet-v2", "random"


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
    """Starting weights. imagenet, imagenet-v2: torchvision's first or second for the backbone.
    timm:NAME: timm's for the backbone (timm:convnext_tiny.fb_in22k). random: none. Else a file, a
    run's folder or a URL: of casc, the reference, or a torchvision ResNet."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue the run in the output folder if there is one, else start. never: refuse
    to touch a folder that has a run. must: refuse to start anew."""
    resume_from: int | None = None
    """Go on from the checkpoint of this step instead of the newest. Later ones are moved to
    checkpoints/set-aside-N, and the same command then goes on with what it saves itself."""
    allow: tuple[Literal["optim"], ...] = ()
    """What may differ from the run so far with --resume-from, though it changes what is learnt.
    optim: all of --optim, after losses that weren't finite, for instance."""

    epochs: int = 12
    """Passes over the training split."""
    batch: int = 2
    """Images per device and forward pass."""
    accumulate: int = 1
    """Forward and backward passes per update; ranks exchange gradients after the last. A step is
    batch x accumulate x devices images."""
    ddp_bucket_mb: int = 25
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
    """Of convolutions and matrix products; auto takes what suits the device. float32 is computed
    in full, without TF32. float16 scales the loss, as little gradients would vanish otherwise."""
    exactness: Literal["default", "reference"] = "default"
    """default: faster equivalents of some of the reference's operations. reference: its own way
    in all of them (adaptive RoIAlign, mask targets from bitmaps)."""
    compile: bool = True
    """Compile the step with torch.compile; off, the same numbers come slower."""
    compile_backend: CompileBackend = "auto"
    """inductor and, on NPUs, dvm make kernels. aot_eager only captures the graph and runs it
    operator by operator. auto: the first that works, tried before the first step; else eager."""
    compile_cache: Path | None = None
    """Folder to keep compiled code in, for later runs and shared by all processes; by default
    $CASC_CACHE/compile, or casc/compile in ~/.cache. It may be deleted at any time."""
    replay: Literal["auto", "on", "off"] = "auto"
    """Record each canvas's whole step on the device, update included, and replay it: the host then
    launches once a step. auto: where it can be done, and the log says whether; on: or else stop."""
    deterministic: bool = False
    """The same bits every time on the same device; an operator that can't do so raises."""
    warm_up: bool = True
    """Compile for all canvases before the first step; off, each when it first comes up."""

    evaluate_every: int = 1
    """Epochs between evaluations, and one at the end; 0 never evaluates."""
    validation_loss: bool = False
    """Evaluations also compute the losses on --val-split: no flip, no jitter, the same noise each
    time. It takes about as long again as the detections."""
    patience: int | None = None
    """End the run when the figure of --keep-best hasn't risen for so many evaluations in a row."""
    save_every: int = 1
    """Epochs between checkpoints, and one at the end; 0 leaves it to --save-steps."""
    save_steps: int | None = None
    """Steps between further checkpoints, for long epochs. With --save-every 0 and without this
    nothing is saved."""
    keep_last: int = 2
    """Newest checkpoints to keep; 0 keeps all."""
    keep_best: Literal["box_ap", "mask_ap", "none"] = "mask_ap"
    """Also keep the checkpoint with the best of this figure; without masks box_ap for mask_ap."""
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
    loading: TrainLoaderConfig = field(default_factory=TrainLoaderConfig)
    model: DetectorConfig = field(default_factory=DetectorConfig)

    @property
    def folder(self) -> Path:
        """Where output goes."""
        return Path("runs") / self.name if self.out is None else self.out

    @property
    def saves(self) -> bool:
        """Whether there are going to be checkpoints."""
        return self.save_every > 0 or self.save_steps is not None

    @property
    def images_per_rank(self) -> int:
        """Images per device and update."""
        return self.batch * self.accumulate


# What may differ when a run is continued: nothing that is learnt depends on it. (Another
# device, or compiling or not, may round differently.)
RESUMABLE_CHANGES = frozenset(
    (
        "name", "data", "out", "init", "resume", "resume_from", "allow", "max_steps", "val_split",
        "device", "compile",
        "compile_cache", "compile_backend", "replay", "deterministic", "model.roi_kernel",
        "model.rpn.nms_kernel", "model.inference.nms_kernel", "model.mask_head.capacity", "warm_up",
        "ddp_bucket_mb",
        "evaluate_every", "validation_loss", "patience", "save_every", "save_steps", "keep_last",
        "keep_best",
        "log_every", "watchdog_minutes", "tensorboard", "profile", "optim.max_skips",
    )
)  # fmt: skip


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with its model as `exactness` wants it, and a figure that the model has."""
    if recipe.exactness == "reference":
        recipe = dataclasses.replace(recipe, model=reference_settings(recipe.model))
    if recipe.keep_best == "mask_ap" and not mask_stages(recipe.model):
        recipe = dataclasses.replace(recipe, keep_best="box_ap")
    return recipe


def reads_bitmaps(recipe: Recipe) -> bool:
    """Whether mask targets are made of bitmaps, which batches then have to hold."""
    model = recipe.model
    return mask_stages(model) > 0 and model.mask_head.target == "bitmap"


@dataclass(frozen=True)
class _Command:
    """What a recipe's command line accepts."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    dry_run: bool = False
    """Print the resolved recipe, what follows from it and what the run that may be in the output
    folder would go on from, and stop; fails where the run itself would be refused."""
    config: Path | None = None
    """Begin with this saved recipe (a run's recipe.json) in place of the recipe's own settings;
    other flags change it."""


_GROUPS = {
    "most used": (
        "help", "data", "out", "init", "epochs", "batch", "optim.lr", "device", "dtype", "resume",
        "dry-run",
    ),
    "the run": (
        "name", "config", "seed", "train-split", "val-split", "max-steps", "resume-from", "allow",
        "",
    ),
    "evaluating, saving, logging": (
        "evaluate-every", "validation-loss", "patience", "save-every", "save-steps", "keep-last",
        "keep-best", "log-every", "tensorboard", "profile", "watchdog-minutes",
    ),
    "speed and exactness": (
        "compile", "compile-backend", "compile-cache", "warm-up", "replay", "exactness",
        "deterministic", "ddp-bucket-mb", "model.roi-align", "model.roi-kernel",
    ),
    "learning": ("accumulate", "normalise", "optim.", "schedule.", "ema."),
    "images": ("image.",),
    "reading data": ("loading.",),
    "model: classes, backbone, pyramid": (
        "model.classes", "model.", "model.backbone.", "model.fpn.",
    ),
    "model: proposals": ("model.anchors.", "model.rpn."),
    "model: box heads": ("model.stages.", "model.box-head."),
    "model: mask heads": ("model.mask-head.",),
    "model: detections": ("model.inference.",),
}  # fmt: skip
"""How `--help` lists the flags; those that most people touch come first."""


def parse(
    recipe: Recipe, description: str | None, args: list[str] | None = None
) -> tuple[Recipe, bool]:
    """The recipe as changed by the command line, and whether it is only to be shown."""
    given = sys.argv[1:] if args is None else args
    command = parse_arguments(
        _Command,
        given,
        default=_Command(_saved(given) or recipe),
        description=description,
        # Which kind of backbone it is, the recipe says; flags change its settings.
        config=(tyro.conf.AvoidSubcommands,),
        groups=_GROUPS,
    )
    return command.recipe, command.dry_run


def _saved(args: list[str]) -> Recipe | None:
    """The recipe that `--config` names; what else is wrong with the flags is told by the parser.

    Ends the program with one line where it can't be read.
    """
    places = [i for i, word in enumerate(args) if word.partition("=")[0] == "--config"]
    if not places:
        return None
    word, following = args[places[-1]], args[places[-1] + 1 :]
    file = word.partition("=")[2] or next(iter(following), "")
    try:
        return from_json(Recipe, upgrade_recipe(read_json(file)), file)
    except UserError as error:
        sys.exit(f"error: --config {error}")
