"""A detector over a split of shards: what its detections are worth."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import groupby, takewhile
from threading import Event
from typing import Protocol

import torch

from casc.data.batch import Batch
from casc.data.evaluation_plan import plan_evaluation
from casc.data.index import Category, Index, canvas, read_index
from casc.data.loader_config import EvalLoaderConfig, RemoteConfig, check_loading
from casc.data.reader import read_shard
from casc.data.record import parse_record
from casc.data.remote import location
from casc.data.status import warn_on_stderr
from casc.data.stream import evaluation_batches
from casc.data.workers import BatchStream
from casc.device.devices import traits
from casc.distributed import ALONE, Ranks, gather
from casc.errors import UserError
from casc.evaluate.coco_eval import MAX_DETS, IouType, join
from casc.evaluate.coco_results import ImageDetections, write_results
from casc.evaluate.errors import check_hotcoco, find_errors
from casc.evaluate.ground_truth import ground_truth_from_samples, ground_truth_from_shards
from casc.evaluate.metrics import IOU_TYPES, Evaluation, accumulate
from casc.evaluate.workers import Truth, by_image, evaluate_images
from casc.model.detector_config import DetectorConfig, mask_stages
from casc.model.preprocess import ImageConfig


class Detector(Protocol):
    """What evaluation needs of a detector; `casc.inference.detector` makes them."""

    @property
    def model(self) -> DetectorConfig:
        """What it is."""
        ...

    @property
    def image(self) -> ImageConfig:
        """How images are resized."""
        ...

    @property
    def most(self) -> int | None:
        """The most detections of an image, if there is such a number."""
        ...

    @property
    def split(self) -> str:
        """What it was evaluated on when it was trained."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        ...

    def find(self, batches: Iterable[tuple[Batch, tuple[int, int]]]) -> Iterator[ImageDetections]:
        """Yield what is found in each image of batches in host memory, each with its canvas."""
        ...

    def check_classes(self, categories: Sequence[Category], where: str) -> None:
        """Refuse a data set of other classes."""
        ...


def evaluate(
    detector: Detector,
    shards: str | os.PathLike[str],
    split: str | None = None,
    *,
    batch: int = 2,
    max_dets: int = MAX_DETS,
    results: str | os.PathLike[str] | None = None,
    errors: bool = False,
    loading: EvalLoaderConfig | None = None,
    watch: Callable[[int], object] = lambda images: None,
) -> Evaluation:
    """Measure a detector's box and mask AP on shards, as COCO does; box AP if it has no masks.

    Args:
        detector: what to evaluate.
        shards: folder or URL of the shards.
        split: which split; by default the one that the detector was evaluated on in training.
        batch: images per step.
        max_dets: detections that count per image and class, pycocotools' maxDets.
        results: file to write the detections to, in COCO's results format.
        errors: also find the kinds of errors, and which classes are taken for each other.
        loading: how shards are read.
        watch: is told how many images each batch had.

    Raises:
        UserError: the shards have no such split, or other classes; and as `evaluate_split`.
    """
    if batch < 1:
        raise UserError(f"batch must be at least 1, not {batch}")
    most = detector.most
    if max_dets <= 10 or (most is not None and max_dets > max(most, MAX_DETS)):
        raise UserError(
            f"--max-dets {max_dets}: must be more than 10, and at most what the detector gives of"
            f" an image, {most}; --detections {max_dets} makes it give more"
        )
    if errors:
        check_hotcoco()
    loading = loading or EvalLoaderConfig()
    check_loading(loading)
    root = location(shards)
    index = read_index(root, loading)
    split = detector.split if split is None else split
    check_split(index, split, root)
    channels = index.splits[split].channels
    if channels != detector.image.channels:
        raise UserError(
            f"{root}: {split} has images of {channels} channels, the model was trained on"
            f" {detector.image.channels}; evaluate on shards made with `data_tools shard --channels"
            f" {detector.image.channels}`"
        )
    detector.check_classes(index.categories, root)
    evaluation = evaluate_split(
        detector,
        root,
        index,
        split,
        batch=batch,
        loading=loading,
        watch=watch,
        max_dets=max_dets,
        results=results,
        errors=errors,
    )
    assert evaluation is not None  # there is only this process
    return evaluation


def measured_types(model: DetectorConfig) -> tuple[IouType, ...]:
    """By which overlap a detector can be measured: boxes', and masks' where it has any."""
    return IOU_TYPES if mask_stages(model) else ("bbox",)


def check_split(index: Index, split: str, where: str) -> None:
    """Refuse a split that there isn't.

    Raises:
        UserError: naming those that there are.
    """
    if split not in index.splits:
        raise UserError(
            f"--split {split}: {where} has no such split; it has {', '.join(index.splits)}"
        )


