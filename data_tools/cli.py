"""From annotations and images to shards, and back to pictures.

`data_tools COMMAND --help` explains a command.
"""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

from casc.arguments import overview, parse_arguments, reader_may_leave
from casc.data.index import ASPECTS, Index
from casc.data.loader_config import MOST_WORKERS, RemoteConfig, check_loading
from casc.data.status import warn_on_stderr
from casc.errors import UserError, told
from casc.printing import plain, say
from data_tools.parallel import default_workers, interrupt_once
from data_tools.report import format_findings, format_table

_LOST = {
    "missing_file": ("missing", "mend the paths"),
    "unreadable": ("unreadable", "mend the files"),
    "broken_file": ("without a whole XML or JSON file", "restore these"),
    "size_mismatch": ("of another shape than annotated", "mend their width and height"),
}
"""Findings of images that are left out: what they are, and what to do."""
_FEW_CROWDS = 0.1
"""Of the annotations; in COCO it is 1 in 100."""


@dataclass(frozen=True)
class ShardCommand:
    """Make webdataset tar shards and index.json from a data set with COCO annotations.

    Image bytes go in untouched. Interrupt it at any time and run it again: what is finished
    is kept. The same input gives the same bytes, whatever the number of workers.

    Examples: `data_tools shard COCO --out shards`; `data_tools shard COCO --splits val2017
    --max-size 1600`.
    """

    coco: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[FOLDER]")]] = None
    """The data set: annotations/instances_<split>.json and a folder <split>/ of images each; or as
    Roboflow, CVAT, Label Studio or FiftyOne lay out COCO's format; or of YOLO, LabelMe
    or Pascal VOC."""
    out: Path = Path("shards")
    """Folder for the shards. Splits that it holds already stay."""
    splits: tuple[str, ...] = ()
    """Which splits, such as train2017 val2017. None named: all that are found."""
    annotations: Path | None = None
    """This annotation file, in place of what lies in the data set's folder."""
    images: Path | None = None
    """Folder of the images that `annotations` lists; by default it is looked for."""
    split: str | None = None
    """What to call the split of `annotations`; by default after the file, or train."""
    negatives: Literal["skip", "keep"] = "skip"
    """Images without any annotation: for evaluation only, or trained on as background."""
    crowds: Literal["keep", "objects"] = "keep"
    """What is marked as a crowd: for evaluation only, as COCO means it, or objects like others, for
    CVAT marks all that was drawn with its brush so."""
    channels: int = 3
    """Of the images. 3: RGB. 1: grey or thermal. Others: planes, as bands of PNG or TIFF, as pages
    of a TIFF, or as npy files [height, width, channels] of 8 or 16 bits."""
    stretch: bool = False
    """Spread each 16-bit greyscale image's range of values over 8 bits, and store it as PNG;
    without it the upper 8 bits count."""
    val_share: float = 0.0
    """Hold so much of the images out as the split val, where the data set has one part only."""
    val_seed: int = 0
    """Chooses which images are held out."""
    skip_invalid: bool = False
    """Leave out annotations of COCO's files that can't be understood, and report them, instead of
    refusing."""
    allow_missing: bool = False
    """End with 0 even though more than 1 % of the images are missing, unreadable, of another shape
    than annotated, or have an XML or JSON file that is broken off."""
    aspects: tuple[float, ...] = field(default=ASPECTS)
    """Edges between buckets, width over height, ascending. No numbers: a single bucket.
    Images of a bucket share a canvas, for which the training step is compiled once."""
    max_size: int | None = None
    """Reduce images whose longer side exceeds this many pixels, and encode them again.
    Without it all images are stored as they are."""
    samples_per_shard: int = 64
    """Most images in a shard."""
    shard_mib: float = 256.0
    """About the most that a shard's images may weigh, in MiB."""
    trace_tolerance: float | None = None
    """Pixels by which polygons traced from RLE masks may deviate from them; 0 is exact, 0.5 gives
    far fewer edges. By default exact up to 500 edges, above within IoU 0.99 of the mask."""
    workers: int = field(default_factory=default_workers)
    """Processes."""
    progress: bool = True
    """Show progress bars (never shown where stderr isn't a terminal)."""

    def run(self) -> int:
        """Make the shards."""
        from data_tools.layouts import named_part
        from data_tools.plan import Settings
        from data_tools.shard import Run, shard_dataset

        root = self.coco or (self.annotations.parent if self.annotations else None)
        if root is None:
            say("data_tools shard: give the data set's folder, or --annotations", sys.stderr)
            return 2
        _check_workers(self.workers)
        settings = Settings(
            aspects=self.aspects,
            max_size=self.max_size,
            samples_per_shard=self.samples_per_shard,
            shard_mib=self.shard_mib,
            trace_tolerance=self.trace_tolerance,
            negatives=self.negatives == "keep",
            channels=self.channels,
            skip_invalid=self.skip_invalid,
            stretch=self.stretch,
            val_share=self.val_share,
            val_seed=self.val_seed,
            crowds=self.crowds == "keep",
        )
        run = Run(workers=self.workers, progress=self.progress, say=say)
        parts = None
        if self.annotations is not None:
            if self.splits:
                raise UserError("--splits: with --annotations use --split")
            parts = [named_part(self.annotations, self.images, self.split)]
        elif self.images is not None or self.split is not None:
            raise UserError("--images and --split go with --annotations FILE")
        splits = [part.split for part in parts] if parts else self.splits
        if self.val_share and splits:
            splits = [*splits, "val"]
        index = shard_dataset(root, self.out, self.splits or None, settings, run, parts)
        say(_describe(index, splits))
        say(f"shards are in {self.out}")
        if hint := _next(index, self.out):
            say(hint)
        return _verdict(index, splits, self.allow_missing)


