"""A checkpoint over a split once more, for what a run's own evaluations don't keep.

Precision by recall, and the images on which it did best and worst, with what it found there.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from casc.data.decode import decode_image
from casc.data.index import Category, Index, Split, canvas
from casc.data.loader_config import EvalLoaderConfig
from casc.data.reader import read_shard
from casc.data.record import parse_record
from casc.data.stream import evaluation_batches
from casc.device.devices import traits
from casc.draw import draw_instances, draw_sample
from casc.evaluate.coco_eval import IouType, join, match, precision_at_recall
from casc.evaluate.coco_results import ImageDetections, Result, image_results
from casc.evaluate.errors import check_hotcoco, find_errors
from casc.evaluate.ground_truth import ground_truth_from_shards, usable_objects, with_masks
from casc.evaluate.metrics import Evaluation, accumulate
from casc.evaluate.run import find_in_stream, measured_types
from casc.evaluate.workers import Truth, by_image
from casc.inference.detector import Detector
from casc.report.quality import Quality, image_quality

_CHUNK = 16
PICTURE, SEEN_AT = 480, 280
"""Longest side of a picture in pixels, and on a page where two lie side by side."""


class Example(NamedTuple):
    """An image with its ground truth and what was found, drawn."""

    image_id: int
    file_name: str
    quality: Quality
    truth: np.ndarray
    """`[H, W, 3]` uint8."""
    predicted: np.ndarray
    """`[H, W, 3]` uint8."""


class ErrorAnalysis(NamedTuple):
    """What a checkpoint did on a split, or on a part of it."""

    images: int
    whole: int
    """Images of the split."""
    evaluation: Evaluation
    curves: dict[IouType, np.ndarray]
    """`[T, 101, K]` precision by IoU threshold, recall and class in order of their ids."""
    categories: list[Category]
    """The K classes."""
    worst: list[Example]
    best: list[Example]


def analyse(
    detector: Detector,
    root: str,
    index: Index,
    split: str,
    *,
    batch: int,
    loading: EvalLoaderConfig,
    threshold: float,
    count: int,
    limit: int | None = None,
    errors: bool = False,
    watch: Callable[[int], object] = lambda images: None,
) -> ErrorAnalysis:
    """Run a detector over a split and keep what a report shows.

    Args:
        detector: what to look at.
        root: folder or URL of the shards.
        index: of the shards.
        split: which split.
        batch: images per step.
        loading: how shards are read.
        threshold: detections below count for the curves, but not for an image's quality, and
            aren't drawn.
        count: how many of the best and of the worst images.
        limit: look at whole shards spread over the split, until they have so many images.
        errors: also find the kinds of errors, and which classes are taken for each other.
        watch: is told how many images each batch had.

    Raises:
        UserError: a shard can't be read, a detection isn't finite, or hotcoco isn't installed.
    """
    if errors:
        check_hotcoco()
    whole = index.splits[split].samples
    index = replace(index, splits={split: part_of(index.splits[split], limit)})
    every = ground_truth_from_shards(root, index, split, loading)
    truth = by_image(every)
    qualities: dict[int, Quality] = {}
    kept: dict[int, list[Result]] = {}
    tallies = []
    types = measured_types(detector.model)
    found_in_all: list[Result] = []

    stream = evaluation_batches(
        root,
        index.splits[split],
        batch=batch,
        world=1,
        rank=0,
        loading=loading,
        pin_memory=traits(detector.device).pin_memory,
    )
    image = detector.image
    sizes = [canvas(bucket, image.short, image.long) for bucket in index.splits[split].buckets]

    def chunks() -> Iterator[list[ImageDetections]]:
        with closing(stream), stream.explained():
            yield from _chunks(find_in_stream(detector, stream, sizes, watch))

    for chunk in chunks():
        results: list[Result] = []
        for found in chunk:
            mine = image_results(found, list(truth.categories))
            results += mine
            found_in_all += mine if errors else []
            sure = [result for result in mine if result["score"] >= threshold]
            kept[found.image_id] = sure
            qualities[found.image_id] = _quality(truth, found, sure, types)
        images = {found.image_id: truth.images[found.image_id] for found in chunk}
        annotations = [a for key in images for a in truth.annotations[key]]
        objects, skipped = usable_objects({"annotations": annotations}, images, truth.categories)
        tallies.append(match(images, truth.categories, objects, results, types, skipped))
    tally = join(tallies)
    evaluation = accumulate(tally, truth.categories)
    if errors:
        kinds = find_errors(every, found_in_all, types, threshold=threshold)
        evaluation = replace(evaluation, errors=kinds)
    ids = sorted(truth.categories)
    worst, best = extremes(qualities, count)
    shown = _draw(root, index, split, loading, {k: qualities[k] for k in (*worst, *best)}, kept)
    return ErrorAnalysis(
        images=len(qualities),
        whole=whole,
        evaluation=evaluation,
        curves={kind: precision_at_recall(m, ids, kind) for kind, m in tally.matches.items()},
        categories=[Category(key, truth.categories[key]) for key in ids],
        worst=[shown[key] for key in worst],
        best=[shown[key] for key in best],
    )


def part_of(split: Split, limit: int | None) -> Split:
    """Whole shards of a split, evenly spread over it, until they have `limit` images."""
    if limit is None or limit >= split.samples:
        return split
    for count in range(1, len(split.shards) + 1):
        places = {(2 * i + 1) * len(split.shards) // (2 * count) for i in range(count)}
        shards = tuple(split.shards[i] for i in sorted(places))
        samples = sum(shard.samples for shard in shards)
        if samples >= limit:
            return replace(split, shards=shards, samples=samples)
    return split


def extremes(qualities: dict[int, Quality], count: int) -> tuple[list[int], list[int]]:
    """Ids of the worst and of the best images, none of them in both.

    Of images that are equally well done, those with most objects come first.
    """
    rated = [
        (q.value, q.found + q.missed, key) for key, q in qualities.items() if q.value is not None
    ]
    low = sorted(rated, key=lambda entry: (entry[0], -entry[1], entry[2]))
    high = sorted(rated, key=lambda entry: (-entry[0], -entry[1], entry[2]))
    count = min(count, len(rated) // 2)
    worst = [key for *_, key in low[:count]]
    return worst, [key for *_, key in high if key not in worst][:count]


def _quality(
    truth: Truth, found: ImageDetections, results: list[Result], types: Sequence[IouType]
) -> Quality:
    images = {found.image_id: truth.images[found.image_id]}
    annotations = {"annotations": truth.annotations[found.image_id]}
    objects, _ = usable_objects(annotations, images, truth.categories)
    size = found.height, found.width
    if "segm" not in types:
        return image_quality(objects, results, size, "bbox")
    return image_quality(with_masks(objects, images)[0], results, size)


def _draw(
    root: str,
    index: Index,
    split: str,
    loading: EvalLoaderConfig,
    wanted: dict[int, Quality],
    kept: dict[int, list[Result]],
) -> dict[int, Example]:
    labels = {category.id: label for label, category in enumerate(index.categories)}
    shown: dict[int, Example] = {}
    channels = index.splits[split].channels
    for shard in index.splits[split].shards:
        if len(shown) == len(wanted):
            break
        for name, image, data in read_shard(root, shard, loading):
            record = parse_record(data, f"{shard.name}: {name}")
            key = record["image_id"]
            if key not in wanted or key in shown:
                continue
            results = kept[key]
            boxes = np.array([r["bbox"] for r in results], float).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            mine = [labels[r["category_id"]] for r in results]
            predicted = draw_instances(
                decode_image(image, record["orientation"], channels),
                boxes,
                [index.categories[label].name for label in mine],
                labels=mine,
                masks=[r.get("segmentation") for r in results],
                scores=[r["score"] for r in results],
                long_side=PICTURE,
                seen_at=SEEN_AT,
            )
            truth = draw_sample(image, record, index.categories, PICTURE, SEEN_AT, channels)
            shown[key] = Example(key, record["file_name"], wanted[key], truth, predicted)
    return shown


def _chunks(found: Iterable[ImageDetections]) -> Iterator[list[ImageDetections]]:
    stream = iter(found)
    while chunk := list(itertools.islice(stream, _CHUNK)):
        yield chunk