def find_in_stream(
    detector: Detector,
    stream: BatchStream,
    sizes: list[tuple[int, int]],
    watch: Callable[[int], object] = lambda images: None,
) -> Iterator[ImageDetections]:
    """Yield what is found in each image of a stream.

    Args:
        detector: what to run.
        stream: from `evaluation_batches`.
        sizes: the canvas (H, W) of each of its buckets.
        watch: is told how many images each batch had.
    """

    def batches() -> Iterator[tuple[Batch, tuple[int, int]]]:
        for bucket, images in stream:
            yield images, sizes[bucket]
            watch(int((images.image_id >= 0).sum()))

    return detector.find(batches())


def evaluate_split(
    detector: Detector,
    root: str | os.PathLike[str],
    index: Index,
    split: str,
    *,
    batch: int,
    loading: EvalLoaderConfig,
    ranks: Ranks = ALONE,
    watch: Callable[[int], object] = lambda images: None,
    opened: Callable[[BatchStream], object] = lambda stream: None,
    warn: Callable[[str], object] = warn_on_stderr,
    point: Callable[[], object] = lambda: None,
    meet: Callable[[], object] = lambda: None,
    processes: int | None = None,
    max_dets: int = MAX_DETS,
    results: str | os.PathLike[str] | None = None,
    errors: bool = False,
) -> Evaluation | None:
    """COCO's figures of a split; ranks share the images, rank 0 has the result.

    Every rank matches its own images while its device computes the next ones, and sends
    what the figures need, some 30 bytes of a detection. So nothing but the sums is left to
    rank 0 in the end, and the others need not wait for it.

    Args:
        detector: what to evaluate.
        root: folder of the shards.
        index: of the shards.
        split: which split.
        batch: images per step.
        loading: how shards are read.
        ranks: the processes that share the work; all must call this.
        watch: is told how many images each batch had.
        opened: gets the stream of batches that are going to be read.
        warn: is told of downloads that had to be taken up again; by default stderr is.
        point: is called at least every second while this waits, and may raise to end it.
        meet: is called before ranks exchange anything, and may raise.
        processes: that paste and match beside this one; 0 does it in this one, and so does
            None for a split so small that starting them would take longer.
        max_dets: detections that count per image and class.
        results: file that rank 0 writes the detections to, in COCO's results format.
        errors: also find the kinds of errors.

    Raises:
        UserError: a shard is missing, damaged, or not what the index says; a worker has died;
            or a detection isn't finite.
    """
    buckets, image = index.splits[split].buckets, detector.image
    sizes = [canvas(bucket, image.short, image.long) for bucket in buckets]
    stream = evaluation_batches(
        root,
        index.splits[split],
        batch=batch,
        world=ranks.world,
        rank=ranks.rank,
        loading=loading,
        pin_memory=traits(detector.device).pin_memory,
        warn=warn,
    )
    opened(stream)
    samples = index.splits[split].samples
    if processes is None:
        processes = 2 if samples >= 500 * ranks.world else 0
    over = Event()
    with (
        closing(stream),
        stream.explained(),
        ThreadPoolExecutor(1, thread_name_prefix="truth") as reader,
    ):
        truth = reader.submit(_truth, root, index, split, batch, ranks, loading, warn, over)
        try:
            tally = evaluate_images(
                find_in_stream(detector, stream, sizes, watch),
                truth,
                processes=processes,
                iou_types=measured_types(detector.model),
                max_dets=max_dets,
                keep_results=errors or results is not None,
                point=point,
            )
        finally:
            over.set()  # nobody waits for the rest
    meet()
    tallies = gather(tally, ranks)
    if not ranks.main:
        return None
    tally = join(tallies)
    if len(tally.image_ids) != samples:
        raise UserError(
            f"{root}: {split} has {samples} images by its index, of which "
            f"{len(tally.image_ids)} were found in the shards"
        )
    if results is not None:
        write_results(list(tally.results), results)
    evaluation = accumulate(tally, {category.id: category.name for category in index.categories})
    if errors:
        every = ground_truth_from_shards(root, index, split, loading)
        found = find_errors(every, list(tally.results), list(tally.matches))
        evaluation = replace(evaluation, errors=found)
    return evaluation


def _truth(
    root: str | os.PathLike[str],
    index: Index,
    split: str,
    batch: int,
    ranks: Ranks,
    loading: RemoteConfig,
    warn: Callable[[str], object],
    over: Event,
) -> Truth:
    """The ground truth of all shards in which this rank has images."""
    shards = index.splits[split].shards
    plan = plan_evaluation(index.splits[split], batch=batch, world=ranks.world, rank=ranks.rank)
    mine = (segment.shard for step in plan for segment in step.segments)  # each in one piece
    samples = (s for i, _ in groupby(mine) for s in read_shard(root, shards[i], loading, warn))
    samples = takewhile(lambda _: not over.is_set(), samples)
    records = (parse_record(record, key) for key, _, record in samples)
    return by_image(ground_truth_from_samples(records, index.categories))