@dataclass(frozen=True)
class CheckCommand:
    """Check shards against their index: sizes, hashes, counts, order, fields, decodability.

    Prints a line for each fault, and exits with 1 if there is any.

    Examples: `data_tools check shards`; `data_tools check shards --workers 8`.
    """

    shards: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SHARDS")]]
    """Folder with index.json, or its URL."""
    workers: int = field(default_factory=default_workers)
    """Processes."""
    progress: bool = True
    """Show progress bars (never shown where stderr isn't a terminal)."""
    loading: RemoteConfig = field(default_factory=RemoteConfig)

    def run(self) -> int:
        """Check the shards."""
        from data_tools.check import check_shards, fault_lines

        _check_workers(self.workers)
        check_loading(self.loading)
        checks = check_shards(
            self.shards,
            workers=self.workers,
            progress=self.progress,
            loading=self.loading,
            warn=warn_on_stderr,
        )
        faults = fault_lines(checks)
        for fault in faults:
            say(plain(fault), sys.stderr)
        rows = [["split", "shards", "images", "annotations", "faults"]]
        for name, check in checks.items():
            counts = check.shards, check.samples, check.annotations, len(check.faults)
            rows.append([name, *(f"{count:,}" for count in counts)])
        say(format_table(rows, right=[1, 2, 3, 4]))
        say(f"{len(faults)} faults" if faults else "all well")
        return 1 if faults else 0


@dataclass(frozen=True)
class SynthCommand:
    """Generate a data set in COCO's layout: overlapping textured shapes.

    The same seed gives the same images. For demonstrations and tests.

    Examples: `data_tools synth shapes`; `data_tools synth shapes --train 1200 --val 100 --size
    224`; `data_tools synth hard --hard`.
    """

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """Folder to make, with annotations/, train2017/ and val2017/."""
    train: int = 240
    """Images in train2017."""
    val: int = 60
    """Images in val2017."""
    size: int = 256
    """Longer side of the images in pixels."""
    classes: int | None = None
    """Kinds of shapes, 5 to 8, by default 6; with --hard 5 to 30, by default 30."""
    names: tuple[str, ...] = ()
    """These shapes, as many as you like, in place of `classes`: disc, triangle, square, star,
    cross, crescent, arrow, ring; with --hard polygon-N, spiked-N, flower-N, gear-N or frame-N, N
    from 3 to 8."""
    hard: bool = False
    """For comparing detectors: similar shapes, sizes of 1 to 20, more occlusion, clutter of no
    class, colours that say nothing, and three classes at most in an image."""
    seed: int = 0
    """Chooses all that is random."""
    progress: bool = True
    """Show progress bars (never shown where stderr isn't a terminal)."""

    def run(self) -> int:
        """Generate the data set."""
        from data_tools.synth import SIMILAR_CLASSES, SynthSettings, synthesise

        classes = self.classes
        if classes is None:
            classes = len(SIMILAR_CLASSES) if self.hard else SynthSettings().classes
        settings = SynthSettings(
            size=self.size, classes=classes, seed=self.seed, names=self.names, hard=self.hard
        )
        counts = {"train2017": self.train, "val2017": self.val}
        for line in synthesise(self.out, counts, settings, progress=self.progress):
            say(line)
        say(f"the data set is in {self.out}")
        return 0


