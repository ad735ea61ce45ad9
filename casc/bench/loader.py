"""`casc bench loader`: images per second of a core, beside the usual way to load."""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import tyro

from casc.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, which --help needn't wait for
    from casc.data.index import Split


class Spread(NamedTuple):
    """Of a figure over the rounds."""

    median: float
    low: float
    high: float


class WorkerRate(NamedTuple):
    """What real worker processes deliver."""

    workers: int
    img_per_s: float
    """Of wall-clock time."""
    steps_per_s: float
    """Training steps that this feeds, one card with the given batch."""


class LoaderReport(NamedTuple):
    """What was measured. Rates without `workers` are per second of one core's time."""

    images: int
    megapixels: float
    """Mean stored size of the images."""
    objects: float
    """Mean number of objects to train on."""
    batch: int
    rounds: int
    img_per_s: Spread
    """Of casc's worker: read the tar, parse the JSON, decode, edges, pad and collate."""
    usual_img_per_s: Spread
    """Masks rasterised at the stored size and resized with the image."""
    usual_last_img_per_s: Spread
    """The same, but scaled polygons rasterised at the final size, which takes less time."""
    ratio: Spread
    """Of casc to the usual way, round by round."""
    ratio_last: Spread
    """Of casc to the second usual way."""
    shares: dict[str, float]
    """Of the worker's time by part; they sum to 1."""
    read_img_per_s: float
    """Of taking encoded samples out of tars, nothing else."""
    decode_img_per_s: dict[str, float]
    """By decoder, of the JPEGs in memory; pillow is casc's."""
    decoders_equal: dict[str, str]
    """In how many images each decoder's pixels equal Pillow's, and the largest difference."""
    workers: list[WorkerRate]
    cores: int


@dataclass(frozen=True)
class LoaderCommand:
    """Time the loader beside the usual way: PIL, torchvision's v2 transforms, pycocotools.

    Both read the same samples in turn, in this process on one thread, and are measured in
    processor time; worker processes are measured by the clock, so keep the machine idle.
    """

    shards: tyro.conf.Positional[Path | None] = None
    """Folder made by `data_tools shard`; without it, generated images of 640 pixels."""
    split: str | None = None
    """Which split; by default the first with images to train on."""
    samples: int = 128
    """Images per round."""
    rounds: int = 7
    """Rounds, in each of which every way loads all samples."""
    batch: int = 2
    """Images per batch."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Numbers of worker processes to try; 0 loads in this process. None: no such trial."""
    seconds: float = 5
    """How long each number of workers is tried."""
    json: bool = False
    """Print one JSON object."""

    def run(self) -> int:
        """Measure."""
        report = bench_loader(self)
        print(format_report(report, as_json=self.json), flush=True)
        return 0


def bench_loader(command: LoaderCommand) -> LoaderReport:
    """Measure.

    Raises:
        UserError: on numbers that make no sense, or a split that isn't there.
    """
    from casc.data.index import read_index

    if min(command.samples, command.rounds, command.batch) < 1 or command.seconds <= 0:
        raise UserError("--samples, --rounds, --batch and --seconds must be positive")
    if any(workers < 0 for workers in command.workers):
        raise UserError("--workers must be at least 0")
    with tempfile.TemporaryDirectory() as temporary, _one_thread():
        root = command.shards or _generate(Path(temporary), command.samples)
        splits = read_index(root).splits
        names = [name for name, split in splits.items() if split.train_samples]
        name = command.split or (names[0] if names else "")
        if name not in names:
            raise UserError(f"--split {name}: {root} has images to train on in {names}")
        return _measure(command, root, splits[name])


def format_report(report: LoaderReport, *, as_json: bool) -> str:
    """One JSON object, or a table."""
    if as_json:
        fields = report._asdict()
        named = {k: v._asdict() for k, v in fields.items() if isinstance(v, Spread)}
        return json.dumps({**fields, **named, "workers": [w._asdict() for w in report.workers]})

    def rate(name: str, found: Spread, *more: str) -> str:
        shown = f"{found.median:8.1f}  ({found.low:.1f} to {found.high:.1f})"
        return "  ".join([f"{name:<34}", shown, *more])

    lines = [
        f"{report.images} images of {report.megapixels:.2f} megapixels with {report.objects:.1f}"
        f" objects, batch {report.batch}, {report.rounds} rounds; median (lowest to highest)",
        "",
        "images per second of one core",
        rate("casc", report.img_per_s),
        rate("usual, masks resized", report.usual_img_per_s),
        rate("usual, polygons rasterised last", report.usual_last_img_per_s),
        rate("casc / usual, masks resized", report.ratio),
        rate("casc / usual, rasterised last", report.ratio_last),
        "",
        "casc's time: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in report.shares.items()),
        f"reading alone: {report.read_img_per_s:.0f} img/s",
        "",
        "JPEG decoder    img/s   pixels as Pillow's",
    ]
    for name, speed in report.decode_img_per_s.items():
        lines.append(f"{name:<12} {speed:8.1f}   {report.decoders_equal[name]}")
    if report.workers:
        lines += ["", f"workers    img/s  steps/s of {report.batch}   ({report.cores} cores)"]
    for found in report.workers:
        lines.append(f"{found.workers:7d} {found.img_per_s:8.1f} {found.steps_per_s:8.1f}")
    return "\n".join(lines)


