"""`casc bench train | inference | graph | loader | card`; train if nothing is said."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from casc.cli.card import CardCommand
from casc.cli.recipes import recipe_named
from casc.errors import UserError
from casc.printing import say

if TYPE_CHECKING:  # torch takes seconds to import, which --help needn't wait for
    from casc.bench.batch import Job, What

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class StepCommand:
    """What timing the training step and timing inference have in common."""

    canvas: tuple[int, int] = (800, 1088)
    """Height and width of the images in pixels, divisible by 32."""
    batch: int = 2
    """Images per step."""
    objects: int = 8
    """Objects per image."""
    capacity: int | None = None
    """Objects that a batch has room for; by default as many as it has."""
    steps: int = 5
    """Timed steps; their medians are reported."""
    against: tuple[str, ...] = ()
    """torchvision: its Mask R-CNN in turns with ours, in float32 and, if we don't run in
    float32, in autocast too. Anything else is a command whose last line is a JSON object
    with img_per_s; it runs before and after."""
    json: bool = False
    """Print one JSON object."""
    device: str = "auto"
    """auto: the accelerator if there is one, else the CPU. Or cpu, cuda, npu, ..."""
    dtype: Literal["auto", "fp32", "bf16", "float32", "bfloat16"] = "auto"
    """Of convolutions and matrix products; auto takes what suits the device."""
    compile: bool = True
    """Compile with torch.compile; --no-compile times the eager step."""
    cold: bool = True
    """Also time a first step without any cache; --no-cold saves those minutes."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    profile: Path | None = None
    """Afterwards trace three more steps into this file (.json.gz), for Perfetto."""


@dataclass(frozen=True)
class TrainCommand(StepCommand):
    """Time the training step, losses and gradients, on a made-up batch.

    The model is the reference's R50-FPN with fresh weights; nothing is read from disk.
    """

    positives: int | None = None
    """RoIs per image and stage that get a mask loss, at least: fresh weights find hardly more
    than the objects themselves, a trained network about 120."""

    def run(self) -> int:
        """Measure."""
        return _run("train", self, self.positives)


@dataclass(frozen=True)
class InferenceCommand(StepCommand):
    """Time inference, from images to boxes, scores, labels and 28x28 masks."""

    batch: int = 1
    """Images per step."""

    def run(self) -> int:
        """Measure."""
        return _run("inference", self, None)


@dataclass(frozen=True)
class GraphCommand:
    """What a step launches on a card, and the time that its memory and arithmetic bound it to.

    Needs no card: the step is lowered by Inductor as for one, in bfloat16, in some minutes. Mask
    heads run at full capacity. casc's own operators count with what they launch when eager.
    """

    what: Literal["train", "inference"] = "train"
    """The step: losses with their gradients, or detections."""
    card: Literal["a100", "h100", "b200"] = "h100"
    """Whose limits hold: casc/bench/cards.py."""
    recipe: str = "coco_1x"
    """Of which recipe (`casc recipes`), with what its own step does to images."""
    canvas: tuple[int, int] | None = None
    """Height and width of the images in pixels, divisible by 32; by default 800 x 1088, or the
    canvas of a recipe's large-scale jitter."""
    batch: int = 2
    """Images per step."""
    objects: int = 8
    """Objects that a batch has room for, per image."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Lower and count."""
        from casc.bench.cards import check_build
        from casc.config import to_json

        if self.batch < 1 or self.objects < 1:
            raise UserError("--batch and --objects must be at least 1")
        if self.canvas is not None:
            check_canvas(self.canvas)
        check_build()
        recipe = recipe_named(self.recipe)
        image, canvas = recipe.image, self.canvas or (800, 1088)
        if image.jitter is None:
            image = replace(image, short=min(canvas), long=max(canvas))
        else:
            size = image.jitter_size
            if self.canvas not in (None, (size, size)):
                raise UserError(f"--canvas: that of {self.recipe} is {size} {size}; leave it out")
            canvas = size, size
        job = {
            "what": self.what, "canvas": canvas, "batch": self.batch, "objects": self.objects,
            "card": self.card, "model": to_json(recipe.model), "image": to_json(image),
        }  # fmt: skip
        command = [sys.executable, "-m", "casc.bench.graph", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            say(done.stderr, sys.stderr)
            raise UserError("casc bench graph: the step can't be lowered; what torch says is above")
        report = json.loads(done.stdout.splitlines()[-1])
        say(json.dumps(report) if self.json else as_table(report))
        return 0


@dataclass(frozen=True)
class LoaderCommand:
    """Time the loader end to end: training batches from shards, by the number of workers.

    Measured by the clock, so keep the machine idle.
    """

    shards: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="[SHARDS]")]] = None
    """Folder made by `data_tools shard`; without it, generated images of 640 pixels."""
    split: str | None = None
    """Which split; by default the first with images to train on."""
    samples: int = 128
    """Images to generate, where there are no shards."""
    batch: int = 2
    """Images per batch."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of worker processes to try; 0 loads in this process."""
    seconds: float = 5
    """How long each number of workers is tried."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Measure."""
        from casc.bench.loader import bench_loader

        report = bench_loader(
            self.shards,
            self.split,
            batch=self.batch,
            workers=self.workers,
            seconds=self.seconds,
            generated=self.samples,
        )
        say(json.dumps(report) if self.json else as_table(report))
        return 0


def check_canvas(canvas: tuple[int, int]) -> None:
    """Refuse sizes that no level of the pyramid fits."""
    if min(canvas) < 32 or any(side % 32 for side in canvas):
        raise UserError(f"--canvas {canvas}: both sides must be multiples of 32")