@dataclass(frozen=True)
class ShowCommand:
    """Draw samples with boxes, masks and names: a contact sheet, or a page. Crowds are striped.

    Examples: `data_tools show shards`; `data_tools show shards --split val2017 --out
    show.html`.
    """

    shards: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SHARDS")]]
    """Folder with index.json, or its URL."""
    out: Path = Path("contact.png")
    """The PNG to write; or, ending in .html, one self-contained page, with annotations listed."""
    split: str | None = None
    """Which split, by default the first."""
    n: int = 16
    """How many samples."""
    seed: int = 0
    """Chooses the samples."""
    classes: tuple[str, ...] = ()
    """Only samples with an object of one of these classes, given by name."""
    ids: tuple[int, ...] = ()
    """These images, however many they are."""
    problems: tuple[str, ...] = ()
    """Only samples in which sharding found one of these, named as in index.json's report, such
    as rle_mask or degenerate_box; all: any of them."""
    cell: int = 480
    """Longer side of a picture, in pixels."""
    loading: RemoteConfig = field(default_factory=RemoteConfig)

    def run(self) -> int:
        """Draw them."""
        from data_tools.choose import Choice
        from data_tools.show import show_shards

        check_loading(self.loading)
        captions = show_shards(
            self.shards,
            self.out,
            Choice(self.n, self.seed, self.classes, self.ids, self.problems),
            split=self.split,
            cell=self.cell,
            loading=self.loading,
        )
        say(f"{len(captions)} samples are on {self.out}")
        return 0


Command = (
    Annotated[ShardCommand, tyro.conf.subcommand("shard")]
    | Annotated[CheckCommand, tyro.conf.subcommand("check")]
    | Annotated[SynthCommand, tyro.conf.subcommand("synth")]
    | Annotated[ShowCommand, tyro.conf.subcommand("show")]
)

_GROUPS = {
    "options": ("help", "out", ""),
    "what the data set is": (
        "annotations", "images", "channels", "stretch", "negatives", "crowds", "skip-invalid",
        "allow-missing", "val-share", "val-seed",
    ),
    "how shards are made": (
        "aspects", "max-size", "samples-per-shard", "shard-mib", "trace-tolerance", "workers",
        "progress",
    ),
    "reading shards": ("loading.",),
}  # fmt: skip
"""How `--help` of a command lists the flags."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 if all is well, 1 if not, 2 on wrong usage."""
    with reader_may_leave():
        _main(arguments)


def _main(arguments: Sequence[str] | None) -> NoReturn:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["-h"], ["--help"]):
        say(overview(Command, "data_tools", __doc__ or ""))
        sys.exit(0)
    command = parse_arguments(
        Command,
        given,
        prog="data_tools",
        description=__doc__,
        groups=_GROUPS,
    )
    # Batch systems end jobs with SIGTERM: stop in order then too.
    before = signal.signal(signal.SIGINT, interrupt_once)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        code = command.run()
    except BrokenPipeError:
        raise
    except (UserError, OSError, MemoryError) as error:
        say(plain(f"data_tools: {told(error)}"), sys.stderr)
        code = 1
    except KeyboardInterrupt:
        say("data_tools: interrupted; the same command takes it up again", sys.stderr)
        sys.exit(130)  # deaf to further interrupts
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(code)


def _check_workers(workers: int) -> None:
    if not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"--workers: expected 1 to {MOST_WORKERS}, got {workers}")