def _measure(command: LoaderCommand, root: Path, split: "Split") -> LoaderReport:
    from casc.bench.decoders import agreement, decoders
    from casc.bench.loader_parts import choose, load, read_pairs, time_parts
    from casc.bench.loader_usual import load_usually
    from casc.data.sample import read_sample
    from casc.data.stream import ShardReader
    from casc.model.preprocess import ImageConfig

    work = choose(split, command.samples)
    pairs = [pair for pairs in read_pairs(root, split, work) for pair in pairs]
    shapes = [(s.image.size / 3e6, len(s.boxes)) for s in itertools.starmap(read_sample, pairs)]
    jpegs = [image for image, _ in pairs if image[:2] == b"\xff\xd8"]
    config = ImageConfig()

    def usual(rasterise_last: bool) -> None:
        flips = itertools.cycle([False, True])
        for part in read_pairs(root, split, work):
            for (image, record), flip in zip(part, flips, strict=False):
                load_usually(image, record, flip, config, rasterise_last=rasterise_last)

    def read() -> None:
        reader = ShardReader(root, split)
        for _, segment in work:
            reader.read(segment)

    ways: dict[str, Callable[[], object]] = {
        "casc": lambda: load(root, split, work, command.batch),
        "usual": lambda: usual(False),
        "usual_last": lambda: usual(True),
        "read": read,
    }
    found = decoders() if jpegs else {}
    for name, decoder in found.items():
        ways["decode " + name] = lambda decoder=decoder: [decoder(data) for data in jpegs]
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    parts: list[dict[str, float]] = []
    for _ in range(command.rounds):
        for name, way in ways.items():
            seconds[name].append(_time(way))
        parts.append(time_parts(root, split, work, command.batch))

    count = len(pairs)
    rates = {name: [count / t for t in times] for name, times in seconds.items()}
    medians = {name: statistics.median(p[name] for p in parts) for name in parts[0]}
    return LoaderReport(
        images=count,
        megapixels=statistics.mean(megapixels for megapixels, _ in shapes),
        objects=statistics.mean(objects for _, objects in shapes),
        batch=command.batch,
        rounds=command.rounds,
        img_per_s=_spread(rates["casc"]),
        usual_img_per_s=_spread(rates["usual"]),
        usual_last_img_per_s=_spread(rates["usual_last"]),
        ratio=_spread(_quotients(rates["casc"], rates["usual"])),
        ratio_last=_spread(_quotients(rates["casc"], rates["usual_last"])),
        shares={name: value / sum(medians.values()) for name, value in medians.items()},
        read_img_per_s=statistics.median(rates["read"]),
        decode_img_per_s={
            name: statistics.median(len(jpegs) / t for t in seconds["decode " + name])
            for name in found
        },
        decoders_equal={
            name: "{0.equal} of {0.images} equal, largest difference {0.largest}".format(
                agreement(decoder, jpegs)
            )
            for name, decoder in found.items()
        },
        workers=[_deliver(root, split, command, workers) for workers in command.workers],
        cores=len(os.sched_getaffinity(0)),
    )


def _deliver(root: Path, split: "Split", command: LoaderCommand, workers: int) -> WorkerRate:
    from casc.data.stream import TrainLoaderConfig, training_batches

    loading = TrainLoaderConfig(workers=workers)
    stream = training_batches(
        root, split, seed=0, steps=range(2**40), batch=command.batch, loading=loading
    )
    # What is ready when the clock starts must have been made at the same speed.
    for _ in range(2 * max(workers, 1) * loading.prefetch):
        next(stream)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < command.seconds:
        next(stream)
        steps += 1
    speed = steps / (time.perf_counter() - start)
    stream.close()
    return WorkerRate(workers, speed * command.batch, speed)


def _generate(folder: Path, samples: int) -> Path:
    from data_tools.cli import ShardCommand
    from data_tools.plan import Settings
    from data_tools.shard import Run, shard_dataset
    from data_tools.synth import SynthSettings, synthesise

    coco, out = folder / "coco", folder / "shards"
    synthesise(coco, {"train2017": max(samples, 8)}, SynthSettings(size=640))
    usual = ShardCommand(coco)
    settings = Settings(
        usual.aspects,
        usual.max_size,
        usual.samples_per_shard,
        usual.shard_mib,
        usual.trace_tolerance,
    )
    shard_dataset(coco, out, None, settings, Run(say=lambda text: None))
    return out


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _quotients(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _spread(values: list[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))