Bench = (
    Annotated[TrainCommand, tyro.conf.subcommand("train", prefix_name=False)]
    | Annotated[InferenceCommand, tyro.conf.subcommand("inference", prefix_name=False)]
    | Annotated[GraphCommand, tyro.conf.subcommand("graph", prefix_name=False)]
    | Annotated[LoaderCommand, tyro.conf.subcommand("loader", prefix_name=False)]
    | Annotated[CardCommand, tyro.conf.subcommand("card", prefix_name=False)]
)


@dataclass(frozen=True)
class BenchCommand:
    """Time a part on this machine; `casc bench --json` means `casc bench train --json`.

    Examples: `casc bench --canvas 512 512`; `casc bench inference --device cpu`.
    """

    part: tyro.conf.OmitArgPrefixes[Bench]

    def run(self) -> int:
        """Measure."""
        return self.part.run()


def _run(what: "What", command: StepCommand, positives: int | None) -> int:
    report = _measure(what, command, positives)
    say(json.dumps(report) if command.json else as_table(report))
    return 0


def _measure(what: "What", command: StepCommand, positives: int | None) -> dict[str, Any]:
    from casc.bench.against import ratio, run_command, spread, take_turns
    from casc.bench.worker import Worker

    job = _job(what, command, positives)
    commands = [c for c in command.against if c != "torchvision"]
    before = {c: run_command(c) for c in commands}
    with ExitStack() as stack:
        cold, made = None, None
        if job.compile and command.cold:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="casc-bench-"))
            job = replace(job, cache=Path(folder))
            with Worker(job) as worker:
                cold = worker.step()["step_s"]
                worker.step()
                made = worker.compilations()
            _say(f"first step without a cache: {cold:.1f} s")
        peers = []
        if "torchvision" in command.against:
            dtypes = dict.fromkeys(("float32", job.dtype))
            peers = [replace(job, who="torchvision", dtype=d, cache=None) for d in dtypes]
        workers = [stack.enter_context(Worker(j)) for j in (job, *peers)]
        ours, *theirs = take_turns(workers, command.steps, _say)
        # What comes from the cache isn't compiled: the first process knows what there was.
        made = made or workers[0].compilations()
        facts, *their_facts = [worker.facts() for worker in workers]
        if command.profile:
            workers[0].trace(command.profile)
    report = _report(job, ours, facts | made)
    if job.compile:
        report |= {"compile_cold_s": cold, "compile_warm_s": ours.first["step_s"]}
    against: dict[str, Any] = {}
    for peer, timed, known in zip(peers, theirs, their_facts, strict=True):
        against[f"torchvision {peer.dtype}"] = {
            "img_per_s": peer.load.batch / timed.median("step_s"),
            "step_s": timed.median("step_s"),
            **known,
            "times_faster": ratio(ours, timed)._asdict(),
        }
    for name in commands:
        both = [before[name], run_command(name)]
        against[name] = both[-1] | {
            "times_faster": spread([report["img_per_s"] / r["img_per_s"] for r in both])._asdict()
        }
    return report | ({"against": against} if against else {})


def _job(what: "What", command: StepCommand, positives: int | None) -> "Job":
    from casc.bench.batch import Job, Load
    from casc.device.devices import choose_device, choose_dtype
    from casc.train.profile import check_profile

    for name, value, least in (
        ("batch", command.batch, 1), ("steps", command.steps, 1), ("objects", command.objects, 0),
        ("threads", command.threads, 1), ("positives", positives, 0),
        ("capacity", command.capacity, max(command.objects, positives or 0, 1)),
    ):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    check_canvas(command.canvas)
    check_profile(command.profile)
    device = choose_device(command.device)
    dtype = choose_dtype(PRECISIONS.get(command.dtype, command.dtype), device)
    load = Load(command.canvas, command.batch, command.objects, positives, command.capacity)
    name = str(dtype).removeprefix("torch.")
    return Job(what, "casc", load, name, str(device), command.compile, threads=command.threads)


def _report(job: "Job", timed: Any, facts: dict[str, Any]) -> dict[str, Any]:
    from casc.bench.against import spread

    seconds = timed.median("step_s")
    parts = {part: timed.median(part) for part in timed.first if part != "step_s"}
    report = {
        "what": job.what,
        "device": job.device,
        "dtype": job.dtype,
        "compiled": job.compile,
        "canvas": job.load.canvas,
        "batch": job.load.batch,
        "objects": job.load.objects,
        "img_per_s": job.load.batch / seconds,
        "step_s": seconds,
        "step_s_spread": spread([r["step_s"] for r in timed.rounds])._asdict(),
        **parts,
        **facts,
    }
    if "flops" in facts:
        report["mfu"] = facts["flops"] / seconds / facts["peak_flops"]
    return report


def as_table(report: dict[str, Any]) -> str:
    """A line per figure."""
    lines = []
    for name, value in _flat(report):
        lines.append(f"{name:<34} {value}")
    return "\n".join(lines)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            if set(value) == {"median", "low", "high"}:
                text = f"{value['median']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
                lines.append((prefix + name, text))
            else:
                lines += _flat(value, f"{prefix}{name}: " if prefix == "" else f"{prefix}{name} ")
        elif isinstance(value, float):
            lines.append((prefix + name, f"{value:.4g}"))
        elif isinstance(value, (list, tuple)):
            lines.append((prefix + name, " ".join(f"{v:.4g}" for v in value)))
        else:
            lines.append((prefix + name, str(value)))
    return lines


def _say(text: str) -> None:
    say(text, sys.stderr)


def with_default(arguments: Sequence[str]) -> list[str]:
    """`casc bench --json` means `casc bench train --json`."""
    arguments = list(arguments)
    if arguments[:1] == ["bench"]:
        rest = arguments[1:]
        if not rest or (rest[0].startswith("-") and rest[0] not in ("-h", "--help")):
            return ["bench", "train", *rest]
    return arguments