def _verdict(index: Index, splits: Sequence[str], allow_missing: bool) -> int:
    """Last lines, on stderr, of what is lost; 1 if it is too much."""
    code = 0
    for name, split in index.splits.items():
        if splits and name not in splits:
            continue
        findings, images = split.report["findings"], split.report["images"]["listed"]
        lost = sum(findings[kind]["count"] for kind in _LOST if kind in findings)
        counts = split.report["annotations"]
        crowds = findings.get("crowd", {}).get("count", 0)
        if crowds > _FEW_CROWDS * counts["stored"]:
            say(
                f"{name}: {crowds:,} of {counts['stored']:,} annotations are marked as crowds,"
                " which aren't trained on; CVAT marks so what was drawn with its brush:"
                " --crowds objects takes them for objects",
                sys.stderr,
            )
        shared = findings.get("in_other_split")
        if shared:
            say(
                f"{name}: {shared['count']:,} of {images:,} images are in another split too, which"
                f" makes figures look better than they are ({'; '.join(shared['examples'][:3])});"
                " take them out of one",
                sys.stderr,
            )
        if not counts["trained"]:
            without = counts.get("trained_without_masks", 0)
            what = f" with masks, {without:,} boxes with --model.masks none" if without else ""
            say(f"{name}: nothing of it can be trained on{what}; see its findings", sys.stderr)
        if lost:
            failed = lost > 0.01 * images and not allow_missing
            kinds = [words for kind, words in _LOST.items() if kind in findings]
            why = " or ".join(what for what, _ in kinds)
            mends = ", ".join(mend for _, mend in kinds)
            remedy = f"; {mends}, or say --allow-missing" if failed else ""
            say(
                f"{name}: {lost:,} of {images:,} images are lost, {why}{remedy}",
                sys.stderr,
            )
            code = max(code, int(failed))
    return code


def _next(index: Index, out: Path) -> str:
    """What to type next, where recipes' own names of splits and number of classes don't fit."""
    splits = index.splits
    counts = {name: split.report["annotations"] for name, split in splits.items()}
    kinds = ("trained", "trained_without_masks")
    train = next((n for n, c in counts.items() if any(c.get(kind) for kind in kinds)), None)
    if train is None or ("train2017" in splits and len(index.categories) == 80):
        return ""
    val = next((name for name in ("val2017", "val", "valid", *splits) if name in splits
                and name != train), None)  # fmt: skip
    evaluated = f" --val-split {val}" if val else " --evaluate-every 0"
    return (
        "to train on them (`casc recipes` lists what there is):"
        f" casc train RECIPE --data {out} --train-split {train}{evaluated}"
        f" --model.classes {len(index.categories)}"
        + ("" if counts[train]["trained"] else " --model.masks none")
        + ("" if val else "; --val-share 0.1 here would hold images out to measure on")
    )


def _describe(index: Index, splits: Sequence[str]) -> str:
    blocks: list[str] = []
    for name, split in index.splits.items():
        if splits and name not in splits:
            continue
        mib = sum(shard.bytes for shard in split.shards) / 2**20
        objects = split.report["annotations"]
        head = (
            f"\n{name}: {split.samples:,} images ({split.train_samples:,} to train on) with "
            f"{objects['stored']:,} annotations ({objects['trained']:,} to train on) "
            f"in {len(split.shards):,} shards, {mib:,.1f} MiB"
        )
        unlisted = split.report["images"]["unlisted_files"]
        if unlisted:
            head += f"\n{unlisted:,} files in its folder aren't listed by the annotation file"
        if not split.train_samples:
            head += "\nnothing of it can be trained on: see the findings below"
        rows = [["bucket", "aspect", "images", "canvas", "most objects", "edges"]]
        for b in split.buckets:
            top = "inf" if b.max_aspect is None else f"{b.max_aspect:.2f}"
            aspect = f"{b.min_aspect:.2f} to {top}"
            canvas = f"{b.width} x {b.height}"
            rows.append([b.name, aspect, f"{b.samples:,}", canvas, str(b.instances), str(b.edges)])
        table = format_table(rows, right=[2, 3, 4, 5])
        blocks.append(f"{head}\n\n{table}\n\n{format_findings(split.report['findings'])}\n")
    return "\n".join(blocks)
